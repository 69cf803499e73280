//! `engraft inspect`: a model, adapter, dataset or run in one screen.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::speech::dataset_defaults;
use crate::adapter::LoadedAdapter;
use crate::adapter::targets::overview;
use crate::cli::Inspect;
use crate::data::SourceFiles;
use crate::model::families;
use crate::recipe::{BaseSource, DataSource};
use crate::train::States;
use crate::weights::Checkpoint;
use crate::{Error, Fault, Result};

/// Tensors listed by name to a person.
const LISTED: usize = 24;

/// Runs the verb; the pages go to `out`.
pub fn run(arguments: &Inspect, out: &mut dyn Write) -> Result<()> {
    for path in &arguments.paths {
        let facts = facts(path)?;
        let text = if arguments.json { format!("{}\n", Value::Object(facts)) } else { page(path, &facts) };
        out.write_all(text.as_bytes()).map_err(|error| Error::Output(Fault::new("standard output", error)))?;
    }
    Ok(())
}

fn facts(path: &Path) -> Result<Map<String, Value>> {
    let ends = |end: &str| path.extension().is_some_and(|found| found.eq_ignore_ascii_case(end));
    let facts = if path.join("adapter_config.json").exists() {
        adapter(path)?
    } else if path.join("config.json").exists() || ends("gguf") {
        let source = if ends("gguf") { BaseSource::Gguf(path.into()) } else { BaseSource::Folder(path.into()) };
        model(&Checkpoint::open(&source)?)
    } else if path.join("state").is_dir() {
        run_folder(path)?
    } else if ends("parquet") {
        dataset(path)?
    } else if ends("safetensors") {
        tensors(&Checkpoint::open_file(path)?)
    } else {
        let what = if path.exists() { "is neither a model, an adapter, a dataset nor a run" } else { "does not exist" };
        let hint = "a folder with config.json or adapter_config.json, a run's folder, or a .gguf, .safetensors or .parquet file";
        return Err(Error::Model(Fault::at(path, what).hint(hint)));
    };
    match facts {
        Value::Object(facts) => Ok(facts),
        _ => unreachable!("every page is an object"),
    }
}

fn model(checkpoint: &Checkpoint) -> Value {
    let config = &checkpoint.config;
    let spec = families::from_config(config);
    let mut facts = json!({
        "kind": "model",
        "model_type": config["model_type"],
        "supported": spec.is_ok(),
        "layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "attention_heads": config["num_attention_heads"],
        "key_value_heads": config["num_key_value_heads"],
        "feed_forward_size": config["intermediate_size"],
        "vocabulary": config["vocab_size"],
        "context": config["max_position_embeddings"],
        "tied_head": config["tie_word_embeddings"],
        "chat_template": checkpoint.sidecars.contains_key("chat_template.jinja")
            || checkpoint.sidecars.get("tokenizer_config.json").is_some_and(|bytes| String::from_utf8_lossy(bytes).contains("\"chat_template\"")),
    });
    if let Err(error) = spec {
        facts["why_not"] = json!(error.to_string());
    }
    let stored = tensors(checkpoint);
    for key in ["parameters", "stored_as", "files", "bytes"] {
        facts[key] = stored[key].clone();
    }
    if !checkpoint.notices().is_empty() {
        facts["notices"] = json!(checkpoint.notices());
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
    let parameters: usize = adapter.updates.iter().map(|update| update.a.numel() + update.b.numel()).sum();
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

fn dataset(path: &Path) -> Result<Value> {
    let parquet = crate::data::ParquetFile::open(path)?;
    let mut facts = json!({
        "kind": "dataset", "rows": parquet.rows(),
        "columns": parquet.columns().into_iter().map(|(name, kind)| (name, json!(kind))).collect::<Map<_, _>>(),
    });
    // Columns that fit no format are still worth looking at.
    match SourceFiles::open(&[DataSource { path: path.into(), weight: 1.0 }], &dataset_defaults()) {
        Ok(files) => {
            facts["format"] = json!(files.sentences().join("; "));
            if let Some(Ok((_, Ok(example)))) = files.examples(1).next() {
                facts["first_row"] = json!(format!("{example:?}").chars().take(400).collect::<String>());
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

fn page(path: &Path, facts: &Map<String, Value>) -> String {
    let mut page = format!("{}\n", path.display());
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
