//! Rows of numbers times columns in vector registers, columns across the lanes.
//!
//! Attention's two products and those with weights are one micro kernel, [`tile`]: some rows times a
//! panel of columns, all sums in registers. The columns are packed once; the rows are read where
//! they are.

#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86;

use crate::buffer::{Scaled, pack};

/// A vector of f32, with the instructions that the processor has for it.
///
/// # Safety
/// Implementations use instructions that must be there: functions with these `target_feature`s are
/// what everything here is inlined into.
pub(crate) unsafe trait Lanes: Copy {
    type V: Copy;
    /// Numbers in a vector.
    const N: usize;
    /// Vectors side by side in a panel, at most.
    const PANEL: usize;
    /// Rows of a tile, by the vectors of a panel: as many sums as there are registers for.
    const ROWS: &'static [usize];

    unsafe fn splat(x: f32) -> Self::V;
    /// # Safety
    /// N numbers must be readable, at any address.
    unsafe fn load(from: *const f32) -> Self::V;
    /// # Safety
    /// N numbers must be writable, at any address.
    unsafe fn store(to: *mut f32, v: Self::V);
    /// # Safety
    /// `count` numbers, at most N, must be writable.
    unsafe fn store_first(to: *mut f32, v: Self::V, count: usize);
    /// a·b + c
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// Of numbers at most 0, to 2⁻²² of each; 0 instead of subnormal numbers, NaN of NaN.
    unsafe fn exp2(x: Self::V) -> Self::V;
    unsafe fn largest(v: Self::V) -> f32;
    unsafe fn sum(v: Self::V) -> f32;
}

/// Numbers of a panel that stays in the nearest cache while rows go by: 36 KB. Of a larger one, a
/// narrower part is read in the time that a tile takes.
const NEAR: usize = 9 << 10;

/// How columns are packed: panels of vectors, one after the other, each with all of its rows. The
/// first ones may have a vector more than the rest.
#[derive(Debug, Clone)]
pub(crate) struct Panels {
    /// Columns that there are.
    pub columns: usize,
    /// Numbers of a vector.
    lanes: usize,
    count: usize,
    /// Vectors of each panel, and how many have one more.
    vectors: usize,
    wider: usize,
}

impl Panels {
    pub fn new<L: Lanes>(columns: usize, depth: usize) -> Self {
        let vectors = columns.div_ceil(L::N);
        let stays = depth.saturating_mul(L::PANEL * L::N) <= NEAR;
        let widest = if stays { L::PANEL } else { L::PANEL.min(3) };
        let count = vectors.div_ceil(widest).max(1);
        Self {
            columns,
            lanes: L::N,
            count,
            vectors: vectors / count,
            wider: vectors % count,
        }
    }

    /// First vector of each panel, and how many it has.
    pub fn parts(&self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.count).map(|i| self.part(i))
    }

    fn part(&self, i: usize) -> (usize, usize) {
        let first = i * self.vectors + i.min(self.wider);
        (first, self.vectors + usize::from(i < self.wider))
    }

    /// The panel of a vector.
    fn of(&self, vector: usize) -> usize {
        let in_wider = self.wider * (self.vectors + 1);
        match vector.checked_sub(in_wider) {
            None => vector / (self.vectors + 1),
            Some(rest) => self.wider + rest / self.vectors,
        }
    }

    /// Columns with the zeros that fill the last vector.
    pub fn padded(&self) -> usize {
        self.columns.next_multiple_of(self.lanes)
    }

    /// Rows of the tiles of the widest panel.
    pub fn rows<L: Lanes>(&self) -> usize {
        L::ROWS[self.part(0).1 - 1]
    }

    /// Packs one of `rows` rows, or the sum of two.
    #[inline(always)]
    pub fn pack_row(
        &self,
        packed: &mut [f32],
        rows: usize,
        row: usize,
        (values, factor): Scaled<'_>,
        added: Option<Scaled<'_>>,
    ) {
        for (first, vectors) in self.parts() {
            let (start, width) = (first * self.lanes, vectors * self.lanes);
            let columns = start..self.columns.min(start + width);
            let to = &mut packed[start * rows + row * width..][..columns.len()];
            let added = added.map(|(added, strength)| (&added[columns.clone()], strength));
            pack(to, (&values[columns], factor), added);
        }
    }

    /// Packs one column.
    pub fn pack_column(&self, packed: &mut [f32], column: usize, (values, factor): Scaled<'_>) {
        let (first, vectors) = self.part(self.of(column / self.lanes));
        let (start, width) = (first * self.lanes, vectors * self.lanes);
        let panel = &mut packed[start * values.len()..][..width * values.len()];
        for (row, x) in panel.chunks_exact_mut(width).zip(values) {
            row[column - start] = x * factor;
        }
    }
}

/// Asks for the lines of the cache with `len` numbers, wherever they are, where stable Rust has an
/// instruction for it.
#[inline(always)]
pub(crate) fn prefetch(row: *const f32, len: usize) {
    for at in (0..len).step_by(LINE) {
        // SAFETY: every x86-64 has the instruction, and any address may be asked for.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            use std::arch::x86_64::*;
            _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(at).cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = row.wrapping_add(at);
    }
}

/// As [`prefetch`], to be written.
#[inline(always)]
pub(crate) fn prefetch_to_write(row: *mut f32, len: usize) {
    for at in (0..len).step_by(LINE) {
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            use std::arch::x86_64::*;
            _mm_prefetch::<_MM_HINT_ET0>(row.wrapping_add(at).cast_const().cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = row.wrapping_add(at);
    }
}

/// Numbers of a line of the cache.
const LINE: usize = 64 / size_of::<f32>();

/// Sums of products of M rows, `stride` apart, with a panel of `depth` rows of NV vectors.
///
/// # Safety
/// All of these must be readable.
#[inline(always)]
pub(crate) unsafe fn tile<L: Lanes, const M: usize, const NV: usize>(
    rows: *const f32,
    stride: isize,
    panel: *const f32,
    depth: usize,
) -> [[L::V; NV]; M] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[L::splat(0.0); NV]; M];
        let mut rows: [*const f32; M] = std::array::from_fn(|m| rows.offset(m as isize * stride));
        let mut column = panel;
        for _ in 0..depth {
            let b: [L::V; NV] = std::array::from_fn(|v| L::load(column.add(v * L::N)));
            column = column.add(NV * L::N);
            for m in 0..M {
                let a = L::splat(*rows[m]);
                rows[m] = rows[m].add(1);
                for v in 0..NV {
                    sums[m][v] = L::fma(a, b[v], sums[m][v]);
                }
            }
        }
        sums
    }
}

/// Calls `$body` with M and NV as constants for all rows of a block: as many rows at a time as there
/// are registers for; the last ones again where fewer are left, or one by one where there are fewer
/// in all.
macro_rules! for_tiles {
    ($lanes:ty, $vectors:expr, $count:expr, |$row:ident, $m:ident, $nv:ident| $body:expr) => {
        match $vectors {
            1 => for_tiles!(@rows $lanes, 1, $count, $row, $m, $nv, $body),
            2 => for_tiles!(@rows $lanes, 2, $count, $row, $m, $nv, $body),
            3 => for_tiles!(@rows $lanes, 3, $count, $row, $m, $nv, $body),
            4 => for_tiles!(@rows $lanes, 4, $count, $row, $m, $nv, $body),
            5 => for_tiles!(@rows $lanes, 5, $count, $row, $m, $nv, $body),
            _ => unreachable!("panels have at most PANEL vectors"),
        }
    };
    (@rows $lanes:ty, $n:literal, $count:expr, $row:ident, $m:ident, $nv:ident, $body:expr) => {
        match <$lanes>::ROWS.get($n - 1) {
            Some(10) => for_tiles!(@tile 10, $n, $count, $row, $m, $nv, $body),
            Some(12) => for_tiles!(@tile 12, $n, $count, $row, $m, $nv, $body),
            Some(8) => for_tiles!(@tile 8, $n, $count, $row, $m, $nv, $body),
            Some(6) => for_tiles!(@tile 6, $n, $count, $row, $m, $nv, $body),
            Some(5) => for_tiles!(@tile 5, $n, $count, $row, $m, $nv, $body),
            Some(4) => for_tiles!(@tile 4, $n, $count, $row, $m, $nv, $body),
            _ => unreachable!("ROWS has these only"),
        }
    };
    (@tile $rows:literal, $n:literal, $count:expr, $row:ident, $m:ident, $nv:ident, $body:expr) => {{
        const $nv: usize = $n;
        let count: usize = $count;
        if count < $rows {
            const $m: usize = 1;
            for $row in 0..count {
                $body
            }
        } else {
            const $m: usize = $rows;
            for group in 0..count.div_ceil($rows) {
                let $row = (group * $rows).min(count - $rows);
                $body
            }
        }
    }};
}
pub(crate) use for_tiles;

/// out\[row, column\], the products of `count` rows, `stride` apart, with columns packed by
/// `panels`, each `depth` long. Rows of `out` have the padded columns; `bias` is added to their last
/// vector.
///
/// # Safety
/// The instructions of L must be there; all of these must be readable, and `out` writable.
#[inline(always)]
pub(crate) unsafe fn products<L: Lanes>(
    panels: &Panels,
    packed: &[f32],
    depth: usize,
    (rows, stride): (*const f32, isize),
    count: usize,
    bias: L::V,
    out: *mut f32,
) {
    let width = panels.padded();
    let last = width / L::N;
    // SAFETY: the caller's promise.
    unsafe {
        for (first, vectors) in panels.parts() {
            let panel = packed.as_ptr().add(first * L::N * depth);
            for_tiles!(L, vectors, count, |row, M, NV| {
                let rows = rows.offset(row as isize * stride);
                let mut sums = tile::<L, M, NV>(rows, stride, panel, depth);
                for (m, sums) in sums.iter_mut().enumerate() {
                    if first + NV == last {
                        sums[NV - 1] = L::add(sums[NV - 1], bias);
                    }
                    let to = out.add((row + m) * width + first * L::N);
                    for (v, sum) in sums.iter().enumerate() {
                        L::store(to.add(v * L::N), *sum);
                    }
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<L: Lanes>(columns: usize, depth: usize) {
        let panels = Panels::new::<L>(columns, depth);
        let mut next = 0;
        for (i, (first, vectors)) in panels.parts().enumerate() {
            assert_eq!(first, next);
            assert!((1..=L::PANEL).contains(&vectors));
            assert!((first..first + vectors).all(|vector| panels.of(vector) == i));
            assert!(vectors <= panels.part(0).1);
            next = first + vectors;
        }
        assert_eq!(next * L::N, panels.padded());
    }

    #[test]
    fn panels_hold_every_vector_once() {
        for columns in 1..1000 {
            for depth in [1, 77, 160, 1000] {
                #[cfg(target_arch = "x86_64")]
                {
                    check::<x86::Avx512>(columns, depth);
                    check::<x86::Avx2>(columns, depth);
                }
                #[cfg(target_arch = "aarch64")]
                check::<neon::Neon>(columns, depth);
            }
        }
    }
}
