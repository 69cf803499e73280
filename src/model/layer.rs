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
use crate::ops::{self, Documents, Flow, Norm, Normed, Offload, rope::Rotation};

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
pub(super) struct Stream<'a> {
    /// The stream (T, D).
    pub(super) h: &'a Tensor,
    /// What it reads of it: normed, where there is a norm.
    pub(super) x: Normed,
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
        flow: Flow,
        context: &Context<'_>,
        handed_on: &mut HandedOn,
        cache: Option<&mut LayerCache>,
    ) -> Flow {
        let flow = self.both_halves(flow, context, handed_on, cache);
        let flow = match &self.input {
            Some(input) => Flow::of(input.add(&flow.joined(), context)),
            None => flow,
        };
        match self.scale {
            Some(scale) => Flow::of(flow.joined() * scale),
            None => flow,
        }
    }

    fn both_halves(
        &self,
        flow: Flow,
        context: &Context<'_>,
        handed_on: &mut HandedOn,
        cache: Option<&mut LayerCache>,
    ) -> Flow {
        match &self.residual {
            Residual::Sequential { attention, feed_forward, multiplier } => {
                let attend = |stream: Stream<'_>| self.attention.forward(stream, context, handed_on, cache);
                let flow = attention.add(flow, *multiplier, attend);
                feed_forward.add(flow, *multiplier, |stream| self.feed_forward.forward(stream, context))
            }
            Residual::Parallel { norm, feed_forward_norm } => {
                let (h, x) = flow.normed(Some(norm));
                let (h, own) = match feed_forward_norm {
                    Some(norm) => Flow::of(h).normed(Some(norm)),
                    None => (h, x.clone()),
                };
                let attended = self.attention.forward(Stream { h: &h, x, residual: None }, context, handed_on, cache);
                let stream = Stream { h: &h, x: own, residual: Some(&attended) };
                let given = self.feed_forward.forward(stream, context);
                Flow::with(h, given, 1.0)
            }
            Residual::Streams { attention, feed_forward } => {
                let attend = |stream: Stream<'_>| self.attention.forward(stream, context, handed_on, cache);
                let h = attention.around(&flow.joined(), attend);
                Flow::of(feed_forward.around(&h, |stream| self.feed_forward.forward(stream, context)))
            }
        }
    }

    /// [`Layer::forward`], keeping only what it reads and running again in backward. With `offload` the stream that it reads waits there.
    pub(super) fn forward_recomputed(
        &self,
        flow: Flow,
        context: &Context<'_>,
        handed_on: &mut HandedOn,
        offload: Option<&Offload>,
    ) -> Flow {
        // One tensor is kept, not two.
        let h = flow.joined();
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
        let inputs: Vec<&Tensor> = [&h].into_iter().chain(read.iter().flatten()).chain(context.input).collect();
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
            let h = layer.forward(Flow::of(h.shallow_clone()), &context, &mut handed_on, None).joined();
            [h].into_iter().chain(fills.into_iter().flat_map(|slot| handed_on.of(slot))).collect()
        });
        if let (Some(slot), [_, keys, values]) = (fills, &outputs[..]) {
            handed_on.put(slot, [keys, values]);
        }
        Flow::of(outputs.into_iter().next().expect("the stream"))
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
        let x = self.before.as_ref().map_or_else(|| Normed::from(h), |norm| norm.of(h));
        self.behind(half(Stream { h, x, residual: None }))
    }

    /// The stream with what `half` gives.
    fn add(&self, flow: Flow, multiplier: f64, half: impl FnOnce(Stream<'_>) -> Tensor) -> Flow {
        let (h, x) = flow.normed(self.before.as_ref());
        let given = self.behind(half(Stream { h: &h, x, residual: None }));
        Flow::with(h, given, multiplier)
    }

    fn behind(&self, y: Tensor) -> Tensor {
        match &self.after {
            Some(norm) => norm.apply(&y),
            None => y,
        }
    }
}
