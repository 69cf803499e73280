//! One page of data per family: `config.json` to [`ModelSpec`] and tensor names.

mod assembly;
mod block;
mod cohere;
mod config;
mod deepseek;
mod deepseek_v4;
mod experts;
mod fused;
mod gemma;
mod gemma4;
mod gpt_oss;
mod heads;
mod layer_norm;
mod layers;
mod llama;
mod llama4;
mod olmo;
mod qwen_next;
mod rope;
mod said;
mod wrapped;

use std::cell::RefCell;

use super::ModelSpec;
use crate::weights::{Checkpoint, prove_readable};
use crate::{Error, Fault, Result};
use config::Config;
pub use said::notices;
use wrapped::wrapped;

/// A family: the `model_type` it answers to, what people know it by, and its page.
struct Family {
    model_type: &'static str,
    known_as: &'static str,
    spec: Page,
}

/// From a config to a spec.
type Page = fn(&Config<'_>) -> Result<ModelSpec>;

const FAMILIES: &[Family] = &[
    Family { model_type: "llama", known_as: "Llama 2 and 3, Yi, SmolLM2, Falcon 3, TinyLlama", spec: llama::llama },
    Family { model_type: "mobilellm", known_as: "MobileLLM, also with shared blocks (LS)", spec: llama::mobilellm },
    Family { model_type: "smollm3", known_as: "SmolLM3", spec: llama::smollm3 },
    Family { model_type: "mistral", known_as: "Mistral 7B, Nemo, Small", spec: llama::mistral },
    Family { model_type: "ministral", known_as: "Ministral", spec: llama::ministral },
    Family { model_type: "ministral3", known_as: "Ministral 3", spec: llama::ministral3 },
    Family { model_type: "mistral3", known_as: "Mistral Small 3.1, 3.2", spec: |c| wrapped(c, &wrapped::MISTRAL3) },
    Family { model_type: "qwen2", known_as: "Qwen 2 and 2.5", spec: llama::qwen2 },
    Family { model_type: "qwen3", known_as: "Qwen 3", spec: llama::qwen3 },
    Family { model_type: "mixtral", known_as: "Mixtral", spec: experts::mixtral },
    Family { model_type: "qwen2_moe", known_as: "Qwen 1.5 and 2 MoE", spec: experts::qwen2_moe },
    Family { model_type: "qwen3_moe", known_as: "Qwen 3 MoE (30B-A3B, 235B-A22B)", spec: experts::qwen3_moe },
    Family { model_type: "qwen3_next", known_as: "Qwen3-Next 80B-A3B", spec: qwen_next::qwen3_next },
    Family { model_type: "qwen3_5_text", known_as: "Qwen 3.5 (text)", spec: qwen_next::qwen3_5 },
    Family { model_type: "qwen3_5", known_as: "Qwen 3.5 0.8B to 27B", spec: |c| wrapped(c, &wrapped::QWEN3_5) },
    Family {
        model_type: "qwen3_5_moe_text",
        known_as: "Qwen 3.5 with experts (text)",
        spec: qwen_next::qwen3_5_moe_apart,
    },
    Family {
        model_type: "qwen3_5_moe",
        known_as: "Qwen 3.5 35B-A3B to 397B-A17B",
        spec: |c| wrapped(c, &wrapped::QWEN3_5_MOE),
    },
    Family { model_type: "granite", known_as: "Granite 3", spec: llama::granite },
    Family { model_type: "gemma", known_as: "Gemma", spec: gemma::gemma },
    Family { model_type: "gemma2", known_as: "Gemma 2", spec: gemma::gemma2 },
    Family { model_type: "gemma3_text", known_as: "Gemma 3 (text)", spec: gemma::gemma3 },
    Family { model_type: "gemma3", known_as: "Gemma 3 with pictures", spec: |c| wrapped(c, &wrapped::GEMMA3) },
    Family { model_type: "gemma4_text", known_as: "Gemma 4 (text)", spec: gemma4::gemma4 },
    Family { model_type: "gemma4", known_as: "Gemma 4 (E2B, E4B, 26B-A4B)", spec: |c| wrapped(c, &wrapped::GEMMA4) },
    Family { model_type: "phi3", known_as: "Phi-3, Phi-3.5, Phi-4", spec: fused::phi3 },
    Family { model_type: "phimoe", known_as: "Phi-3.5-MoE", spec: experts::phimoe },
    Family { model_type: "llama4_text", known_as: "Llama 4 (text)", spec: llama4::llama4 },
    Family { model_type: "llama4", known_as: "Llama 4 Scout, Maverick", spec: |c| wrapped(c, &wrapped::LLAMA4) },
    Family { model_type: "gpt_oss", known_as: "gpt-oss 20b, 120b", spec: gpt_oss::gpt_oss },
    Family { model_type: "glm", known_as: "GLM-4 9B", spec: fused::glm },
    Family { model_type: "glm4", known_as: "GLM-4 0414", spec: fused::glm4 },
    Family { model_type: "olmo2", known_as: "OLMo 2", spec: olmo::olmo2 },
    Family { model_type: "olmo3", known_as: "OLMo 3", spec: olmo::olmo3 },
    Family { model_type: "cohere", known_as: "Command R", spec: cohere::cohere },
    Family { model_type: "cohere2", known_as: "Command R7B, Command A", spec: cohere::cohere2 },
    Family { model_type: "starcoder2", known_as: "StarCoder 2", spec: layer_norm::starcoder2 },
    Family { model_type: "deepseek_v2", known_as: "DeepSeek V2, V2-Lite, V2.5", spec: deepseek::v2 },
    Family { model_type: "deepseek_v3", known_as: "DeepSeek V3, V3.1, R1", spec: deepseek::v3 },
    Family { model_type: "deepseek_v4", known_as: "DeepSeek V4 Flash, Pro", spec: deepseek_v4::deepseek_v4 },
    Family { model_type: "gpt_neox", known_as: "GPT-NeoX, Pythia", spec: layer_norm::gpt_neox },
    Family { model_type: "stablelm", known_as: "StableLM", spec: layer_norm::stablelm },
    Family { model_type: "phi", known_as: "Phi-1.5, Phi-2", spec: layer_norm::phi },
    Family { model_type: "falcon", known_as: "Falcon 7B, 40B, 180B, RW", spec: layer_norm::falcon },
    Family { model_type: "bloom", known_as: "BLOOM, BLOOMZ", spec: layer_norm::bloom },
];

/// Other pages of some types: the same model in files that are laid out otherwise, as the files alone tell. Quantised ones store apart
/// what is published stacked: every expert is a linear of its own to the tools that make them.
const ALSO: &[(&str, Page)] = &[
    ("qwen3_5_moe_text", qwen_next::qwen3_5_moe_of_larger),
    ("qwen3_5_moe_text", qwen_next::qwen3_5_moe_apart_of_larger),
    ("qwen3_5_moe", |c| wrapped(c, &wrapped::QWEN3_5_MOE_APART)),
];

/// Every `model_type` that is supported, with what people know it by.
pub fn supported() -> impl Iterator<Item = (&'static str, &'static str)> {
    FAMILIES.iter().map(|family| (family.model_type, family.known_as))
}

/// The spec of a checkpoint, from its `config.json`, proved against its tensors.
///
/// Errors, which name the file: what [`ModelSpec::prove`] finds; a `model_type` that no family answers to (the answer lists those supported), a field
/// that is missing, out of range or asks for something not supported.
pub fn spec(checkpoint: &Checkpoint) -> Result<ModelSpec> {
    let fitted = |spec: Result<ModelSpec>| -> Result<ModelSpec> {
        let mut spec = spec.map_err(|error| checkpoint.located(error))?;
        spec.settle(checkpoint)?;
        spec.prove(checkpoint)?;
        Ok(spec)
    };
    fitted(from_config(&checkpoint.config)).or_else(|error| {
        let model_type = checkpoint.config.get("model_type").and_then(|value| value.as_str());
        let also = ALSO.iter().filter(|(known, _)| Some(*known) == model_type);
        let found = also.map(|(known, page)| fitted(from_page(&checkpoint.config, known, *page))).find_map(Result::ok);
        found.ok_or(error)
    })
}

/// [`spec`] of a `config.json` alone.
pub fn from_config(config: &serde_json::Value) -> Result<ModelSpec> {
    prove_readable(config)?;
    let asked = RefCell::default();
    let config = Config::new(config, &asked);
    let model_type = config.text("model_type")?;
    let family = FAMILIES.iter().find(|family| family.model_type == model_type).ok_or_else(|| {
        let known: Vec<&str> = supported().map(|(model_type, _)| model_type).collect();
        let what = match unknown_features(&config).join(", ") {
            features if features.is_empty() => format!("'{model_type}' is not supported"),
            features => {
                format!("'{model_type}' is not supported; no family here knows what its config calls {features}")
            }
        };
        Error::Model(Fault::new("config.json: model_type", what).hint(format!("supported: {}", known.join(", "))))
    })?;
    from_page(config.value(), family.model_type, family.spec)
}

/// [`spec`] of a `config.json` alone, by a page of its type.
fn from_page(config: &serde_json::Value, model_type: &str, page: Page) -> Result<ModelSpec> {
    let asked = RefCell::default();
    let config = Config::new(config, &asked);
    let spec = page(&config)?;
    // A larger model's own fields are of its other parts.
    if config.has("text_config") {
        config.prove_featureless()?
    } else {
        config.prove_understood()?
    }
    Ok(ModelSpec { model_type: model_type.to_string(), ..spec })
}

/// How many fields an error names.
const NAMED: usize = 8;

/// Fields of a config that no page asks for.
fn unknown_features(config: &Config<'_>) -> Vec<String> {
    for family in FAMILIES {
        let _ = (family.spec)(config);
    }
    let unknown = config.unknown();
    let more = if unknown.len() > NAMED { vec!["...".to_string()] } else { Vec::new() };
    unknown.into_iter().take(NAMED).map(|(name, _)| name.to_string()).chain(more).collect()
}

#[cfg(test)]
mod curves_tests;
#[cfg(test)]
mod fields_tests;
#[cfg(test)]
mod kernels_tests;
#[cfg(test)]
mod published;
#[cfg(test)]
mod tests;
