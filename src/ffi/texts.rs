//! The strings that a handle lends to C.

use std::{
    collections::BTreeMap,
    ffi::{CStr, CString, c_char},
    sync::OnceLock,
};

use super::{
    argument::index,
    boundary::{Failure, Result, c_string},
    types::*,
};
use crate::{Labels, Layers};

/// C strings of what a handle was made from.
#[derive(Debug)]
pub(super) struct Texts {
    labels: Vec<LabelTexts>,
    layers: Vec<LayerTexts>,
    metadata: OnceLock<BTreeMap<CString, CString>>,
}

#[derive(Debug)]
struct LabelTexts {
    name: CString,
    dimension: CString,
    positive: CString,
    negative: CString,
    display_names: BTreeMap<CString, CString>,
    neutral: f32,
    range: [f32; 2],
    step: f32,
}

#[derive(Debug)]
struct LayerTexts {
    name: CString,
    ldm_name: Option<CString>,
    inner_dim: usize,
}

impl Texts {
    pub fn new(labels: &Labels, layers: &Layers) -> Self {
        let labels = labels.iter().map(|label| LabelTexts {
            name: c_string(&label.name),
            dimension: c_string(&label.dimension),
            positive: c_string(&label.positive.join("\n")),
            negative: c_string(&label.negative.join("\n")),
            display_names: c_strings(&label.display_names),
            neutral: label.neutral.unwrap_or(f32::NAN),
            range: label.range,
            step: label.step,
        });
        let layers = layers.iter().map(|layer| LayerTexts {
            name: c_string(&layer.name),
            ldm_name: layer.ldm_name.as_deref().map(c_string),
            inner_dim: layer.inner_dim,
        });
        Self {
            labels: labels.collect(),
            layers: layers.collect(),
            metadata: OnceLock::new(),
        }
    }

    pub fn label(&self, i: usize, weights: &[f32]) -> Result<VmixLabel> {
        let label = index("label", &self.labels, i)?;
        Ok(VmixLabel {
            struct_size: size_of::<VmixLabel>(),
            name: label.name.as_ptr(),
            dimension: label.dimension.as_ptr(),
            positive: label.positive.as_ptr(),
            negative: label.negative.as_ptr(),
            weight: weights[i],
            neutral: label.neutral,
            low: label.range[0],
            high: label.range[1],
            step: label.step,
        })
    }

    pub fn display_name(&self, i: usize, language: &CStr) -> Result<*const c_char> {
        let label = index("label", &self.labels, i)?;
        let what = format!(
            "display name of label `{}` in",
            label.name.to_string_lossy()
        );
        find(&what, &label.display_names, language)
    }

    pub fn layer(&self, i: usize) -> Result<VmixLayer> {
        let layer = index("layer", &self.layers, i)?;
        Ok(VmixLayer {
            struct_size: size_of::<VmixLayer>(),
            name: layer.name.as_ptr(),
            ldm_name: match &layer.ldm_name {
                Some(name) => name.as_ptr(),
                None => std::ptr::null(),
            },
            inner_dim: layer.inner_dim,
        })
    }

    /// The value of a metadata key; `all` is asked once.
    pub fn metadata(
        &self,
        key: &CStr,
        all: impl FnOnce() -> BTreeMap<String, String>,
    ) -> Result<*const c_char> {
        let metadata = self.metadata.get_or_init(|| c_strings(&all()));
        find("metadata key", metadata, key)
    }
}

fn c_strings(map: &BTreeMap<String, String>) -> BTreeMap<CString, CString> {
    map.iter()
        .map(|(key, value)| (c_string(key), c_string(value)))
        .collect()
}

fn find(what: &str, map: &BTreeMap<CString, CString>, key: &CStr) -> Result<*const c_char> {
    map.get(key).map(|value| value.as_ptr()).ok_or_else(|| {
        let known: Vec<_> = map.keys().map(|key| key.to_string_lossy()).collect();
        let known = known.join(", ");
        let message = format!("no {what} `{}`; known: {known}", key.to_string_lossy());
        Failure::new(VmixStatus::NotFound, message)
    })
}
