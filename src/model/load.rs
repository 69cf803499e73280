//! Reads weights by their spec; [`super::ModelSpec::prove`] has proved that they are there in their shapes.

use std::cell::RefCell;
use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::linear::{Linear, Weight};
use super::names::Names;
use super::sites::expert;
use super::spec::{ExpertLinear, LinearSpec, NormKind, NormSpec, Stored};
use crate::ops::Norm;
use crate::quant::{Digest, Quantised, Scheme};
use crate::weights::Checkpoint;
use crate::{Error, Fault, Result};

/// Where weights come from and what they become.
pub(super) struct Reader<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) names: &'a Names,
    pub(super) kind: Kind,
    pub(super) device: Device,
    /// How the weights of linears are kept; as plain numbers where there is none.
    pub(super) scheme: Option<&'a Scheme>,
    /// Whether the checkpoint has weights in the scheme's form, which are kept as they are.
    pub(super) stored: bool,
    /// Fingerprints of the linears' quantised weights, by module.
    pub(super) digests: &'a RefCell<BTreeMap<String, Digest>>,
    /// Called after each tensor with its numbers.
    pub(super) read: &'a dyn Fn(u64),
}

impl Reader<'_> {
    /// In the model's number type; of the numbers that a scheme's type leaves of what is stored, where there is a scheme.
    pub(super) fn tensor(&self, name: &str) -> Result<Tensor> {
        Ok(self.rounded(name)?.to_kind(self.kind))
    }

    /// In the scheme's number type, where there is a scheme.
    fn rounded(&self, name: &str) -> Result<Tensor> {
        self.tensor_as(name, self.scheme.map_or(self.kind, |scheme| scheme.kind))
    }

    /// In fp32, for what is computed in it.
    pub(super) fn wide(&self, name: &str) -> Result<Tensor> {
        self.tensor_as(name, Kind::Float)
    }

    pub(super) fn tensor_as(&self, name: &str, kind: Kind) -> Result<Tensor> {
        let tensor = self.checkpoint.tensor(&self.names.stored(name), kind, self.device)?;
        (self.read)(tensor.numel() as u64);
        Ok(tensor)
    }

    /// Whole numbers from 0 on, below `limit`.
    ///
    /// Errors: [`Error::Model`] for a number that is not, and for a table of other numbers.
    pub(super) fn table(&self, name: &str, limit: i64) -> Result<Tensor> {
        let stored = self.names.stored(name);
        if self.checkpoint.whole_kind(&stored).is_none() {
            let found = self.checkpoint.stored_as(&stored).unwrap_or("nothing");
            let what = format!("is stored as {found}; whole numbers expected");
            return Err(Error::Model(Fault::new(stored, what).hint("fetch the model again")));
        }
        let table = self.tensor_as(name, Kind::Int64)?;
        let wrong = table.lt(0).logical_or(&table.ge(limit));
        if table.numel() > 0 && wrong.any().int64_value(&[]) != 0 {
            let found = table.masked_select(&wrong).int64_value(&[0]);
            let what = format!("holds {found}; a whole number from 0 to {} expected", limit - 1);
            let fault = Fault::new(stored, what);
            return Err(Error::Model(fault.hint("config.json and the weights do not belong together")));
        }
        Ok(table)
    }

    pub(super) fn linear(&self, spec: &LinearSpec) -> Result<Linear> {
        let name = self.names.module(&spec.name);
        let weight = self.weight(&name, &format!("{}.weight", spec.name))?;
        let bias = if spec.bias { Some(self.tensor(&format!("{}.bias", spec.name))?) } else { None };
        Ok(Linear { name, weight, trained: None, bias, adapter: None })
    }

    /// A linear whose weight is never quantised: in fp32 as it is stored where it is `wide`.
    pub(super) fn linear_unquantised(&self, spec: &LinearSpec, wide: bool) -> Result<Linear> {
        let read = |name: String| if wide { self.wide(&name) } else { self.tensor(&name) };
        let weight = Weight::Dense(read(format!("{}.weight", spec.name))?);
        let bias = if spec.bias { Some(read(format!("{}.bias", spec.name))?) } else { None };
        Ok(Linear { name: self.names.module(&spec.name), weight, trained: None, bias, adapter: None })
    }

    /// The weight of a linear as the scheme keeps it: one tensor is whole at a time.
    pub(super) fn weight(&self, module: &str, name: &str) -> Result<Weight> {
        if let Some(scheme) = self.scheme.filter(|_| self.stored)
            && let Some(stored) = self.checkpoint.quantised(&self.names.stored(name), scheme.kind, self.device)?
        {
            (self.read)(stored.size().iter().product::<i64>() as u64);
            return Ok(self.noted(module, scheme.store(stored, self.kind)));
        }
        self.kept(module, self.rounded(name)?)
    }

    fn noted(&self, module: &str, (weight, digest): (Weight, Digest)) -> Weight {
        self.digests.borrow_mut().insert(module.to_string(), digest);
        weight
    }

    fn kept(&self, module: &str, tensor: Tensor) -> Result<Weight> {
        let Some(scheme) = self.makes(module) else { return Ok(Weight::Dense(tensor.to_kind(self.kind))) };
        scheme.form.holds(module, &tensor)?;
        Ok(self.noted(module, scheme.keep(&tensor, self.kind)))
    }

    /// The scheme, where it quantises a module's weight as it is read: what a base that is stored quantised has left as it was stays so.
    fn makes(&self, module: &str) -> Option<&Scheme> {
        self.scheme.filter(|scheme| !self.stored && !scheme.skips(module))
    }

    /// One linear of every expert: (E, out, in), whatever the checkpoint has. Tensors stored apart are quantised, or put in place, one by
    /// one: only one is whole at a time.
    pub(super) fn experts(&self, spec: &ExpertLinear) -> Result<Linear> {
        let ExpertLinear { name, experts, input, output, .. } = spec;
        if let Some(weight) = self.stored_experts(spec)? {
            let bias = match spec.stored {
                Stored::Apart if spec.bias => {
                    let each = (0..*experts).map(|number| self.tensor(&format!("{}.bias", expert(name, number))));
                    Some(Tensor::stack(&each.collect::<Result<Vec<Tensor>>>()?, 0))
                }
                _ => spec.bias.then(|| self.tensor(&format!("{name}_bias"))).transpose()?,
            };
            return Ok(Linear { name: self.names.module(name), weight, trained: None, bias, adapter: None });
        }
        let module = self.names.module(name);
        let (weight, bias) = match spec.stored {
            Stored::Apart => {
                let each = |end: &str, number| self.rounded(&format!("{}.{end}", expert(name, number)));
                let gather = |end: &str, shape: &[i64]| -> Result<Tensor> {
                    let all = Tensor::empty(shape, (self.kind, self.device));
                    for number in 0..*experts {
                        all.select(0, number).copy_(&each(end, number)?);
                    }
                    Ok(all)
                };
                let weight = match self.makes(&module) {
                    Some(scheme) => {
                        let quantised = |number| -> Result<Quantised> {
                            let weight = each("weight", number)?;
                            scheme.form.holds(&expert(name, number), &weight)?;
                            Ok(scheme.quantised(&weight))
                        };
                        let all = (0..*experts).map(quantised).collect::<Result<Vec<_>>>()?;
                        self.noted(&module, scheme.store(Quantised::Experts(all), self.kind))
                    }
                    None => Weight::Dense(gather("weight", &[*experts, *output, *input])?),
                };
                (weight, spec.bias.then(|| gather("bias", &[*experts, *output])).transpose()?)
            }
            Stored::Together | Stored::Transposed { .. } => {
                let weight = self.rounded(name)?;
                let weight = if spec.stored == Stored::Together { weight } else { weight.transpose(1, 2).contiguous() };
                let weight = self.kept(&module, weight)?;
                (weight, spec.bias.then(|| self.tensor(&format!("{name}_bias"))).transpose()?)
            }
        };
        Ok(Linear { name: module, weight, trained: None, bias, adapter: None })
    }

    /// The weights of all experts as they are stored, where the scheme keeps them so.
    fn stored_experts(&self, spec: &ExpertLinear) -> Result<Option<Weight>> {
        let Some(scheme) = self.scheme.filter(|_| self.stored) else { return Ok(None) };
        let read = |name: &str| self.checkpoint.quantised(&self.names.stored(name), scheme.kind, self.device);
        let found = match spec.stored {
            Stored::Apart => {
                let each = (0..spec.experts).map(|number| read(&format!("{}.weight", expert(&spec.name, number))));
                // One that is stored as plain numbers makes all of them such.
                each.collect::<Result<Option<Vec<Quantised>>>>()?.map(Quantised::Experts)
            }
            Stored::Together | Stored::Transposed { .. } => read(&spec.name)?,
        };
        let found = found.inspect(|stored| (self.read)(stored.size().iter().product::<i64>() as u64));
        let module = self.names.module(&spec.name);
        Ok(found.map(|stored| self.noted(&module, scheme.store(stored, self.kind))))
    }

    /// Norms compute in fp32, so their weights are kept in it: `1 + w` would not survive in bf16.
    pub(super) fn norm(&self, spec: &NormSpec) -> Result<Norm> {
        let weights: Vec<Tensor> = spec.weights.iter().map(|name| self.wide(name)).collect::<Result<_>>()?;
        let width = spec.shape.last().copied().unwrap_or(0);
        let weight = match weights[..] {
            [] => Tensor::ones([1, width], (Kind::Float, self.device)),
            _ => Tensor::cat(&weights, 0).view([-1, width]), // (P, D)
        };
        let offset = if spec.kind == NormKind::RmsOffset { 1.0 } else { 0.0 };
        Ok(Norm {
            name: spec.module().map(|name| self.names.module(name)).unwrap_or_default(),
            weight: if offset == 0.0 { weight } else { weight + offset },
            offset,
            trained: None,
            bias: spec.bias.as_ref().map(|name| self.wide(name)).transpose()?,
            eps: spec.eps,
            centred: spec.kind == NormKind::Layer,
        })
    }

    /// The one number of a tensor (1), rounded to the model's number type.
    pub(super) fn number(&self, name: &str) -> Result<f64> {
        Ok(self.tensor(name)?.double_value(&[0]))
    }

    pub(super) fn optional_norm(&self, spec: Option<&NormSpec>) -> Result<Option<Norm>> {
        spec.map(|spec| self.norm(spec)).transpose()
    }
}
