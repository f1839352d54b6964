//! What Python may pass as a selection of labels, or as one of the named choices.

use pyo3::{
    exceptions::PyTypeError,
    prelude::*,
    types::{PyDict, PyMapping, PySequence, PyString},
};
use vmix::{ApplyTo, DType};

use crate::VMixError;

/// "all", "none", a label, a list of labels or a mapping label → weight.
pub struct Selection(pub vmix::Selection);

impl<'a, 'py> FromPyObject<'a, 'py> for Selection {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let wrong_type = || {
            PyTypeError::new_err(format!(
                "selection: expected None, a label, a list of labels or a mapping from label to \
                 weight, found {}",
                type_name(&object)
            ))
        };
        let selection = if object.is_instance_of::<PyString>() {
            match object.extract::<String>()?.as_str() {
                "all" => vmix::Selection::All,
                "none" => vmix::Selection::None,
                label => vmix::Selection::only([label]),
            }
        } else if let Ok(mapping) = object.cast::<PyMapping>() {
            let mut weights = Vec::new();
            for item in mapping.items()?.iter() {
                let (label, weight) = item.extract::<(Bound<'_, PyAny>, Bound<'_, PyAny>)>()?;
                let label: String = part("a label", &label)?;
                let expected = format!("a number for `{label}`");
                weights.push((label, part::<f32>(&expected, &weight)?));
            }
            vmix::Selection::weights(weights)
        } else if let Ok(sequence) = object.cast::<PySequence>() {
            let labels = sequence.to_list()?;
            let labels: PyResult<Vec<String>> =
                labels.iter().map(|l| part("a label", &l)).collect();
            vmix::Selection::only(labels?)
        } else {
            return Err(wrong_type());
        };
        Ok(Self(selection))
    }
}

/// One selection, or a list with one for every image of a batch.
pub enum Selections {
    One(vmix::Selection),
    Batch(Vec<vmix::Selection>),
}

impl<'a, 'py> FromPyObject<'a, 'py> for Selections {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        // A list of names is one selection: of all these labels.
        let is_text = object.is_instance_of::<PyString>();
        if let (false, Ok(sequence)) = (is_text, object.cast::<PySequence>()) {
            let items = sequence.to_list()?;
            let batch = items.iter().any(|item| !item.is_instance_of::<PyString>());
            if batch {
                let items = items.iter();
                let selections = items.map(|item| Ok(chosen(item.extract::<Option<Selection>>()?)));
                return selections.collect::<PyResult<_>>().map(Self::Batch);
            }
        }
        Ok(Self::One(object.extract::<Selection>()?.0))
    }
}

/// A key, weight or item of a selection; the error shows the one that is wrong.
fn part<'py, T: FromPyObjectOwned<'py>>(expected: &str, found: &Bound<'py, PyAny>) -> PyResult<T> {
    found.extract().map_err(|_| {
        let found = found
            .repr()
            .map_or_else(|_| type_name(found), |repr| repr.to_string());
        PyTypeError::new_err(format!("selection: expected {expected}, found {found}"))
    })
}

/// No selection means the file's own default weights.
pub fn chosen(selection: Option<Selection>) -> vmix::Selection {
    selection.map_or(vmix::Selection::Default, |selection| selection.0)
}

pub fn apply_to(name: &str) -> PyResult<ApplyTo> {
    ApplyTo::from_name(name).ok_or_else(|| unknown("apply_to", ApplyTo::NAMES, name))
}

pub fn dtype(name: &str) -> PyResult<DType> {
    DType::from_name(name).ok_or_else(|| unknown("dtype", DType::NAMES, name))
}

fn unknown(argument: &str, names: &[&str], found: &str) -> PyErr {
    let names = names.join(", ");
    VMixError::new_err(format!(
        "{argument}: expected one of {names}, found `{found}`"
    ))
}

/// label → weight, in the file's order.
pub fn weights<'py>(
    py: Python<'py>,
    labels: &vmix::Labels,
    weights: &[f32],
) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for (label, weight) in labels.iter().zip(weights) {
        dict.set_item(&label.name, weight)?;
    }
    Ok(dict)
}

pub fn type_name(object: &Bound<'_, PyAny>) -> String {
    let name = object.get_type().fully_qualified_name();
    name.map_or_else(|_| "an unknown type".to_owned(), |name| name.to_string())
}
