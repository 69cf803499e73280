//! Messages as a template's values.

use minijinja::value::Value;
use regex::Regex;
use serde_json::Value as Json;

use super::generation;

/// A row's value for the template, its text guarded.
pub(super) fn value_of(value: &Json, apart: Option<&Regex>) -> Value {
    match value {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => Value::from(whole),
            (_, Some(whole)) => Value::from(whole),
            _ => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(generation::guard(text, apart).into_owned()),
        Json::Array(items) => items.iter().map(|item| value_of(item, apart)).collect(),
        Json::Object(fields) => {
            Value::from_pairs(fields.iter().map(|(name, value)| (name.as_str(), value_of(value, apart))))
        }
    }
}

pub(super) fn size_of_text(value: &Json) -> usize {
    match value {
        Json::String(text) => text.len(),
        Json::Array(items) => items.iter().map(size_of_text).sum(),
        Json::Object(fields) => fields.values().map(size_of_text).sum(),
        _ => 0,
    }
}

/// The text of content parts, for a template that takes text only.
pub(super) fn joined(parts: &[Json]) -> std::result::Result<String, String> {
    parts
        .iter()
        .map(|part| match (part.as_str(), part["text"].as_str(), part["type"].as_str()) {
            (Some(text), _, _) | (_, Some(text), None | Some("text")) => Ok(text),
            (_, _, kind) => {
                Err(format!("a content part of type `{}`: only text can be trained on", kind.unwrap_or("none")))
            }
        })
        .collect()
}
