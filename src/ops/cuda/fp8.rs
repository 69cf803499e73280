//! Rows of fp8 numbers made, and matrices of them made whole, by `fp8.cu`. Shapes and meanings are those of `quant::fp8`, whose twins
//! they equal bit for bit.

use tch::{Kind, Tensor};

use super::launch::{Argument, blocks_of, launch};
use super::{THREADS, holds, known, length, number_of, team, words_of};

/// Codes (rows, width) of e4m3fn and scales (rows, 1) fp32 of a matrix (rows, width); nothing where there is no kernel for it.
pub(crate) fn quantise(x: &Tensor) -> Option<(Tensor, Tensor)> {
    if !known(x.kind()) || !holds(&[x]) {
        return None;
    }
    let (rows, width) = x.size2().expect("(rows, width)");
    let team = team(width, x.kind());
    let codes = Tensor::empty([rows, width], (Kind::Float8e4m3fn, x.device()));
    let scales = Tensor::empty([rows, 1], (Kind::Float, x.device()));
    let [width, team_of_threads] = [width, team].map(|size| Argument::Int(i32::try_from(size).expect("a row's width")));
    let arguments = [x.into(), Argument::Long(rows), width, team_of_threads, (&codes).into(), (&scales).into()];
    let of_a_block = THREADS / team;
    // SAFETY: what `fp8_quantise` takes; the outputs were made for it.
    unsafe { launch(x.device(), "fp8_quantise", x.kind(), (rows + of_a_block - 1) / of_a_block, &arguments) };
    Some((codes, scales))
}

/// `code * scale` (rows, columns) of a kind, of codes of e4m3fn or e5m2 (rows, columns) and scales (rows / high, columns / wide), rounded
/// up, fp32; products are rounded to `rounding` first. Nothing where there is no kernel for these tensors.
pub(crate) fn dequantise(
    codes: &Tensor,
    scales: &Tensor,
    [high, wide]: [i64; 2],
    rounding: Option<Kind>,
    kind: Kind,
) -> Option<Tensor> {
    if !known(kind) || !holds(&[codes, scales]) {
        return None;
    }
    let (rows, columns) = codes.size2().expect("(rows, columns)");
    let across = (columns + wide - 1) / wide;
    let exponent = match codes.kind() {
        Kind::Float8e4m3fn => 4,
        Kind::Float8e5m2 => 5,
        _ => return None,
    };
    assert!(
        scales.kind() == Kind::Float && scales.size() == [(rows + high - 1) / high, across],
        "a scale of each block"
    );
    let out = Tensor::empty([rows, columns], (kind, codes.device()));
    let n = rows * columns;
    let blocks = words_of([columns, high, wide, across, exponent, number_of(rounding)]);
    let arguments = [codes.into(), scales.into(), (&out).into(), Argument::Long(n), Argument::Words(blocks)];
    let launched = blocks_of((n + length(kind) - 1) / length(kind));
    // SAFETY: what `fp8_dequantise` takes; sizes as just asserted.
    unsafe { launch(codes.device(), "fp8_dequantise", kind, launched, &arguments) };
    Some(out)
}
