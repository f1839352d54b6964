//! V_a = A·B: coefficients times the value rows of a layer.

use half::{bf16, f16};

use crate::{DType, Data, Tensor, halves, tensor::widen};

/// Columns that are computed together: their rows and sums stay in the nearest cache.
const BLOCK: usize = 256;
/// Columns whose sums stay in registers.
const STRIP: usize = 32;

/// A \[C, R\] with only the columns that are not zero.
pub(crate) struct Product {
    tokens: usize,
    /// The rows of B that count.
    used: Vec<usize>,
    /// \[C, used\]
    coefficients: Vec<f32>,
}

/// V_a has numbers that the dtype cannot hold.
pub(crate) struct Overflow;

impl Product {
    pub fn new(coefficients: &[f32], rows: usize) -> Self {
        let tokens = coefficients.len() / rows;
        let column = |r: usize| coefficients.iter().skip(r).step_by(rows);
        let used: Vec<usize> = (0..rows)
            .filter(|&r| column(r).any(|&a| a != 0.0))
            .collect();
        let tokens_of = coefficients.chunks_exact(rows);
        Self {
            tokens,
            coefficients: tokens_of.flat_map(|a| used.iter().map(|&r| a[r])).collect(),
            used,
        }
    }

    /// A·B \[C, inner_dim\] of B \[R, inner_dim\], summed in f32 and rounded to `dtype`.
    pub fn times(&self, rows: &Tensor, dtype: DType) -> Result<Tensor, Overflow> {
        let shape = [self.tokens, rows.shape()[1]];
        let len = shape[0] * shape[1];
        let data = match dtype {
            DType::F32 => Data::F32(self.computed(rows, len, |sums, out| {
                out.copy_from_slice(sums);
            })?),
            DType::F16 => Data::F16(self.computed::<f16>(rows, len, halves::round)?),
            DType::BF16 => Data::BF16(self.computed::<bf16>(rows, len, halves::round)?),
        };
        Ok(Tensor::new(shape, data))
    }

    fn computed<T: bytemuck::Pod + Ceiling>(
        &self,
        rows: &Tensor,
        len: usize,
        round: impl Fn(&[f32], &mut [T]),
    ) -> Result<Vec<T>, Overflow> {
        let width = rows.shape()[1];
        let (dtype, bytes) = (rows.dtype(), rows.bytes());
        let mut out: Vec<T> = bytemuck::zeroed_vec(len);
        let mut block = vec![0f32; self.used.len() * BLOCK];
        let mut sums = [0f32; BLOCK];
        for start in (0..width).step_by(BLOCK) {
            let count = BLOCK.min(width - start);
            for (&r, block) in self.used.iter().zip(block.chunks_exact_mut(BLOCK)) {
                let first = (r * width + start) * dtype.size();
                let bytes = &bytes[first..first + count * dtype.size()];
                widen(dtype, bytes, &mut block[..count]);
            }
            for token in 0..self.tokens {
                let a = &self.coefficients[token * self.used.len()..][..self.used.len()];
                let largest = add_up(a, &block, &mut sums);
                // Bits of |x|, read as integers, are in the order of |x|, with NaN above infinity.
                if largest >= T::CEILING.to_bits() {
                    return Err(Overflow);
                }
                let first = token * width + start;
                round(&sums[..count], &mut out[first..first + count]);
            }
        }
        Ok(out)
    }
}

/// The smallest number that does not round to a finite one.
trait Ceiling {
    const CEILING: f32;
}

impl Ceiling for f32 {
    const CEILING: f32 = f32::INFINITY;
}

impl Ceiling for f16 {
    const CEILING: f32 = 65520.0;
}

impl Ceiling for bf16 {
    const CEILING: f32 = f32::from_bits(0x7f7f_8000);
}

/// a·B of one token, for a block of columns; the bits of the largest |V_a|.
fn add_up(a: &[f32], block: &[f32], sums: &mut [f32; BLOCK]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        #[target_feature(enable = "avx2,fma")]
        fn add_up_avx2(a: &[f32], block: &[f32], sums: &mut [f32; BLOCK]) -> u32 {
            add_up_with::<true>(a, block, sums)
        }
        // SAFETY: the processor has both.
        return unsafe { add_up_avx2(a, block, sums) };
    }
    if cfg!(target_arch = "aarch64") {
        add_up_with::<true>(a, block, sums)
    } else {
        add_up_with::<false>(a, block, sums)
    }
}

/// Plain loops over arrays, which compilers turn into vectors of whatever width there is.
#[allow(
    clippy::needless_range_loop,
    reason = "iterators are not inlined everywhere"
)]
#[inline(always)]
fn add_up_with<const FMA: bool>(a: &[f32], block: &[f32], sums: &mut [f32; BLOCK]) -> u32 {
    let mut largest = [0u32; STRIP];
    for start in (0..BLOCK).step_by(STRIP) {
        let mut strip = [0f32; STRIP];
        for r in 0..a.len() {
            let (a, row) = (a[r], &block[r * BLOCK + start..][..STRIP]);
            for i in 0..STRIP {
                strip[i] = if FMA {
                    a.mul_add(row[i], strip[i])
                } else {
                    a * row[i] + strip[i]
                };
            }
        }
        for i in 0..STRIP {
            largest[i] = largest[i].max(strip[i].to_bits() & 0x7fff_ffff);
            sums[start + i] = strip[i];
        }
    }
    largest.into_iter().max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that look random, between −1 and 1.
    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        std::iter::repeat_with(next).take(count).collect()
    }

    /// Against sums in f64: each of the R products is rounded at most once and each sum once, all of
    /// at most 1 in size; then the result is rounded to the dtype.
    #[test]
    fn products_are_those_of_f64() {
        for (tokens, rows, width) in [(1, 1, 1), (3, 2, 31), (77, 9, 320), (5, 41, 257)] {
            let mut a = numbers(tokens * rows, 1);
            a.iter_mut().skip(1).step_by(rows).for_each(|a| *a = 0.0);
            let b = numbers(rows * width, 2);
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let stored = Tensor::rounded([rows, width], b.clone(), dtype);
                let exact = stored.to_f32();
                let result = Product::new(&a, rows).times(&stored, dtype);
                let result = result.unwrap_or_else(|_| panic!("an overflow")).to_f32();
                let step = match dtype {
                    DType::F32 => f64::EPSILON,
                    DType::F16 => 2f64.powi(-11),
                    DType::BF16 => 2f64.powi(-8),
                };
                for (i, &found) in result.iter().enumerate() {
                    let (token, column) = (i / width, i % width);
                    let sum: f64 = (0..rows)
                        .map(|r| {
                            f64::from(a[token * rows + r]) * f64::from(exact[r * width + column])
                        })
                        .sum();
                    let bound = 2f64.powi(-23) * rows as f64 + step * sum.abs() + 1e-7;
                    let error = (f64::from(found) - sum).abs();
                    assert!(
                        error <= bound,
                        "{tokens} {rows} {width} {dtype}: {found} {sum}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_a_dtype_cannot_hold_is_an_overflow() {
        let rows = Tensor::rounded([1, 1], vec![1.0], DType::F32);
        let times = |a: f32, dtype| Product::new(&[a], 1).times(&rows, dtype).is_ok();
        assert!(times(65519.0, DType::F16) && !times(65520.0, DType::F16));
        assert!(times(3.389e38, DType::BF16) && !times(3.4e38, DType::BF16));
        assert!(times(f32::MAX, DType::F32) && !times(f32::INFINITY, DType::F32));
        assert!(!times(f32::NAN, DType::F32));
    }
}
