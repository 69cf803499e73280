//! What is exported: a run, an adapter or a whole model, found by its name and proved to belong to its base.

use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use super::super::console::Console;
use super::super::loading;
use crate::adapter::config::CONFIG;
use crate::adapter::{AdapterConfig, LoadedAdapter, Update};
use crate::cli::Export;
use crate::export::manifest::{self, Base, FileDigest, MANIFEST, Manifest};
use crate::model::{ModelSpec, families};
use crate::recipe::{AdapterRecipe, BaseSource};
use crate::weights::Checkpoint;
use crate::{Error, Fault, Result};

/// What was named.
pub(super) enum Source {
    /// A folder of `adapter_config.json`.
    Adapter(PathBuf),
    /// The adapter of a run that is over, the run's folder, and what its manifest says.
    Run(PathBuf, PathBuf, Box<Manifest>),
    /// A whole model.
    Model(BaseSource),
}

/// What is exported, opened.
pub(super) struct Exported {
    pub(super) checkpoint: Checkpoint,
    /// Digests of its files, which are being made.
    pub(super) base_files: JoinHandle<Result<Vec<FileDigest>>>,
    /// The base that the adapter was trained on, where a manifest says so.
    pub(super) trained_on: Option<Base>,
    pub(super) spec: ModelSpec,
    pub(super) config: AdapterConfig,
    /// As read, and fitted to the base.
    pub(super) adapter: Option<(LoadedAdapter, Vec<Update>)>,
    /// Of a run: its folder, and what its manifest says.
    pub(super) run: Option<(PathBuf, Manifest)>,
}

impl Source {
    /// Finds what `typed` names. Errors: nothing of the three, and a run whose writing was cut short or changed since.
    pub(super) fn find(typed: &str) -> Result<Self> {
        let path = Path::new(typed);
        if path.join(CONFIG).exists() {
            return Ok(Self::Adapter(path.to_path_buf()));
        }
        let model = path.join("config.json").exists();
        if path.is_dir()
            && !model
            && ["state", "adapter", "merged", MANIFEST].iter().any(|name| path.join(name).exists())
        {
            return run(path);
        }
        if path.is_file() && path.extension().is_some_and(|end| end == "yaml" || end == "yml") {
            let fault = Fault::at(path, "is a recipe, and --target takes what a run has written");
            return Err(Error::Model(fault.hint("name the recipe's output.dir")));
        }
        let hint = "name a run's folder, an adapter's folder, a merged model's folder or a .gguf file";
        let found = BaseSource::find(typed, None, Path::new(""));
        found.map(Self::Model).map_err(|fault| {
            let hint = if fault.hint.is_empty() { hint.to_string() } else { fault.hint };
            Error::Model(Fault { place: "SOURCE".into(), hint, ..fault })
        })
    }

    /// Opens it with its base: `--model`, or what its manifest or its config names.
    pub(super) fn open(self, arguments: &Export, console: &Console) -> Result<Exported> {
        let (folder, run) = match self {
            Self::Model(source) => {
                if let Some(model) = &arguments.model {
                    let fault =
                        Fault::new("--model", format!("names {model}, but {} is a whole model", arguments.source));
                    return Err(Error::Recipe(vec![fault.hint("leave it out")]));
                }
                let checkpoint = loading::checkpoint(&source, console)?;
                let spec = families::spec(&checkpoint)?;
                let base_files = loading::hash_in_background(checkpoint.files.clone());
                return Ok(Exported {
                    checkpoint,
                    base_files,
                    trained_on: None,
                    spec,
                    config: nothing(),
                    adapter: None,
                    run: None,
                });
            }
            Self::Adapter(folder) => (folder, None),
            Self::Run(folder, run, manifest) => (folder, Some((run, *manifest))),
        };
        let adapter = LoadedAdapter::read(&folder)?;
        let source = base(arguments, run.as_ref().map(|(_, manifest)| manifest), &adapter)?;
        let mut checkpoint = loading::checkpoint(&source, console)?;
        let base_files = loading::hash_in_background(checkpoint.files.clone());
        let trained_on = match &run {
            Some((_, manifest)) => Some(manifest.base.clone()),
            // Weights that were quantised have fingerprints, whatever files they lie in.
            None => Base::of_adapter(&folder).filter(|_| adapter.trained_on().is_ok_and(|on| on.is_none())),
        };
        loading::with_tokens_of(&adapter, &mut checkpoint)?;
        let mut spec = families::spec(&checkpoint)?;
        spec.grow(checkpoint.vocabulary)?;
        let sites = spec.sites();
        let fitted = adapter.fit(&sites, &spec.names)?;
        let config = adapter.config_on(&fitted, &sites, &spec.names, adapter.config.lora_dropout)?;
        let adapter = Some((adapter, fitted.into_values().collect()));
        Ok(Exported { checkpoint, base_files, trained_on, spec, config, adapter, run })
    }
}

/// A run's adapter, where its manifest says that the run wrote all of it, as it is there now; else its merged model, by the same rule.
fn run(path: &Path) -> Result<Source> {
    let cut_short = |what: &str| {
        let hint = "end it: engraft train RECIPE --resume; or write what it has learned so far: engraft export RECIPE";
        Err(Error::State(Fault::at(path, what).hint(hint)))
    };
    let [adapter, merged] = ["adapter", "merged"].map(|name| path.join(name));
    let is_merged = !adapter.join(CONFIG).exists();
    if is_merged && !merged.join("config.json").exists() {
        return cut_short("is a run that has written no adapter: it is not over, or was stopped");
    }
    if !path.join(MANIFEST).exists() {
        return cut_short("is a run without manifest.json, which it writes last: its writing was cut short");
    }
    let manifest = Manifest::read(path)?;
    let folder = if is_merged { merged } else { adapter };
    let known = |file: &&FileDigest| path.join(&file.path).starts_with(&folder);
    let listed: Vec<&FileDigest> = manifest.outputs.iter().filter(known).collect();
    if listed.is_empty() {
        let what = format!("has {}, which its manifest.json does not list", folder.display());
        let hint = format!("name that folder itself to export what lies there: {}", folder.display());
        return Err(Error::State(Fault::at(path, what).hint(hint)));
    }
    for found in manifest::outputs(path, std::slice::from_ref(&folder), &|_, _| ())? {
        let said = listed.iter().find(|file| file.path == found.path);
        if said.is_some_and(|said| said.sha256 != found.sha256) {
            let what = "is not what the run wrote: its SHA-256 is another than in manifest.json";
            let hint = format!("name its own folder to export it as it is now: {}", folder.display());
            return Err(Error::State(Fault::at(&path.join(&found.path), what).hint(hint)));
        }
    }
    let missing = listed.iter().find(|file| !path.join(&file.path).exists());
    if let Some(file) = missing {
        return cut_short(&format!("lacks {}, which its manifest.json lists", file.path.display()));
    }
    Ok(match is_merged {
        true => Source::Model(BaseSource::Folder(folder)),
        false => Source::Run(folder, path.to_path_buf(), Box::new(manifest)),
    })
}

/// Where the adapter's base is.
fn base(arguments: &Export, manifest: Option<&Manifest>, adapter: &LoadedAdapter) -> Result<BaseSource> {
    let of = |fault: Fault, place: &str, way_out: &str| {
        let hint = [fault.hint.as_str(), way_out].into_iter().filter(|hint| !hint.is_empty()).collect::<Vec<_>>();
        Error::Model(Fault { place: place.into(), hint: hint.join("; "), ..fault })
    };
    if let Some(model) = &arguments.model {
        let found = BaseSource::find(model, arguments.revision.as_deref(), Path::new(""));
        return found.map_err(|fault| of(fault, "--model", ""));
    }
    let way_out = "name the base: --model";
    let (name, revision, folder) = match manifest {
        // Paths in a recipe start at its own folder.
        Some(manifest) => {
            (&manifest.base.name, &manifest.base.revision, manifest.recipe.path.parent().unwrap_or(Path::new("")))
        }
        None => match &adapter.config.base_model_name_or_path {
            Some(name) => (name, &adapter.config.revision, Path::new("")),
            None => {
                let fault = Fault::at(&adapter.folder.join(CONFIG), "does not say which base the adapter is for");
                return Err(Error::Model(fault.hint(way_out)));
            }
        },
    };
    let place = format!("the base of {}", adapter.folder.display());
    let found = BaseSource::find(name, None, folder).map_err(|fault| of(fault, &place, way_out))?;
    Ok(match found {
        BaseSource::Hub { id, revision: main } => BaseSource::Hub { id, revision: revision.clone().unwrap_or(main) },
        local => local,
    })
}

/// The config of no adapter.
fn nothing() -> AdapterConfig {
    let selection = crate::adapter::targets::Selection {
        targets: Vec::new(),
        target_modules: crate::recipe::Targets::Names(Vec::new()),
        layers_to_transform: None,
        notices: Vec::new(),
    };
    AdapterConfig::new(&AdapterRecipe::default(), &selection)
}
