//! Takes a fused projection apart: `q | k | v` or `gate | up` of one weight become tensors of their own.
//!
//! Libtorch's own backward of a slice fills a whole tensor with zeros for each part and adds them up; here it is one
//! concatenation.

use tch::Tensor;

use crate::torch_ext::custom;

/// Parts of x (T, G W), each (T, G `widths[i]`), contiguous: x is G groups, each of all parts one after the other (W in all).
///
/// With one group the parts lie end to end; with G groups part i takes `widths[i]` from every group in turn.
pub fn split(x: &Tensor, groups: i64, widths: &[i64]) -> Vec<Tensor> {
    let tokens = x.size()[0];
    let whole: i64 = widths.iter().sum();
    let outputs = tch::no_grad(|| {
        let x = x.view([tokens, groups, whole]);
        let parts = x.split_with_sizes(widths, 2);
        parts.iter().map(|part| part.contiguous().view([tokens, -1])).collect()
    });
    let widths = widths.to_vec();
    custom(c"engraft::split", &[x], outputs, move |grads| {
        let parts: Vec<Tensor> =
            grads.iter().zip(&widths).map(|(grad, width)| grad.reshape([tokens, groups, *width])).collect();
        vec![Some(Tensor::cat(&parts, 2).view([tokens, groups * whole]))]
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, randn};

    #[test]
    fn equals_slices_of_every_group() {
        for groups in [1, 3] {
            check(
                &[randn(&[5, groups * 10], 1)],
                |_, x| split(&x[0], groups, &[4, 1, 5]),
                |_, x| {
                    let x = x[0].view([5, groups, 10]);
                    [(0, 4), (4, 1), (5, 5)]
                        .map(|(start, width)| x.narrow(2, start, width).reshape([5, groups * width]))
                        .into()
                },
            );
        }
    }
}
