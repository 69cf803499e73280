//! How operands are laid out for the micro-kernel, and how its sums are laid out and rounded again.

use half::bf16;
use multiversion::multiversion;
use multiversion::target::target_cfg_f;

use super::BLOCK;
use crate::ops::cpu::{self, LANES, Stored};
use crate::torch_ext::Rows;

/// `sum_h a[row, h] b[row, h]` of every row.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
pub(super) fn dot_rows(a: Rows<'_>, b: Rows<'_>, width: usize, dots: &mut [f32]) {
    for (row, dot) in dots.iter_mut().enumerate() {
        let (a, b) = (&a.elements[row * a.stride..][..width], &b.elements[row * b.stride..][..width]);
        *dot = cpu::dot(a, b, target_cfg_f!(target_feature = "fma"));
    }
}

/// Rounds sums to bf16.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
pub(super) fn round(sums: &[f32], out: &mut [bf16]) {
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = Stored::rounded(*sum);
    }
}

/// Rounds sums (width, rows) into `out` (rows, width), whose rows lie `stride` apart.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
pub(super) fn round_transposed(sums: &[f32], (rows, width): (usize, usize), stride: usize, out: &mut [bf16]) {
    for first in (0..width).step_by(LANES) {
        let lanes = LANES.min(width - first);
        for row in 0..rows {
            let out = &mut out[row * stride + first..][..lanes];
            for (lane, out) in out.iter_mut().enumerate() {
                *out = Stored::rounded(sums[(first + lane) * rows + row]);
            }
        }
    }
}

/// A right operand (width, rows) from x (rows, width): pairs of a row's elements side by side, (width/2, rows, 2).
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
pub(super) fn pack_transposed(x: Rows<'_>, rows: usize, width: usize, packed: &mut [bf16]) {
    across::<2>(x, (rows, width), rows, packed.as_chunks_mut().0);
}

/// A right operand (rows, width) from x (rows, width): pairs of rows side by side, (rows/2, width, 2); an odd last row is
/// paired with zeros.
pub(super) fn pack_rows(x: Rows<'_>, rows: usize, width: usize, packed: &mut [bf16]) {
    for row in (0..rows).step_by(2) {
        let upper = &x.elements[row * x.stride..][..width];
        let packed = &mut packed[row * width..][..2 * width];
        if row + 1 < rows {
            let lower = &x.elements[(row + 1) * x.stride..][..width];
            for ((pair, upper), lower) in packed.chunks_exact_mut(2).zip(upper).zip(lower) {
                pair[0] = *upper;
                pair[1] = *lower;
            }
        } else {
            for (pair, upper) in packed.chunks_exact_mut(2).zip(upper) {
                pair[0] = *upper;
                pair[1] = bf16::ZERO;
            }
        }
    }
}

/// x (rows, width) as (width, rows), rows of it [`BLOCK`] apart; what lies beyond `rows` stays as it is (zero).
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
pub(super) fn transpose(x: Rows<'_>, rows: usize, width: usize, transposed: &mut [bf16]) {
    across::<1>(x, (rows, width), BLOCK, transposed.as_chunks_mut().0);
}

/// x (rows, width / N, N) as (width / N, rows, N), rows of it `pitch` apart. Rows of x are read side by side, so that memory is
/// waited for once for all of them.
#[inline(always)]
fn across<const N: usize>(x: Rows<'_>, (rows, width): (usize, usize), pitch: usize, out: &mut [[bf16; N]]) {
    let (stride, whole) = (x.stride, rows - rows % LANES);
    for first in (0..whole).step_by(LANES) {
        let x = &x.elements[first * stride..];
        for column in 0..width / N {
            let out = out[column * pitch + first..].first_chunk_mut::<LANES>().expect("rows of a tile");
            for (row, out) in out.iter_mut().enumerate() {
                *out = *x[row * stride + column * N..].first_chunk().expect("a row's elements");
            }
        }
    }
    for row in whole..rows {
        for (column, x) in x.elements[row * stride..][..width].as_chunks().0.iter().enumerate() {
            out[column * pitch + row] = *x;
        }
    }
}
