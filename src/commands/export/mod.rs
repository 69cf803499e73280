//! `engraft export`: what a server loads, from a run, an adapter or a model; or the outputs of a run that has saved states.

mod recipe;
mod source;

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde_json::json;
use tch::Kind;

use self::source::{Exported, Source};
use super::console::{Console, Unit};
use super::loading;
use super::probing::Asking;
use crate::adapter::numbers::Here;
use crate::adapter::{Learned, LoadedAdapter, Update};
use crate::cli::{Export, Onto};
use crate::data::Encoder;
use crate::export::card;
use crate::export::licence::Licence;
use crate::export::manifest::{self, Base, ExportManifest, Manifest};
use crate::export::probe::{Answers, PROBE, Probe};
use crate::export::served::{Beside, Served};
use crate::export::sidecars;
use crate::export::signature::{self, Key};
use crate::quant::Scheme;
use crate::recipe::{ExportChoice, Target};
use crate::torch_ext::torch_version;
use crate::train::curves;
use crate::weights::{Hub, Push};
use crate::{Error, Fault, Result};

/// Runs the verb.
pub fn run(arguments: &Export, out: &mut dyn Write) -> Result<()> {
    // A key that is none, or a hub that takes nothing, is found out before anything is written.
    let key = arguments.sign.as_deref().map(Key::read).transpose()?;
    match (arguments.target, &arguments.out) {
        (Some(target), Some(folder)) => for_target(arguments, target, folder, key.as_ref(), out),
        _ if Path::new(&arguments.source).is_dir() => {
            let targets = Target::value_variants().iter().map(|target| target.name()).collect::<Vec<_>>().join(", ");
            let fault = Fault::new(&arguments.source, "is a folder, and what is to load it is not said");
            Err(Error::Recipe(vec![fault.hint(format!("add --target and --out; targets are {targets}"))]))
        }
        _ => recipe::run(arguments, key.as_ref()),
    }
}

/// Writes what `target` loads. Everything that can be refused is, before anything is written.
fn for_target(arguments: &Export, target: Target, folder: &Path, key: Option<&Key>, out: &mut dyn Write) -> Result<()> {
    loading::use_cpu(None);
    let console = Console::new(arguments.json);
    loading::refuse_filled(folder, arguments.overwrite, "exporting")?;
    let hub = arguments.push.as_deref().map(|id| {
        let hub = Hub::from_environment()?;
        hub.may_push(id)?;
        Ok::<_, Error>((hub, id))
    });
    let hub = hub.transpose()?;
    let source = Source::find(&arguments.source)?;
    let merge = arguments.merge || matches!(source, Source::Model(_));
    let choice = ExportChoice { target, merge, numbers: arguments.numbers, from: arguments.from.clone() };
    choice.prove().map_err(|fault| Error::Recipe(vec![fault]))?;
    let Exported { checkpoint, base_files, trained_on: proven, spec, config, adapter, run } =
        source.open(arguments, &console)?;
    let (mut updates, mut saved, mut trained_on, mut template) = (Vec::new(), Vec::new(), None, None);
    let adapter = adapter.map(|(adapter, fitted)| {
        updates = fitted;
        adapter
    });
    if let Some(adapter) = &adapter {
        for notice in &adapter.notices {
            console.say(format_args!("note: {notice}"));
        }
        saved = adapter.saved(&spec)?;
        trained_on = adapter.trained_on()?;
        template = adapter.chat_template()?;
        if let Some(trained_on) = trained_on.as_ref().filter(|_| merge) {
            trained_on.prove_stored_alike(&adapter.folder, Here { checkpoint: &checkpoint, spec: &spec })?;
        }
    }
    let scheme = trained_on.as_ref().map(|trained_on| &trained_on.scheme);
    let onto = scheme.filter(|_| merge && arguments.onto == Onto::Dequantized);
    if onto.is_none() {
        updates = updates.iter().map(Update::of_the_original).collect();
    }
    let served = Served {
        checkpoint: &checkpoint,
        spec: &spec,
        config: &config,
        learned: Learned { updates: &updates, saved: &saved },
        trained_on: trained_on.as_ref(),
        onto,
        template: template.as_deref(),
    };
    served.prove(&choice)?;
    if let Some(adapter) = &adapter {
        refuse_source(folder, &adapter.folder)?;
    }
    // Waited for now only where it decides something; else it is read while the export is written.
    let base_files = match proven.filter(|_| !arguments.other_base) {
        Some(base) => {
            let _stage = console.stage("reading the base", Unit::Bytes);
            let files = loading::joined(base_files)?;
            base.prove_same(&files)?;
            Ok(files)
        }
        None => Err(base_files),
    };
    let elsewhere = trained_on.as_ref().and_then(|trained_on| trained_on.missing(&checkpoint));
    let asked = asked(arguments, &served, adapter.as_ref(), (scheme, elsewhere), &console)?;
    if let Asked::Nothing(why) = &asked {
        console.say(format_args!("note: no prompts are asked, so that there is no {PROBE}: {why}"));
    }

    let dtype = loading::own_dtype(&checkpoint.config);
    let facts = Facts { arguments, folder, base: config.base_model_name_or_path.as_deref(), run: run.as_ref() };
    let beside = facts.beside(&served, &choice, &asked)?;
    let stage = console.stage("exporting", Unit::Bytes);
    let notices = served.write(folder, &choice, dtype, &beside, &|done, total| stage.at(done, total))?;
    drop(stage);
    for notice in &notices {
        console.say(format_args!("note: {notice}"));
    }

    let files = manifest::outputs(folder, std::slice::from_ref(&folder.to_path_buf()), &|_, _| ())?;
    let manifest = ExportManifest {
        engraft_version: env!("CARGO_PKG_VERSION").into(),
        libtorch_version: torch_version().into(),
        created: jiff::Timestamp::now().to_string(),
        target: Some(target),
        base: Base::of(&checkpoint, &checkpoint.source.name(), base_files.or_else(loading::joined)?),
        adapter: match &adapter {
            Some(adapter) => manifest::inputs(&adapter.folder)?,
            None => Vec::new(),
        },
        trained_on: scheme.map(Scheme::to_value),
        onto: scheme.filter(|_| merge).map(|_| arguments.onto.to_string()),
        dtype: if merge { choice.numbers.unwrap_or(dtype.into()).to_string() } else { "f32".into() },
        quantization: None,
        quantization_loss: None,
        drift: None,
        differing: None,
        program: manifest::program(),
        outputs: files,
    };
    manifest.write(folder)?;
    if let Some(key) = key {
        signature::sign(folder, key)?;
    }
    console.say(format_args!("wrote {}", folder.display()));
    let pushed = hub.map(|(hub, id)| {
        let stage = console.stage(&format!("pushing to {id}"), Unit::Bytes);
        let push = Push { id, public: arguments.public, message: "Written by engraft export" };
        hub.push(folder, push, &mut |done, total| stage.at(done, total))
    });
    let pushed = pushed.transpose()?;
    if let Some(pushed) = &pushed {
        console.say(format_args!("pushed to {}, commit {}", pushed.address, pushed.commit));
    }
    if arguments.json {
        let probe = match &asked {
            Asked::Nothing(why) => json!(format!("not asked: {why}")),
            _ => json!(PROBE),
        };
        let facts = json!({
            "target": target, "merged": merge, "out": folder, "files": manifest.outputs, "notices": notices,
            "type": merge.then_some(manifest.dtype), "probe": probe, "signed": key.is_some(),
            "pushed": pushed.map(|pushed| json!({"address": pushed.address, "commit": pushed.commit})),
        });
        writeln!(out, "{facts}").map_err(|error| Error::Output(Fault::new("standard output", error)))?;
    }
    Ok(())
}

/// An export must not replace the adapter it is made of.
fn refuse_source(folder: &Path, adapter: &Path) -> Result<()> {
    match (folder.canonicalize(), adapter.canonicalize()) {
        (Ok(out), Ok(source)) if source.starts_with(&out) => {
            let what = format!("is where the adapter itself lies ({})", adapter.display());
            Err(Error::Output(Fault::at(folder, what).hint("name another folder")))
        }
        _ => Ok(()),
    }
}

/// What is known of the trained model's answers.
enum Asked {
    /// It was asked now.
    Now(Box<Answers>, Box<Encoder>),
    /// Whoever wrote the model that is exported had asked it.
    Before(Box<Probe>),
    /// Nothing, and why.
    Nothing(String),
}

/// Asks the trained model and its base, or takes what is known of a whole model already.
fn asked(
    arguments: &Export,
    served: &Served<'_>,
    adapter: Option<&LoadedAdapter>,
    (scheme, elsewhere): (Option<&Scheme>, Option<String>),
    console: &Console,
) -> Result<Asked> {
    if arguments.no_probe {
        return Ok(Asked::Nothing("--no-probe".into()));
    }
    let (checkpoint, spec) = (served.checkpoint, served.spec);
    let folder = Path::new(&arguments.source);
    if adapter.is_none() && arguments.probe.is_none() && folder.join(PROBE).is_file() {
        return Ok(Asked::Before(Box::new(Probe::read(folder)?)));
    }
    let training = scheme.map_or(Kind::BFloat16, |scheme| scheme.kind);
    let sidecars = sidecars(checkpoint, served.template);
    let asking = match Asking::prepare(arguments.probe.as_deref(), &sidecars, spec, (elsewhere, training))? {
        Ok(asking) => asking,
        Err(why) => return Ok(Asked::Nothing(why)),
    };
    let answers = asking.answers(checkpoint, spec, adapter, scheme, console)?;
    Ok(Asked::Now(Box::new(answers), Box::new(asking.encoder)))
}

/// What a model card is made of.
struct Facts<'a> {
    arguments: &'a Export,
    folder: &'a Path,
    /// The base, as the adapter's config names it.
    base: Option<&'a str>,
    /// Of a run: its folder, and what its manifest says.
    run: Option<&'a (PathBuf, Manifest)>,
}

impl Facts<'_> {
    /// What lies beside what is exported.
    fn beside(&self, served: &Served<'_>, choice: &ExportChoice, asked: &Asked) -> Result<Beside> {
        let checkpoint = served.checkpoint;
        let manifest = self.run.map(|(_, manifest)| manifest);
        let documentation = manifest.and_then(|manifest| manifest.documentation.as_ref());
        let licence = documentation.map_or_else(|| Licence::of(checkpoint), |said| said.base_licence.clone());
        // Metrics that somebody has removed are no reason to write nothing.
        let curve = self.run.and_then(|(run, _)| curves(run).unwrap_or_default());
        let named = self.arguments.push.as_deref().and_then(|id| id.split('/').next_back());
        let named = named.or_else(|| self.folder.file_name()?.to_str());
        let own = checkpoint.source.name();
        let dtype = loading::own_dtype(&checkpoint.config);
        let facts = card::Facts {
            name: named.unwrap_or("A fine-tuned model"),
            kind: card::Kind::Adapter,
            base: self.base.unwrap_or(&own),
            licence: &licence,
            documentation,
            recipe: manifest.map(|manifest| &manifest.resolved_recipe),
            metrics: manifest.map(|manifest| &manifest.metrics),
            train: manifest.map_or(&[], |manifest| &manifest.train),
            drift: None,
            curve: curve.as_deref(),
        };
        let now = match asked {
            Asked::Now(answers, encoder) => Some((&**answers, &**encoder)),
            _ => None,
        };
        let mut beside = served.beside(choice, dtype, now, &facts)?;
        if let Asked::Before(probe) = asked {
            let numbers = choice.numbers.unwrap_or(dtype.into());
            beside.insert(PROBE.into(), probe.in_format(numbers.name()).text().into_bytes());
        }
        Ok(beside)
    }
}
