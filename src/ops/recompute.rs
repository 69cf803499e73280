//! Recompute instead of keep (arXiv:1604.06174): the forward runs without a graph and keeps only its inputs; backward runs
//! it again, with a graph, and walks back through that.

use tch::Tensor;

use super::offload::{Away, Offload};
use crate::torch_ext::{custom, gradients, records_graph};

/// `block(inputs)`, recomputed in backward; `parameters` are the leaves inside that are trained. With `offload`, the first input waits
/// there until then.
///
/// The block must compute the same both times: whatever is random in it comes from seeds.
pub fn recompute(
    inputs: &[&Tensor],
    parameters: &[&Tensor],
    offload: Option<&Offload>,
    block: impl Fn(&[Tensor]) -> Vec<Tensor> + Send + 'static,
) -> Vec<Tensor> {
    let all: Vec<&Tensor> = inputs.iter().chain(parameters).copied().collect();
    let graph = records_graph(&all);
    let keep = |(index, input): (usize, &&Tensor)| match offload {
        Some(offload) if graph && index == 0 => Kept::Away(offload.put(input)),
        _ => Kept::Here(input.detach()),
    };
    // Sent away before the block is made, so that the copy goes on meanwhile.
    let saved: Vec<(Kept, bool)> =
        inputs.iter().enumerate().map(keep).zip(inputs.iter().map(|x| x.requires_grad())).collect();
    let outputs = tch::no_grad(|| block(&inputs.iter().map(|input| input.detach()).collect::<Vec<_>>()));
    let leaves: Vec<Tensor> = parameters.iter().map(|p| p.shallow_clone()).collect();
    custom(c"engraft::recompute", &all, outputs, move |grads| {
        let inputs: Vec<Tensor> =
            saved.into_iter().map(|(input, wants)| input.take().set_requires_grad(wants)).collect();
        let outputs = tch::with_grad(|| block(&inputs));
        // What depends on nothing that is trained (keys that are handed on, say) has no graph to walk back.
        let (outputs, grads): (Vec<&Tensor>, Vec<&Tensor>) =
            outputs.iter().zip(grads).filter(|(output, _)| output.requires_grad()).unzip();
        let wanted: Vec<&Tensor> = inputs.iter().filter(|input| input.requires_grad()).chain(&leaves).collect();
        let mut found = gradients(&outputs, &grads, &wanted).into_iter();
        let of_inputs: Vec<Option<Tensor>> =
            inputs.iter().map(|input| if input.requires_grad() { found.next().flatten() } else { None }).collect();
        of_inputs.into_iter().chain(found).collect()
    })
}

/// An input until backward.
enum Kept {
    Here(Tensor),
    Away(Away),
}

impl Kept {
    fn take(self) -> Tensor {
        match self {
            Self::Here(tensor) => tensor,
            Self::Away(away) => away.back(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, randn};

    #[test]
    fn equals_the_block_that_keeps_everything() {
        let block = |x: &Tensor, w: &Tensor| (x.matmul(w)).tanh() * x;
        check(
            &[randn(&[5, 6], 1), randn(&[6, 6], 2)],
            |_, x| {
                let w = x[1].shallow_clone();
                recompute(&[&x[0]], &[&x[1]], None, move |inputs| vec![block(&inputs[0], &w)])
            },
            |_, x| vec![block(&x[0], &x[1])],
        );
    }

    #[test]
    fn several_inputs_and_outputs_equal_the_block_that_keeps_everything() {
        let block = |x: &Tensor, y: &Tensor, w: &Tensor| vec![x.matmul(w).tanh() * y, x.matmul(w), y.square()];
        check(
            &[randn(&[5, 6], 1), randn(&[5, 6], 2), randn(&[6, 6], 3)],
            |_, x| {
                let w = x[2].shallow_clone();
                recompute(&[&x[0], &x[1]], &[&x[2]], None, move |inputs| block(&inputs[0], &inputs[1], &w))
            },
            |_, x| block(&x[0], &x[1], &x[2]),
        );
    }

    #[test]
    fn outputs_and_inputs_without_a_gradient_are_passed_over() {
        let run = |recomputed: bool| {
            let w = randn(&[4, 4], 2).set_requires_grad(true);
            let inside = w.shallow_clone();
            let block = move |x: &[Tensor]| vec![x[0].matmul(&inside) + &x[1], &x[0] * 2.0];
            let inputs = [randn(&[3, 4], 1), randn(&[3, 4], 3).set_requires_grad(true)];
            let outputs =
                if recomputed { recompute(&[&inputs[0], &inputs[1]], &[&w], None, block) } else { block(&inputs) };
            (outputs[0].tanh() * &outputs[1]).sum(tch::Kind::Float).backward();
            (w.grad().copy(), inputs[1].grad().copy())
        };
        let (found, expected) = (run(true), run(false));
        assert!(found.0.allclose(&expected.0, 1e-6, 1e-6, false) && found.1.allclose(&expected.1, 1e-6, 1e-6, false));
    }

    #[test]
    fn a_block_whose_input_needs_no_gradient_still_trains_its_parameters() {
        let w = randn(&[4, 4], 2).set_requires_grad(true);
        let x = randn(&[3, 4], 1);
        let inside = w.shallow_clone();
        recompute(&[&x], &[&w], None, move |x| vec![x[0].matmul(&inside).tanh()])
            .remove(0)
            .sum(tch::Kind::Float)
            .backward();
        let found = w.grad().copy();
        let again = randn(&[4, 4], 2).set_requires_grad(true);
        x.matmul(&again).tanh().sum(tch::Kind::Float).backward();
        assert!(found.allclose(&again.grad(), 1e-6, 1e-6, false));
    }
}
