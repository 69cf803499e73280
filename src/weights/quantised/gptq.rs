//! Weights as GPTQ's tools store them (GPTQModel 5, AutoGPTQ 0.7.1).
//!
//! `quantization_config {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false, "checkpoint_format": "gptq"}`. Beside
//! one another lie `X.qweight` (in * bits / 32, out) I32, codes of a column from the lowest bits on; `X.qzeros` (groups, out * bits / 32)
//! I32, the codes that stand for zero, one less each unless the format is `gptq_v2`; `X.scales` (groups, out); and `X.g_idx` (in) I32,
//! the group of each column, which `desc_act` mixes. `dynamic` changes bits, groups and order of modules by regular expressions.
//! A checkpoint shows `X.weight` (out, in). A bias of zeros, which AutoGPTQ adds to linears that have none, is marked as spare.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::PathBuf;

use regex::Regex;
use serde_json::Value;
use tch::Kind;

use super::grouped::{Lies, Parts, SCALES, WORD};
use super::parts::{All, Part, dtype};
use super::{method, quantisation, wrong};
use crate::quant::{Layout, grouped::BITS};
use crate::weights::Stored;
use crate::{Error, Fault, Result};

/// Its `quant_method`.
pub(super) const METHOD: &str = "gptq";
/// After the name of a module: its codes.
const CODES: &str = ".qweight";
const OTHERS: [&str; 3] = [".qzeros", ".scales", ".g_idx"];

/// Puts codes and what belongs to them together, where `config` says that there are such.
///
/// Errors: a config that asks for what is not read; a part that is missing, of another type or shape than the codes and the config ask
/// for, or left over.
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
    let mut forms: HashMap<String, (Vec<i64>, Parts)> = HashMap::new();
    let mut taken: HashSet<String> = HashSet::new();
    let mut spare: HashSet<String> = HashSet::new();
    for tensor in &tensors {
        let Some(module) = tensor.name.strip_suffix(CODES) else { continue };
        if all.find(&format!("{module}.weight")).is_some() {
            return Err(all.fault(tensor, format!("{module}.weight is there as plain numbers, too")));
        }
        forms.insert(tensor.name.clone(), parts(&all, tensor, module, scheme.of(module))?);
        taken.extend(OTHERS.map(|end| format!("{module}{end}")));
        spare.extend(zero_bias(&all, module)?);
    }
    super::refuse_left_over(&all, &tensors, &taken, &OTHERS, CODES)?;
    super::say_kept(notices, "quantised by GPTQ", forms.len());
    Ok(super::shown(tensors, forms, &taken, &spare, CODES))
}

/// How the weights of a module are quantised.
#[derive(Clone, Copy)]
struct Own {
    bits: u32,
    /// -1 for all columns.
    group: i64,
    ordered: bool,
    one_less: bool,
}

/// What `quantization_config` says.
struct Scheme {
    own: Own,
    /// What is said of modules whose path begins so.
    dynamic: Vec<(Regex, Own)>,
}

impl Scheme {
    fn read(place: &str, found: &Value) -> Result<Self> {
        let format = ["checkpoint_format", "format"].iter().find_map(|name| Some((*name, found.get(name)?)));
        let one_less = match format.and_then(|(_, format)| format.as_str()) {
            Some("gptq") => true,
            None if format.is_none_or(|(_, format)| format.is_null()) => true,
            Some("gptq_v2") => false,
            _ => {
                let (name, format) = format.expect("matched above where there is none");
                return Err(wrong(place, name, format, "\"gptq\" or \"gptq_v2\""));
            }
        };
        if let Some(marlin) = found.get("is_marlin_format").filter(|said| said.as_bool() == Some(true)) {
            return Err(wrong(place, "is_marlin_format", marlin, "false"));
        }
        let own = Own { bits: 0, group: 128, ordered: false, one_less }.with(place, found, true)?;
        let mut dynamic = Vec::new();
        for (rule, change) in found.get("dynamic").and_then(Value::as_object).into_iter().flatten() {
            // What begins with `-:` is not quantised, which the tensors say as well.
            if rule.starts_with("-:") {
                continue;
            }
            let inner = format!("{place}.dynamic.{rule}");
            let text = rule.strip_prefix("+:").unwrap_or(rule);
            let pattern = Regex::new(&format!("^(?:{text})")).map_err(|error| {
                let what = format!("is no regular expression that is understood here: {error}");
                Error::Model(Fault::new(format!("config.json: {inner}"), what))
            })?;
            dynamic.push((pattern, own.with(&inner, change, false)?));
        }
        Ok(Self { own, dynamic })
    }

    fn of(&self, module: &str) -> Own {
        self.dynamic.iter().find(|(pattern, _)| pattern.is_match(module)).map_or(self.own, |(_, own)| *own)
    }
}

impl Own {
    /// This, with what `found` says otherwise.
    fn with(self, place: &str, found: &Value, needs_bits: bool) -> Result<Self> {
        let said = |name: &str| found.get(name).filter(|value| !value.is_null());
        let bits = match said("bits") {
            None if !needs_bits => self.bits,
            bits => bits
                .and_then(Value::as_u64)
                .and_then(|bits| BITS.into_iter().find(|known| u64::from(*known) == bits))
                .ok_or_else(|| wrong(place, "bits", bits.unwrap_or(&Value::Null), "2, 3, 4 or 8"))?,
        };
        let group = super::group_size(place, said("group_size").map(|size| ("group_size", size)), self.group)?;
        let ordered = match said("desc_act") {
            None => self.ordered,
            Some(value) => value.as_bool().ok_or_else(|| wrong(place, "desc_act", value, "true or false"))?,
        };
        Ok(Self { bits, group, ordered, ..self })
    }
}

/// Shape and parts of a module's weight.
fn parts(all: &All, codes: &Stored, module: &str, own: Own) -> Result<(Vec<i64>, Parts)> {
    let bits = i64::from(own.bits);
    let &[words, rows] = &codes.shape[..] else {
        return Err(all.fault(codes, format!("is {:?}; (in * {bits} / 32, out) expected", codes.shape)));
    };
    if dtype(codes).name != "I32" || words * WORD % bits != 0 || rows * bits % WORD != 0 || words * rows == 0 {
        let what = format!(
            "is {} {:?}; I32 (in * {bits} / 32, out) expected, in and out multiples of 32 over {bits}",
            dtype(codes).name,
            codes.shape
        );
        return Err(all.fault(codes, what));
    }
    let columns = words * WORD / bits;
    let group = if own.group == -1 { columns } else { own.group };
    let groups = (columns + group - 1) / group;
    let why = format!("{bits} bits in groups of {group}");
    let name = |end: &str| format!("{module}{end}");
    let scales = all.shaped(codes, &name(".scales"), &SCALES, &[groups, rows], &why)?;
    let zeros = all.shaped(codes, &name(".qzeros"), &["I32"], &[groups, rows * bits / WORD], &why)?;
    let order = match all.find(&name(".g_idx")) {
        None if own.ordered => {
            return Err(all.fault(codes, format!("needs {module}.g_idx, which is missing (desc_act)")));
        }
        // Some tools leave an empty one where there is no order.
        Some(found) if !own.ordered && found.shape.iter().product::<i64>() == 0 => None,
        None => None,
        Some(_) => Some(all.shaped(codes, &name(".g_idx"), &["I32", "I64"], &[columns], "the group of each column")?),
    };
    let lies = Lies::Columns { one_less: own.one_less };
    let (codes, zeros) = (Part::of(codes), Some(zeros));
    Ok((vec![rows, columns], Parts { layout: Layout::Gptq, lies, bits: own.bits, group, codes, scales, zeros, order }))
}

/// The name of a module's bias, if it is of zeros only.
fn zero_bias(all: &All, module: &str) -> Result<Option<String>> {
    let Some(bias) = all.find(&format!("{module}.bias")) else { return Ok(None) };
    if !matches!(dtype(bias).kind, Some(Kind::Float | Kind::Half | Kind::BFloat16)) {
        return Ok(None);
    }
    let numbers = Part::of(bias).as_stored(all.files, all.opened)?;
    Ok((numbers.count_nonzero(None).int64_value(&[]) == 0).then(|| bias.name.clone()))
}

#[cfg(test)]
mod tests;
