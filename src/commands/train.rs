//! `engraft train`: from a recipe to an adapter.

use std::path::PathBuf;
use std::sync::Arc;

use tch::Kind;

use super::console::{Console, Unit};
use super::loading;
use crate::adapter::Adapters;
use crate::cli::Train;
use crate::data::{Encoder, Tokenizer};
use crate::export::manifest::{self, FileDigest};
use crate::export::run::{self, Finished};
use crate::objective::Supervised;
use crate::recipe::Recipe;
use crate::train::{
    Datasets, Identity, Interrupts, Progress, Run, RunFolder, Start, Trainer, device_name, recomputed_layers,
};
use crate::{Error, Fault, Result};

/// Runs the verb.
pub fn run(arguments: &Train) -> Result<()> {
    let plan = Recipe::read(&arguments.recipe, &arguments.overrides.set)?.plan()?;
    let silent = arguments.quiet || arguments.json;
    let console = Console::new(silent);
    loading::use_cpu(plan.training.threads);
    let interrupts = Interrupts::listen().map_err(|error| Error::Output(Fault::new("signals", error)))?;
    let start = match (arguments.resume, arguments.overwrite) {
        (true, _) => Start::Resume,
        (_, true) => Start::Overwrite,
        _ => Start::Fresh,
    };
    let folder = RunFolder::open(&plan.output.dir, start)?;

    let checkpoint = loading::checkpoint(&plan.base, &console)?;
    let base_files = hash_in_background(checkpoint.files.clone());
    let tokenizer = Arc::new(Tokenizer::new(&checkpoint.sidecars)?);
    let encoder = Encoder::dated(tokenizer, &plan.dataset, folder.day()?.at(0, 0, 0, 0))?;
    let train = loading::dataset("training", &plan.train, &plan, &encoder, &console)?;
    console.say(train.report());
    let eval = match plan.eval.as_slice() {
        [] => None,
        sources => Some(loading::dataset("eval", sources, &plan, &encoder, &console)?),
    };

    let mut model = loading::decoder(&checkpoint, plan.kind, plan.device, &console)?;
    let adapters = Adapters::attach(&mut model, &plan.adapter, plan.training.seed)?;
    for notice in &adapters.notices {
        console.say(format_args!("note: {notice}"));
    }

    let tokens = u64::from(plan.training.micro_batch_size)
        * train.report().longest.max(if plan.dataset.packing { plan.dataset.max_length.into() } else { 0 });
    let recomputed_layers = recomputed_layers(plan.training.recompute, &model.spec, plan.kind, plan.device, tokens);
    if recomputed_layers > 0 {
        console.say(format_args!("{recomputed_layers} of {} layers are recomputed", model.spec.layers.len()));
    }
    let learner =
        Supervised { model: &model, noise_alpha: plan.training.neftune_noise_alpha.unwrap_or(0.0), recomputed_layers };
    let base_files = base_files.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    let device = device_name(plan.device);
    let run = Run {
        identity: Identity {
            recipe: plan.recipe.canonical_json(),
            data: train.fingerprint(),
            base: base_fingerprint(&base_files, &checkpoint.sidecars["config.json"]),
            device: device.clone(),
        },
        folder,
        training: plan.training.clone(),
        half: plan.kind == Kind::Half,
        tensorboard: plan.output.tensorboard,
        json: arguments.json,
        progress: if silent { Progress::silent() } else { Progress::new() },
        interrupts,
        facts: vec![
            ("recipe".into(), plan.path.display().to_string()),
            ("base".into(), plan.recipe.base_model.clone()),
            ("adapter".into(), format!("{} parameters", adapters.trainable())),
            ("training rows".into(), train.report().rows.to_string()),
            ("device".into(), device.clone()),
        ],
    };
    let source =
        Datasets { train: &train, eval: eval.as_ref(), micro_batch_size: plan.training.micro_batch_size.into() };
    let outcome = Trainer::new(run, &learner).run(&source)?;

    let finished = Finished {
        plan: &plan,
        checkpoint: &checkpoint,
        base_files,
        adapters: &adapters,
        train: &train,
        eval: eval.as_ref(),
        chat_template: encoder.template().map(|template| template.source()),
        metrics: serde_json::to_value(&outcome).expect("numbers, flags and a path have a JSON form"),
        device,
    };
    let stage = console.stage("writing", Unit::Bytes);
    for folder in run::write(&finished, &plan.output.save, &|_, done, total| stage.at(done, total))? {
        console.say(format_args!("wrote {}", folder.display()));
    }
    console.say(format_args!("report: {}", plan.output.dir.join("report.html").display()));
    Ok(())
}

/// Digests of the base's files, made while other things load: resuming refuses another base, whatever differs in it.
fn hash_in_background(files: Vec<PathBuf>) -> std::thread::JoinHandle<Result<Vec<FileDigest>>> {
    std::thread::spawn(move || manifest::digests(&files, &|_, _| ()))
}

fn base_fingerprint(files: &[FileDigest], config: &[u8]) -> String {
    let mut all: Vec<&str> = files.iter().map(|file| file.sha256.as_str()).collect();
    let config = manifest::sha256(config);
    all.push(&config);
    manifest::sha256(all.concat().as_bytes())
}
