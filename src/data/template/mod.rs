//! Chat templates: a model's own jinja, rendered byte for byte as transformers' `apply_chat_template` renders it.
//!
//! A template is untrusted: its size, nesting, steps and the text it makes are bounded, and it can reach nothing but
//! the row it is given.

mod builtin;
mod environment;
mod generation;
mod python;
mod source;
mod values;

use std::panic::{AssertUnwindSafe, catch_unwind};

use jiff::civil::DateTime;
use minijinja::value::Value;
use minijinja::{Environment, ErrorKind};
use regex::Regex;
use serde_json::Value as Json;
use serde_json::{Map, json};

pub(super) use builtin::BEGINS_WITH_BOS;
pub use builtin::{BUILTIN, Builtin};
pub use generation::Rendered;

use crate::{Error, Fault, Result};
use environment::{environment, explain};
use values::{joined, size_of_text, value_of};

/// Bytes of text one render may make, intermediate results included: so many, and so many more per byte of the row.
const FREE_TEXT: usize = 32 << 20;
const TEXT_PER_BYTE: usize = 256;

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Where the text comes from, for errors.
    place: String,
    source: String,
    /// Special tokens by the names templates know: `bos_token`, `eos_token`, ...
    special_tokens: Vec<(String, String)>,
    marks_generation: bool,
    content: ContentShape,
}

/// What a template takes as a message's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ContentShape {
    /// A string; a list of parts is joined to one.
    Text,
    /// A list of `{type, text}` parts; a string is made one.
    Parts,
    /// Both.
    Either,
}

/// What is rendered.
#[derive(Debug, Clone, Copy, Default)]
pub struct Conversation<'c> {
    /// The turns: objects with at least `role` and `content`.
    pub messages: &'c [Json],
    /// Tool definitions.
    pub tools: Option<&'c Json>,
    /// Documents for retrieval templates.
    pub documents: Option<&'c Json>,
    /// End with the header of the assistant's next turn.
    pub add_generation_prompt: bool,
    /// Further variables: `enable_thinking`, `date_string`, ...
    pub variables: Option<&'c Map<String, Json>>,
}

/// Which special-token text in a row stays text: one pattern for what people and tools say, one for the assistant.
#[derive(Debug, Clone, Copy, Default)]
pub struct KeptApart<'r> {
    /// For every message but the assistant's, and for tools and documents.
    pub others: Option<&'r Regex>,
    /// For the assistant's messages, which may hold the model's own markup (`<think>`).
    pub assistant: Option<&'r Regex>,
}

impl ChatTemplate {
    /// Compiles a template; `place` names it in errors, `now` is what `strftime_now` prints.
    ///
    /// Errors name the line: what jinja does not understand, or what exceeds the bounds of this module.
    pub fn new(source: &str, place: &str, special_tokens: Vec<(String, String)>, now: DateTime) -> Result<Self> {
        let fault = |line: usize, what: String| {
            let hint = "name another template with dataset.chat_template: a built-in one or a .jinja file";
            Error::Data(Fault::new(format!("{place}, line {line}"), what).hint(hint))
        };
        let rewritten = source::rewrite(source).map_err(|error| fault(error.line, error.what))?;
        let mut environment = environment(now);
        catch_unwind(AssertUnwindSafe(|| environment.add_template_owned("chat", rewritten.text)))
            .unwrap_or_else(|_| Err(minijinja::Error::new(ErrorKind::SyntaxError, "the template cannot be compiled")))
            .map_err(|error| fault(error.line().unwrap_or(1), explain(&error)))?;
        let mut template = ChatTemplate {
            environment,
            place: place.into(),
            source: source.into(),
            special_tokens,
            marks_generation: rewritten.marks_generation,
            content: ContentShape::Either,
        };
        template.content = template.probe();
        Ok(template)
    }

    /// The template as written.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the template says itself what the assistant says (`{% generation %}`).
    pub fn marks_generation(&self) -> bool {
        self.marks_generation
    }

    /// Whether it prints the date.
    pub fn uses_clock(&self) -> bool {
        self.source.contains("strftime_now")
    }

    /// Whether it names this role, or this text, in a string literal.
    pub fn quotes(&self, text: &str) -> bool {
        self.source.contains(&format!("'{text}'")) || self.source.contains(&format!("\"{text}\""))
    }

    /// Renders a conversation. An error is plain text: the template's place, line and complaint.
    pub fn render(&self, conversation: &Conversation, apart: KeptApart) -> std::result::Result<Rendered, String> {
        let mut variables: Vec<(String, Value)> =
            self.special_tokens.iter().map(|(name, text)| (name.clone(), Value::from(text.as_str()))).collect();
        variables.extend(
            conversation.variables.into_iter().flatten().map(|(name, value)| (name.clone(), value_of(value, None))),
        );
        let messages = conversation
            .messages
            .iter()
            .map(|message| self.message(message, apart))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        let optional = |value: Option<&Json>| value.map_or(Value::from(()), |value| value_of(value, apart.others));
        variables.push(("messages".into(), Value::from(messages)));
        variables.push(("tools".into(), optional(conversation.tools)));
        variables.push(("documents".into(), optional(conversation.documents)));
        variables.push(("add_generation_prompt".into(), Value::from(conversation.add_generation_prompt)));
        let size: usize = conversation
            .messages
            .iter()
            .chain(conversation.tools)
            .chain(conversation.documents)
            .map(size_of_text)
            .sum();
        variables
            .push((python::BUDGET.into(), Value::from(FREE_TEXT.saturating_add(size.saturating_mul(TEXT_PER_BYTE)))));

        let rendered = catch_unwind(AssertUnwindSafe(|| {
            self.environment.get_template("chat")?.render(Value::from_pairs(variables))
        }))
        .unwrap_or_else(|_| Err(minijinja::Error::new(ErrorKind::InvalidOperation, "the template cannot be rendered")));
        rendered.map(Rendered::new).map_err(|error| {
            let line = error.line().map(|line| format!(", line {line}")).unwrap_or_default();
            format!("{}{line}: {}", self.place, explain(&error))
        })
    }

    /// A message as the template takes it: content as text or as parts, as it was probed.
    fn message(&self, message: &Json, apart: KeptApart) -> std::result::Result<Value, String> {
        let assistant = message["role"] == "assistant";
        let apart = if assistant { apart.assistant } else { apart.others };
        let Some(fields) = message.as_object() else { return Err("a message is not an object".into()) };
        let pairs = fields.iter().map(|(name, value)| {
            let reshaped = match (name.as_str(), self.content, value) {
                ("content", ContentShape::Text, Json::Array(parts)) => Some(Json::String(joined(parts)?)),
                ("content", ContentShape::Parts, Json::String(text)) => Some(json!([{"type": "text", "text": text}])),
                _ => None,
            };
            Ok((name.as_str(), value_of(reshaped.as_ref().unwrap_or(value), apart)))
        });
        pairs.collect::<std::result::Result<Vec<_>, String>>().map(Value::from_pairs)
    }

    /// Finds out whether the template prints a content that is text, a list of parts, or both.
    fn probe(&self) -> ContentShape {
        const NEEDLE: &str = "Needle";
        let prints = |content: Json| {
            let messages = [json!({"role": "user", "content": content})];
            let conversation = Conversation { messages: &messages, add_generation_prompt: true, ..Default::default() };
            let rendered = self.render(&conversation, KeptApart::default());
            // A template that knows nothing of parts prints the list as Python would.
            rendered
                .is_ok_and(|rendered| rendered.text.contains(NEEDLE) && !rendered.text.contains(&format!("'{NEEDLE}'")))
        };
        match (prints(json!(NEEDLE)), prints(json!([{"type": "text", "text": NEEDLE}]))) {
            (true, true) => ContentShape::Either,
            (false, true) => ContentShape::Parts,
            _ => ContentShape::Text,
        }
    }
}

#[cfg(test)]
mod tests;
