//! `engraft merge`: an adapter folded into its base.

use std::io::Write;
use std::path::Path;

use tch::{Device, Kind};

use super::console::{Console, Unit};
use super::loading;
use crate::adapter::{Adapters, Learned, LoadedAdapter, Origin, Update};
use crate::cli::{Merge, Onto, Quantizing};
use crate::data::{Encoder, Tokenizer};
use crate::evaluate::{Drift, Probes};
use crate::export::manifest::{self, Base, MergeManifest};
use crate::export::{merged, quantised, sidecars};
use crate::model::{ModelSpec, families};
use crate::quant::{Form, Products, Scheme};
use crate::recipe::{BaseSource, DatasetRecipe, Dtype};
use crate::torch_ext::{catching, torch_version};
use crate::train::free_bytes;
use crate::weights::Checkpoint;
use crate::{Error, Fault, Result};

/// Runs the verb: tensor by tensor from the base's files; only what is asked afterwards needs whole models, one after the other.
pub fn run(arguments: &Merge, out: &mut dyn Write) -> Result<()> {
    loading::use_cpu(None);
    let console = Console::new(arguments.json);
    if arguments.quantize.is_none() && arguments.quantizing != Quantizing::default() {
        let fault =
            Fault::new("--no-double-quant, --block-size, --skip", "say how to quantise, but nothing is quantised");
        return Err(Error::Recipe(vec![fault.hint("add --quantize nf4, or leave them out")]));
    }
    loading::refuse_filled(&arguments.out, arguments.overwrite, "merging")?;
    let base = |fault: Fault| Error::Model(Fault { place: "--model".into(), ..fault });
    let source = BaseSource::find(&arguments.model, arguments.revision.as_deref(), Path::new("")).map_err(base)?;
    let adapter = LoadedAdapter::read(&arguments.adapter)?;
    let mut checkpoint = loading::checkpoint(&source, &console)?;
    let base_files = loading::hash_in_background(checkpoint.files.clone());
    loading::with_tokens_of(&adapter, &mut checkpoint)?;
    for notice in &adapter.notices {
        console.say(format_args!("note: {notice}"));
    }
    let mut spec = families::spec(&checkpoint)?;
    spec.grow(checkpoint.vocabulary)?;
    let dtype = arguments.dtype.unwrap_or_else(|| own_dtype(&checkpoint.config));
    let kind = dtype.kind();
    let asked = |form| loading::asked(form, &arguments.quantizing, kind, &spec);
    let scheme = arguments.quantize.map(asked).transpose()?;
    let updates: Vec<_> = adapter.fit(&spec.sites(), &spec.names)?.into_values().collect();
    let saved = adapter.saved(&spec)?;
    // The template it was trained with travels with an adapter.
    let template = adapter.chat_template()?;
    let sidecars = sidecars(&checkpoint, template.as_deref());
    let trained_on = adapter.scheme()?;
    loading::stored_alike(&adapter.folder, trained_on.as_ref(), &checkpoint)?;
    let onto = trained_on.as_ref().filter(|_| arguments.onto == Onto::Dequantized);
    let updates = match onto {
        Some(_) => updates,
        None => updates.iter().map(Update::of_the_original).collect(),
    };
    if onto.is_some() {
        console.say("the update is folded into the numbers it was trained on: those of the quantised base");
    }
    // A form that only its own tool makes is had where it is stored.
    let elsewhere = trained_on
        .as_ref()
        .map(|scheme| scheme.form)
        .filter(|form| !form.can_be_made() && checkpoint.quantised_form() != Some(*form));
    let probes = match arguments.no_probe {
        true => None,
        false => probes(arguments, &sidecars, &spec, elsewhere, &console)?,
    };

    let learned = Learned { updates: &updates, saved: &saved };
    let written = match &scheme {
        Some(scheme) => {
            let stage = console.stage("merging and quantising", Unit::Things("numbers"));
            let at = |done, total| stage.at(done, total);
            Some(quantised::write(&arguments.out, &checkpoint, learned, onto, scheme, &sidecars, &at)?)
        }
        None => {
            let stage = console.stage("merging", Unit::Bytes);
            let at = |done, total| stage.at(done, total);
            merged::write(&arguments.out, &checkpoint, learned, onto, kind, &sidecars, &at)?;
            None
        }
    };
    console.say(format_args!("wrote {}", arguments.out.display()));
    if let Some(written) = &written {
        console.say(written);
    }

    let mut drift = None;
    if let Some(probes) = probes {
        let scheme = trained_on.clone().map(|scheme| Scheme { products: Products::Cached, ..scheme });
        let mut trained =
            loading::decoder(&checkpoint, spec.clone(), Kind::Float, Device::Cpu, scheme.as_ref(), &console)?;
        let origin = Origin { checkpoint: &checkpoint, scheme: scheme.as_ref(), start: None, progress: &|_, _| () };
        Adapters::attach_loaded(&mut trained, &adapter, 0.0, Some(&origin))?;
        let replies = catching("asking the adapter on its base", || Ok(probes.ask(&trained)))?;
        drop(trained);
        let merged = Checkpoint::open(&BaseSource::Folder(arguments.out.clone()))?;
        let spec = families::spec(&merged)?;
        let merged = loading::decoder(&merged, spec, Kind::Float, Device::Cpu, None, &console)?;
        let found = catching("asking the merged model", || Ok(Drift::of(&replies, &merged)))?;
        console.say(format_args!("beside the adapter on its base, at {} prompts: {found}", found.prompts));
        drift = Some(found);
    }

    let manifest = MergeManifest {
        engraft_version: env!("CARGO_PKG_VERSION").into(),
        libtorch_version: torch_version().into(),
        created: jiff::Timestamp::now().to_string(),
        base: Base::of(&checkpoint, &arguments.model, loading::joined(base_files)?),
        adapter: manifest::outputs(Path::new(""), std::slice::from_ref(&adapter.folder), &|_, _| ())?,
        trained_on: trained_on.as_ref().map(Scheme::to_value),
        onto: trained_on.as_ref().map(|_| arguments.onto.to_string()),
        dtype: dtype.to_string(),
        quantization: scheme.as_ref().map(Scheme::to_value),
        quantization_loss: written.map(|written| written.loss),
        drift,
        outputs: manifest::outputs(&arguments.out, std::slice::from_ref(&arguments.out), &|_, _| ())?,
    };
    manifest.write(&arguments.out)?;
    if arguments.json {
        let text = serde_json::to_string(&manifest).expect("names, numbers and flags have a JSON form");
        writeln!(out, "{text}").map_err(|error| Error::Output(Fault::new("standard output", error)))?;
    }
    Ok(())
}

/// What to ask, where there is a tokenizer to ask with and memory for the models, or prompts were named.
fn probes(
    arguments: &Merge,
    sidecars: &std::collections::BTreeMap<String, Vec<u8>>,
    spec: &ModelSpec,
    elsewhere: Option<Form>,
    console: &Console,
) -> Result<Option<Probes>> {
    let named = arguments.probe.as_deref();
    let numbers: i64 = spec.tensors().values().map(|shape| shape.iter().product::<i64>()).sum();
    let (needed, free) = (4 * numbers as u64, free_bytes(Device::Cpu));
    let encoder = Tokenizer::new(sidecars).map(std::sync::Arc::new);
    let encoder = encoder.and_then(|tokenizer| Encoder::new(tokenizer, &DatasetRecipe::defaults()));
    let missing = match (&encoder, free) {
        _ if elsewhere.is_some() => elsewhere
            .map(|form| format!("the adapter was trained on a base that is stored as {form}, which this one is not")),
        (Err(error), _) => Some(format!("without a tokenizer: {error}")),
        (Ok(_), Some(free)) if free < needed => Some(format!(
            "the models take {:.1} GB each in fp32, and {:.1} GB are free",
            gigabytes(needed),
            gigabytes(free)
        )),
        (Ok(_), _) => None,
    };
    match (missing, encoder) {
        (None, Ok(encoder)) => Probes::new(named, &encoder, spec.max_position_embeddings as usize).map(Some),
        (Some(why), _) if named.is_none() => {
            console.say(format_args!("note: no prompts are asked, so that no drift is measured: {why}"));
            Ok(None)
        }
        (_, Err(error)) => Err(error),
        (Some(why), Ok(_)) => {
            let fault = Fault::new("--probe", why).hint("leave it out, or say --no-probe");
            Err(if elsewhere.is_some() { Error::Model(fault) } else { Error::Device(fault) })
        }
    }
}

fn gigabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

/// What the base's config says its weights are.
fn own_dtype(config: &serde_json::Value) -> Dtype {
    let said = [
        &config["dtype"],
        &config["torch_dtype"],
        &config["text_config"]["dtype"],
        &config["text_config"]["torch_dtype"],
    ];
    match said.into_iter().find_map(|dtype| dtype.as_str()) {
        Some("float32") => Dtype::Fp32,
        Some("float16") => Dtype::Fp16,
        _ => Dtype::Bf16,
    }
}
