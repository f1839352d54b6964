//! Data, constants and status codes of the C API. cbindgen turns this file into
//! `include/vmix_types.h`; it must not use macros or types of other files.

use std::ffi::{c_char, c_void};

/// Major version of the binary interface: another one may have changed anything.
pub const VMIX_ABI_MAJOR: u32 = 1;
/// Minor version of the binary interface: a later one has more.
pub const VMIX_ABI_MINOR: u32 = 0;

/// What every fallible function returns. Numbers 11 to 63 are reserved for statuses to come:
/// treat a number that you do not know as a failure.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmixStatus {
    /// It worked, and the out-parameters are filled.
    Ok = 0,
    /// A pointer that must not be NULL is NULL.
    NullArgument = 1,
    /// An argument does not fit: a shape, a number, a dtype, a struct_size, text that is not UTF-8.
    InvalidArgument = 2,
    /// There is no label, layer or metadata key of that name.
    NotFound = 3,
    /// An index is not below the count.
    OutOfRange = 4,
    /// A buffer has not the size that the result has.
    BufferSize = 5,
    /// A file cannot be read or written; the message has the operating system's words.
    Io = 6,
    /// A file is not what docs/format.md asks for; the message names the key or tensor.
    InvalidFile = 7,
    /// The request is valid, but needs something that this library does not do.
    Unsupported = 8,
    /// The result, or the work on it, does not fit into memory.
    OutOfMemory = 9,
    /// A bug in this library, caught at the boundary. Handles remain usable and must be freed.
    Internal = 10,
}

/// Element type of a tensor: one of the VMIX_DTYPE_ constants.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmixDType(pub u32);
/// 32-bit IEEE float.
pub const VMIX_DTYPE_F32: VmixDType = VmixDType(1);
/// 16-bit IEEE float.
pub const VMIX_DTYPE_F16: VmixDType = VmixDType(2);
/// bfloat16.
pub const VMIX_DTYPE_BF16: VmixDType = VmixDType(3);

/// The kind of U-Net a file is for: one of the VMIX_BASE_ constants.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmixBase(pub u32);
/// Stable Diffusion 1.x: 16 cross-attention layers, 77 tokens of width 768.
pub const VMIX_BASE_SD15: VmixBase = VmixBase(1);
/// Stable Diffusion XL: 70 cross-attention layers, 77 tokens of width 2048.
pub const VMIX_BASE_SDXL: VmixBase = VmixBase(2);
/// Another U-Net, with the layers that the file names.
pub const VMIX_BASE_OTHER: VmixBase = VmixBase(3);

/// Which passes of classifier-free guidance values are for: one of the VMIX_APPLY_TO_ constants.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmixApplyTo(pub u32);
/// In requests only: as the file says.
pub const VMIX_APPLY_TO_DEFAULT: VmixApplyTo = VmixApplyTo(0);
/// Values are mixed in the conditional pass only.
pub const VMIX_APPLY_TO_COND: VmixApplyTo = VmixApplyTo(1);
/// The same V_a is mixed in both passes.
pub const VMIX_APPLY_TO_BOTH: VmixApplyTo = VmixApplyTo(2);
/// The selection in the conditional pass, its opposite in the unconditional one.
pub const VMIX_APPLY_TO_CONTRAST: VmixApplyTo = VmixApplyTo(3);

/// A pass of classifier-free guidance: one of the VMIX_PASS_ constants.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmixPass(pub u32);
/// The pass that sees the prompt.
pub const VMIX_PASS_COND: VmixPass = VmixPass(1);
/// The pass that sees the negative prompt, or none.
pub const VMIX_PASS_UNCOND: VmixPass = VmixPass(2);

/// A tensor that is read: `[batch, tokens, heads, head dim]`, wherever and however it lies.
///
/// The order of the dimensions is fixed; the strides say how they lie in memory. Dense
/// `[B, L, H·D]` has strides `{L*H*D, H*D, D, 1}`, dense `[B, H, L, D]` has `{H*L*D, D, L*D, 1}`.
/// Strides may be negative, and 0 where all entries of a dimension are the same one.
/// vmix_view() makes the first of these.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct VmixView {
    /// sizeof(VmixView)
    pub struct_size: usize,
    /// The first element, aligned to its size. May be NULL only if a size is 0.
    pub data: *const c_void,
    /// Element type; any, whatever the other tensors have.
    pub dtype: VmixDType,
    /// Sizes: batch, tokens, heads, head dim.
    pub shape: [i64; 4],
    /// Distances between neighbours, in elements.
    pub strides: [i64; 4],
}

/// A tensor that is written; otherwise as VmixView. No two of its elements may share memory, and
/// each stride must reach beyond all that the shorter ones span.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct VmixViewMut {
    /// sizeof(VmixViewMut)
    pub struct_size: usize,
    /// The first element, aligned to its size. May be NULL only if a size is 0.
    pub data: *mut c_void,
    /// Element type; results are computed in f32 and rounded to nearest even once, which beyond
    /// the dtype's range gives infinity.
    pub dtype: VmixDType,
    /// Sizes: batch, tokens, heads, head dim.
    pub shape: [i64; 4],
    /// Distances between neighbours, in elements; negative ones are allowed.
    pub strides: [i64; 4],
}

/// What an adapter is, filled by vmix_adapter_info().
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct VmixAdapterInfo {
    /// sizeof(VmixAdapterInfo), set by the caller.
    pub struct_size: usize,
    /// The kind of U-Net it is for.
    pub base: VmixBase,
    /// What it was made to be applied to.
    pub apply_to: VmixApplyTo,
    /// N, the number of labels.
    pub label_count: usize,
    /// The number of cross-attention layers.
    pub layer_count: usize,
    /// C, the tokens of one chunk of context.
    pub context_tokens: usize,
    /// d, the width of the context; 0 if neither the base nor the file says it.
    pub context_dim: usize,
}

/// What values are, filled by vmix_values_info().
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct VmixValuesInfo {
    /// sizeof(VmixValuesInfo), set by the caller.
    pub struct_size: usize,
    /// The kind of U-Net they are for.
    pub base: VmixBase,
    /// Which passes they are for.
    pub apply_to: VmixApplyTo,
    /// Element type of all V_a.
    pub dtype: VmixDType,
    /// N, the number of labels.
    pub label_count: usize,
    /// The number of cross-attention layers.
    pub layer_count: usize,
    /// C, the tokens of one chunk of context.
    pub context_tokens: usize,
}

/// An aesthetic label. The strings belong to the handle that was asked, and live as long.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct VmixLabel {
    /// sizeof(VmixLabel), set by the caller.
    pub struct_size: usize,
    /// What users choose by, unique in a file.
    pub name: *const c_char,
    /// The aesthetic dimension, such as "lighting"; may be empty.
    pub dimension: *const c_char,
    /// The texts that mean having the label, one per line.
    pub positive: *const c_char,
    /// The texts that mean the opposite, one per line.
    pub negative: *const c_char,
    /// Of an adapter the weight that hosts start from; of values the weight they were made with.
    pub weight: f32,
    /// The weight at which the label changes nothing; NaN if there is none.
    pub neutral: f32,
    /// Lowest weight of a slider.
    pub low: f32,
    /// Highest weight of a slider.
    pub high: f32,
    /// Step of a slider.
    pub step: f32,
}

/// A cross-attention layer. The strings belong to the handle that was asked, and live as long.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct VmixLayer {
    /// sizeof(VmixLayer), set by the caller.
    pub struct_size: usize,
    /// diffusers path, such as "down_blocks.0.attentions.0.transformer_blocks.0.attn2".
    pub name: *const c_char,
    /// LDM path, such as "input_blocks.1.1.transformer_blocks.0.attn2", as in checkpoints after
    /// "model.diffusion_model."; NULL if unknown.
    pub ldm_name: *const c_char,
    /// Width of the layer's values, heads times head dim.
    pub inner_dim: usize,
}

/// What vmix_adapter_values() is to compute. All zeros but struct_size asks for the file's own
/// defaults in f32.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct VmixValuesParams {
    /// sizeof(VmixValuesParams)
    pub struct_size: usize,
    /// The weight of every label in the file's order. A label that is not wanted is at its neutral
    /// weight, or at 0 where that is NaN. vmix_adapter_label_find() gives the index of a name.
    pub weights: *const f32,
    /// Number of weights: the number of labels, or 0 with NULL for the file's defaults.
    pub weight_count: usize,
    /// Which passes the values are for; VMIX_APPLY_TO_DEFAULT as the file says.
    pub apply_to: VmixApplyTo,
    /// Element type of V_a; 0 for VMIX_DTYPE_F32. Sums are f32 in any case.
    pub dtype: VmixDType,
}

/// What vmix_mix_values() is to mix.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct VmixMixParams {
    /// sizeof(VmixMixParams)
    pub struct_size: usize,
    /// V_c, `{B, k*C, H, D}`, changed in place.
    pub value: *const VmixViewMut,
    /// V_a, `{1 or B, C, H, D}` or `{1 or B, C, 1, H*D}`; repeated k times.
    pub aes_value: *const VmixView,
    /// λ: one for all, or one per batch entry. Where it is 0 not a bit changes.
    pub strength: *const f32,
    /// 1 or B.
    pub strength_count: usize,
}

/// What vmix_attention() is to compute. B batch entries, L_q queries, L_k = k*C keys, H heads of
/// width D. Masks may have size 1 in a dimension in which they do not vary.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct VmixAttentionParams {
    /// sizeof(VmixAttentionParams)
    pub struct_size: usize,
    /// Q, `{B, L_q, H, D}`.
    pub query: *const VmixView,
    /// K_c, `{B, L_k, H, D}`.
    pub key: *const VmixView,
    /// V_c, `{B, L_k, H, D}`.
    pub value: *const VmixView,
    /// V_a, `{1 or B, C, H, D}` or `{1 or B, C, 1, H*D}`; NULL for ordinary attention.
    pub aes_value: *const VmixView,
    /// λ: one for all, or one per batch entry. None are needed if aes_value is NULL.
    pub strength: *const f32,
    /// 1 or B; 0 for none.
    pub strength_count: usize,
    /// What scores are multiplied with; 0 for 1/√D.
    pub scale: f32,
    /// Added to the scaled scores, `{B, L_q, H, L_k}`: -INFINITY hides a key. A query all of whose
    /// keys are hidden gives zeros; NaN and +INFINITY give NaN. NULL for none.
    pub mask: *const VmixView,
    /// What λ is multiplied with for each query, `{B, L_q, 1, 1}`: the strength of a region. NULL
    /// for 1.
    pub query_mask: *const VmixView,
    /// The result, `{B, L_q, H, D}`. It may be the query itself, and must not overlap the other
    /// tensors.
    pub output: *const VmixViewMut,
    /// The attention maps, softmax(Q·Kᵀ·scale + mask), of as many heads as it has:
    /// `{B, L_q, heads, L_k}`. NULL for none.
    pub attention_map: *const VmixViewMut,
    /// The first of these heads.
    pub attention_map_head: usize,
}
