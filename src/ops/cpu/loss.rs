//! Softmax, cross-entropy and its gradient, a row of logits at a time.

use multiversion::multiversion;
use multiversion::target::target_cfg_f;
use tch::Tensor;

use super::{LANES, Stored, exp, sum, tanh};
use crate::ops::cross_entropy::LogitMap;
use crate::torch_ext::{elements, filled_pair};

/// Cross-entropy of logits, mapped from products (C, V), against targets (C): each row's loss (C, 1), fp32, and the gradient (C, V)
/// of `scale` times it.
pub(in crate::ops) fn softmax_cross_entropy(
    products: &Tensor,
    map: LogitMap,
    targets: &Tensor,
    scale: f64,
) -> (Tensor, Tensor) {
    by_kind!(products.kind(), softmax_cross_entropy_of(products, map, targets, scale as f32))
}

fn softmax_cross_entropy_of<S: Stored>(
    products: &Tensor,
    map: LogitMap,
    targets: &Tensor,
    scale: f32,
) -> (Tensor, Tensor) {
    let (rows, width) = products.size2().expect("(C, V)");
    let (products, targets, v) = (elements::<S>(products), elements::<i64>(targets), width as usize);
    let [gradient, loss] = filled_pair::<S, f32>(&[rows, width], &[rows, 1], |range, gradient, loss| {
        let products = &products[range.start * v..range.end * v];
        softmax_cross_entropy_rows(products, map, &targets[range], scale, gradient, loss);
    });
    (loss, gradient)
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn softmax_cross_entropy_rows<S: Stored>(
    products: &[S],
    map: LogitMap,
    targets: &[i64],
    scale: f32,
    gradient: &mut [S],
    losses: &mut [f32],
) {
    let fused = target_cfg_f!(target_feature = "fma");
    let v = products.len() / targets.len().max(1);
    let factor = map.scale as f32;
    let slope = scale * factor;
    let mut capped = vec![0f32; if map.soft_cap.is_some() { v } else { 0 }];
    let rows = products.chunks_exact(v).zip(gradient.chunks_exact_mut(v)).zip(targets.iter().zip(losses));
    for ((x, d), (target, loss)) in rows {
        let target = *target as usize;
        *loss = match map.soft_cap {
            None => cross_entropy_row(x, factor, target, (slope, 0.0), d, fused),
            Some(cap) => {
                let cap = cap as f32;
                let per_cap = 1.0 / cap;
                for (y, x) in capped.iter_mut().zip(x) {
                    *y = tanh(x.wide() * factor * per_cap, fused) * cap;
                }
                cross_entropy_row(&capped, 1.0, target, (slope, per_cap), d, fused)
            }
        };
    }
}

/// The loss of one row whose logits are `factor` x; `d` becomes its gradient times `slope (1 - (logit per_cap)^2)`.
#[inline(always)]
fn cross_entropy_row<X: Stored, S: Stored>(
    x: &[X],
    factor: f32,
    target: usize,
    (slope, per_cap): (f32, f32),
    d: &mut [S],
    fused: bool,
) -> f32 {
    let logit = |i: usize| x[i].wide() * factor;
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in x.chunks(LANES) {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            let value = value.wide() * factor;
            // `max` that lets a NaN through, so that a broken model is seen in its loss.
            *lane = if *lane >= value { *lane } else { value };
        }
    }
    let largest = lanes.iter().fold(f32::NEG_INFINITY, |a, b| if a >= *b { a } else { *b });
    // Partial sums of some hundred terms keep a vocabulary of 250,000 exact to fp32. A loop, not an iterator: its closures may be
    // compiled apart, without the caller's instructions.
    let mut total = 0f64;
    for part in x.chunks(512) {
        total += f64::from(sum(part, |x| exp(x * factor - largest, fused)));
    }
    let logsumexp = largest + total.ln() as f32;
    let loss = logsumexp - logit(target);
    let slope = if loss.is_finite() { slope } else { f32::NAN };
    let along = |logit: f32| slope - slope * (logit * per_cap) * (logit * per_cap);
    for (d, x) in d.iter_mut().zip(x) {
        let logit = x.wide() * factor;
        *d = S::rounded(exp(logit - logsumexp, fused) * along(logit));
    }
    d[target] = S::rounded((exp(logit(target) - logsumexp, fused) - 1.0) * along(logit(target)));
    loss
}
