//! Four-bit blocks made whole and made, by `nf4.cu`. Shapes and meanings are those of `quant::four_bit`, whose twins they equal bit for
//! bit.

use tch::{Kind, Tensor};

use super::launch::{Argument, launch};
use super::{THREADS, WARP, holds, known};

/// Numbers that a warp makes whole: `TILE` of `nf4.cu`.
const TILE: i64 = 1024;
/// Numbers that a lane quantises at a time: `EACH` of `nf4.cu`.
const EACH: i64 = 8;

/// The scales of blocks.
pub(crate) enum Scales<'a> {
    /// (blocks) fp32.
    Plain(&'a Tensor),
    /// `map[codes] * absmax + offset`.
    Nested {
        /// (blocks) u8.
        codes: &'a Tensor,
        /// (blocks / 256, rounded up) fp32.
        absmax: &'a Tensor,
        /// (256) fp32.
        map: &'a Tensor,
        /// Added to each.
        offset: f32,
    },
}

/// The (n) numbers, of a kind, that `codes` ((n + 1) / 2) stand for in blocks of `block`; nothing where there is no kernel for these
/// tensors.
pub(crate) fn dequantise(
    codes: &Tensor,
    (n, block): (i64, i64),
    values: &[f32; 16],
    scales: Scales<'_>,
    kind: Kind,
) -> Option<Tensor> {
    let (nested, absmax, map, offset) = match scales {
        Scales::Plain(absmax) => (None, absmax, None, 0.0),
        Scales::Nested { codes, absmax, map, offset } => (Some(codes), absmax, Some(map), offset),
    };
    let all: Vec<&Tensor> = [codes, absmax].into_iter().chain(nested).chain(map).collect();
    if !known(kind) || !holds(&all) {
        return None;
    }
    let blocks = (n + block - 1) / block;
    assert!(block.count_ones() == 1 && block >= WARP, "a block is a power of two and fills a warp");
    assert!(codes.kind() == Kind::Uint8 && codes.numel() as i64 == (n + 1) / 2, "half a byte of each number");
    assert!(nested.unwrap_or(absmax).numel() as i64 == blocks, "a scale of each block");
    assert!(
        absmax.kind() == Kind::Float && nested.is_none_or(|nested| nested.kind() == Kind::Uint8),
        "types of scales"
    );
    let out = Tensor::empty([n], (kind, codes.device()));
    let arguments = [
        codes.into(),
        Argument::Words(values.iter().map(|value| value.to_bits()).collect()),
        absmax.into(),
        nested.into(),
        map.into(),
        Argument::Float(offset),
        (&out).into(),
        Argument::Long(n),
        Argument::Int(block.trailing_zeros() as i32),
    ];
    let a_block_makes = TILE * THREADS / WARP;
    // SAFETY: what `four_bit_dequantise` takes; sizes as just asserted.
    unsafe { launch(codes.device(), "four_bit_dequantise", kind, (n + a_block_makes - 1) / a_block_makes, &arguments) };
    Some(out)
}

/// Codes ((n + 1) / 2) and magnitudes (blocks) of (n) values in blocks of `block`; nothing where there is no kernel for them.
///
/// `ladder` is the first code, 15 bounds and 15 steps; what a block is divided by is at least `smallest`.
pub(crate) fn quantise(
    values: &Tensor,
    block: i64,
    (first, bounds, steps): (u8, &[f32; 15], &[i32; 15]),
    smallest: f32,
) -> Option<(Tensor, Tensor)> {
    let (n, kind, device) = (values.numel() as i64, values.kind(), values.device());
    if !known(kind) || !holds(&[values]) {
        return None;
    }
    assert!(block.count_ones() == 1 && block >= WARP, "a block is a power of two and fills a warp");
    let blocks = (n + block - 1) / block;
    let codes = Tensor::empty([(n + 1) / 2], (Kind::Uint8, device));
    let absmax = Tensor::empty([blocks], (Kind::Float, device));
    let ladder = std::iter::once(u32::from(first))
        .chain(bounds.iter().map(|bound| bound.to_bits()))
        .chain(steps.iter().map(|step| step.cast_unsigned()))
        .chain([smallest.to_bits()]);
    let arguments = [
        values.into(),
        Argument::Words(ladder.collect()),
        Argument::Long(n),
        Argument::Int(block as i32),
        (&codes).into(),
        (&absmax).into(),
    ];
    // Lanes that share a block, and blocks that share a warp.
    let lanes = (block / EACH).min(WARP);
    let of_a_launched_block = WARP / lanes * (THREADS / WARP);
    let launched = (blocks + of_a_launched_block - 1) / of_a_launched_block;
    // SAFETY: what `four_bit_quantise` takes; the outputs were made for it.
    unsafe { launch(device, "four_bit_quantise", kind, launched, &arguments) };
    Some((codes, absmax))
}
