//! f16 and bf16 to f32, exactly, and back, rounded to nearest even; and sums of them.
//!
//! As the crate `half` does it, but at any address and many at a time.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use half::{bf16, f16};

/// Numbers as they lie in memory, at any address.
type Halves = [[u8; 2]];

/// f16 or bf16.
///
/// # Safety
/// Implementations must have two bytes.
pub(crate) unsafe trait Half: bytemuck::Pod {
    fn widen(self) -> f32;
    fn round(x: f32) -> Self;

    /// Eight of them.
    ///
    /// # Safety
    /// The processor must have AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn widen_8(x: __m128i) -> __m256;

    /// Eight of them.
    ///
    /// # Safety
    /// The processor must have AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn round_8(x: __m256) -> __m128i;
}

// SAFETY: it has.
unsafe impl Half for f16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }

    fn round(x: f32) -> Self {
        Self::from_f32(x)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn widen_8(x: __m128i) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_cvtph_ps(x) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn round_8(x: __m256) -> __m128i {
        // SAFETY: the caller's promise.
        unsafe { _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x) }
    }
}

// SAFETY: it has.
unsafe impl Half for bf16 {
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    fn round(x: f32) -> Self {
        let bits = x.to_bits();
        // Half a step more than what is cut off, or one bit less where that makes the result even.
        let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
        let quiet = (bits >> 16) as u16 | 0x40;
        Self::from_bits(if x.is_nan() { quiet } else { rounded })
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn widen_8(x: __m128i) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x))) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn round_8(x: __m256) -> __m128i {
        // SAFETY: the caller's promise.
        unsafe {
            let bits = _mm256_castps_si256(x);
            let high = _mm256_srli_epi32::<16>(bits);
            // As above.
            let odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
            let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
            let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half));
            let quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
            let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
            let words = _mm256_blendv_epi8(rounded, quiet, is_nan);
            // Four words of each half of the register, twice: the first and the third four are all.
            let packed = _mm256_packus_epi32(words, words);
            _mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b1000>(packed))
        }
    }
}

/// Numbers that are converted at a time.
#[cfg(target_arch = "x86_64")]
const N: usize = 8;

#[cfg(target_arch = "x86_64")]
fn by_eight() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")
}

/// As many f32 as there are halves.
pub(crate) fn widen<H: Half>(from: &Halves, to: &mut [f32]) {
    assert_eq!(from.len(), to.len());
    #[cfg(target_arch = "x86_64")]
    let done = if by_eight() {
        // SAFETY: the instructions are there.
        unsafe { widen_by_eight::<H>(from, to) }
    } else {
        0
    };
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
    for (to, x) in to[done..].iter_mut().zip(&from[done..]) {
        *to = bytemuck::pod_read_unaligned::<H>(x).widen();
    }
}

/// As many halves as there are f32.
pub(crate) fn round<H: Half>(from: &[f32], to: &mut [H]) {
    assert_eq!(from.len(), to.len());
    #[cfg(target_arch = "x86_64")]
    let done = if by_eight() {
        // SAFETY: the instructions are there.
        unsafe { round_by_eight(from, to) }
    } else {
        0
    };
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
    for (to, x) in to[done..].iter_mut().zip(&from[done..]) {
        *to = H::round(*x);
    }
}

/// Adds `scale` times numbers to as many others, in f32, and rounds each sum once.
pub(crate) fn add_scaled<H: Half>(sum: &mut [H], scale: f32, added: &[H]) {
    assert_eq!(sum.len(), added.len());
    #[cfg(target_arch = "x86_64")]
    let done = if by_eight() {
        // SAFETY: the instructions are there.
        unsafe { add_by_eight(sum, scale, added) }
    } else {
        0
    };
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
    for (sum, a) in sum[done..].iter_mut().zip(&added[done..]) {
        *sum = H::round(sum.widen() + scale * a.widen());
    }
}

/// How many were converted: but for the last few, all.
///
/// # Safety
/// The processor must have AVX2 and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
unsafe fn widen_by_eight<H: Half>(from: &Halves, to: &mut [f32]) -> usize {
    let to = to.as_chunks_mut::<N>().0;
    for (to, x) in to.iter_mut().zip(from.as_chunks::<N>().0) {
        // SAFETY: 16 bytes, and room for eight numbers.
        unsafe {
            let x = _mm_loadu_si128(x.as_ptr().cast());
            _mm256_storeu_ps(to.as_mut_ptr(), H::widen_8(x));
        }
    }
    to.len() * N
}

/// As [`widen_by_eight`].
///
/// # Safety
/// The processor must have AVX2 and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
unsafe fn round_by_eight<H: Half>(from: &[f32], to: &mut [H]) -> usize {
    let to = to.as_chunks_mut::<N>().0;
    for (to, x) in to.iter_mut().zip(from.as_chunks::<N>().0) {
        // SAFETY: eight numbers, and room for eight of two bytes.
        unsafe {
            let x = _mm256_loadu_ps(x.as_ptr());
            _mm_storeu_si128(to.as_mut_ptr().cast(), H::round_8(x));
        }
    }
    to.len() * N
}

/// As [`widen_by_eight`].
///
/// # Safety
/// The processor must have AVX2 and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
unsafe fn add_by_eight<H: Half>(sum: &mut [H], scale: f32, added: &[H]) -> usize {
    let sum = sum.as_chunks_mut::<N>().0;
    for (sum, added) in sum.iter_mut().zip(added.as_chunks::<N>().0) {
        // SAFETY: eight of two bytes each.
        unsafe {
            let x = H::widen_8(_mm_loadu_si128(sum.as_ptr().cast()));
            let a = H::widen_8(_mm_loadu_si128(added.as_ptr().cast()));
            let x = _mm256_add_ps(x, _mm256_mul_ps(_mm256_set1_ps(scale), a));
            _mm_storeu_si128(sum.as_mut_ptr().cast(), H::round_8(x));
        }
    }
    sum.len() * N
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same number, or none in both.
    fn same(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
    }

    #[test]
    fn every_half_becomes_its_f32() {
        let all: Vec<[u8; 2]> = (0..=u16::MAX).map(u16::to_ne_bytes).collect();
        let mut out = vec![0.0; all.len()];
        widen::<f16>(&all, &mut out);
        let expected = all.iter().map(|x| f16::from_ne_bytes(*x).to_f32());
        assert!(expected.zip(&out).all(|(a, b)| same(a, *b)));
        widen::<bf16>(&all, &mut out);
        let expected = all.iter().map(|x| bf16::from_ne_bytes(*x).to_f32());
        assert!(expected.zip(&out).all(|(a, b)| same(a, *b)));
    }

    #[test]
    fn f32_are_rounded_to_the_nearest_even_half() {
        // Around every bf16, and around what lies in the middle of two; most f16 are among them.
        let around = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
        let of = |high: u32| around.map(|low| f32::from_bits(high << 16 | low));
        let mut all: Vec<f32> = (0..=0xffff).flat_map(of).collect();
        // And in the middle of two f16, subnormal ones included.
        let halves = (0..=u16::MAX).map(|bits| f16::from_bits(bits).to_f32());
        let middle = halves
            .clone()
            .zip(halves.skip(1))
            .map(|(a, b)| (a + b) / 2.0);
        all.extend(middle);
        let mut out = vec![f16::ZERO; all.len()];
        round(&all, &mut out);
        for (x, found) in all.iter().zip(&out) {
            assert!(
                same(f16::from_f32(*x).to_f32(), found.to_f32()),
                "{x} {found}"
            );
        }
        let mut out = vec![bf16::ZERO; all.len()];
        round(&all, &mut out);
        for (x, found) in all.iter().zip(&out) {
            assert!(
                same(bf16::from_f32(*x).to_f32(), found.to_f32()),
                "{x} {found}"
            );
        }
    }

    #[test]
    fn any_length_at_any_address() {
        let bytes: Vec<u8> = (0..=255).collect();
        for len in 0..40 {
            for start in 0..3 {
                let from: &Halves = bytemuck::cast_slice(&bytes[start..][..2 * len]);
                let mut to = vec![0.0; len];
                widen::<f16>(from, &mut to);
                let expected = from.iter().map(|x| f16::from_ne_bytes(*x).to_f32());
                assert!(expected.zip(&to).all(|(a, b)| same(a, *b)));
                let mut back = vec![f16::ZERO; len];
                round(&to, &mut back);
                let bits = from.iter().map(|x| u16::from_ne_bytes(*x));
                assert!(bits.zip(&back).all(|(a, b)| a == b.to_bits() || b.is_nan()));
            }
        }
    }

    fn check_sums<H: Half>() {
        let all: Vec<H> = (0..=u16::MAX).map(|bits| bytemuck::cast(bits)).collect();
        for (len, scale) in [(all.len(), -0.37), (all.len() - 5, 3.0), (3, 1.0)] {
            let (added, sum) = (&all[..len], &all[all.len() - len..]);
            let mut found = sum.to_vec();
            add_scaled(&mut found, scale, added);
            for ((a, x), found) in added.iter().zip(sum).zip(found) {
                let expected = H::round(x.widen() + scale * a.widen());
                assert!(same(expected.widen(), found.widen()));
            }
        }
    }

    #[test]
    fn sums_are_rounded_once() {
        check_sums::<f16>();
        check_sums::<bf16>();
    }
}
