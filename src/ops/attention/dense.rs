//! Documents of one length on GPUs whose tensor cores FlashAttention-2 makes little of: cuDNN's kernels.
//!
//! They are taken where they were seen to give what flash attention gives, forward and backward: tried once for every shape of heads,
//! as cuDNN's versions differ in what they serve. cuDNN makes a plan for every new length, which takes it a sixth of a second: lengths
//! are multiples of 128, of which there are few.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

use tch::{Kind, Tensor};

use super::{Scoring, flash};
use crate::Result;
use crate::ops::{Documents, cuda};
use crate::torch_ext::{CudnnAttention, cudnn_attention, cudnn_attention_backward, custom, deterministic, uniform};

/// What lengths are a multiple of.
const LENGTHS: i64 = 128;

/// How far its numbers may be from flash attention's, in parts of the largest: what rounding to bf16 on the way explains.
const OFF: f64 = 2e-2;

/// Whether it computes attention of q (T, N, H), k and v (T, K, H), which flash attention takes.
pub(super) fn serves(q: &Tensor, k: &Tensor, documents: &Documents, scoring: &Scoring) -> bool {
    let length = documents.longest();
    let even = documents.spans().all(|(_, of_one)| of_one == length) && length % LENGTHS == 0;
    let whole = scoring.window.is_none_or(|window| window >= length);
    even && whole && cuda::outruns_flash(q.device()) && !deterministic() && is_trusted(q, k)
}

/// Attention, all documents in one call.
pub(super) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, documents: &Documents, scoring: &Scoring) -> Tensor {
    let (length, scale) = (documents.longest(), scoring.scale);
    let refused = "cuDNN served these heads before";
    let forward = tch::no_grad(|| run(q, k, v, length, scale).expect(refused));
    let output = together(&forward.output);
    let saved = [q.detach(), k.detach(), v.detach()];
    custom(c"engraft::attention", &[q, k, v], vec![output], move |grads| {
        let [q, k, v] = &saved;
        back(&grads[0], [q, k, v], &forward, length, scale).expect(refused).map(Some).into()
    })
    .remove(0)
}

/// (T, N, H) as (B, N, L, H), a view.
fn apart(x: &Tensor, length: i64) -> Tensor {
    let (_, heads, head) = x.size3().expect("(T, N, H)");
    x.view([-1, length, heads, head]).transpose(1, 2)
}

/// (B, N, L, H) as (T, N, H): a view where heads of a token lie side by side.
fn together(x: &Tensor) -> Tensor {
    let (_, heads, _, head) = x.size4().expect("(B, N, L, H)");
    x.transpose(1, 2).reshape([-1, heads, head])
}

fn run(q: &Tensor, k: &Tensor, v: &Tensor, length: i64, scale: f64) -> Result<CudnnAttention> {
    let [q, k, v] = [q, k, v].map(|x| apart(x, length));
    cudnn_attention(&q, &k, &v, scale)
}

fn back(grad: &Tensor, inputs: [&Tensor; 3], forward: &CudnnAttention, length: i64, scale: f64) -> Result<[Tensor; 3]> {
    let [q, k, v] = inputs.map(|x| apart(x, length));
    let grads = cudnn_attention_backward(&apart(grad, length), (&q, &k, &v), forward, scale)?;
    Ok(grads.map(|grad| together(&grad)))
}

/// Whether heads of this shape and number type came out as flash attention's when they were tried.
fn is_trusted(q: &Tensor, k: &Tensor) -> bool {
    type Shape = (usize, Kind, i64, i64, i64);
    static TRIED: LazyLock<Mutex<HashMap<Shape, bool>>> = LazyLock::new(Mutex::default);
    let (_, heads, head) = q.size3().expect("(T, N, H)");
    let index = crate::torch_ext::cuda_index(q.device()).unwrap_or(0);
    let shape = (index, q.kind(), heads, k.size()[1], head);
    let mut tried = TRIED.lock().unwrap_or_else(PoisonError::into_inner);
    *tried.entry(shape).or_insert_with(|| tch::no_grad(|| agrees(q, k).unwrap_or(false)))
}

/// Whether two documents of seeded numbers, of heads like these, give what flash attention gives.
fn agrees(q: &Tensor, k: &Tensor) -> Result<bool> {
    let (_, heads, head) = q.size3().expect("(T, N, H)");
    let (length, scale) = (LENGTHS, 1.0 / (head as f64).sqrt());
    let drawn = |heads: i64, seed: u64| {
        let like = Tensor::zeros([2 * length, heads, head], (Kind::Float, q.device()));
        uniform(&like, -1.0, 1.0, seed).to_kind(q.kind())
    };
    let [q, k, v] = [drawn(heads, 1), drawn(k.size()[1], 2), drawn(k.size()[1], 3)];
    let grad = drawn(heads, 4);
    let forward = run(&q, &k, &v, length, scale)?;
    let grads = back(&grad, [&q, &k, &v], &forward, length, scale)?;
    let documents = Documents { offsets: vec![0, length, 2 * length] };
    let expected = flash::cuda_once(&grad, [&q, &k, &v], &documents, scale);
    let found = [together(&forward.output)].into_iter().chain(grads);
    Ok(found.zip(&expected).all(|(found, expected)| {
        let [found, expected] = [&found, expected].map(|x| x.to_kind(Kind::Float));
        let largest = expected.abs().max().double_value(&[]);
        (found - expected).abs().max().double_value(&[]) <= OFF * largest
    }))
}
