//! What experts do between their products: the gate's activation times up, wherever the two lie.

use tch::Tensor;

use super::ExpertInput;
use super::sorted::row_products;
use crate::ops::cpu::gate_up as kernels;
use crate::ops::gated::Activation;

/// How gate and up lie in what the banks give.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) enum Fusion {
    /// (S, F) each.
    Separate,
    /// (S, 2 F): gate, then up.
    Halves,
    /// (S, 2 F): the two in turn.
    Interleaved,
}

/// Gate and up, kept for backward.
pub(super) enum GateUp {
    /// As the banks gave them, for the kernels.
    Whole(Vec<Tensor>),
    /// (S, F) each.
    Apart(Tensor, Tensor),
}

impl Fusion {
    pub(super) fn of(input: &ExpertInput<'_>) -> Self {
        match input {
            ExpertInput::Separate(_) => Self::Separate,
            ExpertInput::Fused { interleaved: false, .. } => Self::Halves,
            ExpertInput::Fused { interleaved: true, .. } => Self::Interleaved,
        }
    }

    /// The activated product (S, F) of what the banks gave, and what backward needs of it.
    pub(super) fn gated(self, activation: Activation, products: Vec<Tensor>, by_kernels: bool) -> (Tensor, GateUp) {
        if by_kernels {
            return (kernels::gated(activation, self, &products), GateUp::Whole(products));
        }
        let (gate, up) = self.apart(products);
        (activation.gated(&gate, Some(&up)), GateUp::Apart(gate, up))
    }

    /// The gradients of what the banks gave, the activated product y (S, F) again and `y . dy` (S, 1), fp32, from dy (S, F) before
    /// it is weighted by `weights` (S, 1), fp32, if given.
    pub(super) fn gated_backward(
        self,
        activation: Activation,
        dy: &Tensor,
        weights: Option<&Tensor>,
        kept: &GateUp,
    ) -> (Vec<Tensor>, Tensor, Tensor) {
        match kept {
            GateUp::Whole(products) => kernels::gated_backward(activation, self, dy, weights, products),
            GateUp::Apart(gate, up) => {
                let weighted = weights.map_or_else(|| dy.shallow_clone(), |weights| dy * weights.to_kind(dy.kind()));
                let (dgate, dup, y) = activation.gated_backward(&weighted, gate, Some(up), false);
                let dot = row_products(dy, &y);
                (self.together(dgate, dup.expect("up was given")), y, dot)
            }
        }
    }

    /// Gate and up (S, F), contiguous.
    fn apart(self, mut products: Vec<Tensor>) -> (Tensor, Tensor) {
        let first = products.remove(0);
        let (rows, width) = first.size2().expect("(S, F) or (S, 2 F)");
        let of = |pair: &Tensor, dim: i64, at: i64| pair.select(dim, at).contiguous();
        match self {
            Self::Separate => (first, products.remove(0)),
            Self::Halves => {
                let halves = first.view([rows, 2, width / 2]);
                (of(&halves, 1, 0), of(&halves, 1, 1))
            }
            Self::Interleaved => {
                let pairs = first.view([rows, width / 2, 2]);
                (of(&pairs, 2, 0), of(&pairs, 2, 1))
            }
        }
    }

    /// The opposite of `apart`.
    fn together(self, gate: Tensor, up: Tensor) -> Vec<Tensor> {
        let rows = gate.size()[0];
        match self {
            Self::Separate => vec![gate, up],
            Self::Halves => vec![Tensor::cat(&[gate, up], 1)],
            Self::Interleaved => vec![Tensor::stack(&[gate, up], 2).view([rows, -1])],
        }
    }
}
