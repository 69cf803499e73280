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
        && let Some(replaced) = with_template(bytes, template)
    {
        *bytes = replaced;
    }
    files
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
