//! Attention of a block of queries by two matrix products of the crate `gemm`, for processors that
//! have no kernel of their own.

use std::f32::consts::LOG2_E;

use super::blocks::Block;
use crate::{
    exp2::{LEAST, POWERS},
    product::product,
};

/// Queries of a block, at least.
pub(super) const ROWS: usize = 32;

/// A block of queries, from scores to the result.
///
/// # Safety
/// Keys and values must be `keys` dense rows of `dim` numbers, and the block as it says.
pub(super) unsafe fn block(keys: usize, dim: usize, block: &mut Block<'_>) {
    let count = block.count;
    // Strides over the sum and over the columns.
    let (key_rows, value_rows) = ((1, dim as isize), (dim as isize, 1));
    // SAFETY: `count` queries are readable, `count` rows of scores are there.
    unsafe {
        let scores = (block.scores.as_mut_ptr(), keys as isize);
        let query = (block.query, block.query_stride);
        product([count, keys, dim], scores, query, block.keys, key_rows);
    }
    for (i, row) in block.scores.chunks_exact_mut(keys).take(count).enumerate() {
        if let Some(mask) = block.mask {
            for (x, mask) in row.iter_mut().zip(&mask[i * keys..]) {
                *x += mask * LOG2_E;
            }
        }
        block.factors[i] = powers(row, block.mask.is_some());
    }
    let (weights, shape) = ((block.scores.as_ptr(), keys as isize), [count, dim, keys]);
    // SAFETY: as above; `count` rows of the result are writable, and of `extra` where it is used.
    unsafe {
        let out = (block.out, block.out_stride);
        product(shape, out, weights, block.values, value_rows);
        if let Some((aes_values, _)) = block.regional {
            let extra = (block.extra.as_mut_ptr(), dim as isize);
            product(shape, extra, weights, aes_values, value_rows);
        }
        for i in 0..count {
            let row = std::slice::from_raw_parts_mut(out.0.offset(i as isize * out.1), dim);
            if let Some((_, strengths)) = block.regional {
                for (x, more) in row.iter_mut().zip(&block.extra[i * dim..]) {
                    *x += strengths[i] * more;
                }
            }
            row.iter_mut().for_each(|x| *x *= block.factors[i]);
        }
    }
}

/// Scores become powers of two; one divided by their sum, or 0 where all are hidden.
fn powers(row: &mut [f32], masked: bool) -> f32 {
    let top = fold(
        row,
        f32::NEG_INFINITY,
        |top, x| if x > top { x } else { top },
    );
    let hidden = masked && top == f32::NEG_INFINITY;
    let top = if hidden { 0.0 } else { top };
    for x in row.iter_mut() {
        *x = exp2(*x - top);
    }
    let sum = fold(row, 0.0, |sum, x| sum + x);
    if hidden && sum == 0.0 { 0.0 } else { 1.0 / sum }
}

/// Of several numbers at a time, none of which waits for the one before it.
fn fold(row: &[f32], first: f32, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut all = [first; 16];
    let (chunks, rest) = row.as_chunks::<16>();
    for chunk in chunks {
        for (all, x) in all.iter_mut().zip(chunk) {
            *all = f(*all, *x);
        }
    }
    for (all, x) in all.iter_mut().zip(rest) {
        *all = f(*all, *x);
    }
    all.into_iter().fold(first, f)
}

/// As the lanes do it, so that the compiler can do several at a time.
fn exp2(x: f32) -> f32 {
    let none = x < LEAST; // which what is no number is not
    let x = if none { LEAST } else { x };
    const NEAREST: f32 = (3 << 22) as f32; // whole numbers are what is left beside it
    let whole = (x + NEAREST) - NEAREST;
    let rest = x - whole;
    let power = POWERS
        .iter()
        .rev()
        .fold(0.0, |power, factor| power * rest + factor);
    let power = power * f32::from_bits(((whole as i32 + 127) as u32) << 23);
    if none { 0.0 } else { power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two() {
        for i in 0..=200_000 {
            let x = i as f32 * -0.001;
            let (found, exact) = (f64::from(exp2(x)), f64::from(x).exp2());
            // Relative 2⁻²², or 0 instead of a subnormal number.
            assert!(
                (found - exact).abs() <= exact * 2f64.powi(-22)
                    || found == 0.0 && exact < 2f64.powi(-126),
                "{x} {found}"
            );
        }
        assert_eq!(exp2(0.0), 1.0);
        assert_eq!(exp2(f32::NEG_INFINITY), 0.0);
        assert!(exp2(f32::NAN).is_nan());
    }
}
