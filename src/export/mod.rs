//! What is written: PEFT adapters ([`peft`]), merged models ([`merged`]), the manifest ([`manifest`]), all of a run
//! together ([`run`]). Each folder appears whole
//! or not at all ([`folder`]).

pub mod folder;
pub mod manifest;
pub mod merged;
pub mod peft;
pub mod run;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde_json::Value;

use crate::weights::Checkpoint;

/// The small files that travel with what was trained: the base's own, with the chat template it was trained with.
///
/// `chat_template` is the template of the recipe, where it is not the base's own: a model must be served with the template it
/// was trained with, so it replaces the base's both as `chat_template.jinja` and inside `tokenizer_config.json`.
pub fn sidecars(checkpoint: &Checkpoint, chat_template: Option<&str>) -> BTreeMap<String, Vec<u8>> {
    let mut files = checkpoint.sidecars.clone();
    let Some(template) = chat_template else { return files };
    files.insert("chat_template.jinja".into(), template.as_bytes().to_vec());
    if let Some(bytes) = files.get_mut("tokenizer_config.json")
        && let Ok(mut config) = serde_json::from_slice::<Value>(bytes)
        && let Some(inside) = config.get_mut("chat_template")
    {
        *inside = Value::String(template.to_string());
        *bytes = format!("{config:#}\n").into_bytes();
    }
    files
}
