//! The block formats of ggml: what each block holds, and the straight-line loops that turn blocks into numbers.
//!
//! Layouts and roundings are those of `ggml-quants.c` (<https://github.com/ggml-org/ggml>): multiplications and additions happen in
//! the same order and are never fused, so the numbers equal the reference's bit for bit.

use half::{bf16, f16};
use tch::Kind;

use super::encode::{self, Quantise};
use crate::weights::storage::Dtype;

/// Turns whole blocks into their numbers.
pub(crate) type Dequantise = fn(&[u8], &mut [f32]);

/// A number format of GGUF tensors.
#[derive(Debug)]
pub(crate) struct Quantisation {
    /// Its number in a GGUF file.
    pub id: u32,
    /// Its usual name.
    pub name: &'static str,
    /// Numbers per block.
    pub values: usize,
    /// Bytes per block.
    pub bytes: usize,
    /// The way to its numbers; `None` for formats that are known but not supported.
    pub dequantise: Option<Dequantise>,
    /// The way from numbers; `None` for formats that are not written.
    pub quantise: Option<Quantise>,
    /// Where a block has its half-precision scales, which large numbers make infinite.
    pub scales: &'static [usize],
}

impl Quantisation {
    /// Every format of ggml (2026), so that an unsupported one can be named.
    pub const ALL: &'static [Quantisation] = &[
        Self::new(0, "F32", 1, 4, Some(f32s)).made_by(encode::f32s, &[]),
        Self::new(1, "F16", 1, 2, Some(f16s)).made_by(encode::f16s, &[]),
        Self::new(2, "Q4_0", 32, 18, Some(q4_0)).made_by(encode::q4_0, &[0]),
        Self::new(3, "Q4_1", 32, 20, Some(q4_1)).made_by(encode::q4_1, &[0, 2]),
        Self::new(6, "Q5_0", 32, 22, Some(q5_0)).made_by(encode::q5_0, &[0]),
        Self::new(7, "Q5_1", 32, 24, Some(q5_1)).made_by(encode::q5_1, &[0, 2]),
        Self::new(8, "Q8_0", 32, 34, Some(q8_0)).made_by(encode::q8_0, &[0]),
        Self::new(9, "Q8_1", 32, 36, None),
        Self::new(10, "Q2_K", 256, 84, Some(q2_k)),
        Self::new(11, "Q3_K", 256, 110, Some(q3_k)),
        Self::new(12, "Q4_K", 256, 144, Some(q4_k)).made_by(encode::q4_k, &[0, 2]),
        Self::new(13, "Q5_K", 256, 176, Some(q5_k)).made_by(encode::q5_k, &[0, 2]),
        Self::new(14, "Q6_K", 256, 210, Some(q6_k)).made_by(encode::q6_k, &[208]),
        Self::new(15, "Q8_K", 256, 292, None),
        Self::new(16, "IQ2_XXS", 256, 66, None),
        Self::new(17, "IQ2_XS", 256, 74, None),
        Self::new(18, "IQ3_XXS", 256, 98, None),
        Self::new(19, "IQ1_S", 256, 50, None),
        Self::new(20, "IQ4_NL", 32, 18, Some(iq4_nl)),
        Self::new(21, "IQ3_S", 256, 110, None),
        Self::new(22, "IQ2_S", 256, 82, None),
        Self::new(23, "IQ4_XS", 256, 136, Some(iq4_xs)),
        Self::new(24, "I8", 1, 1, None),
        Self::new(25, "I16", 1, 2, None),
        Self::new(26, "I32", 1, 4, None),
        Self::new(27, "I64", 1, 8, None),
        Self::new(28, "F64", 1, 8, None),
        Self::new(29, "IQ1_M", 256, 56, None),
        Self::new(30, "BF16", 1, 2, Some(bf16s)).made_by(encode::bf16s, &[]),
        Self::new(34, "TQ1_0", 256, 54, None),
        Self::new(35, "TQ2_0", 256, 66, None),
        Self::new(39, "MXFP4", 32, 17, None),
        Self::new(40, "NVFP4", 64, 36, None),
        Self::new(41, "Q1_0", 128, 18, None),
    ];

    const fn new(id: u32, name: &'static str, values: usize, bytes: usize, dequantise: Option<Dequantise>) -> Self {
        Self { id, name, values, bytes, dequantise, quantise: None, scales: &[] }
    }

    const fn made_by(self, quantise: Quantise, scales: &'static [usize]) -> Self {
        Self { quantise: Some(quantise), scales, ..self }
    }

    /// The format of this name, which must be one.
    pub fn called(name: &str) -> &'static Quantisation {
        Self::ALL.iter().find(|quantisation| quantisation.name == name).expect("a name of the table")
    }

    /// The format a file names.
    pub fn numbered(id: u32) -> Option<&'static Quantisation> {
        Self::ALL.iter().find(|quantisation| quantisation.id == id)
    }

    /// The format to read plain floating-point numbers as when they are to become another floating-point type: reading and
    /// rounding is then one pass, without a second copy of the tensor.
    pub(in crate::weights) fn converting(dtype: &Dtype, kind: Kind) -> Option<&'static Quantisation> {
        let floats = [Kind::Float, Kind::Half, Kind::BFloat16];
        let converts =
            dtype.kind != Some(kind) && floats.contains(&kind) && floats.iter().any(|k| dtype.kind == Some(*k));
        Self::ALL.iter().find(|quantisation| converts && quantisation.name == dtype.name)
    }

    /// The names of those that can be read.
    pub fn supported() -> String {
        let names: Vec<_> = Self::ALL.iter().filter(|q| q.dequantise.is_some()).map(|q| q.name).collect();
        names.join(", ")
    }
}

/// Applies `dequantise` to each block of `BYTES` bytes and its `VALUES` numbers.
#[inline(always)]
fn each<const BYTES: usize, const VALUES: usize>(
    bytes: &[u8],
    numbers: &mut [f32],
    dequantise: impl Fn(&[u8; BYTES], &mut [f32; VALUES]),
) {
    for (block, numbers) in bytes.as_chunks::<BYTES>().0.iter().zip(numbers.as_chunks_mut::<VALUES>().0) {
        dequantise(block, numbers);
    }
}

/// The half-precision scale at byte `at`.
#[inline(always)]
fn scale(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn f32s(bytes: &[u8], numbers: &mut [f32]) {
    each::<4, 1>(bytes, numbers, |block, out| out[0] = f32::from_le_bytes(*block));
}

fn f16s(bytes: &[u8], numbers: &mut [f32]) {
    each::<2, 1>(bytes, numbers, |block, out| out[0] = f16::from_le_bytes(*block).to_f32());
}

fn bf16s(bytes: &[u8], numbers: &mut [f32]) {
    each::<2, 1>(bytes, numbers, |block, out| out[0] = bf16::from_le_bytes(*block).to_f32());
}

/// f16 d; 32 i8: x = q d.
fn q8_0(bytes: &[u8], numbers: &mut [f32]) {
    each::<34, 32>(bytes, numbers, |block, out| {
        let d = scale(block, 0);
        for (x, &q) in out.iter_mut().zip(&block[2..]) {
            *x = f32::from(q as i8) * d;
        }
    });
}

/// f16 d; 16 bytes, low nibbles the first half: x = (q - 8) d.
fn q4_0(bytes: &[u8], numbers: &mut [f32]) {
    each::<18, 32>(bytes, numbers, |block, out| {
        let d = scale(block, 0);
        for (i, &q) in block[2..].iter().enumerate() {
            out[i] = f32::from((q & 15) as i8 - 8) * d;
            out[i + 16] = f32::from((q >> 4) as i8 - 8) * d;
        }
    });
}

/// f16 d, m; 16 bytes: x = q d + m.
fn q4_1(bytes: &[u8], numbers: &mut [f32]) {
    each::<20, 32>(bytes, numbers, |block, out| {
        let (d, m) = (scale(block, 0), scale(block, 2));
        for (i, &q) in block[4..].iter().enumerate() {
            out[i] = f32::from(q & 15) * d + m;
            out[i + 16] = f32::from(q >> 4) * d + m;
        }
    });
}

/// f16 d; 32 fifth bits; 16 bytes: x = (q - 16) d.
fn q5_0(bytes: &[u8], numbers: &mut [f32]) {
    each::<22, 32>(bytes, numbers, |block, out| {
        let d = scale(block, 0);
        let fifth = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
        for (i, &q) in block[6..].iter().enumerate() {
            let low = (q & 15) | ((fifth >> i & 1) << 4) as u8;
            let high = (q >> 4) | ((fifth >> (i + 16) & 1) << 4) as u8;
            out[i] = f32::from(low as i8 - 16) * d;
            out[i + 16] = f32::from(high as i8 - 16) * d;
        }
    });
}

/// f16 d, m; 32 fifth bits; 16 bytes: x = q d + m.
fn q5_1(bytes: &[u8], numbers: &mut [f32]) {
    each::<24, 32>(bytes, numbers, |block, out| {
        let (d, m) = (scale(block, 0), scale(block, 2));
        let fifth = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
        for (i, &q) in block[8..].iter().enumerate() {
            let low = (q & 15) | ((fifth >> i & 1) << 4) as u8;
            let high = (q >> 4) | ((fifth >> (i + 16) & 1) << 4) as u8;
            out[i] = f32::from(low) * d + m;
            out[i + 16] = f32::from(high) * d + m;
        }
    });
}

/// 16 scales and minima of 4 bits; 64 bytes of 2 bits; f16 d, dmin: x = (d s) q - dmin m, per 16.
fn q2_k(bytes: &[u8], numbers: &mut [f32]) {
    each::<84, 256>(bytes, numbers, |block, out| {
        let (scales, rest) = block.split_at(16);
        let (quants, rest) = rest.split_at(64);
        let (d, dmin) = (scale(rest, 0), scale(rest, 2));
        for (part, out) in out.chunks_exact_mut(16).enumerate() {
            let (factor, minimum) = (d * f32::from(scales[part] & 15), dmin * f32::from(scales[part] >> 4));
            // Rows of 32 numbers: 4 rows share 32 bytes, 2 bits each.
            let (row, half) = (part / 2, part % 2);
            let quants = &quants[row / 4 * 32 + half * 16..][..16];
            for (x, &q) in out.iter_mut().zip(quants) {
                *x = factor * f32::from(q >> (2 * (row % 4)) & 3) - minimum;
            }
        }
    });
}

/// 32 bytes of third bits (inverted); 64 bytes of 2 bits; 16 scales of 6 bits; f16 d: x = d (s - 32) (q - 4), per 16.
fn q3_k(bytes: &[u8], numbers: &mut [f32]) {
    each::<110, 256>(bytes, numbers, |block, out| {
        let (third, rest) = block.split_at(32);
        let (quants, rest) = rest.split_at(64);
        let (scales, rest) = rest.split_at(12);
        let d = scale(rest, 0);
        for (part, out) in out.chunks_exact_mut(16).enumerate() {
            let low = if part < 8 { scales[part] & 15 } else { scales[part - 8] >> 4 };
            let high = scales[8 + part % 4] >> (2 * (part / 4)) & 3;
            let factor = d * f32::from((low | high << 4) as i8 - 32);
            let (row, half) = (part / 2, part % 2);
            let quants = &quants[row / 4 * 32 + half * 16..][..16];
            let third = &third[half * 16..][..16];
            for ((x, &q), &bit) in out.iter_mut().zip(quants).zip(third) {
                let low = (q >> (2 * (row % 4)) & 3) as i8;
                let offset = ((bit >> row & 1) ^ 1) << 2;
                *x = factor * f32::from(low - offset as i8);
            }
        }
    });
}

/// The `part`-th of 8 scales and minima of 6 bits each, packed in 12 bytes.
#[inline(always)]
fn scale_and_minimum(packed: &[u8], part: usize) -> (u8, u8) {
    if part < 4 {
        (packed[part] & 63, packed[part + 4] & 63)
    } else {
        let (low, high) = (packed[part - 4] >> 6 << 4, packed[part] >> 6 << 4);
        (packed[part + 4] & 15 | low, packed[part + 4] >> 4 | high)
    }
}

/// f16 d, dmin; 8 scales and minima of 6 bits; 128 bytes of 4 bits: x = (d s) q - dmin m, per 32.
fn q4_k(bytes: &[u8], numbers: &mut [f32]) {
    each::<144, 256>(bytes, numbers, |block, out| {
        let (d, dmin) = (scale(block, 0), scale(block, 2));
        let (packed, quants) = block[4..].split_at(12);
        for (part, out) in out.chunks_exact_mut(32).enumerate() {
            let (s, m) = scale_and_minimum(packed, part);
            let (factor, minimum) = (d * f32::from(s), dmin * f32::from(m));
            let quants = &quants[part / 2 * 32..][..32];
            for (x, &q) in out.iter_mut().zip(quants) {
                *x = factor * f32::from(q >> (4 * (part % 2)) & 15) - minimum;
            }
        }
    });
}

/// As Q4_K, with 32 bytes of fifth bits before the quants.
fn q5_k(bytes: &[u8], numbers: &mut [f32]) {
    each::<176, 256>(bytes, numbers, |block, out| {
        let (d, dmin) = (scale(block, 0), scale(block, 2));
        let (packed, rest) = block[4..].split_at(12);
        let (fifth, quants) = rest.split_at(32);
        for (part, out) in out.chunks_exact_mut(32).enumerate() {
            let (s, m) = scale_and_minimum(packed, part);
            let (factor, minimum) = (d * f32::from(s), dmin * f32::from(m));
            let quants = &quants[part / 2 * 32..][..32];
            for ((x, &q), &bit) in out.iter_mut().zip(quants).zip(fifth) {
                let q = q >> (4 * (part % 2)) & 15 | (bit >> part & 1) << 4;
                *x = factor * f32::from(q) - minimum;
            }
        }
    });
}

/// 128 bytes of 4 bits; 64 bytes of 2 bits; 16 i8 scales; f16 d: x = (d s) (q - 32), per 16.
fn q6_k(bytes: &[u8], numbers: &mut [f32]) {
    each::<210, 256>(bytes, numbers, |block, out| {
        let (low, rest) = block.split_at(128);
        let (high, rest) = rest.split_at(64);
        let (scales, rest) = rest.split_at(16);
        let d = scale(rest, 0);
        for (part, out) in out.chunks_exact_mut(16).enumerate() {
            let factor = d * f32::from(scales[part] as i8);
            // Rows of 32 numbers: half the block is 4 rows; rows 0 and 1 are low nibbles, 2 and 3 high ones.
            let (row, half) = (part / 2, part % 2);
            let low = &low[row / 4 * 64 + row % 2 * 32 + half * 16..][..16];
            let high = &high[row / 4 * 32 + half * 16..][..16];
            for ((x, &l), &h) in out.iter_mut().zip(low).zip(high) {
                let q = l >> (4 * (row % 4 / 2)) & 15 | (h >> (2 * (row % 4)) & 3) << 4;
                *x = factor * f32::from(q as i8 - 32);
            }
        }
    });
}

/// The sixteen values of IQ4_NL and IQ4_XS.
const NONLINEAR: [f32; 16] = [-127., -104., -83., -65., -49., -35., -22., -10., 1., 13., 25., 38., 53., 69., 89., 113.];

/// f16 d; 16 bytes of 4-bit indices: x = d value(q).
fn iq4_nl(bytes: &[u8], numbers: &mut [f32]) {
    each::<18, 32>(bytes, numbers, |block, out| {
        let d = scale(block, 0);
        for (i, &q) in block[2..].iter().enumerate() {
            out[i] = d * NONLINEAR[usize::from(q & 15)];
            out[i + 16] = d * NONLINEAR[usize::from(q >> 4)];
        }
    });
}

/// f16 d; 8 scales of 6 bits (high bits first); 128 bytes of 4-bit indices: x = d (s - 32) value(q), per 32.
fn iq4_xs(bytes: &[u8], numbers: &mut [f32]) {
    each::<136, 256>(bytes, numbers, |block, out| {
        let d = scale(block, 0);
        let high = u16::from_le_bytes([block[2], block[3]]);
        let (low, quants) = block[4..].split_at(4);
        for (part, out) in out.chunks_exact_mut(32).enumerate() {
            let s = low[part / 2] >> (4 * (part % 2)) & 15 | ((high >> (2 * part) & 3) as u8) << 4;
            let factor = d * f32::from(s as i8 - 32);
            for (i, &q) in quants[part * 16..][..16].iter().enumerate() {
                out[i] = factor * NONLINEAR[usize::from(q & 15)];
                out[i + 16] = factor * NONLINEAR[usize::from(q >> 4)];
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `tests/fixtures/gguf_quants.safetensors` holds random blocks of every format and what the `gguf` Python package makes of
    /// them; `tests/python/gguf_quants.py` writes it.
    #[test]
    fn every_format_equals_the_gguf_package_bit_for_bit() {
        let fixture = include_bytes!("../../../tests/fixtures/gguf_quants.safetensors");
        let fixture = safetensors::SafeTensors::deserialize(fixture).unwrap();
        let mut compared = 0;
        for quantisation in Quantisation::ALL {
            let Some(dequantise) = quantisation.dequantise else { continue };
            let name = quantisation.name;
            let blocks = fixture.tensor(&format!("{name}.blocks")).unwrap();
            let expected = fixture.tensor(&format!("{name}.values")).unwrap();
            let expected: Vec<u32> =
                expected.data().as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
            assert_eq!(blocks.data().len() / quantisation.bytes * quantisation.values, expected.len(), "{name}");
            let mut numbers = vec![0f32; expected.len()];
            dequantise(blocks.data(), &mut numbers);
            for (i, (number, expected)) in numbers.iter().zip(&expected).enumerate() {
                // Adding 0 turns -0 into 0: the order of a product's factors may decide the sign of a zero.
                let equal = (number + 0.0).to_bits() == (f32::from_bits(*expected) + 0.0).to_bits();
                assert!(equal, "{name} number {i}: {number} is not {}", f32::from_bits(*expected));
            }
            compared += 1;
        }
        assert_eq!(compared, 15);
    }
}
