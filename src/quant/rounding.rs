//! What a product of code and scale is rounded to before it becomes the number type that is asked for: that of the scale, where the
//! tool that defines the format multiplies in it.

use tch::{Kind, Tensor};

/// A number type to round to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// None: the product of fp32 numbers.
    None,
    /// To fp16.
    Half,
    /// To bf16.
    BFloat16,
}

impl Rounding {
    pub(super) const NONE: u8 = 0;
    pub(super) const HALF: u8 = 1;
    pub(super) const BFLOAT16: u8 = 2;

    /// That of products in a number type.
    pub fn to(kind: Kind) -> Self {
        match kind {
            Kind::Half => Self::Half,
            Kind::BFloat16 => Self::BFloat16,
            _ => Self::None,
        }
    }

    /// The number type; nothing where there is none to round to.
    pub(super) fn kind(self) -> Option<Kind> {
        match self {
            Self::None => None,
            Self::Half => Some(Kind::Half),
            Self::BFloat16 => Some(Kind::BFloat16),
        }
    }

    /// fp32 numbers rounded so, as fp32.
    pub(super) fn apply(self, numbers: Tensor) -> Tensor {
        match self.kind() {
            Some(kind) => numbers.to_kind(kind).to_kind(Kind::Float),
            None => numbers,
        }
    }
}

/// The nearest number of [`Rounding`] number `TO`, ties to even; without branches, so that loops around it are vectorised.
#[inline(always)]
pub(super) fn round<const TO: u8>(x: f32) -> f32 {
    let bits = x.to_bits();
    match TO {
        Rounding::HALF => {
            // Below 2^-14 numbers lie 2^-24 apart, as fp32 numbers from 1/2 to 1 do.
            let small = ((x.abs() + 0.75) - 0.75).copysign(x);
            let nearest = f32::from_bits(bits.wrapping_add(0xfff + ((bits >> 13) & 1)) & !0x1fff);
            let normal = if nearest.abs() >= 65_536.0 { f32::INFINITY.copysign(x) } else { nearest };
            if x.abs() < 6.103_515_6e-5 { small } else { normal }
        }
        Rounding::BFLOAT16 => f32::from_bits(bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & !0xffff),
        _ => x,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_libtorchs() {
        let mut numbers: Vec<f32> = (0..400_000u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9))).collect();
        numbers.extend((0..4096).map(|i| (i as f32 - 2048.0) * 2f32.powi(-25)));
        numbers.extend([
            0.0,
            -0.0,
            65_504.0,
            65_519.0,
            65_520.0,
            -65_520.0,
            1e30,
            6.103_515_6e-5,
            6.1e-5,
            2.98e-8,
            2.99e-8,
        ]);
        numbers.retain(|x| x.is_finite());
        let wide = Tensor::from_slice(&numbers);
        let same = |found: Vec<f32>, rounding: Rounding| {
            let expected = Vec::<f32>::try_from(rounding.apply(wide.shallow_clone())).unwrap();
            for ((x, found), expected) in numbers.iter().zip(found).zip(expected) {
                assert_eq!(found.to_bits(), expected.to_bits(), "{x:e} is rounded to {found:e}, not {expected:e}");
            }
        };
        same(numbers.iter().map(|x| round::<{ Rounding::HALF }>(*x)).collect(), Rounding::Half);
        same(numbers.iter().map(|x| round::<{ Rounding::BFLOAT16 }>(*x)).collect(), Rounding::BFloat16);
    }
}
