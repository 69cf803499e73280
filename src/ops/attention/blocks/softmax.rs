//! Between the products: scores, weights and their gradients of one block.

use half::bf16;
use multiversion::multiversion;
use multiversion::target::target_cfg_f;
use tch::Kind;

use super::BLOCK;
use crate::ops::attention::Scoring;
use crate::ops::cpu::{LANES, Stored, exp, tanh};
use crate::torch_ext::elements;

/// How scores are made of products, read from a [`Scoring`].
pub(super) struct Scores {
    scale: f32,
    soft_cap: Option<f32>,
    /// (N, `longest`): of each head and key.
    biases: Option<Vec<f32>>,
    longest: usize,
    /// (N).
    sinks: Option<Vec<f32>>,
}

/// What is added to the scores of a block.
#[derive(Clone, Copy)]
pub(super) enum Bias<'a> {
    None,
    /// One for each column.
    Columns(&'a [f32]),
    /// One for each row.
    Rows(&'a [f32]),
}

/// What is left to be done to scores when they meet the softmax.
#[derive(Clone, Copy)]
pub(super) struct Left {
    /// They are still to be multiplied by this.
    scale: f32,
    /// The derivative of a score by its product is this times `1 - (score / cap)^2`.
    slope: f32,
    /// 1 / cap; 0 where there is none.
    per_cap: f32,
}

impl Scores {
    /// For `kv_heads` groups of heads and documents of at most `longest` tokens.
    pub(super) fn new(scoring: &Scoring, kv_heads: usize, longest: usize) -> Self {
        let numbers = |t: &tch::Tensor| elements::<f32>(&t.to_kind(Kind::Float).contiguous()).to_vec();
        Self {
            scale: scoring.scale as f32,
            soft_cap: scoring.soft_cap.map(|cap| cap as f32),
            biases: scoring.alibi.as_ref().map(|alibi| numbers(&alibi.bias(kv_heads as i64, 0, longest as i64))),
            longest,
            sinks: scoring.sinks.as_ref().map(numbers),
        }
    }

    /// The biases of a head's keys, by their place in the document.
    pub(super) fn biases(&self, head: usize) -> Option<&[f32]> {
        self.biases.as_ref().map(|biases| &biases[head * self.longest..(head + 1) * self.longest])
    }

    /// What a query of a head starts from: its sink, which is a key without a value.
    pub(super) fn start(&self, head: usize) -> Running {
        match &self.sinks {
            Some(sinks) => Running { largest: sinks[head], total: 1.0 },
            None => Running { largest: f32::NEG_INFINITY, total: 0.0 },
        }
    }

    /// Makes scores of products (rows, width), but for what is [`Scores::left`].
    pub(super) fn of_products(&self, products: &mut [f32], width: usize, bias: Bias<'_>) {
        if self.is_plain() {
            return;
        }
        scores_of_products(products, width, self.scale, bias, self.soft_cap);
    }

    pub(super) fn left(&self) -> Left {
        Left {
            scale: if self.is_plain() { self.scale } else { 1.0 },
            slope: self.scale,
            per_cap: self.soft_cap.map_or(0.0, |cap| 1.0 / cap),
        }
    }

    fn is_plain(&self) -> bool {
        self.soft_cap.is_none() && self.biases.is_none()
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn scores_of_products(products: &mut [f32], width: usize, scale: f32, bias: Bias<'_>, soft_cap: Option<f32>) {
    let fused = target_cfg_f!(target_feature = "fma");
    for (row, products) in products.chunks_exact_mut(width).enumerate() {
        match bias {
            Bias::None => {
                for x in &mut *products {
                    *x *= scale;
                }
            }
            Bias::Rows(biases) => {
                for x in &mut *products {
                    *x = *x * scale + biases[row];
                }
            }
            Bias::Columns(biases) => {
                for (x, bias) in products.iter_mut().zip(biases) {
                    *x = *x * scale + bias;
                }
            }
        }
        if let Some(cap) = soft_cap {
            let per_cap = 1.0 / cap;
            for x in &mut *products {
                *x = tanh(*x * per_cap, fused) * cap;
            }
        }
    }
}

/// The largest score of a query so far, and the sum of exponentials relative to it.
#[derive(Clone, Copy)]
pub(super) struct Running {
    largest: f32,
    total: f32,
}

impl Running {
    pub(super) fn logsumexp(self) -> f32 {
        self.largest + self.total.ln()
    }

    pub(super) fn total(self) -> f32 {
        self.total
    }
}

/// Turns a block of scores (m, n) into weights (m, even), relative to the running maximum, and rescales the sums (m, value) so far.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
#[allow(clippy::too_many_arguments)]
pub(super) fn softmax_block(
    scores: &[f32],
    (m, n, even): (usize, usize, usize),
    left: Left,
    columns: &dyn Fn(usize) -> (usize, usize),
    running: &mut [Running; BLOCK],
    weights: &mut [bf16],
    sums: &mut [f32],
    value: usize,
) {
    let fused = target_cfg_f!(target_feature = "fma");
    let scale = left.scale;
    for row in 0..m {
        let (from, to) = columns(row);
        let weights = &mut weights[row * even..(row + 1) * even];
        weights[..from].fill(bf16::ZERO);
        weights[to..].fill(bf16::ZERO);
        if from == to {
            continue;
        }
        let scores = &scores[row * n + from..row * n + to];
        let mut lanes = [f32::NEG_INFINITY; LANES];
        for chunk in scores.chunks(LANES) {
            for (lane, score) in lanes.iter_mut().zip(chunk) {
                *lane = if *lane >= *score { *lane } else { *score };
            }
        }
        let largest = lanes.iter().fold(f32::NEG_INFINITY, |a, b| if a >= *b { a } else { *b }) * scale;
        let before = running[row];
        let largest = if before.largest >= largest { before.largest } else { largest };
        let mut totals = [0f32; LANES];
        for (weights, scores) in weights[from..to].chunks_mut(LANES).zip(scores.chunks(LANES)) {
            for ((weight, score), total) in weights.iter_mut().zip(scores).zip(&mut totals) {
                let e = exp(score * scale - largest, fused);
                *total += e;
                *weight = Stored::rounded(e);
            }
        }
        let correction = exp(before.largest.max(-1e30) - largest, fused);
        running[row] = Running { largest, total: before.total * correction + totals.iter().sum::<f32>() };
        if before.total > 0.0 && correction != 1.0 {
            for sum in &mut sums[row * value..(row + 1) * value] {
                *sum *= correction;
            }
        }
    }
}

/// P^T and dS^T (n, even) of a block from S^T and dP^T (n, m); one column is one query.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
pub(super) fn gradient_block(
    (scores, products): (&[f32], &[f32]),
    (n, m, even): (usize, usize, usize),
    left: Left,
    columns: &dyn Fn(usize) -> (usize, usize),
    (lse, delta): (&[f32], &[f32]),
    weights: &mut [bf16],
    gradients: &mut [bf16],
) {
    let fused = target_cfg_f!(target_feature = "fma");
    let Left { scale, slope, per_cap } = left;
    for row in 0..n {
        let (from, to) = columns(row);
        let weights = &mut weights[row * even..(row + 1) * even];
        let gradients = &mut gradients[row * even..(row + 1) * even];
        for part in [&mut *weights, &mut *gradients] {
            part[..from].fill(bf16::ZERO);
            part[to..].fill(bf16::ZERO);
        }
        let scores = &scores[row * m + from..row * m + to];
        let products = &products[row * m + from..row * m + to];
        let (lse, delta) = (&lse[from..to], &delta[from..to]);
        let (weights, gradients) = (&mut weights[from..to], &mut gradients[from..to]);
        for i in 0..to - from {
            let score = scores[i] * scale;
            let p = exp(score - lse[i], fused);
            let of_cap = score * per_cap;
            weights[i] = Stored::rounded(p);
            gradients[i] = Stored::rounded(p * (products[i] - delta[i]) * (slope - slope * of_cap * of_cap));
        }
    }
}
