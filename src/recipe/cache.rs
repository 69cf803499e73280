//! Where engraft keeps what it can make or fetch again.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;

/// The user's cache folder: `$ENGRAFT_CACHE`, else `$XDG_CACHE_HOME/engraft`, else `~/.cache/engraft`.
///
/// It may not exist yet. An empty variable counts as absent, as the XDG base directory specification asks, and so
/// does a relative `$XDG_CACHE_HOME`. Without a home folder the system's temporary folder takes its place.
pub fn cache_dir() -> PathBuf {
    choose(|name| env::var_os(name), env::temp_dir)
}

/// The home folder, where the environment names one.
pub(super) fn home_dir() -> Option<PathBuf> {
    env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from)
}

fn choose(variable: impl Fn(&str) -> Option<OsString>, temporary: impl Fn() -> PathBuf) -> PathBuf {
    let named = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(folder) = named("ENGRAFT_CACHE") {
        return folder;
    }
    let base = named("XDG_CACHE_HOME")
        .filter(|folder| folder.is_absolute())
        .or_else(|| named("HOME").map(|home| home.join(".cache")))
        .unwrap_or_else(temporary);
    base.join("engraft")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(variables: &[(&str, &str)]) -> PathBuf {
        let value = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| OsString::from(v));
        choose(value, || PathBuf::from("/t"))
    }

    #[test]
    fn the_first_named_folder_wins() {
        let all = [("ENGRAFT_CACHE", "/c"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/h")];
        assert_eq!(chosen(&all), PathBuf::from("/c"));
        assert_eq!(chosen(&all[1..]), PathBuf::from("/x/engraft"));
        assert_eq!(chosen(&all[2..]), PathBuf::from("/h/.cache/engraft"));
        assert_eq!(chosen(&[]), PathBuf::from("/t/engraft"));
    }

    #[test]
    fn empty_and_relative_ones_do_not_count() {
        assert_eq!(
            chosen(&[("ENGRAFT_CACHE", ""), ("XDG_CACHE_HOME", "x"), ("HOME", "/h")]),
            PathBuf::from("/h/.cache/engraft")
        );
    }
}
