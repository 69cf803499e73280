//! MXFP4 (OCP Microscaling Formats 1.0, sections 5.3.3 and 5.4.1): four-bit floating-point numbers, 32 of them to a power of two.

use tch::{Kind, Tensor};

use super::nibbles::{self, Group, Rows};
use super::rounding::Rounding;
use crate::ops::cuda;

/// Numbers to an exponent.
pub const BLOCK: i64 = 32;
/// What the 16 codes stand for: a sign, two bits of exponent, one of mantissa.
pub const NUMBERS: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// A weight (out, in) in MXFP4.
#[derive(Debug)]
pub struct Mxfp4 {
    /// The number type it is made whole in: bf16, fp16 or fp32.
    pub kind: Kind,
    /// (out, in / 2) u8, two codes to a byte, the first in the low half.
    pub codes: Tensor,
    /// (out, in / 32) u8: a block's numbers are multiplied with `2^(exponent - 127)`.
    pub exponents: Tensor,
}

impl Mxfp4 {
    /// Another handle to the same tensors.
    pub(super) fn handle(&self) -> Self {
        Self { codes: self.codes.shallow_clone(), exponents: self.exponents.shallow_clone(), ..*self }
    }

    /// (out, in).
    pub fn size(&self) -> Vec<i64> {
        let size = self.codes.size();
        vec![size[0], 2 * size[1]]
    }

    /// The numbers it stands for, in its shape and kind.
    pub fn dequantised(&self) -> Tensor {
        if let Some(whole) = cuda::mxfp4_dequantise(&self.codes, &self.exponents, self.kind) {
            return whole;
        }
        if !nibbles::serves(self.codes.device(), self.kind) {
            return self.dequantised_plainly();
        }
        let exponents = crate::torch_ext::elements::<u8>(&self.exponents);
        let blocks = self.exponents.size()[1] as usize;
        let rows = Rows {
            codes: &self.codes,
            columns: 2 * self.codes.size()[1] as usize,
            wide: BLOCK as usize,
            values: &NUMBERS,
            rounding: Rounding::None,
            kind: self.kind,
        };
        nibbles::dequantise(&rows, |row, k| Group { scale: power(exponents[row * blocks + k]), zero: 0.0 })
    }

    /// [`Mxfp4::dequantised`] in libtorch's own operations, for every device.
    fn dequantised_plainly(&self) -> Tensor {
        let device = self.codes.device();
        let four = Tensor::from(4).to_kind(Kind::Uint8).to_device(device);
        let halves = Tensor::stack(&[self.codes.bitwise_and(15), self.codes.bitwise_right_shift(&four)], -1);
        let numbers = Tensor::from_slice(&NUMBERS).to_device(device);
        let numbers = numbers.index_select(0, &halves.view([-1]).to_kind(Kind::Int)).view([-1, BLOCK]);
        let powers: Vec<f32> = (0..=u8::MAX).map(power).collect();
        let powers = Tensor::from_slice(&powers).to_device(device);
        let scales = powers.index_select(0, &self.exponents.view([-1]).to_kind(Kind::Int)).unsqueeze(1); // (blocks, 1)
        (numbers * scales).to_kind(self.kind).view(&self.size()[..])
    }
}

/// `2^(exponent - 127)`; the largest exponent stands for no number.
pub fn power(exponent: u8) -> f32 {
    match exponent {
        0 => f32::from_bits(1 << 22), // 2^-127 is subnormal
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(exponent) << 23),
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::super::four_bit::assert_same;
    use super::*;
    use crate::ops::cuda::emulator::on_gpus;

    #[test]
    fn the_kernels_equal_their_twin_on_every_code_and_exponent() {
        tch::manual_seed(4);
        for (rows, blocks) in [(1, 1), (254, 1), (3, 7), (65, 33)] {
            let codes = Tensor::randint(256, [rows, blocks * BLOCK / 2], (Kind::Uint8, Device::Cpu));
            let exponents = Tensor::arange(rows * blocks, (Kind::Int64, Device::Cpu)).remainder(255);
            let exponents = exponents.to_kind(Kind::Uint8).view([rows, blocks]);
            for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
                let weight = Mxfp4 { kind, codes: codes.shallow_clone(), exponents: exponents.shallow_clone() };
                let expected = weight.dequantised();
                assert_same(&expected, &weight.dequantised_plainly(), &format!("{rows} {blocks} {kind:?}"));
                on_gpus(|device| {
                    let [codes, exponents] = [&weight.codes, &weight.exponents].map(|part| part.to_device(device));
                    let found = cuda::mxfp4_dequantise(&codes, &exponents, kind).expect("served");
                    assert_same(&found, &expected, &format!("{rows} {blocks} {kind:?} on {device:?}"));
                });
            }
        }
    }
}
