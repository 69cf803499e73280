//! A frozen weight, as it is kept and as a product reads it.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use super::{FourBit, Int8};

/// A frozen weight (out, in), or that of all experts (E, out, in).
#[derive(Debug)]
pub enum Weight {
    /// Plain numbers in the type that products are computed in.
    Dense(Tensor),
    /// Fewer bits, made whole where a product reads it.
    Quantised(Arc<Quantised>),
}

/// The forms a quantised weight is kept in.
#[derive(Debug)]
pub enum Quantised {
    /// Blocks of four-bit codes.
    FourBit(FourBit),
    /// Rows of eight-bit integers.
    Int8(Int8),
}

impl Weight {
    /// Another handle to the same tensors.
    pub fn handle(&self) -> Self {
        match self {
            Self::Dense(weight) => Self::Dense(weight.shallow_clone()),
            Self::Quantised(weight) => Self::Quantised(Arc::clone(weight)),
        }
    }

    /// Its shape, (out, in) or (E, out, in).
    pub fn size(&self) -> Vec<i64> {
        match self {
            Self::Dense(weight) => weight.size(),
            Self::Quantised(weight) => weight.size().to_vec(),
        }
    }

    /// The number type of products with it.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Dense(weight) => weight.kind(),
            Self::Quantised(weight) => weight.kind(),
        }
    }

    /// Where it lies.
    pub fn device(&self) -> Device {
        match self {
            Self::Dense(weight) => weight.device(),
            Self::Quantised(weight) => weight.device(),
        }
    }

    /// Its numbers, in the type of [`Weight::kind`]: the tensor itself, or one that is made now and is the caller's to drop.
    pub fn dense(&self) -> Tensor {
        match self {
            Self::Dense(weight) => weight.shallow_clone(),
            Self::Quantised(weight) => weight.dequantised(),
        }
    }

    /// Bytes it occupies.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Dense(weight) => bytes(weight),
            Self::Quantised(weight) => weight.bytes(),
        }
    }
}

impl From<Quantised> for Weight {
    fn from(quantised: Quantised) -> Self {
        Self::Quantised(Arc::new(quantised))
    }
}

impl Quantised {
    /// Its shape.
    pub fn size(&self) -> &[i64] {
        match self {
            Self::FourBit(weight) => &weight.shape,
            Self::Int8(weight) => &weight.shape,
        }
    }

    /// The number type it is made whole in.
    pub fn kind(&self) -> Kind {
        match self {
            Self::FourBit(weight) => weight.kind,
            Self::Int8(weight) => weight.kind,
        }
    }

    /// The numbers it stands for.
    pub fn dequantised(&self) -> Tensor {
        match self {
            Self::FourBit(weight) => weight.dequantised(),
            Self::Int8(weight) => weight.dequantised(),
        }
    }

    fn device(&self) -> Device {
        match self {
            Self::FourBit(weight) => weight.codes.device(),
            Self::Int8(weight) => weight.codes.device(),
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::FourBit(weight) => weight.bytes(),
            Self::Int8(weight) => bytes(&weight.codes) + bytes(&weight.absmax),
        }
    }
}

/// Bytes of a tensor's elements.
pub(super) fn bytes(tensor: &Tensor) -> u64 {
    tensor.numel() as u64 * tensor.kind().elt_size_in_bytes() as u64
}
