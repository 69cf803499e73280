//! How tokens look at each other, and who at whom.

use super::{CompressedAttention, DeltaNet, LinearSpec, NormSpec};

/// How tokens look at each other.
#[derive(Debug, Clone, PartialEq)]
pub enum Attention {
    /// Grouped heads (arXiv:2305.13245); all heads their own when `kv_heads == heads`.
    Grouped(GroupedAttention),
    /// Keys and values of all heads made of one latent (arXiv:2405.04434).
    Latent(LatentAttention),
    /// A state instead of keys and values (arXiv:2412.06464).
    DeltaNet(DeltaNet),
    /// Of the latest tokens, and of windows of earlier ones compressed to entries.
    Compressed(Box<CompressedAttention>),
}

/// Grouped heads.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupedAttention {
    /// N.
    pub heads: i64,
    /// K.
    pub kv_heads: i64,
    /// H.
    pub head_size: i64,
    /// Scores are multiplied by this.
    pub scale: f64,
    /// Scores become `c tanh(score / c)`.
    pub soft_cap: Option<f64>,
    /// From the stream to queries, keys and values.
    pub projection: Projection,
    /// (D, N H).
    pub output: LinearSpec,
    /// Norms of queries and keys.
    pub query_key_norm: Option<QueryKeyNorm>,
    /// Of values.
    pub value_norm: Option<NormSpec>,
    /// The slot in which later blocks find this block's keys and values ([`Projection::QueryOnly`]).
    pub hands_on: Option<usize>,
    /// Tensor name of a logit of each head (N) that takes part in the softmax and gives nothing (arXiv:2309.17453).
    pub sinks: Option<String>,
    /// Queries grow with their position.
    pub temperature: Option<Temperature>,
}

/// How a checkpoint stores queries, keys and values. What is fused stays fused: a low-rank update of the whole is not one of
/// its parts.
#[derive(Debug, Clone, PartialEq)]
pub enum Projection {
    /// Each its own.
    Separate {
        /// (N H, D).
        query: LinearSpec,
        /// (K H, D).
        key: LinearSpec,
        /// (K H, D).
        value: LinearSpec,
    },
    /// As [`Projection::Separate`], and with each query a gate, whose sigmoid the attention's output is multiplied by.
    Gated {
        /// (2 N H, D): for each head its query, its gate.
        query_gate: LinearSpec,
        /// (K H, D).
        key: LinearSpec,
        /// (K H, D).
        value: LinearSpec,
    },
    /// Values are what keys are before their norm and their rotation.
    ValuesAreKeys {
        /// (N H, D).
        query: LinearSpec,
        /// (K H, D).
        key: LinearSpec,
    },
    /// Keys and values are those of an earlier block ([`GroupedAttention::hands_on`]).
    QueryOnly {
        /// (N H, D).
        query: LinearSpec,
        /// The slot in which they are found.
        slot: usize,
    },
    /// One weight ((N + 2 K) H, D): all queries, then all keys, then all values.
    Fused(LinearSpec),
    /// One weight (K (G + 2) H, D): for each key/value head its G queries, its key, its value.
    PerHead(LinearSpec),
}

/// Norms of queries and keys.
#[derive(Debug, Clone, PartialEq)]
pub struct QueryKeyNorm {
    /// Of queries.
    pub query: NormSpec,
    /// Of keys, unless they are another block's.
    pub key: Option<NormSpec>,
    /// Whether they come after the rotation.
    pub after_rotation: bool,
}

/// Queries at position p are multiplied by `1 + growth * ln(1 + floor((p + first) / every))` (arXiv:2501.19399).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Temperature {
    /// How fast.
    pub growth: f64,
    /// Positions of a step.
    pub every: i64,
    /// Number of a document's first position.
    pub first: i64,
}

/// Keys and values of all heads made of one latent of each token. A head's query and key are U elements of its own, then P that
/// rotate; all heads share the P of the key.
#[derive(Debug, Clone, PartialEq)]
pub struct LatentAttention {
    /// N.
    pub heads: i64,
    /// U: elements of a query and a key that do not rotate.
    pub unrotated: i64,
    /// P: those that do, after them.
    pub rotated: i64,
    /// W: elements of a value.
    pub value_size: i64,
    /// Z: width of the latent.
    pub latent_size: i64,
    /// Scores are multiplied by this.
    pub scale: f64,
    /// From the stream to queries.
    pub query: LatentQuery,
    /// From the stream to the latent, then the shared part of the keys: (Z + P, D).
    pub down: LinearSpec,
    /// Of the latent (Z).
    pub norm: NormSpec,
    /// From the latent to each head's part of its key, then its value: (N (U + W), Z). Without a bias.
    pub up: LinearSpec,
    /// (D, N W).
    pub output: LinearSpec,
}

/// From the stream to the queries of latent attention.
#[derive(Debug, Clone, PartialEq)]
pub enum LatentQuery {
    /// (N (U + P), D).
    Direct(LinearSpec),
    /// By way of a latent of its own.
    LowRank {
        /// (latent, D).
        down: LinearSpec,
        /// Of that latent.
        norm: NormSpec,
        /// (N (U + P), latent).
        up: LinearSpec,
    },
}

/// Who may look at whom, within a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// Every token at itself and all before it.
    Full,
    /// Every token at itself and the `window - 1` before it.
    Sliding {
        /// Tokens in sight.
        window: i64,
    },
    /// Every token at itself and those before it in its chunk; a document's chunks begin at multiples of `size`.
    Chunked {
        /// Tokens of a chunk.
        size: i64,
    },
}
