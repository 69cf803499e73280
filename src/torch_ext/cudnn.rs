//! cuDNN's attention, as libtorch calls it.

use std::ffi::c_char;

use tch::Tensor;

use super::failure::checked;
use super::{Raw, owned, raw};
use crate::error::Result;

unsafe extern "C" {
    fn engraft_cudnn_attention(q: Raw, k: Raw, v: Raw, scale: f64, out: *mut Raw) -> *mut c_char;
    #[allow(clippy::too_many_arguments)]
    fn engraft_cudnn_attention_backward(
        grad: Raw,
        q: Raw,
        k: Raw,
        v: Raw,
        output: Raw,
        logsumexp: Raw,
        seed: Raw,
        offset: Raw,
        scale: f64,
        out: *mut Raw,
    ) -> *mut c_char;
}

/// What cuDNN's forward keeps for its backward.
pub struct CudnnAttention {
    /// (B, N, L, H), in memory as the queries lie.
    pub output: Tensor,
    logsumexp: Tensor,
    seed: Tensor,
    offset: Tensor,
}

/// Causal attention of documents of one length: q (B, N, L, H), k and v (B, K, L, H) in half precision; CUDA only.
///
/// # Errors
/// What cuDNN or libtorch does not serve.
pub fn cudnn_attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<CudnnAttention> {
    let mut out = [std::ptr::null_mut(); 4];
    // SAFETY: live tensors; `out` has room for the four results.
    checked(unsafe { engraft_cudnn_attention(raw(q), raw(k), raw(v), scale, out.as_mut_ptr()) })?;
    let [output, logsumexp, seed, offset] = out.map(|p| owned(p).expect("filled on success"));
    Ok(CudnnAttention { output, logsumexp, seed, offset })
}

/// The gradients (dq, dk, dv) of [`cudnn_attention`].
///
/// # Errors
/// What cuDNN or libtorch does not serve.
pub fn cudnn_attention_backward(
    grad: &Tensor,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    forward: &CudnnAttention,
    scale: f64,
) -> Result<[Tensor; 3]> {
    let mut out = [std::ptr::null_mut(); 3];
    let CudnnAttention { output, logsumexp, seed, offset } = forward;
    // SAFETY: live tensors; `out` has room for the three results.
    checked(unsafe {
        engraft_cudnn_attention_backward(
            raw(grad),
            raw(q),
            raw(k),
            raw(v),
            raw(output),
            raw(logsumexp),
            raw(seed),
            raw(offset),
            scale,
            out.as_mut_ptr(),
        )
    })?;
    Ok(out.map(|p| owned(p).expect("filled on success")))
}
