//! A conversation to tokens and mask: which turns are trained, where each begins and where it ends.

use std::ops::Range;

use serde_json::{Value as Json, json};

use super::chat::{Chat, PROBE};
use super::{Begin, Encoder, Row};
use crate::data::template::Rendered;
use crate::data::tokenizer::Tokens;
use crate::data::{BadRow, Document};
use crate::recipe::TrainOn;

/// A conversation and what its template makes of it.
#[derive(Clone, Copy)]
pub(super) struct Told<'a> {
    pub(super) chat: &'a Chat,
    pub(super) messages: &'a [Json],
    pub(super) tools: Option<&'a Json>,
    pub(super) rendered: &'a Rendered,
}

impl Encoder {
    pub(super) fn conversation(&self, messages: &[Json], tools: Option<&Json>, trained_from: usize) -> Row<Document> {
        let chat = self.chat(tools)?;
        let with_system = self.with_system(messages);
        let trained_from = trained_from + with_system.len() - messages.len();
        let messages = with_system;
        self.check_messages(chat, &messages)?;
        let (selected, passed_over) = self.selected(&messages, trained_from)?;

        let mut rendered = self.render(chat, &messages, tools, false)?;
        if let Some(end) = self.missing_end(Told { chat, messages: &messages, tools, rendered: &rendered }) {
            rendered.text.push_str(&end);
        }
        let told = Told { chat, messages: &messages, tools, rendered: &rendered };
        let tokens = self.tokenizer.encode_rendered(&rendered).map_err(BadRow::Malformed)?;
        self.check_bos(&tokens.ids)?;
        let mut trained = vec![false; tokens.ids.len()];
        if self.recipe.train_on == TrainOn::All {
            let from = if trained_from == 0 { 0 } else { self.begin(told, trained_from)? };
            for (flag, span) in trained.iter_mut().zip(&tokens.spans) {
                *flag = span.end > from;
            }
            if !passed_over.is_empty() {
                for span in self.turns(told, &passed_over, &tokens)? {
                    trained[span].fill(false);
                }
            }
        } else {
            for span in self.turns(told, &selected, &tokens)? {
                trained[span].fill(true);
            }
        }
        let ends = tokens.ids.iter().zip(&trained).any(|(id, trained)| *trained && chat.ends_turn(*id));
        if !ends {
            return Err(BadRow::Malformed(
                "no end-of-turn token is trained, so the model would not learn to stop: the chat template writes none \
                 after the assistant's turn; name another with dataset.chat_template"
                    .into(),
            ));
        }
        Ok(Document { ids: tokens.ids, trained })
    }

    /// The end of the last turn where the template writes none: with some (GLM's) it is the next turn's header that ends a turn,
    /// a token the model gives itself to say that it is done.
    fn missing_end(&self, told: Told<'_>) -> Option<String> {
        let Told { chat, messages, tools, rendered } = told;
        let asked = chat.asked.as_ref().filter(|_| !chat.template.marks_generation())?;
        let last = messages.last().filter(|last| is_assistant(last))?;
        if last["tool_calls"].as_array().is_none_or(|calls| calls.is_empty()) {
            return Some(asked.clone());
        }
        let answer = json!({"role": "tool", "content": PROBE.to_string()});
        let answered: Vec<Json> = messages.iter().cloned().chain([answer]).collect();
        let answered = self.render(chat, &answered, tools, false).ok()?;
        let rest = answered.text.strip_prefix(&rendered.text)?;
        let end = self.tokenizer.special_text()?.find(rest).filter(|found| found.start() == 0)?.as_str();
        self.tokenizer.id(end).filter(|id| chat.end_ids.contains(id)).map(|_| end.to_string())
    }

    /// The messages whose turns are trained: all of the assistant's from `from` on, or the last one. Besides, those of
    /// them that the row itself says are not.
    fn selected(&self, messages: &[Json], from: usize) -> Row<(Vec<usize>, Vec<usize>)> {
        let mut asked: Vec<usize> = (from..messages.len()).filter(|at| is_assistant(&messages[*at])).collect();
        if self.recipe.train_on == TrainOn::LastAssistant {
            asked = asked.split_off(asked.len().saturating_sub(1));
        }
        if asked.is_empty() && self.recipe.train_on != TrainOn::All {
            return Err(BadRow::NothingTrained("the conversation has no assistant turn to train on".into()));
        }
        let (mut selected, mut passed_over) = (Vec::new(), Vec::new());
        for at in asked {
            if is_trained(at, &messages[at])? { selected.push(at) } else { passed_over.push(at) }
        }
        if selected.is_empty() && self.recipe.train_on != TrainOn::All {
            let what = "every assistant turn that would be trained says `weight: 0` or `train: false`";
            return Err(BadRow::NothingTrained(what.into()));
        }
        for at in &selected {
            let message = &messages[*at];
            let says = |field: &str| match &message[field] {
                Json::Null => false,
                Json::String(text) => !text.trim().is_empty(),
                Json::Array(items) => !items.is_empty(),
                _ => true,
            };
            let content = content_text(&message["content"]).is_some_and(|text| !text.trim().is_empty());
            if !content
                && !["tool_calls", "function_call", "reasoning_content", "thinking", "reasoning"]
                    .iter()
                    .any(|field| says(field))
            {
                return Err(BadRow::NothingTrained(format!("message {at}: the assistant's turn is empty")));
            }
        }
        Ok((selected, passed_over))
    }

    /// The tokens of the selected turns, each with its end-of-turn token.
    fn turns(&self, told: Told<'_>, selected: &[usize], tokens: &Tokens) -> Row<Vec<Range<usize>>> {
        let Told { chat, messages, rendered, .. } = told;
        if chat.template.marks_generation() {
            let spans = self.generated(told, selected)?;
            return Ok(spans.into_iter().map(|span| tokens_of(tokens, &span, rendered, chat)).collect());
        }
        let assistants: Vec<usize> = (0..messages.len()).filter(|at| is_assistant(&messages[*at])).collect();
        // Those between selected ones are looked for as well: a turn ends before the next one begins, whosever it is.
        let from = |at: &usize| selected.first().is_some_and(|first| at >= first);
        let headers = chat.headers(rendered).filter(|ends| ends.len() == assistants.len());
        // A conversation may change what a template prompts with (`/no_think`).
        let headers = headers.filter(|ends| {
            let last = assistants.last().map(|last| self.begin(told, *last));
            !matches!(last, Some(Ok(begin)) if ends.last() != Some(&begin))
        });
        let begins: Vec<(usize, Begin)> = match headers {
            Some(ends) => assistants.into_iter().zip(ends).filter(|(at, _)| from(at)).collect(),
            None => {
                let begin = |at: usize| Ok((at, self.begin(told, at)?));
                assistants.into_iter().filter(from).map(begin).collect::<Row<_>>()?
            }
        };
        let mut spans = Vec::with_capacity(begins.len());
        for (turn, (message, begin)) in begins.iter().enumerate().filter(|(_, (at, _))| selected.contains(at)) {
            let first = tokens.spans.partition_point(|span| span.end <= *begin);
            let limit = begins.get(turn + 1).map_or(usize::MAX, |(_, next)| *next);
            // A token that closes a turn but ends no generation may close a part of one as well: there the last part counts.
            let said = match chat.closing {
                Some(_) => self.last_shown(told, *message).unwrap_or(*begin),
                None => *begin,
            };
            let end = (first..tokens.ids.len())
                .take_while(|at| tokens.spans[*at].start < limit)
                .find(|at| tokens.spans[*at].start >= said && chat.ends_turn(tokens.ids[*at]));
            let Some(end) = end else {
                return Err(BadRow::Malformed(format!(
                    "message {message}: the chat template ends the assistant's turn with no end-of-turn token, so the model would not \
                     learn to stop; name another with dataset.chat_template"
                )));
            };
            let turn = &rendered.text[tokens.spans[first].start..tokens.spans[end].end];
            let content = &messages[*message]["content"];
            if tokens.ids[first..end].iter().all(|id| chat.ends_turn(*id)) || !holds_answer(&rendered.text, content) {
                return Err(BadRow::Malformed(format!(
                    "message {message}: the chat template leaves out what the assistant says (its text or its tool calls); name \
                     another with dataset.chat_template"
                )));
            }
            if !holds_answer(turn, content) {
                return Err(uncertain(*message));
            }
            if let Some(next) = messages.get(*message + 1).filter(|next| !is_assistant(next) && next["role"] != "user")
            {
                // Some templates write what a tool answers into the turn that called it.
                let shown = self.first_shown(told, *message + 1);
                if shown.is_some_and(|shown| shown < tokens.spans[end].end) {
                    return Err(holds_another(*message, &next["role"]));
                }
            }
            spans.push(first..end + 1);
        }
        Ok(spans)
    }

    /// The spans a template marks with `{% generation %}` for the selected messages.
    fn generated(&self, told: Told<'_>, selected: &[usize]) -> Row<Vec<Range<usize>>> {
        let Told { chat, messages, tools, rendered } = told;
        let assistants: Vec<usize> = (0..messages.len()).filter(|at| is_assistant(&messages[*at])).collect();
        let spans = &rendered.generation;
        if selected.len() == assistants.len() {
            return Ok(spans.clone());
        }
        if spans.len() == assistants.len() {
            let chosen = assistants.iter().zip(spans).filter(|(at, _)| selected.contains(at));
            return Ok(chosen.map(|(_, span)| span.clone()).collect());
        }
        // Several spans per turn: those of the turns before the first selected one are left out. Which belong to a turn in
        // between cannot be told.
        if !assistants.ends_with(selected) {
            return Err(uncertain(selected[0]));
        }
        let before = self.render(chat, &messages[..selected[0]], tools, false)?;
        if before.generation.len() > spans.len() || spans[..before.generation.len()] != before.generation {
            return Err(uncertain(selected[0]));
        }
        Ok(spans[before.generation.len()..].to_vec())
    }
}

/// The tokens of a marked span, and the end-of-turn token after it where the template left it outside.
fn tokens_of(tokens: &Tokens, span: &Range<usize>, rendered: &Rendered, chat: &Chat) -> Range<usize> {
    let first = tokens.spans.partition_point(|token| token.end <= span.start);
    let mut end = tokens.spans.partition_point(|token| token.start < span.end);
    let ends = |at: usize| tokens.ids.get(at).is_some_and(|id| chat.end_ids.contains(id));
    if end > first && !(first..end).any(ends) {
        let blank = (end..tokens.ids.len()).find(|at| !rendered.text[tokens.spans[*at].clone()].trim().is_empty());
        if let Some(next) = blank.filter(|at| ends(*at)) {
            end = next + 1;
        }
    }
    first..end.max(first)
}

/// What a row says about one of its turns, as OpenAI's (`weight: 0`) and Axolotl's (`train: false`) data do.
const TURN_FLAGS: [&str; 3] = ["weight", "train", "training"];

fn is_trained(at: usize, message: &Json) -> Row<bool> {
    for flag in TURN_FLAGS {
        match &message[flag] {
            Json::Null | Json::Bool(true) => {}
            Json::Bool(false) => return Ok(false),
            Json::Number(number) if number.as_f64() == Some(1.0) => {}
            Json::Number(number) if number.as_f64() == Some(0.0) => return Ok(false),
            other => {
                let what = format!("message {at}: its `{flag}` is {other}, expected 0 or 1, true or false");
                return Err(BadRow::Malformed(what));
            }
        }
    }
    Ok(true)
}

pub(super) fn is_assistant(message: &Json) -> bool {
    message["role"] == "assistant"
}

pub(super) fn content_text(content: &Json) -> Option<String> {
    match content {
        Json::String(text) => Some(text.clone()),
        Json::Array(parts) => Some(parts.iter().filter_map(|part| part["text"].as_str()).collect()),
        _ => None,
    }
}

/// Whether a turn's text holds what the assistant says after thinking; white space does not count, templates trim it.
fn holds_answer(turn: &str, content: &Json) -> bool {
    let Some(content) = content_text(content) else { return true };
    let answer = content.rsplit_once("</think>").map_or(content.as_str(), |(_, answer)| answer);
    let dense = |text: &str| text.chars().filter(|c| !c.is_whitespace()).collect::<String>();
    turn.contains(answer.trim()) || dense(turn).contains(&dense(answer))
}

fn holds_another(message: usize, role: &Json) -> BadRow {
    BadRow::Malformed(format!(
        "message {message}: the chat template writes the next message ({role}) into the assistant's turn, so that what the \
         assistant says cannot be told apart; name another with dataset.chat_template"
    ))
}

pub(super) fn uncertain(message: usize) -> BadRow {
    BadRow::Malformed(format!(
        "message {message}: the chat template rewrites this conversation so that where the assistant's turn begins cannot be told; \
         name a template with generation blocks (a built-in one) with dataset.chat_template, or train on the last turn only"
    ))
}
