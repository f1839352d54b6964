//! V_c + λ·V_a, for hosts that have an attention of their own.

use super::{Strengths, fit_aes_value};
use crate::{
    Error, Result,
    view::{TensorView, TensorViewMut},
};

/// Numbers that are added at a time: what is converted stays in the nearest cache.
const PART: usize = 2048;

/// V_c + λ·V_a in place (paper, eq. 9), all that a host with an attention of its own needs.
///
/// `value` is `[B, k·C, H, D]`; `aes_value` `[1 or B, C, H, D]` or `[1 or B, C, 1, H·D]`, repeated k
/// times; `strength`, λ, one for all or one per batch entry. Each sum is computed in f32 and rounded
/// once. Where λ is 0 not a bit changes.
///
/// # Errors
/// When shapes do not fit together, or a λ is not finite. Then nothing is written.
pub fn mix_values(
    value: &mut TensorViewMut<'_>,
    aes_value: TensorView<'_>,
    strength: &[f32],
) -> Result<()> {
    let [batch, keys, heads, dim] = value.shape();
    let strengths = Strengths::new(strength, batch)?;
    let aes_value = fit_aes_value(aes_value, batch, keys, heads, dim)?;
    if value.shape().contains(&0) {
        return Ok(());
    }
    if value.overlaps(&aes_value) {
        let expected = "memory that the values do not span";
        return Err(Error::argument("aes_value", expected, "memory they do"));
    }
    // Longer rows where the heads of a token are adjacent in both.
    let (mut value, aes_value) = match (value.merge_heads(), aes_value.merge_heads()) {
        (Some(value), Some(aes_value)) => (value, aes_value),
        _ => (value.reborrow(), aes_value),
    };
    // And where its tokens are.
    let tokens = aes_value.shape()[1];
    let (mut value, aes_value) = match (value.merge_tokens(tokens), aes_value.merge_tokens(tokens))
    {
        (Some(value), Some(aes_value)) => (value, aes_value),
        _ => (value.reborrow(), aes_value),
    };
    let tokens = aes_value.shape()[1];
    let [_, keys, heads, dim] = value.shape();
    let mut scratch = [Vec::new(), Vec::new()];
    for b in 0..batch {
        let strength = strengths.of(b);
        if strength == 0.0 {
            continue;
        }
        for t in 0..keys {
            for h in 0..heads {
                for d in (0..dim).step_by(PART) {
                    let added = (aes_value, [b, t % tokens, h, d]);
                    let len = PART.min(dim - d);
                    value.add_row([b, t, h, d], len, strength, added, &mut scratch);
                }
            }
        }
    }
    Ok(())
}
