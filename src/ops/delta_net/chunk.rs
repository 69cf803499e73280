//! A run of chunks of the gated delta rule as matrix products.
//!
//! In a chunk of C tokens with the cumulative sums c of log decays, a token i sees j <= i of its own document through
//! `D_ij = exp(c_i - c_j)`, the state S it begins with through `exp(c_i)`, and is seen from its end through `exp(c_C - c_i)`; all
//! of them 0 where documents differ. The rule for all its tokens is then a triangular system for what is newly learned, U:
//!
//! ```text
//! U = (I + A)^-1 (b V + W S)     A_ij = b_i (k_i k_j) D_ij for j < i     W_i = -b_i exp(c_i) k_i      removes what S knows
//! O = R S + B U                  B_ij = (q_i k_j) D_ij for j <= i        R_i = exp(c_i) q_i           reads
//! S' = exp(c_C) S + Y^T U                                                Y_i = exp(c_C - c_i) k_i     writes
//! ```
//!
//! and backward, from dO and dS', with X the gradient of `b V + W S`:
//!
//! ```text
//! dU = B^T dO + Y dS'            X = (I + A)^-T dU                       dS = exp(c_C) dS' + R^T dO + W^T X
//! dA = -X U^T                    dB = dO U^T                             dR = dO S^T    dW = X S^T    dY = U dS'^T
//! ```
//!
//! The gradient of c_i is what each of these depends on it; that of a log decay is the sum of the c after it.

use tch::{Kind, Tensor};

use super::{CHUNK, EPS};
use crate::torch_ext::{deterministic, sent};

/// Who sees whom in a run of chunks: 0, or minus infinity where documents differ.
pub(super) struct Sight {
    /// Of the chunk's token j from i: (M, 1, C, C).
    within: Tensor,
    /// Of the state before the chunk from i: (M, 1, C).
    entering: Tensor,
    /// Of i from the chunk's end: (M, 1, C).
    leaving: Tensor,
    /// Of the state before the chunk from its end: (M, 1).
    passing: Tensor,
}

/// What a run of chunks is computed from; all in fp32. Letters as in the module's formulas.
pub(super) struct Chunks {
    /// M, K, G.
    counts: [i64; 3],
    /// q of length 1 over the root of P, and what made it 1: (M, K, C, P), (M, K, C, 1).
    q: (Tensor, Tensor),
    /// k of length 1.
    k: (Tensor, Tensor),
    /// (M, N, C, H).
    v: Tensor,
    /// b: (M, N, C, 1).
    beta: Tensor,
    /// exp(c): (M, N, C, 1).
    entering: Tensor,
    /// exp(c_C - c): (M, N, C, 1).
    leaving: Tensor,
    /// exp(c_C): (M, N, 1, 1).
    passing: Tensor,
    /// D: (M, N, C, C).
    decay: Tensor,
    /// (k_i k_j) D_ij for j < i: (M, N, C, C).
    keys: Tensor,
    /// B: (M, N, C, C).
    seen: Tensor,
    /// (I + A)^-1: (M, N, C, C).
    solved: Tensor,
    /// W: (M, N, C, P).
    removing: Tensor,
    /// R: (M, N, C, P).
    reading: Tensor,
    /// Y: (M, N, C, P).
    writing: Tensor,
}

impl Sight {
    /// Of the `count` tokens from `start` on; `numbers` are those of their documents, of the whole stream.
    pub(super) fn new(numbers: &[i64], start: i64, count: i64, device: tch::Device) -> Self {
        let chunks = (count + CHUNK - 1) / CHUNK;
        // What is filled up belongs to the last document, so that the state goes through it.
        let at = |i: i64| numbers[(i.min(start + count - 1)) as usize];
        let of =
            |i: i64| Tensor::from_slice(&(0..chunks).map(|m| at((start + m * CHUNK + i).max(0))).collect::<Vec<_>>());
        let own: Vec<i64> = (start..start + chunks * CHUNK).map(at).collect();
        let own = sent(&Tensor::from_slice(&own), device).view([chunks, CHUNK]); // (M, C)
        let (before, last) = (sent(&of(-1), device).view([-1, 1]), sent(&of(CHUNK - 1), device).view([-1, 1]));
        let hidden = |seen: Tensor| {
            Tensor::zeros(seen.size(), (Kind::Float, device)).masked_fill(&seen.logical_not(), f64::NEG_INFINITY)
        };
        Self {
            within: hidden(own.unsqueeze(-1).eq_tensor(&own.unsqueeze(-2)).tril(0)).unsqueeze(1),
            entering: hidden(own.eq_tensor(&before)).unsqueeze(1),
            leaving: hidden(own.eq_tensor(&last)).unsqueeze(1),
            passing: hidden(before.eq_tensor(&last)),
        }
    }
}

impl Chunks {
    /// Of tokens (start, count) of q, k, v, log decay and b.
    pub(super) fn new([q, k, v, log_decay, beta]: &[Tensor; 5], tokens: (i64, i64), sight: &Sight) -> Self {
        let take = |x: &Tensor| rows(x, tokens);
        let scalars = |x: &Tensor| take(&x.unsqueeze(-1)).squeeze_dim(-1); // (M, N, C)
        let (mut q, mut k, v) = (take(q), take(k), take(v));
        let (m, key_heads, _, key_size) = q.size4().expect("(M, K, C, P)");
        let value_heads = v.size()[1];
        let group = value_heads / key_heads;
        let (q_scale, k_scale) = (inverse_length(&q), inverse_length(&k));
        let _ = q.g_mul_(&(&q_scale * (key_size as f64).powf(-0.5)));
        let _ = k.g_mul_(&k_scale);

        let beta = scalars(beta).unsqueeze(-1); // (M, N, C, 1)
        let sums = running_sums(&scalars(log_decay)); // (M, N, C)
        let total = sums.narrow(-1, CHUNK - 1, 1); // (M, N, 1)
        let passing = (&total + sight.passing.unsqueeze(-1)).exp().unsqueeze(-1); // (M, N, 1, 1)
        let entering = (&sums + &sight.entering).exp().unsqueeze(-1); // (M, N, C, 1)
        let leaving = (&total - &sums).g_add_(&sight.leaving).exp().unsqueeze(-1); // (M, N, C, 1)

        // Products once for all value heads of a key head.
        let by_group = |x: &Tensor| x.view([m, key_heads, group, x.size()[2], -1]); // (M, K, G, C, ...)
        let spread = |x: &Tensor, factor: &Tensor| {
            let size = [m, value_heads, CHUNK, x.size()[3]];
            (x.unsqueeze(2) * by_group(factor)).view(size) // (M, N, C, ...)
        };
        let products = |x: &Tensor| batched(x).bmm(&batched(&k).transpose(1, 2)).view([m, key_heads, CHUNK, CHUNK]);
        let decay = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).g_add_(&sight.within).exp_(); // (M, N, C, C)
        let faded = |products: Tensor| {
            let by_group = decay.view([m, key_heads, group, CHUNK, CHUNK]);
            (products.unsqueeze(2) * by_group).view([m, value_heads, CHUNK, CHUNK])
        };
        let seen = faded(products(&q));
        let keys = faded(products(&k)).tril_(-1);
        let one = Tensor::eye(CHUNK, (Kind::Float, k.device())).expand_as(&keys);
        let solved = (&keys * &beta).linalg_solve_triangular(&one, false, true, true).contiguous();
        let removing = spread(&k, &(&beta * &entering).neg());
        let reading = spread(&q, &entering);
        let writing = spread(&k, &leaving);
        Self {
            counts: [m, key_heads, group],
            q: (q, q_scale),
            k: (k, k_scale),
            v,
            beta,
            entering,
            leaving,
            passing,
            decay,
            keys,
            seen,
            solved,
            removing,
            reading,
            writing,
        }
    }

    /// O (M, N, C, H) and the state S (N, P, H) after the last chunk, from that before the first.
    pub(super) fn forward(&self, before: &Tensor) -> (Tensor, Tensor) {
        let output = self.v.empty_like();
        let mut state = before.shallow_clone();
        let targets = &self.v * &self.beta;
        for m in 0..self.counts[0] {
            let at = |x: &Tensor| x.select(0, m);
            let learned = at(&self.solved).bmm(&at(&targets).baddbmm_(&at(&self.removing), &state)); // (N, C, H)
            let mut o = at(&output);
            let _ = at(&self.reading).bmm_out(&o, &state);
            let _ = o.baddbmm_(&at(&self.seen), &learned);
            state = (state * at(&self.passing)).baddbmm_(&at(&self.writing).transpose(1, 2), &learned);
        }
        (output, state)
    }

    /// The gradients of q, k (M, K, C, P), v (M, N, C, H), log decay and b (M, N, C, 1), and of the state before the first chunk;
    /// from those of o (T, N, H) and of the state after the last.
    pub(super) fn backward(
        &self,
        grad: &Tensor,
        tokens: (i64, i64),
        before: &Tensor,
        dafter: Tensor,
    ) -> ([Tensor; 5], Tensor) {
        let [m, ..] = self.counts;
        let doutput = rows(grad, tokens);
        let (learned, x) = (self.v.empty_like(), self.v.empty_like()); // U, X
        let [n, p, h] = before.size()[..] else { unreachable!("(N, P, H)") };
        let states = Tensor::empty([m + 1, n, p, h], (Kind::Float, before.device())); // S before every chunk and after the last
        states.select(0, 0).copy_(before);
        let dstates = states.empty_like();
        dstates.select(0, m).copy_(&dafter);
        let targets = &self.v * &self.beta;
        for m in 0..m {
            let at = |x: &Tensor| x.select(0, m);
            let (state, u) = (at(&states), at(&learned));
            let _ = at(&self.solved).bmm_out(&u, &at(&targets).baddbmm_(&at(&self.removing), &state));
            let after = state * at(&self.passing);
            states.select(0, m + 1).copy_(&after);
            let _ = states.select(0, m + 1).baddbmm_(&at(&self.writing).transpose(1, 2), &u);
        }
        for m in (0..m).rev() {
            let at = |x: &Tensor| x.select(0, m);
            let across = |x: &Tensor| at(x).transpose(1, 2);
            let (after, mut dstate) = (dstates.select(0, m + 1), at(&dstates));
            let du = across(&self.seen).bmm(&at(&doutput)).baddbmm_(&at(&self.writing), &after); // (N, C, H)
            let _ = across(&self.solved).bmm_out(&at(&x), &du);
            dstate.copy_(&(after * at(&self.passing)));
            let _ = dstate.baddbmm_(&across(&self.reading), &at(&doutput));
            let _ = dstate.baddbmm_(&across(&self.removing), &at(&x));
        }
        let (states, after) = (states.narrow(0, 0, m), states.narrow(0, 1, m));
        let (dbefore, dafter) = (dstates.select(0, 0), dstates.narrow(0, 1, m));
        let outer = |a: &Tensor, b: &Tensor| {
            let product = batched(a).bmm(&batched(b).transpose(1, 2));
            let (rows, columns) = (product.size()[1], product.size()[2]);
            product.view([m, n, rows, columns])
        };
        let (dreading, dremoving) = (outer(&doutput, &states), outer(&x, &states)); // (M, N, C, P)
        let dwriting = outer(&learned, &dafter); // (M, N, C, P)
        let (dseen, dsystem) = (outer(&doutput, &learned), outer(&x, &learned)); // (M, N, C, C), the second negative
        let dpassing = (&after * &dafter).sum_dim_intlist([2i64, 3].as_slice(), false, Kind::Float); // (M, N)
        let gradients = self.inputs(&x, &dpassing, [&dreading, &dremoving, &dwriting], [dseen, dsystem]);
        (gradients, dbefore)
    }

    /// The gradients of the inputs from X, from that of c_C through the state after a chunk, and from dR, dW, dY, dB, -dA.
    fn inputs(
        &self,
        x: &Tensor,
        dtotal: &Tensor,
        outer: [&Tensor; 3],
        [mut dseen, mut dsystem]: [Tensor; 2],
    ) -> [Tensor; 5] {
        let [m, key_heads, group] = self.counts;
        let [dreading, dremoving, dwriting] = outer;
        let by_group = |x: &Tensor| x.view([m, key_heads, group, x.size()[2], -1]);
        let sum = |x: &Tensor, dim: i64| x.sum_dim_intlist([dim].as_slice(), true, Kind::Float);
        let over_group = |x: Tensor| by_group(&x).sum_dim_intlist([2i64].as_slice(), false, Kind::Float); // (M, K, C, ...)
        let ((q, q_scale), (k, k_scale)) = (&self.q, &self.k);

        // Through the products within the chunk.
        let mut through = &dseen * &self.seen;
        let mut through_keys = &dsystem * &self.keys;
        let learning = sum(&through_keys, 3); // (M, N, C, 1)
        let _ = through_keys.g_mul_(&self.beta);
        let _ = through.g_sub_(&through_keys);
        let dsums = sum(&through, 3) - sum(&through, 2).transpose(2, 3); // (M, N, C, 1)
        let dqk = over_group(dseen.g_mul_(&self.decay)); // (M, K, C, C)
        let dkk = over_group(dsystem.g_mul_(&self.decay).g_mul_(&self.beta)).tril_(-1); // negative

        // Through what meets the state.
        let reading = sum(&(dreading * &self.reading), 3); // (M, N, C, 1)
        let removing = sum(&(dremoving * &self.removing), 3);
        let writing = sum(&(dwriting * &self.writing), 3);
        let dsums = dsums + reading + &removing - writing;
        // The last sum is also that of the state after the chunk, in which what was written is counted.
        let dsums = dsums.squeeze_dim(3); // (M, N, C)
        let _ = dsums.narrow(2, CHUNK - 1, 1).g_add_(&dtotal.unsqueeze(-1));
        let dlog_decay = running_sums(&dsums.flip([2])).flip([2]).unsqueeze(-1);

        let known = by_group(dremoving) * k.unsqueeze(2); // (M, K, G, C, P)
        let known = sum(&known, 4).view_as(&self.entering) * &self.entering; // (M, N, C, 1)
        let dbeta = sum(&(x * &self.v), 3) - known - learning;
        let dv = x * &self.beta;
        let product = |a: &Tensor, b: &Tensor| batched(a).bmm(&batched(b)).view_as(b);
        let dq = product(&dqk, k) + over_group(dreading * &self.entering);
        let to_keys = dwriting * &self.leaving - dremoving * (&self.beta * &self.entering);
        let dk = product(&dqk.transpose(2, 3), q) - product(&(&dkk + dkk.transpose(2, 3)), k) + over_group(to_keys);
        let key_size = q.size()[3] as f64;
        let dq = (&dq - q * sum(&(&dq * q), 3) * key_size) * (q_scale * key_size.powf(-0.5));
        let dk = (&dk - k * sum(&(&dk * k), 3)) * k_scale;
        [dq, dk, dv, dlog_decay, dbeta]
    }
}

/// x over its length along the last dimension.
pub(super) fn normed(x: &Tensor) -> Tensor {
    x * inverse_length(x)
}

fn inverse_length(x: &Tensor) -> Tensor {
    (x.linalg_norm(2.0, [-1i64].as_slice(), true, None).square() + EPS).rsqrt()
}

/// The sums of x (M, N, C) up to each of C. libtorch's own has no fixed order on a GPU and refuses where one is asked for.
fn running_sums(x: &Tensor) -> Tensor {
    if deterministic() && x.device().is_cuda() { by_triangle(x) } else { x.cumsum(-1, Kind::Float) }
}

/// [`running_sums`] as a product with a triangle of ones.
fn by_triangle(x: &Tensor) -> Tensor {
    let count = x.size()[2];
    x.matmul(&Tensor::ones([count, count], (x.kind(), x.device())).triu(0))
}

/// The first two dimensions as one.
fn batched(x: &Tensor) -> Tensor {
    x.flatten(0, 1)
}

/// Tokens (start, count) of x (T, heads, width) in chunks, filled up with zeros: (M, heads, C, width), fp32.
fn rows(x: &Tensor, (start, count): (i64, i64)) -> Tensor {
    let chunks = (count + CHUNK - 1) / CHUNK;
    let (heads, width) = (x.size()[1], x.size()[2]);
    let x = x.narrow(0, start, count);
    let missing = chunks * CHUNK - count;
    let x = if missing == 0 { x } else { x.constant_pad_nd([0, 0, 0, 0, 0, missing]) };
    let out = Tensor::empty([chunks, heads, CHUNK, width], (Kind::Float, x.device()));
    out.shallow_clone().copy_(&x.view([chunks, CHUNK, heads, width]).transpose(1, 2));
    out
}

/// The opposite of [`rows`]: writes x (M, heads, C, width) into tokens (start, count) of `out` (T, heads, width).
pub(super) fn put(x: &Tensor, out: &Tensor, (start, count): (i64, i64)) {
    let (chunks, heads, _, width) = x.size4().expect("(M, heads, C, width)");
    let size = [count, heads, width];
    let mut out = out.narrow(0, start, count).view(size.as_slice());
    let x = x.transpose(1, 2); // (M, C, heads, width)
    if count == chunks * CHUNK {
        out.view([chunks, CHUNK, heads, width]).copy_(&x);
    } else {
        out.copy_(&x.reshape([-1, heads, width]).narrow(0, 0, count));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::randn;

    #[test]
    fn a_product_with_a_triangle_sums_as_libtorch_does() {
        let x = randn(&[3, 2, CHUNK], 1);
        assert!(by_triangle(&x).allclose(&running_sums(&x), 1e-5, 1e-5, false));
    }
}
