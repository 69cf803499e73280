//! `engraft export`: the outputs of a run's last saved state, without training on.

use std::sync::Arc;

use super::console::{Console, Unit};
use super::loading;
use crate::adapter::Adapters;
use crate::cli::Export;
use crate::data::{Encoder, Tokenizer};
use crate::export::manifest;
use crate::export::run::{self, Finished};
use crate::objective::{Learner, Supervised};
use crate::recipe::Recipe;
use crate::train::{RunFolder, Start, States, restore};
use crate::{Error, Fault, Result};

/// Runs the verb.
pub fn run(arguments: &Export) -> Result<()> {
    let plan = Recipe::read(&arguments.recipe, &arguments.overrides.set)?.plan()?;
    let console = Console::new(false);
    loading::use_cpu(plan.training.threads);
    let folder = RunFolder::open(&plan.output.dir, Start::Resume)?;
    let states = States::of(&plan.output.dir);
    let newest = states.newest()?.ok_or_else(|| {
        Error::State(Fault::at(&plan.output.dir, "holds no saved state").hint("train first: engraft train RECIPE"))
    })?;
    let state = newest.state;
    let differences = state.ledger.identity.recipe_differences(&plan.recipe.canonical_json());
    if !differences.is_empty() {
        let what = format!("the state was saved under another recipe:\n  {}", differences.join("\n  "));
        return Err(Error::State(Fault::at(&plan.output.dir, what).hint("export with the recipe it was trained with")));
    }

    let checkpoint = loading::checkpoint(&plan.base, &console)?;
    let tokenizer = Arc::new(Tokenizer::new(&checkpoint.sidecars)?);
    let encoder = Encoder::dated(tokenizer, &plan.dataset, folder.day()?.at(0, 0, 0, 0))?;
    let train = loading::dataset("training", &plan.train, &plan, &encoder, &console)?;
    let eval = match plan.eval.as_slice() {
        [] => None,
        sources => Some(loading::dataset("eval", sources, &plan, &encoder, &console)?),
    };
    let mut model = loading::decoder(&checkpoint, plan.kind, plan.device, &console)?;
    let adapters = Adapters::attach(&mut model, &plan.adapter, plan.training.seed)?;
    let learner = Supervised { model: &model, noise_alpha: 0.0, recomputed_layers: 0 };
    restore(&learner.parameters(), &state.adapter, &states.path(state.ledger.step))?;
    console.say(format_args!("the state of step {}", state.ledger.step));

    let finished = Finished {
        plan: &plan,
        checkpoint: &checkpoint,
        base_files: manifest::digests(&checkpoint.files, &|_, _| ())?,
        adapters: &adapters,
        train: &train,
        eval: eval.as_ref(),
        chat_template: encoder.template().map(|template| template.source()),
        metrics: serde_json::to_value(&state.ledger).expect("numbers, flags and texts have a JSON form"),
        device: state.ledger.identity.device.clone(),
    };
    let save = if arguments.save.is_empty() { &plan.output.save } else { &arguments.save };
    let stage = console.stage("writing", Unit::Bytes);
    for folder in run::write(&finished, save, &|_, done, total| stage.at(done, total))? {
        console.say(format_args!("wrote {}", folder.display()));
    }
    Ok(())
}
