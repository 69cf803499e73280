//! `engraft diff`: two adapters or models, tensor by tensor.

use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};

use super::console::{Console, Unit};
use super::loading;
use crate::adapter::AdapterConfig;
use crate::adapter::config::CONFIG;
use crate::adapter::load::WEIGHTS;
use crate::cli::Diff;
use crate::recipe::BaseSource;
use crate::weights::{Checkpoint, Comparison, Difference};
use crate::{Error, Fault, Result};

/// How many differences of a kind are shown to a person.
const SHOWN: usize = 20;

/// Runs the verb.
pub fn run(arguments: &Diff, out: &mut dyn Write) -> Result<()> {
    loading::use_cpu(None);
    let console = Console::new(arguments.json);
    let [first, second] = [&arguments.first, &arguments.second].map(|name| open(name, &console));
    let ((first, one), (second, other)) = (first?, second?);
    let configs = match (&one, &other) {
        (Some(one), Some(other)) => of_configs(one, other),
        (None, None) => Vec::new(),
        _ => {
            let what = format!("only one of {} and {} is an adapter", arguments.first, arguments.second);
            return Err(Error::Model(Fault::new("diff", what).hint("name two adapters, or two models")));
        }
    };
    let stage = console.stage("comparing", Unit::Things("tensors"));
    let found = Comparison::of(&first, &second, arguments.tolerance, &|done, total| stage.at(done, total))?;
    drop(stage);
    let equal = found.is_equal() && configs.is_empty();
    let text = match arguments.json {
        true => {
            let mut facts = serde_json::to_value(&found).expect("names and numbers have a JSON form");
            facts["is_equal"] = json!(equal);
            facts["config"] = json!(configs);
            format!("{facts}\n")
        }
        false => page(&found, &configs),
    };
    out.write_all(text.as_bytes()).map_err(|error| Error::Output(Fault::new("standard output", error)))?;
    if equal {
        return Ok(());
    }
    let missing = found.only_in_first.len() + found.only_in_second.len();
    let what = format!(
        "{} of {} tensors differ, {missing} are in one only, {} of the configs' keys say another thing",
        found.different.len(),
        found.in_both,
        configs.len()
    );
    Err(Error::Mismatch(Fault::new(format!("{} and {}", arguments.first, arguments.second), what)))
}

/// The tensors of what is named, and its config where it is an adapter.
fn open(name: &str, console: &Console) -> Result<(Checkpoint, Option<AdapterConfig>)> {
    let path = Path::new(name);
    let run = path.join("adapter");
    let adapter = if path.join(CONFIG).exists() {
        Some(path)
    } else if run.join(CONFIG).exists() && !path.join("config.json").exists() {
        Some(run.as_path())
    } else {
        None
    };
    if let Some(folder) = adapter {
        let (config, notices) = AdapterConfig::read(folder)?;
        for notice in notices {
            console.say(format_args!("note: {name}: {notice}"));
        }
        return Ok((Checkpoint::open_file(&folder.join(WEIGHTS))?, Some(config)));
    }
    if path.is_file() && path.extension().is_some_and(|end| end.eq_ignore_ascii_case("safetensors")) {
        return Ok((Checkpoint::open_file(path)?, None));
    }
    let placed = |fault: Fault| Error::Model(Fault { place: name.into(), ..fault });
    let source = BaseSource::find(name, None, Path::new("")).map_err(placed)?;
    Ok((loading::checkpoint(&source, console)?, None))
}

/// The keys of two adapters' configs that change what their tensors come to.
fn of_configs(one: &AdapterConfig, other: &AdapterConfig) -> Vec<String> {
    let said = |config: &AdapterConfig| -> Vec<(&'static str, Value)> {
        vec![
            ("lora_alpha", json!(config.lora_alpha)),
            ("r", json!(config.r)),
            ("use_rslora", json!(config.use_rslora)),
            ("use_dora", json!(config.use_dora)),
            ("rank_pattern", json!(config.rank_pattern)),
            ("alpha_pattern", json!(config.alpha_pattern)),
            ("modules_to_save", json!(config.modules_to_save)),
            ("trainable_token_indices", json!(config.trainable_token_indices)),
        ]
    };
    let pairs = said(one).into_iter().zip(said(other));
    pairs
        .filter(|(one, other)| one != other)
        .map(|((key, one), (_, other))| format!("{key}: {one} and {other}"))
        .collect()
}

/// The differences for a person.
fn page(found: &Comparison, configs: &[String]) -> String {
    let mut page = format!("{} tensors in both, {} equal\n", found.in_both, found.equal);
    let mut list = |title: &str, lines: &mut dyn Iterator<Item = String>, count: usize| {
        if count > 0 {
            page += &format!("{title} ({count}):\n");
            lines.take(SHOWN).for_each(|line| page += &format!("  {line}\n"));
            if count > SHOWN {
                page += &format!("  ... and {} more (all of them with --json)\n", count - SHOWN);
            }
        }
    };
    list("configs say", &mut configs.iter().cloned(), configs.len());
    list("different", &mut found.different.iter().map(line), found.different.len());
    list("only in the first", &mut found.only_in_first.iter().cloned(), found.only_in_first.len());
    list("only in the second", &mut found.only_in_second.iter().cloned(), found.only_in_second.len());
    page
}

fn line(difference: &Difference) -> String {
    let Difference { name, shapes, stored, largest, relative } = difference;
    let [one, other] = [0, 1].map(|index| format!("{} {:?}", stored[index], shapes[index]));
    let kinds = if one == other { one } else { format!("{one} and {other}") };
    match (largest, relative) {
        (Some(largest), Some(relative)) => {
            format!("{name}  {kinds}  at most {largest:.3e} apart, relative {relative:.3e}")
        }
        (Some(largest), None) => format!("{name}  {kinds}  at most {largest:.3e} apart, the first is zero"),
        _ => format!("{name}  {kinds}"),
    }
}
