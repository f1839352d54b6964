//! V_a of every layer for one selection of labels (paper, eq. 7).

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    ApplyTo, Base, DType, Labels, Layers, Result, Tensor,
    file::{File, View},
    metadata::Common,
    product::Rows,
    projection::Sizes,
};

/// V_a \[C, inner_dim\] of every cross-attention layer for one selection: all that a host needs.
/// Cheap to clone, and usable from many threads at once.
#[derive(Debug, Clone)]
pub struct Values(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    common: Common,
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

/// The adapter file that values were made from, known by its SHA-256.
#[derive(Debug)]
pub(crate) enum Origin {
    /// A mapped file, hashed when somebody asks: that reads all of it.
    Mapped(Arc<File>),
    /// As a preset records it.
    Hash(String),
}

impl Origin {
    pub fn of(file: &Arc<File>) -> Self {
        // Values must not keep alive the whole adapter that a host has freed.
        if file.is_in_memory() {
            Self::Hash(file.sha256().to_owned())
        } else {
            Self::Mapped(file.clone())
        }
    }

    pub fn sha256(&self) -> &str {
        match self {
            Self::Mapped(file) => file.sha256(),
            Self::Hash(hash) => hash,
        }
    }
}

impl Values {
    pub(crate) fn new(
        common: Common,
        layers: Layers,
        weights: Vec<f32>,
        origin: Origin,
        inherited: BTreeMap<String, String>,
        tensors: Vec<LayerValues>,
    ) -> Self {
        Self(Arc::new(Inner {
            common,
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
        self.0.common.apply_to
    }

    /// Element type of all V_a.
    pub fn dtype(&self) -> DType {
        self.0.tensors[0].cond.dtype()
    }

    /// SHA-256 of the adapter file they were made from, in hexadecimal. For values fresh from a
    /// mapped adapter the first call reads that whole file.
    pub fn origin(&self) -> &str {
        self.0.origin.sha256()
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

/// V_a = f_a·W_Vaᵀ of one layer for one or two stacked contexts \[C or 2·C, d\], in f32, rounded to
/// `dtype` at the end. The error says what was not finite.
pub(crate) fn layer_values(
    contexts: &Rows,
    sizes: Sizes,
    weight: View<'_>,
    dtype: DType,
) -> std::result::Result<LayerValues, String> {
    let (tokens, inner_dim) = (sizes.tokens, weight.shape[0]);
    let mut out = contexts.times_transposed(weight)?;
    let uncond = out.split_off(tokens * inner_dim);
    let finish = |values: Vec<f32>| {
        let tensor = Tensor::rounded([tokens, inner_dim], values, dtype);
        if !tensor.is_finite() {
            return Err(format!(
                "values that overflow {dtype} at these label weights"
            ));
        }
        Ok(Arc::new(tensor))
    };
    Ok(LayerValues {
        cond: finish(out)?,
        uncond: (!uncond.is_empty()).then(|| finish(uncond)).transpose()?,
    })
}
