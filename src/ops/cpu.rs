//! CPU kernels of the operations that libtorch would do in many passes over memory: one pass here, fp32 inside, compiled
//! for AVX-512, AVX2 and the baseline and chosen at run time. Their slow twins are the libtorch compositions beside each
//! operation, which serve every other device.

use multiversion::multiversion;
use multiversion::target::target_cfg_f;
use tch::{Device, Kind, Tensor};

use super::rope::{RopeLayout, Rotation};
pub(super) use crate::torch_ext::Number as Stored;
use crate::torch_ext::{elements, filled, filled_beside, filled_pair};

/// Whether the kernels serve these tensors: on the CPU, contiguous, one floating type that they know.
#[cfg_attr(test, track_caller)]
pub(super) fn serves(tensors: &[&Tensor]) -> bool {
    #[cfg(test)]
    if tests::SWITCHED_OFF.get() || super::testing::is_off(std::panic::Location::caller()) {
        return false;
    }
    let kind = tensors[0].kind();
    matches!(kind, Kind::Float | Kind::BFloat16 | Kind::Half)
        && tensors.iter().all(|t| t.device() == Device::Cpu && t.is_contiguous() && t.kind() == kind)
}

/// Calls a generic kernel for the number type of a tensor that [`serves`] accepted.
macro_rules! by_kind {
    ($kind:expr, $kernel:ident($($argument:expr),*)) => {
        match $kind {
            tch::Kind::BFloat16 => $kernel::<half::bf16>($($argument),*),
            tch::Kind::Half => $kernel::<half::f16>($($argument),*),
            _ => $kernel::<f32>($($argument),*),
        }
    };
}
pub(super) use by_kind;

mod activation;
pub(super) mod choice;
pub(super) mod gate_up;
pub(super) mod latent;
mod loss;
mod normed_rope;
mod parts;
pub(super) mod products;
pub(super) mod rows;
pub(super) mod stream_weights;
pub(super) mod streams;
pub(super) mod windows;

pub(super) use activation::{gated, gated_backward};
pub(super) use loss::softmax_cross_entropy;
pub(super) use normed_rope::{norm_and_rotate, norm_and_rotate_backward};
pub(super) use parts::Parts;

pub(super) const LANES: usize = 16;

/// Partial sums of a sum: enough for the additions of several registers to overlap.
const SUMS: usize = 32;

/// Sum of `term(x)`. Slices, not indices: with a bound to check before every term the loop would not become vector instructions.
#[inline(always)]
pub(super) fn sum<A: Stored>(a: &[A], term: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0f32; SUMS];
    let (whole, rest) = a.as_chunks::<SUMS>();
    for a in whole {
        for i in 0..SUMS {
            sums[i] += term(a[i].wide());
        }
    }
    folded(sums) + rest.iter().map(|a| term(a.wide())).sum::<f32>()
}

/// Sum of `term(a, b, c)`.
#[inline(always)]
pub(super) fn sum_of_three<A: Stored, B: Stored, C: Stored>(
    a: &[A],
    b: &[B],
    c: &[C],
    term: impl Fn(f32, f32, f32) -> f32,
) -> f32 {
    assert!(a.len() == b.len() && b.len() == c.len(), "as many of all");
    let mut sums = [0f32; SUMS];
    let ((a, a_rest), (b, b_rest), (c, c_rest)) = (a.as_chunks::<SUMS>(), b.as_chunks::<SUMS>(), c.as_chunks::<SUMS>());
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for i in 0..SUMS {
            sums[i] += term(a[i].wide(), b[i].wide(), c[i].wide());
        }
    }
    let rest = a_rest.iter().zip(b_rest).zip(c_rest);
    folded(sums) + rest.map(|((a, b), c)| term(a.wide(), b.wide(), c.wide())).sum::<f32>()
}

/// The sum of partial sums, halves onto halves.
#[inline(always)]
fn folded(mut sums: [f32; SUMS]) -> f32 {
    let mut width = SUMS;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            sums[i] += sums[i + width];
        }
    }
    sums[0]
}

/// The product of a with b; `fused` as in [`multiply_add`].
#[inline(always)]
pub(super) fn dot<A: Stored, B: Stored>(a: &[A], b: &[B], fused: bool) -> f32 {
    assert_eq!(a.len(), b.len(), "as many of both");
    let mut sums = [0f32; SUMS];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<SUMS>(), b.as_chunks::<SUMS>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..SUMS {
            sums[i] = multiply_add(fused, a[i].wide(), b[i].wide(), sums[i]);
        }
    }
    folded(sums) + a_rest.iter().zip(b_rest).map(|(a, b)| a.wide() * b.wide()).sum::<f32>()
}

/// `a * b + c`, in one instruction where the caller is compiled for a processor that has it.
#[inline(always)]
pub(super) fn multiply_add(fused: bool, a: f32, b: f32, c: f32) -> f32 {
    if fused { a.mul_add(b, c) } else { a * b + c }
}

/// e^x to 2 units in the last place, without a branch: Cody and Waite's reduction, a polynomial of degree 6.
///
/// `fused` says whether the calling function is compiled with fused multiply-add: without the instruction, it is a slow call.
#[inline(always)]
pub(super) fn exp(x: f32, fused: bool) -> f32 {
    let x = x.clamp(-87.336_54, 88.0);
    let magic = 12_582_912.0; // 1.5 * 2^23: adding and taking it away rounds to a whole number
    let n = multiply_add(fused, x, std::f32::consts::LOG2_E, magic) - magic;
    let r = multiply_add(fused, n, 2.121_944_4e-4, multiply_add(fused, n, -0.693_359_4, x));
    let p = 1.987_569_1e-4;
    let p = multiply_add(fused, p, r, 1.398_199_9e-3);
    let p = multiply_add(fused, p, r, 8.333_452e-3);
    let p = multiply_add(fused, p, r, 4.166_579_6e-2);
    let p = multiply_add(fused, p, r, 1.666_666_5e-1);
    let p = multiply_add(fused, p, r, 0.5);
    let p = multiply_add(fused, p, r * r, r) + 1.0;
    p * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

#[inline(always)]
pub(super) fn sigmoid(x: f32, fused: bool) -> f32 {
    1.0 / (1.0 + exp(-x, fused))
}

/// tanh x to 3e-7, absolute.
#[inline(always)]
pub(super) fn tanh(x: f32, fused: bool) -> f32 {
    1.0 - 2.0 / (1.0 + exp(2.0 * x, fused))
}

/// RMSNorm, or LayerNorm where `centred`: y (T, D) and each row's mean and 1/deviation (T, 2), of x (T, D) with w (P, D), b (D).
pub(super) fn norm(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64, centred: bool) -> (Tensor, Tensor) {
    by_kind!(x.kind(), norm_of(x, weight, bias, eps as f32, centred))
}

fn norm_of<S: Stored>(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f32, centred: bool) -> (Tensor, Tensor) {
    let (rows, width) = x.size2().expect("(T, D)");
    let (w, bias, d) = (Turns::new(weight, width), bias.map(elements::<f32>), width as usize);
    let x = elements::<S>(x);
    let [y, stats] = filled_pair::<S, f32>(&[rows, width], &[rows, 2], |range, y, stats| {
        let x = &x[range.start * d..range.end * d];
        norm_stats(x, d, eps, centred, stats);
        norm_rows(x, w.from(range.start), bias, stats, y);
    });
    (y, stats)
}

/// `h + given * factor` (T, D), and what [`norm`] makes of it.
pub(super) fn norm_of_sum(
    h: &Tensor,
    given: &Tensor,
    factor: f64,
    weight: &Tensor,
    bias: Option<&Tensor>,
    eps: f64,
    centred: bool,
) -> (Tensor, Tensor, Tensor) {
    by_kind!(h.kind(), norm_of_sum_of(h, given, factor as f32, weight, bias, eps as f32, centred))
}

fn norm_of_sum_of<S: Stored>(
    h: &Tensor,
    given: &Tensor,
    factor: f32,
    weight: &Tensor,
    bias: Option<&Tensor>,
    eps: f32,
    centred: bool,
) -> (Tensor, Tensor, Tensor) {
    let (rows, width) = h.size2().expect("(T, D)");
    assert_eq!(given.size(), h.size(), "as much is given as there is");
    let (w, bias, d) = (Turns::new(weight, width), bias.map(elements::<f32>), width as usize);
    let (h, given) = (elements::<S>(h), elements::<S>(given));
    let ([sum, y], stats) = filled_beside([&[rows, width]; 2], &[rows, 2], |range, [sum, y]: [&mut [S]; 2], stats| {
        let span = range.start * d..range.end * d;
        add_rows(&h[span.clone()], &given[span], factor, sum);
        norm_stats(sum, d, eps, centred, stats);
        norm_rows(sum, w.from(range.start), bias, stats, y);
    });
    (sum, y, stats)
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn add_rows<S: Stored>(h: &[S], given: &[S], factor: f32, sum: &mut [S]) {
    for ((h, given), sum) in h.iter().zip(given).zip(sum) {
        *sum = S::rounded(h.wide() + given.wide() * factor);
    }
}

/// y (T, D) of [`norm`] again, from the kept statistics (T, 2).
pub(super) fn norm_again(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, stats: &Tensor) -> Tensor {
    by_kind!(x.kind(), norm_again_of(x, weight, bias, stats))
}

fn norm_again_of<S: Stored>(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, stats: &Tensor) -> Tensor {
    let (size, d) = (x.size(), x.size()[1] as usize);
    let (w, bias) = (Turns::new(weight, d as i64), bias.map(elements::<f32>));
    let (x, stats) = (elements::<S>(x), elements::<f32>(stats));
    filled::<S>(&size, |range, y| {
        let stats = &stats[range.start * 2..range.end * 2];
        norm_rows(&x[range.start * d..range.end * d], w.from(range.start), bias, stats, y);
    })
}

/// dx (T, D) of [`norm`], with `more` (T, D) added if given.
pub(super) fn norm_backward(
    dy: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    stats: &Tensor,
    centred: bool,
    more: Option<&Tensor>,
) -> Tensor {
    by_kind!(x.kind(), norm_backward_of(dy, x, weight, stats, centred, more))
}

fn norm_backward_of<S: Stored>(
    dy: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    stats: &Tensor,
    centred: bool,
    more: Option<&Tensor>,
) -> Tensor {
    assert!(more.is_none_or(|more| more.size() == x.size()), "as much is added as there is");
    let (size, d) = (x.size(), x.size()[1] as usize);
    let w = Turns::new(weight, d as i64);
    let (dy, x, stats, more) = (elements::<S>(dy), elements::<S>(x), elements::<f32>(stats), more.map(elements::<S>));
    filled::<S>(&size, |range, dx| {
        let span = range.start * d..range.end * d;
        let stats = &stats[range.start * 2..range.end * 2];
        let more = more.map(|more| &more[span.clone()]);
        norm_backward_rows(&dy[span.clone()], &x[span], w.from(range.start), stats, centred, more, dx);
    })
}

/// Weights (P, D) of which row i takes the one numbered i mod P.
#[derive(Clone, Copy)]
struct Turns<'a> {
    weights: &'a [f32],
    width: usize,
    /// Which one the first row takes.
    first: usize,
}

impl<'a> Turns<'a> {
    fn new(weight: &'a Tensor, width: i64) -> Self {
        let of = weight.size().last().copied().unwrap_or(0);
        assert_eq!(of, width, "a norm's weight is as wide as what it norms");
        Self { weights: elements::<f32>(weight), width: width as usize, first: 0 }
    }

    fn from(self, row: usize) -> Self {
        Self { first: row, ..self }
    }

    #[inline(always)]
    fn of(&self, row: usize) -> &'a [f32] {
        let turn = (self.first + row) % (self.weights.len() / self.width);
        &self.weights[turn * self.width..(turn + 1) * self.width]
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn norm_stats<S: Stored>(x: &[S], d: usize, eps: f32, centred: bool, stats: &mut [f32]) {
    for (x, stats) in x.chunks_exact(d).zip(stats.chunks_exact_mut(2)) {
        let mean = if centred { sum(x, |x| x) / d as f32 } else { 0.0 };
        let squares = sum(x, |x| (x - mean) * (x - mean));
        stats[0] = mean;
        stats[1] = 1.0 / (squares / d as f32 + eps).sqrt();
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn norm_rows<X: Stored, S: Stored>(x: &[X], weights: Turns<'_>, bias: Option<&[f32]>, stats: &[f32], y: &mut [S]) {
    let d = weights.width;
    let rows = x.chunks_exact(d).zip(y.chunks_exact_mut(d)).zip(stats.chunks_exact(2));
    for (row, ((x, y), stats)) in rows.enumerate() {
        let (weight, mean, scale) = (weights.of(row), stats[0], stats[1]);
        match bias {
            None => (0..d).for_each(|i| y[i] = S::rounded((x[i].wide() - mean) * scale * weight[i])),
            Some(bias) => (0..d).for_each(|i| y[i] = S::rounded((x[i].wide() - mean) * scale * weight[i] + bias[i])),
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn norm_backward_rows<G: Stored, S: Stored>(
    dy: &[G],
    x: &[S],
    weights: Turns<'_>,
    stats: &[f32],
    centred: bool,
    more: Option<&[S]>,
    dx: &mut [S],
) {
    let d = weights.width;
    let rows = dy.chunks_exact(d).zip(x.chunks_exact(d)).zip(dx.chunks_exact_mut(d)).zip(stats.chunks_exact(2));
    for (row, (((dy, x), dx), stats)) in rows.enumerate() {
        let (weight, mean, scale) = (weights.of(row), stats[0], stats[1]);
        let dot = sum_of_three(dy, weight, x, |dy, weight, x| dy * weight * (x - mean));
        let along = dot * scale * scale / d as f32;
        let shift = if centred { self::dot(dy, weight, target_cfg_f!(target_feature = "fma")) / d as f32 } else { 0.0 };
        let own = |i: usize| (dy[i].wide() * weight[i] - shift - (x[i].wide() - mean) * along) * scale;
        match more.map(|more| &more[row * d..(row + 1) * d]) {
            None => (0..d).for_each(|i| dx[i] = S::rounded(own(i))),
            Some(more) => (0..d).for_each(|i| dx[i] = S::rounded(own(i) + more[i].wide())),
        }
    }
}

/// x (T, N, H) rotated from element `first` of each head on; `direction` -1 turns back.
pub(super) fn rotate(x: &Tensor, rotation: &Rotation, first: i64, direction: f32) -> Tensor {
    by_kind!(x.kind(), rotate_of(x, rotation, first as usize, direction))
}

fn rotate_of<S: Stored>(x: &Tensor, rotation: &Rotation, first: usize, direction: f32) -> Tensor {
    let (_, heads, head) = x.size3().expect("(T, N, H)");
    let (half, layout) = (rotation.cos.size()[1] as usize, rotation.layout);
    let (size, row, head) = (x.size(), (heads * head) as usize, head as usize);
    let (x, cos, sin) = (elements::<S>(x), elements::<f32>(&rotation.cos), elements::<f32>(&rotation.sin));
    filled::<S>(&size, |range, y| {
        let x = &x[range.start * row..range.end * row];
        let angles = range.start * half..range.end * half;
        let tables = (&cos[angles.clone()], &sin[angles]);
        match layout {
            RopeLayout::Halves => rotate_halves(x, tables, (row, head, first), direction, y),
            RopeLayout::Pairs => rotate_pairs(x, tables, (row, head, first), direction, y),
        }
    })
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn rotate_halves<X: Stored, S: Stored>(
    x: &[X],
    (cos, sin): (&[f32], &[f32]),
    (row, head, first): (usize, usize, usize),
    direction: f32,
    y: &mut [S],
) {
    let half = cos.len() * row / x.len().max(1);
    let tokens =
        x.chunks_exact(row).zip(y.chunks_exact_mut(row)).zip(cos.chunks_exact(half).zip(sin.chunks_exact(half)));
    for ((x, y), (cos, sin)) in tokens {
        for (x, y) in x.chunks_exact(head).zip(y.chunks_exact_mut(head)) {
            let ((before, x), (before_y, y)) = (x.split_at(first), y.split_at_mut(first));
            stay(before, before_y);
            let ((x1, rest), (y1, rest_y)) = (x.split_at(half), y.split_at_mut(half));
            let ((x2, still), (y2, still_y)) = (rest.split_at(half), rest_y.split_at_mut(half));
            for i in 0..half {
                let (c, s) = (cos[i], sin[i] * direction);
                y1[i] = S::rounded(x1[i].wide() * c - x2[i].wide() * s);
                y2[i] = S::rounded(x2[i].wide() * c + x1[i].wide() * s);
            }
            stay(still, still_y);
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn rotate_pairs<X: Stored, S: Stored>(
    x: &[X],
    (cos, sin): (&[f32], &[f32]),
    (row, head, first): (usize, usize, usize),
    direction: f32,
    y: &mut [S],
) {
    let half = cos.len() * row / x.len().max(1);
    let tokens =
        x.chunks_exact(row).zip(y.chunks_exact_mut(row)).zip(cos.chunks_exact(half).zip(sin.chunks_exact(half)));
    for ((x, y), (cos, sin)) in tokens {
        for (x, y) in x.chunks_exact(head).zip(y.chunks_exact_mut(head)) {
            let ((before, x), (before_y, y)) = (x.split_at(first), y.split_at_mut(first));
            stay(before, before_y);
            let ((x, still), (y, still_y)) = (x.split_at(2 * half), y.split_at_mut(2 * half));
            for i in 0..half {
                let (c, s) = (cos[i], sin[i] * direction);
                let (first, second) = (x[2 * i].wide(), x[2 * i + 1].wide());
                y[2 * i] = S::rounded(first * c - second * s);
                y[2 * i + 1] = S::rounded(second * c + first * s);
            }
            stay(still, still_y);
        }
    }
}

#[inline(always)]
fn stay<X: Stored, S: Stored>(x: &[X], y: &mut [S]) {
    for (x, y) in x.iter().zip(y) {
        *y = S::rounded(x.wide());
    }
}

#[cfg(test)]
pub(super) mod tests {
    use half::bf16;

    use super::*;

    thread_local! {
        pub(in crate::ops) static SWITCHED_OFF: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
    }

    /// Runs `body` on the libtorch compositions that serve every other device.
    pub(in crate::ops) fn without_kernels<T>(body: impl FnOnce() -> T) -> T {
        SWITCHED_OFF.set(true);
        let result = body();
        SWITCHED_OFF.set(false);
        result
    }

    #[test]
    fn the_exponential_is_within_two_units_in_the_last_place() {
        for i in 0..400_000 {
            let x = -87.0 + i as f32 * (175.0 / 400_000.0);
            let exact = f64::from(x).exp();
            for fused in [false, true] {
                let error = ((f64::from(exp(x, fused)) - exact) / exact).abs();
                assert!(error < 2.4e-7, "exp({x}) is off by {error:e} (fused: {fused})");
            }
        }
        assert!(exp(-1e30, false) < 1.3e-38 && exp(f32::NAN, true).is_nan());
    }

    #[test]
    fn rounding_to_bf16_is_to_nearest_even_and_keeps_nan() {
        for bits in (0..u32::MAX).step_by(65_537 / 7) {
            let value = f32::from_bits(bits);
            let (found, expected) = (<bf16 as Stored>::rounded(value), bf16::from_f32(value));
            assert!(found == expected || (found.is_nan() && expected.is_nan()), "{value:e}: {found:?} {expected:?}");
        }
    }

    #[test]
    fn a_nan_logit_is_seen_in_the_loss_and_the_gradient() {
        let logits = Tensor::from_slice(&[0.5f32, f32::NAN, 1.0, 2.0]).view([1, 4]);
        let (loss, gradient) =
            softmax_cross_entropy(&logits, crate::ops::LogitMap::PLAIN, &Tensor::from_slice(&[3i64]), 1.0);
        assert!(loss.double_value(&[0, 0]).is_nan());
        assert!(gradient.isnan().any().int64_value(&[]) == 1);
    }
}
