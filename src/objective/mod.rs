//! What is learned. An objective turns a micro-batch into a scalar to go down on; the trainer knows no more than that.

use tch::{Device, Tensor};

use crate::data::Batch;
use crate::model::{Balance, Decoder, Forward, Thrift};
use crate::torch_ext::placed;

/// What the trainer trains: some tensors and a loss over them.
pub trait Learner {
    /// The trained tensors, fp32 leaves with gradient, under stable names in a stable order.
    fn parameters(&self) -> Vec<(String, Tensor)>;

    /// The loss of the batch's trained tokens.
    ///
    /// Everything random (dropout, noise) is a function of `dropout_seed`; `None` is evaluation: nothing is random.
    fn loss(&self, batch: &Batch, dropout_seed: Option<u64>, scale: f64) -> Loss;
}

/// What a micro-batch is judged by. Nothing here has been read from the device.
#[derive(Debug)]
pub struct Loss {
    /// `scale` times the SUM over the trained tokens: a scalar, fp32, with its graph.
    pub value: Tensor,
    /// The loss that balances experts, without its coefficient, each document weighed by its trained tokens times `scale`: a scalar,
    /// fp32, without a graph. None where no experts are balanced.
    pub balance: Option<Tensor>,
}

impl From<Tensor> for Loss {
    fn from(value: Tensor) -> Self {
        Self { value, balance: None }
    }
}

/// The supervised objective: cross-entropy of the next token at the trained rows.
#[derive(Debug)]
pub struct Supervised<'a> {
    /// The model, its adapters attached.
    pub model: &'a Decoder,
    /// NEFTune's alpha while training; 0 is none.
    pub noise_alpha: f64,
    /// What blocks do to take less memory.
    pub thrift: Thrift,
}

impl Learner for Supervised<'_> {
    fn parameters(&self) -> Vec<(String, Tensor)> {
        self.model.trained()
    }

    fn loss(&self, batch: &Batch, dropout_seed: Option<u64>, scale: f64) -> Loss {
        if dropout_seed.is_none() {
            let forward = Forward { thrift: self.thrift, ..Forward::default() };
            return supervised(self.model, batch, forward, scale).into();
        }
        let balance = self.model.balances_experts().then(|| balance(batch, self.model.device, scale));
        let forward = Forward {
            seed: dropout_seed,
            noise_alpha: self.noise_alpha,
            thrift: self.thrift,
            balance: balance.as_ref(),
        };
        let value = supervised(self.model, batch, forward, scale);
        Loss { value, balance: balance.map(|balance| balance.loss(&batch.documents)) }
    }
}

/// The loss that keeps experts balanced, each document weighed as its trained tokens weigh in the loss. It adds its gradient to
/// the cross-entropy's; its value is reported beside it.
fn balance(batch: &Batch, device: Device, scale: f64) -> Balance {
    let rows = Vec::<i64>::try_from(&batch.rows.to_device(Device::Cpu)).expect("row numbers are i64");
    let trained = |(start, length): (i64, i64)| rows.iter().filter(|row| (start..start + length).contains(row)).count();
    let weights: Vec<f32> = batch.documents.spans().map(|span| (trained(span) as f64 * scale) as f32).collect();
    Balance::new(&weights, device)
}

/// The sum over trained tokens of `-log softmax(logits)[target]`, times `scale`: a scalar, fp32, with its graph.
///
/// Only the trained rows reach the head.
pub fn supervised(model: &Decoder, batch: &Batch, forward: Forward<'_>, scale: f64) -> Tensor {
    let here = |tensor: &Tensor| placed(tensor, model.device);
    let hidden = model.hidden(&here(&batch.ids), &here(&batch.positions), &batch.documents, forward); // (T, D)
    let rows = hidden.index_select(0, &here(&batch.rows)); // (S, D)
    model.cross_entropy(&rows, &here(&batch.targets), forward, scale)
}
