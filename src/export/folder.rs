//! A folder that appears whole or not at all: filled under a temporary name beside its place, synced, then renamed.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::card::{CARD, CURVE};
use super::manifest::MANIFEST;
use super::mlx;
use super::probe::PROBE;
use super::served::{ADAPTER, MODELFILE};
use super::signature::SIGNATURE;
use crate::adapter::config::CONFIG;
use crate::adapter::load::{SCHEME, WEIGHTS};
use crate::{Error, Fault, Result};

/// Small files of whatever is written, beside the base's own.
const OURS: [&str; 13] = [
    CONFIG,
    WEIGHTS,
    SCHEME,
    mlx::WEIGHTS,
    ADAPTER,
    MODELFILE,
    "config.json",
    "generation_config.json",
    CARD,
    CURVE,
    PROBE,
    MANIFEST,
    SIGNATURE,
];
/// Files that a tokenizer may consist of, now or in an earlier model at the same place.
const TOKENIZER: [&str; 4] =
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];

/// Whether a file of this name is a tokenizer's.
pub(super) fn tokenizer_file(name: &str) -> bool {
    TOKENIZER.contains(&name)
}

/// Whether a file of this name is of an adapter, a model or an export, so that one of them may be replaced by another; `files` are the
/// small ones that are written now.
pub(super) fn is_ours(name: &str, files: &BTreeMap<String, Vec<u8>>) -> bool {
    let model =
        name.starts_with("model") && [".safetensors", ".index.json", ".gguf"].iter().any(|end| name.ends_with(end));
    model || OURS.contains(&name) || tokenizer_file(name) || files.contains_key(name)
}

/// A folder under its temporary name; removed when it is not committed.
#[derive(Debug)]
pub struct Staging {
    place: PathBuf,
    temporary: PathBuf,
    previous: PathBuf,
    committed: bool,
}

impl Staging {
    /// Begins a folder that will be at `place`. What a killed process left there is cleared away, and an earlier folder that
    /// it had already set aside is put back.
    ///
    /// `ours` says of a file's name whether it may be replaced: an earlier folder that holds anything else is refused, so that
    /// nobody's own files are lost. Errors with [`Error::Output`].
    pub fn create(place: &Path, ours: impl Fn(&str) -> bool) -> Result<Self> {
        let Some(name) = place.file_name() else {
            return Err(Error::Output(Fault::at(place, "is not a folder's name")));
        };
        let sibling = |end: &str| {
            let mut hidden = OsString::from(".");
            hidden.push(name);
            hidden.push(end);
            place.with_file_name(hidden)
        };
        let staging = Self {
            place: place.to_path_buf(),
            temporary: sibling(".partial"),
            previous: sibling(".previous"),
            committed: false,
        };
        let begin = || -> io::Result<()> {
            if let Some(parent) = place.parent() {
                fs::create_dir_all(parent)?;
            }
            if staging.previous.exists() {
                // Killed between the two renames of `commit`, or after them.
                if place.exists() {
                    fs::remove_dir_all(&staging.previous)?
                } else {
                    fs::rename(&staging.previous, place)?
                }
            }
            if staging.temporary.exists() {
                fs::remove_dir_all(&staging.temporary)?;
            }
            Ok(())
        };
        begin().map_err(|error| unwritten(place, &error))?;
        refuse_others(place, ours)?;
        fs::create_dir(&staging.temporary).map_err(|error| unwritten(place, &error))?;
        Ok(staging)
    }

    /// Where to write its files until it is committed.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Puts the folder in its place, instead of an earlier one. Its files must have been synced.
    pub fn commit(mut self) -> Result<()> {
        let finish = || -> io::Result<()> {
            File::open(&self.temporary)?.sync_all()?;
            let replaces = self.place.exists();
            if replaces {
                fs::rename(&self.place, &self.previous)?;
            }
            fs::rename(&self.temporary, &self.place)?;
            // An empty parent is the current folder.
            let parent = self.place.parent().filter(|parent| !parent.as_os_str().is_empty());
            File::open(parent.unwrap_or(Path::new(".")))?.sync_all()?;
            if replaces { fs::remove_dir_all(&self.previous) } else { Ok(()) }
        };
        finish().map_err(|error| unwritten(&self.place, &error))?;
        self.committed = true;
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing more can be done about a folder that cannot be removed; the error being reported names its place.
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

fn refuse_others(place: &Path, ours: impl Fn(&str) -> bool) -> Result<()> {
    let entries = match fs::read_dir(place) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(unwritten(place, &error)),
    };
    for entry in entries {
        let name = entry.map_err(|error| unwritten(place, &error))?.file_name();
        let name = name.to_string_lossy();
        if !ours(&name) {
            let what = format!("holds {name}, which writing here would delete");
            return Err(Error::Output(Fault::at(place, what).hint("name another folder, or move that file away")));
        }
    }
    Ok(())
}

fn unwritten(path: &Path, error: &io::Error) -> Error {
    let fault = Fault::at(path, format_args!("cannot be written: {error}"));
    Error::Output(match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => fault.hint("free space on this disk"),
        io::ErrorKind::NotADirectory => fault.hint("there is a file of that name: name another folder"),
        _ => fault.hint("name a folder that may be written"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(place: &Path, text: &str) -> Result<()> {
        let staging = Staging::create(place, |name| name == "a")?;
        fs::write(staging.path().join("a"), text).unwrap();
        staging.commit()
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_folder_is_replaced_whole_and_leaves_nothing_beside_it() {
        let root = tempfile::tempdir().unwrap();
        let place = root.path().join("deep/adapter");
        fill(&place, "one").unwrap();
        fill(&place, "two").unwrap();
        assert_eq!(fs::read_to_string(place.join("a")).unwrap(), "two");
        assert_eq!(names(&root.path().join("deep")), ["adapter"]);
    }

    #[test]
    fn an_uncommitted_folder_leaves_the_earlier_one() {
        let root = tempfile::tempdir().unwrap();
        let place = root.path().join("adapter");
        fill(&place, "one").unwrap();
        drop(Staging::create(&place, |name| name == "a").unwrap());
        assert_eq!(names(root.path()), ["adapter"]);
        assert_eq!(names(&place), ["a"]);
    }

    #[test]
    fn killed_between_the_renames_the_earlier_one_comes_back() {
        let root = tempfile::tempdir().unwrap();
        let place = root.path().join("adapter");
        fill(&place, "one").unwrap();
        fs::rename(&place, root.path().join(".adapter.previous")).unwrap();
        fs::create_dir(root.path().join(".adapter.partial")).unwrap();
        drop(Staging::create(&place, |name| name == "a").unwrap());
        assert_eq!(names(root.path()), ["adapter"]);
        assert_eq!(fs::read_to_string(place.join("a")).unwrap(), "one");
    }

    #[test]
    fn somebodys_own_files_are_not_deleted() {
        let root = tempfile::tempdir().unwrap();
        let place = root.path().join("adapter");
        fill(&place, "one").unwrap();
        fs::write(place.join("thesis.tex"), "years").unwrap();
        let error = fill(&place, "two").unwrap_err();
        assert_eq!(error.exit_code(), 6);
        assert!(error.to_string().contains("holds thesis.tex"), "{error}");
        assert_eq!(fs::read_to_string(place.join("a")).unwrap(), "one");

        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(fill(&file, "x").unwrap_err().to_string().contains("there is a file of that name"));
    }
}
