//! The header of a GGUF file, versions 2 and 3: metadata and the table of tensors.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Every count and length is checked against the bytes that
//! are left before anything is allocated for it.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use super::Quantisation;
use crate::weights::file;
use crate::{Error, Fault, Result};

/// No vocabulary needs more; a larger header is refused before it fills memory.
const MAX_HEADER: u64 = 256 << 20;
const MAX_DIMENSIONS: u32 = 4;
/// ggml itself stops at 64 bytes.
const MAX_TENSOR_NAME: u64 = 1024;

/// A metadata value. Arrays hold one type each; arrays of arrays are refused, as ggml does.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Integer(i64),
    /// Beyond i64.
    Unsigned(u64),
    Float(f64),
    Bool(bool),
    String(String),
    Integers(Vec<i64>),
    Floats(Vec<f64>),
    Bools(Vec<bool>),
    Strings(Vec<String>),
}

/// A tensor of the table, checked against the file.
#[derive(Debug)]
pub(super) struct Entry {
    pub name: String,
    /// Slowest dimension first, as everywhere but in GGUF.
    pub shape: Vec<i64>,
    pub quantisation: &'static Quantisation,
    /// First byte in the file.
    pub offset: u64,
}

/// The header of one file.
#[derive(Debug)]
pub(super) struct Header {
    pub metadata: HashMap<String, Value>,
    pub tensors: Vec<Entry>,
}

/// Reads and checks a header.
pub(super) fn read(path: &Path, file: &File, length: u64) -> Result<Header> {
    let mut reader = Reader { path, input: BufReader::new(file), position: 0, length, place: String::new() };
    let magic: [u8; 4] = reader.array()?;
    if &magic != b"GGUF" {
        let fault =
            Fault::at(path, format_args!("is not a GGUF file: it begins with {:?}", magic.escape_ascii().to_string()));
        return Err(Error::Model(file::mistaken(fault, &file::first_bytes(file))));
    }
    match reader.u32()? {
        2 | 3 => {}
        version if version.swap_bytes() <= 3 => {
            return Err(reader.fault(format_args!("is a big-endian GGUF file; only little-endian ones are supported")));
        }
        version => return Err(reader.fault(format_args!("is GGUF version {version}; 2 and 3 are supported"))),
    }
    let tensors = reader.u64()?;
    let pairs = reader.u64()?;
    // The shortest entries there can be: a tensor without name and dimensions, a key without name and a byte.
    reader.fits(tensors, 24, "tensors")?;
    reader.fits(pairs, 13, "metadata keys")?;

    let mut metadata = HashMap::new();
    for _ in 0..pairs {
        reader.place = "metadata".to_string();
        let key = reader.string()?;
        reader.place = format!("metadata {key}");
        let kind = reader.u32()?;
        let value = reader.value(kind)?;
        if metadata.insert(key, value).is_some() {
            return Err(reader.fault(format_args!("the key appears twice")));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(&Value::Integer(alignment)) if alignment > 0 && (alignment as u64).is_power_of_two() => alignment as u64,
        Some(other) => {
            reader.place = "metadata general.alignment".to_string();
            return Err(reader.fault(format_args!("must be a power of two, is {other:?}")));
        }
    };

    let mut infos = Vec::new();
    for _ in 0..tensors {
        infos.push(reader.tensor()?);
    }
    reader.place = String::new();
    let data = reader
        .position
        .checked_next_multiple_of(alignment)
        .ok_or_else(|| reader.fault(format_args!("its alignment of {alignment} leads past any file")))?;
    let tensors = check(path, infos, alignment, data, length)?;
    Ok(Header { metadata, tensors })
}

/// The shortest decimal that is this f32: 1e-5 was written as an f32 and should be 1e-5 again, not 9.999999747378752e-6.
pub(super) fn shortest(number: f32) -> f64 {
    number.to_string().parse().unwrap_or(f64::from(number))
}

/// A tensor as written, not yet checked against the data.
struct Info {
    name: String,
    /// Fastest dimension first.
    dimensions: Vec<u64>,
    kind: u32,
    offset: u64,
}

/// Checks that each tensor's data is in the file and overlaps no other; `data` is where data begins.
fn check(path: &Path, infos: Vec<Info>, alignment: u64, data: u64, length: u64) -> Result<Vec<Entry>> {
    let mut entries = Vec::with_capacity(infos.len());
    let mut spans: Vec<(u64, u64, usize)> = Vec::with_capacity(infos.len());
    let mut names = HashSet::new();
    for info in infos {
        let Info { name, dimensions, kind, offset } = info;
        let place = format!("{}: {name}", path.display());
        let fault = |what: fmt::Arguments| Error::Model(Fault::new(&place, what));
        if !names.insert(name.clone()) {
            return Err(fault(format_args!("the tensor appears twice")));
        }
        let Some(quantisation) = Quantisation::numbered(kind) else {
            let fault = Fault::new(&place, format_args!("unknown number format {kind}"));
            return Err(Error::Model(fault.hint(format_args!("supported: {}", Quantisation::supported()))));
        };
        if quantisation.dequantise.is_none() {
            let fault = Fault::new(&place, format_args!("is stored as {}, which is not supported", quantisation.name));
            return Err(Error::Model(fault.hint(format_args!("supported: {}", Quantisation::supported()))));
        }
        let row = dimensions.first().copied().unwrap_or(1);
        if row % quantisation.values as u64 != 0 {
            return Err(fault(format_args!(
                "its rows of {row} numbers are not whole blocks of {} ({})",
                quantisation.values, quantisation.name
            )));
        }
        let count = dimensions.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
        let bytes = count.and_then(|count| (count / quantisation.values as u64).checked_mul(quantisation.bytes as u64));
        let (Some(count), Some(bytes)) = (count, bytes) else {
            return Err(fault(format_args!("its dimensions {dimensions:?} overflow")));
        };
        // Eight bytes per number is the widest type it may be read as; each dimension is checked for itself because of zeros.
        if count > i64::MAX as u64 / 8 || dimensions.iter().any(|&size| size > i64::MAX as u64 / 8) {
            return Err(fault(format_args!("its dimensions {dimensions:?} overflow")));
        }
        if offset % alignment != 0 {
            return Err(fault(format_args!("its offset {offset} is not a multiple of the alignment {alignment}")));
        }
        let end = data.checked_add(offset).and_then(|begin| begin.checked_add(bytes));
        if end.is_none_or(|end| end > length) {
            return Err(fault(format_args!(
                "its {bytes} bytes at {data} + {offset} end past the file's {length}: truncated"
            )));
        }
        spans.push((offset, offset + bytes, entries.len()));
        let shape = dimensions.iter().rev().map(|&size| size as i64).collect();
        entries.push(Entry { name, shape, quantisation, offset: data + offset });
    }
    spans.retain(|(begin, end, _)| begin < end);
    spans.sort();
    for pair in spans.windows(2) {
        let ((_, end, first), (begin, _, second)) = (pair[0], pair[1]);
        if begin < end {
            let place = format!("{}: {}", path.display(), entries[second].name);
            let what =
                format_args!("its bytes begin at {begin}, inside those of {}, which end at {end}", entries[first].name);
            return Err(Error::Model(Fault::new(place, what)));
        }
    }
    Ok(entries)
}

/// Reads forward and knows how much is left.
struct Reader<'a> {
    path: &'a Path,
    input: BufReader<&'a File>,
    position: u64,
    length: u64,
    /// What is being read, for errors.
    place: String,
}

impl Reader<'_> {
    fn fault(&self, what: fmt::Arguments) -> Error {
        if self.place.is_empty() {
            return Error::Model(Fault::at(self.path, what));
        }
        Error::Model(Fault::new(format_args!("{}: {}", self.path.display(), self.place), what))
    }

    /// Bytes that may still belong to the header.
    fn left(&self) -> u64 {
        self.length.min(MAX_HEADER).saturating_sub(self.position)
    }

    /// Refuses a count of things of at least `size` bytes that cannot all be there.
    fn fits(&self, count: u64, size: u64, things: &str) -> Result<()> {
        if count.checked_mul(size).is_some_and(|bytes| bytes <= self.left()) {
            return Ok(());
        }
        let left = self.left();
        if self.length > MAX_HEADER {
            return Err(self.fault(format_args!(
                "{count} {things} do not fit into the {left} bytes left of a header of at most {MAX_HEADER}"
            )));
        }
        Err(self.fault(format_args!(
            "{count} {things} do not fit into the {left} bytes left of the file: truncated or damaged"
        )))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.fits(bytes.len() as u64, 1, "bytes")?;
        self.input.read_exact(bytes).map_err(|error| file::unreadable(self.path, &error))?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn bool(&mut self) -> Result<bool> {
        match self.array::<1>()?[0] {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(self.fault(format_args!("a truth value must be 0 or 1, is {other}"))),
        }
    }

    fn string(&mut self) -> Result<String> {
        let length = self.u64()?;
        self.fits(length, 1, "bytes of text")?;
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|error| self.fault(format_args!("its text is not UTF-8: {error}")))
    }

    fn value(&mut self, kind: u32) -> Result<Value> {
        Ok(match kind {
            7 => Value::Bool(self.bool()?),
            8 => Value::String(self.string()?),
            9 => self.values()?,
            6 | 12 => Value::Float(self.float(kind)?),
            10 => {
                let value = self.u64()?;
                i64::try_from(value).map_or(Value::Unsigned(value), Value::Integer)
            }
            _ => Value::Integer(self.integer(kind)?),
        })
    }

    fn values(&mut self) -> Result<Value> {
        let kind = self.u32()?;
        let count = self.u64()?;
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => return Err(self.fault(format_args!("is an array of arrays, which is not supported"))),
            _ => return Err(self.fault(format_args!("has the unknown type {kind}"))),
        };
        self.fits(count, size, "elements")?;
        Ok(match kind {
            7 => Value::Bools((0..count).map(|_| self.bool()).collect::<Result<_>>()?),
            8 => Value::Strings((0..count).map(|_| self.string()).collect::<Result<_>>()?),
            6 | 12 => Value::Floats((0..count).map(|_| self.float(kind)).collect::<Result<_>>()?),
            _ => Value::Integers((0..count).map(|_| self.integer(kind)).collect::<Result<_>>()?),
        })
    }

    fn integer(&mut self, kind: u32) -> Result<i64> {
        Ok(match kind {
            0 => self.array::<1>()?[0].into(),
            1 => i8::from_le_bytes(self.array()?).into(),
            2 => u16::from_le_bytes(self.array()?).into(),
            3 => i16::from_le_bytes(self.array()?).into(),
            4 => self.u32()?.into(),
            5 => i32::from_le_bytes(self.array()?).into(),
            10 => {
                let value = self.u64()?;
                i64::try_from(value).map_err(|_| self.fault(format_args!("the number {value} is too large")))?
            }
            11 => i64::from_le_bytes(self.array()?),
            _ => return Err(self.fault(format_args!("has the unknown type {kind}"))),
        })
    }

    fn float(&mut self, kind: u32) -> Result<f64> {
        if kind == 12 {
            return Ok(f64::from_le_bytes(self.array()?));
        }
        Ok(shortest(f32::from_le_bytes(self.array()?)))
    }

    fn tensor(&mut self) -> Result<Info> {
        self.place = "tensor table".to_string();
        let length = self.u64()?;
        if length > MAX_TENSOR_NAME {
            return Err(self.fault(format_args!("a name of {length} bytes; at most {MAX_TENSOR_NAME} are allowed")));
        }
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes)?;
        let name =
            String::from_utf8(bytes).map_err(|error| self.fault(format_args!("a name is not UTF-8: {error}")))?;
        self.place.clone_from(&name);
        let dimensions = self.u32()?;
        if dimensions > MAX_DIMENSIONS {
            return Err(self.fault(format_args!("has {dimensions} dimensions; at most {MAX_DIMENSIONS} are allowed")));
        }
        let dimensions = (0..dimensions).map(|_| self.u64()).collect::<Result<_>>()?;
        Ok(Info { name, dimensions, kind: self.u32()?, offset: self.u64()? })
    }
}
