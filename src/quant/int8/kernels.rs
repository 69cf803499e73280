//! CPU kernels of eight-bit integers: row by row in parallel, in one pass over memory and without copies.

use multiversion::multiversion;
use tch::{Kind, Tensor};

use super::Int8;
use crate::torch_ext::{Number, elements, filled, filled_pair};

/// Codes (rows, in) i8 and largest magnitudes (rows) fp32 of a contiguous weight of rows.
pub(super) fn quantise(weight: &Tensor) -> (Tensor, Tensor) {
    match weight.kind() {
        Kind::BFloat16 => quantise_of::<half::bf16>(weight),
        Kind::Half => quantise_of::<half::f16>(weight),
        _ => quantise_of::<f32>(weight),
    }
}

fn quantise_of<T: Number>(weight: &Tensor) -> (Tensor, Tensor) {
    let columns = weight.size()[weight.dim() - 1];
    let all = elements::<T>(weight);
    let rows = if columns == 0 { 0 } else { all.len() as i64 / columns };
    let wide = columns.max(1) as usize;
    let [codes, absmax] = filled_pair::<u8, f32>(&[rows, columns], &[rows], |rows, codes, absmax| {
        let numbers = all[rows.start * wide..rows.end * wide].chunks_exact(wide);
        for ((numbers, codes), absmax) in numbers.zip(codes.chunks_exact_mut(wide)).zip(absmax) {
            *absmax = quantise_row(numbers, codes);
        }
    });
    (codes.view_dtype(Kind::Int8), absmax)
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma+f16c", "x86_64+avx2+fma+f16c"))]
fn quantise_row<T: Number>(numbers: &[T], codes: &mut [u8]) -> f32 {
    let of_half = |number: &T| half::f16::rounded(number.wide()).wide();
    // Magnitudes are in the order of their bits.
    let largest = numbers.iter().fold(0, |largest, number| largest.max(of_half(number).to_bits() & 0x7fff_ffff));
    let absmax = f32::from_bits(largest);
    let scale = if largest == 0 { 0.0 } else { 1.0 / absmax * 127.0 };
    for (code, number) in codes.iter_mut().zip(numbers) {
        *code = (of_half(number) * scale).round_ties_even() as i32 as u8;
    }
    absmax
}

/// What a weight stands for: (rows, in) of its kind.
pub(super) fn dequantise(weight: &Int8) -> Tensor {
    match weight.kind {
        Kind::BFloat16 => of_kind::<half::bf16>(weight),
        Kind::Half => of_kind::<half::f16>(weight),
        _ => of_kind::<f32>(weight),
    }
}

fn of_kind<T: Number>(weight: &Int8) -> Tensor {
    let shape = weight.codes.size();
    let wide = shape[1].max(1) as usize;
    let bytes = weight.codes.view_dtype(Kind::Uint8);
    let (codes, absmax) = (elements::<u8>(&bytes), elements::<f32>(&weight.absmax));
    filled::<T>(&shape, |rows, out| {
        let codes = codes[rows.start * wide..rows.end * wide].chunks_exact(wide);
        for ((codes, out), absmax) in codes.zip(out.chunks_exact_mut(wide)).zip(&absmax[rows]) {
            spread(codes, *absmax, out);
        }
    })
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma+f16c", "x86_64+avx2+fma+f16c"))]
fn spread<T: Number>(codes: &[u8], absmax: f32, out: &mut [T]) {
    for (out, code) in out.iter_mut().zip(codes) {
        *out = T::rounded(f32::from(*code as i8) * absmax * (1.0 / 127.0));
    }
}
