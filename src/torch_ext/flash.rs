//! FlashAttention over documents laid end to end.

use std::ffi::c_char;

use tch::Tensor;

use super::failure::expect;
use super::{Raw, owned, raw};

unsafe extern "C" {
    #[allow(clippy::too_many_arguments)]
    fn engraft_flash_varlen(
        q: Raw,
        k: Raw,
        v: Raw,
        offsets: Raw,
        longest: i64,
        scale: f64,
        window_left: i64,
        out: *mut Raw,
    ) -> *mut c_char;
    #[allow(clippy::too_many_arguments)]
    fn engraft_flash_varlen_backward(
        grad: Raw,
        q: Raw,
        k: Raw,
        v: Raw,
        output: Raw,
        logsumexp: Raw,
        offsets: Raw,
        longest: i64,
        scale: f64,
        window_left: i64,
        rng_state: Raw,
        unused: Raw,
        out: *mut Raw,
    ) -> *mut c_char;
}

/// What FlashAttention's forward keeps for its backward.
pub struct FlashVarlen {
    /// (T, N, H).
    pub output: Tensor,
    /// (N, T), fp32.
    pub logsumexp: Tensor,
    rng_state: Tensor,
    unused: Tensor,
}

/// Causal FlashAttention-2 over documents laid end to end; CUDA only.
///
/// q (T, N, H), k and v (T, K, H), `offsets` int32 on the device; `window` keys to the left besides the query's own.
pub fn flash_varlen(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    offsets: &Tensor,
    longest: i64,
    scale: f64,
    window: Option<i64>,
) -> FlashVarlen {
    let mut out = [std::ptr::null_mut(); 4];
    // SAFETY: live tensors; `out` has room for the four results.
    expect(unsafe {
        engraft_flash_varlen(
            raw(q),
            raw(k),
            raw(v),
            raw(offsets),
            longest,
            scale,
            window.unwrap_or(-1),
            out.as_mut_ptr(),
        )
    });
    let [output, logsumexp, rng_state, unused] = out.map(|p| owned(p).expect("filled on success"));
    FlashVarlen { output, logsumexp, rng_state, unused }
}

/// The gradients (dq, dk, dv) of [`flash_varlen`].
pub fn flash_varlen_backward(
    grad: &Tensor,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    forward: &FlashVarlen,
    offsets: &Tensor,
    longest: i64,
    scale: f64,
    window: Option<i64>,
) -> [Tensor; 3] {
    let mut out = [std::ptr::null_mut(); 3];
    // SAFETY: live tensors; `out` has room for the three results.
    expect(unsafe {
        engraft_flash_varlen_backward(
            raw(grad),
            raw(q),
            raw(k),
            raw(v),
            raw(&forward.output),
            raw(&forward.logsumexp),
            raw(offsets),
            longest,
            scale,
            window.unwrap_or(-1),
            raw(&forward.rng_state),
            raw(&forward.unused),
            out.as_mut_ptr(),
        )
    });
    out.map(|p| owned(p).expect("filled on success"))
}
