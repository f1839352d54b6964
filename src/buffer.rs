//! Memory for vectors, and what is packed into it.

use std::ops::{Deref, DerefMut};

use crate::{Error, Result};

/// Numbers that begin with a line of the cache, which no vector in them then crosses.
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    lines: Vec<Line>,
    len: usize,
}

const LINE: usize = 16;

#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

impl Buffer {
    /// Zeros, or an error where there is not so much memory.
    pub fn zeros(len: usize) -> Result<Self> {
        let mut lines = Vec::new();
        let count = len.div_ceil(LINE);
        if lines.try_reserve_exact(count).is_err() {
            let bytes = len.saturating_mul(size_of::<f32>());
            return Err(Error::OutOfMemory { bytes });
        }
        lines.resize(count, Line([0.0; LINE]));
        Ok(Self { lines, len })
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: lines are numbers without padding, and there are at least `len`.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above; borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// Numbers, and what each is multiplied with.
pub(crate) type Scaled<'a> = (&'a [f32], f32);

/// Writes a row, or the sum of two.
#[inline(always)]
pub(crate) fn pack(to: &mut [f32], (row, factor): Scaled<'_>, added: Option<Scaled<'_>>) {
    match added {
        None => {
            for (to, x) in to.iter_mut().zip(row) {
                *to = x * factor;
            }
        }
        Some((added, strength)) => {
            for ((to, x), a) in to.iter_mut().zip(row).zip(added) {
                *to = x * factor + strength * a;
            }
        }
    }
}
