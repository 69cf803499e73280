//! Writing safetensors: tensor by tensor, so memory peaks at one tensor; whole or not at all.
//!
//! A file is written under a temporary name in its own folder, synced to disk, renamed, and the folder synced: a crash at any
//! moment leaves the old file or the new one. Layout and shards are those of transformers' `save_pretrained`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::folder::{INDEX, SINGLE};
use super::storage::{self, Dtype};
use crate::{Error, Fault, Result};

/// What transformers cuts shards at.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// A tensor to be written, known before its numbers are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the file.
    pub name: String,
    /// Its number type.
    pub kind: Kind,
    /// Its shape.
    pub shape: Vec<i64>,
}

impl TensorSpec {
    /// The description of `tensor`.
    pub fn of(name: impl Into<String>, tensor: &Tensor) -> Self {
        Self { name: name.into(), kind: tensor.kind(), shape: tensor.size() }
    }

    fn bytes(&self) -> u64 {
        self.shape.iter().product::<i64>() as u64 * self.kind.elt_size_in_bytes() as u64
    }
}

/// Writes one safetensors file.
///
/// `produce` is called once per tensor, in the file's order (by number type, then name, as the reference sorts), with the index
/// into `tensors`; its tensor may be on any device. `metadata` is added to `{"format": "pt"}`.
///
/// Errors of `produce` pass through; [`Error::Output`] names the file where it cannot be written (disk full, not allowed) and
/// where a tensor is not what was announced. Nothing is left behind in either case.
pub fn write(
    path: &Path,
    tensors: &[TensorSpec],
    metadata: &BTreeMap<String, String>,
    mut produce: impl FnMut(usize) -> Result<Tensor>,
) -> Result<()> {
    let order = file_order(tensors, 0..tensors.len());
    write_some(path, tensors, &order, metadata, &mut produce)
}

/// Writes a model into `folder`: `model.safetensors`, or shards of at most `shard_bytes` (a larger tensor has its own) with
/// `model.safetensors.index.json`. Returns the weight files, in order; the index is written last.
///
/// `tensors` come in the model's order, which decides what goes into which shard. Files of an earlier model are not removed.
pub fn write_model(
    folder: &Path,
    tensors: &[TensorSpec],
    shard_bytes: u64,
    mut produce: impl FnMut(usize) -> Result<Tensor>,
) -> Result<Vec<PathBuf>> {
    let shards = shards(tensors, shard_bytes);
    let count = shards.len();
    let mut files = Vec::new();
    let mut weight_map = BTreeMap::new();
    for (number, shard) in shards.into_iter().enumerate() {
        let name = match count {
            1 => SINGLE.to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        let path = folder.join(&name);
        weight_map.extend(shard.iter().map(|&index| (tensors[index].name.clone(), name.clone())));
        write_some(&path, tensors, &file_order(tensors, shard), &BTreeMap::new(), &mut produce)?;
        files.push(path);
    }
    if count > 1 {
        let total: u64 = tensors.iter().map(TensorSpec::bytes).sum();
        let parameters: i64 = tensors.iter().map(|tensor| tensor.shape.iter().product::<i64>()).sum();
        let index = json!({
            "metadata": {"total_parameters": parameters, "total_size": total},
            "weight_map": weight_map,
        });
        write_file(&folder.join(INDEX), format!("{index:#}\n").as_bytes())?;
    }
    Ok(files)
}

/// Writes a small file whole or not at all.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = Unfinished::create(path)?;
    file.write(bytes)?;
    file.commit()
}

fn write_some(
    path: &Path,
    tensors: &[TensorSpec],
    order: &[usize],
    metadata: &BTreeMap<String, String>,
    produce: &mut impl FnMut(usize) -> Result<Tensor>,
) -> Result<()> {
    let mut file = Unfinished::create(path)?;
    file.write(&header(path, tensors, order, metadata)?)?;
    for &index in order {
        let spec = &tensors[index];
        let tensor = produce(index)?;
        let made = TensorSpec::of(&spec.name, &tensor);
        if made != *spec {
            let what = format_args!("{} was announced as {spec:?} but is {made:?}", spec.name);
            return Err(Error::Output(Fault::at(path, what)));
        }
        // Neither copies what is already there.
        let tensor = tensor.to_device(Device::Cpu).contiguous();
        file.write(storage::bytes(&tensor))?;
    }
    file.commit()
}

/// The length and JSON of a header, padded with spaces to a multiple of 8 bytes so that the data is aligned.
fn header(
    path: &Path,
    tensors: &[TensorSpec],
    order: &[usize],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>> {
    let fault = |what: String| Error::Output(Fault::at(path, what));
    let mut described = BTreeMap::from([("format", "pt")]);
    described.extend(metadata.iter().map(|(key, value)| (key.as_str(), value.as_str())));
    let mut entries = serde_json::Map::new();
    entries.insert("__metadata__".to_string(), json!(described));
    let mut begin = 0;
    for &index in order {
        let spec = &tensors[index];
        let Some(dtype) = Dtype::of(spec.kind) else {
            return Err(fault(format!("safetensors cannot hold {:?} ({})", spec.kind, spec.name)));
        };
        let end = begin + spec.bytes();
        let entry = json!({"dtype": dtype.name, "shape": spec.shape, "data_offsets": [begin, end]});
        if entries.insert(spec.name.clone(), entry).is_some() {
            return Err(fault(format!("two tensors are called {}", spec.name)));
        }
        begin = end;
    }
    let mut json = Value::Object(entries).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    Ok(bytes)
}

/// The reference's order: widest number type first (which keeps every tensor aligned), then by name.
fn file_order(tensors: &[TensorSpec], some: impl IntoIterator<Item = usize>) -> Vec<usize> {
    let rank = |index: usize| Dtype::ALL.iter().position(|dtype| dtype.kind == Some(tensors[index].kind));
    let mut order: Vec<usize> = some.into_iter().collect();
    order.sort_by(|&a, &b| rank(b).cmp(&rank(a)).then_with(|| tensors[a].name.cmp(&tensors[b].name)));
    order
}

/// Indices of each shard's tensors. Source: `split_state_dict_into_shards_factory` of huggingface_hub.
fn shards(tensors: &[TensorSpec], shard_bytes: u64) -> Vec<Vec<usize>> {
    let mut shards = Vec::new();
    let mut current = Vec::new();
    let mut size = 0;
    for (index, tensor) in tensors.iter().enumerate() {
        let bytes = tensor.bytes();
        if bytes > shard_bytes {
            shards.push(vec![index]);
            continue;
        }
        if size + bytes > shard_bytes {
            shards.push(std::mem::take(&mut current));
            size = 0;
        }
        current.push(index);
        size += bytes;
    }
    if !current.is_empty() || shards.is_empty() {
        shards.push(current);
    }
    shards
}

/// Bytes after which what is written so far is sent on to the disk, while the next are being made.
const STRETCH: usize = 32 << 20;

/// A file under its temporary name; removed when it is not committed.
pub(super) struct Unfinished<'a> {
    path: &'a Path,
    temporary: PathBuf,
    file: File,
    committed: bool,
    /// Bytes since the disk was last told.
    waiting: usize,
    disk: Option<Disk>,
}

/// A thread that waits for the disk, so that the end of a file need not wait for all of it.
struct Disk {
    tell: SyncSender<()>,
    thread: JoinHandle<io::Result<()>>,
}

impl Disk {
    fn new(file: &File) -> io::Result<Self> {
        let file = file.try_clone()?;
        let (tell, told) = sync_channel(1);
        let thread = std::thread::Builder::new().name("disk".into());
        let thread = thread.spawn(move || told.into_iter().try_for_each(|()| file.sync_data()))?;
        Ok(Self { tell, thread })
    }

    /// Waits for what it was told; an error of the disk is told once only, so perhaps here and nowhere else.
    fn end(self) -> io::Result<()> {
        drop(self.tell);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl<'a> Unfinished<'a> {
    pub(super) fn create(path: &'a Path) -> Result<Self> {
        let Some(name) = path.file_name() else {
            return Err(Error::Output(Fault::at(path, "is not a file's name")));
        };
        // The rename below would put a file in the place of a device, a pipe or whatever else lives there.
        if fs::metadata(path).is_ok_and(|there| !there.is_file()) {
            let fault = Fault::at(path, "is there and is not a regular file, so it is not written over");
            return Err(Error::Output(fault.hint("name a file")));
        }
        // One name per file, so that what a killed process left is overwritten by the next.
        let mut temporary = OsString::from(".");
        temporary.push(name);
        temporary.push(".partial");
        let temporary = path.with_file_name(temporary);
        let file = File::create(&temporary).map_err(|error| unwritten(path, &error))?;
        Ok(Self { path, temporary, file, committed: false, waiting: 0, disk: None })
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        for bytes in bytes.chunks(STRETCH) {
            self.stretch(bytes).map_err(|error| unwritten(self.path, &error))?;
        }
        Ok(())
    }

    fn stretch(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.waiting += bytes.len();
        if self.waiting >= STRETCH {
            if self.disk.is_none() {
                self.disk = Some(Disk::new(&self.file)?);
            }
            // One that is still at work, or has failed, sees the rest at the end.
            let told = self.disk.as_ref().is_some_and(|disk| disk.tell.try_send(()).is_ok());
            self.waiting = if told { 0 } else { self.waiting };
        }
        Ok(())
    }

    pub(super) fn commit(mut self) -> Result<()> {
        let disk = self.disk.take();
        let finish = || -> io::Result<()> {
            disk.map_or(Ok(()), Disk::end)?;
            self.file.sync_all()?;
            fs::rename(&self.temporary, self.path)?;
            // The rename itself must reach the disk too. An empty parent is the current folder.
            let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
            File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
        };
        finish().map_err(|error| unwritten(self.path, &error))?;
        self.committed = true;
        Ok(())
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        // Its error is that of a file which is not wanted any more, or was told.
        let _ = self.disk.take().map(Disk::end);
        if !self.committed {
            // Nothing more can be done about a file that cannot be removed; the error being reported names the folder.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

fn unwritten(path: &Path, error: &io::Error) -> Error {
    let fault = Fault::at(path, format_args!("cannot be written: {error}"));
    Error::Output(match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            fault.hint("free space on this disk, or set another output.dir")
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            fault.hint("set an output.dir that may be written")
        }
        io::ErrorKind::NotFound => fault.hint("its folder does not exist"),
        _ => fault,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(kind: Kind, shape: &[i64], first: i64) -> Tensor {
        let count: i64 = shape.iter().product();
        Tensor::arange_start(first, first + count, (Kind::Float, Device::Cpu)).reshape(shape).to_kind(kind)
    }

    fn specs(tensors: &[(&str, Tensor)]) -> Vec<TensorSpec> {
        tensors.iter().map(|(name, tensor)| TensorSpec::of(*name, tensor)).collect()
    }

    #[test]
    fn a_file_is_read_back_by_the_reference_byte_for_byte() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let tensors = [
            ("b.weight", tensor(Kind::BFloat16, &[3, 5], -4)),
            ("a.weight", tensor(Kind::BFloat16, &[1], 0)),
            ("count", tensor(Kind::Int64, &[], 7)),
            ("empty", tensor(Kind::Float, &[0, 4], 0)),
            ("odd", tensor(Kind::Uint8, &[3], 1)),
            ("transposed", tensor(Kind::Float, &[2, 3], 0).tr()),
        ];
        let metadata = BTreeMap::from([("step".to_string(), "3".to_string())]);
        let mut order = Vec::new();
        write(&path, &specs(&tensors), &metadata, |index| {
            order.push(tensors[index].0);
            Ok(tensors[index].1.shallow_clone())
        })
        .unwrap();
        assert_eq!(order, ["count", "empty", "transposed", "a.weight", "b.weight", "odd"]);

        let bytes = fs::read(&path).unwrap();
        assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()) % 8, 0);
        let (_, read) = ::safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let expected = [("format", "pt"), ("step", "3")].map(|(key, value)| (key.to_string(), value.to_string()));
        assert_eq!(read.metadata().clone().unwrap(), expected.into());
        let read = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(read.len(), tensors.len());
        for (name, tensor) in &tensors {
            let view = read.tensor(name).unwrap();
            assert_eq!(view.shape().iter().map(|&size| size as i64).collect::<Vec<_>>(), tensor.size(), "{name}");
            assert_eq!(view.data(), storage::bytes(&tensor.contiguous()), "{name}");
        }
        // What is there is whole: no temporary file remains.
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn shards_are_those_of_transformers() {
        let folder = tempfile::tempdir().unwrap();
        // 4-byte numbers: 40, 40, 120, 40, 8 bytes with a limit of 100.
        let tensors = [
            ("z", tensor(Kind::Float, &[10], 0)),
            ("a", tensor(Kind::Float, &[2, 5], 10)),
            ("large", tensor(Kind::Float, &[30], 20)),
            ("m", tensor(Kind::Float, &[10], 50)),
            ("n", tensor(Kind::Float, &[2], 60)),
        ];
        let files =
            write_model(folder.path(), &specs(&tensors), 100, |index| Ok(tensors[index].1.shallow_clone())).unwrap();
        let names: Vec<_> = files.iter().map(|file| file.file_name().unwrap().to_str().unwrap()).collect();
        let name = |number: usize| format!("model-{number:05}-of-00003.safetensors");
        assert_eq!(names, [name(1), name(2), name(3)]);
        let text = fs::read_to_string(folder.path().join(INDEX)).unwrap();
        let expected = format!(
            "{{\n  \"metadata\": {{\n    \"total_parameters\": 62,\n    \"total_size\": 248\n  }},\n  \"weight_map\": {{\n    \
             \"a\": \"{0}\",\n    \"large\": \"{1}\",\n    \"m\": \"{2}\",\n    \"n\": \"{2}\",\n    \"z\": \"{0}\"\n  }}\n}}\n",
            // The large one overtakes: it becomes a shard at once, the current one is closed later.
            name(2),
            name(1),
            name(3),
        );
        assert_eq!(text, expected);

        let folder = tempfile::tempdir().unwrap();
        let files =
            write_model(folder.path(), &specs(&tensors), 1000, |index| Ok(tensors[index].1.shallow_clone())).unwrap();
        assert_eq!(files, [folder.path().join(SINGLE)]);
        assert!(!folder.path().join(INDEX).exists());
    }

    #[test]
    fn failures_leave_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        write_file(&path, b"old").unwrap();
        let specs = specs(&[("a", tensor(Kind::Float, &[2], 0)), ("b", tensor(Kind::Float, &[2], 0))]);
        let none = BTreeMap::new();
        let error = write(&path, &specs, &none, |index| match index {
            0 => Ok(tensor(Kind::Float, &[2], 0)),
            _ => Err(Error::Model(Fault::new("b", "went wrong"))),
        });
        assert!(matches!(error, Err(Error::Model(_))));
        let error = write(&path, &specs, &none, |_| Ok(tensor(Kind::Half, &[2], 0))).unwrap_err();
        assert!(matches!(&error, Error::Output(_)) && error.to_string().contains("Half"), "{error}");
        let twice = [specs[0].clone(), specs[0].clone()];
        let error = write(&path, &twice, &none, |_| Ok(tensor(Kind::Float, &[2], 0))).unwrap_err();
        assert!(error.to_string().contains("two tensors are called a"));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        let error = write_file(&folder.path().join("no/such"), b"").unwrap_err();
        assert!(error.to_string().contains("folder does not exist"));
    }

    #[test]
    fn nothing_but_a_file_is_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        for path in [fifo.as_path(), folder.path(), Path::new("/dev/full")] {
            let error = write_file(path, b"new").unwrap_err();
            assert!(error.exit_code() == 6 && error.to_string().contains("not a regular file"), "{error}");
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_full_disk_is_named_with_the_way_out() {
        let full = Unfinished {
            path: Path::new("model.safetensors"),
            temporary: PathBuf::from("/nonexistent/.model"),
            file: File::options().write(true).open("/dev/full").unwrap(),
            committed: false,
            waiting: 0,
            disk: None,
        };
        let mut full = full;
        let error = full.write(&[0; 1 << 16]).unwrap_err();
        assert_eq!(error.exit_code(), 6);
        let text = error.to_string();
        assert!(text.contains("model.safetensors") && text.contains("free space"), "{text}");
    }
}
