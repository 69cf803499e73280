//! Whole numbers of two to eight bits in groups with a scale, and where it is not the middle of the range a zero, of their own: GPTQ
//! (arXiv:2210.17323), AWQ (arXiv:2306.00978), and the integers of compressed-tensors.
//!
//! ```text
//! W[o, i] = (code[o, i] - zero[o, g(i)]) * scale[o, g(i)]      rounded to the scale's number type, then to that of the product
//! g(i)    = i / group, or what a table says (the columns were quantised in another order: GPTQ's `desc_act`)
//! ```
//!
//! Files lay codes out for the kernels they were made for; here a row's codes follow one another from the lowest bit of its first byte
//! on, whatever the file had.

mod kernels;
#[cfg(test)]
mod tests;

use tch::{Kind, Tensor};

use super::nibbles;
use super::rounding::Rounding;
use crate::ops::cuda;

/// Bits that a code may have.
pub const BITS: [u32; 4] = [2, 3, 4, 8];

/// A weight (out, in) of whole numbers in groups.
#[derive(Debug)]
pub struct Grouped {
    /// Of the weight (out, in): in.
    pub columns: i64,
    /// Of a code, one of [`BITS`].
    pub bits: u32,
    /// Columns that share a scale; the last group may have fewer.
    pub group: i64,
    /// The number type it is made whole in: bf16, fp16 or fp32.
    pub kind: Kind,
    /// (out, bytes of a row) u8: codes from 0 on, the first in the lowest bits; behind a row's last code there may be bytes that say
    /// nothing.
    pub codes: Tensor,
    /// (out, groups) in the number type that products are rounded to.
    pub scales: Tensor,
    /// (out, groups) u8, the codes that stand for zero; `None` where all are the middle of the range, `2^(bits - 1)`.
    pub zeros: Option<Tensor>,
    /// (in) i32: the group of each column, where it is not `i / group`.
    pub order: Option<Tensor>,
}

impl Grouped {
    /// Another handle to the same tensors.
    pub(super) fn handle(&self) -> Self {
        let Self { columns, bits, group, kind, codes, scales, zeros, order } = self;
        Self {
            columns: *columns,
            bits: *bits,
            group: *group,
            kind: *kind,
            codes: codes.shallow_clone(),
            scales: scales.shallow_clone(),
            zeros: zeros.as_ref().map(Tensor::shallow_clone),
            order: order.as_ref().map(Tensor::shallow_clone),
        }
    }

    /// (out, in).
    pub fn size(&self) -> [i64; 2] {
        [self.codes.size()[0], self.columns]
    }

    /// The numbers it stands for, in its shape and kind.
    pub fn dequantised(&self) -> Tensor {
        match cuda::grouped_dequantise(&self.groups(), self.kind) {
            Some(whole) => whole,
            None if nibbles::serves(self.codes.device(), self.kind) => kernels::dequantise(self),
            None => self.dequantised_plainly(),
        }
    }

    fn groups(&self) -> cuda::Groups<'_> {
        let Self { columns, bits, group, codes, scales, .. } = self;
        cuda::Groups {
            codes,
            columns: *columns,
            bits: *bits,
            wide: *group,
            scales,
            zeros: self.zeros.as_ref(),
            order: self.order.as_ref(),
        }
    }

    /// The code that stands for zero where no tensor says it.
    fn middle(&self) -> u8 {
        1 << (self.bits - 1)
    }

    /// [`Grouped::dequantised`] in libtorch's own operations, for every device.
    fn dequantised_plainly(&self) -> Tensor {
        let [rows, columns] = self.size();
        let device = self.codes.device();
        let codes = plain_codes(&self.codes, self.bits, columns); // (out, in)
        let of_column = match &self.order {
            Some(order) => order.to_kind(Kind::Int64),
            None => Tensor::arange(columns, (Kind::Int64, device)).divide_scalar_mode(self.group, "floor"),
        };
        let scales = self.scales.to_kind(Kind::Float).index_select(1, &of_column); // (out, in)
        let centred = match &self.zeros {
            Some(zeros) => codes - zeros.to_kind(Kind::Float).index_select(1, &of_column),
            None => codes - f64::from(self.middle()),
        };
        Rounding::to(self.scales.kind()).apply(centred * scales).to_kind(self.kind).view([rows, columns])
    }
}

/// Codes of `bits` bits that lie one behind the other in rows of bytes: (rows, count) fp32, in libtorch's own operations.
pub(crate) fn plain_codes(bytes: &Tensor, bits: u32, count: i64) -> Tensor {
    let device = bytes.device();
    if 8 % bits == 0 {
        let parts: Vec<Tensor> = (0..8 / i64::from(bits))
            .map(|k| {
                bytes.bitwise_right_shift(&Tensor::from(k * i64::from(bits)).to_kind(Kind::Uint8).to_device(device))
            })
            .collect();
        let codes = Tensor::stack(&parts, -1).bitwise_and((1i64 << bits) - 1); // (rows, bytes, codes of a byte)
        return codes.view([bytes.size()[0], -1]).narrow(1, 0, count).to_kind(Kind::Float);
    }
    let first = Tensor::arange(count, (Kind::Int64, device)) * i64::from(bits);
    let byte = first.divide_scalar_mode(8, "floor");
    let shift = first.remainder(8);
    // A code may go on in the next byte; behind the last there is none to go on in.
    let padded = bytes.constant_pad_nd([0, 1]).to_kind(Kind::Int64);
    let low = padded.index_select(1, &byte);
    let high = padded.index_select(1, &(byte + 1)) * 256;
    let codes: Tensor = (low + high).bitwise_right_shift(&shift);
    codes.bitwise_and((1i64 << bits) - 1).to_kind(Kind::Float)
}
