//! The gated delta rule (arXiv:2412.06464), the recurrence of a gated delta-net. Of each value head, from `S = 0` at a document's
//! start, with q and k of length 1 and q then divided by the root of its width:
//!
//! ```text
//! S_t = exp(g_t) S_{t-1} + b_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T        o_t = S_t^T q_t
//! ```
//!
//! Computed in chunks of tokens with matrix products (the WY form, arXiv:2406.06484), in fp32; `chunk` has the formulas. On the CPU
//! `native` has kernels for them. Elsewhere chunks are cut from the whole stream: a document that begins inside one sees nothing of
//! what came before, because the decays in between are zero. Kept for backward are the inputs and the state every few chunks; all
//! else is made again.
//!
//! Shape letters beside those of [`crate::model`]: N value heads, K key heads, G value heads of a key head, P width of a key,
//! H width of a value, C tokens of a chunk, M chunks at once.

mod chunk;
mod gates;
mod native;
#[cfg(test)]
mod tests;

use tch::{Device, Kind, Tensor};

use super::Documents;
use crate::torch_ext::custom;
use chunk::{Chunks, Sight};

pub use gates::DeltaGates;

/// C.
const CHUNK: i64 = 64;

/// Tokens between two states that are kept, on the CPU; on other devices they are further apart.
pub const TOKENS_OF_A_RUN: i64 = 4 * CHUNK;

/// Added to the squares of a query or key before the root.
const EPS: f64 = 1e-6;

/// o (T, N, H) of the recurrence, in v's number type, from q and k (T, K, P), v (T, N, H), and in fp32 the logarithm of the decay
/// g (T, N), at most 0, and b (T, N).
pub fn delta_rule(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    log_decay: &Tensor,
    beta: &Tensor,
    documents: &Documents,
) -> Tensor {
    let leaves = [q, k, v, log_decay, beta];
    let inputs = leaves.map(|x| x.detach().contiguous());
    if native::serves(&inputs) {
        let shape = native::Shape::new(&inputs, documents, false);
        let (output, states) = tch::no_grad(|| native::forward(&inputs, &shape, None));
        return custom(c"engraft::delta_rule", &leaves, vec![output], move |grads| {
            native::backward(&grads[0], &inputs, &states, &shape).into_iter().map(Some).collect()
        })
        .remove(0);
    }
    let stream = Stream::new(inputs, documents);
    let (output, states) = tch::no_grad(|| stream.forward(None));
    custom(c"engraft::delta_rule", &leaves, vec![output], move |grads| {
        stream.backward(&grads[0], &states).into_iter().map(Some).collect()
    })
    .remove(0)
}

/// [`delta_rule`] of one document that continues from the state S (N, P, H), and the state after it. No graph.
pub fn delta_rule_continued(inputs: [&Tensor; 5], state: &Tensor) -> (Tensor, Tensor) {
    let documents = Documents::one(inputs[0].size()[0]);
    tch::no_grad(|| {
        let inputs = inputs.map(|x| x.detach().contiguous());
        if native::serves(&inputs) {
            let shape = native::Shape::new(&inputs, &documents, true);
            let (output, states) = native::forward(&inputs, &shape, Some(&state.contiguous()));
            let after = states.narrow(1, states.size()[1] - 1, 1).reshape(state.size()); // (N, P, H)
            return (output, after);
        }
        let (output, mut states) = Stream::new(inputs, &documents).forward(Some(state));
        (output, states.pop().expect("the state after the last token"))
    })
}

/// [`delta_rule`] of one token of each of B documents, whose states S (B, N, P, H) are moved on in place. No graph.
pub fn delta_rule_step([q, k, v, log_decay, beta]: [&Tensor; 5], state: &mut Tensor) -> Tensor {
    tch::no_grad(|| {
        let group = v.size()[1] / q.size()[1];
        let heads = |x: &Tensor| x.to_kind(Kind::Float).repeat_interleave_self_int(group, 1, None).unsqueeze(2); // (B, N, 1, P)
        let (q, k) = (chunk::normed(&heads(q)) * (q.size()[2] as f64).powf(-0.5), chunk::normed(&heads(k)));
        let _ = state.g_mul_(&log_decay.exp().unsqueeze(-1).unsqueeze(-1));
        let known = k.matmul(state); // (B, N, 1, H)
        let new = (v.to_kind(Kind::Float).unsqueeze(2) - known) * beta.unsqueeze(-1).unsqueeze(-1);
        let _ = state.g_add_(&(k.transpose(2, 3) * new)); // (B, N, P, H)
        q.matmul(state).squeeze_dim(2).to_kind(v.kind()) // (B, N, H)
    })
}

/// The inputs of a micro-batch, and how it is cut.
struct Stream {
    /// q, k, v, log_decay, beta.
    inputs: [Tensor; 5],
    /// K, G, P, H.
    sizes: [i64; 4],
    /// What is computed at once.
    runs: Vec<Run>,
}

/// A run of chunks.
struct Run {
    /// First token and how many.
    tokens: (i64, i64),
    sight: Sight,
}

impl Stream {
    fn new(inputs: [Tensor; 5], documents: &Documents) -> Self {
        let [q, _, v, ..] = &inputs;
        let (tokens, key_heads, key_size) = q.size3().expect("(T, K, P)");
        let (_, value_heads, value_size) = v.size3().expect("(T, N, H)");
        let run = match q.device() {
            Device::Cpu => TOKENS_OF_A_RUN,
            _ => 4 * TOKENS_OF_A_RUN,
        };
        let numbers: Vec<i64> =
            (0..).zip(documents.spans()).flat_map(|(i, (_, length))| vec![i; length as usize]).collect();
        let runs = (0..tokens).step_by(run as usize).map(|start| {
            let count = run.min(tokens - start);
            Run { tokens: (start, count), sight: Sight::new(&numbers, start, count, q.device()) }
        });
        Self { sizes: [key_heads, value_heads / key_heads, key_size, value_size], runs: runs.collect(), inputs }
    }

    /// o (T, N, H), and S (N, P, H) before every run and after the last.
    fn forward(&self, state: Option<&Tensor>) -> (Tensor, Vec<Tensor>) {
        let [key_heads, group, key_size, value_size] = self.sizes;
        let output = self.inputs[2].empty_like();
        let mut states = vec![match state {
            Some(state) => state.shallow_clone(),
            None => Tensor::zeros([key_heads * group, key_size, value_size], (Kind::Float, output.device())),
        }];
        for run in &self.runs {
            let before = states.last().expect("one before the first run");
            let (o, after) = Chunks::new(&self.inputs, run.tokens, &run.sight).forward(before);
            chunk::put(&o, &output, run.tokens);
            states.push(after);
        }
        (output, states)
    }

    /// The gradients of the inputs from that of o (T, N, H).
    fn backward(&self, grad: &Tensor, states: &[Tensor]) -> [Tensor; 5] {
        let gradients = self.inputs.each_ref().map(Tensor::empty_like);
        let mut dstate = states[0].zeros_like();
        for (run, state) in self.runs.iter().zip(states).rev() {
            let chunks = Chunks::new(&self.inputs, run.tokens, &run.sight);
            let found;
            (found, dstate) = chunks.backward(grad, run.tokens, state, dstate);
            for (gradient, found) in gradients.iter().zip(&found) {
                chunk::put(found, gradient, run.tokens);
            }
        }
        gradients
    }
}
