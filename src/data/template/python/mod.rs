//! Python's ways in templates: how values print (`str`, `repr`, `json.dumps`), operators, string methods, filters and tests
//! as jinja2 and transformers have them, where minijinja differs.
//!
//! Everything that makes text is charged against a budget per render, so that a template cannot exhaust memory.

mod filters;
mod methods;
mod operators;
mod show;

use std::borrow::Cow;
use std::sync::Arc;

use minijinja::value::{Kwargs, Object, ObjectRepr, Rest, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};

use self::filters::{default, end_of, escape, indent, int, join, length, parse_float, printf, replace};
use self::methods::{Side, method, pad, pairs, strip};
use self::operators::{add, concatenate, describe, modulo, multiply, slice};
use self::show::{text, tojson};
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
        // A list of characters knows its length, so that `loop.last` is known.
        ValueKind::String => Ok(value.as_str().unwrap_or_default().chars().map(Value::from).collect()),
        ValueKind::None | ValueKind::Bool | ValueKind::Number => {
            Err(wrong(format!("cannot go through {}", describe(&value))))
        }
        _ => Ok(value),
    });
    environment.add_filter("__member", |value: &Value, name: &str| match value.get_attr(name)? {
        found if found.is_undefined() && value.kind() == ValueKind::Map => Ok(Value::from_object(Method)),
        found => Ok::<_, Error>(found),
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

/// A method of a mapping that is not called: it is there, and true.
#[derive(Debug)]
struct Method;

impl Object for Method {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }
}

/// Counts text against the render's budget.
pub(super) fn charge(state: &mut State, bytes: usize) -> Result<(), Error> {
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

pub(super) fn wrong(what: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

pub(super) fn too_deep() -> Error {
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
