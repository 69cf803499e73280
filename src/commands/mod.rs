//! One verb per file: straight lines, no logic of their own.
