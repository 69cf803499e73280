//! A YAML document as a tree whose every node knows where it was typed.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_yaml::{DefaultMessageFormatter, Error as YamlError, MessageFormatter, Spanned};

use crate::Fault;

/// Where something was typed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    /// Line and column in the recipe's file, from 1.
    File { line: u64, column: u64 },
    /// The `key=value` of a `--set`.
    Override(String),
}

impl Place {
    /// As a person would look for it; `file` is the recipe's name.
    pub fn show(&self, file: &str) -> String {
        match self {
            Place::File { line, column } => format!("{file}:{line}:{column}"),
            Place::Override(typed) => format!("--set {typed}"),
        }
    }
}

/// What is wrong at a place, and the way out.
#[derive(Debug)]
pub(super) struct Problem {
    pub place: Place,
    pub what: String,
    pub hint: String,
}

impl Problem {
    pub fn new(place: &Place, what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { place: place.clone(), what: what.into(), hint: hint.into() }
    }

    /// As a fault of the recipe called `file`.
    pub fn fault(self, file: &str) -> Fault {
        Fault::new(self.place.show(file), self.what).hint(self.hint)
    }
}

/// A value and its place.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub place: Place,
    pub value: Value,
    /// The first characters as typed, quotes included; empty for lists and mappings.
    pub raw: String,
    /// Where the value's text lies in the file (bytes); an alias' is its anchor's.
    span: (usize, usize),
}

/// What YAML 1.2 says the value is.
#[derive(Debug, Clone)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Integer(i128),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// A key of a mapping and what it holds.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub key: String,
    pub place: Place,
    pub node: Node,
}

impl Node {
    /// Parses one YAML document.
    pub fn parse(text: &str, file: &str) -> Result<Node, Fault> {
        let mut node: Node = serde_yaml::from_str_with_options(text, options())
            .map_err(|error| syntax_fault(error.without_snippet(), text, file))?;
        node.attach_raw(text);
        Ok(node)
    }

    /// A value without a file.
    pub fn typed(value: Value, raw: &str, place: Place) -> Node {
        Node { place, value, raw: shorten(raw), span: (0, 0) }
    }

    /// The value at a dotted path of keys.
    pub fn at(&self, path: &str) -> Option<&Node> {
        path.split('.').try_fold(self, |node, key| node.entry(key).map(|entry| &entry.node))
    }

    /// The entry of `key`, where this is a mapping that has it.
    pub fn entry(&self, key: &str) -> Option<&Entry> {
        self.entries().iter().find(|entry| entry.key == key)
    }

    /// The item at `index` of a list; anything else is its own only item.
    pub fn item(&self, index: usize) -> &Node {
        match &self.value {
            Value::List(nodes) => nodes.get(index).unwrap_or(self),
            _ => self,
        }
    }

    /// The entries, where this is a mapping.
    pub fn entries(&self) -> &[Entry] {
        match &self.value {
            Value::Map(entries) => entries,
            _ => &[],
        }
    }

    /// The text, where this is one.
    pub fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The place of the value at `path`, or of the nearest mapping around it.
    pub fn place_of(&self, path: &str) -> &Place {
        let mut node = self;
        for key in path.split('.') {
            match node.entry(key) {
                Some(entry) => node = &entry.node,
                None => break,
            }
        }
        &node.place
    }

    /// What was found here, for a message.
    pub fn found(&self) -> String {
        match &self.value {
            Value::Null if self.raw.is_empty() => "empty".into(),
            Value::Null => format!("empty (`{}`)", self.raw),
            Value::Bool(value) => format!("`{value}`"),
            Value::Integer(_) => format!("the number {}", self.raw),
            Value::Float(value) if !value.is_finite() => format!("the number {} (not finite)", self.raw),
            Value::Float(_) => format!("the number {}", self.raw),
            Value::Text(text) => format!("the text {:?}", shorten(text)),
            Value::List(_) => "a list".into(),
            Value::Map(_) => "a mapping".into(),
        }
    }

    /// As JSON. A number that JSON has no form for becomes null; the check against the schema has refused it before.
    pub fn json(&self) -> serde_json::Value {
        use serde_json::Value as Json;
        match &self.value {
            Value::Null => Json::Null,
            Value::Bool(value) => Json::from(*value),
            Value::Integer(value) => match (u64::try_from(*value), i64::try_from(*value)) {
                (Ok(value), _) => Json::from(value),
                (_, Ok(value)) => Json::from(value),
                _ => Json::Null,
            },
            Value::Float(value) => Json::from(*value),
            Value::Text(text) => Json::from(text.as_str()),
            Value::List(nodes) => nodes.iter().map(Node::json).collect(),
            Value::Map(entries) => entries.iter().map(|entry| (entry.key.clone(), entry.node.json())).collect(),
        }
    }

    /// Gives the whole tree another place: that of the `--set` it was typed in.
    pub fn move_to(&mut self, place: &Place) {
        self.place = place.clone();
        match &mut self.value {
            Value::List(nodes) => nodes.iter_mut().for_each(|node| node.move_to(place)),
            Value::Map(entries) => entries.iter_mut().for_each(|entry| {
                entry.place = place.clone();
                entry.node.move_to(place);
            }),
            _ => {}
        }
    }

    fn attach_raw(&mut self, text: &str) {
        match &mut self.value {
            Value::List(nodes) => nodes.iter_mut().for_each(|node| node.attach_raw(text)),
            Value::Map(entries) => entries.iter_mut().for_each(|entry| entry.node.attach_raw(text)),
            _ => self.raw = shorten(text.get(self.span.0..self.span.0 + self.span.1).unwrap_or_default()),
        }
    }
}

/// The first characters of `text`, for a message.
pub(super) fn shorten(text: &str) -> String {
    const LONGEST: usize = 60;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_string(),
    }
}

/// Bounds for untrusted text. A recipe needs a depth of 5; aliases may repeat a block, not grow the document.
fn options() -> serde_yaml::Options {
    serde_yaml::options! {
        budget: serde_yaml::budget! {
            max_depth: 16,
            flow_nesting_limit: 16,
            max_nodes: 50_000,
            max_events: 200_000,
            max_aliases: 64,
            max_anchors: 64,
            max_documents: 16,
        },
        alias_limits: serde_yaml::alias_limits! { max_total_replayed_events: 512, max_replay_stack_depth: 8 },
        strict_booleans: true,
        reject_unsupported_tags: true,
        non_finite_float_policy: serde_yaml::options::NonFiniteFloatPolicy::PassThrough,
        with_snippet: false,
    }
}

fn syntax_fault(error: &YamlError, text: &str, file: &str) -> Fault {
    let place = match error.location() {
        Some(location) => Place::File { line: location.line(), column: location.column() }.show(file),
        None => file.to_string(),
    };
    let line = error.location().and_then(|location| text.lines().nth(location.line().saturating_sub(1) as usize));
    let indented_by_tab = line.is_some_and(|line| line[..line.len() - line.trim_start().len()].contains('\t'));
    let message = DefaultMessageFormatter.format_message(error).into_owned();
    let (what, hint) = match error {
        YamlError::DuplicateMappingKey { key, .. } => (
            key.as_ref().map_or("the same key is given twice".into(), |key| {
                format!("the key `{}` is given twice", shorten(key).escape_debug())
            }),
            "keep one of them",
        ),
        YamlError::MultipleDocuments { .. } => {
            ("a second document starts here, a recipe is one document".into(), "remove the `---` or `...` line")
        }
        YamlError::UnsupportedTag { .. } => (message, "remove the tag: a recipe holds plain text, numbers and lists"),
        YamlError::RecursiveReferencesRequireWeakTypes { .. } => {
            ("this alias refers to the value it is in".into(), "write the value out")
        }
        YamlError::UnknownAnchor { .. } => {
            ("this alias has no anchor".into(), "a text that starts with `*` or `&` must be quoted")
        }
        YamlError::Budget { .. } => (format!("too large or too deep for a recipe ({message})"), "is this the recipe?"),
        _ if indented_by_tab => (message, "indent with spaces: YAML does not allow tabs there"),
        _ if message.contains("alias replay") => {
            ("the aliases repeat too much of the document".into(), "write the values out")
        }
        _ if message.contains("recursion limit") => ("nested too deeply for a recipe".into(), "is this the recipe?"),
        _ if message.contains("mapping values are not allowed") => {
            (message, "check the indentation; a text with `: ` in it must be quoted")
        }
        _ if message.contains("unexpected character") => {
            (message, "a text that starts with this character must be quoted")
        }
        _ if message.contains("string scalar") || message.contains("null into string") => {
            ("a key must be a text".into(), "quote it")
        }
        _ => (message, ""),
    };
    Fault::new(place, format!("not valid YAML: {what}")).hint(hint)
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        let (used, defined) = (spanned.referenced, spanned.defined.span());
        Ok(Node {
            place: Place::File { line: used.line(), column: used.column() },
            value: spanned.value,
            raw: String::new(),
            span: (defined.byte_offset().unwrap_or(0) as usize, defined.byte_len().unwrap_or(0) as usize),
        })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Integer(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Integer(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_string()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut nodes = Vec::new();
        while let Some(node) = access.next_element()? {
            nodes.push(node);
        }
        Ok(Value::List(nodes))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = access.next_key::<Spanned<String>>()? {
            let place = Place::File { line: key.referenced.line(), column: key.referenced.column() };
            entries.push(Entry { key: key.value, place, node: access.next_value()? });
        }
        Ok(Value::Map(entries))
    }
}
