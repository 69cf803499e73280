//! `engraft export`: what a server loads, from a run, an adapter or a model; or the outputs of a run that has saved states.

mod recipe;
mod source;

use std::io::Write;
use std::path::PathBuf;

use serde_json::json;

use self::source::{Exported, Source};
use super::console::{Console, Unit};
use super::loading;
use crate::adapter::numbers::Here;
use crate::adapter::{Learned, Update};
use crate::cli::{Export, Onto};
use crate::export::manifest;
use crate::export::served::Served;
use crate::recipe::Target;
use crate::{Error, Fault, Result};

/// Runs the verb.
pub fn run(arguments: &Export, out: &mut dyn Write) -> Result<()> {
    match (arguments.target, &arguments.out) {
        (Some(target), Some(folder)) => for_target(arguments, target, folder, out),
        _ => recipe::run(arguments),
    }
}

/// Writes what `target` loads. Everything that can be refused is, before anything is written.
fn for_target(arguments: &Export, target: Target, folder: &PathBuf, out: &mut dyn Write) -> Result<()> {
    loading::use_cpu(None);
    let console = Console::new(arguments.json);
    loading::refuse_filled(folder, arguments.overwrite, "exporting")?;
    let source = Source::find(&arguments.source)?;
    let merge = arguments.merge || matches!(source, Source::Model(_));
    if let Some(dtype) = arguments.dtype.filter(|_| !merge) {
        let fault = Fault::new("--type", format!("is {dtype}, but an adapter is written as it was trained, in fp32"));
        return Err(Error::Recipe(vec![fault.hint("add --merge for a whole model of that type, or leave it out")]));
    }
    let Exported { checkpoint, spec, config, adapter } = source.open(arguments, &console)?;
    let (mut updates, mut saved, mut trained_on, mut template) = (Vec::new(), Vec::new(), None, None);
    if let Some((adapter, fitted)) = adapter {
        for notice in &adapter.notices {
            console.say(format_args!("note: {notice}"));
        }
        updates = fitted;
        saved = adapter.saved(&spec)?;
        trained_on = adapter.trained_on()?;
        template = adapter.chat_template()?;
        if let Some(trained_on) = trained_on.as_ref().filter(|_| merge) {
            trained_on.prove_stored_alike(&adapter.folder, Here { checkpoint: &checkpoint, spec: &spec })?;
        }
    }
    let onto = trained_on.as_ref().filter(|_| merge && arguments.onto == Onto::Dequantized);
    let onto = onto.map(|trained_on| &trained_on.scheme);
    if onto.is_none() {
        updates = updates.iter().map(Update::of_the_original).collect();
    }
    let served = Served {
        checkpoint: &checkpoint,
        spec: &spec,
        config: &config,
        learned: Learned { updates: &updates, saved: &saved },
        trained_on: trained_on.as_ref(),
        onto,
        template: template.as_deref(),
    };
    let dtype = arguments.dtype.unwrap_or_else(|| loading::own_dtype(&checkpoint.config));
    let stage = console.stage("exporting", Unit::Bytes);
    let notices = served.write(folder, target, merge, dtype.kind(), &|done, total| stage.at(done, total))?;
    drop(stage);
    for notice in &notices {
        console.say(format_args!("note: {notice}"));
    }
    console.say(format_args!("wrote {}", folder.display()));
    if arguments.json {
        let files = manifest::outputs(folder, std::slice::from_ref(folder), &|_, _| ())?;
        let facts = json!({
            "target": target, "merged": merge, "out": folder, "files": files, "notices": notices,
            "type": merge.then_some(dtype),
        });
        writeln!(out, "{facts}").map_err(|error| Error::Output(Fault::new("standard output", error)))?;
    }
    Ok(())
}
