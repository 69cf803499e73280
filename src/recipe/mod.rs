//! The recipe: what was typed ([`Recipe`]), read strictly, then what it means ([`Plan`]).

mod plan;
mod schema;

pub use plan::{BaseSource, DataSource, Plan};
pub use schema::*;
