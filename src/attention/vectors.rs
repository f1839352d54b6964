//! Attention of a block of queries in vector registers: queries one by one, keys and the numbers of
//! a head across the lanes.
//!
//! Keys are few (77 of Stable Diffusion's texts), so a block's scores stay in the nearest cache.
//! The columns of both products are packed once per head; their rows are read where they are, the
//! queries in the caller's memory and the softmax in the block. Nothing is transposed but the keys.

use super::blocks::Block;
#[cfg(target_arch = "aarch64")]
use crate::lanes::neon::Neon;
#[cfg(target_arch = "x86_64")]
use crate::lanes::x86::{Avx2, Avx512};
use crate::{
    buffer::Scaled,
    lanes::{Lanes, Panels, for_tiles, prefetch, prefetch_to_write, products, tile},
};

/// [`compute`] and [`Panels::pack_row`], compiled with the processor's features.
#[derive(Debug, Clone, Copy)]
struct Functions {
    block: unsafe fn(&Plan, &mut Block<'_>),
    pack_value: unsafe fn(&Plan, &mut [f32], usize, Scaled<'_>, Option<Scaled<'_>>),
}

macro_rules! functions {
    ($lanes:ty, $features:literal) => {{
        #[target_feature(enable = $features)]
        unsafe fn block(plan: &Plan, block: &mut Block<'_>) {
            // SAFETY: the caller's promise.
            unsafe { compute::<$lanes>(plan, block) }
        }
        #[target_feature(enable = $features)]
        unsafe fn pack_value(
            plan: &Plan,
            packed: &mut [f32],
            key: usize,
            row: Scaled<'_>,
            added: Option<Scaled<'_>>,
        ) {
            let keys = plan.keys.columns;
            plan.values.pack_row(packed, keys, key, row, added);
        }
        Functions { block, pack_value }
    }};
}

/// What a head's keys and values are packed into.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub keys: Panels,
    pub values: Panels,
    /// 0 for keys, −∞ for what fills the last vector.
    bias: Vec<f32>,
    block_step: usize,
    functions: Functions,
}

impl Plan {
    #[cfg(target_arch = "x86_64")]
    pub fn avx512(keys: usize, dim: usize) -> Self {
        Self::new::<Avx512>(keys, dim, functions!(Avx512, "avx512f"))
    }

    #[cfg(target_arch = "x86_64")]
    pub fn avx2(keys: usize, dim: usize) -> Self {
        Self::new::<Avx2>(keys, dim, functions!(Avx2, "avx2,fma"))
    }

    #[cfg(target_arch = "aarch64")]
    pub fn neon(keys: usize, dim: usize) -> Self {
        Self::new::<Neon>(keys, dim, functions!(Neon, "neon"))
    }

    fn new<L: Lanes>(keys: usize, dim: usize, functions: Functions) -> Self {
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
            functions,
        }
    }

    /// A block of queries, from scores to the result.
    ///
    /// # Safety
    /// The processor must have what the plan was made for, and the block be as it says.
    pub unsafe fn block(&self, block: &mut Block<'_>) {
        // SAFETY: the caller's promise.
        unsafe { (self.functions.block)(self, block) }
    }

    /// The sum of one or two values, those of a key.
    ///
    /// # Safety
    /// The processor must have what the plan was made for.
    pub unsafe fn pack_value(
        &self,
        packed: &mut [f32],
        key: usize,
        row: Scaled<'_>,
        added: Option<Scaled<'_>>,
    ) {
        // SAFETY: the caller's promise.
        unsafe { (self.functions.pack_value)(self, packed, key, row, added) }
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
unsafe fn compute<L: Lanes>(plan: &Plan, block: &mut Block<'_>) {
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

/// Scores in powers of two, with −∞ behind the last key.
///
/// # Safety
/// As [`compute`].
#[inline(always)]
unsafe fn scores<L: Lanes>(plan: &Plan, block: &mut Block<'_>) {
    // SAFETY: the caller's promise: `count` queries as wide as a head, keys packed by this plan, and
    // `count` rows of padded keys for the scores.
    unsafe {
        products::<L>(
            &plan.keys,
            block.keys,
            plan.values.columns,
            (block.query, block.query_stride),
            block.count,
            L::load(plan.bias.as_ptr()),
            block.scores.as_mut_ptr(),
        );
    }
}

/// Powers of two, not yet divided by their sums, which become `factors`.
///
/// # Safety
/// As [`compute`].
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
/// As [`compute`].
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

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    /// Sizes that no memory holds are refused later, with words: nothing here grows with them.
    #[test]
    fn plans_of_any_size_are_small() {
        let plan = Plan::avx512(1 << 58, 1 << 57);
        assert!(plan.keys.padded() >= 1 << 58);
    }
}
