//! Low-rank updates of linears that read the same rows: every A lies on top of the next, so that rows meet them all in one product.

use tch::{Kind, Tensor};

use super::projection::Operand;

/// What forward and backward read of one update.
pub(super) struct Update {
    /// s B (out, R), or of experts (E, out, R), in the compute type.
    pub(super) scaled_b: Tensor,
    pub(super) scale: f64,
    /// Probability and seed of dropout, when there is any.
    pub(super) dropout: Option<(f64, u64)>,
    /// Its rows of the stacked A, which are its columns of U: (start, R).
    rows: (i64, i64),
}

impl Update {
    /// That of each operand, and their A (sum of R, in), or of experts (E, sum of R, in), in the compute type; none without updates.
    pub(super) fn of(operands: &[Operand<'_>]) -> (Vec<Option<Self>>, Option<Tensor>) {
        let (mut stacked, mut start) = (Vec::new(), 0);
        let of_operand = |operand: &Operand<'_>| {
            let (low_rank, kind) = (operand.low_rank?, operand.weight.kind());
            let a = low_rank.a.detach().to_kind(kind);
            let rows = (start, a.size()[a.dim() - 2]);
            start += rows.1;
            stacked.push(a);
            Some(Self {
                scaled_b: (low_rank.b.detach() * low_rank.scale).to_kind(kind),
                scale: low_rank.scale,
                dropout: operand.dropout_seed.filter(|_| low_rank.dropout > 0.0).map(|seed| (low_rank.dropout, seed)),
                rows,
            })
        };
        let updates = operands.iter().map(of_operand).collect();
        let a = if stacked.len() > 1 { Some(Tensor::cat(&stacked, -2)) } else { stacked.pop() };
        (updates, a)
    }

    /// Its columns of U (rows, sum of R).
    pub(super) fn columns(&self, u: &Tensor) -> Tensor {
        u.narrow(1, self.rows.0, self.rows.1)
    }

    /// Its rows of the stacked A, or of their gradient.
    pub(super) fn rows_of(&self, a: &Tensor) -> Tensor {
        a.narrow(-2, self.rows.0, self.rows.1)
    }

    /// dB, fp32, of the gradient of s B.
    pub(super) fn db(&self, of_scaled: &Tensor) -> Tensor {
        of_scaled.to_kind(Kind::Float) * self.scale
    }
}
