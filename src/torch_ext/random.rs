//! Random numbers that are functions of a seed.

use std::ffi::c_char;

use tch::Tensor;

use super::failure::expect;
use super::{Raw, owned, raw};

unsafe extern "C" {
    fn engraft_keep_mask(like: Raw, keep: f64, seed: u64, out: *mut Raw) -> *mut c_char;
    fn engraft_uniform(like: Raw, low: f64, high: f64, seed: u64, out: *mut Raw) -> *mut c_char;
}

/// A uint8 mask shaped and placed like `like`, 1 with probability `keep`: a pure function of `seed`.
pub fn keep_mask(like: &Tensor, keep: f64, seed: u64) -> Tensor {
    let mut out = std::ptr::null_mut();
    // SAFETY: a live tensor; `out` is filled on success.
    expect(unsafe { engraft_keep_mask(raw(like), keep, seed, &mut out) });
    owned(out).expect("filled on success")
}

/// fp32 uniform in [low, high), shaped and placed like `like`: a pure function of `seed`.
pub fn uniform(like: &Tensor, low: f64, high: f64, seed: u64) -> Tensor {
    let mut out = std::ptr::null_mut();
    // SAFETY: a live tensor; `out` is filled on success.
    expect(unsafe { engraft_uniform(raw(like), low, high, seed, &mut out) });
    owned(out).expect("filled on success")
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn masks_and_uniforms_are_functions_of_their_seed() {
        let like = Tensor::zeros([1000], (Kind::Float, Device::Cpu));
        let (a, b, c) = (keep_mask(&like, 0.75, 7), keep_mask(&like, 0.75, 7), keep_mask(&like, 0.75, 8));
        assert!(a.equal(&b) && !a.equal(&c));
        let kept = a.sum(Kind::Int64).int64_value(&[]);
        assert!((680..820).contains(&kept), "{kept} of 1000 kept at 0.75");
        assert!(uniform(&like, -1.0, 1.0, 7).equal(&uniform(&like, -1.0, 1.0, 7)));
    }
}
