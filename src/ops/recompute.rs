//! Recompute instead of keep (arXiv:1604.06174): the forward runs without a graph and keeps only its input; backward runs
//! it again, with a graph, and walks back through that.

use tch::Tensor;

use crate::torch_ext::{custom, gradients};

/// `block(input)`, recomputed in backward; `parameters` are the leaves inside that are trained.
///
/// The block must compute the same both times: whatever is random in it comes from seeds.
pub fn recompute(input: &Tensor, parameters: &[&Tensor], block: impl Fn(&Tensor) -> Tensor + Send + 'static) -> Tensor {
    let output = tch::no_grad(|| block(input));
    let mut inputs = vec![input];
    inputs.extend(parameters);
    let wants_input = input.requires_grad();
    let saved = input.detach();
    let leaves: Vec<Tensor> = parameters.iter().map(|p| p.shallow_clone()).collect();
    custom(c"engraft::recompute", &inputs, vec![output], move |grads| {
        let input = saved.set_requires_grad(wants_input);
        let output = tch::with_grad(|| block(&input));
        let mut wanted: Vec<&Tensor> = leaves.iter().collect();
        if wants_input {
            wanted.insert(0, &input);
        }
        let mut found = gradients(&[&output], &[&grads[0]], &wanted);
        if !wants_input {
            found.insert(0, None);
        }
        found
    })
    .remove(0)
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
                vec![recompute(&x[0], &[&x[1]], move |input| block(input, &w))]
            },
            |_, x| vec![block(&x[0], &x[1])],
        );
    }

    #[test]
    fn a_block_whose_input_needs_no_gradient_still_trains_its_parameters() {
        let w = randn(&[4, 4], 2).set_requires_grad(true);
        let x = randn(&[3, 4], 1);
        let inside = w.shallow_clone();
        recompute(&x, &[&w], move |x| x.matmul(&inside).tanh()).sum(tch::Kind::Float).backward();
        let found = w.grad().copy();
        let again = randn(&[4, 4], 2).set_requires_grad(true);
        x.matmul(&again).tanh().sum(tch::Kind::Float).backward();
        assert!(found.allclose(&again.grad(), 1e-6, 1e-6, false));
    }
}
