//! How values print: `str`, `repr` and `json.dumps`.

use std::borrow::Cow;
use std::fmt::Write;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, State};

use super::{DEEPEST_VALUE, charge, too_deep, wrong};
use crate::data::template::generation;

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
pub(super) fn repr(value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
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
pub(super) fn tojson(
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
