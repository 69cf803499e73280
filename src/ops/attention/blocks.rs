//! FlashAttention-2 (arXiv:2307.08691) on the CPU in bf16: blocks of scores in fp32 by libtorch's own micro-kernel, the
//! softmax between two products in one pass, nothing of size L x L ever stored.
//!
//! libtorch's CPU kernel does the same, but its backward is several times slower on the short documents of fine-tuning.
//! One task is one document and one key/value head with its group of query heads, so tasks share nothing they write.
//!
//! The micro-kernel wants its right operand as pairs of rows side by side. Forward computes `S = Q K^T`; backward computes the
//! transposes, `S^T = K Q^T`, so that every product but one finds its left operand as it lies:
//!
//! ```text
//! P^T = exp(scale S^T - lse)   dV  += P^T dO     dP^T = V dO^T
//! dS^T = P^T (dP^T - delta) scale   dK += dS^T Q     dQ^T += K^T dS^T
//! ```

use std::sync::Mutex;

use half::bf16;
use multiversion::multiversion;
use multiversion::target::target_cfg_f;
use tch::{Device, Kind, Tensor};

use crate::ops::Documents;
use crate::ops::cpu::{LANES, Stored, exp, sum};
use crate::torch_ext::{Rows, bf16_gemm, bf16_gemm_done, bf16_gemm_serves, elements, elements_mut, parallel_tasks};

/// Rows of queries and of keys handled at once: a block of scores is 64 KiB and stays in the second-level cache.
const BLOCK: usize = 128;

/// Whether these tensors can go through here.
pub(super) fn serves(q: &Tensor, k: &Tensor, v: &Tensor) -> bool {
    let head = q.size()[2];
    [q, k, v].iter().all(|t| t.device() == Device::Cpu && t.kind() == Kind::BFloat16 && t.is_contiguous())
        && head % 2 == 0
        && bf16_gemm_serves()
}

/// Sizes, and who may look at whom.
#[derive(Clone)]
pub(super) struct Shape {
    documents: Vec<(usize, usize)>,
    tokens: usize,
    kv_heads: usize,
    group: usize,
    head: usize,
    scale: f32,
    window: usize,
}

impl Shape {
    pub(super) fn new(q: &Tensor, k: &Tensor, documents: &Documents, scale: f64, window: Option<i64>) -> Self {
        let (tokens, heads, head) = q.size3().expect("(T, N, H)");
        let kv_heads = k.size()[1];
        Self {
            documents: documents.spans().map(|(start, length)| (start as usize, length as usize)).collect(),
            tokens: tokens as usize,
            kv_heads: kv_heads as usize,
            group: (heads / kv_heads) as usize,
            head: head as usize,
            scale: scale as f32,
            window: window.map_or(usize::MAX, |w| w as usize),
        }
    }

    /// Elements between a head's rows in q (T, N, H) and in k and v (T, K, H).
    fn strides(&self) -> (usize, usize) {
        (self.kv_heads * self.group * self.head, self.kv_heads * self.head)
    }

    /// Rows `first..last` of query head `n` (or, with `kv`, of key/value head `n`) from `x`.
    fn rows<'a>(&self, x: &'a [bf16], kv: bool, n: usize, first: usize) -> Rows<'a> {
        let stride = if kv { self.strides().1 } else { self.strides().0 };
        Rows { elements: &x[first * stride + n * self.head..], stride }
    }

    /// (document, key/value head) of every task, the longest documents first so that the last tasks are short.
    fn tasks(&self) -> Vec<(usize, usize)> {
        let mut order: Vec<usize> = (0..self.documents.len()).collect();
        order.sort_by_key(|d| std::cmp::Reverse(self.documents[*d].1));
        order.into_iter().flat_map(|d| (0..self.kv_heads).map(move |head| (d, head))).collect()
    }

    /// Blocks of keys that queries `first..last` of a document may look at.
    fn key_blocks(&self, first: usize, last: usize) -> std::ops::Range<usize> {
        let earliest = (first + 1).saturating_sub(self.window);
        earliest / BLOCK..last.div_ceil(BLOCK)
    }

    /// Columns of a block of keys from `key` on, `width` wide, that query `query` may look at.
    fn columns(&self, query: usize, key: usize, width: usize) -> (usize, usize) {
        let from = (query + 1).saturating_sub(self.window).saturating_sub(key).min(width);
        let to = (query + 1).saturating_sub(key).min(width);
        (from.min(to), to)
    }
}

/// The output (T, N, H) and, for backward, logsumexp of the scaled scores as (K, G, T), fp32.
pub(super) fn forward(q: &Tensor, k: &Tensor, v: &Tensor, shape: &Shape) -> (Tensor, Tensor) {
    let Shape { tokens, kv_heads, group, head, .. } = *shape;
    let plane = [kv_heads as i64, tokens as i64, (group * head) as i64];
    let mut output = Tensor::empty(plane, (Kind::BFloat16, Device::Cpu));
    let mut logsumexp = Tensor::empty([kv_heads as i64, tokens as i64, group as i64], (Kind::Float, Device::Cpu));
    let (q, k, v) = (elements::<bf16>(q), elements::<bf16>(k), elements::<bf16>(v));
    {
        let outputs = parts(elements_mut::<bf16>(&mut output), shape, group * head);
        let logsumexps = parts(elements_mut::<f32>(&mut logsumexp), shape, group);
        let tasks = shape.tasks();
        parallel_tasks(tasks.len(), |i| {
            let (document, kv_head) = tasks[i];
            let at = document * kv_heads + kv_head;
            forward_task(q, k, v, shape, document, kv_head, &mut take(&outputs[at]), &mut take(&logsumexps[at]));
        });
    }
    (heads_together(&output, shape, group), logsumexp)
}

/// dq (T, N, H), dk and dv (T, K, H).
pub(super) fn backward(
    grad: &Tensor,
    [q, k, v, output]: [&Tensor; 4],
    logsumexp: &Tensor,
    shape: &Shape,
) -> [Tensor; 3] {
    let Shape { tokens, kv_heads, group, head, .. } = *shape;
    let grad = grad.contiguous();
    let empty =
        |width: usize| Tensor::empty([kv_heads as i64, tokens as i64, width as i64], (Kind::BFloat16, Device::Cpu));
    let (mut dq, mut dk, mut dv) = (empty(group * head), empty(head), empty(head));
    let inputs = Inputs {
        grad: elements(&grad),
        q: elements(q),
        k: elements(k),
        v: elements(v),
        output: elements(output),
        logsumexp: elements(logsumexp),
    };
    {
        let dqs = parts(elements_mut::<bf16>(&mut dq), shape, group * head);
        let dks = parts(elements_mut::<bf16>(&mut dk), shape, head);
        let dvs = parts(elements_mut::<bf16>(&mut dv), shape, head);
        let tasks = shape.tasks();
        parallel_tasks(tasks.len(), |i| {
            let (document, kv_head) = tasks[i];
            let at = document * kv_heads + kv_head;
            let (mut dq, mut dk, mut dv) = (take(&dqs[at]), take(&dks[at]), take(&dvs[at]));
            backward_task(&inputs, shape, document, kv_head, &mut dq, &mut dk, &mut dv);
        });
    }
    [heads_together(&dq, shape, group), heads_together(&dk, shape, 1), heads_together(&dv, shape, 1)]
}

/// What each task writes: the rows of its document in the plane of its head, of (K, T, width).
fn parts<'a, T>(mut all: &'a mut [T], shape: &Shape, width: usize) -> Vec<Mutex<&'a mut [T]>> {
    let mut by_head: Vec<Vec<&mut [T]>> = Vec::new();
    for _ in 0..shape.kv_heads {
        let mut planes = Vec::new();
        for (_, length) in &shape.documents {
            let (part, rest) = all.split_at_mut(length * width);
            planes.push(part);
            all = rest;
        }
        by_head.push(planes);
    }
    let mut heads: Vec<_> = by_head.into_iter().map(Vec::into_iter).collect();
    (0..shape.documents.len() * shape.kv_heads)
        .map(|i| Mutex::new(heads[i % shape.kv_heads].next().expect("a part for every document and head")))
        .collect()
}

/// The part of one task; no other task asks for it.
fn take<'a, 'b, T>(part: &'b Mutex<&'a mut [T]>) -> std::sync::MutexGuard<'b, &'a mut [T]> {
    part.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// (T, K G, H) from (K, T, G H).
fn heads_together(x: &Tensor, shape: &Shape, group: usize) -> Tensor {
    x.transpose(0, 1).contiguous().view([shape.tokens as i64, (shape.kv_heads * group) as i64, shape.head as i64])
}

#[allow(clippy::too_many_arguments)]
fn forward_task(
    q: &[bf16],
    k: &[bf16],
    v: &[bf16],
    shape: &Shape,
    document: usize,
    kv_head: usize,
    output: &mut [bf16],
    logsumexp: &mut [f32],
) {
    let Shape { group, head, scale, .. } = *shape;
    let (start, length) = shape.documents[document];
    let width = |block: usize| BLOCK.min(length - block * BLOCK);
    let blocks = length.div_ceil(BLOCK);
    // K^T and V of every block of keys, as right operands.
    let mut keys = vec![bf16::ZERO; blocks * BLOCK * head];
    let mut values = vec![bf16::ZERO; blocks * BLOCK * head];
    for block in 0..blocks {
        let (at, rows) = (block * BLOCK * head, width(block));
        pack_transposed(shape.rows(k, true, kv_head, start + block * BLOCK), rows, head, &mut keys[at..]);
        pack_rows(shape.rows(v, true, kv_head, start + block * BLOCK), rows, head, &mut values[at..]);
    }
    let mut scores = vec![0f32; BLOCK * BLOCK];
    let mut weights = vec![bf16::ZERO; BLOCK * BLOCK];
    let mut sums = vec![0f32; BLOCK * head];
    for g in 0..group {
        for query_block in 0..blocks {
            let (first, m) = (query_block * BLOCK, width(query_block));
            let queries = shape.rows(q, false, kv_head * group + g, start + first);
            let mut running = [Running { largest: f32::NEG_INFINITY, total: 0.0 }; BLOCK];
            sums[..m * head].fill(0.0);
            for key_block in shape.key_blocks(first, first + m) {
                let (n, at) = (width(key_block), key_block * BLOCK * head);
                let even = n.next_multiple_of(2);
                bf16_gemm((m, n, head), queries, &keys[at..], &mut scores, false);
                let columns = |row: usize| shape.columns(first + row, key_block * BLOCK, n);
                softmax_block(&scores, (m, n, even), scale, &columns, &mut running, &mut weights, &mut sums, head);
                let weights = Rows { elements: &weights, stride: even };
                bf16_gemm((m, head, even), weights, &values[at..], &mut sums, true);
            }
            for (row, running) in running[..m].iter().enumerate() {
                let at = (first + row) * group + g;
                logsumexp[at] = running.largest + running.total.ln();
                let out = &mut output[at * head..(at + 1) * head];
                for (out, sum) in out.iter_mut().zip(&sums[row * head..(row + 1) * head]) {
                    *out = Stored::rounded(sum / running.total);
                }
            }
        }
    }
    bf16_gemm_done();
}

/// The largest scaled score of a query so far, and the sum of exponentials relative to it.
#[derive(Clone, Copy)]
struct Running {
    largest: f32,
    total: f32,
}

/// Turns a block of scores (m, n) into weights (m, even), relative to the running maximum, and rescales the sums so far.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
#[allow(clippy::too_many_arguments)]
fn softmax_block(
    scores: &[f32],
    (m, n, even): (usize, usize, usize),
    scale: f32,
    columns: &dyn Fn(usize) -> (usize, usize),
    running: &mut [Running; BLOCK],
    weights: &mut [bf16],
    sums: &mut [f32],
    head: usize,
) {
    let fused = target_cfg_f!(target_feature = "fma");
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
            for sum in &mut sums[row * head..(row + 1) * head] {
                *sum *= correction;
            }
        }
    }
}

struct Inputs<'a> {
    grad: &'a [bf16],
    q: &'a [bf16],
    k: &'a [bf16],
    v: &'a [bf16],
    output: &'a [bf16],
    /// (K, T, G).
    logsumexp: &'a [f32],
}

fn backward_task(
    inputs: &Inputs<'_>,
    shape: &Shape,
    document: usize,
    kv_head: usize,
    dq: &mut [bf16],
    dk: &mut [bf16],
    dv: &mut [bf16],
) {
    let Shape { group, head, scale, tokens, .. } = *shape;
    let (start, length) = shape.documents[document];
    let width = |block: usize| BLOCK.min(length - block * BLOCK);
    let blocks = length.div_ceil(BLOCK);
    let size = BLOCK * head;
    // K^T (H, n) of every block of keys, as left operand of dQ^T.
    let mut keys_transposed = vec![bf16::ZERO; blocks * size];
    for block in 0..blocks {
        let keys = shape.rows(inputs.k, true, kv_head, start + block * BLOCK);
        transpose(keys, width(block), head, &mut keys_transposed[block * size..]);
    }
    // Q^T, dO^T, Q and dO of every block of queries, as right operands.
    let [mut q_columns, mut g_columns, mut q_rows, mut g_rows] = [(); 4].map(|()| vec![bf16::ZERO; blocks * size]);
    let [mut dk_sums, mut dv_sums] = [(); 2].map(|()| vec![0f32; blocks * size]);
    let mut dq_sums = vec![0f32; blocks * size]; // (H, m) of every block
    let mut delta = vec![0f32; length];
    let mut lse = vec![0f32; length];
    let [mut scores, mut products] = [(); 2].map(|()| vec![0f32; BLOCK * BLOCK]);
    let [mut weights, mut gradients, mut paired] = [(); 3].map(|()| vec![bf16::ZERO; BLOCK * BLOCK]);
    for g in 0..group {
        let query_head = kv_head * group + g;
        for block in 0..blocks {
            let (at, rows) = (block * size, width(block));
            let queries = shape.rows(inputs.q, false, query_head, start + block * BLOCK);
            let grads = shape.rows(inputs.grad, false, query_head, start + block * BLOCK);
            pack_transposed(queries, rows, head, &mut q_columns[at..]);
            pack_transposed(grads, rows, head, &mut g_columns[at..]);
            pack_rows(queries, rows, head, &mut q_rows[at..]);
            pack_rows(grads, rows, head, &mut g_rows[at..]);
        }
        let outputs = shape.rows(inputs.output, false, query_head, start);
        dot_rows(shape.rows(inputs.grad, false, query_head, start), outputs, head, &mut delta);
        for (row, lse) in lse.iter_mut().enumerate() {
            *lse = inputs.logsumexp[(kv_head * tokens + start + row) * group + g];
        }
        dq_sums.fill(0.0);
        for key_block in 0..blocks {
            let (n, key) = (width(key_block), key_block * BLOCK);
            let even = n.next_multiple_of(2);
            let keys = shape.rows(inputs.k, true, kv_head, start + key);
            let values = shape.rows(inputs.v, true, kv_head, start + key);
            for query_block in key_block..blocks {
                let (m, first, at) = (width(query_block), query_block * BLOCK, query_block * size);
                if !shape.key_blocks(first, first + m).contains(&key_block) {
                    continue;
                }
                let even_m = m.next_multiple_of(2);
                bf16_gemm((n, m, head), keys, &q_columns[at..], &mut scores, false);
                bf16_gemm((n, m, head), values, &g_columns[at..], &mut products, false);
                // Query `first + column` sees key `key + row` when it is not before it and within the window.
                let columns = |row: usize| {
                    let key = key + row;
                    let from = key.saturating_sub(first).min(m);
                    let to = key.saturating_add(shape.window).saturating_sub(first).min(m);
                    (from, to.max(from))
                };
                let per_query = (&lse[first..first + m], &delta[first..first + m]);
                gradient_block(
                    (&scores, &products),
                    (n, m, even_m),
                    scale,
                    &columns,
                    per_query,
                    &mut weights,
                    &mut gradients,
                );
                let weights = Rows { elements: &weights, stride: even_m };
                bf16_gemm((n, head, even_m), weights, &g_rows[at..], &mut dv_sums[key * head..], true);
                let gradients = Rows { elements: &gradients, stride: even_m };
                bf16_gemm((n, head, even_m), gradients, &q_rows[at..], &mut dk_sums[key * head..], true);
                pack_rows(gradients, n, m, &mut paired);
                let keys_transposed = Rows { elements: &keys_transposed[key_block * size..], stride: BLOCK };
                bf16_gemm((head, m, even), keys_transposed, &paired, &mut dq_sums[at..], true);
            }
        }
        for block in 0..blocks {
            let (first, m) = (block * BLOCK, width(block));
            let sums = &dq_sums[block * size..block * size + head * m]; // (H, m)
            round_transposed(sums, (m, head), group * head, &mut dq[(first * group + g) * head..]);
        }
    }
    round(&dk_sums, dk);
    round(&dv_sums, dv);
    bf16_gemm_done();
}

/// P^T and dS^T (n, even) of a block from S^T and dP^T (n, m); one column is one query.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn gradient_block(
    (scores, products): (&[f32], &[f32]),
    (n, m, even): (usize, usize, usize),
    scale: f32,
    columns: &dyn Fn(usize) -> (usize, usize),
    (lse, delta): (&[f32], &[f32]),
    weights: &mut [bf16],
    gradients: &mut [bf16],
) {
    let fused = target_cfg_f!(target_feature = "fma");
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
            let p = exp(scores[i] * scale - lse[i], fused);
            weights[i] = Stored::rounded(p);
            gradients[i] = Stored::rounded(p * (products[i] - delta[i]) * scale);
        }
    }
}

/// `sum_h a[row, h] b[row, h]` of every row.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn dot_rows(a: Rows<'_>, b: Rows<'_>, width: usize, dots: &mut [f32]) {
    for (row, dot) in dots.iter_mut().enumerate() {
        let (a, b) = (&a.elements[row * a.stride..][..width], &b.elements[row * b.stride..][..width]);
        *dot = sum(width, |i| a[i].wide() * b[i].wide());
    }
}

/// Rounds sums to bf16.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn round(sums: &[f32], out: &mut [bf16]) {
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = Stored::rounded(*sum);
    }
}

/// Rounds sums (width, rows) into `out` (rows, width), whose rows lie `stride` apart.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn round_transposed(sums: &[f32], (rows, width): (usize, usize), stride: usize, out: &mut [bf16]) {
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
fn pack_transposed(x: Rows<'_>, rows: usize, width: usize, packed: &mut [bf16]) {
    for row in 0..rows {
        let x = &x.elements[row * x.stride..][..width];
        for (pair, x) in x.chunks_exact(2).enumerate() {
            packed[(pair * rows + row) * 2..][..2].copy_from_slice(x);
        }
    }
}

/// A right operand (rows, width) from x (rows, width): pairs of rows side by side, (rows/2, width, 2); an odd last row is
/// paired with zeros.
fn pack_rows(x: Rows<'_>, rows: usize, width: usize, packed: &mut [bf16]) {
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
fn transpose(x: Rows<'_>, rows: usize, width: usize, transposed: &mut [bf16]) {
    for row in 0..rows {
        for (column, x) in x.elements[row * x.stride..][..width].iter().enumerate() {
            transposed[column * BLOCK + row] = *x;
        }
    }
}
