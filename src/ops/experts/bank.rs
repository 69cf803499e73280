//! One linear of every expert, with its low-rank update.

use tch::{Kind, Tensor};

use super::sorted::Sorted;
use crate::ops::dropout::dropped;
use crate::ops::projection::Operand;
use crate::quant::Weight;

/// Handles to frozen tensors, never copies of them.
pub(super) struct Bank {
    weight: Weight,
    pub(super) bias: Option<Tensor>,
    update: Option<Update>,
}

struct Update {
    /// A (E, R, in) in the compute type.
    a: Tensor,
    /// s B (E, out, R) in the compute type.
    scaled_b: Tensor,
    scale: f64,
    /// Probability and seed of dropout, when there is any.
    dropout: Option<(f64, u64)>,
}

impl Bank {
    pub(super) fn of(operand: &Operand<'_>) -> Self {
        let kind = operand.weight.kind();
        let update = operand.low_rank.map(|low_rank| Update {
            a: low_rank.a.detach().to_kind(kind),
            scaled_b: (low_rank.b.detach() * low_rank.scale).to_kind(kind),
            scale: low_rank.scale,
            dropout: operand.dropout_seed.filter(|_| low_rank.dropout > 0.0).map(|seed| (low_rank.dropout, seed)),
        });
        Self { weight: operand.weight.handle(), bias: operand.bias.map(Tensor::shallow_clone), update }
    }

    /// Y (S, out) of rows (S, in), and `drop(rows) A^T` (S, R) where there is an update.
    pub(super) fn forward(&self, rows: &Tensor, sorted: &Sorted) -> (Tensor, Option<Tensor>) {
        let bias = self.bias.as_ref().map(|bias| sorted.spread(bias)); // (S, out)
        let y = sorted.frozen_products(rows, &self.weight, true, bias);
        let Some(update) = &self.update else { return (y, None) };
        let u = sorted.products(&dropped(rows, update.dropout), &update.a.transpose(1, 2), None); // (S, R)
        (sorted.products(&u, &update.scaled_b.transpose(1, 2), Some(y)), Some(u))
    }

    /// dX (S, in) from dY (S, out), added to `onto` (S, in) where it is given, and dU = `dY s B` (S, R) where there is an update.
    pub(super) fn backward(&self, dy: &Tensor, sorted: &Sorted, onto: Option<Tensor>) -> (Tensor, Option<Tensor>) {
        let dx = sorted.frozen_products(dy, &self.weight, false, onto);
        let Some(update) = &self.update else { return (dx, None) };
        let du = sorted.products(dy, &update.scaled_b, None); // (S, R)
        let dx = match update.dropout {
            Some(_) => dx + dropped(&sorted.products(&du, &update.a, None), update.dropout),
            None => sorted.products(&du, &update.a, Some(dx)),
        };
        (dx, Some(du))
    }

    /// dA (E, R, in) and dB (E, out, R), fp32, of the update, if there is one.
    pub(super) fn factors(
        &self,
        rows: &Tensor,
        u: Option<Tensor>,
        dy: &Tensor,
        du: Option<Tensor>,
        sorted: &Sorted,
    ) -> Vec<Tensor> {
        let (Some(update), Some(u), Some(du)) = (&self.update, u, du) else { return Vec::new() };
        let da = sorted.outer_products(&du, &dropped(rows, update.dropout)).to_kind(Kind::Float);
        let db = sorted.outer_products(dy, &u).to_kind(Kind::Float) * update.scale;
        vec![da, db]
    }
}
