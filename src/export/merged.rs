//! `merged/`: the base with its adapter folded in, as transformers' `save_pretrained` lays out a model.
//!
//! The base is read from its checkpoint again, tensor by tensor, so writing peaks at one tensor and never needs a second model.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tch::{Device, Kind};

use super::folder::Staging;
use super::peft::tokenizer_file;
use crate::adapter::Update;
use crate::adapter::merge::merged;
use crate::model::families;
use crate::weights::Checkpoint;
use crate::weights::writer::{self, SHARD_BYTES, TensorSpec};
use crate::{Error, Fault, Result};

/// Writes the merged model into `folder`, whole or not at all; an earlier one is replaced.
///
/// Tensors keep the checkpoint's names (those of transformers for a GGUF) and are stored as `kind`, also where the base is
/// quantised (its scales and its `quantization_config` are gone then), in shards of 5 GB. A head
/// that shares the embedding's weight is not stored, unless an update targets it: then both are stored and the config says they
/// are no longer tied. `sidecars` come from [`super::sidecars`]; `progress` is called with bytes written so far and in all.
///
/// Errors: an update that does not fit the base, a merged value that `kind` cannot hold, what the checkpoint finds damaged;
/// [`Error::Output`] for a folder that cannot be written or is the base's own.
pub fn write(
    folder: &Path,
    checkpoint: &Checkpoint,
    updates: &[Update],
    kind: Kind,
    sidecars: &BTreeMap<String, Vec<u8>>,
    progress: &dyn Fn(u64, u64),
) -> Result<()> {
    refuse_base(folder, checkpoint)?;
    let plan = Plan::new(checkpoint, updates)?;
    let specs: Vec<TensorSpec> =
        plan.tensors.iter().map(|t| TensorSpec { name: t.name.clone(), kind, shape: t.shape.clone() }).collect();
    let bytes = |spec: &TensorSpec| spec.shape.iter().product::<i64>() as u64 * kind.elt_size_in_bytes() as u64;
    let (mut done, total) = (0, specs.iter().map(bytes).sum());

    let ours = |name: &str| {
        let weights = name.starts_with("model") && (name.ends_with(".safetensors") || name.ends_with(".index.json"));
        weights || sidecars.contains_key(name) || tokenizer_file(name) || OURS.contains(&name)
    };
    let staging = Staging::create(folder, ours)?;
    writer::write_model(staging.path(), &specs, SHARD_BYTES, |index| {
        let planned = &plan.tensors[index];
        let mut tensor = checkpoint.tensor(planned.from, kind, Device::Cpu)?;
        if let Some(update) = planned.update {
            tensor = merged(&tensor, update)?;
        }
        done += bytes(&specs[index]);
        progress(done, total);
        Ok(tensor)
    })?;
    for (name, bytes) in sidecars.iter().filter(|(name, _)| *name != "config.json") {
        writer::write_file(&staging.path().join(name), bytes)?;
    }
    let config = config(&checkpoint.config, kind, plan.unties);
    writer::write_file(&staging.path().join("config.json"), format!("{config:#}\n").as_bytes())?;
    staging.commit()
}

const OURS: [&str; 3] = ["config.json", "generation_config.json", "README.md"];

/// What is stored.
struct Plan<'a> {
    tensors: Vec<Planned<'a>>,
    /// Whether the head stops sharing the embedding's weight.
    unties: bool,
}

struct Planned<'a> {
    name: String,
    /// The checkpoint's tensor it is made of.
    from: &'a str,
    shape: Vec<i64>,
    update: Option<&'a Update>,
}

impl<'a> Plan<'a> {
    fn new(checkpoint: &'a Checkpoint, updates: &'a [Update]) -> Result<Self> {
        let spec = families::spec(checkpoint)?;
        let head = format!("{}.weight", spec.head.name);
        let mut by_weight: BTreeMap<String, &Update> =
            updates.iter().map(|update| (format!("{}.weight", update.module), update)).collect();
        let unties = spec.head.tied && by_weight.contains_key(&head);
        let mut tensors = Vec::new();
        for from in checkpoint.names() {
            // A checkpoint may store the shared weight a second time; the embedding's is the one that is used.
            if spec.head.tied && from == head {
                continue;
            }
            let shape = checkpoint.shape(from).unwrap_or_default();
            tensors.push(Planned {
                name: from.to_string(),
                from,
                shape: shape.clone(),
                update: by_weight.remove(from),
            });
            if unties && from == spec.embedding.weight {
                tensors.push(Planned { name: head.clone(), from, shape, update: by_weight.remove(&head) });
            }
        }
        if let Some(update) = by_weight.values().next() {
            let what = format!(
                "{} of the adapter's modules are not in this base, {} among them",
                by_weight.len(),
                update.module
            );
            return Err(Error::Model(Fault::new("merge", what).hint("name the base the adapter was trained on")));
        }
        for planned in &tensors {
            if let Some(update) = planned.update {
                let (rows, columns) = update.shape();
                if planned.shape != [rows, columns] {
                    let what = format!("is {:?} in this base, but the adapter fits [{rows}, {columns}]", planned.shape);
                    let fault = Fault::new(&planned.name, what);
                    return Err(Error::Model(fault.hint("name the base the adapter was trained on")));
                }
            }
        }
        Ok(Self { tensors, unties })
    }
}

/// The base's config, with what merging changes: the number type, and whether the head is tied.
fn config(base: &Value, kind: Kind, unties: bool) -> Value {
    let mut config = base.clone();
    let Some(fields) = config.as_object_mut() else { return config };
    let dtype = json!(match kind {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float32",
    });
    // The name before transformers 4.56; both are read, and must not differ.
    if let Some(old) = fields.get_mut("torch_dtype") {
        *old = dtype.clone();
    }
    fields.insert("dtype".into(), dtype);
    // What was quantised is written as plain numbers.
    fields.remove("quantization_config");
    if let Some(text) = fields.get_mut("text_config").and_then(Value::as_object_mut) {
        text.remove("quantization_config");
    }
    if unties {
        fields.insert("tie_word_embeddings".into(), json!(false));
        if let Some(shared) = fields.get_mut("share_embedding") {
            *shared = json!(false);
        }
    }
    config
}

/// Merging must not replace the files it reads.
fn refuse_base(folder: &Path, checkpoint: &Checkpoint) -> Result<()> {
    // A folder that does not exist yet holds no base.
    let Ok(folder) = fs::canonicalize(folder) else { return Ok(()) };
    // The hub's cache holds links: neither they nor what they point at may be lost.
    let within = |path: &Path| fs::canonicalize(path).is_ok_and(|path| path.starts_with(&folder));
    match checkpoint.files.iter().find(|file| within(file) || file.parent().is_some_and(within)) {
        Some(file) => {
            let what = format!("is the base model's own folder ({})", file.display());
            Err(Error::Output(Fault::at(&folder, what).hint("name another folder")))
        }
        None => Ok(()),
    }
}
