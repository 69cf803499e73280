//! engraft grafts low-rank adapters onto open language models.
//!
//! The rooms of the house, in the order a run walks through them:
//! [`recipe`] (what was typed, then what it means), [`weights`] and [`model`] (the base),
//! [`data`] (parquet to batches), [`adapter`] (who gets one), [`objective`] and [`train`]
//! (steps, state, metrics), [`export`] (what is written). [`ops`], [`quant`] and [`torch_ext`]
//! are the engine room; [`commands`] holds one verb per file.
#![deny(missing_docs)]

pub mod adapter;
pub mod cli;
pub mod commands;
pub mod data;
pub mod error;
pub mod evaluate;
pub mod export;
pub mod model;
pub mod objective;
pub mod ops;
pub mod quant;
pub mod recipe;
pub mod torch_ext;
pub mod train;
pub mod weights;

pub use error::{Error, Fault, Result};

/// Serves libtorch and oneDNN as well, whose `malloc` it takes the place of.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
