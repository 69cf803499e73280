//! The tree against the JSON Schema of [`Recipe`](super::Recipe): every problem, each with its line and the way out.

use serde_json::Value as Json;

use super::foreign;
use super::tree::{Entry, Node, Place, Problem, Value, shorten};

/// So many problems are worked out with a way out; a file that has more is no recipe, and the search for what each key
/// may have meant would take long.
const MOST_HINTS: usize = 100;

/// Texts that may have several lines; any other is a name, where a line's end or an escape is a slip.
const MULTILINE: &[&str] = &["dataset.system"];

/// All that `tree` does that `schema` does not allow.
pub(super) fn check(tree: &Node, schema: &Json) -> Vec<Problem> {
    let mut checker = Checker { root: schema, keys: known_keys(schema), problems: Vec::new() };
    checker.value(tree, schema, "");
    checker.problems
}

/// The dotted paths of every key of `schema`, sections before what is in them.
pub(super) fn known_keys(schema: &Json) -> Vec<String> {
    let mut keys = Vec::new();
    for (key, property) in schema["properties"].as_object().into_iter().flatten() {
        keys.push(key.clone());
        keys.extend(known_keys(property).iter().map(|inner| format!("{key}.{inner}")));
    }
    keys
}

/// The key of `keys` most like `key`, where one is like enough to be what was meant.
pub(super) fn nearest<'a>(key: &str, keys: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |text: &str| text.to_lowercase().replace('-', "_");
    let typed = plain(key);
    // Above this length no key is near, and the comparison is quadratic.
    if typed.len() > 64 {
        return None;
    }
    let keys: Vec<(&str, String)> = keys.map(|known| (known, plain(known))).collect();
    let near = keys
        .iter()
        .map(|(known, plain)| (strsim::damerau_levenshtein(&typed, plain), *known))
        .filter(|(distance, known)| *distance <= (known.len().min(typed.len()) / 3).max(1) && *distance < known.len())
        .min_by_key(|(distance, _)| *distance);
    // `warmup` for `warmup_steps`: the beginning of a name.
    let begun =
        || keys.iter().find(|(_, plain)| typed.len() >= 4 && plain.starts_with(&typed)).map(|(known, _)| *known);
    near.map(|(_, known)| known).or_else(begun)
}

struct Checker<'a> {
    root: &'a Json,
    keys: Vec<String>,
    problems: Vec<Problem>,
}

impl Checker<'_> {
    fn problem(&mut self, place: &Place, what: String, hint: impl Into<String>) {
        self.problems.push(Problem::new(place, what, hint));
    }

    /// The other way out of a value that is missing, where the key at `path` may be left out.
    fn or_leave_out(&self, path: &str) -> &'static str {
        let (above, key) = path.rsplit_once('.').unwrap_or(("", path));
        let section = match above {
            "" => Some(self.root),
            above => self.root.pointer(&format!("/properties/{}", above.replace('.', "/properties/"))),
        };
        let required = section.and_then(|section| section["required"].as_array());
        let required = required.is_some_and(|keys| keys.iter().any(|name| name == key));
        if required || section.is_none() { "" } else { " or leave the key out" }
    }

    fn value(&mut self, node: &Node, schema: &Json, path: &str) {
        let alternatives = alternatives(schema);
        let numeric = matches!(node.value, Value::Integer(_) | Value::Float(_));
        if let Some(decimal) = ambiguous(&node.raw).filter(|_| numeric) {
            let what = format!("`{path}` is {}, which YAML 1.1 reads as octal and YAML 1.2 as decimal", node.raw);
            let text = alternatives.iter().any(|schema| types(schema).contains(&"string"));
            let hint = if text { format!("write \"{}\" or {decimal}", node.raw) } else { format!("write {decimal}") };
            return self.problem(&node.place, what, hint);
        }
        let Some(schema) = alternatives.iter().find(|schema| accepts(schema, node)) else {
            return self.wrong_type(node, &alternatives, path);
        };
        match &node.value {
            Value::Map(entries) => self.mapping(node, entries, schema, path),
            Value::List(nodes) => {
                self.list(node, nodes, schema, path);
                for (index, node) in nodes.iter().enumerate() {
                    self.value(node, &schema["items"], &format!("{path}[{index}]"));
                }
            }
            Value::Integer(number) => self.number(node, *number as f64, Some(*number), schema, path),
            Value::Float(number) => self.number(node, *number, None, schema, path),
            Value::Text(text) => self.choice(node, text, schema, path),
            Value::Null | Value::Bool(_) => {}
        }
    }

    fn mapping(&mut self, node: &Node, entries: &[Entry], schema: &Json, path: &str) {
        // Escaped, because a key may hold what would steer a terminal; keys of the schema stay as they are.
        let join = |key: &str| match path {
            "" => shorten(key).escape_debug().to_string(),
            path => format!("{path}.{}", shorten(key).escape_debug()),
        };
        let mut meant = Vec::new();
        for entry in entries {
            let inner = join(&entry.key);
            if let Some(property) = schema["properties"].get(&entry.key) {
                self.value(&entry.node, property, &inner);
            } else if schema["additionalProperties"].is_object() {
                self.value(&entry.node, &schema["additionalProperties"], &inner);
            } else {
                let hint = match self.problems.len() {
                    ..MOST_HINTS => {
                        let (hint, key) = self.way_out(&entry.key, schema, path);
                        meant.extend(key);
                        hint
                    }
                    _ => String::new(),
                };
                let what = format!("unknown key `{inner}`");
                self.problem(&entry.place, what, hint);
            }
        }
        for key in schema["required"].as_array().into_iter().flatten().filter_map(Json::as_str) {
            let key_path = join(key);
            // A misspelt key is one problem, not two.
            let misspelt = meant.iter().any(|meant| *meant == key_path || meant.starts_with(&format!("{key_path}.")));
            if node.entry(key).is_none() && !misspelt {
                let description = schema["properties"][key]["description"].as_str().unwrap_or_default();
                let hint = format!("add it: {}", description.replace('\n', " "));
                self.problem(&node.place, format!("the key `{key_path}` is missing"), hint);
            }
        }
    }

    /// What to write instead of an unknown key of the mapping `path`, and the key that is.
    fn way_out(&self, key: &str, schema: &Json, path: &str) -> (String, Option<String>) {
        if let Some(foreign) = foreign::KEYS.iter().find(|foreign| foreign.key.eq_ignore_ascii_case(key)) {
            return match foreign.here {
                "" => (foreign.note.into(), None),
                here => (format!("write `{here}`{}", foreign.note), Some(here.into())),
            };
        }
        let name = |path: &str| path.rsplit('.').next().unwrap_or_default().to_string();
        if let Some(moved) = self.keys.iter().find(|known| name(known) == key) {
            return (format!("it belongs elsewhere: write `{moved}`"), Some(moved.clone()));
        }
        let siblings: Vec<&str> =
            schema["properties"].as_object().into_iter().flatten().map(|(k, _)| k.as_str()).collect();
        if let Some(near) = nearest(key, siblings.iter().copied()) {
            let near = if path.is_empty() { near.to_string() } else { format!("{path}.{near}") };
            return (format!("did you mean `{near}`?"), Some(near));
        }
        let names: Vec<String> = self.keys.iter().map(|known| name(known)).collect();
        if let Some(near) = nearest(key, names.iter().map(String::as_str)) {
            // `near` is one of `names`, which has an entry for each of `keys`.
            let known = names.iter().position(|name| name == near).map(|index| self.keys[index].clone());
            return (format!("did you mean `{}`?", known.as_deref().unwrap_or(near)), known);
        }
        (format!("the keys here are {}", siblings.join(", ")), None)
    }

    fn wrong_type(&mut self, node: &Node, alternatives: &[&Json], path: &str) {
        let mut expected: Vec<String> = alternatives.iter().filter_map(|schema| expectation(schema)).collect();
        expected.dedup();
        let name = if path.is_empty() { "the recipe".to_string() } else { format!("`{path}`") };
        let what = format!("{name} is {}, expected {}", node.found(), expected.join(" or "));
        let hint = type_hint(node, alternatives, path, self.or_leave_out(path));
        self.problem(&node.place, what, hint);
    }

    fn list(&mut self, node: &Node, nodes: &[Node], schema: &Json, path: &str) {
        if nodes.is_empty() && schema["minItems"].as_u64().is_some_and(|least| least > 0) {
            let hint = format!("name something in it{}", self.or_leave_out(path));
            self.problem(&node.place, format!("`{path}` is an empty list"), hint);
        }
        if schema["uniqueItems"] == true {
            let values: Vec<Json> = nodes.iter().map(Node::json).collect();
            // Of a list this long, the first repetitions say enough; to compare all with all would take long.
            let again = |index: &usize| values[..*index].contains(&values[*index]);
            for (index, node) in nodes.iter().enumerate().take(MOST_HINTS).filter(|(index, _)| again(index)) {
                let what = format!("`{path}[{index}]` is {} again", node.found());
                self.problem(&node.place, what, "name each only once");
            }
        }
    }

    fn choice(&mut self, node: &Node, text: &str, schema: &Json, path: &str) {
        if text.trim().is_empty() && schema["minLength"].as_u64().is_some_and(|least| least > 0) {
            let hint = format!("give it a value{}", self.or_leave_out(path));
            self.problem(&node.place, format!("`{path}` is an empty text"), hint);
        }
        if text.contains(char::is_control) && !MULTILINE.contains(&path) {
            let what = format!("`{path}` is {}, which holds a control character", node.found());
            self.problem(&node.place, what, "write it on one line, without `|`, `>` or escapes");
        }
        let choices = choices(schema);
        if choices.is_empty() || choices.contains(&text) {
            return;
        }
        let what = format!("`{path}` is {}, expected {}", node.found(), one_of(&choices));
        let hint = match foreign_value(path, text).or_else(|| nearest(text, choices.iter().copied())) {
            Some(ours) => format!("write `{ours}`"),
            None => String::new(),
        };
        self.problem(&node.place, what, hint);
    }

    fn number(&mut self, node: &Node, number: f64, integer: Option<i128>, schema: &Json, path: &str) {
        let bound = |key: &str| schema[key].as_f64();
        let largest = match schema["format"].as_str() {
            Some("uint32") => Some(i128::from(u32::MAX)),
            Some("uint64") => Some(i128::from(u64::MAX)),
            _ => None,
        };
        let outside = !number.is_finite()
            || bound("minimum").is_some_and(|least| number < least)
            || bound("exclusiveMinimum").is_some_and(|least| number <= least)
            || bound("maximum").is_some_and(|most| number > most)
            || bound("exclusiveMaximum").is_some_and(|most| number >= most)
            || integer.zip(largest).is_some_and(|(integer, largest)| integer > largest);
        if outside {
            let kind = match types(schema).contains(&"integer") {
                true => "a whole number",
                false if number.is_finite() => "a number",
                false => "a finite number",
            };
            let most = integer.zip(largest).filter(|(integer, largest)| integer > largest);
            let bounds = bounds(schema, most.map(|(_, largest)| largest.to_string()));
            let comma = if bounds.is_empty() { "" } else { ", " };
            let what = format!("`{path}` is {}, expected {kind}{comma}{bounds}", node.raw);
            let optional = schema["type"].as_array().is_some_and(|types| types.iter().any(|t| t == "null"));
            let hint = if optional && number <= 0.0 { "leave the key out to turn it off" } else { "" };
            self.problem(&node.place, what, hint);
        }
    }
}

/// The schemas a value may follow: those of nested `anyOf`s, or the schema itself.
pub(super) fn alternatives(schema: &Json) -> Vec<&Json> {
    match schema["anyOf"].as_array() {
        Some(inner) => inner.iter().flat_map(alternatives).collect(),
        None => vec![schema],
    }
}

pub(super) fn types(schema: &Json) -> Vec<&str> {
    match &schema["type"] {
        Json::String(name) => vec![name],
        Json::Array(names) => names.iter().filter_map(Json::as_str).collect(),
        _ if !choices(schema).is_empty() => vec!["string"],
        _ => Vec::new(),
    }
}

pub(super) fn choices(schema: &Json) -> Vec<&str> {
    schema["oneOf"].as_array().into_iter().flatten().filter_map(|choice| choice["const"].as_str()).collect()
}

fn accepts(schema: &Json, node: &Node) -> bool {
    types(schema).iter().any(|name| match &node.value {
        Value::Null => *name == "null",
        Value::Bool(_) => *name == "boolean",
        Value::Integer(_) => matches!(*name, "integer" | "number"),
        Value::Float(_) => *name == "number",
        Value::Text(_) => *name == "string",
        Value::List(_) => *name == "array",
        Value::Map(_) => *name == "object",
    })
}

fn expectation(schema: &Json) -> Option<String> {
    let choices = choices(schema);
    if !choices.is_empty() {
        return Some(one_of(&choices));
    }
    let names: Vec<&str> = types(schema).into_iter().filter_map(in_words).collect();
    (!names.is_empty()).then(|| names.join(" or "))
}

fn in_words(name: &str) -> Option<&'static str> {
    match name {
        "boolean" => Some("true or false"),
        "integer" => Some("a whole number"),
        "number" => Some("a number"),
        "string" => Some("a text"),
        "array" => Some("a list"),
        "object" => Some("a mapping of keys"),
        _ => None,
    }
}

fn one_of(choices: &[&str]) -> String {
    let quoted: Vec<String> = choices.iter().map(|choice| format!("`{choice}`")).collect();
    match quoted.as_slice() {
        [only] => only.clone(),
        _ => format!("one of {}", quoted.join(", ")),
    }
}

/// What the value of another tool at `path` is called here.
pub(super) fn foreign_value(path: &str, value: &str) -> Option<&'static str> {
    let found = foreign::VALUES.iter().find(|(key, theirs, _)| *key == path && theirs.eq_ignore_ascii_case(value));
    found.map(|(_, _, ours)| *ours)
}

fn type_hint(node: &Node, alternatives: &[&Json], path: &str, or_leave_out: &str) -> String {
    let expects = |name: &str| alternatives.iter().any(|schema| types(schema).contains(&name));
    let number = |text: &str| text.parse::<f64>().ok().filter(|number| number.is_finite());
    if let Some(ours) = foreign_value(path, node.text().unwrap_or(&node.raw)) {
        return format!("write `{ours}`");
    }
    match &node.value {
        Value::Text(text) if expects("boolean") => match text.to_lowercase().as_str() {
            "yes" | "on" | "y" | "true" => format!("YAML reads {} as a text: write `true`", node.raw),
            "no" | "off" | "n" | "false" => format!("YAML reads {} as a text: write `false`", node.raw),
            _ => String::new(),
        },
        Value::Text(text) if expects("integer") || expects("number") => {
            let quoted = node.raw.starts_with(['"', '\'']);
            match (number(text), number(&text.replace([',', '_', ' '], ""))) {
                (Some(_), _) if quoted => format!("remove the quotes: write {text}"),
                (None, Some(_)) => format!("write {}", text.replace([',', '_', ' '], "")),
                _ => String::new(),
            }
        }
        Value::Float(value) if expects("integer") && value.fract() == 0.0 && value.abs() < 1e15 => {
            format!("write {value:.0}")
        }
        Value::Integer(_) | Value::Float(_) | Value::Bool(_)
            if expects("string") && alternatives.iter().all(|s| choices(s).is_empty()) =>
        {
            format!("put it in quotes: \"{}\"", node.raw)
        }
        Value::Text(_) | Value::Integer(_) if expects("array") && !node.raw.is_empty() => {
            format!("write a list: [{}]", node.raw)
        }
        Value::List(_) | Value::Map(_) | Value::Bool(_) => String::new(),
        _ if expects("object") => {
            let keys: Vec<&str> = alternatives
                .iter()
                .flat_map(|schema| schema["properties"].as_object().into_iter().flatten())
                .map(|(key, _)| key.as_str())
                .take(3)
                .collect();
            format!("write its keys below it, indented ({}, ...){or_leave_out}", keys.join(", "))
        }
        Value::Null => format!("give it a value{or_leave_out}"),
        _ => String::new(),
    }
}

/// The decimal reading of a number with a leading zero (`010`, `-007`), which YAML 1.1 reads as octal.
fn ambiguous(raw: &str) -> Option<String> {
    let (sign, digits) = match raw.strip_prefix('-') {
        Some(digits) => ("-", digits),
        None => ("", raw.strip_prefix('+').unwrap_or(raw)),
    };
    let zero_led = digits.len() > 1 && digits.starts_with('0') && digits.bytes().all(|byte| byte.is_ascii_digit());
    zero_led.then(|| format!("{sign}{}", digits.trim_start_matches('0').parse::<u128>().unwrap_or(0)))
}

/// The bounds of `schema` in words, empty where it has none; `most` is its integer type's largest number.
pub(super) fn bounds(schema: &Json, most: Option<String>) -> String {
    let bound = |key: &str| schema[key].as_f64().map(|bound| bound.to_string());
    let least = match (bound("minimum"), bound("exclusiveMinimum")) {
        (Some(least), _) => Some(format!("at least {least}")),
        (None, Some(least)) => Some(format!("above {least}")),
        (None, None) => None,
    };
    let most = match (bound("maximum").or(most), bound("exclusiveMaximum")) {
        (Some(most), _) => Some(format!("at most {most}")),
        (None, Some(most)) => Some(format!("below {most}")),
        (None, None) => None,
    };
    least.into_iter().chain(most).collect::<Vec<_>>().join(" and ")
}
