//! What is read from several copies of the stream and written to them, a token at a time: its copies stay in the nearest cache.

use multiversion::multiversion;
use multiversion::target::target_cfg_f;
use tch::Tensor;

use super::{Stored, dot, multiply_add};
use crate::torch_ext::{elements, filled, filled_pair, filled_pair_worth};

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

/// The products of each token's copies h (T, M, D), as one row, with those of `function` (n, M D), fp32: (T, n), and the row's sum of
/// squares (T, 1); both fp32.
pub(in crate::ops) fn mapped(h: &Tensor, function: &Tensor) -> (Tensor, Tensor) {
    by_kind!(h.kind(), mapped_of(h, function))
}

/// The gradient of what is read of a token's copies by weights that a map makes.
pub(in crate::ops) struct ReadGradient<'a> {
    /// (T, n), fp32, of `function` (n, M D), fp32.
    pub weights: &'a Tensor,
    pub function: &'a Tensor,
    /// Of the copies themselves: (T, 1), fp32.
    pub factor: &'a Tensor,
    /// (T, M), fp32.
    pub pre: &'a Tensor,
}

/// `weights function + factor h + pre_m dx + more` (T, M, D) of h and, if given, `more` (T, M, D), and dx (T, D).
pub(in crate::ops) fn read_gradient(of: &ReadGradient<'_>, h: &Tensor, dx: &Tensor, more: Option<&Tensor>) -> Tensor {
    by_kind!(h.kind(), read_gradient_of(of, h, dx, more))
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
    let work = copies * (copies + 1) * d;
    let [dpost, dmix] = filled_pair_worth::<f32, f32>(&[tokens, m], &[tokens, m, m], work, |range, dpost, dmix| {
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
    let fused = target_cfg_f!(target_feature = "fma");
    let tokens = a.chunks_exact(left * d).zip(b.chunks_exact(right * d)).zip(out.chunks_exact_mut(left * right));
    for ((a, b), out) in tokens {
        for (a, out) in a.chunks_exact(d).zip(out.chunks_exact_mut(right)) {
            for (b, out) in b.chunks_exact(d).zip(out) {
                *out = dot(a, b, fused);
            }
        }
    }
}

fn mapped_of<S: Stored>(h: &Tensor, function: &Tensor) -> (Tensor, Tensor) {
    let (tokens, copies, d) = sizes(h);
    let (h, function, numbers) = (elements::<S>(h), elements::<f32>(function), function.size()[0]);
    let width = copies * d;
    let work = width * (numbers as usize + 2);
    let [products, squares] =
        filled_pair_worth::<f32, f32>(&[tokens, numbers], &[tokens, 1], work, |range, products, squares| {
            mapped_rows(&h[range.start * width..range.end * width], function, width, products, squares);
        });
    (products, squares)
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn mapped_rows<S: Stored>(h: &[S], function: &[f32], width: usize, products: &mut [f32], squares: &mut [f32]) {
    let fused = target_cfg_f!(target_feature = "fma");
    let mut row = vec![0f32; width];
    let tokens = h.chunks_exact(width).zip(products.chunks_exact_mut(function.len() / width)).zip(squares);
    for ((h, products), square) in tokens {
        row.iter_mut().zip(h).for_each(|(wide, h)| *wide = h.wide());
        for (function, product) in function.chunks_exact(width).zip(products) {
            *product = dot(&row, function, fused);
        }
        *square = dot(&row, &row, fused);
    }
}

fn products_of<S: Stored>(dx: &Tensor, h: &Tensor) -> Tensor {
    let (tokens, copies, d) = sizes(h);
    let (dx, h) = (elements::<S>(dx), elements::<S>(h));
    let [products, _] = filled_pair_worth::<f32, f32>(&[tokens, copies as i64], &[0], copies * d, |range, out, _| {
        let of = |width: usize| range.start * width..range.end * width;
        dots(&dx[of(d)], &h[of(copies * d)], (1, copies, d), out);
    });
    products
}

fn read_gradient_of<S: Stored>(of: &ReadGradient<'_>, h: &Tensor, dx: &Tensor, more: Option<&Tensor>) -> Tensor {
    let (shape, (_, copies, d)) = (h.size(), sizes(h));
    let (width, numbers) = (copies * d, of.function.size()[0] as usize);
    let [weights, function, factor, pre] = [of.weights, of.function, of.factor, of.pre].map(elements::<f32>);
    let (h, dx, more) = (elements::<S>(h), elements::<S>(dx), more.map(elements::<S>));
    filled::<S>(&shape, |range, out| {
        let mut sums = vec![0f32; width];
        for (token, out) in range.zip(out.chunks_exact_mut(width)) {
            let whole = token * width..(token + 1) * width;
            let weights = &weights[token * numbers..(token + 1) * numbers];
            let pre = &pre[token * copies..(token + 1) * copies];
            let dx = &dx[token * d..(token + 1) * d];
            read_rows_back((&h[whole.clone()], factor[token]), (dx, pre), more.map(|more| &more[whole]), &mut sums);
            add_function(function, weights, &mut sums);
            rounded(&sums, out);
        }
    })
}

/// `factor h + pre_m dx + more` of one token.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn read_rows_back<S: Stored>(
    (h, factor): (&[S], f32),
    (dx, pre): (&[S], &[f32]),
    more: Option<&[S]>,
    sums: &mut [f32],
) {
    let d = dx.len();
    for ((h, sums), pre) in h.chunks_exact(d).zip(sums.chunks_exact_mut(d)).zip(pre) {
        for ((sum, h), dx) in sums.iter_mut().zip(h).zip(dx) {
            *sum = h.wide() * factor + dx.wide() * pre;
        }
    }
    if let Some(more) = more {
        sums.iter_mut().zip(more).for_each(|(sum, more)| *sum += more.wide());
    }
}

/// Adds the rows of a function times their weights, four in one go over the sums.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn add_function(function: &[f32], weights: &[f32], sums: &mut [f32]) {
    let (fused, width) = (target_cfg_f!(target_feature = "fma"), sums.len());
    let (mut fours, mut weights) = (function.chunks_exact(4 * width), weights.chunks_exact(4));
    for (rows, w) in (&mut fours).zip(&mut weights) {
        let ((a, b), (c, d)) = {
            let (first, second) = rows.split_at(2 * width);
            (first.split_at(width), second.split_at(width))
        };
        for ((((sum, a), b), c), d) in sums.iter_mut().zip(a).zip(b).zip(c).zip(d) {
            let first = multiply_add(fused, *a, w[0], *sum);
            *sum = multiply_add(fused, *d, w[3], multiply_add(fused, *c, w[2], multiply_add(fused, *b, w[1], first)));
        }
    }
    for (row, weight) in fours.remainder().chunks_exact(width).zip(weights.remainder()) {
        sums.iter_mut().zip(row).for_each(|(sum, row)| *sum += row * weight);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn rounded<S: Stored>(sums: &[f32], out: &mut [S]) {
    out.iter_mut().zip(sums).for_each(|(out, sum)| *out = S::rounded(*sum));
}
