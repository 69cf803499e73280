use std::path::Path;

use arrow::array::ArrayRef;
use serde_json::json;

use super::*;
use crate::data::SourceFiles;
use crate::data::fixtures::{message_lists, one, optional_strings, recipe, strings, write};

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
    let rows = rows(vec![("messages", strings(&[&text, "no json", "{}"])), ("tools", strings(&[&tools, "", ""]))], "");
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
    let completions = message_lists(["role", "content"], &[&[("assistant", Some("4"))], &[("assistant", Some("4"))]]);
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
