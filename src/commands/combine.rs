//! `engraft combine`: several adapters of one base as one.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;

use serde_json::json;

use super::console::{Console, Unit};
use super::loading;
use crate::adapter::combine::{Combination, Combined, combine, trained_on};
use crate::adapter::{LoadedAdapter, overview};
use crate::cli::Combine;
use crate::export::peft;
use crate::{Error, Fault, Result};

/// Runs the verb.
pub fn run(arguments: &Combine, out: &mut dyn Write) -> Result<()> {
    loading::use_cpu(None);
    let console = Console::new(arguments.json);
    loading::refuse_filled(&arguments.out, arguments.overwrite, "combining")?;
    let adapters: Vec<LoadedAdapter> =
        arguments.adapters.iter().map(|folder| LoadedAdapter::read(folder)).collect::<Result<_>>()?;
    for adapter in &adapters {
        for notice in &adapter.notices {
            console.say(format_args!("note: {}: {notice}", adapter.folder.display()));
        }
    }
    let mut notices = Vec::new();
    let (trained_on, differing) = trained_on(&adapters)?;
    notices.extend(differing);
    let bases: BTreeSet<&str> =
        adapters.iter().filter_map(|adapter| adapter.config.base_model_name_or_path.as_deref()).collect();
    if bases.len() > 1 {
        let bases = bases.into_iter().collect::<Vec<_>>().join(", ");
        notices.push(format!("the adapters call their bases otherwise: {bases}; the first one's is written"));
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
    let stage = console.stage("combining", Unit::Things("linears"));
    let Combined { config, updates, relative_error } = combine(&adapters, &how, &|done, total| stage.at(done, total))?;
    drop(stage);
    let sidecars = shared_files(&adapters, &mut notices)?;
    peft::write(&arguments.out, &config, updates.as_slice().into(), trained_on.as_ref(), &sidecars)?;
    for notice in &notices {
        console.say(format_args!("note: {notice}"));
    }
    let modules: Vec<&str> = updates.iter().map(|update| update.module.as_str()).collect();
    console.say(format_args!("wrote {}: rank {}, {}", arguments.out.display(), config.r, overview(&modules)));
    if let Some(error) = relative_error {
        console.say(format_args!("relative error of what was split at that rank: {:.2}%", 100.0 * error));
    }
    if arguments.json {
        let facts = json!({
            "out": arguments.out,
            "adapters": arguments.adapters,
            "weights": how.weights,
            "by": how.method.name(),
            "rank": config.r,
            "modules": modules,
            "relative_error": relative_error,
            "trained_on": trained_on.map(|on| on.scheme.to_value()),
            "notices": notices,
        });
        writeln!(out, "{facts}").map_err(|error| Error::Output(Fault::new("standard output", error)))?;
    }
    Ok(())
}

/// The tokenizer and template of the adapters, where they have the same.
fn shared_files(adapters: &[LoadedAdapter], notices: &mut Vec<String>) -> Result<BTreeMap<String, Vec<u8>>> {
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
            notices.push(format!("the adapters were trained with another {name} each; the first one's is written"));
        }
        if let Some(bytes) = all.into_iter().next().flatten() {
            files.insert(name.to_string(), bytes);
        }
    }
    Ok(files)
}
