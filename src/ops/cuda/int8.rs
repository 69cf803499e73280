//! Rows of eight-bit integers made whole, by `int8.cu`.

use tch::{Kind, Tensor};

use super::launch::{Argument, blocks_of, launch};
use super::{holds, known, length};

/// `codes * absmax / 127` (rows, width), of a kind, of codes (rows, width) i8 and absmax (rows) fp32; nothing where there is no kernel
/// for these tensors.
pub(crate) fn dequantise(codes: &Tensor, absmax: &Tensor, kind: Kind) -> Option<Tensor> {
    if !known(kind) || !holds(&[codes, absmax]) {
        return None;
    }
    let (rows, width) = codes.size2().expect("(rows, width)");
    assert!(codes.kind() == Kind::Int8 && absmax.kind() == Kind::Float, "types of codes and scales");
    assert_eq!(absmax.numel() as i64, rows, "a scale of each row");
    let out = Tensor::empty([rows, width], (kind, codes.device()));
    let n = rows * width;
    let arguments = [codes.into(), absmax.into(), (&out).into(), Argument::Long(n), Argument::Long(width)];
    let launched = blocks_of((n + length(kind) - 1) / length(kind));
    // SAFETY: what `int8_dequantise` takes; sizes as just asserted.
    unsafe { launch(codes.device(), "int8_dequantise", kind, launched, &arguments) };
    Some(out)
}
