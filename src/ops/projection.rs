//! Low-rank linear projections of one input: `Y_i = X W_i^T + bias_i + s_i drop_i(X) A_i^T B_i^T (+ residual)`,
//! with `X = norm(input)` where a norm goes before (arXiv:2106.09685).
//!
//! All projections that share X are one operation: X is kept once (before the norm, which is cheap to redo), the A
//! matrices are stacked so that X meets them in one product, and dX is summed in place. A frozen W costs one product
//! forward and one backward; no gradient of W is ever made and no copy of it kept: a quantised W is made whole for each product.

use tch::{Kind, Tensor};

use super::Norm;
use super::dropout::dropped;
use crate::quant::Weight;
use crate::torch_ext::custom;

/// A low-rank update, trained in fp32.
#[derive(Debug)]
pub struct LowRank {
    /// A (R, in), fp32, a leaf with gradient.
    pub a: Tensor,
    /// B (out, R), fp32, a leaf with gradient.
    pub b: Tensor,
    /// `lora_alpha / r`, or `/ sqrt(r)` when rank-stabilised.
    pub scale: f64,
    /// Probability of dropping an element of X before A.
    pub dropout: f64,
}

/// One of the projections of X.
#[derive(Debug, Clone, Copy)]
pub struct Operand<'a> {
    /// W (out, in), frozen.
    pub weight: &'a Weight,
    /// (out), frozen.
    pub bias: Option<&'a Tensor>,
    /// The update, if any.
    pub low_rank: Option<&'a LowRank>,
    /// Seed of this projection's dropout mask; `None` when nothing is dropped.
    pub dropout_seed: Option<u64>,
}

/// Projects `input` (T, in), after `norm` if given, by every operand; `residual` (T, out) is added to the only one.
pub fn projection(
    input: &Tensor,
    norm: Option<&Norm>,
    operands: &[Operand<'_>],
    residual: Option<&Tensor>,
) -> Vec<Tensor> {
    let group = Group::of(operands);
    let (outputs, stats, u) = tch::no_grad(|| {
        let (x, stats) = match norm {
            Some(norm) => {
                let (x, stats) = norm.forward(input);
                (x, Some(stats))
            }
            None => (input.shallow_clone(), None),
        };
        let (outputs, u) = group.forward(&x, residual);
        (outputs, stats, u)
    });

    let mut inputs = vec![input];
    inputs.extend(residual);
    inputs.extend(factors(operands));
    let wants_dx = input.requires_grad();
    let has_residual = residual.is_some();
    let saved = input.detach();
    let normed = norm.cloned().zip(stats);
    custom(c"engraft::projection", &inputs, outputs, move |grads| {
        let x = |_: Option<&Tensor>| {
            normed.as_ref().map_or_else(|| saved.shallow_clone(), |(norm, stats)| norm.again(&saved, stats))
        };
        let (dx, dfactors) = group.backward(x, u.as_ref(), grads, wants_dx);
        let dinput = dx.map(|dx| match &normed {
            Some((norm, stats)) => norm.backward(&dx, &saved, stats),
            None => dx,
        });
        let mut out = vec![dinput];
        if has_residual {
            out.push(Some(grads[0].shallow_clone()));
        }
        out.extend(dfactors.into_iter().map(Some));
        out
    })
}

/// A and B of every operand that has them, in the order in which gradients are returned.
pub(super) fn factors<'a>(operands: &[Operand<'a>]) -> Vec<&'a Tensor> {
    operands.iter().filter_map(|o| o.low_rank).flat_map(|l| [&l.a, &l.b]).collect()
}

/// Projections of one X: what their forward and backward read. Holds handles to frozen tensors, never copies of them.
pub(super) struct Group {
    members: Vec<Member>,
    /// Every A on top of the next: (sum of R, in), in the compute type.
    a: Option<Tensor>,
}

struct Member {
    weight: Weight,
    bias: Option<Tensor>,
    update: Option<Update>,
}

struct Update {
    /// s B (out, R) in the compute type.
    scaled_b: Tensor,
    scale: f64,
    /// This update's rows of the stacked A, which are its columns of U: (start, R).
    rows: (i64, i64),
    /// Probability and seed of dropout, when there is any.
    dropout: Option<(f64, u64)>,
}

impl Group {
    pub(super) fn of(operands: &[Operand<'_>]) -> Self {
        let mut stacked: Vec<Tensor> = Vec::new();
        let mut start = 0;
        let members = operands
            .iter()
            .map(|operand| {
                let kind = operand.weight.kind();
                let update = operand.low_rank.map(|low_rank| {
                    let rank = low_rank.a.size()[0];
                    stacked.push(low_rank.a.detach().to_kind(kind));
                    start += rank;
                    Update {
                        scaled_b: (low_rank.b.detach() * low_rank.scale).to_kind(kind),
                        scale: low_rank.scale,
                        rows: (start - rank, rank),
                        dropout: operand.dropout_seed.filter(|_| low_rank.dropout > 0.0).map(|s| (low_rank.dropout, s)),
                    }
                });
                Member { weight: operand.weight.handle(), bias: operand.bias.map(Tensor::shallow_clone), update }
            })
            .collect();
        let a = match stacked.len() {
            0 => None,
            1 => stacked.pop(),
            _ => Some(Tensor::cat(&stacked, 0)),
        };
        Self { members, a }
    }

    /// Every Y_i (T, out_i), and U (T, sum of R) with `U_i = drop_i(X) A_i^T`.
    pub(super) fn forward(&self, x: &Tensor, residual: Option<&Tensor>) -> (Vec<Tensor>, Option<Tensor>) {
        assert!(residual.is_none() || self.members.len() == 1, "a residual is added to one projection");
        let u = self.a.as_ref().map(|a| self.down(x, a));
        let outputs = self
            .members
            .iter()
            .map(|member| {
                let weight = member.weight.dense().tr(); // (in, out)
                let mut y = match (residual, &member.bias) {
                    (Some(residual), Some(bias)) => (residual + bias).addmm(x, &weight),
                    (Some(added), None) | (None, Some(added)) => added.addmm(x, &weight),
                    (None, None) => x.mm(&weight),
                };
                if let (Some(update), Some(u)) = (&member.update, &u) {
                    let _ = y.addmm_(&update.columns(u), &update.scaled_b.tr());
                }
                y
            })
            .collect();
        (outputs, u)
    }

    /// dX (T, in) when wanted, and dA (R, in), dB (out, R) in fp32 of every update, from every dY_i (T, out_i).
    ///
    /// With dU_i = dY_i s_i B_i: `dA_i = dU_i^T drop_i(X)`, `dB_i = s_i dY_i^T U_i`,
    /// `dX = sum_i dY_i W_i + drop_i(dU_i A_i)`.
    ///
    /// `x` makes X again; it is called once, at the end, with dX.
    pub(super) fn backward(
        &self,
        x: impl FnOnce(Option<&Tensor>) -> Tensor,
        u: Option<&Tensor>,
        grads: &[Tensor],
        wants_dx: bool,
    ) -> (Option<Tensor>, Vec<Tensor>) {
        let mut dx: Option<Tensor> = None;
        let mut add = |left: &Tensor, right: &Tensor| match &mut dx {
            Some(dx) => drop(dx.addmm_(left, right)),
            None => dx = Some(left.mm(right)),
        };
        if wants_dx {
            for (member, dy) in self.members.iter().zip(grads) {
                add(dy, &member.weight.dense());
            }
        }
        let (Some(a), Some(u)) = (&self.a, u) else {
            let _ = x(dx.as_ref());
            return (dx, Vec::new());
        };
        let updates: Vec<(&Update, &Tensor)> =
            self.members.iter().zip(grads).filter_map(|(m, dy)| m.update.as_ref().map(|update| (update, dy))).collect();
        let du: Vec<Tensor> = updates.iter().map(|(update, dy)| dy.mm(&update.scaled_b)).collect(); // (T, R) each
        let da: Vec<Tensor> = if updates.iter().any(|(update, _)| update.dropout.is_some()) {
            for ((update, _), du) in updates.iter().zip(&du).filter(|_| wants_dx) {
                let through_a = dropped(&du.mm(&update.rows_of(a)), update.dropout);
                dx = Some(dx.expect("wanted, so made above") + through_a);
            }
            let x = x(dx.as_ref());
            updates.iter().zip(&du).map(|((update, _), du)| du.tr().mm(&dropped(&x, update.dropout))).collect()
        } else {
            let du = if du.len() == 1 { du[0].shallow_clone() } else { Tensor::cat(&du, 1) }; // (T, sum of R)
            if wants_dx {
                add(&du, a);
            }
            let da = du.tr().mm(&x(dx.as_ref())); // (sum of R, in)
            updates.iter().map(|(update, _)| update.rows_of(&da)).collect()
        };
        let dfactors = updates
            .iter()
            .zip(da)
            .flat_map(|((update, dy), da)| {
                let db = dy.tr().mm(&update.columns(u)).to_kind(Kind::Float) * update.scale;
                [da.to_kind(Kind::Float), db]
            })
            .collect();
        (dx, dfactors)
    }

    fn down(&self, x: &Tensor, a: &Tensor) -> Tensor {
        let updates: Vec<&Update> = self.members.iter().filter_map(|m| m.update.as_ref()).collect();
        if updates.iter().all(|update| update.dropout.is_none()) {
            return x.mm(&a.tr());
        }
        let parts: Vec<Tensor> = updates.iter().map(|u| dropped(x, u.dropout).mm(&u.rows_of(a).tr())).collect();
        Tensor::cat(&parts, 1)
    }
}

impl Update {
    fn columns(&self, u: &Tensor) -> Tensor {
        u.narrow(1, self.rows.0, self.rows.1)
    }

    fn rows_of(&self, a: &Tensor) -> Tensor {
        a.narrow(0, self.rows.0, self.rows.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::norm::tests::{rms, twin as norm_twin};
    use crate::ops::testing::{check, randn};
    use crate::torch_ext::keep_mask;

    const T: i64 = 19;
    const D: i64 = 24;
    const OUT: [i64; 3] = [24, 8, 40];
    const RANK: i64 = 4;

    fn weight(i: usize, kind: Kind) -> Tensor {
        (randn(&[OUT[i], D], 10 + i as u64) * 0.2).to_kind(kind)
    }

    fn bias(i: usize, kind: Kind) -> Tensor {
        randn(&[OUT[i]], 20 + i as u64).to_kind(kind)
    }

    /// Leaves: X, then A and B of three projections, then a residual. A and B stay fp32 in every run, as in training.
    fn leaves(outputs: &[i64]) -> Vec<Tensor> {
        let mut leaves = vec![randn(&[T, D], 1)];
        for (i, out) in outputs.iter().enumerate() {
            leaves.push(randn(&[RANK, D], 30 + i as u64) * 0.3);
            leaves.push(randn(&[*out, RANK], 40 + i as u64) * 0.3);
        }
        leaves
    }

    fn low_rank(leaves: &[Tensor], i: usize, dropout: f64) -> LowRank {
        let handle = |t: &Tensor| t.to_kind(Kind::Float);
        LowRank { a: handle(&leaves[1 + 2 * i]), b: handle(&leaves[2 + 2 * i]), scale: 1.5, dropout }
    }

    fn plain(x: &Tensor, w: &Tensor, l: Option<&LowRank>, seed: Option<u64>) -> Tensor {
        let y = x.matmul(&w.tr());
        let Some(l) = l else { return y };
        let dropped = match seed {
            Some(seed) if l.dropout > 0.0 => x * keep_mask(x, 1.0 - l.dropout, seed) / (1.0 - l.dropout),
            _ => x.shallow_clone(),
        };
        y + dropped.matmul(&l.a.tr()).matmul(&l.b.tr()) * l.scale
    }

    #[test]
    fn three_projections_after_a_norm_equal_plain_autograd() {
        for dropout in [0.0, 0.3] {
            let norm = rms(D, 1e-6);
            check(
                &leaves(&OUT),
                |kind, x| {
                    let low_ranks: Vec<LowRank> = (0..3).map(|i| low_rank(x, i, dropout)).collect();
                    let weights: Vec<Weight> = (0..3).map(|i| weight(i, kind).into()).collect();
                    let biases: Vec<Tensor> = (0..3).map(|i| bias(i, kind)).collect();
                    let operands: Vec<Operand> = (0..3)
                        .map(|i| Operand {
                            weight: &weights[i],
                            bias: (i != 1).then_some(&biases[i]),
                            low_rank: Some(&low_ranks[i]),
                            dropout_seed: Some(70 + i as u64),
                        })
                        .collect();
                    projection(&x[0], Some(&norm), &operands, None)
                },
                |kind, x| {
                    let normed = norm_twin(&x[0], &norm.weight, 1e-6);
                    (0..3)
                        .map(|i| {
                            let l = low_rank(x, i, dropout);
                            let y = plain(&normed, &weight(i, kind), Some(&l), Some(70 + i as u64));
                            if i == 1 { y } else { y + bias(i, kind) }
                        })
                        .collect()
                },
            );
        }
    }

    #[test]
    fn one_adapter_among_bare_projections_equals_plain_autograd() {
        check(
            &leaves(&OUT[..1]),
            |kind, x| {
                let low_rank = low_rank(x, 0, 0.0);
                let weights: Vec<Weight> = (0..2).map(|i| weight(i, kind).into()).collect();
                let bare = Operand { weight: &weights[1], bias: None, low_rank: None, dropout_seed: None };
                let adapted =
                    Operand { weight: &weights[0], bias: None, low_rank: Some(&low_rank), dropout_seed: None };
                projection(&x[0], None, &[bare, adapted], None)
            },
            |kind, x| {
                let l = low_rank(x, 0, 0.0);
                vec![plain(&x[0], &weight(1, kind), None, None), plain(&x[0], &weight(0, kind), Some(&l), None)]
            },
        );
    }

    #[test]
    fn a_residual_and_a_bias_equal_plain_autograd() {
        let mut inputs = leaves(&OUT[..1]);
        inputs.push(randn(&[T, OUT[0]], 9));
        check(
            &inputs,
            |kind, x| {
                let (low_rank, weight, bias) = (low_rank(x, 0, 0.0), Weight::from(weight(0, kind)), bias(0, kind));
                let operand =
                    Operand { weight: &weight, bias: Some(&bias), low_rank: Some(&low_rank), dropout_seed: None };
                projection(&x[0], None, &[operand], Some(&x[3]))
            },
            |kind, x| {
                let l = low_rank(x, 0, 0.0);
                vec![plain(&x[0], &weight(0, kind), Some(&l), None) + bias(0, kind) + &x[3]]
            },
        );
    }
}
