//! Stored numbers, as arithmetic in fp32 sees them.

use half::{bf16, f16};

use super::Element;

/// A stored number: widened to fp32 for arithmetic, rounded to nearest even when stored.
pub trait Number: Element {
    /// Its value.
    fn wide(self) -> f32;
    /// The nearest number to `value`.
    fn rounded(value: f32) -> Self;
}

impl Number for f32 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }
    #[inline(always)]
    fn rounded(value: f32) -> Self {
        value
    }
}

impl Number for bf16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    // Spelled out rather than `bf16::from_f32`, whose branch for NaN keeps the loop from being vectorised.
    #[inline(always)]
    fn rounded(value: f32) -> Self {
        let bits = value.to_bits();
        let nearest = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        bf16::from_bits(if value.is_nan() { quiet } else { nearest } as u16)
    }
}

impl Number for f16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn rounded(value: f32) -> Self {
        f16::from_f32(value)
    }
}

/// A register of AVX-512 as the numbers in it, first to last.
#[cfg(target_arch = "x86_64")]
pub trait Lanes<Numbers> {
    /// Those numbers.
    fn numbers(self) -> Numbers;
}

#[cfg(target_arch = "x86_64")]
mod lanes {
    use std::arch::x86_64::{__m512, __m512i};
    use std::mem::transmute;

    use super::{Lanes, bf16, f16};

    macro_rules! lanes {
        ($register:ty, $numbers:ty) => {
            impl Lanes<$numbers> for $register {
                #[inline(always)]
                fn numbers(self) -> $numbers {
                    // SAFETY: plain numbers on both sides, in as many bytes, and every pattern of bits is a number.
                    unsafe { transmute(self) }
                }
            }
        };
    }

    lanes!(__m512i, [bf16; 32]);
    lanes!(__m512i, [f16; 32]);
    lanes!([__m512; 2], [f32; 32]);
}
