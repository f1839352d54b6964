//! [`Lanes`] of AArch64: NEON.

use std::arch::aarch64::*;

use super::Lanes;
use crate::exp2::{LEAST, POWERS};

#[derive(Debug, Clone, Copy)]
pub(crate) struct Neon;

// SAFETY: all of it is NEON, which every AArch64 has that Rust compiles for.
unsafe impl Lanes for Neon {
    type V = float32x4_t;
    const N: usize = 4;
    const PANEL: usize = 4;
    const ROWS: &'static [usize] = &[12, 10, 8, 6];

    #[inline(always)]
    unsafe fn splat(x: f32) -> float32x4_t {
        // SAFETY: here and below, the trait's promise: NEON is there.
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> float32x4_t {
        // SAFETY: and N numbers can be read.
        unsafe { vld1q_f32(from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: float32x4_t) {
        // SAFETY: and N numbers can be written.
        unsafe { vst1q_f32(to, v) }
    }
    #[inline(always)]
    unsafe fn store_first(to: *mut f32, v: float32x4_t, count: usize) {
        let mut all = [0.0; Self::N];
        // SAFETY: and `count` numbers can be written, at most N.
        unsafe {
            vst1q_f32(all.as_mut_ptr(), v);
            to.copy_from_nonoverlapping(all.as_ptr(), count);
        }
    }
    #[inline(always)]
    unsafe fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: as in `splat`.
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    unsafe fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: as in `splat`.
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: as in `splat`.
        unsafe { vsubq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: as in `splat`.
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: as in `splat`.
        unsafe { vmaxq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn exp2(x: float32x4_t) -> float32x4_t {
        // SAFETY: as in `splat`.
        unsafe {
            // What is no number is not less, and stays so.
            let least = vdupq_n_f32(LEAST);
            let none = vcltq_f32(x, least);
            let x = vmaxq_f32(x, least);
            let whole = vrndnq_f32(x);
            let rest = vsubq_f32(x, whole);
            let mut power = vdupq_n_f32(POWERS[6]);
            for factor in POWERS[..6].iter().rev() {
                power = vfmaq_f32(vdupq_n_f32(*factor), power, rest);
            }
            let biased = vaddq_s32(vcvtnq_s32_f32(whole), vdupq_n_s32(127));
            let scale = vreinterpretq_f32_s32(vshlq_n_s32::<23>(biased));
            vbslq_f32(none, vdupq_n_f32(0.0), vmulq_f32(power, scale))
        }
    }
    #[inline(always)]
    unsafe fn largest(v: float32x4_t) -> f32 {
        // SAFETY: as in `splat`.
        unsafe { vmaxvq_f32(v) }
    }
    #[inline(always)]
    unsafe fn sum(v: float32x4_t) -> f32 {
        // SAFETY: as in `splat`.
        unsafe { vaddvq_f32(v) }
    }
}
