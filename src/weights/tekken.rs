//! `tokenizer.json` from `tekken.json`, which is all that some of Mistral's models have.
//!
//! `vocab` holds the tokens by rank, their bytes in base64; `special_tokens` those that come before them, so that a token's id is its rank
//! and the number of these. `config` says how text is cut into words (`pattern`), how many special tokens there are, named or not
//! (`default_num_special_tokens`), and how many tokens in all (`default_vocab_size`; what is beyond is left out). What is made is what
//! transformers 5.17 makes (`MistralConverter`): byte-level BPE that merges in the order of the ranks.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{Error, Fault, Result};

/// The file's name.
pub(super) const FILE: &str = "tekken.json";

/// Longest token, in bytes: every way to cut it in two is tried. The vocabularies have tokens of some 100 bytes.
const LONGEST_TOKEN: usize = 1024;
/// More special tokens than any vocabulary has.
const MOST_SPECIAL: usize = 1 << 16;
/// The roles that transformers gives them.
const ROLES: [(&str, &str); 4] =
    [("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<pad>"), ("unk_token", "<unk>")];

#[derive(Deserialize)]
struct Tekken {
    config: Config,
    vocab: Vec<Token>,
    special_tokens: Option<Vec<Special>>,
}

#[derive(Deserialize)]
struct Config {
    pattern: String,
    default_vocab_size: Option<usize>,
    default_num_special_tokens: Option<usize>,
}

#[derive(Deserialize)]
struct Token {
    token_bytes: String,
}

#[derive(Deserialize)]
struct Special {
    rank: usize,
    token_str: String,
}

/// `tokenizer.json` and what says the roles of its tokens, from the `bytes` of the file at `path`.
///
/// # Errors
/// [`Error::Model`] where the file is no such vocabulary, or one of the first, which do not name their special tokens.
pub(super) fn make(path: &Path, bytes: &[u8]) -> Result<BTreeMap<String, Vec<u8>>> {
    let fault = |what: String| Error::Model(Fault::at(path, what).hint("fetch the file again"));
    let tekken: Tekken =
        serde_json::from_slice(bytes).map_err(|error| fault(format!("not a tokenizer of this kind: {error}")))?;
    let special = special(&tekken).map_err(fault)?;
    let kept = match tekken.config.default_vocab_size {
        None => tekken.vocab.len(),
        Some(size) => size.saturating_sub(special.len()).min(tekken.vocab.len()),
    };
    let decoded = tekken.vocab[..kept].iter().enumerate().map(|(rank, token)| {
        let bytes = from_base64(&token.token_bytes).filter(|bytes| (1..=LONGEST_TOKEN).contains(&bytes.len()));
        bytes.ok_or_else(|| fault(format!("the token of rank {rank} is not 1 to {LONGEST_TOKEN} bytes in base64")))
    });
    let tokens: Vec<Vec<u8>> = decoded.collect::<Result<_>>()?;
    let ranks: HashMap<&[u8], usize> = (0..).zip(&tokens).map(|(rank, token)| (token.as_slice(), rank)).collect();
    if ranks.len() < tokens.len() {
        return Err(fault("two of its tokens are the same".into()));
    }
    let spelled: Vec<String> = tokens.iter().map(|token| token.iter().copied().map(character).collect()).collect();
    let mut vocabulary: Map<String, Value> =
        spelled.iter().zip(special.len()..).map(|(token, id)| (token.clone(), json!(id))).collect();
    vocabulary.extend(special.iter().zip(0usize..).map(|(token, id)| (token.clone(), json!(id))));

    let mut merges = Vec::new();
    for token in &tokens {
        let cuts = (1..token.len()).map(|at| token.split_at(at));
        let mut ways: Vec<(usize, usize)> =
            cuts.filter_map(|(left, right)| Some((*ranks.get(left)?, *ranks.get(right)?))).collect();
        ways.sort_unstable();
        merges.extend(ways.into_iter().map(|(left, right)| json!([spelled[left], spelled[right]])));
    }
    let added = special.iter().enumerate().map(|(id, token)| {
        json!({
            "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true,
        })
    });
    let byte_level = |add_prefix_space: bool, trim_offsets: bool, use_regex: bool| {
        json!({
            "type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": trim_offsets, "use_regex": use_regex,
        })
    };
    let words =
        json!({"type": "Split", "pattern": {"Regex": tekken.config.pattern}, "behavior": "Isolated", "invert": false});
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, byte_level(false, true, false)]},
        "post_processor": byte_level(true, false, true),
        "decoder": byte_level(true, true, true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": true, "vocab": vocabulary, "merges": merges,
        },
    });
    let roles = ROLES.into_iter().filter(|(_, token)| special.iter().any(|known| known == token));
    let roles: Map<String, Value> = roles.map(|(role, token)| (role.to_string(), json!(token))).collect();
    let mut config = roles.clone();
    config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    config.insert("clean_up_tokenization_spaces".into(), json!(false));
    let text = |value: Value| format!("{value:#}\n").into_bytes();
    Ok(BTreeMap::from([
        ("tokenizer.json".to_string(), tokenizer.to_string().into_bytes()),
        ("tokenizer_config.json".to_string(), text(Value::Object(config))),
        ("special_tokens_map.json".to_string(), text(Value::Object(roles))),
    ]))
}

/// The special tokens by id, those without a name of their own included.
fn special(tekken: &Tekken) -> std::result::Result<Vec<String>, String> {
    let Some(named) = &tekken.special_tokens else {
        return Err(
            "it does not name its special tokens, as the first of its kind: use the model's tokenizer.json".into()
        );
    };
    let by_rank: BTreeMap<usize, &str> =
        named.iter().map(|special| (special.rank, special.token_str.as_str())).collect();
    if by_rank.len() != named.len() || by_rank.keys().copied().ne(0..named.len()) {
        return Err(format!("the ranks of its {} special tokens are not 0, 1, 2 and so on", named.len()));
    }
    let count = tekken.config.default_num_special_tokens.unwrap_or(named.len());
    if !(named.len()..=MOST_SPECIAL).contains(&count) {
        return Err(format!("it names {} special tokens, but says there are {count}", named.len()));
    }
    let unnamed = (named.len()..count).map(|id| format!("<SPECIAL_{id}>"));
    Ok(by_rank.into_values().map(ToString::to_string).chain(unnamed).collect())
}

/// How byte-level BPE writes a byte: as itself where that can be seen, otherwise by the next character from U+0100 on.
fn character(byte: u8) -> char {
    let seen = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if seen(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|other| !seen(*other)).count() as u32;
    char::from_u32(0x100 + before).expect("at most U+0143")
}

/// The bytes of base64 (RFC 4648, section 4), padded.
fn from_base64(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let digits = text.trim_end_matches('=');
    if !text.len().is_multiple_of(4) || text.len() - digits.len() > 2 {
        return None;
    }
    let mut bytes = Vec::with_capacity(digits.len() * 3 / 4);
    for group in digits.as_bytes().chunks(4) {
        let joined = group.iter().try_fold(0u32, |all, byte| Some(all << 6 | u32::from(digit(*byte)?)))?;
        let joined = joined << (6 * (4 - group.len()));
        bytes.extend(&joined.to_be_bytes()[1..group.len()]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::BaseSource;
    use crate::weights::Checkpoint;

    fn fixture() -> Vec<u8> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer/tekken/tekken.json");
        std::fs::read(path).unwrap()
    }

    /// A folder with that vocabulary, a model of nothing, and `more`.
    fn open(bytes: &[u8], more: &[(&str, &str)]) -> Result<Checkpoint> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE), bytes).unwrap();
        std::fs::write(folder.path().join("config.json"), r#"{"model_type": "mistral"}"#).unwrap();
        for (name, text) in more {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        let nothing: &[(String, tch::Tensor)] = &[];
        tch::Tensor::write_safetensors(nothing, folder.path().join("model.safetensors")).unwrap();
        Checkpoint::open(&BaseSource::Folder(folder.path().to_path_buf()))
    }

    /// `tests/python/tekken.py` makes vocabulary and answers.
    #[test]
    fn ids_are_those_of_transformers_for_every_text() {
        let checkpoint = open(&fixture(), &[]).unwrap();
        let tokenizer = tokenizers::Tokenizer::from_bytes(&checkpoint.sidecars["tokenizer.json"]).unwrap();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer/tekken/ids.json");
        let expected: Vec<(String, Vec<u32>, String)> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert!(expected.len() > 100);
        for (text, ids, again) in expected {
            assert_eq!(tokenizer.encode(text.as_str(), false).unwrap().get_ids(), ids, "{text:?}");
            assert_eq!(tokenizer.encode(text.as_str(), true).unwrap().get_ids(), ids, "{text:?}");
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), again, "{text:?}");
        }
        let config: Value = serde_json::from_slice(&checkpoint.sidecars["tokenizer_config.json"]).unwrap();
        assert_eq!((&config["bos_token"], &config["eos_token"]), (&json!("<s>"), &json!("</s>")));
        let tokenizer = crate::data::Tokenizer::new(&checkpoint.sidecars);
        assert!(tokenizer.is_ok(), "{:?}", tokenizer.err().map(|error| error.to_string()));
    }

    #[test]
    fn a_tokenizer_json_beside_it_comes_first_and_a_config_of_its_own_stays() {
        let checkpoint = open(&fixture(), &[("tokenizer.json", "{}")]).unwrap();
        assert_eq!(checkpoint.sidecars["tokenizer.json"], b"{}");
        let checkpoint = open(&fixture(), &[("tokenizer_config.json", r#"{"eos_token": "[INST]"}"#)]).unwrap();
        assert_eq!(checkpoint.sidecars["tokenizer_config.json"], br#"{"eos_token": "[INST]"}"#);
    }

    #[test]
    fn what_is_no_such_vocabulary_is_an_error_that_says_why() {
        let fault = |change: &dyn Fn(&mut Value)| {
            let mut value: Value = serde_json::from_slice(&fixture()).unwrap();
            change(&mut value);
            open(value.to_string().as_bytes(), &[]).unwrap_err().to_string()
        };
        let all = [
            fault(&|value| drop(value.as_object_mut().unwrap().remove("config"))),
            fault(&|value| drop(value.as_object_mut().unwrap().remove("special_tokens"))),
            fault(&|value| value["vocab"][300]["token_bytes"] = json!("a*==")),
            fault(&|value| value["vocab"][300]["token_bytes"] = json!("")),
            fault(&|value| value["vocab"][300] = value["vocab"][299].clone()),
            fault(&|value| value["special_tokens"][1]["rank"] = json!(7)),
            fault(&|value| value["config"]["default_num_special_tokens"] = json!(2)),
        ];
        let expected = [
            "missing field `config`",
            "does not name its special tokens",
            "rank 300 is not",
            "rank 300 is not",
            "two of its tokens are the same",
            "are not 0, 1, 2 and so on",
            "but says there are 2",
        ];
        for (found, expected) in all.iter().zip(expected) {
            assert!(found.contains(FILE) && found.contains(expected), "{expected}: {found}");
        }
    }

    #[test]
    fn base64_is_that_of_its_rfc() {
        let cases =
            [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("Zm9vYmE=", "fooba"), ("Zm9vYmFy", "foobar")];
        for (text, bytes) in cases {
            assert_eq!(from_base64(text).as_deref(), Some(bytes.as_bytes()), "{text}");
        }
        assert_eq!(["Zg=", "Z", "Zg===", "Z!==", "Zm9v="].map(from_base64), [const { None::<Vec<u8>> }; 5]);
        assert_eq!((character(b' '), character(b'a'), character(0xAD), character(0)), ('Ġ', 'a', 'Ń', 'Ā'));
    }
}
