//! CPU kernels of four-bit blocks: one pass over memory, compiled for AVX-512, AVX2 and the baseline and chosen at run time.

use std::ops::Range;

use multiversion::multiversion;
use multiversion::target::match_target;
use tch::{Device, Kind, Tensor};

use super::super::codebook::{FourBitType, Ladder};
use crate::torch_ext::{Number, elements, filled, filled_pair};

/// Values handled at a time: every block's size is a multiple.
const PIECE: usize = 32;

/// The smallest number a block is divided by: what holds nothing larger is zero.
pub(super) const SMALLEST: f32 = 1e-38;

/// Whether the kernels serve codes or numbers on a device, to or from a number type.
pub(super) fn serves(device: Device, kind: Kind) -> bool {
    device == Device::Cpu && matches!(kind, Kind::Float | Kind::BFloat16 | Kind::Half)
}

/// Codes ((n + 1) / 2), two to a byte, the first in the high half, and each block's largest magnitude (blocks), fp32.
pub(super) fn quantise(values: &Tensor, block: usize, kind: FourBitType) -> (Tensor, Tensor) {
    match values.kind() {
        Kind::BFloat16 => quantise_of::<half::bf16>(values, block, kind),
        Kind::Half => quantise_of::<half::f16>(values, block, kind),
        _ => quantise_of::<f32>(values, block, kind),
    }
}

fn quantise_of<T: Number>(values: &Tensor, block: usize, kind: FourBitType) -> (Tensor, Tensor) {
    let all = elements::<T>(values);
    let blocks = all.len().div_ceil(block);
    let shapes = (&[blocks as i64, block as i64 / 2], &[blocks as i64]);
    let [codes, absmax] = filled_pair::<u8, f32>(shapes.0, shapes.1, |rows, codes, absmax| {
        let end = (rows.end * block).min(all.len());
        quantise_blocks(&all[rows.start * block..end], block, kind.ladder(), codes, absmax);
    });
    (codes.view([-1]).narrow(0, 0, all.len().div_ceil(2) as i64), absmax)
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma+f16c", "x86_64+avx2+fma+f16c"))]
fn quantise_blocks<T: Number>(values: &[T], block: usize, ladder: &Ladder, codes: &mut [u8], absmax: &mut [f32]) {
    for ((values, codes), absmax) in values.chunks(block).zip(codes.chunks_mut(block / 2)).zip(absmax) {
        if values.len() < block {
            *absmax = quantise_tail(values, ladder, codes);
            continue;
        }
        let mut largest = [0f32; PIECE];
        for piece in values.chunks_exact(PIECE) {
            for (largest, value) in largest.iter_mut().zip(piece) {
                let magnitude = value.wide().abs();
                *largest = if magnitude > *largest { magnitude } else { *largest };
            }
        }
        *absmax = largest.iter().copied().fold(0.0, f32::max);
        let scale = 1.0 / absmax.max(SMALLEST);
        for (piece, codes) in values.chunks_exact(PIECE).zip(codes.chunks_exact_mut(PIECE / 2)) {
            let mut found = [0i32; PIECE];
            for (found, value) in found.iter_mut().zip(piece) {
                *found = ladder.code(value.wide() * scale);
            }
            for (byte, pair) in codes.iter_mut().zip(found.chunks_exact(2)) {
                *byte = (pair[0] << 4 | pair[1]) as u8;
            }
        }
    }
}

/// A block that the tensor's end cuts: divided by its largest where whole ones are multiplied by the reciprocal, as bitsandbytes has
/// it on the CPU. A missing second half is the code of zero.
fn quantise_tail<T: Number>(values: &[T], ladder: &Ladder, codes: &mut [u8]) -> f32 {
    let largest = values.iter().map(|value| value.wide().abs()).fold(SMALLEST, f32::max);
    codes.fill(0);
    for (byte, pair) in codes.iter_mut().zip(values.chunks(2)) {
        let code = |value: Option<&T>| ladder.code(value.map_or(0.0, |value| value.wide() / largest));
        *byte = (code(pair.first()) << 4 | code(pair.get(1))) as u8;
    }
    largest
}

impl Ladder {
    #[inline(always)]
    fn code(&self, x: f32) -> i32 {
        let mut code = i32::from(self.first);
        for (bound, step) in self.bounds.iter().zip(&self.steps) {
            code += if x > *bound { *step } else { 0 };
        }
        code
    }
}

/// What codes ((n + 1) / 2) stand for: (n) numbers of a kind; those of block k are multiplied with `scale(k)`.
pub(super) fn dequantise(
    codes: &Tensor,
    (n, block): (usize, usize),
    values: &[f32; 16],
    kind: Kind,
    scale: impl Fn(usize) -> f32 + Sync,
) -> Tensor {
    let bytes = elements::<u8>(codes);
    let shape = [n.div_ceil(block) as i64, block as i64];
    let of = |rows: &Range<usize>| &bytes[rows.start * block / 2..bytes.len().min(rows.end * block / 2)];
    let whole = match kind {
        Kind::BFloat16 => filled(&shape, |rows, out| spread_bf16(of(&rows), values, rows.map(&scale), out, block)),
        Kind::Half => filled(&shape, |rows, out| spread_f16(of(&rows), values, rows.map(&scale), out, block)),
        _ => filled(&shape, |rows, out| spread_f32(of(&rows), values, rows.map(&scale), out, block)),
    };
    whole.view([-1]).narrow(0, 0, n as i64)
}

/// One kernel for each number type. With AVX-512 the sixteen products of a block lie in one register and a code picks one of them:
/// `$table` makes that register of sixteen fp32 products, `$pick` 32 numbers of it and of 32 indices of 16 bits.
macro_rules! spread {
    ($name:ident, $number:ty, |$products:ident| $table:expr, |$register:ident, $indices:ident| $pick:expr) => {
        #[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma+f16c", "x86_64+avx2+fma+f16c"))]
        fn $name(
            codes: &[u8],
            values: &[f32; 16],
            scale: impl Iterator<Item = f32>,
            out: &mut [$number],
            block: usize,
        ) {
            for ((codes, out), scale) in codes.chunks(block / 2).zip(out.chunks_mut(block)).zip(scale) {
                match_target! {
                    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma+f16c" => {
                        if codes.len() == block / 2 {
                            use std::arch::x86_64::*;
                            let $products = _mm512_mul_ps(_mm512_set_ps(
                                values[15], values[14], values[13], values[12], values[11], values[10], values[9], values[8],
                                values[7], values[6], values[5], values[4], values[3], values[2], values[1], values[0],
                            ), _mm512_set1_ps(scale));
                            let $register = $table;
                            for (codes, out) in codes.as_chunks::<8>().0.as_chunks::<2>().0.iter().zip(out.as_chunks_mut::<32>().0) {
                                let bytes = _mm512_cvtepu8_epi32(_mm_set_epi64x(
                                    i64::from_le_bytes(codes[1]),
                                    i64::from_le_bytes(codes[0]),
                                ));
                                let low = _mm512_and_si512(bytes, _mm512_set1_epi32(15));
                                let $indices = _mm512_or_si512(_mm512_srli_epi32::<4>(bytes), _mm512_slli_epi32::<16>(low));
                                *out = crate::torch_ext::Lanes::numbers($pick);
                            }
                            continue;
                        }
                    },
                    _ => (),
                }
                // Widened first and rounded last, so that both loops are vectorised.
                for (codes, out) in codes.chunks(PIECE / 2).zip(out.chunks_mut(PIECE)) {
                    let mut wide = [0f32; PIECE];
                    for (pair, byte) in wide.chunks_exact_mut(2).zip(codes) {
                        pair[0] = values[usize::from(byte >> 4)];
                        pair[1] = values[usize::from(byte & 15)];
                    }
                    for (out, value) in out.iter_mut().zip(wide) {
                        *out = <$number>::rounded(value * scale);
                    }
                }
            }
        }
    };
}

spread!(
    spread_bf16,
    half::bf16,
    |products| {
        let bits = _mm512_castps_si512(products);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let nearest = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(nearest)))
    },
    |table, indices| _mm512_permutexvar_epi16(indices, table)
);

spread!(
    spread_f16,
    half::f16,
    |products| _mm512_broadcast_i64x4(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(products)),
    |table, indices| _mm512_permutexvar_epi16(indices, table)
);

spread!(spread_f32, f32, |products| products, |table, indices| {
    let first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(indices));
    let second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64::<1>(indices));
    [_mm512_permutexvar_ps(first, table), _mm512_permutexvar_ps(second, table)]
});
