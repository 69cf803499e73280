//! Reads weights by their spec; [`super::ModelSpec::prove`] has proved that they are there in their shapes.

use tch::{Device, Kind, Tensor};

use super::linear::{Linear, Weight};
use super::names::Names;
use super::spec::{LinearSpec, NormKind, NormSpec};
use crate::Result;
use crate::ops::Norm;
use crate::weights::Checkpoint;

/// Where weights come from and what they become.
pub(super) struct Reader<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) names: &'a Names,
    pub(super) kind: Kind,
    pub(super) device: Device,
    /// Called after each tensor with its numbers.
    pub(super) read: &'a dyn Fn(u64),
}

impl Reader<'_> {
    /// In the model's number type.
    pub(super) fn tensor(&self, name: &str) -> Result<Tensor> {
        self.tensor_as(name, self.kind)
    }

    fn tensor_as(&self, name: &str, kind: Kind) -> Result<Tensor> {
        let tensor = self.checkpoint.tensor(&self.names.stored(name), kind, self.device)?;
        (self.read)(tensor.numel() as u64);
        Ok(tensor)
    }

    pub(super) fn linear(&self, spec: &LinearSpec) -> Result<Linear> {
        let weight = self.tensor(&format!("{}.weight", spec.name))?;
        let bias = if spec.bias { Some(self.tensor(&format!("{}.bias", spec.name))?) } else { None };
        Ok(Linear { name: self.names.module(&spec.name), weight: Weight::Dense(weight), bias, adapter: None })
    }

    /// Norms compute in fp32, so their weights are kept in it: `1 + w` would not survive in bf16.
    pub(super) fn norm(&self, spec: &NormSpec) -> Result<Norm> {
        let weights: Vec<Tensor> =
            spec.weights.iter().map(|name| self.tensor_as(name, Kind::Float)).collect::<Result<_>>()?;
        let width = spec.shape.last().copied().unwrap_or(0);
        let weight = Tensor::cat(&weights, 0).view([-1, width]); // (P, D)
        Ok(Norm {
            weight: if spec.kind == NormKind::RmsOffset { weight + 1.0 } else { weight },
            bias: spec.bias.as_ref().map(|name| self.tensor_as(name, Kind::Float)).transpose()?,
            eps: spec.eps,
            centred: spec.kind == NormKind::Layer,
        })
    }

    pub(super) fn optional_norm(&self, spec: Option<&NormSpec>) -> Result<Option<Norm>> {
        spec.map(|spec| self.norm(spec)).transpose()
    }
}
