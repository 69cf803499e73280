//! One page of data per family: `config.json` to [`ModelSpec`] and tensor names.

mod config;
mod llama;

use super::ModelSpec;
use crate::weights::Checkpoint;
use crate::{Error, Fault, Result};
use config::Config;

/// A family: the `model_type`s it answers to, and its page.
struct Family {
    model_types: &'static [&'static str],
    spec: fn(&Config<'_>) -> Result<ModelSpec>,
}

const FAMILIES: &[Family] = &[Family { model_types: llama::MODEL_TYPES, spec: llama::spec }];

/// The spec of a checkpoint, from its `config.json`, proved against its tensors.
///
/// Errors: what [`ModelSpec::prove`] finds; a `model_type` that no family answers to (the answer lists those supported), a field that is missing, out of
/// range or asks for something not supported.
pub fn spec(checkpoint: &Checkpoint) -> Result<ModelSpec> {
    let spec = from_config(&checkpoint.config)?;
    spec.prove(checkpoint)?;
    Ok(spec)
}

/// [`spec`] of a `config.json` alone.
pub fn from_config(config: &serde_json::Value) -> Result<ModelSpec> {
    let config = Config::new(config);
    let model_type = config.text("model_type")?;
    let family = FAMILIES.iter().find(|f| f.model_types.contains(&model_type)).ok_or_else(|| {
        let known: Vec<&str> = FAMILIES.iter().flat_map(|f| f.model_types).copied().collect();
        Error::Model(
            Fault::new("config.json: model_type", format!("'{model_type}' is not supported"))
                .hint(format!("supported: {}", known.join(", "))),
        )
    })?;
    (family.spec)(&config)
}
