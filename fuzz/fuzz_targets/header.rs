//! The C API as a C host sees it: `include/vmix.h`, written again by hand.

use std::ffi::{c_char, c_void};

pub type Status = u32;
pub const OK: Status = 0;
pub const NULL_ARGUMENT: Status = 1;
pub const INVALID_ARGUMENT: Status = 2;
pub const NOT_FOUND: Status = 3;
pub const OUT_OF_RANGE: Status = 4;
pub const BUFFER_SIZE: Status = 5;
pub const IO: Status = 6;
pub const INVALID_FILE: Status = 7;
pub const UNSUPPORTED: Status = 8;
pub const OUT_OF_MEMORY: Status = 9;

pub const DTYPE_F32: u32 = 1;
pub const DTYPE_BF16: u32 = 3;
pub const PASS_UNCOND: u32 = 2;

#[repr(C)]
pub struct Adapter {
    incomplete: [u8; 0],
}

#[repr(C)]
pub struct Values {
    incomplete: [u8; 0],
}

/// Anything that begins with its size and is plain data.
///
/// # Safety
/// `repr(C)`, without padding, and all bytes are valid.
pub unsafe trait Struct: Copy {}

macro_rules! structs {
    ($(pub struct $name:ident { $(pub $field:ident: $type:ty,)* })*) => {$(
        #[repr(C)]
        #[derive(Clone, Copy, Debug)]
        pub struct $name {
            $(pub $field: $type,)*
        }

        // SAFETY: numbers and raw pointers, with all padding a field of its own.
        unsafe impl Struct for $name {}
    )*};
}

structs! {
    /* VmixView and VmixViewMut. */
    pub struct View {
        pub struct_size: usize,
        pub data: *mut c_void,
        pub dtype: u32,
        pub padding: u32,
        pub shape: [i64; 4],
        pub strides: [i64; 4],
    }

    pub struct AdapterInfo {
        pub struct_size: usize,
        pub base: u32,
        pub apply_to: u32,
        pub label_count: usize,
        pub layer_count: usize,
        pub context_tokens: usize,
        pub context_dim: usize,
    }

    pub struct ValuesInfo {
        pub struct_size: usize,
        pub base: u32,
        pub apply_to: u32,
        pub dtype: u32,
        pub padding: u32,
        pub label_count: usize,
        pub layer_count: usize,
        pub context_tokens: usize,
    }

    pub struct Label {
        pub struct_size: usize,
        pub name: *const c_char,
        pub dimension: *const c_char,
        pub positive: *const c_char,
        pub negative: *const c_char,
        pub weight: f32,
        pub neutral: f32,
        pub low: f32,
        pub high: f32,
        pub step: f32,
        pub padding: u32,
    }

    pub struct Layer {
        pub struct_size: usize,
        pub name: *const c_char,
        pub ldm_name: *const c_char,
        pub inner_dim: usize,
    }

    pub struct ValuesParams {
        pub struct_size: usize,
        pub weights: *const f32,
        pub weight_count: usize,
        pub apply_to: u32,
        pub dtype: u32,
    }

    pub struct MixParams {
        pub struct_size: usize,
        pub value: *const View,
        pub aes_value: *const View,
        pub strength: *const f32,
        pub strength_count: usize,
    }

    pub struct AttentionParams {
        pub struct_size: usize,
        pub query: *const View,
        pub key: *const View,
        pub value: *const View,
        pub aes_value: *const View,
        pub strength: *const f32,
        pub strength_count: usize,
        pub scale: f32,
        pub padding: u32,
        pub mask: *const View,
        pub query_mask: *const View,
        pub output: *const View,
        pub attention_map: *const View,
        pub attention_map_head: usize,
    }
}

macro_rules! functions {
    ($($name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        unsafe extern "C" {
            $(pub fn $name($($argument: $type),*) $(-> $result)?;)*
        }
    };
}

type Text = *const c_char;

functions! {
    vmix_abi_version() -> u32;
    vmix_version() -> Text;
    vmix_build_info() -> Text;
    vmix_last_error() -> Text;
    vmix_status_name(status: u32) -> Text;
    vmix_set_num_threads(count: usize);
    vmix_num_threads() -> usize;

    vmix_open(path: Text, adapter: *mut *mut Adapter, values: *mut *mut Values) -> Status;

    vmix_adapter_open(path: Text, out: *mut *mut Adapter) -> Status;
    vmix_adapter_open_memory(data: *const c_void, size: usize, out: *mut *mut Adapter) -> Status;
    vmix_adapter_free(adapter: *mut Adapter);
    vmix_adapter_info(adapter: *const Adapter, out: *mut AdapterInfo) -> Status;
    vmix_adapter_metadata(adapter: *const Adapter, key: Text, out: *mut Text) -> Status;
    vmix_adapter_label(adapter: *const Adapter, index: usize, out: *mut Label) -> Status;
    vmix_adapter_label_find(adapter: *const Adapter, name: Text, out: *mut usize) -> Status;
    vmix_adapter_label_display_name(
        adapter: *const Adapter, index: usize, language: Text, out: *mut Text) -> Status;
    vmix_adapter_layer(adapter: *const Adapter, index: usize, out: *mut Layer) -> Status;
    vmix_adapter_layer_find(adapter: *const Adapter, name: Text, out: *mut usize) -> Status;
    vmix_adapter_aes_embed(
        adapter: *const Adapter, weights: *const f32, weight_count: usize, out: *mut f32,
        out_count: usize) -> Status;
    vmix_adapter_project(
        adapter: *const Adapter, weights: *const f32, weight_count: usize, out: *mut f32,
        out_count: usize) -> Status;
    vmix_adapter_values(
        adapter: *const Adapter, params: *const ValuesParams, out: *mut *mut Values) -> Status;

    vmix_values_open(path: Text, out: *mut *mut Values) -> Status;
    vmix_values_open_memory(data: *const c_void, size: usize, out: *mut *mut Values) -> Status;
    vmix_values_save(values: *const Values, path: Text) -> Status;
    vmix_values_free(values: *mut Values);
    vmix_values_info(values: *const Values, out: *mut ValuesInfo) -> Status;
    vmix_values_metadata(values: *const Values, key: Text, out: *mut Text) -> Status;
    vmix_values_label(values: *const Values, index: usize, out: *mut Label) -> Status;
    vmix_values_label_find(values: *const Values, name: Text, out: *mut usize) -> Status;
    vmix_values_label_display_name(
        values: *const Values, index: usize, language: Text, out: *mut Text) -> Status;
    vmix_values_layer(values: *const Values, index: usize, out: *mut Layer) -> Status;
    vmix_values_layer_find(values: *const Values, name: Text, out: *mut usize) -> Status;
    vmix_values_get(values: *const Values, index: usize, pass: u32, out: *mut View) -> Status;
    vmix_values_copy(values: *const Values, index: usize, pass: u32, to: *const View) -> Status;

    vmix_mix_values(params: *const MixParams) -> Status;
    vmix_attention(params: *const AttentionParams) -> Status;
}
