//! jinja2's filters where minijinja's differ.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, State};

use super::methods::{split_lines, strip};
use super::operators::{describe, floats, integer, integers};
use super::show::{repr, text};
use super::{WIDEST_FORMAT, charge, wrong};

pub(super) fn length(value: &Value) -> Result<usize, Error> {
    match value.kind() {
        ValueKind::Undefined => Ok(0),
        _ => value.len().ok_or_else(|| wrong(format!("{} has no length", describe(value)))),
    }
}

pub(super) fn default(
    value: Value,
    other: Option<Value>,
    boolean: Option<Value>,
    options: Kwargs,
) -> Result<Value, Error> {
    let other = other.or(options.get("default_value")?).unwrap_or_else(|| Value::from(""));
    let boolean = boolean.or(options.get("boolean")?).is_some_and(|value| value.is_true());
    options.assert_all_used()?;
    Ok(if value.is_undefined() || (boolean && !value.is_true()) { other } else { value })
}

/// The first or the last item; nothing of nothing.
pub(super) fn end_of(value: Value, last: bool) -> Result<Value, Error> {
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
pub(super) fn int(value: &Value, default: Option<Value>, base: Option<u32>, options: Kwargs) -> Result<Value, Error> {
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

pub(super) fn parse_float(value: &Value) -> Option<f64> {
    match value.as_str() {
        Some(text) => strip(text, None, true, true).replace('_', "").parse().ok(),
        None => floats(value, &Value::from(0)).map(|(number, _)| number),
    }
}

pub(super) fn escape(state: &mut State, value: &Value) -> Result<Value, Error> {
    if value.is_safe() {
        return Ok(value.clone());
    }
    let plain = text(value)?;
    charge(state, plain.len() * 5)?;
    Ok(Value::from_safe_string(escaped(&plain)))
}

/// As markupsafe escapes HTML.
pub(super) fn escaped(plain: &str) -> String {
    let escaped = plain.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    escaped.replace('\'', "&#39;").replace('"', "&#34;")
}

pub(super) fn join(
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

pub(super) fn indent(
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
pub(super) fn printf(state: &mut State, format: &str, arguments: &[Value]) -> Result<String, Error> {
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
pub(super) fn guard_format(format: &str) -> Result<(), Error> {
    let widest = format.split(|c: char| !c.is_ascii_digit()).map(str::len).max().unwrap_or(0);
    if widest > WIDEST_FORMAT || format.contains('*') {
        return Err(wrong(format!("a format string with a width of more than {WIDEST_FORMAT} digits, or of `*`")));
    }
    Ok(())
}

pub(super) fn replace(
    state: &mut State,
    text: &str,
    from: &str,
    to: &str,
    count: Option<i64>,
) -> Result<String, Error> {
    let times = text.matches(from).count().min(count.filter(|count| *count >= 0).unwrap_or(i64::MAX) as usize);
    charge(state, text.len().saturating_add(times.saturating_mul(to.len())))?;
    Ok(text.replacen(from, to, times))
}
