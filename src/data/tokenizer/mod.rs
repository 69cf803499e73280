//! A model's tokenizer: text to token ids and back, exactly as transformers' fast tokenizer does it.
//!
//! Special tokens are recognised only where a template wrote them: the text `<|im_end|>` in a person's message is
//! encoded as the characters it is made of.

mod added;
mod encode;
mod files;
mod stream;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;

use regex::Regex;

use super::quiet::quietly;
use crate::{Error, Fault, Result};

pub use added::{add_tokens, grow};
use encode::Plain;
pub use encode::Tokens;
use files::{
    chat_templates, check_vocabulary, digest, first_of_probe, mark_special, named_tokens, read_json, read_tokenizer,
    whole_numbers,
};
pub use stream::TextStream;

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

    /// The text of tokens; `skip_special` leaves special tokens out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        quietly(|| self.inner.decode(ids, skip_special)).ok().and_then(std::result::Result::ok).unwrap_or_default()
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

/// Bytes as lower-case hexadecimal digits.
pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    pub(super) fn sidecars(name: &str) -> BTreeMap<String, Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer").join(name);
        ["tokenizer.json", "tokenizer_config.json"]
            .iter()
            .map(|file| (file.to_string(), std::fs::read(folder.join(file)).unwrap()))
            .collect()
    }

    pub(super) fn with(name: &str, files: &[(&str, &[u8])]) -> Result<Tokenizer> {
        let mut sidecars = sidecars(name);
        sidecars.extend(files.iter().map(|(name, bytes)| (name.to_string(), bytes.to_vec())));
        Tokenizer::new(&sidecars)
    }
}
