//! Experts: each token goes through the few feed-forwards that its router chose (arXiv:1701.06538), and no other is computed.
//!
//! Tokens are sorted by expert, so that every expert meets its own rows in one product: on CUDA one grouped product over all
//! experts, on the CPU one product for each expert that has rows. Weights of all experts are one tensor (E, out, in), and so are
//! their low-rank updates: A (E, R, in), B (E, out, R). Kept for backward are the tokens before they are sorted, gate and up;
//! sorted rows and the activated product are made again.
//!
//! S is the number of rows after sorting, at least T C with C experts for each token.

mod bank;
mod gate_up;
mod sorted;

use tch::Tensor;

use self::bank::Bank;
pub(super) use self::gate_up::Fusion;
use self::gate_up::GateUp;
use self::sorted::Sorted;
use super::gated::Activation;
use super::projection::{Operand, factors};
use crate::torch_ext::custom;

/// The feed-forwards of all experts: the operands' weights are (E, out, in), their biases (E, out).
#[derive(Debug, Clone, Copy)]
pub struct Experts<'a> {
    /// What the gate goes through.
    pub activation: Activation,
    /// From a token to gate and up.
    pub input: ExpertInput<'a>,
    /// From the activated product back: (E, D, F).
    pub down: Operand<'a>,
    /// What the router's weights are multiplied with.
    pub weighted: Weighted,
}

/// How gate and up are stored.
#[derive(Debug, Clone, Copy)]
pub enum ExpertInput<'a> {
    /// Gate and up, (E, F, D) each.
    Separate([Operand<'a>; 2]),
    /// One weight (E, 2 F, D): gate, then up, or the two in turn where `interleaved`.
    Fused {
        /// The weight.
        operand: Operand<'a>,
        /// Whether its rows are gate, up, gate, up.
        interleaved: bool,
    },
}

/// What the router's weights are multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weighted {
    /// What an expert gives.
    Output,
    /// What an expert is given.
    Input,
}

/// `sum_c weights[t, c] * expert_{chosen[t, c]}(x[t])` for x (T, D), plus `residual` (T, D) if given; chosen (T, C) i64, weights (T, C)
/// fp32, which get their gradient.
pub fn experts(
    x: &Tensor,
    chosen: &Tensor,
    weights: &Tensor,
    experts: &Experts<'_>,
    residual: Option<&Tensor>,
) -> Tensor {
    let operands = experts.operands();
    let (down, into) = operands.split_last().expect("down is last");
    let banks = Banks { into: Bank::of(into), down: Bank::of(std::slice::from_ref(down)) };
    let shape = Shape { activation: experts.activation, weighted: experts.weighted, input: Fusion::of(&experts.input) };
    let like = experts.down.weight;
    let sorted = Sorted::new(chosen, like.size()[0], (like.kind(), like.device()));
    let (output, kept) = tch::no_grad(|| shape.forward(&banks, &sorted, x, weights, residual));

    let mut inputs = vec![x, weights];
    inputs.extend(residual);
    inputs.extend(factors(&operands));
    let wants = Wants { x: x.requires_grad(), weights: weights.requires_grad() };
    let has_residual = residual.is_some();
    let (x, weights) = (x.detach(), weights.detach());
    custom(c"engraft::experts", &inputs, vec![output], move |grads| {
        let (dx, dweights, dfactors) = shape.backward(&banks, &sorted, &x, &weights, &kept, &grads[0], wants);
        let mut out = vec![dx, dweights];
        out.extend(has_residual.then(|| Some(grads[0].shallow_clone())));
        out.extend(dfactors.into_iter().map(Some));
        out
    })
    .remove(0)
}

impl<'a> Experts<'a> {
    /// Down last.
    fn operands(&self) -> Vec<Operand<'a>> {
        match self.input {
            ExpertInput::Separate([gate, up]) => vec![gate, up, self.down],
            ExpertInput::Fused { operand, .. } => vec![operand, self.down],
        }
    }
}

/// What rows go through.
struct Banks {
    /// Gate and up.
    into: Bank,
    down: Bank,
}

/// What forward and backward need to know beside the tensors.
#[derive(Clone, Copy)]
struct Shape {
    activation: Activation,
    weighted: Weighted,
    input: Fusion,
}

#[derive(Clone, Copy)]
struct Wants {
    x: bool,
    weights: bool,
}

/// What forward keeps: gate and up, and what came through A (S, sum of R) in each bank that has updates.
struct Kept {
    gate_up: GateUp,
    u_of_into: Option<Tensor>,
    u_of_down: Option<Tensor>,
}

impl Shape {
    fn forward(
        &self,
        banks: &Banks,
        sorted: &Sorted,
        x: &Tensor,
        weights: &Tensor,
        residual: Option<&Tensor>,
    ) -> (Tensor, Kept) {
        let rows = sorted.gathered(x, self.of_input(weights)); // (S, D)
        let (products, u_of_into) = banks.into.forward(&rows, sorted);
        drop(rows);
        let (product, gate_up) = self.input.gated(self.activation, products, sorted.by_kernels());
        let (mut y, u_of_down) = banks.down.forward(&product, sorted);
        let y = y.remove(0); // (S, D)
        let kept = Kept { gate_up, u_of_into, u_of_down };
        (sorted.summed(&y, self.of_output(weights), residual), kept)
    }

    /// dX (T, D), dweights (T, C) and dA, dB of every update.
    #[allow(clippy::too_many_arguments)]
    fn backward(
        &self,
        banks: &Banks,
        sorted: &Sorted,
        x: &Tensor,
        weights: &Tensor,
        kept: &Kept,
        grad: &Tensor,
        wants: Wants,
    ) -> (Option<Tensor>, Option<Tensor>, Vec<Tensor>) {
        // A weight of the output scales everything behind it, so it is applied to the narrow tensors only.
        let of_rows = self.of_output(weights).map(|weights| sorted.weights(weights)); // (S, 1), fp32
        let weigh = |t: &Tensor| of_rows.as_ref().map_or_else(|| t.shallow_clone(), |w| t * w.to_kind(t.kind()));
        let dy = [sorted.gathered(grad, None)]; // (S, D), before it is weighted
        let (dproduct, du) = banks.down.backward(&dy, sorted);
        let (dproducts, product, dot) =
            self.input.gated_backward(self.activation, &dproduct, of_rows.as_ref(), &kept.gate_up);
        drop(dproduct);
        let mut dweights = (wants.weights && self.weighted == Weighted::Output).then(|| match banks.down.bias() {
            Some(bias) => dot + sorted.products_with_experts(&dy[0], bias),
            None => dot,
        }); // (S, 1)
        let [u, du] = [&kept.u_of_down, &du].map(|u| u.as_ref().map(weigh));
        let of_down = banks.down.factors(&product, u.as_ref(), &dy, du.as_ref(), sorted);
        drop((product, dy));

        let rows = sorted.gathered(x, self.of_input(weights)); // (S, D)
        let (drows, du) = banks.into.backward(&dproducts, sorted);
        let mut dfactors = banks.into.factors(&rows, kept.u_of_into.as_ref(), &dproducts, du.as_ref(), sorted);
        dfactors.extend(of_down);
        if wants.weights && self.weighted == Weighted::Input {
            dweights = Some(sorted.products_with_tokens(&drows, x));
        }
        let dx = wants.x.then(|| sorted.summed(&drows, self.of_input(weights), None));
        (dx, dweights.map(|of_rows| sorted.by_place(&of_rows)), dfactors)
    }

    /// The router's weights where they multiply what an expert is given.
    fn of_input<'a>(&self, weights: &'a Tensor) -> Option<&'a Tensor> {
        (self.weighted == Weighted::Input).then_some(weights)
    }

    /// The router's weights where they multiply what an expert gives.
    fn of_output<'a>(&self, weights: &'a Tensor) -> Option<&'a Tensor> {
        (self.weighted == Weighted::Output).then_some(weights)
    }
}

#[cfg(test)]
mod tests;
