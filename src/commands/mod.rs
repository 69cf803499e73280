//! One verb per file: straight lines, no logic of their own.

pub mod chat;
pub mod codes;
pub mod combine;
pub mod diff;
pub mod doctor;
pub mod eval;
pub mod export;
pub mod extract;
pub mod generate;
pub mod inspect;
pub mod logits;
pub mod merge;
pub mod plan;
pub mod preview;
pub mod quantize;
pub mod schema;
pub mod train;
pub mod validate;
pub mod verify;

mod console;
mod loading;
mod probing;
mod speech;

use std::io::Write;

use crate::Result;
use crate::cli::{Cli, Command};

/// Runs the verb that was typed; what it prints for the user or a program goes to `out`, progress to standard error.
pub fn run(cli: &Cli, out: &mut dyn Write) -> Result<()> {
    match &cli.command {
        Command::Train(arguments) => train::run(arguments),
        Command::Plan(arguments) => plan::run(arguments, out),
        Command::Eval(arguments) => eval::run(arguments, out),
        Command::Chat(arguments) => chat::run(arguments, out),
        Command::Generate(arguments) => generate::run(arguments, out),
        Command::Merge(arguments) => merge::run(arguments, out),
        Command::Export(arguments) => export::run(arguments, out),
        Command::Combine(arguments) => combine::run(arguments, out),
        Command::Extract(arguments) => extract::run(arguments, out),
        Command::Diff(arguments) => diff::run(arguments, out),
        Command::Verify(arguments) => verify::run(arguments, out),
        Command::Quantize(arguments) => quantize::run(arguments, out),
        Command::Inspect(arguments) => inspect::run(arguments, out),
        Command::Preview(arguments) => preview::run(arguments, out),
        Command::Validate(arguments) => validate::run(arguments, out),
        Command::Schema(arguments) => schema::run(arguments, out),
        Command::Logits(arguments) => logits::run(arguments),
        Command::Codes(arguments) => codes::run(arguments, out),
        Command::Doctor(arguments) => doctor::run(arguments, out),
    }
}
