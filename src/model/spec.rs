//! What a decoder is, as data. Expanded per layer, so the forward does no layer-index arithmetic.
//!
//! ```text
//! Residual::Sequential:   h ──┬─ norm? ─ attention ─ norm? ─ x m ──(+)──┬─ norm? ─ feed-forward ─ norm? ─ x m ──(+)──>
//!                             └────────────────────────────────────┘   └───────────────────────────────────────┘
//! Residual::Parallel:     h ──┬─ norm ─ attention ──────(+)──>
//!                             ├─ norm ─ feed-forward ────┤
//!                             └──────────────────────────┘
//! Ending:                 h ──┬─ gate ─ activation ─ x own input ─ projection ─ norm ──(+)── x scale ──>
//!                             └─────────────────────────────────────────────────────────┘
//! ```

use super::names::Names;
use crate::ops::{Activation, LogitMap, RopeLayout, Weighted};

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
    /// From token ids to what each block is told of them besides the stream.
    pub layer_inputs: Option<LayerInputs>,
    /// The blocks, in order.
    pub layers: Vec<LayerSpec>,
    /// After the last block.
    pub final_norm: NormSpec,
    /// From hidden states to logits.
    pub head: HeadSpec,
    /// Tensors a checkpoint may hold that mean nothing here (old buffers), by the end of their name.
    pub ignored_suffixes: Vec<String>,
    /// The same, by how their name begins: layers that only predict further ahead.
    pub ignored_prefixes: Vec<String>,
    /// What its modules are called in files and in transformers.
    pub names: Names,
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

/// P numbers for each token and each of the blocks: of a table of their own, and of the token's embedding e:
/// `scale * (norm(projection(e)) + table_scale * table[id])`, where block i takes the i-th P of them.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerInputs {
    /// P.
    pub width: i64,
    /// Tensor name of the table (rows, blocks P).
    pub table: String,
    /// Rows of the table: at least V.
    pub rows: i64,
    /// What the table gives is multiplied by this, rounded to its number type first.
    pub table_scale: f64,
    /// (blocks P, D).
    pub projection: LinearSpec,
    /// Over the P of each block.
    pub norm: NormSpec,
    /// The sum is multiplied by this.
    pub scale: f64,
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
    /// What happens to the stream after them.
    pub ending: Ending,
}

/// What happens to the stream after both halves of a block.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ending {
    /// The block's own input is let in.
    pub input: Option<LayerInput>,
    /// Tensor name of the number (1) that the stream is multiplied by.
    pub scale: Option<String>,
}

/// How a block's own input x (P) is let into the stream h: `h + norm(projection(act(gate(h)) * x))`.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerInput {
    /// Of the gate.
    pub activation: Activation,
    /// (P, D).
    pub gate: LinearSpec,
    /// (D, P).
    pub projection: LinearSpec,
    /// Of what is added.
    pub norm: NormSpec,
}

/// How tokens look at each other.
#[derive(Debug, Clone, PartialEq)]
pub enum Attention {
    /// Grouped heads (arXiv:2305.13245); all heads their own when `kv_heads == heads`.
    Grouped(GroupedAttention),
    /// Keys and values of all heads made of one latent (arXiv:2405.04434).
    Latent(LatentAttention),
    /// A state instead of keys and values (arXiv:2412.06464).
    DeltaNet(DeltaNet),
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
        /// Cosines and sines are multiplied by the first, in longer documents by the second.
        attention_factors: [f64; 2],
    },
    /// Only the first `turning` of all pairs of the head turn, in the wavelengths they would have if all did.
    Proportional {
        /// Pairs that turn.
        turning: i64,
        /// Positions are divided by it.
        factor: f64,
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
    /// The few that a router chooses for each token, of many (arXiv:1701.06538).
    Experts(Box<Experts>),
    /// What several give for the same stream, added up.
    Sum(Vec<Branch>),
}

/// One of the feed-forwards of a [`FeedForward::Sum`].
#[derive(Debug, Clone, PartialEq)]
pub struct Branch {
    /// Around it.
    pub norms: Around,
    /// Itself.
    pub feed_forward: FeedForward,
}

/// Experts, their router and what all tokens go through beside them.
#[derive(Debug, Clone, PartialEq)]
pub struct Experts {
    /// Chooses.
    pub router: Router,
    /// Of the gate.
    pub activation: Activation,
    /// Gate and up of every expert.
    pub projection: ExpertGateUp,
    /// (D, F) of every expert.
    pub down: ExpertLinear,
    /// What the router's weights are multiplied with.
    pub weighted: Weighted,
    /// The feed-forward that every token goes through.
    pub shared: Option<SharedExpert>,
}

/// Chooses experts for a token and weighs them.
#[derive(Debug, Clone, PartialEq)]
pub struct Router {
    /// Where it does not read what the experts read: how it norms what they have before it is normed for them.
    pub norm: Option<RouterNorm>,
    /// (E, D).
    pub linear: LinearSpec,
    /// Whether its products are made in fp32.
    pub wide: bool,
    /// How.
    pub routing: Routing,
    /// What the loss that balances the experts is multiplied with (arXiv:2101.03961); 0 is none.
    pub balance: f64,
}

/// A norm of a router's own.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterNorm {
    /// The norm.
    pub norm: NormSpec,
    /// What it gives is multiplied by this.
    pub scale: f64,
}

/// From a router's products to the experts of a token and their weights.
#[derive(Debug, Clone, PartialEq)]
pub enum Routing {
    /// Those of the largest scores.
    Largest {
        /// How many.
        chosen: i64,
        /// From products to scores.
        scores: Scores,
        /// Tensor name of what is added to the scores (E) for the choice alone (arXiv:2408.15664).
        correction: Option<String>,
        /// Only experts of the best groups are considered.
        groups: Option<Groups>,
        /// Weights are divided by their sum, to which this is added.
        normalised: Option<f64>,
        /// Weights are then multiplied by this.
        scale: f64,
        /// Tensor name of what each expert's weight is multiplied by at last (E).
        expert_scale: Option<String>,
    },
    /// Two, by the inference form of SparseMixer (arXiv:2409.12136): each weighed among the scores that are near its own.
    SparseMixer {
        /// Scores further apart than twice this share are not near.
        jitter: f64,
    },
}

/// From a router's products to scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scores {
    /// Over all experts.
    Softmax,
    /// Of each expert alone.
    Sigmoid,
}

/// Groups of experts, of which the best are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// How many there are; each is E / count consecutive experts.
    pub count: i64,
    /// How many are kept.
    pub kept: i64,
    /// A group is as good as the sum of this many of its largest scores.
    pub judged_by: i64,
}

/// A feed-forward that every token goes through beside the experts chosen for it.
#[derive(Debug, Clone, PartialEq)]
pub struct SharedExpert {
    /// One of the dense kinds.
    pub feed_forward: FeedForward,
    /// What it gives is multiplied by the sigmoid of this (1, D).
    pub gate: Option<LinearSpec>,
}

/// How a checkpoint stores gate and up of the experts.
#[derive(Debug, Clone, PartialEq)]
pub enum ExpertGateUp {
    /// Each its own.
    Separate {
        /// (F, D) of every expert.
        gate: ExpertLinear,
        /// (F, D) of every expert.
        up: ExpertLinear,
    },
    /// One weight (2 F, D) of every expert.
    Fused {
        /// The weight.
        linear: ExpertLinear,
        /// Whether its rows are gate, up, gate, up, rather than all gates and then all ups.
        interleaved: bool,
    },
}

/// One linear of every expert.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertLinear {
    /// Where it is stored apart: the module path, with `*` for the number of the expert. Else the tensor's name.
    pub name: String,
    /// E.
    pub experts: i64,
    /// Width of what goes in.
    pub input: i64,
    /// Width of what comes out.
    pub output: i64,
    /// Whether there are biases (out); of experts stored together they are the tensor `name`_bias (E, out).
    pub bias: bool,
    /// How.
    pub stored: Stored,
    /// Path of the parameter that transformers keeps it in, fused with others or not.
    pub parameter: String,
}

/// How the weights of all experts are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// A module for each expert.
    Apart,
    /// One tensor (E, out, in).
    Together,
    /// One tensor (E, in, out).
    Transposed {
        /// Whether PEFT takes in for out: it does where transformers' module does not say that it is transposed (Llama 4).
        swapped: bool,
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
    /// Tensor names of its weights (D), or of each head's where there are several; none where it has no weight.
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
    /// Module path, without `.weight`; elsewhere it may be spelled otherwise, see [`Names`].
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
