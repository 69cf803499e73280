//! The outputs of a run from its saved states, without training on: of the last one, or of the best one where the recipe says so.

use std::path::Path;

use tch::Device;

use super::super::console::Console;
use super::super::loading::{self, Base, Writing};
use super::super::probing::Begun;
use crate::Result;
use crate::adapter::{Adapters, Origin, TrainedOn};
use crate::cli::Export;
use crate::data::{Dataset, Encoder};
use crate::export::manifest;
use crate::export::run::{self, Finished};
use crate::export::signature::{self, Key};
use crate::model::Thrift;
use crate::objective::{Learner, Supervised};
use crate::recipe::Recipe;
use crate::train::{Identity, Outcome, RunFolder, States, restore};

/// Writes what the recipe or `--save` says.
pub(super) fn run(arguments: &Export, key: Option<&Key>) -> Result<()> {
    let plan = Recipe::read(Path::new(&arguments.source), &arguments.overrides.set)?.plan()?;
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
    let exports = if arguments.save.is_empty() { plan.output.exports() } else { Vec::new() };
    let begun = match exports.is_empty() {
        true => None,
        false => Some(Begun::ask(&model, eval.as_ref().unwrap_or(&train), &encoder, &plan, &console)?),
    };
    let start = folder.adapter_start()?;
    let origin = Origin { checkpoint: &checkpoint, scheme: scheme.as_ref(), start, progress: &|_, _| () };
    let adapters = Adapters::attach(&mut model, &adapter, plan.training.seed, Some(&origin))?;
    run::prove(&checkpoint, &adapters, &exports)?;
    let learner = Supervised { model: &model, noise_alpha: 0.0, thrift: Thrift::default() };
    let taken = ledger.taken(plan.training.load_best_model_at_end);
    restore(&learner.parameters(), &states.load(taken)?.adapter, &states.path(taken))?;
    console.say(format_args!("the state of step {taken}, of {} steps done", ledger.step));

    let trained_on = scheme.as_ref().map(|scheme| TrainedOn::of(&checkpoint, scheme, &model.digests));
    let finished = Finished {
        plan: &plan,
        checkpoint: &checkpoint,
        trained_on: trained_on.as_ref(),
        base_files,
        adapters: &adapters,
        train: &train,
        eval: eval.as_ref(),
        encoder: &encoder,
        answers: begun.map(|begun| begun.ended(&model, &encoder, &console)).transpose()?,
        outcome: Outcome::of(&ledger, taken, &states),
        device: identity.device,
    };
    let save = if arguments.save.is_empty() { &plan.output.save } else { &arguments.save };
    let writing = Writing::new(&console);
    let written = run::write(&finished, save, &exports, &|name, done, total| writing.at(name, done, total))?;
    drop(writing);
    loading::say_written(&console, &written);
    if let Some(key) = key {
        let path = signature::sign(&plan.output.dir, key)?;
        console.say(format_args!("wrote {}", path.display()));
    }
    Ok(())
}
