//! What several verbs ask models to see what is in a file: an adapter on its base, and the base alone.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use tch::{Device, Kind};

use super::console::{Console, Unit};
use super::loading;
use crate::adapter::{Adapters, LoadedAdapter, Origin};
use crate::data::{Dataset, Encoder, Tokenizer};
use crate::evaluate::{Probes, Said, questions};
use crate::export::probe::Answers;
use crate::model::{Decoder, ModelSpec};
use crate::quant::{Products, Scheme, name_of};
use crate::recipe::{DatasetRecipe, OnBadRow, Plan};
use crate::torch_ext::catching;
use crate::train::free_bytes;
use crate::weights::Checkpoint;
use crate::{Error, Fault, Result};

/// What to ask, and what to compute in.
pub(super) struct Asking {
    pub(super) probes: Probes,
    pub(super) encoder: Encoder,
    pub(super) kind: Kind,
}

impl Asking {
    /// Prompts of the file that was `named`, or those built in; or why nothing is asked: without a tokenizer to ask with, the numbers of
    /// training (`elsewhere` says why), or memory for a model, which takes less in the number type of `training`.
    ///
    /// Errors: where prompts were named.
    pub(super) fn prepare(
        named: Option<&Path>,
        sidecars: &BTreeMap<String, Vec<u8>>,
        spec: &ModelSpec,
        (elsewhere, training): (Option<String>, Kind),
    ) -> Result<std::result::Result<Self, String>> {
        let numbers: i64 = spec.tensors().values().map(|shape| shape.iter().product::<i64>()).sum();
        let encoder = Tokenizer::new(sidecars).map(Arc::new);
        let encoder = encoder.and_then(|tokenizer| Encoder::new(tokenizer, &DatasetRecipe::defaults()));
        let lacks_numbers = elsewhere.is_some();
        let kind = match (elsewhere, &encoder) {
            (Some(why), _) => Err(format!("the adapter {why}")),
            (None, Err(error)) => Err(format!("without a tokenizer: {error}")),
            (None, Ok(_)) => computed_in(numbers as u64, free_bytes(Device::Cpu), training),
        };
        match (kind, encoder) {
            (Ok(kind), Ok(encoder)) => {
                let probes = Probes::new(named, &encoder, spec.max_position_embeddings as usize)?;
                if probes.prompts.is_empty() {
                    return Ok(Err("its template takes none of the prompts".into()));
                }
                Ok(Ok(Self { probes, encoder, kind }))
            }
            (Err(why), _) if named.is_none() => Ok(Err(why)),
            (_, Err(error)) => Err(error),
            (Err(why), Ok(_)) => {
                let fault = Fault::new("--probe", why).hint("leave it out, or say --no-probe");
                Err(if lacks_numbers { Error::Model(fault) } else { Error::Device(fault) })
            }
        }
    }

    /// The base to ask, kept as it was in training (`scheme`); with the scheme that an adapter is put on it by.
    pub(super) fn model(
        &self,
        checkpoint: &Checkpoint,
        spec: &ModelSpec,
        scheme: Option<&Scheme>,
        console: &Console,
    ) -> Result<(Decoder, Option<Scheme>)> {
        let products = if self.kind == Kind::Float { Products::Cached } else { Products::Dequantised };
        let scheme = scheme.map(|scheme| Scheme { products, ..scheme.clone() });
        let model = loading::decoder(checkpoint, spec.clone(), self.kind, Device::Cpu, scheme.as_ref(), console)?;
        Ok((model, scheme))
    }

    /// What the base says, and what it says with the adapter on it; without one it is the trained model itself, and has no base.
    pub(super) fn answers(
        &self,
        checkpoint: &Checkpoint,
        spec: &ModelSpec,
        adapter: Option<&LoadedAdapter>,
        scheme: Option<&Scheme>,
        console: &Console,
    ) -> Result<Answers> {
        let (mut model, scheme) = self.model(checkpoint, spec, scheme, console)?;
        let stage = console.stage("asking the probes", Unit::Things("models"));
        let models = 1 + u64::from(adapter.is_some());
        let record = |model: &Decoder, done: u64| {
            stage.at(done, models);
            catching("asking the probes", || Ok(self.probes.record(model, self.encoder.tokenizer())))
        };
        let base = match adapter {
            Some(adapter) => {
                let said = record(&model, 0)?;
                let origin = Origin { checkpoint, scheme: scheme.as_ref(), start: None, progress: &|_, _| () };
                Adapters::attach_loaded(&mut model, adapter, 0.0, Some(&origin))?;
                Some(said)
            }
            None => None,
        };
        let trained = record(&model, models - 1)?;
        Ok(Answers { probes: self.probes.clone(), trained, base, dtype: name_of(self.kind) })
    }
}

/// What a run's model says before it is trained.
pub(super) struct Begun {
    probes: Probes,
    base: Vec<Said>,
}

/// Rows that are asked beside the prompts built in: of what is trained for, base and trained model are told apart best.
const ROWS: usize = 8;

impl Begun {
    /// Asks the model, before it has adapters: the prompts built in, and some rows of `dataset`.
    pub(super) fn ask(
        model: &Decoder,
        dataset: &Dataset,
        encoder: &Encoder,
        plan: &Plan,
        console: &Console,
    ) -> Result<Self> {
        let context = model.spec.max_position_embeddings as usize;
        let mut probes = Probes::new(None, encoder, context)?;
        let asked = questions(dataset, encoder, context, OnBadRow::Skip)?.asked;
        // An answer to a long prompt takes long, and tells no more.
        let longest = plan.dataset.max_length.try_into().unwrap_or(usize::MAX).min(context);
        probes.add_rows(&asked, ROWS, longest);
        let stage = console.stage("asking the base the probes", Unit::Things("models"));
        stage.at(0, 1);
        let base = catching("asking the base", || Ok(probes.record(model, encoder.tokenizer())))?;
        Ok(Self { probes, base })
    }

    /// Asks it again, trained.
    pub(super) fn ended(self, model: &Decoder, encoder: &Encoder, console: &Console) -> Result<Answers> {
        let Self { probes, base } = self;
        let stage = console.stage("asking the trained model the probes", Unit::Things("models"));
        stage.at(0, 1);
        let trained = catching("asking the trained model", || Ok(probes.record(model, encoder.tokenizer())))?;
        Ok(Answers { probes, trained, base: Some(base), dtype: name_of(model.kind) })
    }
}

/// What two models of so many `numbers`, one after the other, are computed in within `free` bytes: fp32, or the number type of training.
///
/// Errors: what is missing, in a sentence.
pub(super) fn computed_in(numbers: u64, free: Option<u64>, training: Kind) -> std::result::Result<Kind, String> {
    let bytes = |kind: Kind| kind.elt_size_in_bytes() as u64 * numbers;
    let Some(free) = free else { return Ok(Kind::Float) };
    [Kind::Float, training].into_iter().find(|kind| bytes(*kind) <= free).ok_or_else(|| {
        let (needed, free, kind) = (gigabytes(bytes(training)), gigabytes(free), name_of(training));
        format!("the models take {needed:.1} GB each in {kind}, and {free:.1} GB are free")
    })
}

fn gigabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_asked_in_fp32_or_where_that_does_not_fit_in_what_was_trained_in() {
        let of = |free| computed_in(1_000, free, Kind::BFloat16);
        assert_eq!(
            (of(None), of(Some(4_000)), of(Some(3_999))),
            (Ok(Kind::Float), Ok(Kind::Float), Ok(Kind::BFloat16))
        );
        assert_eq!(of(Some(2_000)), Ok(Kind::BFloat16));
        let why = of(Some(1_999)).unwrap_err();
        assert!(why.contains("in bf16"), "{why}");
    }
}
