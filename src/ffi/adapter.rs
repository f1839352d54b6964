//! Adapters: any selection of their labels.

// Of every unsafe block of an exported function here: vmix.h asks for pointers that are valid, what can
// be seen of that is checked by `argument`, and handles are alive until they are freed.
#![expect(clippy::undocumented_unsafe_blocks, reason = "said once, above")]

use std::ffi::{CStr, c_void};

use safer_ffi::{c_char, ffi_export};

use super::{
    argument::{self, Out, OutStruct, reference},
    boundary::{Failure, Result, boundary},
    bridge::{opaque_handle, printed_as},
    texts::Texts,
    types::*,
    values::VmixValues,
};
use crate::{Adapter, DType, LabelKey, Opened, Selection};

/// An adapter that is open.
pub struct VmixAdapter {
    adapter: Adapter,
    texts: Texts,
}

opaque_handle!(
    VmixAdapter,
    "An adapter: any selection of its labels. Freed with vmix_adapter_free()."
);

impl VmixAdapter {
    fn boxed(adapter: Adapter) -> *mut Self {
        let texts = Texts::new(adapter.labels(), adapter.layers());
        Box::into_raw(Box::new(Self { adapter, texts }))
    }
}

/// Opens an adapter or a preset, whichever the file is. On success exactly one of `*adapter` and
/// `*values` is a handle, and the other is NULL. Init files, which are for training, are refused.
///
/// Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (an empty path, a file beyond 4 GiB), IO, INVALID_FILE,
/// OUT_OF_MEMORY.
#[ffi_export]
unsafe fn vmix_open(
    path: *const c_char,
    adapter: *mut *mut VmixAdapter,
    values: *mut *mut VmixValues,
) -> VmixStatus {
    boundary(|| unsafe {
        let path = argument::path("path", path.cast())?;
        let adapter = Out::new("adapter", adapter)?;
        let values = Out::new("values", values)?;
        match crate::open(path)? {
            Opened::Adapter(opened) => {
                adapter.write(VmixAdapter::boxed(opened));
                values.write(std::ptr::null_mut());
            }
            Opened::Preset(opened) => {
                adapter.write(std::ptr::null_mut());
                values.write(VmixValues::boxed(opened));
            }
            Opened::Untrained(_) => {
                let message = "metadata `vmix.kind`: expected `adapter` or `preset`, found `init`, \
                               which is for training";
                let message = format!("{}: {message}", path.display());
                return Err(Failure::new(VmixStatus::InvalidFile, message));
            }
        }
        Ok(())
    })
}

/// Reads an adapter file whole and checks it. The file is not needed afterwards.
///
/// `path`: bytes on Unix, UTF-8 on Windows. `*out` is freed with vmix_adapter_free().
/// Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (an empty path, a file beyond 4 GiB), IO, INVALID_FILE,
/// OUT_OF_MEMORY.
#[ffi_export]
unsafe fn vmix_adapter_open(path: *const c_char, out: *mut *mut VmixAdapter) -> VmixStatus {
    boundary(|| unsafe {
        let path = argument::path("path", path.cast())?;
        let out = Out::new("out", out)?;
        out.write(VmixAdapter::boxed(Adapter::open(path)?));
        Ok(())
    })
}

/// Opens an adapter file of `size` bytes that lies in memory; it is copied.
///
/// Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (a size beyond memory), INVALID_FILE.
#[ffi_export]
unsafe fn vmix_adapter_open_memory(
    data: *const c_void,
    size: usize,
    out: *mut *mut VmixAdapter,
) -> VmixStatus {
    boundary(|| unsafe {
        let data = argument::slice::<u8>("data", data.cast(), size)?;
        let out = Out::new("out", out)?;
        out.write(VmixAdapter::boxed(Adapter::from_bytes(data.to_vec())?));
        Ok(())
    })
}

/// Frees an adapter; NULL is allowed. Values that were computed from it live on.
#[ffi_export]
unsafe fn vmix_adapter_free(adapter: *mut VmixAdapter) {
    boundary(|| {
        if !adapter.is_null() {
            // SAFETY: it came from `boxed`, and is freed once.
            drop(unsafe { Box::from_raw(adapter) });
        }
        Ok(())
    });
}

/// Fills `*out`, whose struct_size the caller has set.
///
/// Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (struct_size).
#[ffi_export]
unsafe fn vmix_adapter_info(adapter: *const VmixAdapter, out: *mut VmixAdapterInfo) -> VmixStatus {
    boundary(|| unsafe {
        let VmixAdapter { adapter, .. } = reference("adapter", adapter)?;
        let out = OutStruct::new("out", out)?;
        out.write(VmixAdapterInfo {
            struct_size: size_of::<VmixAdapterInfo>(),
            base: argument::c_base(adapter.base()),
            apply_to: argument::c_apply_to(adapter.apply_to()),
            label_count: adapter.labels().len(),
            layer_count: adapter.layers().len(),
            context_tokens: adapter.context_tokens(),
            context_dim: adapter.context_dim().unwrap_or(0),
        });
        Ok(())
    })
}

/// The value of a metadata key of the file, such as "modelspec.license", up to its first NUL. The
/// string belongs to the handle.
///
/// Statuses: NULL_ARGUMENT, NOT_FOUND.
#[ffi_export]
unsafe fn vmix_adapter_metadata(
    adapter: *const VmixAdapter,
    key: *const c_char,
    out: *mut *const c_char,
) -> VmixStatus {
    boundary(|| unsafe {
        let VmixAdapter { adapter, texts } = reference("adapter", adapter)?;
        let key = c_str("key", key)?;
        let out = Out::new("out", out)?;
        out.write(texts.metadata(key, || adapter.metadata().clone())?.cast());
        Ok(())
    })
}

/// Fills `*out`, whose struct_size the caller has set, with label `index`, below label_count.
///
/// Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (struct_size), OUT_OF_RANGE.
#[ffi_export]
unsafe fn vmix_adapter_label(
    adapter: *const VmixAdapter,
    index: usize,
    out: *mut VmixLabel,
) -> VmixStatus {
    boundary(|| unsafe {
        let VmixAdapter { adapter, texts } = reference("adapter", adapter)?;
        let out = OutStruct::new("out", out)?;
        let weights = adapter.labels().weights(&Selection::Default)?;
        out.write(texts.label(index, &weights)?);
        Ok(())
    })
}

/// The index of the label of this name. The message of NOT_FOUND lists the known ones.
///
/// Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (not UTF-8), NOT_FOUND.
#[ffi_export]
unsafe fn vmix_adapter_label_find(
    adapter: *const VmixAdapter,
    name: *const c_char,
    out: *mut usize,
) -> VmixStatus {
    boundary(|| unsafe {
        let VmixAdapter { adapter, .. } = reference("adapter", adapter)?;
        let name = argument::text("name", name.cast())?;
        let out = Out::new("out", out)?;
        out.write(adapter.labels().index(&LabelKey::from(name))?);
        Ok(())
    })
}

/// What to call label `index` in a language ("zh", "de"), where the file says so. The string
/// belongs to the handle.
///
/// Statuses: NULL_ARGUMENT, OUT_OF_RANGE, NOT_FOUND.
#[ffi_export]
unsafe fn vmix_adapter_label_display_name(
    adapter: *const VmixAdapter,
    index: usize,
    language: *const c_char,
    out: *mut *const c_char,
) -> VmixStatus {
    boundary(|| unsafe {
        let VmixAdapter { texts, .. } = reference("adapter", adapter)?;
        let language = c_str("language", language)?;
        let out = Out::new("out", out)?;
        out.write(texts.display_name(index, language)?.cast());
        Ok(())
    })
}

/// Fills `*out`, whose struct_size the caller has set, with layer `index`, below layer_count. Layers
/// are in order from down to up; hosts walk U-Nets in orders of their own, so go by the name.
///
/// Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (struct_size), OUT_OF_RANGE.
#[ffi_export]
unsafe fn vmix_adapter_layer(
    adapter: *const VmixAdapter,
    index: usize,
    out: *mut VmixLayer,
) -> VmixStatus {
    boundary(|| unsafe {
        let VmixAdapter { texts, .. } = reference("adapter", adapter)?;
        let out = OutStruct::new("out", out)?;
        out.write(texts.layer(index)?);
        Ok(())
    })
}

/// The index of the layer of this diffusers or LDM name.
///
/// Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (not UTF-8), NOT_FOUND.
#[ffi_export]
unsafe fn vmix_adapter_layer_find(
    adapter: *const VmixAdapter,
    name: *const c_char,
    out: *mut usize,
) -> VmixStatus {
    boundary(|| unsafe {
        let VmixAdapter { adapter, .. } = reference("adapter", adapter)?;
        let name = argument::text("name", name.cast())?;
        let out = Out::new("out", out)?;
        out.write(adapter.layers().index(name)?);
        Ok(())
    })
}

/// f_t, the features of a selection looked up in AesEmb (paper, section 3.3): row-major
/// `[label_count, context_dim]`, which `out_count` must equal exactly.
///
/// `weights`: one per label, or NULL with `weight_count` 0 for the file's defaults.
/// Statuses: NULL_ARGUMENT, INVALID_ARGUMENT, BUFFER_SIZE, NOT_FOUND (a file without AesEmb).
#[ffi_export]
unsafe fn vmix_adapter_aes_embed(
    adapter: *const VmixAdapter,
    weights: *const f32,
    weight_count: usize,
    out: *mut f32,
    out_count: usize,
) -> VmixStatus {
    boundary(|| unsafe {
        let VmixAdapter { adapter, .. } = reference("adapter", adapter)?;
        let selection = selection("weights", weights, weight_count, adapter)?;
        // Before the buffer: of what is not there the caller may not know the size.
        let f_t = present(adapter.aes_embed(&selection)?, "AesEmb")?.to_f32();
        argument::buffer("out", out, out_count, f_t.len())?.copy_from_slice(&f_t);
        Ok(())
    })
}

/// f_a, the aesthetic context of a selection (paper, eq. 6): row-major
/// `[context_tokens, context_dim]`, which `out_count` must equal exactly.
///
/// `weights`: one per label, or NULL with `weight_count` 0 for the file's defaults.
/// Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (also a result that overflows), BUFFER_SIZE, NOT_FOUND (a
/// linear adapter, which has none).
#[ffi_export]
unsafe fn vmix_adapter_project(
    adapter: *const VmixAdapter,
    weights: *const f32,
    weight_count: usize,
    out: *mut f32,
    out_count: usize,
) -> VmixStatus {
    boundary(|| unsafe {
        let VmixAdapter { adapter, .. } = reference("adapter", adapter)?;
        let selection = selection("weights", weights, weight_count, adapter)?;
        let f_a = present(adapter.project(&selection)?, "f_a")?.to_f32();
        argument::buffer("out", out, out_count, f_a.len())?.copy_from_slice(&f_a);
        Ok(())
    })
}

/// V_a of every layer for a selection (paper, eq. 7): once per choice of labels. It uses all cores.
///
/// `params`: NULL for the file's defaults in f32. `*out` is freed with vmix_values_free() and does
/// not need the adapter any more.
/// Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (also values beyond the dtype), UNSUPPORTED (params of a
/// later version).
#[ffi_export]
unsafe fn vmix_adapter_values(
    adapter: *const VmixAdapter,
    params: *const VmixValuesParams,
    out: *mut *mut VmixValues,
) -> VmixStatus {
    boundary(|| unsafe {
        let VmixAdapter { adapter, .. } = reference("adapter", adapter)?;
        let out = Out::new("out", out)?;
        let mut selected = Selection::Default;
        let mut apply_to = adapter.apply_to();
        let mut dtype = DType::F32;
        if !params.is_null() {
            let params = argument::read_struct("params", params)?;
            let name = "params->weights";
            selected = selection(name, params.weights, params.weight_count, adapter)?;
            apply_to = argument::apply_to("params", params.apply_to, apply_to)?;
            if params.dtype != VmixDType(0) {
                dtype = argument::dtype("params", params.dtype)?;
            }
        }
        let values = adapter.values(&selected, apply_to, dtype)?;
        out.write(VmixValues::boxed(values));
        Ok(())
    })
}

fn present<T>(what: Option<T>, name: &str) -> Result<T> {
    what.ok_or_else(|| {
        let message = format!("this adapter has no {name}");
        Failure::new(VmixStatus::NotFound, message)
    })
}

/// # Safety
/// That many numbers must be readable.
unsafe fn selection(
    argument: &str,
    weights: *const f32,
    count: usize,
    adapter: &Adapter,
) -> Result<Selection> {
    if weights.is_null() && count == 0 {
        return Ok(Selection::Default);
    }
    // SAFETY: the caller's promise.
    let weights = unsafe { argument::slice(argument, weights, count)? };
    let expected = adapter.labels().len();
    if count != expected {
        let message =
            format!("{argument}: expected {expected} numbers, one per label, found {count}");
        return Err(Failure::new(VmixStatus::InvalidArgument, message));
    }
    Ok(Selection::weights(weights.iter().copied().enumerate()))
}

/// A C string of any bytes, for lookups.
///
/// # Safety
/// As [`argument::text`].
pub(super) unsafe fn c_str<'a>(argument: &str, pointer: *const c_char) -> Result<&'a CStr> {
    // SAFETY: the caller's promise.
    unsafe {
        reference(argument, pointer)?;
        Ok(CStr::from_ptr(pointer.cast()))
    }
}
