//! `engraft logits`: the logits of given token ids, for comparing engraft with other programs.

use std::collections::BTreeMap;

use tch::Tensor;

use super::console::Console;
use super::loading;
use crate::cli::Logits;
use crate::model::{Documents, Forward};
use crate::weights::writer::{self, TensorSpec};
use crate::{Error, Fault, Result};

/// Runs the verb: every position's logits (T, V) in fp32, as the tensor `logits` of a safetensors file.
pub fn run(arguments: &Logits) -> Result<()> {
    loading::use_cpu(None);
    let loaded = loading::chosen(&arguments.model, &Console::new(false))?;
    let vocabulary = loaded.model.spec.vocab_size;
    if let Some(id) = arguments.ids.iter().find(|id| i64::from(**id) >= vocabulary) {
        return Err(Error::Data(Fault::new("--ids", format!("{id} is not below the vocabulary of {vocabulary}"))));
    }
    let ids: Vec<i64> = arguments.ids.iter().map(|id| i64::from(*id)).collect();
    let lengths: Vec<i64> = match arguments.lengths[..] {
        [] => vec![ids.len() as i64],
        ref lengths => lengths.iter().map(|length| i64::from(*length)).collect(),
    };
    if lengths.contains(&0) || lengths.iter().sum::<i64>() != ids.len() as i64 {
        let what = format!("{lengths:?} do not add up to the {} ids, or one is 0", ids.len());
        return Err(Error::Data(Fault::new("--lengths", what)));
    }
    let logits = tch::no_grad(|| {
        let model = &loaded.model;
        let positions: Vec<i64> = lengths.iter().flat_map(|length| 0..*length).collect();
        let [ids, positions] = [&ids, &positions].map(|numbers| Tensor::from_slice(numbers).to_device(model.device));
        let ends = lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        });
        let documents = Documents { offsets: std::iter::once(0).chain(ends).collect() };
        model.logits(&model.hidden(&ids, &positions, &documents, Forward::default()))
    });
    let logits = logits.to_device(tch::Device::Cpu);
    let spec = [TensorSpec::of("logits", &logits)];
    writer::write(&arguments.out, &spec, &BTreeMap::new(), |_| Ok(logits.shallow_clone()))
}
