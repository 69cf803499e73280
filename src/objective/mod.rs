//! What is learned. An objective turns a micro-batch into a scalar to go down on; the trainer knows no more than that.

use tch::{Kind, Tensor};

use crate::data::Batch;
use crate::model::Decoder;

/// What the trainer trains: some tensors and a loss over them.
pub trait Learner {
    /// The trained tensors, fp32 leaves with gradient, under stable names in a stable order.
    fn parameters(&self) -> Vec<(String, Tensor)>;

    /// `scale` times the SUM of the loss over the batch's trained tokens: a scalar, fp32, with its graph.
    ///
    /// Everything random (dropout, noise) is a function of `dropout_seed`; `None` is evaluation: nothing is random.
    fn loss(&self, batch: &Batch, dropout_seed: Option<u64>, scale: f64) -> Tensor;
}

/// The supervised objective: cross-entropy of the next token at the trained rows.
#[derive(Debug)]
pub struct Supervised<'a> {
    /// The model, its adapters attached.
    pub model: &'a Decoder,
}

impl Learner for Supervised<'_> {
    fn parameters(&self) -> Vec<(String, Tensor)> {
        let adapters =
            self.model.linears().into_iter().filter_map(|linear| Some((&linear.name, linear.adapter.as_ref()?)));
        let tensors = adapters.flat_map(|(name, adapter)| {
            [(format!("{name}.a"), adapter.a.shallow_clone()), (format!("{name}.b"), adapter.b.shallow_clone())]
        });
        tensors.collect()
    }

    fn loss(&self, batch: &Batch, dropout_seed: Option<u64>, scale: f64) -> Tensor {
        supervised(self.model, batch, dropout_seed, scale)
    }
}

/// The sum over trained tokens of `-log softmax(logits)[target]`, times `scale`: a scalar, fp32, with its graph.
///
/// Only the trained rows reach the head.
pub fn supervised(model: &Decoder, batch: &Batch, dropout_seed: Option<u64>, scale: f64) -> Tensor {
    let here = |tensor: &Tensor| tensor.to_device(model.device);
    let hidden = model.hidden(&here(&batch.ids), &here(&batch.positions), &batch.documents, dropout_seed); // (T, D)
    let logits = model.logits(&hidden.index_select(0, &here(&batch.rows))); // (S, V)
    let targets = here(&batch.targets).unsqueeze(-1); // (S, 1)
    let log_probabilities = logits.log_softmax(-1, Kind::Float).gather(-1, &targets, false); // (S, 1)
    log_probabilities.sum(Kind::Float) * -scale
}
