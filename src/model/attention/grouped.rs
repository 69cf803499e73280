//! Grouped heads, from multi-head to multi-query attention.

use tch::{Device, Kind, Tensor};

use super::HandedOn;
use crate::Result;
use crate::model::cache::KeysValues;
use crate::model::layer::{Context, Stream};
use crate::model::linear::Linear;
use crate::model::load::Reader;
use crate::model::spec::{self, LayerSpec, Mask, Position, Projection, Temperature};
use crate::ops::{self, Activation, Alibi, Norm, Normed, Readers, Scoring};

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
    query_norm: Option<HeadNorm>,
    key_norm: Option<HeadNorm>,
    value_norm: Option<HeadNorm>,
    norms_after_rotation: bool,
    temperature: Option<Temperature>,
    /// The slot in which later blocks find the keys and values.
    pub(super) hands_on: Option<usize>,
}

/// From the stream to queries, keys and values.
#[derive(Debug, Clone)]
enum Input {
    /// Query, key, value.
    Separate(Box<[Linear; 3]>),
    /// Query and gate of each head, key, value.
    Gated(Box<[Linear; 3]>),
    /// Query, key.
    ValuesAreKeys(Box<[Linear; 2]>),
    /// Query, and the slot of the rest.
    QueryOnly(Box<Linear>, usize),
    Fused(Box<Linear>),
    PerHead(Box<Linear>),
}

/// What a block projects besides queries.
enum Own {
    KeysValues([Tensor; 2]),
    /// They are those of an earlier block.
    Nothing {
        slot: usize,
    },
}

/// A norm of queries, keys or values.
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
            Projection::ValuesAreKeys { query, key } => {
                Input::ValuesAreKeys(Box::new([read.linear(query)?, read.linear(key)?]))
            }
            Projection::QueryOnly { query, slot } => Input::QueryOnly(Box::new(read.linear(query)?), *slot),
            Projection::Fused(linear) => Input::Fused(Box::new(read.linear(linear)?)),
            Projection::PerHead(linear) => Input::PerHead(Box::new(read.linear(linear)?)),
        };
        let norm = |spec: Option<&spec::NormSpec>| -> Result<Option<HeadNorm>> {
            let whole = |spec: &spec::NormSpec| spec.shape.last().is_some_and(|width| *width != head_size);
            spec.map(|spec| Ok(HeadNorm { norm: read.norm(spec)?, whole: whole(spec) })).transpose()
        };
        let norms = attention.query_key_norm.as_ref();
        Ok(Self {
            heads,
            kv_heads,
            head_size,
            scoring: Scoring { window, soft_cap, alibi, sinks, ..Scoring::scaled(scale) },
            mask: spec.mask,
            input,
            output: read.linear(&attention.output)?,
            query_norm: norm(norms.map(|norms| &norms.query))?,
            key_norm: norm(norms.and_then(|norms| norms.key.as_ref()))?,
            value_norm: norm(attention.value_norm.as_ref())?,
            norms_after_rotation: norms.is_some_and(|norms| norms.after_rotation),
            temperature: attention.temperature,
            hands_on: attention.hands_on,
        })
    }

    /// What attention gives for the stream.
    pub(super) fn forward(
        &self,
        stream: Stream<'_>,
        context: &Context<'_>,
        handed_on: &mut HandedOn,
        mut cache: Option<&mut KeysValues>,
    ) -> Tensor {
        let Stream { h, x, residual } = stream;
        let tokens = h.size()[0];
        let (q, own, gate) = self.projected(x, context);
        let q = q.view([tokens, self.heads, self.head_size]); // (T, N, H)
        let (q, k, v) = match own {
            Own::KeysValues(keys_values) => {
                let [k, v] = keys_values.map(|x| x.view([tokens, self.kv_heads, self.head_size])); // (T, K, H)
                let v = normed(v, self.value_norm.as_ref());
                let [q, k] = self.placed([(q, &self.query_norm), (k, &self.key_norm)], context);
                if let Some(slot) = self.hands_on {
                    handed_on.put(slot, [&k, &v]);
                }
                if let Some(cache) = &mut cache {
                    cache.append(&k, Some(&v), context.documents);
                }
                (q, k, v)
            }
            Own::Nothing { slot } => {
                let [q] = self.placed([(q, &self.query_norm)], context);
                let [k, v] = handed_on.of(slot);
                (q, k, v)
            }
        };
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
            // Attention keeps its output, too.
            Some(gate) => {
                let both = (&gate, Some(&attended));
                ops::gated_projection(Activation::Sigmoid, both, Readers::Others, output, residual)
            }
            None => ops::projection(&attended, &[output], residual).remove(0),
        }
    }

    /// Queries, or queries and keys (T, heads, H), normed and rotated.
    fn placed<const X: usize>(&self, x: [(Tensor, &Option<HeadNorm>); X], context: &Context<'_>) -> [Tensor; X] {
        let rotated = |x: [Tensor; X]| match context.rotation {
            Some(rotation) => ops::rope(x.each_ref(), rotation),
            None => x,
        };
        let of_heads = |norm: &Option<HeadNorm>| norm.as_ref().is_some_and(|norm| !norm.whole);
        if let Some(rotation) = context.rotation
            && !self.norms_after_rotation
            && x.iter().all(|(_, norm)| of_heads(norm))
        {
            let norms = x.each_ref().map(|(_, norm)| &norm.as_ref().expect("asked just now").norm);
            return ops::normed_rope(x.each_ref().map(|(x, _)| x), norms, rotation);
        }
        if !self.norms_after_rotation {
            return rotated(x.map(|(x, norm)| normed(x, norm.as_ref())));
        }
        let norms = x.each_ref().map(|(_, norm)| norm.as_ref());
        let mut norms = norms.into_iter();
        rotated(x.map(|(x, _)| x)).map(|x| normed(x, norms.next().flatten()))
    }

    /// Queries (T, N H), this block's own keys and values (T, K H) if it has them, and the gate of the output (T, N H) where there is
    /// one.
    fn projected(&self, x: Normed, context: &Context<'_>) -> (Tensor, Own, Option<Tensor>) {
        let seed = context.dropout_seed;
        let one = |linear: &Linear| ops::projection(&x, &[linear.operand(seed)], None).remove(0);
        let (query, key) = (self.heads * self.head_size, self.kv_heads * self.head_size);
        let separate = |linears: &[Linear; 3]| -> [Tensor; 3] {
            let parts = ops::projection(&x, &linears.each_ref().map(|l| l.operand(seed)), None);
            parts.try_into().expect("one of each")
        };
        let parts = match &self.input {
            Input::Separate(linears) => separate(linears).into(),
            Input::Gated(linears) => {
                let [both, k, v] = separate(linears);
                let mut parts = ops::split(&both, self.heads, &[self.head_size, self.head_size]);
                let gate = parts.pop();
                return (parts.remove(0), Own::KeysValues([k, v]), gate);
            }
            Input::ValuesAreKeys(linears) => {
                let mut parts = ops::projection(&x, &linears.each_ref().map(|l| l.operand(seed)), None);
                parts.push(parts[1].shallow_clone());
                parts
            }
            Input::QueryOnly(linear, slot) => return (one(linear), Own::Nothing { slot: *slot }, None),
            Input::Fused(linear) => ops::split(&one(linear), 1, &[query, key, key]),
            Input::PerHead(linear) => {
                let widths = [query / self.kv_heads, self.head_size, self.head_size];
                ops::split(&one(linear), self.kv_heads, &widths)
            }
        };
        let [q, k, v] = parts.try_into().expect("queries, keys and values");
        (q, Own::KeysValues([k, v]), None)
    }

    /// The slot that is read instead of having keys and values.
    pub(super) fn reads(&self) -> Option<usize> {
        match &self.input {
            Input::QueryOnly(_, slot) => Some(*slot),
            Input::Separate(_) | Input::Gated(_) | Input::ValuesAreKeys(_) | Input::Fused(_) | Input::PerHead(_) => {
                None
            }
        }
    }

    /// Linears in checkpoint order.
    pub(super) fn linears(&self) -> Vec<&Linear> {
        let mut all: Vec<&Linear> = match &self.input {
            Input::Separate(linears) | Input::Gated(linears) => linears.iter().collect(),
            Input::ValuesAreKeys(linears) => linears.iter().collect(),
            Input::QueryOnly(linear, _) | Input::Fused(linear) | Input::PerHead(linear) => vec![&**linear],
        };
        all.push(&self.output);
        all
    }

    /// Linears in checkpoint order.
    pub(super) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mut all: Vec<&mut Linear> = match &mut self.input {
            Input::Separate(linears) | Input::Gated(linears) => linears.iter_mut().collect(),
            Input::ValuesAreKeys(linears) => linears.iter_mut().collect(),
            Input::QueryOnly(linear, _) | Input::Fused(linear) | Input::PerHead(linear) => vec![&mut **linear],
        };
        all.push(&mut self.output);
        all
    }

    /// Norms whose own numbers can be trained.
    pub(super) fn norms(&self) -> Vec<&Norm> {
        [&self.query_norm, &self.key_norm, &self.value_norm].into_iter().flatten().map(|own| &own.norm).collect()
    }

    /// Norms whose own numbers can be trained.
    pub(super) fn norms_mut(&mut self) -> Vec<&mut Norm> {
        let all = [&mut self.query_norm, &mut self.key_norm, &mut self.value_norm];
        all.into_iter().flatten().map(|own| &mut own.norm).collect()
    }

    /// An empty cache for `sequences` sequences.
    pub(super) fn cache(&self, sequences: i64, options: (Kind, Device)) -> KeysValues {
        KeysValues::new(sequences, self.kv_heads, self.head_size, options)
    }
}

/// x (T, heads, H), normed if there is a norm.
fn normed(x: Tensor, norm: Option<&HeadNorm>) -> Tensor {
    match norm {
        Some(norm) => norm.apply(&x),
        None => x,
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
