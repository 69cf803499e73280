//! A short causal convolution of every channel on its own, then SiLU: `y_t = silu(sum_j w_j x_{t-C+1+j})` with C taps, nothing
//! before a document's start.
//!
//! Keeps x; what SiLU takes is made again in backward. Libtorch's grouped convolution is many times slower on the CPU, where a
//! kernel of one pass serves.

use multiversion::multiversion;
use multiversion::target::target_cfg_f;
use tch::{Kind, Tensor};

use super::Documents;
use super::cpu::{self, Stored, by_kind, multiply_add, sigmoid};
use crate::torch_ext::{custom, elements, filled, sent};

/// A frozen convolution of W channels.
#[derive(Debug)]
pub struct Convolution {
    /// (C, W), fp32: the tap of the oldest token first.
    pub weight: Tensor,
}

impl Clone for Convolution {
    /// Another handle to the same weight.
    fn clone(&self) -> Self {
        Self { weight: self.weight.shallow_clone() }
    }
}

impl Convolution {
    /// y (T, W) of x (T, W).
    pub fn apply(&self, x: &Tensor, documents: &Documents) -> Tensor {
        let reach = Reach::new(documents, self.weight.size()[0]);
        let output = tch::no_grad(|| self.forward(x, &reach));
        let (own, saved) = (self.clone(), x.detach());
        custom(c"engraft::convolution", &[x], vec![output], move |grads| {
            vec![Some(own.backward(&grads[0], &saved, &reach))]
        })
        .remove(0)
    }

    fn forward(&self, x: &Tensor, reach: &Reach) -> Tensor {
        if cpu::serves(&[x]) {
            return by_kind!(x.kind(), forward_of(x, &self.weight, reach));
        }
        self.sums(x, reach).silu().to_kind(x.kind())
    }

    fn backward(&self, dy: &Tensor, x: &Tensor, reach: &Reach) -> Tensor {
        if cpu::serves(&[x, dy]) {
            return by_kind!(x.kind(), backward_of(dy, x, &self.weight, reach));
        }
        let dsums = self.sums(x, reach).silu_backward(&dy.to_kind(Kind::Float));
        let dx = dsums.zeros_like();
        for (lag, tap, seen, rest) in self.lags(reach, x) {
            let part = dsums.narrow(0, lag, rest) * seen * tap;
            let _ = dx.narrow(0, 0, rest).g_add_(&part);
        }
        dx.to_kind(x.kind())
    }

    /// What SiLU takes: (T, W), fp32.
    fn sums(&self, x: &Tensor, reach: &Reach) -> Tensor {
        let wide = x.to_kind(Kind::Float);
        let sums = wide.zeros_like();
        for (lag, tap, seen, rest) in self.lags(reach, x) {
            let part = wide.narrow(0, 0, rest) * seen * tap;
            let _ = sums.narrow(0, lag, rest).g_add_(&part);
        }
        sums
    }

    /// Of every lag its tap (W), which of the tokens after so many reach back so far (rest, 1), and how many these are.
    fn lags(&self, reach: &Reach, x: &Tensor) -> impl Iterator<Item = (i64, Tensor, Tensor, i64)> {
        let (taps, tokens) = (self.weight.size()[0], x.size()[0]);
        let lengths: Vec<i64> = reach.0.iter().map(|length| *length as i64).collect();
        let reach = sent(&Tensor::from_slice(&lengths), x.device()).unsqueeze(1); // (T, 1)
        (0..taps.min(tokens)).map(move |lag| {
            let rest = tokens - lag;
            let seen = reach.narrow(0, lag, rest).ge(lag).to_kind(Kind::Float);
            (lag, self.weight.get(taps - 1 - lag), seen, rest)
        })
    }
}

/// How many tokens before it each token sees: (T).
struct Reach(Vec<usize>);

impl Reach {
    fn new(documents: &Documents, taps: i64) -> Self {
        Self(documents.spans().flat_map(|(_, length)| (0..length).map(|t| t.min(taps - 1) as usize)).collect())
    }
}

fn forward_of<S: Stored>(x: &Tensor, weight: &Tensor, reach: &Reach) -> Tensor {
    let size = x.size();
    let (x, taps, width) = (elements::<S>(x), elements::<f32>(weight), size[1] as usize);
    filled::<S>(&size, |range, y| {
        for (t, y) in range.zip(y.chunks_exact_mut(width)) {
            activated_row(x, taps, t, reach.0[t], y);
        }
    })
}

fn backward_of<S: Stored>(dy: &Tensor, x: &Tensor, weight: &Tensor, reach: &Reach) -> Tensor {
    let (size, taps) = (x.size(), weight.size()[0] as usize);
    let (dy, x, weight) = (elements::<S>(dy), elements::<S>(x), elements::<f32>(weight));
    let (tokens, width) = (size[0] as usize, size[1] as usize);
    filled::<S>(&size, |range, dx| {
        // The gradients of the sums of a token and of those after it that see it.
        let mut recent = vec![0f32; taps * width];
        let mut done = range.start;
        for (t, dx) in range.zip(dx.chunks_exact_mut(width)) {
            let seen = (t + taps).min(tokens);
            for next in done..seen {
                let row = next % taps * width;
                let dy = &dy[next * width..(next + 1) * width];
                sum_gradient_row(x, weight, next, reach.0[next], dy, &mut recent[row..row + width]);
            }
            done = seen;
            let seen_by = (0..taps).filter(|lag| t + lag < tokens && reach.0[t + lag] >= *lag);
            gradient_row(&recent, weight, t, seen_by, dx);
        }
    })
}

/// Columns of a row done at a time: their sums stay in registers.
const COLUMNS: usize = 64;

/// Adds `x * tap` to the sums of as many columns.
#[inline(always)]
fn accumulate<S: Stored>(fused: bool, sums: &mut [f32; COLUMNS], x: &[S], tap: &[f32]) {
    match (<&[S; COLUMNS]>::try_from(x), <&[f32; COLUMNS]>::try_from(tap)) {
        (Ok(x), Ok(tap)) => (0..COLUMNS).for_each(|i| sums[i] = multiply_add(fused, x[i].wide(), tap[i], sums[i])),
        _ => x.iter().zip(tap).zip(sums).for_each(|((x, tap), sum)| *sum = multiply_add(fused, x.wide(), *tap, *sum)),
    }
}

/// The sums of `count` columns from `from` on of token t, which sees `reach` tokens before it.
#[inline(always)]
fn sums<S: Stored>(
    fused: bool,
    (x, weight, width): (&[S], &[f32], usize),
    (t, reach): (usize, usize),
    (from, count): (usize, usize),
) -> [f32; COLUMNS] {
    let taps = weight.len() / width;
    let mut sums = [0f32; COLUMNS];
    for lag in 0..=reach {
        let (token, tap) = ((t - lag) * width + from, (taps - 1 - lag) * width + from);
        accumulate(fused, &mut sums, &x[token..token + count], &weight[tap..tap + count]);
    }
    sums
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn activated_row<S: Stored>(x: &[S], weight: &[f32], t: usize, reach: usize, y: &mut [S]) {
    let (fused, width) = (target_cfg_f!(target_feature = "fma"), y.len());
    for (i, y) in y.chunks_mut(COLUMNS).enumerate() {
        let sums = sums(fused, (x, weight, width), (t, reach), (i * COLUMNS, y.len()));
        for (y, sum) in y.iter_mut().zip(&sums) {
            *y = S::rounded(sum * sigmoid(*sum, fused));
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn sum_gradient_row<S: Stored>(x: &[S], weight: &[f32], t: usize, reach: usize, dy: &[S], dsums: &mut [f32]) {
    let (fused, width) = (target_cfg_f!(target_feature = "fma"), dy.len());
    for (i, (dy, dsums)) in dy.chunks(COLUMNS).zip(dsums.chunks_mut(COLUMNS)).enumerate() {
        let sums = sums(fused, (x, weight, width), (t, reach), (i * COLUMNS, dy.len()));
        for ((dsum, dy), sum) in dsums.iter_mut().zip(dy).zip(&sums) {
            let s = sigmoid(*sum, fused);
            *dsum = dy.wide() * (s + sum * s * (1.0 - s));
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn gradient_row<S: Stored>(
    recent: &[f32],
    weight: &[f32],
    t: usize,
    seen_by: impl Iterator<Item = usize> + Clone,
    dx: &mut [S],
) {
    let (fused, width) = (target_cfg_f!(target_feature = "fma"), dx.len());
    let taps = weight.len() / width;
    for (i, dx) in dx.chunks_mut(COLUMNS).enumerate() {
        let (from, count) = (i * COLUMNS, dx.len());
        let mut total = [0f32; COLUMNS];
        for lag in seen_by.clone() {
            let (token, tap) = ((t + lag) % taps * width + from, (taps - 1 - lag) * width + from);
            accumulate(fused, &mut total, &recent[token..token + count], &weight[tap..tap + count]);
        }
        for (dx, total) in dx.iter_mut().zip(&total) {
            *dx = S::rounded(*total);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, randn};

    /// Libtorch's own, a document at a time.
    fn twin(x: &Tensor, weight: &Tensor, documents: &Documents) -> Tensor {
        let (taps, width) = weight.size2().unwrap();
        let parts: Vec<Tensor> = documents
            .spans()
            .map(|(start, length)| {
                let x = x.narrow(0, start, length).tr().unsqueeze(0); // (1, W, L)
                let weight = weight.tr().reshape([width, 1, taps]);
                let y = x.conv1d::<Tensor>(&weight, None, 1, taps - 1, 1, width);
                y.narrow(2, 0, length).squeeze_dim(0).tr()
            })
            .collect();
        Tensor::cat(&parts, 0).silu()
    }

    #[test]
    fn equals_libtorchs_convolution_of_every_document() {
        for (taps, width) in [(4, 150), (3, 5), (1, 64)] {
            let documents = Documents { offsets: vec![0, 1, 3, 4, 60, 62, 100] };
            let convolution = Convolution { weight: randn(&[taps, width], 2) };
            check(
                &[randn(&[100, width], 1)],
                |_, x| vec![convolution.apply(&x[0], &documents)],
                |_, x| vec![twin(&x[0], &convolution.weight, &documents)],
            );
        }
    }
}
