//! A base model's files: safetensors shards, GGUF, hub download. Tensors stream; bytes are validated before use.

use std::collections::BTreeMap;
use std::path::PathBuf;

use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::recipe::BaseSource;

/// A base model opened: nothing but headers read yet.
///
/// Whatever the files are (a transformers folder or one GGUF), this shows them as transformers does:
/// tensors under their checkpoint names, small files under their usual names.
pub struct Checkpoint {
    /// Where it is.
    pub source: BaseSource,
    /// `config.json` (made from the metadata for a GGUF).
    pub config: serde_json::Value,
    /// The small files of a transformers folder by name, those that exist: `config.json`, `generation_config.json`, `tokenizer.json`,
    /// `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja`. Made from the metadata for a GGUF.
    pub sidecars: BTreeMap<String, Vec<u8>>,
    /// The files that hold the weights, in a stable order.
    pub files: Vec<PathBuf>,
}

impl Checkpoint {
    /// Opens and validates headers, index and config. Hub sources are fetched into the hub cache first.
    pub fn open(_source: &BaseSource) -> Result<Self> {
        todo!()
    }

    /// Tensor names, in file order.
    pub fn names(&self) -> Vec<&str> {
        todo!()
    }

    /// Shape of a tensor; `None` when there is no such tensor.
    pub fn shape(&self, _name: &str) -> Option<Vec<i64>> {
        todo!()
    }

    /// Reads one tensor (dequantised where stored quantised), converted to `kind` on `device`.
    ///
    /// Errors name the file and the tensor: missing, NaN or infinite values, truncated while mapped.
    pub fn tensor(&self, _name: &str, _kind: Kind, _device: Device) -> Result<Tensor> {
        todo!()
    }
}
