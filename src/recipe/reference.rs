//! The recipe's reference, made from its structs: a JSON Schema for editors and checks, a Markdown table for people.

use std::fmt::Write;

use schemars::generate::SchemaSettings;
use serde_json::Value as Json;

use super::{Recipe, check};

/// The JSON Schema (draft 7, which every editor knows) of a recipe, without references to other parts of itself.
pub fn json_schema() -> Json {
    let settings = SchemaSettings::draft07().with(|settings| settings.inline_subschemas = true);
    // Through serde, which puts a schema's keys into the order people read them in; a schema is always JSON.
    let mut schema =
        serde_json::to_value(settings.into_generator().into_root_schema_for::<Recipe>()).unwrap_or_default();
    schema["title"] = "engraft recipe".into();
    drop_empty_defaults(&mut schema);
    schema
}

/// The reference as Markdown: one table for the top and one for each section.
pub fn markdown() -> String {
    let schema = json_schema();
    let mut text = String::new();
    let mut sections = vec![(String::new(), &schema)];
    sections.extend(
        properties(&schema).filter(|(_, section)| is_section(section)).map(|(key, section)| (key.clone(), section)),
    );
    for (name, section) in sections {
        if !name.is_empty() {
            let _ = writeln!(text, "\n### `{name}`\n\n{}\n", line(section));
        }
        text.push_str("| Key | Type | Default | Meaning |\n|---|---|---|---|\n");
        for (key, property) in properties(section) {
            let required = section["required"].as_array().is_some_and(|keys| keys.iter().any(|name| name == key));
            let default = match (&property["default"], required) {
                (_, true) => "required".into(),
                (Json::Null, _) => String::new(),
                (Json::String(text), _) => format!("`{text}`"),
                (Json::Array(items), _) => {
                    format!("`[{}]`", items.iter().filter_map(Json::as_str).collect::<Vec<_>>().join(", "))
                }
                (value, _) => format!("`{}`", value.to_string().trim_end_matches(".0")),
            };
            let kind = if is_section(property) { format!("[section](#{key})") } else { kind(property) };
            let _ = writeln!(text, "| `{key}` | {kind} | {default} | {} |", meaning(property).replace('|', "\\|"));
        }
    }
    text
}

/// Nulls and whole sections say nothing as defaults: the key is simply absent, the section's keys have their own.
fn drop_empty_defaults(schema: &mut Json) {
    let section = schema["type"] == "object";
    match schema {
        Json::Object(map) => {
            if map.get("default").is_some_and(|default| default.is_null() || (section && default.is_object())) {
                map.shift_remove("default");
            }
            map.values_mut().for_each(drop_empty_defaults);
        }
        Json::Array(items) => items.iter_mut().for_each(drop_empty_defaults),
        _ => {}
    }
}

fn properties(schema: &Json) -> impl Iterator<Item = (&String, &Json)> {
    schema["properties"].as_object().into_iter().flatten()
}

fn is_section(schema: &Json) -> bool {
    schema["properties"].is_object()
}

fn line(schema: &Json) -> String {
    schema["description"].as_str().unwrap_or_default().replace('\n', " ")
}

/// The description, then what each choice means, then the bounds.
fn meaning(schema: &Json) -> String {
    let mut text = line(schema);
    let choices: Vec<String> = check::alternatives(schema)
        .into_iter()
        .chain(std::iter::once(&schema["items"]))
        .flat_map(|schema| schema["oneOf"].as_array().into_iter().flatten())
        .filter_map(|choice| Some(format!("`{}`: {}", choice["const"].as_str()?, line(choice))))
        .collect();
    for choice in choices {
        text.push_str("<br>");
        text.push_str(&choice);
    }
    let bounds = check::bounds(schema, None);
    if !bounds.is_empty() && bounds != "at least 0" {
        let _ = write!(text, " ({bounds})");
    }
    text
}

fn kind(schema: &Json) -> String {
    let mut kinds: Vec<String> = Vec::new();
    for schema in check::alternatives(schema) {
        if !check::choices(schema).is_empty() {
            kinds.push("choice".into());
            continue;
        }
        kinds.extend(check::types(schema).into_iter().filter_map(|name| {
            Some(match name {
                "boolean" => "true/false".into(),
                "integer" => "whole number".into(),
                "number" => "number".into(),
                "string" => "text".into(),
                "array" => match kind(&schema["items"]) {
                    items if items.contains(" or ") => format!("list of ({items})"),
                    items => format!("list of {items}"),
                },
                "object" if is_section(schema) => {
                    format!("{{{}}}", properties(schema).map(|(key, _)| key.as_str()).collect::<Vec<_>>().join(", "))
                }
                "object" => format!("{{name: {}}}", kind(&schema["additionalProperties"])),
                _ => return None,
            })
        }));
    }
    kinds.dedup();
    kinds.join(" or ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Editors read the committed file; this keeps it true. Write it anew with `engraft schema > recipes/recipe.schema.json`.
    #[test]
    fn the_committed_schema_is_up_to_date() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/recipes/recipe.schema.json");
        let committed: Json = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert!(committed == json_schema(), "run: engraft schema > recipes/recipe.schema.json");
    }

    /// Put it there anew with `engraft schema --markdown`.
    #[test]
    fn the_readme_holds_the_reference() {
        let readme = include_str!("../../README.md");
        assert!(readme.contains(markdown().trim()), "put the output of `engraft schema --markdown` into the README");
    }

    #[test]
    fn the_schema_refers_to_nothing_and_describes_every_key() {
        let schema = json_schema();
        assert!(!schema.to_string().contains("\"$ref\""));
        assert_eq!(schema["properties"]["training"]["properties"]["learning_rate"]["default"], 2e-4);
        assert_eq!(schema["properties"]["training"].get("default"), None);
        for key in check::known_keys(&schema) {
            let pointer = format!("/properties/{}", key.replace('.', "/properties/"));
            let property = schema.pointer(&pointer).unwrap();
            assert!(!line(property).is_empty(), "{key} has no description");
        }
    }

    #[test]
    fn the_reference_has_a_row_for_every_key() {
        let text = markdown();
        for key in check::known_keys(&json_schema()) {
            let name = key.rsplit('.').next().unwrap();
            assert!(text.contains(&format!("\n| `{name}` | ")), "{key}");
        }
        assert!(text.contains("| `r` | whole number | `16` | Rank. (at least 1 and at most 65536) |"), "{text}");
        assert!(text.contains("| `base_model` | text | required | "), "{text}");
    }
}
