//! Init files, and the text encoders they are made with.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use pyo3::{
    exceptions::{PyTypeError, PyUserWarning},
    prelude::*,
    types::PyString,
};
use vmix::Labels;

use crate::{
    VMixError,
    adapter::{Label, labels},
    tensor::Tensor,
    to_py,
};

#[pyclass(module = "vmix", frozen)]
pub struct Untrained(pub vmix::Untrained);

#[pymethods]
impl Untrained {
    #[staticmethod]
    fn open(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        py.detach(|| vmix::Untrained::open(path))
            .map(Self)
            .map_err(to_py)
    }

    #[staticmethod]
    fn from_bytes(data: Vec<u8>) -> PyResult<Self> {
        vmix::Untrained::from_bytes(data).map(Self).map_err(to_py)
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
    fn context_tokens(&self) -> usize {
        self.0.context_tokens()
    }

    #[getter]
    fn context_dim(&self) -> usize {
        self.0.context_dim()
    }

    #[getter]
    fn aes_emb(&self) -> Tensor {
        Tensor(Arc::new(self.0.aes_emb().clone()))
    }

    /// diffusers name → LDM name of every layer, for bases that no table has.
    #[getter]
    fn ldm_names<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        // Elsewhere the key is ignored, whatever it says.
        let names = match self.0.base() {
            vmix::Base::Other => &*self.0.metadata()["vmix.ldm_names"],
            _ => "{}",
        };
        py.import("json")?.call_method1("loads", (names,))
    }

    #[getter]
    fn metadata(&self) -> BTreeMap<String, String> {
        self.0.metadata().clone()
    }

    fn __repr__(&self) -> String {
        let names: Vec<_> = self.0.labels().iter().map(|label| &label.name).collect();
        format!("Untrained(base={}, labels={names:?})", self.0.base())
    }
}

/// A path to a `labels.toml`, a list of labels as they are typed, or None for the default ones.
fn read_labels(given: Option<&Bound<'_, PyAny>>) -> PyResult<Labels> {
    let Some(given) = given else {
        return Ok(Labels::standard());
    };
    if !given.is_instance_of::<PyString>()
        && let Ok(entries) = given.extract::<Vec<String>>()
    {
        let entries = entries.iter().map(String::as_str);
        return Labels::from_entries(entries).map_err(to_py);
    }
    let expected = "labels: expected a path to a labels.toml, or a list of texts";
    let path: PathBuf = given
        .extract()
        .map_err(|_| PyTypeError::new_err(expected))?;
    if !path.exists() {
        let found = path.display();
        return Err(VMixError::new_err(format!(
            "{expected}, found no file {found}"
        )));
    }
    Labels::open_toml(path).map_err(to_py)
}

/// The labels of a `labels.toml` or of a list of texts; without either the default ones.
#[pyfunction]
#[pyo3(signature = (source=None))]
pub fn read_label_list(source: Option<&Bound<'_, PyAny>>) -> PyResult<Vec<Label>> {
    Ok(labels(&read_labels(source)?))
}

/// The start of a training, for a checkpoint and a list of labels.
#[pyfunction]
#[pyo3(signature = (base, labels=None, *, progress=None))]
pub fn init_adapter(
    py: Python<'_>,
    base: PathBuf,
    labels: Option<&Bound<'_, PyAny>>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Untrained> {
    let labels = read_labels(labels)?;
    let checkpoint = py.detach(|| vmix::Checkpoint::open(base)).map_err(to_py)?;
    let encoder = py.detach(|| checkpoint.text_encoder()).map_err(to_py)?;
    for warning in encoder.warnings(&labels).map_err(to_py)? {
        let warning = std::ffi::CString::new(warning).expect("labels have no NUL characters");
        PyErr::warn(py, &py.get_type::<PyUserWarning>(), &warning, 1)?;
    }
    let mut failure = None;
    let untrained = py.detach(|| {
        vmix::init_adapter(&checkpoint, &labels, |done, total| {
            if let (Some(progress), None) = (&progress, &failure) {
                failure = Python::attach(|py| progress.call1(py, (done, total)).err());
            }
        })
    });
    match failure {
        Some(error) => Err(error),
        None => untrained.map(Untrained).map_err(to_py),
    }
}

#[pyclass(module = "vmix", frozen)]
pub struct Tokenizer(vmix::Tokenizer);

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> Self {
        Self(vmix::Tokenizer::clip())
    }

    #[staticmethod]
    fn open(py: Python<'_>, folder: PathBuf) -> PyResult<Self> {
        py.detach(|| vmix::Tokenizer::open(folder))
            .map(Self)
            .map_err(to_py)
    }

    fn encode(&self, text: &str) -> PyResult<Vec<u32>> {
        self.0.encode(text).map_err(to_py)
    }

    #[getter]
    fn max_tokens(&self) -> usize {
        self.0.max_tokens()
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }

    fn why_not_rare(&self, text: &str) -> PyResult<Option<String>> {
        self.0.why_not_rare(text).map_err(to_py)
    }
}

/// The merges of OpenAI's CLIP, one `a b` per line, after a line of comment.
#[pyfunction]
pub fn clip_merges() -> &'static str {
    vmix::CLIP_MERGES
}

#[pyclass(module = "vmix", frozen)]
pub struct TextEncoder(vmix::TextEncoder);

#[pymethods]
impl TextEncoder {
    #[staticmethod]
    fn open(py: Python<'_>, base: PathBuf) -> PyResult<Self> {
        py.detach(|| vmix::TextEncoder::open(base))
            .map(Self)
            .map_err(to_py)
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
    fn tokenizers(&self) -> Vec<Tokenizer> {
        self.0.tokenizers().cloned().map(Tokenizer).collect()
    }

    fn features(&self, py: Python<'_>, texts: Vec<String>) -> PyResult<Tensor> {
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        py.detach(|| self.0.features(&texts, |_, _| ()))
            .map(|features| Tensor(Arc::new(features)))
            .map_err(to_py)
    }

    #[pyo3(signature = (ids, model=0))]
    fn encode(&self, py: Python<'_>, ids: Vec<Vec<u32>>, model: usize) -> PyResult<ClipOutput> {
        let model = self.0.models().nth(model).ok_or_else(|| {
            let count = self.0.models().len();
            crate::VMixError::new_err(format!("model: expected below {count}, found {model}"))
        })?;
        let output = py.detach(|| model.encode(&ids)).map_err(to_py)?;
        let tensor = |tensor| Tensor(Arc::new(tensor));
        Ok(ClipOutput {
            last: Py::new(py, tensor(output.last))?,
            penultimate: Py::new(py, tensor(output.penultimate))?,
            pooled: Py::new(py, tensor(output.pooled))?,
            projected: output
                .projected
                .map(|projected| Py::new(py, tensor(projected)))
                .transpose()?,
        })
    }
}

#[pyclass(module = "vmix", frozen, get_all)]
pub struct ClipOutput {
    last: Py<Tensor>,
    penultimate: Py<Tensor>,
    pooled: Py<Tensor>,
    projected: Option<Py<Tensor>>,
}

/// The command `vmix`; the first argument is its name.
#[pyfunction]
pub fn run_command(py: Python<'_>, arguments: Vec<std::ffi::OsString>) -> u8 {
    py.detach(|| vmix::cli::status(arguments))
}
