//! Weights as compressed-tensors 0.20 stores them, what llm-compressor and vLLM's makers publish.
//!
//! `quantization_config {"quant_method": "compressed-tensors", "format": ..., "config_groups": {"group_0": {"targets": ["Linear"],
//! "weights": {"num_bits", "type", "strategy", "group_size", "block_structure", "symmetric"}}}, "ignore": ["lm_head", "re:..."]}`.
//!
//! - `pack-quantized`: `X.weight_packed` (out, in * bits / 32) I32, codes of a row from the lowest bits on; `X.weight_shape`;
//!   `X.weight_scale` (out, groups); `X.weight_zero_point` (out * bits / 32, groups) I32 where groups have zeros of their own;
//!   `X.weight_g_idx` (in), the groups of columns, in checkpoints of earlier versions.
//! - `int-quantized`, `float-quantized`, `naive-quantized`: `X.weight` in I8 or F8_E4M3, `X.weight_scale` and `X.weight_zero_point`.
//!
//! A scale is that of the weight (`tensor`), a row (`channel`), a group of a row (`group`), or a block (`block`). A number is
//! `(code - zero) * scale`, rounded to the scale's number type. Scales of inputs and of the key-value cache are passed over.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::PathBuf;

use serde_json::Value;

use super::fp8;
use super::grouped::{Lies, Parts, SCALES, WORD};
use super::parts::{All, Part, dtype};
use super::scheme::{Numbers, Scheme, Strategy, Weights};
use super::{method, quantisation};
use crate::Result;
use crate::quant::Layout;
use crate::weights::{Form, Stored};

/// Its `quant_method`.
pub(super) const METHOD: &str = "compressed-tensors";
/// After the name of a module: its codes.
const PACKED: &str = ".weight_packed";
/// After the name of a module: what belongs to its weight.
const OTHERS: [&str; 4] = [".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx"];
/// After the name of a module: what is for servers that quantise inputs, outputs, or the cache.
const OF_INPUTS: [&str; 10] = [
    ".input_scale",
    ".input_zero_point",
    ".output_scale",
    ".output_zero_point",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".k_zero_point",
    ".v_zero_point",
    ".q_zero_point",
];

/// Puts codes and what belongs to them together, where `config` says that there are such.
///
/// Errors: a config that asks for what is not read; a part that is missing, of another type or shape than the codes and the config ask
/// for, or left over; a module that the config leaves out and that is quantised nevertheless.
pub(super) fn pair(
    config: &Value,
    (files, opened): (&[PathBuf], &[File]),
    tensors: Vec<Stored>,
    notices: &mut Vec<String>,
) -> Result<Vec<Stored>> {
    let Some((place, found)) = quantisation(config).filter(|(_, found)| method(found) == Some(METHOD)) else {
        return Ok(tensors);
    };
    let scheme = Scheme::read(place, found)?;
    let Some(all) = All::new((files, opened), &tensors) else { return Ok(tensors) };
    let mut integers: HashMap<String, (Vec<i64>, Parts)> = HashMap::new();
    let mut floats: HashMap<String, fp8::Scales> = HashMap::new();
    let mut taken: HashSet<String> = HashSet::new();
    for tensor in &tensors {
        let packed = tensor.name.strip_suffix(PACKED);
        let kind = dtype(tensor).name;
        let whole = tensor.name.strip_suffix(".weight").filter(|module| {
            let scaled = all.find(&format!("{module}.weight_scale")).is_some();
            scaled || kind == "I8" || kind.starts_with("F8_")
        });
        let Some(module) = packed.or(whole) else { continue };
        let own = scheme.of(module).map_err(|what| all.fault(tensor, what))?;
        match (packed, own.numbers) {
            (Some(_), Numbers::Whole) => {
                if all.find(&format!("{module}.weight")).is_some() {
                    return Err(all.fault(tensor, format!("{module}.weight is there as plain numbers, too")));
                }
                integers.insert(tensor.name.clone(), packed_parts(&all, tensor, module, own)?);
            }
            (None, Numbers::Whole) => {
                integers.insert(tensor.name.clone(), byte_parts(&all, tensor, module, own)?);
            }
            (None, Numbers::Float) => {
                floats.insert(tensor.name.clone(), scales(&all, tensor, module, own)?);
            }
            (Some(_), Numbers::Float) => {
                let what = "is packed, but config.json says of it that it holds floating-point numbers of eight bits";
                return Err(all.fault(tensor, what.into()));
            }
        }
        taken.extend(OTHERS.map(|end| format!("{module}{end}")));
    }
    super::refuse_left_over(&all, &tensors, &taken, &OTHERS, ".weight")?;
    let of_inputs: Vec<String> = tensors
        .iter()
        .filter(|tensor| OF_INPUTS.iter().any(|end| tensor.name.ends_with(end)))
        .map(|tensor| tensor.name.clone())
        .collect();
    super::say_kept(notices, "quantised by compressed-tensors", integers.len() + floats.len());
    if scheme.quantises_inputs || !of_inputs.is_empty() {
        notices.push(
            "the base is meant to be served with quantised inputs or a quantised cache: here they stay as they are"
                .to_string(),
        );
    }
    taken.extend(of_inputs);
    let mut shown = super::shown(tensors, integers, &taken, &HashSet::new(), PACKED);
    for tensor in &mut shown {
        if let (Some(scales), Form::Plain(dtype)) = (floats.remove(&tensor.name), &tensor.form) {
            tensor.form = Form::Scaled(dtype, scales);
        }
    }
    Ok(shown)
}

/// Shape and parts of a weight of packed integers.
fn packed_parts(all: &All, codes: &Stored, module: &str, own: Weights) -> Result<(Vec<i64>, Parts)> {
    let bits = i64::from(own.bits);
    let beside = all.needed(codes, &format!("{module}.weight_shape"))?;
    let said = Part::of(beside);
    let shape = match (dtype(beside).name, &beside.shape[..]) {
        ("I64" | "I32", [2]) => {
            let sizes = said.as_stored(all.files, all.opened)?;
            [sizes.int64_value(&[0]), sizes.int64_value(&[1])]
        }
        (kind, shape) => return Err(all.fault(beside, format!("is {kind} {shape:?}; I64 [2] expected"))),
    };
    let [rows, columns] = shape;
    let words = columns.checked_mul(bits).map(|all| (all + WORD - 1) / WORD);
    if rows < 1
        || columns < 1
        || dtype(codes).name != "I32"
        || words.map(|words| vec![rows, words]) != Some(codes.shape.clone())
    {
        let what = format!(
            "is {} {:?}, but {shape:?} numbers (weight_shape) of {bits} bits are I32 [{rows}, {}]",
            dtype(codes).name,
            codes.shape,
            words.unwrap_or(0)
        );
        return Err(all.fault(codes, what));
    }
    let (group, high, scales) = scale(all, codes, module, own, [rows, columns])?;
    let groups = (columns + group - 1) / group;
    let zeros = match all.find(&format!("{module}.weight_zero_point")) {
        None if own.symmetric => None,
        None => return Err(all.fault(codes, format!("needs {module}.weight_zero_point, which is missing"))),
        Some(found) if dtype(found).name == "I8" => Some(zero_bytes(all, codes, found, &scales)?),
        Some(found) => {
            let (shape, why) = ([(rows * bits + WORD - 1) / WORD, groups], format!("zeros of {rows} rows"));
            Some(all.shaped(codes, &found.name, &["I32"], &shape, &why)?)
        }
    };
    let order = match all.find(&format!("{module}.weight_g_idx")) {
        None if own.ordered => {
            let what = format!("needs {module}.weight_g_idx, which is missing (actorder is \"group\")");
            return Err(all.fault(codes, what));
        }
        None => None,
        Some(found) => Some(all.shaped(codes, &found.name, &["I32", "I64"], &[columns], "the group of each column")?),
    };
    let (layout, codes) = (Layout::CompressedTensors, Part::of(codes));
    Ok((
        shape.to_vec(),
        Parts { layout, lies: Lies::Words { high }, bits: own.bits, group, codes, scales, zeros, order },
    ))
}

/// Shape and parts of a weight of integers, each in a byte.
fn byte_parts(all: &All, codes: &Stored, module: &str, own: Weights) -> Result<(Vec<i64>, Parts)> {
    let shape = matrix(all, codes, "I8")?;
    let (group, high, scales) = scale(all, codes, module, own, shape)?;
    let zeros = match all.find(&format!("{module}.weight_zero_point")) {
        None if own.symmetric => None,
        None => return Err(all.fault(codes, format!("needs {module}.weight_zero_point, which is missing"))),
        Some(found) => Some(zero_bytes(all, codes, found, &scales)?),
    };
    let (layout, codes) = (Layout::CompressedTensors, Part::of(codes));
    let lies = Lies::Bytes { high };
    Ok((shape.to_vec(), Parts { layout, lies, bits: 8, group, codes, scales, zeros, order: None }))
}

/// The scales of a weight of floating-point numbers.
fn scales(all: &All, codes: &Stored, module: &str, own: Weights) -> Result<fp8::Scales> {
    let shape = matrix(all, codes, "F8_E4M3")?;
    let (group, high, scales) = scale(all, codes, module, own, shape)?;
    if let Some(zeros) = all.find(&format!("{module}.weight_zero_point")) {
        let what = "holds zeros of floating-point numbers, which are not supported".to_string();
        let numbers = Part::of(zeros);
        let kind = dtype(zeros).kind.ok_or_else(|| all.fault(zeros, what.clone()))?;
        if numbers.tensor(all.files, all.opened, kind)?.to_kind(tch::Kind::Float).count_nonzero(None).int64_value(&[])
            != 0
        {
            return Err(all.fault(zeros, what));
        }
    }
    Ok(fp8::Scales::beside(scales, [high, group], Layout::CompressedTensors))
}

fn matrix(all: &All, codes: &Stored, expected: &str) -> Result<[i64; 2]> {
    match codes.shape[..] {
        [rows, columns] if dtype(codes).name == expected && rows * columns > 0 => Ok([rows, columns]),
        _ => {
            let what =
                format!("is {} {:?}; {expected} (out, in) expected by config.json", dtype(codes).name, codes.shape);
            Err(all.fault(codes, what))
        }
    }
}

/// Columns and rows to a scale, and the scales.
fn scale(all: &All, codes: &Stored, module: &str, own: Weights, [rows, columns]: [i64; 2]) -> Result<(i64, i64, Part)> {
    let (high, wide) = match own.strategy {
        Strategy::Tensor => (rows, columns),
        Strategy::Channel => (1, columns),
        Strategy::Group(size) => (1, size),
        Strategy::Block([high, wide]) => (high, wide),
    };
    let name = format!("{module}.weight_scale");
    let shape = [(rows + high - 1) / high, (columns + wide - 1) / wide];
    let found = all.needed(codes, &name)?;
    let one = own.strategy == Strategy::Tensor && found.shape.iter().product::<i64>() == 1;
    let shape = if one { found.shape.clone() } else { shape.to_vec() };
    let why = format!("a scale for {high} x {wide} of {rows} x {columns} numbers, by config.json");
    Ok((wide, high, all.shaped(codes, &name, &SCALES, &shape, &why)?))
}

/// Zeros in bytes with a sign, as many as scales.
fn zero_bytes(all: &All, codes: &Stored, found: &Stored, scales: &Part) -> Result<Part> {
    all.shaped(codes, &found.name, &["I8"], &scales.shape, "a zero for each scale")
}

#[cfg(test)]
mod tests;
