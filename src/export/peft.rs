//! `adapter/`: what PEFT's `save_pretrained` writes, and the tokenizer beside it as TRL saves it, so that the folder can be served.

use std::collections::BTreeMap;
use std::path::Path;

use super::folder::{Staging, is_ours};
use crate::Result;
use crate::adapter::config::CONFIG;
use crate::adapter::load::{SCHEME, WEIGHTS};
use crate::adapter::{AdapterConfig, Learned, Saved, TrainedOn, layout};
use crate::weights::writer::{self, TensorSpec};

/// Files of a base that an adapter's folder does not repeat: PEFT takes them from the base.
pub(super) const THE_BASES_OWN: [&str; 2] = ["config.json", "generation_config.json"];

/// Writes an adapter's folder, whole or not at all: `adapter_config.json`, `adapter_model.safetensors` (fp32; updates, and what is
/// trained whole), the tokenizer's
/// files and the chat template of `sidecars` ([`super::sidecars`]), and `base_quantization.json` where the base was quantised. An
/// earlier one is replaced.
///
/// Unlike PEFT, an adapted head is stored without its base weight: servers pass it over and PEFT has it from the base.
///
/// Errors with [`crate::Error::Output`].
pub fn write(
    folder: &Path,
    config: &AdapterConfig,
    learned: Learned<'_>,
    trained_on: Option<&TrainedOn>,
    sidecars: &BTreeMap<String, Vec<u8>>,
) -> Result<()> {
    let staging = Staging::create(folder, |name| is_ours(name, sidecars))?;
    let Learned { updates, saved } = learned;
    let mut tensors = layout::tensors(updates);
    tensors.extend(saved.iter().flat_map(Saved::tensors).map(|(key, tensor)| (key, tensor.detach())));
    let specs: Vec<TensorSpec> = tensors.iter().map(|(key, tensor)| TensorSpec::of(key, tensor)).collect();
    writer::write(&staging.path().join(WEIGHTS), &specs, &BTreeMap::new(), |index| Ok(tensors[index].1.contiguous()))?;
    writer::write_file(&staging.path().join(CONFIG), config.to_json().as_bytes())?;
    if let Some(mut trained_on) = trained_on.cloned() {
        trained_on.scheme.after_start = updates.iter().any(|update| update.taken.is_some());
        writer::write_file(&staging.path().join(SCHEME), trained_on.to_json().as_bytes())?;
    }
    for (name, bytes) in sidecars.iter().filter(|(name, _)| !THE_BASES_OWN.contains(&name.as_str())) {
        writer::write_file(&staging.path().join(name), bytes)?;
    }
    staging.commit()
}
