//! `engraft train`: from a recipe to an adapter.

use tch::{Device, Kind};

use super::console::{Console, Unit};
use super::loading::{self, Base, Writing};
use super::probing::Begun;
use crate::adapter::numbers::Here;
use crate::adapter::{Adapters, Origin, PlannedAdapters, TrainedOn};
use crate::cli::Train;
use crate::data::{Dataset, Encoder};
use crate::export::manifest;
use crate::export::run::{self, Finished};
use crate::export::signature::{self, Key};
use crate::objective::Supervised;
use crate::recipe::{DataSource, MicroBatch, Offload, Recipe, TileFeedForward, Tiling, TrainingRecipe};
use crate::torch_ext::{cpu_memory, set_deterministic};
use crate::train::{
    self, Choice, Chosen, Cut, Datasets, Event, Events, Identity, Interrupts, Planned, Progress, Run, RunFolder,
    RunMemory, Start, Trainer, Wish, device_name, memory_bytes, peak_memory_bytes,
};
use crate::{Error, Fault, Result};

/// Runs the verb.
pub fn run(arguments: &Train) -> Result<()> {
    let events = Events::new(arguments.json);
    train(arguments, events).inspect_err(|error| events.error(error))
}

fn train(arguments: &Train, events: Events) -> Result<()> {
    let plan = Recipe::read(&arguments.recipe, &arguments.overrides.set)?.plan()?;
    let device = plan.device()?;
    // A key that is none is found out before the training, not after it.
    let key = arguments.sign.as_deref().map(Key::read).transpose()?;
    let silent = arguments.quiet || arguments.json;
    let console = Console::new(silent);
    loading::use_cpu(plan.training.threads);
    if plan.training.deterministic && device != Device::Cpu {
        set_deterministic(true);
    }
    let start = match (arguments.resume, arguments.overwrite) {
        (true, _) => Start::Resume,
        (_, true) => Start::Overwrite,
        _ => Start::Fresh,
    };
    let mut folder = RunFolder::open(&plan.output.dir, start)?;

    let Base { checkpoint, adapter, spec } = loading::base(&plan, &console)?;
    let base_files = loading::hash_in_background(checkpoint.files.clone());
    let tokenizer = loading::tokenizer(&checkpoint)?;
    let encoder = Encoder::dated(tokenizer, &plan.dataset, folder.day.at(0, 0, 0, 0))?;
    let open = |set: &str, sources: &[DataSource]| -> Result<Dataset> {
        let dataset = loading::dataset(set, sources, &plan, &checkpoint, &encoder, &console)?;
        console.say(format_args!("{set} set:\n{}", dataset.report()));
        events.dataset(set, dataset.report());
        Ok(dataset)
    };
    let mut train = open("training", &plan.train)?;
    let mut eval = (!plan.eval.is_empty()).then(|| open("eval", &plan.eval)).transpose()?;
    if device != Device::Cpu {
        let pinned = [Some(&mut train), eval.as_mut()].into_iter().flatten().try_for_each(Dataset::pin_batches);
        if let Err(error) = pinned {
            console.say(format_args!(
                "note: micro-batches are copied while the host waits, as no memory can be pinned: {error}"
            ));
        }
    }

    let scheme = loading::scheme(&plan, &checkpoint, &spec, device, &console)?;
    if let Some(continued) = &plan.adapter.adapter_name_or_path {
        loading::same_numbers(
            continued,
            &plan,
            scheme.as_ref(),
            Here { checkpoint: &checkpoint, spec: &spec },
            &console,
        )?;
    }
    let (longest, made_for) = (train.report().longest, spec.max_position_embeddings as u64);
    if longest > made_for {
        console.say(format_args!("note: the longest document has {longest} tokens; the base was made for {made_for}"));
    }
    loading::announce_plain_attention(&spec, plan.kind, device, &console);
    let planned_adapters = PlannedAdapters::of(&spec, &adapter)?;
    let memory = RunMemory::new(Planned {
        spec: &spec,
        checkpoint: Some(&checkpoint),
        kind: plan.kind,
        device,
        scheme: scheme.as_ref(),
        adapters: &planned_adapters,
        training: &plan.training,
    });
    let cut = Cut { training: &plan.training, max_length: plan.dataset.max_length, dataset: Some(&train) };
    let largest = |rows, count| cut.largest(rows, count);
    let (free, free_on_host) = (train::free_bytes(device), train::free_bytes(Device::Cpu));
    let begun_with = folder.chosen()?;
    let sizes = match begun_with {
        Some(Chosen { micro_batch_size, gradient_accumulation_steps, .. }) => {
            vec![(micro_batch_size, gradient_accumulation_steps)]
        }
        None => train::sizes(&plan.training),
    };
    // Another tile would round otherwise.
    let tile = match begun_with.map(|chosen| chosen.feed_forward_tile) {
        Some(Some(tile)) => TileFeedForward::Tokens(u32::try_from(tile).unwrap_or(u32::MAX)),
        Some(None) => TileFeedForward::Left(Tiling::Off),
        None => plan.training.tile_feed_forward,
    };
    let choice = train::choose(
        &memory,
        &Wish {
            sizes: &sizes,
            recompute: plan.training.recompute,
            tile,
            offload: plan.training.offload,
            host: free_on_host.map(train::budget),
            largest: &largest,
            budget: free.map(train::budget),
            overhead: train::overhead(device),
        },
    );
    let Choice { micro_batch_size: rows, gradient_accumulation_steps: count, thrift, .. } = choice;
    if plan.training.micro_batch_size.rows().is_none() {
        let why = if begun_with.is_some() { ", as the run began" } else { "" };
        console.say(format_args!("micro-batches of {rows} rows, {count} to a step{why}"));
    }
    if thrift.recomputed_layers > 0 {
        console.say(format_args!("{} of {} layers are recomputed", thrift.recomputed_layers, memory.layers()));
    }
    if thrift.offload {
        console.say("inputs of recomputed layers wait in the host's memory");
    } else if plan.training.offload == Offload::On && device == Device::Cpu {
        console.say("note: training.offload: on the CPU there is no other memory to spare: nothing is copied away");
    }
    if let Some(tile) = thrift.feed_forward_tile {
        console.say(format_args!("{tile} tokens at a time go through the feed-forwards"));
    }
    console.say(choice.memory);
    events.tell(&Event::MemoryPlan(&choice));
    let advice = train::advice(&memory, &choice, &largest);
    if let Some(free) = free.filter(|_| !arguments.ignore_memory_plan) {
        train::refuse_what_does_not_fit(&choice.memory, free, free_on_host, &advice)?;
    }
    let training = TrainingRecipe {
        micro_batch_size: MicroBatch::Rows(rows),
        gradient_accumulation_steps: count,
        ..plan.training.clone()
    };
    let before = memory_bytes(device);
    let mut model = loading::decoder(&checkpoint, spec.clone(), plan.kind, device, scheme.as_ref(), &console)?;
    if let Some(coefficient) = plan.training.router_aux_loss_coef
        && !model.balance_experts(coefficient)
    {
        let fault =
            Fault::new("training.router_aux_loss_coef", format!("is {coefficient}, but the base has no experts"));
        return Err(Error::Recipe(vec![fault.hint("remove this key")]));
    }
    let exports = plan.output.exports();
    let begun = match exports.is_empty() {
        true => None,
        false => Some(Begun::ask(&model, eval.as_ref().unwrap_or(&train), &encoder, &plan, &console)?),
    };
    let adapters = {
        let stage = console.stage("starting the adapters", Unit::Things("modules"));
        let start = folder.adapter_start()?;
        let origin = Origin {
            checkpoint: &checkpoint,
            scheme: scheme.as_ref(),
            start,
            progress: &|done, all| stage.at(done, all),
        };
        Adapters::attach(&mut model, &adapter, plan.training.seed, Some(&origin))?
    };
    if let Some(continued) = &plan.adapter.adapter_name_or_path {
        loading::say_what_differs(continued, &model, &console)?;
    }
    folder.keep_adapter_start(adapters.start())?;
    // What a server cannot load is better known now than after the training.
    run::prove(&checkpoint, &adapters, &exports)?;
    for notice in &adapters.notices {
        console.say(format_args!("note: {notice}"));
    }

    let learner = Supervised { model: &model, noise_alpha: plan.training.neftune_noise_alpha.unwrap_or(0.0), thrift };
    let base_files = loading::joined(base_files)?;
    let device_name = device_name(device);
    let run = Run {
        identity: Identity {
            recipe: plan.recipe.canonical_json(),
            data: train.fingerprint(),
            eval: eval.as_ref().map(Dataset::fingerprint),
            base: manifest::base_fingerprint(&base_files, &checkpoint),
            device: device_name.clone(),
        },
        folder,
        training,
        half: plan.kind == Kind::Half,
        tensorboard: plan.output.tensorboard,
        events,
        progress: if silent { Progress::silent() } else { Progress::new() },
        // From here on there is a state to save: until now a signal ends the process as usual.
        interrupts: Interrupts::listen().map_err(|error| Error::Output(Fault::new("signals", error)))?,
        facts: vec![
            ("recipe".into(), plan.path.display().to_string()),
            ("base".into(), plan.recipe.base_model.clone()),
            ("adapter".into(), format!("{} parameters", adapters.trainable())),
            ("device".into(), device_name.clone()),
            ("training set".into(), train.report().to_string()),
            ("eval set".into(), eval.as_ref().map_or("none".into(), |eval| eval.report().to_string())),
        ],
        chosen: Some(Chosen {
            micro_batch_size: rows,
            gradient_accumulation_steps: count,
            feed_forward_tile: thrift.feed_forward_tile,
        }),
        advice,
    };
    let source = Datasets { train: &train, eval: eval.as_ref(), micro_batch_size: rows.into() };
    let outcome = Trainer::new(run, &learner).run(&source)?;

    if let (Some(before), Some(peak)) = (before, peak_memory_bytes(device)) {
        let (planned_bytes, measured_bytes) = (choice.memory.peak, peak.saturating_sub(before));
        let [planned, measured] = [planned_bytes, measured_bytes].map(|bytes| bytes as f64 / 1e9);
        console.say(format_args!("memory: {measured:.2} GB at most, {planned:.2} were planned"));
        let tensors = (device == Device::Cpu).then(cpu_memory);
        events.tell(&Event::Memory {
            planned_bytes,
            measured_bytes,
            tensor_bytes: tensors.map(|tensors| tensors.peak),
            tensor_bytes_with_holes: tensors.map(|tensors| tensors.used),
        });
    }

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
        outcome,
        device: device_name,
    };
    let writing = Writing::new(&console);
    let written =
        run::write(&finished, &plan.output.save, &exports, &|name, done, total| writing.at(name, done, total))?;
    drop(writing);
    loading::say_written(&console, &written);
    for path in &written.folders {
        events.tell(&Event::Wrote { path });
    }
    if let Some(key) = &key {
        let path = signature::sign(&plan.output.dir, key)?;
        console.say(format_args!("wrote {}", path.display()));
        events.tell(&Event::Wrote { path: &path });
    }
    console.say(format_args!("report: {}", plan.output.dir.join("report.html").display()));
    Ok(())
}
