//! Attention of a block of queries in vector registers: queries one by one, keys and the numbers of
//! a head across the lanes.
//!
//! Keys are few (77 of Stable Diffusion's texts), so a block's scores stay in the nearest cache.
//! Both products are one micro kernel, [`tile`]: some rows times a panel of columns, all sums in
//! registers. The columns are packed once per head; the rows are read where they are, the queries
//! in the caller's memory and the softmax in the block. Nothing is transposed but the keys.

use super::{
    blocks::Block,
    engine::{Scaled, pack},
    x86::{prefetch, prefetch_to_write},
};

/// A vector of f32, with the instructions that the processor has for it.
///
/// # Safety
/// Implementations use instructions that must be there: functions with these `target_feature`s are
/// what everything here is inlined into.
pub(super) unsafe trait Lanes: Copy {
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
pub(super) struct Panels {
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
    fn parts(&self) -> impl Iterator<Item = (usize, usize)> {
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

/// What a head's keys and values are packed into.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub keys: Panels,
    pub values: Panels,
    /// 0 for keys, −∞ for what fills the last vector.
    bias: Vec<f32>,
    block_step: usize,
}

impl Plan {
    pub fn new<L: Lanes>(keys: usize, dim: usize) -> Self {
        let panels = Panels::new::<L>(keys, dim);
        let bias = (panels.padded() - L::N..panels.padded())
            .map(|key| if key < keys { 0.0 } else { f32::NEG_INFINITY })
            .collect();
        let values = Panels::new::<L>(dim, keys);
        let (a, b) = (panels.rows::<L>(), values.rows::<L>());
        let multiple = (1..=b).map(|n| n * a).find(|n| n % b == 0);
        Self {
            block_step: multiple.expect("b times a is one"),
            keys: panels,
            values,
            bias,
        }
    }

    /// A multiple of the rows of either product's tiles.
    pub fn block_step(&self) -> usize {
        self.block_step
    }
}

/// A block of queries, from scores to the result.
///
/// # Safety
/// The instructions of L must be there, and the block must be as it says.
#[inline(always)]
pub(super) unsafe fn block<L: Lanes>(plan: &Plan, block: &mut Block<'_>) {
    // SAFETY: the caller's promise, handed on.
    unsafe {
        scores::<L>(plan, block);
        softmax::<L>(plan, block);
        match block.regional {
            None => mixed::<L, false>(plan, block, (&[], &[])),
            Some(regional) => mixed::<L, true>(plan, block, regional),
        }
    }
}

/// Sums of products of M rows, `stride` apart, with a panel of `depth` rows of NV vectors.
///
/// # Safety
/// All of these must be readable.
#[inline(always)]
unsafe fn tile<L: Lanes, const M: usize, const NV: usize>(
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

/// Scores in powers of two, with −∞ behind the last key.
///
/// # Safety
/// As [`block`].
#[inline(always)]
unsafe fn scores<L: Lanes>(plan: &Plan, block: &mut Block<'_>) {
    let (width, dim) = (plan.keys.padded(), plan.values.columns);
    let last = width / L::N;
    // SAFETY: the caller's promise: `count` queries of `dim` numbers, keys packed by this plan, and
    // `count` rows of `width` numbers for the scores.
    unsafe {
        let scores = block.scores.as_mut_ptr();
        let bias = L::load(plan.bias.as_ptr());
        for (first, vectors) in plan.keys.parts() {
            let panel = block.keys.as_ptr().add(first * L::N * dim);
            for_tiles!(L, vectors, block.count, |row, M, NV| {
                let query = block.query.offset(row as isize * block.query_stride);
                let mut sums = tile::<L, M, NV>(query, block.query_stride, panel, dim);
                for (m, sums) in sums.iter_mut().enumerate() {
                    if first + NV == last {
                        sums[NV - 1] = L::add(sums[NV - 1], bias);
                    }
                    let to = scores.add((row + m) * width + first * L::N);
                    for (v, sum) in sums.iter().enumerate() {
                        L::store(to.add(v * L::N), *sum);
                    }
                }
            });
        }
    }
}

/// Powers of two, not yet divided by their sums, which become `factors`.
///
/// # Safety
/// As [`block`].
#[inline(always)]
unsafe fn softmax<L: Lanes>(plan: &Plan, block: &mut Block<'_>) {
    let (width, dim) = (plan.keys.padded(), plan.values.columns);
    // SAFETY: as in `scores`; masks have as many rows and columns.
    unsafe {
        for row in 0..block.count {
            // A head's rows may lie apart, so that no processor guesses which are wanted next: here
            // is time to bring those of the next block, and where this one's result will be.
            let next = (row + block.count) as isize * block.query_stride;
            prefetch(block.query.wrapping_offset(next), dim);
            prefetch_to_write(
                block.out.wrapping_offset(row as isize * block.out_stride),
                dim,
            );
            let scores = block.scores.as_mut_ptr().add(row * width);
            if let Some(mask) = &block.mask {
                let mask = mask.as_ptr().add(row * width);
                let log2_e = L::splat(std::f32::consts::LOG2_E);
                for at in (0..width).step_by(L::N) {
                    let masked = L::fma(L::load(mask.add(at)), log2_e, L::load(scores.add(at)));
                    L::store(scores.add(at), masked);
                }
            }
            let mut top = L::load(scores);
            for at in (L::N..width).step_by(L::N) {
                top = L::max(top, L::load(scores.add(at)));
            }
            let mut top = L::largest(top);
            let hidden = block.mask.is_some() && top == f32::NEG_INFINITY;
            if hidden {
                top = 0.0;
            }
            let top = L::splat(top);
            let mut sum = L::splat(0.0);
            for at in (0..width).step_by(L::N) {
                let power = L::exp2(L::sub(L::load(scores.add(at)), top));
                L::store(scores.add(at), power);
                sum = L::add(sum, power);
            }
            let sum = L::sum(sum);
            block.factors[row] = if hidden && sum == 0.0 { 0.0 } else { 1.0 / sum };
        }
    }
}

/// The softmax times the values, and times V_a with a strength for each query, written.
///
/// # Safety
/// As [`block`].
#[inline(always)]
unsafe fn mixed<L: Lanes, const REGIONAL: bool>(
    plan: &Plan,
    block: &Block<'_>,
    (aes_values, strengths): (&[f32], &[f32]),
) {
    let (width, keys, dim) = (plan.keys.padded(), plan.keys.columns, plan.values.columns);
    // SAFETY: as in `scores`; values are packed by this plan, and `count` rows of `dim` numbers can
    // be written.
    unsafe {
        for (first, vectors) in plan.values.parts() {
            let at = first * L::N * keys;
            // Numbers of the panel's last vector that there are.
            let rest = (dim - (first + vectors - 1) * L::N).min(L::N);
            let factors = block.factors.as_ptr();
            for_tiles!(L, vectors, block.count, |row, M, NV| {
                let out = block
                    .out
                    .offset(row as isize * block.out_stride)
                    .add(first * L::N);
                let weights = block.scores.as_ptr().add(row * width);
                let panel = block.values.as_ptr().add(at);
                let mut sums = tile::<L, M, NV>(weights, width as isize, panel, keys);
                if REGIONAL {
                    let panel = aes_values.as_ptr().add(at);
                    let more = tile::<L, M, NV>(weights, width as isize, panel, keys);
                    for (m, (sums, more)) in sums.iter_mut().zip(more).enumerate() {
                        let strength = L::splat(strengths[row + m]);
                        for (sum, more) in sums.iter_mut().zip(more) {
                            *sum = L::fma(more, strength, *sum);
                        }
                    }
                }
                for (m, sums) in sums.iter().enumerate() {
                    let factor = L::splat(*factors.add(row + m));
                    let to = out.offset(m as isize * block.out_stride);
                    for (v, sum) in sums.iter().enumerate() {
                        let (to, scaled) = (to.add(v * L::N), L::mul(*sum, factor));
                        if v + 1 == NV && rest < L::N {
                            L::store_first(to, scaled, rest);
                        } else {
                            L::store(to, scaled);
                        }
                    }
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::x86::*, *};

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
                check::<Avx512>(columns, depth);
                check::<Avx2>(columns, depth);
            }
        }
    }

    /// Sizes that no memory holds are refused later, with words: nothing here grows with them.
    #[test]
    fn plans_of_any_size_are_small() {
        let plan = Plan::new::<Avx512>(1 << 58, 1 << 57);
        assert!(plan.keys.padded() >= 1 << 58);
    }
}
