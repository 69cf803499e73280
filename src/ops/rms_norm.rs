//! RMSNorm: `y = x / sqrt(mean(x^2) + eps) * w` (arXiv:1910.07467). Statistics in fp32, one rounding at the end.

use tch::{Kind, Tensor};

use super::cpu;
use crate::torch_ext::custom;

/// A frozen norm.
#[derive(Debug)]
pub struct Norm {
    /// w (D), in the model's number type.
    pub weight: Tensor,
    /// Added to the mean square.
    pub eps: f64,
}

impl Norm {
    /// Another handle to the same weight.
    pub fn shallow_clone(&self) -> Self {
        Self { weight: self.weight.shallow_clone(), eps: self.eps }
    }

    /// y (T, D) in x's number type and 1/rms (T, 1) in fp32. No graph.
    pub(crate) fn forward(&self, x: &Tensor) -> (Tensor, Tensor) {
        if cpu::serves(&[x, &self.weight]) {
            return cpu::rms_norm(x, &self.weight, self.eps);
        }
        let wide = x.to_kind(Kind::Float);
        let rstd = (wide.square().mean_dim([-1i64].as_slice(), true, Kind::Float) + self.eps).rsqrt(); // (T, 1)
        let y = (&wide * &rstd * self.weight.to_kind(Kind::Float)).to_kind(x.kind());
        (y, rstd)
    }

    /// y again, from x and the kept 1/rms: cheaper than keeping y.
    pub(crate) fn again(&self, x: &Tensor, rstd: &Tensor) -> Tensor {
        if cpu::serves(&[x, &self.weight]) {
            return cpu::rms_norm_again(x, &self.weight, rstd);
        }
        (x.to_kind(Kind::Float) * rstd * self.weight.to_kind(Kind::Float)).to_kind(x.kind())
    }

    /// dx (T, D) from dy (T, D).
    ///
    /// With g = dy * w and n = x / rms: `dx = (g - n * mean(g * n)) / rms`.
    pub(crate) fn backward(&self, dy: &Tensor, x: &Tensor, rstd: &Tensor) -> Tensor {
        if cpu::serves(&[dy, x, &self.weight]) {
            return cpu::rms_norm_backward(dy, x, &self.weight, rstd);
        }
        let g = dy.to_kind(Kind::Float) * self.weight.to_kind(Kind::Float);
        let n = x.to_kind(Kind::Float) * rstd;
        let dot = (&g * &n).mean_dim([-1i64].as_slice(), true, Kind::Float); // (T, 1)
        ((g - n * dot) * rstd).to_kind(x.kind())
    }

    /// The norm alone, differentiable in x.
    pub fn apply(&self, x: &Tensor) -> Tensor {
        let (y, rstd) = tch::no_grad(|| self.forward(x));
        let (norm, saved) = (self.shallow_clone(), x.detach());
        custom(c"engraft::rms_norm", &[x], vec![y], move |grads| vec![Some(norm.backward(&grads[0], &saved, &rstd))])
            .remove(0)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::ops::testing::{check, randn};

    /// The slow twin.
    pub(crate) fn twin(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
        let wide = x.to_kind(Kind::Float);
        let rms = (wide.square().mean_dim([-1i64].as_slice(), true, Kind::Float) + eps).sqrt();
        (wide / rms * weight.to_kind(Kind::Float)).to_kind(x.kind())
    }

    #[test]
    fn equals_plain_autograd() {
        let norm = |kind| Norm { weight: (randn(&[35], 2) * 0.1 + 1.0).to_kind(kind), eps: 1e-5 };
        check(
            &[randn(&[7, 35], 1)],
            |kind, x| vec![norm(kind).apply(&x[0])],
            |kind, x| vec![twin(&x[0], &norm(kind).weight, 1e-5)],
        );
    }
}
