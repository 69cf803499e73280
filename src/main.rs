//! Parses the command line, dispatches, prints the error, and turns it into an exit code.

use std::any::Any;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;

use clap::Parser;
use engraft::cli::Cli;
use engraft::{Result, commands};

/// Where the last panic was.
static PLACE: Mutex<String> = Mutex::new(String::new());

fn main() -> ExitCode {
    let cli = Cli::parse();
    let (code, said) = ended(|| commands::run(&cli, &mut std::io::stdout()));
    // Where standard error is closed, the code still says it.
    let _ = std::io::stderr().write_all(said.as_bytes());
    ExitCode::from(code)
}

/// Runs a command: its exit code, and what to say on standard error. A panic is a bug and ends with code 1.
///
/// Nothing is printed where a panic happens: some are caught on the way and become errors of their own.
fn ended(run: impl FnOnce() -> Result<()>) -> (u8, String) {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        *PLACE.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = place;
    }));
    let result = catch_unwind(AssertUnwindSafe(run));
    drop(std::panic::take_hook());
    match result {
        Ok(Ok(())) => (0, String::new()),
        Ok(Err(error)) => (error.exit_code(), error.screen()),
        Err(panic) => (1, bug(&*panic)),
    }
}

fn bug(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    // libtorch adds its own stack, with line breaks spelled out where an error is shown for a programmer.
    let text = text.unwrap_or("a panic without words").split(['\n', '\r']).next().unwrap_or_default();
    let text = text.split("\\n").next().unwrap_or_default();
    let place = PLACE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    format!("error: this is a bug in engraft {}, please report it: {text} ({place})\n", env!("CARGO_PKG_VERSION"))
}

#[cfg(test)]
mod tests {
    use engraft::{Error, Fault};

    use super::*;

    #[test]
    fn a_panic_is_one_line_that_asks_for_a_report_and_ends_with_1() {
        let (code, said) = ended(|| panic!("nothing is {}\nat all", "there"));
        assert_eq!(code, 1);
        assert!(said.contains("bug") && said.contains("please report it: nothing is there (src/main.rs:"), "{said}");
        assert_eq!(said.lines().count(), 1);
        // A thread's panic, handed on by the one that waits for it.
        let (code, said) = ended(|| {
            let thread = std::thread::spawn(|| -> Result<()> { panic!("in a thread") });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        assert!(code == 1 && said.contains("in a thread (src/main.rs:"), "{said}");
    }

    #[test]
    fn an_error_keeps_its_code() {
        assert_eq!(ended(|| Ok(())), (0, String::new()));
        let (code, said) = ended(|| Err(Error::Output(Fault::new("place", "what"))));
        assert_eq!((code, said.as_str()), (6, "error: place: what\n"));
    }
}
