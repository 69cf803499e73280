//! A frozen weight, as it is kept and as a product reads it.

use tch::{Device, Kind, Tensor};

use super::{FourBit, Fp8, Grouped, Int8, Mxfp4};

/// A frozen weight (out, in), or that of all experts (E, out, in).
#[derive(Debug)]
pub enum Weight {
    /// Plain numbers in the type that products are computed in.
    Dense(Tensor),
    /// Fewer bits, made whole where a product reads it.
    Quantised(Quantised),
}

/// The forms a quantised weight is kept in.
#[derive(Debug)]
pub enum Quantised {
    /// Blocks of four-bit codes.
    FourBit(FourBit),
    /// Rows of eight-bit integers.
    Int8(Int8),
    /// Integers of two to eight bits in groups.
    Grouped(Grouped),
    /// Eight-bit floating-point numbers with scales.
    Fp8(Fp8),
    /// Four-bit floating-point numbers with exponents.
    Mxfp4(Mxfp4),
    /// Each expert's weight by itself.
    Experts(Vec<Quantised>),
}

impl Weight {
    /// Another handle to the same tensors.
    pub fn handle(&self) -> Self {
        match self {
            Self::Dense(weight) => Self::Dense(weight.shallow_clone()),
            Self::Quantised(weight) => Self::Quantised(weight.handle()),
        }
    }

    /// Its shape, (out, in) or (E, out, in).
    pub fn size(&self) -> Vec<i64> {
        match self {
            Self::Dense(weight) => weight.size(),
            Self::Quantised(weight) => weight.size(),
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

    /// `X W^T + added` (T, out) of X (T, in), where W is a matrix.
    pub fn product(&self, x: &Tensor, added: Option<Tensor>) -> Tensor {
        if let Some(weight) = self.multiplied() {
            let y = weight.product(x);
            return match added {
                Some(added) => y + added,
                None => y,
            };
        }
        let weight = self.dense().tr(); // (in, out)
        added.map_or_else(|| x.mm(&weight), |added| added.addmm(x, &weight))
    }

    /// `X W^T` (T, out) of X (T, in), added in place to `onto`.
    pub fn product_onto(&self, x: &Tensor, mut onto: Tensor) -> Tensor {
        match self.multiplied() {
            Some(weight) => onto.g_add_(&weight.product(x)),
            None => onto.addmm_(x, &self.dense().tr()),
        }
    }

    /// `X W^T` (T, out) of X (T, in), both in half precision, in the fp32 that products are summed in.
    pub fn wide_product(&self, x: &Tensor) -> Tensor {
        let weight = self.dense().tr(); // (in, out)
        match x.device() {
            Device::Cuda(_) => x.mm_dtype(&weight, Kind::Float),
            // Libtorch has no such product elsewhere.
            _ => x.to_kind(Kind::Float).mm(&weight.to_kind(Kind::Float)),
        }
    }

    /// `dY W` (T, in) of dY (T, out), added in place to what there is.
    pub fn product_back(&self, dy: &Tensor, onto: Option<Tensor>) -> Tensor {
        match (self.multiplied(), onto) {
            (Some(weight), None) => weight.product_back(dy),
            (Some(weight), Some(mut onto)) => onto.g_add_(&weight.product_back(dy)),
            (None, None) => dy.mm(&self.dense()),
            (None, Some(mut onto)) => onto.addmm_(dy, &self.dense()),
        }
    }

    /// Whether products read its codes themselves, and not the numbers they stand for.
    pub fn is_multiplied(&self) -> bool {
        self.multiplied().is_some()
    }

    /// The weight whose own codes products read.
    fn multiplied(&self) -> Option<&Fp8> {
        match self {
            Self::Quantised(Quantised::Fp8(weight)) if weight.multiplied => Some(weight),
            Self::Quantised(_) | Self::Dense(_) => None,
        }
    }

    /// [`Weight::dense`] of one expert: (out, in).
    pub fn expert(&self, number: i64) -> Tensor {
        match self {
            Self::Dense(weight) => weight.select(0, number),
            Self::Quantised(weight) => match weight {
                Quantised::Experts(experts) => experts[number as usize].dequantised(),
                // Of those only bitsandbytes' forms hold several experts in one.
                Quantised::FourBit(_)
                | Quantised::Int8(_)
                | Quantised::Grouped(_)
                | Quantised::Fp8(_)
                | Quantised::Mxfp4(_) => weight.dequantised().select(0, number),
            },
        }
    }
}

impl From<Tensor> for Weight {
    fn from(weight: Tensor) -> Self {
        Self::Dense(weight)
    }
}

impl From<Quantised> for Weight {
    fn from(quantised: Quantised) -> Self {
        Self::Quantised(quantised)
    }
}

impl Quantised {
    /// Another handle to the same tensors.
    fn handle(&self) -> Self {
        match self {
            Self::FourBit(weight) => Self::FourBit(weight.handle()),
            Self::Int8(weight) => Self::Int8(weight.handle()),
            Self::Grouped(weight) => Self::Grouped(weight.handle()),
            Self::Fp8(weight) => Self::Fp8(weight.handle()),
            Self::Mxfp4(weight) => Self::Mxfp4(weight.handle()),
            Self::Experts(experts) => Self::Experts(experts.iter().map(Self::handle).collect()),
        }
    }

    /// Its shape.
    pub fn size(&self) -> Vec<i64> {
        match self {
            Self::FourBit(weight) => weight.shape.clone(),
            Self::Int8(weight) => weight.shape.clone(),
            Self::Grouped(weight) => weight.size().to_vec(),
            Self::Fp8(weight) => weight.codes.size(),
            Self::Mxfp4(weight) => weight.size(),
            Self::Experts(experts) => {
                let own = experts.first().map(Self::size).unwrap_or_default();
                std::iter::once(experts.len() as i64).chain(own).collect()
            }
        }
    }

    /// The number type it is made whole in.
    pub fn kind(&self) -> Kind {
        match self {
            Self::FourBit(weight) => weight.kind,
            Self::Int8(weight) => weight.kind,
            Self::Grouped(weight) => weight.kind,
            Self::Fp8(weight) => weight.kind,
            Self::Mxfp4(weight) => weight.kind,
            Self::Experts(experts) => experts.first().map_or(Kind::Float, Self::kind),
        }
    }

    /// The numbers it stands for.
    pub fn dequantised(&self) -> Tensor {
        match self {
            Self::FourBit(weight) => weight.dequantised(),
            Self::Int8(weight) => weight.dequantised(),
            Self::Grouped(weight) => weight.dequantised(),
            Self::Fp8(weight) => weight.dequantised(),
            Self::Mxfp4(weight) => weight.dequantised(),
            Self::Experts(experts) => {
                let whole = Tensor::empty(self.size(), (self.kind(), self.device()));
                for (number, expert) in experts.iter().enumerate() {
                    whole.select(0, number as i64).copy_(&expert.dequantised());
                }
                whole
            }
        }
    }

    fn device(&self) -> Device {
        match self {
            Self::FourBit(weight) => weight.codes.device(),
            Self::Int8(weight) => weight.codes.device(),
            Self::Grouped(weight) => weight.codes.device(),
            Self::Fp8(weight) => weight.codes.device(),
            Self::Mxfp4(weight) => weight.codes.device(),
            Self::Experts(experts) => experts.first().map_or(Device::Cpu, Self::device),
        }
    }
}
