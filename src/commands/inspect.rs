//! `engraft inspect`: a model, adapter, dataset or run in one screen.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::console::{Console, Unit};
use crate::adapter::targets::overview;
use crate::adapter::{LoadedAdapter, Update};
use crate::cli::Inspect;
use crate::data::{ParquetFile, SourceFiles};
use crate::model::families;
use crate::recipe::{BaseSource, DataSource, DatasetRecipe};
use crate::train::States;
use crate::weights::Checkpoint;
use crate::{Error, Fault, Result};

/// Tensors listed by name to a person.
const LISTED: usize = 24;
/// Characters shown of each text of a dataset's first row.
const SHOWN: usize = 400;

/// Runs the verb; the pages go to `out`.
pub fn run(arguments: &Inspect, out: &mut dyn Write) -> Result<()> {
    let console = Console::new(arguments.json);
    for name in &arguments.names {
        let facts = facts(name, &console)?;
        let text = if arguments.json { format!("{}\n", Value::Object(facts)) } else { page(name, &facts) };
        out.write_all(text.as_bytes()).map_err(|error| Error::Output(Fault::new("standard output", error)))?;
    }
    Ok(())
}

/// What a name means is found as recipes find it; what only this verb knows (adapters, runs, single files) comes first.
fn facts(name: &str, console: &Console) -> Result<Map<String, Value>> {
    let path = Path::new(name);
    let ends = |end: &str| path.extension().is_some_and(|found| found.eq_ignore_ascii_case(end));
    let placed = |fault: Fault| if fault.place.is_empty() { Fault { place: name.into(), ..fault } } else { fault };
    let facts = if path.join("adapter_config.json").exists() {
        adapter(path)?
    } else if path.join("state").is_dir() && !path.join("config.json").exists() {
        run_folder(path)?
    } else if path.is_file() && ends("safetensors") {
        tensors(&Checkpoint::open_file(path)?)
    } else if ends("parquet") || (!path.exists() && name.contains(['*', '?', '['])) {
        dataset(&DataSource::find(name, Path::new("")).map_err(|fault| Error::Data(placed(fault)))?)?
    } else if path.is_dir() && !path.join("config.json").exists() {
        let Ok(sources) = DataSource::find(name, Path::new("")) else {
            let what = "is neither a model, an adapter, a dataset nor a run";
            let hint = "such a folder holds config.json, adapter_config.json, .parquet files or state";
            return Err(Error::Model(Fault::new(name, what).hint(hint)));
        };
        dataset(&sources)?
    } else {
        let source = BaseSource::find(name, None, Path::new("")).map_err(|fault| Error::Model(placed(fault)))?;
        let stage = console.stage("fetching the base", Unit::Bytes);
        model(&Checkpoint::open_with(&source, &mut |transfer| stage.at(transfer.done, transfer.total))?)
    };
    match facts {
        Value::Object(facts) => Ok(facts),
        _ => unreachable!("every page is an object"),
    }
}

fn model(checkpoint: &Checkpoint) -> Value {
    let config = &checkpoint.config;
    let spec = families::from_config(config);
    // Where the model has several parts, the text model's.
    let size = |field: &str| if config[field].is_null() { &config["text_config"][field] } else { &config[field] };
    let mut facts = json!({
        "kind": "model",
        "model_type": config["model_type"],
        "supported": spec.is_ok(),
        "layers": size("num_hidden_layers"),
        "hidden_size": size("hidden_size"),
        "attention_heads": size("num_attention_heads"),
        "key_value_heads": size("num_key_value_heads"),
        "feed_forward_size": size("intermediate_size"),
        "vocabulary": size("vocab_size"),
        "context": size("max_position_embeddings"),
        "tied_head": config["tie_word_embeddings"],
        "chat_template": checkpoint.sidecars.contains_key("chat_template.jinja")
            || checkpoint.sidecars.get("tokenizer_config.json").is_some_and(|bytes| String::from_utf8_lossy(bytes).contains("\"chat_template\"")),
    });
    if let Err(error) = spec {
        facts["why_not"] = json!(checkpoint.located(error).to_string());
    }
    let stored = tensors(checkpoint);
    for key in ["parameters", "stored_as", "files", "bytes"] {
        facts[key] = stored[key].clone();
    }
    let notices = [checkpoint.notices(), &families::notices(&checkpoint.config)].concat();
    if !notices.is_empty() {
        facts["notices"] = json!(notices);
    }
    facts
}

fn tensors(checkpoint: &Checkpoint) -> Value {
    let mut stored: BTreeMap<&str, u64> = BTreeMap::new();
    let mut parameters = 0u64;
    let mut listed = Map::new();
    for name in checkpoint.names() {
        let shape = checkpoint.shape(name).unwrap_or_default();
        let numbers = shape.iter().product::<i64>() as u64;
        let dtype = checkpoint.stored_as(name).unwrap_or("?");
        parameters += numbers;
        *stored.entry(dtype).or_default() += numbers;
        listed.insert(name.into(), json!(format!("{dtype} {shape:?}")));
    }
    let bytes: u64 = checkpoint.files.iter().filter_map(|file| file.metadata().ok()).map(|m| m.len()).sum();
    json!({
        "kind": "tensors", "parameters": parameters, "stored_as": stored, "files": checkpoint.files.len(),
        "bytes": bytes, "tensors": listed,
    })
}

fn adapter(path: &Path) -> Result<Value> {
    let adapter = LoadedAdapter::read(path)?;
    let modules: Vec<&str> = adapter.updates.iter().map(|update| update.module.as_str()).collect();
    let parameters: usize = adapter.updates.iter().flat_map(Update::tensors).map(|(_, tensor)| tensor.numel()).sum();
    let untrained = adapter.updates.iter().all(|update| update.b.abs().max().double_value(&[]) == 0.0);
    let mut facts = json!({
        "kind": "adapter", "base": adapter.config.base_model_name_or_path, "r": adapter.config.r,
        "lora_alpha": adapter.config.lora_alpha, "use_rslora": adapter.config.use_rslora,
        "modules": overview(&modules), "parameters": parameters,
    });
    if untrained {
        facts["note"] = json!("every B is zero: the adapter changes nothing yet");
    }
    if !adapter.notices.is_empty() {
        facts["notices"] = json!(adapter.notices);
    }
    Ok(facts)
}

fn dataset(sources: &[DataSource]) -> Result<Value> {
    let (mut rows, mut columns) = (0, Map::new());
    for source in sources {
        let parquet = ParquetFile::open(&source.path)?;
        rows += parquet.rows();
        columns.extend(parquet.columns().into_iter().map(|(name, kind)| (name, json!(kind))));
    }
    let mut facts = json!({ "kind": "dataset", "files": sources.len(), "rows": rows, "columns": columns });
    // Columns that fit no format are still worth looking at.
    match SourceFiles::open(sources, &DatasetRecipe::defaults()) {
        Ok(files) => {
            facts["format"] = json!(files.sentences().join("; "));
            if let Some(Ok((_, Ok(example)))) = files.examples(1).next() {
                facts["first_row"] = json!(example.outline(SHOWN));
            }
        }
        Err(error) => facts["format"] = json!(error.to_string()),
    }
    Ok(facts)
}

fn run_folder(path: &Path) -> Result<Value> {
    let states = States::of(path);
    let mut facts = json!({ "kind": "run", "states": states.steps()? });
    if let Some(newest) = states.newest()? {
        let ledger = newest.state.ledger;
        facts["step"] = json!(ledger.step);
        facts["loss"] = json!(ledger.loss);
        facts["eval_loss"] = json!(ledger.eval_loss);
        facts["best"] = json!(ledger.best);
        facts["trained_tokens"] = json!(ledger.trained_tokens);
        facts["seconds"] = json!(ledger.elapsed_seconds);
        facts["device"] = json!(ledger.identity.device);
        facts["damaged_states"] = json!(newest.damaged.iter().map(|(step, _)| step).collect::<Vec<_>>());
    }
    let outputs: Vec<&str> = ["adapter", "merged", "manifest.json", "report.html"]
        .into_iter()
        .filter(|name| path.join(name).exists())
        .collect();
    facts["outputs"] = json!(outputs);
    Ok(facts)
}

fn page(name: &str, facts: &Map<String, Value>) -> String {
    let mut page = format!("{name}\n");
    for (key, value) in facts {
        let text = match value {
            Value::Null => continue,
            Value::String(text) => text.replace('\n', "\n                     "),
            Value::Object(entries) => {
                let shown = entries.iter().take(LISTED).map(|(name, value)| match value {
                    Value::String(text) => format!("{name}  {text}"),
                    value => format!("{name}  {value}"),
                });
                let more = entries.len().saturating_sub(LISTED);
                let last = (more > 0).then(|| format!("... and {more} more (all of them with --json)"));
                shown.chain(last).collect::<Vec<_>>().join("\n                     ")
            }
            Value::Array(items) => items
                .iter()
                .map(|item| item.as_str().map_or_else(|| item.to_string(), ToString::to_string))
                .collect::<Vec<_>>()
                .join(", "),
            value => value.to_string(),
        };
        page += &format!("  {key:<17}  {text}\n");
    }
    page
}
