//! What happens to each token alone.

use super::{Around, Experts, LinearSpec};
use crate::ops::Activation;

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

/// One of the feed-forwards of a [`FeedForward::Sum`].
#[derive(Debug, Clone, PartialEq)]
pub struct Branch {
    /// Around it.
    pub norms: Around,
    /// Itself.
    pub feed_forward: FeedForward,
}
