//! Values: V_a of every layer for one selection; what a preset file holds.

// Of every unsafe block of an exported function here: vmix.h asks for pointers that are valid, what can
// be seen of that is checked by `argument`, and handles are alive until they are freed.
#![expect(clippy::undocumented_unsafe_blocks, reason = "said once, above")]

use std::ffi::c_void;

use safer_ffi::{c_char, ffi_export};

use super::{
    adapter::c_str,
    argument::{self, Out, OutStruct, reference},
    boundary::{Failure, Result, boundary},
    bridge::{opaque_handle, printed_as},
    texts::Texts,
    types::*,
};
use crate::{ApplyTo, LabelKey, Tensor, TensorView, Values};

/// Values of one selection.
pub struct VmixValues {
    values: Values,
    texts: Texts,
}

opaque_handle!(
    VmixValues,
    "V_a of every layer for one selection. Freed with vmix_values_free()."
);

impl VmixValues {
    pub(super) fn boxed(values: Values) -> *mut Self {
        let texts = Texts::new(values.labels(), values.layers());
        Box::into_raw(Box::new(Self { values, texts }))
    }

    /// V_a of a layer in a pass; none where nothing is to be mixed.
    fn tensor(&self, layer: usize, pass: VmixPass) -> Result<Option<&Tensor>> {
        let name = &argument::index("layer", self.values.layers(), layer)?.name;
        let uncond = argument::is_uncond(pass)?;
        Ok(match (uncond, self.values.apply_to()) {
            (false, _) | (true, ApplyTo::Both) => Some(self.values.get(name)?),
            (true, ApplyTo::Contrast) => self.values.get_uncond(name)?.map(|tensor| &**tensor),
            (true, ApplyTo::Cond) => None,
        })
    }
}

/// Reads a preset file whole and checks it. The file is not needed afterwards.
///
/// `path`: bytes on Unix, UTF-8 on Windows. `*out` is freed with vmix_values_free().
/// Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (an empty path, a file beyond 4 GiB), IO, INVALID_FILE,
/// OUT_OF_MEMORY.
#[ffi_export]
unsafe fn vmix_values_open(path: *const c_char, out: *mut *mut VmixValues) -> VmixStatus {
    boundary(|| unsafe {
        let path = argument::path("path", path.cast())?;
        let out = Out::new("out", out)?;
        out.write(VmixValues::boxed(Values::open(path)?));
        Ok(())
    })
}

/// Opens a preset file of `size` bytes that lies in memory; what is needed is copied.
///
/// Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (a size beyond memory), INVALID_FILE.
#[ffi_export]
unsafe fn vmix_values_open_memory(
    data: *const c_void,
    size: usize,
    out: *mut *mut VmixValues,
) -> VmixStatus {
    boundary(|| unsafe {
        let data = argument::slice::<u8>("data", data.cast(), size)?;
        let out = Out::new("out", out)?;
        out.write(VmixValues::boxed(Values::from_bytes(data.to_vec())?));
        Ok(())
    })
}

/// Writes a preset file, whole or not at all: beside its place, and then renamed into it. A link stays
/// one, and what it leads to is replaced; what is no regular file is refused.
///
/// Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (an empty path), IO.
#[ffi_export]
unsafe fn vmix_values_save(values: *const VmixValues, path: *const c_char) -> VmixStatus {
    boundary(|| unsafe {
        let VmixValues { values, .. } = reference("values", values)?;
        let path = argument::path("path", path.cast())?;
        Ok(values.save(path)?)
    })
}

/// Frees values; NULL is allowed. Views of them end.
#[ffi_export]
unsafe fn vmix_values_free(values: *mut VmixValues) {
    boundary(|| {
        if !values.is_null() {
            // SAFETY: it came from `boxed`, and is freed once.
            drop(unsafe { Box::from_raw(values) });
        }
        Ok(())
    });
}

/// Fills `*out`, whose struct_size the caller has set.
///
/// Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (struct_size).
#[ffi_export]
unsafe fn vmix_values_info(values: *const VmixValues, out: *mut VmixValuesInfo) -> VmixStatus {
    boundary(|| unsafe {
        let VmixValues { values, .. } = reference("values", values)?;
        let out = OutStruct::new("out", out)?;
        out.write(VmixValuesInfo {
            struct_size: size_of::<VmixValuesInfo>(),
            base: argument::c_base(values.base()),
            apply_to: argument::c_apply_to(values.apply_to()),
            dtype: argument::c_dtype(values.dtype()),
            label_count: values.labels().len(),
            layer_count: values.layers().len(),
            context_tokens: values.context_tokens(),
        });
        Ok(())
    })
}

/// The value of a metadata key as a preset file has it, such as "vmix.origin", the SHA-256 of the
/// adapter file. The string belongs to the handle.
///
/// Statuses: NULL_ARGUMENT, NOT_FOUND.
#[ffi_export]
unsafe fn vmix_values_metadata(
    values: *const VmixValues,
    key: *const c_char,
    out: *mut *const c_char,
) -> VmixStatus {
    boundary(|| unsafe {
        let VmixValues { values, texts } = reference("values", values)?;
        let key = c_str("key", key)?;
        let out = Out::new("out", out)?;
        out.write(texts.metadata(key, || values.metadata())?.cast());
        Ok(())
    })
}

/// Fills `*out`, whose struct_size the caller has set, with label `index`, below label_count, and
/// the weight it was selected with.
///
/// Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (struct_size), OUT_OF_RANGE.
#[ffi_export]
unsafe fn vmix_values_label(
    values: *const VmixValues,
    index: usize,
    out: *mut VmixLabel,
) -> VmixStatus {
    boundary(|| unsafe {
        let VmixValues { values, texts } = reference("values", values)?;
        let out = OutStruct::new("out", out)?;
        out.write(texts.label(index, values.weights())?);
        Ok(())
    })
}

/// The index of the label of this name. The message of NOT_FOUND lists the known ones.
///
/// Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (not UTF-8), NOT_FOUND.
#[ffi_export]
unsafe fn vmix_values_label_find(
    values: *const VmixValues,
    name: *const c_char,
    out: *mut usize,
) -> VmixStatus {
    boundary(|| unsafe {
        let VmixValues { values, .. } = reference("values", values)?;
        let name = argument::text("name", name.cast())?;
        let out = Out::new("out", out)?;
        out.write(values.labels().index(&LabelKey::from(name))?);
        Ok(())
    })
}

/// What to call label `index` in a language ("zh", "de"), where the file says so. The string
/// belongs to the handle.
///
/// Statuses: NULL_ARGUMENT, OUT_OF_RANGE, NOT_FOUND.
#[ffi_export]
unsafe fn vmix_values_label_display_name(
    values: *const VmixValues,
    index: usize,
    language: *const c_char,
    out: *mut *const c_char,
) -> VmixStatus {
    boundary(|| unsafe {
        let VmixValues { texts, .. } = reference("values", values)?;
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
unsafe fn vmix_values_layer(
    values: *const VmixValues,
    index: usize,
    out: *mut VmixLayer,
) -> VmixStatus {
    boundary(|| unsafe {
        let VmixValues { texts, .. } = reference("values", values)?;
        let out = OutStruct::new("out", out)?;
        out.write(texts.layer(index)?);
        Ok(())
    })
}

/// The index of the layer of this diffusers or LDM name.
///
/// Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (not UTF-8), NOT_FOUND.
#[ffi_export]
unsafe fn vmix_values_layer_find(
    values: *const VmixValues,
    name: *const c_char,
    out: *mut usize,
) -> VmixStatus {
    boundary(|| unsafe {
        let VmixValues { values, .. } = reference("values", values)?;
        let name = argument::text("name", name.cast())?;
        let out = Out::new("out", out)?;
        out.write(values.layers().index(name)?);
        Ok(())
    })
}

/// V_a of layer `index` in a pass, where it lies: `*out`, whose struct_size the caller has set,
/// becomes a dense view of shape `{1, context_tokens, 1, inner_dim}`, valid until the values are
/// freed. Its data is NULL where nothing is to be mixed: in the unconditional pass of values that
/// are for the conditional one only.
///
/// Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (struct_size, pass), OUT_OF_RANGE.
#[ffi_export]
unsafe fn vmix_values_get(
    values: *const VmixValues,
    index: usize,
    pass: VmixPass,
    out: *mut VmixView,
) -> VmixStatus {
    boundary(|| unsafe {
        let values = reference("values", values)?;
        let out = OutStruct::new("out", out)?;
        let inner_dim = argument::index("layer", values.values.layers(), index)?.inner_dim;
        let tensor = values.tensor(index, pass)?;
        let (tokens, width) = (values.values.context_tokens() as i64, inner_dim as i64);
        out.write(VmixView {
            struct_size: size_of::<VmixView>(),
            data: tensor.map_or(std::ptr::null(), |tensor| tensor.bytes().as_ptr().cast()),
            dtype: argument::c_dtype(values.values.dtype()),
            shape: [1, tokens, 1, width],
            strides: [tokens * width, width, width, 1],
        });
        Ok(())
    })
}

/// Copies V_a of layer `index` in a pass into the caller's buffer, whose shape must be
/// `{1, context_tokens, heads, inner_dim / heads}` for any number of heads, in the buffer's dtype.
///
/// Statuses: NULL_ARGUMENT, INVALID_ARGUMENT, OUT_OF_RANGE, NOT_FOUND (where vmix_values_get() gives
/// NULL), UNSUPPORTED (a view of a later version).
#[ffi_export]
unsafe fn vmix_values_copy(
    values: *const VmixValues,
    index: usize,
    pass: VmixPass,
    to: *const VmixViewMut,
) -> VmixStatus {
    boundary(|| unsafe {
        let values = reference("values", values)?;
        let tensor = values.tensor(index, pass)?.ok_or_else(|| {
            let message = "values for the conditional pass only have none for the unconditional";
            Failure::new(VmixStatus::NotFound, message)
        })?;
        let mut to = argument::view_mut("to", to)?;
        let shape = [1, tensor.shape()[0], 1, tensor.shape()[1]];
        let from = TensorView::dense("values", tensor, shape)?;
        Ok(to.copy_from("to", from)?)
    })
}
