//! A base quantised once and for all: the folder that transformers and bitsandbytes write and load (`load_in_4bit`, `load_in_8bit`), and
//! for fp8, which bitsandbytes does not have, that of compressed-tensors (weights of eight bits, inputs as they are).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::folder::Staging;
use super::folder::is_ours;
use super::merged::{Merging, dtype_name, finish};
use crate::Result;
use crate::adapter::Learned;
use crate::model::families;
use crate::model::sites::Role;
use crate::quant::four_bit::{Absmax, FourBit, NESTED_BLOCK};
use crate::quant::{Digest, Form, Fp8, Int8, Scheme};
use crate::weights::Checkpoint;
use crate::weights::writer::{self, SHARD_BYTES, TensorSpec};

/// Bytes of a state's JSON, filled up with spaces: its length must be known before its numbers are.
const STATE_BYTES: usize = 320;

/// What was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Written {
    /// Weights that were quantised.
    pub quantised: usize,
    /// Linears of experts, which transformers keeps in parameters that bitsandbytes does not reach: written as they are.
    pub experts: usize,
    /// What quantising took away.
    pub loss: Loss,
    /// Fingerprints of the weights that the update was folded into, by module, where these were quantised.
    pub onto: BTreeMap<String, Digest>,
}

/// What quantising took away: of each weight W, which became Q, `|Q - W| / |W|` in Frobenius norms.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Loss {
    /// The mean over the weights.
    pub mean: f64,
    /// The largest.
    pub worst: f64,
    /// The weight that has it.
    pub worst_tensor: String,
    /// All weights by name.
    pub tensors: BTreeMap<String, f64>,
}

impl Loss {
    fn of(tensors: BTreeMap<String, f64>) -> Self {
        let worst = tensors.iter().max_by(|one, other| one.1.total_cmp(other.1));
        let (worst_tensor, worst) = worst.map(|(name, loss)| (name.clone(), *loss)).unwrap_or_default();
        let mean = tensors.values().sum::<f64>() / tensors.len().max(1) as f64;
        Self { mean, worst, worst_tensor, tensors }
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mean, worst, worst_tensor, .. } = self;
        write!(f, "relative error {:.2}% on average, {:.2}% at worst ({worst_tensor})", 100.0 * mean, 100.0 * worst)
    }
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} weights are quantised: {}", self.quantised, self.loss)?;
        if self.experts > 0 {
            let experts = self.experts;
            write!(f, "\nlinears of experts ({experts}) are written as they are: bitsandbytes quantises linears only")?;
        }
        Ok(())
    }
}

/// Writes `checkpoint`, what was `learned` folded in, quantised as `scheme` says into `folder`, whole or not at all; an earlier model is
/// replaced.
///
/// Tensors keep the checkpoint's names; what is not quantised is stored in the scheme's number type, to which weights are rounded
/// before they are quantised. `onto` and `sidecars` are those of [`super::merged::write`]. `progress` is called with numbers done and
/// in all.
///
/// Errors: those of [`super::merged::write`].
pub fn write(
    folder: &Path,
    checkpoint: &Checkpoint,
    learned: Learned<'_>,
    onto: Option<&Scheme>,
    scheme: &Scheme,
    sidecars: &BTreeMap<String, Vec<u8>>,
    progress: &dyn Fn(u64, u64),
) -> Result<Written> {
    let merging = Merging::new(folder, checkpoint, learned, onto, scheme.kind)?;
    let spec = families::spec(checkpoint)?;
    let sites = spec.sites();
    let path = |module: &str| {
        let weight = format!("{module}.weight");
        let mut all = spec.names.spec_names(&weight).map(|name| spec.names.stored(&name));
        all.find(|name| checkpoint.shape(name).is_some())
    };
    let linears = sites.iter().filter(|site| matches!(site.role, Role::Linear | Role::Indexer | Role::Head));
    let head = spec.names.stored(&format!("{}.weight", spec.head.name));
    let own_head = !spec.head.tied || merging.unties();
    let chosen: HashSet<String> = linears
        .filter(|site| (site.role != Role::Head || own_head) && !scheme.skips(&site.name))
        .filter_map(|site| path(&site.name).or_else(|| (site.role == Role::Head).then(|| head.clone())))
        .collect();

    let mut parts: Vec<(TensorSpec, Source)> = Vec::new();
    for index in 0..merging.tensors() {
        let plain = merging.spec(index);
        if chosen.contains(&plain.name) {
            let own = layout(scheme, &plain.name, &plain.shape);
            parts.extend(own.into_iter().map(|spec| (spec, Source { index, quantised: true })));
        } else {
            parts.push((plain, Source { index, quantised: false }));
        }
    }
    let specs: Vec<TensorSpec> = parts.iter().map(|(spec, _)| spec.clone()).collect();
    let total: u64 = (0..merging.tensors()).map(|index| numbers(&merging.spec(index).shape)).sum();

    let staging = Staging::create(folder, |name| is_ours(name, sidecars))?;
    let mut done = 0;
    let mut losses = BTreeMap::new();
    // A weight is made once; what its other tensors will hold waits here until the file comes to them.
    let mut waiting: HashMap<String, Tensor> = HashMap::new();
    writer::write_model(staging.path(), &specs, SHARD_BYTES, |at| {
        let (own, source) = &parts[at];
        if let Some(tensor) = waiting.remove(&own.name) {
            return Ok(tensor);
        }
        let told = |tensor: &Tensor, done: &mut u64| {
            *done += tensor.numel() as u64;
            progress(*done, total);
        };
        if !source.quantised {
            let tensor = merging.tensor(source.index, own.kind)?;
            told(&tensor, &mut done);
            return Ok(tensor);
        }
        let name = merging.spec(source.index).name;
        let exact = merging.tensor(source.index, Kind::Float)?;
        let weight = exact.to_kind(scheme.kind);
        scheme.form.holds(&name, &weight)?;
        losses.insert(name.clone(), relative_error(&scheme.numbers(&weight), &exact));
        waiting.extend(made(scheme, &name, &weight));
        told(&exact, &mut done);
        Ok(waiting.remove(&own.name).expect("all tensors of the weight were just made"))
    })?;
    let routers = sites.iter().filter(|site| matches!(site.role, Role::Router | Role::Blocks));
    let shared = sites.iter().filter(|site| site.role == Role::Head && !own_head && !scheme.skips(&site.name));
    let as_they_are = routers.chain(shared).map(|site| site.name.clone());
    let modules = scheme.skip.iter().cloned().chain(as_they_are).collect();
    let there =
        |part: &&&str| checkpoint.names().iter().any(|name| spec.names.is_other_part(name) && name.starts_with(**part));
    let skipped = Skipped { modules, parts: spec.names.other_parts.iter().filter(there).copied().collect() };
    let mut config = merging.config();
    if let Some(fields) = config.as_object_mut() {
        fields.insert("quantization_config".into(), quantization_config(scheme, &skipped));
    }
    finish(staging, &config, sidecars)?;
    let experts = sites.iter().filter(|site| matches!(site.role, Role::Experts { .. })).count();
    Ok(Written { quantised: chosen.len(), experts, loss: Loss::of(losses), onto: merging.digests() })
}

/// `|found - exact| / |exact|`; 0 of a weight of zeros, which every form holds.
fn relative_error(found: &Tensor, exact: &Tensor) -> f64 {
    let norm = |tensor: &Tensor| tensor.to_kind(Kind::Float).norm().double_value(&[]);
    let whole = norm(exact);
    if whole == 0.0 { 0.0 } else { norm(&(found.to_kind(Kind::Float) - exact)) / whole }
}

/// Where a written tensor comes from.
struct Source {
    /// Of the merged model's tensor.
    index: usize,
    /// Whether it is one of those that stand for the tensor; otherwise it is the tensor.
    quantised: bool,
}

fn numbers(shape: &[i64]) -> u64 {
    shape.iter().product::<i64>() as u64
}

/// The tensors that stand for a weight, before their numbers are known.
fn layout(scheme: &Scheme, name: &str, shape: &[i64]) -> Vec<TensorSpec> {
    let n = numbers(shape) as i64;
    let of = |name: String, kind, shape: &[i64]| TensorSpec { name, kind, shape: shape.to_vec() };
    match scheme.form {
        Form::FourBit { code, block, double_quant } => {
            let blocks = (n + block - 1) / block;
            let end = |end: &str| format!("{name}.{end}");
            let absmax = if double_quant { Kind::Uint8 } else { Kind::Float };
            let mut all = vec![
                of(name.to_string(), Kind::Uint8, &[(n + 1) / 2, 1]),
                of(end("absmax"), absmax, &[blocks]),
                of(end("quant_map"), Kind::Float, &[16]),
                of(end(&format!("quant_state.bitsandbytes__{code}")), Kind::Uint8, &[STATE_BYTES as i64]),
            ];
            if double_quant {
                let nested = (blocks + NESTED_BLOCK - 1) / NESTED_BLOCK;
                all.push(of(end("nested_absmax"), Kind::Float, &[nested]));
                all.push(of(end("nested_quant_map"), Kind::Float, &[256]));
            }
            all
        }
        Form::Int8 => {
            let module = name.strip_suffix(".weight").unwrap_or(name);
            vec![
                of(name.to_string(), Kind::Int8, shape),
                of(format!("{module}.SCB"), Kind::Float, &shape[..1]),
                of(format!("{module}.weight_format"), Kind::Uint8, &[]),
            ]
        }
        Form::Fp8 => vec![
            of(name.to_string(), Kind::Float8e4m3fn, shape),
            of(format!("{name}_scale"), Kind::Float, &[shape[0], 1]),
        ],
        Form::Stored(layout) => unreachable!("{layout} is never made"),
    }
}

/// The same tensors with their numbers, by name.
fn made(scheme: &Scheme, name: &str, weight: &Tensor) -> Vec<(String, Tensor)> {
    match scheme.form {
        Form::FourBit { code, block, double_quant } => {
            let quantised = FourBit::of(weight, code, block, double_quant);
            let state = state(&quantised);
            let end = |end: &str| format!("{name}.{end}");
            let mut all = vec![
                (name.to_string(), quantised.codes.view([-1, 1]).contiguous()),
                (end("quant_map"), Tensor::from_slice(code.values())),
                (end(&format!("quant_state.bitsandbytes__{code}")), Tensor::from_slice(&state)),
            ];
            match quantised.absmax {
                Absmax::Plain(absmax) => all.push((end("absmax"), absmax)),
                Absmax::Nested { codes, absmax, map, .. } => {
                    all.push((end("absmax"), codes));
                    all.push((end("nested_absmax"), absmax));
                    all.push((end("nested_quant_map"), map));
                }
            }
            all
        }
        Form::Int8 => {
            let module = name.strip_suffix(".weight").unwrap_or(name);
            let Int8 { codes, absmax, .. } = Int8::of(weight);
            let row_major = Tensor::zeros([] as [i64; 0], (Kind::Uint8, Device::Cpu));
            vec![
                (name.to_string(), codes),
                (format!("{module}.SCB"), absmax),
                (format!("{module}.weight_format"), row_major),
            ]
        }
        Form::Fp8 => {
            let Fp8 { codes, scales, .. } = Fp8::of(weight);
            vec![(name.to_string(), codes), (format!("{name}_scale"), scales)]
        }
        Form::Stored(layout) => unreachable!("{layout} is never made"),
    }
}

/// What bitsandbytes writes as `quant_state`.
fn state(weight: &FourBit) -> Vec<u8> {
    let mut said = json!({
        "quant_type": weight.code.to_string(),
        "blocksize": weight.block,
        "dtype": dtype_name(weight.kind),
        "shape": weight.shape,
    });
    if let (Absmax::Nested { offset, .. }, Some(fields)) = (&weight.absmax, said.as_object_mut()) {
        fields.insert("nested_blocksize".into(), NESTED_BLOCK.into());
        fields.insert("nested_dtype".into(), "float32".into());
        fields.insert("nested_offset".into(), f64::from(*offset).into());
    }
    let mut text = said.to_string().into_bytes();
    assert!(text.len() <= STATE_BYTES, "names and numbers of a few digits");
    text.resize(STATE_BYTES, b' ');
    text
}

/// What of the model is not quantised.
struct Skipped {
    /// Linears, by their paths or the ends of these.
    modules: Vec<String>,
    /// What the paths of other parts of a larger model begin with.
    parts: Vec<&'static str>,
}

/// What transformers reads to build the model.
fn quantization_config(scheme: &Scheme, skipped: &Skipped) -> Value {
    // A part is known by how a path begins; transformers puts all of a larger model below `model`, whatever the files do.
    let below = skipped.parts.iter().filter(|part| !part.starts_with("model.")).map(|part| format!("model.{part}"));
    let parts = skipped.parts.iter().map(ToString::to_string).chain(below);
    let all: Vec<String> = skipped.modules.iter().cloned().chain(parts).collect();
    let mut said = BTreeMap::from([
        ("quant_method", json!("bitsandbytes")),
        ("llm_int8_skip_modules", json!(all)),
        ("llm_int8_threshold", json!(6.0)),
        ("llm_int8_has_fp16_weight", json!(false)),
        ("llm_int8_enable_fp32_cpu_offload", json!(false)),
    ]);
    match scheme.form {
        Form::FourBit { code, double_quant, .. } => said.extend([
            ("load_in_4bit", json!(true)),
            ("load_in_8bit", json!(false)),
            ("bnb_4bit_quant_type", json!(code.to_string())),
            ("bnb_4bit_use_double_quant", json!(double_quant)),
            ("bnb_4bit_compute_dtype", json!(dtype_name(scheme.kind))),
            ("bnb_4bit_quant_storage", json!("uint8")),
        ]),
        Form::Int8 => said.extend([("load_in_4bit", json!(false)), ("load_in_8bit", json!(true))]),
        Form::Fp8 => return fp8_config(skipped),
        Form::Stored(layout) => unreachable!("{layout} is never made"),
    }
    json!(said)
}

/// The same for compressed-tensors, which leaves modules out by whole names or regular expressions for the beginning.
fn fp8_config(skipped: &Skipped) -> Value {
    let ends = skipped.modules.iter().map(|name| format!("re:(.*\\.)?{}$", regex::escape(name)));
    let parts = skipped.parts.iter().map(|part| format!("re:(.*\\.)?{}\\.", regex::escape(part)));
    let ignored: Vec<String> = ends.chain(parts).collect();
    json!({
        "quant_method": "compressed-tensors",
        "format": "naive-quantized",
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {"group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": true, "dynamic": false},
        }},
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{FourBitType, Products};

    /// transformers makes linears of every part of a larger model, and takes for quantised what the config does not leave out.
    #[test]
    fn parts_that_see_or_hear_are_left_out_below_model_too() {
        let skipped = Skipped { modules: vec!["lm_head".into()], parts: vec!["vision_tower", "model.audio_tower"] };
        let scheme = |form| Scheme {
            form,
            kind: Kind::BFloat16,
            skip: Vec::new(),
            products: Products::Dequantised,
            after_start: false,
        };
        let nf4 = Form::FourBit { code: FourBitType::Nf4, block: 64, double_quant: true };
        let said = quantization_config(&scheme(nf4), &skipped);
        let expected = ["lm_head", "vision_tower", "model.audio_tower", "model.vision_tower"];
        assert_eq!(said["llm_int8_skip_modules"], json!(expected));
        let said = quantization_config(&scheme(Form::Fp8), &skipped);
        let expected = [r"re:(.*\.)?lm_head$", r"re:(.*\.)?vision_tower\.", r"re:(.*\.)?model\.audio_tower\."];
        assert_eq!(said["ignore"], json!(expected));
    }
}
