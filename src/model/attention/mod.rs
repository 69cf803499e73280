//! How tokens look at each other: built from its spec, walked forward.

mod compressed;
mod compressor;
mod delta_net;
mod grouped;
mod latent;

use tch::{Device, Kind, Tensor};

use super::cache::LayerCache;
use super::layer::{Context, Stream};
use super::linear::Linear;
use super::load::Reader;
use super::spec::{self, LayerSpec};
use crate::Result;
use crate::ops::{Norm, flash_takes};
use compressed::CompressedAttention;
use delta_net::DeltaNet;
use grouped::GroupedAttention;
use latent::LatentAttention;

pub(super) use compressor::Compressor;

impl LayerSpec {
    /// What of its attention no fused kernel for GPUs takes, in numbers of `kind`: it is computed in plain products there.
    pub fn plain_on_gpu(&self, kind: Kind) -> Option<String> {
        let (head, sinks, soft_cap) = match &self.attention {
            spec::Attention::Grouped(grouped) => (grouped.head_size, grouped.sinks.is_some(), grouped.soft_cap),
            spec::Attention::Latent(latent) => (latent.unrotated + latent.rotated, false, None),
            spec::Attention::Compressed(compressed) => (compressed.head_size, true, None),
            spec::Attention::DeltaNet(_) => return None,
        };
        let alibi = matches!(self.position, spec::Position::Alibi { .. });
        let of_scores = [(sinks, "attention sinks"), (soft_cap.is_some(), "soft-capped scores"), (alibi, "ALiBi")];
        match of_scores.iter().find(|(there, _)| *there) {
            Some((_, what)) => Some((*what).to_owned()),
            None if kind == Kind::Float => Some("fp32".to_owned()),
            None if !flash_takes(kind, head) => Some(format!("heads of {head} elements")),
            None => None,
        }
    }
}

/// Keys and values that blocks hand on to later ones, by slot: (T, K, H) each, rotated, of the tokens of this forward.
#[derive(Debug, Default)]
pub(super) struct HandedOn(Vec<Option<[Tensor; 2]>>);

impl HandedOn {
    pub(super) fn put(&mut self, slot: usize, keys_values: [&Tensor; 2]) {
        if self.0.len() <= slot {
            self.0.resize_with(slot + 1, || None);
        }
        self.0[slot] = Some(keys_values.map(Tensor::shallow_clone));
    }

    /// Of a slot that an earlier block has filled: families see to it.
    pub(super) fn of(&self, slot: usize) -> [Tensor; 2] {
        let found = self.0.get(slot).and_then(Option::as_ref).expect("an earlier block fills the slot");
        found.each_ref().map(Tensor::shallow_clone)
    }
}

/// Attention with its weights.
#[derive(Debug, Clone)]
pub(super) enum Attention {
    Grouped(Box<GroupedAttention>),
    Latent(Box<LatentAttention>),
    DeltaNet(Box<DeltaNet>),
    Compressed(Box<CompressedAttention>),
}

impl Attention {
    pub(super) fn load(spec: &LayerSpec, read: &Reader<'_>) -> Result<Self> {
        match &spec.attention {
            spec::Attention::Grouped(grouped) => {
                Ok(Self::Grouped(Box::new(GroupedAttention::load(grouped, spec, read)?)))
            }
            spec::Attention::Latent(latent) => Ok(Self::Latent(Box::new(LatentAttention::load(latent, spec, read)?))),
            spec::Attention::DeltaNet(net) => Ok(Self::DeltaNet(Box::new(DeltaNet::load(net, read)?))),
            spec::Attention::Compressed(compressed) => {
                Ok(Self::Compressed(Box::new(CompressedAttention::load(compressed, spec, read)?)))
            }
        }
    }

    /// What attention gives for the stream.
    pub(super) fn forward(
        &self,
        stream: Stream<'_>,
        context: &Context<'_>,
        handed_on: &mut HandedOn,
        cache: Option<&mut LayerCache>,
    ) -> Tensor {
        match self {
            Self::Grouped(grouped) => grouped.forward(stream, context, handed_on, cache.map(LayerCache::keys_values)),
            Self::Latent(latent) => latent.forward(stream, context, cache.map(LayerCache::keys_values)),
            Self::DeltaNet(net) => net.forward(stream, context, cache.map(LayerCache::recurrent)),
            Self::Compressed(compressed) => compressed.forward(stream, context, cache.map(LayerCache::compressed)),
        }
    }

    /// The slot that this block fills for later ones.
    pub(super) fn fills(&self) -> Option<usize> {
        match self {
            Self::Grouped(grouped) => grouped.hands_on,
            Self::Latent(_) | Self::DeltaNet(_) | Self::Compressed(_) => None,
        }
    }

    /// The slot that this block reads instead of having keys and values, and a cache, of its own.
    pub(super) fn reads(&self) -> Option<usize> {
        match self {
            Self::Grouped(grouped) => grouped.reads(),
            Self::Latent(_) | Self::DeltaNet(_) | Self::Compressed(_) => None,
        }
    }

    /// Linears in checkpoint order.
    pub(super) fn linears(&self) -> Vec<&Linear> {
        match self {
            Self::Grouped(grouped) => grouped.linears(),
            Self::Latent(latent) => latent.linears(),
            Self::DeltaNet(net) => net.linears(),
            Self::Compressed(compressed) => compressed.linears(),
        }
    }

    /// Linears in checkpoint order.
    pub(super) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        match self {
            Self::Grouped(grouped) => grouped.linears_mut(),
            Self::Latent(latent) => latent.linears_mut(),
            Self::DeltaNet(net) => net.linears_mut(),
            Self::Compressed(compressed) => compressed.linears_mut(),
        }
    }

    /// Norms whose own numbers can be trained.
    pub(super) fn norms(&self) -> Vec<&Norm> {
        match self {
            Self::Grouped(grouped) => grouped.norms(),
            Self::Latent(_) | Self::DeltaNet(_) | Self::Compressed(_) => Vec::new(),
        }
    }

    /// Norms whose own numbers can be trained.
    pub(super) fn norms_mut(&mut self) -> Vec<&mut Norm> {
        match self {
            Self::Grouped(grouped) => grouped.norms_mut(),
            Self::Latent(_) | Self::DeltaNet(_) | Self::Compressed(_) => Vec::new(),
        }
    }

    /// An empty cache for `sequences` sequences.
    pub(super) fn cache(&self, sequences: i64, options: (Kind, Device)) -> LayerCache {
        match self {
            Self::Grouped(grouped) => LayerCache::KeysValues(grouped.cache(sequences, options)),
            Self::Latent(latent) => LayerCache::KeysValues(latent.cache(sequences, options)),
            Self::DeltaNet(net) => LayerCache::Recurrent(net.cache(sequences, options)),
            Self::Compressed(compressed) => LayerCache::Compressed(compressed.cache(sequences, options)),
        }
    }
}
