//! libtorch's own flash kernels: FlashAttention-2 on CUDA (arXiv:2307.08691), and on the CPU document by document.

use tch::{Kind, Tensor};

use super::{Scoring, Taken, grouped};
use crate::ops::Documents;
use crate::torch_ext::{self, custom};

/// Attention in half precision on CUDA, all documents in one call.
pub(super) fn cuda(q: &Tensor, k: &Tensor, v: &Tensor, documents: &Documents, scoring: &Scoring) -> Tensor {
    let offsets = torch_ext::sent(&Tensor::from_slice(&documents.offsets).to_kind(Kind::Int), q.device());
    let (longest, scale) = (documents.longest(), scoring.scale);
    let left = scoring.window.map(|w| w - 1);
    let forward = tch::no_grad(|| torch_ext::flash_varlen((q, k, v), &offsets, longest, scale, left));
    let output = forward.output.shallow_clone();
    let saved = [q.detach(), k.detach(), v.detach()];
    custom(c"engraft::attention", &[q, k, v], vec![output], move |grads| {
        let [q, k, v] = &saved;
        torch_ext::flash_varlen_backward(&grads[0], (q, k, v), &forward, &offsets, longest, scale, left)
            .map(Some)
            .into()
    })
    .remove(0)
}

/// The output, dq, dk and dv of [`cuda`] for the output's gradient, without a graph.
pub(super) fn cuda_once(grad: &Tensor, [q, k, v]: [&Tensor; 3], documents: &Documents, scale: f64) -> [Tensor; 4] {
    let offsets = torch_ext::sent(&Tensor::from_slice(&documents.offsets).to_kind(Kind::Int), q.device());
    let longest = documents.longest();
    let forward = torch_ext::flash_varlen((q, k, v), &offsets, longest, scale, None);
    let [dq, dk, dv] = torch_ext::flash_varlen_backward(grad, (q, k, v), &forward, &offsets, longest, scale, None);
    [forward.output, dq, dk, dv]
}

/// One document: q (K, G, L, H), k and v (K, G, L, H) with a stride of zero over G, G heads to a group.
struct Span {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Option<Tensor>,
}

impl Span {
    fn new(q: &Tensor, k: &Tensor, v: &Tensor, span: (i64, i64), window: Option<i64>) -> Self {
        let heads = k.size()[1];
        let shared = |t: &Tensor| {
            let t = t.narrow(0, span.0, span.1).transpose(0, 1).unsqueeze(1); // (K, 1, L, H)
            let (k, _, l, h) = t.size4().expect("four dimensions by construction");
            t.expand([k, q.size()[1] / heads, l, h], false)
        };
        // A window that reaches over the whole document is no window, and causality needs no mask: the kernel knows it.
        let mask = window.filter(|w| *w < span.1).map(|w| band(span.1, w, q));
        Self { q: grouped(q, span, heads), k: shared(k), v: shared(v), mask }
    }

    /// The output (K, G, L, H) and the logsumexp of the scores.
    fn forward(&self, scale: f64) -> (Tensor, Tensor) {
        let (causal, mask) = (self.mask.is_none(), self.mask.as_ref());
        Tensor::internal_scaled_dot_product_flash_attention_for_cpu(&self.q, &self.k, &self.v, 0.0, causal, mask, scale)
    }

    /// dq, dk and dv, all (K, G, L, H).
    fn backward(&self, grad: &Tensor, output: &Tensor, logsumexp: &Tensor, scale: f64) -> [Tensor; 3] {
        let (causal, mask) = (self.mask.is_none(), self.mask.as_ref());
        Tensor::internal_scaled_dot_product_flash_attention_for_cpu_backward(
            grad, &self.q, &self.k, &self.v, output, logsumexp, 0.0, causal, mask, scale,
        )
        .into()
    }
}

/// On the CPU: the output (T, N, H) and every document's logsumexp of the scores.
pub(super) fn forward([q, k, v]: [&Tensor; 3], documents: &Documents, scoring: &Scoring) -> (Tensor, Vec<Tensor>) {
    let output = q.empty_like();
    let attend = |span: (i64, i64)| {
        let (part, logsumexp) = Span::new(q, k, v, span, scoring.window).forward(scoring.scale);
        grouped(&output, span, k.size()[1]).copy_(&part);
        logsumexp
    };
    let kept = documents.spans().map(attend).collect();
    (output, kept)
}

/// On the CPU: dq (T, N, H), dk and dv (T, K, H).
pub(super) fn backward(grad: &Tensor, taken: &Taken) -> [Tensor; 3] {
    let Taken { tensors: [q, k, v, output], kept, documents, scoring } = taken;
    let heads = k.size()[1];
    let [dq, dk, dv] = [q, k, v].map(Tensor::empty_like);
    for (span, logsumexp) in documents.spans().zip(kept) {
        let part = Span::new(q, k, v, span, scoring.window);
        let [gq, gk, gv] =
            part.backward(&grouped(grad, span, heads), &grouped(output, span, heads), logsumexp, scoring.scale);
        grouped(&dq, span, heads).copy_(&gq);
        // The heads of a group share K and V: their gradients add up.
        for (into, grad) in [(&dk, gk), (&dv, gv)] {
            let summed = grad.sum_dim_intlist([1i64].as_slice(), false, into.kind()); // (K, L, H)
            into.narrow(0, span.0, span.1).transpose(0, 1).copy_(&summed);
        }
    }
    [dq, dk, dv]
}

/// Additive mask (L, L): 0 where a token may look, minus infinity elsewhere.
fn band(length: i64, window: i64, like: &Tensor) -> Tensor {
    let ones = Tensor::ones([length, length], (Kind::Bool, like.device()));
    let outside = ones.tril(0).logical_and(&ones.triu(1 - window)).logical_not();
    Tensor::zeros([length, length], (like.kind(), like.device())).masked_fill(&outside, f64::NEG_INFINITY)
}
