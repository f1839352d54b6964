//! Products with weights that stay in their file.

use crate::{file::View, tensor::widen};

/// Rows of a weight that are widened to f32 at a time: 1 MB at SDXL's width, so the scratch stays
/// in cache and nothing the size of a weight is ever allocated.
const ROWS: usize = 128;

/// rows·Wᵀ in f32, for rows \[m, k\] and a weight W \[n, k\]. The error says what was not finite.
pub(crate) fn times_transposed(rows: &[f32], weight: View<'_>) -> Result<Vec<f32>, String> {
    let out = times_unchecked(rows, weight)?;
    if !all_finite(&out) {
        return Err("values that overflow float32 at these label weights".to_owned());
    }
    Ok(out)
}

/// rows·Wᵀ, and an error where the weight is not finite. Where the result is not, callers know why.
fn times_unchecked(rows: &[f32], weight: View<'_>) -> Result<Vec<f32>, String> {
    let &[inner_dim, dim] = weight.shape else {
        panic!("the shape of weights is checked when a file is opened")
    };
    let mut out = vec![0f32; rows.len() / dim * inner_dim];
    let mut block = vec![0f32; ROWS.min(inner_dim) * dim];
    for (index, bytes) in weight
        .bytes
        .chunks(ROWS * dim * weight.dtype.size())
        .enumerate()
    {
        let block = &mut block[..bytes.len() / weight.dtype.size()];
        widen(weight.dtype, bytes, block);
        if !all_finite(block) {
            return Err("NaN or infinity".to_owned());
        }
        multiply(rows, block, dim, &mut out[index * ROWS..], inner_dim);
    }
    Ok(out)
}

/// rows·Wᵀ + b with all cores, for one weight after the other.
#[cfg(feature = "clip")]
pub(crate) fn times_transposed_in_parallel(
    rows: &[f32],
    weight: View<'_>,
    bias: &[f32],
) -> Result<Vec<f32>, String> {
    use rayon::prelude::*;

    let &[inner_dim, dim] = weight.shape else {
        panic!("the shape of weights is checked before they are used")
    };
    let parts: Vec<Vec<f32>> = weight
        .bytes
        .par_chunks(ROWS * dim * weight.dtype.size())
        .map(|bytes| {
            let shape = [bytes.len() / weight.dtype.size() / dim, dim];
            let part = View {
                shape: &shape,
                bytes,
                ..weight
            };
            times_unchecked(rows, part)
        })
        .collect::<Result<_, _>>()?;
    let mut out = vec![0f32; rows.len() / dim * inner_dim];
    let finite = out.par_chunks_mut(inner_dim).enumerate().all(|(row, out)| {
        let blocks = out.chunks_mut(ROWS).zip(bias.chunks(ROWS));
        for (part, (out, bias)) in parts.iter().zip(blocks) {
            let part = &part[row * out.len()..];
            for ((out, x), b) in out.iter_mut().zip(part).zip(bias) {
                *out = x + b;
            }
        }
        all_finite(out)
    });
    if !finite {
        return Err("values with which float32 overflows".to_owned());
    }
    Ok(out)
}

/// Does not stop at the first that is not, so that several are looked at together.
fn all_finite(values: &[f32]) -> bool {
    values.iter().fold(true, |all, x| all & x.is_finite())
}

/// out\[m, n\] = Σ_k lhs\[m, k\]·rhs\[n, k\], where rows of `out` are `out_stride` apart.
fn multiply(lhs: &[f32], rhs: &[f32], k: usize, out: &mut [f32], out_stride: usize) {
    let (m, n) = (lhs.len() / k, rhs.len() / k);
    assert!(m * k == lhs.len() && n * k == rhs.len() && n <= out_stride);
    assert!(out.len() >= (m - 1) * out_stride + n);
    let signed = |stride: usize| isize::try_from(stride).expect("slices are shorter than isize");
    // SAFETY: with the strides given, `out` is written at [0, (m-1)·out_stride + n) and `lhs` read at
    // [0, m·k), inside their slices as asserted above; `out` is borrowed mutably.
    unsafe {
        let (out, lhs) = (
            (out.as_mut_ptr(), signed(out_stride)),
            (lhs.as_ptr(), signed(k)),
        );
        product([m, n, k], out, lhs, rhs, (1, signed(k)));
    }
}

/// out\[m, n\] = lhs\[m, k\]·rhs\[k, n\], in the thread that asks. `lhs` and `out` have rows, a stride
/// apart; `rhs` is dense, with a stride over k and one over n.
///
/// # Safety
/// m rows of n numbers must be writable at `out`, by nobody else, and m of k readable at `lhs`; the
/// strides of `rhs` must be 1 and n or k.
pub(crate) unsafe fn product(
    [m, n, k]: [usize; 3],
    (out, out_stride): (*mut f32, isize),
    (lhs, lhs_stride): (*const f32, isize),
    rhs: &[f32],
    (over_k, over_n): (isize, isize),
) {
    assert!(rhs.len() >= n * k);
    // SAFETY: the caller's promise; `rhs` has n·k numbers, as asserted.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            out_stride,
            false,
            lhs,
            1,
            lhs_stride,
            rhs.as_ptr(),
            over_n,
            over_k,
            0.0,
            1.0,
            false,
            false,
            false,
            // What runs in parallel are layers and heads.
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
