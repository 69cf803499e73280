//! What an optimizer does to all tensors at once: the step, the norm of the gradients, their end.

use std::ffi::c_char;

use tch::Tensor;

use super::failure::{checked, expect};
use super::{Raw, owned, raw, raws};
use crate::error::Result;

unsafe extern "C" {
    #[allow(clippy::too_many_arguments)]
    fn engraft_fused_adamw(
        params: *const Raw,
        grads: *const Raw,
        exp_avgs: *const Raw,
        exp_avg_sqs: *const Raw,
        steps: *const Raw,
        n: usize,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        grad_scale: Raw,
        found_inf: Raw,
    ) -> *mut c_char;
    fn engraft_add_scaled(x: Raw, y: Raw, factor: f64, out: *mut Raw) -> *mut c_char;
    fn engraft_clear_gradients(tensors: *const Raw, n: usize);
    fn engraft_global_norm(tensors: *const Raw, n: usize, out: *mut Raw) -> *mut c_char;
}

/// Hyper-parameters of one AdamW step (arXiv:1711.05101).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub learning_rate: f64,
    /// First decay.
    pub beta1: f64,
    /// Second decay.
    pub beta2: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
}

/// libtorch's fused AdamW over all parameters in one call; `steps` are fp32 scalars, already counting this step.
///
/// `guard` decides on the device, without waiting for it: `(divisor, skip)`, two fp32 scalars. Gradients are divided
/// by the first (in place); nothing changes where the second is 1.
pub fn fused_adamw_(
    params: &[Tensor],
    grads: &[Tensor],
    exp_avgs: &[Tensor],
    exp_avg_sqs: &[Tensor],
    steps: &[Tensor],
    settings: AdamW,
    guard: Option<(&Tensor, &Tensor)>,
) -> Result<()> {
    let n = params.len();
    assert!([grads.len(), exp_avgs.len(), exp_avg_sqs.len(), steps.len()].iter().all(|len| *len == n));
    let lists = [params, grads, exp_avgs, exp_avg_sqs, steps].map(|list| raws(list.iter()));
    // SAFETY: live tensors, lists of equal length.
    checked(unsafe {
        engraft_fused_adamw(
            lists[0].as_ptr(),
            lists[1].as_ptr(),
            lists[2].as_ptr(),
            lists[3].as_ptr(),
            lists[4].as_ptr(),
            n,
            settings.learning_rate,
            settings.beta1,
            settings.beta2,
            settings.weight_decay,
            settings.epsilon,
            guard.map_or(std::ptr::null_mut(), |(divisor, _)| raw(divisor)),
            guard.map_or(std::ptr::null_mut(), |(_, skip)| raw(skip)),
        )
    })
}

/// `x + factor * y`, rounded as torch's `add(alpha=)` does it: once, on processors that can.
pub fn add_scaled(x: &Tensor, y: &Tensor, factor: f64) -> Tensor {
    let mut out = std::ptr::null_mut();
    // SAFETY: live tensors; `out` is filled on success.
    expect(unsafe { engraft_add_scaled(raw(x), raw(y), factor, &mut out) });
    owned(out).expect("filled on success")
}

/// Drops the gradient of every tensor: the next backward then gives its own away instead of adding it to zeros.
pub fn clear_gradients(tensors: &[Tensor]) {
    let list = raws(tensors.iter());
    // SAFETY: live tensors.
    unsafe { engraft_clear_gradients(list.as_ptr(), list.len()) }
}

/// L2 norm over all elements of all tensors: an fp32 scalar on their device.
pub fn global_norm(tensors: &[Tensor]) -> Tensor {
    let list = raws(tensors.iter());
    let mut out = std::ptr::null_mut();
    // SAFETY: live tensors; `out` is filled on success.
    expect(unsafe { engraft_global_norm(list.as_ptr(), list.len(), &mut out) });
    owned(out).expect("filled on success")
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn the_norm_is_over_all_elements_of_all_tensors() {
        let tensors = [Tensor::from_slice(&[1f32, 2.0]), Tensor::from_slice(&[-2f32, 4.0, 0.0]).view([3, 1])];
        assert_eq!(global_norm(&tensors).double_value(&[]), 5.0);
    }

    #[test]
    fn a_gradient_that_is_cleared_is_gone() {
        let x = Tensor::from_slice(&[1f32]).set_requires_grad(true);
        (&x * 2.0).sum(Kind::Float).backward();
        assert!(x.grad().defined());
        clear_gradients(&[x.shallow_clone()]);
        assert!(!x.grad().defined());
    }
}
