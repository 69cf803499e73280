//! What a decoder is, as data. Expanded per layer, so the forward does no layer-index arithmetic.
//!
//! ```text
//! Residual::Sequential:   h ──┬─ norm? ─ attention ─ norm? ─ x m ──(+)──┬─ norm? ─ feed-forward ─ norm? ─ x m ──(+)──>
//!                             └────────────────────────────────────┘   └───────────────────────────────────────┘
//! Residual::Parallel:     h ──┬─ norm ─ attention ──────(+)──>
//!                             ├─ norm ─ feed-forward ────┤
//!                             └──────────────────────────┘
//! ```

use crate::ops::{Activation, LogitMap, RopeLayout};

/// A whole decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// `model_type` of `config.json`.
    pub model_type: String,
    /// D.
    pub hidden_size: i64,
    /// V.
    pub vocab_size: i64,
    /// Longest document the base was made for, in tokens.
    pub max_position_embeddings: i64,
    /// From token ids to the stream.
    pub embedding: EmbeddingSpec,
    /// The blocks, in order.
    pub layers: Vec<LayerSpec>,
    /// After the last block.
    pub final_norm: NormSpec,
    /// From hidden states to logits.
    pub head: HeadSpec,
    /// Tensors a checkpoint may hold that mean nothing here (old buffers), by the end of their name.
    pub ignored_suffixes: Vec<&'static str>,
    /// The same, by how their name begins: layers that only predict further ahead.
    pub ignored_prefixes: Vec<String>,
}

/// From token ids to the stream.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbeddingSpec {
    /// Tensor name of the token embedding (V, D).
    pub weight: String,
    /// Embeddings are multiplied by this, rounded to their number type first.
    pub scale: f64,
    /// Applied to the embeddings.
    pub norm: Option<NormSpec>,
}

/// One block.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    /// How tokens look at each other.
    pub attention: Attention,
    /// How positions enter.
    pub position: Position,
    /// Who may look at whom.
    pub mask: Mask,
    /// What happens to each token alone.
    pub feed_forward: FeedForward,
    /// How the two are added to the stream.
    pub residual: Residual,
}

/// How tokens look at each other.
#[derive(Debug, Clone, PartialEq)]
pub enum Attention {
    /// Grouped heads (arXiv:2305.13245); all heads their own when `kv_heads == heads`.
    Grouped(GroupedAttention),
    /// Keys and values of all heads made of one latent (arXiv:2405.04434).
    Latent(LatentAttention),
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
    /// Norms of queries and keys, before they are rotated.
    pub query_key_norm: Option<QueryKeyNorm>,
    /// Queries grow with their position.
    pub temperature: Option<Temperature>,
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
    /// W: elements of a value, at most U + P.
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
    /// Of keys.
    pub key: NormSpec,
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

/// How positions enter.
#[derive(Debug, Clone, PartialEq)]
pub enum Position {
    /// Rotary (arXiv:2104.09864).
    Rope(Rope),
    /// Biases linear in the distance (arXiv:2108.12409).
    Alibi {
        /// Of each head.
        slopes: Vec<f64>,
        /// Whether slopes and biases are rounded to bf16.
        rounded: bool,
        /// Biases are multiplied by this.
        scale: f64,
    },
    /// Not at all: the mask alone tells tokens apart.
    None,
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the wavelengths.
    pub theta: f64,
    /// How many of a head's H elements rotate: the first ones, but the last ones in latent attention.
    pub rotated: i64,
    /// Which of them turn together.
    pub layout: RopeLayout,
    /// How it reaches beyond the length it was trained for.
    pub scaling: RopeScaling,
}

/// How rotary embedding reaches beyond the length it was trained for.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not.
    None,
    /// Positions are divided by the factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// The base grows with documents longer than `original` (NTK-aware, by u/bloc97 and u/emozilla).
    Dynamic {
        /// The factor.
        factor: f64,
        /// Length the base was trained for, in tokens.
        original: i64,
    },
    /// YaRN (arXiv:2309.00071).
    Yarn {
        /// The factor.
        factor: f64,
        /// Length the base was trained for, in tokens.
        original: i64,
        /// Rotations above which a dimension is left alone.
        beta_fast: f64,
        /// Rotations below which a dimension is interpolated whole.
        beta_slow: f64,
        /// Cosines and sines are multiplied by this.
        attention_factor: f64,
        /// Whether the correction range is rounded to whole dimensions.
        truncate: bool,
    },
    /// LongRoPE (arXiv:2402.13753): wavelengths stretched one by one, in documents longer than `original` by other factors.
    LongRope {
        /// Of documents of at most `original` tokens.
        short: Vec<f64>,
        /// Of longer ones.
        long: Vec<f64>,
        /// Length the base was trained for, in tokens.
        original: i64,
        /// Cosines and sines are multiplied by this.
        attention_factor: f64,
    },
    /// Llama 3.1's: long wavelengths divided, short ones kept, a ramp between.
    Llama3 {
        /// The factor.
        factor: f64,
        /// Length the base was trained for, in tokens.
        original: i64,
        /// Rotations over `original` below which a wavelength is divided whole.
        low_freq_factor: f64,
        /// Rotations over `original` above which it is kept.
        high_freq_factor: f64,
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

/// What happens to each token alone.
#[derive(Debug, Clone, PartialEq)]
pub enum FeedForward {
    /// `down(act(up(x)))`.
    Plain {
        /// Of what `up` gives.
        activation: Activation,
        /// (F, D).
        up: LinearSpec,
        /// (D, F).
        down: LinearSpec,
    },
    /// `down(act(gate(x)) * up(x))` (arXiv:2002.05202).
    Gated {
        /// Of the gate.
        activation: Activation,
        /// Gate and up.
        projection: GateUp,
        /// (D, F).
        down: LinearSpec,
    },
}

/// How a checkpoint stores gate and up.
#[derive(Debug, Clone, PartialEq)]
pub enum GateUp {
    /// Each its own.
    Separate {
        /// (F, D).
        gate: LinearSpec,
        /// (F, D).
        up: LinearSpec,
    },
    /// One weight (2 F, D): gate, then up.
    Fused(LinearSpec),
}

/// How a block's two halves are added to the stream.
#[derive(Debug, Clone, PartialEq)]
pub enum Residual {
    /// One after the other.
    Sequential {
        /// Around attention.
        attention: Around,
        /// Around the feed-forward.
        feed_forward: Around,
        /// What each half gives is multiplied by this.
        multiplier: f64,
    },
    /// Both read the same stream (GPT-J's).
    Parallel {
        /// Before attention, and before the feed-forward unless that has its own.
        norm: NormSpec,
        /// Before the feed-forward.
        feed_forward_norm: Option<NormSpec>,
    },
}

/// Norms before and after a half of a block.
#[derive(Debug, Clone, PartialEq)]
pub struct Around {
    /// Of what it reads.
    pub before: Option<NormSpec>,
    /// Of what it gives, before that is added.
    pub after: Option<NormSpec>,
}

/// A norm.
#[derive(Debug, Clone, PartialEq)]
pub struct NormSpec {
    /// Tensor names of its weights (D), or of each head's where there are several.
    pub weights: Vec<String>,
    /// Shape of each weight: (D), or (N, D) where one tensor holds those of all heads.
    pub shape: Vec<i64>,
    /// Tensor name of its bias (D).
    pub bias: Option<String>,
    /// Added to the mean square.
    pub eps: f64,
    /// What is computed.
    pub kind: NormKind,
}

/// What a norm computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// `x / rms(x) * w`.
    Rms,
    /// `x / rms(x) * (1 + w)`.
    RmsOffset,
    /// `(x - mean(x)) / deviation(x) * w + b`.
    Layer,
}

/// A linear layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearSpec {
    /// Module path, without `.weight`.
    pub name: String,
    /// Width of what goes in.
    pub input: i64,
    /// Width of what comes out.
    pub output: i64,
    /// Whether there is a bias (out).
    pub bias: bool,
}

/// From hidden states to logits.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadSpec {
    /// Module path.
    pub name: String,
    /// Whether it shares the embedding's weight.
    pub tied: bool,
    /// Whether there is a bias (V).
    pub bias: bool,
    /// What becomes of its products.
    pub map: LogitMap,
}
