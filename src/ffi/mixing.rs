//! Values mixed, and attention over mixed values.

use safer_ffi::ffi_export;

use super::{
    argument::{optional_view, read_struct, slice, view, view_mut},
    boundary::boundary,
    types::*,
};
use crate::{Attention, mix_values};

/// V_c + λ·V_a in place (paper, eq. 9): all that a host with an attention of its own needs. Each sum
/// is computed in f32 and rounded once. Where λ is 0 not a bit changes.
///
/// The number of keys must be a multiple of the tokens of V_a. On failure nothing is written.
/// Statuses: NULL_ARGUMENT, INVALID_ARGUMENT, UNSUPPORTED (params of a later version).
#[ffi_export]
unsafe fn vmix_mix_values(params: *const VmixMixParams) -> VmixStatus {
    boundary(|| {
        // SAFETY: the header asks for valid pointers; NULL is refused.
        unsafe {
            let params = read_struct("params", params)?;
            let mut value = view_mut("value", params.value)?;
            let aes_value = view("aes_value", params.aes_value)?;
            let strength = slice("strength", params.strength, params.strength_count)?;
            Ok(mix_values(&mut value, aes_value, strength)?)
        }
    })
}

/// softmax(Q·Kᵀ/√D)·(V_c + λ·V_a) (paper, eq. 9), for hosts without an attention of their own,
/// computed in f32. λ = 0 gives bit for bit what no V_a gives.
///
/// The number of keys must be a multiple of the tokens of V_a. It may use as many threads as
/// vmix_set_num_threads() allows. On failure nothing is written.
/// Statuses: NULL_ARGUMENT, INVALID_ARGUMENT, UNSUPPORTED (params of a later version),
/// OUT_OF_MEMORY.
#[ffi_export]
unsafe fn vmix_attention(params: *const VmixAttentionParams) -> VmixStatus {
    boundary(|| {
        // SAFETY: the header asks for valid pointers; NULL is refused where something must be.
        unsafe {
            let params = read_struct("params", params)?;
            let mut attention = Attention::new(
                view("query", params.query)?,
                view("key", params.key)?,
                view("value", params.value)?,
            );
            attention.aes_value = optional_view("aes_value", params.aes_value)?;
            if attention.aes_value.is_some() || params.strength_count != 0 {
                attention.strength = slice("strength", params.strength, params.strength_count)?;
            }
            if params.scale != 0.0 {
                attention.scale = Some(params.scale);
            }
            attention.mask = optional_view("mask", params.mask)?;
            attention.query_mask = optional_view("query_mask", params.query_mask)?;
            let mut output = view_mut("output", params.output)?;
            let mut map = match params.attention_map {
                map if map.is_null() => None,
                map => Some(view_mut("attention_map", map)?),
            };
            let map = map.as_mut().map(|map| (map, params.attention_map_head));
            Ok(attention.forward(&mut output, map)?)
        }
    })
}
