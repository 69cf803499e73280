//! Writing GGUF, version 3: the header, then each tensor as it is made, so memory peaks at one tensor; whole or not at all.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::collections::HashSet;
use std::path::Path;

use super::{Quantisation, header};
use crate::weights::writer::Unfinished;
use crate::{Error, Fault, Result};

/// Every tensor's data begins at a multiple of this.
const ALIGNMENT: usize = 32;
/// ggml keeps 64 bytes, the last of which is 0.
const MAX_NAME: usize = 63;

/// A metadata value, of the type that readers expect.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Bools(Vec<bool>),
    Texts(Vec<String>),
}

/// Keys and values, in the file's order.
pub(crate) type Pairs = Vec<(String, Value)>;

/// A tensor to be written, known before its numbers are.
#[derive(Debug, Clone)]
pub(crate) struct Described {
    /// Its GGUF name.
    pub name: String,
    /// Slowest dimension first.
    pub shape: Vec<i64>,
    pub format: &'static Quantisation,
}

impl Described {
    pub fn bytes(&self) -> u64 {
        self.format.size(self.shape.iter().product::<i64>() as usize) as u64
    }
}

/// Writes one file. `produce` is called once per tensor, in order, and hands its bytes to what it is given, in as many pieces as it
/// likes.
///
/// Errors of `produce` pass through; [`Error::Output`] names the file where it cannot be written and where a tensor is not as long as
/// was announced. Nothing is left behind in either case.
pub(crate) fn write(
    path: &Path,
    metadata: &Pairs,
    tensors: &[Described],
    mut produce: impl FnMut(usize, &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
) -> Result<()> {
    let mut file = Unfinished::create(path)?;
    file.write(&head(path, metadata, tensors)?)?;
    for (index, tensor) in tensors.iter().enumerate() {
        let mut written = 0;
        produce(index, &mut |bytes| {
            written += bytes.len() as u64;
            file.write(bytes)
        })?;
        if written != tensor.bytes() {
            let what = format!("{} was announced with {} bytes but has {written}", tensor.name, tensor.bytes());
            return Err(Error::Output(Fault::at(path, what)));
        }
        file.write(&[0; ALIGNMENT][..padding(written)])?;
    }
    file.commit()
}

fn padding(length: u64) -> usize {
    (length.next_multiple_of(ALIGNMENT as u64) - length) as usize
}

/// All that comes before the data.
fn head(path: &Path, metadata: &Pairs, tensors: &[Described]) -> Result<Vec<u8>> {
    let fault = |what: String| Error::Output(Fault::at(path, what));
    let mut keys = HashSet::new();
    if let Some((twice, _)) = metadata.iter().find(|(key, _)| !keys.insert(key)) {
        return Err(fault(format!("the metadata key {twice} would be there twice")));
    }
    let mut out = [b"GGUF".as_slice(), &3u32.to_le_bytes()].concat();
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut out, key);
        value.write(&mut out);
    }
    let mut names = HashSet::new();
    let mut offset = 0u64;
    for tensor in tensors {
        let name = &tensor.name;
        if !names.insert(name) {
            return Err(fault(format!("two tensors would be called {name}")));
        }
        if name.len() > MAX_NAME || tensor.shape.is_empty() || tensor.shape.len() > 4 {
            return Err(fault(format!("GGUF cannot hold the tensor {name} {:?}", tensor.shape)));
        }
        text(&mut out, name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        for size in tensor.shape.iter().rev() {
            out.extend((*size as u64).to_le_bytes());
        }
        out.extend(tensor.format.id.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += tensor.bytes();
        offset += padding(offset) as u64;
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    Ok(out)
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Value {
    /// Its type's number, and its bytes.
    fn write(&self, out: &mut Vec<u8>) {
        const ARRAY: u32 = 9;
        let array = |out: &mut Vec<u8>, kind: u32, count: usize| {
            out.extend([ARRAY, kind].map(u32::to_le_bytes).concat());
            out.extend((count as u64).to_le_bytes());
        };
        match self {
            Self::U32(value) => out.extend([4, *value].map(u32::to_le_bytes).concat()),
            Self::F32(value) => out.extend([6u32.to_le_bytes(), value.to_le_bytes()].concat()),
            Self::Bool(value) => out.extend([&7u32.to_le_bytes()[..], &[u8::from(*value)]].concat()),
            Self::Text(value) => {
                out.extend(8u32.to_le_bytes());
                text(out, value);
            }
            Self::I32s(values) => {
                array(out, 5, values.len());
                values.iter().for_each(|value| out.extend(value.to_le_bytes()));
            }
            Self::F32s(values) => {
                array(out, 6, values.len());
                values.iter().for_each(|value| out.extend(value.to_le_bytes()));
            }
            Self::Bools(values) => {
                array(out, 7, values.len());
                out.extend(values.iter().map(|value| u8::from(*value)));
            }
            Self::Texts(values) => {
                array(out, 8, values.len());
                values.iter().for_each(|value| text(out, value));
            }
        }
    }

    /// What reading it gives.
    pub(super) fn read(&self) -> header::Value {
        match self {
            Self::U32(value) => header::Value::Integer(i64::from(*value)),
            Self::F32(value) => header::Value::Float(header::shortest(*value)),
            Self::Bool(value) => header::Value::Bool(*value),
            Self::Text(value) => header::Value::String(value.clone()),
            Self::I32s(values) => header::Value::Integers(values.iter().map(|value| i64::from(*value)).collect()),
            Self::F32s(values) => header::Value::Floats(values.iter().map(|value| header::shortest(*value)).collect()),
            Self::Bools(values) => header::Value::Bools(values.clone()),
            Self::Texts(values) => header::Value::Strings(values.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    fn pairs() -> Pairs {
        let pair = |key: &str, value| (key.to_string(), value);
        vec![
            pair("general.architecture", Value::Text("llama".into())),
            pair("a.count", Value::U32(7)),
            pair("a.number", Value::F32(1e-5)),
            pair("a.flag", Value::Bool(true)),
            pair("a.whole", Value::I32s(vec![1, -2])),
            pair("a.numbers", Value::F32s(vec![0.5, -1e-6])),
            pair("a.flags", Value::Bools(vec![true, false])),
            pair("a.texts", Value::Texts(vec!["é".into(), String::new()])),
        ]
    }

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        let f32s = Quantisation::called("F32");
        let tensors = [
            Described { name: "one".into(), shape: vec![3], format: f32s },
            Described { name: "two".into(), shape: vec![2, 32], format: Quantisation::called("Q8_0") },
        ];
        let produce = |index: usize, take: &mut dyn FnMut(&[u8]) -> Result<()>| match index {
            0 => take(&[1; 12]),
            _ => take(&[2; 34]).and_then(|()| take(&[3; 34])),
        };
        write(&path, &pairs(), &tensors, produce).unwrap();
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes.len() % ALIGNMENT, 0);
        let read = header::read(&path, &File::open(&path).unwrap(), bytes.len() as u64).unwrap();
        assert_eq!(read.metadata.len(), pairs().len());
        for (key, value) in pairs() {
            assert_eq!(read.metadata[&key], value.read(), "{key}");
        }
        assert_eq!(read.metadata["a.number"], header::Value::Float(1e-5));
        let [one, two] = &read.tensors[..] else { panic!("two tensors") };
        assert_eq!((one.name.as_str(), &one.shape[..]), ("one", &[3i64][..]));
        assert_eq!((two.name.as_str(), &two.shape[..], two.quantisation.name), ("two", &[2i64, 32][..], "Q8_0"));
        assert_eq!(bytes[one.offset as usize..][..12], [1; 12]);
        assert_eq!(bytes[two.offset as usize + 34..][..34], [3; 34]);
    }

    #[test]
    fn what_cannot_be_right_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        let tensor = |name: &str| Described { name: name.into(), shape: vec![2], format: Quantisation::called("F32") };
        let fault = |pairs: Pairs, tensors: &[Described], bytes: &[u8]| {
            let error = write(&path, &pairs, tensors, |_, take| take(bytes)).unwrap_err();
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
            assert_eq!(error.exit_code(), 6);
            error.to_string()
        };
        assert!(fault(pairs(), &[tensor("a")], &[0; 4]).contains("a was announced with 8 bytes but has 4"));
        assert!(fault(pairs(), &[tensor("a"), tensor("a")], &[0; 8]).contains("two tensors would be called a"));
        assert!(fault([pairs(), pairs()].concat(), &[], &[]).contains("would be there twice"));
        assert!(fault(pairs(), &[tensor(&"n".repeat(64))], &[0; 8]).contains("GGUF cannot hold"));
    }
}
