//! V_a of every layer, as a mapping from layer name to tensor.

use std::{path::PathBuf, sync::Arc};

use pyo3::{
    exceptions::PyKeyError,
    prelude::*,
    types::{PyDict, PyIterator},
};

use crate::{
    adapter::{Label, Layer, is_layer, labels, layer_names, layers},
    selection,
    tensor::Tensor,
    to_py,
};

#[pyclass(module = "vmix", frozen, mapping)]
pub struct Values(pub vmix::Values);

#[pymethods]
impl Values {
    #[staticmethod]
    fn open(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        py.detach(|| vmix::Values::open(path))
            .map(Self)
            .map_err(to_py)
    }

    #[staticmethod]
    fn from_bytes(py: Python<'_>, data: Vec<u8>) -> PyResult<Self> {
        py.detach(|| vmix::Values::from_bytes(data))
            .map(Self)
            .map_err(to_py)
    }

    /// It never changes, so a copy is the thing itself.
    fn __copy__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __deepcopy__(slf: Py<Self>, _memo: &Bound<'_, PyAny>) -> Py<Self> {
        slf
    }

    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        py.detach(|| self.0.save(path)).map_err(to_py)
    }

    #[getter]
    fn base(&self) -> &'static str {
        self.0.base().name()
    }

    #[getter]
    fn labels(&self) -> Vec<Label> {
        labels(self.0.labels())
    }

    #[getter]
    fn layers(&self) -> Vec<Layer> {
        layers(self.0.layers())
    }

    #[getter]
    fn context_tokens(&self) -> usize {
        self.0.context_tokens()
    }

    #[getter]
    fn apply_to(&self) -> &'static str {
        self.0.apply_to().name()
    }

    #[getter]
    fn selection<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        selection::weights(py, self.0.labels(), self.0.weights())
    }

    #[getter]
    fn dtype(&self) -> &'static str {
        self.0.dtype().name()
    }

    #[getter]
    fn origin(&self) -> &str {
        self.0.origin()
    }

    fn uncond(&self, layer: &str) -> PyResult<Option<Tensor>> {
        let tensor = self.0.get_uncond(layer).map_err(to_key_error)?;
        Ok(tensor.map(|tensor| Tensor(Arc::clone(tensor))))
    }

    fn __getitem__(&self, layer: &str) -> PyResult<Tensor> {
        let tensor = self.0.get(layer).map_err(to_key_error)?;
        Ok(Tensor(Arc::clone(tensor)))
    }

    fn __contains__(&self, layer: &Bound<'_, PyAny>) -> bool {
        is_layer(self.0.layers(), layer)
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyIterator>> {
        layer_names(self.0.layers(), py)
    }

    fn __len__(&self) -> usize {
        self.0.layers().len()
    }

    fn __repr__(&self) -> String {
        format!(
            "Values(base={}, layers={}, dtype={}, apply_to={})",
            self.0.base(),
            self.0.layers().len(),
            self.0.dtype(),
            self.0.apply_to()
        )
    }
}

/// Mappings raise KeyError, whose text Python shows in quotes.
pub fn to_key_error(error: vmix::Error) -> PyErr {
    PyKeyError::new_err(error.to_string())
}
