//! A base model's files: safetensors shards, GGUF, hub download. Bytes are validated before use; tensors stream.
//!
//! [`Checkpoint::open`] reads headers only (and what quantisers keep of each weight's shape beside it). [`Checkpoint::tensor`] reads one
//! tensor straight into its own memory, a quantised one beside its codes, so loading a model peaks at the model plus one tensor. A
//! `Checkpoint` is `Send + Sync`: several threads may read tensors from it.

mod compare;
mod file;
mod folder;
pub(crate) mod gguf;
pub mod hub;
mod pieces;
mod quantised;
mod safetensors;
mod storage;
mod tekken;
pub mod writer;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use crate::quant::{self, Quantised};
use crate::recipe::BaseSource;
use crate::{Error, Fault, Result};

pub use compare::{Comparison, Difference};
pub use file::sha256_file;
pub(crate) use file::{json_object, read, sha256_file_told};
pub use hub::{Hub, Push};
pub(crate) use pieces::Pieces;
pub(crate) use quantised::prove_readable;
pub(crate) use storage::non_finite_numbers;

/// A base model opened: nothing but headers read yet.
///
/// Whatever the files are (a transformers folder or one GGUF), this shows them as transformers does:
/// tensors under their checkpoint names, small files under their usual names.
#[derive(Debug)]
pub struct Checkpoint {
    /// Where it is.
    pub source: BaseSource,
    /// `config.json` (made from the metadata for a GGUF).
    pub config: serde_json::Value,
    /// The small files of a transformers folder by name, those that exist: `config.json`, `generation_config.json`, `tokenizer.json`,
    /// `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja`. Made from the metadata for a GGUF; the tokenizer's from `tekken.json` where it has that alone.
    pub sidecars: BTreeMap<String, Vec<u8>>,
    /// How many tokens the model is to have, where that may be more than rows are stored: those beyond are the mean of all.
    pub vocabulary: i64,
    /// The commit of a hub repository that the files are of, whatever branch or tag was asked for.
    pub commit: Option<String>,
    /// The files that hold the weights, in a stable order.
    pub files: Vec<PathBuf>,
    /// The same files, opened: what was validated is what is read, even when a path is replaced meanwhile.
    opened: Vec<File>,
    tensors: Vec<Stored>,
    by_name: HashMap<String, usize>,
    notices: Vec<String>,
}

/// What a kind of source finds out; the [`Checkpoint`] is made of it.
struct Parts {
    config: serde_json::Value,
    sidecars: BTreeMap<String, Vec<u8>>,
    files: Vec<PathBuf>,
    opened: Vec<File>,
    /// In file order.
    tensors: Vec<Stored>,
    notices: Vec<String>,
}

/// A tensor in its file.
#[derive(Debug)]
struct Stored {
    /// Its checkpoint name.
    name: String,
    /// Its name as the file spells it, for errors.
    stored_name: String,
    shape: Vec<i64>,
    /// Index into `files`.
    file: usize,
    /// First byte in the file.
    offset: u64,
    form: Form,
    /// Whether the model is the same without it.
    spare: bool,
}

/// How a tensor's numbers are stored.
#[derive(Debug)]
enum Form {
    Plain(&'static storage::Dtype),
    Blocks(&'static gguf::Quantisation, gguf::Conversion),
    /// To be multiplied by scales that are stored beside it.
    Scaled(&'static storage::Dtype, quantised::fp8::Scales),
    /// Two numbers to a byte, with exponents that are stored beside them.
    Mxfp4(quantised::mxfp4::Scales),
    /// Codes of a type and shape, and what makes numbers of them.
    Bitsandbytes(&'static storage::Dtype, Vec<i64>, quantised::bitsandbytes::Parts),
    /// Whole numbers in groups, and what makes numbers of them.
    Grouped(Box<quantised::grouped::Parts>),
}

impl Stored {
    /// How a quantised weight lies in its file, beyond its form.
    fn layout(&self) -> Option<String> {
        match &self.form {
            Form::Grouped(parts) => Some(parts.layout_of(&self.shape)),
            Form::Scaled(dtype, scales) => Some(scales.layout_of(dtype, &self.shape)),
            Form::Bitsandbytes(_, _, parts) => parts.layout_of(),
            Form::Mxfp4(_) | Form::Plain(_) | Form::Blocks(..) => None,
        }
    }
}

impl Checkpoint {
    /// Opens and validates headers, index and config. Hub sources are fetched into the hub cache first.
    pub fn open(source: &BaseSource) -> Result<Self> {
        Self::open_with(source, &mut |_| {})
    }

    /// [`Checkpoint::open`], telling `progress` how far a download is.
    pub fn open_with(source: &BaseSource, progress: &mut dyn FnMut(hub::Transfer)) -> Result<Self> {
        let mut commit = None;
        let parts = match source {
            BaseSource::Folder(folder) => folder::open(folder)?,
            BaseSource::Gguf(path) => gguf::open(path)?,
            BaseSource::Hub { id, revision } => {
                let fetched = hub::Hub::from_environment()?.fetch(id, revision, progress)?;
                let mut parts = folder::open(&fetched.folder)?;
                parts.notices.extend(fetched.notice);
                commit = Some(fetched.commit);
                parts
            }
        };
        let Parts { config, sidecars, files, opened, tensors, notices } = parts;
        let mut by_name = HashMap::with_capacity(tensors.len());
        for (index, tensor) in tensors.iter().enumerate() {
            if let Some(other) = by_name.insert(tensor.name.clone(), index) {
                let (first, second) = (&files[tensors[other].file], &files[tensor.file]);
                let what = format_args!("is in two files: {} and {}", first.display(), second.display());
                return Err(Error::Model(
                    Fault::new(&tensor.name, what).hint("remove one of them, or fetch the model again"),
                ));
            }
        }
        Ok(Self {
            source: source.clone(),
            config,
            sidecars,
            vocabulary: 0,
            commit,
            files,
            opened,
            tensors,
            by_name,
            notices,
        })
    }

    /// Opens one safetensors file by itself, such as an adapter's: no config, no small files.
    pub fn open_file(path: &Path) -> Result<Self> {
        let (file, tensors) = folder::shard(path, 0)?;
        // The header has been checked for names that appear twice.
        let by_name = tensors.iter().enumerate().map(|(index, tensor)| (tensor.name.clone(), index)).collect();
        Ok(Self {
            source: BaseSource::Folder(path.parent().map(Path::to_path_buf).unwrap_or_default()),
            config: serde_json::Value::Null,
            sidecars: BTreeMap::new(),
            vocabulary: 0,
            commit: None,
            files: vec![path.to_path_buf()],
            opened: vec![file],
            tensors,
            by_name,
            notices: Vec::new(),
        })
    }

    /// Tensor names, in file order.
    pub fn names(&self) -> Vec<&str> {
        self.tensors.iter().map(|tensor| tensor.name.as_str()).collect()
    }

    /// Shape of a tensor; `None` when there is no such tensor.
    pub fn shape(&self, name: &str) -> Option<Vec<i64>> {
        self.find(name).map(|tensor| tensor.shape.clone())
    }

    /// How a tensor is stored, as its format names it (`BF16`, `Q4_K`); `None` when there is no such tensor.
    pub fn stored_as(&self, name: &str) -> Option<&'static str> {
        self.find(name).map(|tensor| match tensor.form {
            Form::Plain(dtype) | Form::Scaled(dtype, _) => dtype.name,
            Form::Blocks(quantisation, _) => quantisation.name,
            Form::Mxfp4(_) => "MXFP4",
            Form::Bitsandbytes(_, _, ref parts) => parts.name(),
            Form::Grouped(ref parts) => parts.name(),
        })
    }

    /// The number type of a tensor of whole numbers; `None` for any other, and when there is no such tensor.
    pub fn whole_kind(&self, name: &str) -> Option<Kind> {
        match self.find(name)?.form {
            Form::Plain(dtype) => dtype.kind.filter(|kind| storage::whole(*kind)),
            Form::Blocks(..) | Form::Scaled(..) | Form::Mxfp4(_) | Form::Bitsandbytes(..) | Form::Grouped(_) => None,
        }
    }

    /// What the user should know about this model's files, in plain sentences.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// An error about one of the small files, which those who read them know by name only, with the path it is found under.
    pub fn located(&self, error: Error) -> Error {
        match (&self.source, error) {
            (BaseSource::Gguf(path), Error::Model(fault)) if folder::names_a_sidecar(&fault.place) => {
                Error::Model(Fault { place: format!("{}: {}", path.display(), fault.place), ..fault })
            }
            (BaseSource::Gguf(_), error) => error,
            (BaseSource::Folder(_) | BaseSource::Hub { .. }, error) => {
                match self.files.first().and_then(|f| f.parent()) {
                    Some(folder) => folder::located(folder, error),
                    None => error,
                }
            }
        }
    }

    /// Reads one tensor (dequantised where stored quantised), converted to `kind` on `device`.
    ///
    /// A tensor stored in `kind` is one parallel read into its own memory. Errors name the file and the tensor: missing, NaN or
    /// infinite values (stored, or made so by `kind`), truncated since it was opened, out of memory.
    pub fn tensor(&self, name: &str, kind: Kind, device: Device) -> Result<Tensor> {
        let Some(stored) = self.find(name) else {
            let place = self.files.first().map(|file| file.display().to_string()).unwrap_or_default();
            let near = self.nearest(name).map(|near| format!("the nearest name there is {near}")).unwrap_or_default();
            return Err(Error::Model(Fault::new(place, format_args!("there is no tensor {name}")).hint(near)));
        };
        let source = self.source_of(stored.file, &stored.stored_name, stored.offset);
        let tensor = match &stored.form {
            Form::Plain(dtype) => match gguf::Quantisation::converting(dtype, kind) {
                Some(floats) => gguf::read_blocks(source, floats, gguf::Conversion::Same, &stored.shape, kind)?,
                None => storage::read_plain(source, dtype, &stored.shape, kind)?,
            },
            Form::Blocks(quantisation, rows) => gguf::read_blocks(source, quantisation, *rows, &stored.shape, kind)?,
            Form::Scaled(..) | Form::Mxfp4(_) | Form::Bitsandbytes(..) | Form::Grouped(_) => {
                let kept = self.kept(stored, kind, Device::Cpu)?.expect("a form that is kept");
                let numbers = kept.dequantised();
                drop(kept);
                source.finite(storage::non_finite_numbers(&numbers), kind)?;
                match &stored.form {
                    // Kept as products read it; what is shown lies as the checkpoint's own tensors do.
                    Form::Mxfp4(scales) if scales.transposed => numbers.transpose(1, 2).contiguous(),
                    _ => numbers,
                }
            }
        };
        storage::place(tensor, device)
    }

    /// A weight as it is stored, where that is a form products can be made of; `None` where it is stored as plain numbers, or in blocks
    /// of a GGUF. (out, in) or (E, out, in), whichever way a tensor of experts lies; it is made whole in `kind`.
    pub fn quantised(&self, name: &str, kind: Kind, device: Device) -> Result<Option<Quantised>> {
        self.find(name).map_or(Ok(None), |stored| self.kept(stored, kind, device))
    }

    fn kept(&self, stored: &Stored, kind: Kind, device: Device) -> Result<Option<Quantised>> {
        let source = self.source_of(stored.file, &stored.stored_name, stored.offset);
        let files = (&self.files[..], &self.opened[..]);
        let kept = match &stored.form {
            Form::Plain(_) | Form::Blocks(..) => return Ok(None),
            Form::Scaled(dtype, scales) => {
                let beside = self.source_of(scales.file, &scales.name, scales.offset);
                scales.read(source, dtype, &stored.shape, beside, (kind, device))?
            }
            Form::Mxfp4(scales) => {
                let beside = self.source_of(scales.file, &scales.name, scales.offset);
                scales.read(source, beside, &stored.shape, (kind, device))?
            }
            Form::Bitsandbytes(codes, packed, parts) => {
                parts.read(source, (codes, packed), &stored.shape, files, (kind, device))?
            }
            Form::Grouped(parts) => Quantised::Grouped(parts.read(&stored.shape, files, (kind, device))?),
        };
        Ok(Some(kept))
    }

    /// Whether two tensors are there, of the same shape and stored alike as plain numbers, with other numbers.
    ///
    /// # Errors
    /// [`Error::Model`] where they cannot be read.
    pub fn differ(&self, one: &str, other: &str) -> Result<bool> {
        const AT_ONCE: u64 = 1 << 20;
        let (Some(one), Some(other)) = (self.find(one), self.find(other)) else { return Ok(false) };
        let (Form::Plain(dtype), Form::Plain(same)) = (&one.form, &other.form) else { return Ok(false) };
        if one.shape != other.shape || dtype != same {
            return Ok(false);
        }
        let length = one.shape.iter().product::<i64>() as u64 * dtype.bits / 8;
        let [one, other] = [one, other].map(|stored| self.source_of(stored.file, &stored.stored_name, stored.offset));
        for start in (0..length).step_by(AT_ONCE as usize) {
            let [mut mine, mut theirs] = [(); 2].map(|()| vec![0; (length - start).min(AT_ONCE) as usize]);
            one.read(&mut mine, start)?;
            other.read(&mut theirs, start)?;
            if mine != theirs {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether the model is the same without a tensor: a bias of zeros that a quantiser added.
    pub fn is_spare(&self, name: &str) -> bool {
        self.find(name).is_some_and(|stored| stored.spare)
    }

    /// Whether a tensor is in a form that [`Checkpoint::quantised`] keeps.
    pub fn is_quantised(&self, name: &str) -> bool {
        self.find(name).is_some_and(|stored| !matches!(stored.form, Form::Plain(_) | Form::Blocks(..)))
    }

    /// The form of the first weight that [`Checkpoint::quantised`] keeps.
    pub fn quantised_form(&self) -> Option<quant::Form> {
        self.tensors.iter().find_map(|tensor| match &tensor.form {
            Form::Bitsandbytes(_, _, parts) => Some(parts.form()),
            Form::Grouped(parts) => Some(quant::Form::Stored(parts.layout)),
            Form::Scaled(_, scales) => Some(quant::Form::Stored(scales.layout)),
            Form::Mxfp4(_) => Some(quant::Form::Stored(quant::Layout::Mxfp4)),
            Form::Plain(_) | Form::Blocks(..) => None,
        })
    }

    /// How the weights that [`Checkpoint::quantised`] keeps lie in the files, beyond their form: bits, groups, number types, whichever
    /// there are; `None` where there are none such weights, or their form says it all.
    pub fn layout(&self) -> Option<String> {
        let layouts: BTreeSet<String> = self.tensors.iter().filter_map(Stored::layout).collect();
        (!layouts.is_empty()).then(|| layouts.into_iter().collect::<Vec<_>>().join("; "))
    }

    /// Whether all weights that [`Checkpoint::quantised`] keeps are of e4m3 numbers with a scale to each row, which products can read.
    pub fn is_fp8_in_rows(&self) -> bool {
        let mut kept =
            self.tensors.iter().filter(|tensor| !matches!(tensor.form, Form::Plain(_) | Form::Blocks(..))).peekable();
        let rows = |tensor: &Stored| match &tensor.form {
            Form::Scaled(dtype, scales) => dtype.kind == Some(Kind::Float8e4m3fn) && scales.are_of_rows(&tensor.shape),
            _ => false,
        };
        kept.peek().is_some() && kept.all(rows)
    }

    /// Bytes that [`Checkpoint::quantised`] keeps of a weight; `None` where it keeps none.
    pub fn quantised_bytes(&self, name: &str) -> Option<u64> {
        let stored = self.find(name)?;
        let numbers = stored.shape.iter().product::<i64>() as u64;
        match &stored.form {
            Form::Plain(_) | Form::Blocks(..) => None,
            Form::Scaled(_, scales) => Some(numbers + scales.bytes()),
            Form::Mxfp4(_) => Some(numbers / 2 + numbers / quant::mxfp4::BLOCK as u64),
            Form::Bitsandbytes(codes, packed, parts) => {
                Some(packed.iter().product::<i64>() as u64 * codes.bits / 8 + parts.bytes())
            }
            Form::Grouped(parts) => Some(parts.bytes(&stored.shape)),
        }
    }

    /// Bytes that [`Checkpoint::tensor`] takes beside the tensor it gives, while it reads it as `kind`.
    pub fn bytes_while_read(&self, name: &str, kind: Kind) -> u64 {
        let Some(stored) = self.find(name) else { return 0 };
        match &stored.form {
            Form::Plain(dtype) if dtype.kind != Some(kind) && gguf::Quantisation::converting(dtype, kind).is_none() => {
                stored.shape.iter().product::<i64>() as u64 * dtype.bits / 8
            }
            Form::Plain(_) | Form::Blocks(..) => 0,
            _ => self.quantised_bytes(name).unwrap_or(0),
        }
    }

    fn source_of<'a>(&'a self, file: usize, name: &'a str, offset: u64) -> storage::Source<'a> {
        storage::Source { path: &self.files[file], file: &self.opened[file], name, offset }
    }

    fn find(&self, name: &str) -> Option<&Stored> {
        self.by_name.get(name).map(|&index| &self.tensors[index])
    }

    fn nearest(&self, name: &str) -> Option<&str> {
        let near = self
            .tensors
            .iter()
            .max_by(|a, b| strsim::jaro_winkler(&a.name, name).total_cmp(&strsim::jaro_winkler(&b.name, name)));
        near.map(|tensor| tensor.name.as_str())
    }
}

#[cfg(test)]
mod tests;
