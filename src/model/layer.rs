//! One block of the decoder: attention and feed-forward, and how they are added to the stream.

use tch::{Device, Kind, Tensor};

use super::attention::{Attention, HandedOn};
use super::cache::LayerCache;
use super::feed_forward::FeedForward;
use super::layer_inputs::LayerInput;
use super::linear::Linear;
use super::load::Reader;
use super::router::{Balance, Router};
use super::spec::{self, LayerSpec};
use super::streams::StreamMix;
use crate::Result;
use crate::ops::{self, Documents, Norm, Offload, rope::Rotation};

/// A block with its weights.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    attention: Attention,
    feed_forward: FeedForward,
    residual: Residual,
    /// The block's own input is let in.
    input: Option<LayerInput>,
    /// The stream is multiplied by this at last.
    scale: Option<f64>,
    /// Which of the decoder's rotations this block uses, if any.
    pub(super) rotation: Option<usize>,
    /// Which of the decoder's caches this block uses: its own, or that of the block whose keys and values it reads.
    pub(super) cached_in: usize,
}

/// How the two halves are added to the stream.
#[derive(Debug, Clone)]
enum Residual {
    Sequential { attention: Around, feed_forward: Around, multiplier: f64 },
    Parallel { norm: Norm, feed_forward_norm: Option<Norm> },
    Streams { attention: Box<StreamMix>, feed_forward: Box<StreamMix> },
}

/// Norms before and after a half.
#[derive(Debug, Clone)]
pub(super) struct Around {
    before: Option<Norm>,
    after: Option<Norm>,
}

/// What a half of a block works on.
#[derive(Clone, Copy)]
pub(super) struct Stream<'a> {
    /// What it reads (T, D).
    pub(super) h: &'a Tensor,
    /// What it reads is normed by this first.
    pub(super) norm: Option<&'a Norm>,
    /// What it gives is added to this (T, D).
    pub(super) residual: Option<&'a Tensor>,
}

/// What every block of a forward shares.
pub(super) struct Context<'a> {
    pub(super) documents: &'a Documents,
    /// Of the tokens (T), i64.
    pub(super) ids: &'a Tensor,
    /// (T), i64, from each document's start.
    pub(super) positions: &'a Tensor,
    pub(super) rotation: Option<&'a Rotation>,
    /// The block's own input (T, P), where blocks have some.
    pub(super) input: Option<&'a Tensor>,
    /// Number type of the stream.
    pub(super) kind: Kind,
    /// Makes the dropout masks; `None` is evaluation.
    pub(super) dropout_seed: Option<u64>,
    /// Where routers say what they chose.
    pub(super) balance: Option<&'a Balance>,
    /// Tokens that go through a dense feed-forward at a time, where not all do.
    pub(super) tile: Option<u64>,
}

impl Layer {
    /// Reads the weights; `before` are those before, among which it finds what it shares with them.
    pub(super) fn load(spec: &LayerSpec, rotation: Option<usize>, before: &[Self], read: &Reader<'_>) -> Result<Self> {
        let residual = match &spec.residual {
            spec::Residual::Sequential { attention, feed_forward, multiplier } => Residual::Sequential {
                attention: Around::load(attention, read)?,
                feed_forward: Around::load(feed_forward, read)?,
                multiplier: *multiplier,
            },
            spec::Residual::Parallel { norm, feed_forward_norm } => Residual::Parallel {
                norm: read.norm(norm)?,
                feed_forward_norm: read.optional_norm(feed_forward_norm.as_ref())?,
            },
            spec::Residual::Streams { attention, feed_forward } => Residual::Streams {
                attention: Box::new(StreamMix::load(attention, read)?),
                feed_forward: Box::new(StreamMix::load(feed_forward, read)?),
            },
        };
        let attention = Attention::load(spec, read)?;
        let shared = attention.reads().and_then(|slot| before.iter().find(|b| b.attention.fills() == Some(slot)));
        let own = || before.iter().filter(|block| block.attention.reads().is_none()).count();
        Ok(Self {
            cached_in: shared.map_or_else(own, |block| block.cached_in),
            attention,
            feed_forward: FeedForward::load(&spec.feed_forward, read)?,
            residual,
            input: spec.ending.input.as_ref().map(|input| LayerInput::load(input, read)).transpose()?,
            scale: spec.ending.scale.as_ref().map(|name| read.number(name)).transpose()?,
            rotation,
        })
    }

    /// The stream (T, D), or its copies (T, M, D), after this block.
    pub(super) fn forward(
        &self,
        h: &Tensor,
        context: &Context<'_>,
        handed_on: &mut HandedOn,
        cache: Option<&mut LayerCache>,
    ) -> Tensor {
        let h = self.both_halves(h, context, handed_on, cache);
        let h = match &self.input {
            Some(input) => input.add(&h, context),
            None => h,
        };
        match self.scale {
            Some(scale) => h * scale,
            None => h,
        }
    }

    fn both_halves(
        &self,
        h: &Tensor,
        context: &Context<'_>,
        handed_on: &mut HandedOn,
        cache: Option<&mut LayerCache>,
    ) -> Tensor {
        match &self.residual {
            Residual::Sequential { attention, feed_forward, multiplier } => {
                let attend = |stream: Stream<'_>| self.attention.forward(stream, context, handed_on, cache);
                let h = attention.add(h, *multiplier, attend);
                feed_forward.add(&h, *multiplier, |stream| self.feed_forward.forward(stream, context))
            }
            Residual::Parallel { norm, feed_forward_norm } => {
                let (input, own) = Norm::ahead(Some(norm), h);
                let stream = Stream { h: &input, norm: own, residual: Some(h) };
                let attended = self.attention.forward(stream, context, handed_on, cache);
                let (input, own) = match feed_forward_norm {
                    Some(norm) => Norm::ahead(Some(norm), h),
                    None => (input, own),
                };
                self.feed_forward.forward(Stream { h: &input, norm: own, residual: Some(&attended) }, context)
            }
            Residual::Streams { attention, feed_forward } => {
                let attend = |stream: Stream<'_>| self.attention.forward(stream, context, handed_on, cache);
                let h = attention.around(h, attend);
                feed_forward.around(&h, |stream| self.feed_forward.forward(stream, context))
            }
        }
    }

    /// [`Layer::forward`], keeping only what it reads and running again in backward. With `offload` the stream that it reads waits there.
    pub(super) fn forward_recomputed(
        &self,
        h: &Tensor,
        context: &Context<'_>,
        handed_on: &mut HandedOn,
        offload: Option<&Offload>,
    ) -> Tensor {
        let of_linears = self.linears().into_iter().flat_map(Linear::leaves);
        let trained: Vec<&Tensor> = of_linears.chain(self.norms().into_iter().flat_map(Norm::leaves)).collect();
        let layer = self.clone();
        let documents = context.documents.clone();
        let (ids, positions) = (context.ids.shallow_clone(), context.positions.shallow_clone());
        let rotation = context.rotation.map(Rotation::shallow_clone);
        let Context { kind, dropout_seed, tile, .. } = *context;
        let balance = context.balance.cloned();
        let (reads, fills) = (self.attention.reads(), self.attention.fills());
        let read = reads.map(|slot| handed_on.of(slot));
        let inputs: Vec<&Tensor> = [h].into_iter().chain(read.iter().flatten()).chain(context.input).collect();
        let outputs = ops::recompute(&inputs, &trained, offload, move |inputs| {
            let (h, mut rest) = inputs.split_first().expect("the stream");
            let mut handed_on = HandedOn::default();
            if let (Some(slot), [keys, values, others @ ..]) = (reads, rest) {
                handed_on.put(slot, [keys, values]);
                rest = others;
            }
            let context = Context {
                documents: &documents,
                ids: &ids,
                positions: &positions,
                rotation: rotation.as_ref(),
                input: rest.first(),
                kind,
                dropout_seed,
                balance: balance.as_ref(),
                tile,
            };
            let h = layer.forward(h, &context, &mut handed_on, None);
            [h].into_iter().chain(fills.into_iter().flat_map(|slot| handed_on.of(slot))).collect()
        });
        if let (Some(slot), [_, keys, values]) = (fills, &outputs[..]) {
            handed_on.put(slot, [keys, values]);
        }
        outputs.into_iter().next().expect("the stream")
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
        let ending = self.input.iter().flat_map(LayerInput::linears).collect();
        [self.attention.linears(), self.feed_forward.linears(), ending].concat()
    }

    /// Linears in checkpoint order.
    pub(super) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mut all = self.attention.linears_mut();
        all.extend(self.feed_forward.linears_mut());
        all.extend(self.input.iter_mut().flat_map(LayerInput::linears_mut));
        all
    }

    /// Norms whose own numbers can be trained.
    pub(super) fn norms(&self) -> Vec<&Norm> {
        let around: Vec<&Norm> = match &self.residual {
            Residual::Sequential { attention, feed_forward, .. } => {
                [&attention.before, &attention.after, &feed_forward.before, &feed_forward.after]
                    .into_iter()
                    .flatten()
                    .collect()
            }
            Residual::Parallel { norm, feed_forward_norm } => [norm].into_iter().chain(feed_forward_norm).collect(),
            Residual::Streams { .. } => Vec::new(),
        };
        [around, self.attention.norms()].concat()
    }

    /// Norms whose own numbers can be trained.
    pub(super) fn norms_mut(&mut self) -> Vec<&mut Norm> {
        let mut all: Vec<&mut Norm> = match &mut self.residual {
            Residual::Sequential { attention, feed_forward, .. } => {
                let around = [attention, feed_forward].into_iter().flat_map(|half| [&mut half.before, &mut half.after]);
                around.flatten().collect()
            }
            Residual::Parallel { norm, feed_forward_norm } => [norm].into_iter().chain(feed_forward_norm).collect(),
            Residual::Streams { .. } => Vec::new(),
        };
        all.extend(self.attention.norms_mut());
        all
    }

    /// An empty cache for `sequences` sequences, unless this block reads that of another.
    pub(super) fn cache(&self, sequences: i64, options: (Kind, Device)) -> Option<LayerCache> {
        self.attention.reads().is_none().then(|| self.attention.cache(sequences, options))
    }
}

impl Around {
    pub(super) fn load(spec: &spec::Around, read: &Reader<'_>) -> Result<Self> {
        Ok(Self { before: read.optional_norm(spec.before.as_ref())?, after: read.optional_norm(spec.after.as_ref())? })
    }

    /// What `half` gives for `h` (T, D), both norms around it.
    pub(super) fn around(&self, h: &Tensor, half: impl FnOnce(Stream<'_>) -> Tensor) -> Tensor {
        let (h, norm) = Norm::ahead(self.before.as_ref(), h);
        let y = half(Stream { h: &h, norm, residual: None });
        match &self.after {
            Some(norm) => norm.apply(&y),
            None => y,
        }
    }

    /// The stream `h` (T, D) with what `half` gives added: in one go where nothing comes between.
    fn add(&self, h: &Tensor, multiplier: f64, half: impl FnOnce(Stream<'_>) -> Tensor) -> Tensor {
        if self.after.is_none() && multiplier == 1.0 {
            let (input, norm) = Norm::ahead(self.before.as_ref(), h);
            return half(Stream { h: &input, norm, residual: Some(h) });
        }
        let y = self.around(h, half);
        if multiplier == 1.0 { h + y } else { h + y * multiplier }
    }
}
