//! CPU kernel of four-bit codes, two to a byte and the first in the low half: MXFP4, and integers in groups.
//!
//! All numbers of a group are of sixteen: `(values[code] - zero) * scale`. With AVX-512 they lie in one register, and a code picks one.

use multiversion::multiversion;
use multiversion::target::match_target;
use tch::{Device, Kind, Tensor};

use super::rounding::{Rounding, round};
use crate::torch_ext::{Number, elements, filled};

/// Numbers handled at a time by the fast path: whole groups of it.
const PIECE: usize = 32;

/// How the numbers of a group are made of its codes.
#[derive(Clone, Copy)]
pub(super) struct Group {
    pub scale: f32,
    pub zero: f32,
}

/// A matrix of codes.
pub(super) struct Rows<'a> {
    /// (rows, bytes of a row) u8; what lies behind the last code of a row is passed over.
    pub codes: &'a Tensor,
    /// Codes of a row.
    pub columns: usize,
    /// Codes of a group; the last of a row may be shorter.
    pub wide: usize,
    /// What codes stand for before scale and zero.
    pub values: &'a [f32; 16],
    /// What a product is rounded to before it becomes `kind`.
    pub rounding: Rounding,
    /// The number type that is made: fp32, bf16 or fp16.
    pub kind: Kind,
}

/// Whether the kernels serve codes on a device, to a number type.
pub(super) fn serves(device: Device, kind: Kind) -> bool {
    device == Device::Cpu && matches!(kind, Kind::Float | Kind::BFloat16 | Kind::Half)
}

/// The numbers (rows, columns); `group(row, k)` tells how those of a row's k-th group are made.
pub(super) fn dequantise(matrix: &Rows<'_>, group: impl Fn(usize, usize) -> Group + Sync) -> Tensor {
    let (rows, stride) = (matrix.codes.size()[0], matrix.codes.size()[1] as usize);
    let (bytes, columns) = (elements::<u8>(matrix.codes), matrix.columns);
    let groups = columns.div_ceil(matrix.wide);
    let shape = [rows, columns as i64];
    let all = |row: usize| {
        let group = &group;
        (&bytes[row * stride..(row + 1) * stride], (0..groups).map(move |k| group(row, k)))
    };
    let (values, wide, rounding) = (matrix.values, matrix.wide, matrix.rounding);
    match matrix.kind {
        Kind::BFloat16 => filled(&shape, |rows, out| {
            for (row, out) in rows.zip(out.chunks_mut(columns.max(1))) {
                let (codes, groups) = all(row);
                spread_bf16(codes, values, groups, rounding, wide, out);
            }
        }),
        Kind::Half => filled(&shape, |rows, out| {
            for (row, out) in rows.zip(out.chunks_mut(columns.max(1))) {
                let (codes, groups) = all(row);
                spread_f16(codes, values, groups, rounding, wide, out);
            }
        }),
        _ => filled(&shape, |rows, out| {
            for (row, out) in rows.zip(out.chunks_mut(columns.max(1))) {
                let (codes, groups) = all(row);
                spread_f32(codes, values, groups, rounding, wide, out);
            }
        }),
    }
}

/// The sixteen numbers of a group.
#[inline(always)]
fn table(values: &[f32; 16], Group { scale, zero }: Group, rounding: Rounding) -> [f32; 16] {
    let mut products = [0f32; 16];
    for (product, value) in products.iter_mut().zip(values) {
        *product = (value - zero) * scale;
    }
    // One loop for each, so that it is vectorised.
    match rounding {
        Rounding::None => {}
        Rounding::Half => products.iter_mut().for_each(|x| *x = round::<{ Rounding::HALF }>(*x)),
        Rounding::BFloat16 => products.iter_mut().for_each(|x| *x = round::<{ Rounding::BFLOAT16 }>(*x)),
    }
    products
}

/// One kernel for each number type. `$table` makes a register of sixteen fp32 products one that is picked from, `$pick` 32 numbers of
/// it and of 32 indices of 16 bits.
macro_rules! spread {
    ($name:ident, $number:ty, |$products:ident| $table:expr, |$register:ident, $indices:ident| $pick:expr) => {
        #[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma+f16c", "x86_64+avx2+fma+f16c"))]
        fn $name(
            codes: &[u8],
            values: &[f32; 16],
            groups: impl Iterator<Item = Group>,
            rounding: Rounding,
            wide: usize,
            out: &mut [$number],
        ) {
            for (k, (out, group)) in out.chunks_mut(wide).zip(groups).enumerate() {
                let numbers = table(values, group, rounding);
                // Groups of whole pieces begin and end with bytes; the end of others is made one by one.
                let whole = if wide.is_multiple_of(PIECE) { out.len() / PIECE * PIECE } else { 0 };
                let (pieces, rest) = out.split_at_mut(whole);
                let of_group = codes.get(k * wide / 2..).unwrap_or_default();
                match_target! {
                    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma+f16c" => {
                        use std::arch::x86_64::*;
                        let $products = _mm512_set_ps(
                            numbers[15], numbers[14], numbers[13], numbers[12], numbers[11], numbers[10], numbers[9], numbers[8],
                            numbers[7], numbers[6], numbers[5], numbers[4], numbers[3], numbers[2], numbers[1], numbers[0],
                        );
                        let $register = $table;
                        for (codes, out) in of_group.as_chunks::<8>().0.as_chunks::<2>().0.iter().zip(pieces.as_chunks_mut::<32>().0) {
                            let bytes = _mm512_cvtepu8_epi32(_mm_set_epi64x(
                                i64::from_le_bytes(codes[1]),
                                i64::from_le_bytes(codes[0]),
                            ));
                            let low = _mm512_and_si512(bytes, _mm512_set1_epi32(15));
                            let $indices = _mm512_or_si512(low, _mm512_slli_epi32::<16>(_mm512_srli_epi32::<4>(bytes)));
                            *out = crate::torch_ext::Lanes::numbers($pick);
                        }
                    },
                    _ => {
                        for (codes, out) in of_group.chunks(PIECE / 2).zip(pieces.chunks_mut(PIECE)) {
                            let mut made = [0f32; PIECE];
                            for (pair, byte) in made.chunks_exact_mut(2).zip(codes) {
                                pair[0] = numbers[usize::from(byte & 15)];
                                pair[1] = numbers[usize::from(byte >> 4)];
                            }
                            for (out, value) in out.iter_mut().zip(made) {
                                *out = <$number>::rounded(value);
                            }
                        }
                    },
                }
                for (i, out) in rest.iter_mut().enumerate() {
                    let place = k * wide + whole + i;
                    let code = codes[place / 2] >> (place % 2 * 4) & 15;
                    *out = <$number>::rounded(numbers[usize::from(code)]);
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
