//! What is read from several copies of the stream and written to them, a token at a time: its copies stay in the nearest cache.

use multiversion::multiversion;
use tch::Tensor;

use super::{Stored, sum};
use crate::torch_ext::{elements, filled, filled_pair};

/// `sum_m pre_m h_m` (T, D) of h (T, M, D) and pre (T, M), fp32.
pub(in crate::ops) fn read(h: &Tensor, pre: &Tensor) -> Tensor {
    by_kind!(h.kind(), read_of(h, pre))
}

/// `post_m y + sum_k mix[k, m] h_k` (T, M, D) of h (T, M, D), y (T, D), post (T, M) and mix (T, M, M), both fp32.
pub(in crate::ops) fn spread(h: &Tensor, y: &Tensor, post: &Tensor, mix: &Tensor) -> Tensor {
    by_kind!(h.kind(), spread_of(h, y, post, mix))
}

/// dh (T, M, D), dy (T, D), dpost (T, M) and dmix (T, M, M), both fp32, of [`spread`].
pub(in crate::ops) fn spread_backward(
    grad: &Tensor,
    h: &Tensor,
    y: &Tensor,
    post: &Tensor,
    mix: &Tensor,
) -> [Tensor; 4] {
    by_kind!(h.kind(), spread_backward_of(grad, h, y, post, mix))
}

/// `dx . h_m` (T, M), fp32, of dx (T, D) and h (T, M, D).
pub(in crate::ops) fn products_with_copies(dx: &Tensor, h: &Tensor) -> Tensor {
    by_kind!(h.kind(), products_of(dx, h))
}

/// `product + factor h + pre_m dx` (T, M, D) of product (T, M D), factor (T, 1), pre (T, M), all fp32, h (T, M, D) and dx (T, D).
pub(in crate::ops) fn read_gradient(
    product: &Tensor,
    factor: &Tensor,
    pre: &Tensor,
    h: &Tensor,
    dx: &Tensor,
) -> Tensor {
    by_kind!(h.kind(), read_gradient_of(product, factor, pre, h, dx))
}

/// T, M, D.
fn sizes(h: &Tensor) -> (i64, usize, usize) {
    let (tokens, copies, width) = h.size3().expect("(T, M, D)");
    (tokens, copies as usize, width as usize)
}

fn read_of<S: Stored>(h: &Tensor, pre: &Tensor) -> Tensor {
    let (tokens, copies, d) = sizes(h);
    let (h, pre) = (elements::<S>(h), elements::<f32>(pre));
    filled::<S>(&[tokens, d as i64], |range, out| {
        let h = &h[range.start * copies * d..range.end * copies * d];
        weighted_rows(h, &pre[range.start * copies..range.end * copies], (copies, d), out);
    })
}

/// Rows of `sum_m w_m h_m`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn weighted_rows<S: Stored>(h: &[S], weights: &[f32], (copies, d): (usize, usize), out: &mut [S]) {
    let mut sums = vec![0f32; d];
    let tokens = h.chunks_exact(copies * d).zip(weights.chunks_exact(copies)).zip(out.chunks_exact_mut(d));
    for ((h, weights), out) in tokens {
        sums.fill(0.0);
        for (h, weight) in h.chunks_exact(d).zip(weights) {
            (0..d).for_each(|i| sums[i] += h[i].wide() * weight);
        }
        (0..d).for_each(|i| out[i] = S::rounded(sums[i]));
    }
}

fn spread_of<S: Stored>(h: &Tensor, y: &Tensor, post: &Tensor, mix: &Tensor) -> Tensor {
    let (shape, (_, copies, d)) = (h.size(), sizes(h));
    let (h, y) = (elements::<S>(h), elements::<S>(y));
    let (post, mix) = (elements::<f32>(post), elements::<f32>(mix));
    filled::<S>(&shape, |range, out| {
        let of = |width: usize| range.start * width..range.end * width;
        let weights = (&post[of(copies)], &mix[of(copies * copies)]);
        spread_rows(&h[of(copies * d)], &y[of(d)], weights, (copies, d), out);
    })
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn spread_rows<S: Stored>(h: &[S], y: &[S], (post, mix): (&[f32], &[f32]), (copies, d): (usize, usize), out: &mut [S]) {
    let mut sums = vec![0f32; d];
    let tokens = h.chunks_exact(copies * d).zip(y.chunks_exact(d)).zip(out.chunks_exact_mut(copies * d));
    let weights = post.chunks_exact(copies).zip(mix.chunks_exact(copies * copies));
    for (((h, y), out), (post, mix)) in tokens.zip(weights) {
        for (m, out) in out.chunks_exact_mut(d).enumerate() {
            (0..d).for_each(|i| sums[i] = y[i].wide() * post[m]);
            for (k, h) in h.chunks_exact(d).enumerate() {
                let weight = mix[k * copies + m];
                (0..d).for_each(|i| sums[i] += h[i].wide() * weight);
            }
            (0..d).for_each(|i| out[i] = S::rounded(sums[i]));
        }
    }
}

fn spread_backward_of<S: Stored>(grad: &Tensor, h: &Tensor, y: &Tensor, post: &Tensor, mix: &Tensor) -> [Tensor; 4] {
    let (shape, (tokens, copies, d)) = (h.size(), sizes(h));
    let (grad, h, y) = (elements::<S>(grad), elements::<S>(h), elements::<S>(y));
    let (post, mix) = (elements::<f32>(post), elements::<f32>(mix));
    let [dh, dy] = filled_pair::<S, S>(&shape, &[tokens, d as i64], |range, dh, dy| {
        let of = |width: usize| range.start * width..range.end * width;
        let grad = &grad[of(copies * d)];
        weighted_rows(grad, &post[of(copies)], (copies, d), dy);
        mixed_back(grad, &mix[of(copies * copies)], (copies, d), dh);
    });
    let m = copies as i64;
    let [dpost, dmix] = filled_pair::<f32, f32>(&[tokens, m], &[tokens, m, m], |range, dpost, dmix| {
        let of = |width: usize| range.start * width..range.end * width;
        let grad = &grad[of(copies * d)];
        dots(&y[of(d)], grad, (1, copies, d), dpost);
        dots(&h[of(copies * d)], grad, (copies, copies, d), dmix);
    });
    [dh, dy, dpost, dmix]
}

/// Rows of `dh_k = sum_m mix[k, m] grad_m`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn mixed_back<S: Stored>(grad: &[S], mix: &[f32], (copies, d): (usize, usize), dh: &mut [S]) {
    let mut sums = vec![0f32; d];
    let tokens = grad.chunks_exact(copies * d).zip(mix.chunks_exact(copies * copies));
    for ((grad, mix), dh) in tokens.zip(dh.chunks_exact_mut(copies * d)) {
        for (mix, dh) in mix.chunks_exact(copies).zip(dh.chunks_exact_mut(d)) {
            sums.fill(0.0);
            for (grad, weight) in grad.chunks_exact(d).zip(mix) {
                (0..d).for_each(|i| sums[i] += grad[i].wide() * weight);
            }
            (0..d).for_each(|i| dh[i] = S::rounded(sums[i]));
        }
    }
}

/// Of every token the products (left, right) of its `left` rows of a with its `right` rows of b.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn dots<S: Stored>(a: &[S], b: &[S], (left, right, d): (usize, usize, usize), out: &mut [f32]) {
    let tokens = a.chunks_exact(left * d).zip(b.chunks_exact(right * d)).zip(out.chunks_exact_mut(left * right));
    for ((a, b), out) in tokens {
        for (a, out) in a.chunks_exact(d).zip(out.chunks_exact_mut(right)) {
            for (b, out) in b.chunks_exact(d).zip(out) {
                *out = sum(d, |i| a[i].wide() * b[i].wide());
            }
        }
    }
}

fn products_of<S: Stored>(dx: &Tensor, h: &Tensor) -> Tensor {
    let (tokens, copies, d) = sizes(h);
    let (dx, h) = (elements::<S>(dx), elements::<S>(h));
    filled::<f32>(&[tokens, copies as i64], |range, out| {
        let of = |width: usize| range.start * width..range.end * width;
        dots(&dx[of(d)], &h[of(copies * d)], (1, copies, d), out);
    })
}

fn read_gradient_of<S: Stored>(product: &Tensor, factor: &Tensor, pre: &Tensor, h: &Tensor, dx: &Tensor) -> Tensor {
    let (shape, (_, copies, d)) = (h.size(), sizes(h));
    let [product, factor, pre] = [product, factor, pre].map(elements::<f32>);
    let (h, dx) = (elements::<S>(h), elements::<S>(dx));
    filled::<S>(&shape, |range, out| {
        let of = |width: usize| range.start * width..range.end * width;
        let weights = (&factor[of(1)], &pre[of(copies)]);
        read_gradient_rows(&product[of(copies * d)], weights, (&h[of(copies * d)], &dx[of(d)]), (copies, d), out);
    })
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn read_gradient_rows<S: Stored>(
    product: &[f32],
    (factor, pre): (&[f32], &[f32]),
    (h, dx): (&[S], &[S]),
    (copies, d): (usize, usize),
    out: &mut [S],
) {
    let rows = product.chunks_exact(d).zip(h.chunks_exact(d)).zip(out.chunks_exact_mut(d)).zip(pre);
    for (row, (((product, h), out), pre)) in rows.enumerate() {
        let token = row / copies;
        let (factor, dx) = (factor[token], &dx[token * d..(token + 1) * d]);
        (0..d).for_each(|i| out[i] = S::rounded(product[i] + h[i].wide() * factor + dx[i].wide() * pre));
    }
}
