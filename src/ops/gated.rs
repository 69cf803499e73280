//! The gated feed-forward's second half: `Y = (act(G) * U) W^T + updates + residual` (arXiv:2002.05202).
//!
//! Keeps G and U; the product is made again in backward and the gradients take the place of what they came from.

use tch::Tensor;

use super::cpu;
use super::projection::{Group, Operand, factors};
use crate::torch_ext::custom;

/// What the gate goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// The exact error-function form.
    Gelu,
    /// The tanh approximation.
    GeluTanh,
}

impl Activation {
    /// `act(gate) * up` (T, F). No graph.
    fn gated(self, gate: &Tensor, up: &Tensor) -> Tensor {
        if self == Self::Silu && cpu::serves(&[gate, up]) {
            return cpu::swiglu(gate, up);
        }
        self.forward(gate) * up
    }

    /// The gradients of gate and up from that of [`Activation::gated`], and its value again.
    fn gated_backward(self, grad: &Tensor, gate: &Tensor, up: &Tensor) -> [Tensor; 3] {
        if self == Self::Silu && cpu::serves(&[gate, up, grad]) {
            return cpu::swiglu_backward(grad, gate, up);
        }
        let activated = self.forward(gate);
        [self.backward(&(grad * up), gate), grad * &activated, activated * up]
    }

    fn forward(self, x: &Tensor) -> Tensor {
        match self {
            Self::Silu => x.silu(),
            Self::Gelu => x.gelu("none"),
            Self::GeluTanh => x.gelu("tanh"),
        }
    }

    fn backward(self, grad: &Tensor, x: &Tensor) -> Tensor {
        match self {
            Self::Silu => x.silu_backward(grad),
            Self::Gelu => x.gelu_backward(grad, "none"),
            Self::GeluTanh => x.gelu_backward(grad, "tanh"),
        }
    }
}

/// Projects `act(gate) * up` (both (T, F)) by `operand` and adds `residual` (T, D).
pub fn gated_projection(
    activation: Activation,
    gate: &Tensor,
    up: &Tensor,
    operand: Operand<'_>,
    residual: &Tensor,
) -> Tensor {
    let group = Group::of(&[operand]);
    let (outputs, u) = tch::no_grad(|| group.forward(&activation.gated(gate, up), Some(residual)));
    let mut inputs = vec![gate, up, residual];
    inputs.extend(factors(&[operand]));
    let wants_dx = gate.requires_grad() || up.requires_grad();
    let (gate, up) = (gate.detach(), up.detach());
    custom(c"engraft::gated_projection", &inputs, outputs, move |grads| {
        // The gradients of gate and up and the product itself come out of one pass, so the product is made when it is asked for.
        let mut passed = [None, None];
        let (_, dfactors) = group.backward(
            |dx| match dx {
                Some(dx) => {
                    let [dgate, dup, product] = activation.gated_backward(dx, &gate, &up);
                    passed = [Some(dgate), Some(dup)];
                    product
                }
                None => activation.gated(&gate, &up),
            },
            u.as_ref(),
            grads,
            wants_dx,
        );
        let [dgate, dup] = passed;
        let mut out = vec![dgate, dup, Some(grads[0].shallow_clone())];
        out.extend(dfactors.into_iter().map(Some));
        out
    })
    .remove(0)
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::ops::LowRank;
    use crate::ops::testing::{check, randn};

    #[test]
    fn equals_plain_autograd() {
        let (t, f, d, r) = (11, 24, 16, 4);
        let inputs =
            [randn(&[t, f], 1), randn(&[t, f], 2), randn(&[t, d], 3), randn(&[r, f], 4) * 0.3, randn(&[d, r], 5) * 0.3];
        let weight = |kind| (randn(&[d, f], 6) * 0.2).to_kind(kind);
        for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
            check(
                &inputs,
                |kind, x| {
                    let low_rank = LowRank {
                        a: x[3].to_kind(Kind::Float),
                        b: x[4].to_kind(Kind::Float),
                        scale: 0.5,
                        dropout: 0.0,
                    };
                    let weight = weight(kind);
                    let operand =
                        Operand { weight: &weight, bias: None, low_rank: Some(&low_rank), dropout_seed: None };
                    vec![gated_projection(activation, &x[0], &x[1], operand, &x[2])]
                },
                |kind, x| {
                    let h = activation.forward(&x[0]) * &x[1];
                    vec![h.matmul(&weight(kind).tr()) + h.matmul(&x[3].tr()).matmul(&x[4].tr()) * 0.5 + &x[2]]
                },
            );
        }
    }
}
