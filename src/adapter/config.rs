//! `adapter_config.json`: what PEFT 0.21.2 writes, and what is read of it.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::targets::{self, Patterns};
use crate::recipe::{AdapterRecipe, InitLora, Targets, TokenIndices};
use crate::weights::json_object;
use crate::{Error, Fault, Result};

/// The file's name.
pub const CONFIG: &str = "adapter_config.json";
/// The release whose files these are.
pub const PEFT_VERSION: &str = "0.21.2";

const MAX_CONFIG: u64 = 16 << 20;

/// A LoRA adapter's configuration, as far as it is more than PEFT's defaults.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct AdapterConfig {
    /// The model it was trained on, as its trainer called it.
    #[serde(default)]
    pub base_model_name_or_path: Option<String>,
    /// Revision of that model.
    #[serde(default)]
    pub revision: Option<String>,
    /// Rank, where no pattern says otherwise.
    #[serde(default = "eight")]
    pub r: u32,
    /// Scale numerator, where no pattern says otherwise.
    #[serde(default = "eight_point_nought")]
    pub lora_alpha: f64,
    /// Dropout it was trained with.
    #[serde(default)]
    pub lora_dropout: f64,
    /// Whether the scale is `alpha / sqrt(r)`.
    #[serde(default)]
    pub use_rslora: bool,
    /// Whether the lengths of the weights' rows are trained, too (DoRA).
    #[serde(default)]
    pub use_dora: bool,
    /// Which modules.
    #[serde(default)]
    pub target_modules: Option<Targets>,
    /// Which parameters, where they are not the weights of linears.
    #[serde(default)]
    pub target_parameters: Option<Vec<String>>,
    /// Which not.
    #[serde(default)]
    pub exclude_modules: Option<Targets>,
    /// Which layers.
    #[serde(default, deserialize_with = "one_or_many")]
    pub layers_to_transform: Option<Vec<u32>>,
    /// What those layers are called in module paths, where the file says so; a string or a list.
    #[serde(default)]
    pub layers_pattern: Option<Value>,
    /// Rank by expression, in the file's order, which decides between several that match.
    #[serde(default, deserialize_with = "in_order")]
    pub rank_pattern: Vec<(String, u32)>,
    /// Alpha by expression, likewise.
    #[serde(default, deserialize_with = "in_order")]
    pub alpha_pattern: Vec<(String, f64)>,
    /// How A started.
    #[serde(default, deserialize_with = "init")]
    pub init_lora_weights: InitLora,
    /// Modules trained whole.
    #[serde(default)]
    pub modules_to_save: Option<Vec<String>>,
    /// Tokens trained by their rows.
    #[serde(default)]
    pub trainable_token_indices: Option<TokenIndices>,
    /// Whether a head that shares the embedding's weight goes on sharing it where the embedding is trained.
    #[serde(default)]
    pub ensure_weight_tying: bool,
}

/// What PEFT can do beside plain LoRA on linears: its key, its name, the way out.
const MORE_THAN_LORA: &[(&str, &str)] = &[
    ("lora_bias", "a bias on lora_B"),
    ("layer_replication", "replicated layers"),
    ("fan_in_fan_out", "transposed weights (fan_in_fan_out)"),
    ("alora_invocation_tokens", "aLoRA"),
    ("use_qalora", "QALoRA"),
    ("use_bdlora", "block-diagonal LoRA"),
    ("arrow_config", "Arrow routing"),
    ("kasa_config", "KaSA"),
    ("monteclora_config", "MonteCLoRA"),
    ("velora_config", "VeLoRA"),
];
/// Keys whose value changes nothing about a trained adapter.
const HARMLESS: &[&str] = &[
    "peft_type",
    "task_type",
    "peft_version",
    "auto_mapping",
    "inference_mode",
    "bias",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "ensure_weight_tying",
    "runtime_config",
    "base_model_name_or_path",
    "revision",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "modules_to_save",
    "trainable_token_indices",
];
/// Starts that change the base's own weights: their adapters fit the changed base only.
const MUTATING_STARTS: &[&str] = &["pissa", "olora", "corda", "loftq", "lora_ga"];

impl AdapterConfig {
    /// What a recipe's adapter is, `selection` being its targets on the base.
    pub fn new(recipe: &AdapterRecipe, selection: &targets::Selection) -> Self {
        Self {
            base_model_name_or_path: None,
            revision: None,
            r: recipe.r,
            lora_alpha: recipe.lora_alpha,
            lora_dropout: recipe.lora_dropout,
            use_rslora: recipe.use_rslora,
            use_dora: recipe.decomposes(),
            target_modules: Some(selection.target_modules.clone()),
            target_parameters: None,
            exclude_modules: recipe.exclude_modules.clone(),
            layers_to_transform: selection.layers_to_transform.clone(),
            layers_pattern: None,
            rank_pattern: recipe.rank_pattern.iter().map(|(key, r)| (key.clone(), *r)).collect(),
            alpha_pattern: recipe.alpha_pattern.iter().map(|(key, alpha)| (key.clone(), *alpha)).collect(),
            init_lora_weights: recipe.init_lora_weights,
            modules_to_save: recipe.modules_to_save.clone(),
            trainable_token_indices: recipe.trainable_token_indices.clone(),
            ensure_weight_tying: false,
        }
    }

    /// Every rank `times` as large, at the same scales.
    pub fn widen(&mut self, times: u32) {
        let alpha = if self.use_rslora { f64::from(times).sqrt() } else { f64::from(times) };
        self.r *= times;
        self.lora_alpha *= alpha;
        self.rank_pattern.iter_mut().for_each(|(_, r)| *r *= times);
        self.alpha_pattern.iter_mut().for_each(|(_, own)| *own *= alpha);
    }

    /// Reads the file of `folder`, and says what in it was passed over.
    ///
    /// Errors: not an adapter's JSON, another method than LoRA, a feature beside plain LoRA on linears (each is named), a rank
    /// of 0.
    pub fn read(folder: &Path) -> Result<(Self, Vec<String>)> {
        let path = folder.join(CONFIG);
        let (value, _) = json_object(&path, MAX_CONFIG)?;
        let fault = |what: String| Fault::at(&path, what);
        // A program-made file without `peft_type` is LoRA when it has LoRA's rank.
        let kind = value.get("peft_type").and_then(Value::as_str).unwrap_or("LORA").to_string();
        if kind != "LORA" || (value.get("peft_type").is_none() && value.get("r").is_none()) {
            let what = match value.get("peft_type") {
                None => "says neither peft_type nor r: not a LoRA adapter".to_string(),
                Some(found) => format!("peft_type is {found}; engraft reads LORA"),
            };
            return Err(Error::Model(fault(what).hint(MERGE_IT)));
        }
        refuse_more(&path, &value)?;
        let notices = unknown(&value);
        let config: Self = serde_json::from_value(value).map_err(|error| Error::Model(fault(error.to_string())))?;
        if config.r == 0 || config.rank_pattern.iter().any(|(_, r)| *r == 0) {
            return Err(Error::Model(fault("has a rank of 0; a rank is at least 1".to_string())));
        }
        Ok((config, notices))
    }

    /// The file's text, byte for byte as PEFT lays it out.
    pub fn to_json(&self) -> String {
        let pairs = |map: Map<String, Value>| Value::Object(map);
        let value = json!({
            "alora_invocation_tokens": null,
            "alpha_pattern": pairs(sorted(&self.alpha_pattern, |alpha| number(*alpha))),
            "arrow_config": null,
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "corda_config": null,
            "ensure_weight_tying": self.ensure_weight_tying,
            "eva_config": null,
            "exclude_modules": self.exclude_modules,
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": match self.init_lora_weights {
                // Of a decomposed weight, the file has what fits the base as it was.
                InitLora::Kaiming | InitLora::Pissa | InitLora::Olora | InitLora::Loftq => json!(true),
                InitLora::Gaussian => json!("gaussian"),
            },
            "kasa_config": null,
            "layer_replication": null,
            "layers_pattern": self.layers_pattern,
            "layers_to_transform": self.layers_to_transform,
            "loftq_config": {},
            "lora_alpha": number(self.lora_alpha),
            "lora_bias": false,
            "lora_dropout": self.lora_dropout,
            "lora_ga_config": null,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "modules_to_save": self.modules_to_save,
            "monteclora_config": null,
            "peft_type": "LORA",
            "peft_version": PEFT_VERSION,
            "qalora_group_size": 16,
            "r": self.r,
            "rank_pattern": pairs(sorted(&self.rank_pattern, |r| json!(r))),
            "revision": self.revision,
            "target_modules": self.target_modules,
            "target_parameters": self.target_parameters,
            "task_type": "CAUSAL_LM",
            "trainable_token_indices": self.trainable_token_indices,
            "use_bdlora": null,
            "use_dora": self.use_dora,
            "use_qalora": false,
            "use_rslora": self.use_rslora,
            "velora_config": null,
        });
        ascii(&format!("{value:#}"))
    }

    /// Rank and scale by module, as this configuration says.
    pub fn ranks(&self, path: &Path) -> Result<Ranks> {
        let mut faults = Vec::new();
        let place = |key: &str| format!("{}: {key}", path.display());
        let ranks = Patterns::new(&place("rank_pattern"), self.rank_pattern.iter().map(|(k, r)| (k, r)), &mut faults);
        let alphas =
            Patterns::new(&place("alpha_pattern"), self.alpha_pattern.iter().map(|(k, alpha)| (k, alpha)), &mut faults);
        match faults.into_iter().next() {
            Some(fault) => Err(Error::Model(fault)),
            None => Ok(Ranks { r: self.r, alpha: self.lora_alpha, rank_stabilised: self.use_rslora, ranks, alphas }),
        }
    }
}

/// Rank and scale by module.
#[derive(Debug, Clone)]
pub struct Ranks {
    r: u32,
    alpha: f64,
    rank_stabilised: bool,
    ranks: Patterns<u32>,
    alphas: Patterns<f64>,
}

impl Ranks {
    /// The rank of a module.
    pub fn rank(&self, module: &str) -> u32 {
        self.ranks.value(module).unwrap_or(self.r)
    }

    /// What B A of a module is multiplied with.
    pub fn scale(&self, module: &str) -> f64 {
        let alpha = self.alphas.value(module).unwrap_or(self.alpha);
        targets::scale(self.rank(module), alpha, self.rank_stabilised)
    }
}

/// The way out that serves every adapter PEFT can load.
pub(super) const MERGE_IT: &str = "merge it with PEFT (merge_and_unload, save_pretrained) and use the result as base_model, or train it anew as plain LoRA";

fn refuse_more(path: &Path, value: &Value) -> Result<()> {
    let on = |key: &str| match value.get(key) {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Array(list)) => !list.is_empty(),
        Some(Value::Object(map)) => !map.is_empty(),
        Some(Value::String(text)) => !text.is_empty(),
        Some(_) => true,
    };
    let mut more: Vec<String> =
        MORE_THAN_LORA.iter().filter(|(key, _)| on(key)).map(|(_, feature)| feature.to_string()).collect();
    match value.get("bias").and_then(Value::as_str) {
        None | Some("none") => {}
        Some(bias) => more.push(format!("trained biases (bias: {bias})")),
    }
    if !more.is_empty() {
        let what = format!("uses {}; engraft reads plain LoRA on linears", more.join(" and "));
        return Err(Error::Model(Fault::at(path, what).hint(MERGE_IT)));
    }
    let start = value.get("init_lora_weights").and_then(Value::as_str).unwrap_or_default().to_lowercase();
    if MUTATING_STARTS.iter().any(|known| start.starts_with(known)) {
        let what =
            format!("began as {start}, which changes the base's own weights: it does not fit the base as published");
        return Err(Error::Model(Fault::at(path, what).hint(
            "save it from PEFT as plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )));
    }
    Ok(())
}

/// Keys of a later PEFT that say something.
fn unknown(value: &Value) -> Vec<String> {
    let says = |value: &Value| !matches!(value, Value::Null | Value::Bool(false));
    let keys = value.as_object().into_iter().flatten();
    keys.filter(|(key, value)| {
        says(value) && !HARMLESS.contains(&key.as_str()) && MORE_THAN_LORA.iter().all(|(known, _)| known != key)
    })
    .filter(|(_, value)| value.as_object().is_none_or(|map| !map.is_empty()))
    .map(|(key, value)| format!("{CONFIG}: {key}: {value} is not known to engraft and was passed over"))
    .collect()
}

fn sorted<T>(pairs: &[(String, T)], value: impl Fn(&T) -> Value) -> Map<String, Value> {
    let mut pairs: Vec<_> = pairs.iter().collect();
    pairs.sort_by(|(a, _), (b, _)| a.cmp(b));
    pairs.into_iter().map(|(key, one)| (key.clone(), value(one))).collect()
}

/// PEFT's alphas are integers where they are whole.
fn number(alpha: f64) -> Value {
    if alpha.fract() == 0.0 && alpha.abs() < 1e15 { json!(alpha as i64) } else { json!(alpha) }
}

/// JSON as Python's `json.dumps` writes it by default: what is not ASCII, escaped.
fn ascii(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_ascii() {
            out.push(character);
        } else {
            let mut units = [0; 2];
            out.extend(character.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")));
        }
    }
    out
}

fn eight() -> u32 {
    8
}

fn eight_point_nought() -> f64 {
    8.0
}

fn one_or_many<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<u32>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Layers {
        One(u32),
        Many(Vec<u32>),
    }
    Ok(Option::<Layers>::deserialize(deserializer)?.map(|layers| match layers {
        Layers::One(layer) => vec![layer],
        Layers::Many(layers) => layers,
    }))
}

fn in_order<'de, D, T>(deserializer: D) -> Result<Vec<(String, T)>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: serde::de::DeserializeOwned,
{
    let map = Option::<Map<String, Value>>::deserialize(deserializer)?.unwrap_or_default();
    map.into_iter()
        .map(|(key, value)| Ok((key, serde_json::from_value(value).map_err(serde::de::Error::custom)?)))
        .collect()
}

/// Every start but gaussian reads as the default: it no longer matters once A is there.
fn init<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<InitLora, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let gaussian = value.as_str().is_some_and(|text| text.eq_ignore_ascii_case("gaussian"));
    Ok(if gaussian { InitLora::Gaussian } else { InitLora::Kaiming })
}
