//! `engraft merge`: an adapter folded into its base.

use std::path::Path;

use super::console::{Console, Unit};
use super::loading;
use crate::adapter::{Learned, LoadedAdapter, Update};
use crate::cli::{Merge, Onto};
use crate::export::{merged, sidecars};
use crate::model::families;
use crate::recipe::{BaseSource, Dtype};
use crate::{Error, Fault, Result};

/// Runs the verb: tensor by tensor from the base's files, never the whole model in memory.
pub fn run(arguments: &Merge) -> Result<()> {
    loading::use_cpu(None);
    let console = Console::new(false);
    loading::refuse_filled(&arguments.out, arguments.overwrite, "merging")?;
    let base = |fault: Fault| Error::Model(Fault { place: "--model".into(), ..fault });
    let source = BaseSource::find(&arguments.model, arguments.revision.as_deref(), Path::new("")).map_err(base)?;
    let adapter = LoadedAdapter::read(&arguments.adapter)?;
    let mut checkpoint = loading::checkpoint(&source, &console)?;
    loading::with_tokens_of(&adapter, &mut checkpoint)?;
    for notice in &adapter.notices {
        console.say(format_args!("note: {notice}"));
    }
    let mut spec = families::spec(&checkpoint)?;
    spec.grow(checkpoint.vocabulary)?;
    let updates: Vec<_> = adapter.fit(&spec.sites(), &spec.names)?.into_values().collect();
    let saved = adapter.saved(&spec)?;
    // The template it was trained with travels with an adapter.
    let template = adapter.chat_template()?;
    let sidecars = sidecars(&checkpoint, template.as_deref());
    let kind = arguments.dtype.unwrap_or_else(|| own_dtype(&checkpoint.config)).kind();
    let trained_on = adapter.scheme()?;
    let onto = trained_on.filter(|_| arguments.onto == Onto::Dequantized);
    let updates = match onto {
        Some(_) => updates,
        None => updates.iter().map(Update::of_the_original).collect(),
    };
    if onto.is_some() {
        console.say("the update is folded into the numbers it was trained on: those of the quantised base");
    }
    let stage = console.stage("merging", Unit::Bytes);
    merged::write(
        &arguments.out,
        &checkpoint,
        Learned { updates: &updates, saved: &saved },
        onto.as_ref(),
        kind,
        &sidecars,
        &|done, total| {
            stage.at(done, total);
        },
    )?;
    drop(stage);
    console.say(format_args!("wrote {}", arguments.out.display()));
    Ok(())
}

/// What the base's config says its weights are.
fn own_dtype(config: &serde_json::Value) -> Dtype {
    let said = [
        &config["dtype"],
        &config["torch_dtype"],
        &config["text_config"]["dtype"],
        &config["text_config"]["torch_dtype"],
    ];
    match said.into_iter().find_map(|dtype| dtype.as_str()) {
        Some("float32") => Dtype::Fp32,
        Some("float16") => Dtype::Fp16,
        _ => Dtype::Bf16,
    }
}
