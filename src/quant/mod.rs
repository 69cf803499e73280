//! Weights in fewer bits: NF4, FP4, int8, fp8 and what other tools store; quantise, dequantise, and the forms in between.
//!
//! A frozen base is kept quantised and made whole, one weight at a time, where a product needs it; adapters on it train in fp32.
//! Forms that are made here are those of bitsandbytes 0.50.2 (QLoRA, arXiv:2305.14314; LLM.int8(), arXiv:2208.07339), bit for bit,
//! and rows of fp8 numbers; those that other tools make ([`Layout`]) are kept as they were stored.

mod codebook;
mod digest;
pub mod dynamic;
pub mod four_bit;
pub mod fp8;
pub mod grouped;
pub mod int8;
pub mod mxfp4;
mod nibbles;
mod rounding;
mod scheme;
mod twin;
mod weight;

pub use codebook::FourBitType;
pub use digest::Digest;
pub use four_bit::FourBit;
pub use fp8::Fp8;
pub use grouped::Grouped;
pub use int8::Int8;
pub use mxfp4::Mxfp4;
pub use rounding::Rounding;
pub use scheme::{Form, Layout, Products, Scheme, ends_in, name_of};
pub use weight::{Quantised, Weight};
