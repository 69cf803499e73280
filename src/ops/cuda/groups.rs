//! Codes in groups made whole, by `groups.cu`. Shapes and meanings are those of `quant::grouped` and `quant::mxfp4`, whose twins they equal
//! bit for bit.

use tch::{Kind, Tensor};

use super::launch::{Argument, blocks_of, launch};
use super::{holds, known, number_of, words_of};

/// Numbers that a thread makes: `EIGHT` of `groups.cu`.
const EIGHT: i64 = 8;
/// Numbers to an exponent of MXFP4.
const MXFP4_BLOCK: i64 = 32;

/// Whole numbers in groups.
pub(crate) struct Groups<'a> {
    /// (rows, bytes of a row) u8.
    pub codes: &'a Tensor,
    /// Columns of the matrix, and bits of a code.
    pub columns: i64,
    /// Of a code.
    pub bits: u32,
    /// Columns to a group, where `order` does not say it.
    pub wide: i64,
    /// (rows, groups).
    pub scales: &'a Tensor,
    /// (rows, groups) u8; without them the middle of the range stands for zero.
    pub zeros: Option<&'a Tensor>,
    /// (columns) i32.
    pub order: Option<&'a Tensor>,
}

/// `(code - zero) * scale` (rows, columns) of a kind, rounded to the scales' type first; nothing where there is no kernel for these
/// tensors.
pub(crate) fn grouped(groups: &Groups<'_>, kind: Kind) -> Option<Tensor> {
    let Groups { codes, columns, bits, wide, scales, zeros, order } = *groups;
    let own_kind = scales.kind();
    let scales = scales.to_kind(Kind::Float);
    let all: Vec<&Tensor> = [codes, &scales].into_iter().chain(zeros).chain(order).collect();
    if !known(kind) || !known(own_kind) || !holds(&all) {
        return None;
    }
    let (rows, stride) = codes.size2().expect("(rows, bytes of a row)");
    let across = scales.size()[1];
    assert!(codes.kind() == Kind::Uint8 && stride * 8 >= columns * i64::from(bits), "so many bits of each number");
    assert!(order.is_some() || across * wide >= columns, "a scale of each group");
    assert!(
        zeros.is_none_or(|zeros| zeros.kind() == Kind::Uint8 && zeros.size() == scales.size()),
        "a zero of each group"
    );
    assert!(order.is_none_or(|order| order.kind() == Kind::Int && order.size() == [columns]), "a group of each column");
    let out = Tensor::empty([rows, columns], (kind, codes.device()));
    let middle = (1u32 << (bits - 1)) as f32;
    let mut words = words_of([wide, across]);
    words.push(middle.to_bits());
    words.extend(words_of([number_of(Some(own_kind))]));
    let arguments = [
        codes.into(),
        (&scales).into(),
        zeros.into(),
        order.into(),
        (&out).into(),
        Argument::Words(words_of([rows, columns, stride, i64::from(bits)])),
        Argument::Words(words),
    ];
    // SAFETY: what `grouped_dequantise` takes; sizes as just asserted, groups of `order` by whoever read it.
    unsafe { launch(codes.device(), "grouped_dequantise", kind, blocks_of(threads(rows, columns)), &arguments) };
    Some(out)
}

/// The number of e2m1 times `2^(exponent - 127)`, (rows, columns) of a kind, of codes (rows, columns / 2) u8 and exponents (rows, columns / 32) u8;
/// nothing where there is no kernel for these tensors.
pub(crate) fn mxfp4(codes: &Tensor, exponents: &Tensor, kind: Kind) -> Option<Tensor> {
    if !known(kind) || !holds(&[codes, exponents]) {
        return None;
    }
    let (rows, stride) = codes.size2().expect("(rows, columns / 2)");
    let columns = 2 * stride;
    assert!(codes.kind() == Kind::Uint8 && exponents.kind() == Kind::Uint8, "types of codes and exponents");
    assert_eq!(exponents.size(), [rows, columns / MXFP4_BLOCK], "an exponent of each block");
    let out = Tensor::empty([rows, columns], (kind, codes.device()));
    let arguments =
        [codes.into(), exponents.into(), (&out).into(), Argument::Words(words_of([rows, columns, stride, 4]))];
    // SAFETY: what `mxfp4_dequantise` takes; sizes as just asserted.
    unsafe { launch(codes.device(), "mxfp4_dequantise", kind, blocks_of(threads(rows, columns)), &arguments) };
    Some(out)
}

fn threads(rows: i64, columns: i64) -> i64 {
    rows * ((columns + EIGHT - 1) / EIGHT)
}
