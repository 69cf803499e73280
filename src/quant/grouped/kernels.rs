//! CPU kernels of whole numbers in groups: row by row in parallel, compiled for AVX-512, AVX2 and the baseline and chosen at run time.

use multiversion::multiversion;
use tch::{Kind, Tensor};

use super::Grouped;
use crate::quant::nibbles::{self, Group, Rows};
use crate::quant::rounding::{Rounding, round};
use crate::torch_ext::{Number, elements, filled};

/// What codes of four bits stand for before scale and zero.
const COUNTING: [f32; 16] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];

/// Columns in any order that are made whole at a time.
const PIECE: usize = 256;

/// What a weight stands for: (out, in) of its kind.
pub(super) fn dequantise(weight: &Grouped) -> Tensor {
    let zeros = weight.zeros.as_ref().map(elements::<u8>);
    let (groups, middle) = (weight.scales.size()[1] as usize, weight.middle());
    let zero = |place: usize| f32::from(zeros.map_or(middle, |zeros| zeros[place]));
    match weight.scales.kind() {
        Kind::Half => {
            let scales = elements::<half::f16>(&weight.scales);
            of_groups(weight, |row, k| Group { scale: scales[row * groups + k].wide(), zero: zero(row * groups + k) })
        }
        Kind::BFloat16 => {
            let scales = elements::<half::bf16>(&weight.scales);
            of_groups(weight, |row, k| Group { scale: scales[row * groups + k].wide(), zero: zero(row * groups + k) })
        }
        _ => {
            let scales = elements::<f32>(&weight.scales);
            of_groups(weight, |row, k| Group { scale: scales[row * groups + k], zero: zero(row * groups + k) })
        }
    }
}

fn of_groups(weight: &Grouped, group: impl Fn(usize, usize) -> Group + Sync) -> Tensor {
    let rounding = Rounding::to(weight.scales.kind());
    let (columns, wide) = (weight.columns as usize, weight.group as usize);
    if weight.bits == 4 && weight.order.is_none() {
        let rows = Rows { codes: &weight.codes, columns, wide, values: &COUNTING, rounding, kind: weight.kind };
        return nibbles::dequantise(&rows, group);
    }
    match rounding {
        Rounding::None => of_rounding::<{ Rounding::NONE }>(weight, group),
        Rounding::Half => of_rounding::<{ Rounding::HALF }>(weight, group),
        Rounding::BFloat16 => of_rounding::<{ Rounding::BFLOAT16 }>(weight, group),
    }
}

fn of_rounding<const TO: u8>(weight: &Grouped, group: impl Fn(usize, usize) -> Group + Sync) -> Tensor {
    match weight.kind {
        Kind::BFloat16 => of_kind::<TO, half::bf16>(weight, group),
        Kind::Half => of_kind::<TO, half::f16>(weight, group),
        _ => of_kind::<TO, f32>(weight, group),
    }
}

/// Row after row: its codes as bytes, then its numbers.
fn of_kind<const TO: u8, T: Number>(weight: &Grouped, group: impl Fn(usize, usize) -> Group + Sync) -> Tensor {
    let (bytes, stride) = (elements::<u8>(&weight.codes), weight.codes.size()[1] as usize);
    let (columns, wide) = (weight.columns as usize, weight.group as usize);
    let groups = weight.scales.size()[1] as usize;
    let order = weight.order.as_ref().map(|order| Vec::<i32>::try_from(order).expect("a table of whole numbers"));
    let (shape, bits) = (weight.size(), weight.bits);
    filled::<T>(&shape, |rows, out| {
        let mut codes = vec![0; columns.next_multiple_of(8)];
        let mut own = Vec::with_capacity(groups);
        for (row, out) in rows.zip(out.chunks_mut(columns.max(1))) {
            unpack(&bytes[row * stride..(row + 1) * stride], bits, &mut codes);
            match &order {
                None => {
                    for (k, (codes, out)) in codes[..columns].chunks(wide).zip(out.chunks_mut(wide)).enumerate() {
                        scaled::<TO, T>(codes, group(row, k), out);
                    }
                }
                Some(order) => {
                    own.clear();
                    own.extend((0..groups).map(|k| group(row, k)));
                    in_order::<TO, T>(&codes[..columns], &own, order, out);
                }
            }
        }
    })
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma+f16c", "x86_64+avx2+fma+f16c"))]
fn scaled<const TO: u8, T: Number>(codes: &[u8], Group { scale, zero }: Group, out: &mut [T]) {
    for (out, code) in out.iter_mut().zip(codes) {
        *out = T::rounded(round::<TO>((f32::from(*code) - zero) * scale));
    }
}

/// Columns in any order: what belongs to each is gathered first, so that the arithmetic is vectorised.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma+f16c", "x86_64+avx2+fma+f16c"))]
fn in_order<const TO: u8, T: Number>(codes: &[u8], groups: &[Group], order: &[i32], out: &mut [T]) {
    let pieces = out.chunks_mut(PIECE).zip(codes.chunks(PIECE)).zip(order.chunks(PIECE));
    for ((out, codes), order) in pieces {
        let (mut scales, mut zeros) = ([0f32; PIECE], [0f32; PIECE]);
        for ((scale, zero), group) in scales.iter_mut().zip(&mut zeros).zip(order) {
            Group { scale: *scale, zero: *zero } = groups[*group as usize];
        }
        for (((out, code), scale), zero) in out.iter_mut().zip(codes).zip(&scales).zip(&zeros) {
            *out = T::rounded(round::<TO>((f32::from(*code) - zero) * scale));
        }
    }
}

/// Codes of `bits` bits as bytes; as many as `codes` holds, a multiple of eight, and zeros where `bytes` ends before.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma+f16c", "x86_64+avx2+fma+f16c"))]
pub(in crate::quant) fn unpack(bytes: &[u8], bits: u32, codes: &mut [u8]) {
    let mut unpacked = 0;
    match bits {
        8 => {
            unpacked = codes.len().min(bytes.len());
            codes[..unpacked].copy_from_slice(&bytes[..unpacked]);
        }
        4 => {
            for (codes, byte) in codes.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
                *codes = [byte & 15, byte >> 4];
                unpacked += 2;
            }
        }
        2 => {
            for (codes, byte) in codes.as_chunks_mut::<4>().0.iter_mut().zip(bytes) {
                *codes = [byte & 3, byte >> 2 & 3, byte >> 4 & 3, byte >> 6];
                unpacked += 4;
            }
        }
        _ => {
            for (codes, own) in codes.as_chunks_mut::<8>().0.iter_mut().zip(bytes.as_chunks::<3>().0) {
                let all = u32::from_le_bytes([own[0], own[1], own[2], 0]);
                for (i, code) in codes.iter_mut().enumerate() {
                    *code = (all >> (3 * i) & 7) as u8;
                }
                unpacked += 8;
            }
        }
    }
    codes[unpacked..].fill(0);
}
