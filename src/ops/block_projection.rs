//! A linear that is block-diagonal: x is G parts side by side, each goes through rows of the weight of its own,
//! `Y_g = X_g W_g^T + s drop(X_g) A^T B_g^T`. The update has one A for all parts: it is a low-rank update of the whole weight.

use tch::{Kind, Tensor};

use super::dropout::dropped;
use super::projection::Operand;
use super::update::Update;
use crate::torch_ext::custom;

/// Projects x (T, G I) by `operand`, whose weight is (G O, I), without a bias: (T, G O).
pub fn block_projection(x: &Tensor, groups: i64, operand: Operand<'_>) -> Tensor {
    let Operand { weight, trained, bias, low_rank, .. } = operand;
    assert!(bias.is_none() && trained.is_none(), "a block-diagonal linear has no bias and a frozen weight");
    let [rows, input] = weight.size()[..] else { unreachable!("(G O, I): checked at load") };
    let kind = weight.kind();
    let weight = weight.handle();
    let (mut updates, a) = Update::of(&[operand]);
    let update = updates.remove(0).zip(a);
    let (y, u) = tch::no_grad(|| {
        let y = x.new_empty([x.size()[0], rows], (kind, x.device()));
        let whole = weight.dense(); // made anew where it is quantised
        for [x, y, weight] in parts(groups, [(x, 1), (&y, 1), (&whole, 0)]) {
            drop(x.mm_out(&y, &weight.tr()));
        }
        let u = update.as_ref().map(|(update, a)| {
            let parted = dropped(x, update.dropout).reshape([-1, input]); // (T G, I)
            let u = parted.mm(&a.tr()).view([x.size()[0], -1]); // (T, G R)
            for [u, mut y, scaled_b] in parts(groups, [(&u, 1), (&y, 1), (&update.scaled_b, 0)]) {
                drop(y.addmm_(&u, &scaled_b.tr()));
            }
            u
        });
        (y, u)
    });
    let mut inputs = vec![x];
    inputs.extend(low_rank.iter().flat_map(|l| [&l.a, &l.b]));
    let x = x.detach();
    custom(c"engraft::block_projection", &inputs, vec![y], move |grads| {
        let (dy, dx) = (&grads[0], x.empty_like());
        let whole = weight.dense();
        for [dy, dx, weight] in parts(groups, [(dy, 1), (&dx, 1), (&whole, 0)]) {
            drop(dy.mm_out(&dx, &weight));
        }
        let (Some((update, a)), Some(u)) = (update, u) else { return vec![Some(dx)] };
        let Update { scaled_b, dropout, .. } = &update;
        let (du, db) = (u.empty_like(), scaled_b.empty_like());
        for [dy, du, u, scaled_b, db] in parts(groups, [(dy, 1), (&du, 1), (&u, 1), (scaled_b, 0), (&db, 0)]) {
            drop(dy.mm_out(&du, &scaled_b));
            drop(dy.tr().mm_out(&db, &u));
        }
        // One A for all parts: the parts of a token are as many rows.
        let du = du.view([-1, a.size()[0]]); // (T G, R)
        let da = du.tr().mm(&dropped(&x, *dropout).reshape([-1, input]));
        let dx = match dropout {
            None => dx.view([-1, input]).addmm_(&du, &a).view_as(&x),
            Some(_) => dx + dropped(&du.mm(&a).view_as(&x), *dropout),
        };
        vec![Some(dx), Some(da.to_kind(Kind::Float)), Some(update.db(&db))]
    })
    .remove(0)
}

/// Each group's part of all tensors, which lie side by side along the dimension named beside each.
fn parts<const N: usize>(groups: i64, all: [(&Tensor, i64); N]) -> impl Iterator<Item = [Tensor; N]> {
    (0..groups).map(move |group| {
        all.map(|(x, dim)| {
            let width = x.size()[dim as usize] / groups;
            x.narrow(dim, group * width, width)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::LowRank;
    use crate::ops::testing::{check, randn};
    use crate::torch_ext::keep_mask;

    #[test]
    fn equals_the_block_diagonal_matrix_in_plain_autograd() {
        let (tokens, groups, input, output, rank) = (19, 3, 24, 16, 2); // large enough for oneDNN
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
