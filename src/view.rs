//! Strided views over the tensors of a host.

use std::marker::PhantomData;

use half::{bf16, f16};

use crate::{DType, Error, Result, Tensor, halves};

/// A host's tensor, read where it lies: `[batch, tokens, heads, head dim]`, with any strides.
///
/// The order of the dimensions is fixed, the layout in memory is what the strides say:
/// `[B, L, H·D]` in memory has the strides `[L·H·D, H·D, D, 1]`, `[B, H, L, D]` has
/// `[H·L·D, D, L·D, 1]`. A stride of 0 repeats.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    data: *const u8,
    layout: Layout,
    lifetime: PhantomData<&'a [u8]>,
}

/// A host's tensor, written where it lies; see [`TensorView`]. No two elements share memory.
#[derive(Debug)]
pub struct TensorViewMut<'a> {
    data: *mut u8,
    layout: Layout,
    lifetime: PhantomData<&'a mut [u8]>,
}

/// What a view is, but for where it is.
#[derive(Debug, Clone, Copy)]
struct Layout {
    dtype: DType,
    shape: [usize; 4],
    /// In elements.
    strides: [isize; 4],
}

// SAFETY: a view is a shared slice with holes; nothing is written through it.
unsafe impl Send for TensorView<'_> {}
// SAFETY: as above.
unsafe impl Sync for TensorView<'_> {}
// SAFETY: a mutable view is an exclusive slice with holes.
unsafe impl Send for TensorViewMut<'_> {}

impl Layout {
    /// Checks that every element can be addressed from `data`; `argument` is for the error.
    fn new(
        argument: &str,
        data: *const u8,
        dtype: DType,
        shape: [usize; 4],
        strides: [isize; 4],
    ) -> Result<Self> {
        let layout = Self {
            dtype,
            shape,
            strides,
        };
        if layout.is_empty() {
            // Nothing will be addressed: whatever strides came cannot overflow anything.
            let strides = [0; 4];
            return Ok(Self { strides, ..layout });
        }
        if data.is_null() {
            let found = format!("NULL for shape {shape:?}");
            return Err(Error::argument(
                argument,
                "a pointer to its elements",
                found,
            ));
        }
        if data.align_offset(dtype.size()) != 0 {
            let expected = format!("{dtype} at a multiple of {} bytes", dtype.size());
            return Err(Error::argument(argument, expected, format!("{data:p}")));
        }
        // The distance to the last element, and the number of elements, in bytes.
        let bytes = |n: isize| n.checked_mul(dtype.size() as isize);
        let reach = (0..4).try_fold(0isize, |reach, i| {
            let steps = isize::try_from(shape[i] - 1).ok()?;
            bytes(steps.checked_mul(strides[i])?.checked_abs()?)?.checked_add(reach)
        });
        let count = shape.iter().try_fold(1isize, |count, size| {
            count.checked_mul(isize::try_from(*size).ok()?)
        });
        match (reach, count.and_then(bytes)) {
            (Some(_), Some(_)) => Ok(layout),
            _ => Err(Error::argument(
                argument,
                "a tensor that fits into memory",
                format!("shape {shape:?}, strides {strides:?}"),
            )),
        }
    }

    fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// Whether no two indices lead to the same element.
    fn is_distinct(&self) -> bool {
        let mut dims = [(0, 1); 4];
        for ((dim, stride), size) in dims.iter_mut().zip(self.strides).zip(self.shape) {
            *dim = (stride.unsigned_abs(), size);
        }
        dims.sort_unstable();
        let mut reach = 0;
        dims.iter()
            .filter(|(_, size)| *size > 1)
            .all(|(stride, size)| {
                let distinct = *stride > reach;
                reach += stride * (size - 1);
                distinct
            })
    }

    /// The same elements with the heads of a token as one, if they are adjacent in memory.
    fn merge_heads(mut self) -> Option<Self> {
        let [_, _, heads, dim] = self.shape;
        let adjacent =
            heads == 1 || Some(self.strides[2]) == self.strides[3].checked_mul(dim as isize);
        if self.is_empty() || !adjacent {
            return None;
        }
        (self.shape[2], self.shape[3]) = (1, heads * dim);
        Some(self)
    }

    /// The same elements with `count` tokens as one, if they are adjacent in memory and have one head.
    fn merge_tokens(mut self, count: usize) -> Option<Self> {
        let [_, tokens, heads, dim] = self.shape;
        let adjacent = Some(self.strides[1]) == self.strides[3].checked_mul(dim as isize);
        if self.is_empty() || heads != 1 || !adjacent || !tokens.is_multiple_of(count) {
            return None;
        }
        (self.shape[1], self.shape[3]) = (tokens / count, count * dim);
        self.strides[1] *= count as isize;
        Some(self)
    }

    /// Dimensions of size 1 are broadcast: any index into them means 0.
    fn clamp(&self, index: &mut [usize; 4]) {
        for (i, size) in index.iter_mut().zip(self.shape) {
            if size == 1 {
                *i = 0;
            }
        }
    }

    /// Where a slice of `len` elements starts at this index, if they are adjacent and of this type.
    fn slice_offset<T: Element>(&self, index: [usize; 4], len: usize) -> Option<isize> {
        assert!(index[3] + len <= self.shape[3]);
        (self.dtype == T::DTYPE && self.strides[3] == 1).then(|| self.offset(index))
    }

    /// The first and the last address of any element; `None` without elements.
    fn extent(&self, data: *const u8) -> Option<(usize, usize)> {
        if self.is_empty() {
            return None;
        }
        let size = self.dtype.size() as isize;
        let reach = |sign: isize| -> isize {
            let steps = (0..4).map(|i| self.strides[i] * (self.shape[i] as isize - 1));
            steps.filter(|steps| steps.signum() == sign).sum()
        };
        let at = |elements: isize| data.addr().wrapping_add_signed(elements * size);
        Some((at(reach(-1)), at(reach(1)) + self.dtype.size() - 1))
    }

    /// Distance in elements from the first element to this one.
    fn offset(&self, index: [usize; 4]) -> isize {
        assert!((0..4).all(|i| index[i] < self.shape[i]), "{index:?}");
        (0..4).map(|i| index[i] as isize * self.strides[i]).sum()
    }
}

impl<'a> TensorView<'a> {
    /// A view of `shape` and `strides` (in elements), whose first element is at `data`. `argument`
    /// is what errors call it.
    ///
    /// # Errors
    /// When `data` is NULL or misaligned, or the extent overflows.
    ///
    /// # Safety
    /// Every element must be readable, and not be written, for as long as the view lives.
    pub unsafe fn from_raw(
        argument: &str,
        data: *const u8,
        dtype: DType,
        shape: [usize; 4],
        strides: [isize; 4],
    ) -> Result<Self> {
        Ok(Self {
            data,
            layout: Layout::new(argument, data, dtype, shape, strides)?,
            lifetime: PhantomData,
        })
    }

    /// A view of a dense tensor as `[batch, tokens, heads, head dim]`.
    ///
    /// # Errors
    /// When the tensor has another number of elements.
    pub fn dense(argument: &str, tensor: &'a Tensor, shape: [usize; 4]) -> Result<Self> {
        let count = shape
            .iter()
            .try_fold(1usize, |n, size| n.checked_mul(*size));
        let elements = tensor.bytes().len() / tensor.dtype().size();
        if count != Some(elements) {
            let found = format!("shape {:?}", tensor.shape());
            return Err(Error::argument(argument, format!("shape {shape:?}"), found));
        }
        let data = tensor.bytes().as_ptr();
        // SAFETY: dense strides over as many elements as the borrowed tensor has.
        unsafe { Self::from_raw(argument, data, tensor.dtype(), shape, dense_strides(shape)) }
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.layout.dtype
    }

    /// `[batch, tokens, heads, head dim]`.
    pub fn shape(&self) -> [usize; 4] {
        self.layout.shape
    }

    /// The same memory with the last two dimensions in one or, from one, in two.
    pub(crate) fn with_heads(self, argument: &str, heads: usize, head_dim: usize) -> Result<Self> {
        let mut view = self;
        let Layout { shape, strides, .. } = &mut view.layout;
        if [shape[2], shape[3]] == [heads, head_dim] {
            return Ok(view);
        }
        if shape[2] != 1 || heads.checked_mul(head_dim) != Some(shape[3]) {
            let expected = format!("{heads} heads of {head_dim}, or 1 of their product");
            let found = format!("{} of {}", shape[2], shape[3]);
            return Err(Error::argument(argument, expected, found));
        }
        (shape[2], shape[3]) = (heads, head_dim);
        // Inside the extent that was checked when the view was made.
        strides[2] = strides[3] * head_dim as isize;
        Ok(view)
    }

    pub(crate) fn merge_heads(self) -> Option<Self> {
        let layout = self.layout.merge_heads()?;
        Some(Self { layout, ..self })
    }

    pub(crate) fn merge_tokens(self, count: usize) -> Option<Self> {
        let layout = self.layout.merge_tokens(count)?;
        Some(Self { layout, ..self })
    }

    /// The row from this index on, and how far the next token's is, where rows are adjacent f32.
    pub(crate) fn rows(&self, index: [usize; 4]) -> Option<(*const f32, isize)> {
        let offset = self
            .layout
            .slice_offset::<f32>(index, self.layout.shape[3])?;
        let data = self.data.cast::<f32>().wrapping_offset(offset);
        Some((data, self.layout.strides[1]))
    }

    /// The elements along the last dimension where they can be used as a slice.
    fn slice<T: Element>(&self, mut index: [usize; 4], len: usize) -> Option<&'a [T]> {
        self.layout.clamp(&mut index);
        let offset = self.layout.slice_offset::<T>(index, len)?;
        // SAFETY: as in `read_row`; adjacent elements of this type are a slice.
        Some(unsafe { std::slice::from_raw_parts(self.data.cast::<T>().offset(offset), len) })
    }

    /// The row from this index on, where it lies, or read into `scratch`, which is as long.
    pub(crate) fn row<'b>(&self, index: [usize; 4], scratch: &'b mut [f32]) -> &'b [f32]
    where
        'a: 'b,
    {
        match self.slice(index, scratch.len()) {
            Some(row) => row,
            None => {
                self.read_row(index, scratch);
                scratch
            }
        }
    }

    /// Reads the `out.len()` elements along the last dimension from this index on, exactly. Where
    /// the view has size 1 in a dimension, any index there means 0: it is broadcast.
    pub(crate) fn read_row(&self, mut index: [usize; 4], out: &mut [f32]) {
        self.layout.clamp(&mut index);
        let (stride, size) = (self.layout.strides[3], self.layout.shape[3]);
        let stride = if size == 1 { 0 } else { stride };
        assert!(size == 1 || index[3] + out.len() <= size);
        if out.is_empty() {
            return;
        }
        // SAFETY: first and last index are inside the shape, as asserted here and in `offset`, so that
        // all elements read are ones that `from_raw` was promised.
        unsafe {
            let offset = self.layout.offset(index);
            match self.layout.dtype {
                DType::F32 => read(self.data.cast::<f32>().offset(offset), stride, out),
                DType::F16 => read(self.data.cast::<f16>().offset(offset), stride, out),
                DType::BF16 => read(self.data.cast::<bf16>().offset(offset), stride, out),
            }
        }
    }
}

impl<'a> TensorViewMut<'a> {
    /// A view to write through; see [`TensorView::from_raw`].
    ///
    /// # Errors
    /// Also when two elements would share memory.
    ///
    /// # Safety
    /// Every element must be readable and writable, and used by nobody else, for as long as the
    /// view lives.
    pub unsafe fn from_raw(
        argument: &str,
        data: *mut u8,
        dtype: DType,
        shape: [usize; 4],
        strides: [isize; 4],
    ) -> Result<Self> {
        let layout = Layout::new(argument, data, dtype, shape, strides)?;
        if !layout.is_empty() && !layout.is_distinct() {
            let found = format!("shape {shape:?} with strides {strides:?}");
            return Err(Error::argument(
                argument,
                "elements that do not overlap",
                found,
            ));
        }
        Ok(Self {
            data,
            layout,
            lifetime: PhantomData,
        })
    }

    /// A view of dense elements that were just allocated.
    pub(crate) fn dense(out: &'a mut [f32], shape: [usize; 4]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), out.len());
        let layout = Layout {
            dtype: DType::F32,
            shape,
            strides: dense_strides(shape),
        };
        Self {
            data: out.as_mut_ptr().cast(),
            layout,
            lifetime: PhantomData,
        }
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.layout.dtype
    }

    /// `[batch, tokens, heads, head dim]`.
    pub fn shape(&self) -> [usize; 4] {
        self.layout.shape
    }

    /// The same elements, to be read until they are next written.
    pub(crate) fn as_read(&self) -> TensorView<'_> {
        TensorView {
            data: self.data,
            layout: self.layout,
            lifetime: PhantomData,
        }
    }

    pub(crate) fn reborrow(&mut self) -> TensorViewMut<'_> {
        TensorViewMut {
            data: self.data,
            layout: self.layout,
            lifetime: PhantomData,
        }
    }

    /// To be written by several threads.
    pub(crate) fn raw_rows(&mut self) -> RawRows<'_> {
        RawRows {
            data: self.data,
            layout: self.layout,
            lifetime: PhantomData,
        }
    }

    pub(crate) fn merge_heads(&mut self) -> Option<TensorViewMut<'_>> {
        let layout = self.layout.merge_heads()?;
        Some(TensorViewMut {
            layout,
            ..self.reborrow()
        })
    }

    pub(crate) fn merge_tokens(&mut self, count: usize) -> Option<TensorViewMut<'_>> {
        let layout = self.layout.merge_tokens(count)?;
        Some(TensorViewMut {
            layout,
            ..self.reborrow()
        })
    }

    /// Whether the memory that this view spans overlaps that of another.
    pub(crate) fn overlaps(&self, other: &TensorView<'_>) -> bool {
        match (
            self.layout.extent(self.data),
            other.layout.extent(other.data),
        ) {
            (Some((first, last)), Some((start, end))) => first <= end && start <= last,
            _ => false,
        }
    }

    /// Copies `[1, tokens, 1, width]` into a view of as many elements and any number of heads.
    #[cfg(feature = "capi")]
    pub(crate) fn copy_from(&mut self, argument: &str, from: TensorView<'_>) -> Result<()> {
        let [batch, tokens, heads, dim] = self.layout.shape;
        let [_, expected, _, width] = from.layout.shape;
        if (batch, tokens) != (1, expected) || heads.checked_mul(dim) != Some(width) {
            let expected = format!("shape [1, {expected}, heads, {width} / heads]");
            let found = format!("shape {:?}", self.layout.shape);
            return Err(Error::argument(argument, expected, found));
        }
        let from = from.with_heads(argument, heads, dim)?;
        let mut row = vec![0.0; dim];
        for t in 0..tokens {
            for h in 0..heads {
                from.read_row([0, t, h, 0], &mut row);
                self.write_row([0, t, h, 0], &row);
            }
        }
        Ok(())
    }

    /// Adds `scale` times a row of another view to the `len` elements from this index on. `scratch`
    /// becomes two rows for elements that must be converted.
    pub(crate) fn add_row(
        &mut self,
        index: [usize; 4],
        len: usize,
        scale: f32,
        (other, other_index): (TensorView<'_>, [usize; 4]),
        scratch: &mut [Vec<f32>; 2],
    ) {
        fn in_place<T: Element>(
            view: &mut TensorViewMut<'_>,
            index: [usize; 4],
            scale: f32,
            added: Option<&[T]>,
        ) -> Option<()> {
            let added = added?;
            T::add_scaled(view.slice(index, added.len())?, scale, added);
            Some(())
        }
        let added_in_place = match self.layout.dtype {
            DType::F32 => None,
            DType::F16 => in_place::<f16>(self, index, scale, other.slice(other_index, len)),
            DType::BF16 => in_place::<bf16>(self, index, scale, other.slice(other_index, len)),
        };
        if added_in_place.is_some() {
            return;
        }
        let [sum, added] = scratch;
        added.resize(len, 0.0);
        let added = other.row(other_index, added);
        if let Some(row) = self.slice(index, len) {
            return f32::add_scaled(row, scale, added);
        }
        sum.resize(len, 0.0);
        self.as_read().read_row(index, sum);
        f32::add_scaled(sum, scale, added);
        self.write_row(index, sum);
    }

    /// The elements along the last dimension where they can be used as a slice.
    fn slice<T: Element>(&mut self, index: [usize; 4], len: usize) -> Option<&mut [T]> {
        let offset = self.layout.slice_offset::<T>(index, len)?;
        // SAFETY: as in `read_row`; adjacent elements of this type, and the view is exclusive.
        Some(unsafe { std::slice::from_raw_parts_mut(self.data.cast::<T>().offset(offset), len) })
    }

    /// Writes `values` along the last dimension from this index on, rounded to nearest even.
    pub(crate) fn write_row(&mut self, index: [usize; 4], values: &[f32]) {
        assert!(index[3] + values.len() <= self.layout.shape[3]);
        if values.is_empty() {
            return;
        }
        let stride = self.layout.strides[3];
        // SAFETY: as in `read_row`; the view is exclusive.
        unsafe {
            let offset = self.layout.offset(index);
            match self.layout.dtype {
                DType::F32 => write(self.data.cast::<f32>().offset(offset), stride, values),
                DType::F16 => write(self.data.cast::<f16>().offset(offset), stride, values),
                DType::BF16 => write(self.data.cast::<bf16>().offset(offset), stride, values),
            }
        }
    }
}

/// A view whose rows several threads write, each its own.
pub(crate) struct RawRows<'a> {
    data: *mut u8,
    layout: Layout,
    lifetime: PhantomData<&'a mut [u8]>,
}

// SAFETY: what it writes with is unsafe, and asks that no two threads have the same row.
unsafe impl Sync for RawRows<'_> {}

impl RawRows<'_> {
    /// `[batch, tokens, heads, head dim]`.
    pub fn shape(&self) -> [usize; 4] {
        self.layout.shape
    }

    /// As [`TensorView::rows`].
    pub fn rows(&self, index: [usize; 4]) -> Option<(*mut f32, isize)> {
        let offset = self
            .layout
            .slice_offset::<f32>(index, self.layout.shape[3])?;
        let data = self.data.cast::<f32>().wrapping_offset(offset);
        Some((data, self.layout.strides[1]))
    }

    /// As [`TensorViewMut::write_row`].
    ///
    /// # Safety
    /// Nobody else may be using this row.
    pub unsafe fn write_row(&self, index: [usize; 4], values: &[f32]) {
        let mut view = TensorViewMut {
            data: self.data,
            layout: self.layout,
            lifetime: PhantomData,
        };
        view.write_row(index, values);
    }
}

/// The strides of a dense row-major tensor whose elements fit into memory.
pub(crate) fn dense_strides(shape: [usize; 4]) -> [isize; 4] {
    if shape.contains(&0) {
        return [0; 4];
    }
    let mut strides = [1; 4];
    for i in (0..3).rev() {
        strides[i] = strides[i + 1] * shape[i + 1] as isize;
    }
    strides
}

/// An element type, converted a slice at a time where the elements are adjacent.
///
/// # Safety
/// Implementations must be the type that their `DTYPE` names.
unsafe trait Element: Copy {
    const DTYPE: DType;

    fn widen(from: &[Self], to: &mut [f32]);
    fn narrow(from: &[f32], to: &mut [Self]);
    /// Adds `scale` times numbers to as many others, in f32, and rounds each sum once.
    fn add_scaled(sum: &mut [Self], scale: f32, added: &[Self]);
}

// SAFETY: it is.
unsafe impl Element for f32 {
    const DTYPE: DType = DType::F32;

    fn widen(from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    fn narrow(from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }

    fn add_scaled(sum: &mut [Self], scale: f32, added: &[Self]) {
        #[inline(always)]
        fn add(sum: &mut [f32], scale: f32, added: &[f32]) {
            for (x, a) in sum.iter_mut().zip(added) {
                *x += scale * a;
            }
        }
        /// # Safety
        /// The processor must have AVX2.
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2")]
        unsafe fn add_avx2(sum: &mut [f32], scale: f32, added: &[f32]) {
            add(sum, scale, added);
        }
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the instructions are there.
            return unsafe { add_avx2(sum, scale, added) };
        }
        add(sum, scale, added);
    }
}

macro_rules! half_elements {
    ($($type:ty: $dtype:ident),*) => {$(
        // SAFETY: named below.
        unsafe impl Element for $type {
            const DTYPE: DType = DType::$dtype;

            fn widen(from: &[Self], to: &mut [f32]) {
                halves::widen::<Self>(bytemuck::cast_slice(from), to);
            }

            fn narrow(from: &[f32], to: &mut [Self]) {
                halves::round(from, to);
            }

            fn add_scaled(sum: &mut [Self], scale: f32, added: &[Self]) {
                halves::add_scaled(sum, scale, added);
            }
        }
    )*};
}
half_elements!(f16: F16, bf16: BF16);

/// # Safety
/// `out.len()` elements, `stride` apart, must be readable from `data` on.
unsafe fn read<T: Element>(data: *const T, stride: isize, out: &mut [f32]) {
    if stride == 1 {
        // SAFETY: the caller's promise; nothing writes the elements while the slice lives.
        T::widen(unsafe { std::slice::from_raw_parts(data, out.len()) }, out);
        return;
    }
    for (i, x) in out.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        let element = unsafe { data.offset(i as isize * stride).read() };
        T::widen(&[element], std::slice::from_mut(x));
    }
}

/// # Safety
/// `values.len()` elements, `stride` apart, must be writable from `data` on.
unsafe fn write<T: Element + Default>(data: *mut T, stride: isize, values: &[f32]) {
    if stride == 1 {
        // SAFETY: the caller's promise; nothing else uses the elements while the slice lives.
        let out = unsafe { std::slice::from_raw_parts_mut(data, values.len()) };
        T::narrow(values, out);
        return;
    }
    for (i, x) in values.iter().enumerate() {
        let mut element = [T::default()];
        T::narrow(std::slice::from_ref(x), &mut element);
        // SAFETY: the caller's promise.
        unsafe { data.offset(i as isize * stride).write(element[0]) };
    }
}
