//! GGUF for llama.cpp and what is built on it: merged models in every usual number format ([`write_model`]), adapters ([`write_adapter`]).
//!
//! Names, orders of rows and settings are those of the table that GGUF files are read by ([`crate::weights`]), gone through the other way.
//! Before a model is written, what its file will say is read again and must be the same model.

mod adapter;
mod metadata;
mod mixture;
mod proof;
mod tensors;
mod vocabulary;

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value as Json;
use tch::Kind;

pub use adapter::{read_adapter, write_adapter};

use super::merged::Merging;
use crate::adapter::Learned;
use crate::model::{ModelSpec, families};
use crate::quant::Scheme;
pub use crate::recipe::FileType;
use crate::weights::Checkpoint;
use crate::weights::gguf::{self, Architecture, Conversion, Described, Heads, Quantisation};
use crate::{Error, Fault, Result};
use tensors::{MadeOf, Target};

impl FileType {
    /// `general.file_type`: `llama_ftype` of llama.cpp.
    fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 7,
            Self::Q5_0 => 8,
            Self::Q5_1 => 9,
            Self::Q4KM => 15,
            Self::Q5KM => 17,
            Self::Q6K => 18,
            Self::Bf16 => 32,
        }
    }

    /// The format of most tensors.
    fn format(self) -> &'static Quantisation {
        Quantisation::called(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q4KM => "Q4_K",
            Self::Q5KM => "Q5_K",
            Self::Q6K => "Q6_K",
        })
    }
}

/// What a file holds beside numbers.
#[derive(Debug, Clone, Copy)]
pub struct Texts<'a> {
    /// What the model is called; without it, as its base.
    pub name: Option<&'a str>,
    /// Tokenizer and chat template: [`super::sidecars`].
    pub sidecars: &'a BTreeMap<String, Vec<u8>>,
}

/// Writes the merged model as one GGUF file, whole or not at all, with its tokenizer and chat template; gives what the user should know,
/// in plain sentences. Memory peaks at one tensor (as it is stored, or fp32 where something is folded into it) and buffers.
///
/// `onto` is how the base was quantised when the adapter was trained: the update is folded into those numbers. `progress` is called with
/// bytes written so far and in all.
///
/// Errors: a family llama.cpp does not know; a model it would compute otherwise; a tokenizer that GGUF has no name for; an update that
/// does not fit the base; numbers that the type cannot hold; [`Error::Output`] for a file that cannot be written.
pub fn write_model(
    path: &Path,
    checkpoint: &Checkpoint,
    learned: Learned<'_>,
    onto: Option<&Scheme>,
    file_type: FileType,
    texts: Texts<'_>,
    progress: &dyn Fn(u64, u64),
) -> Result<Vec<String>> {
    let merging = Merging::new(path, checkpoint, learned, onto, exact_kind(checkpoint))?;
    let Written { spec, architecture, heads } = Written::of(checkpoint)?;
    let mut notices = Vec::new();
    let config = text_config(&checkpoint.config);
    let (settings, derived) = metadata::settings(&spec, architecture, config)?;
    let stored: Vec<_> = (0..merging.tensors()).map(|index| merging.spec(index)).collect();
    let targets = tensors::targets(&spec, architecture, heads, &stored, &derived, &mut notices)?;
    let shapes: Vec<_> = targets.iter().map(|target| (target.name.clone(), target.shape.clone())).collect();

    let (tokenizer, passes_over) = vocabulary::pairs(texts.sidecars, spec.vocab_size, &mut notices)?;
    let name = texts.name.map(ToString::to_string).or_else(|| metadata::base_name(checkpoint));
    let name = name.map(|name| metadata::named_for_llama_cpp(&name, passes_over));
    let mut pairs =
        metadata::general(architecture, "model", name.as_deref(), checkpoint, metadata::size_label(&shapes));
    pairs.extend(settings);
    let shown = gguf::shown(path, &pairs, &shapes, &derived)?;
    proof::prove(path, &spec, architecture, &shown, &mut notices)?;
    pairs.extend(metadata::stored(file_type));
    pairs.extend(tokenizer);

    let (formats, fallen_back) = mixture::formats(
        file_type,
        &shapes,
        &mixture::Model {
            architecture: architecture.name,
            layers: spec.layers.len(),
            experts: metadata::experts_of(&spec),
            heads: (heads.query, heads.key),
        },
    );
    if fallen_back > 0 {
        notices.push(format!(
            "{fallen_back} tensors have rows that are no whole blocks of {}'s formats: they are stored in larger ones, as llama.cpp stores them",
            file_type.name()
        ));
    }
    let described: Vec<Described> = targets
        .iter()
        .zip(&formats)
        .map(|(target, format)| Described { name: target.name.clone(), shape: target.shape.clone(), format })
        .collect();
    let (mut done, total) = (0, described.iter().map(Described::bytes).sum());
    gguf::write(path, &pairs, &described, |index, take| {
        let Target { name, order, made_of, .. } = &targets[index];
        let format = formats[index];
        let mut count = |bytes: &[u8]| {
            done += bytes.len() as u64;
            take(bytes)?;
            progress(done, total);
            Ok(())
        };
        match made_of {
            MadeOf::Numbers(numbers) => {
                let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
                count(&bytes)
            }
            MadeOf::Parts(parts) => parts.iter().try_for_each(|part| {
                let kind = merging.untouched(*part).unwrap_or_else(|| kind_for(format, *order));
                let tensor = merging.tensor(*part, kind)?.contiguous();
                gguf::quantise_in_pieces(&tensor, format, *order, name, &mut count)
            }),
        }
    })?;
    Ok(notices)
}

/// Refuses a base that no file is written of, whatever is exported of it: see [`write_model`] and [`write_adapter`]. Only headers are
/// read.
pub fn prove(checkpoint: &Checkpoint) -> Result<()> {
    let Written { spec, architecture, .. } = Written::of(checkpoint)?;
    metadata::settings(&spec, architecture, text_config(&checkpoint.config)).map(|_| ())
}

/// What a model is written as.
struct Written {
    spec: ModelSpec,
    architecture: &'static Architecture,
    heads: Heads,
}

impl Written {
    fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let mut spec = families::spec(checkpoint)?;
        spec.grow(checkpoint.vocabulary)?;
        let text = checkpoint.config.get("text_config").map(|text| text["model_type"].as_str());
        let has = |name: &str| {
            let there = |name: &str| checkpoint.shape(name).is_some();
            there(name) || there(&spec.names.stored_as(name, there))
        };
        let Some(architecture) = Architecture::written(&spec.model_type, text, has) else {
            let what = format!("{} is not written as GGUF", spec.model_type);
            let fault = Fault::new("config.json: model_type", what);
            let hint = format!(
                "written: {}; or export to another target, such as transformers or vllm",
                Architecture::all_written().join(", ")
            );
            return Err(Error::Model(fault.hint(hint)));
        };
        let attention = metadata::attention(&spec)?;
        let heads = Heads { query: attention.heads, key: attention.kv_heads };
        Ok(Self { spec, architecture, heads })
    }
}

/// The part of a config that is the text model's.
fn text_config(config: &Json) -> &Json {
    config.get("text_config").unwrap_or(config)
}

/// The number type in which every tensor of the checkpoint is read as it is stored.
fn exact_kind(checkpoint: &Checkpoint) -> Kind {
    let all = |name: &str| checkpoint.names().iter().all(|tensor| checkpoint.stored_as(tensor) == Some(name));
    match () {
        () if all("BF16") => Kind::BFloat16,
        () if all("F16") => Kind::Half,
        () => Kind::Float,
    }
}

/// What a tensor that something is folded into is made in, to be written in a format.
fn kind_for(format: &Quantisation, order: Conversion) -> Kind {
    match format.name {
        "F16" if order != Conversion::FromOne => Kind::Half,
        "BF16" if order != Conversion::FromOne => Kind::BFloat16,
        _ => Kind::Float,
    }
}

#[cfg(test)]
mod golden;
#[cfg(test)]
mod tests;
