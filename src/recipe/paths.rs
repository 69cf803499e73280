//! Paths as people type them: `~/`, relative to a folder, perhaps not there yet.

use std::fs;
use std::path::{Path, PathBuf};

use super::cache::home_dir;
use super::check::nearest;

/// What is at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    File,
    Folder,
    /// A pipe, socket or device: reading it may never end.
    Special,
    Nothing,
}

/// Looks at `path`, following links.
pub(super) fn look(path: &Path) -> Found {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => Found::File,
        Ok(metadata) if metadata.is_dir() => Found::Folder,
        Ok(_) => Found::Special,
        Err(_) => Found::Nothing,
    }
}

/// `typed` with `~/` expanded and relative paths taken from `folder`.
pub(super) fn from_folder(typed: &str, folder: &Path) -> PathBuf {
    let rest = if typed == "~" { Some("") } else { typed.strip_prefix("~/") };
    match (rest, home_dir()) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => folder.join(typed),
    }
}

/// `path` absolute, without links and `..` as far as it exists: two names of one place become equal.
///
/// The part that does not exist yet is taken by its letters.
pub(super) fn settle(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    for ancestor in path.ancestors() {
        if let Ok(real) = fs::canonicalize(ancestor) {
            // `ancestor` is an ancestor of `path`, so the prefix is there.
            let rest = path.strip_prefix(ancestor).unwrap_or(Path::new(""));
            return rest.components().fold(real, |mut settled, component| {
                match component {
                    std::path::Component::ParentDir => {
                        settled.pop();
                    }
                    component => settled.push(component),
                }
                settled
            });
        }
    }
    path
}

/// Like [`settle`], but a link that `path` itself is stays: its name says more than that of what it leads to.
pub(super) fn settle_file(path: &Path) -> PathBuf {
    match (path.parent(), path.file_name()) {
        (Some(folder), Some(name)) => {
            settle(if folder.as_os_str().is_empty() { Path::new(".") } else { folder }).join(name)
        }
        _ => settle(path),
    }
}

/// Why a person may have expected `typed` to be there: it is in the current folder, or something is called alike.
pub(super) fn hint_for_missing(typed: &str, folder: &Path) -> String {
    let here = Path::new(typed);
    if here.is_relative() && here.exists() {
        return format!(
            "there is one in the current folder, but paths are taken from the recipe's folder ({}): write {}",
            shown(folder),
            std::path::absolute(here).map_or_else(|_| typed.to_string(), |path| path.display().to_string())
        );
    }
    let path = from_folder(typed, folder);
    let path = std::path::absolute(&path).unwrap_or(path);
    let parent = path.parent().unwrap_or(Path::new("/"));
    if !parent.is_dir() {
        return match path.ancestors().skip(1).find(|ancestor| ancestor.is_dir()) {
            Some(there) => format!("there is no folder {}, only {}", parent.display(), shown(there)),
            None => String::new(),
        };
    }
    let names = names_in(parent);
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    match nearest(&name, names.iter().map(String::as_str)) {
        Some(near) => format!("did you mean {}?", parent.join(near).display()),
        None => String::new(),
    }
}

/// The names in a folder, sorted.
pub(super) fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn shown(folder: &Path) -> String {
    if folder.as_os_str().is_empty() { ".".into() } else { folder.display().to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_names_of_one_place_settle_to_one() {
        let folder = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(folder.path()).unwrap();
        fs::create_dir(real.join("a")).unwrap();
        std::os::unix::fs::symlink(real.join("a"), real.join("link")).unwrap();
        assert_eq!(settle(&real.join("link/new/../x")), real.join("a/x"));
        assert_eq!(settle(&real.join("a/../a/./x")), real.join("a/x"));
        assert_eq!(settle(&real.join("link")), real.join("a"));
        assert_eq!(settle_file(&real.join("a/../link")), real.join("link"));
        assert_eq!(settle_file(Path::new("x")), fs::canonicalize(".").unwrap().join("x"));
    }

    #[test]
    fn home_is_expanded_only_as_a_whole_component() {
        let home = home_dir().unwrap();
        assert_eq!(from_folder("~/x", Path::new("/f")), home.join("x"));
        assert_eq!(from_folder("~x", Path::new("/f")), Path::new("/f/~x"));
        assert_eq!(from_folder("/x", Path::new("/f")), Path::new("/x"));
        assert_eq!(from_folder("x", Path::new("/f")), Path::new("/f/x"));
    }
}
