//! Attention to the latest tokens and to compressed windows of all earlier ones, as data.

use super::{LinearSpec, NormSpec};

/// Attention whose one key of each token is also its value, of the latest tokens (the mask's window) and of entries that windows of
/// tokens are compressed to. The layer's rotation turns the last elements of queries, keys and entries; values have been turned
/// with the keys, so what comes out is turned back.
#[derive(Debug, Clone, PartialEq)]
pub struct CompressedAttention {
    /// N.
    pub heads: i64,
    /// H.
    pub head_size: i64,
    /// Scores are multiplied by this.
    pub scale: f64,
    /// From the stream to the latent of queries: (latent, D).
    pub query_down: LinearSpec,
    /// Of that latent.
    pub query_norm: NormSpec,
    /// (N H, latent).
    pub query_up: LinearSpec,
    /// Of each head's query.
    pub query_head_norm: NormSpec,
    /// (H, D).
    pub key_value: LinearSpec,
    /// Of keys (H).
    pub key_value_norm: NormSpec,
    /// Tensor name of a logit of each head (N) that takes part in the softmax and gives nothing (arXiv:2309.17453).
    pub sinks: String,
    /// What there is besides the latest tokens.
    pub entries: Entries,
    /// G: the heads' output is projected in so many parts.
    pub groups: i64,
    /// (G R', N H / G): part g of the output, through rows g R' to (g + 1) R'.
    pub group: LinearSpec,
    /// (D, G R').
    pub output: LinearSpec,
}

/// What attention sees besides the latest tokens.
#[derive(Debug, Clone, PartialEq)]
pub enum Entries {
    /// Nothing.
    None,
    /// An entry for every complete window of tokens before.
    All(Compressor),
    /// Of these, the few that an indexer chooses for each token.
    Chosen {
        /// Makes them.
        compressor: Compressor,
        /// Chooses.
        indexer: Box<Indexer>,
    },
}

/// Makes one entry of every window of m tokens: for each element the mean of k, weighed by a softmax over the window of g + bias.
#[derive(Debug, Clone, PartialEq)]
pub struct Compressor {
    /// m.
    pub rate: i64,
    /// H: elements of an entry.
    pub width: i64,
    /// Whether an entry is made of two windows: of the first half of what the tokens of the window before give, and the second half of
    /// what those of its own do. k and g are then 2 H wide.
    pub overlapping: bool,
    /// From the stream to k.
    pub key_value: LinearSpec,
    /// From the stream to g.
    pub gate: LinearSpec,
    /// Tensor name of the bias (m, width of g).
    pub bias: String,
    /// Of entries (H).
    pub norm: NormSpec,
}

/// Chooses entries for each token t by scores `sum_i relu(q_ti . e) w_ti / sqrt(H' I)` of its I heads of H' elements, e of its own
/// compressor. No gradient goes through the choice, so its linears are never trained.
#[derive(Debug, Clone, PartialEq)]
pub struct Indexer {
    /// I.
    pub heads: i64,
    /// H'.
    pub head_size: i64,
    /// How many entries a token sees at most.
    pub chosen: i64,
    /// Makes e.
    pub compressor: Compressor,
    /// From the normed latent of queries to q: (I H', latent).
    pub query: LinearSpec,
    /// From the stream to w: (I, D).
    pub weights: LinearSpec,
}

impl Entries {
    /// What makes the entries, if there are any.
    pub fn compressor(&self) -> Option<&Compressor> {
        match self {
            Self::None => None,
            Self::All(compressor) | Self::Chosen { compressor, .. } => Some(compressor),
        }
    }
}
