//! `engraft quantize`: a base in four or eight bits.

use std::path::Path;

use super::console::{Console, Unit};
use super::loading;
use crate::cli::Quantize;
use crate::export::quantised;
use crate::quant::Scheme;
use crate::recipe::BaseSource;
use crate::{Error, Fault, Result};

/// Runs the verb: tensor by tensor from the base's files.
pub fn run(arguments: &Quantize) -> Result<()> {
    loading::use_cpu(None);
    let console = Console::new(false);
    loading::refuse_filled(&arguments.out, arguments.overwrite, "quantising")?;
    let base = |fault: Fault| Error::Model(Fault { place: "--model".into(), ..fault });
    let source = BaseSource::find(&arguments.model, arguments.revision.as_deref(), Path::new("")).map_err(base)?;
    let checkpoint = loading::checkpoint(&source, &console)?;
    let form = arguments.form.with(arguments.block_size.into(), !arguments.no_double_quant);
    if checkpoint.quantised_form().is_some_and(|stored| stored == form || !stored.may_become(form)) {
        return Err(base(Fault::new("", "is quantised already").hint("name the model it was made of")));
    }
    let scheme =
        Scheme { form, kind: arguments.dtype.kind(), skip: arguments.skip.clone(), whole: false, after_start: false };
    let stage = console.stage("quantising", Unit::Things("numbers"));
    let written = quantised::write(&arguments.out, &checkpoint, &scheme, &|done, total| stage.at(done, total))?;
    drop(stage);
    if written.experts > 0 {
        console.say(format_args!(
            "note: linears of experts ({}) are written as they are: bitsandbytes quantises linears only",
            written.experts
        ));
    }
    console.say(format_args!("wrote {}: {} weights in {}", arguments.out.display(), written.quantised, arguments.form));
    Ok(())
}
