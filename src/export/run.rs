//! What a finished run writes: its adapter, its merged model, and the manifest that ties them to what they came from.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tch::Kind;

use super::manifest::{self, Base, FileDigest, MANIFEST, Manifest};
use super::{merged, peft, sidecars};
use crate::Result;
use crate::adapter::Adapters;
use crate::data::Dataset;
use crate::quant::Scheme;
use crate::recipe::{Plan, Save};
use crate::torch_ext::torch_version;
use crate::train::Outcome;
use crate::weights::Checkpoint;

/// A run that is done, and all that the manifest says of it.
pub struct Finished<'a> {
    /// What it was asked to do.
    pub plan: &'a Plan,
    /// Its base.
    pub checkpoint: &'a Checkpoint,
    /// How the base was quantised; `None` where it was not.
    pub scheme: Option<&'a Scheme>,
    /// Digests of the base's weight files.
    pub base_files: Vec<FileDigest>,
    /// What it trained.
    pub adapters: &'a Adapters,
    /// What it trained on.
    pub train: &'a Dataset,
    /// What it was evaluated on.
    pub eval: Option<&'a Dataset>,
    /// Source of the chat template its rows were rendered with.
    pub chat_template: Option<&'a str>,
    /// How it went.
    pub outcome: Outcome,
    /// What it ran on.
    pub device: String,
}

/// Writes into the run's folder what `save` names, then `manifest.json`; gives the folders written.
///
/// `progress` is told which of them is being written, and bytes done and in all.
pub fn write(finished: &Finished<'_>, save: &[Save], progress: &dyn Fn(&str, u64, u64)) -> Result<Vec<PathBuf>> {
    let plan = finished.plan;
    let dir = &plan.output.dir;
    let own_template = plan.dataset.chat_template.as_ref().and(finished.chat_template);
    let sidecars = sidecars(finished.checkpoint, own_template);
    let mut written = Vec::new();
    for what in save {
        let (name, folder) = match what {
            Save::Adapter => ("adapter", dir.join("adapter")),
            Save::Merged => ("merged", dir.join("merged")),
        };
        match what {
            Save::Adapter => {
                let mut config = finished.adapters.config.clone();
                // The commit is one of the repository that was trained on, whatever that is called in the config.
                (config.base_model_name_or_path, config.revision) = match &plan.output.base_model_name_or_path {
                    Some(name) => (Some(name.clone()), plan.recipe.revision.clone()),
                    None => (Some(plan.recipe.base_model.clone()), finished.checkpoint.commit.clone()),
                };
                peft::write(&folder, &config, finished.adapters.learned(), finished.scheme, &sidecars)?;
            }
            Save::Merged => {
                let at = |done, total| progress(name, done, total);
                merged::write(
                    &folder,
                    finished.checkpoint,
                    finished.adapters.learned(),
                    finished.scheme,
                    plan.kind,
                    &sidecars,
                    &at,
                )?;
            }
        }
        written.push(folder);
    }
    manifest(finished, &written)?.write(dir)?;
    Ok(written)
}

fn manifest(finished: &Finished<'_>, written: &[PathBuf]) -> Result<Manifest> {
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
    let reports = datasets.into_iter().filter_map(|(set, dataset)| Some((set.to_string(), dataset?.report().clone())));
    let metrics = serde_json::to_value(&finished.outcome).expect("numbers, flags and a path have a JSON form");
    let quiet = |_, _| ();
    let mut outputs = manifest::outputs(&plan.output.dir, written, &quiet)?;
    outputs.extend(kept(finished, &outputs, &metrics));
    outputs.sort_by(|one, other| one.path.cmp(&other.path));
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
        chat_template: finished.chat_template.map(|source| manifest::sha256(source.as_bytes())),
        recipe: manifest::digests(std::slice::from_ref(&plan.path), &quiet)?.remove(0),
        resolved_recipe: serde_json::to_value(&plan.recipe)
            .expect("a recipe was read from YAML, so it has a JSON form"),
        seeds: BTreeMap::from([("training".to_string(), plan.training.seed)]),
        metrics,
        outputs,
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
