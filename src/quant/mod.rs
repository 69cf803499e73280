//! Weights in fewer bits: NF4, FP4, int8, fp8 and what other tools store; quantise, dequantise, and the forms in between.
//!
//! A frozen base is kept quantised and made whole, one weight at a time, where a product needs it; adapters on it train in fp32.
//! Stored forms are those of bitsandbytes 0.50.2 (QLoRA, arXiv:2305.14314; LLM.int8(), arXiv:2208.07339), bit for bit.

mod codebook;
pub mod dynamic;
pub mod four_bit;
pub mod int8;
mod scheme;
mod weight;

pub use codebook::FourBitType;
pub use four_bit::FourBit;
pub use int8::Int8;
pub use scheme::{Form, Scheme};
pub use weight::{Quantised, Weight};
