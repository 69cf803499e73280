//! Keys and values of all heads made of one narrow latent of each token (arXiv:2405.04434).
//!
//! ```text
//! h ─ norm ─┬─ q_proj, or q_a ─ norm ─ q_b ──> each head: U elements | P to rotate
//!           └─ kv_a ──> latent Z | P to rotate, one key for all heads
//!                       latent ─ norm ─ kv_b ──> each head: U elements of its key | W of its value
//! ```
//!
//! Over whole documents the latent is taken up to all heads' keys and values, and attention is plain. Of tokens in a cache only the
//! normed latent and the rotated key are kept, Z + P numbers; to look at them, the queries are taken down instead:
//! `q . (K c) = (K^T q) . c`, so one head of keys, the latents themselves, serves all heads of queries, and what comes out goes
//! through each head's part for values.

use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::model::cache::KeysValues;
use crate::model::layer::{Context, Stream};
use crate::model::linear::Linear;
use crate::model::load::Reader;
use crate::model::spec::{self, LatentQuery, LayerSpec, Mask};
use crate::ops::{self, Norm, Scoring};

/// Latent attention with its weights.
#[derive(Debug, Clone)]
pub(in crate::model) struct LatentAttention {
    heads: i64,
    unrotated: i64,
    rotated: i64,
    value_size: i64,
    latent_size: i64,
    scoring: Scoring,
    mask: Mask,
    query: Query,
    down: Linear,
    norm: Norm,
    up: Linear,
    output: Linear,
}

/// From the stream to queries.
#[derive(Debug, Clone)]
enum Query {
    Direct(Linear),
    LowRank { down: Linear, norm: Norm, up: Box<Linear> },
}

impl LatentAttention {
    /// Reads the weights of `attention`, which is that of `spec`.
    pub(super) fn load(attention: &spec::LatentAttention, spec: &LayerSpec, read: &Reader<'_>) -> Result<Self> {
        let spec::LatentAttention { heads, unrotated, rotated, value_size, latent_size, scale, .. } = *attention;
        assert!(!attention.up.bias, "a bias from the latent to keys and values: no page asks for one");
        let window = match spec.mask {
            Mask::Sliding { window } => Some(window),
            Mask::Full | Mask::Chunked { .. } => None,
        };
        let query = match &attention.query {
            LatentQuery::Direct(linear) => Query::Direct(read.linear(linear)?),
            LatentQuery::LowRank { down, norm, up } => {
                Query::LowRank { down: read.linear(down)?, norm: read.norm(norm)?, up: Box::new(read.linear(up)?) }
            }
        };
        Ok(Self {
            heads,
            unrotated,
            rotated,
            value_size,
            latent_size,
            scoring: Scoring { window, ..Scoring::scaled(scale) },
            mask: spec.mask,
            query,
            down: read.linear(&attention.down)?,
            norm: read.norm(&attention.norm)?,
            up: read.linear(&attention.up)?,
            output: read.linear(&attention.output)?,
        })
    }

    /// What attention gives for the stream.
    pub(super) fn forward(&self, stream: Stream<'_>, context: &Context<'_>, cache: Option<&mut KeysValues>) -> Tensor {
        let Stream { h, x, residual } = stream;
        let (tokens, seed) = (h.size()[0], context.dropout_seed);
        let first = match &self.query {
            Query::Direct(linear) => linear,
            Query::LowRank { down, .. } => down,
        };
        let mut parts = ops::projection(x, &[first.operand(seed), self.down.operand(seed)], None);
        let down = parts.pop().expect("two projections"); // (T, Z + P)
        let q = parts.pop().expect("two projections");
        let q = match &self.query {
            Query::Direct(_) => q,
            Query::LowRank { norm, up, .. } => ops::projection(norm.of(&q), &[up.operand(seed)], None).remove(0),
        };
        let mut parts = ops::split(&down, 1, &[self.latent_size, self.rotated]);
        let key = parts.pop().expect("two parts").view([tokens, 1, self.rotated]); // (T, 1, P)
        let latent = parts.pop().expect("two parts"); // (T, Z)
        let q = q.view([tokens, self.heads, self.unrotated + self.rotated]); // (T, N, U + P)
        let [q, key] = match context.rotation {
            Some(rotation) => ops::rope_last([&q, &key], rotation),
            None => [q, key],
        };
        let attended = match cache {
            None => self.attend(&q, &latent, &key, context),
            Some(cache) => {
                let first = cache.is_empty();
                let kept = Tensor::cat(&[&self.norm.apply(&latent).unsqueeze(1), &key], 2); // (T, 1, Z + P)
                cache.append(&kept, None, context.documents);
                if first { self.attend(&q, &latent, &key, context) } else { self.attend_to_latents(&q, context, cache) }
            }
        };
        let attended = attended.view([tokens, self.heads * self.value_size]); // (T, N W)
        ops::projection(&attended, &[self.output.operand(seed)], residual).remove(0)
    }

    /// Attends q (T, N, U + P) within its documents, to keys and values made of `latent` (T, Z) before its norm and to `key`
    /// (T, 1, P): (T, N, W).
    fn attend(&self, q: &Tensor, latent: &Tensor, key: &Tensor, context: &Context<'_>) -> Tensor {
        let operand = self.up.operand(context.dropout_seed);
        let up = ops::projection(self.norm.of(latent), &[operand], None).remove(0); // (T, N (U + W))
        let (k, v) = ops::keys_values(&up, key, self.heads, self.unrotated);
        ops::attention(q, &k, &v, &self.mask.documents(context.documents), &self.scoring)
    }

    /// Attends q (T, N, U + P) of the tokens last taken in to all in the cache: (T, N, W). No graph.
    fn attend_to_latents(&self, q: &Tensor, context: &Context<'_>, cache: &KeysValues) -> Tensor {
        let own = q.narrow(2, 0, self.unrotated).transpose(0, 1); // (N, T, U)
        let own = self.key_part().down(&own).transpose(0, 1); // (T, N, Z)
        let q = Tensor::cat(&[&own, &q.narrow(2, self.unrotated, self.rotated)], 2); // (T, N, Z + P)
        let attended = cache.attend_to_seen(&q, context.documents, &self.scoring, self.mask); // (T, N, Z)
        self.value_part().up(&attended.transpose(0, 1)).transpose(0, 1).contiguous() // (T, N, W)
    }

    /// What makes keys of the latent.
    fn key_part(&self) -> HeadsPart {
        self.part(0, self.unrotated)
    }

    /// What makes values of the latent.
    fn value_part(&self) -> HeadsPart {
        self.part(self.unrotated, self.value_size)
    }

    fn part(&self, start: i64, size: i64) -> HeadsPart {
        let of_heads = |t: &Tensor| {
            let width = t.size()[1];
            t.view([self.heads, self.unrotated + self.value_size, width]).narrow(1, start, size)
        };
        let operand = self.up.operand(None);
        let kind = operand.weight.kind();
        let weight = operand.whole();
        let gains = operand.low_rank.and_then(|low_rank| low_rank.gains(&weight));
        HeadsPart {
            weight: of_heads(&weight),
            update: operand
                .low_rank
                .map(|low_rank| (low_rank.a.to_kind(kind), of_heads(&(&low_rank.b * low_rank.scale).to_kind(kind)))),
            gains: gains.map(|gains| of_heads(&gains.unsqueeze(1)).transpose(1, 2)), // (N, 1, S)
        }
    }

    /// Linears in checkpoint order.
    pub(super) fn linears(&self) -> Vec<&Linear> {
        let mut all = match &self.query {
            Query::Direct(linear) => vec![linear],
            Query::LowRank { down, up, .. } => vec![down, up],
        };
        all.extend([&self.down, &self.up, &self.output]);
        all
    }

    /// Linears in checkpoint order.
    pub(super) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mut all = match &mut self.query {
            Query::Direct(linear) => vec![linear],
            Query::LowRank { down, up, .. } => vec![down, up],
        };
        all.extend([&mut self.down, &mut self.up, &mut self.output]);
        all
    }

    /// An empty cache for `sequences` sequences.
    pub(super) fn cache(&self, sequences: i64, options: (Kind, Device)) -> KeysValues {
        KeysValues::latent(sequences, self.latent_size + self.rotated, self.latent_size, options)
    }
}

/// Rows of the weight from the latent to the heads: S of each head (N, S, Z), and their low-rank update: A (R, Z), s B (N, S, R).
struct HeadsPart {
    weight: Tensor,
    update: Option<(Tensor, Tensor)>,
    /// What the rows' lengths are multiplied with (N, 1, S), fp32, where they are trained.
    gains: Option<Tensor>,
}

impl HeadsPart {
    /// x (N, T, S) of the heads to latents (N, T, Z).
    fn down(&self, x: &Tensor) -> Tensor {
        let x = &self.lengthened(x.shallow_clone());
        let y = x.matmul(&self.weight);
        match &self.update {
            Some((a, b)) => y + x.matmul(b).matmul(a),
            None => y,
        }
    }

    /// Latents (N, T, Z) to x (N, T, S) of the heads.
    fn up(&self, latents: &Tensor) -> Tensor {
        let y = latents.matmul(&self.weight.transpose(1, 2));
        self.lengthened(match &self.update {
            Some((a, b)) => y + latents.matmul(&a.tr()).matmul(&b.transpose(1, 2)),
            None => y,
        })
    }

    fn lengthened(&self, x: Tensor) -> Tensor {
        match &self.gains {
            Some(gains) => (&x * gains).to_kind(x.kind()),
            None => x,
        }
    }
}
