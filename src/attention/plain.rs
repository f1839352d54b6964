//! Attention by candle's tensor operations, one after the other: slow, and plainly right.

use candle_core::{D, Device, Tensor as Candle};

use super::{Checked, reserve, zeros};
use crate::{Result, view::TensorViewMut};

/// Attention maps are at most this many numbers at a time.
const BLOCK: usize = 1 << 20;

const CPU: &Device = &Device::Cpu;

/// # Errors
/// Without memory for a head; then something may have been written.
pub(super) fn forward(
    checked: &Checked<'_>,
    output: &mut TensorViewMut<'_>,
    map: Option<(&mut TensorViewMut<'_>, usize)>,
) -> Result<()> {
    let ([batch, queries, heads, dim], keys) = (checked.query.shape(), checked.keys);
    let mut map = map;
    let block = (BLOCK / keys).clamp(1, queries.max(1));
    let rows = Rows::new([keys, block], dim)?;
    for b in 0..batch {
        let strength = checked.strengths.of(b);
        let aes_value = checked.aes_value.filter(|_| strength != 0.0);
        for h in 0..heads {
            let key = rows.read(keys, |t, row| checked.key.read_row([b, t, h, 0], row))?;
            let aesthetic = aes_value
                .map(|v_a| {
                    let tokens = v_a.shape()[1];
                    rows.read(keys, |t, row| {
                        v_a.read_row([b, t % tokens, h, 0], row);
                        row.iter_mut().for_each(|x| *x *= strength);
                    })
                })
                .transpose()?;
            let mut value = rows.read(keys, |t, row| checked.value.read_row([b, t, h, 0], row))?;
            // A strength per query cannot be folded into the values: two branches then.
            let aesthetic = match aesthetic {
                Some(aesthetic) if checked.query_mask.is_none() => {
                    value = (value + aesthetic)?;
                    None
                }
                other => other,
            };
            for first in (0..queries).step_by(block) {
                let count = block.min(queries - first);
                let query = rows.read(count, |i, row| {
                    checked.query.read_row([b, first + i, h, 0], row);
                })?;
                let scores = query.matmul(&key.t()?)?.affine(checked.scale.into(), 0.0)?;
                let weights = match checked.mask {
                    None => candle_nn::ops::softmax_last_dim(&scores)?,
                    Some(mask) => {
                        let mut added = zeros(count * keys)?;
                        for (i, row) in added.chunks_exact_mut(keys).enumerate() {
                            mask.read_row([b, first + i, h, 0], row);
                        }
                        masked_softmax(scores, Candle::from_vec(added, (count, keys), CPU)?)?
                    }
                };
                let mut mixed = weights.matmul(&value)?;
                if let (Some(mask), Some(aesthetic)) = (checked.query_mask, &aesthetic) {
                    let mut m = zeros(count)?;
                    for (i, m) in m.iter_mut().enumerate() {
                        mask.read_row([b, first + i, 0, 0], std::slice::from_mut(m));
                    }
                    let m = Candle::from_vec(m, (count, 1), CPU)?;
                    mixed = (mixed + weights.matmul(aesthetic)?.broadcast_mul(&m)?)?;
                }
                write_rows(&mixed, dim, |i, row| {
                    output.write_row([b, first + i, h, 0], row);
                })?;
                if let Some((map, first_head)) = &mut map
                    && let Some(h) = h.checked_sub(*first_head)
                    && h < map.shape()[2]
                {
                    write_rows(&weights, keys, |i, row| {
                        map.write_row([b, first + i, h, 0], row);
                    })?;
                }
            }
        }
    }
    Ok(())
}

/// softmax(scores + mask), with zeros for rows that are −∞ throughout.
fn masked_softmax(scores: Candle, mask: Candle) -> candle_core::Result<Candle> {
    let scores = (scores + mask)?;
    let hidden = scores.max_keepdim(D::Minus1)?.eq(f64::NEG_INFINITY)?;
    let hidden = hidden.broadcast_as(scores.shape())?;
    let weights = candle_nn::ops::softmax_last_dim(&scores)?;
    hidden.where_cond(&weights.zeros_like()?, &weights)
}

/// Makes tensors of rows of one width, whose size was found to fit into memory.
struct Rows(usize);

impl Rows {
    fn new(counts: [usize; 2], width: usize) -> Result<Self> {
        // As much as is in use at a time below, where failing would be an abort instead of an error.
        let count = counts[0].max(counts[1]).saturating_mul(width);
        reserve(count.saturating_mul(4))?;
        Ok(Self(width))
    }

    fn read(&self, count: usize, read: impl Fn(usize, &mut [f32])) -> Result<Candle> {
        let mut data = zeros(count * self.0)?;
        for (i, row) in data.chunks_exact_mut(self.0).enumerate() {
            read(i, row);
        }
        Ok(Candle::from_vec(data, (count, self.0), CPU)?)
    }
}

fn write_rows(tensor: &Candle, width: usize, mut write: impl FnMut(usize, &[f32])) -> Result<()> {
    let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
    for (i, row) in values.chunks_exact(width).enumerate() {
        write(i, row);
    }
    Ok(())
}
