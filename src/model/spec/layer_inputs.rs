//! What each block is told of the tokens besides the stream.

use super::{LinearSpec, NormSpec};
use crate::ops::Activation;

/// P numbers for each token and each of the blocks: of a table of their own, and of the token's embedding e:
/// `scale * (norm(projection(e)) + table_scale * table[id])`, where block i takes the i-th P of them.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerInputs {
    /// P.
    pub width: i64,
    /// Tensor name of the table (rows, blocks P).
    pub table: String,
    /// Rows of the table: at least V.
    pub rows: i64,
    /// What the table gives is multiplied by this, rounded to its number type first.
    pub table_scale: f64,
    /// (blocks P, D).
    pub projection: LinearSpec,
    /// Over the P of each block.
    pub norm: NormSpec,
    /// The sum is multiplied by this.
    pub scale: f64,
}

/// How a block's own input x (P) is let into the stream h: `h + norm(projection(act(gate(h)) * x))`.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerInput {
    /// Of the gate.
    pub activation: Activation,
    /// (P, D).
    pub gate: LinearSpec,
    /// (D, P).
    pub projection: LinearSpec,
    /// Of what is added.
    pub norm: NormSpec,
}
