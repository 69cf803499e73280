//! `engraft merge`: an adapter folded into its base.

use std::io::Write;
use std::path::Path;

use tch::Device;

use super::console::{Console, Unit};
use super::loading;
use super::probing::Asking;
use crate::adapter::numbers::{Here, skips_something};
use crate::adapter::{Adapters, Learned, LoadedAdapter, Origin, TrainedOn, Update};
use crate::cli::{Merge, Onto, Quantizing};
use crate::evaluate::{Drift, Measured};
use crate::export::manifest::{self, Base, ExportManifest, Manifest};
use crate::export::{merged, quantised, sidecars};
use crate::model::families;
use crate::quant::Scheme;
use crate::recipe::{BaseSource, QuantizationRecipe};
use crate::torch_ext::{catching, torch_version};
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
    let dtype = arguments.dtype.unwrap_or_else(|| loading::own_dtype(&checkpoint.config));
    let kind = dtype.kind();
    let asked = |form| loading::asked(form, &arguments.quantizing, kind, &spec);
    let scheme = arguments.quantize.map(asked).transpose()?;
    let updates: Vec<_> = adapter.fit(&spec.sites(), &spec.names)?.into_values().collect();
    let saved = adapter.saved(&spec)?;
    // The template it was trained with travels with an adapter.
    let template = adapter.chat_template()?;
    let sidecars = sidecars(&checkpoint, template.as_deref());
    let here = Here { checkpoint: &checkpoint, spec: &spec };
    let trained_on = trained_on(arguments, &adapter, here, &console)?;
    let asked_onto = arguments.onto.unwrap_or(Onto::Dequantized);
    let onto = trained_on.as_ref().filter(|_| asked_onto == Onto::Dequantized);
    if let Some(what) = onto.and_then(|trained_on| trained_on.missing(&checkpoint)) {
        let hint = "name the base the adapter was trained on, or say --onto original";
        return Err(Error::Model(Fault::at(&adapter.folder, what).hint(hint)));
    }
    // Of other numbers in the same shapes nothing else would tell, but where weights have fingerprints.
    let said = Base::of_adapter(&adapter.folder).filter(|_| !arguments.other_base && trained_on.is_none());
    let base_files = match said {
        Some(base) => {
            let files = {
                let _stage = console.stage("reading the base", Unit::Bytes);
                loading::joined(base_files)?
            };
            base.prove_same(&files)?;
            Ok(files)
        }
        None => Err(base_files),
    };
    let onto = onto.map(|trained_on| &trained_on.scheme);
    let updates = match onto {
        Some(_) => updates,
        None => updates.iter().map(Update::of_the_original).collect(),
    };
    if onto.is_some() {
        console.say("the update is folded into the numbers it was trained on: those of the quantised base");
    }
    let scheme_of = trained_on.as_ref().map(|trained_on| &trained_on.scheme);
    let elsewhere = trained_on.as_ref().and_then(|trained_on| trained_on.missing(&checkpoint));
    let probes = match arguments.no_probe {
        true => Err("--no-probe".to_string()),
        false => Asking::prepare(
            arguments.probe.as_deref(),
            &sidecars,
            &spec,
            (elsewhere, scheme_of.map_or(kind, |scheme| scheme.kind)),
        )?,
    };
    if let (Err(why), false) = (&probes, arguments.no_probe) {
        console.say(format_args!("note: no prompts are asked, so that no drift is measured: {why}"));
    }

    let learned = Learned { updates: &updates, saved: &saved };
    let (written, made) = match &scheme {
        Some(scheme) => {
            let stage = console.stage("merging and quantising", Unit::Things("numbers"));
            let at = |done, total| stage.at(done, total);
            let written = quantised::write(&arguments.out, &checkpoint, learned, onto, scheme, &sidecars, &at)?;
            (Some(written.clone()), written.onto)
        }
        None => {
            let stage = console.stage("merging", Unit::Bytes);
            let at = |done, total| stage.at(done, total);
            (None, merged::write(&arguments.out, &checkpoint, learned, onto, kind, &sidecars, &at)?)
        }
    };
    console.say(format_args!("wrote {}", arguments.out.display()));
    if let Some(written) = &written {
        console.say(written);
    }

    let differing = trained_on.as_ref().and_then(|trained_on| trained_on.differing(&made));
    if let Some(differing) = &differing {
        console.say(format_args!("note: {differing}"));
    }

    let mut manifest = ExportManifest {
        engraft_version: env!("CARGO_PKG_VERSION").into(),
        libtorch_version: torch_version().into(),
        created: jiff::Timestamp::now().to_string(),
        target: None,
        base: Base::of(&checkpoint, &arguments.model, base_files.or_else(loading::joined)?),
        adapter: manifest::inputs(&adapter.folder)?,
        trained_on: scheme_of.map(Scheme::to_value),
        onto: trained_on.as_ref().map(|_| asked_onto.to_string()),
        dtype: dtype.to_string(),
        quantization: scheme.as_ref().map(Scheme::to_value),
        quantization_loss: written.map(|written| written.loss),
        drift: Some(Measured::Not("not measured: what was merged was not asked to the end".into())),
        differing,
        program: manifest::program(),
        // Whole from here on, whatever becomes of what is asked.
        outputs: manifest::outputs(&arguments.out, std::slice::from_ref(&arguments.out), &|_, _| ())?,
    };
    manifest.write(&arguments.out)?;

    let drift = probes.map(|asking| {
        let kind = asking.kind;
        let (mut trained, scheme) = asking.model(&checkpoint, &spec, scheme_of, &console)?;
        let origin = Origin { checkpoint: &checkpoint, scheme: scheme.as_ref(), start: None, progress: &|_, _| () };
        Adapters::attach_loaded(&mut trained, &adapter, 0.0, Some(&origin))?;
        let replies = catching("asking the adapter on its base", || Ok(asking.probes.ask(&trained)))?;
        drop(trained);
        let merged = Checkpoint::open(&BaseSource::Folder(arguments.out.clone()))?;
        let spec = families::spec(&merged)?;
        let merged = loading::decoder(&merged, spec, kind, Device::Cpu, None, &console)?;
        let found = catching("asking the merged model", || Ok(Drift::of(&replies, &merged)))?;
        console.say(format_args!("beside the adapter on its base, at {} prompts: {found}", found.prompts));
        Ok::<_, Error>(Measured::Drift(found))
    });
    let drift = match drift {
        Ok(measured) => measured?,
        Err(why) => Measured::Not(format!("not measured: {why}")),
    };

    manifest.drift = Some(drift);
    manifest.write(&arguments.out)?;
    if arguments.json {
        let text = serde_json::to_string(&manifest).expect("names, numbers and flags have a JSON form");
        writeln!(out, "{text}").map_err(|error| Error::Output(Fault::new("standard output", error)))?;
    }
    Ok(())
}

/// What the base was when the adapter was trained, as the adapter or `--trained-on` says; `None` where it was not quantised, or nothing
/// says so.
fn trained_on(
    arguments: &Merge,
    adapter: &LoadedAdapter,
    here: Here<'_>,
    console: &Console,
) -> Result<Option<TrainedOn>> {
    const PLACE: &str = "--trained-on";
    let itself = adapter.trained_on()?;
    let (found, typed) = match (itself, &arguments.trained_on) {
        (Some(itself), Some(_)) => {
            let what = format!("the adapter says itself that its base was quantised as {}", itself.scheme);
            return Err(Error::Recipe(vec![Fault::new(PLACE, what).hint("leave it out")]));
        }
        (itself, None) => (itself, None),
        // What weights are read in where nothing else is said.
        (None, Some(typed)) => {
            let kind = loading::own_dtype(&here.checkpoint.config).kind();
            let scheme = QuantizationRecipe::typed(typed, PLACE, kind)?;
            skips_something(&scheme, here.spec, PLACE)?;
            (None, Some(TrainedOn { scheme, stored: None, weights: Default::default() }))
        }
    };
    if let Some(typed) = &typed {
        console.say(format_args!("the adapter is taken as trained on its base quantised as {}", typed.scheme));
    }
    let found = found.or(typed);
    match &found {
        Some(found) => found.prove_stored_alike(&adapter.folder, here)?,
        // What is stored quantised is read as the numbers that it stands for.
        None if here.checkpoint.quantised_form().is_some() => {}
        None if arguments.onto == Some(Onto::Dequantized) => {
            let fault = Fault::at(&adapter.folder, "does not say that it was trained on a quantised base, nor how");
            let hint = format!("say how ({PLACE} nf4), or leave out --onto: the update is folded into the base's own numbers");
            return Err(Error::Model(fault.hint(hint)));
        }
        None if !is_of_a_plain_run(&adapter.folder) => console.say(format_args!(
            "note: the adapter does not say how its base was quantised, if it was; the update is folded into the base's own numbers \
             ({PLACE} nf4: into those of a base quantised so)"
        )),
        None => {}
    }
    Ok(found)
}

/// Whether an adapter lies in the folder of a run of engraft, which would have said that its base was quantised.
fn is_of_a_plain_run(adapter: &Path) -> bool {
    adapter.parent().is_some_and(|run| Manifest::read(run).is_ok())
}
