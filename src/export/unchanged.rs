//! Whether the files that a manifest lists are still those that it lists.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::manifest::{Base, FileDigest, MANIFEST, sha256};
use super::signature::SIGNATURE;
use crate::data::Tokenizer;
use crate::recipe::BaseSource;
use crate::weights::{Checkpoint, json_object, sha256_file};
use crate::{Error, Fault, Result};

/// Longest manifest that is read.
const MOST_BYTES: u64 = 64 << 20;

/// What became of one thing that a manifest lists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// `base`, `training data`, `eval data`, `tokenizer`, `chat template`, `recipe`, `adapter`, `output`.
    pub what: &'static str,
    /// Which file.
    pub path: PathBuf,
    /// What became of it.
    #[serde(flatten)]
    pub state: State,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum State {
    /// Nothing.
    Same,
    /// It holds something else.
    Changed {
        /// SHA-256 that the manifest has.
        expected: String,
        /// SHA-256 now; the length alone where that differs.
        found: String,
    },
    /// It is no longer there.
    Missing,
    /// It is there, and not in the manifest.
    Extra,
    /// It cannot be told here.
    Unknown {
        /// Why.
        why: String,
    },
}

/// The parts of a manifest that have digests: of a run, of a merged model, of an export.
#[derive(Deserialize)]
struct Listed {
    base: Option<Base>,
    #[serde(default)]
    train: Vec<FileDigest>,
    #[serde(default)]
    eval: Vec<FileDigest>,
    #[serde(default)]
    tokenizer: BTreeMap<String, String>,
    chat_template: Option<String>,
    recipe: Option<FileDigest>,
    #[serde(default)]
    adapter: Vec<FileDigest>,
    #[serde(default)]
    outputs: Vec<FileDigest>,
    /// Of an export.
    #[serde(default)]
    target: Option<serde_json::Value>,
}

/// Looks at every file that the manifest in `folder` lists, and at what else lies beside its outputs; `progress` is told files done
/// and in all, from several threads.
///
/// # Errors
/// [`Error::State`]: no manifest, or not one.
pub fn changes(folder: &Path, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Vec<Change>> {
    let path = folder.join(MANIFEST);
    let state = |error: Error| Error::State(error.faults()[0].clone());
    let (value, _) = json_object(&path, MOST_BYTES).map_err(state)?;
    let listed: Listed = serde_json::from_value(value).map_err(|error| Error::State(Fault::at(&path, error)))?;

    let base = listed.base.as_ref();
    let digests = [
        ("base", base.map(|base| base.files.as_slice()).unwrap_or_default()),
        ("training data", &listed.train),
        ("eval data", &listed.eval),
        ("recipe", listed.recipe.as_slice()),
        ("adapter", &listed.adapter),
        ("output", &listed.outputs),
    ];
    let files: Vec<(&'static str, &FileDigest)> =
        digests.into_iter().flat_map(|(what, files)| files.iter().map(move |file| (what, file))).collect();
    let done = std::sync::atomic::AtomicU64::new(0);
    let look = |(what, file): &(&'static str, &FileDigest)| {
        let path = found_at(folder, what, &file.path);
        let state = match compared(&path, file) {
            // It is served elsewhere than it was made.
            State::Missing if listed.target.is_some() && *what != "output" => {
                State::Unknown { why: "is not on this machine".into() }
            }
            state => state,
        };
        let done = 1 + done.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        progress(done, files.len() as u64);
        Change { what, path, state }
    };
    let mut all: Vec<Change> = files.par_iter().map(look).collect();
    all.extend(base.filter(|_| listed.target.is_none()).and_then(config_of));
    all.extend(texts(folder, &listed));
    all.extend(extra(folder, &listed.outputs));
    Ok(all)
}

/// Outputs lie under the folder; the rest is where it was, as seen from here or from the folder.
fn found_at(folder: &Path, what: &str, path: &Path) -> PathBuf {
    match what {
        "output" => folder.join(path),
        _ if path.exists() => path.to_path_buf(),
        _ if folder.join(path).exists() => folder.join(path),
        _ => path.to_path_buf(),
    }
}

fn compared(path: &Path, expected: &FileDigest) -> State {
    let Ok(metadata) = path.metadata() else { return State::Missing };
    if !metadata.is_file() {
        return State::Changed { expected: expected.sha256.clone(), found: "no file".into() };
    }
    if metadata.len() != expected.bytes {
        let found = format!("{} bytes instead of {}", metadata.len(), expected.bytes);
        return State::Changed { expected: expected.sha256.clone(), found };
    }
    match sha256_file(path) {
        Ok(found) if found == expected.sha256 => State::Same,
        Ok(found) => State::Changed { expected: expected.sha256.clone(), found },
        Err(error) => State::Unknown { why: error.to_string() },
    }
}

/// The base's config, where it is a file of its own.
fn config_of(base: &Base) -> Option<Change> {
    let (expected, first) = (base.config.as_ref()?, base.files.first()?);
    let path = first.path.with_file_name("config.json");
    if first.path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf")) {
        return None;
    }
    let state = match std::fs::read(&path) {
        Err(_) => State::Missing,
        Ok(bytes) if sha256(&bytes) == *expected => State::Same,
        // The base of an adapter that added tokens has them in its config, too.
        Ok(bytes) => State::Changed { expected: expected.clone(), found: sha256(&bytes) },
    };
    Some(Change { what: "base", path, state })
}

/// Tokenizer and template are texts, not files: they lie beside the base, inside a GGUF, or beside what was written.
fn texts(folder: &Path, listed: &Listed) -> Vec<Change> {
    let outputs: BTreeSet<PathBuf> =
        listed.outputs.iter().filter_map(|file| Some(folder.join(&file.path).parent()?.to_path_buf())).collect();
    let base = listed.base.as_ref().and_then(|base| base.files.first()).map(|file| file.path.as_path());
    let gguf = base.filter(|path| path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf")));
    let inside = gguf.and_then(|path| Checkpoint::open(&BaseSource::Gguf(path.to_path_buf())).ok());
    let inside = inside.map(|checkpoint| checkpoint.sidecars).unwrap_or_default();
    let beside = base.and_then(Path::parent).map(Path::to_path_buf);
    let folders: Vec<PathBuf> = beside.into_iter().filter(|_| gguf.is_none()).chain(outputs).collect();
    let mut changes = Vec::new();
    for (name, expected) in &listed.tokenizer {
        let mut found: Vec<(PathBuf, String)> =
            inside.get(name).map(|bytes| (gguf.unwrap_or(folder).to_path_buf(), sha256(bytes))).into_iter().collect();
        found.extend(folders.iter().filter_map(|folder| {
            let path = folder.join(name);
            Some((path.clone(), sha256(&std::fs::read(path).ok()?)))
        }));
        changes.push(one_of("tokenizer", Path::new(name), expected, &found));
    }
    if let Some(expected) = &listed.chat_template {
        let mut found = Vec::new();
        for place in &folders {
            let read = |name: &str| Some((name.to_string(), std::fs::read(place.join(name)).ok()?));
            let names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];
            let files: BTreeMap<String, Vec<u8>> = names.into_iter().filter_map(read).collect();
            found.extend(templates(place, &files));
        }
        found.extend(templates(gguf.unwrap_or(folder), &inside));
        changes.push(one_of("chat template", Path::new("chat_template"), expected, &found));
    }
    changes
}

/// Digests of the chat templates among a model's small files.
fn templates(place: &Path, files: &BTreeMap<String, Vec<u8>>) -> Vec<(PathBuf, String)> {
    let own = files.get("chat_template.jinja").map(|bytes| sha256(bytes));
    let tokenizer = Tokenizer::new(files).ok();
    let named = tokenizer.iter().flat_map(|tokenizer| tokenizer.chat_templates().values());
    let digests = named.map(|source| sha256(source.as_bytes())).chain(own);
    digests.map(|digest| (place.to_path_buf(), digest)).collect()
}

/// Unchanged where any of the places still holds it.
fn one_of(what: &'static str, name: &Path, expected: &str, found: &[(PathBuf, String)]) -> Change {
    if let Some((path, _)) = found.iter().find(|(_, digest)| digest == expected) {
        return Change { what, path: path.clone(), state: State::Same };
    }
    match found.first() {
        Some((path, digest)) => {
            let state = State::Changed { expected: expected.into(), found: digest.clone() };
            Change { what, path: path.clone(), state }
        }
        None => Change { what, path: name.to_path_buf(), state: State::Missing },
    }
}

/// Files beside outputs that are not listed.
fn extra(folder: &Path, outputs: &[FileDigest]) -> Vec<Change> {
    let listed: BTreeSet<PathBuf> = outputs.iter().map(|file| folder.join(&file.path)).collect();
    // What lies in the run's own folder is the run's: states, metrics, the report.
    let folders: BTreeSet<&Path> = listed.iter().filter_map(|path| path.parent()).collect();
    let own = outputs.iter().any(|file| file.path.components().count() == 1);
    let entries =
        folders.into_iter().filter(|place| own || *place != folder).flat_map(|place| std::fs::read_dir(place).ok());
    let paths = entries.flatten().flatten().map(|entry| entry.path()).filter(|path| path.is_file());
    let ours = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        listed.contains(path) || (path.parent() == Some(folder) && [MANIFEST, SIGNATURE].contains(&name))
    };
    let mut extra: Vec<PathBuf> = paths.filter(|path| !ours(path)).collect();
    extra.sort();
    extra.into_iter().map(|path| Change { what: "output", path, state: State::Extra }).collect()
}

impl Change {
    /// Whether a person has to know.
    pub fn matters(&self) -> bool {
        matches!(self.state, State::Changed { .. } | State::Missing | State::Extra)
    }
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let short = |digest: &str| {
            digest.get(..16).filter(|_| digest.len() == 64).map_or(digest.to_string(), |it| format!("{it}..."))
        };
        write!(f, "{:<14}{}: ", self.what, self.path.display())?;
        match &self.state {
            State::Same => f.write_str("same"),
            State::Changed { expected, found } => {
                write!(f, "CHANGED, SHA-256 was {}, is {}", short(expected), short(found))
            }
            State::Missing => f.write_str("MISSING"),
            State::Extra => f.write_str("EXTRA, the manifest does not list it"),
            State::Unknown { why } => write!(f, "cannot be told: {why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::export::manifest::digests;

    #[test]
    fn what_changed_is_missing_or_extra_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(folder.path()).unwrap();
        let file = |name: &str, text: &str| {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            digests(&[path], &|_, _| ()).unwrap().remove(0)
        };
        let base = file("base/model.safetensors", "weights");
        let config = file("base/config.json", "{}").sha256;
        let tokenizer = file("base/tokenizer.json", "words").sha256;
        let (train, recipe) = (file("train.parquet", "rows"), file("recipe.yaml", "r: 4"));
        let mut adapter = file("run/adapter/adapter_model.safetensors", "a b");
        adapter.path = "adapter/adapter_model.safetensors".into();
        let run = root.join("run");
        let manifest = serde_json::json!({
            "base": {"name": "base", "revision": null, "files": [base], "config": config},
            "train": [train], "eval": [], "recipe": recipe, "outputs": [adapter],
            "tokenizer": {"tokenizer.json": tokenizer}, "chat_template": null,
        });
        fs::write(run.join(MANIFEST), manifest.to_string()).unwrap();
        fs::write(run.join("metrics.jsonl"), "").unwrap();
        let found = || -> Vec<String> {
            let all = changes(&run, &|_, _| ()).unwrap();
            all.iter().filter(|change| change.matters()).map(|change| change.to_string()).collect()
        };
        assert_eq!(found(), [""; 0]);
        assert_eq!(changes(&run, &|_, _| ()).unwrap().len(), 6);

        for (name, text, said) in [
            ("base/model.safetensors", "Weights", "base          "),
            ("base/config.json", "{} ", "base          "),
            ("base/tokenizer.json", "Words", "tokenizer     "),
            ("train.parquet", "rows and more", "training data "),
            ("recipe.yaml", "r: 8", "recipe        "),
            ("run/adapter/adapter_model.safetensors", "a c", "output        "),
        ] {
            let before = fs::read(root.join(name)).unwrap();
            fs::write(root.join(name), text).unwrap();
            let lines = found();
            assert_eq!(lines.len(), 1, "{name}: {lines:?}");
            assert!(lines[0].starts_with(said) && lines[0].contains("CHANGED") && lines[0].contains(name), "{lines:?}");
            fs::remove_file(root.join(name)).unwrap();
            let lines = found();
            assert!(lines.len() == 1 && lines[0].ends_with("MISSING"), "{lines:?}");
            fs::write(root.join(name), before).unwrap();
        }
        fs::write(run.join("adapter/pytorch_model.bin"), "x").unwrap();
        let lines = found();
        assert!(lines.len() == 1 && lines[0].contains("pytorch_model.bin: EXTRA"), "{lines:?}");
        fs::write(run.join(MANIFEST), "[]").unwrap();
        assert_eq!(changes(&run, &|_, _| ()).unwrap_err().exit_code(), 7);
    }
}
