//! What is exported: a run, an adapter or a whole model, found by its name and proved to belong to its base.

use std::path::{Path, PathBuf};

use super::super::console::Console;
use super::super::loading;
use crate::adapter::config::CONFIG;
use crate::adapter::{AdapterConfig, LoadedAdapter, Update};
use crate::cli::Export;
use crate::export::manifest::{self, FileDigest, MANIFEST, Manifest};
use crate::model::{ModelSpec, families};
use crate::recipe::{AdapterRecipe, BaseSource};
use crate::weights::Checkpoint;
use crate::{Error, Fault, Result};

/// What was named.
pub(super) enum Source {
    /// A folder of `adapter_config.json`.
    Adapter(PathBuf),
    /// The adapter of a run that is over, and what its manifest says.
    Run(PathBuf, Box<Manifest>),
    /// A whole model.
    Model(BaseSource),
}

/// What is exported, opened.
pub(super) struct Exported {
    pub(super) checkpoint: Checkpoint,
    pub(super) spec: ModelSpec,
    pub(super) config: AdapterConfig,
    /// As read, and fitted to the base.
    pub(super) adapter: Option<(LoadedAdapter, Vec<Update>)>,
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
        let (folder, manifest) = match self {
            Self::Model(source) => {
                if let Some(model) = &arguments.model {
                    let fault =
                        Fault::new("--model", format!("names {model}, but {} is a whole model", arguments.source));
                    return Err(Error::Recipe(vec![fault.hint("leave it out")]));
                }
                let checkpoint = loading::checkpoint(&source, console)?;
                let spec = families::spec(&checkpoint)?;
                return Ok(Exported { checkpoint, spec, config: nothing(), adapter: None });
            }
            Self::Adapter(folder) => (folder, None),
            Self::Run(folder, manifest) => (folder, Some(manifest)),
        };
        let adapter = LoadedAdapter::read(&folder)?;
        let source = base(arguments, manifest.as_deref(), &adapter)?;
        let mut checkpoint = loading::checkpoint(&source, console)?;
        if let Some(manifest) = manifest.filter(|_| !arguments.other_base) {
            same_base(&manifest, &checkpoint)?;
        }
        loading::with_tokens_of(&adapter, &mut checkpoint)?;
        let mut spec = families::spec(&checkpoint)?;
        spec.grow(checkpoint.vocabulary)?;
        let sites = spec.sites();
        let fitted = adapter.fit(&sites, &spec.names)?;
        let config = adapter.config_on(&fitted, &sites, &spec.names, adapter.config.lora_dropout)?;
        Ok(Exported { checkpoint, spec, config, adapter: Some((adapter, fitted.into_values().collect())) })
    }
}

/// A run's adapter, where its manifest says that the run wrote all of it, as it is there now; else its merged model.
fn run(path: &Path) -> Result<Source> {
    let cut_short = |what: &str| {
        let hint = "end it: engraft train RECIPE --resume; or write what it has learned so far: engraft export RECIPE";
        Err(Error::State(Fault::at(path, what).hint(hint)))
    };
    let folder = path.join("adapter");
    if !folder.join(CONFIG).exists() {
        let merged = path.join("merged");
        if merged.join("config.json").exists() && path.join(MANIFEST).exists() {
            return Ok(Source::Model(BaseSource::Folder(merged)));
        }
        return cut_short("is a run that has written no adapter: it is not over, or was stopped");
    }
    if !path.join(MANIFEST).exists() {
        return cut_short("is a run without manifest.json, which it writes last: its writing was cut short");
    }
    let manifest = Manifest::read(path)?;
    let known = |file: &&FileDigest| file.path.starts_with("adapter");
    for found in manifest::outputs(path, std::slice::from_ref(&folder), &|_, _| ())? {
        let said = manifest.outputs.iter().filter(known).find(|file| file.path == found.path);
        if said.is_some_and(|said| said.sha256 != found.sha256) {
            let what = "is not what the run wrote: its SHA-256 is another than in manifest.json";
            let hint = format!("name the adapter's own folder to export it as it is now: {}", folder.display());
            return Err(Error::State(Fault::at(&path.join(&found.path), what).hint(hint)));
        }
    }
    let missing = manifest.outputs.iter().filter(known).find(|file| !path.join(&file.path).exists());
    if let Some(file) = missing {
        return cut_short(&format!("lacks {}, which its manifest.json lists", file.path.display()));
    }
    Ok(Source::Run(folder, Box::new(manifest)))
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

/// Refuses a base with other numbers than a run was trained on.
fn same_base(manifest: &Manifest, checkpoint: &Checkpoint) -> Result<()> {
    let found = manifest::digests(&checkpoint.files, &|_, _| ())?;
    let said = &manifest.base.files;
    let differs = found.iter().zip(said).find(|(found, said)| found.sha256 != said.sha256);
    if found.len() == said.len() && differs.is_none() {
        return Ok(());
    }
    let what = match differs {
        Some((found, _)) => format!("{} has other numbers than the base of the run", found.path.display()),
        None => format!("has {} weight files, the base of the run {}", found.len(), said.len()),
    };
    let hint = format!(
        "the run was trained on {}: name that with --model, or say --other-base to export for this one all the same",
        manifest.base.name
    );
    Err(Error::Model(Fault::new("the base", what).hint(hint)))
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
