//! Weights in MXFP4, as gpt-oss and DeepSeek V4 are published.
//!
//! `quantization_config {"quant_method": "mxfp4"}`: `X_blocks` (E, out, in / 32, 16), u8, holds two numbers to a byte, the low half
//! first, and `X_scales` (E, out, in / 32), u8, an exponent for each 32: a number is `fp4 * 2^(scale - 127)` (OCP Microscaling
//! Formats 1.0, sections 5.3.3 and 5.4.1). Together they are shown as `X` (E, in, out), the layout of the model without them.
//!
//! Among fp8 weights, `X.weight` (out, in / 2), i8, holds two numbers to a byte in the same way, and `X.scale` (out, in / 32), F8_E8M0, the
//! exponents. They are shown as `X.weight` (out, in).

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use rayon::prelude::*;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::{fp8, method, quantisation};
use crate::quant::mxfp4::BLOCK;
use crate::quant::{Mxfp4, Quantised};
use crate::weights::storage::{self, Source};
use crate::weights::{Form, Stored};
use crate::{Error, Fault, Result};

/// Its `quant_method`.
pub(super) const METHOD: &str = "mxfp4";

const BLOCKS: &str = "_blocks";
const SCALES: &str = "_scales";
/// How the format calls scales that are exponents alone.
const EXPONENTS: &str = "F8_E8M0";
/// Bytes per positioned read.
const CHUNK: usize = 1 << 20;

/// Where the scales of a weight are.
#[derive(Debug)]
pub(in crate::weights) struct Scales {
    /// Their name in the file.
    pub name: String,
    /// Index into the checkpoint's files.
    pub file: usize,
    /// First byte in the file.
    pub offset: u64,
    /// Whether what is shown is (E, in, out) of blocks (E, out, in), rather than as it is stored.
    pub transposed: bool,
}

/// Puts blocks and their scales together, where `config` says that there are such.
///
/// Errors: blocks without scales or scales without blocks; shapes that are none of MXFP4, or do not fit each other.
pub(super) fn pair(
    config: &Value,
    files: &[PathBuf],
    tensors: Vec<Stored>,
    notices: &mut Vec<String>,
) -> Result<Vec<Stored>> {
    if quantisation(config).is_none_or(|(_, found)| method(found) != Some(METHOD)) {
        return Ok(tensors);
    }
    let fault = |tensor: &Stored, what: String| {
        let place = format!("{}: {}", files[tensor.file].display(), tensor.stored_name);
        let hint = "is the download complete? fetch the model again, or name its unquantised version";
        Err(Error::Model(Fault::new(place, what).hint(hint)))
    };
    let by_name: HashMap<&str, &Stored> = tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
    if by_name.len() < tensors.len() {
        return Ok(tensors); // a tensor that is there twice: refused when the checkpoint is put together
    }
    let mut scales: HashMap<String, Scales> = HashMap::new();
    let mut taken: HashSet<String> = HashSet::new();
    for tensor in &tensors {
        if let Some(name) = tensor.name.strip_suffix(SCALES)
            && !by_name.contains_key(format!("{name}{BLOCKS}").as_str())
        {
            return fault(tensor, format!("the blocks it scales, {name}{BLOCKS}, are missing"));
        }
        let Some(name) = tensor.name.strip_suffix(BLOCKS) else { continue };
        let Some(own) = by_name.get(format!("{name}{SCALES}").as_str()) else {
            return fault(tensor, format!("its scales, {name}{SCALES}, are missing"));
        };
        let bytes = |tensor: &Stored| matches!(tensor.form, Form::Plain(dtype) if dtype.kind == Some(Kind::Uint8));
        let [experts, rows, blocks, half] = tensor.shape[..] else {
            return fault(tensor, format!("is {:?}; (experts, out, in / {BLOCK}, 16) expected", tensor.shape));
        };
        if half != BLOCK / 2 || !bytes(tensor) || !bytes(own) {
            return fault(tensor, format!("is {:?}; (experts, out, in / {BLOCK}, 16) of U8 expected", tensor.shape));
        }
        if own.shape != [experts, rows, blocks] {
            let what =
                format!("is {:?} for blocks of {:?}; {:?} expected", own.shape, tensor.shape, &tensor.shape[..3]);
            return fault(own, what);
        }
        if by_name.contains_key(name) {
            return fault(tensor, format!("{name} is there as plain numbers, too"));
        }
        taken.insert(own.name.clone());
        let own = Scales { name: own.stored_name.clone(), file: own.file, offset: own.offset, transposed: true };
        scales.insert(tensor.name.clone(), own);
    }
    notices.extend(notice(scales.len()));
    let shown = tensors.into_iter().filter(|tensor| !taken.contains(&tensor.name)).map(|mut tensor| {
        if let Some(scales) = scales.remove(&tensor.name) {
            let [experts, rows, blocks, _] = tensor.shape[..] else { unreachable!("checked above") };
            tensor.name.truncate(tensor.name.len() - BLOCKS.len());
            tensor.shape = vec![experts, blocks * BLOCK, rows];
            tensor.form = Form::Mxfp4(scales);
        }
        tensor
    });
    Ok(shown.collect())
}

fn notice(weights: usize) -> Option<String> {
    let what = "`adapter.method: qlora` keeps them so, another method reads them as plain numbers, and a merged model is written in those";
    (weights > 0).then(|| format!("the base holds weights in MXFP4 ({weights}): {what}"))
}

/// Puts rows of two numbers to a byte and their scales together, where `config` says that the model is in fp8.
///
/// Errors: rows and scales that do not fit each other.
pub(super) fn pair_rows(
    config: &Value,
    files: &[PathBuf],
    tensors: Vec<Stored>,
    notices: &mut Vec<String>,
) -> Result<Vec<Stored>> {
    if quantisation(config).is_none_or(|(_, found)| method(found) != Some(fp8::METHOD)) {
        return Ok(tensors);
    }
    let exponents: HashMap<&str, &Stored> = tensors
        .iter()
        .filter(|tensor| matches!(tensor.form, Form::Plain(dtype) if dtype.name == EXPONENTS))
        .map(|tensor| (tensor.name.as_str(), tensor))
        .collect();
    let mut scales: HashMap<String, Scales> = HashMap::new();
    let mut taken: HashSet<String> = HashSet::new();
    for tensor in &tensors {
        let Some(module) = tensor.name.strip_suffix(".weight") else { continue };
        let bytes = matches!(tensor.form, Form::Plain(dtype) if matches!(dtype.kind, Some(Kind::Int8 | Kind::Uint8)));
        let Some(own) = exponents.get(format!("{module}.scale").as_str()).filter(|_| bytes) else { continue };
        let expected = match tensor.shape[..] {
            [rows, half] if half * 2 % BLOCK == 0 => vec![rows, half * 2 / BLOCK],
            _ => Vec::new(),
        };
        if own.shape != expected {
            let place = format!("{}: {}", files[own.file].display(), own.stored_name);
            let what = format!(
                "is {:?} for a weight of {:?}; a scale for {BLOCK} numbers, two to a byte, expected",
                own.shape, tensor.shape
            );
            let hint = "is the download complete? fetch the model again, or name its unquantised version";
            return Err(Error::Model(Fault::new(place, what).hint(hint)));
        }
        taken.insert(own.name.clone());
        let own = Scales { name: own.stored_name.clone(), file: own.file, offset: own.offset, transposed: false };
        scales.insert(tensor.name.clone(), own);
    }
    notices.extend(notice(scales.len()));
    let shown = tensors.into_iter().filter(|tensor| !taken.contains(&tensor.name)).map(|mut tensor| {
        if let Some(scales) = scales.remove(&tensor.name) {
            tensor.shape[1] *= 2;
            tensor.form = Form::Mxfp4(scales);
        }
        tensor
    });
    Ok(shown.collect())
}

impl Scales {
    /// Reads blocks and these scales, shown as `shape`, (E, in, out) or (out, in), for products: (E, out, in) or (out, in). It is made
    /// whole in `kind`.
    pub(in crate::weights) fn read(
        &self,
        blocks: Source,
        scales: Source,
        shape: &[i64],
        (kind, device): (Kind, Device),
    ) -> Result<Quantised> {
        let (experts, rows, columns) = match *shape {
            [experts, columns, rows] if self.transposed => (experts, rows, columns),
            [rows, columns] => (1, rows, columns),
            _ => unreachable!("shapes were proved"),
        };
        let bytes = |source: Source, shape: &[i64]| {
            let mut tensor = storage::allocate(shape, Kind::Uint8)?;
            let chunks = storage::bytes_mut(&mut tensor).par_chunks_mut(CHUNK).enumerate();
            chunks.into_par_iter().try_for_each(|(chunk, bytes)| source.read(bytes, (chunk * CHUNK) as u64))?;
            Ok::<Tensor, Error>(tensor)
        };
        let exponents = bytes(scales, &[experts, rows, columns / BLOCK])?;
        // The largest exponent stands for no number.
        scales
            .finite(storage::bytes(&exponents).iter().filter(|exponent| **exponent == u8::MAX).count(), Kind::Float)?;
        let codes = storage::place(bytes(blocks, &[experts, rows, columns / 2])?, device)?;
        let exponents = storage::place(exponents, device)?;
        let one = |codes: Tensor, exponents: Tensor| Quantised::Mxfp4(Mxfp4 { kind, codes, exponents });
        Ok(match shape.len() {
            2 => one(codes.select(0, 0), exponents.select(0, 0)),
            _ => Quantised::Experts(
                codes.unbind(0).into_iter().zip(exponents.unbind(0)).map(|(c, e)| one(c, e)).collect(),
            ),
        })
    }
}

#[cfg(test)]
mod tests;
