//! A row of a record batch -> [`Example`].
//!
//! What is accepted, and what is a bad row:
//! - Roles are normalised (`human` -> `user`, `gpt` -> `assistant`, ...); an unknown one is a bad row.
//! - The first turn that is not a system or developer message must not be the assistant's: a model is not taught to
//!   speak unasked by accident.
//! - An assistant turn needs text or tool calls.
//! - Two user turns in a row, or a last turn by the user, go to the template, which may refuse them.
//! - Null fields inside a message are left out (a column of structs gives every message the fields of all).

mod cells;
mod json;

use arrow::array::RecordBatch;
use serde_json::{Map, Value};

use super::layout::Layout;
use super::{BadRow, Example};
use cells::Cells;

/// Most text of a row, in bytes (UTF-8): tokenizers take some 150 bytes of memory for each while they work.
const ROW_LIMIT: usize = 8 << 20;

/// What row `row` of a batch says; `system` is put before a conversation that has none.
pub(super) fn read(layout: &Layout, batch: &RecordBatch, row: usize, system: Option<&str>) -> Result<Example, BadRow> {
    let example = said(layout, batch, row, system)?;
    match text_bytes(&example) {
        ..=ROW_LIMIT => Ok(example),
        bytes => Err(BadRow::Malformed(too_long("row", bytes))),
    }
}

/// Bytes of text in an example.
pub(super) fn text_bytes(example: &Example) -> usize {
    fn of(value: &Value) -> usize {
        match value {
            Value::String(text) => text.len(),
            Value::Array(items) => items.iter().map(of).sum(),
            Value::Object(fields) => fields.iter().map(|(key, value)| key.len() + of(value)).sum(),
            _ => 8,
        }
    }
    match example {
        Example::Conversation { messages, tools, .. } => {
            messages.iter().map(of).sum::<usize>() + tools.as_ref().map_or(0, of)
        }
        Example::PromptCompletion { prompt, completion } => prompt.len() + completion.len(),
        Example::Text(text) => text.len(),
    }
}

fn too_long(what: &str, bytes: usize) -> String {
    format!("{bytes} bytes of text in one {what}, more than the {ROW_LIMIT} that are read: split it into several rows")
}

fn said(layout: &Layout, batch: &RecordBatch, row: usize, system: Option<&str>) -> Result<Example, BadRow> {
    let cells = Cells { batch, row };
    match layout {
        Layout::Messages { messages, tools, system: own, keys } => {
            let turns = cells.messages(messages, keys)?;
            let own = cells.optional_text(own.as_ref())?;
            conversation(turns, 0, own.as_deref().or(system), cells.tools(tools.as_ref())?)
        }
        Layout::Pair { prompt, completion, tools, conversational: true, keys } => {
            let mut turns = cells.messages(prompt, keys)?;
            let trained_from = turns.len();
            let answer = cells.messages(completion, keys)?;
            if answer.is_empty() {
                return Err(BadRow::Malformed(format!("column `{}` has no message", completion.name)));
            }
            turns.extend(answer);
            conversation(turns, trained_from, system, cells.tools(tools.as_ref())?)
        }
        Layout::Pair { prompt, completion, .. } => {
            let (prompt, answer) = (cells.text(prompt)?, cells.text(completion)?);
            match (prompt.is_empty(), answer.is_empty()) {
                (true, true) => Err(BadRow::Empty),
                (false, true) => Err(BadRow::Malformed(format!("column `{}` is empty", completion.name))),
                _ => Ok(Example::PromptCompletion { prompt, completion: answer }),
            }
        }
        Layout::Instruction { instruction, input, output, system: own } => {
            let (mut request, answer) = (cells.text(instruction)?, cells.text(output)?);
            if let Some(input) = cells.optional_text(input.as_ref())? {
                let gap = if request.is_empty() { "" } else { "\n\n" };
                request += &format!("{gap}{input}");
            }
            if request.trim().is_empty() {
                let what = format!("column `{}` is empty", instruction.name);
                return Err(if answer.trim().is_empty() { BadRow::Empty } else { BadRow::Malformed(what) });
            }
            let own = cells.optional_text(own.as_ref())?;
            let turns = vec![turn("user", request), turn("assistant", answer)];
            conversation(turns, 0, own.as_deref().or(system), None)
        }
        Layout::Text { text } => match cells.text(text)? {
            text if text.is_empty() => Err(BadRow::Empty),
            text => Ok(Example::Text(text)),
        },
    }
}

impl Example {
    /// Who says what, for a person to glance at: a paragraph for each text, cut to `longest` characters.
    pub fn outline(&self, longest: usize) -> String {
        let short = |text: &str| match text.char_indices().nth(longest) {
            Some((end, _)) => format!("{}...", &text[..end]),
            None => text.to_string(),
        };
        let line = |who: &str, text: &str| format!("{who}: {}", short(text));
        match self {
            Example::Conversation { messages, tools, .. } => {
                let tools = tools.iter().map(|tools| line("tools", &tools.to_string()));
                let turns = messages.iter().map(|message| {
                    let role = message["role"].as_str().unwrap_or("?");
                    let content = match &message["content"] {
                        Value::String(text) => text.clone(),
                        parts => parts.to_string(),
                    };
                    let calls = message.get("tool_calls").map(|calls| format!(" {calls}")).unwrap_or_default();
                    line(role, (content + &calls).trim_start())
                });
                tools.chain(turns).collect::<Vec<_>>().join("\n")
            }
            Example::PromptCompletion { prompt, completion } => {
                [line("prompt", prompt), line("completion", completion)].join("\n")
            }
            Example::Text(text) => line("text", text),
        }
    }
}

fn turn(role: &str, content: String) -> Map<String, Value> {
    Map::from_iter([("role".to_string(), role.into()), ("content".to_string(), content.into())])
}

/// Checks the order of the turns and puts the system message before them.
fn conversation(
    mut turns: Vec<Map<String, Value>>,
    mut trained_from: usize,
    system: Option<&str>,
    tools: Option<Value>,
) -> Result<Example, BadRow> {
    if turns.is_empty() {
        return Err(BadRow::Empty);
    }
    let is = |turn: &Map<String, Value>, role: &str| turn["role"] == role;
    match turns.iter().find(|turn| !is(turn, "system") && !is(turn, "developer")) {
        None => return Err(BadRow::Malformed("there is no turn but the system message".into())),
        Some(first) if is(first, "assistant") => {
            return Err(BadRow::Malformed(
                "the first turn is the assistant's; begin with a user turn, or give the text as `prompt` and `completion`".into(),
            ));
        }
        Some(_) => {}
    }
    for (index, turn) in turns.iter().enumerate().filter(|(_, turn)| is(turn, "assistant")) {
        let says = match &turn["content"] {
            Value::String(text) => !text.trim().is_empty(),
            Value::Array(parts) => !parts.is_empty(),
            _ => false,
        };
        let calls = turn.get("tool_calls").and_then(Value::as_array).is_some_and(|calls| !calls.is_empty())
            || turn.get("function_call").is_some_and(Value::is_object);
        if !says && !calls {
            return Err(BadRow::Malformed(format!("turn {index}, the assistant's, is empty")));
        }
    }
    let has_system = turns.iter().any(|turn| is(turn, "system") || is(turn, "developer"));
    if let Some(system) = system.filter(|_| !has_system) {
        turns.insert(0, turn("system", system.to_string()));
        trained_from += usize::from(trained_from > 0);
    }
    Ok(Example::Conversation { messages: turns.into_iter().map(Value::Object).collect(), tools, trained_from })
}

#[cfg(test)]
mod tests;
