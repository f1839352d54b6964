//! One CLIP text model, computed from weights that stay in their file.

use candle_core::cpu::erf::erf_f32;
use rayon::prelude::*;

use super::product::Rows;
use super::{Activation, ClipConfig, names::Names};
use crate::{DType, Error, Result, Tensor, component::Component, file::View, tensor::widen};

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
    pub last: Tensor,
    /// Hidden states before the last block, without the LayerNorm, \[B, T, d\].
    pub penultimate: Tensor,
    /// `last` at the first end of text, \[B, d\].
    pub pooled: Tensor,
    /// `pooled` times the text projection, \[B, p\], if the file has one.
    pub projected: Option<Tensor>,
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
        if intermediate_size == 0 {
            return Err(weights.error(&last, "at least one row", "none"));
        }
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
        let tokens = self.longest(texts)?;
        let filled: Vec<Vec<u32>> = texts
            .iter()
            .map(|ids| {
                let mut ids = ids.clone();
                ids.resize(tokens, ids[ids.len() - 1]);
                ids
            })
            .collect();
        let filled: Vec<&[u32]> = filled.iter().map(Vec::as_slice).collect();
        let layers = self.config.num_hidden_layers;
        let mut x = self.embed(&filled)?;
        self.blocks(&mut x, &filled, 0..layers - 1, &mut || ())?;
        let penultimate = x.clone();
        self.blocks(&mut x, &filled, layers - 1..layers, &mut || ())?;
        let last = self.final_norm(&x)?;
        let ends = texts.iter().enumerate();
        let ends = ends.map(|(row, ids)| row * tokens + first_end(ids));
        let pooled: Vec<f32> = ends.flat_map(|at| &last[at * d..][..d]).copied().collect();
        let projected = self.project(&pooled)?;
        let tensor = |shape: &[usize], values| Tensor::rounded(shape, values, DType::F32);
        Ok(ClipOutput {
            projected: projected.map(|values| tensor(&[rows, values.len() / rows], values)),
            pooled: tensor(&[rows, d], pooled),
            last: tensor(&[rows, tokens, d], last),
            penultimate: tensor(&[rows, tokens, d], penultimate),
        })
    }

    /// \[B, d\]: the hidden states at the first end of text. Attention is causal, so that nothing
    /// after it matters, and nothing after it is computed.
    pub(crate) fn features(
        &self,
        texts: &[Vec<u32>],
        hidden: Hidden,
        progress: &mut dyn FnMut(),
    ) -> Result<Vec<f32>> {
        self.longest(texts)?;
        let d = self.config.hidden_size;
        let texts: Vec<&[u32]> = texts.iter().map(|ids| &ids[..=first_end(ids)]).collect();
        let mut x = self.embed(&texts)?;
        self.blocks(&mut x, &texts, 0..self.block_count(hidden), progress)?;
        let mut rest = x.as_slice();
        let mut ends = Vec::with_capacity(texts.len() * d);
        for ids in texts {
            let (text, others) = rest.split_at(ids.len() * d);
            ends.extend(&text[text.len() - d..]);
            rest = others;
        }
        match hidden {
            Hidden::Last => self.final_norm(&ends),
            Hidden::Penultimate => Ok(ends),
        }
    }

    /// How many blocks the hidden states need: how often `features` reports progress.
    pub(crate) fn block_count(&self, hidden: Hidden) -> usize {
        match hidden {
            Hidden::Last => self.config.num_hidden_layers,
            Hidden::Penultimate => self.config.num_hidden_layers - 1,
        }
    }

    /// The tokens of the longest text.
    fn longest(&self, texts: &[Vec<u32>]) -> Result<usize> {
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

    /// The sums of token and position embeddings: d values for every token of every text, one after
    /// the other. So are all hidden states.
    fn embed(&self, texts: &[&[u32]]) -> Result<Vec<f32>> {
        let ClipConfig {
            vocab_size,
            hidden_size: d,
            max_positions,
            ..
        } = self.config;
        let name = self.names.token_embedding();
        let embedding = self.weights.tensor_of_shape(&name, &[vocab_size, d])?;
        let positions = self.names.position_embedding();
        let positions = self.weights.small_tensor(&positions, &[max_positions, d])?;
        let row = d * embedding.dtype.size();
        let mut x = vec![0.0; texts.iter().map(|ids| ids.len() * d).sum()];
        let ids = texts
            .iter()
            .flat_map(|ids| ids.iter().zip(positions.chunks_exact(d)));
        for ((&id, position), x) in ids.zip(x.chunks_exact_mut(d)) {
            let id = id as usize;
            if id >= vocab_size {
                return Err(Error::argument(
                    "token id",
                    format!("below {vocab_size}, the size of the vocabulary"),
                    id.to_string(),
                ));
            }
            widen(embedding.dtype, &embedding.bytes[id * row..][..row], x);
            if !x.iter().all(|x| x.is_finite()) {
                return Err(self
                    .weights
                    .error(&name, "finite values", "NaN or infinity"));
            }
            add(x, position);
        }
        Ok(x)
    }

    /// Runs transformer blocks on the hidden states of texts.
    fn blocks(
        &self,
        x: &mut [f32],
        texts: &[&[u32]],
        blocks: std::ops::Range<usize>,
        progress: &mut dyn FnMut(),
    ) -> Result<()> {
        for block in blocks {
            let normed = self.norm(&self.names.norm1(block), x)?;
            add(x, &self.self_attention(block, &normed, texts)?);
            let normed = self.norm(&self.names.norm2(block), x)?;
            add(x, &self.mlp(block, &normed)?);
            progress();
        }
        Ok(())
    }

    fn self_attention(&self, block: usize, x: &[f32], texts: &[&[u32]]) -> Result<Vec<f32>> {
        let d = self.config.hidden_size;
        let project = |which| match self.names.projection(block, which) {
            Some(name) => self.linear(&name, x, d, d),
            None => self.in_projection(block, which, x),
        };
        let (query, key, value) = (project(0)?, project(1)?, project(2)?);
        let mut mixed = vec![0.0; x.len()];
        let mut parts = Vec::new();
        let (mut rest, mut start) = (mixed.as_mut_slice(), 0);
        for ids in texts {
            let (part, others) = rest.split_at_mut(ids.len() * d);
            parts.push((start..start + part.len(), part));
            start += ids.len() * d;
            rest = others;
        }
        let heads = self.config.num_attention_heads;
        parts.into_par_iter().for_each(|(at, mixed)| {
            attend(
                [&query, &key, &value].map(|x| &x[at.clone()]),
                mixed,
                d,
                heads,
            );
        });
        self.linear(&self.names.out_projection(block), &mixed, d, d)
    }

    fn mlp(&self, block: usize, x: &[f32]) -> Result<Vec<f32>> {
        let ClipConfig {
            hidden_size: d,
            intermediate_size: width,
            activation,
            ..
        } = self.config;
        let mut hidden = self.linear(&self.names.fc1(block), x, d, width)?;
        hidden
            .par_chunks_mut(width)
            .for_each(|row| match activation {
                Activation::QuickGelu => {
                    row.iter_mut().for_each(|x| *x /= 1.0 + (-1.702 * *x).exp());
                }
                Activation::Gelu => {
                    let phi = |x: f32| 0.5 * (1.0 + erf_f32(x * std::f32::consts::FRAC_1_SQRT_2));
                    row.iter_mut().for_each(|x| *x *= phi(*x));
                }
            });
        self.linear(&self.names.fc2(block), &hidden, width, d)
    }

    fn final_norm(&self, x: &[f32]) -> Result<Vec<f32>> {
        self.norm(&self.names.final_norm(), x)
    }

    fn norm(&self, name: &str, x: &[f32]) -> Result<Vec<f32>> {
        let d = self.config.hidden_size;
        let weight = self.weights.small_tensor(&format!("{name}.weight"), &[d])?;
        let bias = self.weights.small_tensor(&format!("{name}.bias"), &[d])?;
        let mean_of = |x: &mut dyn Iterator<Item = f64>| x.sum::<f64>() / d as f64;
        let mut out = x.to_vec();
        out.par_chunks_mut(d).for_each(|row| {
            let mean = mean_of(&mut row.iter().map(|&x| f64::from(x)));
            let variance = mean_of(&mut row.iter().map(|&x| (f64::from(x) - mean).powi(2)));
            let scale = (variance + self.config.layer_norm_eps).sqrt().recip();
            let (mean, scale) = (mean as f32, scale as f32);
            for ((x, weight), bias) in row.iter_mut().zip(&weight).zip(&bias) {
                *x = (*x - mean) * scale * weight + bias;
            }
        });
        Ok(out)
    }

    /// rows·Wᵀ + b, for rows of `width` values and W \[`out`, `width`\].
    fn linear(&self, name: &str, rows: &[f32], width: usize, out: usize) -> Result<Vec<f32>> {
        let weight = format!("{name}.weight");
        let view = self.weights.tensor_of_shape(&weight, &[out, width])?;
        let bias = self.weights.small_tensor(&format!("{name}.bias"), &[out])?;
        self.affine(&weight, rows, view, &bias)
    }

    /// The query, key or value third of OpenCLIP's one tensor.
    fn in_projection(&self, block: usize, which: usize, rows: &[f32]) -> Result<Vec<f32>> {
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
        self.affine(&weight, rows, view, &bias[which * d..][..d])
    }

    fn affine(&self, name: &str, rows: &[f32], weight: View<'_>, bias: &[f32]) -> Result<Vec<f32>> {
        Rows::new(rows, weight.shape[1])?
            .times_transposed(weight, bias)
            .map_err(|found| self.weights.error(name, "finite values", found))
    }

    /// `pooled` \[B, d\] times the text projection, if the file has one.
    fn project(&self, pooled: &[f32]) -> Result<Option<Vec<f32>>> {
        let name = self.names.text_projection();
        if !self.weights.has_tensor(name) {
            return Ok(None);
        }
        let shape = self.weights.tensor(name)?.shape;
        let d = self.config.hidden_size;
        let &[rows, columns] = shape else {
            let found = format!("shape {shape:?}");
            return Err(self.weights.error(name, "two dimensions", found));
        };
        let transposed = matches!(self.names, Names::Transformers { .. });
        if d != if transposed { columns } else { rows } || shape.contains(&0) {
            let found = format!("shape {shape:?}");
            return Err(self.weights.error(name, format!("width {d}"), found));
        }
        let weight = self.weights.small_tensor(name, shape)?;
        let project = |x: &[f32]| -> Vec<f32> {
            if transposed {
                return weight.chunks_exact(d).map(|row| dot(x, row)).collect();
            }
            let mut out = vec![0.0; columns];
            for (&x, row) in x.iter().zip(weight.chunks_exact(columns)) {
                add_times(&mut out, x, row);
            }
            out
        };
        Ok(Some(pooled.chunks_exact(d).flat_map(project).collect()))
    }
}

/// Where the text ends, by its last token, for the first time.
pub(super) fn first_end(ids: &[u32]) -> usize {
    let last = ids.len() - 1;
    ids.iter().position(|id| *id == ids[last]).unwrap_or(last)
}

/// softmax(Q·Kᵀ/√w)·V of one text \[T, d\], whose heads are side by side and w wide. It is causal: no
/// token sees a later one.
fn attend([query, key, value]: [&[f32]; 3], out: &mut [f32], d: usize, heads: usize) {
    let width = d / heads;
    let scale = (width as f32).sqrt().recip();
    let mut scores = vec![0.0; out.len() / d];
    let rows = query.chunks_exact(d).zip(out.chunks_exact_mut(d));
    for (token, (query, out)) in rows.enumerate() {
        let scores = &mut scores[..=token];
        for start in (0..d).step_by(width) {
            let query = &query[start..][..width];
            for (score, key) in scores.iter_mut().zip(key.chunks_exact(d)) {
                *score = scale * dot(query, &key[start..][..width]);
            }
            let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            scores.iter_mut().for_each(|x| *x = (*x - most).exp());
            let sum: f32 = scores.iter().sum();
            let out = &mut out[start..][..width];
            for (score, value) in scores.iter().zip(value.chunks_exact(d)) {
                add_times(out, score / sum, &value[start..][..width]);
            }
        }
    }
}

/// Σ a·b, of eight lanes that are added at the end.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0.0; 8];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest = a_rest.iter().zip(b_rest).map(|(a, b)| a * b);
    sums.iter().copied().chain(rest).sum()
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn add_times(x: &mut [f32], factor: f32, y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += factor * y);
}
