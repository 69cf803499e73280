//! The slow twins of kernels, in libtorch's own operations: what kernels are compared with, in their numbers and in their speed.

use tch::{Kind, Tensor};

use super::{Form, FourBit, Fp8, Int8, Quantised};

impl Form {
    /// A weight (out, in) quantised without a kernel; `None` for what another tool made.
    pub fn quantised_plainly(self, weight: &Tensor) -> Option<Quantised> {
        match self {
            Self::FourBit { code, block, double_quant } => {
                Some(Quantised::FourBit(FourBit::of_plainly(weight, code, block, double_quant)))
            }
            Self::Int8 => Some(Quantised::Int8(Int8::of_plainly(weight))),
            Self::Fp8 => Some(Quantised::Fp8(Fp8::of_plainly(weight))),
            Self::Stored(_) => None,
        }
    }
}

impl Quantised {
    /// What a weight of a form that is made here stands for, made whole without a kernel; another form's with one.
    pub fn dequantised_plainly(&self) -> Tensor {
        match self {
            Self::FourBit(weight) => weight.dequantised_plainly(),
            Self::Int8(weight) => weight.dequantised_plainly(),
            Self::Fp8(weight) => weight.dequantised_plainly(),
            Self::Grouped(_) | Self::Mxfp4(_) | Self::Experts(_) => self.dequantised(),
        }
    }

    /// The same codes and scales as those of a weight of numbers in `kind`, which it is made whole in.
    pub fn of_kind(mut self, kind: Kind) -> Self {
        match &mut self {
            Self::FourBit(weight) => (weight.stored, weight.kind) = (kind, kind),
            Self::Int8(weight) => weight.kind = kind,
            Self::Grouped(weight) => weight.kind = kind,
            Self::Fp8(weight) => weight.kind = kind,
            Self::Mxfp4(weight) => weight.kind = kind,
            Self::Experts(experts) => *experts = experts.drain(..).map(|expert| expert.of_kind(kind)).collect(),
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::quant::{FourBitType, Products, Scheme};

    #[test]
    fn a_weight_made_without_kernels_is_that_which_they_make() {
        tch::manual_seed(41);
        let weight = Tensor::randn([33, 128], (Kind::BFloat16, Device::Cpu));
        let four = |code, double_quant| Form::FourBit { code, block: 64, double_quant };
        for form in [four(FourBitType::Nf4, true), four(FourBitType::Fp4, false), Form::Int8, Form::Fp8] {
            let (kind, products, skip) = (Kind::BFloat16, Products::Dequantised, Vec::new());
            let made = Scheme { form, kind, skip, products, after_start: false }.quantised(&weight);
            let plain = form.quantised_plainly(&weight).unwrap();
            assert_eq!(made.digest(), plain.digest(), "{form}");
            assert_eq!(made.dequantised(), plain.dequantised_plainly(), "{form}");
            assert_eq!(made.of_kind(Kind::Float).kind(), Kind::Float);
        }
    }
}
