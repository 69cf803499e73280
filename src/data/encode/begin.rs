//! Where a message comes out in a rendered conversation.
//!
//! Most templates keep what came before: then a turn begins where the prompt for it ends. Others move the system message,
//! drop earlier thinking or write tools into the last question. There the message itself is traced: a character put into
//! its texts shows where they are printed, and the turn begins with the header before that place.

use serde_json::Value as Json;

use super::chat::PROBE;
use super::mask::{Told, content_text, is_assistant, uncertain};
use super::{Begin, Encoder, Row};
use crate::data::template::Rendered;

/// Fields of a message that templates print.
const FIELDS: [&str; 6] = ["content", "reasoning_content", "reasoning", "thinking", "tool_calls", "function_call"];
/// What opens and closes a thought, which a template may write into the prompt but not into the history.
const THOUGHTS: [&str; 4] = ["<think>", "</think>", "[THINK]", "<|channel>"];

/// Which end of a message's texts is traced.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    First,
    Last,
}

impl Encoder {
    /// Where the turn of a message begins in the rendered conversation: where the prompt for it ends.
    pub(super) fn begin(&self, told: Told<'_>, at: usize) -> Row<Begin> {
        let Told { chat, messages, tools, rendered } = told;
        let prompt_of = |prompted: bool| self.render(chat, &messages[..at], tools, prompted).ok();
        let prompt = (at > 0).then(|| prompt_of(is_assistant(&messages[at]))).flatten();
        if let Some(rest) = prompt.as_ref().and_then(|prompt| rendered.text.strip_prefix(&prompt.text)) {
            let header =
                chat.unprompted_header.as_deref().filter(|header| rest.starts_with(header)).unwrap_or_default();
            return Ok(rendered.text.len() - rest.len() + header.len());
        }

        let shown = self.first_shown(told, at).ok_or_else(|| uncertain(at))?;
        // The header is looked for behind what was said before.
        let moves = |role: &Json| role == "system" || role == "developer";
        let earlier = (0..at).rev().filter(|earlier| !moves(&messages[*earlier]["role"]));
        let mut earlier = earlier.map(|earlier| self.first_shown(told, earlier));
        let after = earlier.find_map(|shown| shown).unwrap_or(0);
        if after > shown {
            return Err(uncertain(at));
        }
        if let Some(prompt) = prompt {
            let before = prompt_of(false);
            let prompted = before.as_ref().and_then(|before| prompt.text.strip_prefix(&before.text));
            // After a tool's answer some write none, though they do write one before a further call.
            let prompted = prompted.filter(|header| !header.is_empty()).or(chat.prompted_header.as_deref());
            let header = chat.unprompted_header.as_deref().or(prompted).unwrap_or_default();
            if let Some(begin) = behind_header(rendered, header, after, shown) {
                return Ok(begin);
            }
            if let Some(begin) = self.aligned(&prompt.text, rendered, after, shown) {
                return Ok(begin);
            }
        }
        let content = content_text(&messages[at]["content"]).unwrap_or_default();
        let begins = !content.trim().is_empty() && rendered.text[shown..].starts_with(content.trim());
        if begins { Ok(shown) } else { Err(uncertain(at)) }
    }

    /// The first place where anything a message says is printed.
    pub(super) fn first_shown(&self, told: Told<'_>, at: usize) -> Option<usize> {
        let traced = self.traced(told, at, Side::First)?;
        let text = &told.rendered.text;
        let same = text.bytes().zip(traced.bytes()).take_while(|(a, b)| a == b).count();
        (traced != *text).then(|| (0..=same).rev().find(|place| text.is_char_boundary(*place)).unwrap_or(0))
    }

    /// The last place where anything a message says is printed.
    pub(super) fn last_shown(&self, told: Told<'_>, at: usize) -> Option<usize> {
        let traced = self.traced(told, at, Side::Last)?;
        let text = &told.rendered.text;
        let same = text.bytes().rev().zip(traced.bytes().rev()).take_while(|(a, b)| a == b).count();
        (traced != *text).then_some(text.len() - same)
    }

    /// The conversation rendered with a character put into the texts of one message.
    fn traced(&self, told: Told<'_>, at: usize, side: Side) -> Option<String> {
        let mut messages = told.messages.to_vec();
        for field in FIELDS {
            match messages[at].get_mut(field) {
                Some(calls) if field.ends_with("calls") || field.ends_with("call") => trace_calls(calls, side),
                Some(value) => trace(value, side),
                None => {}
            }
        }
        self.render(told.chat, &messages, told.tools, false).ok().map(|rendered| rendered.text)
    }

    /// The place between `after` and `shown` before which the conversation reads as the prompt does at its end: for
    /// templates that write nothing of their own as a prompt (`[/INST]` ends the question).
    fn aligned(&self, prompt: &str, rendered: &Rendered, after: usize, shown: usize) -> Option<Begin> {
        let text = &rendered.text;
        let common =
            |place: usize| text[..place].bytes().rev().zip(prompt.bytes().rev()).take_while(|(a, b)| a == b).count();
        let places = (after..=shown).filter(|place| text.is_char_boundary(*place));
        let (length, begin) = places.map(|place| (common(place), place)).max()?;
        // Only a special token is sure to be the template's own.
        let last = self.tokenizer.special_text()?.find_iter(&text[after..begin]).last()?.range();
        let last = after + last.start..after + last.end;
        (last.start >= begin - length && !rendered.is_literal(&last)).then_some(begin)
    }
}

/// Where a header ends that stands between two places: whole, or without the thought it opens or closes.
fn behind_header(rendered: &Rendered, header: &str, after: usize, shown: usize) -> Option<Begin> {
    let thought = THOUGHTS.iter().filter_map(|thought| header.find(thought)).min().unwrap_or(header.len());
    for head in [header, &header[..thought], header[..thought].trim_end()] {
        if head.trim().is_empty() {
            continue;
        }
        let Some(found) = rendered.text[after..shown].rfind(head) else { continue };
        let span = after + found..after + found + head.len();
        if rendered.is_literal(&span) {
            return None;
        }
        // The template may write something before the rest of what it prompts with: `<think></think>` for `</think>`.
        let rest = header[head.len()..].trim();
        let behind = rendered.text[span.end..shown].find(rest).filter(|_| !rest.is_empty());
        return Some(span.end + behind.map_or(0, |place| place + rest.len()));
    }
    None
}

/// Puts a character into every text of a value.
fn trace(value: &mut Json, side: Side) {
    match value {
        Json::String(text) => *text = traced_text(text, side),
        Json::Array(items) => items.iter_mut().for_each(|item| trace(item, side)),
        Json::Object(fields) => {
            let told = fields.iter_mut().filter(|(name, _)| !matches!(name.as_str(), "type" | "id" | "role"));
            told.for_each(|(_, value)| trace(value, side));
        }
        _ => {}
    }
}

/// A call begins with its name and ends with its arguments. The name is left alone at the end: templates repeat it with the
/// tool's answer.
fn trace_calls(calls: &mut Json, side: Side) {
    let calls = match calls {
        Json::Array(calls) => calls.as_mut_slice(),
        call => std::slice::from_mut(call),
    };
    for call in calls {
        let call = if call["function"].is_object() { &mut call["function"] } else { call };
        let Some(fields) = call.as_object_mut() else { continue };
        let name = if side == Side::First { "name" } else { "arguments" };
        match fields.get_mut(name) {
            Some(Json::Object(arguments)) => {
                arguments.insert(PROBE.to_string(), Json::String(PROBE.to_string()));
            }
            Some(text) => trace(text, side),
            None => {}
        }
    }
}

fn traced_text(text: &str, side: Side) -> String {
    let blank = text.len() - text.trim_end().len();
    if side == Side::Last && !text.trim().is_empty() {
        let (said, blank) = text.split_at(text.len() - blank);
        return format!("{said}{PROBE}{blank}");
    }
    // A template may drop a thought, and what stands before it: every piece between markup begins with the character.
    let mut traced = String::with_capacity(text.len() + 8);
    let mut begins = true;
    for (place, c) in text.char_indices() {
        let markup = THOUGHTS.iter().any(|thought| text[place..].starts_with(thought));
        if begins && !c.is_whitespace() && !markup {
            traced.push(PROBE);
            begins = false;
        }
        traced.push(c);
        begins |= matches!(c, '>' | ']');
    }
    traced
}
