//! The command line: clap structs only.
