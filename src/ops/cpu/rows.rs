//! Rows gathered, summed and multiplied by lists of where they are.

use multiversion::multiversion;
use multiversion::target::target_cfg_f;
use tch::Tensor;

use super::{Stored, dot, multiply_add};
use crate::torch_ext::{elements, filled};

/// The rows of x (T, D) in the order of `from` (S), each times its factor (S, 1), fp32, if given; zeros where there is none: (S, D).
pub(in crate::ops) fn gathered(x: &Tensor, from: &[Option<u32>], factors: Option<&Tensor>) -> Tensor {
    by_kind!(x.kind(), gathered_of(x, from, factors))
}

fn gathered_of<S: Stored>(x: &Tensor, from: &[Option<u32>], factors: Option<&Tensor>) -> Tensor {
    let (x, width, factors) = (elements::<S>(x), x.size()[1], factors.map(elements::<f32>));
    let d = width as usize;
    filled::<S>(&[from.len() as i64, width], |range, y| {
        for (row, y) in range.zip(y.chunks_exact_mut(d)) {
            let Some(at) = from[row] else {
                y.fill(S::rounded(0.0));
                continue;
            };
            let x = &x[at as usize * d..][..d];
            match factors {
                Some(factors) => scaled_row(x, factors[row], y),
                None => y.copy_from_slice(x),
            }
        }
    })
}

/// The sum of C rows of `rows` (S, D) for each token, those that `of_places` (T C) names, each times its weight of (T, C), fp32, if
/// given, and of the residual (T, D), if given: (T, D).
pub(in crate::ops) fn summed(
    rows: &Tensor,
    (of_places, choices): (&[u32], i64),
    weights: Option<&Tensor>,
    residual: Option<&Tensor>,
) -> Tensor {
    by_kind!(rows.kind(), summed_of(rows, (of_places, choices as usize), weights, residual))
}

fn summed_of<S: Stored>(
    rows: &Tensor,
    (of_places, choices): (&[u32], usize),
    weights: Option<&Tensor>,
    residual: Option<&Tensor>,
) -> Tensor {
    let (rows, width) = (elements::<S>(rows), rows.size()[1]);
    let (weights, residual) = (weights.map(elements::<f32>), residual.map(elements::<S>));
    let d = width as usize;
    filled::<S>(&[(of_places.len() / choices) as i64, width], |range, y| {
        for (token, y) in range.zip(y.chunks_exact_mut(d)) {
            let places = token * choices..(token + 1) * choices;
            let (of_places, weights) = (&of_places[places.clone()], weights.map(|weights| &weights[places]));
            let residual = residual.map(|residual| &residual[token * d..(token + 1) * d]);
            summed_row(rows, of_places, weights, residual, y);
        }
    })
}

/// The products of rows (S, D) with those of x (T, D) that `with` (S) names: (S, 1), fp32; 0 where there is none.
pub(in crate::ops) fn products(rows: &Tensor, x: &Tensor, with: &[Option<u32>]) -> Tensor {
    by_kind!(rows.kind(), products_of(rows, x, with))
}

fn products_of<S: Stored>(rows: &Tensor, x: &Tensor, with: &[Option<u32>]) -> Tensor {
    let (rows, x, d) = (elements::<S>(rows), elements::<S>(x), x.size()[1] as usize);
    filled::<f32>(&[with.len() as i64, 1], |range, products| {
        for (row, product) in range.zip(products) {
            *product = with[row].map_or(0.0, |at| dot_row(&rows[row * d..][..d], &x[at as usize * d..][..d]));
        }
    })
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn scaled_row<S: Stored>(x: &[S], factor: f32, y: &mut [S]) {
    for (x, y) in x.iter().zip(y) {
        *y = S::rounded(x.wide() * factor);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn dot_row<S: Stored>(a: &[S], b: &[S]) -> f32 {
    dot(a, b, target_cfg_f!(target_feature = "fma"))
}

/// Columns of a row done at a time: their sums stay in registers.
const COLUMNS: usize = 64;

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn summed_row<S: Stored>(rows: &[S], of_places: &[u32], weights: Option<&[f32]>, residual: Option<&[S]>, y: &mut [S]) {
    let (fused, d) = (target_cfg_f!(target_feature = "fma"), y.len());
    for (i, y) in y.chunks_mut(COLUMNS).enumerate() {
        let (from, count) = (i * COLUMNS, y.len());
        let mut sums = [0f32; COLUMNS];
        if let Some(residual) = residual {
            accumulate(fused, &mut sums, &residual[from..from + count], 1.0);
        }
        for (place, row) in of_places.iter().enumerate() {
            let first = *row as usize * d + from;
            accumulate(fused, &mut sums, &rows[first..first + count], weights.map_or(1.0, |weights| weights[place]));
        }
        for (y, sum) in y.iter_mut().zip(&sums) {
            *y = S::rounded(*sum);
        }
    }
}

/// Adds `x * factor` to the sums of as many columns.
#[inline(always)]
fn accumulate<S: Stored>(fused: bool, sums: &mut [f32; COLUMNS], x: &[S], factor: f32) {
    match <&[S; COLUMNS]>::try_from(x) {
        Ok(x) => (0..COLUMNS).for_each(|i| sums[i] = multiply_add(fused, x[i].wide(), factor, sums[i])),
        _ => x.iter().zip(sums).for_each(|(x, sum)| *sum = multiply_add(fused, x.wide(), factor, *sum)),
    }
}
