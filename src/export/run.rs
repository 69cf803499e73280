//! What a finished run writes: its adapter, its merged model, and the manifest that ties them to what they came from.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tch::Kind;

use super::documentation::{self, Documentation};
use super::licence::Licence;
use super::manifest::{self, Base, FileDigest, MANIFEST, Manifest};
use super::probe::Answers;
use super::served::Served;
use super::{card, merged, peft, sidecars};
use crate::adapter::{AdapterConfig, Adapters, PlannedAdapters, TrainedOn};
use crate::data::{Dataset, Encoder};
use crate::model::families;
use crate::recipe::{ExportChoice, Plan, Save};
use crate::torch_ext::torch_version;
use crate::train::speed::{Lengths, Work};
use crate::train::{Cut, Outcome, curves};
use crate::weights::Checkpoint;
use crate::{Error, Fault, Result};

/// A run that is done, and all that the manifest says of it.
pub struct Finished<'a> {
    /// What it was asked to do.
    pub plan: &'a Plan,
    /// Its base.
    pub checkpoint: &'a Checkpoint,
    /// What the base's numbers were; `None` where it was not quantised.
    pub trained_on: Option<&'a TrainedOn>,
    /// Digests of the base's weight files.
    pub base_files: Vec<FileDigest>,
    /// What it trained.
    pub adapters: &'a Adapters,
    /// What it trained on.
    pub train: &'a Dataset,
    /// What it was evaluated on.
    pub eval: Option<&'a Dataset>,
    /// What its rows became tokens by.
    pub encoder: &'a Encoder,
    /// What the base and the trained model said of the probes; `None` where nothing is exported.
    pub answers: Option<Answers>,
    /// How it went.
    pub outcome: Outcome,
    /// What it ran on.
    pub device: String,
}

/// What was written of a run.
#[derive(Debug, Default)]
pub struct Written {
    /// The folders.
    pub folders: Vec<PathBuf>,
    /// What the one who serves them must know, in plain sentences.
    pub notices: Vec<String>,
}

/// Refuses exports that could not be written of what is trained: better known before the training than after it.
///
/// Errors: those of [`Served::prove`].
pub fn prove(checkpoint: &Checkpoint, adapters: &Adapters, exports: &[ExportChoice]) -> Result<()> {
    let mut spec = families::spec(checkpoint)?;
    spec.grow(checkpoint.vocabulary)?;
    let served = Served {
        checkpoint,
        spec: &spec,
        config: &adapters.config,
        learned: adapters.learned(),
        trained_on: None,
        onto: None,
        template: None,
    };
    for choice in exports {
        served.prove(choice)?;
    }
    Ok(())
}

/// Writes into the run's folder what `save` names, `export/<target>` for each of `exports`, then `manifest.json`.
///
/// `progress` is told which of them is being written, and bytes done and in all.
pub fn write(
    finished: &Finished<'_>,
    save: &[Save],
    exports: &[ExportChoice],
    progress: &dyn Fn(&str, u64, u64),
) -> Result<Written> {
    let plan = finished.plan;
    let dir = &plan.output.dir;
    let own_template = plan.dataset.chat_template.as_ref().and(chat_template(finished));
    let sidecars = sidecars(finished.checkpoint, own_template);
    let config = config(finished);
    let mut manifest = manifest(finished)?;
    // Metrics that somebody has removed are no reason to write nothing.
    let curve = curves(dir).unwrap_or_default();
    let mut written = Written::default();
    let texts = Texts { sidecars, config, template: own_template, curve };
    let done = write_each(finished, &manifest, &texts, save, exports, &mut written, progress);
    // What is whole is the run's, whatever became of the rest.
    manifest.outputs = manifest::outputs(dir, &written.folders, &|_, _| ())?;
    manifest.outputs.extend(kept(finished, &manifest.outputs, &manifest.metrics));
    manifest.outputs.sort_by(|one, other| one.path.cmp(&other.path));
    manifest.write(dir)?;
    done.map(|()| written).map_err(|error| also(error, finished))
}

/// What goes beside the numbers of whatever a run writes.
struct Texts<'a> {
    sidecars: BTreeMap<String, Vec<u8>>,
    config: AdapterConfig,
    /// Source of the chat template that is not the base's own.
    template: Option<&'a str>,
    /// The loss, drawn.
    curve: Option<String>,
}

/// Writes one after the other, up to the first that cannot be written.
fn write_each(
    finished: &Finished<'_>,
    manifest: &Manifest,
    texts: &Texts<'_>,
    save: &[Save],
    exports: &[ExportChoice],
    written: &mut Written,
    progress: &dyn Fn(&str, u64, u64),
) -> Result<()> {
    let (plan, dir) = (finished.plan, &finished.plan.output.dir);
    let (learned, onto) = (finished.adapters.learned(), finished.trained_on.map(|on| &on.scheme));
    let with_card = |kind| {
        let mut files = texts.sidecars.clone();
        let facts = facts(finished, manifest, kind, texts.curve.as_deref());
        files.extend(card::files(&facts));
        files
    };
    for what in save {
        let folder = match what {
            Save::Adapter => {
                let (folder, files) = (dir.join("adapter"), with_card(card::Kind::Adapter));
                peft::write(&folder, &texts.config, learned, finished.trained_on, &files)?;
                folder
            }
            Save::Merged => {
                let (folder, files) = (dir.join("merged"), with_card(card::Kind::Merged));
                let at = |done, total| progress("merged", done, total);
                let made = merged::write(&folder, finished.checkpoint, learned, onto, plan.kind, &files, &at)?;
                written.notices.extend(finished.trained_on.and_then(|on| on.differing(&made)));
                folder
            }
        };
        written.folders.push(folder);
    }
    if exports.is_empty() {
        return Ok(());
    }
    let mut spec = families::spec(finished.checkpoint)?;
    spec.grow(finished.checkpoint.vocabulary)?;
    let served = Served {
        checkpoint: finished.checkpoint,
        spec: &spec,
        config: &texts.config,
        learned,
        trained_on: finished.trained_on,
        onto,
        template: texts.template,
    };
    for choice in exports {
        let name = choice.folder();
        let folder = dir.join("export").join(&name);
        let at = |done, total| progress(&name, done, total);
        let facts = facts(finished, manifest, card::Kind::Adapter, texts.curve.as_deref());
        let answers = finished.answers.as_ref().map(|answers| (answers, finished.encoder));
        let beside = served.beside(choice, plan.recipe.dtype, answers, &facts)?;
        let notices = served.write(&folder, choice, plan.recipe.dtype, &beside, &at)?;
        written.notices.extend(notices.into_iter().map(|notice| format!("export/{name}: {notice}")));
        written.folders.push(folder);
    }
    Ok(())
}

/// The error of an output, with the way to what was trained: nothing of that is lost.
fn also(error: Error, finished: &Finished<'_>) -> Error {
    let way_out = format!(
        "what was trained is saved: once that is mended, write the rest with `engraft export {}`",
        finished.plan.path.display()
    );
    let also = |fault: Fault| {
        let hint = [fault.hint.as_str(), &way_out].into_iter().filter(|hint| !hint.is_empty()).collect::<Vec<_>>();
        Fault { hint: hint.join("; "), ..fault }
    };
    match error {
        Error::Output(fault) => Error::Output(also(fault)),
        Error::Model(fault) => Error::Model(also(fault)),
        other => other,
    }
}

/// What the card of something that the run wrote says.
fn facts<'a>(
    finished: &'a Finished<'_>,
    manifest: &'a Manifest,
    kind: card::Kind,
    curve: Option<&'a str>,
) -> card::Facts<'a> {
    let plan = finished.plan;
    let documentation = manifest.documentation.as_ref().expect("a run's manifest has it");
    let named = plan.output.dir.file_name().and_then(|name| name.to_str());
    card::Facts {
        name: named.unwrap_or("A fine-tuned model"),
        kind,
        base: plan.output.base_model_name_or_path.as_ref().unwrap_or(&plan.recipe.base_model),
        licence: &documentation.base_licence,
        documentation: Some(documentation),
        recipe: Some(&manifest.resolved_recipe),
        metrics: Some(&manifest.metrics),
        train: &manifest.train,
        drift: None,
        curve,
    }
}

/// Source of the chat template its rows were rendered with.
fn chat_template<'a>(finished: &Finished<'a>) -> Option<&'a str> {
    finished.encoder.template().map(|template| template.source())
}

/// The adapter's config, with the name of its base.
fn config(finished: &Finished<'_>) -> AdapterConfig {
    let plan = finished.plan;
    let mut config = finished.adapters.config.clone();
    // The commit is one of the repository that was trained on, whatever that is called in the config.
    (config.base_model_name_or_path, config.revision) = match &plan.output.base_model_name_or_path {
        Some(name) => (Some(name.clone()), plan.recipe.revision.clone()),
        None => (Some(plan.recipe.base_model.clone()), finished.checkpoint.commit.clone()),
    };
    config
}

/// The recipe's path from wherever the manifest is read, as those of data and base are.
fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| Error::Recipe(vec![Fault::at(path, error)]))
}

/// All but what was written.
fn manifest(finished: &Finished<'_>) -> Result<Manifest> {
    let plan = finished.plan;
    let dataset_files = |dataset: &Dataset| {
        let digest = |file: &crate::data::DatasetFile| FileDigest {
            path: file.path.clone(),
            bytes: std::fs::metadata(&file.path).map_or(0, |metadata| metadata.len()),
            sha256: file.sha256.clone(),
        };
        dataset.files().iter().map(digest).collect::<Vec<_>>()
    };
    let datasets = [("training", Some(finished.train)), ("eval", finished.eval)];
    let datasets: Vec<(&str, &Dataset)> =
        datasets.into_iter().filter_map(|(set, dataset)| Some((set, dataset?))).collect();
    let reports = datasets.iter().map(|(set, dataset)| ((*set).to_string(), dataset.report().clone()));
    let metrics = serde_json::to_value(&finished.outcome).expect("numbers, flags and a path have a JSON form");
    let quiet = |_, _| ();
    let documentation = Documentation::new(model(finished)?, plan, &datasets, &finished.outcome, &finished.device);
    Ok(Manifest {
        engraft_version: env!("CARGO_PKG_VERSION").into(),
        libtorch_version: torch_version().into(),
        created: jiff::Timestamp::now().to_string(),
        device: finished.device.clone(),
        dtype: match plan.kind {
            Kind::BFloat16 => "bf16",
            Kind::Half => "fp16",
            _ => "fp32",
        }
        .into(),
        base: Base::of(finished.checkpoint, &plan.recipe.base_model, finished.base_files.clone()),
        train: dataset_files(finished.train),
        eval: finished.eval.map(dataset_files).unwrap_or_default(),
        datasets: reports.collect(),
        tokenizer: manifest::tokenizer(finished.checkpoint),
        chat_template: chat_template(finished).map(|source| manifest::sha256(source.as_bytes())),
        recipe: manifest::digests(&[absolute(&plan.path)?], &quiet)?.remove(0),
        resolved_recipe: serde_json::to_value(&plan.recipe)
            .expect("a recipe was read from YAML, so it has a JSON form"),
        seeds: BTreeMap::from([("training".to_string(), plan.training.seed)]),
        metrics,
        program: manifest::program(),
        documentation: Some(documentation),
        outputs: Vec::new(),
    })
}

/// What the documentation says of the model: its size, its base's licence, and the work of training it.
fn model(finished: &Finished<'_>) -> Result<documentation::Model> {
    let (plan, checkpoint, outcome) = (finished.plan, finished.checkpoint, &finished.outcome);
    let spec = families::spec(checkpoint)?;
    let parameters: i64 = spec.tensors().values().map(|shape| shape.iter().product::<i64>()).sum();
    let cut = Cut { training: &plan.training, max_length: plan.dataset.max_length, dataset: Some(finished.train) };
    let pass = cut.lengths(&spec);
    // Of attention as much as the tokens that were seen have in a pass.
    let part = outcome.tokens as f64 / pass.tokens.max(1.0);
    let lengths = Lengths {
        documents: part * pass.documents,
        tokens: outcome.tokens as f64,
        trained: outcome.trained_tokens as f64,
        attention: part * pass.attention,
    };
    let adapters = PlannedAdapters::attached(finished.adapters);
    Ok(documentation::Model {
        architecture: checkpoint.config["model_type"].as_str().unwrap_or_default().into(),
        parameters: parameters as u64,
        trained: finished.adapters.trainable() as u64,
        context: spec.max_position_embeddings,
        operations: Work::of(&spec, &adapters).operations(&lengths),
        licence: Licence::of(checkpoint),
    })
}

/// Outputs that an earlier manifest of this run lists, still there and of the same step: they are the run's as much as those
/// written now.
fn kept(finished: &Finished<'_>, written: &[FileDigest], metrics: &serde_json::Value) -> Vec<FileDigest> {
    let dir = &finished.plan.output.dir;
    if !dir.join(MANIFEST).exists() {
        return Vec::new();
    }
    // One that cannot be read is replaced by a whole one.
    let Ok(earlier) = Manifest::read(dir) else { return Vec::new() };
    let folder = |file: &FileDigest| file.path.parent().map(Path::to_path_buf);
    let mut outputs = earlier.outputs;
    outputs.retain(|file| dir.join(&file.path).is_file() && !written.iter().any(|new| folder(new) == folder(file)));
    if earlier.metrics["taken"] == metrics["taken"] { outputs } else { Vec::new() }
}
