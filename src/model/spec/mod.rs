//! What a decoder is, as data. Expanded per layer, so the forward does no layer-index arithmetic.
//!
//! ```text
//! Residual::Sequential:   h ──┬─ norm? ─ attention ─ norm? ─ x m ──(+)──┬─ norm? ─ feed-forward ─ norm? ─ x m ──(+)──>
//!                             └────────────────────────────────────┘   └───────────────────────────────────────┘
//! Residual::Parallel:     h ──┬─ norm ─ attention ──────(+)──>
//!                             ├─ norm ─ feed-forward ────┤
//!                             └──────────────────────────┘
//! Residual::Streams:      h ═╤═ gather ─ norm ─ attention ─ spread ═(+)═╤═ gather ─ norm ─ feed-forward ─ spread ═(+)══>
//!                             ╘════════════ mix ════════════════════╛   ╘══════════════ mix ═══════════════════════╛
//! Ending:                 h ──┬─ gate ─ activation ─ x own input ─ projection ─ norm ──(+)── x scale ──>
//!                             └─────────────────────────────────────────────────────────┘
//! ```

mod attention;
mod compressed;
mod delta_net;
mod experts;
mod feed_forward;
mod layer_inputs;
mod position;
mod residual;
mod streams;

use super::names::Names;
use crate::ops::LogitMap;

pub use attention::{
    Attention, GroupedAttention, LatentAttention, LatentQuery, Mask, Projection, QueryKeyNorm, Temperature,
};
pub use compressed::{CompressedAttention, Compressor, Entries, Indexer};
pub use delta_net::{DeltaNet, DeltaProjection};
pub use experts::{
    ExpertGateUp, ExpertLinear, Experts, Groups, Router, RouterNorm, Routing, Scores, SharedExpert, Stored,
};
pub use feed_forward::{Branch, FeedForward, GateUp};
pub use layer_inputs::{LayerInput, LayerInputs};
pub use position::{Position, Rope, RopeScaling};
pub use residual::{Around, Ending, Residual};
pub use streams::{StreamMap, StreamMix, Streams};

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
    /// Where there are several copies of the stream ([`Residual::Streams`]).
    pub streams: Option<Streams>,
    /// The blocks, in order.
    pub layers: Vec<LayerSpec>,
    /// How often the stream goes through each block before it goes on to the next; every time with keys and values of its own.
    pub passes: usize,
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

impl NormSpec {
    /// The path of the module that has its weight; `None` where it has none, or those of several modules.
    pub fn module(&self) -> Option<&str> {
        match &self.weights[..] {
            [one] => one.strip_suffix(".weight"),
            _ => None,
        }
    }
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
