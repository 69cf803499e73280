//! The one decoder. A family is data ([`ModelSpec`], made in `families`); the forward reads only the spec.
//!
//! Legend of shape letters, used in every comment: T tokens of a micro-batch (all documents end to end,
//! no padding), L tokens of one document, S rows picked from T (or keys in sight), B sequences of a cache, D model width,
//! N heads, K key/value heads, G heads to a group, H head size, F hidden width of the feed-forward, E experts, C of them chosen,
//! V vocabulary, R rank. Of latent attention: Z width of the latent, U elements of a head that do not rotate, P those that do,
//! W elements of a value. Of several copies of the stream: M copies.

pub mod families;
pub mod names;
pub mod sites;
pub mod spec;

mod attention;
mod cache;
mod decoder;
mod embedding;
mod entries;
mod experts;
mod feed_forward;
mod fit;
mod generate;
mod layer;
mod layer_inputs;
mod linear;
mod load;
mod mask;
mod position;
mod recurrent;
mod router;
mod streams;

pub use crate::ops::Documents;
pub use cache::Cache;
pub use decoder::{Decoder, Forward, Thrift};
pub use embedding::{Embedding, grown};
pub use generate::{Continuation, Finish, Sampling};
pub use linear::{Linear, LowRank, Trained, Weight};
pub use router::Balance;
pub use spec::ModelSpec;
