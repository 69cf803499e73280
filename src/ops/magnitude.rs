//! Weight-decomposed low-rank adaptation, DoRA (arXiv:2402.09353): each row of `V = W + s B A` keeps its direction and is given a
//! trained length, `Y = X (m / |V| V)^T`. Section 4.3: |V| is a constant to the gradient.

use tch::{Kind, Tensor};

use super::dropout::dropped;
use super::projection::LowRank;
use crate::quant::Weight;

/// Numbers squared at a time, so that the fp32 copies of a large weight stay small beside it.
const CHUNK: i64 = 1 << 24;

/// The trained lengths of a weight's rows.
#[derive(Debug)]
pub struct Magnitude {
    /// m (out), fp32, a leaf with gradient.
    pub lengths: Tensor,
    /// `|W|^2` by row (out), fp32, frozen: with it, |V| needs no V.
    pub squares: Tensor,
}

impl Magnitude {
    /// Another handle to the same tensors.
    pub fn handle(&self) -> Self {
        Self { lengths: self.lengths.shallow_clone(), squares: self.squares.shallow_clone() }
    }
}

/// `|W|^2` by row (out), fp32, of a weight (out, in).
pub fn squares(weight: &Weight) -> Tensor {
    tch::no_grad(|| {
        let weight = weight.dense();
        let columns = weight.size()[1].max(1);
        let chunks = weight.split((CHUNK / columns).max(1), 0);
        let sums: Vec<Tensor> = chunks
            .iter()
            .map(|rows| rows.to_kind(Kind::Float).square().sum_dim_intlist([1i64].as_slice(), false, Kind::Float))
            .collect();
        Tensor::cat(&sums, 0)
    })
}

/// |V| by row (out), fp32, of W (out, in), its `squares`, A (R, in) and s B (out, R).
///
/// `|W + sBA|^2 = |W|^2 + 2 (W A^T) . sB + (sB A A^T) . sB`: two products with R columns, and nothing of the size of W is made.
pub fn lengths(weight: &Tensor, squares: &Tensor, a: &Tensor, scaled_b: &Tensor) -> Tensor {
    tch::no_grad(|| {
        let a = a.detach().to_kind(Kind::Float);
        let across = weight.mm(&a.to_kind(weight.kind()).tr()).to_kind(Kind::Float); // (out, R)
        let own = scaled_b.mm(&a.mm(&a.tr())); // (out, R)
        let more = ((across * 2.0 + own) * scaled_b).sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
        // Of rows that cancel out, rounding may leave less than nothing.
        (squares + more).clamp_min(f64::from(f32::MIN_POSITIVE)).sqrt()
    })
}

/// What a low-rank update needs beside itself where lengths are trained.
pub(super) struct Decomposed {
    magnitude: Magnitude,
    /// A (R, in) and s B (out, R), fp32.
    a: Tensor,
    scaled_b: Tensor,
}

/// What its forward leaves for the backward: Z (T, out), whose columns were multiplied with `m / |V|`; that less 1, and |V|, both (out).
pub(super) struct Lengthened {
    z: Tensor,
    more: Tensor,
    lengths: Tensor,
}

impl Decomposed {
    /// None where lengths are not trained.
    pub(super) fn of(low_rank: &LowRank) -> Option<Self> {
        let magnitude = low_rank.magnitude.as_ref()?.handle();
        Some(Self { magnitude, a: low_rank.a.detach(), scaled_b: low_rank.b.detach() * low_rank.scale })
    }

    /// `Y = X W^T - D W^T + Z m / |V| + added` with `D = drop(X)` and `Z = D W^T + U (s B)^T`, of U (T, R) and s B (out, R) in the
    /// compute type: nothing is taken off and put on again where nothing is dropped.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        weight: &Weight,
        (u, scaled_b): (&Tensor, &Tensor),
        dropout: Option<(f64, u64)>,
        added: Option<Tensor>,
    ) -> (Tensor, Lengthened) {
        let Magnitude { lengths: trained, squares } = &self.magnitude;
        // Lengths and products read the same numbers: a quantised weight is made whole once for all.
        let whole = Weight::Dense(weight.dense());
        let lengths = lengths(&whole.dense(), squares, &self.a, &self.scaled_b);
        let weight = if weight.is_multiplied() { weight } else { &whole };
        let more = trained.detach() / &lengths - 1.0;
        let mut z = weight.product(&dropped(x, dropout), None);
        let whole = dropout.map(|_| weight.product(x, None) - &z);
        let _ = z.addmm_(u, &scaled_b.tr());
        let y = [whole, added].into_iter().flatten().fold(scaled(&z, &more), |y, more| y + more);
        (y, Lengthened { z, more, lengths })
    }
}

impl Lengthened {
    /// dZ from dY (T, out).
    pub(super) fn through_lengths(&self, dy: &Tensor) -> Tensor {
        scaled(dy, &self.more)
    }

    /// dm (out), fp32, from dY (T, out).
    pub(super) fn dlengths(&self, dy: &Tensor) -> Tensor {
        let products = dy.to_kind(Kind::Float) * &self.z;
        products.sum_dim_intlist([0i64].as_slice(), false, Kind::Float) / &self.lengths
    }
}

/// `z` (T, out) with its columns times `1 + more` (out).
///
/// A factor near 1 would lose its digits in bf16; what it has more than 1 does not.
fn scaled(z: &Tensor, more: &Tensor) -> Tensor {
    z.addcmul(z, &more.to_kind(z.kind()))
}
