//! Keys and values of latent attention (arXiv:2405.04434), put together of the heads' own parts and the key that all share.

use tch::{Kind, Tensor};

use super::cpu;
use crate::torch_ext::custom;

/// Keys (T, N, U + P) and values (T, N, W) from `up` (T, N (U + W)), of each head U elements of its key, then its value; and
/// `shared` (T, 1, P), the end of every head's key.
pub fn keys_values(up: &Tensor, shared: &Tensor, heads: i64, unrotated: i64) -> (Tensor, Tensor) {
    let (tokens, rotated) = (up.size()[0], shared.size()[2]);
    let value = up.size()[1] / heads - unrotated;
    let outputs = tch::no_grad(|| {
        if cpu::serves(&[up, shared]) {
            return cpu::latent::keys_values(up, shared, heads, unrotated).into();
        }
        let up = up.view([tokens, heads, unrotated + value]); // (T, N, U + W)
        let k = Tensor::empty([tokens, heads, unrotated + rotated], (up.kind(), up.device()));
        k.narrow(2, 0, unrotated).copy_(&up.narrow(2, 0, unrotated));
        k.narrow(2, unrotated, rotated).copy_(shared); // every head's
        vec![k, up.narrow(2, unrotated, value).contiguous()]
    });
    let mut outputs = custom(c"engraft::keys_values", &[up, shared], outputs, move |grads| {
        let [dk, dv] = grads else { unreachable!("a gradient for keys and one for values") };
        if cpu::serves(&[dk, dv]) {
            return cpu::latent::keys_values_backward(dk, dv, unrotated).map(Some).into();
        }
        let dup = Tensor::cat(&[&dk.narrow(2, 0, unrotated), dv], 2); // (T, N, U + W)
        let dshared = dk.narrow(2, unrotated, rotated).sum_dim_intlist([1i64].as_slice(), true, Kind::Float); // (T, 1, P)
        vec![Some(dup.view([tokens, -1])), Some(dshared.to_kind(dk.kind()))]
    });
    let v = outputs.pop().expect("two outputs");
    (outputs.pop().expect("two outputs"), v)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, randn};

    #[test]
    fn equals_plain_autograd() {
        for value in [3, 5, 9] {
            check(
                &[randn(&[7, 4 * (5 + value)], 1), randn(&[7, 1, 2], 2)],
                |_, x| {
                    let (k, v) = keys_values(&x[0], &x[1], 4, 5);
                    vec![k, v]
                },
                |_, x| {
                    let up = x[0].view([7, 4, 5 + value]);
                    let k = Tensor::cat(&[&up.narrow(2, 0, 5), &x[1].expand([7, 4, 2], false)], 2);
                    vec![k, up.narrow(2, 5, value)]
                },
            );
        }
    }
}
