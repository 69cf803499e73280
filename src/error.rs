//! One error type. Each variant is a room's failure and has a stable exit code; each fault names the
//! place, what is wrong (with both values) and the way out.

use std::fmt;
use std::path::Path;

/// The library's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Where something is wrong, what is wrong there, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// File, line, row, tensor or key: the place a person would look at.
    pub place: String,
    /// What is wrong, with the value found and the value expected.
    pub what: String,
    /// The way out; empty where there is none to offer.
    pub hint: String,
}

impl Fault {
    /// A fault at `place`; add the way out with [`Fault::hint`].
    pub fn new(place: impl fmt::Display, what: impl fmt::Display) -> Self {
        Self { place: place.to_string(), what: what.to_string(), hint: String::new() }
    }

    /// A fault in the file or folder `path`.
    pub fn at(path: &Path, what: impl fmt::Display) -> Self {
        Self::new(path.display(), what)
    }

    /// Says the way out.
    #[must_use]
    pub fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.hint = hint.to_string();
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (place, what, hint) = (one_line(&self.place), printable(&self.what), printable(&self.hint));
        if place.is_empty() {
            write!(f, "{what}")?;
        } else {
            write!(f, "{place}: {what}")?;
        }
        if !hint.is_empty() {
            write!(f, "\n  help: {hint}")?;
        }
        Ok(())
    }
}

/// Longest line shown, in characters: names in files may have any length, and a list of all columns should fit.
const LONGEST_LINE: usize = 2000;

/// `text` as a terminal may be given it: control characters, which files and servers may put into what is quoted here, are
/// shown and not obeyed; what is long is cut. Line ends stay, for lists.
pub(crate) fn printable(text: &str) -> String {
    let steers = |c: char| c.is_control() || is_invisible(c);
    let line = |line: &str| {
        let mut shown = String::with_capacity(line.len());
        for (index, c) in line.chars().enumerate() {
            if index == LONGEST_LINE {
                shown += "...";
                break;
            }
            if steers(c) { shown.extend(c.escape_default()) } else { shown.push(c) }
        }
        shown
    };
    text.split('\n').map(line).collect::<Vec<_>>().join("\n")
}

/// [`printable`] without line ends: what comes from a file can then not look like a message of its own.
pub(crate) fn one_line(text: &str) -> String {
    printable(&text.replace('\n', "\\n"))
}

/// Characters that turn the direction of the text around them.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200E}' | '\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}')
}

/// Everything that can end a command early.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The recipe (or an override) is wrong; all its problems at once.
    #[error("{}", list(.0))]
    Recipe(Vec<Fault>),
    /// The dataset or its template cannot be trained on as it is.
    #[error("{0}")]
    Data(Fault),
    /// The base model, its config, its tokenizer or an adapter's files are damaged or not supported.
    #[error("{0}")]
    Model(Fault),
    /// Something could not be written, or the output folder is in use.
    #[error("{0}")]
    Output(Fault),
    /// A saved state is damaged, or belongs to another recipe, dataset or base.
    #[error("{0}")]
    State(Fault),
    /// The device is missing, refused or out of memory.
    #[error("{0}")]
    Device(Fault),
    /// The loss or a gradient stopped being finite too often.
    #[error("{0}")]
    Diverged(Fault),
    /// A quality gate (`--fail-under`) was missed.
    #[error("{0}")]
    Gate(Fault),
    /// A hub or server could not be reached or refused.
    #[error("{0}")]
    Network(Fault),
    /// What was compared, exported, served or signed is not what it should be, or cannot be told to be.
    #[error("{0}")]
    Mismatch(Fault),
    /// A signal asked the run to stop; its state is saved and `--resume` continues it.
    #[error("{0}")]
    Interrupted(Fault),
}

impl Error {
    /// What is wrong: one fault, or all those of a recipe.
    pub fn faults(&self) -> &[Fault] {
        match self {
            Error::Recipe(faults) => faults,
            Error::Data(fault)
            | Error::Model(fault)
            | Error::Output(fault)
            | Error::State(fault)
            | Error::Device(fault)
            | Error::Diverged(fault)
            | Error::Gate(fault)
            | Error::Network(fault)
            | Error::Mismatch(fault)
            | Error::Interrupted(fault) => std::slice::from_ref(fault),
        }
    }

    /// The error as a terminal shows it: each fault begins with `error: `, its further lines are indented.
    pub fn screen(&self) -> String {
        let indented = |line: &str| if line.starts_with(' ') { format!("{line}\n") } else { format!("  {line}\n") };
        let shown = |fault: &Fault| {
            let text = fault.to_string();
            let mut lines = text.lines();
            format!("error: {}\n", lines.next().unwrap_or_default()) + &lines.map(indented).collect::<String>()
        };
        self.faults().iter().map(shown).collect()
    }

    /// The process exit code of this error. Stable: documented in the README, relied on by CI.
    ///
    /// 1 is a bug or an uncaught failure, 2 is wrong usage of the command line (clap's own).
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Recipe(_) => 3,
            Error::Data(_) => 4,
            Error::Model(_) => 5,
            Error::Output(_) => 6,
            Error::State(_) => 7,
            Error::Device(_) => 8,
            Error::Diverged(_) => 9,
            Error::Gate(_) => 10,
            Error::Network(_) => 11,
            Error::Mismatch(_) => 12,
            // EX_TEMPFAIL of sysexits.h: run it again (with --resume).
            Error::Interrupted(_) => 75,
        }
    }
}

fn list(faults: &[Fault]) -> String {
    faults.iter().map(Fault::to_string).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_files_say_does_not_steer_the_terminal() {
        let fault = Fault::new("x.gguf: blk.0.\x1b[2Jfoo\nerror: bar", "\x1b[31mred\u{202E}\r\na list").hint("\x07");
        let shown = r"x.gguf: blk.0.\u{1b}[2Jfoo\nerror: bar: \u{1b}[31mred\u{202e}\r";
        assert_eq!(fault.to_string(), format!("{shown}\na list\n  help: \\u{{7}}"));
        let long = Fault::new("ü".repeat(5000), "what").to_string();
        assert_eq!(long, format!("{}...: what", "ü".repeat(LONGEST_LINE)));
    }

    #[test]
    fn a_fault_of_many_lines_is_one_error() {
        let error = Error::State(Fault::new("state", "is none of:\nthis\n  that").hint("keep\nor remove it"));
        assert_eq!(error.screen(), "error: state: is none of:\n  this\n  that\n  help: keep\n  or remove it\n");
        let two = Error::Recipe(vec![Fault::new("a", "b"), Fault::new("", "c").hint("d")]);
        assert_eq!(two.screen(), "error: a: b\nerror: c\n  help: d\n");
    }
}
