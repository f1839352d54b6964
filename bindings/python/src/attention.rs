//! Value-mixed attention over tensors of any library, read where they lie.

use std::sync::Arc;

use half::{bf16, f16};
use pyo3::prelude::*;
use vmix::{Attention, DType, Data, TensorViewMut, threads};

use crate::{
    VMixError,
    tensor::{Borrowed, Tensor},
    to_py,
};

#[derive(FromPyObject)]
pub enum Strength {
    One(f32),
    Each(Vec<f32>),
}

#[pyfunction]
#[pyo3(signature = (
    query, key, value, aes_value=None, strength=Strength::One(1.0), heads=None,
    *, scale=None, mask=None, query_mask=None,
))]
#[pyo3(
    text_signature = "(query, key, value, aes_value=None, strength=1.0, heads=None, \
    *, scale=None, mask=None, query_mask=None)"
)]
#[allow(clippy::too_many_arguments)]
pub fn attention(
    py: Python<'_>,
    query: &Bound<'_, PyAny>,
    key: &Bound<'_, PyAny>,
    value: &Bound<'_, PyAny>,
    aes_value: Option<&Bound<'_, PyAny>>,
    strength: Strength,
    heads: Option<usize>,
    scale: Option<f32>,
    mask: Option<&Bound<'_, PyAny>>,
    query_mask: Option<&Bound<'_, PyAny>>,
) -> PyResult<Tensor> {
    let optional = |name, object: Option<&Bound<'_, PyAny>>| {
        object.map(|object| Borrowed::new(name, object)).transpose()
    };
    let query = Borrowed::new("query", query)?;
    let key = Borrowed::new("key", key)?;
    let value = Borrowed::new("value", value)?;
    let aes_value = optional("aes_value", aes_value)?;
    let mask = optional("mask", mask)?;
    let query_mask = optional("query_mask", query_mask)?;

    let shape = query.shape()?;
    // Which dimensions are which, from the last one.
    let order = match (shape.len(), heads) {
        (3, Some(_)) => [Some(2), Some(1), None, Some(0)],
        (4, None) => [Some(3), Some(1), Some(2), Some(0)],
        (3, None) => {
            let message = "heads: expected a number, since query has three dimensions, found none";
            return Err(VMixError::new_err(message));
        }
        _ => {
            let expected = "shape [batch, tokens, heads · head dim] with heads, or [batch, heads, \
                            tokens, head dim] without";
            return Err(query.wrong_shape(expected));
        }
    };
    for tensor in [&key, &value] {
        if tensor.shape()?.len() != shape.len() {
            return Err(tensor.wrong_shape("as many dimensions as query has"));
        }
    }
    let mut attention = Attention::new(
        query.view(order, heads)?,
        key.view(order, heads)?,
        value.view(order, heads)?,
    );
    if let Some(aes_value) = &aes_value {
        if !(2..=3).contains(&aes_value.shape()?.len()) {
            let expected = "shape [context tokens, heads · head dim], or one for each batch entry";
            return Err(aes_value.wrong_shape(expected));
        }
        attention.aes_value = Some(aes_value.view([Some(2), Some(1), None, Some(0)], None)?);
    }
    if let Some(mask) = &mask {
        if !(2..=4).contains(&mask.shape()?.len()) {
            return Err(mask.wrong_shape("shape [batch, heads, queries, keys], or fewer of these"));
        }
        attention.mask = Some(mask.view([Some(3), Some(1), Some(2), Some(0)], None)?);
    }
    if let Some(query_mask) = &query_mask {
        if query_mask.shape()?.len() != 2 {
            return Err(query_mask.wrong_shape("shape [batch, queries]"));
        }
        attention.query_mask = Some(query_mask.view([Some(1), Some(0), None, None], None)?);
    }
    attention.scale = scale;
    attention.strength = match &strength {
        Strength::One(strength) => std::slice::from_ref(strength),
        Strength::Each(each) => each,
    };

    let count = shape.iter().product();
    if count == 0 {
        return Err(query.wrong_shape("at least one row and one query"));
    }
    // Not zeroed: all of it will be written, and of large results zeros are a tenth of the time.
    let mut data = match query.dtype {
        DType::F32 => Data::F32(Vec::with_capacity(count)),
        DType::F16 => Data::F16(Vec::<f16>::with_capacity(count)),
        DType::BF16 => Data::BF16(Vec::<bf16>::with_capacity(count)),
    };
    let pointer: *mut u8 = match &mut data {
        Data::F32(v) => v.as_mut_ptr().cast(),
        Data::F16(v) => v.as_mut_ptr().cast(),
        Data::BF16(v) => v.as_mut_ptr().cast(),
    };
    let of = attention.query.shape();
    let [_, queries, heads, dim] = of.map(|size| size as isize);
    let strides = match shape.len() {
        3 => [queries * heads * dim, heads * dim, dim, 1],
        _ => [queries * heads * dim, dim, queries * dim, 1],
    };
    // SAFETY: as many elements as the shape has, dense, in a vector that nobody else has; `forward`
    // reads nothing of its output.
    let output = unsafe { TensorViewMut::from_raw("output", pointer, query.dtype, of, strides) };
    let mut output = output.map_err(to_py)?;
    py.detach(|| attention.forward(&mut output, None))
        .map_err(to_py)?;
    // SAFETY: the capacity of each, all of which a `forward` without error has written.
    unsafe {
        match &mut data {
            Data::F32(v) => v.set_len(count),
            Data::F16(v) => v.set_len(count),
            Data::BF16(v) => v.set_len(count),
        }
    }
    Ok(Tensor(Arc::new(vmix::Tensor::new(shape, data))))
}

#[pyfunction]
pub fn set_num_threads(count: usize) {
    threads::set(count);
}

#[pyfunction]
pub fn get_num_threads() -> usize {
    threads::count()
}
