//! FlashAttention-2 (arXiv:2307.08691) on the CPU in bf16: blocks of scores in fp32 by libtorch's own micro-kernel, the
//! softmax between two products in one pass, nothing of size L x L ever stored.
//!
//! libtorch's CPU kernel does the same, but its backward is several times slower on the short documents of fine-tuning.
//! One task is one document and one key/value head with its group of query heads, so tasks share nothing they write.
//! Soft caps, linear biases and sinks are served too, and values of another head size than queries and keys.
//!
//! The micro-kernel wants its right operand as pairs of rows side by side. Forward computes `S = Q K^T`; backward computes the
//! transposes, `S^T = K Q^T`, so that every product but one finds its left operand as it lies:
//!
//! ```text
//! P^T = exp(scale S^T - lse)   dV  += P^T dO     dP^T = V dO^T
//! dS^T = P^T (dP^T - delta) scale   dK += dS^T Q     dQ^T += K^T dS^T
//! ```

pub(super) mod entries;
mod pack;
mod softmax;

use half::bf16;
use tch::{Device, Kind, Tensor};

use super::Scoring;
use crate::ops::Documents;
use crate::ops::cpu::{Parts, Stored};
use crate::torch_ext::{Rows, bf16_gemm, bf16_gemm_done, bf16_gemm_serves, elements, elements_mut, parallel_tasks};
use pack::{dot_rows, pack_rows, pack_transposed, round, round_transposed, transpose};
use softmax::{Bias, Scores, gradient_block, softmax_block};

/// Rows of queries and of keys handled at once: a block of scores is 64 KiB and stays in the second-level cache.
const BLOCK: usize = 128;

/// Whether these tensors can go through here.
pub(super) fn serves(q: &Tensor, k: &Tensor, v: &Tensor) -> bool {
    [q, k, v].iter().all(|t| t.device() == Device::Cpu && t.kind() == Kind::BFloat16 && t.is_contiguous())
        && q.size()[2] % 2 == 0
        && v.size()[2] % 2 == 0
        && bf16_gemm_serves()
}

/// Sizes, who may look at whom, and how scores are made.
pub(super) struct Shape {
    documents: Vec<(usize, usize)>,
    tokens: usize,
    kv_heads: usize,
    group: usize,
    /// Elements of a head of queries and keys.
    head: usize,
    /// Elements of a head of values, and of the output.
    value: usize,
    window: usize,
    scores: Scores,
}

/// Which tensor rows are taken from.
#[derive(Clone, Copy)]
enum Of {
    /// q (T, N, H), of a query head.
    Queries(usize),
    /// k (T, K, H), of a key/value head.
    Keys(usize),
    /// v (T, K, Hv), of a key/value head.
    Values(usize),
    /// The output (T, N, Hv) or its gradient, of a query head.
    Outputs(usize),
}

impl Shape {
    pub(super) fn new(q: &Tensor, k: &Tensor, v: &Tensor, documents: &Documents, scoring: &Scoring) -> Self {
        let (tokens, heads, head) = q.size3().expect("(T, N, H)");
        let (kv_heads, value) = (k.size()[1], v.size()[2]);
        Self {
            documents: documents.spans().map(|(start, length)| (start as usize, length as usize)).collect(),
            tokens: tokens as usize,
            kv_heads: kv_heads as usize,
            group: (heads / kv_heads) as usize,
            head: head as usize,
            value: value as usize,
            window: scoring.window.map_or(usize::MAX, |w| w as usize),
            scores: Scores::new(scoring, kv_heads as usize, documents.longest() as usize),
        }
    }

    /// Rows of a head, from token `first` on.
    fn rows<'a>(&self, x: &'a [bf16], of: Of, first: usize) -> Rows<'a> {
        let (heads, width, n) = match of {
            Of::Queries(n) => (self.kv_heads * self.group, self.head, n),
            Of::Keys(n) => (self.kv_heads, self.head, n),
            Of::Values(n) => (self.kv_heads, self.value, n),
            Of::Outputs(n) => (self.kv_heads * self.group, self.value, n),
        };
        Rows { elements: &x[(first * heads + n) * width..], stride: heads * width }
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

/// The output (T, N, Hv) and, for backward, logsumexp of the scores as (K, T, G), fp32.
pub(super) fn forward(q: &Tensor, k: &Tensor, v: &Tensor, shape: &Shape) -> (Tensor, Tensor) {
    let Shape { tokens, kv_heads, group, value, .. } = *shape;
    let plane = [kv_heads as i64, tokens as i64, (group * value) as i64];
    let mut output = Tensor::empty(plane, (Kind::BFloat16, Device::Cpu));
    let mut logsumexp = Tensor::empty([kv_heads as i64, tokens as i64, group as i64], (Kind::Float, Device::Cpu));
    let (q, k, v) = (elements::<bf16>(q), elements::<bf16>(k), elements::<bf16>(v));
    {
        let outputs = parts(elements_mut::<bf16>(&mut output), shape, group * value);
        let logsumexps = parts(elements_mut::<f32>(&mut logsumexp), shape, group);
        let tasks = shape.tasks();
        parallel_tasks(tasks.len(), |i| {
            let (document, kv_head) = tasks[i];
            let (mut output, mut logsumexp) = (outputs.take(kv_head, document), logsumexps.take(kv_head, document));
            forward_task(q, k, v, shape, document, kv_head, &mut output, &mut logsumexp);
        });
    }
    (heads_together(&output, shape, group, value), logsumexp)
}

/// dq (T, N, H), dk (T, K, H) and dv (T, K, Hv).
pub(super) fn backward(
    grad: &Tensor,
    [q, k, v, output]: [&Tensor; 4],
    logsumexp: &Tensor,
    shape: &Shape,
) -> [Tensor; 3] {
    let Shape { tokens, kv_heads, group, head, value, .. } = *shape;
    let grad = grad.contiguous();
    let empty =
        |width: usize| Tensor::empty([kv_heads as i64, tokens as i64, width as i64], (Kind::BFloat16, Device::Cpu));
    let (mut dq, mut dk, mut dv) = (empty(group * head), empty(head), empty(value));
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
        let dvs = parts(elements_mut::<bf16>(&mut dv), shape, value);
        let tasks = shape.tasks();
        parallel_tasks(tasks.len(), |i| {
            let (document, kv_head) = tasks[i];
            let [mut dq, mut dk, mut dv] = [&dqs, &dks, &dvs].map(|parts| parts.take(kv_head, document));
            backward_task(&inputs, shape, document, kv_head, &mut dq, &mut dk, &mut dv);
        });
    }
    [heads_together(&dq, shape, group, head), heads_together(&dk, shape, 1, head), heads_together(&dv, shape, 1, value)]
}

/// What each task writes: the rows of its document in the plane of its head, of (K, T, width).
fn parts<'a, T>(all: &'a mut [T], shape: &Shape, width: usize) -> Parts<'a, T> {
    let lengths: Vec<usize> = shape.documents.iter().map(|(_, length)| length * width).collect();
    Parts::new(all, shape.kv_heads, &lengths)
}

/// (T, K G, `width`) from (K, T, G `width`).
fn heads_together(x: &Tensor, shape: &Shape, group: usize, width: usize) -> Tensor {
    x.transpose(0, 1).contiguous().view([shape.tokens as i64, (shape.kv_heads * group) as i64, width as i64])
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
    let Shape { group, head, value, .. } = *shape;
    let (start, length) = shape.documents[document];
    let width = |block: usize| BLOCK.min(length - block * BLOCK);
    let blocks = length.div_ceil(BLOCK);
    // K^T and V of every block of keys, as right operands.
    let mut keys = vec![bf16::ZERO; blocks * BLOCK * head];
    let mut values = vec![bf16::ZERO; blocks * BLOCK * value];
    for block in 0..blocks {
        let (first, rows) = (block * BLOCK, width(block));
        pack_transposed(shape.rows(k, Of::Keys(kv_head), start + first), rows, head, &mut keys[first * head..]);
        pack_rows(shape.rows(v, Of::Values(kv_head), start + first), rows, value, &mut values[first * value..]);
    }
    let left = shape.scores.left();
    let mut scores = vec![0f32; BLOCK * BLOCK];
    let mut weights = vec![bf16::ZERO; BLOCK * BLOCK];
    let mut sums = vec![0f32; BLOCK * value];
    for g in 0..group {
        let query_head = kv_head * group + g;
        for query_block in 0..blocks {
            let (first, m) = (query_block * BLOCK, width(query_block));
            let queries = shape.rows(q, Of::Queries(query_head), start + first);
            let mut running = [shape.scores.start(query_head); BLOCK];
            sums[..m * value].fill(0.0);
            for key_block in shape.key_blocks(first, first + m) {
                let (n, key) = (width(key_block), key_block * BLOCK);
                let even = n.next_multiple_of(2);
                bf16_gemm((m, n, head), queries, &keys[key * head..], &mut scores, false);
                let bias = shape.scores.biases(query_head).map_or(Bias::None, |b| Bias::Columns(&b[key..key + n]));
                shape.scores.of_products(&mut scores[..m * n], n, bias);
                let columns = |row: usize| shape.columns(first + row, key, n);
                softmax_block(&scores, (m, n, even), left, &columns, &mut running, &mut weights, &mut sums, value);
                let weights = Rows { elements: &weights, stride: even };
                bf16_gemm((m, value, even), weights, &values[key * value..], &mut sums, true);
            }
            for (row, running) in running[..m].iter().enumerate() {
                let at = (first + row) * group + g;
                logsumexp[at] = running.logsumexp();
                let out = &mut output[at * value..(at + 1) * value];
                for (out, sum) in out.iter_mut().zip(&sums[row * value..(row + 1) * value]) {
                    *out = Stored::rounded(sum / running.total());
                }
            }
        }
    }
    bf16_gemm_done();
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
    let Shape { group, head, value, tokens, .. } = *shape;
    let (start, length) = shape.documents[document];
    let width = |block: usize| BLOCK.min(length - block * BLOCK);
    let blocks = length.div_ceil(BLOCK);
    let padded = blocks * BLOCK;
    // K^T (H, n) of every block of keys, as left operand of dQ^T.
    let mut keys_transposed = vec![bf16::ZERO; padded * head];
    for block in 0..blocks {
        let keys = shape.rows(inputs.k, Of::Keys(kv_head), start + block * BLOCK);
        transpose(keys, width(block), head, &mut keys_transposed[block * BLOCK * head..]);
    }
    // Q^T, dO^T, Q and dO of every block of queries, as right operands.
    let [mut q_columns, mut q_rows] = [(); 2].map(|()| vec![bf16::ZERO; padded * head]);
    let [mut g_columns, mut g_rows] = [(); 2].map(|()| vec![bf16::ZERO; padded * value]);
    let (mut dk_sums, mut dv_sums) = (vec![0f32; padded * head], vec![0f32; padded * value]);
    let mut dq_sums = vec![0f32; padded * head]; // (H, m) of every block
    let mut delta = vec![0f32; length];
    let mut lse = vec![0f32; length];
    let left = shape.scores.left();
    let [mut scores, mut products] = [(); 2].map(|()| vec![0f32; BLOCK * BLOCK]);
    let [mut weights, mut gradients, mut paired] = [(); 3].map(|()| vec![bf16::ZERO; BLOCK * BLOCK]);
    for g in 0..group {
        let query_head = kv_head * group + g;
        for block in 0..blocks {
            let (first, rows) = (block * BLOCK, width(block));
            let queries = shape.rows(inputs.q, Of::Queries(query_head), start + first);
            let grads = shape.rows(inputs.grad, Of::Outputs(query_head), start + first);
            pack_transposed(queries, rows, head, &mut q_columns[first * head..]);
            pack_transposed(grads, rows, value, &mut g_columns[first * value..]);
            pack_rows(queries, rows, head, &mut q_rows[first * head..]);
            pack_rows(grads, rows, value, &mut g_rows[first * value..]);
        }
        let [grads, outputs] = [inputs.grad, inputs.output].map(|x| shape.rows(x, Of::Outputs(query_head), start));
        dot_rows(grads, outputs, value, &mut delta);
        for (row, lse) in lse.iter_mut().enumerate() {
            *lse = inputs.logsumexp[(kv_head * tokens + start + row) * group + g];
        }
        dq_sums.fill(0.0);
        for key_block in 0..blocks {
            let (n, key) = (width(key_block), key_block * BLOCK);
            let even = n.next_multiple_of(2);
            let keys = shape.rows(inputs.k, Of::Keys(kv_head), start + key);
            let values = shape.rows(inputs.v, Of::Values(kv_head), start + key);
            for query_block in key_block..blocks {
                let (m, first) = (width(query_block), query_block * BLOCK);
                if !shape.key_blocks(first, first + m).contains(&key_block) {
                    continue;
                }
                let even_m = m.next_multiple_of(2);
                bf16_gemm((n, m, head), keys, &q_columns[first * head..], &mut scores, false);
                bf16_gemm((n, m, value), values, &g_columns[first * value..], &mut products, false);
                let bias = shape.scores.biases(query_head).map_or(Bias::None, |b| Bias::Rows(&b[key..key + n]));
                shape.scores.of_products(&mut scores[..n * m], m, bias);
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
                    left,
                    &columns,
                    per_query,
                    &mut weights,
                    &mut gradients,
                );
                let weights = Rows { elements: &weights, stride: even_m };
                bf16_gemm((n, value, even_m), weights, &g_rows[first * value..], &mut dv_sums[key * value..], true);
                let gradients = Rows { elements: &gradients, stride: even_m };
                bf16_gemm((n, head, even_m), gradients, &q_rows[first * head..], &mut dk_sums[key * head..], true);
                pack_rows(gradients, n, m, &mut paired);
                let keys_transposed = Rows { elements: &keys_transposed[key * head..], stride: BLOCK };
                bf16_gemm((head, m, even), keys_transposed, &paired, &mut dq_sums[first * head..], true);
            }
        }
        for block in 0..blocks {
            let (first, m) = (block * BLOCK, width(block));
            let sums = &dq_sums[first * head..(first + m) * head]; // (H, m)
            round_transposed(sums, (m, head), group * head, &mut dq[(first * group + g) * head..]);
        }
    }
    round(&dk_sums, dk);
    round(&dv_sums, dv);
    bf16_gemm_done();
}
