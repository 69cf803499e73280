//! Causal attention of documents laid end to end, grouped heads included (arXiv:2205.14135, arXiv:2305.13245).
//!
//! A document never sees another. On CUDA one call serves all documents: FlashAttention-2's, or cuDNN's where they are of one length and
//! it is faster. On the CPU bf16 goes through our own
//! blocks, soft caps, linear biases, sinks and values of another head size included; other number types go through libtorch's
//! flash kernel document by document. What no kernel takes (fp32 on CUDA, odd head sizes, and away from our blocks all that is
//! not a plain scaled product) is computed in plain products, some queries at a time.

mod blocks;
mod choice;
mod dense;
pub mod entries;
mod flash;
mod plain;

use tch::{Device, Kind, Tensor};

use super::{Documents, cpu};
use crate::torch_ext::custom;

pub use choice::choose_entries;

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

    /// Scores in fp32 from products (..., K, G, L, S) with keys at places from `first_key` on, before any mask.
    fn scores(&self, products: &Tensor, first_key: i64) -> Tensor {
        let mut scores = products.to_kind(Kind::Float) * self.scale;
        if let Some(alibi) = &self.alibi {
            let size = scores.size();
            scores += alibi.bias(size[size.len() - 4], first_key, size[size.len() - 1]);
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
    /// Whether slopes, places and biases are rounded to bf16, as Falcon was trained.
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
    /// (K, G, 1, S), fp32, of `keys` keys at places from `first_key` on.
    fn bias(&self, kv_heads: i64, first_key: i64, keys: i64) -> Tensor {
        let round = |t: Tensor| if self.rounded { t.to_kind(Kind::BFloat16).to_kind(Kind::Float) } else { t };
        let places = Tensor::arange_start(first_key, first_key + keys, (Kind::Float, self.slopes.device()));
        let slopes = round(self.slopes.view([kv_heads, -1, 1, 1]));
        round(slopes * round(places)) * self.scale
    }
}

/// `softmax(scores + mask) v`: (T, N, Hv) from q (T, N, H), k (T, K, H) and v (T, K, Hv).
///
/// The mask is causal within each document, and within the scoring's window.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, documents: &Documents, scoring: &Scoring) -> Tensor {
    let (head, value) = (q.size()[2], v.size()[2]);
    let way = Way::of(q, k, v, scoring);
    if matches!(way, Way::Cuda | Way::Flash) && value < head {
        // libtorch's kernels know one size. Elements of zero come out as zero.
        let widened = v.constant_pad_nd([0, head - value]); // (T, K, H)
        return attention(q, k, &widened, documents, scoring).narrow(2, 0, value).contiguous(); // (T, N, Hv)
    }
    match way {
        Way::Cuda if dense::serves(q, k, documents, scoring) => dense::attend(q, k, v, documents, scoring),
        Way::Cuda => flash::cuda(q, k, v, documents, scoring),
        Way::Blocks => {
            let shape = blocks::Shape::new(q, k, v, documents, scoring);
            let (output, logsumexp) = tch::no_grad(|| blocks::forward(q, k, v, &shape));
            with_backward([q, k, v], output, move |grad, saved| blocks::backward(grad, saved, &logsumexp, &shape))
        }
        Way::Flash => in_parts([q, k, v], documents, scoring, flash::forward, flash::backward),
        Way::Plain => in_parts([q, k, v], documents, scoring, plain::forward, plain::backward),
    }
}

/// Whether FlashAttention-2 takes heads of `head` elements of a number type: half precision, up to 256 elements in steps of 8.
pub fn flash_takes(kind: Kind, head: i64) -> bool {
    kind != Kind::Float && head % 8 == 0 && head <= 256
}

/// What computes attention.
enum Way {
    /// FlashAttention-2.
    Cuda,
    /// Our own blocks on the CPU.
    Blocks,
    /// libtorch's flash kernel on the CPU.
    Flash,
    /// Plain products.
    Plain,
}

impl Way {
    fn of(q: &Tensor, k: &Tensor, v: &Tensor, scoring: &Scoring) -> Self {
        #[cfg(test)]
        if tests::PLAIN.get() {
            return Self::Plain;
        }
        let head = q.size()[2];
        let simple = scoring.is_simple() && v.size()[2] <= head;
        match q.device() {
            Device::Cuda(_) if simple && flash_takes(q.kind(), head) => Self::Cuda,
            Device::Cpu if cpu::serves(&[q, k, v]) && blocks::serves(q, k, v) => Self::Blocks,
            Device::Cpu if simple => Self::Flash,
            _ => Self::Plain,
        }
    }
}

/// What the backward of attention that was computed part by part reads.
struct Taken {
    /// q, k, v and the output.
    tensors: [Tensor; 4],
    /// What forward kept of each part.
    kept: Vec<Tensor>,
    documents: Documents,
    scoring: Scoring,
}

/// Attention part by part: `forward` gives the output and what is kept of each part, `backward` the gradients of q, k and v.
fn in_parts(
    inputs: [&Tensor; 3],
    documents: &Documents,
    scoring: &Scoring,
    forward: impl FnOnce([&Tensor; 3], &Documents, &Scoring) -> (Tensor, Vec<Tensor>),
    backward: impl FnOnce(&Tensor, &Taken) -> [Tensor; 3] + Send + 'static,
) -> Tensor {
    let (output, kept) = tch::no_grad(|| forward(inputs, documents, scoring));
    let (documents, scoring) = (documents.clone(), scoring.clone());
    with_backward(inputs, output, move |grad, saved| {
        backward(grad, &Taken { tensors: saved.map(Tensor::shallow_clone), kept, documents, scoring })
    })
}

/// Hands autograd the backward: of the output's gradient and `[q, k, v, output]` it makes those of q, k and v.
fn with_backward(
    inputs: [&Tensor; 3],
    output: Tensor,
    backward: impl FnOnce(&Tensor, [&Tensor; 4]) -> [Tensor; 3] + Send + 'static,
) -> Tensor {
    let [q, k, v] = inputs.map(Tensor::detach);
    let saved = [q, k, v, output.shallow_clone()];
    custom(c"engraft::attention", &inputs, vec![output], move |grads| {
        backward(&grads[0], saved.each_ref()).map(Some).into()
    })
    .remove(0)
}

/// Attention of new queries (B, N, L, H) to all keys seen, (B, K, S, H) each with its value; `allowed` (B or 1, 1, L, S) says who
/// may look where. No graph.
pub fn attention_to_cache(q: &Tensor, keys: &Tensor, values: &Tensor, allowed: &Tensor, scoring: &Scoring) -> Tensor {
    let (b, heads, l, head) = q.size4().expect("(B, N, L, H)");
    let (kv_heads, seen) = (keys.size()[1], keys.size()[2]);
    let group = heads / kv_heads;
    let q = q.view([b, kv_heads, group, l, head]);
    let output = Tensor::empty([b, kv_heads, group, l, values.size()[3]], (q.kind(), q.device()));
    let rows = plain::queries_at_once(b * heads, seen);
    for first in (0..l).step_by(rows as usize) {
        let rows = rows.min(l - first);
        let queries = q.narrow(3, first, rows).reshape([b, kv_heads, group * rows, head]); // heads of a group side by side
        let products = queries.matmul(&keys.transpose(-1, -2)).view([b, kv_heads, group, rows, seen]);
        let refused = allowed.narrow(2, first, rows).unsqueeze(2).logical_not(); // (B or 1, 1, 1, L, S)
        let scores = scoring.scores(&products, 0).masked_fill(&refused, f64::NEG_INFINITY);
        let logsumexp = scoring.with_sinks(scores.logsumexp([-1i64].as_slice(), true));
        let weights = (scores - logsumexp).exp_().to_kind(q.kind()).view([b, kv_heads, group * rows, seen]);
        output.narrow(3, first, rows).copy_(&weights.matmul(values).view([b, kv_heads, group, rows, -1]));
    }
    output.view([b, heads, l, -1])
}

/// A part of x (T, N, H) as (K, G, L, H), a view; head n belongs to group n / G.
fn grouped(x: &Tensor, (start, length): (i64, i64), kv_heads: i64) -> Tensor {
    let (_, heads, head) = x.size3().expect("(T, N, H)");
    x.narrow(0, start, length).view([length, kv_heads, heads / kv_heads, head]).permute([1, 2, 0, 3])
}

#[cfg(test)]
mod tests;
