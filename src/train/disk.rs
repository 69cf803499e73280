//! Writes that survive a power cut: every file is flushed to the disk before it gets its name, every folder after.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use crate::{Error, Fault, Result};

/// Writes a new file and flushes it to the disk.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        before("create", path)?;
        let mut file = File::create(path)?;
        before("write", path)?;
        file.write_all(bytes)?;
        before("flush", path)?;
        file.sync_all()
    };
    write().map_err(|error| failed("write", path, &error))
}

/// Writes a file whole or not at all: readers see the old one or the new one, never a part.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let temporary = path.with_file_name(format!(".tmp-{name}"));
    let replaced = write_file(&temporary, bytes).and_then(|()| rename(&temporary, path));
    if replaced.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    replaced
}

/// Makes a folder and those above it; it may exist.
pub fn create_folder(path: &Path) -> Result<()> {
    before("create", path).and_then(|()| fs::create_dir_all(path)).map_err(|error| failed("create", path, &error))
}

/// Renames within one folder and flushes that folder.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    before("rename", to).and_then(|()| fs::rename(from, to)).map_err(|error| failed("rename to", to, &error))?;
    flush_folder(to.parent().unwrap_or(to))
}

/// Flushes a folder's list of names to the disk.
pub fn flush_folder(path: &Path) -> Result<()> {
    let flushed = before("flush", path).and_then(|()| File::open(path)?.sync_all());
    match flushed {
        // Some network file systems cannot flush a folder; they keep names in order themselves.
        Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
        flushed => flushed.map_err(|error| failed("flush", path, &error)),
    }
}

/// Removes a file or a folder with all it holds; it may be gone already.
pub fn remove(path: &Path) -> Result<()> {
    let removed = before("remove", path).and_then(|()| match fs::symlink_metadata(path) {
        Ok(kind) if kind.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    });
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path, &error)),
        _ => Ok(()),
    }
}

/// The error of a failed operation on the run's folder, with the way out for the usual causes.
pub fn failed(verb: &str, path: &Path, error: &io::Error) -> Error {
    let hint = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free some space, or choose another output.dir, then continue with --resume; what was saved before is intact"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "choose an output.dir that you may write to"
        }
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => {
            "a file is in the way: move it, or choose another output.dir"
        }
        _ => "",
    };
    Error::Output(Fault::at(path, format!("cannot {verb} it: {error}")).hint(hint))
}

/// Where tests make an operation fail; nothing outside tests.
fn before(_operation: &'static str, _path: &Path) -> io::Result<()> {
    #[cfg(test)]
    faults::before(_operation, _path)?;
    Ok(())
}

/// Lets a test make the operations of its own thread fail.
#[cfg(test)]
pub mod faults {
    use std::cell::RefCell;
    use std::io;
    use std::path::Path;

    type Hook = Box<dyn FnMut(&str, &Path) -> io::Result<()>>;

    thread_local!(static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) });

    /// Calls `hook` before each operation while `run` runs.
    pub fn with<T>(hook: impl FnMut(&str, &Path) -> io::Result<()> + 'static, run: impl FnOnce() -> T) -> T {
        HOOK.with(|slot| *slot.borrow_mut() = Some(Box::new(hook)));
        let result = run();
        HOOK.with(|slot| *slot.borrow_mut() = None);
        result
    }

    pub(super) fn before(operation: &str, path: &Path) -> io::Result<()> {
        HOOK.with(|slot| slot.borrow_mut().as_mut().map_or(Ok(()), |hook| hook(operation, path)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_or_stays_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.html");
        replace_file(&path, b"old").unwrap();
        for failing in ["create", "write", "flush", "rename"] {
            let full = move |operation: &str, _: &Path| {
                if operation == failing { Err(io::Error::from(io::ErrorKind::StorageFull)) } else { Ok(()) }
            };
            let error = faults::with(full, || replace_file(&path, b"new")).unwrap_err();
            assert!(matches!(&error, Error::Output(fault) if fault.hint.contains("free some space")), "{error}");
            assert_eq!(fs::read(&path).unwrap(), b"old");
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing half-written is left");
        }
        replace_file(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }
}
