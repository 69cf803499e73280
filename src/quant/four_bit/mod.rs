//! Four bits to a number, in blocks with a scale of their own: bitsandbytes' NF4 and FP4 (QLoRA, arXiv:2305.14314).
//!
//! The numbers of a weight, row after row, are cut into blocks; each is divided by its largest magnitude, and what remains becomes the
//! code of the nearest of sixteen values. With double quantisation those magnitudes, less their mean, are stored in eight bits.
//! Equal to bitsandbytes 0.50.2 on the CPU bit for bit, with one thread where there are more than 32767 blocks: with several, torch sums
//! that many magnitudes in another order there, and their mean may differ in its last bits. (Its CPU kernel for processors with AVX-512
//! takes the scale of another block where a row is a multiple of 16 but not of the block; there, this follows the format.)

mod kernels;
mod mean;
mod scales;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub(super) use tests::assert_same;

use tch::{Device, Kind, Tensor};

use super::FourBitType;
use crate::ops::cuda::{self, FourBitScales};
use crate::torch_ext::elements;

/// Blocks of this many magnitudes share a scale where magnitudes are quantised themselves.
pub const NESTED_BLOCK: i64 = 256;

/// The block sizes that bitsandbytes has.
pub const BLOCKS: [i64; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// A weight of four-bit codes.
#[derive(Debug)]
pub struct FourBit {
    /// What the codes stand for.
    pub code: FourBitType,
    /// Numbers to a block, one of [`BLOCKS`].
    pub block: i64,
    /// Of the weight: (out, in) or (E, out, in).
    pub shape: Vec<i64>,
    /// The number type it was quantised of, which its numbers are rounded to.
    pub stored: Kind,
    /// The number type it is made whole in: bf16, fp16 or fp32.
    pub kind: Kind,
    /// Two codes to a byte, the first in the high half: ((n + 1) / 2) u8.
    pub codes: Tensor,
    /// The largest magnitude of each block.
    pub absmax: Absmax,
}

/// The largest magnitude of each block.
#[derive(Debug)]
pub enum Absmax {
    /// (blocks) fp32.
    Plain(Tensor),
    /// Double quantisation: `map[codes] * absmax + offset`, rounded twice.
    Nested {
        /// (blocks) u8.
        codes: Tensor,
        /// (blocks / 256, rounded up) fp32.
        absmax: Tensor,
        /// Their mean, fp32.
        offset: f32,
        /// What a code stands for: (256) fp32.
        map: Tensor,
    },
}

impl FourBit {
    /// Quantises a weight of bf16, fp16 or fp32 numbers in blocks of `block`.
    pub fn of(weight: &Tensor, code: FourBitType, block: i64, double_quant: bool) -> Self {
        Self::made(weight, quantise(weight, code, block), (code, block, double_quant))
    }

    /// [`FourBit::of`] in libtorch's own operations, for every device.
    pub(super) fn of_plainly(weight: &Tensor, code: FourBitType, block: i64, double_quant: bool) -> Self {
        let flat = weight.contiguous().view([-1]);
        Self::made(weight, quantise_plainly(&flat, code, block), (code, block, double_quant))
    }

    fn made(
        weight: &Tensor,
        (codes, absmax): (Tensor, Tensor),
        (code, block, double_quant): (FourBitType, i64, bool),
    ) -> Self {
        let codes = codes.view([-1]);
        let absmax = if double_quant { Absmax::nested(&absmax) } else { Absmax::Plain(absmax) };
        Self { code, block, shape: weight.size(), stored: weight.kind(), kind: weight.kind(), codes, absmax }
    }

    /// Another handle to the same tensors.
    pub(super) fn handle(&self) -> Self {
        let Self { code, block, shape, stored, kind, codes, absmax } = self;
        let absmax = match absmax {
            Absmax::Plain(absmax) => Absmax::Plain(absmax.shallow_clone()),
            Absmax::Nested { codes, absmax, offset, map } => Absmax::Nested {
                codes: codes.shallow_clone(),
                absmax: absmax.shallow_clone(),
                offset: *offset,
                map: map.shallow_clone(),
            },
        };
        let (codes, shape) = (codes.shallow_clone(), shape.clone());
        Self { code: *code, block: *block, shape, stored: *stored, kind: *kind, codes, absmax }
    }

    /// The numbers it stands for, in its shape and kind.
    pub fn dequantised(&self) -> Tensor {
        if let Some(flat) = self.dequantised_on_cuda() {
            return flat.view(&self.shape[..]).to_kind(self.kind);
        }
        if !kernels::serves(self.codes.device(), self.stored) {
            return self.dequantised_plainly();
        }
        let size = (self.shape.iter().product::<i64>() as usize, self.block as usize);
        let flat = match &self.absmax {
            Absmax::Plain(absmax) => {
                let absmax = elements::<f32>(absmax);
                kernels::dequantise(&self.codes, size, self.code.values(), self.stored, |k| absmax[k])
            }
            Absmax::Nested { codes, absmax, offset, map } => {
                let (codes, absmax, map) = (elements::<u8>(codes), elements::<f32>(absmax), elements::<f32>(map));
                let scale = |k: usize| map[usize::from(codes[k])] * absmax[k / NESTED_BLOCK as usize] + offset;
                kernels::dequantise(&self.codes, size, self.code.values(), self.stored, scale)
            }
        };
        flat.view(&self.shape[..]).to_kind(self.kind)
    }

    /// (n) numbers, where there is a CUDA kernel for them.
    fn dequantised_on_cuda(&self) -> Option<Tensor> {
        let scales = match &self.absmax {
            Absmax::Plain(absmax) => FourBitScales::Plain(absmax),
            Absmax::Nested { codes, absmax, offset, map } => {
                FourBitScales::Nested { codes, absmax, map, offset: *offset }
            }
        };
        let size = (self.shape.iter().product(), self.block);
        cuda::four_bit_dequantise(&self.codes, size, self.code.values(), scales, self.stored)
    }

    /// [`FourBit::dequantised`] in libtorch's own operations, for every device.
    pub(super) fn dequantised_plainly(&self) -> Tensor {
        let codes = self.codes.view([-1]);
        let n: i64 = self.shape.iter().product();
        let halves = Tensor::stack(
            &[codes.bitwise_right_shift(&Tensor::from(4).to_kind(Kind::Uint8)), codes.bitwise_and(15)],
            1,
        );
        let values = Tensor::from_slice(self.code.values()).to_device(codes.device());
        let values = values.index_select(0, &halves.view([-1]).narrow(0, 0, n).to_kind(Kind::Int));
        let scales = self.absmax.plain().repeat_interleave_self_int(self.block, 0, None).narrow(0, 0, n);
        (values * scales).to_kind(self.stored).to_kind(self.kind).view(&self.shape[..])
    }
}

impl Absmax {
    /// Double quantisation of magnitudes (blocks).
    fn nested(absmax: &Tensor) -> Self {
        // Summed in one order wherever they are made: another would be another offset, and other numbers all through the weight.
        let offset = mean::of(elements::<f32>(&absmax.to_device(Device::Cpu)));
        let (codes, nested) = scales::quantise(&(absmax - f64::from(offset)), NESTED_BLOCK);
        let map = Tensor::from_slice(scales::codes()).to_device(absmax.device());
        Self::Nested { codes, absmax: nested, offset, map }
    }

    /// The magnitudes (blocks), fp32.
    pub fn plain(&self) -> Tensor {
        match self {
            Self::Plain(absmax) => absmax.shallow_clone(),
            Self::Nested { codes, absmax, offset, map } => {
                let blocks = codes.numel() as i64;
                let scales = absmax.repeat_interleave_self_int(NESTED_BLOCK, 0, None).narrow(0, 0, blocks);
                map.index_select(0, &codes.to_kind(Kind::Int)) * scales + f64::from(*offset)
            }
        }
    }
}

/// Codes ((n + 1) / 2) and magnitudes (blocks).
fn quantise(weight: &Tensor, code: FourBitType, block: i64) -> (Tensor, Tensor) {
    let flat = weight.contiguous().view([-1]);
    let ladder = code.ladder();
    let ladder = (ladder.first, &ladder.bounds, &ladder.steps);
    if let Some(made) = cuda::four_bit_quantise(&flat, block, ladder, kernels::SMALLEST) {
        return made;
    }
    if kernels::serves(flat.device(), flat.kind()) {
        return kernels::quantise(&flat, block as usize, code);
    }
    quantise_plainly(&flat, code, block)
}

/// [`quantise`] in libtorch's own operations, for every device.
fn quantise_plainly(flat: &Tensor, code: FourBitType, block: i64) -> (Tensor, Tensor) {
    let n = flat.numel() as i64;
    let blocks = (n + block - 1) / block;
    let (whole, cut) = (n / block, n % block);
    let values = flat.to_kind(Kind::Float).constant_pad_nd([0, blocks * block - n]).view([blocks, block]);
    let absmax = values.abs().amax([1], false); // (blocks)
    let smallest = f64::from(kernels::SMALLEST);
    let scaled = &values.narrow(0, 0, whole) * absmax.narrow(0, 0, whole).clamp_min(smallest).reciprocal().unsqueeze(1);
    let (scaled, absmax) = if cut == 0 {
        (scaled, absmax)
    } else {
        // A last block that is cut is divided by its largest, which is never zero, as bitsandbytes has it on the CPU.
        let largest = absmax.narrow(0, whole, 1).clamp_min(smallest);
        let last = values.narrow(0, whole, 1) / &largest;
        (Tensor::cat(&[scaled, last], 0), Tensor::cat(&[absmax.narrow(0, 0, whole), largest], 0))
    };
    let ladder = code.ladder();
    let bounds = Tensor::from_slice(&ladder.bounds).to_device(flat.device());
    let order = Tensor::from_slice(&ladder.order()).to_device(flat.device());
    let rank = scaled.view([-1]).narrow(0, 0, n).constant_pad_nd([0, n % 2]).bucketize(&bounds, true, false);
    let codes = order.index_select(0, &rank).view([-1, 2]);
    let packed = codes.select(1, 0) * 16 + codes.select(1, 1);
    (packed.to_kind(Kind::Uint8), absmax)
}
