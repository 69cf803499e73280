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
    /// What updates are multiplied with, over their rank; 0 for nothing.
    pub alpha: f64,
    /// Its tensors, fp32, by GGUF name.
    pub tensors: Vec<(String, Tensor)>,
}

impl AdapterFile {
    /// Reads and checks a file of an adapter for a base of this architecture; `order` says by name and shape how a tensor's rows were
    /// moved.
    pub fn read(path: &Path, architecture: &str, order: impl Fn(&str, &[i64]) -> Result<Conversion>) -> Result<Self> {
        let (file, length) = file::open(path)?;
        let header = header::read(path, &file, length)?;
        let metadata = Metadata { path, values: header.metadata };
        let (kind, of) = (metadata.optional_text("general.type")?, metadata.optional_text("adapter.type")?);
        if (kind, of) != (Some("adapter"), Some("lora")) {
            let what = match (kind, of) {
                (Some("adapter"), of) => format!("is an adapter of the type {}, not a LoRA", of.unwrap_or("(none)")),
                (kind, _) => format!("is a {}, not an adapter", kind.unwrap_or("model")),
            };
            return Err(Error::Model(Fault::at(path, what)));
        }
        let own = metadata.text("general.architecture")?;
        if own != architecture {
            let what = format!("is an adapter of a {own}, but this base is a {architecture}");
            return Err(Error::Model(Fault::at(path, what).hint("name the base the adapter was trained on")));
        }
        let mut tensors = Vec::new();
        for entry in &header.tensors {
            let order = order(&entry.name, &entry.shape).map_err(|error| match error {
                Error::Model(fault) => {
                    Error::Model(Fault { place: format!("{}: {}", path.display(), fault.place), ..fault })
                }
                other => other,
            })?;
            let source = Source { path, file: &file, name: &entry.name, offset: entry.offset };
            let tensor = read_blocks(source, entry.quantisation, order, &entry.shape, Kind::Float)?;
            tensors.push((entry.name.clone(), tensor));
        }
        Ok(Self { alpha: metadata.number("adapter.lora.alpha")?.unwrap_or(0.0), tensors })
    }
}
