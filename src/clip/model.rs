//! One CLIP text model, computed from weights that stay in their file.

use candle_core::{D, DType, Device, Tensor};
use candle_nn::{LayerNorm, Module, ops::sigmoid, ops::softmax_last_dim};

use super::{Activation, ClipConfig, names::Names};
use crate::{
    Error, Result, component::Component, file::View, product::times_transposed_in_parallel,
    tensor::widen,
};

/// A CLIP text model. Its weights are read where they lie, in f32, f16 or bf16, block by block while
/// it computes in f32; what a result does not need is not read.
#[derive(Debug, Clone)]
pub struct ClipTextModel {
    config: ClipConfig,
    weights: Component,
    names: Names,
}

/// What a text model says of a batch of B texts of T tokens at most.
#[derive(Debug, Clone)]
pub struct ClipOutput {
    /// Hidden states after the last block and the final LayerNorm, \[B, T, d\].
    pub last: crate::Tensor,
    /// Hidden states before the last block, without the LayerNorm, \[B, T, d\].
    pub penultimate: crate::Tensor,
    /// `last` at the first end of text, \[B, d\].
    pub pooled: crate::Tensor,
    /// `pooled` times the text projection, \[B, p\], if the file has one.
    pub projected: Option<crate::Tensor>,
}

/// Which hidden states of a text model a U-Net receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hidden {
    /// After the last block and the final LayerNorm: SD1.5.
    Last,
    /// Before the last block: SDXL.
    Penultimate,
}

impl ClipTextModel {
    pub(super) fn new(
        weights: Component,
        names: Names,
        config: Option<ClipConfig>,
    ) -> Result<Self> {
        let config = match config {
            Some(config) => config,
            None => ClipConfig::infer(&weights, &names)?,
        };
        let model = Self {
            config,
            weights,
            names,
        };
        // Before anything is allocated by what a configuration says.
        let ClipConfig {
            vocab_size,
            hidden_size: d,
            intermediate_size,
            num_hidden_layers,
            max_positions,
            ..
        } = model.config;
        let weights = &model.weights;
        weights.tensor_of_shape(&model.names.token_embedding(), &[vocab_size, d])?;
        weights.tensor_of_shape(&model.names.position_embedding(), &[max_positions, d])?;
        let last = format!("{}.weight", model.names.fc1(num_hidden_layers - 1));
        weights.tensor_of_shape(&last, &[intermediate_size, d])?;
        Ok(model)
    }

    /// Its sizes.
    pub fn config(&self) -> &ClipConfig {
        &self.config
    }

    /// All that the model says of some token sequences, each of which ends with its end of text.
    /// Shorter ones are filled up with that token, as pipelines do.
    pub fn encode(&self, texts: &[Vec<u32>]) -> Result<ClipOutput> {
        let d = self.config.hidden_size;
        let rows = texts.len();
        let tokens = self.tokens(texts)?;
        let layers = self.config.num_hidden_layers;
        let penultimate = self.blocks(self.embed(texts, tokens)?, 0..layers - 1, &mut || ())?;
        let last = self.blocks(penultimate.clone(), layers - 1..layers, &mut || ())?;
        let last = self.final_norm(&last)?;
        let pooled = at_ends(&last, texts)?;
        let projected = self.project(&pooled)?;
        let ours = |tensor: &Tensor, shape: Vec<usize>| -> Result<crate::Tensor> {
            let values = tensor.flatten_all()?.to_vec1()?;
            Ok(crate::Tensor::rounded(shape, values, crate::DType::F32))
        };
        Ok(ClipOutput {
            last: ours(&last, vec![rows, tokens, d])?,
            penultimate: ours(&penultimate, vec![rows, tokens, d])?,
            pooled: ours(&pooled, vec![rows, d])?,
            projected: projected
                .map(|projected| ours(&projected, vec![rows, projected.dim(1)?]))
                .transpose()?,
        })
    }

    /// \[B, d\]: the hidden states at the first end of text. Attention is causal, so that nothing
    /// after it matters and no text is computed any longer than the longest of them.
    pub(crate) fn features(
        &self,
        texts: &[Vec<u32>],
        hidden: Hidden,
        progress: &mut dyn FnMut(),
    ) -> Result<Tensor> {
        let x = self.embed(texts, self.tokens(texts)?)?;
        let blocks = self.block_count(hidden);
        let x = at_ends(&self.blocks(x, 0..blocks, progress)?, texts)?;
        match hidden {
            Hidden::Last => self.final_norm(&x),
            Hidden::Penultimate => Ok(x),
        }
    }

    /// How many blocks the hidden states need: how often `features` reports progress.
    pub(crate) fn block_count(&self, hidden: Hidden) -> usize {
        match hidden {
            Hidden::Last => self.config.num_hidden_layers,
            Hidden::Penultimate => self.config.num_hidden_layers - 1,
        }
    }

    /// T, the length of the longest text.
    fn tokens(&self, texts: &[Vec<u32>]) -> Result<usize> {
        let tokens = texts.iter().map(Vec::len).max().unwrap_or(0);
        let most = self.config.max_positions;
        if tokens == 0 || texts.iter().any(Vec::is_empty) || tokens > most {
            return Err(Error::argument(
                "texts",
                format!("at least one, of 1 to {most} tokens each"),
                format!("{} of up to {tokens} tokens", texts.len()),
            ));
        }
        Ok(tokens)
    }

    /// \[B, T, d\]: the sum of token and position embeddings.
    fn embed(&self, texts: &[Vec<u32>], tokens: usize) -> Result<Tensor> {
        let ClipConfig {
            vocab_size,
            hidden_size: d,
            max_positions,
            ..
        } = self.config;
        let name = self.names.token_embedding();
        let embedding = self.weights.tensor_of_shape(&name, &[vocab_size, d])?;
        let row = d * embedding.dtype.size();
        let mut x = vec![0.0; texts.len() * tokens * d];
        for (text, x) in texts.iter().zip(x.chunks_exact_mut(tokens * d)) {
            let fill = *text.last().expect("no text is empty");
            let ids = text.iter().chain(std::iter::repeat(&fill));
            for (&id, x) in ids.zip(x.chunks_exact_mut(d)) {
                let id = id as usize;
                if id >= vocab_size {
                    return Err(Error::argument(
                        "token id",
                        format!("below {vocab_size}, the size of the vocabulary"),
                        id.to_string(),
                    ));
                }
                widen(embedding.dtype, &embedding.bytes[id * row..][..row], x);
            }
        }
        if !x.iter().all(|x| x.is_finite()) {
            return Err(self
                .weights
                .error(&name, "finite values", "NaN or infinity"));
        }
        let positions = self.names.position_embedding();
        let positions = self.weights.small_tensor(&positions, &[max_positions, d])?;
        let positions = Tensor::from_slice(&positions[..tokens * d], (tokens, d), &Device::Cpu)?;
        let x = Tensor::from_vec(x, (texts.len(), tokens, d), &Device::Cpu)?;
        Ok(x.broadcast_add(&positions)?)
    }

    /// Runs transformer blocks on hidden states \[B, T, d\].
    fn blocks(
        &self,
        mut x: Tensor,
        blocks: std::ops::Range<usize>,
        progress: &mut dyn FnMut(),
    ) -> Result<Tensor> {
        let mask = causal_mask(x.dim(1)?)?;
        for block in blocks {
            let normed = self.norm(&self.names.norm1(block), &x)?;
            x = (x + self.self_attention(block, &normed, &mask)?)?;
            let normed = self.norm(&self.names.norm2(block), &x)?;
            x = (x + self.mlp(block, &normed)?)?;
            progress();
        }
        Ok(x)
    }

    fn self_attention(&self, block: usize, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (rows, tokens, d) = x.dims3()?;
        let heads = self.config.num_attention_heads;
        let width = d / heads;
        let mut projected = Vec::new();
        for which in 0..3 {
            let y = match self.names.projection(block, which) {
                Some(name) => self.linear(&name, x, d)?,
                None => self.in_projection(block, which, x)?,
            };
            let y = y.reshape((rows, tokens, heads, width))?.transpose(1, 2)?;
            projected.push(y.contiguous()?);
        }
        let [query, key, value] = projected.try_into().expect("three projections");
        let query = (query * (width as f64).powf(-0.5))?;
        let scores = query.matmul(&key.t()?)?.broadcast_add(mask)?;
        let x = softmax_last_dim(&scores)?.matmul(&value)?;
        let x = x.transpose(1, 2)?.reshape((rows, tokens, d))?;
        self.linear(&self.names.out_projection(block), &x, d)
    }

    fn mlp(&self, block: usize, x: &Tensor) -> Result<Tensor> {
        let ClipConfig {
            hidden_size,
            intermediate_size,
            ..
        } = self.config;
        let x = self.linear(&self.names.fc1(block), x, intermediate_size)?;
        let x = match self.config.activation {
            Activation::QuickGelu => (&x * sigmoid(&(&x * 1.702)?)?)?,
            Activation::Gelu => x.gelu_erf()?,
        };
        self.linear(&self.names.fc2(block), &x, hidden_size)
    }

    fn final_norm(&self, x: &Tensor) -> Result<Tensor> {
        self.norm(&self.names.final_norm(), x)
    }

    fn norm(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let d = self.config.hidden_size;
        let read = |part: &str| -> Result<Tensor> {
            let values = self.weights.small_tensor(&format!("{name}.{part}"), &[d])?;
            Ok(Tensor::from_vec(values, d, &Device::Cpu)?)
        };
        let norm = LayerNorm::new(read("weight")?, read("bias")?, self.config.layer_norm_eps);
        Ok(norm.forward(x)?)
    }

    /// x·Wᵀ + b, for W \[`out`, width of x\].
    fn linear(&self, name: &str, x: &Tensor, out: usize) -> Result<Tensor> {
        let weight = format!("{name}.weight");
        let view = self
            .weights
            .tensor_of_shape(&weight, &[out, x.dim(D::Minus1)?])?;
        let bias = self.weights.small_tensor(&format!("{name}.bias"), &[out])?;
        self.affine(&weight, x, view, bias)
    }

    /// The query, key or value third of OpenCLIP's one tensor.
    fn in_projection(&self, block: usize, which: usize, x: &Tensor) -> Result<Tensor> {
        let d = self.config.hidden_size;
        let name = self.names.in_projection(block);
        let weight = format!("{name}weight");
        let all = self.weights.tensor_of_shape(&weight, &[3 * d, d])?;
        let bias = self
            .weights
            .small_tensor(&format!("{name}bias"), &[3 * d])?;
        let third = all.bytes.len() / 3;
        let view = View {
            shape: &[d, d],
            bytes: &all.bytes[which * third..][..third],
            ..all
        };
        self.affine(&weight, x, view, bias[which * d..][..d].to_vec())
    }

    fn affine(&self, name: &str, x: &Tensor, weight: View<'_>, bias: Vec<f32>) -> Result<Tensor> {
        let mut shape = x.dims().to_vec();
        let rows: Vec<f32> = x.flatten_all()?.to_vec1()?;
        let mut out = times_transposed_in_parallel(&rows, weight)
            .map_err(|found| self.weights.error(name, "finite values", found))?;
        for row in out.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(&bias).for_each(|(x, b)| *x += b);
        }
        *shape.last_mut().expect("hidden states have dimensions") = bias.len();
        Ok(Tensor::from_vec(out, shape, &Device::Cpu)?)
    }

    /// `pooled` \[B, d\] times the text projection, if the file has one.
    fn project(&self, pooled: &Tensor) -> Result<Option<Tensor>> {
        let name = self.names.text_projection();
        if !self.weights.has_tensor(name) {
            return Ok(None);
        }
        let shape = self.weights.tensor(name)?.shape.to_vec();
        let d = self.config.hidden_size;
        let &[rows, columns] = shape.as_slice() else {
            let found = format!("shape {shape:?}");
            return Err(self.weights.error(name, "two dimensions", found));
        };
        let transposed = matches!(self.names, Names::Transformers { .. });
        if d != if transposed { columns } else { rows } {
            let found = format!("shape {shape:?}");
            return Err(self.weights.error(name, format!("width {d}"), found));
        }
        let weight = self.weights.small_tensor(name, &shape)?;
        let weight = Tensor::from_vec(weight, (rows, columns), &Device::Cpu)?;
        let weight = if transposed { weight.t()? } else { weight };
        Ok(Some(pooled.matmul(&weight)?))
    }
}

/// Hidden states \[B, T, d\] at the first end of text of every row, \[B, d\].
fn at_ends(x: &Tensor, texts: &[Vec<u32>]) -> Result<Tensor> {
    let rows: Vec<Tensor> = texts
        .iter()
        .enumerate()
        .map(|(row, ids)| {
            let end = ids.last().expect("no text is empty");
            let first = ids
                .iter()
                .position(|id| id == end)
                .expect("it is among them");
            Ok(x.get(row)?.get(first)?)
        })
        .collect::<Result<_>>()?;
    Ok(Tensor::stack(&rows, 0)?)
}

/// \[T, T\]: −∞ where a token would see a later one.
fn causal_mask(tokens: usize) -> Result<Tensor> {
    let rows = (0..tokens)
        .flat_map(|i| (0..tokens).map(move |j| if j > i { f32::NEG_INFINITY } else { 0.0 }));
    let mask = Tensor::from_iter(rows, &Device::Cpu)?;
    Ok(mask.reshape((tokens, tokens))?.to_dtype(DType::F32)?)
}
