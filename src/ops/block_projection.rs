//! A linear that is block-diagonal: x is G parts side by side, each goes through rows of the weight of its own,
//! `Y_g = X_g W_g^T + s drop(X_g) A^T B_g^T`. The update has one A for all parts: it is a low-rank update of the whole weight.

use tch::{Kind, Tensor};

use super::dropout::dropped;
use super::projection::Operand;
use crate::torch_ext::custom;

/// Projects x (T, G I) by `operand`, whose weight is (G O, I), without a bias: (T, G O).
pub fn block_projection(x: &Tensor, groups: i64, operand: Operand<'_>) -> Tensor {
    let Operand { weight, trained, bias, low_rank, dropout_seed } = operand;
    assert!(bias.is_none() && trained.is_none(), "a block-diagonal linear has no bias and a frozen weight");
    let [rows, input] = weight.size()[..] else { unreachable!("(G O, I): checked at load") };
    let (tokens, output, kind) = (x.size()[0], rows / groups, weight.kind());
    let blocks = move |x: &Tensor, width: i64| x.view([tokens, groups, width]).transpose(0, 1); // (G, T, width)
    let together = move |y: Tensor| y.transpose(0, 1).reshape([tokens, -1]);
    let weight = weight.handle();
    let whole = move || weight.dense().view([groups, output, input]); // made anew where it is quantised
    let update = low_rank.map(|low_rank| Update {
        a: low_rank.a.detach().to_kind(kind),
        scaled_b: (low_rank.b.detach() * low_rank.scale).to_kind(kind).view([groups, output, -1]),
        scale: low_rank.scale,
        dropout: dropout_seed.filter(|_| low_rank.dropout > 0.0).map(|seed| (low_rank.dropout, seed)),
    });
    let (y, u) = tch::no_grad(|| {
        let y = blocks(x, input).bmm(&whole().transpose(1, 2)); // (G, T, O)
        match &update {
            None => (together(y), None),
            Some(update) => {
                let u = blocks(&dropped(x, update.dropout), input).matmul(&update.a.tr()); // (G, T, R)
                (together(y.baddbmm(&u, &update.scaled_b.transpose(1, 2), 1.0, 1.0)), Some(u))
            }
        }
    });
    let mut inputs = vec![x];
    inputs.extend(low_rank.iter().flat_map(|l| [&l.a, &l.b]));
    let x = x.detach();
    custom(c"engraft::block_projection", &inputs, vec![y], move |grads| {
        let dy = blocks(&grads[0].contiguous(), output); // (G, T, O)
        let dx = dy.bmm(&whole()); // (G, T, I)
        let (Some(update), Some(u)) = (update, u) else { return vec![Some(together(dx))] };
        let du = dy.bmm(&update.scaled_b); // (G, T, R)
        let through_a = together(du.matmul(&update.a));
        let dx = together(dx) + dropped(&through_a, update.dropout);
        let rank = du.size()[2];
        let rows = |t: &Tensor, width: i64| t.reshape([groups * tokens, width]);
        let da =
            rows(&du, rank).tr().mm(&rows(&blocks(&dropped(&x, update.dropout), input), input)).to_kind(Kind::Float);
        let db = dy.transpose(1, 2).bmm(&u).to_kind(Kind::Float) * update.scale; // (G, O, R)
        vec![Some(dx), Some(da), Some(db.view([groups * output, rank]))]
    })
    .remove(0)
}

struct Update {
    /// A (R, I) in the compute type.
    a: Tensor,
    /// s B (G, O, R) in the compute type.
    scaled_b: Tensor,
    scale: f64,
    /// Probability and seed of dropout, when there is any.
    dropout: Option<(f64, u64)>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::LowRank;
    use crate::ops::testing::{check, randn};
    use crate::torch_ext::keep_mask;

    #[test]
    fn equals_the_block_diagonal_matrix_in_plain_autograd() {
        let (tokens, groups, input, output, rank) = (7, 3, 8, 5, 2);
        let weight = |kind| (randn(&[groups * output, input], 4) * 0.3).to_kind(kind);
        for (adapted, dropout) in [(false, 0.0), (true, 0.0), (true, 0.3)] {
            let mut leaves = vec![randn(&[tokens, groups * input], 1)];
            if adapted {
                leaves.extend([randn(&[rank, input], 2) * 0.4, randn(&[groups * output, rank], 3) * 0.4]);
            }
            check(
                &leaves,
                |kind, x| {
                    let low_rank = adapted.then(|| LowRank {
                        a: x[1].to_kind(Kind::Float),
                        b: x[2].to_kind(Kind::Float),
                        scale: 1.5,
                        dropout,
                        magnitude: None,
                    });
                    let weight = weight(kind).into();
                    let low_rank = low_rank.as_ref();
                    let operand =
                        Operand { weight: &weight, trained: None, bias: None, low_rank, dropout_seed: Some(5) };
                    vec![block_projection(&x[0], groups, operand)]
                },
                |kind, x| {
                    let diagonal = |w: &Tensor| {
                        let rows = w.split(output, 0);
                        rows.into_iter().reduce(|all, block| Tensor::block_diag(&[all, block])).expect("groups")
                    };
                    let y = x[0].matmul(&diagonal(&weight(kind)).tr());
                    if !adapted {
                        return vec![y];
                    }
                    let dropped = match dropout {
                        0.0 => x[0].shallow_clone(),
                        _ => &x[0] * keep_mask(&x[0], 1.0 - dropout, 5) / (1.0 - dropout),
                    };
                    vec![y + dropped.matmul(&diagonal(&x[2].matmul(&x[1])).tr()) * 1.5]
                },
            );
        }
    }
}
