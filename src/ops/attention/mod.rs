//! Causal attention of documents laid end to end, grouped heads included (arXiv:2205.14135, arXiv:2305.13245).
//!
//! A document never sees another. On CUDA one FlashAttention call serves all documents. On the CPU bf16 goes through our own
//! blocks, the rest through libtorch's flash kernel document by document, K and V shared by their group of heads through a
//! stride of zero instead of a copy. What no flash kernel takes (fp32 on CUDA, odd head sizes, soft caps, ALiBi, sinks) is
//! computed in plain products, document by document.

mod blocks;

use tch::{Device, Kind, Tensor};

use super::{Documents, cpu};
use crate::torch_ext::{self, custom};

/// How scores are made of the products of queries and keys.
#[derive(Debug)]
pub struct Scoring {
    /// Products are multiplied by this.
    pub scale: f64,
    /// A token sees itself and the `window - 1` tokens before it; all before it without.
    pub window: Option<i64>,
    /// Scores become `c tanh(score / c)` (arXiv:2408.00118).
    pub soft_cap: Option<f64>,
    /// A bias that grows with the key's place (arXiv:2108.12409).
    pub alibi: Option<Alibi>,
    /// Of each head (N), fp32: the score of a key that is always there and has no value (arXiv:2309.17453).
    pub sinks: Option<Tensor>,
}

impl Clone for Scoring {
    /// Another handle to the same tensors.
    fn clone(&self) -> Self {
        Self { alibi: self.alibi.clone(), sinks: self.sinks.as_ref().map(Tensor::shallow_clone), ..*self }
    }
}

impl Scoring {
    /// Plain scaled products.
    pub fn scaled(scale: f64) -> Self {
        Self { scale, window: None, soft_cap: None, alibi: None, sinks: None }
    }

    /// Whether flash kernels compute these scores.
    fn is_simple(&self) -> bool {
        self.soft_cap.is_none() && self.alibi.is_none() && self.sinks.is_none()
    }

    /// Scores in fp32 from products (..., L, S) of (K, G) heads with keys at places `0..S`, before any mask.
    fn scores(&self, products: &Tensor) -> Tensor {
        let mut scores = products.to_kind(Kind::Float) * self.scale;
        if let Some(alibi) = &self.alibi {
            scores += alibi.bias(&scores);
        }
        match self.soft_cap {
            Some(cap) => (scores / cap).tanh() * cap,
            None => scores,
        }
    }

    /// The gradient of the products from that of the scores; `scores` as [`Scoring::scores`] gave them.
    fn backward(&self, dscores: Tensor, scores: &Tensor) -> Tensor {
        let dscores = match self.soft_cap {
            Some(cap) => dscores * ((scores / cap).square().neg() + 1.0),
            None => dscores,
        };
        dscores * self.scale
    }

    /// The logsumexp (..., K, G, L, 1) with the sinks among the keys.
    fn with_sinks(&self, logsumexp: Tensor) -> Tensor {
        match &self.sinks {
            Some(sinks) => {
                let size = logsumexp.size();
                let (kv_heads, group) = (size[size.len() - 4], size[size.len() - 3]);
                logsumexp.logaddexp(&sinks.view([kv_heads, group, 1, 1]))
            }
            None => logsumexp,
        }
    }
}

/// Attention with linear biases: `slope * place of the key` is added to a head's scores.
#[derive(Debug)]
pub struct Alibi {
    /// Of each head (N), fp32.
    pub slopes: Tensor,
    /// Whether slopes and biases are rounded to bf16, as Falcon was trained.
    pub rounded: bool,
    /// Biases are multiplied by this.
    pub scale: f64,
}

impl Clone for Alibi {
    /// Another handle to the same slopes.
    fn clone(&self) -> Self {
        Self { slopes: self.slopes.shallow_clone(), ..*self }
    }
}

impl Alibi {
    /// (K, G, 1, S), fp32, for scores (..., K, G, L, S).
    fn bias(&self, scores: &Tensor) -> Tensor {
        let size = scores.size();
        let [kv_heads, group, _, keys] = size[size.len() - 4..] else { unreachable!("scores have four dimensions") };
        let round = |t: Tensor| if self.rounded { t.to_kind(Kind::BFloat16).to_kind(Kind::Float) } else { t };
        let places = Tensor::arange(keys, (Kind::Float, scores.device()));
        let slopes = round(self.slopes.view([kv_heads, group, 1, 1]));
        round(slopes * places) * self.scale
    }
}

/// `softmax(scores + mask) v`: (T, N, W) from q (T, N, H), k (T, K, H) and v (T, K, W), W at most H.
///
/// The mask is causal within each document, and within the scoring's window.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, documents: &Documents, scoring: &Scoring) -> Tensor {
    let (head, value) = (q.size()[2], v.size()[2]);
    if value < head {
        // The kernels know one size. Elements of zero come out as zero.
        let widened = v.constant_pad_nd([0, head - value]); // (T, K, H)
        return attention(q, k, &widened, documents, scoring).narrow(2, 0, value).contiguous(); // (T, N, W)
    }
    let (scale, window) = (scoring.scale, scoring.window);
    // What FlashAttention-2 takes: half precision, heads of up to 256 elements in steps of 8.
    if q.device().is_cuda() && q.kind() != Kind::Float && head % 8 == 0 && head <= 256 && scoring.is_simple() {
        return cuda(q, k, v, documents, scale, window);
    }
    let plain = is_plain(q, scoring);
    if cpu::serves(&[q, k, v]) && !plain && blocks::serves(q, k, v) {
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
                let (o, logsumexp) = Span::new(q, k, v, span, window, plain).forward(scoring);
                ungroup(&output, span).copy_(&o);
                logsumexp
            })
            .collect();
        (output, kept)
    });
    let saved = [q.detach(), k.detach(), v.detach(), output.shallow_clone()];
    let (documents, scoring) = (documents.clone(), scoring.clone());
    custom(c"engraft::attention", &[q, k, v], vec![output], move |grads| {
        let [q, k, v, output] = &saved;
        let [dq, dk, dv] = [q, k, v].map(Tensor::empty_like);
        for (span, logsumexp) in documents.spans().zip(&kept) {
            let part = Span::new(q, k, v, span, window, plain);
            let heads = k.size()[1];
            let [gq, gk, gv] =
                part.backward(&grouped(&grads[0], span, heads), &grouped(output, span, heads), logsumexp, &scoring);
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
    /// Whether it is computed in plain products.
    plain: bool,
}

/// Whether no flash kernel takes this and it is computed in plain products.
fn is_plain(q: &Tensor, scoring: &Scoring) -> bool {
    #[cfg(test)]
    if tests::PLAIN.get() {
        return true;
    }
    q.device() != Device::Cpu || !scoring.is_simple()
}

impl Span {
    /// Scores before the mask (K, G, L, L), fp32.
    fn scores(&self, scoring: &Scoring) -> Tensor {
        scoring.scores(&self.q.matmul(&self.k.transpose(-1, -2)))
    }

    /// Scores (K, G, L, L) with minus infinity where a token may not look.
    fn masked(&self, scores: &Tensor) -> Tensor {
        self.mask.as_ref().map_or_else(|| scores.shallow_clone(), |mask| scores + mask)
    }

    fn new(q: &Tensor, k: &Tensor, v: &Tensor, span: (i64, i64), window: Option<i64>, plain: bool) -> Self {
        let heads = k.size()[1];
        let shared = |t: &Tensor| {
            let t = t.narrow(0, span.0, span.1).transpose(0, 1).unsqueeze(1); // (K, 1, L, H)
            let (k, _, l, h) = t.size4().expect("four dimensions by construction");
            t.expand([k, q.size()[1] / heads, l, h], false)
        };
        // A window that reaches over the whole document is no window, and causality needs no mask where the kernel knows it.
        let window = window.filter(|w| *w < span.1).or_else(|| plain.then_some(span.1));
        let mask = window.map(|w| band(span.1, w, q));
        Self { q: grouped(q, span, heads), k: shared(k), v: shared(v), mask, plain }
    }

    /// The output (K, G, L, H) and the logsumexp of the scores.
    fn forward(&self, scoring: &Scoring) -> (Tensor, Tensor) {
        if self.plain {
            let scores = self.masked(&self.scores(scoring));
            let logsumexp = scoring.with_sinks(scores.logsumexp([-1i64].as_slice(), true)); // (K, G, L, 1)
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
            scoring.scale,
        )
    }

    /// dq, dk and dv, all (K, G, L, H).
    fn backward(&self, grad: &Tensor, output: &Tensor, logsumexp: &Tensor, scoring: &Scoring) -> [Tensor; 3] {
        if self.plain {
            let scores = self.scores(scoring);
            let weights = (self.masked(&scores) - logsumexp).exp(); // (K, G, L, L)
            let delta = (grad * output).sum_dim_intlist([-1i64].as_slice(), true, Kind::Float); // (K, G, L, 1)
            let dweights = grad.matmul(&self.v.transpose(-1, -2)).to_kind(Kind::Float);
            let dproducts = scoring.backward((dweights - delta) * &weights, &scores).to_kind(self.q.kind());
            let dv = weights.to_kind(self.q.kind()).transpose(-1, -2).matmul(grad);
            return [dproducts.matmul(&self.k), dproducts.transpose(-1, -2).matmul(&self.q), dv];
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
            scoring.scale,
        )
        .into()
    }
}

/// Attention of new queries (B, N, L, H) to all keys seen (B, K, S, H), each with its value (B, K, S, W): (B, N, L, W). `allowed`
/// (B or 1, 1, L, S) says who may look where. No graph.
pub fn attention_to_cache(q: &Tensor, keys: &Tensor, values: &Tensor, allowed: &Tensor, scoring: &Scoring) -> Tensor {
    let (b, heads, l, head) = q.size4().expect("(B, N, L, H)");
    let kv_heads = keys.size()[1];
    let q = q.view([b, kv_heads, heads / kv_heads, l, head]); // (B, K, G, L, H)
    let scores = scoring.scores(&q.matmul(&keys.unsqueeze(2).transpose(-1, -2))); // (B, K, G, L, S)
    let scores = scores.masked_fill(&allowed.unsqueeze(2).logical_not(), f64::NEG_INFINITY);
    let logsumexp = scoring.with_sinks(scores.logsumexp([-1i64].as_slice(), true));
    let weights = (scores - logsumexp).exp().to_kind(q.kind());
    weights.matmul(&values.unsqueeze(2)).reshape([b, heads, l, values.size()[3]]) // (B, N, L, W)
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
    fn twin(q: &Tensor, k: &Tensor, v: &Tensor, documents: &Documents, scoring: &Scoring) -> Tensor {
        let t = q.size()[0];
        let mut allowed = vec![false; (t * t) as usize];
        let mut places = vec![0f32; t as usize];
        for (start, length) in documents.spans() {
            for i in start..start + length {
                places[i as usize] = (i - start) as f32;
                for j in start..=i {
                    allowed[(i * t + j) as usize] = scoring.window.is_none_or(|w| i - j < w);
                }
            }
        }
        let refused = Tensor::from_slice(&allowed).view([t, t]).logical_not();
        let groups = q.size()[1] / k.size()[1];
        let spread = |x: &Tensor| x.repeat_interleave_self_int(groups, 1, None).transpose(0, 1); // (N, T, H)
        let mut scores = q.transpose(0, 1).matmul(&spread(k).transpose(1, 2)) * scoring.scale;
        if let Some(alibi) = &scoring.alibi {
            scores += alibi.slopes.view([-1, 1, 1]) * Tensor::from_slice(&places) * alibi.scale;
        }
        if let Some(cap) = scoring.soft_cap {
            scores = (scores / cap).tanh() * cap;
        }
        let mut scores = scores.masked_fill(&refused, f64::NEG_INFINITY);
        if let Some(sinks) = &scoring.sinks {
            scores = Tensor::cat(&[&scores, &sinks.view([-1, 1, 1]).expand([-1, t, 1], false)], 2);
        }
        let weights = scores.softmax(-1, Kind::Float).narrow(2, 0, t).to_kind(q.kind());
        weights.matmul(&spread(v)).transpose(0, 1)
    }

    fn compare(offsets: &[i64], (heads, kv_heads): (i64, i64), scoring: &Scoring) {
        let documents = Documents { offsets: offsets.to_vec() };
        let t = offsets[offsets.len() - 1];
        let inputs = [randn(&[t, heads, 16], 1), randn(&[t, kv_heads, 16], 2), randn(&[t, kv_heads, 16], 3)];
        for plain in [false, true] {
            PLAIN.set(plain);
            check(
                &inputs,
                |_, x| vec![attention(&x[0], &x[1], &x[2], &documents, scoring)],
                |_, x| vec![twin(&x[0], &x[1], &x[2], &documents, scoring)],
            );
            PLAIN.set(false);
        }
    }

    #[test]
    fn equals_plain_autograd_over_documents_groups_and_windows() {
        // Short documents, one of a single token; then one of several blocks with an odd rest.
        let cases = [(vec![0, 7, 8, 29], [None, Some(5), Some(100)]), (vec![0, 3, 304], [None, Some(130), Some(77)])];
        let heads = [(6, 2), (4, 4), (3, 1)];
        for ((offsets, windows), heads) in cases.iter().flat_map(|c| heads.iter().map(move |h| (c, *h))) {
            for window in *windows {
                compare(offsets, heads, &Scoring { window, ..Scoring::scaled(0.25) });
            }
        }
    }

    #[test]
    fn values_smaller_than_keys_equal_plain_autograd() {
        for (offsets, scoring) in [
            (vec![0, 7, 8, 29], Scoring::scaled(0.25)),
            (vec![0, 140, 150], Scoring { window: Some(5), ..Scoring::scaled(0.25) }),
        ] {
            let t = offsets[offsets.len() - 1];
            let documents = Documents { offsets };
            check(
                &[randn(&[t, 4, 16], 1), randn(&[t, 2, 16], 2), randn(&[t, 2, 10], 3)],
                |_, x| vec![attention(&x[0], &x[1], &x[2], &documents, &scoring)],
                |_, x| vec![twin(&x[0], &x[1], &x[2], &documents, &scoring)],
            );
        }
    }

    #[test]
    fn soft_caps_linear_biases_and_sinks_equal_plain_autograd() {
        let slopes = || Tensor::from_slice(&[0.5f32, 0.25, 0.125, 0.0625, 0.03, 0.01]);
        let alibi = Alibi { slopes: slopes(), rounded: false, scale: 0.5 };
        for window in [None, Some(5)] {
            for scoring in [
                Scoring { soft_cap: Some(1.5), ..Scoring::scaled(0.4) },
                Scoring { alibi: Some(alibi.clone()), ..Scoring::scaled(0.25) },
                Scoring { sinks: Some(slopes() * 4.0), ..Scoring::scaled(0.25) },
                Scoring {
                    soft_cap: Some(2.0),
                    alibi: Some(alibi.clone()),
                    sinks: Some(slopes()),
                    ..Scoring::scaled(0.25)
                },
            ] {
                compare(&[0, 7, 8, 29], (6, 2), &Scoring { window, ..scoring });
            }
        }
    }
}
