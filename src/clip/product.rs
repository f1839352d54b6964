//! Products with weights that stay in their file.

use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use crate::lanes::x86::{Avx512, products_avx512};
use crate::{
    DType, Kernel, Result,
    buffer::{Buffer, pack},
    file::View,
    lanes::Panels,
    product::product,
    tensor::widen,
};

/// Rows \[m, k\] to multiply weights \[n, k\] with, packed once for all of them.
pub(crate) struct Rows {
    numbers: Buffer,
    /// m
    count: usize,
    /// k
    dim: usize,
    packing: Packing,
}

enum Packing {
    /// One after the other, for the crate `gemm`.
    Dense,
    #[cfg(target_arch = "x86_64")]
    Avx512(Panels),
}

impl Rows {
    /// # Errors
    /// When the environment's kernel is none, or memory is short.
    pub fn new(rows: &[f32], dim: usize) -> Result<Self> {
        Self::packed_for(Kernel::chosen()?, rows, dim)
    }

    /// # Panics
    /// When the processor has not what the kernel needs.
    fn packed_for(kernel: Kernel, rows: &[f32], dim: usize) -> Result<Self> {
        assert!(kernel.is_available());
        let count = rows.len() / dim;
        assert!(count > 0 && count * dim == rows.len());
        let packing = match kernel {
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 => Packing::Avx512(Panels::new::<Avx512>(count, dim)),
            _ => Packing::Dense,
        };
        let padded = packing.panels().map_or(count, Panels::padded);
        let mut packed = Self {
            numbers: Buffer::zeros(padded.saturating_mul(dim))?,
            count,
            dim,
            packing,
        };
        match packed.packing.panels() {
            None => pack(&mut packed.numbers, (rows, 1.0), None),
            // A row of ours is a column to a weight's rows.
            Some(panels) => {
                for (column, row) in rows.chunks_exact(dim).enumerate() {
                    panels.pack_column(&mut packed.numbers, column, (row, 1.0));
                }
            }
        }
        Ok(packed)
    }

    /// rows·Wᵀ + b \[m, n\] with all cores, for one weight after the other.
    pub fn times_transposed(
        &self,
        weight: View<'_>,
        bias: &[f32],
    ) -> std::result::Result<Vec<f32>, String> {
        let inner_dim = self.rows_of(weight);
        let step = self.packing.step();
        let blocks: Vec<&[u8]> = self.blocks(weight).collect();
        let parts: Vec<Vec<f32>> = blocks
            .into_par_iter()
            .map_init(
                || Scratch::new(self),
                |scratch, bytes| {
                    let rows = bytes.len() / weight.dtype.size() / self.dim;
                    let mut part = vec![0f32; self.count * rows];
                    self.multiply((weight.dtype, bytes), scratch, &mut part, rows);
                    part
                },
            )
            .collect();
        let mut out = vec![0f32; self.count * inner_dim];
        out.par_chunks_mut(inner_dim)
            .enumerate()
            .for_each(|(row, out)| {
                let blocks = out.chunks_mut(step).zip(bias.chunks(step));
                for (part, (out, bias)) in parts.iter().zip(blocks) {
                    let part = &part[row * out.len()..];
                    for ((out, x), b) in out.iter_mut().zip(part).zip(bias) {
                        *out = x + b;
                    }
                }
            });
        finite(out, weight, "values with which float32 overflows")
    }

    fn rows_of(&self, weight: View<'_>) -> usize {
        match weight.shape {
            &[inner_dim, dim] if dim == self.dim => inner_dim,
            _ => panic!("the shape of weights is checked before they are used"),
        }
    }

    fn blocks<'a>(&self, weight: View<'a>) -> impl Iterator<Item = &'a [u8]> {
        let row = self.dim * weight.dtype.size();
        weight.bytes.chunks(self.packing.step() * row)
    }

    /// Rows of a weight, at most a step's, times ours: columns of `out`, whose rows are `out_stride`
    /// apart.
    fn multiply(
        &self,
        (dtype, bytes): (DType, &[u8]),
        scratch: &mut Scratch,
        out: &mut [f32],
        out_stride: usize,
    ) {
        let (dim, stride) = (self.dim, self.packing.stride(self.dim));
        let rows = bytes.chunks_exact(dim * dtype.size());
        let count = rows.len();
        assert!(count <= self.packing.step() && (self.count - 1) * out_stride + count <= out.len());
        for (row, to) in rows.zip(scratch.block.chunks_mut(stride)) {
            widen(dtype, row, &mut to[..dim]);
        }
        match &self.packing {
            Packing::Dense => {
                let rows = (self.numbers.as_ptr(), dim as isize);
                // SAFETY: `numbers` are `self.count` dense rows of `dim`; `out`, borrowed mutably, has
                // room as asserted above.
                unsafe {
                    let out = (out.as_mut_ptr(), out_stride as isize);
                    product(
                        [self.count, count, dim],
                        out,
                        rows,
                        &scratch.block,
                        (1, dim as isize),
                    );
                }
            }
            #[cfg(target_arch = "x86_64")]
            Packing::Avx512(panels) => {
                let Scratch { block, sums } = scratch;
                let width = panels.padded();
                assert!(block.len() >= count * stride && sums.len() >= count * width);
                let (numbers, block) = (&self.numbers, (block.as_ptr(), stride as isize));
                // SAFETY: `packed_for` has looked for the instructions; `numbers` are packed by
                // these panels, and `block` and `sums` have `count` rows, as asserted above.
                unsafe {
                    products_avx512(panels, numbers, dim, block, count, sums.as_mut_ptr());
                }
                for (i, out) in out.chunks_mut(out_stride).take(self.count).enumerate() {
                    for (out, sums) in out[..count].iter_mut().zip(sums.chunks_exact(width)) {
                        *out = sums[i];
                    }
                }
            }
        }
    }
}

impl Packing {
    fn panels(&self) -> Option<&Panels> {
        match self {
            Self::Dense => None,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(panels) => Some(panels),
        }
    }

    /// Rows of a weight that are widened to f32 at a time, so that nothing the size of a weight is ever
    /// allocated, and that they stay in cache beside the packed rows. 40 is a multiple of the rows of
    /// every tile of AVX-512.
    /// `gemm` packs ours again each time, and so has more.
    fn step(&self) -> usize {
        match self.panels() {
            None => 128,
            Some(_) => 40,
        }
    }

    /// From a widened row to the next. A power of two apart, they would share a few lines of the
    /// nearest cache.
    fn stride(&self, dim: usize) -> usize {
        match self.panels() {
            None => dim,
            Some(_) => dim + 16,
        }
    }
}

/// A step's widened rows of a weight, and their products.
struct Scratch {
    block: Vec<f32>,
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    sums: Vec<f32>,
}

impl Scratch {
    fn new(rows: &Rows) -> Self {
        let (step, panels) = (rows.packing.step(), rows.packing.panels());
        Self {
            block: vec![0.0; step * rows.packing.stride(rows.dim)],
            sums: vec![0.0; panels.map_or(0, |panels| step * panels.padded())],
        }
    }
}

/// Checks products with a weight. What is not finite in it makes products that are not, whatever it
/// is multiplied with, so that the weight is only looked at when one is found.
fn finite(
    products: Vec<f32>,
    weight: View<'_>,
    overflow: &str,
) -> std::result::Result<Vec<f32>, String> {
    // Does not stop at the first that is not, so that several are looked at together.
    if products.iter().fold(true, |all, x| all & x.is_finite()) {
        return Ok(products);
    }
    let mut some = [0.0; 1024];
    let is_finite = weight
        .bytes
        .chunks(some.len() * weight.dtype.size())
        .all(|bytes| {
            let some = &mut some[..bytes.len() / weight.dtype.size()];
            widen(weight.dtype, bytes, some);
            some.iter().all(|x| x.is_finite())
        });
    Err(if is_finite {
        overflow
    } else {
        "NaN or infinity"
    }
    .to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernels() -> impl Iterator<Item = Kernel> {
        Kernel::ALL
            .into_iter()
            .filter(|kernel| kernel.is_available())
    }

    fn dense<'a>(numbers: &'a [f32], shape: &'a [usize]) -> View<'a> {
        View {
            dtype: DType::F32,
            shape,
            bytes: bytemuck::cast_slice(numbers),
        }
    }

    #[test]
    fn every_kernel_is_the_plain_triple_loop() {
        for kernel in kernels() {
            // One row and one block, whole panels and steps, and a number more than those.
            for (m, n, k) in [
                (1, 1, 1),
                (3, 5, 7),
                (77, 40, 64),
                (80, 129, 33),
                (154, 81, 130),
            ] {
                let rows: Vec<f32> = (0..m * k).map(|i| (i % 19) as f32 - 9.0).collect();
                let weight: Vec<f32> = (0..n * k).map(|i| (i % 11) as f32).collect();
                let shape = [n, k];
                let view = dense(&weight, &shape);
                let rows_of = Rows::packed_for(kernel, &rows, k).unwrap();
                let products = (0..m * n).map(|i| {
                    let (row, weight) = (&rows[i / n * k..][..k], &weight[i % n * k..][..k]);
                    // Small whole numbers: exact in any order of summation.
                    row.iter().zip(weight).map(|(a, b)| a * b).sum::<f32>()
                });
                let expected: Vec<f32> = products.collect();
                let bias: Vec<f32> = (0..n).map(|i| i as f32).collect();
                let found = rows_of.times_transposed(view, &bias).unwrap();
                let expected = expected.iter().enumerate().map(|(i, x)| x + bias[i % n]);
                assert_eq!(found, expected.collect::<Vec<_>>(), "{kernel} {m} {n} {k}");
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_said() {
        for kernel in kernels() {
            for (weight, rows, found) in [
                (f32::NAN, 0.0, "NaN or infinity"),
                (f32::INFINITY, 0.0, "NaN or infinity"),
                (f32::MAX, 2.0, "values with which float32 overflows"),
            ] {
                let rows = Rows::packed_for(kernel, &[rows; 6], 3).unwrap();
                let mut weights = [1.0; 12];
                weights[7] = weight;
                let view = dense(&weights, &[4, 3]);
                assert_eq!(
                    rows.times_transposed(view, &[0.0; 4]).unwrap_err(),
                    found,
                    "{kernel}"
                );
            }
        }
    }
}
