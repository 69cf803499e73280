//! Recompute instead of keep (arXiv:1604.06174): the forward runs without a graph and keeps only its inputs; backward runs
//! it again, with a graph, and walks back through that.

use tch::Tensor;

use crate::torch_ext::{custom, gradients};

/// `block(inputs)`, recomputed in backward; `parameters` are the leaves inside that are trained.
///
/// The block must compute the same both times: whatever is random in it comes from seeds.
pub fn recompute(
    inputs: &[&Tensor],
    parameters: &[&Tensor],
    block: impl Fn(&[Tensor]) -> Vec<Tensor> + Send + 'static,
) -> Vec<Tensor> {
    let saved: Vec<(Tensor, bool)> = inputs.iter().map(|input| (input.detach(), input.requires_grad())).collect();
    let outputs = tch::no_grad(|| block(&saved.iter().map(|(input, _)| input.shallow_clone()).collect::<Vec<_>>()));
    let leaves: Vec<Tensor> = parameters.iter().map(|p| p.shallow_clone()).collect();
    let all: Vec<&Tensor> = inputs.iter().chain(parameters).copied().collect();
    custom(c"engraft::recompute", &all, outputs, move |grads| {
        let inputs: Vec<Tensor> = saved.into_iter().map(|(input, wants)| input.set_requires_grad(wants)).collect();
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
                recompute(&[&x[0]], &[&x[1]], move |inputs| vec![block(&inputs[0], &w)])
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
                recompute(&[&x[0], &x[1]], &[&x[2]], move |inputs| block(&inputs[0], &inputs[1], &w))
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
            let outputs = if recomputed { recompute(&[&inputs[0], &inputs[1]], &[&w], block) } else { block(&inputs) };
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
        recompute(&[&x], &[&w], move |x| vec![x[0].matmul(&inside).tanh()]).remove(0).sum(tch::Kind::Float).backward();
        let found = w.grad().copy();
        let again = randn(&[4, 4], 2).set_requires_grad(true);
        x.matmul(&again).tanh().sum(tch::Kind::Float).backward();
        assert!(found.allclose(&again.grad(), 1e-6, 1e-6, false));
    }
}
