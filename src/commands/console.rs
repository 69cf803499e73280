//! What a person sees while something slow is under way: a bar on a terminal, a line elsewhere, nothing when it is quick.

use std::cell::Cell;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::error::printable;

/// Quicker than this is not worth a word.
const WORTH_SHOWING: Duration = Duration::from_millis(800);

/// Standard error, unless told to be quiet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Console {
    quiet: bool,
}

/// Something slow under way; gone from the terminal when dropped.
pub(super) struct Stage {
    what: String,
    began: Instant,
    bar: Option<ProgressBar>,
    quiet: bool,
    said: Cell<bool>,
}

impl Console {
    pub(super) fn new(quiet: bool) -> Self {
        Self { quiet }
    }

    /// A line for a person, whatever files say in it.
    pub(super) fn say(&self, line: impl std::fmt::Display) {
        if !self.quiet {
            // A closed standard error is no reason to stop.
            let _ = writeln!(std::io::stderr(), "{}", printable(&line.to_string()));
        }
    }

    /// Begins something that counts in `unit`: bytes, rows, answers.
    pub(super) fn stage(&self, what: &str, unit: Unit) -> Stage {
        let bar = (!self.quiet && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr_with_hz(8));
            let count = match unit {
                Unit::Bytes => "{bytes} of {total_bytes}",
                Unit::Things(_) => "{pos} of {len}",
            };
            let template = format!("{what:<24} {{bar:28}} {count}{unit}  {{eta}} left");
            bar.set_style(ProgressStyle::with_template(&template).expect("the template names only known fields"));
            bar
        });
        Stage { what: what.into(), began: Instant::now(), bar, quiet: self.quiet, said: Cell::new(false) }
    }
}

/// What a stage counts.
#[derive(Debug, Clone, Copy)]
pub(super) enum Unit {
    Bytes,
    Things(&'static str),
}

impl std::fmt::Display for Unit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Unit::Bytes => Ok(()),
            Unit::Things(name) => write!(f, " {name}"),
        }
    }
}

impl Stage {
    /// How far it is.
    pub(super) fn at(&self, done: u64, total: u64) {
        if self.began.elapsed() < WORTH_SHOWING {
            return;
        }
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
        } else if !self.quiet && !self.said.replace(true) {
            let _ = writeln!(std::io::stderr(), "{} ...", self.what);
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
