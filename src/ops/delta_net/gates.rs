//! How much a delta-net forgets and how much it learns, from two small projections.

use tch::{Kind, Tensor};

use crate::torch_ext::custom;

/// The frozen half of both.
#[derive(Debug)]
pub struct DeltaGates {
    /// The logarithm of a head's pace (N), fp32.
    pub pace: Tensor,
    /// (N), fp32.
    pub bias: Tensor,
}

impl Clone for DeltaGates {
    /// Another handle to the same tensors.
    fn clone(&self) -> Self {
        Self { pace: self.pace.shallow_clone(), bias: self.bias.shallow_clone() }
    }
}

impl DeltaGates {
    /// The logarithm of the decay, `-exp(pace) softplus(a + bias)`, and `sigmoid(b)`: fp32 (T, N), from a and b (T, N).
    pub fn apply(&self, a: &Tensor, b: &Tensor) -> (Tensor, Tensor) {
        let (log_decay, beta, slope) = tch::no_grad(|| {
            let shifted = a.to_kind(Kind::Float) + &self.bias;
            let falling = -self.pace.exp(); // (N)
            let log_decay = shifted.softplus() * &falling;
            (log_decay, b.to_kind(Kind::Float).sigmoid(), shifted.sigmoid() * falling)
        });
        let kept = beta.shallow_clone();
        let kinds = [a.kind(), b.kind()];
        let mut outputs = custom(c"engraft::delta_gates", &[a, b], vec![log_decay, beta], move |grads| {
            let da = &grads[0] * slope;
            let db = Tensor::sigmoid_backward(&grads[1], &kept);
            vec![Some(da.to_kind(kinds[0])), Some(db.to_kind(kinds[1]))]
        });
        let beta = outputs.pop().expect("two outputs");
        (outputs.pop().expect("two outputs"), beta)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, randn};

    #[test]
    fn equals_plain_autograd() {
        let gates = DeltaGates { pace: randn(&[5], 3), bias: randn(&[5], 4) };
        check(
            &[randn(&[7, 5], 1) * 3.0, randn(&[7, 5], 2)],
            |_, x| {
                let (log_decay, beta) = gates.apply(&x[0], &x[1]);
                vec![log_decay, beta]
            },
            |_, x| {
                let growth = ((&x[0] + &gates.bias).exp() + 1.0).log();
                vec![-gates.pace.exp() * growth, ((-&x[1]).exp() + 1.0).reciprocal()]
            },
        );
    }
}
