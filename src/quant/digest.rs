//! Fingerprints of quantised weights: whether what was made here is what was made elsewhere.

use std::fmt;
use std::str::FromStr;

use rayon::prelude::*;
use sha2::{Digest as _, Sha256};
use tch::{Device, Kind, Tensor};

use super::four_bit::Absmax;
use super::{FourBit, Fp8, Grouped, Int8, Mxfp4, Quantised};
use crate::torch_ext::elements;

/// Bytes that one thread hashes at a time.
const PIECE: usize = 1 << 20;

/// A fingerprint of a weight's codes and scales: two are equal where these are, bit for bit, whatever device they are on and whatever
/// number type they are made whole in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Digest([u8; 16]);

impl Digest {
    /// What the weight of one expert adds to that of all: those of all experts, in any order, give the digest of their weights together.
    pub fn of_expert(self, number: i64) -> Self {
        Self::of_bytes(&[&number.to_le_bytes(), &self.0])
    }

    /// With what another expert adds.
    pub fn with(self, other: Self) -> Self {
        let mut both = self.0;
        both.iter_mut().zip(other.0).for_each(|(byte, other)| *byte ^= other);
        Self(both)
    }

    fn of_bytes(parts: &[&[u8]]) -> Self {
        let mut hash = Sha256::new();
        parts.iter().for_each(|part| hash.update(part));
        let mut first = [0; 16];
        first.copy_from_slice(&hash.finalize()[..16]);
        Self(first)
    }

    /// Of what is said in words, and of tensors.
    fn of(said: &str, tensors: &[&Tensor]) -> Self {
        let tensors: Vec<Self> = tensors.iter().map(|tensor| Self::of_tensor(tensor)).collect();
        let tensors = tensors.iter().map(|digest| &digest.0[..]);
        Self::of_bytes(&[said.as_bytes()].into_iter().chain(tensors).collect::<Vec<_>>())
    }

    fn of_tensor(tensor: &Tensor) -> Self {
        let said = format!("{:?} {:?}", tensor.kind(), tensor.size());
        let bytes = tensor.to_device(Device::Cpu).contiguous().view([-1]).view_dtype(Kind::Uint8);
        let pieces: Vec<Self> =
            elements::<u8>(&bytes).par_chunks(PIECE).map(|piece| Self::of_bytes(&[piece])).collect();
        let pieces = pieces.iter().map(|piece| &piece.0[..]);
        Self::of_bytes(&[said.as_bytes()].into_iter().chain(pieces).collect::<Vec<_>>())
    }
}

impl Quantised {
    /// Its fingerprint.
    pub fn digest(&self) -> Digest {
        match self {
            Self::FourBit(FourBit { code, block, shape, codes, absmax, .. }) => {
                let said = format!("{code} {block} {shape:?}");
                match absmax {
                    Absmax::Plain(absmax) => Digest::of(&said, &[codes, absmax]),
                    Absmax::Nested { codes: scales, absmax, offset, map } => {
                        Digest::of(&format!("{said} {:08x}", offset.to_bits()), &[codes, scales, absmax, map])
                    }
                }
            }
            Self::Int8(Int8 { shape, codes, absmax, .. }) => Digest::of(&format!("int8 {shape:?}"), &[codes, absmax]),
            Self::Grouped(Grouped { columns, bits, group, codes, scales, zeros, order, .. }) => {
                let said = format!("groups {columns} {bits} {group} {} {}", zeros.is_some(), order.is_some());
                let parts = [codes, scales].into_iter().chain(zeros).chain(order);
                Digest::of(&said, &parts.collect::<Vec<_>>())
            }
            Self::Fp8(Fp8 { rounding, codes, scales, block, .. }) => {
                Digest::of(&format!("fp8 {block:?} {rounding:?}"), &[codes, scales])
            }
            Self::Mxfp4(Mxfp4 { codes, exponents, .. }) => Digest::of("mxfp4", &[codes, exponents]),
            Self::Experts(experts) => {
                let each = (0..).zip(experts).map(|(number, expert)| expert.digest().of_expert(number));
                each.fold(Digest::default(), Digest::with)
            }
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Digest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no fingerprint, which is 32 hexadecimal digits");
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        u128::from_str_radix(text, 16).map(|number| Self(number.to_be_bytes())).map_err(|_| wrong())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{Form, FourBitType, Products, Scheme};

    #[test]
    fn a_digest_is_of_codes_and_scales_and_is_written_and_read() {
        tch::manual_seed(31);
        let weight = Tensor::randn([96, 128], (Kind::Float, Device::Cpu));
        let of = |form, weight: &Tensor| {
            let (kind, products, skip) = (Kind::Float, Products::Dequantised, Vec::new());
            Scheme { form, kind, skip, products, after_start: false }.quantised(weight).digest()
        };
        let four = |code, block, double_quant| Form::FourBit { code, block, double_quant };
        let forms = [
            four(FourBitType::Nf4, 64, true),
            four(FourBitType::Nf4, 64, false),
            four(FourBitType::Nf4, 128, true),
            four(FourBitType::Fp4, 64, true),
            Form::Int8,
            Form::Fp8,
        ];
        let digests = forms.map(|form| of(form, &weight));
        for (at, (form, digest)) in forms.into_iter().zip(digests).enumerate() {
            assert_eq!(of(form, &weight.copy()), digest, "{form}");
            assert!(!digests[..at].contains(&digest), "{form}");
            let other = weight.copy();
            let _ = other.narrow(0, 95, 1).g_mul_scalar_(1.5);
            assert_ne!(of(form, &other), digest, "{form}");
            assert_eq!(digest.to_string().parse(), Ok(digest));
        }
        assert!("0".parse::<Digest>().is_err() && "+".repeat(32).parse::<Digest>().is_err());
    }

    /// What is read expert by expert has the digest of all together, in any order, but not with two of them exchanged.
    #[test]
    fn digests_of_experts_add_up() {
        let experts = Tensor::randn([3, 8, 64], (Kind::Float, Device::Cpu));
        let scheme = Scheme {
            form: Form::Int8,
            kind: Kind::Float,
            skip: Vec::new(),
            products: Products::Dequantised,
            after_start: false,
        };
        let of = |number: i64, place: i64| scheme.quantised(&experts.select(0, number)).digest().of_expert(place);
        let together = scheme.quantised(&experts).digest();
        assert_eq!([2, 0, 1].map(|n| of(n, n)).into_iter().fold(Digest::default(), Digest::with), together);
        assert_ne!(of(0, 1).with(of(1, 0)).with(of(2, 2)), together);
    }
}
