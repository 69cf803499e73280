//! What a model's small files say of its tokenizer.

use std::collections::BTreeMap;

use serde_json::Value as Json;
use sha2::{Digest, Sha256};
use tokenizers::{AddedToken, ModelWrapper};

use crate::data::quiet::quietly;
use crate::data::tokenizer::hexadecimal;
use crate::{Error, Fault, Result};

/// A character may become this many bytes by the tokenizer's own replacements: a space becomes `▁` (3), seldom more.
const MOST_GROWTH: usize = 1000;
/// The names transformers gives special tokens, in templates and in `tokenizer_config.json`.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

pub(super) fn read_tokenizer(
    sidecars: &BTreeMap<String, Vec<u8>>,
    notices: &mut Vec<String>,
) -> Result<tokenizers::Tokenizer> {
    let Some(bytes) = sidecars.get("tokenizer.json") else {
        let what = if sidecars.contains_key("tokenizer.model") {
            "the model has only tokenizer.model (sentencepiece); engraft reads tokenizer.json"
        } else {
            "the model has no tokenizer.json"
        };
        let hint =
            "make it once with transformers: AutoTokenizer.from_pretrained(\"MODEL\").save_pretrained(\"MODEL\")";
        return Err(Error::Model(Fault::new("tokenizer.json", what).hint(hint)));
    };
    check_bom("tokenizer.json", bytes)?;
    let damaged = |what: String| {
        let hint = "fetch the file again, or make it with transformers' save_pretrained";
        Error::Model(Fault::new("tokenizer.json", format!("not a tokenizer: {what}")).hint(hint))
    };
    let mut inner = quietly(|| tokenizers::Tokenizer::from_bytes(bytes))
        .map_err(|panic| damaged(format!("its contents contradict one another ({panic})")))?
        .map_err(|error| damaged(error.to_string()))?;
    let steps = [
        ("normalizer", inner.get_normalizer().map(serde_json::to_value)),
        ("decoder", inner.get_decoder().map(serde_json::to_value)),
    ];
    for (name, step) in steps {
        let Some(step) = step else { continue };
        let growth = growth(&step.map_err(|error| damaged(error.to_string()))?);
        if growth > MOST_GROWTH {
            let what = format!("its {name} makes one character up to {growth} bytes, more than {MOST_GROWTH}");
            return Err(damaged(what));
        }
    }
    if let ModelWrapper::BPE(model) = inner.get_model()
        && let Some(dropout) = model.dropout.filter(|dropout| *dropout > 0.0)
    {
        // It leaves merges out by chance: the same text would have other tokens each time it is read.
        let mut model = model.clone();
        model.dropout = None;
        inner.with_model(model);
        notices.push(format!(
            "tokenizer.json: its dropout of {dropout} is switched off, so that a text always has the same tokens"
        ));
    }
    inner.with_truncation(None).map_err(|error| damaged(error.to_string()))?;
    inner.with_padding(None);
    Ok(inner)
}

/// How many bytes one character may become by the replacements in a step and the steps within it, at most.
fn growth(step: &Json) -> usize {
    let length = |value: &Json| value.as_str().map(str::len);
    let own = match step["type"].as_str() {
        // An expression may match between any two characters.
        Some("Replace") => match length(&step["pattern"]["String"]) {
            Some(pattern) => length(&step["content"]).unwrap_or(0).div_ceil(pattern.max(1)),
            None => length(&step["content"]).unwrap_or(0) + 1,
        },
        Some("Prepend") => length(&step["prepend"]).unwrap_or(0),
        _ => 1,
    };
    let inner = match step {
        Json::Array(steps) => steps.iter().map(growth).fold(1, usize::saturating_mul),
        Json::Object(fields) => fields.values().map(growth).fold(1, usize::saturating_mul),
        _ => 1,
    };
    own.max(1).saturating_mul(inner)
}

/// The first token of a text as the tokenizer itself begins one; what it cannot do with a letter it can do with no text.
pub(super) fn first_of_probe(inner: &tokenizers::Tokenizer) -> Result<Option<u32>> {
    let unusable = |what: String| {
        let hint = "fetch the file again, or make it with transformers' save_pretrained";
        let what = format!("it fails on the text `a`: {what}");
        Error::Model(Fault::new("tokenizer.json", what).hint(hint))
    };
    let encoding = quietly(|| inner.encode("a", true)).map_err(unusable)?;
    let encoding = encoding.map_err(|error| unusable(error.to_string()))?;
    Ok(encoding.get_ids().first().copied())
}

/// A JSON file, `null` when there is none.
pub(super) fn read_json(sidecars: &BTreeMap<String, Vec<u8>>, name: &str) -> Result<Json> {
    let Some(bytes) = sidecars.get(name) else { return Ok(Json::Null) };
    check_bom(name, bytes)?;
    serde_json::from_slice(bytes)
        .map_err(|error| Error::Model(Fault::new(name, format!("not JSON: {error}")).hint("fetch the file again")))
}

fn check_bom(name: &str, bytes: &[u8]) -> Result<()> {
    if bytes.starts_with(&[0xEF, 0xBB, 0xBF]) || bytes.starts_with(&[0xFF, 0xFE]) || bytes.starts_with(&[0xFE, 0xFF]) {
        let fault = Fault::new(name, "the file begins with a byte-order mark");
        return Err(Error::Model(fault.hint("save it as UTF-8 without one")));
    }
    Ok(())
}

/// Every token must have a row in the model's embedding.
pub(super) fn check_vocabulary(inner: &tokenizers::Tokenizer, config: &Json) -> Result<()> {
    let sizes = [&config["vocab_size"], &config["text_config"]["vocab_size"]];
    let Some(size) = sizes.iter().find_map(|size| size.as_u64()) else { return Ok(()) };
    let outside = inner.get_vocab(true).into_iter().filter(|(_, id)| u64::from(*id) >= size).max_by_key(|(_, id)| *id);
    if let Some((token, id)) = outside {
        let what = format!("token `{token}` has id {id}, but the model's vocabulary has {size} rows (config.json)");
        let hint = "the tokenizer and the weights belong to different models, or tokens were added without resizing the embedding";
        return Err(Error::Model(Fault::new("tokenizer.json", what).hint(hint)));
    }
    Ok(())
}

/// Special tokens by name: as the tokenizer's files say, else by the ids of the model's configuration.
pub(super) fn named_tokens(inner: &tokenizers::Tokenizer, files: &[&Json], configs: &[&Json]) -> Vec<(String, String)> {
    NAMED
        .iter()
        .filter_map(|name| {
            let in_file = |file: &&Json| {
                let value = &file[*name];
                value
                    .as_str()
                    .or(value["content"].as_str())
                    .filter(|text| inner.token_to_id(text).is_some())
                    .map(String::from)
            };
            let by_id = |config: &&Json| {
                let ids = whole_numbers(&config[format!("{name}_id")]);
                ids.first().and_then(|id| inner.id_to_token(*id))
            };
            let text = files.iter().find_map(in_file).or_else(|| configs.iter().find_map(by_id))?;
            Some((name.to_string(), text))
        })
        .collect()
}

/// Named tokens are special even where `tokenizer.json` does not say so, as transformers has it.
pub(super) fn mark_special(inner: &mut tokenizers::Tokenizer, named: &[(String, String)]) -> Result<()> {
    let decoder = inner.get_added_tokens_decoder();
    let missing: Vec<AddedToken> = named
        .iter()
        .filter_map(|(_, text)| match decoder.values().find(|token| token.content == *text) {
            Some(token) if token.special => None,
            Some(token) => Some(token.clone().special(true)),
            None => Some(AddedToken::from(text.as_str(), true)),
        })
        .collect();
    if !missing.is_empty() {
        inner.add_special_tokens(missing).map_err(|error| Error::Model(Fault::new("tokenizer_config.json", error)))?;
    }
    if inner.get_added_tokens_decoder().len() >= 60_000 {
        return Err(Error::Model(Fault::new("tokenizer.json", "more than 60,000 added tokens")));
    }
    Ok(())
}

/// One id, or several.
pub(super) fn whole_numbers(value: &Json) -> Vec<u32> {
    let id = |value: &Json| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Json::Array(ids) => ids.iter().filter_map(id).collect(),
        one => id(one).into_iter().collect(),
    }
}

/// `chat_template.jinja` before `tokenizer_config.json`, where it is a text or a list of named ones.
pub(super) fn chat_templates(
    sidecars: &BTreeMap<String, Vec<u8>>,
    tokenizer_config: &Json,
) -> Result<BTreeMap<String, String>> {
    let mut templates = BTreeMap::new();
    match &tokenizer_config["chat_template"] {
        Json::String(text) => {
            templates.insert("default".to_string(), text.clone());
        }
        Json::Array(named) => {
            templates.extend(named.iter().filter_map(|named| {
                Some((named["name"].as_str()?.to_string(), named["template"].as_str()?.to_string()))
            }))
        }
        Json::Object(named) => {
            templates.extend(named.iter().filter_map(|(name, text)| Some((name.clone(), text.as_str()?.to_string()))))
        }
        _ => {}
    }
    if let Some(bytes) = sidecars.get("chat_template.jinja") {
        let text = std::str::from_utf8(bytes)
            .map_err(|_| Error::Model(Fault::new("chat_template.jinja", "the file is not UTF-8")))?;
        // A byte-order mark is the editor's, not the template's.
        let text = text.strip_prefix('\u{FEFF}').unwrap_or(text);
        templates.clear();
        templates.insert("default".into(), text.into());
    }
    Ok(templates)
}

pub(super) fn digest(sidecars: &BTreeMap<String, Vec<u8>>) -> String {
    let mut hasher = Sha256::new();
    for (name, bytes) in sidecars {
        hasher.update((name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        hasher.update((bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    }
    hexadecimal(&hasher.finalize())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::data::tokenizer::Tokenizer;
    use crate::data::tokenizer::tests::{sidecars, with};

    #[test]
    fn damaged_files_are_errors_that_name_the_file() {
        let deep = "[".repeat(200_000);
        let deep_object = "{\"a\":".repeat(200_000);
        let good = String::from_utf8(sidecars("bytes")["tokenizer.json"].clone()).unwrap();
        let mut damaged: Vec<(&str, Vec<u8>)> = Vec::new();
        for name in [
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "generation_config.json",
            "config.json",
        ] {
            damaged.push((name, deep.clone().into_bytes()));
            damaged.push((name, deep_object.clone().into_bytes()));
            damaged.push((name, b"\xEF\xBB\xBF{}".to_vec()));
            damaged.push((name, b"".to_vec()));
            damaged.push((name, b"\x00\xff garbage".to_vec()));
            damaged.push((name, b"{\"model\": ".to_vec()));
        }
        for text in [
            "{}",
            "[]",
            "null",
            "{\"model\": {\"type\": \"BPE\"}}",
            &good[..good.len() / 2],
            &good.replace("\"BPE\"", "\"Nonsense\""),
        ] {
            damaged.push(("tokenizer.json", text.as_bytes().to_vec()));
        }
        damaged.push(("chat_template.jinja", vec![0xFF, 0xFE, 0x00]));
        for (name, bytes) in damaged {
            let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(40)]).into_owned();
            let error = with("bytes", &[(name, &bytes)]).err().unwrap_or_else(|| panic!("{name}: {shown} was taken"));
            assert!(error.to_string().starts_with(name), "{name}: {error}");
        }
    }

    /// `tokenizer.json` of a fixture with one of its parts replaced.
    fn changed(name: &str, edit: impl FnOnce(&mut Json)) -> Vec<u8> {
        let mut file: Json = serde_json::from_slice(&sidecars(name)["tokenizer.json"]).unwrap();
        edit(&mut file);
        file.to_string().into_bytes()
    }

    #[test]
    fn a_tokenizer_that_panics_or_swells_is_an_error() {
        let replace = |pattern: &str, content: &str| json!({"type": "Replace", "pattern": {"String": pattern}, "content": content});
        let thrice = vec![replace("a", &"a".repeat(2000)); 3];
        let processor = json!({
            "type": "TemplateProcessing", "special_tokens": {}, "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "single": [{"SpecialToken": {"id": "nobody", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        });
        for (what, key, value) in [
            ("", "normalizer", replace("", "x")),
            ("8000000000 bytes", "normalizer", json!({"type": "Sequence", "normalizers": thrice})),
            ("more than 1000", "decoder", replace("a", &"b".repeat(2000))),
            ("", "post_processor", processor),
        ] {
            let bytes = changed("bytes", |file| file[key] = value);
            let error = with("bytes", &[("tokenizer.json", &bytes)]).err().unwrap_or_else(|| panic!("{key} was taken"));
            assert!(error.to_string().starts_with("tokenizer.json") && error.to_string().contains(what), "{error}");
        }
        let space = changed("bytes", |file| file["normalizer"] = replace(" ", "\u{2581}"));
        assert!(with("bytes", &[("tokenizer.json", &space)]).is_ok());
    }

    #[test]
    fn dropout_is_switched_off_and_said() {
        let bytes = changed("bytes", |file| file["model"]["dropout"] = json!(0.9));
        let tokenizer = with("bytes", &[("tokenizer.json", &bytes)]).unwrap();
        let plain = with("bytes", &[]).unwrap();
        let text = "The quick brown fox jumps over the lazy dog. ".repeat(5);
        assert_eq!(tokenizer.encode(&text), plain.encode(&text));
        assert!(tokenizer.notices()[0].contains("dropout of 0.9"), "{:?}", tokenizer.notices());
        assert!(plain.notices().is_empty());
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_a_template() {
        let tokenizer = with("bytes", &[("chat_template.jinja", b"\xEF\xBB\xBFhello")]).unwrap();
        assert_eq!(tokenizer.chat_templates()["default"], "hello");
    }

    #[test]
    fn a_missing_tokenizer_says_how_to_make_one() {
        let sentencepiece = BTreeMap::from([("tokenizer.model".to_string(), vec![1, 2])]);
        let error = Tokenizer::new(&sentencepiece).err().unwrap().to_string();
        assert!(error.contains("sentencepiece") && error.contains("save_pretrained"), "{error}");
        assert!(Tokenizer::new(&BTreeMap::new()).err().unwrap().to_string().contains("no tokenizer.json"));
    }

    #[test]
    fn a_vocabulary_smaller_than_the_tokenizer_is_an_error() {
        let error = with("bytes", &[("config.json", br#"{"vocab_size": 300}"#)]).err().unwrap().to_string();
        assert!(error.contains("300 rows"), "{error}");
        assert!(with("bytes", &[("config.json", br#"{"vocab_size": 5000}"#)]).is_ok());
    }

    #[test]
    fn ends_come_from_every_configuration() {
        let generation = br#"{"eos_token_id": [0, 2]}"#;
        let tokenizer = with("bytes", &[("generation_config.json", generation)]).unwrap();
        assert_eq!(tokenizer.end_ids(), [0, 2]);
        assert_eq!(tokenizer.eos(), Some(2));
        // Without a tokenizer_config.json, the ids of the model's configuration name the tokens.
        let mut bare = sidecars("pieces");
        bare.remove("tokenizer_config.json");
        bare.insert("config.json".into(), br#"{"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 5000}"#.to_vec());
        let tokenizer = Tokenizer::new(&bare).unwrap();
        assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.adds_bos()), (Some(1), Some(2), true));
    }

    #[test]
    fn the_template_file_wins_over_the_configuration() {
        let named = json!({"eos_token": {"content": "<|im_end|>"}, "chat_template": [
            {"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]});
        let config = named.to_string();
        let tokenizer = with("bytes", &[("tokenizer_config.json", config.as_bytes())]).unwrap();
        assert_eq!(tokenizer.chat_templates()["tool_use"], "two");
        assert_eq!(tokenizer.eos(), tokenizer.id("<|im_end|>"));
        let tokenizer =
            with("bytes", &[("tokenizer_config.json", config.as_bytes()), ("chat_template.jinja", b"three")]).unwrap();
        assert_eq!(tokenizer.chat_templates().values().collect::<Vec<_>>(), ["three"]);
    }
}
