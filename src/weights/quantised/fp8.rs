//! Weights in fp8 with their scales beside them, as DeepSeek V3 and Qwen 3's FP8 models are published.
//!
//! `quantization_config {"quant_method": "fp8", "weight_block_size": [128, 128]}`: beside `X.weight` (out, in) in fp8 lies
//! `X.weight_scale_inv` (out / 128, in / 128, rounded up), and element (i, j) stands for
//! `f32(weight[i, j]) * scale_inv[i / 128, j / 128]` (DeepSeek V3's technical report, arXiv:2412.19437, section 3.3, and its
//! `weight_dequant`). Without a block size one scale is that of the whole weight. Experts that are stacked in one tensor `X`
//! (E, out, in) have theirs in `X_scale_inv` (E, out / 128, in / 128); without a block size each expert has one, or one for each
//! of the parts that its rows divide into (gate and up). Scales stored as F8_E8M0, or as its bytes in U8, are exponents:
//! `2^(byte - 127)` (OCP Microscaling Formats 1.0, section 5.4.1). DeepSeek V4 calls the
//! scales of a module's weight `X.scale`. A checkpoint shows the weights alone, under their names.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use regex::Regex;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::parts::Part;
use super::{method, quantisation};
use crate::quant::mxfp4::power;
use crate::quant::{Fp8, Layout, Quantised, Rounding};
use crate::weights::storage::{self, Dtype, Source};
use crate::weights::{Form, Stored};
use crate::{Error, Fault, Result};

/// After the name of a weight: its scales.
const SCALE: &str = "_scale_inv";
/// After the name of a module: the same.
const OF_MODULE: &str = ".scale";
/// Of what goes into a linear, for servers that compute in fp8.
const ACTIVATION_SCALE: &str = ".activation_scale";
/// The same of stacked experts, after the weight's name.
const ACTIVATION_SCALES: &str = "_activation_scale";
/// Types that hold exponents.
const EXPONENTS: [&str; 2] = ["F8_E8M0", "U8"];
/// Its `quant_method`.
pub(super) const METHOD: &str = "fp8";

/// Where the scales of a weight are.
#[derive(Debug)]
pub(in crate::weights) struct Scales {
    pub name: String,
    dtype: &'static Dtype,
    shape: Vec<i64>,
    /// Index into the checkpoint's files.
    pub file: usize,
    /// First byte in the file.
    pub offset: u64,
    /// Rows and columns of a weight (out, in) to a scale.
    block: [i64; 2],
    /// What a product with a scale is rounded to first.
    rounding: Rounding,
    /// Whose they are.
    pub layout: Layout,
}

/// Puts fp8 weights and their scales together, where `config` says that there are such; other models are left as they are.
///
/// Scales without a weight stay tensors of their own, which no model accounts for.
///
/// Errors: a block size that is none; fp8 weights without scales, scales of another shape or beside a weight that is not fp8.
pub(super) fn pair(
    config: &Value,
    files: &[PathBuf],
    tensors: Vec<Stored>,
    notices: &mut Vec<String>,
) -> Result<Vec<Stored>> {
    let Some((place, found)) = quantisation(config).filter(|(_, found)| method(found) == Some(METHOD)) else {
        return Ok(tensors);
    };
    let scheme = Scheme::read(place, found)?;
    let place_of = |tensor: &Stored| format!("{}: {}", files[tensor.file].display(), tensor.stored_name);
    let fault = |tensor: &Stored, what: String, hint: &str| {
        Error::Model(Fault::new(place_of(tensor), what).hint(hint.to_string()))
    };
    let fetch = "is the download complete? fetch the model again, or name its unquantised version";

    let by_name: HashMap<&str, &Stored> = tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
    if by_name.len() < tensors.len() {
        return Ok(tensors); // a tensor that is there twice: refused when the checkpoint is put together
    }
    let mut scales: HashMap<String, Scales> = HashMap::new();
    let mut taken: HashSet<String> = HashSet::new();
    for tensor in &tensors {
        let Some(dtype) = fp8(tensor) else { continue };
        let name = format!("{}{SCALE}", tensor.name);
        let other = tensor.name.strip_suffix(".weight").map(|module| format!("{module}{OF_MODULE}"));
        let found = by_name.get(name.as_str()).or_else(|| by_name.get(other.as_deref()?));
        let Some(scale) = found else {
            if scheme.is_left(tensor.name.trim_end_matches(".weight")) {
                continue;
            }
            let what = format!("is stored as {}, but its scales, {name}, are missing", dtype.name);
            return Err(fault(tensor, what, fetch));
        };
        let Some(block) = scheme.block(&tensor.shape, &scale.shape) else {
            let what = format!(
                "is {:?} for a weight of {:?}; {:?} expected by {place}.weight_block_size",
                scale.shape,
                tensor.shape,
                scheme.scales_of(&tensor.shape)
            );
            return Err(fault(scale, what, fetch));
        };
        let Form::Plain(dtype) = scale.form else { unreachable!("nothing is paired before") };
        let name = scale.name.clone();
        taken.insert(name.clone());
        let (shape, file, offset) = (scale.shape.clone(), scale.file, scale.offset);
        let (rounding, layout) = (Rounding::None, Layout::Fp8);
        let stored = Scales { name, dtype, shape, file, offset, block, rounding, layout };
        scales.insert(tensor.name.clone(), stored);
    }
    for tensor in tensors.iter().filter(|tensor| !taken.contains(&tensor.name)) {
        let weight = tensor.name.strip_suffix(SCALE).and_then(|weight| by_name.get(weight));
        if let Some(weight) = weight {
            let Form::Plain(dtype) = weight.form else { unreachable!("nothing is paired before") };
            let what = format!("holds scales of {}, which is stored as {}, not in fp8", weight.name, dtype.name);
            return Err(fault(tensor, what, "config.json and the weights do not belong together"));
        }
    }

    let quantised = |module: &str| scales.contains_key(&format!("{module}.weight"));
    let of_inputs: HashSet<String> = tensors
        .iter()
        .filter(|tensor| {
            let stacked = tensor.name.strip_suffix(ACTIVATION_SCALES);
            tensor.name.strip_suffix(ACTIVATION_SCALE).is_some_and(quantised)
                || stacked.is_some_and(|weight| scales.contains_key(weight))
        })
        .map(|tensor| tensor.name.clone())
        .collect();
    if !scales.is_empty() {
        notices.push(format!(
            "the base holds weights in fp8 ({}): `adapter.method: qlora` keeps them so, another method reads them as plain numbers, and \
             a merged model is written in those",
            scales.len()
        ));
    }
    if !of_inputs.is_empty() {
        notices.push(format!(
            "the base holds scales of activations ({}): passed over, they are for servers that compute in fp8",
            of_inputs.len()
        ));
    }
    let paired =
        tensors.into_iter().filter(|t| !taken.contains(&t.name) && !of_inputs.contains(&t.name)).map(|mut t| {
            if let (Some(scales), Form::Plain(dtype)) = (scales.remove(&t.name), &t.form) {
                t.form = Form::Scaled(dtype, scales);
            }
            t
        });
    Ok(paired.collect())
}

/// The type of a tensor stored in fp8.
fn fp8(tensor: &Stored) -> Option<&'static Dtype> {
    match tensor.form {
        Form::Plain(dtype) => Some(dtype).filter(|d| matches!(d.kind, Some(Kind::Float8e4m3fn | Kind::Float8e5m2))),
        _ => None,
    }
}

/// What `quantization_config` says.
struct Scheme {
    block: Option<[usize; 2]>,
    /// Modules that were not quantised: the text, and as a regular expression where it is one.
    left: Vec<(String, Option<Regex>)>,
}

impl Scheme {
    fn read(place: &str, found: &Value) -> Result<Self> {
        let wrong = |name: &str, value: &Value, expected: &str| {
            let what = format!("{value} found, {expected} expected");
            Error::Model(Fault::new(format!("config.json: {place}.{name}"), what))
        };
        let block = match found.get("weight_block_size") {
            None => Some([128, 128]),
            Some(Value::Null) => None,
            Some(value) => {
                let sizes: Option<Vec<usize>> = value.as_array().and_then(|list| {
                    list.iter().map(|n| n.as_u64().filter(|n| (1..=1 << 30).contains(n)).map(|n| n as usize)).collect()
                });
                let sizes = sizes.and_then(|sizes| <[usize; 2]>::try_from(sizes).ok());
                Some(sizes.ok_or_else(|| wrong("weight_block_size", value, "two whole numbers from 1 to 2^30"))?)
            }
        };
        let mut left = Vec::new();
        for name in ["modules_to_not_convert", "ignored_layers"] {
            let Some(value) = found.get(name).filter(|value| !value.is_null()) else { continue };
            let names: Option<Vec<&str>> = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
            let names = names.ok_or_else(|| wrong(name, value, "a list of module names"))?;
            left.extend(names.into_iter().map(|name| (name.to_string(), Regex::new(&format!("^(?:{name})")).ok())));
        }
        Ok(Self { block, left })
    }

    /// The shape of the scales of a weight (out, in), or of stacked ones (E, out, in); empty where there is one for all.
    fn scales_of(&self, weight: &[i64]) -> Vec<i64> {
        let (stack, of_one) = weight.split_at(weight.len().saturating_sub(2));
        match self.block {
            None if stack.is_empty() => Vec::new(),
            None => stack.iter().copied().chain([1, 1]).collect(),
            Some(block) => {
                let across = of_one.iter().zip(block).map(|(size, block)| (*size as usize).div_ceil(block) as i64);
                stack.iter().copied().chain(across).collect()
            }
        }
    }

    /// Rows and columns to a scale, where weight and scales go together.
    fn block(&self, weight: &[i64], scales: &[i64]) -> Option<[i64; 2]> {
        let (&[.., rows, columns], 2 | 3) = (weight, weight.len()) else { return None };
        let whole = [rows.max(1), columns.max(1)];
        match (self.block, weight, scales) {
            (Some(block), ..) => (scales == self.scales_of(weight)).then_some(block.map(|size| size as i64)),
            (None, [_, _], _) => scales.iter().all(|n| *n == 1).then_some(whole),
            (None, [experts, ..], &[stack, high, wide]) => {
                let divide = high > 0 && wide > 0 && rows % high == 0 && columns % wide == 0;
                (stack == *experts && divide).then(|| [whole[0] / high, whole[1] / wide])
            }
            (None, ..) => None,
        }
    }

    /// Whether a module was left as it is: named whole, by how its path begins or ends, or by a regular expression for its
    /// beginning, as in `should_convert_module` of transformers 5.17.
    fn is_left(&self, module: &str) -> bool {
        self.left.iter().any(|(text, pattern)| {
            let begins =
                module.strip_prefix(text.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
            begins || module.ends_with(text.as_str()) || pattern.as_ref().is_some_and(|p| p.is_match(module))
        })
    }
}

impl Scales {
    /// Scales of a weight (out, in) that another tool stores beside it: `of` so many rows and columns each.
    pub(super) fn beside(part: Part, of: [i64; 2], layout: Layout) -> Self {
        let Part { name, dtype, shape, file, offset } = part;
        let rounding = dtype.kind.map_or(Rounding::None, Rounding::to);
        Self { name, dtype, shape, file, offset, block: of, rounding, layout }
    }

    /// Reads a `weight` of `shape`, (out, in) or (E, out, in), stored as `dtype`, and its `scales`; it is made whole in `kind`.
    pub(in crate::weights) fn read(
        &self,
        weight: Source,
        dtype: &'static Dtype,
        shape: &[i64],
        scales: Source,
        (kind, device): (Kind, Device),
    ) -> Result<Quantised> {
        let own = dtype.kind.expect("a type that was recognised as fp8");
        let codes = storage::place(storage::read_plain(weight, dtype, shape, own)?, device)?;
        let &[.., rows, columns] = shape else { unreachable!("two or three dimensions were proved") };
        let [high, wide] = self.block;
        let scales = self.factors(scales)?.view([-1, (rows + high - 1) / high, (columns + wide - 1) / wide]);
        let scales = storage::place(scales, device)?;
        let one = |codes: Tensor, scales: Tensor| {
            Quantised::Fp8(Fp8 { kind, rounding: self.rounding, codes, scales, block: self.block, multiplied: false })
        };
        Ok(match shape.len() {
            2 => one(codes, scales.select(0, 0)),
            _ => {
                Quantised::Experts(codes.unbind(0).into_iter().zip(scales.unbind(0)).map(|(c, s)| one(c, s)).collect())
            }
        })
    }

    /// Whether each row of a weight of `shape` has a scale.
    pub(in crate::weights) fn are_of_rows(&self, shape: &[i64]) -> bool {
        self.block[0] == 1 && shape.last().is_some_and(|columns| self.block[1] >= *columns)
    }

    /// How the weight lies, stored as `dtype`: its number type, and rows and columns to a scale.
    pub(in crate::weights) fn layout_of(&self, dtype: &Dtype, shape: &[i64]) -> String {
        let of = match (self.block, shape) {
            _ if self.are_of_rows(shape) => "each row".to_string(),
            ([high, wide], &[.., rows, columns]) if high >= rows && wide >= columns => "the whole weight".to_string(),
            ([high, wide], _) => format!("blocks of {high} x {wide}"),
        };
        format!("{} with scales in {} to {of}", dtype.name, self.dtype.name)
    }

    /// Bytes of the scales as they are kept.
    pub(in crate::weights) fn bytes(&self) -> u64 {
        4 * self.shape.iter().product::<i64>() as u64
    }

    /// The scales as fp32 numbers.
    fn factors(&self, scales: Source) -> Result<Tensor> {
        if !EXPONENTS.contains(&self.dtype.name) {
            return storage::read_plain(scales, self.dtype, &self.shape, Kind::Float);
        }
        let mut exponents = vec![0; self.shape.iter().product::<i64>() as usize];
        scales.read(&mut exponents, 0)?;
        let factors: Vec<f32> = exponents.into_iter().map(power).collect();
        scales.finite(factors.iter().filter(|factor| !factor.is_finite()).count(), Kind::Float)?;
        Ok(Tensor::from_slice(&factors))
    }
}

#[cfg(test)]
mod tests;
