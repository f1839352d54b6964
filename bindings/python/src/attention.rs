//! Value-mixed attention over tensors of any library.

use std::sync::Arc;

use pyo3::prelude::*;

use crate::{
    tensor::{Tensor, import},
    to_py,
};

#[pyfunction]
pub fn attention(
    query: &Bound<'_, PyAny>,
    key: &Bound<'_, PyAny>,
    value: &Bound<'_, PyAny>,
    aes_value: &Bound<'_, PyAny>,
    strength: f32,
    heads: usize,
) -> PyResult<Tensor> {
    let py = query.py();
    let query = import("query", query)?;
    let key = import("key", key)?;
    let value = import("value", value)?;
    let aes_value = import("aes_value", aes_value)?;
    py.detach(|| vmix::attention(&query, &key, &value, &aes_value, strength, heads))
        .map(|out| Tensor(Arc::new(out)))
        .map_err(to_py)
}
