//! Where a base model's files are: from a name as typed to a place.

use std::path::{Path, PathBuf};

use super::cache::cache_dir;
use super::paths::{self, Found};
use crate::Fault;

/// Where a base model's files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BaseSource {
    /// A hub repository.
    Hub {
        /// `owner/name`.
        id: String,
        /// Branch, tag or commit.
        revision: String,
    },
    /// A folder with `config.json`, safetensors and tokenizer.
    Folder(PathBuf),
    /// One `.gguf` file.
    Gguf(PathBuf),
}

/// File name endings of pickled weights, which are programs as much as data.
const PICKLES: &[&str] = &["bin", "pt", "pth", "ckpt", "pkl", "pickle"];

impl BaseSource {
    /// What it is found by from any folder: a hub id, or a path.
    pub fn name(&self) -> String {
        match self {
            Self::Hub { id, .. } => id.clone(),
            Self::Folder(path) | Self::Gguf(path) => {
                std::path::absolute(path).unwrap_or_else(|_| path.clone()).display().to_string()
            }
        }
    }

    /// Finds what `typed` names, in this order: a folder or `.gguf` file at that path (from `folder`), a bare
    /// `NAME.gguf` in `<cache>/models`, a hub id `owner/name` at `revision` (`main` when not given).
    ///
    /// Nothing is opened or fetched.
    ///
    /// # Errors
    ///
    /// A fault without a place, for the caller to add: pickled weights, another kind of file, a path that is not
    /// there, a revision for something local.
    pub fn find(typed: &str, revision: Option<&str>, folder: &Path) -> Result<Self, Fault> {
        let fault = |what: String| Fault::new("", what);
        let path = paths::from_folder(typed, folder);
        let ending = path.extension().map(|ending| ending.to_string_lossy().to_lowercase()).unwrap_or_default();
        let found = paths::look(&path);
        if found != Found::Folder && PICKLES.contains(&ending.as_str()) {
            return Err(fault(format!(
                "{typed} is pickled weights (.{ending}), which can run code when they are read"
            ))
            .hint("use the model's safetensors or GGUF files"));
        }
        let local = match found {
            Found::Folder => Some(BaseSource::Folder(paths::settle(&path))),
            Found::File if ending == "gguf" => Some(BaseSource::Gguf(paths::settle_file(&path))),
            Found::File => {
                let hint = match ending.as_str() {
                    "safetensors" | "json" => {
                        "name the folder that holds config.json, the safetensors and the tokenizer"
                    }
                    _ => "a base is a folder of safetensors, a .gguf file or a hub id",
                };
                return Err(fault(format!("{} is neither a folder nor a .gguf file", path.display())).hint(hint));
            }
            Found::Special => return Err(fault(format!("{} is a pipe, socket or device", path.display()))),
            Found::Nothing if ending == "gguf" && !typed.contains('/') => {
                let cached = cache_dir().join("models").join(typed);
                if !cached.is_file() {
                    let places = format!("{typed} is neither {} nor {}", path.display(), cached.display());
                    let hint = match paths::hint_for_missing(typed, folder) {
                        hint if hint.is_empty() => format!("put the file into {}", cached.with_file_name("").display()),
                        hint => hint,
                    };
                    return Err(fault(places).hint(hint));
                }
                Some(BaseSource::Gguf(cached))
            }
            Found::Nothing => None,
        };
        match (local, revision) {
            (Some(local), None) => Ok(local),
            (Some(_), Some(revision)) => {
                Err(fault(format!("{typed} is local, but the revision {revision} is asked for"))
                    .hint("a revision belongs to a hub id: leave it out"))
            }
            // A path that is here but not there was meant as a path: asking the hub for it would only confuse.
            (None, _) if is_hub_id(typed) && !Path::new(typed).exists() => {
                Ok(BaseSource::Hub { id: typed.into(), revision: revision.unwrap_or("main").into() })
            }
            (None, _) => Err(missing(typed, &path, folder)),
        }
    }
}

fn missing(typed: &str, path: &Path, folder: &Path) -> Fault {
    let fault = Fault::new("", format!("{typed} is not a hub id (owner/name), and there is no {}", path.display()));
    if let Some((_, id)) = typed.split_once("huggingface.co/") {
        let id: Vec<&str> = id.split('/').take(2).collect();
        return Fault::new("", format!("{typed} is an address, not a hub id")).hint(format!("write {}", id.join("/")));
    }
    let hint = match paths::hint_for_missing(typed, folder) {
        hint if hint.is_empty() && !typed.contains('/') => {
            "a hub id has an owner, as in HuggingFaceTB/SmolLM2-135M-Instruct".to_string()
        }
        hint => hint,
    };
    if is_hub_id(typed) {
        Fault::new("", format!("there is no {}", path.display())).hint(hint)
    } else {
        fault.hint(hint)
    }
}

/// `owner/name` by the hub's rules: letters, digits, `-`, `_` and `.`, each part at most 96 characters, no `..` or `--`.
pub(super) fn is_hub_id(typed: &str) -> bool {
    let part = |part: &str| {
        (1..=96).contains(&part.len())
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
            && part.starts_with(|first: char| first.is_ascii_alphanumeric() || first == '_')
            && !part.ends_with(['-', '.'])
            && !part.contains("..")
            && !part.contains("--")
    };
    let weights = [".gguf", ".safetensors", ".json"].iter().any(|ending| typed.to_lowercase().ends_with(ending));
    !weights && typed.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn hub_ids_are_told_from_paths() {
        for id in
            ["HuggingFaceTB/SmolLM2-135M-Instruct", "meta-llama/Llama-3.2-1B", "a/b", "01-ai/Yi-6B", "x/gpt2_v1.0"]
        {
            assert!(is_hub_id(id), "{id}");
        }
        for path in
            ["gpt2", "./a/b", "../a", "/a/b", "a/b/c", "~/a", "a/", "/a", "a b/c", "a/b.gguf", "a/..", "a//b", ""]
        {
            assert!(!is_hub_id(path), "{path}");
        }
    }

    #[test]
    fn folders_and_files_come_before_the_hub() {
        let folder = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(folder.path()).unwrap();
        fs::create_dir_all(root.join("owner/name")).unwrap();
        fs::write(root.join("m.GGUF"), "").unwrap();
        fs::write(root.join("model.safetensors"), "").unwrap();
        let find = |typed: &str| BaseSource::find(typed, None, &root);
        assert_eq!(find("owner/name").unwrap(), BaseSource::Folder(root.join("owner/name")));
        assert_eq!(find("m.GGUF").unwrap(), BaseSource::Gguf(root.join("m.GGUF")));
        assert_eq!(find("owner/other").unwrap(), BaseSource::Hub { id: "owner/other".into(), revision: "main".into() });
        assert!(find("model.safetensors").unwrap_err().hint.contains("name the folder"));
        assert!(find("/dev/null").unwrap_err().what.contains("device"));
        let local = BaseSource::find("owner/name", Some("v1"), &root).unwrap_err();
        assert!(local.what.contains("revision v1"), "{local}");
        let hub = BaseSource::find("a/b", Some("v1"), &root).unwrap();
        assert_eq!(hub, BaseSource::Hub { id: "a/b".into(), revision: "v1".into() });
    }

    #[test]
    fn pickles_are_refused_by_name_there_or_not() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("pytorch_model.bin"), "").unwrap();
        for typed in ["pytorch_model.bin", "x.pt", "x.PTH", "a/x.ckpt", "x.pkl"] {
            assert!(BaseSource::find(typed, None, folder.path()).unwrap_err().what.contains("pickled"), "{typed}");
        }
    }

    #[test]
    fn what_is_nowhere_says_where_was_looked() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("smollm")).unwrap();
        let fault = |typed: &str| BaseSource::find(typed, None, folder.path()).unwrap_err().to_string();
        assert!(fault("none.gguf").contains("models/none.gguf"), "{}", fault("none.gguf"));
        assert!(fault("smolm").contains("did you mean"), "{}", fault("smolm"));
        assert!(fault("gpt2").contains("a hub id has an owner"), "{}", fault("gpt2"));
        assert!(fault("./a/b").contains("there is no folder"), "{}", fault("./a/b"));
        assert!(fault("https://huggingface.co/a/b/tree/main").ends_with("write a/b"));
        // The tests run in the crate's root, which has src/recipe; the temporary folder has not.
        assert!(fault("src/recipe").contains("current folder"), "{}", fault("src/recipe"));
        assert!(fault("Cargo.gguf/../src").contains("there is no"));
    }
}
