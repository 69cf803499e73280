//! Products of small fp32 matrices that lie in the nearest caches: tiles of the result stay in registers. Libtorch's own spend much of
//! their time on finding out what to do with matrices of 64 by 64.
//!
//! Rows are handled [`ROWS`] at a time and columns [`COLUMNS`] at a time, so both are filled up to a multiple by who calls.

use std::ops::Range;

use multiversion::multiversion;
use multiversion::target::{match_target, target_cfg_f};

use super::multiply_add;

/// Rows of a tile.
pub(in crate::ops) const ROWS: usize = 4;

/// Widths are multiples of it.
pub(in crate::ops) const COLUMNS: usize = 32;

/// A left operand: its element (i, p) is at `i * row + p * column`.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Left<'a> {
    elements: &'a [f32],
    row: usize,
    column: usize,
}

impl<'a> Left<'a> {
    /// A matrix as it lies, its rows `stride` apart.
    pub(in crate::ops) fn plain(elements: &'a [f32], stride: usize) -> Self {
        Self { elements, row: stride, column: 1 }
    }

    /// The transpose of a matrix whose rows are `stride` apart.
    pub(in crate::ops) fn turned(elements: &'a [f32], stride: usize) -> Self {
        Self { elements, row: 1, column: stride }
    }

    #[inline(always)]
    fn at(self, i: usize, p: usize) -> f32 {
        self.elements[i * self.row + p * self.column]
    }
}

/// What of the matrices is not zero or not wanted. A tile's rows are taken as one: those that begin at row i, up to i + [`ROWS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::ops) enum Part {
    /// All.
    Whole,
    /// Of the left operand what is on and below the diagonal.
    LowerLeft,
    /// Of the left operand what is on and above the diagonal.
    UpperLeft,
    /// Of the result what is on and below the diagonal: beyond, it is left as it was, or made.
    LowerResult,
}

impl Part {
    /// Which of `inner` terms the rows from `i` on have.
    #[inline(always)]
    fn terms(self, i: usize, inner: usize) -> Range<usize> {
        match self {
            Self::Whole | Self::LowerResult => 0..inner,
            Self::LowerLeft => 0..inner.min(i + ROWS),
            Self::UpperLeft => i..inner,
        }
    }

    /// Whether the rows from `i` on want the columns from `j` on.
    #[inline(always)]
    fn wants(self, i: usize, j: usize) -> bool {
        self != Self::LowerResult || j < i + ROWS
    }
}

/// `out (m, n) = left (m, k) right (k, n)`, added to `out` where `add`; rows of right and out are as far apart as said. m is a multiple
/// of [`ROWS`], n one of [`COLUMNS`].
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
pub(in crate::ops) fn product(
    size: [usize; 3],
    part: Part,
    left: Left<'_>,
    right: (&[f32], usize),
    out: (&mut [f32], usize),
    add: bool,
) {
    let fused = target_cfg_f!(target_feature = "fma");
    match_target! {
        "x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma" => product_of::<32>(fused, size, part, left, right, out, add),
        _ => product_of::<16>(fused, size, part, left, right, out, add),
    }
}

#[inline(always)]
fn product_of<const N: usize>(
    fused: bool,
    [m, n, k]: [usize; 3],
    part: Part,
    left: Left<'_>,
    (right, right_stride): (&[f32], usize),
    (out, stride): (&mut [f32], usize),
    add: bool,
) {
    for j in (0..n).step_by(N) {
        for i in (0..m).step_by(ROWS).filter(|i| part.wants(*i, j)) {
            let mut sums = [[0f32; N]; ROWS];
            for p in part.terms(i, k) {
                let right: &[f32; N] = right[p * right_stride + j..][..N].try_into().expect("N columns");
                for (row, sums) in sums.iter_mut().enumerate() {
                    let factor = left.at(i + row, p);
                    for (sum, right) in sums.iter_mut().zip(right) {
                        *sum = multiply_add(fused, factor, *right, *sum);
                    }
                }
            }
            for (row, sums) in sums.iter().enumerate() {
                let out = &mut out[(i + row) * stride + j..][..N];
                if add {
                    out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
                } else {
                    out.copy_from_slice(sums);
                }
            }
        }
    }
}

/// `(I + A)^-1 x` in place of x (m, n), or `(I + A)^-T x` where `turned`; of A only what is below the diagonal is read. Rows of A and
/// of x are as far apart as said; m is a multiple of [`ROWS`], n one of [`COLUMNS`].
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
pub(in crate::ops) fn solve(size: [usize; 2], a: (&[f32], usize), turned: bool, x: (&mut [f32], usize)) {
    let fused = target_cfg_f!(target_feature = "fma");
    match_target! {
        "x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma" => solve_of::<32>(fused, size, a, turned, x),
        _ => solve_of::<16>(fused, size, a, turned, x),
    }
}

#[inline(always)]
fn solve_of<const N: usize>(
    fused: bool,
    [m, n]: [usize; 2],
    (a, a_stride): (&[f32], usize),
    turned: bool,
    (x, stride): (&mut [f32], usize),
) {
    for j in (0..n).step_by(N) {
        for step in (0..m).step_by(ROWS) {
            let i = if turned { m - ROWS - step } else { step };
            let left = if turned { Left::turned(a, a_stride) } else { Left::plain(a, a_stride) };
            let mut rows = [[0f32; N]; ROWS];
            for (row, rows) in rows.iter_mut().enumerate() {
                rows.copy_from_slice(&x[(i + row) * stride + j..][..N]);
            }
            // What is known already, then what these rows say of each other.
            for p in if turned { i + ROWS..m } else { 0..i } {
                let known: &[f32; N] = x[p * stride + j..][..N].try_into().expect("N columns");
                for (row, rows) in rows.iter_mut().enumerate() {
                    let factor = -left.at(i + row, p);
                    for (value, known) in rows.iter_mut().zip(known) {
                        *value = multiply_add(fused, factor, *known, *value);
                    }
                }
            }
            for first in 1..ROWS {
                for second in 0..first {
                    let (row, by) = if turned { (ROWS - 1 - first, ROWS - 1 - second) } else { (first, second) };
                    let (factor, known) = (-left.at(i + row, i + by), rows[by]);
                    for (value, known) in rows[row].iter_mut().zip(&known) {
                        *value = multiply_add(fused, factor, *known, *value);
                    }
                }
            }
            for (row, rows) in rows.iter().enumerate() {
                x[(i + row) * stride + j..][..N].copy_from_slice(rows);
            }
        }
    }
}

/// Rows and columns of a square that is turned at once.
const SQUARE: usize = 16;

/// The transpose (n, m) of x (m, n), whose rows are as far apart as said; m and n are multiples of 16.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
pub(in crate::ops) fn transpose(
    [m, n]: [usize; 2],
    (x, x_stride): (&[f32], usize),
    (out, stride): (&mut [f32], usize),
) {
    for i in (0..m).step_by(SQUARE) {
        for j in (0..n).step_by(SQUARE) {
            let mut turned = [[0f32; SQUARE]; SQUARE];
            for row in 0..SQUARE {
                let x: &[f32; SQUARE] = x[(i + row) * x_stride + j..][..SQUARE].try_into().expect("a row of a square");
                for column in 0..SQUARE {
                    turned[column][row] = x[column];
                }
            }
            for (column, turned) in turned.iter().enumerate() {
                out[(j + column) * stride + i..][..SQUARE].copy_from_slice(turned);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7 + seed * 5) % 23) as f32 * 0.1 - 1.1).collect()
    }

    fn close(found: f32, expected: f64, what: &str) {
        assert!(
            (f64::from(found) - expected).abs() < 1e-4 * expected.abs().max(1.0),
            "{what}: {found}, not {expected}"
        );
    }

    #[test]
    fn products_are_those_of_plain_sums_whatever_part_is_asked_for() {
        let ([m, n, k], right_stride, stride) = ([12, 64, 12], 70, 66);
        for (part, turned, add) in [
            (Part::Whole, false, false),
            (Part::Whole, true, true),
            (Part::LowerLeft, false, true),
            (Part::UpperLeft, true, false),
            (Part::LowerResult, false, false),
        ] {
            let mut left = numbers(k * m, 1);
            let at = |i: usize, p: usize| if turned { p * m + i } else { i * k + p };
            for (i, p) in (0..m).flat_map(|i| (0..k).map(move |p| (i, p))) {
                if part == Part::LowerLeft && p > i || part == Part::UpperLeft && p < i {
                    left[at(i, p)] = 0.0;
                }
            }
            let right = numbers(k * right_stride, 2);
            let before = numbers(m * stride, 3);
            let mut out = before.clone();
            let operand = if turned { Left::turned(&left, m) } else { Left::plain(&left, k) };
            product([m, n, k], part, operand, (&right, right_stride), (&mut out, stride), add);
            for (i, j) in (0..m).flat_map(|i| (0..stride).map(move |j| (i, j))) {
                let own = f64::from(before[i * stride + j]);
                let sum: f64 = (0..k).map(|p| f64::from(left[at(i, p)]) * f64::from(right[p * right_stride + j])).sum();
                let made = j < n && (part != Part::LowerResult || j <= i);
                if made || j >= n {
                    let expected = if j >= n { own } else { sum + if add { own } else { 0.0 } };
                    close(out[i * stride + j], expected, &format!("{part:?}, row {i}, column {j}"));
                }
            }
        }
    }

    #[test]
    fn what_is_solved_for_gives_back_what_was_asked() {
        let ([m, n], a_stride, stride) = ([16, 32], 20, 40);
        let (a, asked) = (numbers(m * a_stride, 4), numbers(m * stride, 5));
        for turned in [false, true] {
            let mut x = asked.clone();
            solve([m, n], (&a, a_stride), turned, (&mut x, stride));
            let below = |i: usize, j: usize| match i.cmp(&j) {
                std::cmp::Ordering::Less => 0.0,
                std::cmp::Ordering::Equal => 1.0,
                std::cmp::Ordering::Greater => f64::from(a[i * a_stride + j]),
            };
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let factor = |p: usize| if turned { below(p, i) } else { below(i, p) };
                let (sum, size) = (0..m).fold((0.0, 1.0f64), |(sum, size), p| {
                    let term = factor(p) * f64::from(x[p * stride + j]);
                    (sum + term, size.max(term.abs()))
                });
                let off = (sum - f64::from(asked[i * stride + j])).abs() / size;
                assert!(off < 1e-5, "turned: {turned}, row {i}, column {j} is off by {off:e}");
            }
            assert!((0..m).all(|i| x[i * stride + n..(i + 1) * stride] == asked[i * stride + n..(i + 1) * stride]));
        }
    }

    #[test]
    fn a_transpose_turned_again_is_what_it_was() {
        let x = numbers(32 * 50, 6);
        let (mut turned, mut again) = (vec![0.0; 48 * 33], vec![0.0; 32 * 50]);
        transpose([32, 48], (&x, 50), (&mut turned, 33));
        assert_eq!(turned[5 * 33 + 7], x[7 * 50 + 5]);
        transpose([48, 32], (&turned, 33), (&mut again, 50));
        assert!((0..32).all(|i| x[i * 50..][..48] == again[i * 50..][..48]));
    }
}
