//! Products of bf16 matrices on the CPU.

use std::ffi::{c_char, c_int};

use half::bf16;

use super::failure::{expect, message};

unsafe extern "C" {
    #[allow(clippy::too_many_arguments)]
    fn engraft_bf16_gemm(
        m: i64,
        n: i64,
        k: i64,
        lda: i64,
        ldb: i64,
        ldc: i64,
        accumulate: c_int,
        a: *const bf16,
        b: *const bf16,
        c: *mut f32,
    ) -> *mut c_char;
    fn engraft_bf16_gemm_done();
}

/// A matrix operand: its elements and the distance between rows.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// Elements, from the first one on.
    pub elements: &'a [bf16],
    /// Elements from one row to the next.
    pub stride: usize,
}

/// `C (m, n) = A (m, k) B (k, n)` in fp32, added to C when `accumulate`; one thread. B holds pairs of rows side by side
/// (k/2, n, 2) and k is even. Only where [`bf16_gemm_serves`].
pub fn bf16_gemm((m, n, k): (usize, usize, usize), a: Rows<'_>, b: &[bf16], c: &mut [f32], accumulate: bool) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(k > 0 && k % 2 == 0 && a.stride >= k, "k is even and a row of A holds it");
    assert!(
        a.elements.len() >= (m - 1) * a.stride + k && b.len() >= k * n && c.len() >= m * n,
        "operands are large enough"
    );
    // SAFETY: all that is read and written lies within the slices, as just asserted.
    expect(unsafe {
        engraft_bf16_gemm(
            m as i64,
            n as i64,
            k as i64,
            a.stride as i64,
            n as i64,
            n as i64,
            c_int::from(accumulate),
            a.elements.as_ptr(),
            b.as_ptr(),
            c.as_mut_ptr(),
        )
    });
}

/// To be called when a thread is through with its [`bf16_gemm`] calls.
pub fn bf16_gemm_done() {
    // SAFETY: no arguments; harmless where there is nothing to give back.
    unsafe { engraft_bf16_gemm_done() }
}

/// Whether libtorch has the kernel behind [`bf16_gemm`] for this processor: tried once, on numbers whose product is known.
pub fn bf16_gemm_serves() -> bool {
    static SERVES: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| {
        let a: Vec<bf16> = (0..8).map(|i| bf16::from_f32(i as f32)).collect(); // (2, 4)
        let b: Vec<bf16> = (0..8).map(|i| bf16::from_f32((i % 3) as f32)).collect(); // (2, 2, 2)
        let mut c = [0f32; 4];
        // SAFETY: a (2, 4), b (4, 2) and c (2, 2) are as large as said.
        let error = unsafe { engraft_bf16_gemm(2, 2, 4, 4, 2, 2, 0, a.as_ptr(), b.as_ptr(), c.as_mut_ptr()) };
        bf16_gemm_done();
        // b's pairs spell the rows (0, 2), (1, 0), (1, 0), (2, 1).
        message(error).is_none() && c == [9.0, 3.0, 25.0, 15.0]
    });
    *SERVES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_those_of_plain_sums_and_are_added_where_asked() {
        if !bf16_gemm_serves() {
            return; // Nothing calls it then.
        }
        let (m, n, k, stride) = (3, 5, 6, 8);
        let number = |i: usize| bf16::from_f32(((i * 7) % 11) as f32 - 5.0);
        let a: Vec<bf16> = (0..m * stride).map(number).collect();
        let b: Vec<bf16> = (0..k * n).map(|i| number(i + 3)).collect(); // (k/2, n, 2)
        let expected = |row: usize, column: usize| -> f32 {
            let right = |inner: usize| b[(inner / 2 * n + column) * 2 + inner % 2].to_f32();
            (0..k).map(|inner| a[row * stride + inner].to_f32() * right(inner)).sum()
        };
        let mut c = vec![100.0; m * n];
        for (accumulate, times) in [(false, 1.0), (true, 2.0)] {
            bf16_gemm((m, n, k), Rows { elements: &a, stride }, &b, &mut c, accumulate);
            for (i, found) in c.iter().enumerate() {
                assert_eq!(*found, times * expected(i / n, i % n), "element {i}, accumulate {accumulate}");
            }
        }
        bf16_gemm_done();
    }
}
