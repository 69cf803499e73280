//! Numbers into the block formats of ggml: what a model in GGUF is quantised to.
//!
//! Codes and scales are those of `quantize_row_*_ref` of `ggml-quants.c` (<https://github.com/ggml-org/ggml>), every product and sum
//! rounded by itself and in its order. That code looks at one part of a block after the other; here sixteen parts lie side by side,
//! each doing what it would do alone, so that a processor does sixteen at a time.

mod by_range;
mod k;

use half::f16;
use tch::Kind;

pub(crate) use by_range::{q4_0, q4_1, q5_0, q5_1, q8_0};
pub(crate) use k::{q4_k, q5_k, q6_k};

use crate::weights::storage::{self, PIECE};

/// Turns numbers, whole blocks of them, into bytes.
pub(crate) type Quantise = fn(&[f32], &mut [u8]);

/// Parts of blocks that are looked at side by side.
const LANES: usize = 16;

/// A number of each part.
type Lanes = [f32; LANES];

/// Applies `quantise` to each `VALUES` numbers and their block of `BYTES` bytes.
#[inline(always)]
fn each<const VALUES: usize, const BYTES: usize>(
    numbers: &[f32],
    bytes: &mut [u8],
    quantise: impl Fn(&[f32; VALUES], &mut [u8; BYTES]),
) {
    for (numbers, block) in numbers.as_chunks::<VALUES>().0.iter().zip(bytes.as_chunks_mut::<BYTES>().0) {
        quantise(numbers, block);
    }
}

/// Writes a half-precision scale.
#[inline(always)]
fn put_half(block: &mut [u8], at: usize, number: f32) {
    block[at..at + 2].copy_from_slice(&f16::from_f32(number).to_le_bytes());
}

/// `1 / d`, or 0 of 0.
#[inline(always)]
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// As they are.
pub(crate) fn f32s(numbers: &[f32], bytes: &mut [u8]) {
    rounded(Kind::Float, numbers, bytes);
}

/// The nearest halves.
pub(crate) fn f16s(numbers: &[f32], bytes: &mut [u8]) {
    rounded(Kind::Half, numbers, bytes);
}

/// The nearest bf16.
pub(crate) fn bf16s(numbers: &[f32], bytes: &mut [u8]) {
    rounded(Kind::BFloat16, numbers, bytes);
}

fn rounded(kind: Kind, numbers: &[f32], bytes: &mut [u8]) {
    let size = kind.elt_size_in_bytes();
    for (numbers, bytes) in numbers.chunks(PIECE).zip(bytes.chunks_mut(PIECE * size)) {
        storage::round(kind, numbers, bytes);
    }
}

/// The nearest whole number, of two the even one, of one of a magnitude below 2^22.
#[inline(always)]
fn nearest(x: f32) -> i32 {
    ((x + 12_582_912.0).to_bits() & 0x7f_ffff) as i32 - 0x40_0000
}

/// A number of each lane, by a function of the lane.
#[inline(always)]
fn lanes(of: impl Fn(usize) -> f32) -> Lanes {
    std::array::from_fn(of)
}

#[cfg(test)]
mod tests {
    use super::super::Quantisation;

    /// `tests/fixtures/gguf_encoded.safetensors` holds varied numbers and what `quantize_row_*_ref` of ggml makes of them;
    /// `tests/python/gguf_encoded.py` writes it.
    #[test]
    fn every_format_equals_ggml_byte_for_byte() {
        let fixture = include_bytes!("../../../../tests/fixtures/gguf_encoded.safetensors");
        let fixture = safetensors::SafeTensors::deserialize(fixture).unwrap();
        let numbers = fixture.tensor("numbers").unwrap();
        let numbers: Vec<f32> = numbers.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let mut compared = 0;
        for format in Quantisation::ALL {
            let (Some(quantise), true) = (format.quantise, format.values > 1) else { continue };
            let expected = fixture.tensor(format.name).unwrap();
            let mut bytes = vec![0xa5; numbers.len() / format.values * format.bytes];
            quantise(&numbers, &mut bytes);
            for (block, (ours, theirs)) in
                bytes.chunks(format.bytes).zip(expected.data().chunks(format.bytes)).enumerate()
            {
                assert_eq!(ours, theirs, "{} block {block}: {:?}", format.name, &numbers[block * format.values..][..4]);
            }
            assert_eq!(bytes.len(), expected.data().len());
            // An odd number of blocks, of which some are looked at in pairs.
            let one = &mut bytes[..format.bytes];
            quantise(&numbers[..format.values], one);
            assert_eq!(one, &expected.data()[..format.bytes], "{}", format.name);
            compared += 1;
        }
        assert_eq!(compared, 8);
    }
}
