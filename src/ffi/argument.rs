//! Checks of what C passes in. Nothing is used before it went through one of these.

use std::ffi::{CStr, c_char, c_void};

use super::{
    boundary::{Failure, Result},
    types::*,
};
use crate::{ApplyTo, Base, DType, TensorView, TensorViewMut};

/// No struct of this API will ever be larger: a greater `struct_size` was never set.
const MAX_STRUCT_SIZE: usize = 4096;

fn invalid(
    argument: &str,
    expected: impl std::fmt::Display,
    found: impl std::fmt::Display,
) -> Failure {
    let message = format!("{argument}: expected {expected}, found {found}");
    Failure::new(VmixStatus::InvalidArgument, message)
}

fn check_pointer<T>(argument: &str, pointer: *const T) -> Result<()> {
    if pointer.is_null() {
        let message = format!("{argument}: expected a pointer, found NULL");
        return Err(Failure::new(VmixStatus::NullArgument, message));
    }
    if !pointer.is_aligned() {
        let expected = format!("a pointer to a multiple of {}", align_of::<T>());
        return Err(invalid(argument, expected, format!("{pointer:p}")));
    }
    Ok(())
}

/// A handle or another value that is read.
///
/// # Safety
/// A pointer that is not NULL must lead to a `T` that lives for `'a`.
pub(super) unsafe fn reference<'a, T>(argument: &str, pointer: *const T) -> Result<&'a T> {
    check_pointer(argument, pointer)?;
    // SAFETY: the caller's promise; NULL and misaligned pointers were refused.
    Ok(unsafe { &*pointer })
}

/// Where a result goes: checked at once, written last.
pub(super) struct Out<T>(*mut T);

impl<T> Out<T> {
    pub fn new(argument: &str, pointer: *mut T) -> Result<Self> {
        check_pointer(argument, pointer)?;
        Ok(Self(pointer))
    }

    /// # Safety
    /// The pointer must lead to memory for a `T`.
    pub unsafe fn write(self, value: T) {
        // SAFETY: the caller's promise.
        unsafe { self.0.write(value) };
    }
}

/// Text of a C string.
///
/// # Safety
/// A pointer that is not NULL must lead to a string with a NUL at its end, which lives for `'a`.
pub(super) unsafe fn text<'a>(argument: &str, pointer: *const c_char) -> Result<&'a str> {
    check_pointer(argument, pointer)?;
    // SAFETY: the caller's promise.
    let bytes = unsafe { CStr::from_ptr(pointer) };
    bytes.to_str().map_err(|e| invalid(argument, "UTF-8", e))
}

/// A path of a C string: bytes as they are on Unix, UTF-8 elsewhere.
///
/// # Safety
/// As [`text`].
#[cfg(unix)]
pub(super) unsafe fn path<'a>(
    argument: &str,
    pointer: *const c_char,
) -> Result<&'a std::path::Path> {
    use std::os::unix::ffi::OsStrExt;

    check_pointer(argument, pointer)?;
    // SAFETY: the caller's promise.
    let bytes = unsafe { CStr::from_ptr(pointer) }.to_bytes();
    if bytes.is_empty() {
        return Err(invalid(argument, "the name of a file", "an empty one"));
    }
    Ok(std::ffi::OsStr::from_bytes(bytes).as_ref())
}

/// A path of a C string: bytes as they are on Unix, UTF-8 elsewhere.
///
/// # Safety
/// As [`text`].
#[cfg(not(unix))]
pub(super) unsafe fn path<'a>(
    argument: &str,
    pointer: *const c_char,
) -> Result<&'a std::path::Path> {
    // SAFETY: the caller's promise.
    unsafe { text(argument, pointer) }.map(AsRef::as_ref)
}

/// `count` elements; any pointer will do for none.
///
/// # Safety
/// That many elements must be readable at the pointer for as long as `'a`.
pub(super) unsafe fn slice<'a, T>(
    argument: &str,
    pointer: *const T,
    count: usize,
) -> Result<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    check_pointer(argument, pointer)?;
    check_extent::<T>(argument, count)?;
    // SAFETY: the caller's promise; the pointer is aligned and the extent fits into memory.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) })
}

/// A buffer that a result of `expected` elements fills exactly.
///
/// # Safety
/// `count` elements must be writable at the pointer for as long as `'a`, and be used by nobody else.
pub(super) unsafe fn buffer<'a>(
    argument: &str,
    pointer: *mut f32,
    count: usize,
    expected: usize,
) -> Result<&'a mut [f32]> {
    check_pointer(argument, pointer)?;
    check_extent::<f32>(argument, count)?;
    if count != expected {
        let message =
            format!("{argument}: expected a buffer for {expected} numbers, found {count}");
        return Err(Failure::new(VmixStatus::BufferSize, message));
    }
    // SAFETY: the caller's promise; the pointer is aligned and the extent fits into memory.
    Ok(unsafe { std::slice::from_raw_parts_mut(pointer, count) })
}

fn check_extent<T>(argument: &str, count: usize) -> Result<()> {
    match count.checked_mul(size_of::<T>()) {
        Some(bytes) if isize::try_from(bytes).is_ok() => Ok(()),
        _ => Err(invalid(argument, "a count that fits into memory", count)),
    }
}

/// A struct whose first field is its size as the caller knows it, so that it can grow.
///
/// # Safety
/// The struct must be plain data for which all zeros are valid, with `struct_size: usize` first.
pub(super) unsafe trait Growable: Copy {
    /// Its name in C.
    const NAME: &str;
    /// Its size in ABI 1.0; smaller ones were never valid.
    const FIRST_SIZE: usize;
}

macro_rules! sized {
    ($($type:ident: $size:expr),* $(,)?) => {$(
        // SAFETY: structs of numbers and raw pointers; all begin with struct_size.
        unsafe impl Growable for $type {
            const NAME: &str = stringify!($type);
            // Written out, because it must stay what it is when the struct grows.
            const FIRST_SIZE: usize = $size;
        }
    )*};
}

const WORD: usize = size_of::<usize>();
sized!(
    VmixView: 2 * WORD + 8 + 64,
    VmixViewMut: 2 * WORD + 8 + 64,
    VmixAdapterInfo: 5 * WORD + 8,
    VmixValuesInfo: 5 * WORD + 8,
    VmixLabel: 5 * WORD + 24,
    VmixLayer: 4 * WORD,
    VmixValuesParams: 3 * WORD + 8,
    VmixMixParams: 5 * WORD,
    VmixAttentionParams: 13 * WORD,
);

/// # Safety
/// A pointer that is not NULL must lead to a struct that is as long as its first field says.
unsafe fn struct_size<T: Growable>(argument: &str, pointer: *const T) -> Result<usize> {
    check_pointer(argument, pointer)?;
    // SAFETY: the caller's promise: there is at least the first field.
    let size = unsafe { pointer.cast::<usize>().read() };
    // The size of a struct is a multiple of its alignment: no field is there by half.
    if size < T::FIRST_SIZE || size > MAX_STRUCT_SIZE || !size.is_multiple_of(align_of::<T>()) {
        let argument = format!("{argument}->struct_size");
        return Err(invalid(&argument, format!("sizeof({})", T::NAME), size));
    }
    Ok(size)
}

/// A struct that the caller filled. Fields that an older caller does not have are zero; fields that
/// only a newer caller has must be zero.
///
/// # Safety
/// A pointer that is not NULL must lead to a struct that is as long as its first field says.
pub(super) unsafe fn read_struct<T: Growable>(argument: &str, pointer: *const T) -> Result<T> {
    // SAFETY: the caller's promise.
    let size = unsafe { struct_size(argument, pointer)? };
    let known = size.min(size_of::<T>());
    let mut value = std::mem::MaybeUninit::<T>::zeroed();
    // SAFETY: `size` bytes are readable, of which `known` fit into the value; all zeros and all
    // that C can write are valid for these types.
    let value = unsafe {
        std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), value.as_mut_ptr().cast(), known);
        value.assume_init()
    };
    // SAFETY: the caller's promise.
    let unknown =
        unsafe { std::slice::from_raw_parts(pointer.cast::<u8>().add(known), size - known) };
    if unknown.iter().any(|byte| *byte != 0) {
        let message = format!(
            "{argument}: expected a {} of {} bytes, as this version of vmix knows it, found {size}, \
             of which the later are set",
            T::NAME,
            size_of::<T>()
        );
        return Err(Failure::new(VmixStatus::Unsupported, message));
    }
    Ok(value)
}

/// A struct that the caller wants filled, as far as the caller knows it.
pub(super) struct OutStruct<T> {
    pointer: *mut T,
    size: usize,
}

impl<T: Growable> OutStruct<T> {
    /// # Safety
    /// A pointer that is not NULL must lead to a struct that is as long as its first field says.
    pub unsafe fn new(argument: &str, pointer: *mut T) -> Result<Self> {
        // SAFETY: the caller's promise.
        let size = unsafe { struct_size(argument, pointer.cast_const())? };
        Ok(Self { pointer, size })
    }

    /// Fields that only a newer caller has become zero. `struct_size` stays.
    ///
    /// # Safety
    /// As [`OutStruct::new`]; the struct must be writable.
    pub unsafe fn write(self, value: T) {
        let known = self.size.min(size_of::<T>());
        let first = size_of::<usize>();
        // SAFETY: the caller's promise; `known` is at most what either side has.
        unsafe {
            let to = self.pointer.cast::<u8>();
            let from = (&raw const value).cast::<u8>();
            std::ptr::copy_nonoverlapping(from.add(first), to.add(first), known - first);
            to.add(known).write_bytes(0, self.size - known);
        }
    }
}

pub(super) fn dtype(argument: &str, dtype: VmixDType) -> Result<DType> {
    match dtype {
        VMIX_DTYPE_F32 => Ok(DType::F32),
        VMIX_DTYPE_F16 => Ok(DType::F16),
        VMIX_DTYPE_BF16 => Ok(DType::BF16),
        VmixDType(other) => {
            let expected = "1 (f32), 2 (f16) or 3 (bf16)";
            Err(invalid(&format!("{argument}->dtype"), expected, other))
        }
    }
}

pub(super) fn c_dtype(dtype: DType) -> VmixDType {
    match dtype {
        DType::F32 => VMIX_DTYPE_F32,
        DType::F16 => VMIX_DTYPE_F16,
        DType::BF16 => VMIX_DTYPE_BF16,
    }
}

pub(super) fn c_base(base: Base) -> VmixBase {
    match base {
        Base::Sd15 => VMIX_BASE_SD15,
        Base::Sdxl => VMIX_BASE_SDXL,
        Base::Other => VMIX_BASE_OTHER,
    }
}

pub(super) fn apply_to(argument: &str, apply_to: VmixApplyTo, default: ApplyTo) -> Result<ApplyTo> {
    match apply_to {
        VMIX_APPLY_TO_DEFAULT => Ok(default),
        VMIX_APPLY_TO_COND => Ok(ApplyTo::Cond),
        VMIX_APPLY_TO_BOTH => Ok(ApplyTo::Both),
        VMIX_APPLY_TO_CONTRAST => Ok(ApplyTo::Contrast),
        VmixApplyTo(other) => {
            let expected = "0 (as the file says), 1 (cond), 2 (both) or 3 (contrast)";
            Err(invalid(&format!("{argument}->apply_to"), expected, other))
        }
    }
}

pub(super) fn c_apply_to(apply_to: ApplyTo) -> VmixApplyTo {
    match apply_to {
        ApplyTo::Cond => VMIX_APPLY_TO_COND,
        ApplyTo::Both => VMIX_APPLY_TO_BOTH,
        ApplyTo::Contrast => VMIX_APPLY_TO_CONTRAST,
    }
}

/// A pass, as the position in a (cond, uncond) pair.
pub(super) fn is_uncond(pass: VmixPass) -> Result<bool> {
    match pass {
        VMIX_PASS_COND => Ok(false),
        VMIX_PASS_UNCOND => Ok(true),
        VmixPass(other) => Err(invalid("pass", "1 (cond) or 2 (uncond)", other)),
    }
}

pub(super) fn index<'a, T>(argument: &str, items: &'a [T], index: usize) -> Result<&'a T> {
    items.get(index).ok_or_else(|| {
        let message = format!(
            "{argument}: expected an index below {}, found {index}",
            items.len()
        );
        Failure::new(VmixStatus::OutOfRange, message)
    })
}

fn sizes(argument: &str, shape: [i64; 4]) -> Result<[usize; 4]> {
    let mut sizes = [0; 4];
    for (to, from) in sizes.iter_mut().zip(shape) {
        *to = usize::try_from(from)
            .map_err(|_| invalid(&format!("{argument}->shape"), "no negative size", from))?;
    }
    Ok(sizes)
}

fn distances(argument: &str, strides: [i64; 4]) -> Result<[isize; 4]> {
    let mut distances = [0; 4];
    for (to, from) in distances.iter_mut().zip(strides) {
        *to = isize::try_from(from)
            .map_err(|_| invalid(&format!("{argument}->strides"), "strides of memory", from))?;
    }
    Ok(distances)
}

/// A tensor that is read.
///
/// # Safety
/// A pointer that is not NULL must lead to a view whose elements are readable for as long as `'a`.
pub(super) unsafe fn view<'a>(argument: &str, pointer: *const VmixView) -> Result<TensorView<'a>> {
    // SAFETY: the caller's promise.
    let view = unsafe { read_struct(argument, pointer)? };
    let shape = sizes(argument, view.shape)?;
    let strides = distances(argument, view.strides)?;
    let dtype = dtype(argument, view.dtype)?;
    let data = view.data.cast();
    // SAFETY: the caller's promise; what overflows is refused.
    Ok(unsafe { TensorView::from_raw(argument, data, dtype, shape, strides)? })
}

/// A tensor that is read, or NULL for none.
///
/// # Safety
/// As [`view`].
pub(super) unsafe fn optional_view<'a>(
    argument: &str,
    pointer: *const VmixView,
) -> Result<Option<TensorView<'a>>> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's promise.
    unsafe { view(argument, pointer) }.map(Some)
}

/// A tensor that is written.
///
/// # Safety
/// A pointer that is not NULL must lead to a view whose elements are writable for as long as `'a`.
pub(super) unsafe fn view_mut<'a>(
    argument: &str,
    pointer: *const VmixViewMut,
) -> Result<TensorViewMut<'a>> {
    // SAFETY: the caller's promise.
    let view = unsafe { read_struct(argument, pointer)? };
    let shape = sizes(argument, view.shape)?;
    let strides = distances(argument, view.strides)?;
    let dtype = dtype(argument, view.dtype)?;
    let data: *mut c_void = view.data;
    // SAFETY: the caller's promise; what overflows or overlaps itself is refused.
    Ok(unsafe { TensorViewMut::from_raw(argument, data.cast(), dtype, shape, strides)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_sizes_are_those_of_abi_1_0() {
        // What has not grown since has its own.
        assert_eq!((VMIX_ABI_MAJOR, VMIX_ABI_MINOR), (1, 0));
        fn check<T: Growable>() {
            assert_eq!(size_of::<T>(), T::FIRST_SIZE, "{}", T::NAME);
        }
        check::<VmixView>();
        check::<VmixViewMut>();
        check::<VmixAdapterInfo>();
        check::<VmixValuesInfo>();
        check::<VmixLabel>();
        check::<VmixLayer>();
        check::<VmixValuesParams>();
        check::<VmixMixParams>();
        check::<VmixAttentionParams>();
    }

    /// VmixLayer as a later version may have it.
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Later {
        layer: VmixLayer,
        more: [usize; 2],
    }

    fn later(more: [usize; 2]) -> Later {
        let layer = VmixLayer {
            struct_size: size_of::<Later>(),
            name: std::ptr::null(),
            ldm_name: std::ptr::null(),
            inner_dim: 7,
        };
        Later { layer, more }
    }

    #[test]
    fn structs_of_later_callers_are_read_if_what_is_new_is_zero() {
        // SAFETY: a struct that is as long as it says, but for those that are refused for it.
        let read = |later: &Later| unsafe {
            read_struct("layer", (&raw const *later).cast::<VmixLayer>())
        };
        assert_eq!(read(&later([0, 0])).unwrap().inner_dim, 7);
        let failure = read(&later([0, 1])).unwrap_err();
        assert_eq!(failure.status, VmixStatus::Unsupported);
        let whole = size_of::<VmixLayer>();
        let half = [whole + 1, whole + WORD - 1];
        for size in [0, 1, whole - WORD, half[0], half[1], 4097, usize::MAX] {
            let mut bad = later([0, 0]);
            bad.layer.struct_size = size;
            let failure = read(&bad).unwrap_err();
            assert_eq!(failure.status, VmixStatus::InvalidArgument);
            assert_eq!(
                failure.message,
                format!("layer->struct_size: expected sizeof(VmixLayer), found {size}")
            );
        }
    }

    #[test]
    fn structs_of_later_callers_are_filled_with_zeros() {
        let mut to = later([5, 6]);
        // SAFETY: a struct that is as long as it says.
        let out = unsafe { OutStruct::new("layer", (&raw mut to).cast::<VmixLayer>()) };
        let mut value = to.layer;
        value.inner_dim = 3;
        value.struct_size = 0;
        // SAFETY: as above.
        unsafe { out.unwrap().write(value) };
        assert_eq!(to.layer.inner_dim, 3);
        assert_eq!(to.layer.struct_size, size_of::<Later>());
        assert_eq!(to.more, [0, 0]);
    }
}
