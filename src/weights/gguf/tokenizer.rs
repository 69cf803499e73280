//! `tokenizer.json` and its companions from GGUF metadata.
//!
//! Two kinds of vocabulary are known: byte-level BPE (`gpt2`), whose text splitting GGUF names but does not spell out, and
//! SentencePiece BPE (`llama`). What is made splits text as the model's original tokenizer does, which is not always what
//! transformers' own GGUF loader does (it gives every llama-architecture model GPT-2's splitting).

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};

use super::header::Value;
use super::splittings::{SPLITTINGS, Step};
use super::{Metadata, Sidecars, pretty};
use crate::{Error, Result};

/// Longest token that merges are found for, in bytes: every way to cut it in two is tried. Known vocabularies have tokens of
/// some 200 bytes.
const LONGEST_TOKEN: usize = 1024;

/// Kinds of tokens (`tokenizer.ggml.token_type`).
pub(crate) mod kind {
    pub const NORMAL: i64 = 1;
    pub const UNKNOWN: i64 = 2;
    pub const CONTROL: i64 = 3;
    pub const USER_DEFINED: i64 = 4;
    pub const UNUSED: i64 = 5;
    pub const BYTE: i64 = 6;
}

/// The vocabulary as the metadata holds it.
struct Vocabulary<'a> {
    tokens: &'a [String],
    /// Kind of each token.
    kinds: Vec<i64>,
}

/// Makes the tokenizer's files, and adds what the user should know to `notices`.
pub(super) fn make(metadata: &Metadata, notices: &mut Vec<String>) -> Result<Sidecars> {
    let vocabulary = vocabulary(metadata)?;
    let special = Special::read(metadata, &vocabulary)?;
    let (tokenizer, adds_bos) = match metadata.text("tokenizer.ggml.model")? {
        "gpt2" => byte_level(metadata, &vocabulary, &special, notices)?,
        "llama" => sentence_piece(metadata, &vocabulary, &special)?,
        other => {
            let fault = metadata.fault("tokenizer.ggml.model", format_args!("{other} is not supported"));
            return Err(Error::Model(fault.hint("supported: gpt2 (byte-level BPE), llama (SentencePiece)")));
        }
    };
    let mut sidecars = Sidecars::from([("tokenizer.json".to_string(), tokenizer.to_string().into_bytes())]);

    let names = special.names();
    let mut config = Map::new();
    config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    config.insert("clean_up_tokenization_spaces".into(), json!(false));
    config.insert("add_bos_token".into(), json!(adds_bos));
    config.insert("add_eos_token".into(), json!(special.add_eos));
    config.extend(names.clone());
    let architecture = metadata.text("general.architecture")?;
    if let Some(length) = metadata.integer(&format!("{architecture}.context_length"))? {
        config.insert("model_max_length".into(), json!(length));
    }
    if let Some(template) = metadata.optional_text("tokenizer.chat_template")? {
        config.insert("chat_template".into(), json!(template));
        sidecars.insert("chat_template.jinja".to_string(), template.as_bytes().to_vec());
    }
    sidecars.insert("tokenizer_config.json".to_string(), pretty(&Json::Object(config)));
    sidecars.insert("special_tokens_map.json".to_string(), pretty(&Json::Object(names)));
    sidecars.insert("generation_config.json".to_string(), pretty(&special.generation()));
    Ok(sidecars)
}

fn vocabulary<'a>(metadata: &'a Metadata) -> Result<Vocabulary<'a>> {
    let tokens = metadata.texts("tokenizer.ggml.tokens")?;
    let key = "tokenizer.ggml.token_type";
    let kinds = match metadata.values.get(key) {
        None => vec![kind::NORMAL; tokens.len()],
        Some(Value::Integers(kinds)) => kinds.clone(),
        Some(_) => return Err(metadata.wrong(key, "an array of integers")),
    };
    if kinds.len() != tokens.len() {
        let what = format_args!("holds {} kinds, but there are {} tokens", kinds.len(), tokens.len());
        return Err(Error::Model(metadata.fault(key, what)));
    }
    Ok(Vocabulary { tokens, kinds })
}

/// The tokens with a role.
struct Special<'a> {
    /// Role as transformers names it, id, text.
    roles: Vec<(&'static str, i64, &'a str)>,
    /// A second end, of turns, where it is not EOS.
    end_of_turn: Option<i64>,
    add_bos: Option<bool>,
    add_eos: bool,
}

impl<'a> Special<'a> {
    fn read(metadata: &Metadata, vocabulary: &Vocabulary<'a>) -> Result<Self> {
        let id = |key: &str| -> Result<Option<(i64, &'a str)>> {
            let key = format!("tokenizer.ggml.{key}");
            let Some(id) = metadata.integer(&key)? else { return Ok(None) };
            match usize::try_from(id).ok().and_then(|id| vocabulary.tokens.get(id)) {
                Some(token) => Ok(Some((id, token))),
                None => {
                    let what = format_args!("is {id}, but there are {} tokens", vocabulary.tokens.len());
                    Err(Error::Model(metadata.fault(&key, what)))
                }
            }
        };
        let mut roles = Vec::new();
        for (role, key) in [
            ("bos_token", "bos_token_id"),
            ("eos_token", "eos_token_id"),
            ("unk_token", "unknown_token_id"),
            ("pad_token", "padding_token_id"),
        ] {
            roles.extend(id(key)?.map(|(id, token)| (role, id, token)));
        }
        let end_of_turn = id("eot_token_id")?.map(|(id, _)| id);
        let add_bos = metadata.bool("tokenizer.ggml.add_bos_token")?;
        let add_eos = metadata.bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
        Ok(Self { roles, end_of_turn, add_bos, add_eos })
    }

    fn role(&self, role: &str) -> Option<(i64, &'a str)> {
        self.roles.iter().find(|(name, ..)| *name == role).map(|&(_, id, token)| (id, token))
    }

    fn names(&self) -> Map<String, Json> {
        self.roles.iter().map(|(role, _, token)| (role.to_string(), json!(token))).collect()
    }

    /// `generation_config.json`: with a second end of turn, either stops.
    fn generation(&self) -> Json {
        let id = |role| self.role(role).map(|(id, _)| id);
        let mut config = Map::new();
        config.extend(id("bos_token").map(|id| ("bos_token_id".to_string(), json!(id))));
        match (id("eos_token"), self.end_of_turn) {
            (Some(eos), Some(turn)) if eos != turn => config.insert("eos_token_id".into(), json!([eos, turn])),
            (Some(end), _) | (None, Some(end)) => config.insert("eos_token_id".into(), json!(end)),
            (None, None) => None,
        };
        config.extend(id("pad_token").map(|id| ("pad_token_id".to_string(), json!(id))));
        Json::Object(config)
    }

    /// Puts BOS before and EOS after the text, where the model wants them.
    fn post_processor(&self, adds_bos: bool) -> Json {
        let bos = if adds_bos { self.role("bos_token") } else { None };
        let eos = if self.add_eos { self.role("eos_token") } else { None };
        if bos.is_none() && eos.is_none() {
            return Json::Null;
        }
        let around = |sequence: &str, kind: u32| {
            let special = |token: &str| json!({"SpecialToken": {"id": token, "type_id": kind}});
            let mut pieces: Vec<Json> = bos.iter().map(|(_, token)| special(token)).collect();
            pieces.push(json!({"Sequence": {"id": sequence, "type_id": kind}}));
            pieces.extend(eos.iter().map(|(_, token)| special(token)));
            pieces
        };
        let tokens = bos.iter().chain(&eos).map(|(id, token)| {
            let token = token.to_string();
            (token.clone(), json!({"id": token, "ids": [id], "tokens": [token]}))
        });
        json!({
            "type": "TemplateProcessing",
            "single": around("A", 0),
            "pair": ([around("A", 0), around("B", 1)].concat()),
            "special_tokens": tokens.collect::<Map<_, _>>(),
        })
    }
}

/// A `tokenizer.json` of byte-level BPE, and whether it adds BOS.
fn byte_level(
    metadata: &Metadata,
    vocabulary: &Vocabulary,
    special: &Special,
    notices: &mut Vec<String>,
) -> Result<(Json, bool)> {
    let key = "tokenizer.ggml.pre";
    let name = match metadata.optional_text(key)? {
        None | Some("default") => {
            notices.push(
                "the GGUF does not say how its tokenizer splits text (tokenizer.ggml.pre): GPT-2's way is assumed"
                    .into(),
            );
            "gpt-2"
        }
        Some(name) => name,
    };
    let Some(splitting) = SPLITTINGS.iter().find(|splitting| splitting.names.contains(&name)) else {
        let known: Vec<_> = SPLITTINGS.iter().flat_map(|splitting| splitting.names).copied().collect();
        let fault = metadata.fault(key, format_args!("the splitting {name} is not supported"));
        let hint = format!("supported: {}; or use the model's safetensors", known.join(", "));
        return Err(Error::Model(fault.hint(hint)));
    };
    // Unused ids were given made-up names by the converter.
    let tokens: Map<String, Json> = vocabulary
        .tokens
        .iter()
        .enumerate()
        .filter(|(id, _)| vocabulary.kinds[*id] != kind::UNUSED)
        .map(|(id, token)| (token.clone(), json!(id)))
        .collect();
    let merges = written_merges(metadata, &tokens)?.ok_or_else(|| metadata.missing("tokenizer.ggml.merges"))?;

    let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let mut steps: Vec<Json> = Vec::new();
    for step in splitting.steps {
        steps.push(match step {
            Step::Digits => json!({"type": "Digits", "individual_digits": true}),
            Step::Gpt2 => byte_level(true),
            Step::DigitRuns => json!({"type": "Digits", "individual_digits": false}),
            Step::Punctuation => json!({"type": "Punctuation", "behavior": "Contiguous"}),
            Step::Split(regex) => {
                json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false})
            }
        });
    }
    if !splitting.steps.contains(&Step::Gpt2) {
        steps.push(byte_level(false));
    }
    let adds_bos = special.add_bos.unwrap_or(splitting.add_bos) && special.role("bos_token").is_some();
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(vocabulary),
        "normalizer": if splitting.nfc { json!({"type": "NFC"}) } else { Json::Null },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": special.post_processor(adds_bos),
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": splitting.ignore_merges,
            "vocab": tokens,
            "merges": merges,
        },
    });
    Ok((tokenizer, adds_bos))
}

/// A `tokenizer.json` of SentencePiece BPE, as transformers converts Llama 2's, and whether it adds BOS.
fn sentence_piece(metadata: &Metadata, vocabulary: &Vocabulary, special: &Special) -> Result<(Json, bool)> {
    let tokens: Map<String, Json> =
        vocabulary.tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let merges = match written_merges(metadata, &tokens)? {
        Some(merges) => merges,
        None => {
            check_lengths(metadata, vocabulary)?;
            scored_merges(vocabulary, &scores(metadata, vocabulary.tokens.len())?)
        }
    };
    // The token of kind 2 is the unknown one where no id says so.
    let unknown = special.role("unk_token").map(|(_, token)| token).or_else(|| {
        let at = vocabulary.kinds.iter().position(|&kind| kind == kind::UNKNOWN)?;
        Some(&vocabulary.tokens[at])
    });
    let prefix = metadata.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let adds_bos = special.add_bos.unwrap_or(true) && special.role("bos_token").is_some();

    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(vocabulary),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": special.post_processor(adds_bos),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": vocabulary.kinds.contains(&kind::BYTE),
            "ignore_merges": false,
            "vocab": tokens,
            "merges": merges,
        },
    });
    Ok((tokenizer, adds_bos))
}

/// Tokens that are found in text before it is split: control tokens (special) and those the user defined.
fn added_tokens(vocabulary: &Vocabulary) -> Vec<Json> {
    let mut added = Vec::new();
    for (id, (token, &kind)) in vocabulary.tokens.iter().zip(&vocabulary.kinds).enumerate() {
        if !matches!(kind, kind::UNKNOWN | kind::CONTROL | kind::USER_DEFINED) || token.is_empty() {
            continue;
        }
        added.push(json!({
            "id": id,
            "content": token,
            "single_word": false,
            "lstrip": false,
            "rstrip": false,
            "normalized": false,
            "special": kind != kind::USER_DEFINED,
        }));
    }
    added
}

/// The merges the metadata spells out (`left right`), checked against the vocabulary.
fn written_merges(metadata: &Metadata, tokens: &Map<String, Json>) -> Result<Option<Vec<Json>>> {
    let key = "tokenizer.ggml.merges";
    let Some(merges) = metadata.optional_texts(key)? else { return Ok(None) };
    let mut pairs = Vec::with_capacity(merges.len());
    for (number, merge) in merges.iter().enumerate() {
        let fault = |what: String| Error::Model(metadata.fault(key, format_args!("merge {number} ({merge:?}) {what}")));
        // A piece may itself begin with a space, never end with one.
        let space = merge.char_indices().skip(1).find(|&(_, character)| character == ' ').map(|(at, _)| at);
        let Some(space) = space else { return Err(fault("is not two pieces".to_string())) };
        let (left, right) = (&merge[..space], &merge[space + 1..]);
        for piece in [left, right, &[left, right].concat()] {
            if !tokens.contains_key(piece) {
                return Err(fault(format!("needs the token {piece:?}, which is not in the vocabulary")));
            }
        }
        pairs.push(json!([left, right]));
    }
    Ok(Some(pairs))
}

fn scores(metadata: &Metadata, tokens: usize) -> Result<Vec<f64>> {
    let key = "tokenizer.ggml.scores";
    let scores = match metadata.values.get(key) {
        None => return Err(metadata.missing(key)),
        Some(Value::Floats(scores)) => scores.clone(),
        Some(_) => return Err(metadata.wrong(key, "an array of numbers")),
    };
    if scores.len() != tokens {
        let what = format_args!("holds {} scores, but there are {tokens} tokens", scores.len());
        return Err(Error::Model(metadata.fault(key, what)));
    }
    Ok(scores)
}

fn check_lengths(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<()> {
    let long = vocabulary.tokens.iter().enumerate().find(|(_, token)| token.len() > LONGEST_TOKEN);
    let Some((id, token)) = long else { return Ok(()) };
    let what = format_args!("token {id} is {} bytes long, at most {LONGEST_TOKEN} are read", token.len());
    Err(Error::Model(metadata.fault("tokenizer.ggml.tokens", what).hint("use the model's safetensors")))
}

/// The merges that give SentencePiece's order: every way to make a token of two others, best-scored token first.
///
/// Source: `GGUFTokenizerSkeleton` of transformers' `integrations/ggml.py`.
fn scored_merges(vocabulary: &Vocabulary, scores: &[f64]) -> Vec<Json> {
    let merged = |id: &usize| matches!(vocabulary.kinds[*id], kind::NORMAL | kind::USER_DEFINED);
    let ids: HashMap<&str, usize> =
        (0..vocabulary.tokens.len()).filter(merged).map(|id| (vocabulary.tokens[id].as_str(), id)).collect();
    let mut merges: Vec<(f64, &str, &str)> = Vec::new();
    for id in (0..vocabulary.tokens.len()).filter(merged) {
        let token = vocabulary.tokens[id].as_str();
        let mut ways: Vec<(usize, usize, &str, &str)> = token
            .char_indices()
            .skip(1)
            .filter_map(|(at, _)| {
                let (left, right) = token.split_at(at);
                Some((*ids.get(left)?, *ids.get(right)?, left, right))
            })
            .collect();
        ways.sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]).then(scores[b.1].total_cmp(&scores[a.1])));
        merges.extend(ways.into_iter().map(|(_, _, left, right)| (scores[id], left, right)));
    }
    // Stable: equal scores keep the order of ids.
    merges.sort_by(|a, b| b.0.total_cmp(&a.0));
    merges.into_iter().map(|(_, left, right)| json!([left, right])).collect()
}
