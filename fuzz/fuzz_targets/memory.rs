//! The memory of the host that calls are made from.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};

use arbitrary::{Arbitrary, Result, Unstructured};

use crate::header::Struct;

/// No struct of the API is larger; a greater struct_size must be refused.
const MAX_STRUCT_SIZE: usize = 4096;

const ALIGNMENT: usize = 8;

/// Memory of exactly so many bytes: AddressSanitizer sees every byte too far.
#[derive(Debug)]
pub struct Block {
    data: *mut u8,
    layout: Layout,
    before: Vec<u8>,
}

impl Block {
    pub fn new(bytes: Vec<u8>) -> Self {
        let layout = Layout::from_size_align(bytes.len().max(1), ALIGNMENT).expect("small sizes");
        // SAFETY: the layout has a size above 0, and room for the bytes.
        let data = unsafe {
            let data = alloc(layout);
            if data.is_null() {
                handle_alloc_error(layout);
            }
            data.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            data
        };
        Self {
            data,
            layout,
            before: bytes,
        }
    }

    /// Where a result goes, filled with what no result is.
    pub fn poisoned(size: usize) -> Self {
        Self::new(vec![0xa5; size])
    }

    pub fn of_floats(values: &[f32]) -> Self {
        Self::new(values.iter().flat_map(|x| x.to_ne_bytes()).collect())
    }

    /// A C string of the bytes up to their first NUL.
    pub fn text(bytes: &[u8]) -> Self {
        let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        Self::new([text, &[0]].concat())
    }

    /// A struct as a caller has it who thinks that it is `size` bytes long. All else that a caller
    /// of a later version has is `more`.
    pub fn of_struct<T: Struct>(value: &T, size: usize, more: u8) -> Self {
        // SAFETY: plain data without padding.
        let bytes =
            unsafe { std::slice::from_raw_parts((&raw const *value).cast::<u8>(), size_of::<T>()) };
        let mut bytes = bytes.to_vec();
        bytes[..size_of::<usize>()].copy_from_slice(&size.to_ne_bytes());
        let sizes = size_of::<T>()..=MAX_STRUCT_SIZE;
        if sizes.contains(&size) && size.is_multiple_of(align_of::<T>()) {
            bytes.resize(size, more);
        } else {
            // Refused for its size: nothing but that may be read.
            bytes.truncate(size_of::<usize>());
        }
        Self::new(bytes)
    }

    pub fn len(&self) -> usize {
        self.before.len()
    }

    pub fn pointer<T>(&self) -> *mut T {
        self.data.cast()
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: so many bytes were allocated and written.
        unsafe { std::slice::from_raw_parts(self.data, self.len()) }
    }

    pub fn before(&self) -> &[u8] {
        &self.before
    }

    pub fn is_untouched(&self) -> bool {
        self.bytes() == self.before
    }

    pub fn read<T: Copy>(&self) -> T {
        assert!(self.len() >= size_of::<T>());
        // SAFETY: the block is aligned and long enough; the types read are plain data.
        unsafe { self.data.cast::<T>().read() }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, freed once.
        unsafe { dealloc(self.data, self.layout) };
    }
}

/// Something that is usually not there.
#[derive(Debug)]
pub struct Rare<T>(pub Option<T>);

impl<'a, T: Arbitrary<'a>> Arbitrary<'a> for Rare<T> {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        // Where the input ends nothing is rare.
        let there = u.arbitrary::<u8>()? >= 240;
        Ok(Self(if there { Some(u.arbitrary()?) } else { None }))
    }
}

impl<T> Rare<T> {
    pub fn is_some(&self) -> bool {
        self.0.is_some()
    }
}

/// A number that matters more often than others do.
#[derive(Debug, Clone, Copy)]
pub struct Number(pub i64);

impl<'a> Arbitrary<'a> for Number {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let near = i64::from(u.arbitrary::<i8>()? >> 4);
        Ok(Self(match u.arbitrary::<u8>()? {
            0..128 => near,
            128..160 => i64::MAX.wrapping_add(near),
            160..192 => (1i64 << u.int_in_range(0..=63)?).wrapping_add(near),
            192..224 => (-1i64 << u.int_in_range(0..=63)?).wrapping_add(near),
            _ => u.arbitrary()?,
        }))
    }
}

/// The struct_size of a caller: usually that of the header.
#[derive(Debug)]
pub struct StructSize(Option<Number>);

impl<'a> Arbitrary<'a> for StructSize {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        u.arbitrary::<Rare<Number>>().map(|rare| Self(rare.0))
    }
}

impl StructSize {
    pub fn of<T>(&self) -> usize {
        match self.0 {
            None => size_of::<T>(),
            // Sizes near that of the header matter most.
            Some(Number(n)) => size_of::<T>().wrapping_add_signed(n as isize),
        }
    }
}

/// 0 now and then, or a size up to N.
#[derive(Debug, Clone, Copy)]
pub struct Small<const N: u8>(pub usize);

impl<'a, const N: u8> Arbitrary<'a> for Small<N> {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Self(match u.arbitrary::<u8>()? {
            248.. => 0,
            byte => usize::from(byte % N) + 1,
        }))
    }
}

/// An ordinary number, or any.
#[derive(Debug, Clone, Copy)]
pub struct Float(pub f32);

impl<'a> Arbitrary<'a> for Float {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Self(match u.arbitrary::<i8>()? {
            -128 => u.arbitrary()?,
            byte => f32::from(byte) / 16.0,
        }))
    }
}

/// Numbers of a caller: as many as are expected, or not.
#[derive(Debug, Arbitrary)]
pub struct Floats {
    first: [Float; 3],
    wrong: Rare<WrongCount>,
}

#[derive(Debug, Arbitrary)]
enum WrongCount {
    Null(Number),
    Count(Small<9>),
    TooMany(Number),
}

impl Floats {
    /// Pointer and count, and the memory behind them.
    pub fn make(&self, expected: usize) -> (*const f32, usize, Block) {
        let count = match self.wrong.0 {
            Some(WrongCount::Count(Small(count))) => count,
            _ => expected.min(MAX_COUNT),
        };
        let values: Vec<f32> = (0..count).map(|i| self.first[i % 3].0).collect();
        let block = Block::of_floats(&values);
        match self.wrong.0 {
            Some(WrongCount::Null(Number(count))) => (std::ptr::null(), count as usize, block),
            // In bytes beyond what memory can be, whatever is at the pointer.
            Some(WrongCount::TooMany(Number(count))) => {
                (block.pointer(), count as usize | 1 << 62, block)
            }
            _ => (block.pointer(), count, block),
        }
    }
}

/// Elements of one buffer.
pub const MAX_COUNT: usize = 100_000;
