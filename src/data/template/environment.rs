//! Where templates run: what they may use, and how much of it.

use jiff::civil::DateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind};

use super::python;

/// Steps of minijinja one render may take; a long conversation takes some ten thousand.
const FUEL: u64 = 4_000_000;
/// How deep macros and loops may nest while rendering.
const DEEPEST_CALL: usize = 400;

pub(super) fn environment(now: DateTime) -> Environment<'static> {
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

/// The template's complaint, with the ways of jinja that lead to it.
pub(super) fn explain(error: &minijinja::Error) -> String {
    match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => format!("the template takes more than {FUEL} steps"),
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_string(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    }
}
