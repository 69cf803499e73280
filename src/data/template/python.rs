//! Python's ways in templates: how values print (`str`, `repr`, `json.dumps`), operators, string methods, filters and tests
//! as jinja2 and transformers have them, where minijinja differs.
//!
//! Everything that makes text is charged against a budget per render, so that a template cannot exhaust memory.

use std::borrow::Cow;
use std::fmt::Write;

use minijinja::value::{Kwargs, Rest, Tuple, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State};

use super::generation;

/// The variable that says how many bytes of text a render may make; no template can set a variable of this name.
pub(super) const BUDGET: &str = "text budget";
/// How deep lists and mappings may be nested (serde_json reads no deeper than 128).
const DEEPEST_VALUE: usize = 200;
/// Widths and precisions in format strings have at most this many digits.
const WIDEST_FORMAT: usize = 4;

/// Teaches minijinja Python's ways.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.set_formatter(|out, state, value| {
        // Most of what is printed is a string; anything else is printed as Python prints it.
        let text = text(value)?;
        charge(state, text.len())?;
        out.write_str(&text).map_err(Error::from)
    });
    environment.set_unknown_method_callback(method);
    environment.add_filter(generation::FILTER, |state: &mut State, body: &str| {
        charge(state, body.len())?;
        Ok::<_, Error>(generation::mark(body))
    });

    environment.add_filter("__add", add);
    environment.add_filter("__concat", concatenate);
    environment.add_filter("__multiply", multiply);
    environment.add_filter("__modulo", modulo);
    environment.add_filter("__slice", slice);
    environment.add_filter("__each", |value: Value| match value.kind() {
        ValueKind::None | ValueKind::Bool | ValueKind::Number => {
            Err(wrong(format!("cannot go through {}", describe(&value))))
        }
        _ => Ok(value),
    });
    environment.add_filter("__deep", |value: Value| if deep(&value, 0) { Err(too_deep()) } else { Ok(value) });

    environment.add_filter("tojson", tojson);
    environment.add_filter("string", |value: &Value| text(value).map(Cow::into_owned));
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter("trim", |value: &Value, characters: Option<&str>| {
        Ok::<_, Error>(strip(&text(value)?, characters, true, true).to_string())
    });
    environment.add_filter("join", join);
    environment.add_filter(
        "replace",
        |state: &mut State, value: &Value, from: &Value, to: &Value, count: Option<i64>| {
            replace(state, &text(value)?, &text(from)?, &text(to)?, count)
        },
    );
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("items", |value: &Value| match value.kind() {
        ValueKind::Undefined => Ok(Value::from(Vec::<Value>::new())),
        ValueKind::Map => pairs(value),
        kind => Err(wrong(format!("cannot take the items of a {kind}"))),
    });
    environment.add_filter("format", |state: &mut State, format: &str, arguments: Rest<Value>| {
        printf(state, format, &arguments)
    });
    environment.add_filter("indent", indent);
    environment.add_filter("first", |value: Value| end_of(value, false));
    environment.add_filter("last", |value: Value| end_of(value, true));
    environment.add_filter("int", int);
    environment.add_filter("float", |value: &Value, default: Option<Value>, options: Kwargs| {
        let default = default.or(options.get("default")?).unwrap_or_else(|| Value::from(0.0));
        Ok::<_, Error>(parse_float(value).map_or(default, Value::from))
    });
    environment.add_filter("e", escape);
    environment.add_filter("escape", escape);
    environment.add_filter("center", |state: &mut State, value: &Value, width: Option<usize>| {
        pad(state, &text(value)?, width.unwrap_or(80), ' ', Side::Both)
    });
    environment.add_filter("wordcount", |value: &Value| {
        Ok::<_, Error>(
            text(value)?.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty()).count(),
        )
    });
    // Filters of minijinja that jinja2 does not have.
    for name in ["chain", "zip", "bool", "lines", "split"] {
        environment.remove_filter(name);
    }

    environment.add_test("iterable", |value: &Value| {
        matches!(
            value.kind(),
            ValueKind::Undefined
                | ValueKind::String
                | ValueKind::Bytes
                | ValueKind::Seq
                | ValueKind::Map
                | ValueKind::Iterable
        )
    });
    environment.add_test("sequence", |value: &Value| {
        matches!(
            value.kind(),
            ValueKind::Undefined | ValueKind::String | ValueKind::Bytes | ValueKind::Seq | ValueKind::Map
        )
    });
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);

    environment.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, text(message)?.into_owned()))
    });
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    environment.add_function("cycler", |items: Rest<Value>| minijinja_contrib::globals::cycler(items.0));
}

/// Counts text against the render's budget.
fn charge(state: &mut State, bytes: usize) -> Result<(), Error> {
    struct Left(usize);
    let left = match state.get_extension_mut::<Left>() {
        Some(left) => left,
        None => {
            let budget = state.lookup(BUDGET).and_then(|budget| budget.as_usize()).unwrap_or(0);
            state.get_or_insert_extension(Left(budget))
        }
    };
    match left.0.checked_sub(bytes) {
        Some(rest) => left.0 = rest,
        None => return Err(wrong("the template makes too much text of one row")),
    }
    Ok(())
}

fn wrong(what: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

fn too_deep() -> Error {
    wrong(format!("values are nested more than {DEEPEST_VALUE} deep"))
}

fn deep(value: &Value, depth: usize) -> bool {
    if depth > DEEPEST_VALUE {
        return true;
    }
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            value.try_iter().is_ok_and(|mut items| items.any(|item| deep(&item, depth + 1)))
        }
        ValueKind::Map => value
            .try_iter()
            .is_ok_and(|mut keys| keys.any(|key| value.get_item(&key).is_ok_and(|item| deep(&item, depth + 1)))),
        _ => false,
    }
}

/// `str(value)`; nothing for an undefined value.
pub(super) fn text(value: &Value) -> Result<Cow<'_, str>, Error> {
    if let Some(text) = value.as_str() {
        return Ok(Cow::Borrowed(text));
    }
    if value.is_undefined() {
        return Ok(Cow::Borrowed(""));
    }
    let mut out = String::new();
    repr(value, &mut out, 0)?;
    Ok(Cow::Owned(out))
}

/// `repr(value)`.
fn repr(value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
    if depth > DEEPEST_VALUE {
        return Err(too_deep());
    }
    if let Some(text) = value.as_str() {
        repr_text(text, out);
        return Ok(());
    }
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::Number => match float(value) {
            Some(number) => out.push_str(&repr_float(number)),
            None => {
                let _ = write!(out, "{value}");
            }
        },
        ValueKind::Seq | ValueKind::Iterable => {
            let tuple = value.is_tuple();
            out.push(if tuple { '(' } else { '[' });
            let mut count = 0;
            for item in value.try_iter()? {
                if count > 0 {
                    out.push_str(", ");
                }
                repr(&item, out, depth + 1)?;
                count += 1;
            }
            out.push_str(match (tuple, count) {
                (true, 1) => ",)",
                (true, _) => ")",
                _ => "]",
            });
        }
        ValueKind::Map => {
            out.push('{');
            for (at, key) in value.try_iter()?.enumerate() {
                if at > 0 {
                    out.push_str(", ");
                }
                repr(&key, out, depth + 1)?;
                out.push_str(": ");
                repr(&value.get_item(&key)?, out, depth + 1)?;
            }
            out.push('}');
        }
        _ => {
            let _ = write!(out, "{value}");
        }
    }
    Ok(())
}

fn float(value: &Value) -> Option<f64> {
    (value.kind() == ValueKind::Number && !value.is_integer()).then(|| f64::try_from(value.clone()).ok()).flatten()
}

/// Shortest digits that read back the same, with an exponent below 1e-4 and from 1e16.
fn repr_float(number: f64) -> String {
    if !number.is_finite() {
        return if number.is_nan() {
            "nan".into()
        } else if number > 0.0 {
            "inf".into()
        } else {
            "-inf".into()
        };
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').expect("`e` formatting writes one");
    let exponent: i32 = exponent.parse().expect("`e` formatting writes a whole exponent");
    if number != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = format!("{number}");
    if plain.contains('.') { plain } else { plain + ".0" }
}

fn repr_text(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if printable(c) => out.push(c),
            c => {
                let code = c as u32;
                let _ = match code {
                    0..=0xFF => write!(out, "\\x{code:02x}"),
                    0x100..=0xFFFF => write!(out, "\\u{code:04x}"),
                    _ => write!(out, "\\U{code:08x}"),
                };
            }
        }
    }
    out.push(quote);
}

/// `str.isprintable` for the characters that occur: not controls, formats, separators or private use.
fn printable(c: char) -> bool {
    if generation::is_mark(c) {
        return true;
    }
    !(c.is_control()
        || (c != ' ' && c.is_whitespace())
        || matches!(c as u32, 0xAD | 0x600..=0x605 | 0x61C | 0x6DD | 0x70F | 0x180E | 0x200B..=0x200F | 0x202A..=0x202E
            | 0x2060..=0x206F | 0xE000..=0xF8FF | 0xFEFF | 0xFFF9..=0xFFFB | 0xFFFE | 0xFFFF | 0xE0001..=0xE007F | 0xF0000..))
}

/// transformers' `tojson`: `json.dumps` with `ensure_ascii=False`, nothing escaped for HTML.
fn tojson(
    state: &mut State,
    value: &Value,
    ensure_ascii: Option<Value>,
    indent: Option<Value>,
    options: Kwargs,
) -> Result<String, Error> {
    let option = |name: &str, given: Option<Value>| match given {
        Some(value) => Ok(value),
        None => options.get::<Option<Value>>(name).map(|value| value.unwrap_or(Value::UNDEFINED)),
    };
    let ensure_ascii = option("ensure_ascii", ensure_ascii)?.is_true();
    let indent = option("indent", indent)?;
    let indent = match (indent.as_i64(), indent.as_str()) {
        (Some(width), _) => Some(" ".repeat(width.clamp(0, 100) as usize)),
        (_, Some(text)) => Some(text.to_string()),
        _ => None,
    };
    let separators = option("separators", None)?;
    let separator =
        |at: i64| separators.get_item(&Value::from(at)).ok().and_then(|text| text.as_str().map(String::from));
    let mut json = Json {
        out: String::new(),
        ensure_ascii,
        sort_keys: option("sort_keys", None)?.is_true(),
        comma: separator(0).unwrap_or_else(|| if indent.is_some() { "," } else { ", " }.into()),
        colon: separator(1).unwrap_or_else(|| ": ".into()),
        indent,
    };
    options.assert_all_used()?;
    json.write(value, 0)?;
    charge(state, json.out.len())?;
    Ok(json.out)
}

struct Json {
    out: String,
    ensure_ascii: bool,
    sort_keys: bool,
    comma: String,
    colon: String,
    indent: Option<String>,
}

impl Json {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEEPEST_VALUE {
            return Err(too_deep());
        }
        if let Some(text) = value.as_str() {
            self.text(text);
            return Ok(());
        }
        match value.kind() {
            ValueKind::None | ValueKind::Bool | ValueKind::Number => self.out.push_str(&scalar(value)?),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.nested('[', ']', depth, items, |json, item| json.write(&item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.nested('{', '}', depth, keys, |json, key| {
                    match key.as_str() {
                        Some(text) => json.text(text),
                        None => {
                            let text = scalar(&key)?;
                            json.text(&text);
                        }
                    }
                    let colon = json.colon.clone();
                    json.out.push_str(&colon);
                    json.write(&value.get_item(&key)?, depth + 1)
                })?;
            }
            kind => return Err(wrong(format!("a value of type {kind} is not JSON serializable"))),
        }
        Ok(())
    }

    fn nested(
        &mut self,
        open: char,
        close: char,
        depth: usize,
        items: Vec<Value>,
        mut write: impl FnMut(&mut Self, Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        let empty = items.is_empty();
        for (at, item) in items.into_iter().enumerate() {
            if at > 0 {
                let comma = self.comma.clone();
                self.out.push_str(&comma);
            }
            self.line(depth + 1);
            write(self, item)?;
        }
        if !empty {
            self.line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            for _ in 0..depth {
                self.out.push_str(indent);
            }
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if (c as u32) < 0x20 || (self.ensure_ascii && c as u32 > 0x7E && !generation::is_mark(c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

fn scalar(value: &Value) -> Result<String, Error> {
    Ok(match value.kind() {
        ValueKind::None => "null".into(),
        ValueKind::Bool => value.is_true().to_string(),
        ValueKind::Number => match float(value) {
            Some(number) if number.is_nan() => "NaN".into(),
            Some(number) if number.is_infinite() => if number > 0.0 { "Infinity" } else { "-Infinity" }.into(),
            Some(number) => repr_float(number),
            None => value.to_string(),
        },
        kind => return Err(wrong(format!("a key of type {kind} is not JSON serializable"))),
    })
}

/// `a + b + ...`: numbers, strings, lists, tuples.
fn add(state: &mut State, first: Value, terms: Rest<Value>) -> Result<Value, Error> {
    // The common case, a chain of strings, is joined in one go.
    let plain = |value: &Value| value.as_str().is_some() && !value.is_safe();
    if plain(&first) && terms.iter().all(plain) {
        let mut out = String::from(first.as_str().unwrap_or_default());
        for term in terms.iter() {
            out.push_str(term.as_str().unwrap_or_default());
        }
        charge(state, out.len())?;
        return Ok(Value::from(out));
    }
    let mut sum = first;
    for term in terms.0 {
        sum = add_two(state, &sum, &term)?;
    }
    Ok(sum)
}

fn add_two(state: &mut State, a: &Value, b: &Value) -> Result<Value, Error> {
    if let (Some(left), Some(right)) = (a.as_str(), b.as_str()) {
        charge(state, 5 * (left.len() + right.len()))?;
        // Where one is marked `safe`, the other is escaped (markupsafe).
        return Ok(match (a.is_safe(), b.is_safe()) {
            (false, false) => Value::from([left, right].concat()),
            (true, false) => Value::from_safe_string(format!("{left}{}", escaped(right))),
            (false, true) => Value::from_safe_string(format!("{}{right}", escaped(left))),
            (true, true) => Value::from_safe_string([left, right].concat()),
        });
    }
    if let Some((a, b)) = integers(a, b) {
        return integer(a.checked_add(b));
    }
    if let Some((a, b)) = floats(a, b) {
        return Ok(Value::from(a + b));
    }
    let list = |value: &Value| matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable);
    if list(a) && list(b) && a.is_tuple() == b.is_tuple() {
        let items: Vec<Value> = a.try_iter()?.chain(b.try_iter()?).collect();
        charge(state, items.len() * size_of::<Value>())?;
        return Ok(if a.is_tuple() { Value::from(Tuple::from(items)) } else { Value::from(items) });
    }
    Err(wrong(format!("cannot add {} and {}", describe(a), describe(b))))
}

/// `a ~ b ~ ...`: everything as text.
fn concatenate(state: &mut State, first: &Value, terms: Rest<Value>) -> Result<String, Error> {
    let mut out = text(first)?.into_owned();
    for term in terms.iter() {
        out.push_str(&text(term)?);
        charge(state, out.len())?;
    }
    Ok(out)
}

/// `a * b`: numbers; strings and lists repeated.
fn multiply(state: &mut State, a: &Value, b: &Value) -> Result<Value, Error> {
    if let Some((a, b)) = integers(a, b) {
        return integer(a.checked_mul(b));
    }
    if let Some((a, b)) = floats(a, b) {
        return Ok(Value::from(a * b));
    }
    let (repeated, times) = if b.is_integer() { (a, b) } else { (b, a) };
    let times = times.as_i64().unwrap_or(-1);
    if let (Some(text), 0..) = (repeated.as_str(), times) {
        charge(state, text.len().saturating_mul(times as usize))?;
        return Ok(Value::from(text.repeat(times as usize)));
    }
    if let (ValueKind::Seq, 0..) = (repeated.kind(), times) {
        let items: Vec<Value> = repeated.try_iter()?.collect();
        charge(state, items.len().saturating_mul(times as usize).saturating_mul(size_of::<Value>()))?;
        let many = std::iter::repeat_n(items, times as usize).flatten().collect::<Vec<_>>();
        return Ok(Value::from(many));
    }
    Err(wrong(format!("cannot multiply {} and {}", describe(a), describe(b))))
}

/// `a % b`: the remainder with the sign of `b`, or a format string filled in.
fn modulo(state: &mut State, a: &Value, b: &Value) -> Result<Value, Error> {
    if let Some(format) = a.as_str() {
        let arguments: Vec<Value> = if b.is_tuple() { b.try_iter()?.collect() } else { vec![b.clone()] };
        return printf(state, format, &arguments).map(Value::from);
    }
    if let Some((a, b)) = integers(a, b) {
        return match b {
            0 => Err(wrong("modulo by zero")),
            b => integer(a.checked_rem(b).map(|r| if r != 0 && (r < 0) != (b < 0) { r + b } else { r })),
        };
    }
    if let Some((a, b)) = floats(a, b) {
        return match b {
            0.0 => Err(wrong("modulo by zero")),
            b => Ok(Value::from(a - b * (a / b).floor())),
        };
    }
    Err(wrong(format!("cannot take {} modulo {}", describe(a), describe(b))))
}

fn integers(a: &Value, b: &Value) -> Option<(i128, i128)> {
    let whole = |value: &Value| match value.kind() {
        ValueKind::Bool => Some(i128::from(value.is_true())),
        ValueKind::Number if value.is_integer() => i128::try_from(value.clone()).ok(),
        _ => None,
    };
    Some((whole(a)?, whole(b)?))
}

fn floats(a: &Value, b: &Value) -> Option<(f64, f64)> {
    let number = |value: &Value| match value.kind() {
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => f64::try_from(value.clone()).ok(),
        _ => None,
    };
    Some((number(a)?, number(b)?))
}

fn integer(number: Option<i128>) -> Result<Value, Error> {
    let number = number.ok_or_else(|| wrong("a whole number grew too large"))?;
    Ok(i64::try_from(number).map_or_else(|_| Value::from(number), Value::from))
}

fn describe(value: &Value) -> &'static str {
    match value.kind() {
        ValueKind::Undefined => "an undefined value",
        ValueKind::None => "None",
        ValueKind::Bool | ValueKind::Number => "a number",
        ValueKind::String => "a string",
        ValueKind::Seq | ValueKind::Iterable => "a list",
        ValueKind::Map => "a mapping",
        _ => "an object",
    }
}

/// `value[start:stop:step]`.
fn slice(state: &mut State, value: &Value, start: &Value, stop: &Value, step: &Value) -> Result<Value, Error> {
    let bound = |value: &Value| match value.kind() {
        ValueKind::None => Ok(None),
        _ => value.as_i64().map(Some).ok_or_else(|| wrong(format!("a slice index is {}", describe(value)))),
    };
    let (start, stop, step) = (bound(start)?, bound(stop)?, bound(step)?.unwrap_or(1));
    if step == 0 {
        return Err(wrong("a slice step is zero"));
    }
    if let Some(text) = value.as_str() {
        charge(state, text.len())?;
        let characters: Vec<char> = text.chars().collect();
        return Ok(Value::from(
            taken(characters.len(), start, stop, step).map(|at| characters[at]).collect::<String>(),
        ));
    }
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {}
        ValueKind::Undefined => return Err(wrong("cannot take a slice of an undefined value")),
        _ => return Ok(Value::UNDEFINED),
    }
    let items: Vec<Value> = value.try_iter()?.collect();
    charge(state, items.len() * size_of::<Value>())?;
    let items: Vec<Value> = taken(items.len(), start, stop, step).map(|at| items[at].clone()).collect();
    Ok(if value.is_tuple() { Value::from(Tuple::from(items)) } else { Value::from(items) })
}

/// The indices of a slice, by the rules of Python's `slice.indices`.
fn taken(length: usize, start: Option<i64>, stop: Option<i64>, step: i64) -> impl Iterator<Item = usize> {
    let length = length as i64;
    let (lowest, highest) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let place = |bound: i64| (if bound < 0 { bound.saturating_add(length) } else { bound }).clamp(lowest, highest);
    let start = start.map_or(if step > 0 { lowest } else { highest }, place);
    let stop = stop.map_or(if step > 0 { highest } else { lowest }, place);
    let mut at = start;
    std::iter::from_fn(move || {
        let inside = if step > 0 { at < stop } else { at > stop };
        let here = at;
        at = at.saturating_add(step);
        inside.then_some(here as usize)
    })
}

fn length(value: &Value) -> Result<usize, Error> {
    match value.kind() {
        ValueKind::Undefined => Ok(0),
        _ => value.len().ok_or_else(|| wrong(format!("{} has no length", describe(value)))),
    }
}

fn default(value: Value, other: Option<Value>, boolean: Option<Value>, options: Kwargs) -> Result<Value, Error> {
    let other = other.or(options.get("default_value")?).unwrap_or_else(|| Value::from(""));
    let boolean = boolean.or(options.get("boolean")?).is_some_and(|value| value.is_true());
    options.assert_all_used()?;
    Ok(if value.is_undefined() || (boolean && !value.is_true()) { other } else { value })
}

/// The first or the last item; nothing of nothing.
fn end_of(value: Value, last: bool) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        let end = if last { text.chars().next_back() } else { text.chars().next() };
        return Ok(end.map_or(Value::UNDEFINED, Value::from));
    }
    if value.is_undefined() {
        return Ok(value);
    }
    let mut items = value.try_iter()?;
    Ok(if last { items.last() } else { items.next() }.unwrap_or(Value::UNDEFINED))
}

/// A whole number, from text in a base; the default (0) where it is none.
fn int(value: &Value, default: Option<Value>, base: Option<u32>, options: Kwargs) -> Result<Value, Error> {
    let default = default.or(options.get("default")?).unwrap_or_else(|| Value::from(0));
    let base = base.or(options.get("base")?).unwrap_or(10).clamp(2, 36);
    if let Some(text) = value.as_str() {
        let digits = strip(text, None, true, true).replace('_', "").to_lowercase();
        let prefix = match base {
            2 => "0b",
            8 => "0o",
            16 => "0x",
            _ => "",
        };
        let digits = digits.strip_prefix(prefix).unwrap_or(&digits);
        if let Ok(number) = i128::from_str_radix(digits, base) {
            return integer(Some(number));
        }
    } else if let Some((number, _)) = integers(value, &Value::from(0)) {
        return integer(Some(number));
    }
    let number = parse_float(value).filter(|number| number.is_finite() && number.abs() < 1e30);
    number.map_or(Ok(default), |number| integer(Some(number as i128)))
}

fn parse_float(value: &Value) -> Option<f64> {
    match value.as_str() {
        Some(text) => strip(text, None, true, true).replace('_', "").parse().ok(),
        None => floats(value, &Value::from(0)).map(|(number, _)| number),
    }
}

fn escape(state: &mut State, value: &Value) -> Result<Value, Error> {
    if value.is_safe() {
        return Ok(value.clone());
    }
    let plain = text(value)?;
    charge(state, plain.len() * 5)?;
    Ok(Value::from_safe_string(escaped(&plain)))
}

/// As markupsafe escapes HTML.
fn escaped(plain: &str) -> String {
    let escaped = plain.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    escaped.replace('\'', "&#39;").replace('"', "&#34;")
}

fn join(
    state: &mut State,
    value: &Value,
    separator: Option<Value>,
    attribute: Option<Value>,
    options: Kwargs,
) -> Result<String, Error> {
    let separator = separator.or(options.get("d")?).unwrap_or_else(|| Value::from(""));
    let attribute = attribute.or(options.get("attribute")?);
    options.assert_all_used()?;
    let separator = text(&separator)?;
    let mut out = String::new();
    for (at, item) in value.try_iter()?.enumerate() {
        if at > 0 {
            out.push_str(&separator);
        }
        let item = match &attribute {
            Some(attribute) => item.get_item(attribute)?,
            None => item,
        };
        let before = out.len();
        out.push_str(&text(&item)?);
        charge(state, out.len() - before + separator.len())?;
    }
    Ok(out)
}

fn indent(
    state: &mut State,
    value: &Value,
    width: Option<Value>,
    first: Option<bool>,
    options: Kwargs,
) -> Result<String, Error> {
    let width = width.or(options.get("width")?).unwrap_or_else(|| Value::from(4));
    let first = first.or(options.get("first")?).unwrap_or(false);
    let blank = options.get::<Option<bool>>("blank")?.unwrap_or(false);
    options.assert_all_used()?;
    let prefix = match width.as_str() {
        Some(text) => text.to_string(),
        None => " ".repeat(width.as_i64().unwrap_or(4).clamp(0, 1000) as usize),
    };
    let body = text(value)?;
    charge(state, body.len() + prefix.len() * (1 + body.matches('\n').count()))?;
    let mut out = String::new();
    for (at, line) in split_lines(&format!("{body}\n"), false).iter().enumerate() {
        let line = line.as_str().unwrap_or_default();
        if at > 0 {
            out.push('\n');
        }
        // jinja2: the first line only with `first`, blank lines only with `blank`.
        if if at == 0 { first } else { blank || !line.is_empty() } {
            out.push_str(&prefix);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// `%`-formatting; `%s` and `%r` as Python prints values.
fn printf(state: &mut State, format: &str, arguments: &[Value]) -> Result<String, Error> {
    guard_format(format)?;
    // minijinja has no `%r`, and prints values its own way: both are given to it as text.
    let mut plain = String::with_capacity(format.len());
    let mut given = Vec::with_capacity(arguments.len());
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        plain.push_str(&rest[..at + 1]);
        rest = &rest[at + 1..];
        let flags = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit() || "-+ #.".contains(c)).len();
        plain.push_str(&rest[..flags]);
        rest = &rest[flags..];
        let Some(kind) = rest.chars().next() else { break };
        rest = &rest[kind.len_utf8()..];
        match (kind, arguments.get(given.len())) {
            ('r', Some(value)) => {
                let mut shown = String::new();
                repr(value, &mut shown, 0)?;
                given.push(Value::from(shown));
                plain.push('s');
                continue;
            }
            ('s', Some(value)) => given.push(Value::from(text(value)?.into_owned())),
            ('%' | '(', _) | (_, None) => {}
            (_, Some(value)) => given.push(value.clone()),
        }
        plain.push(kind);
    }
    plain.push_str(rest);
    given.extend(arguments.iter().skip(given.len()).cloned());
    let out = minijinja::formatting::format(minijinja::formatting::FormatStyle::Printf, &plain, &given)?;
    charge(state, out.len())?;
    Ok(out)
}

/// Refuses widths that would make huge texts.
fn guard_format(format: &str) -> Result<(), Error> {
    let widest = format.split(|c: char| !c.is_ascii_digit()).map(str::len).max().unwrap_or(0);
    if widest > WIDEST_FORMAT || format.contains('*') {
        return Err(wrong(format!("a format string with a width of more than {WIDEST_FORMAT} digits, or of `*`")));
    }
    Ok(())
}

fn replace(state: &mut State, text: &str, from: &str, to: &str, count: Option<i64>) -> Result<String, Error> {
    let times = text.matches(from).count().min(count.filter(|count| *count >= 0).unwrap_or(i64::MAX) as usize);
    charge(state, text.len().saturating_add(times.saturating_mul(to.len())))?;
    Ok(text.replacen(from, to, times))
}

/// Python's white space: Unicode's, and the four information separators.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn strip<'t>(text: &'t str, characters: Option<&str>, left: bool, right: bool) -> &'t str {
    let stripped = |c: char| characters.map_or_else(|| is_space(c), |set| set.contains(c));
    let text = if left { text.trim_start_matches(stripped) } else { text };
    if right { text.trim_end_matches(stripped) } else { text }
}

enum Side {
    Left,
    Right,
    Both,
}

/// Fills `text` up to `width` characters; `side` is where the text stays.
fn pad(state: &mut State, text: &str, width: usize, fill: char, side: Side) -> Result<String, Error> {
    let missing = width.saturating_sub(text.chars().count());
    charge(state, text.len().saturating_add(missing.saturating_mul(4)))?;
    let left = match side {
        Side::Left => 0,
        Side::Right => missing,
        // `str.center` puts the odd blank left when the width is odd.
        Side::Both => missing / 2 + (missing & width & 1),
    };
    let fills = |count: usize| std::iter::repeat_n(fill, count).collect::<String>();
    Ok(format!("{}{text}{}", fills(left), fills(missing - left)))
}

fn pairs(value: &Value) -> Result<Value, Error> {
    let mut pairs = Vec::new();
    for key in value.try_iter()? {
        let item = value.get_item(&key)?;
        pairs.push(Value::from(Tuple::from([key, item])));
    }
    Ok(Value::from(pairs))
}

/// Methods of Python's strings, mappings and lists; what is not here is minijinja-contrib's.
fn method(state: &mut State, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        if let Some(result) = text_method(state, text, name, arguments)? {
            return Ok(result);
        }
    } else if value.kind() == ValueKind::Map {
        match name {
            "keys" => return Ok(Value::from(value.try_iter()?.collect::<Vec<_>>())),
            "values" => {
                let values = value.try_iter()?.map(|key| value.get_item(&key)).collect::<Result<Vec<_>, _>>()?;
                return Ok(Value::from(values));
            }
            "items" => return pairs(value),
            "copy" => return Ok(value.clone()),
            _ => {}
        }
    } else if value.kind() == ValueKind::Seq {
        match name {
            "copy" => return Ok(value.clone()),
            "index" => {
                let (item,): (Value,) = from_args(arguments)?;
                let at = value.try_iter()?.position(|other| other == item);
                return at.map(Value::from).ok_or_else(|| wrong("the value is not in the list"));
            }
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments)
}

fn text_method(state: &mut State, text: &str, name: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    let result = match name {
        "strip" | "lstrip" | "rstrip" => {
            let (characters,): (Option<&str>,) = from_args(arguments)?;
            Value::from(strip(text, characters, name != "rstrip", name != "lstrip"))
        }
        "split" | "rsplit" => {
            let (separator, limit, options): (Option<Value>, Option<i64>, Kwargs) = from_args(arguments)?;
            let separator = separator.or(options.get("sep")?).filter(|separator| !separator.is_none());
            let limit = limit.or(options.get("maxsplit")?).filter(|limit| *limit >= 0).map(|limit| limit as usize);
            options.assert_all_used()?;
            charge(state, text.len())?;
            Value::from(split(text, separator.as_ref(), limit, name == "rsplit")?)
        }
        "splitlines" => {
            let (keep,): (Option<bool>,) = from_args(arguments)?;
            Value::from(split_lines(text, keep.unwrap_or(false)))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(arguments)?;
            let found = if name == "partition" { text.split_once(separator) } else { text.rsplit_once(separator) };
            Value::from(Tuple::from(match found {
                Some((before, after)) => [before, separator, after].map(Value::from),
                None if name == "partition" => [text, "", ""].map(Value::from),
                None => ["", "", text].map(Value::from),
            }))
        }
        "find" | "rfind" | "index" | "rindex" | "count" => {
            let (what, start, stop): (&str, Option<i64>, Option<i64>) = from_args(arguments)?;
            let (part, before) = window(text, start, stop);
            if name == "count" {
                let count = if what.is_empty() { part.chars().count() + 1 } else { part.matches(what).count() };
                return Ok(Some(Value::from(count)));
            }
            let found = if name.starts_with('r') { part.rfind(what) } else { part.find(what) };
            match found {
                Some(at) => Value::from(before + part[..at].chars().count()),
                None if name.ends_with("find") => Value::from(-1),
                None => return Err(wrong("substring not found")),
            }
        }
        "startswith" | "endswith" => {
            let (what, start, stop): (&Value, Option<i64>, Option<i64>) = from_args(arguments)?;
            let (part, _) = window(text, start, stop);
            let matches = |what: &Value| match what.as_str() {
                Some(what) => Ok(if name == "startswith" { part.starts_with(what) } else { part.ends_with(what) }),
                None => Err(wrong(format!("{name} needs a string or a tuple of strings"))),
            };
            let mut any = false;
            match what.kind() {
                ValueKind::Seq => {
                    for what in what.try_iter()? {
                        any |= matches(&what)?;
                    }
                }
                _ => any = matches(what)?,
            }
            Value::from(any)
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(arguments)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(arguments)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "replace" => {
            let (from, to, count): (&str, &str, Option<i64>) = from_args(arguments)?;
            Value::from(replace(state, text, from, to, count)?)
        }
        "join" => {
            let (items,): (Value,) = from_args(arguments)?;
            let options: Kwargs = std::iter::empty::<(String, Value)>().collect();
            Value::from(join(state, &items, Some(Value::from(text)), None, options)?)
        }
        "format" => {
            guard_format(text)?;
            let out = minijinja::formatting::format(minijinja::formatting::FormatStyle::StrFormat, text, arguments)?;
            charge(state, out.len())?;
            Value::from(out)
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (i64, Option<char>) = from_args(arguments)?;
            let side = match name {
                "ljust" => Side::Left,
                "rjust" => Side::Right,
                _ => Side::Both,
            };
            Value::from(pad(state, text, width.max(0) as usize, fill.unwrap_or(' '), side)?)
        }
        "zfill" => {
            let (width,): (i64,) = from_args(arguments)?;
            let (sign, digits) = match text.strip_prefix(['-', '+']) {
                Some(digits) => (&text[..1], digits),
                None => ("", text),
            };
            let width = (width.max(0) as usize).saturating_sub(sign.len());
            Value::from(format!("{sign}{}", pad(state, digits, width, '0', Side::Right)?))
        }
        "expandtabs" => {
            let (width,): (Option<usize>,) = from_args(arguments)?;
            let width = width.unwrap_or(8).clamp(0, 1000);
            charge(state, text.len() + width * text.matches('\t').count())?;
            let (mut out, mut column) = (String::new(), 0usize);
            for c in text.chars() {
                let count = if c == '\t' { width - column.checked_rem(width).unwrap_or(0) } else { 1 };
                out.extend(std::iter::repeat_n(if c == '\t' { ' ' } else { c }, count));
                column = if matches!(c, '\n' | '\r') { 0 } else { column + count };
            }
            Value::from(out)
        }
        "casefold" => Value::from(text.to_lowercase().replace('ß', "ss")),
        "swapcase" => Value::from(
            text.chars()
                .flat_map(|c| {
                    if c.is_uppercase() { c.to_lowercase().to_string() } else { c.to_uppercase().to_string() }
                        .chars()
                        .collect::<Vec<_>>()
                })
                .collect::<String>(),
        ),
        "isspace" => Value::from(!text.is_empty() && text.chars().all(is_space)),
        "isdecimal" => Value::from(!text.is_empty() && text.chars().all(|c| c.is_ascii_digit())),
        _ => return Ok(None),
    };
    Ok(Some(result))
}

/// The part of `text` between two character indices (Python's rules), and how many characters come before it.
fn window(text: &str, start: Option<i64>, stop: Option<i64>) -> (&str, usize) {
    if start.is_none() && stop.is_none() {
        return (text, 0);
    }
    let count = text.chars().count();
    let place = |bound: i64| (if bound < 0 { bound + count as i64 } else { bound }).clamp(0, count as i64) as usize;
    let (start, stop) = (start.map_or(0, place), stop.map_or(count, place));
    let byte = |at: usize| text.char_indices().nth(at).map_or(text.len(), |(byte, _)| byte);
    (&text[byte(start)..byte(stop.max(start))], start)
}

fn split(text: &str, separator: Option<&Value>, limit: Option<usize>, from_right: bool) -> Result<Vec<Value>, Error> {
    let mut parts: Vec<&str> = Vec::new();
    let mut rest = text;
    match separator.map(Value::as_str) {
        Some(None) => return Err(wrong("the separator of split is not a string")),
        Some(Some("")) => return Err(wrong("the separator of split is empty")),
        Some(Some(separator)) => {
            while limit.is_none_or(|limit| parts.len() < limit) {
                let found = if from_right { rest.rsplit_once(separator) } else { rest.split_once(separator) };
                let Some((before, after)) = found else { break };
                parts.push(if from_right { after } else { before });
                rest = if from_right { before } else { after };
            }
            parts.push(rest);
        }
        None => {
            // White space: runs are one separator, and none is kept at the ends.
            rest = strip(rest, None, true, true);
            while !rest.is_empty() && limit.is_none_or(|limit| parts.len() < limit) {
                let found = if from_right { rest.rfind(is_space) } else { rest.find(is_space) };
                let Some(at) = found else { break };
                let next = at + rest[at..].chars().next().map_or(1, char::len_utf8);
                parts.push(if from_right { &rest[next..] } else { &rest[..at] });
                rest = if from_right {
                    strip(&rest[..at], None, false, true)
                } else {
                    strip(&rest[next..], None, true, false)
                };
            }
            if !rest.is_empty() {
                parts.push(rest);
            }
        }
    }
    if from_right {
        parts.reverse();
    }
    Ok(parts.into_iter().map(Value::from).collect())
}

/// `str.splitlines`: every line end of Unicode.
fn split_lines(text: &str, keep: bool) -> Vec<Value> {
    let mut lines = Vec::new();
    let mut begin = 0;
    let mut characters = text.char_indices().peekable();
    while let Some((at, c)) = characters.next() {
        if !matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}') {
            continue;
        }
        let mut end = at + c.len_utf8();
        if c == '\r' && characters.next_if(|(_, next)| *next == '\n').is_some() {
            end += 1;
        }
        lines.push(Value::from(&text[begin..if keep { end } else { at }]));
        begin = end;
    }
    if begin < text.len() {
        lines.push(Value::from(&text[begin..]));
    }
    lines
}
