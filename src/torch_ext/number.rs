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
    // Both ways spelled out rather than `half`'s, which call an instruction for each number and keep loops from being vectorised.
    #[inline(always)]
    fn wide(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let magnitude = (bits & 0x7fff) << 13;
        let normal = f32::from_bits(magnitude + (112 << 23));
        // The exponent of what is no number is the largest of fp32, too; without one the mantissa counts steps of 2^-24.
        let number = if magnitude >= 31 << 23 { f32::from_bits(magnitude + (224 << 23)) } else { normal };
        let small = (bits & 0x3ff) as i32 as f32 * f32::from_bits((127 - 24) << 23);
        let value = if magnitude < 1 << 23 { small } else { number };
        f32::from_bits(value.to_bits() | (bits & 0x8000) << 16)
    }
    #[inline(always)]
    fn rounded(value: f32) -> Self {
        let bits = value.to_bits();
        let magnitude = bits & 0x7fff_ffff;
        // Below 2^-14 numbers lie 2^-24 apart, as those of fp32 from 1/2 to 1 do: a sum rounds, and its last bits are the code.
        let small = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
        let normal = magnitude.wrapping_add(0xfff + ((magnitude >> 13) & 1)).wrapping_sub(112 << 23) >> 13;
        let finite = if magnitude < 113 << 23 { small } else { normal };
        let infinite = if magnitude > 255 << 23 { 0x7e00 | (magnitude >> 13 & 0x3ff) } else { 0x7c00 };
        // From 65520 on the nearest is infinity.
        let code = if magnitude >= 0x477f_f000 { infinite } else { finite };
        f16::from_bits((code | (bits >> 16 & 0x8000)) as u16)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_widened_and_rounded_as_the_type_itself_does() {
        for bits in 0..=u16::MAX {
            let half = f16::from_bits(bits);
            let (found, expected) = (half.wide(), half.to_f32());
            assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(), "{bits:x}: {found}");
            // The number itself, what lies halfway to its neighbours, and what is next to that.
            let halfway = f32::from_bits(expected.to_bits().wrapping_add(1 << 12));
            let smallest = (f32::from(bits & 0x7fff) + 0.5) * 2f32.powi(-24);
            for value in [expected, halfway, smallest].into_iter().flat_map(|x| [x.next_down(), x, x.next_up(), -x]) {
                let (found, expected) = (f16::rounded(value), f16::from_f32(value));
                assert!(
                    found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(),
                    "{value:e} is rounded to {found}, not {expected}"
                );
            }
        }
        for value in (0..=u32::MAX).step_by(9973).map(f32::from_bits) {
            let (found, expected) = (f16::rounded(value), f16::from_f32(value));
            assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(), "{value:e}");
        }
    }
}
