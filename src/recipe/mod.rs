//! The recipe: what was typed ([`Recipe`]), read strictly, then what it means ([`Plan`]).
//!
//! ```text
//! file ──> text ──> tree with places ──> overrides ──> JSON Schema, then rules ──> Recipe ──> Plan
//! ```
//!
//! Each arrow collects all the problems it can see before it gives up, each with its line.

mod base;
mod cache;
mod check;
mod difference;
mod exports;
mod file;
mod foreign;
mod overrides;
mod paths;
mod plan;
mod read;
mod reference;
mod rules;
mod schema;
mod sources;
mod tree;

pub use base::BaseSource;
pub use cache::cache_dir;
pub use exports::{ExportChoice, ExportRecipe, FileType, Target};
pub use plan::Plan;
pub use read::RecipeFile;
pub use reference::{json_schema, markdown};
pub use schema::*;
pub use sources::DataSource;
