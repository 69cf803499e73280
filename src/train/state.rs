//! Resumable states: a folder per state, complete or not there at all.
//!
//! ```text
//! <run>/state/step-000123/adapter.safetensors      the adapter, as it is evaluated
//!                         optimizer.safetensors    step, moments, and what is trained where that is another thing
//!                         state.json               the ledger
//!                         manifest.json            size and SHA-256 of each file above
//! ```
//!
//! A state is written under a temporary name, every file and the folder flushed, and then renamed: killed at
//! any moment, either the new state is there whole or the one before is the newest. The manifest tells a file
//! that was cut short or whose bits flipped afterwards; such a state is passed over for the one before.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use super::disk;
use super::ledger::{Ledger, VERSION};
use crate::{Error, Fault, Result};

const ADAPTER: &str = "adapter.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
/// The number types that a state holds.
const TYPES: [(Dtype, Kind); 3] = [(Dtype::F32, Kind::Float), (Dtype::F64, Kind::Double), (Dtype::U8, Kind::Uint8)];
const LEDGER: &str = "state.json";
const MANIFEST: &str = "manifest.json";
const TEMPORARY: &str = ".tmp-";
const SET_ASIDE: &str = "damaged-";
/// No manifest or ledger comes near this; a larger one is not read at all.
const LARGEST_JSON: u64 = 64 << 20;

/// A state in memory, its tensors on the CPU.
#[derive(Debug)]
pub struct State {
    /// What the run had done.
    pub ledger: Ledger,
    /// The trained tensors; sorted by name when read.
    pub adapter: Vec<(String, Tensor)>,
    /// The optimizer's tensors; sorted by name when read.
    pub optimizer: Vec<(String, Tensor)>,
}

/// The states of a run: its `state` folder.
#[derive(Debug)]
pub struct States {
    folder: PathBuf,
}

/// The newest valid state, and the newer ones that are damaged with what is wrong with them.
pub struct Newest {
    /// The state.
    pub state: State,
    /// Steps of damaged states newer than it.
    pub damaged: Vec<(u64, Error)>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    bytes: u64,
    sha256: String,
}

impl States {
    /// The states of the run in `run`. Nothing is made or read yet.
    pub fn of(run: &Path) -> Self {
        Self { folder: run.join("state") }
    }

    /// The folder of the state of a step.
    pub fn path(&self, step: u64) -> PathBuf {
        self.folder.join(format!("step-{step:06}"))
    }

    /// Steps of all states, damaged ones too, oldest first.
    pub fn steps(&self) -> Result<Vec<u64>> {
        let step = |name: &str| name.strip_prefix("step-")?.parse::<u64>().ok();
        let mut steps: Vec<u64> = self.names()?.iter().filter_map(|name| step(name)).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// Removes what a killed run left under temporary names.
    pub fn clean(&self) -> Result<()> {
        let stale = self.names()?.into_iter().filter(|name| name.starts_with(TEMPORARY));
        stale.map(|name| self.folder.join(name)).try_for_each(|path| disk::remove(&path))
    }

    /// Writes a state whole or not at all and returns its folder.
    ///
    /// # Errors
    /// [`Error::Output`] when the disk refuses, [`Error::Diverged`] when a tensor is not finite; the states before are intact.
    pub fn save(&self, state: &State) -> Result<PathBuf> {
        let target = self.path(state.ledger.step);
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let temporary = self.folder.join(format!("{TEMPORARY}{name}"));
        let files = [
            (ADAPTER, tensors_to_bytes(&state.adapter, &target)?),
            (OPTIMIZER, tensors_to_bytes(&state.optimizer, &target)?),
            (LEDGER, json(&state.ledger)),
        ];
        let written = self.write(&temporary, &files).and_then(|()| disk::rename(&temporary, &target));
        if written.is_err() {
            let _ = disk::remove(&temporary);
        }
        written.map(|()| target)
    }

    fn write(&self, temporary: &Path, files: &[(&str, Vec<u8>)]) -> Result<()> {
        disk::remove(temporary)?;
        disk::create_folder(temporary)?;
        let mut manifest = BTreeMap::new();
        for (name, bytes) in files {
            disk::write_file(&temporary.join(name), bytes)?;
            manifest.insert(*name, Entry { bytes: bytes.len() as u64, sha256: hex(&Sha256::digest(bytes)) });
        }
        disk::write_file(&temporary.join(MANIFEST), &json(&manifest))?;
        disk::flush_folder(temporary)
    }

    /// Keeps the newest `limit` states and those of `besides`, removes the others. Call it after a save: the newest is then valid.
    pub fn retain(&self, limit: u32, besides: Option<u64>) -> Result<()> {
        let steps = self.steps()?;
        let surplus = steps.len().saturating_sub(limit.max(1) as usize);
        for step in steps[..surplus].iter().filter(|step| Some(**step) != besides) {
            // Renamed first, so that a removal cut short never leaves half a state under a state's name.
            let temporary = self.folder.join(format!("{TEMPORARY}old-step-{step:06}"));
            disk::remove(&temporary)?;
            disk::rename(&self.path(*step), &temporary)?;
            disk::remove(&temporary)?;
        }
        Ok(())
    }

    /// The newest state that is whole; `None` when there are none at all.
    ///
    /// # Errors
    /// [`Error::State`] when there are states but every one is damaged.
    pub fn newest(&self) -> Result<Option<Newest>> {
        let mut damaged = Vec::new();
        for step in self.steps()?.into_iter().rev() {
            match self.load(step) {
                Ok(state) => return Ok(Some(Newest { state, damaged })),
                Err(error) => damaged.push((step, error)),
            }
        }
        if damaged.is_empty() {
            return Ok(None);
        }
        let list: Vec<String> = damaged.iter().map(|(_, error)| error.to_string()).collect();
        let what = format!("none of the states is whole\n{}", list.join("\n"));
        let hint = "bring one back from a backup, or remove the folder to begin again";
        Err(Error::State(Fault::at(&self.folder, what).hint(hint)))
    }

    /// Reads the state of a step and proves it whole.
    pub fn load(&self, step: u64) -> Result<State> {
        let folder = self.path(step);
        let damaged = |file: &str, what: String| Error::State(Fault::at(&folder.join(file), what));
        let manifest = read(&folder.join(MANIFEST), LARGEST_JSON)?;
        let manifest: BTreeMap<String, Entry> =
            serde_json::from_slice(&manifest).map_err(|error| damaged(MANIFEST, format!("not a manifest: {error}")))?;
        let file = |name: &str, largest: u64| {
            let entry = manifest.get(name).ok_or_else(|| damaged(MANIFEST, format!("does not list {name}")))?;
            let bytes = read(&folder.join(name), largest.min(entry.bytes))?;
            let found = Entry { bytes: bytes.len() as u64, sha256: hex(&Sha256::digest(&bytes)) };
            if found != *entry {
                let what = format!(
                    "{} bytes with SHA-256 {}, but {} bytes with {} were written",
                    found.bytes, found.sha256, entry.bytes, entry.sha256
                );
                return Err(damaged(name, what));
            }
            Ok(bytes)
        };
        let ledger: serde_json::Value = serde_json::from_slice(&file(LEDGER, LARGEST_JSON)?)
            .map_err(|error| damaged(LEDGER, format!("not JSON: {error}")))?;
        if ledger["version"] != VERSION {
            return Err(damaged(
                LEDGER,
                format!("has version {}, this engraft reads version {VERSION}", ledger["version"]),
            ));
        }
        Ok(State {
            ledger: serde_json::from_value(ledger).map_err(|error| damaged(LEDGER, format!("not a state: {error}")))?,
            adapter: tensors_from_bytes(&file(ADAPTER, u64::MAX)?, &folder.join(ADAPTER))?,
            optimizer: tensors_from_bytes(&file(OPTIMIZER, u64::MAX)?, &folder.join(OPTIMIZER))?,
        })
    }

    /// Puts a damaged state out of the way under another name, for a person to look at.
    pub fn set_aside(&self, step: u64) -> Result<PathBuf> {
        let aside = self.folder.join(format!("{SET_ASIDE}step-{step:06}"));
        disk::remove(&aside)?;
        disk::rename(&self.path(step), &aside)?;
        Ok(aside)
    }

    fn names(&self) -> Result<Vec<String>> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(disk::failed("list", &self.folder, &error)),
        };
        let names = entries.map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()));
        names.collect::<std::io::Result<_>>().map_err(|error| disk::failed("list", &self.folder, &error))
    }
}

/// Reads a regular file of at most `largest` bytes (a longer one is cut there, which its hash then tells).
fn read(path: &Path, largest: u64) -> Result<Vec<u8>> {
    let damaged = |what: String| Error::State(Fault::at(path, what));
    let kind = fs::metadata(path).map_err(|error| damaged(format!("cannot read it: {error}")))?;
    if !kind.is_file() {
        return Err(damaged("not a regular file".into()));
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|error| damaged(format!("cannot open it: {error}")))?;
    // One byte more than allowed, so that a file that is too long shows.
    let count = file.take(largest.saturating_add(1)).read_to_end(&mut bytes);
    count.map_err(|error| damaged(format!("cannot read it: {error}")))?;
    Ok(bytes)
}

pub(super) fn tensors_to_bytes(tensors: &[(String, Tensor)], place: &Path) -> Result<Vec<u8>> {
    let mut stored = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        if tensor.isfinite().all().int64_value(&[]) == 0 {
            let what = format!("`{name}` holds values that are not finite, so this state was not saved");
            let hint = "lower training.learning_rate, or set training.max_grad_norm; the state before is intact";
            return Err(Error::Diverged(Fault::at(place, what).hint(hint)));
        }
        let tensor = tensor.detach().to_device(Device::Cpu).contiguous();
        let Some((dtype, _)) = TYPES.iter().find(|(_, kind)| *kind == tensor.kind()) else {
            return Err(Error::Output(Fault::at(place, format!("`{name}` holds {:?} numbers", tensor.kind()))));
        };
        let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
        tensor.copy_data_u8(&mut bytes, tensor.numel());
        stored.push((name, *dtype, tensor.size().iter().map(|&size| size as usize).collect::<Vec<_>>(), bytes));
    }
    let views = stored.iter().map(|(name, dtype, shape, bytes)| {
        let view = TensorView::new(*dtype, shape.clone(), bytes);
        (name, view.expect("the buffer was made for this shape"))
    });
    let bytes = safetensors::serialize(views, None);
    bytes.map_err(|error| Error::Output(Fault::at(place, format!("cannot write the tensors: {error}"))))
}

pub(super) fn tensors_from_bytes(bytes: &[u8], place: &Path) -> Result<Vec<(String, Tensor)>> {
    let damaged = |what: String| Error::State(Fault::at(place, what));
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| damaged(format!("not safetensors: {error}")))?;
    let read = tensors.tensors().into_iter().map(|(name, view)| {
        let Some((_, kind)) = TYPES.iter().find(|(dtype, _)| *dtype == view.dtype()) else {
            return Err(damaged(format!("`{name}` is {:?}, expected F32, F64 or U8", view.dtype())));
        };
        let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
        let tensor = Tensor::f_from_data_size(view.data(), &shape, *kind);
        Ok((name, tensor.map_err(|error| damaged(error.to_string()))?))
    });
    let mut read = read.collect::<Result<Vec<_>>>()?;
    read.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(read)
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec_pretty(value).expect("plain structs with string keys always serialise")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::io;

    use serde_json::Value;

    use super::disk::faults;
    use super::*;
    use crate::train::ledger::Identity;

    fn state(step: u64) -> State {
        let identity =
            Identity { recipe: Value::Null, data: "d".into(), eval: None, base: "b".into(), device: "cpu".into() };
        let tensor = |value: f64| Tensor::full([3, 2], value, (Kind::Float, Device::Cpu));
        State {
            ledger: Ledger { step, ..Ledger::new(identity, true) },
            adapter: vec![("a".into(), tensor(step as f64)), ("b".into(), tensor(0.5))],
            optimizer: vec![("step".into(), Tensor::from(step as f32))],
        }
    }

    fn saved(steps: &[u64]) -> (tempfile::TempDir, States) {
        let folder = tempfile::tempdir().unwrap();
        let states = States::of(folder.path());
        for step in steps {
            states.save(&state(*step)).unwrap();
        }
        (folder, states)
    }

    fn newest(states: &States) -> (u64, usize) {
        let newest = states.newest().unwrap().unwrap();
        assert_eq!(newest.state.adapter[0].1.double_value(&[0, 0]), newest.state.ledger.step as f64);
        (newest.state.ledger.step, newest.damaged.len())
    }

    #[test]
    fn a_state_comes_back_as_it_was() {
        let (_folder, states) = saved(&[12]);
        let State { ledger, adapter, optimizer } = states.load(12).unwrap();
        assert_eq!(ledger, state(12).ledger);
        assert_eq!(
            adapter.iter().map(|(name, t)| (name.as_str(), t.size())).collect::<Vec<_>>(),
            [("a", vec![3, 2]), ("b", vec![3, 2])]
        );
        assert_eq!(optimizer[0].1.double_value(&[]), 12.0);
        assert!(states.newest().unwrap().is_some());
        assert!(saved(&[]).1.newest().unwrap().is_none());
    }

    #[test]
    fn numbers_of_every_type_come_back_bit_for_bit() {
        let (_folder, states) = saved(&[]);
        let optimizer: Vec<(String, Tensor)> = vec![
            ("codes".into(), Tensor::from_slice(&[0u8, 7, 255]).reshape([3, 1])),
            ("single".into(), Tensor::from(0.1f32)),
            ("sum".into(), Tensor::from(0.1f64)),
        ];
        let copies = optimizer.iter().map(|(name, tensor)| (name.clone(), tensor.copy())).collect();
        states.save(&State { optimizer: copies, ..state(3) }).unwrap();
        for ((name, found), (other, expected)) in states.load(3).unwrap().optimizer.iter().zip(&optimizer) {
            assert_eq!((name, found.kind(), found.size()), (other, expected.kind(), expected.size()));
            assert!(found.equal(expected), "{name}");
        }
        let odd = State { optimizer: vec![("step".into(), Tensor::from(1i64))], ..state(4) };
        assert!(states.save(&odd).unwrap_err().to_string().contains("`step` holds Int64 numbers"));
    }

    #[test]
    fn killed_before_any_operation_of_a_save_the_previous_state_is_the_newest() {
        let mut operations = 0;
        loop {
            let (folder, states) = saved(&[1]);
            let mut left = operations;
            // From the fatal operation on nothing reaches the disk any more, clean-up included.
            let killed = move |_: &str, _: &Path| {
                if left == 0 {
                    return Err(io::Error::other("killed"));
                }
                left -= 1;
                Ok(())
            };
            let result = faults::with(killed, || states.save(&state(2)));
            if result.is_ok() {
                assert_eq!(newest(&states), (2, 0));
                break;
            }
            let renamed = states.path(2).exists();
            assert_eq!(newest(&states), (if renamed { 2 } else { 1 }, 0), "killed before operation {operations}");
            states.clean().unwrap();
            assert_eq!(fs::read_dir(folder.path().join("state")).unwrap().count(), if renamed { 2 } else { 1 });
            assert!(states.save(&state(3)).is_ok(), "what was left is not in the way");
            operations += 1;
        }
        assert!(operations > 12, "only {operations} operations were tried");
    }

    #[test]
    fn a_full_disk_is_an_output_error_and_leaves_nothing_half_written() {
        for failing in ["create", "write", "flush", "rename"] {
            let (folder, states) = saved(&[1]);
            let full = move |operation: &str, _: &Path| match operation == failing {
                true => Err(io::Error::from(io::ErrorKind::StorageFull)),
                false => Ok(()),
            };
            let error = faults::with(full, || states.save(&state(2))).unwrap_err();
            assert!(matches!(&error, Error::Output(fault) if fault.hint.contains("--resume")), "{failing}: {error}");
            assert_eq!(newest(&states), (1, 0));
            assert_eq!(fs::read_dir(folder.path().join("state")).unwrap().count(), 1, "{failing}");
        }
    }

    #[test]
    fn any_cut_or_flipped_file_makes_the_state_before_the_newest() {
        for name in [ADAPTER, OPTIMIZER, LEDGER, MANIFEST] {
            let (_folder, states) = saved(&[1, 2]);
            let path = states.path(2).join(name);
            let whole = fs::read(&path).unwrap();
            for cut in [0, 1, whole.len() / 2, whole.len() - 1] {
                fs::write(&path, &whole[..cut]).unwrap();
                assert_eq!(newest(&states), (1, 1), "{name} cut to {cut} bytes");
            }
            let mut longer = whole.clone();
            longer.push(b'x');
            fs::write(&path, longer).unwrap();
            assert_eq!(newest(&states), (1, 1), "{name} with a byte more");
            // A flip inside the manifest's own white space or key order would be no damage; all its other bytes are proved by what they say.
            if name != MANIFEST {
                for position in (0..whole.len()).step_by(37) {
                    let mut flipped = whole.clone();
                    flipped[position] ^= 0x10;
                    fs::write(&path, flipped).unwrap();
                    assert_eq!(newest(&states), (1, 1), "{name} flipped at {position}");
                }
            }
            fs::remove_file(&path).unwrap();
            assert_eq!(newest(&states), (1, 1), "without {name}");
        }
    }

    #[test]
    fn when_every_state_is_damaged_the_error_names_each() {
        let (_folder, states) = saved(&[1, 2]);
        fs::write(states.path(1).join(ADAPTER), "").unwrap();
        fs::remove_file(states.path(2).join(MANIFEST)).unwrap();
        let Err(error) = states.newest() else { panic!("a damaged state was taken") };
        let text = error.to_string();
        assert!(matches!(error, Error::State(_)));
        assert!(
            text.contains("step-000001/adapter.safetensors") && text.contains("step-000002/manifest.json"),
            "{text}"
        );
    }

    #[test]
    fn a_manifest_of_another_version_or_with_huge_sizes_is_refused_without_reading_much() {
        let (_folder, states) = saved(&[1]);
        let manifest = states.path(1).join(MANIFEST);
        let text = fs::read_to_string(&manifest).unwrap();
        fs::write(&manifest, text.replace("\"bytes\": ", "\"bytes\": 9")).unwrap();
        assert!(states.load(1).unwrap_err().to_string().contains("were written"));
        let mut other = state(5);
        other.ledger.version = 99;
        states.save(&other).unwrap();
        assert!(
            states
                .load(5)
                .unwrap_err()
                .to_string()
                .contains(&format!("version 99, this engraft reads version {VERSION}"))
        );
    }

    #[test]
    fn the_newest_and_the_best_are_kept() {
        let (folder, states) = saved(&[10, 20, 30, 40]);
        states.retain(2, Some(10)).unwrap();
        assert_eq!(states.steps().unwrap(), [10, 30, 40]);
        states.retain(0, None).unwrap();
        assert_eq!(states.steps().unwrap(), [40], "never the last one");
        assert_eq!(fs::read_dir(folder.path().join("state")).unwrap().count(), 1);
    }

    #[test]
    fn tensors_that_are_not_finite_are_never_saved() {
        let (_folder, states) = saved(&[1]);
        let mut diverged = state(2);
        diverged.adapter[1].1 = Tensor::from_slice(&[1.0f32, f32::NAN]);
        let error = states.save(&diverged).unwrap_err();
        assert!(matches!(&error, Error::Diverged(fault) if fault.what.contains("`b`")), "{error}");
        assert_eq!(newest(&states), (1, 0));
    }
}
