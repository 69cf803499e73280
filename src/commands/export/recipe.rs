//! The outputs of a run from its saved states, without training on: of the last one, or of the best one where the recipe says so.

use std::path::Path;

use tch::Device;

use super::super::console::{Console, Unit};
use super::super::loading::{self, Base};
use crate::Result;
use crate::adapter::{Adapters, Origin, TrainedOn};
use crate::cli::Export;
use crate::data::{Dataset, Encoder};
use crate::export::manifest;
use crate::export::run::{self, Finished};
use crate::model::Thrift;
use crate::objective::{Learner, Supervised};
use crate::recipe::Recipe;
use crate::train::{Identity, Outcome, RunFolder, States, restore};

/// Writes what the recipe or `--save` says.
pub(super) fn run(arguments: &Export) -> Result<()> {
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
    let start = folder.adapter_start()?;
    let origin = Origin { checkpoint: &checkpoint, scheme: scheme.as_ref(), start, progress: &|_, _| () };
    let adapters = Adapters::attach(&mut model, &adapter, plan.training.seed, Some(&origin))?;
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
        chat_template: encoder.template().map(|template| template.source()),
        outcome: Outcome::of(&ledger, taken, &states),
        device: identity.device,
    };
    let exports = plan.output.exports();
    let (save, exports) = match arguments.save.as_slice() {
        [] => (plan.output.save.as_slice(), exports.as_slice()),
        save => (save, [].as_slice()),
    };
    let stage = console.stage("writing", Unit::Bytes);
    let written = run::write(&finished, save, exports, &|_, done, total| stage.at(done, total))?;
    loading::say_written(&console, &written);
    Ok(())
}
