//! The one decoder. A family is data ([`ModelSpec`], made in `families`); the forward reads only the spec.
//!
//! Legend of shape letters, used in every comment: T tokens of a micro-batch (all documents end to end,
//! no padding), B sequences of a cache, D model width, N heads, K key/value heads, H head size, F hidden
//! width of the feed-forward, E experts, V vocabulary, R rank, S supervised rows.

pub mod families;
pub mod spec;

mod decoder;
mod linear;

pub use decoder::{Decoder, Documents};
pub use linear::{Linear, LowRank, Weight};
pub use spec::ModelSpec;
