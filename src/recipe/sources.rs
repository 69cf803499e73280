//! The files of a dataset: from names, folders and globs to a list in a stable order.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::paths::{self, Found};
use super::{Source, Sources};
use crate::Fault;

/// One parquet file of a dataset.
#[derive(Debug, Clone, PartialEq)]
pub struct DataSource {
    /// The file.
    pub path: PathBuf,
    /// How often each row is seen per epoch.
    pub weight: f64,
}

impl DataSource {
    /// The files that `typed` names: a parquet file, a folder of them or a glob, relative to `folder`.
    ///
    /// # Errors
    ///
    /// A fault without a place, for the caller to add: nothing is there, or something else than parquet.
    pub fn find(typed: &str, folder: &Path) -> Result<Vec<Self>, Fault> {
        Ok(expand(typed, folder)?.into_iter().map(|path| Self { path, weight: 1.0 }).collect())
    }
}

/// After so many wrong sources the rest is not looked at.
const MOST_FAULTS: usize = 20;

/// The files of `sources`, in the order typed, each folder's and glob's sorted by name.
///
/// `folder` is where relative paths start. The faults (one for each source that names nothing to train on) come with the
/// index of their source and without a place, which the caller knows.
pub(super) fn resolve(sources: &Sources, folder: &Path) -> Result<Vec<DataSource>, Vec<(usize, Fault)>> {
    let typed: Vec<(&str, f64)> = match sources {
        Sources::One(path) => vec![(path, 1.0)],
        Sources::Many(many) => many
            .iter()
            .map(|source| match source {
                Source::Path(path) => (path.as_str(), 1.0),
                Source::Weighted(weighted) => (weighted.path.as_str(), weighted.weight),
            })
            .collect(),
    };
    let (mut files, mut faults) = (Vec::new(), Vec::new());
    let mut named_by: BTreeMap<PathBuf, &str> = BTreeMap::new();
    for (index, (path, weight)) in typed.into_iter().enumerate() {
        match expand(path, folder) {
            Ok(found) => {
                for file in found {
                    // Counting a file's rows twice is a weight, and must be said as one.
                    match named_by.insert(paths::settle(&file), path) {
                        Some(other) => {
                            let what = format!("{} is named twice, by {other} and by {path}", file.display());
                            faults.push((
                                index,
                                Fault::new("", what).hint("name it once; {path, weight} says how often"),
                            ));
                        }
                        None => files.push(DataSource { path: file, weight }),
                    }
                }
            }
            Err(fault) => faults.push((index, fault)),
        }
        if faults.len() >= MOST_FAULTS {
            break;
        }
    }
    if faults.is_empty() { Ok(files) } else { Err(faults) }
}

/// The files that one source names.
fn expand(typed: &str, folder: &Path) -> Result<Vec<PathBuf>, Fault> {
    let path = paths::from_folder(typed, folder);
    match paths::look(&path) {
        Found::File | Found::Special => Ok(vec![parquet_file(path)?]),
        Found::Folder => in_folder(&path),
        Found::Nothing if typed.contains(['*', '?', '[']) => matching(typed, folder),
        Found::Nothing if path.symlink_metadata().is_ok() => {
            Err(Fault::new("", format!("{} is a link to nothing", path.display())))
        }
        Found::Nothing => {
            // Where not even the folder is there, what looks like a hub id was meant as one.
            let owner = typed.split_once('/').map(|(owner, _)| folder.join(owner));
            let hub = super::base::is_hub_id(typed) && !is_parquet(&path) && owner.is_some_and(|owner| !owner.exists());
            let hint = match paths::hint_for_missing(typed, folder) {
                _ if typed.contains('{') => "braces are no part of a glob here: write a list".to_string(),
                _ if hub && !Path::new(typed).exists() => {
                    "a dataset is parquet on this machine: download it from the hub first".to_string()
                }
                hint => hint,
            };
            Err(Fault::new("", format!("there is no {}", path.display())).hint(hint))
        }
    }
}

fn in_folder(folder: &Path) -> Result<Vec<PathBuf>, Fault> {
    // Hidden ones are what an editor or a copy left behind (`._a.parquet`); no glob matches them either.
    let names: Vec<String> = paths::names_in(folder).into_iter().filter(|name| !name.starts_with('.')).collect();
    let files: Vec<PathBuf> = names
        .iter()
        .map(|name| folder.join(name))
        .filter(|path| is_parquet(path) && paths::look(path) != Found::Folder)
        .collect();
    if files.is_empty() {
        let mut there = names.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
        if there.is_empty() {
            there = "nothing".into();
        }
        return Err(Fault::new("", format!("no .parquet file in the folder {}", folder.display()))
            .hint(format!("there is {there}; folders inside are not searched, a glob like **/*.parquet does")));
    }
    files.into_iter().map(parquet_file).collect()
}

fn matching(typed: &str, folder: &Path) -> Result<Vec<PathBuf>, Fault> {
    let fault = |what: String| Fault::new("", what);
    // The recipe's folder may have glob signs in its own name.
    let root = glob::Pattern::escape(&folder.to_string_lossy());
    let pattern = paths::from_folder(typed, Path::new(&root));
    let options = glob::MatchOptions { require_literal_leading_dot: true, ..glob::MatchOptions::new() };
    let matches = glob::glob_with(&pattern.to_string_lossy(), options)
        .map_err(|error| fault(format!("{typed} is not a glob: {}", error.msg)))?;
    let mut files = Vec::new();
    for found in matches {
        let path = found
            .map_err(|error| fault(format!("{} cannot be looked at: {}", error.path().display(), error.error())))?;
        if paths::look(&path) == Found::Folder {
            let way = "a glob must match files only, as in data/*.parquet";
            return Err(fault(format!("{typed} matches the folder {}", path.display())).hint(way));
        }
        files.push(parquet_file(path)?);
    }
    if files.is_empty() {
        let way =
            if Path::new(typed).is_relative() && glob::glob(typed).is_ok_and(|mut matches| matches.next().is_some()) {
                "it matches in the current folder, but paths are taken from the recipe's folder"
            } else {
                ""
            };
        return Err(fault(format!("nothing matches {}", paths::from_folder(typed, folder).display())).hint(way));
    }
    files.sort();
    Ok(files)
}

fn is_parquet(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("parquet"))
}

/// `path`, settled, when it is a regular file called `.parquet`.
fn parquet_file(path: PathBuf) -> Result<PathBuf, Fault> {
    let fault = |what: &str| Fault::new("", format!("{} {what}", path.display()));
    match paths::look(&path) {
        Found::File => {}
        Found::Nothing => return Err(fault("is a link to nothing")),
        _ => return Err(fault("is a pipe, socket or device, expected a parquet file")),
    }
    if is_parquet(&path) {
        return Ok(paths::settle_file(&path));
    }
    let ending = path.extension().map(|ending| ending.to_string_lossy().to_lowercase()).unwrap_or_default();
    let read = match ending.as_str() {
        "jsonl" | "ndjson" => "read_json(FILE, lines=True)",
        "json" => "read_json(FILE)",
        "csv" => "read_csv(FILE)",
        "tsv" => "read_csv(FILE, sep='\\t')",
        "arrow" | "feather" => "read_feather(FILE)",
        _ => return Err(fault("is not called .parquet").hint("rename it if it is parquet, otherwise convert it")),
    };
    Err(fault(&format!("is .{ending}, expected .parquet"))
        .hint(format!("convert it, for example in Python: pandas.{read}.to_parquet(FILE)")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::WeightedSource;
    use std::fs;

    /// A folder with brackets in its name, as a glob must survive them.
    fn folder() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(folder.path()).unwrap().join("set [1]*");
        for name in ["b.parquet", "a.parquet", "sub/c.PARQUET", "mixed/d.parquet", "mixed/e.jsonl", "mixed/.f.parquet"]
        {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        fs::create_dir(root.join("empty")).unwrap();
        (folder, root)
    }

    fn names(typed: &str, root: &Path) -> Result<Vec<String>, String> {
        match resolve(&Sources::One(typed.into()), root) {
            Ok(files) => {
                Ok(files.iter().map(|file| file.path.strip_prefix(root).unwrap().display().to_string()).collect())
            }
            Err(faults) => Err(faults.into_iter().map(|(_, fault)| fault.to_string()).collect()),
        }
    }

    #[test]
    fn files_folders_and_globs_come_in_a_stable_order() {
        let (_guard, root) = folder();
        assert_eq!(names("b.parquet", &root).unwrap(), ["b.parquet"]);
        assert_eq!(names(".", &root).unwrap(), ["a.parquet", "b.parquet"]);
        assert_eq!(names("sub", &root).unwrap(), ["sub/c.PARQUET"]);
        assert_eq!(names("mixed", &root).unwrap(), ["mixed/d.parquet"]);
        assert_eq!(names("*.parquet", &root).unwrap(), ["a.parquet", "b.parquet"]);
        assert_eq!(names("**/[a-d].parquet", &root).unwrap(), ["a.parquet", "b.parquet", "mixed/d.parquet"]);
    }

    #[test]
    fn weights_and_order_are_kept() {
        let (_guard, root) = folder();
        let sources = Sources::Many(vec![
            Source::Weighted(WeightedSource { path: "sub".into(), weight: 0.5 }),
            Source::Path("*.parquet".into()),
        ]);
        let files = resolve(&sources, &root).unwrap();
        let shown: Vec<_> =
            files.iter().map(|file| (file.path.file_name().unwrap().to_str().unwrap(), file.weight)).collect();
        assert_eq!(shown, [("c.PARQUET", 0.5), ("a.parquet", 1.0), ("b.parquet", 1.0)]);
    }

    #[test]
    fn a_file_named_twice_is_refused() {
        let (_guard, root) = folder();
        std::os::unix::fs::symlink(root.join("a.parquet"), root.join("sub/z.parquet")).unwrap();
        let sources = Sources::Many(vec![Source::Path("*.parquet".into()), Source::Path("sub".into())]);
        let faults = resolve(&sources, &root).unwrap_err();
        assert!(faults.len() == 1 && faults[0].0 == 1 && faults[0].1.what.contains("named twice"), "{faults:?}");
    }

    #[test]
    fn what_names_no_parquet_says_why() {
        let (_guard, root) = folder();
        let fifo = root.join("pipe.parquet");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        std::os::unix::fs::symlink("nowhere", root.join("empty/x.parquet")).unwrap();
        for (typed, what, hint) in [
            ("none/*.parquet", "nothing matches", ""),
            ("c.parquet", "there is no", "did you mean"),
            ("{a,b}.parquet", "there is no", "write a list"),
            ("nofolder/x.parquet", "there is no", "there is no folder"),
            ("mixed/*", "is .jsonl, expected .parquet", "read_json(FILE, lines=True)"),
            ("m*", "matches the folder", "data/*.parquet"),
            ("a[", "is not a glob", ""),
            ("pipe.parquet", "is a pipe", ""),
            ("/dev/null", "is a pipe, socket or device", ""),
            ("empty", "is a link to nothing", ""),
            ("owner/name", "there is no", "download it from the hub first"),
            ("empty/x.parquet", "is a link to nothing", ""),
            ("src/../Cargo.toml", "there is no", "current folder"),
        ] {
            let message = names(typed, &root).unwrap_err();
            assert!(message.contains(what) && message.contains(hint), "{typed}: {message}");
        }
        fs::remove_file(root.join("empty/x.parquet")).unwrap();
        assert!(names("empty", &root).unwrap_err().contains("there is nothing"));
    }
}
