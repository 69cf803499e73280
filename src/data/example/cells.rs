//! The cells of a row: texts, tools, messages.

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StructArray};
use arrow::datatypes::DataType;
use serde_json::{Map, Value};

use super::json::{json, string};
use crate::data::BadRow;
use crate::data::layout::{Column, MessageKeys};

/// The cells of one row.
pub(super) struct Cells<'a> {
    pub(super) batch: &'a RecordBatch,
    pub(super) row: usize,
}

impl Cells<'_> {
    /// The column's array, or None where the cell is null.
    fn cell(&self, column: &Column) -> Result<Option<&ArrayRef>, BadRow> {
        // The projection keeps file order and names; layouts only name projected columns.
        let array = self.batch.column_by_name(&column.name);
        let array = array.ok_or_else(|| BadRow::Malformed(format!("column `{}` was not read", column.name)))?;
        Ok(Some(array).filter(|array| !array.is_null(self.row)))
    }

    pub(super) fn text(&self, column: &Column) -> Result<String, BadRow> {
        let array = self.cell(column)?.ok_or_else(|| null(column))?;
        string(array, self.row).map_err(|what| BadRow::Malformed(format!("column `{}`: {what}", column.name)))
    }

    /// None where there is no such column, the cell is null or the text is blank.
    pub(super) fn optional_text(&self, column: Option<&Column>) -> Result<Option<String>, BadRow> {
        let Some(column) = column else { return Ok(None) };
        if self.cell(column)?.is_none() {
            return Ok(None);
        }
        Ok(Some(self.text(column)?).filter(|text| !text.trim().is_empty()))
    }

    pub(super) fn tools(&self, column: Option<&Column>) -> Result<Option<Value>, BadRow> {
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

    pub(super) fn messages(&self, column: &Column, keys: &MessageKeys) -> Result<Vec<Map<String, Value>>, BadRow> {
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
