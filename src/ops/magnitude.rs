//! Weight-decomposed low-rank adaptation, DoRA (arXiv:2402.09353): each row of `V = W + s B A` keeps its direction and is given a
//! trained length, `Y = X (m / |V| V)^T`. Section 4.3: |V| is a constant to the gradient.

use tch::{Kind, Tensor};

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

/// `z` (T, out) with its columns times `1 + more` (out).
///
/// A factor near 1 would lose its digits in bf16; what it has more than 1 does not.
pub(super) fn scaled(z: &Tensor, more: &Tensor) -> Tensor {
    z.addcmul(z, &more.to_kind(z.kind()))
}
