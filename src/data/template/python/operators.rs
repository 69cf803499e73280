//! Operators with Python's rules: `+`, `~`, `*`, `%` and slices.

use minijinja::value::{Rest, Tuple, Value, ValueKind};
use minijinja::{Error, State};

use super::filters::{escaped, printf};
use super::show::text;
use super::{charge, wrong};

/// `a + b + ...`: numbers, strings, lists, tuples.
pub(super) fn add(state: &mut State, first: Value, terms: Rest<Value>) -> Result<Value, Error> {
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
pub(super) fn concatenate(state: &mut State, first: &Value, terms: Rest<Value>) -> Result<String, Error> {
    let mut out = text(first)?.into_owned();
    for term in terms.iter() {
        out.push_str(&text(term)?);
        charge(state, out.len())?;
    }
    Ok(out)
}

/// `a * b`: numbers; strings and lists repeated.
pub(super) fn multiply(state: &mut State, a: &Value, b: &Value) -> Result<Value, Error> {
    if let Some((a, b)) = integers(a, b) {
        return integer(a.checked_mul(b));
    }
    if let Some((a, b)) = floats(a, b) {
        return Ok(Value::from(a * b));
    }
    let (repeated, times) = if b.is_integer() { (a, b) } else { (b, a) };
    // Fewer than none are none.
    let times = times.as_i64().map(|times| times.max(0) as usize);
    if let (Some(text), Some(times)) = (repeated.as_str(), times) {
        charge(state, text.len().saturating_mul(times))?;
        return Ok(Value::from(text.repeat(times)));
    }
    if let (ValueKind::Seq, Some(times)) = (repeated.kind(), times) {
        let items: Vec<Value> = repeated.try_iter()?.collect();
        charge(state, items.len().saturating_mul(times).saturating_mul(size_of::<Value>()))?;
        let many = std::iter::repeat_n(items, times).flatten().collect::<Vec<_>>();
        return Ok(if repeated.is_tuple() { Value::from(Tuple::from(many)) } else { Value::from(many) });
    }
    Err(wrong(format!("cannot multiply {} and {}", describe(a), describe(b))))
}

/// `a % b`: the remainder with the sign of `b`, or a format string filled in.
pub(super) fn modulo(state: &mut State, a: &Value, b: &Value) -> Result<Value, Error> {
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

pub(super) fn integers(a: &Value, b: &Value) -> Option<(i128, i128)> {
    let whole = |value: &Value| match value.kind() {
        ValueKind::Bool => Some(i128::from(value.is_true())),
        ValueKind::Number if value.is_integer() => i128::try_from(value.clone()).ok(),
        _ => None,
    };
    Some((whole(a)?, whole(b)?))
}

pub(super) fn floats(a: &Value, b: &Value) -> Option<(f64, f64)> {
    let number = |value: &Value| match value.kind() {
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => f64::try_from(value.clone()).ok(),
        _ => None,
    };
    Some((number(a)?, number(b)?))
}

pub(super) fn integer(number: Option<i128>) -> Result<Value, Error> {
    let number = number.ok_or_else(|| wrong("a whole number grew too large"))?;
    Ok(i64::try_from(number).map_or_else(|_| Value::from(number), Value::from))
}

pub(super) fn describe(value: &Value) -> &'static str {
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
pub(super) fn slice(
    state: &mut State,
    value: &Value,
    start: &Value,
    stop: &Value,
    step: &Value,
) -> Result<Value, Error> {
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
        _ => return Err(wrong(format!("cannot take a slice of {}", describe(value)))),
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
