//! Attention in plain products, for what no kernel takes: a block of queries at a time, so that scores stay bounded however long
//! a document is.

use tch::{Kind, Tensor};

use super::{Scoring, Taken, grouped};
use crate::ops::Documents;

/// Bytes of fp32 scores that may exist at once.
const SCORES_BYTES: i64 = 64 << 20;

/// Some queries of a document and the keys they may look at.
struct Block {
    /// Place of the first query in the document.
    first: i64,
    /// Place of the first key in the document.
    first_key: i64,
    /// (start, length) among all tokens.
    queries: (i64, i64),
    /// (start, length) among all tokens.
    keys: (i64, i64),
}

/// How many queries at once have no more scores than may exist.
pub(super) fn queries_at_once(heads: i64, keys: i64) -> i64 {
    #[cfg(test)]
    if let Some(queries) = super::tests::QUERIES.get() {
        return queries;
    }
    (SCORES_BYTES / (4 * heads * keys.max(1))).max(1)
}

fn blocks(documents: &Documents, heads: i64, window: Option<i64>) -> Vec<Block> {
    let of_document = |(start, length): (i64, i64)| {
        let rows = queries_at_once(heads, length);
        (0..length).step_by(rows as usize).map(move |first| {
            let end = length.min(first + rows);
            let first_key = window.map_or(0, |window| (first + 1 - window).max(0));
            Block {
                first,
                first_key,
                queries: (start + first, end - first),
                keys: (start + first_key, end - first_key),
            }
        })
    };
    documents.spans().flat_map(of_document).collect()
}

/// A block's operands, heads of a group side by side.
struct Part {
    /// (K, G L, H).
    q: Tensor,
    /// (K, S, H).
    k: Tensor,
    /// (K, S, Hv).
    v: Tensor,
    /// K, G, L, S.
    size: [i64; 4],
    /// (L, S): minus infinity where a query may not look.
    mask: Tensor,
    first_key: i64,
}

impl Part {
    fn new(q: &Tensor, k: &Tensor, v: &Tensor, block: &Block, window: Option<i64>) -> Self {
        let (kv_heads, rows, keys) = (k.size()[1], block.queries.1, block.keys.1);
        let shared = |x: &Tensor| x.narrow(0, block.keys.0, keys).transpose(0, 1); // (K, S, H)
        let ones = Tensor::ones([rows, keys], (Kind::Bool, q.device()));
        let ahead = block.first - block.first_key;
        let before = ones.tril(ahead);
        let seen = window.map_or_else(|| before.shallow_clone(), |w| before.logical_and(&ones.triu(ahead + 1 - w)));
        let mask = Tensor::zeros([rows, keys], (Kind::Float, q.device()));
        Self {
            q: side_by_side(q, block.queries, kv_heads),
            k: shared(k),
            v: shared(v),
            size: [kv_heads, q.size()[1] / kv_heads, rows, keys],
            mask: mask.masked_fill(&seen.logical_not(), f64::NEG_INFINITY),
            first_key: block.first_key,
        }
    }

    /// Scores before the mask (K, G, L, S), fp32.
    fn scores(&self, scoring: &Scoring) -> Tensor {
        scoring.scores(&self.q.matmul(&self.k.transpose(1, 2)).view(self.size), self.first_key)
    }

    /// (K, G L, S) in the number type of the stream.
    fn flat(&self, x: &Tensor) -> Tensor {
        let [kv_heads, group, rows, keys] = self.size;
        x.to_kind(self.q.kind()).view([kv_heads, group * rows, keys])
    }

    /// (K, G, L, H) from (K, G L, H).
    fn apart(&self, x: &Tensor) -> Tensor {
        let [kv_heads, group, rows, _] = self.size;
        x.view([kv_heads, group, rows, -1])
    }
}

/// (K, G L, H) of a part of x (T, N, H).
fn side_by_side(x: &Tensor, span: (i64, i64), kv_heads: i64) -> Tensor {
    grouped(x, span, kv_heads).reshape([kv_heads, -1, x.size()[2]])
}

/// The output (T, N, Hv) and every block's logsumexp of the scores, (K, G, L, 1).
pub(super) fn forward([q, k, v]: [&Tensor; 3], documents: &Documents, scoring: &Scoring) -> (Tensor, Vec<Tensor>) {
    let (tokens, heads, _) = q.size3().expect("(T, N, H)");
    let kv_heads = k.size()[1];
    let output = Tensor::empty([tokens, heads, v.size()[2]], (q.kind(), q.device()));
    let attend = |block: &Block| {
        let part = Part::new(q, k, v, block, scoring.window);
        let scores = part.scores(scoring) + &part.mask;
        let logsumexp = scoring.with_sinks(scores.logsumexp([-1i64].as_slice(), true)); // (K, G, L, 1)
        let weights = (scores - &logsumexp).exp_();
        let attended = part.flat(&weights).matmul(&part.v); // (K, G L, Hv)
        grouped(&output, block.queries, kv_heads).copy_(&part.apart(&attended));
        logsumexp
    };
    let kept = blocks(documents, heads, scoring.window).iter().map(attend).collect();
    (output, kept)
}

/// dq (T, N, H), dk (T, K, H) and dv (T, K, Hv).
pub(super) fn backward(grad: &Tensor, taken: &Taken) -> [Tensor; 3] {
    let Taken { tensors: [q, k, v, output], kept, documents, scoring } = taken;
    let kv_heads = k.size()[1];
    let dq = q.empty_like();
    let [dk, dv] = [k, v].map(|x| Tensor::zeros(x.size(), (Kind::Float, x.device())));
    for (block, logsumexp) in blocks(documents, q.size()[1], scoring.window).iter().zip(kept) {
        let part = Part::new(q, k, v, block, scoring.window);
        let grad = side_by_side(grad, block.queries, kv_heads); // (K, G L, Hv)
        let output = side_by_side(output, block.queries, kv_heads); // (K, G L, Hv)
        let scores = part.scores(scoring);
        let weights = (&scores + &part.mask - logsumexp).exp_(); // (K, G, L, S)
        let delta = (&grad * output).sum_dim_intlist([-1i64].as_slice(), true, Kind::Float); // (K, G L, 1)
        let dweights = grad.matmul(&part.v.transpose(1, 2)).to_kind(Kind::Float).view(part.size);
        let dscores = (dweights - part.apart(&delta)) * &weights;
        let dproducts = part.flat(&scoring.backward(dscores, &scores));
        grouped(&dq, block.queries, kv_heads).copy_(&part.apart(&dproducts.matmul(&part.k)));
        // The heads of a group share K and V: the products add their gradients up.
        for (into, grad) in
            [(&dk, dproducts.transpose(1, 2).matmul(&part.q)), (&dv, part.flat(&weights).transpose(1, 2).matmul(&grad))]
        {
            let mut into = into.narrow(0, block.keys.0, block.keys.1).transpose(0, 1); // (K, S, H)
            into += grad;
        }
    }
    [dq, dk.to_kind(k.kind()), dv.to_kind(v.kind())]
}
