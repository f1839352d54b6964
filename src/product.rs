//! Products of matrices by the crate `gemm`.

/// out\[m, n\] = lhs\[m, k\]·rhs\[k, n\], in the thread that asks. `lhs` and `out` have rows, a stride
/// apart; `rhs` is dense, with a stride over k and one over n.
///
/// # Safety
/// m rows of n numbers must be writable at `out`, by nobody else, and m of k readable at `lhs`; the
/// strides of `rhs` must be 1 and n or k.
pub(crate) unsafe fn product(
    [m, n, k]: [usize; 3],
    (out, out_stride): (*mut f32, isize),
    (lhs, lhs_stride): (*const f32, isize),
    rhs: &[f32],
    (over_k, over_n): (isize, isize),
) {
    assert!(rhs.len() >= n * k);
    // SAFETY: the caller's promise; `rhs` has n·k numbers, as asserted.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            out_stride,
            false,
            lhs,
            1,
            lhs_stride,
            rhs.as_ptr(),
            over_n,
            over_k,
            0.0,
            1.0,
            false,
            false,
            false,
            // What runs in parallel are layers and heads.
            gemm::Parallelism::None,
        );
    }
}
