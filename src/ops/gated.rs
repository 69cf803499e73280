//! The feed-forward's second half: `Y = (act(G) * U) W^T + updates (+ residual)` (arXiv:2002.05202), or without U where there is
//! no gate.
//!
//! Keeps G and U. The product is made again in backward, and on CUDA everything there takes the place of what it came from: the gradients of
//! G and U theirs, the product that of its own gradient.

use tch::Tensor;

use super::projection::{Group, Operand, factors};
use super::{cpu, cuda};
use crate::torch_ext::custom;

/// What the gate goes through.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// The exact error-function form.
    Gelu,
    /// The tanh approximation.
    GeluTanh,
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
    /// `g * sigmoid(slope * g)` of a gate of at most `limit`, times an up that is kept within `limit` and shifted by `offset`
    /// (gpt-oss).
    Clamped {
        /// Largest gate, and largest magnitude of up.
        limit: f64,
        /// Slope of the sigmoid.
        slope: f64,
        /// Added to up.
        offset: f64,
    },
}

impl Activation {
    /// `act(gate) * up` (T, F), or `act(gate)` without `up`. No graph.
    pub(super) fn gated(self, gate: &Tensor, up: Option<&Tensor>) -> Tensor {
        if cuda::serves(&[gate, up.unwrap_or(gate)]) {
            return cuda::gated(self.curve(), gate, up);
        }
        if cpu::serves(&[gate, up.unwrap_or(gate)]) {
            return cpu::gated(self, gate, up);
        }
        let activated = self.forward(gate);
        up.map_or_else(|| activated.shallow_clone(), |up| &activated * self.up(up))
    }

    /// The gradients of gate and up from that of [`Activation::gated`], and its value again. What is said to be over may be written over:
    /// all three that are given.
    pub(super) fn gated_backward(
        self,
        grad: &Tensor,
        gate: &Tensor,
        up: Option<&Tensor>,
        over: bool,
    ) -> (Tensor, Option<Tensor>, Tensor) {
        if cuda::serves(&[gate, up.unwrap_or(gate), grad]) {
            return cuda::gated_backward(self.curve(), grad, gate, up, over);
        }
        if cpu::serves(&[gate, up.unwrap_or(gate), grad]) {
            return cpu::gated_backward(self, grad, gate, up);
        }
        let Some(up) = up else { return (self.backward(grad, gate), None, self.forward(gate)) };
        let activated = self.forward(gate);
        let shown = self.up(up);
        (self.backward(&(grad * &shown), gate), Some(self.up_backward(grad * &activated, up)), activated * shown)
    }

    /// As the CUDA kernels know it.
    pub(super) fn curve(self) -> cuda::Curve {
        match self {
            Self::Silu => cuda::Curve::Silu,
            Self::Gelu => cuda::Curve::Gelu,
            Self::GeluTanh => cuda::Curve::GeluTanh,
            Self::Sigmoid => cuda::Curve::Sigmoid,
            Self::Clamped { limit, slope, offset } => cuda::Curve::Clamped(limit as f32, slope as f32, offset as f32),
        }
    }

    fn forward(self, x: &Tensor) -> Tensor {
        match self {
            Self::Silu => x.silu(),
            Self::Gelu => x.gelu("none"),
            Self::GeluTanh => x.gelu("tanh"),
            Self::Sigmoid => x.sigmoid(),
            Self::Clamped { limit, slope, .. } => {
                let gate = x.clamp_max(limit);
                (&gate * slope).sigmoid() * gate
            }
        }
    }

    /// What the activated gate is multiplied with.
    fn up(self, up: &Tensor) -> Tensor {
        match self {
            Self::Clamped { limit, offset, .. } => up.clamp(-limit, limit) + offset,
            Self::Silu | Self::Gelu | Self::GeluTanh | Self::Sigmoid => up.shallow_clone(),
        }
    }

    /// The gradient of up from that of [`Activation::up`].
    fn up_backward(self, grad: Tensor, up: &Tensor) -> Tensor {
        match self {
            Self::Clamped { limit, .. } => grad * up.abs().le(limit),
            Self::Silu | Self::Gelu | Self::GeluTanh | Self::Sigmoid => grad,
        }
    }

    fn backward(self, grad: &Tensor, x: &Tensor) -> Tensor {
        match self {
            Self::Silu => x.silu_backward(grad),
            Self::Gelu => x.gelu_backward(grad, "none"),
            Self::GeluTanh => x.gelu_backward(grad, "tanh"),
            Self::Sigmoid => Tensor::sigmoid_backward(grad, &x.sigmoid()),
            Self::Clamped { limit, slope, .. } => {
                let sigmoid = (x * slope).sigmoid();
                let slope_of_gate = (sigmoid.ones_like() - &sigmoid) * x * slope + 1.0;
                grad * sigmoid * slope_of_gate * x.le(limit)
            }
        }
    }
}

/// Who else reads gate and up after a forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readers {
    /// No one: backward may write over them.
    None,
    /// What made them, say, for its own backward.
    Others,
}

/// Projects `act(gate) * up` (both (T, F)), or `act(gate)` without `up`, by `operand` and adds `residual` (T, D).
pub fn gated_projection(
    activation: Activation,
    (gate, up): (&Tensor, Option<&Tensor>),
    readers: Readers,
    operand: Operand<'_>,
    residual: Option<&Tensor>,
) -> Tensor {
    let group = Group::of(&[operand]);
    let (outputs, kept) = tch::no_grad(|| group.forward(&activation.gated(gate, up), residual));
    let mut inputs = vec![gate];
    inputs.extend(up);
    inputs.extend(residual);
    inputs.extend(factors(&[operand]));
    let wants_dx = gate.requires_grad() || up.is_some_and(Tensor::requires_grad);
    let has_residual = residual.is_some();
    let (gate, up) = (gate.detach(), up.map(Tensor::detach));
    custom(c"engraft::gated_projection", &inputs, outputs, move |grads| {
        // The gradients of gate and up and the product itself come out of one pass, so the product is made when it is asked for.
        let mut passed = (None, up.as_ref().map(|_| None));
        let x = |dx: Option<&Tensor>| match dx {
            Some(dx) => {
                let (dgate, dup, product) = activation.gated_backward(dx, &gate, up.as_ref(), readers == Readers::None);
                passed = (Some(dgate), dup.map(Some));
                product
            }
            None => activation.gated(&gate, up.as_ref()),
        };
        let (_, dfactors) = group.backward(x, &kept, grads, wants_dx);
        let mut out = vec![passed.0];
        out.extend(passed.1);
        out.extend(has_residual.then(|| Some(grads[0].shallow_clone())));
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
        let clamped = Activation::Clamped { limit: 1.2, slope: 1.702, offset: 1.0 };
        for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Sigmoid, clamped] {
            check(
                &inputs,
                |kind, x| {
                    let low_rank = LowRank {
                        a: x[3].to_kind(Kind::Float),
                        b: x[4].to_kind(Kind::Float),
                        scale: 0.5,
                        dropout: 0.0,
                        magnitude: None,
                    };
                    let weight = weight(kind).into();
                    let operand = Operand {
                        weight: &weight,
                        trained: None,
                        bias: None,
                        low_rank: Some(&low_rank),
                        dropout_seed: None,
                    };
                    vec![
                        gated_projection(activation, (&x[0], Some(&x[1])), Readers::Others, operand, Some(&x[2])),
                        gated_projection(activation, (&x[0], None), Readers::Others, operand, None),
                        gated_projection(
                            activation,
                            (&(&x[0] * 1.0), Some(&(&x[1] * 1.0))),
                            Readers::None,
                            operand,
                            None,
                        ),
                    ]
                },
                |kind, x| {
                    let project =
                        |h: &Tensor| h.matmul(&weight(kind).tr()) + h.matmul(&x[3].tr()).matmul(&x[4].tr()) * 0.5;
                    let activated = activation.forward(&x[0]);
                    let both = project(&(&activated * activation.up(&x[1])));
                    vec![&both + &x[2], project(&activated), both]
                },
            );
        }
    }
}
