//! A transformers folder: `config.json`, small files, and the weights as one `model.safetensors` or as shards with an index.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde_json::Value;

use super::{Form, Parts, Stored, file, quantised, safetensors, tekken};
use crate::{Error, Fault, Result};

/// The weights as one file.
pub(super) const SINGLE: &str = "model.safetensors";
/// The table of the shards.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// The small files, those that may be absent.
pub(super) const SIDECARS: [&str; 5] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// Ends of files that hold pickles: opening one can run any code, so none is ever opened.
const PICKLES: [&str; 6] = [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"];

const MAX_CONFIG: u64 = 16 << 20;
const MAX_SIDECAR: u64 = 256 << 20;
const MAX_INDEX: u64 = 128 << 20;

/// Reads config and headers of the model in `folder`.
pub(super) fn open(folder: &Path) -> Result<Parts> {
    if !folder.is_dir() {
        let what = if folder.exists() { "is not a folder" } else { "there is no such folder" };
        return Err(Error::Model(
            Fault::at(folder, what).hint("name a model's folder, a .gguf file or owner/name on the hub"),
        ));
    }
    let (mut config, bytes) = read_config(folder)?;
    let mut notices = Vec::new();
    if config.get("auto_map").is_some() {
        notices.push(
            "config.json asks for code of its own (auto_map): ignored, engraft never runs a model's code".to_string(),
        );
    }
    let mut sidecars = BTreeMap::from([("config.json".to_string(), bytes)]);
    for name in SIDECARS {
        let path = folder.join(name);
        // A dangling link is an error, not an absent file.
        if path.symlink_metadata().is_ok() {
            sidecars.insert(name.to_string(), file::read(&path, MAX_SIDECAR)?);
        }
    }
    let tekken = folder.join(tekken::FILE);
    if !sidecars.contains_key("tokenizer.json") && tekken.symlink_metadata().is_ok() {
        let made = tekken::make(&tekken, &file::read(&tekken, MAX_SIDECAR)?)?;
        for (name, bytes) in made {
            sidecars.entry(name).or_insert(bytes);
        }
    }

    let (files, index) = weight_files(folder)?;
    let mut opened = Vec::new();
    let mut tensors = Vec::new();
    for (number, path) in files.iter().enumerate() {
        let (file, stored) = shard(path, number)?;
        opened.push(file);
        tensors.extend(stored);
    }
    if let Some(index) = index {
        check_index(folder, &index, &files, &tensors)?;
    }
    let beside = quantised::said_beside(folder, &mut config, &tensors)?;
    if let Some(name) = beside {
        notices.push(format!("{name} says how the weights are quantised, which config.json does not"));
    }
    const SAID: &str = "config.json: quantization_config.";
    let tensors =
        quantised::pair(&config, (&files, &opened), tensors, &mut notices).map_err(|error| match (error, beside) {
            (Error::Model(fault), Some(name)) if fault.place.starts_with(SAID) => {
                let place = fault.place.replacen(SAID, &format!("{name}: "), 1);
                Error::Model(Fault { place: folder.join(place).display().to_string(), ..fault })
            }
            (error, _) => located(folder, error),
        })?;
    Ok(Parts { config, sidecars, files, opened, tensors, notices })
}

fn read_config(folder: &Path) -> Result<(Value, Vec<u8>)> {
    let path = folder.join("config.json");
    if path.symlink_metadata().is_err() {
        let fault = Fault::at(&path, "there is no such file");
        let hint = if folder.join("adapter_config.json").exists() {
            "this folder holds an adapter: base_model must name the model it was trained on"
        } else {
            "a model's folder holds config.json, the tokenizer's files and *.safetensors"
        };
        return Err(Error::Model(fault.hint(hint)));
    }
    file::json_object(&path, MAX_CONFIG)
}

/// Opens one safetensors file, the `number`th of its model, and reads its header.
pub(super) fn shard(path: &Path, number: usize) -> Result<(File, Vec<Stored>)> {
    let (file, length) = file::open(path)?;
    let entries = safetensors::read_header(path, &file, length)?;
    let stored = entries.into_iter().map(|entry| Stored {
        stored_name: entry.name.clone(),
        name: entry.name,
        shape: entry.shape,
        file: number,
        offset: entry.offset,
        form: Form::Plain(entry.dtype),
        spare: false,
    });
    Ok((file, stored.collect()))
}

/// The weight files, and the index where there is one. One file wins over an index, as in transformers.
fn weight_files(folder: &Path) -> Result<(Vec<PathBuf>, Option<Index>)> {
    let single = folder.join(SINGLE);
    if single.symlink_metadata().is_ok() {
        return Ok((vec![single], None));
    }
    let path = folder.join(INDEX);
    if path.symlink_metadata().is_err() {
        return Err(no_weights(folder));
    }
    let index = Index::parse(&path, &file::read(&path, MAX_INDEX)?)?;
    let shards: BTreeSet<&str> = index.weight_map.iter().map(|(_, shard)| shard.as_str()).collect();
    if shards.is_empty() {
        return Err(Error::Model(Fault::at(&path, "its weight_map is empty")));
    }
    let files = shards.iter().map(|shard| shard_path(folder, &path, shard)).collect::<Result<_>>()?;
    Ok((files, Some(index)))
}

/// The error with the path of the small file it is about, where it has the file's name alone (`config.json: hidden_size`).
pub(super) fn located(folder: &Path, error: Error) -> Error {
    match error {
        Error::Model(fault) if names_a_sidecar(&fault.place) => {
            Error::Model(Fault { place: folder.join(&fault.place).display().to_string(), ..fault })
        }
        error => error,
    }
}

/// Whether a fault's place is a small file, or something in it, without the folder it is in.
pub(super) fn names_a_sidecar(place: &str) -> bool {
    let mut names = SIDECARS.into_iter().chain(["config.json"]);
    names.any(|name| place.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with(':')))
}

/// What to say about a folder without safetensors.
fn no_weights(folder: &Path) -> Error {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .map(|entries| entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    names.sort();
    refuse_others(folder, &names)
}

/// The fault of a model (a folder or hub repository) whose files `names` hold neither [`SINGLE`] nor [`INDEX`].
pub(super) fn refuse_others(place: &Path, names: &[String]) -> Error {
    let ending = |ends: &[&str]| names.iter().find(|name| ends.iter().any(|end| name.ends_with(end)));
    let fault = |what: String, hint: &str| Error::Model(Fault::at(place, what).hint(hint));
    if let Some(shard) = ending(&[".safetensors"]) {
        return fault(
            format!("holds {shard}, but neither {SINGLE} nor {INDEX}"),
            "fetch the missing index, or rename a model that is one file",
        );
    }
    if let Some(gguf) = ending(&[".gguf"]) {
        return fault(format!("holds no safetensors, but {gguf}"), "name the .gguf file itself as base_model");
    }
    if let Some(pickle) = ending(&PICKLES) {
        return fault(
            format!("holds its weights as a pickle ({pickle}), which can run code when opened: refused"),
            "use a safetensors version of this model, or convert it with transformers' save_pretrained",
        );
    }
    fault(format!("holds neither {SINGLE} nor {INDEX}"), "fetch the model's weights, or name another folder")
}

/// Where a shard lies: inside the model's folder, links followed.
fn shard_path(folder: &Path, index: &Path, shard: &str) -> Result<PathBuf> {
    let fault = |what: String| Error::Model(Fault::at(index, what).hint("a shard must lie in the model's own folder"));
    check_shard_name(index, shard)?;
    let path = folder.join(shard);
    if path.symlink_metadata().is_err() {
        let fault = Fault::at(index, format_args!("names the shard {shard}, which is missing"));
        return Err(Error::Model(fault.hint("fetch the model again: the download is not complete")));
    }
    let canonical = |path: &Path| path.canonicalize().map_err(|error| file::unreadable(path, &error));
    let target = canonical(&path)?;
    let mut homes = vec![canonical(folder)?];
    // The hub's cache keeps files in <repository>/blobs and links to them from <repository>/snapshots/<commit>.
    if let Some(snapshots) = homes[0].parent().filter(|parent| parent.ends_with("snapshots")) {
        homes.extend(snapshots.with_file_name("blobs").canonicalize());
    }
    if !homes.iter().any(|home| target.starts_with(home)) {
        return Err(fault(format!("the shard {shard} is a link to {}, outside of the folder", target.display())));
    }
    Ok(path)
}

/// Refuses a shard's name that leads anywhere but down, or that is not safetensors.
pub(super) fn check_shard_name(index: &Path, shard: &str) -> Result<()> {
    let fault = |what: String| Error::Model(Fault::at(index, what).hint("a shard must lie in the model's own folder"));
    let plain = Path::new(shard).components().all(|part| matches!(part, Component::Normal(_)));
    if shard.is_empty() || !plain || shard.contains(['\0', '\\']) {
        return Err(fault(format!("names the shard {shard:?}, which is not a plain name inside the folder")));
    }
    if PICKLES.iter().any(|end| shard.ends_with(end)) {
        return Err(fault(format!("names {shard}, a pickle, which can run code when opened: refused")));
    }
    Ok(())
}

/// Each tensor must be where the index says; a tensor in two shards is found when the checkpoint is put together.
fn check_index(folder: &Path, index: &Index, files: &[PathBuf], tensors: &[Stored]) -> Result<()> {
    let there: HashSet<(&Path, &str)> = tensors.iter().map(|t| (files[t.file].as_path(), t.name.as_str())).collect();
    for (name, shard) in &index.weight_map {
        let path = folder.join(shard);
        if !there.contains(&(path.as_path(), name.as_str())) {
            let other = tensors.iter().find(|tensor| tensor.name == *name).map(|tensor| &files[tensor.file]);
            let found = other.map(|path| format!("; it is in {}", path.display())).unwrap_or_default();
            let what = format_args!("{name} should be in {shard} by the index, but is not there{found}");
            return Err(Error::Model(Fault::at(&folder.join(INDEX), what).hint("fetch the model again")));
        }
    }
    Ok(())
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
pub(super) struct Index {
    /// Tensor name and shard name.
    #[serde(deserialize_with = "unique")]
    pub weight_map: Vec<(String, String)>,
}

impl Index {
    /// Parses the index; duplicate names are refused.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        file::json(path, bytes)
    }
}

/// An object of strings, no key twice, in the order written.
fn unique<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<(String, String)>, D::Error> {
    struct Pairs;
    impl<'de> Visitor<'de> for Pairs {
        type Value = Vec<(String, String)>;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("an object of strings")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut pairs = Vec::new();
            let mut seen = HashSet::new();
            while let Some((name, shard)) = map.next_entry::<String, String>()? {
                if !seen.insert(name.clone()) {
                    return Err(de::Error::custom(format_args!("{name} appears twice in the weight_map")));
                }
                pairs.push((name, shard));
            }
            Ok(pairs)
        }
    }
    deserializer.deserialize_map(Pairs)
}
