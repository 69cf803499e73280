//! Adapters as GGUF-LoRA, which llama.cpp adds to a base at run time: `x W + alpha / rank * (x A) B`, the rank told from the tensor.

use std::collections::BTreeMap;
use std::path::Path;

use tch::{Kind, Tensor};

use super::{Written, metadata, tensors, text_config};
use crate::adapter::Update;
use crate::model::sites::{Role, expert};
use crate::model::spec::Stored;
use crate::weights::Checkpoint;
use crate::weights::gguf::{self, AdapterFile, Conversion, Described, Quantisation, Written as Value};
use crate::{Error, Fault, Result};

/// The two factors of one GGUF tensor's update.
struct Pair {
    /// GGUF name of the weight.
    name: String,
    /// A (R, in) or (E, R, in).
    a: Tensor,
    /// B (out, R) or (E, out, R), scaled so that `alpha / R` is right.
    b: Tensor,
    /// How B's rows are ordered.
    order: Conversion,
}

/// Writes an adapter as one GGUF file (fp32), whole or not at all; it is called `name`, or without one as its base. `checkpoint` is the base
/// it was trained on; `progress` is called with bytes written so far and in all.
///
/// llama.cpp scales every update by `alpha` over its rank, so other scales (rank-stabilised ones, patterns) are folded into B. What was
/// taken off the base before training is part of the update.
///
/// Errors: what llama.cpp cannot add at run time (DoRA, a head that is the embedding, a family it does not know), with merging as the
/// way out; [`Error::Output`] for a file that cannot be written.
pub fn write_adapter(
    path: &Path,
    name: Option<&str>,
    checkpoint: &Checkpoint,
    updates: &[Update],
    progress: &dyn Fn(u64, u64),
) -> Result<()> {
    let written = Written::of(checkpoint)?;
    let updates: Vec<Update> = updates.iter().map(Update::of_the_original).collect();
    // The first update's own alpha, so that a plain adapter's numbers stay as they are.
    let alpha = updates.first().map_or(1.0, |update| update.scale * update.rank() as f64);
    let alpha = if alpha > 0.0 && alpha.is_finite() { f64::from(alpha as f32) } else { 1.0 };
    let mut pairs = Vec::new();
    for update in &updates {
        pairs.push(pair(&written, checkpoint, update, alpha)?);
    }
    if pairs.is_empty() {
        return Err(Error::Model(Fault::new("the adapter", "holds no update that GGUF could hold")));
    }

    let architecture = written.architecture;
    // The settings are the base's own business; they must only be those of a model that llama.cpp computes.
    metadata::settings(&written.spec, architecture, text_config(&checkpoint.config))?;
    let adapted: Vec<(String, Vec<i64>)> = pairs
        .iter()
        .map(|pair| {
            let mut shape = pair.b.size();
            *shape.last_mut().expect("B has dimensions") = pair.a.size().last().copied().unwrap_or(1);
            (pair.name.clone(), shape)
        })
        .collect();
    let mut metadata = metadata::general(architecture, "adapter", name, checkpoint, metadata::size_label(&adapted));
    metadata.push(("adapter.type".into(), Value::Text("lora".into())));
    metadata.push(("adapter.lora.alpha".into(), Value::F32(alpha as f32)));
    metadata.extend(metadata::stored(super::FileType::F32));

    let format = Quantisation::called("F32");
    let described: Vec<Described> = pairs
        .iter()
        .flat_map(|pair| [("lora_a", &pair.a), ("lora_b", &pair.b)].map(|(end, tensor)| (pair, end, tensor)))
        .map(|(pair, end, tensor)| Described { name: format!("{}.{end}", pair.name), shape: tensor.size(), format })
        .collect();
    let (mut done, total) = (0, described.iter().map(Described::bytes).sum());
    gguf::write(path, &metadata, &described, |index, take| {
        let pair = &pairs[index / 2];
        let (tensor, order) = if index % 2 == 0 { (&pair.a, Conversion::Same) } else { (&pair.b, pair.order) };
        let bytes = gguf::quantise(tensor, format, order, &described[index].name)?;
        done += bytes.len() as u64;
        take(&bytes)?;
        progress(done, total);
        Ok(())
    })
}

/// An update by the names of GGUF.
fn pair(written: &Written, checkpoint: &Checkpoint, update: &Update, alpha: f64) -> Result<Pair> {
    let refused = |what: String| {
        let fault = Fault::new(&update.module, what);
        Error::Model(fault.hint("merge it: a merged model is written as GGUF whatever was trained"))
    };
    let spec = &written.spec;
    if update.lengths.is_some() {
        return Err(refused("is trained with DoRA, which llama.cpp does not add at run time".into()));
    }
    let is_head = [spec.head.name.clone(), spec.names.module(&spec.head.name)].contains(&update.module);
    if is_head && spec.head.tied {
        let what = "is the embedding, too, and llama.cpp would add its update nowhere or in both places";
        return Err(refused(what.into()));
    }
    let (stored, apart) = match &update.role {
        Role::Experts { stored: Stored::Apart, .. } => (format!("{}.weight", expert(&update.module, 0)), true),
        Role::Experts { .. } => (update.module.clone(), false),
        _ => (format!("{}.weight", update.module), false),
    };
    let there = |name: &str| checkpoint.shape(name).is_some();
    let stored = spec.names.stored_as(&stored, there);
    let Some(shape) = checkpoint.shape(&stored) else {
        let what = "is no module of this base";
        return Err(Error::Model(Fault::new(&update.module, what).hint("name the base the adapter was trained on")));
    };
    let (rows, columns) = update.shape();
    if !shape.ends_with(&[rows, columns]) {
        let what = format!("is {shape:?} in this base, but the adapter fits [{rows}, {columns}]");
        return Err(Error::Model(Fault::new(&update.module, what).hint("name the base the adapter was trained on")));
    }
    let Some((name, order, number)) = tensors::named(written.architecture, &spec.names, &stored) else {
        return Err(refused(format!("llama.cpp's {} has no such tensor", written.architecture.name)));
    };
    if apart != number.is_some() {
        return Err(refused("stands for all experts at once, which this base's GGUF form has apart".into()));
    }
    let order = tensors::order(written.architecture, &name, order, rows, written.heads)?;
    let scale = update.scale * update.rank() as f64 / alpha;
    let [a, b] = [&update.a, &update.b].map(|tensor| tensor.detach().to_device(tch::Device::Cpu).to_kind(Kind::Float));
    // As they are, where llama.cpp's own scale is right.
    let b = if (scale - 1.0).abs() < 1e-7 { b } else { b * scale };
    Ok(Pair { name, a: a.contiguous(), b: b.contiguous(), order })
}

/// Reads an adapter that [`write_adapter`], or llama.cpp's converter, wrote for this base.
///
/// Errors: a file that is damaged or no adapter, or one of another architecture; tensors that fit no linear of the base.
pub fn read_adapter(path: &Path, checkpoint: &Checkpoint) -> Result<Vec<Update>> {
    let Written { spec, architecture, heads } = Written::of(checkpoint)?;
    let fault = |what: String| Error::Model(Fault::at(path, what).hint("name the base the adapter was trained on"));
    let linear = |tensor: &str| {
        let gguf = tensor.strip_suffix(".lora_a").or_else(|| tensor.strip_suffix(".lora_b"))?;
        Some((gguf.to_string(), architecture.to_checkpoint(gguf)?))
    };
    let file = AdapterFile::read(path, architecture.name, |tensor, shape| match linear(tensor) {
        Some((gguf, (_, rows))) if tensor.ends_with(".lora_b") && shape.len() == 2 => {
            tensors::order(architecture, &gguf, rows, shape[0], heads)
        }
        _ => Ok(Conversion::Same),
    })?;
    let mut factors: BTreeMap<String, [Option<Tensor>; 2]> = BTreeMap::new();
    for (tensor, numbers) in file.tensors {
        let Some((_, (name, _))) = linear(&tensor) else {
            return Err(fault(format!(
                "{tensor}: no tensor of this name is known for the architecture {}",
                architecture.name
            )));
        };
        factors.entry(name).or_default()[usize::from(tensor.ends_with("_b"))] = Some(numbers);
    }
    let mut updates = Vec::new();
    for site in spec.sites() {
        let parameter = match site.role {
            Role::Experts { stored: Stored::Together | Stored::Transposed { .. }, .. } => site.name.clone(),
            _ => format!("{}.weight", site.name),
        };
        let spelled = spec.names.spec_names(&parameter).collect::<Vec<_>>();
        let found = spelled.iter().chain([&parameter]).find_map(|name| factors.remove(name));
        let Some([a, b]) = found else { continue };
        let (Some(a), Some(b)) = (a, b) else {
            return Err(fault(format!("{}: has one of its two factors", site.name)));
        };
        let rank = b.size().last().copied().unwrap_or(1);
        if rank == 0 {
            return Err(fault(format!("{}: has rank 0", site.name)));
        }
        let scale = if file.alpha == 0.0 { 1.0 } else { file.alpha / rank as f64 };
        let update = Update { module: site.name, role: site.role, a, b, scale, lengths: None, taken: None };
        let shapes = (update.shape(), update.a.size().iter().rev().nth(1).copied());
        if shapes != (site.shape, Some(rank)) {
            let what = format!("{}: fits {:?}, but the base has {:?}", update.module, update.shape(), site.shape);
            return Err(fault(what));
        }
        updates.push(update);
    }
    match factors.keys().next() {
        Some(name) => {
            Err(fault(format!("{} of its updates fit no linear of this base, {name} among them", factors.len())))
        }
        None => Ok(updates),
    }
}
