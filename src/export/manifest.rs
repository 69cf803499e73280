//! `manifest.json`: what went into a run or a merged model and what came out, with the SHA-256 of every file, so that a result can be traced and
//! made again.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::documentation::Documentation;
use super::folder::tokenizer_file;
use super::quantised::Loss;
use super::signature::SIGNATURE;
use crate::data::DatasetReport;
use crate::evaluate::Measured;
use crate::recipe::Target;
use crate::weights::{Checkpoint, sha256_file, writer};
use crate::{Error, Fault, Result};

/// The file's name, in the run's folder.
pub const MANIFEST: &str = "manifest.json";
/// Longest such file that is read.
const MOST_BYTES: u64 = 64 << 20;

/// What went into a run and what came out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of engraft.
    pub engraft_version: String,
    /// Version of libtorch.
    pub libtorch_version: String,
    /// When it was written, RFC 3339, UTC.
    pub created: String,
    /// What it ran on: `cpu`, or the name of the GPU.
    pub device: String,
    /// Number type of the base and the activations.
    pub dtype: String,
    /// The base model.
    pub base: Base,
    /// Training files.
    pub train: Vec<FileDigest>,
    /// Evaluation files.
    pub eval: Vec<FileDigest>,
    /// What the datasets hold and which of their rows were left out or cut, by `training` and `eval`.
    #[serde(default)]
    pub datasets: BTreeMap<String, DatasetReport>,
    /// SHA-256 of each of the tokenizer's files, by name.
    pub tokenizer: BTreeMap<String, String>,
    /// SHA-256 of the chat template that was trained with; absent where rows are not rendered.
    pub chat_template: Option<String>,
    /// The recipe's file.
    pub recipe: FileDigest,
    /// The recipe as it was run: with overrides applied and defaults filled in.
    pub resolved_recipe: serde_json::Value,
    /// Seeds, by what they seed.
    pub seeds: BTreeMap<String, u64>,
    /// How the run went: the last loss, evaluations, tokens, seconds.
    pub metrics: serde_json::Value,
    /// SHA-256 of the program that ran: the very code, whatever its version is called. Absent where it cannot be read.
    #[serde(default)]
    pub program: Option<String>,
    /// What whoever publishes the model has to document, as far as the run knows it.
    #[serde(default)]
    pub documentation: Option<Documentation>,
    /// What was written, with paths relative to the run's folder.
    pub outputs: Vec<FileDigest>,
}

/// The base model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Base {
    /// As the recipe names it.
    pub name: String,
    /// Commit, for a hub repository: of a branch or tag, the one it pointed to.
    pub revision: Option<String>,
    /// Its weight files, config and tokenizer apart.
    pub files: Vec<FileDigest>,
    /// SHA-256 of its `config.json` (of the one made from its metadata, for a GGUF).
    pub config: Option<String>,
}

/// A file and what it held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileDigest {
    /// Where it was.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// Its SHA-256, in 64 hexadecimal digits.
    pub sha256: String,
}

impl Base {
    /// A checkpoint that was named `name`, with digests of its files.
    pub fn of(checkpoint: &Checkpoint, name: &str, files: Vec<FileDigest>) -> Self {
        Self {
            name: name.into(),
            revision: checkpoint.commit.clone(),
            files,
            config: checkpoint.sidecars.get("config.json").map(|bytes| sha256(bytes)),
        }
    }
}

impl Base {
    /// Refuses a base whose files hold other numbers than this one's; `found` are their digests.
    ///
    /// # Errors
    /// [`Error::Model`], with the file that differs and the base's name.
    pub fn prove_same(&self, found: &[FileDigest]) -> Result<()> {
        let differs = found.iter().zip(&self.files).find(|(found, said)| found.sha256 != said.sha256);
        if found.len() == self.files.len() && differs.is_none() {
            return Ok(());
        }
        let what = match differs {
            Some((found, _)) => format!("{} has other numbers than the base of the adapter", found.path.display()),
            None => format!("has {} weight files, the base of the adapter {}", found.len(), self.files.len()),
        };
        let hint = format!(
            "it was trained on {}: name that with --model, or say --other-base to take this one all the same",
            self.name
        );
        Err(Error::Model(Fault::new("the base", what).hint(hint)))
    }

    /// The base that the adapter in a folder was trained on, where the manifest of its run or its export says so of the adapter as it
    /// is now.
    pub fn of_adapter(folder: &Path) -> Option<Self> {
        let weights = folder.join(crate::adapter::load::WEIGHTS);
        let exported = ExportManifest::read(folder).filter(|manifest| manifest.target.is_some());
        let of_run = || {
            let run = std::path::absolute(folder).ok()?.parent()?.to_path_buf();
            let Manifest { base, outputs, .. } = Manifest::read(&run).ok()?;
            Some((base, outputs, run))
        };
        let exported = exported.map(|manifest| (manifest.base, manifest.outputs, folder.to_path_buf()));
        let (base, outputs, root) = exported.or_else(of_run)?;
        let place = std::path::absolute(&weights).ok()?;
        let said =
            outputs.iter().find(|file| std::path::absolute(root.join(&file.path)).ok() == Some(place.clone()))?;
        (sha256_file(&weights).ok()? == said.sha256).then_some(base)
    }
}

/// What went into a merged model or an export, and what was changed beside the update.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExportManifest {
    /// Version of engraft.
    pub engraft_version: String,
    /// Version of libtorch.
    pub libtorch_version: String,
    /// When it was written, RFC 3339, UTC.
    pub created: String,
    /// What it was written for; absent of what `engraft merge` wrote.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
    /// The base model, or the whole model that was exported.
    pub base: Base,
    /// The adapter's files; none of a whole model.
    pub adapter: Vec<FileDigest>,
    /// How the base was quantised when the adapter was trained; absent where it was not, or nothing says so.
    pub trained_on: Option<serde_json::Value>,
    /// What the update was folded into, where there was a choice: `dequantized` or `original`.
    pub onto: Option<String>,
    /// Number type: of a whole model of what is not quantised, or the file's own (`q4_k_m`); fp32 of an adapter.
    pub dtype: String,
    /// How the merged model is quantised; absent where it is not.
    pub quantization: Option<serde_json::Value>,
    /// What quantising took away.
    pub quantization_loss: Option<Loss>,
    /// How far it is from the adapter on its base, or why that was not measured; absent of an export, which holds probes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drift: Option<Measured>,
    /// Where the numbers that the update was folded into are not those the adapter was trained on; absent where they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub differing: Option<String>,
    /// SHA-256 of the program that wrote it. Absent where it cannot be read.
    #[serde(default)]
    pub program: Option<String>,
    /// What was written, with paths relative to the model's folder.
    pub outputs: Vec<FileDigest>,
}

impl ExportManifest {
    /// Reads it back; `None` where there is none, or it is of something else.
    pub fn read(folder: &Path) -> Option<Self> {
        let (value, _) = crate::weights::json_object(&folder.join(MANIFEST), MOST_BYTES).ok()?;
        serde_json::from_value(value).ok()
    }

    /// Writes it into the model's folder, whole or not at all. Errors with [`Error::Output`].
    pub fn write(&self, folder: &Path) -> Result<()> {
        write(folder, self)
    }
}

/// As `manifest.json`.
fn write(folder: &Path, manifest: &impl Serialize) -> Result<()> {
    let path = folder.join(MANIFEST);
    let text = serde_json::to_string_pretty(manifest)
        .map_err(|error| Error::Output(Fault::at(&path, format_args!("cannot be put into JSON: {error}"))))?;
    // A signature of what it said before would accuse whoever wrote it anew.
    match fs::remove_file(folder.join(SIGNATURE)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::Output(Fault::at(&folder.join(SIGNATURE), error)));
        }
        Err(_) | Ok(()) => {}
    }
    writer::write_file(&path, format!("{text}\n").as_bytes())
}

impl Manifest {
    /// Writes it into the run's folder, whole or not at all. Errors with [`Error::Output`].
    pub fn write(&self, folder: &Path) -> Result<()> {
        write(folder, self)
    }

    /// Reads it back.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(MANIFEST);
        let (value, _) = crate::weights::json_object(&path, MOST_BYTES)?;
        serde_json::from_value(value).map_err(|error| Error::State(Fault::at(&path, error)))
    }
}

/// SHA-256 of files, several at a time; `progress` is called with bytes hashed so far and in all, from several threads, as files
/// are finished.
///
/// Errors name the file that cannot be read.
pub fn digests(paths: &[PathBuf], progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Vec<FileDigest>> {
    let length = |path: &Path| {
        let metadata = fs::metadata(path).map_err(|error| Error::Model(Fault::at(path, error)))?;
        Ok(metadata.len())
    };
    let lengths = paths.iter().map(|path| length(path)).collect::<Result<Vec<u64>>>()?;
    let total = lengths.iter().sum();
    let done = AtomicU64::new(0);
    let digest = |(path, bytes): (&PathBuf, &u64)| {
        let sha256 = sha256_file(path)?;
        progress(done.fetch_add(*bytes, Ordering::Relaxed) + bytes, total);
        Ok(FileDigest { path: path.clone(), bytes: *bytes, sha256 })
    };
    paths.par_iter().zip(&lengths).map(digest).collect()
}

/// SHA-256 of every file under `folders` (sorted), with paths relative to `root`, under which they lie.
pub fn outputs(root: &Path, folders: &[PathBuf], progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Vec<FileDigest>> {
    let mut files = Vec::new();
    for folder in folders {
        let entries = fs::read_dir(folder).map_err(|error| Error::Output(Fault::at(folder, error)))?;
        for entry in entries {
            files.push(entry.map_err(|error| Error::Output(Fault::at(folder, error)))?.path());
        }
    }
    files.retain(|path| path.is_file());
    files.sort();
    let mut digests = digests(&files, progress)?;
    for digest in &mut digests {
        if let Ok(relative) = digest.path.strip_prefix(root) {
            digest.path = relative.to_path_buf();
        }
    }
    Ok(digests)
}

/// Digests of the files of a folder that something was made of, by paths that hold from anywhere.
pub fn inputs(folder: &Path) -> Result<Vec<FileDigest>> {
    let folder = std::path::absolute(folder).map_err(|error| Error::Output(Fault::at(folder, error)))?;
    outputs(Path::new(""), std::slice::from_ref(&folder), &|_, _| ())
}

/// SHA-256 of bytes, in 64 hexadecimal digits.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SHA-256 of the program that runs.
pub fn program() -> Option<String> {
    sha256_file(&std::env::current_exe().ok()?).ok()
}

/// One fingerprint of a base: of its weight files and its config. Another one means other numbers.
pub fn base_fingerprint(files: &[FileDigest], checkpoint: &Checkpoint) -> String {
    let config = sha256(&checkpoint.sidecars["config.json"]);
    let all: Vec<&str> = files.iter().map(|file| file.sha256.as_str()).chain([config.as_str()]).collect();
    sha256(all.concat().as_bytes())
}

/// SHA-256 of a checkpoint's tokenizer files, by name.
pub fn tokenizer(checkpoint: &Checkpoint) -> BTreeMap<String, String> {
    tokenizer_of(&checkpoint.sidecars)
}

/// SHA-256 of the tokenizer's files among some, by name.
pub fn tokenizer_of(sidecars: &BTreeMap<String, Vec<u8>>) -> BTreeMap<String, String> {
    let files = sidecars.iter().filter(|(name, _)| tokenizer_file(name));
    files.map(|(name, bytes)| (name.clone(), sha256(bytes))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn digests_are_sha256_and_progress_ends_at_the_total() {
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = ["abc", "", "a longer one"]
            .map(|text| {
                let path = folder.path().join(format!("{}.txt", text.len()));
                fs::write(&path, text).unwrap();
                path
            })
            .to_vec();
        let calls = Mutex::new(Vec::new());
        let found = digests(&paths, &|done, total| calls.lock().unwrap().push((done, total))).unwrap();
        // FIPS 180-2, appendix B.1, and the hash of nothing.
        assert_eq!(found[0].sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(found[1].sha256, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert_eq!((found[2].bytes, found[2].sha256.clone()), (12, sha256(b"a longer one")));
        let mut calls = calls.into_inner().unwrap();
        calls.sort();
        assert_eq!(calls.last(), Some(&(15, 15)));

        let missing = folder.path().join("gone");
        assert!(digests(&[missing], &|_, _| ()).unwrap_err().to_string().contains("gone"));
        let listed = outputs(folder.path(), &[folder.path().to_path_buf()], &|_, _| ()).unwrap();
        let names: Vec<_> = listed.iter().map(|digest| digest.path.to_str().unwrap()).collect();
        assert_eq!(names, ["0.txt", "12.txt", "3.txt"]);
    }

    #[test]
    fn a_manifest_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let file = FileDigest { path: "a".into(), bytes: 1, sha256: sha256(b"a") };
        let manifest = Manifest {
            engraft_version: "0".into(),
            libtorch_version: "2.11.0".into(),
            created: "2026-01-01T00:00:00Z".into(),
            device: "cpu".into(),
            dtype: "bf16".into(),
            base: Base { name: "owner/name".into(), revision: None, files: vec![file.clone()], config: None },
            train: vec![file.clone()],
            eval: vec![],
            datasets: BTreeMap::from([("training".into(), DatasetReport { rows: 3, ..Default::default() })]),
            tokenizer: BTreeMap::from([("tokenizer.json".into(), sha256(b"t"))]),
            chat_template: None,
            recipe: file.clone(),
            resolved_recipe: serde_json::json!({"base_model": "owner/name"}),
            seeds: BTreeMap::from([("training".into(), u64::MAX)]),
            metrics: serde_json::json!({"loss": 0.5}),
            program: program(),
            documentation: None,
            outputs: vec![file],
        };
        assert_eq!(manifest.program.as_ref().map(String::len), Some(64), "this test's own");
        manifest.write(folder.path()).unwrap();
        assert_eq!(Manifest::read(folder.path()).unwrap(), manifest);
        fs::write(folder.path().join(MANIFEST), "{\"base\": 3}").unwrap();
        assert_eq!(Manifest::read(folder.path()).unwrap_err().exit_code(), 7);
    }
}
