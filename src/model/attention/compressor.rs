//! What makes entries of windows of tokens, and what chooses among them: with their weights.

use tch::{Kind, Tensor};

use crate::Result;
use crate::model::linear::Linear;
use crate::model::load::Reader;
use crate::model::spec::{self, Rope};
use crate::ops::rope::Rotation;
use crate::ops::{self, Documents, Norm, Normed, choose_entries};
use crate::torch_ext::sent;

/// Makes entries.
#[derive(Debug, Clone)]
pub(in crate::model) struct Compressor {
    pub(in crate::model) rate: i64,
    width: i64,
    pub(in crate::model) overlapping: bool,
    pub(super) key_value: Linear,
    pub(super) gate: Linear,
    bias: Bias,
    norm: Norm,
}

/// (m, width of a gate), fp32.
#[derive(Debug)]
struct Bias(Tensor);

/// Chooses entries.
#[derive(Debug, Clone)]
pub(super) struct Indexer {
    pub(super) heads: i64,
    pub(super) head_size: i64,
    pub(super) chosen: i64,
    pub(super) compressor: Compressor,
    pub(super) query: Linear,
    pub(super) weights: Linear,
}

/// What an indexer has made of tokens: queries (T, I, H'), rotated, their weights (T, I), fp32, and k and g of its compressor.
pub(super) struct Indexed {
    pub(super) queries: Tensor,
    pub(super) weights: Tensor,
    pub(super) k: Tensor,
    pub(super) g: Tensor,
}

impl Clone for Bias {
    /// Another handle to the same tensor.
    fn clone(&self) -> Self {
        Self(self.0.shallow_clone())
    }
}

impl Compressor {
    pub(super) fn load(spec: &spec::Compressor, read: &Reader<'_>) -> Result<Self> {
        Ok(Self {
            rate: spec.rate,
            width: spec.width,
            overlapping: spec.overlapping,
            key_value: read.linear(&spec.key_value)?,
            gate: read.linear(&spec.gate)?,
            bias: Bias(read.wide(&spec.bias)?),
            norm: read.norm(&spec.norm)?,
        })
    }

    /// Entries (W, H) of the complete windows of every document, from k and g of its tokens, normed and rotated; `numbers` are those of
    /// the windows in their document, which say where it is.
    pub(in crate::model) fn entries(
        &self,
        k: &Tensor,
        g: &Tensor,
        documents: &Documents,
        numbers: &[i64],
        rope: &Rope,
    ) -> Tensor {
        let entries = ops::compress(k, g, &self.bias.0, self.overlapping, documents);
        if numbers.is_empty() {
            return entries;
        }
        let entries = self.norm.apply(&entries).view([-1, 1, self.width]);
        let positions: Vec<i64> = numbers.iter().map(|number| number * self.rate).collect();
        let (all, reached) = (Documents::one(positions.len() as i64), positions.last().map_or(0, |last| last + 1));
        let rotation = rope.rotation(&sent(&Tensor::from_slice(&positions), k.device()), &all, &[reached]);
        let [rotated] = ops::rope_last([&entries], &rotation);
        rotated.view([-1, self.width])
    }
}

impl Indexer {
    pub(super) fn load(spec: &spec::Indexer, read: &Reader<'_>) -> Result<Self> {
        Ok(Self {
            heads: spec.heads,
            head_size: spec.head_size,
            chosen: spec.chosen,
            compressor: Compressor::load(&spec.compressor, read)?,
            query: read.linear(&spec.query)?,
            weights: read.linear(&spec.weights)?,
        })
    }

    /// What it makes of rows of the stream (T, D), and of the latent of queries before its norm.
    pub(super) fn read(&self, x: &Normed, latent: (&Tensor, &Norm), rotation: &Rotation) -> Indexed {
        tch::no_grad(|| {
            let linears = [&self.compressor.key_value, &self.compressor.gate, &self.weights];
            let mut parts = ops::projection(x, &linears.map(|linear| linear.operand(None)), None);
            let weights = parts.pop().expect("three projections").to_kind(Kind::Float);
            let scale = ((self.heads * self.head_size) as f64).powf(-0.5);
            let g = parts.pop().expect("three projections");
            let k = parts.pop().expect("three projections");
            let queries = ops::projection(latent.1.of(latent.0), &[self.query.operand(None)], None).remove(0);
            let [queries] = ops::rope_last([&queries.view([-1, self.heads, self.head_size])], rotation); // (T, I, H')
            Indexed { queries, weights: weights * scale, k, g }
        })
    }

    /// Which of a document's entries (W, H') tokens at `positions` (L) see: (L, W), or all where that is none.
    pub(super) fn choose(
        &self,
        queries: &Tensor,
        weights: &Tensor,
        entries: &Tensor,
        positions: &Tensor,
    ) -> Option<Tensor> {
        choose_entries(queries, weights, entries, positions, (self.compressor.rate, self.chosen))
    }
}
