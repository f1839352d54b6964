//! Adapters, their labels and layers.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use pyo3::{
    IntoPyObjectExt,
    prelude::*,
    types::{PyDict, PyIterator, PyList, PyMapping},
};
use vmix::Opened;

use crate::{
    VMixError,
    init::Untrained,
    selection::{self, Selection, Selections, chosen},
    tensor::{Tensor, import},
    to_py,
    values::{Values, to_key_error},
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
        let tensors = import_all(tensors)?;
        py.detach(|| vmix::Adapter::from_tensors(&tensors, &metadata))
            .map(Self)
            .map_err(to_py)
    }

    #[staticmethod]
    #[pyo3(signature = (tensors, metadata, dtype="float32"))]
    fn from_matrices(
        py: Python<'_>,
        tensors: &Bound<'_, PyMapping>,
        metadata: BTreeMap<String, String>,
        dtype: &str,
    ) -> PyResult<Self> {
        let tensors = import_all(tensors)?;
        let dtype = selection::dtype(dtype)?;
        py.detach(|| vmix::Adapter::from_matrices(&tensors, &metadata, dtype))
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
    fn context_dim(&self) -> Option<usize> {
        self.0.context_dim()
    }

    #[getter]
    fn coefficient_kind(&self) -> &'static str {
        self.0.coefficient_kind().name()
    }

    #[getter]
    fn row_sides(&self) -> Vec<(Option<String>, &'static str)> {
        let name = |i: usize| self.0.labels()[i].name.clone();
        let sides = self.0.row_sides().iter();
        sides
            .map(|row| (row.label().map(name), row.side()))
            .collect()
    }

    #[getter]
    fn dtype(&self) -> &'static str {
        self.0.dtype().name()
    }

    #[getter]
    fn apply_to(&self) -> &'static str {
        self.0.apply_to().name()
    }

    /// `vmix.made`, how the file was made.
    #[getter]
    fn made<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let made = &self.0.metadata()["vmix.made"];
        py.import("json")?.call_method1("loads", (made,))
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
        let weights = self.0.weights(&chosen(selection)).map_err(to_py)?;
        selection::weights(py, self.0.labels(), &weights)
    }

    #[pyo3(signature = (selection=None))]
    fn opposite<'py>(
        &self,
        py: Python<'py>,
        selection: Option<Selection>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let weights = self.0.opposite(&chosen(selection)).map_err(to_py)?;
        selection::weights(py, self.0.labels(), &weights)
    }

    #[pyo3(signature = (selection=None))]
    fn coefficients(&self, py: Python<'_>, selection: Option<Selections>) -> PyResult<Tensor> {
        let selections = selection.unwrap_or(Selections::One(vmix::Selection::Default));
        py.detach(|| match selections {
            Selections::One(selection) => self.0.coefficients(&selection),
            Selections::Batch(batch) => self.0.batch_coefficients(&batch),
        })
        .map(|a| Tensor(Arc::new(a)))
        .map_err(to_py)
    }

    #[getter]
    fn rows(&self) -> Rows {
        Rows(self.0.clone())
    }

    #[pyo3(signature = (selection=None))]
    fn aes_embed(&self, selection: Option<Selection>) -> PyResult<Option<Tensor>> {
        let f_t = self.0.aes_embed(&chosen(selection)).map_err(to_py)?;
        Ok(f_t.map(|f_t| Tensor(Arc::new(f_t))))
    }

    #[pyo3(signature = (selection=None))]
    fn project(&self, selection: Option<Selection>) -> PyResult<Option<Tensor>> {
        let f_a = self.0.project(&chosen(selection)).map_err(to_py)?;
        Ok(f_a.map(|f_a| Tensor(Arc::new(f_a))))
    }

    #[pyo3(signature = (selection=None, *, apply_to=None, dtype="float32"))]
    fn values(
        &self,
        py: Python<'_>,
        selection: Option<Selection>,
        apply_to: Option<&str>,
        dtype: &str,
    ) -> PyResult<Values> {
        let selection = chosen(selection);
        let apply_to = apply_to.map(selection::apply_to).transpose()?;
        let apply_to = apply_to.unwrap_or(self.0.apply_to());
        let dtype = selection::dtype(dtype)?;
        py.detach(|| self.0.values(&selection, apply_to, dtype))
            .map(Values)
            .map_err(to_py)
    }

    fn __repr__(&self) -> String {
        let names: Vec<_> = self.0.labels().iter().map(|label| &label.name).collect();
        format!("Adapter(base={}, labels={names:?})", self.0.base())
    }
}

fn import_all(tensors: &Bound<'_, PyMapping>) -> PyResult<BTreeMap<String, vmix::Tensor>> {
    let mut imported = BTreeMap::new();
    for item in tensors.items()?.iter() {
        let (name, tensor) = item.extract::<(String, Bound<'_, PyAny>)>()?;
        let tensor = import(&format!("tensor `{name}`"), &tensor)?;
        imported.insert(name, tensor);
    }
    Ok(imported)
}

/// Whether it is the diffusers or LDM name of a layer.
pub fn is_layer(layers: &vmix::Layers, name: &Bound<'_, PyAny>) -> bool {
    name.extract::<&str>()
        .is_ok_and(|name| layers.contains(name))
}

/// The diffusers names of layers, as an iterator of Python's.
pub fn layer_names<'py>(
    layers: &vmix::Layers,
    py: Python<'py>,
) -> PyResult<Bound<'py, PyIterator>> {
    let names = layers.iter().map(|layer| &layer.name);
    PyList::new(py, names.collect::<Vec<_>>())?.try_iter()
}

/// B of every layer, as a mapping from layer name to tensor.
#[pyclass(module = "vmix", frozen, mapping)]
pub struct Rows(vmix::Adapter);

#[pymethods]
impl Rows {
    fn __getitem__(&self, layer: &str) -> PyResult<Tensor> {
        let rows = self.0.rows(layer).map_err(to_key_error)?;
        Ok(Tensor(Arc::clone(rows)))
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
}

/// One adapter with some labels of one or several.
#[pyfunction]
#[pyo3(signature = (adapters, labels=None))]
pub fn merge_adapters(
    py: Python<'_>,
    adapters: Vec<PyRef<'_, Adapter>>,
    labels: Option<Vec<String>>,
) -> PyResult<Adapter> {
    let adapters: Vec<_> = adapters.iter().map(|adapter| adapter.0.clone()).collect();
    let names: Option<Vec<&str>> = labels
        .as_ref()
        .map(|labels| labels.iter().map(String::as_str).collect());
    py.detach(|| vmix::merge(&adapters, names.as_deref()))
        .map(Adapter)
        .map_err(to_py)
}

/// Opens any VMix file; its own metadata says what it is.
#[pyfunction]
pub fn open(py: Python<'_>, path: PathBuf) -> PyResult<Py<PyAny>> {
    match py.detach(|| vmix::open(path)).map_err(to_py)? {
        Opened::Adapter(adapter) => Adapter(adapter).into_py_any(py),
        Opened::Preset(values) => Values(values).into_py_any(py),
        Opened::Untrained(untrained) => Untrained(untrained).into_py_any(py),
        _ => unreachable!("the crate in this workspace opens no other files"),
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
    positive: Vec<String>,
    negative: Vec<String>,
    default: f32,
    neutral: Option<f32>,
    range: (f32, f32),
    step: f32,
    effect: BTreeMap<String, f64>,
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
        range: label.range.into(),
        step: label.step,
        effect: label.effect.clone(),
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
