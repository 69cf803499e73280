//! Rotary tables: from positions to cosines and sines, for every scaling Llama models know.
//!
//! The formulas are those of transformers' `modeling_rope_utils.py`, in fp32 and in the same order of operations.

use std::f64::consts::PI;

use tch::{Device, Kind, Tensor};

use super::spec::{Rope, RopeScaling};
use crate::ops::{Documents, rope::Rotation};
use crate::torch_ext::sent;

impl Rope {
    /// Cosines and sines (T, rotated/2), fp32, of `positions` (T).
    ///
    /// Dynamic scaling and LongRoPE depend on how long a document is; each document gets its own, so that it does not matter
    /// what it is packed with: `reached` is the position after its last.
    pub fn rotation(&self, positions: &Tensor, documents: &Documents, reached: &[i64]) -> Rotation {
        let tables = |positions: &Tensor, length: i64| {
            let angles = angles(positions, &self.frequencies(length, positions.device()));
            let scale = self.attention_factor(length);
            (angles.cos() * scale, angles.sin() * scale)
        };
        let (cos, sin) = match &self.scaling {
            RopeScaling::Dynamic { original, .. } | RopeScaling::LongRope { original, .. } => {
                let spans = documents.spans().zip(reached).filter(|((_, length), _)| *length > 0);
                let parts = spans.map(|((start, length), reached)| {
                    tables(&positions.narrow(0, start, length), *reached.max(original))
                });
                let (cos, sin): (Vec<Tensor>, Vec<Tensor>) = parts.unzip();
                (Tensor::cat(&cos, 0), Tensor::cat(&sin, 0))
            }
            _ => tables(positions, 0),
        };
        Rotation { layout: self.layout, cos, sin }
    }

    fn attention_factor(&self, length: i64) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            RopeScaling::LongRope { attention_factors: [short, long], original, .. } => {
                if length > original {
                    long
                } else {
                    short
                }
            }
            RopeScaling::None
            | RopeScaling::Linear { .. }
            | RopeScaling::Dynamic { .. }
            | RopeScaling::Proportional { .. }
            | RopeScaling::Llama3 { .. } => 1.0,
        }
    }

    /// Inverse frequencies (rotated/2), fp32; `length` matters to dynamic scaling and LongRoPE only.
    fn frequencies(&self, length: i64, device: Device) -> Tensor {
        let dims = self.rotated as f64;
        let plain = |theta: f64| powers(theta, self.rotated, device).reciprocal();
        match self.scaling {
            RopeScaling::LongRope { ref short, ref long, original, .. } => {
                let factors = if length > original { long } else { short };
                let factors = sent(&Tensor::from_slice(factors).to_kind(Kind::Float), device);
                (factors * powers(self.theta, self.rotated, device)).reciprocal()
            }
            RopeScaling::None => plain(self.theta),
            RopeScaling::Linear { factor } => plain(self.theta) / factor,
            RopeScaling::Proportional { turning, factor } => {
                let frequencies = plain(self.theta) / factor;
                let _ = frequencies.slice(0, turning, None::<i64>, 1).zero_();
                frequencies
            }
            RopeScaling::Dynamic { factor, original } => {
                let stretch = factor * length as f64 / original as f64 - (factor - 1.0);
                plain(self.theta * stretch.powf(dims / (dims - 2.0)))
            }
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, truncate, .. } => {
                let dimension =
                    |rotations: f64| dims * (original as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
                let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(dims - 1.0));
                if low == high {
                    high += 0.001;
                }
                let ramp = (Tensor::arange(self.rotated / 2, (Kind::Float, device)) - low) / (high - low);
                let kept = ramp.clamp(0.0, 1.0) * -1.0 + 1.0; // 1: left alone, 0: interpolated
                let powers = powers(self.theta, self.rotated, device);
                let interpolated = (&powers * factor).reciprocal();
                interpolated * (kept.ones_like() - &kept) + powers.reciprocal() * kept
            }
            RopeScaling::Llama3 { factor, original, low_freq_factor, high_freq_factor } => {
                let frequencies = plain(self.theta);
                let wavelengths = frequencies.reciprocal() * (2.0 * PI);
                let long = wavelengths.gt(original as f64 / low_freq_factor);
                let short = wavelengths.lt(original as f64 / high_freq_factor);
                let divided = (&frequencies / factor).where_self(&long, &frequencies);
                let smooth = (wavelengths.reciprocal() * original as f64 - low_freq_factor)
                    / (high_freq_factor - low_freq_factor);
                let ramp = (smooth.ones_like() - &smooth) * &divided / factor + &smooth * &divided;
                let medium = long.logical_or(&short).logical_not();
                ramp.where_self(&medium, &divided)
            }
        }
    }
}

/// Positions times frequencies: (T, rotated/2), fp32.
fn angles(positions: &Tensor, frequencies: &Tensor) -> Tensor {
    positions.to_kind(Kind::Float).unsqueeze(1) * frequencies.unsqueeze(0)
}

/// `theta ^ (2i / dims)`, fp32.
fn powers(theta: f64, dims: i64, device: Device) -> Tensor {
    let exponents = Tensor::arange_start_step(0, dims, 2, (Kind::Float, device)) / dims as f64;
    Tensor::pow_scalar(theta, &exponents)
}
