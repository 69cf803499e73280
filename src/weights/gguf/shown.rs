//! What a GGUF file that is not yet written will say of its model when it is read again.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value as Json;

use super::header::Entry;
use super::{Architecture, Metadata, Pairs, Quantisation, config, stored};
use crate::weights::Stored;
use crate::{Error, Fault, Result};

/// The `config.json` that reading a file of this metadata and these tensors (GGUF name and shape) makes; `derived` holds the numbers of
/// those that the config is made of. `path` is for errors.
pub(crate) fn shown(
    path: &Path,
    metadata: &Pairs,
    tensors: &[(String, Vec<i64>)],
    derived: &[(&'static str, Vec<f32>)],
) -> Result<Json> {
    let values: HashMap<_, _> = metadata.iter().map(|(key, value)| (key.clone(), value.read())).collect();
    let metadata = Metadata { path, values };
    let name = metadata.text("general.architecture")?;
    let has = |what: &str| {
        metadata.values.contains_key(&format!("{name}.{what}")) || tensors.iter().any(|(tensor, _)| tensor == what)
    };
    let Some(architecture) = Architecture::named(name, has) else {
        return Err(Error::Output(Fault::at(path, format_args!("{name} could not be read again"))));
    };
    let heads = config::heads(architecture, &metadata)?;
    let mut found: Vec<Stored> = Vec::new();
    for (name, shape) in tensors.iter().filter(|(name, _)| !architecture.is_derived(name)) {
        let quantisation = Quantisation::called("F32");
        let entry = Entry { name: name.clone(), shape: shape.clone(), quantisation, offset: 0 };
        found.extend(stored(architecture, heads, path, 0, entry)?);
    }
    let factors = derived
        .iter()
        .map(|(name, numbers)| {
            (name.to_string(), numbers.iter().map(|number| super::header::shortest(*number)).collect())
        })
        .collect();
    config::make(architecture, &metadata, heads, &found, &factors)
}
