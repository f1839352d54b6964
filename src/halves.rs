//! f16 and bf16 to f32, exactly, and back, rounded to nearest even.
//!
//! As the crate `half` does it, but at any address and many at a time.

use half::{bf16, f16};

/// Numbers as they lie in memory, at any address.
type Halves = [[u8; 2]];

/// As many f32 as there are f16.
pub(crate) fn f16_to_f32(from: &Halves, to: &mut [f32]) {
    assert_eq!(from.len(), to.len());
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("f16c") {
        // SAFETY: the instructions are there.
        return unsafe { x86::f16_to_f32(from, to) };
    }
    for (to, x) in to.iter_mut().zip(from) {
        *to = f16::from_ne_bytes(*x).to_f32();
    }
}

/// As many f16 as there are f32.
pub(crate) fn f32_to_f16(from: &[f32], to: &mut [f16]) {
    assert_eq!(from.len(), to.len());
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("f16c") {
        // SAFETY: the instructions are there.
        return unsafe { x86::f32_to_f16(from, to) };
    }
    for (to, x) in to.iter_mut().zip(from) {
        *to = f16::from_f32(*x);
    }
}

/// As many f32 as there are bf16.
pub(crate) fn bf16_to_f32(from: &Halves, to: &mut [f32]) {
    assert_eq!(from.len(), to.len());
    for (to, x) in to.iter_mut().zip(from) {
        *to = f32::from_bits(u32::from(u16::from_ne_bytes(*x)) << 16);
    }
}

/// As many bf16 as there are f32.
pub(crate) fn f32_to_bf16(from: &[f32], to: &mut [bf16]) {
    assert_eq!(from.len(), to.len());
    for (to, x) in to.iter_mut().zip(from) {
        let bits = x.to_bits();
        // Half a step more than what is cut off, or one bit less where that makes the result even.
        let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
        let quiet = (bits >> 16) as u16 | 0x40;
        *to = bf16::from_bits(if x.is_nan() { quiet } else { rounded });
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::f16;

    use super::Halves;

    const N: usize = 8;

    /// # Safety
    /// The processor must have F16C.
    #[target_feature(enable = "avx,f16c")]
    pub unsafe fn f16_to_f32(from: &Halves, to: &mut [f32]) {
        let (chunks, rest) = from.as_chunks::<N>();
        let (to_chunks, to_rest) = to.as_chunks_mut::<N>();
        for (to, x) in to_chunks.iter_mut().zip(chunks) {
            // SAFETY: 16 bytes, and room for eight numbers.
            unsafe {
                let x = _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast()));
                _mm256_storeu_ps(to.as_mut_ptr(), x);
            }
        }
        for (to, x) in to_rest.iter_mut().zip(rest) {
            *to = f16::from_ne_bytes(*x).to_f32();
        }
    }

    /// # Safety
    /// The processor must have F16C.
    #[target_feature(enable = "avx,f16c")]
    pub unsafe fn f32_to_f16(from: &[f32], to: &mut [f16]) {
        let (chunks, rest) = from.as_chunks::<N>();
        let (to_chunks, to_rest) = to.as_chunks_mut::<N>();
        for (to, x) in to_chunks.iter_mut().zip(chunks) {
            // SAFETY: eight numbers, and room for 16 bytes.
            unsafe {
                let x = _mm256_loadu_ps(x.as_ptr());
                let x = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
                _mm_storeu_si128(to.as_mut_ptr().cast(), x);
            }
        }
        for (to, x) in to_rest.iter_mut().zip(rest) {
            *to = f16::from_f32(*x);
        }
    }
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
        f16_to_f32(&all, &mut out);
        let expected = all.iter().map(|x| f16::from_ne_bytes(*x).to_f32());
        assert!(expected.zip(&out).all(|(a, b)| same(a, *b)));
        bf16_to_f32(&all, &mut out);
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
        f32_to_f16(&all, &mut out);
        for (x, found) in all.iter().zip(&out) {
            assert!(
                same(f16::from_f32(*x).to_f32(), found.to_f32()),
                "{x} {found}"
            );
        }
        let mut out = vec![bf16::ZERO; all.len()];
        f32_to_bf16(&all, &mut out);
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
                f16_to_f32(from, &mut to);
                let expected = from.iter().map(|x| f16::from_ne_bytes(*x).to_f32());
                assert!(expected.zip(&to).all(|(a, b)| same(a, *b)));
                let mut back = vec![f16::ZERO; len];
                f32_to_f16(&to, &mut back);
                let bits = from.iter().map(|x| u16::from_ne_bytes(*x));
                assert!(bits.zip(&back).all(|(a, b)| a == b.to_bits() || b.is_nan()));
            }
        }
    }
}
