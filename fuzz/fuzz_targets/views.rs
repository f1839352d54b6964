//! Tensors of the host: any layout of a shape, over memory of exactly the extent.

use std::collections::HashSet;

use arbitrary::Arbitrary;

use crate::{
    header::{DTYPE_BF16, DTYPE_F32, View},
    memory::{Block, MAX_COUNT, Number, Rare, StructSize},
};

/// How a tensor lies in memory, and what is wrong with it.
#[derive(Debug, Arbitrary)]
pub struct Tensor {
    dtype: u8,
    /// Which dimension is innermost, and so on.
    order: [u8; 4],
    /// Elements left out between two.
    gaps: Rare<[u8; 4]>,
    /// One bit for each dimension: strides below 0, and of 0.
    reversed: Rare<u8>,
    repeated: Rare<u8>,
    fill: u32,
    change: Rare<Change>,
}

#[derive(Debug, Arbitrary)]
enum Change {
    Null,
    NullData,
    Misaligned(u8),
    StructSize(StructSize, u8),
    DType(u32),
    Size(u8, Number),
    Stride(u8, Number),
    SizeAndStride(u8, Number, Number),
    Anything([Number; 4], [Number; 4]),
}

/// A tensor as it is passed.
#[derive(Debug)]
pub struct Passed {
    view: Option<Block>,
    pub data: Block,
    /// Byte offsets of its elements, where it has any that may be used.
    offsets: HashSet<usize>,
    element: usize,
    /// The library must refuse it, whatever else the call is.
    pub wrong: bool,
}

#[derive(Debug, Clone, Copy)]
struct Layout {
    shape: [i64; 4],
    strides: [i64; 4],
}

impl Tensor {
    /// Whether it is NULL, which for some tensors means that there is none.
    pub fn is_null(&self) -> bool {
        matches!(self.change.0, Some(Change::Null))
    }

    /// A tensor of this shape, unless something is wrong with it. `written` ones may not have two
    /// elements in one place.
    pub fn pass(&self, shape: [usize; 4], written: bool) -> Passed {
        let mut dtype = DTYPE_F32 + u32::from(self.dtype) % DTYPE_BF16;
        if let Some(Change::DType(other)) = self.change.0 {
            dtype = other;
        }
        let known = (DTYPE_F32..=DTYPE_BF16).contains(&dtype);
        let element = if dtype == DTYPE_F32 { 4 } else { 2 };

        let plain = self.layout(shape.map(|size| size as i64), written);
        assert!(plain.is_harmless(element, written), "{plain:?}");
        let changed = self.changed(plain);
        let layout = if changed.is_harmless(element, written) {
            changed
        } else {
            plain
        };
        let mut wrong = !known || layout.is_wrong(element);
        let (mut first, mut offsets) = (0, HashSet::new());
        let mut bytes = 0;
        if !wrong && !layout.is_empty() {
            match layout.offsets() {
                Some((lowest, found)) => {
                    wrong |= written && found.len() < layout.count() as usize;
                    first = -lowest as usize * element;
                    offsets = found.iter().map(|i| i * element).collect();
                    bytes = offsets.iter().max().map_or(0, |last| last + element);
                }
                // As many elements as this overlap for sure.
                None => wrong = true,
            }
        }
        let mut shift = 0;
        match self.change.0 {
            Some(Change::Misaligned(by)) if !offsets.is_empty() => {
                shift = usize::from(by) % element;
                wrong |= shift != 0;
                offsets = offsets.iter().map(|i| i + shift).collect();
                bytes += shift;
            }
            Some(Change::NullData) => wrong |= !layout.is_empty(),
            Some(Change::Null) => wrong = true,
            _ => {}
        }

        let data = Block::new(self.content(bytes));
        let view = View {
            struct_size: 0,
            data: match self.change.0 {
                Some(Change::NullData) => std::ptr::null_mut(),
                // SAFETY: the first element lies inside the block.
                _ => unsafe { data.pointer::<u8>().add(first + shift).cast() },
            },
            dtype,
            padding: 0,
            shape: layout.shape,
            strides: layout.strides,
        };
        let block = match &self.change.0 {
            Some(Change::Null) => None,
            Some(Change::StructSize(size, more)) => {
                wrong |= size.of::<View>() < size_of::<View>();
                wrong |= size.of::<View>() > size_of::<View>() && *more != 0;
                Some(Block::of_struct(&view, size.of::<View>(), *more))
            }
            _ => Some(Block::of_struct(&view, size_of::<View>(), 0)),
        };
        Passed {
            view: block,
            data,
            offsets,
            element,
            wrong,
        }
    }

    fn layout(&self, shape: [i64; 4], written: bool) -> Layout {
        let mut strides = [1; 4];
        let mut order = [0, 1, 2, 3];
        order.sort_by_key(|i| self.order[*i]);
        let gaps = self.gaps.0.unwrap_or_default();
        let mut step = 1;
        // Ties leave the first dimension outermost, which is dense.
        for i in order.into_iter().rev() {
            strides[i] = step * (1 + i64::from(gaps[i] % 2));
            step = strides[i] * shape[i].max(1);
        }
        for (i, stride) in strides.iter_mut().enumerate() {
            if self.reversed.0.unwrap_or(0) >> i & 1 == 1 {
                *stride = -*stride;
            }
            if !written && self.repeated.0.unwrap_or(0) >> i & 1 == 1 {
                *stride = 0;
            }
        }
        Layout { shape, strides }
    }

    fn changed(&self, mut layout: Layout) -> Layout {
        match &self.change.0 {
            Some(Change::Size(i, size)) => layout.shape[usize::from(i % 4)] = size.0,
            Some(Change::Stride(i, stride)) => layout.strides[usize::from(i % 4)] = stride.0,
            Some(Change::SizeAndStride(i, size, stride)) => {
                layout.shape[usize::from(i % 4)] = size.0;
                layout.strides[usize::from(i % 4)] = stride.0;
            }
            Some(Change::Anything(shape, strides)) => {
                layout = Layout {
                    shape: shape.map(|n| n.0),
                    strides: strides.map(|n| n.0),
                }
            }
            _ => {}
        }
        layout
    }

    /// Ordinary numbers, or any bits.
    fn content(&self, bytes: usize) -> Vec<u8> {
        let mut state = u64::from(self.fill) | 1 << 40;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32
        };
        let words = std::iter::from_fn(|| {
            let random = next();
            Some(match self.fill % 8 {
                0 => random,
                1 => 0,
                // Without the highest bit of the exponent: below 2 in all dtypes.
                _ => random & 0xbfff_bfff,
            })
        });
        let words = words.take(bytes.div_ceil(4)).flat_map(u32::to_ne_bytes);
        words.take(bytes).collect()
    }
}

impl Layout {
    fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    fn count(&self) -> i128 {
        let sizes = self.shape.iter().map(|size| i128::from(*size));
        // Four sizes of 63 bits are too much even for i128, and so are four steps below.
        sizes.fold(1, i128::saturating_mul)
    }

    /// The lowest and the highest element, from the first one.
    fn reach(&self) -> (i128, i128) {
        let steps = (0..4).map(|i| i128::from(self.strides[i]) * (i128::from(self.shape[i]) - 1));
        steps.fold((0, 0), |(low, high), step| {
            (
                low.saturating_add(step.min(0)),
                high.saturating_add(step.max(0)),
            )
        })
    }

    /// Sizes below 0, or more than memory can be: to be refused without a look at the memory.
    fn is_wrong(&self, element: usize) -> bool {
        if self.shape.iter().any(|size| *size < 0) {
            return true;
        }
        let (low, high) = self.reach();
        let most = i128::from(i64::MAX) / element as i128;
        !self.is_empty() && (high.saturating_sub(low) > most || self.count() > most)
    }

    /// Whether it may be passed: small, or refused before its memory is used.
    fn is_harmless(&self, element: usize, written: bool) -> bool {
        let (low, high) = self.reach();
        let most = MAX_COUNT as i128;
        let repeated = (0..4).any(|i| self.shape[i] > 1 && self.strides[i] == 0);
        self.is_wrong(element)
            || self.is_empty()
            || written && repeated
            || high.saturating_sub(low) < most && self.count() <= most
    }

    /// How far the lowest element is from the first, and where all are from there. None where
    /// there are too many.
    fn offsets(&self) -> Option<(i128, HashSet<usize>)> {
        let (low, high) = self.reach();
        if high.saturating_sub(low) >= MAX_COUNT as i128 || self.count() > MAX_COUNT as i128 {
            return None;
        }
        let mut offsets = HashSet::from([-low as i64]);
        for (size, stride) in self.shape.into_iter().zip(self.strides) {
            offsets = (0..size)
                .flat_map(|i| offsets.iter().map(move |from| from + i * stride))
                .collect();
        }
        Some((low, offsets.into_iter().map(|i| i as usize).collect()))
    }
}

impl Passed {
    pub fn pointer(&self) -> *const View {
        self.view
            .as_ref()
            .map_or(std::ptr::null(), |block| block.pointer())
    }

    pub fn is_untouched(&self) -> bool {
        self.data.is_untouched() && self.view.as_ref().is_none_or(Block::is_untouched)
    }

    /// Whether nothing but the elements has changed.
    pub fn is_written_inside(&self) -> bool {
        let mut inside = vec![false; self.data.len()];
        for offset in &self.offsets {
            inside[*offset..offset + self.element].fill(true);
        }
        let bytes = self.data.bytes().iter().zip(self.data.before());
        bytes
            .zip(inside)
            .all(|((now, before), inside)| inside || now == before)
            && self.view.as_ref().is_none_or(Block::is_untouched)
    }
}
