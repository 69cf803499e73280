//! The linears that all experts' rows go through together, with their low-rank updates.

use tch::{Kind, Tensor};

use super::sorted::Sorted;
use crate::ops::dropout::dropped;
use crate::ops::projection::Operand;
use crate::ops::update::Update;
use crate::quant::Weight;

/// Linears of the same rows, one of every expert each: gate and up, or down alone. Their A are stacked, so that rows meet them in one
/// product of each expert. Holds handles to frozen tensors, never copies of them.
pub(super) struct Bank {
    members: Vec<Member>,
    /// Every A on top of the next: (E, sum of R, in), in the compute type.
    a: Option<Tensor>,
}

struct Member {
    weight: Weight,
    bias: Option<Tensor>,
    update: Option<Update>,
}

impl Bank {
    pub(super) fn of(operands: &[Operand<'_>]) -> Self {
        assert!(operands.iter().all(|operand| operand.trained.is_none()), "experts' own weights stay as they are");
        let (updates, a) = Update::of(operands);
        let member = |(operand, update): (&Operand<'_>, Option<Update>)| Member {
            weight: operand.weight.handle(),
            bias: operand.bias.map(Tensor::shallow_clone),
            update,
        };
        Self { members: operands.iter().zip(updates).map(member).collect(), a }
    }

    /// The bias (E, out) of the only linear.
    pub(super) fn bias(&self) -> Option<&Tensor> {
        self.members[0].bias.as_ref()
    }

    /// Every Y (S, out) of rows (S, in), and U (S, sum of R), `drop(rows) A^T` of each that has an update.
    pub(super) fn forward(&self, rows: &Tensor, sorted: &Sorted) -> (Vec<Tensor>, Option<Tensor>) {
        let u = self.a.as_ref().map(|a| match self.drops() {
            false => sorted.products(rows, &a.transpose(1, 2), None),
            true => self.together(|update| {
                sorted.products(&dropped(rows, update.dropout), &update.rows_of(a).transpose(1, 2), None)
            }),
        });
        let product = |member: &Member| {
            let bias = member.bias.as_ref().map(|bias| sorted.spread(bias)); // (S, out)
            let y = sorted.frozen_products(rows, &member.weight, true, bias);
            match (&member.update, &u) {
                (Some(update), Some(u)) => {
                    sorted.products(&update.columns(u), &update.scaled_b.transpose(1, 2), Some(y))
                }
                _ => y,
            }
        };
        (self.members.iter().map(product).collect(), u)
    }

    /// dX (S, in) from every dY (S, out), and dU (S, sum of R), `dY s B` of each that has an update.
    pub(super) fn backward(&self, dys: &[Tensor], sorted: &Sorted) -> (Tensor, Option<Tensor>) {
        let mut dx: Option<Tensor> = None;
        for (member, dy) in self.members.iter().zip(dys) {
            dx = Some(sorted.frozen_products(dy, &member.weight, false, dx));
        }
        let dx = dx.expect("a bank has linears");
        let Some(a) = &self.a else { return (dx, None) };
        let mut of_members = dys.iter().zip(&self.members).filter(|(_, member)| member.update.is_some());
        let du = self.together(|update| {
            let (dy, _) = of_members.next().expect("one for each update");
            sorted.products(dy, &update.scaled_b, None)
        });
        let dx = if self.drops() {
            self.updates().fold(dx, |dx, update| {
                dx + dropped(&sorted.products(&update.columns(&du), &update.rows_of(a), None), update.dropout)
            })
        } else {
            sorted.products(&du, a, Some(dx))
        };
        (dx, Some(du))
    }

    /// dA (E, R, in) and dB (E, out, R), fp32, of every update.
    pub(super) fn factors(
        &self,
        rows: &Tensor,
        u: Option<&Tensor>,
        dys: &[Tensor],
        du: Option<&Tensor>,
        sorted: &Sorted,
    ) -> Vec<Tensor> {
        let (Some(u), Some(du)) = (u, du) else { return Vec::new() };
        let stacked = (!self.drops()).then(|| sorted.outer_products(du, rows)); // (E, sum of R, in)
        let of_member = |(member, dy): (&Member, &Tensor)| {
            let update = member.update.as_ref()?;
            let da = match &stacked {
                Some(stacked) => update.rows_of(stacked),
                None => sorted.outer_products(&update.columns(du), &dropped(rows, update.dropout)),
            };
            let db = update.db(&sorted.outer_products(dy, &update.columns(u)));
            Some([da.to_kind(Kind::Float), db])
        };
        self.members.iter().zip(dys).filter_map(of_member).flatten().collect()
    }

    fn updates(&self) -> impl Iterator<Item = &Update> {
        self.members.iter().filter_map(|member| member.update.as_ref())
    }

    /// Whether rows meet each A with a mask of its own.
    fn drops(&self) -> bool {
        self.updates().any(|update| update.dropout.is_some())
    }

    /// What there is of each update (S, R), side by side.
    fn together(&self, of: impl FnMut(&Update) -> Tensor) -> Tensor {
        let mut parts: Vec<Tensor> = self.updates().map(of).collect();
        if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 1) }
    }
}
