//! Causal attention of documents laid end to end, grouped heads included (arXiv:2205.14135, arXiv:2305.13245).
//!
//! A document never sees another. On CUDA one FlashAttention call serves all documents. On the CPU bf16 goes through our own
//! blocks, the rest through libtorch's flash kernel document by document, K and V shared by their group of heads through a
//! stride of zero instead of a copy. What no flash kernel takes (fp32 on CUDA, odd head sizes) is computed in plain
//! products, document by document.

mod blocks;

use tch::{Device, Kind, Tensor};

use super::{Documents, cpu};
use crate::torch_ext::{self, custom};

/// `softmax(scale q k^T + mask) v`: (T, N, H) from q (T, N, H), k and v (T, K, H).
///
/// The mask is causal within each document; with `window`, a token sees itself and the `window - 1` tokens before it.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, documents: &Documents, scale: f64, window: Option<i64>) -> Tensor {
    // What FlashAttention-2 takes: half precision, heads of up to 256 elements in steps of 8.
    let head = q.size()[2];
    if q.device().is_cuda() && q.kind() != Kind::Float && head % 8 == 0 && head <= 256 {
        return cuda(q, k, v, documents, scale, window);
    }
    if cpu::serves(&[q, k, v]) && !is_plain(q) && blocks::serves(q, k, v) {
        let shape = blocks::Shape::new(q, k, documents, scale, window);
        let (output, logsumexp) = tch::no_grad(|| blocks::forward(q, k, v, &shape));
        let saved = [q.detach(), k.detach(), v.detach(), output.shallow_clone()];
        return custom(c"engraft::attention", &[q, k, v], vec![output], move |grads| {
            blocks::backward(&grads[0], saved.each_ref(), &logsumexp, &shape).map(Some).into()
        })
        .remove(0);
    }
    let (output, kept) = tch::no_grad(|| {
        let output = q.empty_like();
        let kept: Vec<Tensor> = documents
            .spans()
            .map(|span| {
                let (o, logsumexp) = Span::new(q, k, v, span, window).forward(scale);
                ungroup(&output, span).copy_(&o);
                logsumexp
            })
            .collect();
        (output, kept)
    });
    let saved = [q.detach(), k.detach(), v.detach(), output.shallow_clone()];
    let documents = documents.clone();
    custom(c"engraft::attention", &[q, k, v], vec![output], move |grads| {
        let [q, k, v, output] = &saved;
        let [dq, dk, dv] = [q, k, v].map(Tensor::empty_like);
        for (span, logsumexp) in documents.spans().zip(&kept) {
            let part = Span::new(q, k, v, span, window);
            let heads = k.size()[1];
            let [gq, gk, gv] =
                part.backward(&grouped(&grads[0], span, heads), &grouped(output, span, heads), logsumexp, scale);
            ungroup(&dq, span).copy_(&gq);
            // The heads of a group share K and V: their gradients add up.
            for (into, grad) in [(&dk, gk), (&dv, gv)] {
                let summed = grad.sum_dim_intlist([1i64].as_slice(), false, into.kind()); // (K, L, H)
                into.narrow(0, span.0, span.1).transpose(0, 1).copy_(&summed);
            }
        }
        vec![Some(dq), Some(dk), Some(dv)]
    })
    .remove(0)
}

fn cuda(q: &Tensor, k: &Tensor, v: &Tensor, documents: &Documents, scale: f64, window: Option<i64>) -> Tensor {
    let offsets = Tensor::from_slice(&documents.offsets).to_kind(Kind::Int).to_device(q.device());
    let longest = documents.longest();
    let left = window.map(|w| w - 1);
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

/// One document: q (K, G, L, H), k and v (K, G, L, H) with a stride of zero over G, G heads to a group.
struct Span {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Option<Tensor>,
}

/// Whether no flash kernel takes this and it is computed in plain products.
fn is_plain(q: &Tensor) -> bool {
    #[cfg(test)]
    if tests::PLAIN.get() {
        return true;
    }
    q.device() != Device::Cpu
}

impl Span {
    fn is_plain(&self) -> bool {
        is_plain(&self.q)
    }

    /// Scaled and masked scores (K, G, L, L), fp32.
    fn scores(&self, scale: f64) -> Tensor {
        let scores = self.q.matmul(&self.k.transpose(-1, -2)).to_kind(Kind::Float) * scale;
        self.mask.as_ref().map_or_else(|| scores.shallow_clone(), |mask| &scores + mask)
    }

    fn new(q: &Tensor, k: &Tensor, v: &Tensor, span: (i64, i64), window: Option<i64>) -> Self {
        let heads = k.size()[1];
        let shared = |t: &Tensor| {
            let t = t.narrow(0, span.0, span.1).transpose(0, 1).unsqueeze(1); // (K, 1, L, H)
            let (k, _, l, h) = t.size4().expect("four dimensions by construction");
            t.expand([k, q.size()[1] / heads, l, h], false)
        };
        // A window that reaches over the whole document is no window, and causality needs no mask where the kernel knows it.
        let window = window.filter(|w| *w < span.1).or_else(|| is_plain(q).then_some(span.1));
        let mask = window.map(|w| band(span.1, w, q));
        Self { q: grouped(q, span, heads), k: shared(k), v: shared(v), mask }
    }

    /// The output (K, G, L, H) and the logsumexp of the scaled scores.
    fn forward(&self, scale: f64) -> (Tensor, Tensor) {
        if self.is_plain() {
            let scores = self.scores(scale);
            let logsumexp = scores.logsumexp([-1i64].as_slice(), true); // (K, G, L, 1)
            let weights = (scores - &logsumexp).exp().to_kind(self.q.kind());
            return (weights.matmul(&self.v), logsumexp);
        }
        Tensor::internal_scaled_dot_product_flash_attention_for_cpu(
            &self.q,
            &self.k,
            &self.v,
            0.0,
            self.mask.is_none(),
            self.mask.as_ref(),
            scale,
        )
    }

    /// dq, dk and dv, all (K, G, L, H).
    fn backward(&self, grad: &Tensor, output: &Tensor, logsumexp: &Tensor, scale: f64) -> [Tensor; 3] {
        if self.is_plain() {
            let weights = (self.scores(scale) - logsumexp).exp(); // (K, G, L, L)
            let delta = (grad * output).sum_dim_intlist([-1i64].as_slice(), true, Kind::Float); // (K, G, L, 1)
            let dweights = grad.matmul(&self.v.transpose(-1, -2)).to_kind(Kind::Float);
            let dscores = ((dweights - delta) * &weights * scale).to_kind(self.q.kind());
            let dv = weights.to_kind(self.q.kind()).transpose(-1, -2).matmul(grad);
            return [dscores.matmul(&self.k), dscores.transpose(-1, -2).matmul(&self.q), dv];
        }
        Tensor::internal_scaled_dot_product_flash_attention_for_cpu_backward(
            grad,
            &self.q,
            &self.k,
            &self.v,
            output,
            logsumexp,
            0.0,
            self.mask.is_none(),
            self.mask.as_ref(),
            scale,
        )
        .into()
    }
}

/// A document's part of x (T, N, H) as (K, G, L, H); head n belongs to group n / G.
fn grouped(x: &Tensor, (start, length): (i64, i64), kv_heads: i64) -> Tensor {
    let (_, heads, head) = x.size3().expect("(T, N, H)");
    x.narrow(0, start, length).view([length, kv_heads, heads / kv_heads, head]).permute([1, 2, 0, 3])
}

/// Where a document's (K, G, L, H) goes in x (T, N, H): the same view, to be written to.
fn ungroup(x: &Tensor, span: (i64, i64)) -> UngroupTarget {
    UngroupTarget { x: x.shallow_clone(), span }
}

struct UngroupTarget {
    x: Tensor,
    span: (i64, i64),
}

impl UngroupTarget {
    fn copy_(&self, part: &Tensor) {
        grouped(&self.x, self.span, part.size()[0]).copy_(part);
    }
}

/// Additive mask (L, L): 0 where a token may look, minus infinity elsewhere.
fn band(length: i64, window: i64, like: &Tensor) -> Tensor {
    let ones = Tensor::ones([length, length], (Kind::Bool, like.device()));
    let outside = ones.tril(0).logical_and(&ones.triu(1 - window)).logical_not();
    Tensor::zeros([length, length], (like.kind(), like.device())).masked_fill(&outside, f64::NEG_INFINITY)
}

#[cfg(test)]
mod tests {
    use super::*;

    thread_local! {
        pub(super) static PLAIN: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
    }
    use crate::ops::testing::{check, randn};

    /// The slow twin: one softmax over all T keys with a mask that says who may look where.
    fn twin(q: &Tensor, k: &Tensor, v: &Tensor, documents: &Documents, scale: f64, window: Option<i64>) -> Tensor {
        let t = q.size()[0];
        let mut allowed = vec![false; (t * t) as usize];
        for (start, length) in documents.spans() {
            for i in start..start + length {
                for j in start..=i {
                    allowed[(i * t + j) as usize] = window.is_none_or(|w| i - j < w);
                }
            }
        }
        let refused = Tensor::from_slice(&allowed).view([t, t]).logical_not();
        let groups = q.size()[1] / k.size()[1];
        let spread = |x: &Tensor| x.repeat_interleave_self_int(groups, 1, None).transpose(0, 1); // (N, T, H)
        let scores = q.transpose(0, 1).matmul(&spread(k).transpose(1, 2)) * scale;
        let weights = scores.masked_fill(&refused, f64::NEG_INFINITY).softmax(-1, Kind::Float).to_kind(q.kind());
        weights.matmul(&spread(v)).transpose(0, 1)
    }

    #[test]
    fn equals_plain_autograd_over_documents_groups_and_windows() {
        // Short documents, one of a single token; then one of several blocks with an odd rest.
        let cases = [(vec![0, 7, 8, 29], [None, Some(5), Some(100)]), (vec![0, 3, 304], [None, Some(130), Some(77)])];
        let heads = [(6, 2), (4, 4), (3, 1)];
        for ((offsets, windows), (heads, kv_heads)) in cases.iter().flat_map(|c| heads.iter().map(move |h| (c, h))) {
            let documents = Documents { offsets: offsets.clone() };
            let t = offsets[offsets.len() - 1];
            for window in *windows {
                let inputs = [randn(&[t, *heads, 16], 1), randn(&[t, *kv_heads, 16], 2), randn(&[t, *kv_heads, 16], 3)];
                for plain in [false, true] {
                    PLAIN.set(plain);
                    check(
                        &inputs,
                        |_, x| vec![attention(&x[0], &x[1], &x[2], &documents, 0.25, window)],
                        |_, x| vec![twin(&x[0], &x[1], &x[2], &documents, 0.25, window)],
                    );
                    PLAIN.set(false);
                }
            }
        }
    }
}
