//! The folder of a run: locked while in use, and never mixing two runs.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::disk;
use super::state::States;
use crate::{Error, Fault, Result};

const LOCK: &str = ".lock";
const DAY: &str = ".day";

/// What to do with what the folder already holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Begin; refuse a folder that holds the states or the results of a run.
    Fresh,
    /// Continue from the newest state; begin where there is none.
    Resume,
    /// Remove the states and metrics of the run that is there, and begin. Its results stay until the new ones replace them.
    Overwrite,
}

/// A run's folder, locked until this is dropped (or the process ends, however it ends).
#[derive(Debug)]
pub struct RunFolder {
    /// The folder.
    pub path: PathBuf,
    /// How the run begins.
    pub start: Start,
    _lock: File,
}

impl RunFolder {
    /// Makes, locks and checks the folder. Open it before anything slow: that another run is in it shows at once.
    ///
    /// # Errors
    /// [`Error::Output`] when the folder cannot be written, is in use (the process is named) or holds another run.
    pub fn open(path: &Path, start: Start) -> Result<Self> {
        disk::create_folder(path)?;
        let lock = lock(&path.join(LOCK))?;
        let states = States::of(path);
        match start {
            Start::Fresh => refuse_another_run(path, &states)?,
            Start::Resume => {}
            Start::Overwrite => {
                for name in ["state", super::metrics::FILE, super::tensorboard::FOLDER, super::report::FILE] {
                    disk::remove(&path.join(name))?;
                }
            }
        }
        states.clean()?;
        Ok(Self { path: path.to_owned(), start, _lock: lock })
    }
}

impl RunFolder {
    /// The day the run began: templates that print a date print this one, also when the run goes on another day.
    ///
    /// # Errors
    /// [`Error::Output`] when it cannot be noted, [`Error::State`] when the note is not a date.
    pub fn day(&self) -> Result<jiff::civil::Date> {
        let path = self.path.join(DAY);
        if self.start == Start::Resume
            && let Ok(noted) = std::fs::read_to_string(&path)
        {
            return noted.trim().parse().map_err(|error| Error::State(Fault::at(&path, error)));
        }
        let today = jiff::Zoned::now().date();
        disk::replace_file(&path, format!("{today}\n").as_bytes())?;
        Ok(today)
    }
}

fn refuse_another_run(path: &Path, states: &States) -> Result<()> {
    let newest = states.steps()?.last().map(|step| format!("state/step-{step:06}"));
    let results = ["adapter", "merged"].into_iter().filter(|name| path.join(name).exists()).map(str::to_owned);
    let held: Vec<String> = newest.into_iter().chain(results).collect();
    if held.is_empty() {
        return Ok(());
    }
    let hint = "continue it with --resume, begin again with --overwrite, or choose another output.dir";
    Err(Error::Output(Fault::at(path, format!("already holds a run ({})", held.join(", "))).hint(hint)))
}

/// Takes the lock and writes this process's id into it, for the one that finds it taken.
fn lock(path: &Path) -> Result<File> {
    let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
    let mut file = open.map_err(|error| disk::failed("write", path, &error))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut owner = String::new();
            // The owner may be just about to write it.
            let _ = Read::by_ref(&mut file).take(32).read_to_string(&mut owner);
            let owner =
                if owner.trim().is_empty() { "another process".into() } else { format!("process {}", owner.trim()) };
            let folder = path.parent().unwrap_or(path);
            let hint = "wait for it to end, stop it, or choose another output.dir";
            return Err(Error::Output(Fault::at(folder, format!("{owner} is training into this folder")).hint(hint)));
        }
        // A file system without locks: two runs at once are then the user's to avoid.
        Err(TryLockError::Error(error)) if error.kind() == std::io::ErrorKind::Unsupported => return Ok(file),
        Err(TryLockError::Error(error)) => return Err(disk::failed("lock", path, &error)),
    }
    let write = file
        .set_len(0)
        .and_then(|()| file.seek(SeekFrom::Start(0)))
        .and_then(|_| writeln!(file, "{}", std::process::id()));
    write.map_err(|error| disk::failed("write", path, &error))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_second_run_fails_at_once_and_names_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let first = RunFolder::open(&path, Start::Fresh).unwrap();
        let error = RunFolder::open(&path, Start::Resume).unwrap_err();
        assert!(matches!(error, Error::Output(_)));
        assert!(error.to_string().contains(&format!("process {} is training", std::process::id())), "{error}");
        drop(first);
        RunFolder::open(&path, Start::Fresh).unwrap();
    }

    #[test]
    fn a_finished_run_is_not_written_over_unasked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        fs::create_dir_all(path.join("state/step-000120")).unwrap();
        fs::create_dir_all(path.join("state/.tmp-step-000130")).unwrap();
        fs::create_dir_all(path.join("adapter")).unwrap();
        let error = RunFolder::open(path, Start::Fresh).unwrap_err();
        assert!(error.to_string().contains("already holds a run (state/step-000120, adapter)"), "{error}");
        assert!(error.to_string().contains("--resume"));
        assert!(path.join("state/.tmp-step-000130").exists(), "a refusal touches nothing");
        drop(RunFolder::open(path, Start::Resume).unwrap());
        assert!(!path.join("state/.tmp-step-000130").exists(), "what a killed save left is removed");
        assert!(path.join("state/step-000120").exists());
        drop(RunFolder::open(path, Start::Overwrite).unwrap());
        assert!(!path.join("state").exists());
        assert!(path.join("adapter").exists(), "results stay until new ones replace them");
    }

    #[test]
    fn a_run_killed_before_its_first_state_is_begun_again() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("metrics.jsonl"), "{}\n").unwrap();
        RunFolder::open(folder.path(), Start::Fresh).unwrap();
    }

    #[test]
    fn a_file_where_the_folder_should_be_is_an_output_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        fs::write(&path, "").unwrap();
        assert!(matches!(RunFolder::open(&path, Start::Fresh), Err(Error::Output(_))));
        assert!(matches!(RunFolder::open(&path.join("deeper"), Start::Fresh), Err(Error::Output(_))));
    }
}
