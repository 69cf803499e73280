//! Chat templates: a model's own jinja, rendered byte for byte as transformers' `apply_chat_template` renders it.
//!
//! A template is untrusted: its size, nesting, steps and the text it makes are bounded, and it can reach nothing but
//! the row it is given.

mod builtin;
mod generation;
mod python;
mod source;

use std::panic::{AssertUnwindSafe, catch_unwind};

use jiff::civil::DateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, ErrorKind};
use regex::Regex;
use serde_json::Value as Json;
use serde_json::{Map, json};

pub(super) use builtin::BEGINS_WITH_BOS;
pub use builtin::{BUILTIN, Builtin};
pub use generation::Rendered;

use crate::{Error, Fault, Result};

/// Steps of minijinja one render may take; a long conversation takes some ten thousand.
const FUEL: u64 = 4_000_000;
/// Bytes of text one render may make, intermediate results included: so many, and so many more per byte of the row.
const FREE_TEXT: usize = 32 << 20;
const TEXT_PER_BYTE: usize = 256;
/// How deep macros and loops may nest while rendering.
const DEEPEST_CALL: usize = 400;

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

fn environment(now: DateTime) -> Environment<'static> {
    let mut environment = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    environment.set_syntax(syntax.build().expect("the standard delimiters are valid"));
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_recursion_limit(DEEPEST_CALL);
    environment.set_fuel(Some(FUEL));
    environment.set_debug(false);
    python::install(&mut environment);
    environment.add_function("strftime_now", move |format: &str| {
        // What depends on the locale is written as in C's, and the time zone, which Python's has none of, as nothing.
        let known = [
            ("%c", "%a %b %e %H:%M:%S %Y"),
            ("%x", "%m/%d/%y"),
            ("%X", "%H:%M:%S"),
            ("%f", "000000"),
            ("%Z", ""),
            ("%z", ""),
        ];
        let parts = format
            .split("%%")
            .map(|part| known.iter().fold(part.to_string(), |part, (from, to)| part.replace(from, to)));
        jiff::fmt::strtime::format(parts.collect::<Vec<_>>().join("%%"), now)
            .map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}")))
    });
    environment
}

/// A row's value for the template, its text guarded.
fn value_of(value: &Json, apart: Option<&Regex>) -> Value {
    match value {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => Value::from(whole),
            (_, Some(whole)) => Value::from(whole),
            _ => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(generation::guard(text, apart).into_owned()),
        Json::Array(items) => items.iter().map(|item| value_of(item, apart)).collect(),
        Json::Object(fields) => {
            Value::from_pairs(fields.iter().map(|(name, value)| (name.as_str(), value_of(value, apart))))
        }
    }
}

fn size_of_text(value: &Json) -> usize {
    match value {
        Json::String(text) => text.len(),
        Json::Array(items) => items.iter().map(size_of_text).sum(),
        Json::Object(fields) => fields.values().map(size_of_text).sum(),
        _ => 0,
    }
}

/// The text of content parts, for a template that takes text only.
fn joined(parts: &[Json]) -> std::result::Result<String, String> {
    parts
        .iter()
        .map(|part| match (part.as_str(), part["text"].as_str(), part["type"].as_str()) {
            (Some(text), _, _) | (_, Some(text), None | Some("text")) => Ok(text),
            (_, _, kind) => {
                Err(format!("a content part of type `{}`: only text can be trained on", kind.unwrap_or("none")))
            }
        })
        .collect()
}

/// The template's complaint, with the ways of jinja that lead to it.
fn explain(error: &minijinja::Error) -> String {
    match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => format!("the template takes more than {FUEL} steps"),
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_string(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::{Path, PathBuf};

    fn fixtures() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/templates")
    }

    fn read(name: &str) -> Json {
        serde_json::from_slice(&std::fs::read(fixtures().join(name)).unwrap()).unwrap()
    }

    fn special_tokens() -> Vec<(String, String)> {
        let tokens = read("conversations.json");
        tokens["special_tokens"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(name, text)| (name.clone(), text.as_str().unwrap().into()))
            .collect()
    }

    fn now() -> DateTime {
        read("conversations.json")["now"].as_str().unwrap().parse().unwrap()
    }

    fn compile(source: &str) -> Result<ChatTemplate> {
        ChatTemplate::new(source, "test", special_tokens(), now())
    }

    fn render(source: &str, messages: &[Json]) -> std::result::Result<String, String> {
        let template = compile(source).map_err(|error| error.to_string())?;
        let conversation = Conversation { messages, ..Default::default() };
        template.render(&conversation, KeptApart::default()).map(|rendered| rendered.text)
    }

    /// What ours gives instead of the reference's, if it does.
    fn difference(
        template: &Result<ChatTemplate>,
        case: &Json,
        messages: &[Json],
        variables: &Map<String, Json>,
    ) -> Option<String> {
        let ours = match template {
            Err(error) => Err(error.to_string()),
            Ok(template) => {
                let conversation = Conversation {
                    messages,
                    tools: case.get("tools"),
                    documents: case.get("documents"),
                    add_generation_prompt: case["add_generation_prompt"] == true,
                    variables: Some(variables),
                };
                template.render(&conversation, KeptApart::default())
            }
        };
        match (ours, case["text"].as_str()) {
            (Err(_), None) => None,
            (Ok(rendered), Some(text)) => {
                let spans = case["generation"].as_array().into_iter().flatten();
                let spans: Vec<_> =
                    spans.map(|span| span[0].as_u64().unwrap() as usize..span[1].as_u64().unwrap() as usize).collect();
                if rendered.text == text && rendered.generation == spans {
                    return None;
                }
                Some(format!("ours   {:?} {:?}\n  theirs {text:?} {spans:?}", rendered.text, rendered.generation))
            }
            (Ok(rendered), None) => Some(format!("ours   {:?}\n  theirs {}", rendered.text, case["error"])),
            (Err(error), Some(text)) => Some(format!("ours   {error}\n  theirs {text:?}")),
        }
    }

    #[test]
    fn conversations_render_as_transformers_renders_them() {
        let conversations = &read("conversations.json")["conversations"];
        let (mut compared, mut differences) = (0, Vec::new());
        for entry in std::fs::read_dir(fixtures()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let file = read(&name);
            let Some(source) = file["template"].as_str() else { continue };
            let template = compile(source);
            let shape = template.as_ref().unwrap().content;
            for case in file["cases"].as_array().unwrap() {
                let title = case["title"].as_str().unwrap();
                // Contents the template does not take are made to fit here, and print as nothing or as Python lists there.
                if (shape == ContentShape::Text && title == "parts")
                    || (shape == ContentShape::Parts && title != "parts")
                {
                    continue;
                }
                let messages = conversations[title].as_array().unwrap();
                let variables = case["variables"].as_object().cloned().unwrap_or_default();
                compared += 1;
                if let Some(difference) = difference(&template, case, messages, &variables) {
                    differences.push(format!("{name} {title} {}\n  {difference}", Json::Object(variables)));
                }
            }
        }
        assert!(differences.is_empty(), "{} of {compared} differ:\n{}", differences.len(), differences.join("\n"));
        assert!(compared > 300, "only {compared} compared");
    }

    #[test]
    fn jinja_means_what_it_means_to_jinja2() {
        let file = read("expressions.json");
        let mut context = file["context"].as_object().unwrap().clone();
        let messages = context.remove("messages").unwrap();
        let mut differences = Vec::new();
        let cases = file["cases"].as_array().unwrap();
        // Python refuses this; printing `False` does no harm.
        let lenient = ["{{ 1 in 'abc' }}"];
        for case in cases {
            if lenient.contains(&case["template"].as_str().unwrap()) {
                continue;
            }
            let template = compile(case["template"].as_str().unwrap());
            if let Some(difference) = difference(&template, case, messages.as_array().unwrap(), &context) {
                differences.push(format!("{}\n  {difference}", case["template"]));
            }
        }
        assert!(differences.is_empty(), "{} of {} differ:\n{}", differences.len(), cases.len(), differences.join("\n"));
    }

    /// On a thread with the small stack of a worker.
    fn on_small_stack<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> T {
        std::thread::Builder::new().stack_size(2 << 20).spawn(run).unwrap().join().expect("no overflow, no panic")
    }

    #[test]
    fn hostile_templates_end_in_an_error() {
        let deep =
            |open: &str, close: &str, count: usize| format!("{{{{ {}1{} }}}}", open.repeat(count), close.repeat(count));
        let hostile = [
            deep("-", "", 60_000),
            deep("not ", "", 15_000),
            deep("(", ")", 30_000),
            deep("[", "]", 30_000),
            deep("{'a':", "}", 10_000),
            deep("a(", ")", 20_000),
            deep("a[", "]", 20_000),
            deep("1 if 1 else ", "", 5_000),
            deep("1+", "", 30_000),
            deep("1~", "", 30_000),
            deep("1*", "", 30_000),
            deep("1-", "", 30_000),
            deep("1**", "", 20_000),
            deep("1<", "", 30_000),
            deep("1 and ", "", 9_000),
            deep("1|", "abs", 1),
            format!("{{{{ 1{} }}}}", "|abs".repeat(15_000)),
            format!("{{{{ a{} }}}}", ".a".repeat(30_000)),
            "{% if 1 %}".repeat(6_000),
            "{% for a in [1] %}".repeat(3_500),
            format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(5_000)),
            "x".repeat(65 * 1024),
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".into(),
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}".into(),
            "{% set ns = namespace(s='x' * 1000) %}{% for a in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}".into(),
            "{% set ns = namespace(s='x' * 1000) %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}".into(),
            "{% set ns = namespace(s='x' * 1000) %}{% for a in range(60) %}{% set ns.s = ns.s.replace('x', 'xx') %}{% endfor %}".into(),
            "{% set ns = namespace(s='x' * 1000) %}{% for a in range(60) %}{% set ns.s = [ns.s, ns.s]|join %}{% endfor %}".into(),
            "{% set ns = namespace(s='x' * 1000) %}{% for a in range(60) %}{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}".into(),
            "{% set ns = namespace(s='x' * 1000) %}{% for a in range(60) %}{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}{% endfor %}".into(),
            "{% set ns = namespace(l=[1] * 1000) %}{% for a in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}".into(),
            "{% set ns = namespace(l=[]) %}{% for a in range(90000) %}{% set ns.l = [ns.l] %}{% endfor %}".into(),
            "{% set ns = namespace(l={}) %}{% for a in range(90000) %}{% set ns.l = {'a': ns.l} %}{% endfor %}".into(),
            "{% set ns = namespace() %}{% set ns.self = ns %}{{ ns }}".into(),
            "{% set ns = namespace() %}{% set ns.self = ns %}{{ ns|tojson }}".into(),
            format!("{{% for a in range(99999) %}}{}{{% endfor %}}", "raw text ".repeat(6_000)),
            format!("{{% set x %}}{{% for a in range(99999) %}}{}{{% endfor %}}{{% endset %}}", "raw text ".repeat(6_000)),
            "{{ 'x' * 99999999999 }}".into(),
            "{{ 'x'.ljust(99999999999) }}".into(),
            "{{ '%999999999d' % 1 }}".into(),
            "{{ '{:999999999}'.format(1) }}".into(),
            "{{ range(999999999999)|list }}".into(),
            "{{ 'open".into(),
            "{% raw %} never closed".into(),
            "{# never closed".into(),
            "{% generation %} never closed".into(),
            "{% include 'other' %}".into(),
            "{{ '\\x4' }}".into(),
            "{%".into(),
            "{{".into(),
            "{{}}".into(),
            "{% %}".into(),
            "{% set %}".into(),
            "{% for %}".into(),
            "{{ a[] }}".into(),
            "{{ a. }}".into(),
            "{{ 'a' 5 }}".into(),
            "{{ \u{0} }}".into(),
        ];
        for source in hostile {
            let shown: String = source.chars().take(60).collect();
            let outcome = on_small_stack(move || render(&source, &[json!({"role": "user", "content": "x"})]));
            assert!(outcome.is_err(), "{shown} gave {} bytes", outcome.unwrap().len());
        }
    }

    #[test]
    fn the_deepest_template_allowed_fits_a_small_stack() {
        let allowed = [
            format!("{{{{ {}1{} }}}}", "(".repeat(38), ")".repeat(38)),
            format!("{{{{ {}1{} }}}}", "[".repeat(38), "]".repeat(38)),
            format!("{{{{ {}1 }}}}", "- ".repeat(38)),
            format!("{{{{ {}messages{} }}}}", "(".repeat(38), "|length)".to_string() + &")".repeat(37)),
            format!("{}x{}", "{% if 1 %}".repeat(60), "{% endif %}".repeat(60)),
            format!("{}x{}", "{% for a in [1] %}".repeat(60), "{% endfor %}".repeat(60)),
            format!("{{% if 0 %}}{}{{% else %}}x{{% endif %}}", "{% elif 0 %}".repeat(58)),
            format!("{{{{ {}1 }}}}", "1 + ".repeat(99)),
            format!("{{{{ {}1 }}}}", "1 and ".repeat(99)),
            format!("{{{{ 1{} }}}}", "|abs".repeat(99)),
            "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}x".into(),
        ];
        for source in allowed {
            let shown: String = source.chars().take(60).collect();
            let outcome = on_small_stack(move || render(&source, &[json!({"role": "user", "content": "x"})]));
            assert!(outcome.as_ref().is_ok_and(|text| !text.is_empty()), "{shown}: {outcome:?}");
        }
    }

    #[test]
    fn errors_name_the_line_of_the_template() {
        let template =
            compile("a\n{#\n\n#}{{ 'b\n' }}\n{% if true %}\n  {{ raise_exception('no ' ~\n 'tools') }}{% endif %}")
                .unwrap();
        let error = template.render(&Conversation::default(), KeptApart::default()).unwrap_err();
        assert!(error.starts_with("test, line 7") || error.starts_with("test, line 8"), "{error}");
        assert!(error.ends_with("no tools"), "{error}");
        let error = compile("one\ntwo {{ 1 +* 2 }}").err().unwrap().to_string();
        assert!(error.starts_with("test, line 2: "), "{error}");
        let error = compile("one\n\n{% unknown %}").err().unwrap().to_string();
        assert!(error.starts_with("test, line 3: "), "{error}");
    }

    #[test]
    fn content_is_given_in_the_shape_a_template_takes() {
        let parts =
            [json!({"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]})];
        let text = [json!({"role": "user", "content": "a b"})];
        for source in [
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            "{% for m in messages %}{{ m.content | trim }}{% endfor %}",
            "{% for m in messages %}{{ m.content + '' }}{% endfor %}",
            "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
            "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}",
        ] {
            assert_eq!(render(source, &parts).unwrap(), "a b", "{source}");
            assert_eq!(render(source, &text).unwrap(), "a b", "{source}");
        }
        let image = [json!({"role": "user", "content": [{"type": "image", "image": "x.png"}]})];
        assert!(render("{% for m in messages %}{{ m.content }}{% endfor %}", &image).unwrap_err().contains("image"));
    }
}
