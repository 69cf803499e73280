//! `engraft logits`: the logits of given token ids, for comparing engraft with other programs.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use super::console::Console;
use super::loading;
use crate::cli::Logits;
use crate::model::{Documents, Forward};
use crate::weights::writer::{self, TensorSpec};
use crate::{Error, Fault, Result};

/// Runs the verb: one document, every position's logits (T, V) in fp32, as the tensor `logits` of a safetensors file.
pub fn run(arguments: &Logits) -> Result<()> {
    loading::use_cpu(None);
    let loaded = loading::chosen(&arguments.model, &Console::new(false))?;
    let vocabulary = loaded.model.spec.vocab_size;
    if let Some(id) = arguments.ids.iter().find(|id| i64::from(**id) >= vocabulary) {
        return Err(Error::Data(Fault::new("--ids", format!("{id} is not below the vocabulary of {vocabulary}"))));
    }
    let ids: Vec<i64> = arguments.ids.iter().map(|id| i64::from(*id)).collect();
    let length = ids.len() as i64;
    let logits = tch::no_grad(|| {
        let model = &loaded.model;
        let positions = Tensor::arange(length, (Kind::Int64, model.device));
        let ids = Tensor::from_slice(&ids).to_device(model.device);
        model.logits(&model.hidden(&ids, &positions, &Documents::one(length), Forward::default()))
    });
    let logits = logits.to_device(tch::Device::Cpu);
    let spec = [TensorSpec::of("logits", &logits)];
    writer::write(&arguments.out, &spec, &BTreeMap::new(), |_| Ok(logits.shallow_clone()))
}
