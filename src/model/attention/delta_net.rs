//! A gated delta-net: short convolutions of queries, keys and values, the gated delta rule, a gated norm.

use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::model::layer::{Context, Stream};
use crate::model::linear::Linear;
use crate::model::load::Reader;
use crate::model::recurrent::Recurrent;
use crate::model::spec::{self, DeltaProjection};
use crate::ops::{self, Activation, Convolution, DeltaGates, Norm, Normed, Readers};

/// A delta-net with its weights.
#[derive(Debug, Clone)]
pub(in crate::model) struct DeltaNet {
    key_heads: i64,
    value_heads: i64,
    key_size: i64,
    value_size: i64,
    input: Input,
    /// Of queries, keys and values.
    convolutions: [Convolution; 3],
    gates: DeltaGates,
    norm: Norm,
    output: Linear,
}

/// From the stream to all that follows; letters as in [`DeltaProjection`].
#[derive(Debug, Clone)]
enum Input {
    /// q, k, v, z; b, a.
    Interleaved(Box<[Linear; 2]>),
    /// q, k, v; z; b; a.
    Separate(Box<[Linear; 4]>),
}

/// What the stream is projected to.
struct Projected {
    /// q, k (T, K P), v (T, N H), before their convolution.
    streams: [Tensor; 3],
    /// (T, N H).
    z: Tensor,
    /// (T, N).
    b: Tensor,
    /// (T, N).
    a: Tensor,
}

impl DeltaNet {
    pub(super) fn load(spec: &spec::DeltaNet, read: &Reader<'_>) -> Result<Self> {
        let spec::DeltaNet { key_heads, value_heads, key_size, value_size, taps, .. } = *spec;
        let input = match &spec.projection {
            DeltaProjection::Interleaved { qkvz, ba } => {
                Input::Interleaved(Box::new([read.linear(qkvz)?, read.linear(ba)?]))
            }
            DeltaProjection::Separate { qkv, z, b, a } => {
                Input::Separate(Box::new([read.linear(qkv)?, read.linear(z)?, read.linear(b)?, read.linear(a)?]))
            }
        };
        let (keys, values) = (key_heads * key_size, value_heads * value_size);
        let weight = read.wide(&spec.convolution)?.view([-1, taps]).tr(); // (C, 2 K P + N H)
        let part = |start, width| Convolution { weight: weight.narrow(1, start, width).contiguous() };
        Ok(Self {
            key_heads,
            value_heads,
            key_size,
            value_size,
            input,
            convolutions: [part(0, keys), part(keys, keys), part(2 * keys, values)],
            gates: DeltaGates { pace: read.wide(&spec.pace)?, bias: read.wide(&spec.bias)? },
            norm: read.norm(&spec.norm)?,
            output: read.linear(&spec.output)?,
        })
    }

    /// What the net gives for the stream.
    pub(super) fn forward(&self, stream: Stream<'_>, context: &Context<'_>, cache: Option<&mut Recurrent>) -> Tensor {
        let Stream { x, residual, .. } = stream;
        let Projected { streams, z, b, a } = self.project(x, context);
        let (log_decay, beta) = self.gates.apply(&a, &b);
        let heads = |[q, k, v]: [Tensor; 3]| {
            [
                q.view([-1, self.key_heads, self.key_size]),     // (T, K, P)
                k.view([-1, self.key_heads, self.key_size]),     // (T, K, P)
                v.view([-1, self.value_heads, self.value_size]), // (T, N, H)
            ]
        };
        let read = match cache {
            None => {
                let convolved = |i: usize| self.convolutions[i].apply(&streams[i], context.documents);
                let [q, k, v] = heads(std::array::from_fn(convolved));
                ops::delta_rule(&q, &k, &v, &log_decay, &beta, context.documents)
            }
            Some(cache) => {
                let [q, k, v] = heads(cache.convolve(&self.convolutions, &streams, context.documents));
                cache.recur([&q, &k, &v, &log_decay, &beta], context.documents)
            }
        };
        let normed = self.norm.apply_to_heads(&read).view([-1, self.value_heads * self.value_size]); // (T, N H)
        let output = self.output.operand(context.dropout_seed);
        ops::gated_projection(Activation::Silu, (&z, Some(&normed)), Readers::None, output, residual)
    }

    fn project(&self, x: Normed, context: &Context<'_>) -> Projected {
        let (keys, values) = (self.key_heads * self.key_size, self.value_heads * self.value_size);
        let linears = self.input.linears();
        let operands: Vec<_> = linears.iter().map(|linear| linear.operand(context.dropout_seed)).collect();
        let mut parts = ops::projection(x, &operands, None).into_iter();
        let mut next = || parts.next().expect("as many as there are linears");
        match &self.input {
            Input::Interleaved(_) => {
                let (own, per_key) = (self.key_size, self.value_heads / self.key_heads);
                let widths = [own, own, per_key * self.value_size, per_key * self.value_size];
                let streams = ops::split(&next(), self.key_heads, &widths);
                let gates = ops::split(&next(), self.key_heads, &[per_key, per_key]);
                let [q, k, v, z] = streams.try_into().expect("four parts");
                let [b, a] = gates.try_into().expect("two parts");
                Projected { streams: [q, k, v], z, b, a }
            }
            Input::Separate(_) => {
                let streams = ops::split(&next(), 1, &[keys, keys, values]).try_into().expect("three parts");
                Projected { streams, z: next(), b: next(), a: next() }
            }
        }
    }

    /// Linears in checkpoint order.
    pub(super) fn linears(&self) -> Vec<&Linear> {
        let mut all = self.input.linears();
        all.push(&self.output);
        all
    }

    /// Linears in checkpoint order.
    pub(super) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mut all: Vec<&mut Linear> = match &mut self.input {
            Input::Interleaved(linears) => linears.iter_mut().collect(),
            Input::Separate(linears) => linears.iter_mut().collect(),
        };
        all.push(&mut self.output);
        all
    }

    /// An empty cache for `sequences` sequences.
    pub(super) fn cache(&self, sequences: i64, options: (Kind, Device)) -> Recurrent {
        let (keys, values) = (self.key_heads * self.key_size, self.value_heads * self.value_size);
        let history = self.convolutions[0].weight.size()[0] - 1;
        let state = [sequences, self.value_heads, self.key_size, self.value_size];
        Recurrent::new([keys, keys, values].map(|width| [sequences, history, width]), state, options)
    }
}

impl Input {
    fn linears(&self) -> Vec<&Linear> {
        match self {
            Self::Interleaved(linears) => linears.iter().collect(),
            Self::Separate(linears) => linears.iter().collect(),
        }
    }
}
