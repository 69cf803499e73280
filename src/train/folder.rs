//! The folder of a run: locked while in use, and never mixing two runs.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tch::Tensor;

use super::disk;
use super::ledger::{Chosen, Ledger};
use super::state::{States, tensors_from_bytes, tensors_to_bytes};
use crate::{Error, Fault, Result};

const LOCK: &str = ".lock";
const DAY: &str = ".day";
const ADAPTER_START: &str = "adapter_start.safetensors";

/// What to do with what the folder already holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Begin; refuse a folder that holds the states or the results of a run.
    Fresh,
    /// Continue from the newest state; begin where there is none.
    Resume,
    /// Remove the states, metrics and manifest of the run that is there, and begin. Its adapter and merged model stay until the
    /// new ones replace them.
    Overwrite,
}

/// What [`Start::Overwrite`] removes.
const REPLACED: [&str; 7] = [
    "state",
    ADAPTER_START,
    super::metrics::FILE,
    super::tensorboard::FOLDER,
    super::report::FILE,
    "manifest.json",
    "manifest.json.sig",
];

/// A run's folder, locked until this is dropped (or the process ends, however it ends).
///
/// Until [`RunFolder::begin`] nothing in it is changed, and dropped before, it leaves nothing of its own behind.
#[derive(Debug)]
pub struct RunFolder {
    /// The folder.
    pub path: PathBuf,
    /// How the run begins.
    pub start: Start,
    /// The day the run began: templates that print a date print this one, also when the run goes on another day.
    pub day: jiff::civil::Date,
    /// Small files that belong to the run: [`RunFolder::begin`] writes them.
    kept: Vec<(PathBuf, Vec<u8>)>,
    /// What was not there before, in the order in which it can be removed.
    made: Vec<PathBuf>,
    _lock: File,
}

impl RunFolder {
    /// Makes, locks and checks the folder. Open it before anything slow: that another run is in it shows at once.
    ///
    /// # Errors
    /// [`Error::Output`] when the folder cannot be written, is in use (the process is named) or holds another run,
    /// [`Error::State`] when the day noted in it is no date.
    pub fn open(path: &Path, start: Start) -> Result<Self> {
        let own = std::iter::once(path.join(LOCK)).chain(path.ancestors().map(Path::to_path_buf));
        let made = own.filter(|path| !path.exists()).collect();
        disk::create_folder(path)?;
        let lock = lock(&path.join(LOCK))?;
        let mut folder =
            Self { path: path.to_owned(), start, day: jiff::Zoned::now().date(), kept: Vec::new(), made, _lock: lock };
        let states = States::of(path);
        match start {
            Start::Fresh => refuse_another_run(path, &states)?,
            Start::Resume => folder.day = noted_day(path)?.unwrap_or(folder.day),
            Start::Overwrite => {}
        }
        states.clean()?;
        Ok(folder)
    }

    /// The folder of a run that has a state, for its results to be written once more, and the ledger of its newest state.
    ///
    /// # Errors
    /// [`Error::State`] when there is no state, and those of [`RunFolder::open`].
    pub fn existing(path: &Path) -> Result<(Self, Ledger)> {
        let none = || Error::State(Fault::at(path, "holds no saved state").hint("train first: engraft train RECIPE"));
        let states = States::of(path);
        // Looked for before the folder is locked, so that none is made.
        if states.steps()?.is_empty() {
            return Err(none());
        }
        let folder = Self::open(path, Start::Resume)?;
        Ok((folder, states.newest()?.ok_or_else(none)?.state.ledger))
    }

    /// Makes the folder that of this run: call it once nothing can refuse the run any more. What [`Start::Overwrite`] removes
    /// is removed, and the day is noted.
    ///
    /// # Errors
    /// [`Error::Output`] when the folder cannot be written.
    pub fn begin(&mut self) -> Result<()> {
        self.made.clear();
        if self.start == Start::Overwrite {
            REPLACED.iter().try_for_each(|name| disk::remove(&self.path.join(name)))?;
        }
        for (path, bytes) in self.kept.drain(..) {
            disk::replace_file(&path, &bytes)?;
        }
        disk::replace_file(&self.path.join(DAY), format!("{}\n", self.day).as_bytes())
    }

    /// What the adapters of the run that goes on here started with, where they were taken from the weights.
    ///
    /// # Errors
    /// [`Error::State`] when the file is damaged.
    pub fn adapter_start(&self) -> Result<Option<Vec<(String, Tensor)>>> {
        let path = self.path.join(ADAPTER_START);
        if self.start != Start::Resume || !path.exists() {
            return Ok(None);
        }
        let bytes = std::fs::read(&path).map_err(|error| disk::failed("read", &path, &error))?;
        tensors_from_bytes(&bytes, &path).map(Some)
    }

    /// How the run that goes on here cuts its steps into micro-batches, where its recipe leaves that to the memory plan.
    ///
    /// # Errors
    /// [`Error::State`] when there are states but every one is damaged.
    pub fn chosen(&self) -> Result<Option<Chosen>> {
        if self.start != Start::Resume {
            return Ok(None);
        }
        Ok(States::of(&self.path).newest()?.and_then(|newest| newest.state.ledger.chosen))
    }

    /// Keeps what the adapters started with, for [`RunFolder::adapter_start`].
    ///
    /// # Errors
    /// [`Error::Diverged`] when a number is not finite.
    pub fn keep_adapter_start(&mut self, start: &[(String, Tensor)]) -> Result<()> {
        let path = self.path.join(ADAPTER_START);
        if !start.is_empty() {
            let bytes = tensors_to_bytes(start, &path)?;
            self.kept.push((path, bytes));
        }
        Ok(())
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        for path in &self.made {
            // Only an empty folder can be removed this way. What cannot be removed is no reason for a second error.
            let _ = std::fs::remove_file(path).or_else(|_| std::fs::remove_dir(path));
        }
    }
}

fn noted_day(folder: &Path) -> Result<Option<jiff::civil::Date>> {
    let path = folder.join(DAY);
    let Ok(noted) = std::fs::read_to_string(&path) else { return Ok(None) };
    noted.trim().parse().map(Some).map_err(|error| Error::State(Fault::at(&path, error)))
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
        fs::write(path.join("manifest.json"), "{}").unwrap();
        let mut again = RunFolder::open(path, Start::Overwrite).unwrap();
        assert!(path.join("state/step-000120").exists(), "what may still be refused removes nothing");
        again.begin().unwrap();
        assert!(!path.join("state").exists() && !path.join("manifest.json").exists());
        assert!(path.join("adapter").exists(), "results stay until new ones replace them");
    }

    #[test]
    fn what_ends_before_it_begins_leaves_nothing_and_keeps_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("a/b/c");
        drop(RunFolder::open(&deep, Start::Fresh).unwrap());
        assert!(!folder.path().join("a").exists());
        let mut begun = RunFolder::open(&deep, Start::Fresh).unwrap();
        begun.begin().unwrap();
        drop(begun);
        assert!(deep.join(DAY).exists());
        fs::write(deep.join(DAY), "2026-02-03\n").unwrap();
        drop(RunFolder::open(&deep, Start::Overwrite).unwrap());
        assert_eq!(RunFolder::open(&deep, Start::Resume).unwrap().day, jiff::civil::date(2026, 2, 3));
        fs::write(deep.join(DAY), "today").unwrap();
        assert!(matches!(RunFolder::open(&deep, Start::Resume), Err(Error::State(_))));
    }

    #[test]
    fn a_run_without_a_state_is_no_existing_one_and_nothing_is_made_to_find_out() {
        let folder = tempfile::tempdir().unwrap();
        let error = RunFolder::existing(&folder.path().join("nothing")).unwrap_err();
        assert!(matches!(&error, Error::State(_)) && error.to_string().contains("no saved state"), "{error}");
        RunFolder::existing(folder.path()).unwrap_err();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
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
