//! Eight-bit floating-point numbers with scales: sign, four bits of exponent and three of mantissa (e4m3fn), or five and two (e5m2)
//! (arXiv:2209.05433).
//!
//! Weights that are quantised here have one scale to a row, `max |w| / 448` in fp32: what servers' row-wise products
//! (`torch._scaled_mm`) take as it is, and compressed-tensors calls a channel. Those of published models have one for a block of rows
//! and columns (DeepSeek V3: 128 x 128), a row, or the whole weight.

mod kernels;
mod product;
#[cfg(test)]
mod tests;

pub use product::multiplies;
use tch::{Kind, Tensor};

use super::nibbles;
use super::rounding::Rounding;
use crate::ops::cuda;

/// The largest number of e4m3fn.
pub const LARGEST: f32 = 448.0;

/// A weight (out, in) of fp8 numbers.
#[derive(Debug)]
pub struct Fp8 {
    /// The number type it is made whole in: bf16, fp16 or fp32.
    pub kind: Kind,
    /// What a product with a scale is rounded to before that.
    pub rounding: Rounding,
    /// (out, in) of e4m3fn or e5m2.
    pub codes: Tensor,
    /// (out / high, in / wide), rounded up, fp32.
    pub scales: Tensor,
    /// Rows and columns to a scale, (high, wide).
    pub block: [i64; 2],
    /// Whether products read these numbers themselves ([`Fp8::product`]), their inputs quantised, too.
    pub multiplied: bool,
}

impl Fp8 {
    /// Quantises a weight of bf16, fp16 or fp32 numbers to e4m3fn, a scale to each row; a row of zeros has the scale 1.
    pub fn of(weight: &Tensor) -> Self {
        let weight = weight.contiguous();
        let columns = weight.size()[1];
        let (codes, scales) = match cuda::fp8_quantise(&weight) {
            Some(made) => made,
            None if nibbles::serves(weight.device(), weight.kind()) => kernels::quantise(&weight),
            None => quantise_plainly(&weight),
        };
        let block = [1, columns.max(1)];
        Self { kind: weight.kind(), rounding: Rounding::None, codes, scales, block, multiplied: false }
    }

    /// [`Fp8::of`] in libtorch's own operations, for every device.
    pub(super) fn of_plainly(weight: &Tensor) -> Self {
        let (codes, scales) = quantise_plainly(weight);
        let block = [1, weight.size()[1].max(1)];
        Self { kind: weight.kind(), rounding: Rounding::None, codes, scales, block, multiplied: false }
    }

    /// Another handle to the same tensors.
    pub(super) fn handle(&self) -> Self {
        Self { codes: self.codes.shallow_clone(), scales: self.scales.shallow_clone(), ..*self }
    }

    /// The numbers it stands for, in its shape and kind: `code * scale`.
    pub fn dequantised(&self) -> Tensor {
        match cuda::fp8_dequantise(&self.codes, &self.scales, self.block, self.rounding.kind(), self.kind) {
            Some(whole) => whole,
            None if nibbles::serves(self.codes.device(), self.kind) => kernels::dequantise(self),
            None => self.dequantised_plainly(),
        }
    }

    /// [`Fp8::dequantised`] in libtorch's own operations, for every device.
    pub(super) fn dequantised_plainly(&self) -> Tensor {
        let [high, wide] = self.block;
        let &[rows, columns] = &self.codes.size()[..] else { unreachable!("a weight is a matrix") };
        let scales = self.scales.repeat_interleave_self_int(high, 0, None).narrow(0, 0, rows);
        let scales = scales.repeat_interleave_self_int(wide, 1, None).narrow(1, 0, columns); // (out, in)
        self.rounding.apply(self.codes.to_kind(Kind::Float) * scales).to_kind(self.kind)
    }
}

/// Codes (out, in) and scales (out, 1), in libtorch's own operations.
fn quantise_plainly(weight: &Tensor) -> (Tensor, Tensor) {
    let wide = weight.to_kind(Kind::Float);
    let largest = wide.abs().amax([1], true); // (out, 1)
    let limit = f64::from(LARGEST);
    // Divided by a tensor: on CUDA a number is multiplied with as its reciprocal.
    let scales = (&largest / largest.full_like(limit)).where_self(&largest.gt(0.0), &largest.ones_like());
    let codes = (wide / &scales).clamp(-limit, limit).to_kind(Kind::Float8e4m3fn);
    (codes, scales)
}
