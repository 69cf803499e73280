//! One verb per file: straight lines, no logic of their own.

pub mod schema;
pub mod validate;
