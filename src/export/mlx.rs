//! An adapter as mlx-lm loads it (`tuner/utils.py`, `tuner/lora.py`): `adapters.safetensors` with `lora_a` (in, R) and `lora_b` (R, out)
//! by module, and an `adapter_config.json` of its own. Modules are called as mlx-lm's models call them, which is how the base's files
//! do; experts lie in stacks, `lora_a` (E, R, in) and `lora_b` (E, out, R), under `switch_mlp`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Value, json};
use tch::Tensor;

use super::peft::THE_BASES_OWN;
use crate::Result;
use crate::adapter::plain::Plain;
use crate::adapter::{Update, overview};
use crate::model::ModelSpec;
use crate::model::sites::Role;
use crate::weights::writer::{self, TensorSpec};

/// The weights' file.
pub(super) const WEIGHTS: &str = "adapters.safetensors";

/// Writes the files of `plain` into `folder`, and the small files of the tokenizer beside them.
pub(super) fn write(
    folder: &Path,
    plain: &Plain,
    spec: &ModelSpec,
    sidecars: &BTreeMap<String, Vec<u8>>,
) -> Result<()> {
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    for update in &plain.updates {
        let Some(module) = module(spec, update) else { continue };
        let (a, b) = (update.a.detach(), update.b.detach());
        let (a, b) = match a.dim() {
            2 => (a.tr(), b.tr()), // (in, R), (R, out)
            _ => (a, b),           // (E, R, in), (E, out, R)
        };
        tensors.push((format!("{module}.lora_a"), a.contiguous()));
        tensors.push((format!("{module}.lora_b"), b.contiguous()));
    }
    let specs: Vec<TensorSpec> = tensors.iter().map(|(name, tensor)| TensorSpec::of(name, tensor)).collect();
    let metadata = BTreeMap::from([("format".to_string(), "mlx".to_string())]);
    writer::write(&folder.join(WEIGHTS), &specs, &metadata, |index| Ok(tensors[index].1.shallow_clone()))?;
    let config = format!("{:#}\n", config(plain, spec));
    writer::write_file(&folder.join(crate::adapter::config::CONFIG), config.as_bytes())?;
    for (name, bytes) in sidecars.iter().filter(|(name, _)| !THE_BASES_OWN.contains(&name.as_str())) {
        writer::write_file(&folder.join(name), bytes)?;
    }
    Ok(())
}

/// What mlx-lm cannot find in a model of this spec, as ends of "mlx-lm cannot load this adapter: ...".
pub(super) fn unfit(spec: &ModelSpec, updates: &[Update]) -> Vec<String> {
    let mut unfit = Vec::new();
    if spec.names.among_others {
        unfit.push("the model is a part of a larger one, whose modules it calls otherwise".to_string());
    }
    let unknown: Vec<&str> =
        updates.iter().filter(|update| module(spec, update).is_none()).map(|update| update.module.as_str()).collect();
    if !unknown.is_empty() {
        unfit.push(format!("it has another layout for the experts of this model ({})", overview(&unknown)));
    }
    unfit
}

/// How mlx-lm calls a module; `None` where it puts the base's tensors together in a way that is not known here.
fn module(spec: &ModelSpec, update: &Update) -> Option<String> {
    let found = spec.names.spec_names(&update.module).find(|name| spec.names.module(name) == update.module);
    let stored = spec.names.stored(&found.unwrap_or_else(|| update.module.clone()));
    match update.role {
        Role::Experts { .. } => {
            let (block, linear) = stored.split_once(".experts.*.")?;
            ["gate_proj", "up_proj", "down_proj"].contains(&linear).then(|| format!("{block}.switch_mlp.{linear}"))
        }
        _ => Some(stored),
    }
}

fn config(plain: &Plain, spec: &ModelSpec) -> Value {
    let scale = plain.updates.first().map_or(1.0, |update| update.scale);
    let modules = plain.updates.iter().filter_map(|update| module(spec, update));
    // A key is a path in a layer, which then counts in all of them (those without numbers in the file stay as they were: their
    // lora_b begins as zeros), or a whole path.
    let key = |module: String| match module.split_once(".layers.").and_then(|(_, rest)| rest.split_once('.')) {
        Some((number, rest)) if number.bytes().all(|b| b.is_ascii_digit()) => rest.to_string(),
        _ => module,
    };
    let keys: BTreeSet<String> = modules.map(key).collect();
    json!({
        "fine_tune_type": "lora",
        "model": plain.config.base_model_name_or_path,
        "num_layers": spec.layers.len(),
        "lora_parameters": {"rank": plain.config.r, "scale": scale, "dropout": plain.config.lora_dropout, "keys": keys},
    })
}
