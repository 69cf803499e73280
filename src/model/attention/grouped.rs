//! Grouped heads, from multi-head to multi-query attention.

use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::model::cache::KeysValues;
use crate::model::layer::Context;
use crate::model::linear::Linear;
use crate::model::load::Reader;
use crate::model::spec::{self, LayerSpec, Mask, Position, Projection, Temperature};
use crate::ops::{self, Activation, Alibi, Norm, Scoring};

/// Grouped attention with its weights.
#[derive(Debug, Clone)]
pub(in crate::model) struct GroupedAttention {
    heads: i64,
    kv_heads: i64,
    head_size: i64,
    scoring: Scoring,
    mask: Mask,
    input: Input,
    output: Linear,
    /// Of queries and of keys.
    norms: Option<[HeadNorm; 2]>,
    norms_after_rotation: bool,
    temperature: Option<Temperature>,
}

/// From the stream to queries, keys and values.
#[derive(Debug, Clone)]
enum Input {
    /// Query, key, value.
    Separate(Box<[Linear; 3]>),
    /// Query and gate of each head, key, value.
    Gated(Box<[Linear; 3]>),
    Fused(Box<Linear>),
    PerHead(Box<Linear>),
}

/// A norm of queries or keys.
#[derive(Debug, Clone)]
struct HeadNorm {
    norm: Norm,
    /// Over all heads together, rather than over each.
    whole: bool,
}

impl GroupedAttention {
    /// Reads the weights of `attention`, which is that of `spec`.
    pub(super) fn load(attention: &spec::GroupedAttention, spec: &LayerSpec, read: &Reader<'_>) -> Result<Self> {
        let spec::GroupedAttention { heads, kv_heads, head_size, scale, soft_cap, .. } = *attention;
        let alibi = match &spec.position {
            Position::Alibi { slopes, rounded, scale } => {
                let slopes = Tensor::from_slice(slopes).to_kind(Kind::Float).to_device(read.device);
                Some(Alibi { slopes, rounded: *rounded, scale: *scale })
            }
            Position::Rope(_) | Position::None => None,
        };
        let window = match spec.mask {
            Mask::Sliding { window } => Some(window),
            Mask::Full | Mask::Chunked { .. } => None,
        };
        let sinks = attention.sinks.as_ref().map(|name| read.tensor_as(name, Kind::Float)).transpose()?;
        let input = match &attention.projection {
            Projection::Separate { query, key, value } => {
                Input::Separate(Box::new([read.linear(query)?, read.linear(key)?, read.linear(value)?]))
            }
            Projection::Gated { query_gate, key, value } => {
                Input::Gated(Box::new([read.linear(query_gate)?, read.linear(key)?, read.linear(value)?]))
            }
            Projection::Fused(linear) => Input::Fused(Box::new(read.linear(linear)?)),
            Projection::PerHead(linear) => Input::PerHead(Box::new(read.linear(linear)?)),
        };
        let norm = |spec: &spec::NormSpec| -> Result<HeadNorm> {
            let whole = spec.shape.last().is_some_and(|width| *width != head_size);
            Ok(HeadNorm { norm: read.norm(spec)?, whole })
        };
        let norms = match &attention.query_key_norm {
            Some(norms) => Some([norm(&norms.query)?, norm(&norms.key)?]),
            None => None,
        };
        Ok(Self {
            heads,
            kv_heads,
            head_size,
            scoring: Scoring { window, soft_cap, alibi, sinks, ..Scoring::scaled(scale) },
            mask: spec.mask,
            input,
            output: read.linear(&attention.output)?,
            norms,
            norms_after_rotation: attention.query_key_norm.as_ref().is_some_and(|norms| norms.after_rotation),
            temperature: attention.temperature,
        })
    }

    /// What attention gives for the stream `h` (T, D), normed first where `norm` is there; added to `residual` (T, D) if given.
    pub(super) fn forward(
        &self,
        h: &Tensor,
        norm: Option<&Norm>,
        residual: Option<&Tensor>,
        context: &Context<'_>,
        cache: Option<&mut KeysValues>,
    ) -> Tensor {
        let tokens = h.size()[0];
        let ([q, k, v], gate) = self.queries_keys_values(h, norm, context);
        let q = q.view([tokens, self.heads, self.head_size]); // (T, N, H)
        let k = k.view([tokens, self.kv_heads, self.head_size]); // (T, K, H)
        let v = v.view([tokens, self.kv_heads, self.head_size]); // (T, K, H)
        let (q, k) = if self.norms_after_rotation { (q, k) } else { self.normed(q, k) };
        let (q, k) = match context.rotation {
            Some(rotation) => ops::rope(&q, &k, rotation),
            None => (q, k),
        };
        let (q, k) = if self.norms_after_rotation { self.normed(q, k) } else { (q, k) };
        let q = match self.temperature {
            Some(temperature) => q * temperature.of(context.positions).to_kind(context.kind),
            None => q,
        };
        let attended = match cache {
            None => ops::attention(&q, &k, &v, &self.mask.documents(context.documents), &self.scoring),
            Some(cache) => cache.attend(&q, &k, &v, context.documents, &self.scoring, self.mask),
        };
        let attended = attended.view([tokens, self.heads * self.head_size]); // (T, N H)
        let output = self.output.operand(context.dropout_seed);
        match gate {
            Some(gate) => ops::gated_projection(Activation::Sigmoid, &gate, Some(&attended), output, residual),
            None => ops::projection(&attended, None, &[output], residual).remove(0),
        }
    }

    fn normed(&self, q: Tensor, k: Tensor) -> (Tensor, Tensor) {
        match &self.norms {
            Some([of_query, of_key]) => (of_query.apply(&q), of_key.apply(&k)),
            None => (q, k),
        }
    }

    /// q (T, N H), k and v (T, K H), and the gate of the output (T, N H) where there is one.
    fn queries_keys_values(
        &self,
        h: &Tensor,
        norm: Option<&Norm>,
        context: &Context<'_>,
    ) -> ([Tensor; 3], Option<Tensor>) {
        let seed = context.dropout_seed;
        let fused = |linear: &Linear| ops::projection(h, norm, &[linear.operand(seed)], None).remove(0);
        let (query, key) = (self.heads * self.head_size, self.kv_heads * self.head_size);
        let separate = |linears: &[Linear; 3]| -> [Tensor; 3] {
            let parts = ops::projection(h, norm, &linears.each_ref().map(|l| l.operand(seed)), None);
            parts.try_into().expect("one of each")
        };
        let parts = match &self.input {
            Input::Separate(linears) => return (separate(linears), None),
            Input::Gated(linears) => {
                let [both, k, v] = separate(linears);
                let mut parts = ops::split(&both, self.heads, &[self.head_size, self.head_size]);
                let gate = parts.pop();
                return ([parts.remove(0), k, v], gate);
            }
            Input::Fused(linear) => ops::split(&fused(linear), 1, &[query, key, key]),
            Input::PerHead(linear) => {
                let widths = [query / self.kv_heads, self.head_size, self.head_size];
                ops::split(&fused(linear), self.kv_heads, &widths)
            }
        };
        (parts.try_into().expect("queries, keys and values"), None)
    }

    /// Linears in checkpoint order.
    pub(super) fn linears(&self) -> Vec<&Linear> {
        let mut all: Vec<&Linear> = match &self.input {
            Input::Separate(linears) | Input::Gated(linears) => linears.iter().collect(),
            Input::Fused(linear) | Input::PerHead(linear) => vec![&**linear],
        };
        all.push(&self.output);
        all
    }

    /// Linears in checkpoint order.
    pub(super) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mut all: Vec<&mut Linear> = match &mut self.input {
            Input::Separate(linears) | Input::Gated(linears) => linears.iter_mut().collect(),
            Input::Fused(linear) | Input::PerHead(linear) => vec![&mut **linear],
        };
        all.push(&mut self.output);
        all
    }

    /// An empty cache for `sequences` sequences.
    pub(super) fn cache(&self, sequences: i64, options: (Kind, Device)) -> KeysValues {
        KeysValues::new(sequences, self.kv_heads, self.head_size, options)
    }
}

impl HeadNorm {
    /// Norms x (T, N, H).
    fn apply(&self, x: &Tensor) -> Tensor {
        if !self.whole {
            return self.norm.apply_to_heads(x);
        }
        let size = x.size();
        self.norm.apply(&x.view([size[0], -1])).view(size.as_slice())
    }
}

impl Temperature {
    /// (T, 1, 1), fp32, at positions (T).
    fn of(self, positions: &Tensor) -> Tensor {
        let steps = (positions + self.first).divide_scalar_mode(self.every, "floor").to_kind(Kind::Float);
        ((steps + 1.0).log() * self.growth + 1.0).view([-1, 1, 1])
    }
}
