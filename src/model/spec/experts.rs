//! The few that a router chooses for each token, of many.

use super::{FeedForward, LinearSpec, NormSpec};
use crate::ops::{Activation, Weighted};

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
    /// Those that a table names for the token's id.
    OfToken {
        /// How many.
        chosen: i64,
        /// Tensor name of the table (V, chosen), whole numbers.
        table: String,
        /// From products to scores.
        scores: Scores,
        /// Weights are divided by their sum, to which this is added.
        normalised: f64,
        /// Weights are then multiplied by this.
        scale: f64,
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
    /// The square root of the softplus, of each expert alone.
    SqrtSoftplus,
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

/// A feed-forward that every token goes through beside the experts chosen for it.
#[derive(Debug, Clone, PartialEq)]
pub struct SharedExpert {
    /// One of the dense kinds.
    pub feed_forward: FeedForward,
    /// What it gives is multiplied by the sigmoid of this (1, D).
    pub gate: Option<LinearSpec>,
}
