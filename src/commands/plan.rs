//! `engraft plan`: what a recipe will take, before anything is loaded.

use std::io::Write;

use tch::Device;

use super::console::Console;
use super::loading::{self, Base};
use crate::adapter::PlannedAdapters;
use crate::cli;
use crate::quant::Products;
use crate::recipe::Recipe;
use crate::train::speed::{How, Work};
use crate::train::{self, Card, Cut, Page, Planned, RunMemory, Wish};
use crate::{Error, Fault, Result};

/// Runs the verb; the plan goes to `out`.
pub fn run(arguments: &cli::Plan, out: &mut dyn Write) -> Result<()> {
    let asked = arguments.gpu;
    let plan = Recipe::read(&arguments.recipe, &arguments.overrides.set)?.plan()?;
    let device = if asked.is_some() { Device::Cuda(0) } else { plan.device()? };
    loading::use_cpu(plan.training.threads);
    let console = Console::new(arguments.json);
    let Base { checkpoint, adapter, spec } = loading::base(&plan, &console)?;
    let scheme = loading::scheme(&plan, &checkpoint, &spec, device, &console)?;
    loading::announce_plain_attention(&spec, plan.kind, device, &console);
    let adapters = PlannedAdapters::of(&spec, &adapter)?;
    let dataset = loading::cached_dataset(&plan, &checkpoint)?;

    let memory = RunMemory::new(Planned {
        spec: &spec,
        checkpoint: Some(&checkpoint),
        kind: plan.kind,
        device,
        scheme: scheme.as_ref(),
        adapters: &adapters,
        training: &plan.training,
    });
    let card = asked.or_else(|| Card::called(&train::device_name(device)));
    let free = match asked {
        Some(card) => Some(card.memory()),
        None => train::free_bytes(device),
    };
    // Another machine's host is not known.
    let host = if asked.is_some() { None } else { train::free_bytes(Device::Cpu) };
    let run = Cut { training: &plan.training, max_length: plan.dataset.max_length, dataset: dataset.as_ref() };
    let largest = |rows, count| run.largest(rows, count);
    let named = train::sizes(&plan.training);
    let wish = Wish {
        sizes: &named,
        recompute: plan.training.recompute,
        tile: plan.training.tile_feed_forward,
        offload: plan.training.offload,
        host: host.map(train::budget),
        largest: &largest,
        budget: free.map(train::budget),
        overhead: train::overhead(device),
    };
    let choice = train::choose(&memory, &wish);
    let global = choice.micro_batch_size * choice.gradient_accumulation_steps;
    let largest_that_fits = train::choices(&memory, &Wish { sizes: &train::divisors(global), ..wish });
    let largest_that_fits = largest_that_fits.into_iter().rfind(|choice| choice.fits);

    let machine = match (device, card) {
        (Device::Cpu, _) => Some(train::measured(&spec, plan.kind)),
        (_, card) => card.map(|card| card.machine()),
    };
    let lengths = run.lengths(&spec);
    let schedule = run.schedule(&choice);
    let quantised = scheme.as_ref().is_some_and(|scheme| scheme.products == Products::Dequantised);
    let how = How {
        recomputed: choice.thrift.recomputed_layers as f64 / memory.layers().max(1) as f64,
        tiled: choice.thrift.feed_forward_tile.is_some(),
        quantised,
        element: plan.kind.elt_size_in_bytes() as u64,
    };
    let prediction = machine
        .as_ref()
        .map(|machine| Work::of(&spec, &adapters).predict(machine, &lengths, &schedule, &choice.memory, how));

    let planned = Page {
        recipe: &plan.path,
        layers: memory.layers(),
        free,
        choice,
        largest_that_fits,
        global,
        from_cache: dataset.is_some(),
        lengths,
        machine,
        deterministic: plan.training.deterministic.then_some(device == Device::Cpu),
        prediction,
    };
    let text = if arguments.json { format!("{}\n", planned.facts()) } else { planned.text() };
    out.write_all(text.as_bytes()).map_err(|error| Error::Output(Fault::new("standard output", error)))
}
