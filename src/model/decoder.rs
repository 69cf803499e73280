//! The only forward.

use tch::{Device, Kind, Tensor};

use super::{Linear, ModelSpec};
use crate::Result;
use crate::weights::Checkpoint;

/// Where each document of a micro-batch begins and ends, and how long the longest is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Documents {
    /// Offsets into T: document i is `offsets[i]..offsets[i + 1]`; the last offset is T.
    pub offsets: Vec<i64>,
}

/// A language model: frozen base weights, with the adapters attached to its linears.
#[derive(Debug)]
pub struct Decoder {
    /// What it is.
    pub spec: ModelSpec,
    /// Number type of weights and activations.
    pub kind: Kind,
    /// Where it lives.
    pub device: Device,
}

impl Decoder {
    /// Reads the weights tensor by tensor; `progress` is called with bytes read so far and in all.
    pub fn load(_checkpoint: &Checkpoint, _kind: Kind, _device: Device, _progress: &dyn Fn(u64, u64)) -> Result<Self> {
        todo!()
    }

    /// The final hidden states (T, D) of documents laid end to end in `ids` (T), i64.
    ///
    /// `positions` (T), i64, restart at each document. `dropout_seed` makes the dropout masks of this
    /// micro-batch; `None` is evaluation (no dropout, no noise).
    pub fn hidden(&self, _ids: &Tensor, _positions: &Tensor, _documents: &Documents, _dropout_seed: Option<u64>) -> Tensor {
        todo!()
    }

    /// The logits (S, V), fp32, of hidden states (S, D).
    pub fn logits(&self, _hidden: &Tensor) -> Tensor {
        todo!()
    }

    /// Every linear of the model in checkpoint order, the head last.
    pub fn linears(&self) -> Vec<&Linear> {
        todo!()
    }

    /// Every linear of the model in checkpoint order, the head last.
    pub fn linears_mut(&mut self) -> Vec<&mut Linear> {
        todo!()
    }
}
