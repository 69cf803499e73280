//! Quantised weights as models are published with them (`quantization_config`): a tensor and its scales become one tensor under the
//! name that plain numbers would have. Each is read as such, or kept as it is stored.

mod awq;
pub(super) mod bitsandbytes;
mod compressed_tensors;
pub(super) mod fp8;
mod gptq;
pub(super) mod grouped;
pub(super) mod mxfp4;
mod parts;
mod scheme;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use serde_json::Value;

use self::parts::All;
use super::{Form, Stored, json_object};
use crate::{Error, Fault, Result};

/// What `quant_method` may be.
const METHODS: [&str; 6] =
    [bitsandbytes::METHOD, gptq::METHOD, awq::METHOD, compressed_tensors::METHOD, fp8::METHOD, mxfp4::METHOD];

/// An error where `config` (of a model) asks for a quantisation that is not read.
pub(crate) fn prove_readable(config: &Value) -> Result<()> {
    let Some((place, found)) = quantisation(config) else { return Ok(()) };
    if method(found).is_some_and(|method| METHODS.contains(&method)) {
        return Ok(());
    }
    let what = match found.get("quant_method").and_then(Value::as_str) {
        Some(method) => format!("a base quantised by {method:?} is not supported"),
        None => "missing, so there is no telling how the base is quantised".to_string(),
    };
    let hint = format!("supported: {}; or name the model's unquantised version", METHODS.join(", "));
    Err(Error::Model(Fault::new(format!("config.json: {place}.quant_method"), what).hint(hint)))
}

/// Puts quantised weights and their scales together, where `config` says that there are such; other models are left as they are.
///
/// Errors: what the method's own `pair` finds wrong.
pub(super) fn pair(
    config: &Value,
    (files, opened): (&[PathBuf], &[File]),
    tensors: Vec<Stored>,
    notices: &mut Vec<String>,
) -> Result<Vec<Stored>> {
    let tensors = bitsandbytes::pair(config, (files, opened), tensors, notices)?;
    let tensors = gptq::pair(config, (files, opened), tensors, notices)?;
    let tensors = awq::pair(config, (files, opened), tensors, notices)?;
    let tensors = compressed_tensors::pair(config, (files, opened), tensors, notices)?;
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

/// What `quant_method` is; before there was one, bitsandbytes alone was asked for by flags, and transformers reads these still.
fn method(quantisation: &Value) -> Option<&str> {
    let flagged = || ["load_in_4bit", "load_in_8bit"].iter().any(|flag| quantisation.get(*flag) == Some(&true.into()));
    match quantisation.get("quant_method").filter(|value| !value.is_null()) {
        Some(method) => method.as_str(),
        None => flagged().then_some(bitsandbytes::METHOD),
    }
}

/// Files beside `config.json` in which tools say what it does not, and the `quant_method` that is theirs: AutoGPTQ's and AutoAWQ's.
const BESIDE: [(&str, &str); 2] = [("quantize_config.json", gptq::METHOD), ("quant_config.json", awq::METHOD)];
/// Bytes of such a file, at most.
const MOST_BESIDE: u64 = 1 << 20;

/// Puts what a file of [`BESIDE`] in `folder` says into a `config` that is silent, where there are codes it must be about; gives the
/// file's name.
///
/// Errors: a file that is no JSON object.
pub(super) fn said_beside(folder: &Path, config: &mut Value, tensors: &[Stored]) -> Result<Option<&'static str>> {
    let coded = tensors.iter().any(|tensor| tensor.name.ends_with(".qweight"));
    if quantisation(config).is_some() || !coded {
        return Ok(None);
    }
    for (name, method) in BESIDE {
        let path = folder.join(name);
        if path.symlink_metadata().is_err() {
            continue;
        }
        let (mut said, _) = json_object(&path, MOST_BESIDE)?;
        if let (Some(fields), Some(config)) = (said.as_object_mut(), config.as_object_mut()) {
            fields.entry("quant_method").or_insert_with(|| method.into());
            config.insert("quantization_config".into(), said);
        }
        return Ok(Some(name));
    }
    Ok(None)
}

/// A value of `quantization_config` that is not read.
fn wrong(place: &str, name: &str, value: &Value, expected: &str) -> Error {
    let fault = Fault::new(format!("config.json: {place}.{name}"), format!("is {value}; {expected} expected"));
    Error::Model(fault.hint("name the model in a layout that is read, or its unquantised version"))
}

/// Columns to a scale, -1 for all of them; `otherwise` where nothing is said.
fn group_size(place: &str, said: Option<(&str, &Value)>, otherwise: i64) -> Result<i64> {
    let Some((name, value)) = said else { return Ok(otherwise) };
    let size = value.as_i64().filter(|size| *size == -1 || (1..=1 << 30).contains(size));
    size.ok_or_else(|| wrong(place, name, value, "-1 or a whole number from 1 to 2^30"))
}

/// An error for what would belong to codes that are not there.
fn refuse_left_over(
    all: &All<'_>,
    tensors: &[Stored],
    taken: &HashSet<String>,
    others: &[&str],
    codes: &str,
) -> Result<()> {
    let left = tensors.iter().filter(|tensor| !taken.contains(&tensor.name));
    let left = left.filter_map(|tensor| Some((tensor, others.iter().find_map(|end| tensor.name.strip_suffix(end))?)));
    match left.into_iter().next() {
        Some((tensor, module)) => Err(all.fault(tensor, format!("belongs to {module}{codes}, which is missing"))),
        None => Ok(()),
    }
}

/// Tells the user what becomes of weights that are stored quantised.
fn say_kept(notices: &mut Vec<String>, how: &str, weights: usize) {
    if weights > 0 {
        notices.push(format!(
            "the base holds weights {how} ({weights}): `adapter.method: qlora` keeps them so, another method reads them as plain \
             numbers, and a merged model is written in those"
        ));
    }
}

/// The tensors without those that are `taken`, each of `forms` as the weight it stands for.
fn shown(
    tensors: Vec<Stored>,
    mut forms: HashMap<String, (Vec<i64>, grouped::Parts)>,
    taken: &HashSet<String>,
    spare: &HashSet<String>,
    codes: &str,
) -> Vec<Stored> {
    let kept = tensors.into_iter().filter(|tensor| !taken.contains(&tensor.name));
    kept.map(|mut tensor| {
        tensor.spare = spare.contains(&tensor.name);
        if let Some((shape, parts)) = forms.remove(&tensor.name) {
            if let Some(module) = tensor.name.strip_suffix(codes) {
                tensor.name = format!("{module}.weight");
            }
            tensor.shape = shape;
            tensor.form = Form::Grouped(Box::new(parts));
        }
        tensor
    })
    .collect()
}

#[cfg(test)]
mod golden;
