//! What powers of two are computed with.

/// 2^x on [-½, ½], lowest power first: a minimax polynomial, whose relative error is 2⁻²⁹.
pub(crate) const POWERS: [f32; 7] = [
    1.0,
    std::f32::consts::LN_2,
    0.240_226_46,
    0.055_503_286,
    0.009_618_489,
    0.001_339_993_1,
    0.000_153_458_11,
];

/// Of smaller numbers the power is 0: it would be a subnormal number, on which processors lose
/// hundreds of cycles, and which no sum with a 1 in it notices.
pub(crate) const LEAST: f32 = -126.0;
