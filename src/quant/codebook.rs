//! The sixteen numbers that four bits stand for.

use std::fmt;

/// A four-bit number type of bitsandbytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FourBitType {
    /// Sixteen quantiles of a normal distribution (arXiv:2305.14314, appendix E).
    Nf4,
    /// One sign bit, two bits of exponent, one of mantissa, divided by the largest.
    Fp4,
}

impl FourBitType {
    /// What each code stands for, as fractions of a block's largest magnitude.
    pub const fn values(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &NF4,
            Self::Fp4 => &FP4,
        }
    }

    /// How `x` becomes a code: the sum of the steps whose bound lies below `x`, added to the first code.
    pub(super) const fn ladder(self) -> &'static Ladder {
        match self {
            Self::Nf4 => &NF4_LADDER,
            Self::Fp4 => &FP4_LADDER,
        }
    }
}

impl fmt::Display for FourBitType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        })
    }
}

/// Codes by rising value, as bounds (the midpoints in fp32 between neighbours) and the step from each code to the next.
pub(super) struct Ladder {
    pub first: u8,
    pub bounds: [f32; 15],
    pub steps: [i32; 15],
}

impl Ladder {
    /// The codes by rising value.
    pub fn order(&self) -> Vec<i64> {
        let rising = self.steps.iter().scan(i64::from(self.first), |code, step| {
            *code += i64::from(*step);
            Some(*code)
        });
        std::iter::once(i64::from(self.first)).chain(rising).collect()
    }

    const fn new(values: &[f32; 16], order: [u8; 16]) -> Self {
        let mut ladder = Self { first: order[0], bounds: [0.0; 15], steps: [0; 15] };
        let mut i = 0;
        while i < 15 {
            ladder.bounds[i] = (values[order[i] as usize] + values[order[i + 1] as usize]) / 2.0;
            ladder.steps[i] = order[i + 1] as i32 - order[i] as i32;
            i += 1;
        }
        ladder
    }
}

const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

const FP4: [f32; 16] = [
    0.0,
    0.0625 / 12.0,
    8.0 / 12.0,
    1.0,
    4.0 / 12.0,
    6.0 / 12.0,
    2.0 / 12.0,
    3.0 / 12.0,
    0.0,
    -0.0625 / 12.0,
    -8.0 / 12.0,
    -1.0,
    -4.0 / 12.0,
    -6.0 / 12.0,
    -2.0 / 12.0,
    -3.0 / 12.0,
];

static NF4_LADDER: Ladder = Ladder::new(&NF4, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
// Two codes stand for zero: what is not above it gets the first.
static FP4_LADDER: Ladder = Ladder::new(&FP4, [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3]);
