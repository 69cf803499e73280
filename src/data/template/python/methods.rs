//! Methods of Python's strings, mappings and lists.

use minijinja::value::{Kwargs, Tuple, Value, ValueKind, from_args};
use minijinja::{Error, State};

use super::filters::{guard_format, join, replace};
use super::{charge, wrong};

/// Methods of Python's strings, mappings and lists; what is not here is minijinja-contrib's.
pub(super) fn method(state: &mut State, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
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
        // A letter after anything but a letter is a capital: "they're" becomes "They'Re".
        "title" => {
            let (mut titled, mut inside) = (String::with_capacity(text.len()), false);
            for c in text.chars() {
                if inside {
                    titled.extend(c.to_lowercase())
                } else {
                    titled.extend(c.to_uppercase())
                }
                inside = c.is_alphabetic();
            }
            Value::from(titled)
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

/// Python's white space: Unicode's, and the four information separators.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

pub(super) fn strip<'t>(text: &'t str, characters: Option<&str>, left: bool, right: bool) -> &'t str {
    let stripped = |c: char| characters.map_or_else(|| is_space(c), |set| set.contains(c));
    let text = if left { text.trim_start_matches(stripped) } else { text };
    if right { text.trim_end_matches(stripped) } else { text }
}

pub(super) enum Side {
    Left,
    Right,
    Both,
}

/// Fills `text` up to `width` characters; `side` is where the text stays.
pub(super) fn pad(state: &mut State, text: &str, width: usize, fill: char, side: Side) -> Result<String, Error> {
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

pub(super) fn pairs(value: &Value) -> Result<Value, Error> {
    let mut pairs = Vec::new();
    for key in value.try_iter()? {
        let item = value.get_item(&key)?;
        pairs.push(Value::from(Tuple::from([key, item])));
    }
    Ok(Value::from(pairs))
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
pub(super) fn split_lines(text: &str, keep: bool) -> Vec<Value> {
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
