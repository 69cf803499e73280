//! `engraft schema`: the recipe's reference, made from the structs that read it.

use std::io::Write;

use crate::cli::Schema;
use crate::recipe::{json_schema, markdown};
use crate::{Error, Fault, Result};

/// Writes the JSON Schema, or the Markdown tables, to `out`.
///
/// # Errors
///
/// [`Error::Output`] when `out` cannot be written.
pub fn run(arguments: &Schema, out: &mut dyn Write) -> Result<()> {
    let text = if arguments.markdown { markdown() } else { format!("{:#}\n", json_schema()) };
    out.write_all(text.as_bytes()).map_err(|error| Error::Output(Fault::new("standard output", error)))
}
