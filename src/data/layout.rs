//! Which column means what: the format of a file, from its columns and the recipe.

use std::path::Path;

use arrow::datatypes::{DataType, Fields};

use crate::error::one_line;
use crate::recipe::{DataFormat, DatasetRecipe};
use crate::{Error, Fault, Result};

/// A column that is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Column {
    /// Its name in the file.
    pub name: String,
    /// Its index among the file's top-level columns.
    pub root: usize,
}

/// A file's format with its columns found and their types checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Layout {
    Messages { messages: Column, tools: Option<Column>, system: Option<Column>, keys: MessageKeys },
    Pair { prompt: Column, completion: Column, tools: Option<Column>, conversational: bool, keys: MessageKeys },
    Instruction { instruction: Column, input: Option<Column>, output: Column, system: Option<Column> },
    Text { text: Column },
}

/// What a message's fields are called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MessageKeys {
    pub role: String,
    pub content: String,
}

impl Layout {
    /// What its rows need to be encoded: pairs of message lists are conversations.
    pub fn format(&self) -> DataFormat {
        match self {
            Layout::Messages { .. } | Layout::Pair { conversational: true, .. } => DataFormat::Messages,
            Layout::Pair { .. } => DataFormat::PromptCompletion,
            Layout::Instruction { .. } => DataFormat::Instruction,
            Layout::Text { .. } => DataFormat::Text,
        }
    }

    /// The columns that are read, by their index in the file.
    pub fn roots(&self) -> Vec<usize> {
        let columns = match self {
            Layout::Messages { messages, tools, system, .. } => vec![Some(messages), tools.as_ref(), system.as_ref()],
            Layout::Pair { prompt, completion, tools, .. } => vec![Some(prompt), Some(completion), tools.as_ref()],
            Layout::Instruction { instruction, input, output, system } => {
                vec![Some(instruction), input.as_ref(), Some(output), system.as_ref()]
            }
            Layout::Text { text } => vec![Some(text)],
        };
        let mut roots: Vec<usize> = columns.into_iter().flatten().map(|column| column.root).collect();
        roots.sort_unstable();
        roots.dedup();
        roots
    }
}

/// The names a format's parts may be mapped by, required ones first, and how many of them are required.
fn parts(format: DataFormat) -> (&'static [&'static str], usize) {
    match format {
        DataFormat::Messages => (&["messages", "tools", "system", "role", "content"], 1),
        DataFormat::PromptCompletion => (&["prompt", "completion", "tools", "role", "content"], 2),
        DataFormat::Instruction => (&["instruction", "output", "input", "system"], 2),
        DataFormat::Text => (&["text"], 1),
    }
}

fn format_name(format: DataFormat) -> &'static str {
    match format {
        DataFormat::Messages => "messages",
        DataFormat::PromptCompletion => "prompt-completion",
        DataFormat::Instruction => "instruction",
        DataFormat::Text => "text",
    }
}

/// In the order tried.
const FORMATS: [DataFormat; 4] =
    [DataFormat::Messages, DataFormat::PromptCompletion, DataFormat::Instruction, DataFormat::Text];

/// Finds the format and columns of a file and says in a sentence what was decided and why.
///
/// # Errors
/// [`Error::Data`] listing the columns there are, where one is missing, mistyped or named by an unknown key.
pub(super) fn find(path: &Path, fields: &Fields, recipe: &DatasetRecipe) -> Result<(Layout, String)> {
    let look = Look { path, fields, recipe };
    let (format, why) = look.format()?;
    let (names, _) = parts(format);
    if let Some(unknown) = recipe.columns.keys().find(|key| !names.contains(&key.as_str())) {
        return Err(Error::Data(
            Fault::new("dataset.columns", format!("format `{}` has no part `{unknown}`", format_name(format)))
                .hint(format!("its parts are {}", quoted(names))),
        ));
    }
    let layout = look.layout(format)?;
    let roots = layout.roots();
    let (used, unused): (Vec<_>, Vec<_>) = fields.iter().enumerate().partition(|(root, _)| roots.contains(root));
    let used: Vec<String> = used
        .iter()
        .map(|(_, field)| format!("`{}` ({})", one_line(field.name()), type_name(field.data_type())))
        .collect();
    let mut sentence = format!("format `{}`, {why}: {}", format_name(format), used.join(", "));
    if !unused.is_empty() {
        let mut names: Vec<&str> = unused.iter().map(|(_, field)| field.name().as_str()).collect();
        let more = names.len().saturating_sub(8);
        names.truncate(8);
        sentence += &format!("; not used: {}", quoted(&names));
        if more > 0 {
            sentence += &format!(" and {more} more");
        }
    }
    Ok((layout, sentence))
}

struct Look<'a> {
    path: &'a Path,
    fields: &'a Fields,
    recipe: &'a DatasetRecipe,
}

impl Look<'_> {
    fn format(&self) -> Result<(DataFormat, &'static str)> {
        if let Some(format) = self.recipe.format {
            return Ok((format, "as the recipe says"));
        }
        let named = |format: &DataFormat| {
            let (names, required) = parts(*format);
            names[..required].iter().any(|name| self.recipe.columns.contains_key(*name))
        };
        if let Some(format) = FORMATS.into_iter().find(named) {
            return Ok((format, "from dataset.columns"));
        }
        let complete = |format: &DataFormat| {
            let (names, required) = parts(*format);
            names[..required].iter().all(|name| self.column(name).is_some())
        };
        if let Some(format) = FORMATS.into_iter().find(complete) {
            return Ok((format, "inferred from the columns"));
        }
        let pairs = [("question", "answer"), ("input", "output"), ("query", "response"), ("prompt", "response")];
        let pairs = pairs.into_iter().chain([("instruction", "response"), ("input", "target"), ("prompt", "chosen")]);
        let pair = pairs
            .into_iter()
            .find(|(prompt, completion)| [prompt, completion].iter().all(|name| self.root(name).is_some()));
        let hint = match pair {
            Some((prompt, completion)) => format!("write `columns: {{prompt: {prompt}, completion: {completion}}}` under `dataset`"),
            None => "say which column is which under `dataset`: `columns: {messages: NAME}`, `{prompt: NAME, completion: NAME}`, \
                     `{instruction: NAME, output: NAME}` or `{text: NAME}`"
                .to_string(),
        };
        Err(Error::Data(
            Fault::at(self.path, format!("no known format has these columns: {}", self.listing())).hint(hint),
        ))
    }

    fn layout(&self, format: DataFormat) -> Result<Layout> {
        let key = |ours: &str, from: &str, value: &str, present: bool| match self.recipe.columns.get(ours) {
            Some(name) => name.clone(),
            None => (if present { from } else { value }).to_string(),
        };
        Ok(match format {
            DataFormat::Messages => {
                let messages = self.required("messages", format)?;
                let kind = self.kind(&messages);
                let keys = MessageKeys {
                    role: key("role", "from", "role", sharegpt(kind)),
                    content: key("content", "value", "content", sharegpt(kind)),
                };
                self.check(
                    &messages,
                    is_string(kind) || is_message_list(kind, &keys),
                    "a list of {role, content} or a JSON string of one",
                )?;
                Layout::Messages { messages, tools: self.tools(), system: self.optional("system")?, keys }
            }
            DataFormat::PromptCompletion => {
                let (prompt, completion) = (self.required("prompt", format)?, self.required("completion", format)?);
                let (left, right) = (self.kind(&prompt), self.kind(&completion));
                let keys = MessageKeys {
                    role: key("role", "from", "role", sharegpt(left)),
                    content: key("content", "value", "content", sharegpt(left)),
                };
                let conversational = is_message_list(left, &keys);
                let expected = "a string or a list of {role, content}";
                self.check(&prompt, is_string(left) || conversational, expected)?;
                let same = if conversational { is_message_list(right, &keys) } else { is_string(right) };
                let expected = if conversational { "a list of {role, content}, as the prompt is" } else { "a string" };
                self.check(&completion, same, expected)?;
                let tools = if conversational { self.tools() } else { None };
                Layout::Pair { prompt, completion, tools, conversational, keys }
            }
            DataFormat::Instruction => Layout::Instruction {
                instruction: self.string("instruction", format)?,
                input: self.optional("input")?,
                output: self.string("output", format)?,
                system: self.optional("system")?,
            },
            DataFormat::Text => Layout::Text { text: self.string("text", format)? },
        })
    }

    fn root(&self, name: &str) -> Option<usize> {
        self.fields.iter().position(|field| field.name() == name)
    }

    fn kind(&self, column: &Column) -> &DataType {
        self.fields[column.root].data_type()
    }

    /// The column that plays `part`: the one mapped to it, else the one called so.
    fn column(&self, part: &str) -> Option<Column> {
        let aliases: &[&str] =
            if part == "messages" { &["messages", "conversations", "conversation"] } else { &[part] };
        let found = |name: &str| self.root(name).map(|root| Column { name: name.to_string(), root });
        match self.recipe.columns.get(part) {
            Some(name) => found(name),
            None => aliases.iter().find_map(|name| found(name)),
        }
    }

    fn required(&self, part: &str, format: DataFormat) -> Result<Column> {
        self.column(part).ok_or_else(|| {
            let name = self.recipe.columns.get(part).map_or(part, String::as_str);
            Error::Data(
                Fault::at(
                    self.path,
                    format!("no column `{name}` for format `{}`; there are: {}", format_name(format), self.listing()),
                )
                .hint(format!("name it under `dataset`: `columns: {{{part}: NAME}}`")),
            )
        })
    }

    fn string(&self, part: &str, format: DataFormat) -> Result<Column> {
        let column = self.required(part, format)?;
        self.check(&column, is_string(self.kind(&column)), "a string")?;
        Ok(column)
    }

    /// A column of strings that need not be there; it must be when it was mapped.
    fn optional(&self, part: &str) -> Result<Option<Column>> {
        let mapped = self.recipe.columns.get(part);
        match self.column(part) {
            // A column without a single value is written with the null type.
            Some(column) if matches!(self.kind(&column), DataType::Null) => Ok(None),
            // Of another type it is an error, mapped or not: it was meant to be read.
            Some(column) => self.check(&column, is_string(self.kind(&column)), "a string").map(|()| Some(column)),
            None if mapped.is_some() => {
                let name = mapped.map_or(part, String::as_str);
                Err(Error::Data(Fault::at(self.path, format!("no column `{name}`; there are: {}", self.listing()))))
            }
            _ => Ok(None),
        }
    }

    /// Tool definitions may be of any type but null: they go to the template as they are.
    fn tools(&self) -> Option<Column> {
        self.column("tools").filter(|column| !matches!(self.kind(column), DataType::Null))
    }

    fn check(&self, column: &Column, good: bool, expected: &str) -> Result<()> {
        if good {
            return Ok(());
        }
        let found = type_name(self.kind(column));
        Err(Error::Data(
            Fault::at(
                self.path,
                format!("column `{}` is {found}, expected {expected}; there are: {}", column.name, self.listing()),
            )
            .hint("map other columns with `dataset.columns`, or convert or rename this one when writing the file"),
        ))
    }

    fn listing(&self) -> String {
        let names: Vec<String> = self
            .fields
            .iter()
            .map(|field| format!("`{}` ({})", one_line(field.name()), type_name(field.data_type())))
            .collect();
        if names.is_empty() { "none".into() } else { names.join(", ") }
    }
}

fn is_string(kind: &DataType) -> bool {
    matches!(kind, DataType::Utf8View | DataType::BinaryView)
}

/// A list of message objects, a list of JSON strings, or the struct of lists that some writers make of one.
fn is_message_list(kind: &DataType, keys: &MessageKeys) -> bool {
    let has = |fields: &Fields| [&keys.role, &keys.content].iter().all(|key| fields.find(key).is_some());
    match kind {
        DataType::List(item) => match item.data_type() {
            DataType::Struct(fields) => has(fields),
            DataType::Map(..) => true,
            other => is_string(other),
        },
        DataType::Struct(fields) => {
            has(fields) && fields.iter().all(|field| matches!(field.data_type(), DataType::List(_)))
        }
        _ => false,
    }
}

fn sharegpt(kind: &DataType) -> bool {
    let item = if let DataType::List(item) = kind { item.data_type() } else { kind };
    matches!(item, DataType::Struct(fields) if fields.find("role").is_none() && fields.find("from").is_some())
}

/// A type as a person would say it.
pub(super) fn type_name(kind: &DataType) -> String {
    match kind {
        DataType::Utf8View => "string".into(),
        DataType::BinaryView => "bytes".into(),
        DataType::List(item) => format!("list of {}", type_name(item.data_type())),
        DataType::Struct(fields) => {
            let names: Vec<String> = fields.iter().map(|field| one_line(field.name())).collect();
            format!("{{{}}}", names.join(", "))
        }
        DataType::Map(..) => "map".into(),
        other => other.to_string().to_lowercase(),
    }
}

fn quoted(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{}`", one_line(name))).collect::<Vec<_>>().join(", ")
}
