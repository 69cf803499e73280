//! `engraft combine`: several adapters of one base as one.

use std::collections::{BTreeMap, BTreeSet};

use super::console::Console;
use super::loading;
use crate::adapter::combine::{Combination, combine};
use crate::adapter::{LoadedAdapter, TrainedOn, overview};
use crate::cli::Combine;
use crate::export::peft;
use crate::{Error, Fault, Result};

/// Runs the verb.
pub fn run(arguments: &Combine) -> Result<()> {
    loading::use_cpu(None);
    let console = Console::new(false);
    loading::refuse_filled(&arguments.out, arguments.overwrite, "combining")?;
    let adapters: Vec<LoadedAdapter> =
        arguments.adapters.iter().map(|folder| LoadedAdapter::read(folder)).collect::<Result<_>>()?;
    for adapter in &adapters {
        if let Some(TrainedOn { scheme, .. }) = adapter.trained_on()?.filter(|on| on.scheme.after_start) {
            let what = format!("is an update of what was left of a base quantised as {scheme}");
            let hint = "combine adapters that were trained on the base as it is";
            return Err(Error::Model(Fault::at(&adapter.folder, what).hint(hint)));
        }
        for notice in &adapter.notices {
            console.say(format_args!("note: {}: {notice}", adapter.folder.display()));
        }
    }
    let bases: BTreeSet<&str> =
        adapters.iter().filter_map(|adapter| adapter.config.base_model_name_or_path.as_deref()).collect();
    if bases.len() > 1 {
        let bases = bases.into_iter().collect::<Vec<_>>().join(", ");
        console.say(format_args!("note: the adapters call their bases otherwise: {bases}; the first one's is written"));
    }
    let weights = match arguments.weights.as_slice() {
        [] => vec![1.0; adapters.len()],
        weights => weights.to_vec(),
    };
    let how = Combination {
        method: arguments.by,
        weights,
        density: arguments.density,
        majority: arguments.majority_sign,
        rank: arguments.rank,
        seed: arguments.seed,
    };
    let (config, updates) = combine(&adapters, &how)?;
    let sidecars = shared_files(&adapters, &console)?;
    peft::write(&arguments.out, &config, updates.as_slice().into(), None, &sidecars)?;
    let modules: Vec<&str> = updates.iter().map(|update| update.module.as_str()).collect();
    console.say(format_args!("wrote {}: rank {}, {}", arguments.out.display(), config.r, overview(&modules)));
    Ok(())
}

/// The tokenizer and template of the adapters, where they have the same.
fn shared_files(adapters: &[LoadedAdapter], console: &Console) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"] {
        let read = |adapter: &LoadedAdapter| {
            let path = adapter.folder.join(name);
            match path.is_file() {
                true => std::fs::read(&path).map(Some).map_err(|error| Error::Model(Fault::at(&path, error))),
                false => Ok(None),
            }
        };
        let all: Vec<Option<Vec<u8>>> = adapters.iter().map(read).collect::<Result<_>>()?;
        if all.iter().any(|own| *own != all[0]) {
            console.say(format_args!(
                "note: the adapters were trained with another {name} each; the first one's is written"
            ));
        }
        if let Some(bytes) = all.into_iter().next().flatten() {
            files.insert(name.to_string(), bytes);
        }
    }
    Ok(files)
}
