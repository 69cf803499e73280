//! A state instead of keys and values.

use super::{LinearSpec, NormSpec};

/// A gated delta-net: N value heads of width H, K key heads of width P.
#[derive(Debug, Clone, PartialEq)]
pub struct DeltaNet {
    /// K.
    pub key_heads: i64,
    /// N: a multiple of K.
    pub value_heads: i64,
    /// P.
    pub key_size: i64,
    /// H.
    pub value_size: i64,
    /// C: how many tokens the convolution of queries, keys and values reaches over.
    pub taps: i64,
    /// From the stream to all that follows.
    pub projection: DeltaProjection,
    /// Tensor name of the convolution's weight (2 K P + N H, 1, C): queries, keys, values.
    pub convolution: String,
    /// Tensor name of the logarithm of each head's pace of forgetting (N).
    pub pace: String,
    /// Tensor name of what is added before the softplus (N).
    pub bias: String,
    /// Of what each head reads (H).
    pub norm: NormSpec,
    /// (D, N H).
    pub output: LinearSpec,
}

/// How a checkpoint stores what a delta-net is computed from: q and k (K P), v and the output's gate z (N H), and of each value
/// head b, how much it learns, and a, how much it forgets (N).
#[derive(Debug, Clone, PartialEq)]
pub enum DeltaProjection {
    /// For each key head what is its own and its value heads'.
    Interleaved {
        /// (2 K P + 2 N H, D): q, k, v, z.
        qkvz: LinearSpec,
        /// (2 N, D): b, a.
        ba: LinearSpec,
    },
    /// All heads' of a kind together.
    Separate {
        /// (2 K P + N H, D): q, k, v.
        qkv: LinearSpec,
        /// (N H, D).
        z: LinearSpec,
        /// (N, D).
        b: LinearSpec,
        /// (N, D).
        a: LinearSpec,
    },
}

impl DeltaProjection {
    /// In checkpoint order.
    pub fn linears(&self) -> Vec<&LinearSpec> {
        match self {
            Self::Interleaved { qkvz, ba } => vec![qkvz, ba],
            Self::Separate { qkv, z, b, a } => vec![qkv, z, b, a],
        }
    }
}
