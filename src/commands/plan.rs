//! `engraft plan`: what a recipe will take, before anything is loaded.

use std::fmt::Write as _;
use std::io::Write;

use serde_json::{Value, json};
use tch::Device;

use super::console::Console;
use super::loading::{self, Base};
use crate::adapter::PlannedAdapters;
use crate::cli;
use crate::data::{Dataset, MicroBatchSize};
use crate::model::ModelSpec;
use crate::quant::Products;
use crate::recipe::{Plan, Recipe};
use crate::train::speed::{self, Lengths, Machine, Prediction, Schedule, Work};
use crate::train::{self, Card, Choice, MemoryPlan, Planned, RunMemory, Wish};
use crate::{Error, Fault, Result};

/// Runs the verb; the plan goes to `out`.
pub fn run(arguments: &cli::Plan, out: &mut dyn Write) -> Result<()> {
    let asked = arguments.gpu.as_deref().map(Card::find).transpose()?;
    let plan = Recipe::read(&arguments.recipe, &arguments.overrides.set)?.plan()?;
    let device = if asked.is_some() { Device::Cuda(0) } else { plan.device()? };
    loading::use_cpu(plan.training.threads);
    let console = Console::new(arguments.json);
    let Base { checkpoint, adapter, spec } = loading::base(&plan, &console)?;
    let scheme = loading::scheme(&plan, &checkpoint, &spec, device, &console)?;
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
    let run = Cut { plan: &plan, dataset: dataset.as_ref() };
    let largest = |rows, count| run.largest(rows, count);
    let named = train::sizes(&plan.training);
    let wish = Wish {
        sizes: &named,
        recompute: plan.training.recompute,
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
    let recomputed = choice.recomputed_layers as f64 / memory.layers().max(1) as f64;
    let how = (recomputed, quantised, plan.kind.elt_size_in_bytes() as u64);
    let prediction = machine
        .as_ref()
        .map(|machine| Work::of(&spec, &adapters).predict(machine, &lengths, &schedule, &choice.memory, how));

    let planned = Page {
        plan: &plan,
        layers: memory.layers(),
        free,
        choice,
        largest_that_fits,
        global,
        from_cache: dataset.is_some(),
        lengths,
        machine,
        prediction,
    };
    let text = if arguments.json { format!("{}\n", planned.facts()) } else { planned.text() };
    out.write_all(text.as_bytes()).map_err(|error| Error::Output(Fault::new("standard output", error)))
}

/// How the data is cut, known from the token cache, or from `max_length` alone.
struct Cut<'a> {
    plan: &'a Plan,
    dataset: Option<&'a Dataset>,
}

impl Cut<'_> {
    fn largest(&self, rows: u32, count: u32) -> MicroBatchSize {
        let training = &self.plan.training;
        match self.dataset {
            Some(dataset) => {
                let of_a_pass = dataset.micro_batches_in_epoch(0, rows.into()) as f64;
                let all =
                    training.max_steps.map_or((training.epochs * of_a_pass).ceil() as u64, |s| s * u64::from(count));
                dataset.largest_micro_batch(rows.into(), all)
            }
            None => {
                let tokens = u64::from(rows) * u64::from(self.plan.dataset.max_length);
                MicroBatchSize { tokens, trained: tokens }
            }
        }
    }

    fn lengths(&self, spec: &ModelSpec) -> Lengths {
        let none = Lengths { documents: 0.0, tokens: 0.0, trained: 0.0, attention: 0.0 };
        let Some(dataset) = self.dataset else {
            let length = self.plan.dataset.max_length.into();
            let attention = speed::attention_of(spec, length);
            return Lengths { documents: 1.0, tokens: length as f64, trained: length as f64, attention };
        };
        dataset.lengths().fold(none, |sum, (tokens, trained, weight)| Lengths {
            documents: sum.documents + weight,
            tokens: sum.tokens + weight * tokens as f64,
            trained: sum.trained + weight * trained as f64,
            attention: sum.attention + weight * speed::attention_of(spec, tokens),
        })
    }

    /// Without the data's lengths a pass is taken to be one row.
    fn schedule(&self, choice: &Choice) -> Schedule {
        let (rows, accumulated) = (choice.micro_batch_size, f64::from(choice.gradient_accumulation_steps));
        let training = &self.plan.training;
        let micro_batches = match self.dataset {
            Some(dataset) => dataset.micro_batches_in_epoch(0, rows.into()) as f64,
            None => 1.0 / f64::from(rows),
        };
        let of_passes = || match self.dataset {
            Some(_) => (training.epochs * (micro_batches / accumulated).ceil()).ceil(),
            None => 0.0,
        };
        let steps = training.max_steps.map_or_else(of_passes, |steps| steps as f64);
        Schedule { micro_batches, accumulated, steps, largest: choice.largest_tokens as f64 }
    }
}

/// What is said.
struct Page<'a> {
    plan: &'a Plan,
    layers: usize,
    free: Option<u64>,
    choice: Choice,
    largest_that_fits: Option<Choice>,
    global: u32,
    from_cache: bool,
    lengths: Lengths,
    machine: Option<Machine>,
    prediction: Option<Prediction>,
}

impl Page<'_> {
    fn facts(&self) -> Value {
        let layer = |index: usize| if index < self.choice.recomputed_layers { "recompute" } else { "save" };
        json!({
            "recipe": self.plan.path,
            "machine": self.machine,
            "free_bytes": self.free,
            "memory": self.choice,
            "layers": (0..self.layers).map(layer).collect::<Vec<_>>(),
            "global_batch_size": self.global,
            "largest_micro_batch": self.largest_that_fits,
            "lengths": self.lengths,
            "lengths_from": if self.from_cache { "token cache" } else { "dataset.max_length" },
            "speed": self.prediction,
        })
    }

    fn text(&self) -> String {
        let gigabytes = |bytes: u64| format!("{:8.2} GB", bytes as f64 / 1e9);
        let Choice { micro_batch_size: rows, gradient_accumulation_steps: count, recomputed_layers, memory, .. } =
            self.choice;
        let MemoryPlan {
            weights,
            adapters,
            gradients,
            optimizer,
            activations,
            logits,
            working,
            loading,
            libtorch,
            saving,
            peak,
            ..
        } = memory;
        let mut text = String::new();
        let mut line = |what: &str, said: String| {
            let _ = writeln!(text, "{what:<13}{said}");
        };
        if let Some(machine) = &self.machine {
            line("machine", format!("{}; {}", machine.name, machine.figures));
        }
        let Lengths { documents, tokens, trained, .. } = self.lengths;
        line(
            "data",
            match self.from_cache {
                true => format!(
                    "{documents:.0} documents of {:.0} tokens on average, {:.0} % of them trained (from the token cache)",
                    tokens / documents.max(1.0),
                    100.0 * trained / tokens.max(1.0)
                ),
                false => {
                    format!("every row taken to be {tokens:.0} trained tokens (dataset.max_length: not tokenised yet)")
                }
            },
        );
        for (what, bytes) in [
            ("base", weights),
            ("adapters", adapters),
            ("gradients", gradients),
            ("optimizer", optimizer),
            ("activations", activations),
            ("logits", logits),
            ("at work", working),
            ("libtorch", libtorch),
            ("saving", saving),
            ("loading", loading),
        ] {
            line(what, gigabytes(bytes));
        }
        let fits = match (self.free, self.choice.fits) {
            (None, _) => String::new(),
            (Some(free), fits) => {
                let verdict = match (fits, peak <= free) {
                    (true, _) => "it fits",
                    (false, true) => "it may just fit",
                    (false, false) => "IT DOES NOT FIT",
                };
                format!(" at once, of {}: {verdict}", gigabytes(free).trim_start())
            }
        };
        line("peak", gigabytes(peak) + &fits);
        line(
            "layers",
            match recomputed_layers {
                0 => format!("all {} keep their activations", self.layers),
                some if some == self.layers => format!("all {some} are recomputed"),
                some => format!("1 to {some} are recomputed, {} to {} keep their activations", some + 1, self.layers),
            },
        );
        let tokens = self.choice.largest_tokens;
        line("micro-batch", format!("{rows} rows, {tokens} tokens at most; {count} to a step of {} rows", self.global));
        line(
            "",
            match &self.largest_that_fits {
                Some(largest) => format!(
                    "the largest that fits: {} rows, {} of {} layers recomputed, {}",
                    largest.micro_batch_size,
                    largest.recomputed_layers,
                    self.layers,
                    gigabytes(largest.memory.peak).trim_start()
                ),
                None => "none fits".into(),
            },
        );
        if let Some(prediction) = &self.prediction {
            let Prediction {
                tokens_per_second, trained_tokens_per_second, seconds_per_step, total_seconds, steps, ..
            } = *prediction;
            line(
                "speed",
                format!(
                    "{tokens_per_second:.0} tokens/s ({trained_tokens_per_second:.0} trained), {seconds_per_step:.2} s a step, {:.0} % of \
                     the matrix products' rate",
                    100.0 * prediction.utilisation
                ),
            );
            line(
                "time",
                match steps {
                    0 => "not known before the data is tokenised (training.max_steps would tell)".into(),
                    steps => format!("{} for {steps} steps", duration(total_seconds)),
                },
            );
        }
        text
    }
}

fn duration(seconds: f64) -> String {
    match seconds {
        ..90.0 => format!("{seconds:.0} s"),
        ..5400.0 => format!("{:.0} min", seconds / 60.0),
        _ => format!("{:.1} h", seconds / 3600.0),
    }
}
