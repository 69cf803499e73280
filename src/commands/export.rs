//! `engraft export`: the outputs of a run from its saved states, without training on: of the last one, or of the best one where
//! the recipe says so.

use tch::Device;

use super::console::{Console, Unit};
use super::loading::{self, Base};
use crate::Result;
use crate::adapter::{Adapters, Origin};
use crate::cli::Export;
use crate::data::{Dataset, Encoder};
use crate::export::manifest;
use crate::export::run::{self, Finished};
use crate::model::Thrift;
use crate::objective::{Learner, Supervised};
use crate::recipe::Recipe;
use crate::train::{Identity, Outcome, RunFolder, States, restore};

/// Runs the verb.
pub fn run(arguments: &Export) -> Result<()> {
    let plan = Recipe::read(&arguments.recipe, &arguments.overrides.set)?.plan()?;
    let console = Console::new(false);
    loading::use_cpu(plan.training.threads);
    let (folder, ledger) = RunFolder::existing(&plan.output.dir)?;
    let states = States::of(&plan.output.dir);

    let Base { checkpoint, adapter, spec } = loading::base(&plan, &console)?;
    let base_files = manifest::digests(&checkpoint.files, &|_, _| ())?;
    let tokenizer = loading::tokenizer(&checkpoint)?;
    let encoder = Encoder::dated(tokenizer, &plan.dataset, folder.day.at(0, 0, 0, 0))?;
    let train = loading::dataset("training", &plan.train, &plan, &checkpoint, &encoder, &console)?;
    let eval = match plan.eval.as_slice() {
        [] => None,
        sources => Some(loading::dataset("eval", sources, &plan, &checkpoint, &encoder, &console)?),
    };
    let identity = Identity {
        recipe: plan.recipe.canonical_json(),
        data: train.fingerprint(),
        eval: eval.as_ref().map(Dataset::fingerprint),
        base: manifest::base_fingerprint(&base_files, &checkpoint),
        device: ledger.identity.device.clone(),
    };
    identity.check(&ledger.identity, &states.path(ledger.step))?;

    let scheme = loading::scheme(&plan, &checkpoint, &spec, Device::Cpu, &console)?;
    let mut model = loading::decoder(&checkpoint, spec, plan.kind, Device::Cpu, scheme.as_ref(), &console)?;
    let start = folder.adapter_start()?;
    let origin = Origin { checkpoint: &checkpoint, scheme: scheme.as_ref(), start, progress: &|_, _| () };
    let adapters = Adapters::attach(&mut model, &adapter, plan.training.seed, Some(&origin))?;
    let learner = Supervised { model: &model, noise_alpha: 0.0, thrift: Thrift::default() };
    let taken = ledger.taken(plan.training.load_best_model_at_end);
    restore(&learner.parameters(), &states.load(taken)?.adapter, &states.path(taken))?;
    console.say(format_args!("the state of step {taken}, of {} steps done", ledger.step));

    let finished = Finished {
        plan: &plan,
        checkpoint: &checkpoint,
        scheme: scheme.as_ref(),
        base_files,
        adapters: &adapters,
        train: &train,
        eval: eval.as_ref(),
        chat_template: encoder.template().map(|template| template.source()),
        outcome: Outcome::of(&ledger, taken, &states),
        device: identity.device,
    };
    let save = if arguments.save.is_empty() { &plan.output.save } else { &arguments.save };
    let stage = console.stage("writing", Unit::Bytes);
    for folder in run::write(&finished, save, &|_, done, total| stage.at(done, total))? {
        console.say(format_args!("wrote {}", folder.display()));
    }
    Ok(())
}
