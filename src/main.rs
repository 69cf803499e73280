//! Parses the command line, dispatches, prints the error, and turns it into an exit code.

use std::process::ExitCode;

use clap::Parser;
use engraft::cli::Cli;
use engraft::commands;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match commands::run(&cli, &mut std::io::stdout()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            for line in error.to_string().lines() {
                eprintln!("{}{line}", if line.starts_with("  help:") { "" } else { "error: " });
            }
            ExitCode::from(error.exit_code())
        }
    }
}
