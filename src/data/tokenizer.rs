//! A model's tokenizer: text to token ids and back, exactly as transformers' fast tokenizer does it.
//!
//! Special tokens are recognised only where a template wrote them: the text `<|im_end|>` in a person's message is
//! encoded as the characters it is made of.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::OnceLock;

use regex::Regex;
use serde_json::Value as Json;
use sha2::{Digest, Sha256};
use tokenizers::{AddedToken, ModelWrapper};

use super::quiet::quietly;
use super::template::Rendered;
use crate::{Error, Fault, Result};

/// First of the private-use characters that stand for special tokens while text is encoded around them.
const STAND_INS: u32 = 0xF0000;
/// A character may become this many bytes by the tokenizer's own replacements: a space becomes `▁` (3), seldom more.
const MOST_GROWTH: usize = 1000;
/// The names transformers gives special tokens, in templates and in `tokenizer_config.json`.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Encodes and decodes text for one model.
pub struct Tokenizer {
    /// Without post-processor, truncation and padding: adding tokens is this type's and the encoder's business.
    inner: tokenizers::Tokenizer,
    /// The same, reading special-token text as plain text; made when a row first needs it.
    plain: OnceLock<Plain>,
    /// Special tokens, as the text they have and the id.
    special: Vec<(String, u32)>,
    /// Matches the text of any special token, the longest first; `None` when there is none.
    special_text: Option<Regex>,
    /// `bos_token` and the like by name.
    named: Vec<(String, String)>,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    end_ids: Vec<u32>,
    adds_bos: bool,
    chat_templates: BTreeMap<String, String>,
    digest: String,
    notices: Vec<String>,
}

/// The tokenizer with special tokens replaced by characters no text has.
struct Plain {
    inner: tokenizers::Tokenizer,
    /// Id of a stand-in to the id it stands for.
    ids: BTreeMap<u32, u32>,
}

/// Encoded text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tokens {
    /// Token ids.
    pub ids: Vec<u32>,
    /// The bytes of the text each token stands for.
    pub spans: Vec<Range<usize>>,
}

impl Tokenizer {
    /// Reads the tokenizer from a model's small files, by their usual names: `tokenizer.json` (required), `tokenizer_config.json`,
    /// `special_tokens_map.json`, `generation_config.json`, `config.json`, `chat_template.jinja`.
    ///
    /// Errors name the file: missing, damaged, or with more tokens than the model's vocabulary.
    pub fn new(sidecars: &BTreeMap<String, Vec<u8>>) -> Result<Self> {
        let mut notices = Vec::new();
        let mut inner = read_tokenizer(sidecars, &mut notices)?;
        let config = read_json(sidecars, "config.json")?;
        let tokenizer_config = read_json(sidecars, "tokenizer_config.json")?;
        let special_tokens_map = read_json(sidecars, "special_tokens_map.json")?;
        let generation_config = read_json(sidecars, "generation_config.json")?;
        check_vocabulary(&inner, &config)?;

        let named = named_tokens(&inner, &[&tokenizer_config, &special_tokens_map], &[&generation_config, &config]);
        mark_special(&mut inner, &named)?;
        let id = |name: &str| {
            let (_, text) = named.iter().find(|(other, _)| other == name)?;
            inner.token_to_id(text)
        };
        let (bos, eos, pad) = (id("bos_token"), id("eos_token"), id("pad_token"));

        let configs = [&generation_config, &config, &config["text_config"]];
        let configured: Vec<u32> = configs.iter().flat_map(|config| whole_numbers(&config["eos_token_id"])).collect();
        let known = configured.iter().copied().filter(|id| inner.id_to_token(*id).is_some());
        let end_ids: BTreeSet<u32> = known.chain(eos).collect();
        if end_ids.is_empty() && !configured.is_empty() {
            let fault =
                Fault::new("config.json", format!("eos_token_id {configured:?}: no such token in tokenizer.json"));
            return Err(Error::Model(fault.hint("the tokenizer and the configuration belong to different models")));
        }

        let first = first_of_probe(&inner)?;
        let adds_bos = bos.is_some_and(|bos| match inner.get_post_processor() {
            Some(_) => first == Some(bos),
            None => tokenizer_config["add_bos_token"] == true,
        });
        inner.with_post_processor(None::<tokenizers::processors::PostProcessorWrapper>);

        let mut special: Vec<(String, u32)> = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special && !token.content.is_empty())
            .map(|(id, token)| (token.content, id))
            .collect();
        special.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then_with(|| a.cmp(b)));

        Ok(Tokenizer {
            special_text: pattern(special.iter().map(|(text, _)| text.as_str())),
            chat_templates: chat_templates(sidecars, &tokenizer_config)?,
            digest: digest(sidecars),
            plain: OnceLock::new(),
            end_ids: end_ids.into_iter().collect(),
            inner,
            special,
            named,
            bos,
            eos,
            pad,
            adds_bos,
            notices,
        })
    }

    /// What a person should know about it: what of its file is not obeyed.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// The beginning-of-text token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The end-of-text token.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The padding token; often the same as [`Tokenizer::eos`].
    pub fn pad(&self) -> Option<u32> {
        self.pad
    }

    /// Every token that ends a generation by the model's own configuration, in ascending order; a chat template may have
    /// one more ([`super::Encoder::end_ids`]).
    pub fn end_ids(&self) -> &[u32] {
        &self.end_ids
    }

    /// Whether text without a template begins with [`Tokenizer::bos`].
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// `bos_token`, `eos_token` and the like: name and text.
    pub fn named_tokens(&self) -> &[(String, String)] {
        &self.named
    }

    /// The model's own chat templates by name; the usual one is `default`.
    pub fn chat_templates(&self) -> &BTreeMap<String, String> {
        &self.chat_templates
    }

    /// SHA-256 of the files the tokenizer was read from.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The id of a token by its exact text in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether a token is special: not shown in decoded text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.iter().any(|(_, special)| *special == id)
    }

    /// Special tokens: text and id, the longest text first.
    pub fn special_tokens(&self) -> &[(String, u32)] {
        &self.special
    }

    /// Matches special-token text.
    pub fn special_text(&self) -> Option<&Regex> {
        self.special_text.as_ref()
    }

    /// Encodes text in which special-token text is the special token. Adds nothing.
    pub fn encode(&self, text: &str) -> Result<Tokens, String> {
        encode(&self.inner, text)
    }

    /// Encodes text in which special-token text is only text. Adds nothing.
    pub fn encode_plain(&self, text: &str) -> Result<Tokens, String> {
        match &self.special_text {
            Some(special) if special.is_match(text) => encode(&self.plain()?.inner, text),
            _ => encode(&self.inner, text),
        }
    }

    /// Encodes two pieces of plain text with a token boundary between them; gives the number of tokens of the first too.
    pub fn encode_apart(&self, first: &str, second: &str) -> Result<(Tokens, usize), String> {
        let plain = self.plain()?;
        let boundary = stand_in(self.special.len());
        reject_stand_ins(first, self.special.len())?;
        reject_stand_ins(second, self.special.len())?;
        let mut tokens = encode(&plain.inner, &format!("{first}{boundary}{second}"))?;
        let boundary = plain.inner.token_to_id(&boundary.to_string());
        let at =
            tokens.ids.iter().position(|id| Some(*id) == boundary).ok_or("the tokenizer drops unknown characters")?;
        let width = tokens.spans[at].len();
        tokens.ids.remove(at);
        tokens.spans.remove(at);
        for span in &mut tokens.spans[at..] {
            *span = span.start.saturating_sub(width)..span.end.saturating_sub(width);
        }
        Ok((tokens, at))
    }

    /// Encodes a rendered conversation: special-token text a message contains is text, the template's own is the token.
    ///
    /// Where no message contains any, this is the encoding of the whole text.
    pub fn encode_rendered(&self, rendered: &Rendered) -> Result<Tokens, String> {
        let text = rendered.text.as_str();
        let Some(special) = self.special_text.as_ref().filter(|_| !rendered.literal.is_empty()) else {
            return self.encode(text);
        };
        // The template's special tokens become single characters the plain tokenizer reads as tokens.
        reject_stand_ins(text, self.special.len())?;
        let plain = self.plain()?;
        let mut replaced = String::with_capacity(text.len());
        // Where the replaced text is ahead of the original: (byte in the replaced text, bytes left out up to there).
        let mut shifts = vec![(0usize, 0usize)];
        let (mut copied, mut at) = (0, 0);
        while let Some(found) = special.find_at(text, at) {
            let span = found.range();
            if rendered.is_literal(&span) {
                at = span.start + text[span.start..].chars().next().map_or(1, char::len_utf8);
                continue;
            }
            let index =
                self.special.iter().position(|(text, _)| text == found.as_str()).ok_or("an unknown special token")?;
            replaced.push_str(&text[copied..span.start]);
            replaced.push(stand_in(index));
            copied = span.end;
            at = span.end;
            shifts.push((replaced.len(), span.end - replaced.len()));
        }
        replaced.push_str(&text[copied..]);
        let mut tokens = encode(&plain.inner, &replaced)?;
        for (id, span) in tokens.ids.iter_mut().zip(&mut tokens.spans) {
            let original = |at: usize| at + shifts[shifts.partition_point(|(from, _)| *from <= at) - 1].1;
            *span = original(span.start)..original(span.end);
            if let Some(stands_for) = plain.ids.get(id) {
                *id = *stands_for;
            }
        }
        Ok(tokens)
    }

    fn plain(&self) -> Result<&Plain, String> {
        if let Some(plain) = self.plain.get() {
            return Ok(plain);
        }
        let mut inner = self.inner.clone();
        inner.set_encode_special_tokens(true);
        let decoder = self.inner.get_added_tokens_decoder();
        let mut stand_ins: Vec<AddedToken> = self
            .special
            .iter()
            .enumerate()
            .map(|(index, (_, id))| {
                let token = AddedToken::from(stand_in(index).to_string(), false).normalized(false);
                match decoder.get(id) {
                    Some(original) => {
                        token.single_word(original.single_word).lstrip(original.lstrip).rstrip(original.rstrip)
                    }
                    None => token,
                }
            })
            .collect();
        stand_ins.push(AddedToken::from(stand_in(self.special.len()).to_string(), false).normalized(false));
        inner.add_tokens(stand_ins).map_err(|error| error.to_string())?;
        let ids = self
            .special
            .iter()
            .enumerate()
            .filter_map(|(index, (_, id))| Some((inner.token_to_id(&stand_in(index).to_string())?, *id)))
            .collect();
        Ok(self.plain.get_or_init(|| Plain { inner, ids }))
    }

    /// The text of tokens; `skip_special` leaves special tokens out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        quietly(|| self.inner.decode(ids, skip_special)).ok().and_then(std::result::Result::ok).unwrap_or_default()
    }

    /// Decodes a generation token by token.
    pub fn stream(&self, skip_special: bool) -> TextStream<'_> {
        TextStream { tokenizer: self, skip_special, ids: Vec::new(), begin: 0, shown: 0 }
    }
}

/// Text that grows token by token: a character made of several tokens appears when it is whole.
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    skip_special: bool,
    ids: Vec<u32>,
    /// First token still needed as context of the next text.
    begin: usize,
    /// Tokens whose text has been given out.
    shown: usize,
}

impl TextStream<'_> {
    /// The text that a further token adds; empty while a character is incomplete.
    pub fn push(&mut self, id: u32) -> String {
        self.ids.push(id);
        self.advance(false)
    }

    /// What is left, complete or not.
    pub fn finish(mut self) -> String {
        self.advance(true)
    }

    fn advance(&mut self, last: bool) -> String {
        let before = self.tokenizer.decode(&self.ids[self.begin..self.shown], self.skip_special);
        let now = self.tokenizer.decode(&self.ids[self.begin..], self.skip_special);
        if (now.ends_with('\u{FFFD}') && !last) || now.len() <= before.len() {
            return String::new();
        }
        self.begin = self.shown;
        self.shown = self.ids.len();
        now.get(before.len()..).unwrap_or_default().to_string()
    }
}

/// A pattern that matches any of these texts literally; they come longest first.
pub(super) fn pattern<'t>(texts: impl Iterator<Item = &'t str>) -> Option<Regex> {
    let texts: Vec<String> = texts.map(regex::escape).collect();
    if texts.is_empty() {
        return None;
    }
    Regex::new(&texts.join("|")).ok()
}

fn encode(inner: &tokenizers::Tokenizer, text: &str) -> Result<Tokens, String> {
    let encoding = quietly(|| inner.encode(text, false))
        .map_err(|panic| format!("the tokenizer failed on this text: {panic}"))?
        .map_err(|error| format!("the tokenizer failed on this text: {error}"))?;
    let spans = encoding.get_offsets().iter().map(|(begin, end)| *begin..*end).collect();
    Ok(Tokens { ids: encoding.get_ids().to_vec(), spans })
}

fn stand_in(index: usize) -> char {
    char::from_u32(STAND_INS + index as u32)
        .expect("a vocabulary has fewer special tokens than plane 15 characters: checked when read")
}

fn reject_stand_ins(text: &str, count: usize) -> Result<(), String> {
    let taken = STAND_INS..=STAND_INS + count as u32;
    match text.chars().find(|c| taken.contains(&(*c as u32))) {
        Some(c) => Err(format!(
            "private-use character U+{:X} beside special-token text: set dataset.allow_special_tokens, or remove the character",
            c as u32
        )),
        None => Ok(()),
    }
}

fn read_tokenizer(sidecars: &BTreeMap<String, Vec<u8>>, notices: &mut Vec<String>) -> Result<tokenizers::Tokenizer> {
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
fn first_of_probe(inner: &tokenizers::Tokenizer) -> Result<Option<u32>> {
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
fn read_json(sidecars: &BTreeMap<String, Vec<u8>>, name: &str) -> Result<Json> {
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
fn check_vocabulary(inner: &tokenizers::Tokenizer, config: &Json) -> Result<()> {
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
fn named_tokens(inner: &tokenizers::Tokenizer, files: &[&Json], configs: &[&Json]) -> Vec<(String, String)> {
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
fn mark_special(inner: &mut tokenizers::Tokenizer, named: &[(String, String)]) -> Result<()> {
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
fn whole_numbers(value: &Json) -> Vec<u32> {
    let id = |value: &Json| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Json::Array(ids) => ids.iter().filter_map(id).collect(),
        one => id(one).into_iter().collect(),
    }
}

/// `chat_template.jinja` before `tokenizer_config.json`, where it is a text or a list of named ones.
fn chat_templates(sidecars: &BTreeMap<String, Vec<u8>>, tokenizer_config: &Json) -> Result<BTreeMap<String, String>> {
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

fn digest(sidecars: &BTreeMap<String, Vec<u8>>) -> String {
    let mut hasher = Sha256::new();
    for (name, bytes) in sidecars {
        hasher.update((name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        hasher.update((bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    }
    hexadecimal(&hasher.finalize())
}

/// Bytes as lower-case hexadecimal digits.
pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::path::Path;

    fn sidecars(name: &str) -> BTreeMap<String, Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer").join(name);
        ["tokenizer.json", "tokenizer_config.json"]
            .iter()
            .map(|file| (file.to_string(), std::fs::read(folder.join(file)).unwrap()))
            .collect()
    }

    fn with(name: &str, files: &[(&str, &[u8])]) -> Result<Tokenizer> {
        let mut sidecars = sidecars(name);
        sidecars.extend(files.iter().map(|(name, bytes)| (name.to_string(), bytes.to_vec())));
        Tokenizer::new(&sidecars)
    }

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

    #[test]
    fn a_stream_gives_the_whole_text_and_no_broken_characters() {
        for name in ["bytes", "pieces"] {
            let tokenizer = with(name, &[]).unwrap();
            let text = "Grüße 你好 🙂🙃 and  two spaces\n\nend é";
            let ids = tokenizer.encode(text).unwrap().ids;
            let mut stream = tokenizer.stream(true);
            let pieces: Vec<String> = ids.iter().map(|id| stream.push(*id)).collect();
            let streamed = pieces.concat() + &stream.finish();
            assert!(!streamed.contains('\u{FFFD}'), "{streamed}");
            assert_eq!(streamed, tokenizer.decode(&ids, true));
            assert!(pieces.iter().filter(|piece| !piece.is_empty()).count() > 10);
        }
    }

    #[test]
    fn apart_means_a_boundary_and_nothing_else() {
        for name in ["bytes", "pieces"] {
            let tokenizer = with(name, &[]).unwrap();
            let (tokens, at) = tokenizer.encode_apart("The quick bro", "wn <|im_end|></s> fox").unwrap();
            assert_eq!(tokens.ids[..at], tokenizer.encode_plain("The quick bro").unwrap().ids);
            assert_eq!(tokens.spans.last().unwrap().end, "The quick brown <|im_end|></s> fox".len());
            assert!(tokens.ids.iter().all(|id| !tokenizer.is_special(*id)));
        }
    }
}
