//! V_a of every layer for one selection of labels (paper, eq. 7).

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    ApplyTo, Base, DType, Labels, Layers, Result, Tensor,
    file::{File, View},
    metadata::Common,
    projection::Sizes,
    tensor::widen,
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

/// Rows of W_Va that are widened to f32 at a time: 1 MB at SDXL's width, so the scratch stays in
/// cache and nothing the size of a weight is ever allocated.
const ROWS: usize = 128;

/// V_a = f_a·W_Vaᵀ of one layer for one or two stacked contexts \[C or 2·C, d\], in f32, rounded to
/// `dtype` at the end. The error says what was not finite.
pub(crate) fn layer_values(
    contexts: &[f32],
    sizes: Sizes,
    weight: View<'_>,
    dtype: DType,
) -> std::result::Result<LayerValues, String> {
    let Sizes { tokens, dim, .. } = sizes;
    let rows = contexts.len() / dim;
    let inner_dim = weight.shape[0];
    let mut out = vec![0f32; rows * inner_dim];
    let mut block = vec![0f32; ROWS.min(inner_dim) * dim];
    for (index, bytes) in weight
        .bytes
        .chunks(ROWS * dim * weight.dtype.size())
        .enumerate()
    {
        let block = &mut block[..bytes.len() / weight.dtype.size()];
        widen(weight.dtype, bytes, block);
        if !block.iter().all(|x| x.is_finite()) {
            return Err("NaN or infinity".to_owned());
        }
        multiply(contexts, block, dim, &mut out[index * ROWS..], inner_dim);
    }
    if !out.iter().all(|x| x.is_finite()) {
        return Err("weights that overflow float32".to_owned());
    }
    let uncond = out.split_off(tokens * inner_dim);
    let finish = |values: Vec<f32>| {
        let tensor = Tensor::rounded([tokens, inner_dim], values, dtype);
        if !tensor.is_finite() {
            return Err(format!("values that overflow {dtype}"));
        }
        Ok(Arc::new(tensor))
    };
    Ok(LayerValues {
        cond: finish(out)?,
        uncond: (!uncond.is_empty()).then(|| finish(uncond)).transpose()?,
    })
}

/// out\[m, n\] = Σ_k lhs\[m, k\]·rhs\[n, k\], where rows of `out` are `out_stride` apart.
fn multiply(lhs: &[f32], rhs: &[f32], k: usize, out: &mut [f32], out_stride: usize) {
    let (m, n) = (lhs.len() / k, rhs.len() / k);
    assert!(m * k == lhs.len() && n * k == rhs.len() && n <= out_stride);
    assert!(out.len() >= (m - 1) * out_stride + n);
    let signed = |stride: usize| isize::try_from(stride).expect("slices are shorter than isize");
    // SAFETY: with the strides given, `out` is read and written at [0, (m-1)·out_stride + n) and
    // `lhs` and `rhs` are read at [0, m·k) and [0, n·k), all inside their slices as asserted above;
    // `out` is borrowed mutably, so nothing aliases it.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            signed(out_stride),
            false,
            lhs.as_ptr(),
            1,
            signed(k),
            rhs.as_ptr(),
            signed(k),
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            // The layers are what runs in parallel.
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multiply_is_the_plain_triple_loop() {
        let (m, n, k, stride) = (3, 5, 7, 6);
        let lhs: Vec<f32> = (0..m * k).map(|i| i as f32 - 9.0).collect();
        let rhs: Vec<f32> = (0..n * k).map(|i| (i % 11) as f32).collect();
        let mut out = vec![-1.0; (m - 1) * stride + n];
        multiply(&lhs, &rhs, k, &mut out, stride);
        for i in 0..m {
            for j in 0..stride {
                let expected = if j < n {
                    // Small whole numbers: exact in any order of summation.
                    (0..k).map(|l| lhs[i * k + l] * rhs[j * k + l]).sum()
                } else {
                    -1.0
                };
                if let Some(found) = out.get(i * stride + j) {
                    assert_eq!(*found, expected, "[{i}, {j}]");
                }
            }
        }
    }
}
