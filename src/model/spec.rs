//! What a decoder is, as data. Expanded per layer, so the forward does no layer-index arithmetic.
//!
//! ```text
//! Residual::Sequential:   h ──┬─ norm ─ attention ──(+)──┬─ norm ─ feed-forward ──(+)──>
//!                             └──────────────────────┘   └────────────────────────┘
//! ```

use crate::ops::Activation;

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
    /// Tensor name of the token embedding (V, D).
    pub embedding: String,
    /// The blocks, in order.
    pub layers: Vec<LayerSpec>,
    /// After the last block.
    pub final_norm: NormSpec,
    /// From hidden states to logits.
    pub head: HeadSpec,
    /// Tensors a checkpoint may hold that mean nothing here (old buffers), by the end of their name.
    pub ignored_suffixes: Vec<&'static str>,
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
    Grouped {
        /// N.
        heads: i64,
        /// K.
        kv_heads: i64,
        /// H.
        head_size: i64,
        /// Scores are multiplied by this.
        scale: f64,
        /// (N H, D).
        query: LinearSpec,
        /// (K H, D).
        key: LinearSpec,
        /// (K H, D).
        value: LinearSpec,
        /// (D, N H).
        output: LinearSpec,
    },
}

/// How positions enter.
#[derive(Debug, Clone, PartialEq)]
pub enum Position {
    /// Rotary (arXiv:2104.09864).
    Rope(Rope),
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the wavelengths.
    pub theta: f64,
    /// How many of a head's H elements rotate.
    pub rotated: i64,
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
}

impl Mask {
    /// Tokens in sight, where limited.
    pub fn window(self) -> Option<i64> {
        match self {
            Mask::Full => None,
            Mask::Sliding { window } => Some(window),
        }
    }
}

/// What happens to each token alone.
#[derive(Debug, Clone, PartialEq)]
pub enum FeedForward {
    /// `down(act(gate(x)) * up(x))` (arXiv:2002.05202).
    Gated {
        /// Of the gate.
        activation: Activation,
        /// (F, D).
        gate: LinearSpec,
        /// (F, D).
        up: LinearSpec,
        /// (D, F).
        down: LinearSpec,
    },
}

/// How a block's two halves are added to the stream.
#[derive(Debug, Clone, PartialEq)]
pub enum Residual {
    /// Each half reads a norm of the stream and is added to it.
    Sequential {
        /// Before attention.
        attention_norm: NormSpec,
        /// Before the feed-forward.
        feed_forward_norm: NormSpec,
    },
}

/// An RMSNorm.
#[derive(Debug, Clone, PartialEq)]
pub struct NormSpec {
    /// Tensor name of its weight.
    pub weight: String,
    /// Elements of the weight.
    pub width: i64,
    /// Added to the mean square.
    pub eps: f64,
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
}
