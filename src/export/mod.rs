//! What is written: PEFT adapters ([`peft`]), merged models ([`merged`]), quantised bases ([`quantised`]), GGUF ([`gguf`]) and its
//! Modelfile ([`ollama`]), what servers load ([`served`], by the rules of [`target`]), the manifest ([`manifest`]), all of a run
//! together ([`run`]). Each folder appears whole
//! or not at all ([`folder`]).

pub mod card;
pub mod documentation;
pub mod folder;
pub mod gguf;
pub mod licence;
pub mod manifest;
pub mod merged;
mod mlx;
pub mod ollama;
pub mod peft;
pub mod probe;
pub mod quantised;
pub mod run;
pub mod served;
pub mod server;
pub mod signature;
pub mod target;
pub mod unchanged;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::data::{Encoder, Tokenizer};
use crate::recipe::DatasetRecipe;
use crate::weights::Checkpoint;

/// The small files that travel with what was trained: the base's own, with the chat template it was trained with.
///
/// `chat_template` is the template of the recipe, where it is not the base's own. A model must be served with the template it
/// was trained with, and stop where its turns end: so it replaces the base's both as `chat_template.jinja` and inside
/// `tokenizer_config.json`, and what ends its turns joins `generation_config.json`.
pub fn sidecars(checkpoint: &Checkpoint, chat_template: Option<&str>) -> BTreeMap<String, Vec<u8>> {
    let mut files = checkpoint.sidecars.clone();
    let Some(template) = chat_template else { return files };
    files.insert("chat_template.jinja".into(), template.as_bytes().to_vec());
    if let Some(bytes) = files.get_mut("tokenizer_config.json")
        && let Some(replaced) = with_template(bytes, template)
    {
        *bytes = replaced;
    }
    if let Some(config) = with_ends(files.get("generation_config.json"), &checkpoint.config, &end_ids(&files)) {
        files.insert("generation_config.json".into(), config);
    }
    files
}

/// Token ids that end a generation by these files: the model's own, and those that end a turn of their template. None without
/// a tokenizer to say so; one that cannot be read was refused long before anything is written.
fn end_ids(files: &BTreeMap<String, Vec<u8>>) -> Vec<u32> {
    let tokenizer = Tokenizer::new(files);
    let encoder = tokenizer.and_then(|tokenizer| Encoder::new(Arc::new(tokenizer), &DatasetRecipe::defaults()));
    encoder.map(|encoder| encoder.end_ids()).unwrap_or_default()
}

/// `generation_config.json` whose `eos_token_id` holds all of `end_ids`; `None` where it does already.
fn with_ends(generation: Option<&Vec<u8>>, config: &Value, end_ids: &[u32]) -> Option<Vec<u8>> {
    let mut generation: Value =
        generation.and_then(|bytes| serde_json::from_slice(bytes).ok()).unwrap_or_else(|| json!({}));
    let known = generation.get("eos_token_id").or_else(|| config.get("eos_token_id"));
    let mut ids: Vec<u64> = match known {
        Some(Value::Array(ids)) => ids.iter().filter_map(Value::as_u64).collect(),
        Some(id) => id.as_u64().into_iter().collect(),
        None => Vec::new(),
    };
    let before = ids.len();
    ids.extend(end_ids.iter().map(|id| u64::from(*id)));
    let mut seen = std::collections::HashSet::new();
    ids.retain(|id| seen.insert(*id));
    if ids.len() == before {
        return None;
    }
    generation.as_object_mut()?.insert("eos_token_id".into(), Value::from(ids));
    Some(format!("{generation:#}\n").into_bytes())
}

/// `tokenizer_config.json` with another template where it holds one; `None` where it holds none.
///
/// Only the template's own bytes change: written out anew, a `model_max_length` of 10^30 would no longer be an integer.
fn with_template(bytes: &[u8], template: &str) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(bytes).ok()?;
    let mut expected: Value = serde_json::from_str(text).ok()?;
    *expected.get_mut("chat_template")? = Value::from(template);
    let key = "\"chat_template\"";
    for (at, _) in text.match_indices(key) {
        let after = text[at + key.len()..].trim_start();
        let Some(value) = after.strip_prefix(':').map(str::trim_start) else { continue };
        let mut values = serde_json::Deserializer::from_str(value).into_iter::<Value>();
        if !matches!(values.next(), Some(Ok(_))) {
            continue;
        }
        let (before, behind) = (&text[..text.len() - value.len()], &value[values.byte_offset()..]);
        let replaced = format!("{before}{}{behind}", Value::from(template));
        // The key may also occur deeper, or within a text.
        if serde_json::from_str::<Value>(&replaced).is_ok_and(|found| found == expected) {
            return Some(replaced.into_bytes());
        }
    }
    Some(format!("{expected:#}\n").into_bytes())
}
