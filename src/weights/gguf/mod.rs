//! GGUF: one file (or its parts) with weights, config and tokenizer, shown as a transformers checkpoint.

mod adapter;
mod architectures;
mod config;
mod encode;
mod header;
mod names;
mod quantise;
mod quants;
mod read;
mod shown;
mod splittings;
mod tokenizer;
mod writer;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

pub(crate) use adapter::AdapterFile;
use architectures::ARCHITECTURES;
use header::{Entry, Value};
pub(crate) use names::{Architecture, Field, Head, Heads, Rotary, Rows};
pub(crate) use quantise::{quantise, quantise_in_pieces};
pub(crate) use quants::Quantisation;
pub(super) use read::read_blocks;
pub(crate) use shown::shown;
pub(crate) use splittings::{SpelledOut, known as known_splittings, splitting};
pub(crate) use tokenizer::kind;
pub(crate) use writer::{Described, Pairs, Value as Written, write};

use super::storage::Dtype;
use super::{Form, Parts, Stored, file};
use crate::{Error, Fault, Result};

/// What llama.cpp's converter did to a tensor, to be undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Conversion {
    /// Nothing.
    Same,
    /// 1 was added to each number.
    FromOne,
    /// Within each head, llama.cpp stores row `i` of the first half and row `i` of the second next to each other (its rotary
    /// embedding turns adjacent pairs), where transformers stores the two halves one after the other.
    Paired {
        /// Rows of half a head.
        half: usize,
    },
    /// All queries, all keys, all values are one after the other, where the checkpoint has, for each key, its queries, the key
    /// and its value.
    Apart {
        /// Query heads.
        queries: usize,
        /// Key heads.
        keys: usize,
        /// Rows of a head.
        size: usize,
    },
}

impl Conversion {
    /// Where the checkpoint's row `row` is stored. Source: `permute` of llama.cpp's `convert_hf_to_gguf.py`, reversed.
    fn stored(self, row: usize) -> usize {
        match self {
            Conversion::Same | Conversion::FromOne => row,
            Conversion::Paired { half } => {
                let (head, row) = (row / (2 * half), row % (2 * half));
                head * 2 * half + row % half * 2 + row / half
            }
            Conversion::Apart { queries, keys, size } => {
                let (head, row) = (row / size, row % size);
                let group = queries / keys;
                let (key, head) = (head / (group + 2), head % (group + 2));
                let head = match head.checked_sub(group) {
                    None => key * group + head,
                    Some(0) => queries + key,
                    Some(_) => queries + keys + key,
                };
                head * size + row
            }
        }
    }
}

/// Opens a GGUF file, and its other parts when it is split.
pub(super) fn open(path: &Path) -> Result<Parts> {
    let mut files = Vec::new();
    let mut opened = Vec::new();
    let mut headers = Vec::new();
    for path in parts(path)? {
        let (file, length) = file::open(&path)?;
        headers.push(header::read(&path, &file, length)?);
        opened.push(file);
        files.push(path);
    }
    let metadata = Metadata { path: &files[0], values: std::mem::take(&mut headers[0].metadata) };
    check_split(&metadata, &files, &headers)?;

    let name = metadata.text("general.architecture")?;
    let has = |what: &str| {
        let tensor = |header: &header::Header| header.tensors.iter().any(|entry| entry.name == what);
        metadata.values.contains_key(&format!("{name}.{what}")) || headers.iter().any(tensor)
    };
    let Some(architecture) = Architecture::named(name, has) else {
        let mut known: Vec<_> = ARCHITECTURES.iter().map(|architecture| architecture.name).collect();
        known.dedup();
        let fault = metadata.fault("general.architecture", format_args!("{name} is not supported from GGUF"));
        let hint = format!("supported: {}; or use the model's safetensors", known.join(", "));
        return Err(Error::Model(fault.hint(hint)));
    };
    let heads = config::heads(architecture, &metadata)?;
    let mut tensors = Vec::new();
    let mut factors = HashMap::new();
    for (file, header) in headers.into_iter().enumerate() {
        for entry in header.tensors {
            if config::FACTORS.contains(&entry.name.as_str()) {
                let read = config::read_factors(&files[file], &opened[file], &entry)?;
                factors.insert(entry.name.clone(), read);
            }
            if architecture.is_derived(&entry.name) {
                continue;
            }
            tensors.extend(stored(architecture, heads, &files[file], file, entry)?);
        }
    }
    let config = config::make(architecture, &metadata, heads, &tensors, &factors)?;
    let mut notices = Vec::new();
    let mut sidecars = tokenizer::make(&metadata, &mut notices)?;
    let vocabulary = config["vocab_size"].as_i64().unwrap_or(0);
    let tokens = metadata.texts("tokenizer.ggml.tokens")?.len();
    if (tokens as i64) > vocabulary {
        let what = format_args!("holds {tokens} tokens, but the embedding has {vocabulary} rows");
        return Err(Error::Model(metadata.fault("tokenizer.ggml.tokens", what)));
    }
    sidecars.insert("config.json".to_string(), pretty(&config));
    Ok(Parts { config, sidecars, files, opened, tensors, notices })
}

/// A GGUF tensor as the checkpoint has it: one, or one of each expert.
fn stored(architecture: &Architecture, heads: Heads, path: &Path, file: usize, entry: Entry) -> Result<Vec<Stored>> {
    let fault = |what: String| Fault::new(format_args!("{}: {}", path.display(), entry.name), what);
    let Some((name, rows)) = architecture.to_checkpoint(&entry.name) else {
        let what = format!("no tensor of this name is known for the architecture {}", architecture.name);
        return Err(Error::Model(fault(what).hint("use the model's safetensors")));
    };
    let count = entry.shape.first().copied().unwrap_or(0);
    let norm = architecture.norms_from_one && entry.name.ends_with("_norm.weight");
    let order = if norm { Some(Conversion::FromOne) } else { rows.order(count, heads) };
    let Some(order) = order else {
        let what = format!("its {count} rows are not whole heads ({} query, {} key)", heads.query, heads.key);
        return Err(Error::Model(fault(what)));
    };
    let plain = if order == Conversion::Same { Dtype::named(entry.quantisation.name) } else { None };
    let form = || plain.map_or(Form::Blocks(entry.quantisation, order), Form::Plain);
    if name.contains('*') && entry.shape.len() != 3 {
        return Err(Error::Model(fault(format!("is {:?}; (experts, out, in) expected", entry.shape))));
    }
    let mut shape = entry.shape.clone();
    if rows == Rows::One && shape.len() == 1 {
        shape.insert(0, 1);
    }
    let tensor = |name: String, shape: Vec<i64>, offset: u64| Stored {
        name,
        stored_name: entry.name.clone(),
        shape,
        file,
        offset,
        form: form(),
        spare: false,
    };
    let Some((before, after)) = name.split_once('*') else { return Ok(vec![tensor(name, shape, entry.offset)]) };
    let &[experts, out, columns] = shape.as_slice() else { unreachable!("checked above") };
    // Rows are whole blocks, so experts are.
    let bytes = (out * columns) as u64 / entry.quantisation.values as u64 * entry.quantisation.bytes as u64;
    let expert = |number: i64| {
        tensor(format!("{before}{number}{after}"), vec![out, columns], entry.offset + number as u64 * bytes)
    };
    Ok((0..experts).map(expert).collect())
}

/// All files of a model split as `name-00001-of-00003.gguf`, or the one file.
fn parts(path: &Path) -> Result<Vec<PathBuf>> {
    let Some((stem, _, count)) = path.file_name().and_then(|name| split_name(name.to_str()?)) else {
        return Ok(vec![path.to_path_buf()]);
    };
    let parts: Vec<_> =
        (1..=count).map(|part| path.with_file_name(format!("{stem}-{part:05}-of-{count:05}.gguf"))).collect();
    // Named before anything is read: the first that is missing is what to fetch.
    if let Some(missing) = parts.iter().find(|part| !part.exists()) {
        let fault = Fault::at(missing, format_args!("this part of the {count} of {} is missing", path.display()));
        return Err(Error::Model(fault.hint("put all parts into one folder")));
    }
    Ok(parts)
}

/// `(stem, part, parts)` of a part's file name.
fn split_name(name: &str) -> Option<(&str, u32, u32)> {
    let rest = name.strip_suffix(".gguf")?;
    let (rest, count) = rest.rsplit_once("-of-")?;
    let (stem, part) = rest.rsplit_once('-')?;
    let number = |text: &str| (text.len() == 5).then(|| text.parse().ok()).flatten();
    let (part, count) = (number(part)?, number(count)?);
    (1 <= part && part <= count).then_some((stem, part, count))
}

/// The metadata of a split model must agree with the files that were found.
fn check_split(metadata: &Metadata, files: &[PathBuf], headers: &[header::Header]) -> Result<()> {
    if let Some(count) = metadata.integer("split.count")?
        && count > 1
        && count != files.len() as i64
    {
        let what = format_args!("this is one of {count} parts, but its name names {}", files.len());
        let hint = "give the parts their names back: name-00001-of-0000N.gguf";
        return Err(Error::Model(metadata.fault("split.count", what).hint(hint)));
    }
    let found: usize = headers.iter().map(|header| header.tensors.len()).sum();
    if let Some(expected) = metadata.integer("split.tensors.count")?
        && expected != found as i64
    {
        let what = format_args!("should be {expected} tensors in all parts, but there are {found}");
        return Err(Error::Model(metadata.fault("split.tensors.count", what)));
    }
    Ok(())
}

/// Metadata with typed access and errors that name the key.
struct Metadata<'a> {
    path: &'a Path,
    values: HashMap<String, Value>,
}

impl Metadata<'_> {
    fn fault(&self, key: &str, what: impl std::fmt::Display) -> Fault {
        Fault::new(format_args!("{}: metadata {key}", self.path.display()), what)
    }

    fn missing(&self, key: &str) -> Error {
        Error::Model(self.fault(key, "is missing"))
    }

    fn wrong(&self, key: &str, expected: &str) -> Error {
        Error::Model(self.fault(key, format_args!("should be {expected}")))
    }

    fn integer(&self, key: &str) -> Result<Option<i64>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(&Value::Integer(value)) => Ok(Some(value)),
            // Some writers give one value per layer; when all agree it is one value.
            Some(Value::Integers(values)) if !values.is_empty() && values.iter().all(|value| *value == values[0]) => {
                Ok(Some(values[0]))
            }
            Some(_) => Err(self.wrong(key, "one integer")),
        }
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        match self.values.get(key) {
            Some(&Value::Float(value)) if value.is_finite() => Ok(Some(value)),
            Some(Value::Float(_)) => Err(self.wrong(key, "a finite number")),
            _ => Ok(self.integer(key)?.map(|value| value as f64)),
        }
    }

    fn bool(&self, key: &str) -> Result<Option<bool>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(&Value::Bool(value)) => Ok(Some(value)),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    fn optional_text(&self, key: &str) -> Result<Option<&str>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(_) => Err(self.wrong(key, "text")),
        }
    }

    fn text(&self, key: &str) -> Result<&str> {
        self.optional_text(key)?.ok_or_else(|| self.missing(key))
    }

    fn optional_texts(&self, key: &str) -> Result<Option<&[String]>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Strings(values)) => Ok(Some(values)),
            Some(_) => Err(self.wrong(key, "an array of texts")),
        }
    }

    fn texts(&self, key: &str) -> Result<&[String]> {
        self.optional_texts(key)?.ok_or_else(|| self.missing(key))
    }
}

/// JSON as transformers writes it: two spaces, a newline at the end.
fn pretty(value: &serde_json::Value) -> Vec<u8> {
    // Display of a Value cannot fail.
    format!("{value:#}\n").into_bytes()
}

/// The small files a GGUF model is shown with.
type Sidecars = BTreeMap<String, Vec<u8>>;

#[cfg(test)]
mod tests;
