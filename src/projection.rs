//! From the features of the chosen labels to the aesthetic context f_a (paper, eq. 6).

use candle_core::{Device, Tensor};
use candle_nn::{LayerNorm, Module};

use crate::{Result, file::File, product::Rows};

const ZERO_WEIGHT: &str = "projection.zero.weight";

/// The projection layer of an adapter.
#[derive(Debug)]
pub(crate) enum Projection {
    /// f_a = Z(F(f_t)): F is linear over the token axis followed by a LayerNorm, Z is linear.
    Learned {
        /// \[C, N\]
        linear: Tensor,
        /// \[C, 1\]; inert, as the LayerNorm subtracts it, but files may have it.
        linear_bias: Option<Tensor>,
        norm: LayerNorm,
        /// \[d\]; the weight of Z stays in the file: 17 MB in f32 at SDXL's width.
        zero_bias: Tensor,
    },
    /// f_a\[c\] = Σ gain_i·w_i·(t_i − t̂_i), the same for every token c.
    Difference {
        /// \[N\]
        gain: Vec<f32>,
    },
}

/// Sizes of a projection: N labels, C tokens, width d.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub labels: usize,
    pub tokens: usize,
    pub dim: usize,
}

impl Projection {
    pub const LEARNED_TENSORS: &[&str] = &[
        "projection.linear.weight",
        "projection.linear.bias",
        "projection.norm.weight",
        "projection.norm.bias",
        ZERO_WEIGHT,
        "projection.zero.bias",
    ];
    pub const DIFFERENCE_TENSORS: &[&str] = &["projection.gain"];

    pub fn read_learned(file: &File, sizes: Sizes, eps: f64) -> Result<Self> {
        let Sizes {
            labels,
            tokens,
            dim,
        } = sizes;
        let read = |name: &str, shape: &[usize]| -> Result<Tensor> {
            let values = file.small_tensor(name, shape)?;
            Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
        };
        file.check_small_tensor(ZERO_WEIGHT, &[dim, dim])?;
        const BIAS: &str = "projection.linear.bias";
        let linear_bias = file
            .has_tensor(BIAS)
            .then(|| -> Result<Tensor> { Ok(read(BIAS, &[tokens])?.reshape((tokens, 1))?) })
            .transpose()?;
        Ok(Self::Learned {
            linear: read("projection.linear.weight", &[tokens, labels])?,
            linear_bias,
            norm: LayerNorm::new(
                read("projection.norm.weight", &[dim])?,
                read("projection.norm.bias", &[dim])?,
                eps,
            ),
            zero_bias: read("projection.zero.bias", &[dim])?,
        })
    }

    pub fn read_difference(file: &File, sizes: Sizes) -> Result<Self> {
        let gain = file.small_tensor("projection.gain", &[sizes.labels])?;
        Ok(Self::Difference { gain })
    }

    /// f_a \[C, d\] of label weights w \[N\], given AesEmb \[N, 2, d\] and the file of both.
    pub fn project(
        &self,
        file: &File,
        aes_emb: &[f32],
        weights: &[f32],
        sizes: Sizes,
    ) -> Result<Vec<f32>> {
        let Sizes {
            labels,
            tokens,
            dim,
        } = sizes;
        match self {
            Self::Learned {
                linear,
                linear_bias,
                norm,
                zero_bias,
            } => {
                let f_t = select(aes_emb, weights, dim);
                let f_t = Tensor::from_vec(f_t, (labels, dim), &Device::Cpu)?;
                let mut mixed = linear.matmul(&f_t)?;
                if let Some(bias) = linear_bias {
                    mixed = mixed.broadcast_add(bias)?;
                }
                let normed: Vec<f32> = norm.forward(&mixed)?.flatten_all()?.to_vec1()?;
                let f_a = Rows::new(&normed, dim)?
                    .times_transposed(file.tensor(ZERO_WEIGHT)?)
                    .map_err(|found| file.tensor_error(ZERO_WEIGHT, "finite values", found))?;
                let f_a = Tensor::from_vec(f_a, (tokens, dim), &Device::Cpu)?;
                let f_a = f_a.broadcast_add(zero_bias)?;
                Ok(f_a.flatten_all()?.to_vec1()?)
            }
            Self::Difference { gain } => {
                let mut row = vec![0.0; dim];
                for ((pair, w), g) in aes_emb.chunks_exact(2 * dim).zip(weights).zip(gain) {
                    let (positive, negative) = pair.split_at(dim);
                    for ((x, t), t_hat) in row.iter_mut().zip(positive).zip(negative) {
                        *x += g * w * (t - t_hat);
                    }
                }
                Ok(row.repeat(tokens))
            }
        }
    }

    /// f_a \[C, d\] of the opposite of a selection, for the unconditional pass.
    pub fn project_opposite(
        &self,
        file: &File,
        aes_emb: &[f32],
        weights: &[f32],
        sizes: Sizes,
    ) -> Result<Vec<f32>> {
        match self {
            Self::Learned { .. } => self.project(file, aes_emb, &vec![0.0; weights.len()], sizes),
            Self::Difference { .. } => {
                let opposite: Vec<f32> = weights.iter().map(|w| -w).collect();
                self.project(file, aes_emb, &opposite, sizes)
            }
        }
    }
}

/// f_t \[N, d\]: each label's feature between its negative (w = 0) and its positive (w = 1),
/// both of which come out exactly as AesEmb holds them.
pub(crate) fn select(aes_emb: &[f32], weights: &[f32], dim: usize) -> Vec<f32> {
    let pairs = aes_emb.chunks_exact(2 * dim).zip(weights);
    pairs
        .flat_map(|(pair, &w)| {
            let (positive, negative) = pair.split_at(dim);
            let both = positive.iter().zip(negative);
            both.map(move |(t, t_hat)| (1.0 - w) * t_hat + w * t)
        })
        .collect()
}
