//! `engraft codes`: tensors quantised and made whole again, for comparing engraft with other programs: the numbers, and the speed.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::Instant;

use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::loading;
use crate::cli::{Codes, Quantizing};
use crate::quant::four_bit::Absmax;
use crate::quant::{Form, FourBit, Int8};
use crate::weights::Checkpoint;
use crate::weights::writer::{self, TensorSpec};
use crate::{Error, Fault, Result};

/// Runs the verb: of each tensor `NAME.codes`, `NAME.absmax` (`NAME.nested_absmax` and `NAME.nested_offset` where scales are quantised,
/// too) and the numbers they stand for, `NAME.bf16`, `NAME.fp16`, `NAME.fp32`; or the seconds that all of it takes, as one JSON object.
pub fn run(arguments: &Codes, out: &mut dyn Write) -> Result<()> {
    loading::use_cpu(arguments.threads);
    let checkpoint = Checkpoint::open_file(&arguments.tensors)?;
    let tensors = checkpoint.names().into_iter().map(|name| Ok((name, own(&checkpoint, name)?)));
    let tensors = tensors.collect::<Result<Vec<(&str, Tensor)>>>()?;
    let Quantizing { block_size, no_double_quant, .. } = arguments.quantizing;
    let form = arguments.form.with(block_size.into(), !no_double_quant);
    if !matches!(form, Form::FourBit { .. } | Form::Int8) {
        return Err(Error::Recipe(vec![Fault::new("--type", "is not a form of bitsandbytes: write nf4, fp4 or int8")]));
    }
    if let Some(path) = &arguments.out {
        let parts: Vec<(String, Tensor)> = tensors
            .iter()
            .flat_map(|(name, tensor)| {
                parts(form, tensor).into_iter().map(move |(part, t)| (format!("{name}.{part}"), t))
            })
            .collect();
        let specs: Vec<TensorSpec> = parts.iter().map(|(name, tensor)| TensorSpec::of(name, tensor)).collect();
        writer::write(path, &specs, &BTreeMap::new(), |index| Ok(parts[index].1.shallow_clone()))?;
    }
    let Some(repeat) = arguments.repeat else { return Ok(()) };
    let numbers: usize = tensors.iter().map(|(_, tensor)| tensor.numel()).sum();
    let mut all = json!({"numbers": numbers, "quantise": [], "dequantise": [], "copy": []});
    for _ in 0..repeat {
        for (_, tensor) in &tensors {
            let quantised = Stored::of(form, tensor);
            let mut timed = |what: &str, run: &dyn Fn() -> Tensor| {
                let began = Instant::now();
                drop(run());
                if let Some(seconds) = all[what].as_array_mut() {
                    seconds.push(json!(began.elapsed().as_secs_f64()));
                }
            };
            timed("quantise", &|| Stored::of(form, tensor).codes());
            timed("dequantise", &|| quantised.numbers());
            timed("copy", &|| tensor.copy());
        }
    }
    writeln!(out, "{all}").map_err(|error| Error::Output(Fault::new("standard output", error)))
}

/// A tensor in the type it is stored in.
fn own(checkpoint: &Checkpoint, name: &str) -> Result<Tensor> {
    let kind = match checkpoint.stored_as(name) {
        Some("BF16") => Kind::BFloat16,
        Some("F16") => Kind::Half,
        _ => Kind::Float,
    };
    checkpoint.tensor(name, kind, Device::Cpu)
}

/// What is stored of a weight.
enum Stored {
    FourBit(FourBit),
    Int8(Int8),
}

impl Stored {
    fn of(form: Form, weight: &Tensor) -> Self {
        match form {
            Form::FourBit { code, block, double_quant } => {
                Self::FourBit(FourBit::of(weight, code, block, double_quant))
            }
            Form::Int8 => Self::Int8(Int8::of(weight)),
            Form::Fp8 | Form::Stored(_) => unreachable!("refused when the command begins"),
        }
    }

    fn codes(&self) -> Tensor {
        match self {
            Self::FourBit(weight) => weight.codes.shallow_clone(),
            Self::Int8(weight) => weight.codes.shallow_clone(),
        }
    }

    fn numbers(&self) -> Tensor {
        match self {
            Self::FourBit(weight) => weight.dequantised(),
            Self::Int8(weight) => weight.dequantised(),
        }
    }

    /// The numbers of a weight of another type with the same codes and scales.
    fn numbers_in(&mut self, kind: Kind) -> Tensor {
        match self {
            Self::FourBit(weight) => (weight.stored, weight.kind) = (kind, kind),
            Self::Int8(weight) => weight.kind = kind,
        }
        self.numbers()
    }
}

fn parts(form: Form, tensor: &Tensor) -> Vec<(&'static str, Tensor)> {
    let mut stored = Stored::of(form, tensor);
    let mut all = vec![("codes", stored.codes())];
    match &stored {
        Stored::FourBit(FourBit { absmax: Absmax::Plain(absmax), .. }) | Stored::Int8(Int8 { absmax, .. }) => {
            all.push(("absmax", absmax.shallow_clone()));
        }
        Stored::FourBit(FourBit { absmax: Absmax::Nested { codes, absmax, offset, .. }, .. }) => {
            all.push(("absmax", codes.shallow_clone()));
            all.push(("nested_absmax", absmax.shallow_clone()));
            all.push(("nested_offset", Tensor::from_slice(&[*offset])));
        }
    }
    for (name, kind) in [("bf16", Kind::BFloat16), ("fp16", Kind::Half), ("fp32", Kind::Float)] {
        all.push((name, stored.numbers_in(kind).contiguous()));
    }
    all
}
