//! What becomes of the stream in a block.

use super::{LayerInput, NormSpec, StreamMix};

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
    /// One after the other, on several copies of the stream.
    Streams {
        /// Around attention.
        attention: Box<StreamMix>,
        /// Around the feed-forward.
        feed_forward: Box<StreamMix>,
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

/// What happens to the stream after both halves of a block.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ending {
    /// The block's own input is let in.
    pub input: Option<LayerInput>,
    /// Tensor name of the number (1) that the stream is multiplied by.
    pub scale: Option<String>,
}
