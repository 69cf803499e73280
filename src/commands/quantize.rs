//! `engraft quantize`: a base in four or eight bits.

use std::io::Write;
use std::path::Path;

use serde_json::json;

use super::console::{Console, Unit};
use super::loading;
use crate::adapter::Learned;
use crate::cli::Quantize;
use crate::export::quantised;
use crate::model::families;
use crate::recipe::BaseSource;
use crate::{Error, Fault, Result};

/// Runs the verb: tensor by tensor from the base's files.
pub fn run(arguments: &Quantize, out: &mut dyn Write) -> Result<()> {
    loading::use_cpu(None);
    let console = Console::new(arguments.json);
    loading::refuse_filled(&arguments.out, arguments.overwrite, "quantising")?;
    let base = |fault: Fault| Error::Model(Fault { place: "--model".into(), ..fault });
    let source = BaseSource::find(&arguments.model, arguments.revision.as_deref(), Path::new("")).map_err(base)?;
    let checkpoint = loading::checkpoint(&source, &console)?;
    let scheme =
        loading::asked(arguments.form, &arguments.quantizing, arguments.dtype.kind(), &families::spec(&checkpoint)?)?;
    if checkpoint.quantised_form().is_some_and(|stored| stored == scheme.form || !stored.may_become(scheme.form)) {
        return Err(base(Fault::new("", "is quantised already").hint("name the model it was made of")));
    }
    let stage = console.stage("quantising", Unit::Things("numbers"));
    let at = |done, total| stage.at(done, total);
    let written =
        quantised::write(&arguments.out, &checkpoint, Learned::default(), None, &scheme, &checkpoint.sidecars, &at)?;
    drop(stage);
    console.say(format_args!("wrote {}", arguments.out.display()));
    console.say(format_args!("{written}"));
    if arguments.json {
        let facts = json!({
            "out": arguments.out,
            "model": arguments.model,
            "commit": checkpoint.commit,
            "quantization": scheme.to_value(),
            "quantized": written.quantised,
            "experts": written.experts,
            "loss": written.loss,
        });
        writeln!(out, "{facts}").map_err(|error| Error::Output(Fault::new("standard output", error)))?;
    }
    Ok(())
}
