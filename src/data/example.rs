//! A row of a record batch -> [`Example`].
//!
//! What is accepted, and what is a bad row:
//! - Roles are normalised (`human` -> `user`, `gpt` -> `assistant`, ...); an unknown one is a bad row.
//! - The first turn that is not a system or developer message must not be the assistant's: a model is not taught to
//!   speak unasked by accident.
//! - An assistant turn needs text or tool calls.
//! - Two user turns in a row, or a last turn by the user, go to the template, which may refuse them.
//! - Null fields inside a message are left out (a column of structs gives every message the fields of all).

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StructArray};
use arrow::datatypes::{self, DataType, Field};
use arrow::util::display::array_value_to_string;
use serde_json::{Map, Value};

use super::layout::{Column, Layout, MessageKeys};
use super::{BadRow, Example};

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

/// The cells of one row.
struct Cells<'a> {
    batch: &'a RecordBatch,
    row: usize,
}

impl Cells<'_> {
    /// The column's array, or None where the cell is null.
    fn cell(&self, column: &Column) -> Result<Option<&ArrayRef>, BadRow> {
        // The projection keeps file order and names; layouts only name projected columns.
        let array = self.batch.column_by_name(&column.name);
        let array = array.ok_or_else(|| BadRow::Malformed(format!("column `{}` was not read", column.name)))?;
        Ok(Some(array).filter(|array| !array.is_null(self.row)))
    }

    fn text(&self, column: &Column) -> Result<String, BadRow> {
        let array = self.cell(column)?.ok_or_else(|| null(column))?;
        string(array, self.row).map_err(|what| BadRow::Malformed(format!("column `{}`: {what}", column.name)))
    }

    /// None where there is no such column, the cell is null or the text is blank.
    fn optional_text(&self, column: Option<&Column>) -> Result<Option<String>, BadRow> {
        let Some(column) = column else { return Ok(None) };
        if self.cell(column)?.is_none() {
            return Ok(None);
        }
        Ok(Some(self.text(column)?).filter(|text| !text.trim().is_empty()))
    }

    fn tools(&self, column: Option<&Column>) -> Result<Option<Value>, BadRow> {
        let Some(column) = column else { return Ok(None) };
        let Some(array) = self.cell(column)? else { return Ok(None) };
        let wrong = |what: String| BadRow::Malformed(format!("column `{}`: {what}", column.name));
        let mut value = json(array, self.row).map_err(wrong)?;
        if let Value::String(text) = &value {
            if text.trim().is_empty() {
                return Ok(None);
            }
            value = parse(text).map_err(wrong)?;
        }
        if let Value::Array(tools) = &mut value {
            for tool in tools.iter_mut() {
                if let Value::String(text) = tool {
                    *tool = parse(text).map_err(wrong)?;
                }
            }
        }
        match value {
            Value::Array(tools) if tools.is_empty() => Ok(None),
            Value::Null => Ok(None),
            Value::Array(_) => Ok(Some(value)),
            Value::Object(_) => Ok(Some(Value::Array(vec![value]))),
            _ => Err(wrong("expected a list of tool definitions".into())),
        }
    }

    fn messages(&self, column: &Column, keys: &MessageKeys) -> Result<Vec<Map<String, Value>>, BadRow> {
        let wrong = |what: String| BadRow::Malformed(format!("column `{}`: {what}", column.name));
        let array = self.cell(column)?.ok_or_else(|| null(column))?;
        let mut value = match array.data_type() {
            DataType::Struct(_) => transposed(array.as_struct(), self.row),
            _ => json(array, self.row),
        }
        .map_err(wrong)?;
        if let Value::String(text) = &value {
            value = parse(text).map_err(wrong)?;
        }
        let Value::Array(items) = value else {
            return Err(wrong("expected a list of messages".into()));
        };
        items
            .into_iter()
            .enumerate()
            .map(|(index, item)| {
                let item = if let Value::String(text) = &item { parse(text).map_err(wrong)? } else { item };
                let Value::Object(fields) = item else {
                    return Err(wrong(format!("turn {index} is {}, expected an object", kind_of(&item))));
                };
                message(fields, keys).map_err(|what| wrong(format!("turn {index}: {what}")))
            })
            .collect()
    }
}

fn null(column: &Column) -> BadRow {
    BadRow::Malformed(format!("column `{}` is null", column.name))
}

/// Gives a message its `role` and `content`; everything else it has stays.
fn message(mut fields: Map<String, Value>, keys: &MessageKeys) -> Result<Map<String, Value>, String> {
    // A JSON column's keys are not known from the schema, so ShareGPT's are looked for in each message.
    let mut take = |key: &str, other: &str| fields.shift_remove(key).or_else(|| fields.shift_remove(other));
    let role = take(&keys.role, "from");
    let content = take(&keys.content, "value");
    let role = match role {
        Some(Value::String(role)) => role,
        Some(Value::Null) | None => return Err(format!("it has no `{}`", keys.role)),
        Some(other) => return Err(format!("its `{}` is {}, expected a string", keys.role, kind_of(&other))),
    };
    let role = match role.trim().to_lowercase().as_str() {
        "user" | "human" => "user",
        "assistant" | "gpt" | "bot" | "model" | "chatgpt" => "assistant",
        "system" => "system",
        "developer" => "developer",
        "tool" | "function" | "observation" | "ipython" => "tool",
        _ => {
            return Err(format!(
                "unknown role `{role}`; known are system, developer, user (human), assistant (gpt), tool (function)"
            ));
        }
    };
    let content = match content {
        Some(content @ (Value::String(_) | Value::Array(_))) => content,
        // What a turn made of tool calls has; an empty answer is found later.
        Some(Value::Null) | None if role == "assistant" => Value::String(String::new()),
        Some(Value::Null) | None => return Err(format!("the `{}` of the {role} is missing or null", keys.content)),
        Some(content @ Value::Object(_)) if role == "tool" => Value::String(content.to_string()),
        Some(other) => return Err(format!("its `{}` is {}, expected a string", keys.content, kind_of(&other))),
    };
    let mut message = Map::from_iter([("role".to_string(), role.into()), ("content".to_string(), content)]);
    message.extend(fields.into_iter().filter(|(_, value)| !value.is_null()));
    // Arguments of tool calls are often stored as JSON text inside JSON; they stay as they are, templates know both.
    if let Some(Value::String(text)) = message.get("tool_calls") {
        let calls = if text.trim().is_empty() { Value::Null } else { parse(text)? };
        if calls.is_null() {
            message.shift_remove("tool_calls");
        } else {
            message["tool_calls"] = calls;
        }
    }
    Ok(message)
}

/// `{role: [..], content: [..]}`, as some writers store a list of messages.
fn transposed(lists: &StructArray, row: usize) -> Result<Value, String> {
    let mut messages: Vec<Map<String, Value>> = Vec::new();
    for (field, array) in lists.fields().iter().zip(lists.columns()) {
        let Value::Array(values) = json(array, row)? else { continue };
        messages.resize_with(messages.len().max(values.len()), Map::new);
        for (message, value) in messages.iter_mut().zip(values) {
            message.insert(field.name().clone(), value);
        }
    }
    Ok(Value::Array(messages.into_iter().map(Value::Object).collect()))
}

fn parse(text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(|error| format!("the text is not JSON ({error})"))
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn string(array: &ArrayRef, row: usize) -> Result<String, String> {
    let bytes = match array.data_type() {
        DataType::Utf8View => array.as_string_view().value(row).as_bytes(),
        DataType::BinaryView => array.as_binary_view().value(row),
        other => return Err(format!("{other}, expected a string")),
    };
    if bytes.len() > ROW_LIMIT {
        return Err(too_long("cell", bytes.len()));
    }
    std::str::from_utf8(bytes)
        .map(str::to_string)
        .map_err(|error| format!("the text is not valid UTF-8 ({error}): decode it to UTF-8 when writing the file"))
}

/// Any cell as JSON. The null fields of structs are left out: arrow gives every struct the fields of all.
fn json(array: &ArrayRef, row: usize) -> Result<Value, String> {
    if array.is_null(row) {
        return Ok(Value::Null);
    }
    Ok(match array.data_type() {
        DataType::Null => Value::Null,
        DataType::Boolean => array.as_boolean().value(row).into(),
        DataType::Int8 => array.as_primitive::<datatypes::Int8Type>().value(row).into(),
        DataType::Int16 => array.as_primitive::<datatypes::Int16Type>().value(row).into(),
        DataType::Int32 => array.as_primitive::<datatypes::Int32Type>().value(row).into(),
        DataType::Int64 => array.as_primitive::<datatypes::Int64Type>().value(row).into(),
        DataType::UInt8 => array.as_primitive::<datatypes::UInt8Type>().value(row).into(),
        DataType::UInt16 => array.as_primitive::<datatypes::UInt16Type>().value(row).into(),
        DataType::UInt32 => array.as_primitive::<datatypes::UInt32Type>().value(row).into(),
        DataType::UInt64 => array.as_primitive::<datatypes::UInt64Type>().value(row).into(),
        DataType::Float32 => f64::from(array.as_primitive::<datatypes::Float32Type>().value(row)).into(),
        DataType::Float64 => array.as_primitive::<datatypes::Float64Type>().value(row).into(),
        DataType::Utf8View | DataType::BinaryView => Value::String(string(array, row)?),
        DataType::List(_) => {
            let items = array.as_list::<i32>().value(row);
            Value::Array((0..items.len()).map(|index| json(&items, index)).collect::<Result<_, _>>()?)
        }
        DataType::Struct(fields) => object(fields.iter().map(AsRef::as_ref), array.as_struct().columns(), row)?,
        DataType::Map(..) => {
            let entries = array.as_map().value(row);
            let mut object = Map::new();
            for index in 0..entries.len() {
                let value = json(entries.column(1), index)?;
                if !value.is_null() {
                    object.insert(string(entries.column(0), index)?, value);
                }
            }
            Value::Object(object)
        }
        // Dates, times, decimals: as text.
        _ => Value::String(array_value_to_string(array, row).map_err(|error| error.to_string())?),
    })
}

fn object<'a>(fields: impl Iterator<Item = &'a Field>, columns: &[ArrayRef], row: usize) -> Result<Value, String> {
    let mut object = Map::new();
    for (field, column) in fields.zip(columns) {
        let value = json(column, row)?;
        if !value.is_null() {
            object.insert(field.name().clone(), value);
        }
    }
    Ok(Value::Object(object))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::super::SourceFiles;
    use super::super::fixtures::{message_lists, one, optional_strings, recipe, strings, write};
    use super::*;

    fn rows(columns: Vec<(&str, ArrayRef)>, more: &str) -> Vec<Result<Example, BadRow>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.parquet");
        write(&path, columns);
        read_rows(&path, more)
    }

    fn read_rows(path: &Path, more: &str) -> Vec<Result<Example, BadRow>> {
        let sources = SourceFiles::open(&one(path.to_path_buf()), &recipe(more)).unwrap();
        sources.examples(u64::MAX).map(|row| row.unwrap().1).collect()
    }

    fn said(row: &Result<Example, BadRow>) -> String {
        row.as_ref().unwrap_err().to_string()
    }

    #[test]
    fn an_outline_says_who_says_what_and_cuts_what_is_long() {
        let messages = json!([
            {"role": "user", "content": "Wie spät ist es?"},
            {"role": "assistant", "content": "", "tool_calls": [1]},
            {"role": "tool", "content": "12:00\n"},
        ]);
        let outline = talk(messages).unwrap().outline(10);
        assert_eq!(outline, "user: Wie spät i...\nassistant: [1]\ntool: 12:00\n");
        let pair = Example::PromptCompletion { prompt: "p".into(), completion: "c".into() };
        assert_eq!(pair.outline(10), "prompt: p\ncompletion: c");
        assert_eq!(Example::Text("t".repeat(11)).outline(10), format!("text: {}...", "t".repeat(10)));
    }

    fn talk(messages: Value) -> Result<Example, BadRow> {
        let Value::Array(messages) = messages else { panic!() };
        Ok(Example::Conversation { messages, tools: None, trained_from: 0 })
    }

    #[test]
    fn bad_conversations_are_named() {
        let lists = message_lists(
            ["role", "content"],
            &[
                &[("user", Some("q")), ("narrator", Some("a"))],
                &[("assistant", Some("a"))],
                &[("user", Some("q")), ("assistant", Some(" "))],
                &[("user", Some("q")), ("assistant", None)],
                &[("user", None), ("assistant", Some("a"))],
                &[],
                &[("system", Some("s"))],
                &[("user", Some("q")), ("user", Some("r")), ("assistant", Some("a"))],
            ],
        );
        let rows = rows(vec![("messages", lists)], "");
        assert!(said(&rows[0]).contains("turn 1: unknown role `narrator`"), "{}", said(&rows[0]));
        assert!(said(&rows[1]).contains("first turn is the assistant's"));
        assert!(said(&rows[2]).contains("turn 1, the assistant's, is empty"));
        assert!(said(&rows[3]).contains("turn 1, the assistant's, is empty"));
        assert!(said(&rows[4]).contains("turn 0: the `content` of the user is missing or null"), "{}", said(&rows[4]));
        assert_eq!(rows[5], Err(BadRow::Empty));
        assert!(said(&rows[6]).contains("no turn but the system message"));
        assert!(rows[7].is_ok());
    }

    #[test]
    fn the_recipes_system_message_fills_in() {
        let lists = message_lists(
            ["role", "content"],
            &[
                &[("user", Some("q")), ("assistant", Some("a"))],
                &[("system", Some("own")), ("user", Some("q")), ("assistant", Some("a"))],
            ],
        );
        let rows = rows(vec![("messages", lists)], "system: be brief");
        let turns = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]);
        let with = |text: &str| {
            let mut turns = turns.as_array().unwrap().clone();
            turns.insert(0, json!({"role": "system", "content": text}));
            talk(turns.into())
        };
        assert_eq!(rows, [with("be brief"), with("own")]);
    }

    #[test]
    fn json_text_is_read_with_tools_and_extra_fields() {
        let text = json!([
            {"from": "human", "value": "weather?"},
            {"from": "gpt", "value": null, "name": null, "tool_calls": [{"function": {"name": "w", "arguments": {"at": null}}}]},
            {"from": "observation", "value": "sun", "name": "w"},
            {"from": "gpt", "value": "Sunny.", "thinking": "hm"},
        ])
        .to_string();
        let tools = json!([{"type": "function", "function": {"name": "w"}}]).to_string();
        let rows =
            rows(vec![("messages", strings(&[&text, "no json", "{}"])), ("tools", strings(&[&tools, "", ""]))], "");
        let expected = json!([
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "w", "arguments": {"at": null}}}]},
            {"role": "tool", "content": "sun", "name": "w"},
            {"role": "assistant", "content": "Sunny.", "thinking": "hm"},
        ]);
        let Ok(Example::Conversation { messages, tools: Some(found), .. }) = &rows[0] else { panic!("{:?}", rows[0]) };
        assert_eq!(&Value::Array(messages.clone()), &expected);
        assert_eq!(found.to_string(), tools);
        assert!(said(&rows[1]).contains("column `messages`: the text is not JSON"));
        assert!(said(&rows[2]).contains("expected a list of messages"));
    }

    #[test]
    fn a_row_of_too_much_text_says_to_split_it() {
        let (half, long) = ("a".repeat(ROW_LIMIT / 2), "a".repeat(ROW_LIMIT + 1));
        let texts = rows(vec![("text", strings(&[&half, &long]))], "");
        assert!(texts[0].is_ok());
        let bytes = format!("{} bytes of text in one cell, more than the {ROW_LIMIT}", ROW_LIMIT + 1);
        assert!(said(&texts[1]).contains(&bytes) && said(&texts[1]).contains("split"), "{}", said(&texts[1]));
        // Each cell may pass, and the row not.
        let more = half.clone() + "a";
        let pairs = rows(vec![("prompt", strings(&[&half, &half])), ("completion", strings(&[&half, &more]))], "");
        assert!(pairs[0].is_ok() && said(&pairs[1]).contains("in one row"), "{}", said(&pairs[1]));
    }

    #[test]
    fn deep_json_is_a_bad_row() {
        let deep = "[".repeat(200_000);
        let rows = rows(vec![("messages", strings(&[&deep]))], "");
        assert!(said(&rows[0]).contains("recursion limit"), "{}", said(&rows[0]));
    }

    #[test]
    fn message_pairs_are_trained_from_the_completion() {
        let prompts = message_lists(
            ["role", "content"],
            &[&[("user", Some("1")), ("assistant", Some("2")), ("user", Some("3"))], &[]],
        );
        let completions =
            message_lists(["role", "content"], &[&[("assistant", Some("4"))], &[("assistant", Some("4"))]]);
        let rows = rows(vec![("prompt", prompts), ("completion", completions)], "system: s");
        let Ok(Example::Conversation { messages, trained_from, .. }) = &rows[0] else { panic!("{:?}", rows[0]) };
        assert_eq!((messages.len(), *trained_from), (5, 4));
        assert_eq!(messages[*trained_from], json!({"role": "assistant", "content": "4"}));
        assert!(said(&rows[1]).contains("first turn"));
    }

    #[test]
    fn alpaca_rows_become_turns() {
        let columns = vec![
            ("instruction", optional_strings(&[Some("Add."), Some("Sing."), Some(""), None, Some("x")])),
            ("input", optional_strings(&[Some("1 2"), None, Some(""), Some(""), Some("")])),
            ("output", optional_strings(&[Some("3"), Some("la"), Some(""), Some("y"), Some("")])),
        ];
        let rows = rows(columns, "");
        let pair = |user: &str, answer: &str| {
            talk(json!([{"role": "user", "content": user}, {"role": "assistant", "content": answer}]))
        };
        assert_eq!(rows[0], pair("Add.\n\n1 2", "3"));
        assert_eq!(rows[1], pair("Sing.", "la"));
        assert_eq!(rows[2], Err(BadRow::Empty));
        assert_eq!(said(&rows[3]), "column `instruction` is null");
        assert!(said(&rows[4]).contains("is empty"));
    }

    #[test]
    fn null_and_empty_cells_are_bad_rows() {
        let pairs = rows(
            vec![
                ("prompt", optional_strings(&[Some("p"), None, Some("p"), Some(""), Some("")])),
                ("completion", optional_strings(&[None, Some("c"), Some(""), Some(""), Some("c")])),
            ],
            "",
        );
        assert_eq!(said(&pairs[0]), "column `completion` is null");
        assert_eq!(said(&pairs[1]), "column `prompt` is null");
        assert_eq!(said(&pairs[2]), "column `completion` is empty");
        assert_eq!(pairs[3], Err(BadRow::Empty));
        assert!(pairs[4].is_ok());
        let texts = rows(vec![("text", optional_strings(&[None, Some(""), Some("t")]))], "");
        assert_eq!(said(&texts[0]), "column `text` is null");
        assert_eq!(texts[1..], [Err(BadRow::Empty), Ok(Example::Text("t".into()))]);
    }

    #[test]
    fn bytes_that_are_not_text_are_a_bad_row() {
        let bytes: ArrayRef = std::sync::Arc::new(arrow::array::BinaryArray::from(vec![&b"ok"[..], &[0xff]]));
        let rows = rows(vec![("text", bytes)], "");
        assert_eq!(rows[0], Ok(Example::Text("ok".into())));
        assert!(said(&rows[1]).contains("column `text`: the text is not valid UTF-8"));
    }

    #[test]
    fn fields_of_messages_can_be_mapped() {
        let lists = message_lists(["speaker", "says"], &[&[("user", Some("q")), ("bot", Some("a"))]]);
        let rows = rows(vec![("dialog", lists)], "columns: {messages: dialog, role: speaker, content: says}");
        assert_eq!(rows, [talk(json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]))]);
    }
}
