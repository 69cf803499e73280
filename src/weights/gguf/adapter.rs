//! GGUF files that hold an adapter: read as they are, for those who know what it is an adapter of.

use std::path::Path;

use tch::{Kind, Tensor};

use super::{Conversion, Metadata, header, read_blocks};
use crate::weights::file;
use crate::weights::storage::Source;
use crate::{Error, Fault, Result};

/// What an adapter's file says.
#[derive(Debug)]
pub(crate) struct AdapterFile {
    /// The architecture of its base.
    pub architecture: String,
    /// What updates are multiplied with, over their rank; 0 for nothing.
    pub alpha: f64,
    /// Its tensors, fp32, by GGUF name.
    pub tensors: Vec<(String, Tensor)>,
}

impl AdapterFile {
    /// Reads and checks a file; `order` says by name and shape how a tensor's rows were moved.
    pub fn read(path: &Path, order: impl Fn(&str, &[i64]) -> Result<Conversion>) -> Result<Self> {
        let (file, length) = file::open(path)?;
        let header = header::read(path, &file, length)?;
        let metadata = Metadata { path, values: header.metadata };
        let kind = (metadata.text("general.type")?, metadata.text("adapter.type")?);
        if kind != ("adapter", "lora") {
            let what = format_args!("is a {} ({}), not a LoRA adapter", kind.0, kind.1);
            return Err(Error::Model(Fault::at(path, what)));
        }
        let mut tensors = Vec::new();
        for entry in &header.tensors {
            let order = order(&entry.name, &entry.shape)?;
            let source = Source { path, file: &file, name: &entry.name, offset: entry.offset };
            let tensor = read_blocks(source, entry.quantisation, order, &entry.shape, Kind::Float)?;
            tensors.push((entry.name.clone(), tensor));
        }
        Ok(Self {
            architecture: metadata.text("general.architecture")?.to_string(),
            alpha: metadata.number("adapter.lora.alpha")?.unwrap_or(0.0),
            tensors,
        })
    }
}
