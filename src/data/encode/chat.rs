//! A chat template as one model uses it: its headers, its end of turn, and where it comes from.

use std::collections::BTreeSet;

use jiff::civil::DateTime;
use regex::Regex;
use serde_json::{Value as Json, json};

use super::Begin;
use crate::data::template::{BEGINS_WITH_BOS, BUILTIN, ChatTemplate, Conversation, KeptApart, Rendered};
use crate::data::tokenizer::{Tokenizer, pattern};
use crate::recipe::DatasetRecipe;
use crate::{Error, Fault, Result};

/// Stands for what the assistant says while a template is examined.
pub(super) const PROBE: char = '\u{F8FF}';

/// A template as this model uses it.
pub(super) struct Chat {
    pub(super) template: ChatTemplate,
    /// What the template writes before an assistant's turn, when it holds a special token: then no message can contain it.
    pub(super) header: Option<String>,
    /// What the template writes as a prompt for an assistant's turn, which may be more than it writes before one it is given.
    pub(super) prompted_header: Option<String>,
    /// What the template writes before an assistant's turn though it does not write it as a prompt for one.
    pub(super) unprompted_header: Option<String>,
    /// Tokens that end an assistant's turn, and with it a generation.
    pub(super) end_ids: BTreeSet<u32>,
    /// The token after an assistant's turn within a conversation, where it is none of those: `<|end|>` for `<|return|>`.
    pub(super) closing: Option<u32>,
    /// The header of a further question where that is what ends a turn, and nothing does at the end of a conversation.
    pub(super) asked: Option<String>,
    /// Special-token text kept apart in the assistant's messages: all but what the template itself looks for there.
    pub(super) assistant_special: Option<Regex>,
}

impl Chat {
    pub(super) fn new(template: ChatTemplate, tokenizer: &Tokenizer) -> Result<Self> {
        let looked_for = |text: &str| {
            // `'</think>' in content`, `content.split('</think>')`: markup the assistant's messages are expected to hold.
            let text = regex::escape(text);
            let uses = format!(
                r#"(?s)['"]{text}['"]\s+(not\s+)?in\b|(split|partition|startswith|endswith|find|index|replace)\(\s*['"]{text}"#
            );
            Regex::new(&uses).is_ok_and(|uses| uses.is_match(template.source()))
        };
        let kept = tokenizer.special_tokens().iter().map(|(text, _)| text.as_str()).filter(|text| !looked_for(text));
        let mut chat = Chat {
            assistant_special: pattern(kept),
            header: None,
            prompted_header: None,
            unprompted_header: None,
            end_ids: tokenizer.end_ids().iter().copied().collect(),
            closing: None,
            asked: None,
            template,
        };
        chat.find_ends(tokenizer);
        chat.prompted_header = chat.find_prompted_header();
        chat.header = chat.find_header(tokenizer);
        chat.unprompted_header = chat.find_unprompted_header();
        Ok(chat)
    }

    /// Whether a token ends an assistant's turn.
    pub(super) fn ends_turn(&self, id: u32) -> bool {
        self.end_ids.contains(&id) || self.closing == Some(id)
    }

    /// What ends the assistant's turns, by the special tokens the template writes at the end of a conversation and before a
    /// further turn. Where the model's configuration names none of them, it is the last one of those in both places.
    fn find_ends(&mut self, tokenizer: &Tokenizer) {
        let answer = PROBE.to_string();
        let messages = [("user", "One"), ("assistant", answer.as_str()), ("user", "Two")];
        let closing = |messages: &[(&str, &str)]| -> Option<(Vec<u32>, String)> {
            let text = self.probe(messages, false)?;
            let after = text.rsplit_once(PROBE)?.1;
            let mut rest = after;
            let mut ids = Vec::new();
            while let Some(found) = tokenizer.special_text()?.find(rest.trim_start()).filter(|found| found.start() == 0)
            {
                ids.push(tokenizer.id(found.as_str())?);
                rest = &rest.trim_start()[found.end()..];
            }
            Some((ids, after.to_string()))
        };
        let Some((last, rest)) = closing(&messages[..2]) else { return };
        // A template may refuse a conversation that ends with a question.
        let (within, next) = closing(&messages).unwrap_or_else(|| (last.clone(), rest.clone()));
        let both: Vec<u32> = last.iter().zip(&within).take_while(|(a, b)| a == b).map(|(id, _)| *id).collect();
        if !both.iter().any(|id| self.end_ids.contains(id)) {
            self.end_ids.extend(both.last());
        }
        match within.first() {
            Some(first) if !within.iter().any(|id| self.end_ids.contains(id)) => self.closing = Some(*first),
            Some(first) if rest.trim().is_empty() && self.end_ids.contains(first) => {
                let special = tokenizer.special_text().and_then(|special| special.find(&next));
                self.asked = special.filter(|found| found.start() == 0).map(|found| found.as_str().to_string());
            }
            _ => {}
        }
    }

    fn find_prompted_header(&self) -> Option<String> {
        let first = [("user", "One")];
        let header = self.probe(&first, true)?.strip_prefix(&self.probe(&first, false)?)?.to_string();
        Some(header).filter(|header| !header.trim().is_empty())
    }

    /// The header of the assistant's turn, when it can be searched for: it holds a special token, and it is where turns begin in a conversation.
    fn find_header(&self, tokenizer: &Tokenizer) -> Option<String> {
        let both = [("user", "One"), ("assistant", "Two"), ("user", "Three"), ("assistant", "Four")];
        let header = self.prompted_header.clone()?;
        tokenizer.special_text()?.find(&header)?;
        let whole = self.probe(&both, false)?;
        let ends: Vec<usize> = whole.match_indices(&header).map(|(at, _)| at + header.len()).collect();
        let prompts = [self.probe(&both[..1], true)?, self.probe(&both[..3], true)?];
        let agree = ends.len() == 2
            && ends.iter().zip(&prompts).all(|(end, prompt)| whole.starts_with(prompt) && *end == prompt.len());
        agree.then_some(header)
    }

    /// Templates that ignore `add_generation_prompt` write `<|im_start|>assistant` only together with the answer.
    fn find_unprompted_header(&self) -> Option<String> {
        let answer = PROBE.to_string();
        let messages = [("user", "One"), ("assistant", answer.as_str())];
        let before = self.probe(&messages[..1], false)?;
        let text = self.probe(&messages, false)?;
        let header = text.split_once(PROBE)?.0.strip_prefix(&before)?.to_string();
        // White space alone is the model's to write, as in `[/INST] answer`.
        let prompted = self.probe(&messages[..1], true)? != before;
        Some(header).filter(|header| !prompted && !header.trim().is_empty())
    }

    fn probe(&self, messages: &[(&str, &str)], add_generation_prompt: bool) -> Option<String> {
        let messages: Vec<Json> =
            messages.iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
        let conversation = Conversation { messages: &messages, add_generation_prompt, ..Default::default() };
        self.template.render(&conversation, KeptApart::default()).ok().map(|rendered| rendered.text)
    }

    /// Where the template's own headers end in a rendered conversation.
    pub(super) fn headers(&self, rendered: &Rendered) -> Option<Vec<Begin>> {
        let header = self.header.as_deref()?;
        let found = rendered.text.match_indices(header).map(|(at, _)| at..at + header.len());
        Some(found.filter(|span| !rendered.is_literal(span)).map(|span| span.end).collect())
    }
}

/// The template the recipe names, or the model's own.
pub(super) fn find_template(
    tokenizer: &Tokenizer,
    recipe: &DatasetRecipe,
    now: DateTime,
) -> Result<Option<ChatTemplate>> {
    let named = tokenizer.named_tokens().to_vec();
    let own = tokenizer.chat_templates();
    let Some(name) = recipe.chat_template.as_deref() else {
        // Of several none of which is the usual one, none is taken: which it is, the recipe must say.
        return own
            .get("default")
            .map(|source| ChatTemplate::new(source, "the model's chat template", named, now))
            .transpose();
    };
    if let Some(builtin) = BUILTIN.iter().find(|builtin| builtin.name == name) {
        let place = format!("chat template `{name}`");
        let special = |text: &str| tokenizer.special_tokens().iter().any(|(special, _)| special == text);
        if let Some(missing) = builtin.tokens.iter().find(|token| !special(token)) {
            let fault =
                Fault::new(place, format!("it writes `{missing}`, which is no special token of this tokenizer"));
            return Err(Error::Data(
                fault.hint("plain, alpaca, vicuna, zephyr and mistral end turns with the tokenizer's own eos_token"),
            ));
        }
        if builtin.tokens.is_empty() && tokenizer.eos().is_none() {
            let fault = Fault::new(place, "it ends turns with eos_token, which this tokenizer does not name");
            return Err(Error::Data(fault.hint("add eos_token to tokenizer_config.json")));
        }
        // Left out of the text, not rendered empty: the text travels with what is trained, and whoever serves that renders
        // the tokenizer's bos_token whether it is added or not.
        let without_bos = builtin.source.strip_prefix(BEGINS_WITH_BOS).filter(|_| !tokenizer.adds_bos());
        let source = without_bos.unwrap_or(builtin.source);
        return ChatTemplate::new(source, &place, named, now).map(Some);
    }
    if let Some(source) = own.get(name) {
        return ChatTemplate::new(source, &format!("the model's chat template `{name}`"), named, now).map(Some);
    }
    let path = std::path::Path::new(name);
    if !name.ends_with(".jinja") && !path.is_file() {
        let names = BUILTIN.map(|builtin| builtin.name).join(", ");
        let fault = Fault::new("dataset.chat_template", format!("no template is called `{name}`"));
        return Err(Error::Data(fault.hint(format!("there are {names}; or name a .jinja file"))));
    }
    let metadata = std::fs::metadata(path).map_err(|error| Error::Data(Fault::at(path, error)))?;
    if !metadata.is_file() || metadata.len() > 1 << 20 {
        return Err(Error::Data(Fault::at(path, "not a template: it is no file, or larger than 1 MiB")));
    }
    let bytes = std::fs::read(path).map_err(|error| Error::Data(Fault::at(path, error)))?;
    let source = String::from_utf8(bytes).map_err(|_| Error::Data(Fault::at(path, "the template is not UTF-8")))?;
    let source = source.strip_prefix('\u{FEFF}').unwrap_or(&source);
    ChatTemplate::new(source, name, named, now).map(Some)
}
