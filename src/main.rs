//! Parses the command line, dispatches, prints the error chain, and turns it into an exit code.

fn main() {}
