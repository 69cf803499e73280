//! The tokenizer and the chat template as GGUF has them: byte-level BPE as `gpt2`, SentencePiece's BPE as `llama`.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::Value as Json;

use crate::data::Tokenizer;
use crate::weights::gguf::{Pairs, SpelledOut, Written, kind, known_splittings, splitting};
use crate::{Error, Fault, Result};

const FILE: &str = "tokenizer.json";
/// SentencePiece's space.
const SPACE: char = '▁';
/// What added tokens score in llama.cpp's files.
const ADDED_SCORE: f32 = -1000.0;

/// The vocabulary: for each id its text and its kind.
struct Vocabulary {
    tokens: Vec<String>,
    kinds: Vec<i32>,
}

/// The tokenizer's keys, for a model of so many `rows` (V), and whether llama.cpp is to pass over spaces behind added tokens, for which it
/// has no key. What GGUF cannot say exactly is said in `notices`.
pub(super) fn pairs(
    sidecars: &BTreeMap<String, Vec<u8>>,
    rows: i64,
    notices: &mut Vec<String>,
) -> Result<(Pairs, bool)> {
    let fault = |what: &str| Fault::new(FILE, what);
    let Some(bytes) = sidecars.get(FILE) else {
        let what = "there is none, and a GGUF file holds its model's tokenizer";
        return Err(Error::Model(fault(what).hint("put the base's tokenizer.json beside its config.json")));
    };
    let json: Json =
        serde_json::from_slice(bytes).map_err(|error| Error::Model(fault(&format!("is not JSON: {error}"))))?;
    let tokenizer = Tokenizer::new(sidecars)?;
    if json["model"]["type"].as_str().is_some_and(|kind| kind != "BPE") {
        let what = format!("is a {} tokenizer; BPE is written as GGUF", json["model"]["type"]);
        return Err(Error::Model(fault(&what).hint("export to another target, such as transformers or vllm")));
    }
    let byte_level = holds(&json["pre_tokenizer"], "ByteLevel") || holds(&json["decoder"], "ByteLevel");
    let vocabulary = Vocabulary::of(&json, rows as usize, !byte_level)?;
    let merges = merges(&json)?;
    let mut list_merges = byte_level;
    let mut pairs = Pairs::new();
    let mut add = |key: &str, value: Written| pairs.push((format!("tokenizer.ggml.{key}"), value));
    if byte_level {
        let spelled = SpelledOut::of(&json);
        let Some(name) = splitting(&spelled) else {
            let what = format!("cuts text in a way that GGUF has no name for: {spelled}");
            let hint =
                format!("known: {}; or export to another target, such as transformers or vllm", known_splittings());
            return Err(Error::Model(fault(&what).hint(hint)));
        };
        add("model", Written::Text("gpt2".into()));
        add("pre", Written::Text(name.into()));
    } else {
        if json["model"]["byte_fallback"] != true {
            let what = "is neither byte-level nor falls back to bytes, which GGUF's tokenizers do";
            return Err(Error::Model(fault(what).hint("export to another target, such as transformers or vllm")));
        }
        add("model", Written::Text("llama".into()));
        add("pre", Written::Text("default".into()));
        let (scores, without_place) = scores(&vocabulary, &merges);
        if without_place > 0 {
            notices.push(format!(
                "llama.cpp's SentencePiece merges by scores, not by a list: {without_place} pairs of this tokenizer's have no place \
                 among them, and some words may be cut otherwise"
            ));
            list_merges = true;
        }
        add("scores", Written::F32s(scores));
        add("add_space_prefix", Written::Bool(adds_space(&json)));
    }
    add("tokens", Written::Texts(vocabulary.tokens));
    add("token_type", Written::I32s(vocabulary.kinds));
    if list_merges {
        let written = merges.iter().map(|(left, right)| format!("{} {}", spaceless(left), spaceless(right)));
        add("merges", Written::Texts(written.collect()));
    }

    let id = |name: &str| {
        let (_, text) = tokenizer.named_tokens().iter().find(|(other, _)| other == name)?;
        tokenizer.id(text)
    };
    let unknown = id("unk_token").or_else(|| tokenizer.id(json["model"]["unk_token"].as_str()?));
    let roles = [
        ("bos_token_id", tokenizer.bos()),
        ("eos_token_id", tokenizer.eos()),
        ("unknown_token_id", unknown),
        ("seperator_token_id", id("sep_token")),
        ("padding_token_id", tokenizer.pad()),
        ("cls_token_id", id("cls_token")),
        ("mask_token_id", id("mask_token")),
    ];
    for (key, id) in roles {
        if let Some(id) = id {
            add(key, Written::U32(id));
        }
    }
    let others: Vec<u32> = tokenizer.end_ids().iter().copied().filter(|end| Some(*end) != tokenizer.eos()).collect();
    if let Some(turn) = others.first() {
        add(if tokenizer.eos().is_some() { "eot_token_id" } else { "eos_token_id" }, Written::U32(*turn));
    }
    if others.len() > 1 {
        let text = |id: &u32| tokenizer.decode(&[*id], false);
        let left: Vec<String> = others[1..].iter().map(text).collect();
        notices.push(format!(
            "GGUF names two tokens that end an answer; {} ends one here, too: llama.cpp goes by such a token's text",
            left.join(", ")
        ));
    }
    add("add_bos_token", Written::Bool(tokenizer.adds_bos()));
    add("add_eos_token", Written::Bool(adds_eos(&json, &tokenizer)));
    templates(&tokenizer, &mut pairs);
    Ok((pairs, passes_over_spaces(&json, &tokenizer, notices)))
}

/// Whether spaces behind added tokens are passed over, as llama.cpp does for Phi 3: behind all but a few.
fn passes_over_spaces(json: &Json, tokenizer: &Tokenizer, notices: &mut Vec<String>) -> bool {
    const NEVER: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];
    let added = || json["added_tokens"].as_array().into_iter().flatten();
    let strips = |token: &Json| token["rstrip"] == true;
    let count = |wrong: &dyn Fn(&Json) -> bool| added().filter(|token| wrong(token)).count();
    let by_no_name = count(&strips);
    let by_name = count(&|token| strips(token) == NEVER.iter().any(|never| token["content"] == *never));
    // llama.cpp does not load a model called so that lacks one of these.
    let is_phi = ["</s>"].iter().chain(&NEVER).all(|text| tokenizer.id(text).is_some());
    let passes = is_phi && by_name < by_no_name;
    let wrong = if passes { by_name } else { by_no_name };
    if wrong > 0 {
        notices.push(format!(
            "spaces behind {wrong} of the tokenizer's added tokens are read otherwise by llama.cpp, which knows of no tokenizer that passes over them there"
        ));
    }
    passes
}

/// The usual template, and others by their names.
fn templates(tokenizer: &Tokenizer, pairs: &mut Pairs) {
    let mut others = Vec::new();
    for (name, template) in tokenizer.chat_templates() {
        let key = match name.as_str() {
            "default" => "tokenizer.chat_template".to_string(),
            other => {
                others.push(other.to_string());
                format!("tokenizer.chat_template.{other}")
            }
        };
        pairs.push((key, Written::Text(template.clone())));
    }
    if !others.is_empty() {
        pairs.push(("tokenizer.chat_templates".into(), Written::Texts(others)));
    }
}

impl Vocabulary {
    fn of(json: &Json, rows: usize, sentence_piece: bool) -> Result<Self> {
        let mut tokens: Vec<String> = (0..rows).map(|id| format!("[PAD{id}]")).collect();
        let mut kinds = vec![kind::UNUSED as i32; rows];
        let mut set = |id: Option<usize>, text: String, kind: i64| match id.filter(|id| *id < rows) {
            Some(id) => {
                tokens[id] = text;
                kinds[id] = kind as i32;
                Ok(())
            }
            None => {
                let what = format!("the token {text:?} has the id {id:?}, but the model has {rows} rows");
                Err(Error::Model(Fault::new(FILE, what)))
            }
        };
        let unknown = json["model"]["unk_token"].as_str();
        let number = |id: &Json| id.as_u64().map(|id| id as usize);
        for (text, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
            let kind = match text {
                text if sentence_piece && Some(text.as_str()) == unknown => kind::UNKNOWN,
                text if sentence_piece && is_byte(text) => kind::BYTE,
                _ => kind::NORMAL,
            };
            set(number(id), text.clone(), kind)?;
        }
        for added in json["added_tokens"].as_array().into_iter().flatten() {
            let text = added["content"].as_str().unwrap_or_default();
            let kind = match added["special"] == true || looks_special(text) {
                true if sentence_piece && Some(text) == unknown => kind::UNKNOWN,
                true => kind::CONTROL,
                false => kind::USER_DEFINED,
            };
            // llama.cpp finds user-defined tokens in text as it is written.
            let text = if kind == kind::USER_DEFINED { text.replace(SPACE, " ") } else { text.to_string() };
            set(number(&added["id"]), text, kind)?;
        }
        Ok(Self { tokens, kinds })
    }
}

/// `<0x0A>`.
fn is_byte(text: &str) -> bool {
    text.strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'))
        .is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// Texts that are never shown, though a tokenizer may not say so. Source: `does_token_look_special` of llama.cpp's converter.
fn looks_special(text: &str) -> bool {
    let within = |start: &str, end: &str| text.starts_with(start) && text.ends_with(end);
    ["<pad>", "<mask>", "<2mass>", "[@BOS@]"].contains(&text)
        || within("<|", "|>")
        || within("<｜", "｜>")
        || within("<unused", ">")
}

/// Whether a step of this type is there, alone or in a sequence.
fn holds(step: &Json, kind: &str) -> bool {
    let lists = ["pretokenizers", "decoders", "normalizers", "processors"];
    step["type"] == kind
        || lists.iter().any(|list| step[list].as_array().is_some_and(|all| all.iter().any(|step| holds(step, kind))))
}

fn merges(json: &Json) -> Result<Vec<(String, String)>> {
    let merges = json["model"]["merges"].as_array().into_iter().flatten();
    let pair = |merge: &Json| match merge {
        Json::String(text) => text.split_once(' ').map(|(left, right)| (left.to_string(), right.to_string())),
        Json::Array(pair) => match &pair[..] {
            [Json::String(left), Json::String(right)] => Some((left.clone(), right.clone())),
            _ => None,
        },
        _ => None,
    };
    let fault = |merge: &Json| Error::Model(Fault::new(FILE, format!("the merge {merge} is not two pieces")));
    merges.map(|merge| pair(merge).ok_or_else(|| fault(merge))).collect()
}

/// A piece of a merge, which a space would end.
fn spaceless(piece: &str) -> String {
    piece.replace(' ', "Ġ")
}

/// Scores by which llama.cpp's SentencePiece, which merges the best-scored token first, merges as these merges say: the earlier a token
/// is made, the better. And how many pairs these scores merge otherwise.
fn scores(vocabulary: &Vocabulary, merges: &[(String, String)]) -> (Vec<f32>, usize) {
    let mut order: HashMap<String, usize> = HashMap::new();
    let mut last = String::new();
    let mut apart = 0;
    for (left, right) in merges {
        let token = format!("{left}{right}");
        let next = order.len();
        match order.get(&token) {
            Some(_) => apart += usize::from(token != last),
            None => drop(order.insert(token.clone(), next)),
        }
        last = token;
    }
    // Any two neighbours that make a token are merged there, whether or not a merge says so.
    let said: HashSet<(&str, &str)> = merges.iter().map(|(left, right)| (left.as_str(), right.as_str())).collect();
    let whole = |id: &usize| matches!(i64::from(vocabulary.kinds[*id]), kind::NORMAL | kind::USER_DEFINED);
    let known: HashSet<&str> =
        (0..vocabulary.tokens.len()).filter(whole).map(|id| vocabulary.tokens[id].as_str()).collect();
    let unsaid = known
        .iter()
        .flat_map(|token| token.char_indices().skip(1).map(|(at, _)| token.split_at(at)))
        .filter(|(left, right)| known.contains(left) && known.contains(right) && !said.contains(&(*left, *right)))
        .count();
    let count = order.len() as f32;
    let scores = vocabulary
        .tokens
        .iter()
        .zip(&vocabulary.kinds)
        .map(|(token, token_kind)| match i64::from(*token_kind) {
            kind::NORMAL => order.get(token).map_or(-count - 1.0, |order| -(*order as f32)),
            kind::USER_DEFINED | kind::UNUSED => ADDED_SCORE,
            _ => 0.0,
        })
        .collect();
    (scores, apart + unsaid)
}

/// Whether text that does not begin with a space is read as if it did.
fn adds_space(json: &Json) -> bool {
    let metaspace = |step: &Json| -> bool {
        let all = step["pretokenizers"].as_array().map_or_else(|| vec![step], |steps| steps.iter().collect());
        all.iter().any(|step| {
            let scheme = step["prepend_scheme"].as_str();
            step["type"] == "Metaspace" && scheme.map_or(step["add_prefix_space"] != false, |scheme| scheme != "never")
        })
    };
    holds(&json["normalizer"], "Prepend") || metaspace(&json["pre_tokenizer"])
}

/// Whether text ends with the end-of-text token without being asked to.
fn adds_eos(json: &Json, tokenizer: &Tokenizer) -> bool {
    let processor = &json["post_processor"];
    let all = processor["processors"].as_array().map_or_else(|| vec![processor], |steps| steps.iter().collect());
    all.iter().any(|step| {
        let last = step["single"].as_array().filter(|single| single.len() > 1).and_then(|single| single.last());
        let text = last.and_then(|last| last["SpecialToken"]["id"].as_str());
        text.and_then(|text| tokenizer.id(text)).is_some_and(|id| Some(id) == tokenizer.eos())
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn value<'p>(pairs: &'p Pairs, key: &str) -> Option<&'p Written> {
        pairs.iter().find(|(known, _)| known.strip_prefix("tokenizer.").is_some_and(|rest| rest == key)).map(|(_, v)| v)
    }

    fn sidecars(tokenizer: &Json, config: &Json) -> BTreeMap<String, Vec<u8>> {
        [("tokenizer.json", tokenizer), ("tokenizer_config.json", config)]
            .map(|(name, json)| (name.to_string(), json.to_string().into_bytes()))
            .into()
    }

    fn byte_level() -> Json {
        json!({
            "added_tokens": [
                {"id": 4, "content": "<|end|>", "special": false, "normalized": false, "single_word": false, "lstrip": false, "rstrip": false},
                {"id": 5, "content": "<extra>", "special": false, "normalized": false, "single_word": false, "lstrip": false, "rstrip": false},
                {"id": 6, "content": "[BOS]", "special": true, "normalized": false, "single_word": false, "lstrip": false, "rstrip": false},
            ],
            "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "[BOS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"[BOS]": {"id": "[BOS]", "ids": [6], "tokens": ["[BOS]"]}},
            },
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "Ġ": 2, "ab": 3}, "merges": ["a b"]},
        })
    }

    #[test]
    fn byte_level_tokenizers_have_their_kind_their_roles_and_their_template() {
        let config = json!({"bos_token": "[BOS]", "eos_token": "<|end|>", "chat_template": [
            {"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "{{ tools }}"},
        ]});
        let mut files = sidecars(&byte_level(), &config);
        files.insert("generation_config.json".into(), br#"{"eos_token_id": [4, 3, 0]}"#.to_vec());
        let mut notices = Vec::new();
        let (pairs, passes_over) = pairs(&files, 8, &mut notices).unwrap();
        assert!(!passes_over);
        let text = |text: &str| Some(Written::Text(text.into()));
        assert_eq!(value(&pairs, "ggml.model").cloned(), text("gpt2"));
        assert_eq!(value(&pairs, "ggml.pre").cloned(), text("gpt-2"));
        let tokens = ["a", "b", "Ġ", "ab", "<|end|>", "<extra>", "[BOS]", "[PAD7]"].map(String::from);
        assert_eq!(value(&pairs, "ggml.tokens"), Some(&Written::Texts(tokens.into())));
        assert_eq!(value(&pairs, "ggml.token_type"), Some(&Written::I32s(vec![1, 1, 1, 1, 3, 4, 3, 5])));
        assert_eq!(value(&pairs, "ggml.merges"), Some(&Written::Texts(vec!["a b".into()])));
        let id = |key: &str| match value(&pairs, key) {
            Some(Written::U32(id)) => Some(*id),
            _ => None,
        };
        assert_eq!((id("ggml.bos_token_id"), id("ggml.eos_token_id")), (Some(6), Some(4)));
        assert_eq!((id("ggml.eot_token_id"), id("ggml.padding_token_id")), (Some(0), None));
        assert!(notices[0].contains("ab ends one here, too"), "{notices:?}");
        assert_eq!(value(&pairs, "ggml.add_bos_token"), Some(&Written::Bool(true)));
        assert_eq!(value(&pairs, "ggml.add_eos_token"), Some(&Written::Bool(false)));
        assert_eq!(value(&pairs, "chat_template").cloned(), text("{{ messages }}"));
        assert_eq!(value(&pairs, "chat_template.tool_use").cloned(), text("{{ tools }}"));
    }

    /// llama.cpp has this for Phi 3's tokenizer alone.
    #[test]
    fn spaces_behind_added_tokens_are_passed_over_as_in_phi_3_or_it_is_said_that_they_are_not() {
        let with = |tokens: &[(&str, bool)]| {
            let mut json = byte_level();
            json["post_processor"] = Json::Null;
            json["added_tokens"] = tokens
                .iter()
                .zip(4..)
                .map(|((text, strips), id)| {
                    json!({"id": id, "content": text, "special": true, "normalized": false, "single_word": false, "lstrip": false, "rstrip": strips})
                })
                .collect();
            let mut notices = Vec::new();
            let (_, passes) = pairs(&sidecars(&json, &json!({})), 16, &mut notices).unwrap();
            (passes, notices.len())
        };
        let phi = [("<unk>", false), ("<s>", false), ("</s>", true), ("<|endoftext|>", false), ("<|user|>", true)];
        assert_eq!(with(&phi), (true, 0));
        assert_eq!(with(&phi.map(|(text, _)| (text, false))), (false, 0));
        assert_eq!(with(&[&phi[..], &[("<|end|>", false)]].concat()), (true, 1));
        assert_eq!(with(&phi[1..]), (false, 1), "llama.cpp would not load it by that name");
    }

    #[test]
    fn what_gguf_has_no_name_for_is_an_error() {
        let fault =
            |json: Json, rows: i64| pairs(&sidecars(&json, &json!({})), rows, &mut Vec::new()).unwrap_err().to_string();
        let mut other = byte_level();
        other["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]});
        let text = fault(other, 8);
        assert!(text.contains("has no name for: Split \"x+\"") && text.contains("known: gpt-2, smollm"), "{text}");
        let text = fault(byte_level(), 6);
        assert!(text.contains("[BOS]") && text.contains("6 rows"), "{text}");
        let mut plain = byte_level();
        plain["pre_tokenizer"] = Json::Null;
        plain["decoder"] = Json::Null;
        assert!(fault(plain, 8).contains("neither byte-level nor falls back to bytes"));
        let error = pairs(&BTreeMap::new(), 8, &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("a GGUF file holds its model's tokenizer"), "{error}");
    }

    #[test]
    fn sentence_piece_scores_follow_the_merges() {
        let vocabulary = |tokens: &[&str]| Vocabulary {
            tokens: tokens.iter().map(ToString::to_string).collect(),
            kinds: vec![kind::NORMAL as i32; tokens.len()],
        };
        let merges = |all: &[(&str, &str)]| -> Vec<(String, String)> {
            all.iter().map(|(left, right)| (left.to_string(), right.to_string())).collect()
        };
        let known = vocabulary(&["a", "b", "c", "abc", "ab", "bc"]);
        let whole = merges(&[("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]);
        let (scores, without_place) = scores(&known, &whole);
        assert_eq!((scores, without_place), (vec![-4.0, -4.0, -4.0, -2.0, -1.0, 0.0], 0));
        // llama.cpp would merge a and bc, which this list does not; and ab is not made in one place.
        assert_eq!(super::scores(&known, &whole[..3]).1, 1);
        let apart = merges(&[("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc"), ("a", "b")]);
        assert_eq!(super::scores(&known, &apart).1, 1);
    }
}
