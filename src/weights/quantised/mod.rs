//! Quantised weights as models are published with them (`quantization_config`): a tensor and its scales become one tensor of plain
//! numbers, under its own name.

pub(super) mod bitsandbytes;
pub(super) mod fp8;
pub(super) mod mxfp4;

use std::fs::File;
use std::path::PathBuf;

use serde_json::Value;

use super::Stored;
use crate::{Error, Fault, Result};

/// An error where `config` (of a model) asks for a quantisation that is not read.
pub(crate) fn prove_readable(config: &Value) -> Result<()> {
    let Some((place, found)) = quantisation(config) else { return Ok(()) };
    if matches!(method(found), Some(fp8::METHOD | mxfp4::METHOD | bitsandbytes::METHOD)) {
        return Ok(());
    }
    let what = match found.get("quant_method").and_then(Value::as_str) {
        Some(method) => format!("a base quantised by {method:?} is not supported"),
        None => "missing, so there is no telling how the base is quantised".to_string(),
    };
    let hint = format!(
        "supported: {} (F8_E4M3 or F8_E5M2), {}, {}; or name the model's unquantised version",
        fp8::METHOD,
        mxfp4::METHOD,
        bitsandbytes::METHOD
    );
    Err(Error::Model(Fault::new(format!("config.json: {place}.quant_method"), what).hint(hint)))
}

/// Puts quantised weights and their scales together, where `config` says that there are such; other models are left as they are.
///
/// Errors: what [`bitsandbytes::pair`], [`fp8::pair`], [`mxfp4::pair_rows`] and [`mxfp4::pair`] find wrong.
pub(super) fn pair(
    config: &Value,
    (files, opened): (&[PathBuf], &[File]),
    tensors: Vec<Stored>,
    notices: &mut Vec<String>,
) -> Result<Vec<Stored>> {
    let tensors = bitsandbytes::pair(config, (files, opened), tensors, notices)?;
    let tensors = fp8::pair(config, files, tensors, notices)?;
    let tensors = mxfp4::pair_rows(config, files, tensors, notices)?;
    mxfp4::pair(config, files, tensors, notices)
}

/// `quantization_config` of a model or of its text part, with where it is.
fn quantisation(config: &Value) -> Option<(&'static str, &Value)> {
    let own = config.get("quantization_config").map(|found| ("quantization_config", found));
    let text = || Some(("text_config.quantization_config", config.get("text_config")?.get("quantization_config")?));
    own.filter(|(_, found)| !found.is_null()).or_else(|| text().filter(|(_, found)| !found.is_null()))
}

fn method(quantisation: &Value) -> Option<&str> {
    quantisation.get("quant_method").and_then(Value::as_str)
}

/// `2^(exponent - 127)`; the largest exponent stands for no number.
fn power(exponent: u8) -> f32 {
    match exponent {
        0 => f32::from_bits(1 << 22), // 2^-127 is subnormal
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(exponent) << 23),
    }
}
