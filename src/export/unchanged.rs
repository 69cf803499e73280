//! Whether the files that a manifest lists are still those that it lists.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::folder::tokenizer_file;
use super::manifest::{self, Base, FileDigest, MANIFEST, sha256};
use super::signature::SIGNATURE;
use crate::data::Tokenizer;
use crate::error::one_line;
use crate::recipe::BaseSource;
use crate::weights::{Checkpoint, json_object, read, sha256_file, sha256_file_told};
use crate::{Error, Fault, Result};

/// Longest manifest that is read.
const MOST_BYTES: u64 = 64 << 20;
/// Longest file of a tokenizer that is read: those of 250 000 tokens have some 35 MB.
const MOST_TOKENIZER_BYTES: u64 = 256 << 20;

/// What became of one thing that a manifest lists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// `base`, `training data`, `eval data`, `tokenizer`, `chat template`, `recipe`, `adapter`, `output`, `program`.
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
    /// It is there, and what it holds cannot be found out.
    Unreadable {
        /// Why.
        why: String,
    },
    /// It is not here, where it need not be.
    Unknown {
        /// Why.
        why: String,
    },
    /// The program that wrote the manifest is another one than this, which is no fault of the files.
    Another {
        /// Its version, as the manifest has it.
        version: String,
        /// Its SHA-256, as the manifest has it.
        expected: String,
        /// SHA-256 of this one.
        found: String,
    },
}

/// The parts of a manifest that have digests: of a run, of a merged model, of an export.
#[derive(Deserialize)]
struct Listed {
    #[serde(default)]
    engraft_version: String,
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
    program: Option<String>,
    #[serde(default)]
    outputs: Vec<FileDigest>,
    /// Of an export.
    #[serde(default)]
    target: Option<serde_json::Value>,
}

impl Listed {
    /// What cannot be a manifest of ours: one that names nothing that could be compared, or files where it has no business.
    fn prove(&self) -> Result<(), String> {
        let base = self.base.as_ref().map_or(0, |base| base.files.len());
        if self.outputs.is_empty() && (self.target.is_some() || base == 0) {
            let what = if self.target.is_some() { "no outputs" } else { "no base and no outputs" };
            return Err(format!("lists {what}, so that nothing can be compared"));
        }
        let inside = |path: &Path| {
            path.components().count() > 0 && path.components().all(|part| matches!(part, Component::Normal(_)))
        };
        if let Some(file) = self.outputs.iter().find(|file| !inside(&file.path)) {
            return Err(format!("lists the output {:?}, which is no path within its folder", file.path));
        }
        if let Some(name) = self.tokenizer.keys().find(|name| !tokenizer_file(name)) {
            return Err(format!("names {name:?} among the tokenizer's files, which is none"));
        }
        Ok(())
    }
}

/// Looks at every file that the manifest in `folder` lists, at what else lies beside its outputs, and at the program that runs;
/// `progress` is told bytes read and in all, from several threads.
///
/// # Errors
/// [`Error::State`]: no manifest, or not one, or one that lists nothing.
pub fn changes(folder: &Path, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Vec<Change>> {
    let path = folder.join(MANIFEST);
    let state = |error: Error| Error::State(error.faults()[0].clone());
    let (value, _) = json_object(&path, MOST_BYTES).map_err(state)?;
    let listed: Listed = serde_json::from_value(value).map_err(|error| Error::State(Fault::at(&path, error)))?;
    listed.prove().map_err(|what| Error::State(Fault::at(&path, what)))?;

    let base = listed.base.as_ref();
    let digests = [
        ("base", base.map(|base| base.files.as_slice()).unwrap_or_default()),
        ("training data", &listed.train),
        ("eval data", &listed.eval),
        ("recipe", listed.recipe.as_slice()),
        ("adapter", &listed.adapter),
        ("output", &listed.outputs),
    ];
    let files = digests.into_iter().flat_map(|(what, files)| files.iter().map(move |file| (what, file)));
    // What can be told without reading is, so that it is known how much there is to read.
    let files: Vec<(&'static str, PathBuf, &FileDigest, Option<State>)> = files
        .map(|(what, file)| {
            let path = found_at(folder, what, &file.path);
            // An export is served elsewhere than it was made.
            let elsewhere = listed.target.is_some() && what != "output";
            let state = at_a_glance(&path, file, elsewhere);
            (what, path, file, state)
        })
        .collect();
    let total = files.iter().filter(|(.., state)| state.is_none()).map(|(_, _, file, _)| file.bytes).sum();
    let done = AtomicU64::new(0);
    progress(0, total);
    let hashed = |more: u64| progress(done.fetch_add(more, Ordering::Relaxed) + more, total);
    let look = |(what, path, file, state): &(&'static str, PathBuf, &FileDigest, Option<State>)| {
        let state = state.clone().unwrap_or_else(|| compared(path, file, &mut &hashed));
        Change { what, path: path.clone(), state }
    };
    let mut all: Vec<Change> = files.par_iter().map(look).collect();
    all.extend(base.filter(|_| listed.target.is_none()).and_then(config_of));
    all.extend(texts(folder, &listed));
    all.extend(extra(folder, &listed.outputs));
    all.extend(program(&listed));
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

/// What can be told without reading; `elsewhere` says that the file may be on another machine.
fn at_a_glance(path: &Path, expected: &FileDigest, elsewhere: bool) -> Option<State> {
    let metadata = match path.metadata() {
        Ok(metadata) => metadata,
        Err(_) if elsewhere => return Some(State::Unknown { why: "is not on this machine".into() }),
        Err(error) if is_missing(error.kind()) => return Some(State::Missing),
        Err(error) => return Some(State::Unreadable { why: error.to_string() }),
    };
    if !metadata.is_file() {
        return Some(State::Changed { expected: expected.sha256.clone(), found: "no file".into() });
    }
    (metadata.len() != expected.bytes).then(|| {
        let found = format!("{} bytes instead of {}", metadata.len(), expected.bytes);
        State::Changed { expected: expected.sha256.clone(), found }
    })
}

fn is_missing(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::NotFound | ErrorKind::NotADirectory)
}

fn compared(path: &Path, expected: &FileDigest, more: &mut dyn FnMut(u64)) -> State {
    match sha256_file_told(path, more) {
        Ok(found) if found == expected.sha256 => State::Same,
        Ok(found) => State::Changed { expected: expected.sha256.clone(), found },
        Err(error) => unreadable(&error),
    }
}

fn unreadable(error: &Error) -> State {
    State::Unreadable { why: error.faults()[0].what.clone() }
}

/// Whether the program that wrote the manifest is this one.
fn program(listed: &Listed) -> Option<Change> {
    let expected = listed.program.as_ref()?;
    let path = std::env::current_exe().unwrap_or_default();
    let state = match manifest::program() {
        None => State::Unknown { why: "the program that runs cannot be read".into() },
        Some(found) if found == *expected => State::Same,
        Some(found) => State::Another { version: listed.engraft_version.clone(), expected: expected.clone(), found },
    };
    Some(Change { what: "program", path, state })
}

/// The base's config, where it is a file of its own.
fn config_of(base: &Base) -> Option<Change> {
    let (expected, first) = (base.config.as_ref()?, base.files.first()?);
    let path = first.path.with_file_name("config.json");
    if first.path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf")) {
        return None;
    }
    let state = match sha256_file(&path) {
        Ok(found) if found == *expected => State::Same,
        // The base of an adapter that added tokens has them in its config, too.
        Ok(found) => State::Changed { expected: expected.clone(), found },
        Err(error) => match path.metadata() {
            Err(error) if is_missing(error.kind()) => State::Missing,
            _ => unreadable(&error),
        },
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
            Some((path.clone(), sha256_file(&path).ok()?))
        }));
        changes.push(one_of("tokenizer", Path::new(name), expected, &found));
    }
    if let Some(expected) = &listed.chat_template {
        let mut found = Vec::new();
        for place in &folders {
            let read = |name: &str| Some((name.to_string(), read(&place.join(name), MOST_TOKENIZER_BYTES).ok()?));
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
    /// Whether the files are not those that the manifest lists, or cannot be told to be.
    pub fn matters(&self) -> bool {
        matches!(self.state, State::Changed { .. } | State::Missing | State::Extra | State::Unreadable { .. })
    }
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let short = |digest: &str| {
            digest.get(..16).filter(|_| digest.len() == 64).map_or(one_line(digest), |it| one_line(it) + "...")
        };
        // Names are whatever the manifest says, and must not look like lines of ours.
        write!(f, "{:<14}{}: ", self.what, one_line(&self.path.to_string_lossy()))?;
        match &self.state {
            State::Same => f.write_str("same"),
            State::Changed { expected, found } => {
                write!(f, "CHANGED, SHA-256 was {}, is {}", short(expected), short(found))
            }
            State::Missing => f.write_str("MISSING"),
            State::Extra => f.write_str("EXTRA, the manifest does not list it"),
            State::Unreadable { why } => write!(f, "UNREADABLE, {}", one_line(why)),
            State::Unknown { why } => write!(f, "cannot be told: {}", one_line(why)),
            State::Another { version, expected, found } => {
                let (expected, found) = (short(expected), short(found));
                write!(f, "this is {found}, made by another program: engraft {}, SHA-256 {expected}", one_line(version))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Mutex;

    use serde_json::{Value, json};

    use super::*;
    use crate::export::manifest::digests;

    /// A folder with an export in it, of a base that lies beside.
    fn export() -> (tempfile::TempDir, Value) {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            digests(&[path], &|_, _| ()).unwrap().remove(0)
        };
        let base = file("base/model.safetensors", "weights");
        let mut output = file("out/model.gguf", &"numbers ".repeat(1 << 20));
        output.path = "model.gguf".into();
        let manifest = json!({
            "engraft_version": "9.9.9", "target": "llama.cpp", "outputs": [output], "program": manifest::program(),
            "base": {"name": "base", "revision": null, "files": [base], "config": null},
        });
        (folder, manifest)
    }

    fn found(folder: &Path, manifest: &Value) -> Result<Vec<Change>> {
        fs::write(folder.join("out").join(MANIFEST), manifest.to_string()).unwrap();
        changes(&folder.join("out"), &|_, _| ())
    }

    fn telling(changes: &[Change]) -> Vec<String> {
        changes.iter().filter(|change| change.matters()).map(Change::to_string).collect()
    }

    #[test]
    fn a_file_that_cannot_be_read_is_not_taken_for_the_same() {
        let (folder, manifest) = export();
        assert_eq!(telling(&found(folder.path(), &manifest).unwrap()), [""; 0]);
        let output = folder.path().join("out/model.gguf");
        // Whoever may read everything can still not read what a disk has lost: a file of the system that refuses to be read.
        let (path, expected) = if fs::set_permissions(&output, fs::Permissions::from_mode(0o0)).is_ok()
            && fs::File::open(&output).is_err()
        {
            (output.clone(), FileDigest { path: output.clone(), bytes: 8 << 20, sha256: "0".repeat(64) })
        } else {
            let memory = PathBuf::from("/proc/self/mem");
            (memory.clone(), FileDigest { path: memory, bytes: 0, sha256: "0".repeat(64) })
        };
        assert_eq!(at_a_glance(&path, &expected, false), None);
        let state = compared(&path, &expected, &mut |_| ());
        let change = Change { what: "output", path, state };
        assert!(change.matters() && change.to_string().contains(": UNREADABLE, cannot be read"), "{change}");
    }

    #[test]
    fn what_an_export_was_made_of_need_not_be_here() {
        let (folder, manifest) = export();
        fs::remove_dir_all(folder.path().join("base")).unwrap();
        let changes = found(folder.path(), &manifest).unwrap();
        assert_eq!(telling(&changes), [""; 0]);
        assert!(changes[0].what == "base" && matches!(changes[0].state, State::Unknown { .. }), "{changes:?}");
        // What it consists of must.
        fs::remove_file(folder.path().join("out/model.gguf")).unwrap();
        assert!(telling(&found(folder.path(), &manifest).unwrap())[0].ends_with("model.gguf: MISSING"));
    }

    #[test]
    fn a_manifest_that_lists_nothing_or_reaches_elsewhere_is_refused() {
        let (folder, manifest) = export();
        let refused = |change: &dyn Fn(&mut Value)| {
            let mut changed = manifest.clone();
            change(&mut changed);
            let error = found(folder.path(), &changed).unwrap_err();
            assert_eq!(error.exit_code(), 7);
            error.to_string()
        };
        let text = refused(&|manifest| *manifest = json!({}));
        assert!(text.contains("lists no base and no outputs"), "{text}");
        let text = refused(&|manifest| *manifest = json!({"outputs": [], "base": null}));
        assert!(text.contains("lists no base and no outputs"), "{text}");
        // Of an export that lists none of its own files, all the rest may be elsewhere.
        let text = refused(&|manifest| manifest["outputs"] = json!([]));
        assert!(text.contains("lists no outputs"), "{text}");
        for path in ["/etc/passwd", "../base/model.safetensors", "a/../../b", "", "./model.gguf"] {
            let text = refused(&|manifest| manifest["outputs"][0]["path"] = json!(path));
            assert!(text.contains("no path within its folder") && text.contains(path), "{text}");
        }
        for name in ["/dev/zero", "../tokenizer.json", "model.gguf"] {
            let text = refused(&|manifest| manifest["tokenizer"] = json!({name: "00"}));
            assert!(text.contains("among the tokenizer's files") && text.contains(name), "{text}");
        }
    }

    #[test]
    fn neither_endless_files_nor_those_that_wait_for_a_writer_are_read() {
        let (folder, mut manifest) = export();
        manifest.as_object_mut().unwrap().remove("target");
        manifest["base"]["config"] = json!("00");
        manifest["tokenizer"] = json!({"tokenizer.json": "00", "tokenizer_config.json": "00"});
        manifest["chat_template"] = json!("00");
        let base = folder.path().join("base");
        std::os::unix::fs::symlink("/dev/zero", base.join("config.json")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", base.join("tokenizer.json")).unwrap();
        assert!(
            std::process::Command::new("mkfifo").arg(base.join("tokenizer_config.json")).status().unwrap().success()
        );
        let lines = telling(&found(folder.path(), &manifest).unwrap());
        assert_eq!(lines.len(), 4, "{lines:?}");
        assert!(lines[0].ends_with("config.json: UNREADABLE, is not a regular file"), "{lines:?}");
    }

    #[test]
    fn another_program_is_told_and_is_no_fault() {
        let (folder, mut manifest) = export();
        let program = |manifest: &Value| found(folder.path(), manifest).unwrap().pop().unwrap();
        let change = program(&manifest);
        assert!(change.what == "program" && change.state == State::Same, "{change:?}");
        manifest["program"] = json!("ab".repeat(32));
        let change = program(&manifest);
        assert!(!change.matters());
        let said = "made by another program: engraft 9.9.9, SHA-256 abababababababab...";
        assert!(change.to_string().ends_with(said), "{change}");
        manifest["program"] = Value::Null;
        assert_eq!(program(&manifest).what, "output");
    }

    #[test]
    fn progress_counts_bytes_within_files() {
        let (folder, manifest) = export();
        fs::write(folder.path().join("out").join(MANIFEST), manifest.to_string()).unwrap();
        let told = Mutex::new(Vec::new());
        changes(&folder.path().join("out"), &|done, total| told.lock().unwrap().push((done, total))).unwrap();
        let told = told.into_inner().unwrap();
        let total = (8 << 20) + 7;
        assert_eq!(told.first(), Some(&(0, total)));
        assert_eq!(told.iter().max(), Some(&(total, total)));
        assert!(told.len() > 8, "{told:?}");
    }

    #[test]
    fn names_in_a_manifest_steer_no_terminal() {
        let path = PathBuf::from("a\u{1b}[2J\noutput        b: same");
        let change = Change { what: "output", path, state: State::Missing };
        assert_eq!(change.to_string(), "output        a\\u{1b}[2J\\noutput        b: same: MISSING");
        let state = State::Another { version: "\u{1b}c".into(), expected: "\u{202e}x".into(), found: "00".into() };
        let text = Change { what: "program", path: "p".into(), state }.to_string();
        assert!(!text.contains(['\u{1b}', '\u{202e}']), "{text:?}");
    }

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
