//! How tokens look at each other: built from its spec, walked forward.

mod delta_net;
mod grouped;
mod latent;

use tch::{Device, Kind, Tensor};

use super::cache::LayerCache;
use super::layer::Context;
use super::linear::Linear;
use super::load::Reader;
use super::spec::{self, LayerSpec};
use crate::Result;
use crate::ops::Norm;
use delta_net::DeltaNet;
use grouped::GroupedAttention;
use latent::LatentAttention;

/// Attention with its weights.
#[derive(Debug, Clone)]
pub(super) enum Attention {
    Grouped(Box<GroupedAttention>),
    Latent(Box<LatentAttention>),
    DeltaNet(Box<DeltaNet>),
}

impl Attention {
    pub(super) fn load(spec: &LayerSpec, read: &Reader<'_>) -> Result<Self> {
        match &spec.attention {
            spec::Attention::Grouped(grouped) => {
                Ok(Self::Grouped(Box::new(GroupedAttention::load(grouped, spec, read)?)))
            }
            spec::Attention::Latent(latent) => Ok(Self::Latent(Box::new(LatentAttention::load(latent, spec, read)?))),
            spec::Attention::DeltaNet(net) => Ok(Self::DeltaNet(Box::new(DeltaNet::load(net, read)?))),
        }
    }

    /// What attention gives for the stream `h` (T, D), normed first where `norm` is there; added to `residual` (T, D) if given.
    pub(super) fn forward(
        &self,
        h: &Tensor,
        norm: Option<&Norm>,
        residual: Option<&Tensor>,
        context: &Context<'_>,
        cache: Option<&mut LayerCache>,
    ) -> Tensor {
        match self {
            Self::Grouped(grouped) => grouped.forward(h, norm, residual, context, cache.map(LayerCache::keys_values)),
            Self::Latent(latent) => latent.forward(h, norm, residual, context, cache.map(LayerCache::keys_values)),
            Self::DeltaNet(net) => net.forward(h, norm, residual, context, cache.map(LayerCache::recurrent)),
        }
    }

    /// Linears in checkpoint order.
    pub(super) fn linears(&self) -> Vec<&Linear> {
        match self {
            Self::Grouped(grouped) => grouped.linears(),
            Self::Latent(latent) => latent.linears(),
            Self::DeltaNet(net) => net.linears(),
        }
    }

    /// Linears in checkpoint order.
    pub(super) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        match self {
            Self::Grouped(grouped) => grouped.linears_mut(),
            Self::Latent(latent) => latent.linears_mut(),
            Self::DeltaNet(net) => net.linears_mut(),
        }
    }

    /// An empty cache for `sequences` sequences.
    pub(super) fn cache(&self, sequences: i64, options: (Kind, Device)) -> LayerCache {
        match self {
            Self::Grouped(grouped) => LayerCache::KeysValues(grouped.cache(sequences, options)),
            Self::Latent(latent) => LayerCache::KeysValues(latent.cache(sequences, options)),
            Self::DeltaNet(net) => LayerCache::Recurrent(net.cache(sequences, options)),
        }
    }
}
