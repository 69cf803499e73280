//! What blocks are told of each token besides the stream, and how each lets it in.

use tch::Tensor;

use super::layer::Context;
use super::linear::Linear;
use super::load::Reader;
use super::spec;
use crate::Result;
use crate::ops::{self, Activation, Norm, Readers};

/// The inputs of all blocks, with their weights.
#[derive(Debug)]
pub(super) struct LayerInputs {
    /// P.
    width: i64,
    /// (rows, blocks P).
    table: Tensor,
    /// In the number type of the table.
    table_scale: Tensor,
    pub(super) projection: Linear,
    norm: Norm,
    scale: f64,
}

/// How one block lets its input in, with its weights.
#[derive(Debug, Clone)]
pub(super) struct LayerInput {
    activation: Activation,
    gate: Linear,
    projection: Linear,
    norm: Norm,
}

impl LayerInputs {
    pub(super) fn load(spec: &spec::LayerInputs, read: &Reader<'_>) -> Result<Self> {
        Ok(Self {
            width: spec.width,
            table: read.tensor(&spec.table)?,
            table_scale: Tensor::from(spec.table_scale).to_kind(read.kind).to_device(read.device),
            projection: read.linear(&spec.projection)?,
            norm: read.norm(&spec.norm)?,
            scale: spec.scale,
        })
    }

    /// (T, P) for each block, of tokens `ids` (T) embedded as `embedded` (T, D).
    pub(super) fn of(&self, ids: &Tensor, embedded: &Tensor, dropout_seed: Option<u64>) -> Vec<Tensor> {
        let projected = ops::projection(embedded, &[self.projection.operand(dropout_seed)], None).remove(0);
        let projected = projected.view([-1, self.width]); // (T blocks, P)
        let of_ids = (self.table.index_select(0, ids) * &self.table_scale).view([-1, self.width]); // (T blocks, P)
        let both = (self.norm.apply(&projected) + of_ids) * self.scale;
        let blocks = self.table.size()[1] / self.width;
        ops::split(&both.view([-1, blocks * self.width]), 1, &vec![self.width; blocks as usize])
    }
}

impl LayerInput {
    pub(super) fn load(spec: &spec::LayerInput, read: &Reader<'_>) -> Result<Self> {
        Ok(Self {
            activation: spec.activation,
            gate: read.linear(&spec.gate)?,
            projection: read.linear(&spec.projection)?,
            norm: read.norm(&spec.norm)?,
        })
    }

    /// The stream `h` (T, D) with the block's own input let in.
    pub(super) fn add(&self, h: &Tensor, context: &Context<'_>) -> Tensor {
        let seed = context.dropout_seed;
        let gate = ops::projection(h, &[self.gate.operand(seed)], None).remove(0); // (T, P)
        let (operand, both) = (self.projection.operand(seed), (&gate, context.input));
        let added = ops::gated_projection(self.activation, both, Readers::Others, operand, None);
        h + self.norm.apply(&added)
    }

    /// In checkpoint order.
    pub(super) fn linears(&self) -> [&Linear; 2] {
        [&self.gate, &self.projection]
    }

    /// In checkpoint order.
    pub(super) fn linears_mut(&mut self) -> [&mut Linear; 2] {
        [&mut self.gate, &mut self.projection]
    }
}
