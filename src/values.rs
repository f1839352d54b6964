//! V_a of every layer for one selection of labels (paper, eq. 7).

use std::{collections::BTreeMap, sync::Arc};

use crate::{ApplyTo, Base, DType, Labels, Layers, Result, Tensor, file::File, metadata::Common};

/// V_a \[C, inner_dim\] of every cross-attention layer for one selection: all that a host needs.
/// Cheap to clone, and usable from many threads at once.
#[derive(Debug, Clone)]
pub struct Values(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    common: Common,
    apply_to: ApplyTo,
    layers: Layers,
    /// w_i of every label.
    weights: Vec<f32>,
    origin: Origin,
    /// Metadata that is only handed on.
    inherited: BTreeMap<String, String>,
    tensors: Vec<LayerValues>,
}

/// V_a of one layer; that of the unconditional pass only with [`ApplyTo::Contrast`].
#[derive(Debug)]
pub(crate) struct LayerValues {
    pub cond: Arc<Tensor>,
    pub uncond: Option<Arc<Tensor>>,
}

/// The adapter file that values were made from.
#[derive(Debug, Clone)]
pub(crate) enum Origin {
    /// Its SHA-256, as a preset records it.
    Known(String),
    /// The file itself. Hashing takes about as long as the values, and few hosts ask for it.
    File(Arc<File>),
}

impl Values {
    pub(crate) fn new(
        common: Common,
        apply_to: ApplyTo,
        layers: Layers,
        weights: Vec<f32>,
        origin: Origin,
        inherited: BTreeMap<String, String>,
        tensors: Vec<LayerValues>,
    ) -> Self {
        Self(Arc::new(Inner {
            common,
            apply_to,
            layers,
            weights,
            origin,
            inherited,
            tensors,
        }))
    }

    pub(crate) fn common(&self) -> &Common {
        &self.0.common
    }

    pub(crate) fn inherited(&self) -> &BTreeMap<String, String> {
        &self.0.inherited
    }

    pub(crate) fn tensors(&self) -> &[LayerValues] {
        &self.0.tensors
    }

    /// The kind of U-Net the values are for.
    pub fn base(&self) -> Base {
        self.0.common.base
    }

    /// The labels of the adapter they were made from.
    pub fn labels(&self) -> &Labels {
        &self.0.common.labels
    }

    /// The weight of every label, in the order of [`Values::labels`].
    pub fn weights(&self) -> &[f32] {
        &self.0.weights
    }

    /// The layers, down to up.
    pub fn layers(&self) -> &Layers {
        &self.0.layers
    }

    /// C, the tokens of one chunk of context; longer contexts repeat V_a.
    pub fn context_tokens(&self) -> usize {
        self.0.common.context_tokens
    }

    /// Which passes of classifier-free guidance the values are for.
    pub fn apply_to(&self) -> ApplyTo {
        self.0.apply_to
    }

    /// Element type of all V_a.
    pub fn dtype(&self) -> DType {
        self.0.tensors[0].cond.dtype()
    }

    /// SHA-256 of the adapter file they were made from, in hexadecimal.
    pub fn origin(&self) -> &str {
        match &self.0.origin {
            Origin::Known(hash) => hash,
            Origin::File(file) => file.sha256(),
        }
    }

    pub(crate) fn shared_origin(&self) -> Origin {
        self.0.origin.clone()
    }

    /// V_a \[C, inner_dim\] of the layer with this diffusers or LDM name.
    pub fn get(&self, layer: &str) -> Result<&Arc<Tensor>> {
        Ok(&self.0.tensors[self.0.layers.index(layer)?].cond)
    }

    /// V_a of the unconditional pass; `None` unless [`Values::apply_to`] is [`ApplyTo::Contrast`].
    pub fn get_uncond(&self, layer: &str) -> Result<Option<&Arc<Tensor>>> {
        Ok(self.0.tensors[self.0.layers.index(layer)?].uncond.as_ref())
    }
}
