//! `engraft extract`: an adapter taken from a fine-tuned model.

use std::io::Write;
use std::path::Path;

use super::console::{Console, Unit};
use super::loading;
use crate::adapter::Learned;
use crate::adapter::extract::{Wish, extract};
use crate::cli::Extract;
use crate::export::peft;
use crate::model::families;
use crate::recipe::BaseSource;
use crate::{Error, Fault, Result};

/// Runs the verb: linear by linear from both models' files.
pub fn run(arguments: &Extract, out: &mut dyn Write) -> Result<()> {
    loading::use_cpu(None);
    let console = Console::new(arguments.json);
    loading::refuse_filled(&arguments.out, arguments.overwrite, "extracting")?;
    let open = |name: &str, option: &str| {
        let placed = |fault: Fault| Error::Model(Fault { place: option.into(), ..fault });
        loading::checkpoint(&BaseSource::find(name, None, Path::new("")).map_err(placed)?, &console)
    };
    let (tuned, base) = (open(&arguments.tuned, "--tuned")?, open(&arguments.model, "--model")?);
    let spec = families::spec(&base)?;
    let wish = Wish { rank: arguments.rank, save_others: arguments.save_others };
    let stage = console.stage("extracting", Unit::Things("linears"));
    let found = extract(&tuned, &base, &spec, wish, &|done, total| stage.at(done, total))?;
    drop(stage);
    let mut config = found.config;
    (config.base_model_name_or_path, config.revision) = (Some(arguments.model.clone()), base.commit.clone());
    let learned = Learned { updates: &found.updates, saved: &found.saved };
    // The tuned model's tokenizer and template are those it answers with.
    peft::write(&arguments.out, &config, learned, None, &tuned.sidecars)?;
    console.say(format_args!("wrote {}", arguments.out.display()));
    console.say(&found.report);
    if arguments.json {
        let text = serde_json::to_string(&found.report).expect("names and numbers have a JSON form");
        writeln!(out, "{text}").map_err(|error| Error::Output(Fault::new("standard output", error)))?;
    }
    Ok(())
}
