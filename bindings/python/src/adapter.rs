//! Adapters, their labels and layers.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use pyo3::{
    IntoPyObjectExt,
    prelude::*,
    types::{PyDict, PyMapping},
};
use vmix::Opened;

use crate::{
    VMixError,
    selection::{self, Selection, chosen},
    tensor::{Tensor, import},
    to_py,
    values::Values,
};

#[pyclass(module = "vmix", frozen)]
pub struct Adapter(pub vmix::Adapter);

#[pymethods]
impl Adapter {
    #[staticmethod]
    fn open(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        py.detach(|| vmix::Adapter::open(path))
            .map(Self)
            .map_err(to_py)
    }

    #[staticmethod]
    fn from_bytes(py: Python<'_>, data: Vec<u8>) -> PyResult<Self> {
        py.detach(|| vmix::Adapter::from_bytes(data))
            .map(Self)
            .map_err(to_py)
    }

    #[staticmethod]
    fn from_tensors(
        py: Python<'_>,
        tensors: &Bound<'_, PyMapping>,
        metadata: BTreeMap<String, String>,
    ) -> PyResult<Self> {
        let mut imported = BTreeMap::new();
        for item in tensors.items()?.iter() {
            let (name, tensor) = item.extract::<(String, Bound<'_, PyAny>)>()?;
            let tensor = import(&format!("tensor `{name}`"), &tensor)?;
            imported.insert(name, tensor);
        }
        py.detach(|| vmix::Adapter::from_tensors(&imported, &metadata))
            .map(Self)
            .map_err(to_py)
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
    fn context_dim(&self) -> usize {
        self.0.context_dim()
    }

    #[getter]
    fn projection(&self) -> &'static str {
        self.0.projection().name()
    }

    #[getter]
    fn value_weights(&self) -> &'static str {
        self.0.value_weights().name()
    }

    #[getter]
    fn apply_to(&self) -> &'static str {
        self.0.apply_to().name()
    }

    #[getter]
    fn trained(&self) -> &str {
        self.0.metadata().get("vmix.trained").map_or("no", |s| s)
    }

    #[getter]
    fn metadata(&self) -> BTreeMap<String, String> {
        self.0.metadata().clone()
    }

    fn tensors(&self, py: Python<'_>) -> PyResult<BTreeMap<String, Tensor>> {
        let tensors = py.detach(|| self.0.tensors()).map_err(to_py)?;
        let shared = |(name, tensor)| (name, Tensor(Arc::new(tensor)));
        Ok(tensors.into_iter().map(shared).collect())
    }

    #[pyo3(signature = (selection=None))]
    fn weights<'py>(
        &self,
        py: Python<'py>,
        selection: Option<Selection>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let weights = self.0.labels().weights(&chosen(selection)).map_err(to_py)?;
        selection::weights(py, self.0.labels(), &weights)
    }

    #[pyo3(signature = (selection=None))]
    fn aes_embed(&self, py: Python<'_>, selection: Option<Selection>) -> PyResult<Tensor> {
        let selection = chosen(selection);
        let f_t = py.detach(|| self.0.aes_embed(&selection)).map_err(to_py)?;
        Ok(Tensor(Arc::new(f_t)))
    }

    #[pyo3(signature = (selection=None))]
    fn project(&self, py: Python<'_>, selection: Option<Selection>) -> PyResult<Tensor> {
        let selection = chosen(selection);
        let f_a = py.detach(|| self.0.project(&selection)).map_err(to_py)?;
        Ok(Tensor(Arc::new(f_a)))
    }

    #[pyo3(signature = (
        selection=None, *, apply_to=None, dtype="float32", base=None
    ))]
    fn values(
        &self,
        py: Python<'_>,
        selection: Option<Selection>,
        apply_to: Option<&str>,
        dtype: &str,
        base: Option<PathBuf>,
    ) -> PyResult<Values> {
        let selection = chosen(selection);
        let apply_to = apply_to.map(selection::apply_to).transpose()?;
        let apply_to = apply_to.unwrap_or(self.0.apply_to());
        let dtype = selection::dtype(dtype)?;
        py.detach(|| match base {
            None => self.0.values(&selection, apply_to, dtype),
            Some(base) => {
                let base = vmix::Checkpoint::open(base)?;
                self.0.values_on(&base, &selection, apply_to, dtype)
            }
        })
        .map(Values)
        .map_err(to_py)
    }

    fn validate(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.validate()).map_err(to_py)
    }

    fn __repr__(&self) -> String {
        let names: Vec<_> = self.0.labels().iter().map(|label| &label.name).collect();
        let experimental = match self.0.projection() {
            vmix::ProjectionKind::Difference => ", training-free (EXPERIMENTAL)",
            vmix::ProjectionKind::Learned => "",
        };
        format!(
            "Adapter(base={}, labels={names:?}{experimental})",
            self.0.base()
        )
    }
}

/// Opens an adapter or a preset; the file's own metadata says which it is.
#[pyfunction]
pub fn open(py: Python<'_>, path: PathBuf) -> PyResult<Py<PyAny>> {
    match py.detach(|| vmix::open(path)).map_err(to_py)? {
        Opened::Adapter(adapter) => Adapter(adapter).into_py_any(py),
        Opened::Preset(values) => Values(values).into_py_any(py),
        _ => unreachable!("the crate in this workspace opens adapters and presets"),
    }
}

/// The cross-attention layers of "sd15" or "sdxl".
#[pyfunction]
pub fn unet_layers(base: &str) -> PyResult<Vec<Layer>> {
    let known = vmix::Base::from_name(base).and_then(vmix::Base::layers);
    known.map(|known| layers(&known)).ok_or_else(|| {
        VMixError::new_err(format!("base: expected one of sd15, sdxl, found `{base}`"))
    })
}

/// The LDM path of a diffusers path; None if it is not one of a spatial transformer's parts.
#[pyfunction]
#[pyo3(signature = (name, layers_per_block=2))]
pub fn ldm_name(name: &str, layers_per_block: usize) -> Option<String> {
    vmix::ldm_name(name, layers_per_block)
}

#[pyclass(module = "vmix", frozen, get_all)]
pub struct Label {
    name: String,
    dimension: String,
    positive: String,
    negative: String,
    default: f32,
    neutral: Option<f32>,
    display_names: BTreeMap<String, String>,
}

#[pymethods]
impl Label {
    fn __repr__(&self) -> String {
        format!("Label({:?}, dimension={:?})", self.name, self.dimension)
    }
}

pub fn labels(labels: &vmix::Labels) -> Vec<Label> {
    let convert = |label: &vmix::Label| Label {
        name: label.name.clone(),
        dimension: label.dimension.clone(),
        positive: label.positive.clone(),
        negative: label.negative.clone(),
        default: label.default,
        neutral: label.neutral,
        display_names: label.display_names.clone(),
    };
    labels.iter().map(convert).collect()
}

#[pyclass(module = "vmix", frozen, get_all)]
pub struct Layer {
    name: String,
    ldm_name: Option<String>,
    inner_dim: usize,
}

#[pymethods]
impl Layer {
    fn __repr__(&self) -> String {
        format!("Layer({:?}, inner_dim={})", self.name, self.inner_dim)
    }
}

pub fn layers(layers: &vmix::Layers) -> Vec<Layer> {
    let convert = |layer: &vmix::Layer| Layer {
        name: layer.name.clone(),
        ldm_name: layer.ldm_name.clone(),
        inner_dim: layer.inner_dim,
    };
    layers.iter().map(convert).collect()
}
