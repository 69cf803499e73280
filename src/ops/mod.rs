//! Differentiable operations with hand-written backward.
//!
//! Each computes its result without a graph, keeps only what its backward needs and hands libtorch's engine a backward
//! written in Rust ([`crate::torch_ext::custom`]). Each has a slow twin, plain autograd over libtorch operations, in its
//! tests. Shape letters are those of [`crate::model`].

pub mod attention;
pub mod block_projection;
pub mod compress;
pub mod convolution;
mod cpu;
pub mod cross_entropy;
pub mod cuda;
pub mod delta_net;
mod dropout;
pub mod experts;
pub mod gated;
pub mod latent;
pub mod magnitude;
pub mod norm;
pub mod normed;
pub mod offload;
pub mod projection;
pub mod recompute;
pub mod rope;
pub mod split;
pub mod streams;
#[cfg(test)]
pub(crate) mod testing;
pub mod tiled;
mod update;

pub use attention::{Alibi, Scoring, attention, attention_to_cache, choose_entries, flash_takes};
pub use block_projection::block_projection;
pub use compress::compress;
pub use convolution::Convolution;
pub use cross_entropy::{LogitMap, cross_entropy, rows_of_logits};
pub use delta_net::{DeltaGates, delta_rule, delta_rule_continued, delta_rule_step};
pub use experts::{ExpertInput, Experts, Weighted, experts};
pub use gated::{Activation, Readers, gated_projection};
pub use latent::keys_values;
pub use magnitude::Magnitude;
pub use norm::{Norm, TrainedNorm};
pub use normed::{Flow, Normed};
pub use offload::Offload;
pub use projection::{LowRank, Operand, Trained, projection};
pub use recompute::recompute;
pub use rope::{RopeLayout, normed_rope, normed_rope_last, rope, rope_last};
pub use split::split;
pub use tiled::tiled;

/// Where each document of a micro-batch begins and ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Documents {
    /// Offsets into T: document i is `offsets[i]..offsets[i + 1]`; the first is 0, the last is T.
    pub offsets: Vec<i64>,
}

impl Documents {
    /// One document of `length` tokens.
    pub fn one(length: i64) -> Self {
        Self { offsets: vec![0, length] }
    }

    /// (start, length) of each document.
    pub fn spans(&self) -> impl Iterator<Item = (i64, i64)> + '_ {
        self.offsets.windows(2).map(|w| (w[0], w[1] - w[0]))
    }

    /// Documents cut into chunks of at most `size` tokens, counted from each document's start.
    pub fn chunked(&self, size: i64) -> Self {
        let cuts =
            self.spans().flat_map(|(start, length)| (0..length).step_by(size as usize).map(move |at| start + at));
        Self { offsets: cuts.chain(self.offsets.last().copied()).collect() }
    }

    /// Length of the longest document.
    pub fn longest(&self) -> i64 {
        self.spans().map(|(_, length)| length).max().unwrap_or(0)
    }
}
