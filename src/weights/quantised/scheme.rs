//! What compressed-tensors' part of a config says of each module's weight.

use regex::Regex;
use serde_json::Value;

use super::wrong;
use crate::{Error, Fault, Result};

/// Formats that are read; `mixed-precision` leaves it to each group to say one.
const FORMATS: [&str; 6] =
    ["pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense", "mixed-precision"];

/// `quantization_config`.
pub(super) struct Scheme {
    groups: Vec<(Vec<Target>, Weights)>,
    ignored: Vec<Target>,
    /// Whether servers are meant to quantise more than weights.
    pub quantises_inputs: bool,
}

/// How a weight is quantised.
#[derive(Clone, Copy)]
pub(super) struct Weights {
    pub bits: u32,
    pub numbers: Numbers,
    pub strategy: Strategy,
    pub symmetric: bool,
    /// Whether columns have groups in another order than their own.
    pub ordered: bool,
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Numbers {
    Whole,
    /// e4m3.
    Float,
}

/// What shares a scale.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Strategy {
    Tensor,
    Channel,
    Group(i64),
    Block([i64; 2]),
}

/// Modules.
enum Target {
    /// All linears.
    Linears,
    Name(String),
    /// Those whose path begins so.
    Pattern(Regex),
}

impl Scheme {
    pub fn read(place: &str, found: &Value) -> Result<Self> {
        let said = |name: &str| found.get(name).filter(|value| !value.is_null());
        for name in ["format", "sparsity_config.format"] {
            let value = name.split('.').try_fold(found, |inner, name| inner.get(name)).filter(|value| !value.is_null());
            let known: &[&str] = if name == "format" { &FORMATS } else { &["dense"] };
            if let Some(value) = value.filter(|value| !value.as_str().is_some_and(|format| known.contains(&format))) {
                return Err(wrong(place, name, value, &known.join(", ")));
            }
        }
        let empty = |value: &Value| match value {
            Value::Object(fields) => fields.get("config_groups").is_none_or(|groups| groups == &serde_json::json!({})),
            _ => false,
        };
        if let Some(value) = said("transform_config").filter(|value| !empty(value)) {
            return Err(wrong(
                place,
                "transform_config",
                value,
                "none: what multiplies weights and inputs with matrices is not read",
            ));
        }
        let mut groups = Vec::new();
        let mut quantises_inputs = said("kv_cache_scheme").is_some();
        for (name, group) in said("config_groups").and_then(Value::as_object).into_iter().flatten() {
            let inner = format!("{place}.config_groups.{name}");
            if let Some(value) = group.get("format").filter(|value| !value.is_null())
                && !value.as_str().is_some_and(|format| FORMATS.contains(&format))
            {
                return Err(wrong(&inner, "format", value, &FORMATS.join(", ")));
            }
            quantises_inputs |= group.get("input_activations").is_some_and(|value| !value.is_null());
            let Some(weights) = group.get("weights").filter(|value| !value.is_null()) else { continue };
            let said = group.get("targets").unwrap_or(&Value::Null);
            let targets = names(&inner, "targets", said)?.into_iter().map(|text| {
                Target::of(text).map_err(|error| {
                    let what = format!("{text:?} is no regular expression that is understood here: {error}");
                    Error::Model(Fault::new(format!("config.json: {inner}.targets"), what))
                })
            });
            groups.push((targets.collect::<Result<_>>()?, Weights::read(&format!("{inner}.weights"), weights)?));
        }
        // What is left as it was is told by the tensors, too: an expression that is not understood here takes nothing away.
        let ignored = said("ignore").map(|said| names(place, "ignore", said)).transpose()?.unwrap_or_default();
        let ignored = ignored.into_iter().filter_map(|text| Target::of(text).ok()).collect();
        Ok(Self { groups, ignored, quantises_inputs })
    }

    /// How a module's weight is quantised.
    ///
    /// Errors: what is wrong, in a sentence, where nothing says how.
    pub fn of(&self, module: &str) -> std::result::Result<Weights, String> {
        // A linear of that name is left as it is, whatever its class.
        if self.ignored.iter().any(|target| !matches!(target, Target::Linears) && target.takes(module)) {
            return Err("is quantised, but config.json has it under `ignore`".into());
        }
        let own = self.groups.iter().find(|(targets, _)| targets.iter().any(|target| target.takes(module)));
        own.map(|(_, weights)| *weights)
            .ok_or_else(|| "is quantised, but no target of config.json's config_groups takes it".into())
    }
}

impl Target {
    fn of(text: &str) -> std::result::Result<Self, regex::Error> {
        match text.strip_prefix("re:") {
            Some(pattern) => Regex::new(&format!("^(?:{pattern})")).map(Self::Pattern),
            None if text == "Linear" => Ok(Self::Linears),
            None => Ok(Self::Name(text.to_string())),
        }
    }

    fn takes(&self, module: &str) -> bool {
        match self {
            Self::Linears => true,
            Self::Name(name) => name == module,
            Self::Pattern(pattern) => pattern.is_match(module),
        }
    }
}

fn names<'a>(place: &str, name: &str, said: &'a Value) -> Result<Vec<&'a str>> {
    let names: Option<Vec<&str>> = said.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
    names.ok_or_else(|| wrong(place, name, said, "a list of names"))
}

impl Weights {
    fn read(place: &str, found: &Value) -> Result<Self> {
        let said = |name: &str| found.get(name).filter(|value| !value.is_null());
        let text = |name: &str| said(name).map(|value| value.as_str().map(str::to_lowercase).unwrap_or_default());
        let bits = said("num_bits").map_or(Some(8), Value::as_u64).unwrap_or(0);
        let null = Value::Null;
        let numbers = match (text("type").as_deref(), bits) {
            (None | Some("int"), 2 | 4 | 8) => Numbers::Whole,
            (Some("float"), 8) => Numbers::Float,
            (None | Some("int"), _) => {
                return Err(wrong(place, "num_bits", said("num_bits").unwrap_or(&null), "2, 4 or 8"));
            }
            (Some("float"), _) => {
                return Err(wrong(place, "num_bits", said("num_bits").unwrap_or(&null), "8 (of floats)"));
            }
            _ => return Err(wrong(place, "type", said("type").unwrap_or(&null), "\"int\" or \"float\"")),
        };
        let group = said("group_size");
        let size = super::group_size(place, group.map(|value| ("group_size", value)), -1)?;
        let strategy = match text("strategy").as_deref() {
            None if group.is_none() => Strategy::Tensor,
            None if size == -1 => Strategy::Channel,
            Some("group") if size == -1 => {
                return Err(wrong(place, "group_size", group.unwrap_or(&null), "a whole number from 1 on"));
            }
            None | Some("group") => Strategy::Group(size),
            Some("tensor") => Strategy::Tensor,
            Some("channel") => Strategy::Channel,
            Some("block") => Strategy::Block(block(place, said("block_structure").unwrap_or(&null))?),
            Some(_) => {
                return Err(wrong(
                    place,
                    "strategy",
                    said("strategy").unwrap_or(&null),
                    "tensor, channel, group or block",
                ));
            }
        };
        let symmetric = said("symmetric").map_or(Some(true), Value::as_bool);
        let symmetric =
            symmetric.ok_or_else(|| wrong(place, "symmetric", said("symmetric").unwrap_or(&null), "true or false"))?;
        let ordered = matches!(text("actorder").as_deref(), Some("group" | "dynamic"));
        Ok(Self { bits: bits as u32, numbers, strategy, symmetric, ordered })
    }
}

/// Rows and columns of a block, also as earlier versions write it: "128x128".
fn block(place: &str, said: &Value) -> Result<[i64; 2]> {
    let sizes: Option<Vec<i64>> = match said {
        Value::Array(list) => list.iter().map(Value::as_i64).collect(),
        Value::String(text) => text.split('x').map(|size| size.parse().ok()).collect(),
        _ => None,
    };
    let sizes = sizes.filter(|sizes| sizes.iter().all(|size| (1..=1 << 30).contains(size)));
    let sizes = sizes.and_then(|sizes| <[i64; 2]>::try_from(sizes).ok());
    sizes.ok_or_else(|| wrong(place, "block_structure", said, "two whole numbers from 1 on"))
}
