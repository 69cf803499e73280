//! `engraft codes`: tensors quantised and made whole again, for comparing engraft with other programs: the numbers, and the speed.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::Instant;

use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::loading;
use crate::cli::{Codes, Quantizing};
use crate::ops::cuda;
use crate::quant::four_bit::Absmax;
use crate::quant::{Form, FourBit, Fp8, Int8, Products, Quantised, Scheme};
use crate::recipe::cache_dir;
use crate::weights::Checkpoint;
use crate::weights::writer::{self, TensorSpec};
use crate::{Error, Fault, Result};

/// Runs the verb: of each tensor `NAME.codes`, `NAME.absmax` (`NAME.nested_absmax` and `NAME.nested_offset` where scales are quantised,
/// too) and the numbers they stand for, `NAME.bf16`, `NAME.fp16`, `NAME.fp32`; or the seconds that all of it
/// takes, with kernels and in their plain twins, as one JSON object.
pub fn run(arguments: &Codes, out: &mut dyn Write) -> Result<()> {
    loading::use_cpu(arguments.threads);
    let device = arguments.device.find();
    let device = device.map_err(|fault| Error::Device(Fault { place: "--device".into(), ..fault }))?;
    cuda::prepare(device, &cache_dir(), &|_, _| ())?;
    let checkpoint = Checkpoint::open_file(&arguments.tensors)?;
    let tensors = checkpoint.names().into_iter().map(|name| Ok((name, own(&checkpoint, name, device)?)));
    let tensors = tensors.collect::<Result<Vec<(&str, Tensor)>>>()?;
    let Quantizing { block_size, no_double_quant, .. } = arguments.quantizing;
    let form = arguments.form.with(block_size.into(), !no_double_quant);
    if let Some((name, tensor)) = tensors.iter().find(|(_, tensor)| form == Form::Fp8 && tensor.dim() != 2) {
        let what = format!("is {:?}; fp8 has a scale to each row of a matrix", tensor.size());
        return Err(Error::Model(Fault::new(*name, what)));
    }
    let of = move |tensor: &Tensor| Scheme {
        form,
        kind: tensor.kind(),
        skip: Vec::new(),
        products: Products::Dequantised,
        after_start: false,
    };
    if let Some(path) = &arguments.out {
        let parts: Vec<(String, Tensor)> = tensors
            .iter()
            .flat_map(|(name, tensor)| {
                parts(&of(tensor), tensor)
                    .into_iter()
                    .map(move |(part, t)| (format!("{name}.{part}"), t.to_device(Device::Cpu)))
            })
            .collect();
        let specs: Vec<TensorSpec> = parts.iter().map(|(name, tensor)| TensorSpec::of(name, tensor)).collect();
        writer::write(path, &specs, &BTreeMap::new(), |index| Ok(parts[index].1.shallow_clone()))?;
    }
    let Some(repeat) = arguments.repeat else { return Ok(()) };
    let numbers: usize = tensors.iter().map(|(_, tensor)| tensor.numel()).sum();
    let mut all = json!({"numbers": numbers});
    for _ in 0..repeat {
        for (_, tensor) in &tensors {
            let scheme = of(tensor);
            let quantised = scheme.quantised(tensor);
            let mut timed = |what: &str, run: &dyn Fn()| {
                let began = Instant::now();
                run();
                if let Device::Cuda(index) = device {
                    tch::Cuda::synchronize(index as i64);
                }
                let seconds = json!(began.elapsed().as_secs_f64());
                match all[what].as_array_mut() {
                    Some(others) => others.push(seconds),
                    None => all[what] = json!([seconds]),
                }
            };
            timed("quantise", &|| drop(scheme.quantised(tensor)));
            timed("dequantise", &|| drop(quantised.dequantised()));
            timed("copy", &|| drop(tensor.copy()));
            timed("plain_quantise", &|| drop(form.quantised_plainly(tensor)));
            timed("plain_dequantise", &|| drop(quantised.dequantised_plainly()));
        }
    }
    writeln!(out, "{all}").map_err(|error| Error::Output(Fault::new("standard output", error)))
}

/// A tensor in the type it is stored in, on a device.
fn own(checkpoint: &Checkpoint, name: &str, device: Device) -> Result<Tensor> {
    let kind = match checkpoint.stored_as(name) {
        Some("BF16") => Kind::BFloat16,
        Some("F16") => Kind::Half,
        _ => Kind::Float,
    };
    let tensor = checkpoint.tensor(name, kind, device)?;
    // Rows below one another, as a weight's are.
    Ok(if tensor.dim() > 2 { tensor.flatten(0, -2) } else { tensor })
}

/// What is stored of a weight, and what that stands for in each number type.
fn parts(form: &Scheme, tensor: &Tensor) -> Vec<(&'static str, Tensor)> {
    let mut quantised = form.quantised(tensor);
    let mut all: Vec<(&'static str, Tensor)> = match &quantised {
        Quantised::FourBit(FourBit { codes, absmax: Absmax::Plain(absmax), .. })
        | Quantised::Int8(Int8 { codes, absmax, .. }) => {
            vec![("codes", codes.shallow_clone()), ("absmax", absmax.shallow_clone())]
        }
        Quantised::FourBit(FourBit { codes, absmax: Absmax::Nested { codes: scales, absmax, offset, .. }, .. }) => {
            vec![
                ("codes", codes.shallow_clone()),
                ("absmax", scales.shallow_clone()),
                ("nested_absmax", absmax.shallow_clone()),
                ("nested_offset", Tensor::from_slice(&[*offset])),
            ]
        }
        Quantised::Fp8(Fp8 { codes, scales, .. }) => {
            vec![("codes", codes.shallow_clone()), ("scales", scales.shallow_clone())]
        }
        Quantised::Grouped(_) | Quantised::Mxfp4(_) | Quantised::Experts(_) => {
            unreachable!("a matrix, of a form made here")
        }
    };
    for (name, kind) in [("bf16", Kind::BFloat16), ("fp16", Kind::Half), ("fp32", Kind::Float)] {
        quantised = quantised.of_kind(kind);
        all.push((name, quantised.dequantised().contiguous()));
    }
    all
}
