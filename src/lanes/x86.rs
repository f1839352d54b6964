//! [`Lanes`] of x86-64: AVX-512, and AVX2 with FMA.

use std::arch::x86_64::*;

use super::Lanes;
#[cfg(feature = "clip")]
use super::{Panels, products};
use crate::exp2::{LEAST, POWERS};

#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512;

/// # Safety
/// The processor must have AVX-512 F; the rest as [`products`].
#[cfg(feature = "clip")]
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn products_avx512(
    panels: &Panels,
    packed: &[f32],
    depth: usize,
    rows: (*const f32, isize),
    count: usize,
    out: *mut f32,
) {
    // SAFETY: the caller's promise.
    unsafe { products::<Avx512>(panels, packed, depth, rows, count, Avx512::splat(0.0), out) }
}

// SAFETY: all of it is AVX-512 F.
unsafe impl Lanes for Avx512 {
    type V = __m512;
    const N: usize = 16;
    const PANEL: usize = 5;
    const ROWS: &'static [usize] = &[10, 10, 8, 5, 5];

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        // SAFETY: here and below, the trait's promise: AVX-512 F is there.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: and N numbers can be read.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: __m512) {
        // SAFETY: and N numbers can be written.
        unsafe { _mm512_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn store_first(to: *mut f32, v: __m512, count: usize) {
        // SAFETY: and `count` numbers can be written, which are all that the mask lets through.
        unsafe { _mm512_mask_storeu_ps(to, (1u16 << count).wrapping_sub(1), v) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: as in `splat`.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as in `splat`.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as in `splat`.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as in `splat`.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as in `splat`.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn exp2(x: __m512) -> __m512 {
        // SAFETY: as in `splat`.
        unsafe {
            // What is no number is not less, and stays so.
            let least = _mm512_set1_ps(LEAST);
            let some = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, least);
            // max() gives its second operand where one is no number.
            let x = _mm512_max_ps(least, x);
            let whole = _mm512_roundscale_ps::<0>(x);
            let rest = _mm512_sub_ps(x, whole);
            let mut power = _mm512_set1_ps(POWERS[6]);
            for factor in POWERS[..6].iter().rev() {
                power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(*factor));
            }
            _mm512_maskz_scalef_ps(some, power, whole)
        }
    }
    #[inline(always)]
    unsafe fn largest(v: __m512) -> f32 {
        // SAFETY: as in `splat`.
        unsafe { _mm512_reduce_max_ps(v) }
    }
    #[inline(always)]
    unsafe fn sum(v: __m512) -> f32 {
        // SAFETY: as in `splat`.
        unsafe { _mm512_reduce_add_ps(v) }
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2;

/// A mask of the first `count` lanes.
///
/// # Safety
/// The processor must have AVX2.
#[inline(always)]
unsafe fn first(count: usize) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), lanes)
    }
}

// SAFETY: all of it is AVX2 and FMA.
unsafe impl Lanes for Avx2 {
    type V = __m256;
    const N: usize = 8;
    const PANEL: usize = 3;
    const ROWS: &'static [usize] = &[12, 6, 4];

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        // SAFETY: here and below, the trait's promise: AVX2 and FMA are there.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        // SAFETY: and N numbers can be read.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: __m256) {
        // SAFETY: and N numbers can be written.
        unsafe { _mm256_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn store_first(to: *mut f32, v: __m256, count: usize) {
        // SAFETY: and `count` numbers can be written, which are all that the mask lets through.
        unsafe { _mm256_maskstore_ps(to, first(count), v) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: as in `splat`.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as in `splat`.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as in `splat`.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as in `splat`.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as in `splat`.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn exp2(x: __m256) -> __m256 {
        // SAFETY: as in `splat`.
        unsafe {
            // As above.
            let least = _mm256_set1_ps(LEAST);
            let some = _mm256_cmp_ps::<_CMP_NLT_UQ>(x, least);
            let x = _mm256_max_ps(least, x);
            let whole = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
            let rest = _mm256_sub_ps(x, whole);
            let mut power = _mm256_set1_ps(POWERS[6]);
            for factor in POWERS[..6].iter().rev() {
                power = _mm256_fmadd_ps(power, rest, _mm256_set1_ps(*factor));
            }
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
            let scale = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased));
            _mm256_and_ps(_mm256_mul_ps(power, scale), some)
        }
    }
    #[inline(always)]
    unsafe fn largest(v: __m256) -> f32 {
        // SAFETY: as in `splat`.
        unsafe {
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps::<1>(v, v)))
        }
    }
    #[inline(always)]
    unsafe fn sum(v: __m256) -> f32 {
        // SAFETY: as in `splat`.
        unsafe {
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps::<1>(v, v)))
        }
    }
}
