//! One block of the decoder: attention and feed-forward, and how they are added to the stream.

use tch::{Device, Kind, Tensor};

use super::attention::Attention;
use super::cache::LayerCache;
use super::feed_forward::FeedForward;
use super::linear::Linear;
use super::load::Reader;
use super::router::{Balance, Router};
use super::spec::{self, LayerSpec};
use crate::Result;
use crate::ops::{self, Documents, Norm, rope::Rotation};

/// A block with its weights.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    attention: Attention,
    feed_forward: FeedForward,
    residual: Residual,
    /// Which of the decoder's rotations this block uses, if any.
    pub(super) rotation: Option<usize>,
}

/// How the two halves are added to the stream.
#[derive(Debug, Clone)]
enum Residual {
    Sequential { attention: Around, feed_forward: Around, multiplier: f64 },
    Parallel { norm: Norm, feed_forward_norm: Option<Norm> },
}

/// Norms before and after a half.
#[derive(Debug, Clone)]
struct Around {
    before: Option<Norm>,
    after: Option<Norm>,
}

/// What every block of a forward shares.
pub(super) struct Context<'a> {
    pub(super) documents: &'a Documents,
    /// (T), i64, from each document's start.
    pub(super) positions: &'a Tensor,
    pub(super) rotation: Option<&'a Rotation>,
    /// Number type of the stream.
    pub(super) kind: Kind,
    /// Makes the dropout masks; `None` is evaluation.
    pub(super) dropout_seed: Option<u64>,
    /// Where routers say what they chose.
    pub(super) balance: Option<&'a Balance>,
}

impl Layer {
    pub(super) fn load(spec: &LayerSpec, rotation: Option<usize>, read: &Reader<'_>) -> Result<Self> {
        let around = |around: &spec::Around| -> Result<Around> {
            Ok(Around {
                before: read.optional_norm(around.before.as_ref())?,
                after: read.optional_norm(around.after.as_ref())?,
            })
        };
        let residual = match &spec.residual {
            spec::Residual::Sequential { attention, feed_forward, multiplier } => Residual::Sequential {
                attention: around(attention)?,
                feed_forward: around(feed_forward)?,
                multiplier: *multiplier,
            },
            spec::Residual::Parallel { norm, feed_forward_norm } => Residual::Parallel {
                norm: read.norm(norm)?,
                feed_forward_norm: read.optional_norm(feed_forward_norm.as_ref())?,
            },
        };
        let attention = Attention::load(spec, read)?;
        Ok(Self { attention, feed_forward: FeedForward::load(&spec.feed_forward, read)?, residual, rotation })
    }

    /// The stream (T, D) after this block.
    pub(super) fn forward(&self, h: &Tensor, context: &Context<'_>, cache: Option<&mut LayerCache>) -> Tensor {
        match &self.residual {
            Residual::Sequential { attention, feed_forward, multiplier } => {
                let attend = |norm: Option<&Norm>, residual: Option<&Tensor>| {
                    self.attention.forward(h, norm, residual, context, cache)
                };
                let h = attention.add(h, *multiplier, attend);
                feed_forward
                    .add(&h, *multiplier, |norm, residual| self.feed_forward.forward(&h, norm, residual, context))
            }
            Residual::Parallel { norm, feed_forward_norm } => {
                let attended = self.attention.forward(h, Some(norm), Some(h), context, cache);
                let norm = feed_forward_norm.as_ref().unwrap_or(norm);
                self.feed_forward.forward(h, Some(norm), Some(&attended), context)
            }
        }
    }

    /// [`Layer::forward`], keeping only `h` and running again in backward.
    pub(super) fn forward_recomputed(&self, h: &Tensor, context: &Context<'_>) -> Tensor {
        let trained: Vec<&Tensor> = self.linears().into_iter().flat_map(Linear::trained).collect();
        let layer = self.clone();
        let (documents, positions) = (context.documents.clone(), context.positions.shallow_clone());
        let rotation = context.rotation.map(Rotation::shallow_clone);
        let (kind, dropout_seed, balance) = (context.kind, context.dropout_seed, context.balance.cloned());
        ops::recompute(h, &trained, move |h| {
            let context = Context {
                documents: &documents,
                positions: &positions,
                rotation: rotation.as_ref(),
                kind,
                dropout_seed,
                balance: balance.as_ref(),
            };
            layer.forward(h, &context, None)
        })
    }

    /// What chooses among its experts, if it has any.
    pub(super) fn router(&self) -> Option<&Router> {
        self.feed_forward.router()
    }

    /// What chooses among its experts, if it has any.
    pub(super) fn router_mut(&mut self) -> Option<&mut Router> {
        self.feed_forward.router_mut()
    }

    /// Linears in checkpoint order.
    pub(super) fn linears(&self) -> Vec<&Linear> {
        [self.attention.linears(), self.feed_forward.linears()].concat()
    }

    /// Linears in checkpoint order.
    pub(super) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mut all = self.attention.linears_mut();
        all.extend(self.feed_forward.linears_mut());
        all
    }

    /// An empty cache for `sequences` sequences.
    pub(super) fn cache(&self, sequences: i64, options: (Kind, Device)) -> LayerCache {
        self.attention.cache(sequences, options)
    }
}

impl Around {
    /// The stream `h` (T, D) with what `half` gives added: in one go where nothing comes between.
    fn add(&self, h: &Tensor, multiplier: f64, half: impl FnOnce(Option<&Norm>, Option<&Tensor>) -> Tensor) -> Tensor {
        if self.after.is_none() && multiplier == 1.0 {
            return half(self.before.as_ref(), Some(h));
        }
        let y = half(self.before.as_ref(), None);
        let y = self.after.as_ref().map_or_else(|| y.shallow_clone(), |norm| norm.apply(&y));
        if multiplier == 1.0 { h + y } else { h + y * multiplier }
    }
}
