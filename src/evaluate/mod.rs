//! How good a model is: its loss on held-out rows, and its answers beside the rows' own.

mod answers;
mod probe;
mod questions;

use std::ops::ControlFlow;

use serde::Serialize;

use crate::Result;
use crate::data::Batch;
use crate::model::{Decoder, Forward};
use crate::objective::supervised;

pub use answers::{Answer, Score, answer_all, score};
pub use probe::{
    Apart, Candidate, Drift, Ended, FORMATS, Finding, MOST_PROMPTS, Measured, Place, Probes, Prompt, Reply, Said,
    Strength, Tolerance, Verdict,
};
pub use questions::{Question, Questions, questions};

/// Loss on a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Loss {
    /// Mean cross-entropy over the trained tokens, in nats.
    pub loss: f64,
    /// Its exponential.
    pub perplexity: f64,
    /// How many tokens it is the mean of.
    pub trained_tokens: u64,
}

/// The mean loss over every trained token of `batches`; `seen` is told the trained tokens so far and may end it early.
pub fn loss(
    model: &Decoder,
    batches: impl Iterator<Item = Result<Batch>>,
    mut seen: impl FnMut(u64) -> ControlFlow<()>,
) -> Result<Loss> {
    let (mut sum, mut trained_tokens) = (0.0, 0);
    for batch in batches {
        let batch = batch?;
        sum += tch::no_grad(|| supervised(model, &batch, Forward::default(), 1.0)).double_value(&[]);
        trained_tokens += batch.targets.numel() as u64;
        if seen(trained_tokens).is_break() {
            break;
        }
    }
    let loss = sum / trained_tokens.max(1) as f64;
    Ok(Loss { loss, perplexity: loss.exp(), trained_tokens })
}
