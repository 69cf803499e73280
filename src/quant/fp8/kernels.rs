//! CPU kernels of fp8: row by row in parallel, in arithmetic that vectorises rather than by table.

use multiversion::multiversion;
use tch::{Kind, Tensor};

use super::{Fp8, LARGEST};
use crate::quant::rounding::{Rounding, round};
use crate::torch_ext::{Number, elements, filled, filled_pair};

/// Codes (out, in) of e4m3fn and scales (out, 1) fp32 of a contiguous weight.
pub(super) fn quantise(weight: &Tensor) -> (Tensor, Tensor) {
    match weight.kind() {
        Kind::BFloat16 => quantise_of::<half::bf16>(weight),
        Kind::Half => quantise_of::<half::f16>(weight),
        _ => quantise_of::<f32>(weight),
    }
}

fn quantise_of<T: Number>(weight: &Tensor) -> (Tensor, Tensor) {
    let shape = weight.size();
    let (all, columns) = (elements::<T>(weight), shape[1] as usize);
    let [codes, scales] = filled_pair::<u8, f32>(&shape, &[shape[0], 1], |rows, codes, scales| {
        let numbers = &all[rows.start * columns..rows.end * columns];
        let of_row = numbers.chunks(columns.max(1)).zip(codes.chunks_mut(columns.max(1)));
        for ((numbers, codes), scale) in of_row.zip(scales) {
            *scale = quantise_row(numbers, codes);
        }
    });
    (codes.view_dtype(Kind::Float8e4m3fn), scales)
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma+f16c", "x86_64+avx2+fma+f16c"))]
fn quantise_row<T: Number>(numbers: &[T], codes: &mut [u8]) -> f32 {
    // Magnitudes are in the order of their bits.
    let largest = numbers.iter().fold(0, |largest, number| largest.max(number.wide().to_bits() & 0x7fff_ffff));
    let scale = if largest == 0 { 1.0 } else { f32::from_bits(largest) / LARGEST };
    for (code, number) in codes.iter_mut().zip(numbers) {
        *code = encode((number.wide() / scale).clamp(-LARGEST, LARGEST));
    }
    scale
}

/// The nearest number of e4m3fn, ties to even, of one of magnitude at most 448.
#[inline(always)]
fn encode(x: f32) -> u8 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    // Below 2^-6 numbers lie 2^-9 apart: their codes are what is left of a sum at which fp32 numbers lie one apart.
    let small = (f32::from_bits(magnitude) * 512.0 + 8_388_608.0).to_bits() & 0xff;
    let normal = ((magnitude + 0x7_ffff + ((magnitude >> 20) & 1)) >> 20).wrapping_sub(120 << 3);
    let code = if magnitude < 0x3c80_0000 { small } else { normal };
    (code | (bits >> 24 & 0x80)) as u8
}

/// What a weight stands for: (out, in) of its kind.
pub(super) fn dequantise(weight: &Fp8) -> Tensor {
    match weight.rounding {
        Rounding::None => of_rounding::<{ Rounding::NONE }>(weight),
        Rounding::Half => of_rounding::<{ Rounding::HALF }>(weight),
        Rounding::BFloat16 => of_rounding::<{ Rounding::BFLOAT16 }>(weight),
    }
}

fn of_rounding<const TO: u8>(weight: &Fp8) -> Tensor {
    match weight.kind {
        Kind::BFloat16 => of_kind::<TO, half::bf16>(weight),
        Kind::Half => of_kind::<TO, half::f16>(weight),
        _ => of_kind::<TO, f32>(weight),
    }
}

fn of_kind<const TO: u8, T: Number>(weight: &Fp8) -> Tensor {
    let shape = weight.codes.size();
    let (columns, [high, wide]) = (shape[1] as usize, weight.block.map(|size| size as usize));
    let across = weight.scales.size()[1] as usize;
    let bytes = weight.codes.view_dtype(Kind::Uint8);
    let (codes, scales) = (elements::<u8>(&bytes), elements::<f32>(&weight.scales));
    let of_four = weight.codes.kind() == Kind::Float8e4m3fn;
    filled::<T>(&shape, |rows, out| {
        for (row, out) in rows.zip(out.chunks_mut(columns.max(1))) {
            let codes = &codes[row * columns..(row + 1) * columns];
            let scales = &scales[row / high * across..][..across];
            for ((codes, out), scale) in codes.chunks(wide).zip(out.chunks_mut(wide)).zip(scales) {
                if of_four {
                    spread_e4m3::<TO, T>(codes, *scale, out)
                } else {
                    spread_e5m2::<TO, T>(codes, *scale, out)
                }
            }
        }
    })
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma+f16c", "x86_64+avx2+fma+f16c"))]
fn spread_e4m3<const TO: u8, T: Number>(codes: &[u8], scale: f32, out: &mut [T]) {
    for (out, code) in out.iter_mut().zip(codes) {
        *out = T::rounded(round::<TO>(decode::<4>(*code) * scale));
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma+f16c", "x86_64+avx2+fma+f16c"))]
fn spread_e5m2<const TO: u8, T: Number>(codes: &[u8], scale: f32, out: &mut [T]) {
    for (out, code) in out.iter_mut().zip(codes) {
        *out = T::rounded(round::<TO>(decode::<5>(*code) * scale));
    }
}

/// The finite number that a code with so many bits of exponent stands for.
#[inline(always)]
fn decode<const EXPONENT: u32>(code: u8) -> f32 {
    let mantissa = 7 - EXPONENT;
    let bias = (1 << (EXPONENT - 1)) - 1;
    let magnitude = u32::from(code & 0x7f);
    let normal = f32::from_bits((magnitude << (23 - mantissa)) + ((127 - bias) << 23));
    // Without exponent the mantissa alone counts steps of the smallest number: 2^(1 - bias - mantissa).
    let small = magnitude as i32 as f32 * f32::from_bits((127 + 1 - bias - mantissa) << 23);
    let value = if magnitude < (1 << mantissa) { small } else { normal };
    f32::from_bits(value.to_bits() | u32::from(code & 0x80) << 24)
}
