//! What a recipe leaves to the plan: how many rows a micro-batch has, and which blocks run again in backward.

use serde::Serialize;
use tch::Device;

use super::{MemoryPlan, RunMemory, Step};
use crate::data::MicroBatchSize;
use crate::recipe::{Recompute, TrainingRecipe};
use crate::{Error, Fault, Result};

/// What a recomputed block costs of its time in a step: forward once more, of forward, and backward of twice that.
const AGAIN: f64 = 1.0 / 3.0;

/// What there is to choose from.
pub struct Wish<'a> {
    /// Rows of a micro-batch with the number of micro-batches that make up a step.
    pub sizes: &'a [(u32, u32)],
    /// What the recipe says of recomputing.
    pub recompute: Recompute,
    /// The largest micro-batch of so many rows, where so many make up a step.
    pub largest: &'a dyn Fn(u32, u32) -> MicroBatchSize,
    /// Bytes that the plan may take; without it, everything fits.
    pub budget: Option<u64>,
    /// Tokens whose work takes as long as what every micro-batch costs whatever its size, reading the weights above all.
    pub overhead: f64,
}

/// What was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Choice {
    /// Rows of a micro-batch.
    pub micro_batch_size: u32,
    /// Micro-batches of a step.
    pub gradient_accumulation_steps: u32,
    /// Blocks that run again in backward: the first ones.
    pub recomputed_layers: usize,
    /// Tokens of the largest micro-batch.
    pub largest_tokens: u64,
    /// What a step takes.
    #[serde(flatten)]
    pub memory: MemoryPlan,
    /// Whether that is within the budget.
    pub fits: bool,
}

/// The choice that takes the least time of those that fit; where none does, the one that takes the least memory.
///
/// Every size has as few recomputed blocks as it needs to fit.
pub fn choose(run: &RunMemory<'_>, wish: &Wish<'_>) -> Choice {
    let all = choices(run, wish);
    let layers = run.layers();
    let time = |choice: &Choice| {
        let again = AGAIN * choice.recomputed_layers as f64 / layers.max(1) as f64;
        f64::from(choice.gradient_accumulation_steps) * (choice.largest_tokens as f64 + wish.overhead) * (1.0 + again)
    };
    let best = all.iter().filter(|choice| choice.fits).min_by(|a, b| time(a).total_cmp(&time(b)));
    let least = || all.iter().min_by_key(|choice| choice.memory.peak);
    *best.or_else(least).expect("a recipe names a size, or a number of rows that has divisors")
}

/// Every size, with as few recomputed blocks as it needs to fit.
pub fn choices(run: &RunMemory<'_>, wish: &Wish<'_>) -> Vec<Choice> {
    let layers = run.layers();
    let of_size = |&(rows, count): &(u32, u32)| {
        let largest = (wish.largest)(rows, count);
        let plan = |recomputed_layers| run.plan(Step { largest, accumulates: count > 1, recomputed_layers });
        let fits = |recomputed| wish.budget.is_none_or(|budget| plan(recomputed).peak <= budget);
        let recomputed_layers = match wish.recompute {
            Recompute::None => 0,
            Recompute::Full => layers,
            Recompute::Auto => fewest(layers, fits),
        };
        Choice {
            micro_batch_size: rows,
            gradient_accumulation_steps: count,
            recomputed_layers,
            largest_tokens: largest.tokens,
            memory: plan(recomputed_layers),
            fits: fits(recomputed_layers),
        }
    };
    wish.sizes.iter().map(of_size).collect()
}

/// The fewest recomputed blocks with which all fits; all of them where nothing does. More never take more.
fn fewest(layers: usize, fits: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, layers);
    while low < high {
        let middle = (low + high) / 2;
        if fits(middle) { high = middle } else { low = middle + 1 }
    }
    low
}

/// The rows that a micro-batch may have, each with how many make up a step: what the recipe says, or every divisor of its global batch.
pub fn sizes(training: &TrainingRecipe) -> Vec<(u32, u32)> {
    match training.micro_batch_size.rows() {
        Some(rows) => vec![(rows, training.gradient_accumulation_steps)],
        // A recipe that leaves the size to the plan says it: the rules see to that.
        None => divisors(training.global_batch_size.unwrap_or(1)),
    }
}

/// The rows that a micro-batch may have where `global` make up a step, each with how many do.
pub fn divisors(global: u32) -> Vec<(u32, u32)> {
    (1..=global).filter(|rows| global.is_multiple_of(*rows)).map(|rows| (rows, global / rows)).collect()
}

/// [`Wish::overhead`] of a device: a GPU computes with a weight as long as it reads it at some two hundred tokens.
pub fn overhead(device: Device) -> f64 {
    if device == Device::Cpu { 32.0 } else { 200.0 }
}

/// What would take less than `choice`, and how much.
pub fn advice(run: &RunMemory<'_>, choice: &Choice, largest: &dyn Fn(u32, u32) -> MicroBatchSize) -> String {
    let Choice { micro_batch_size: rows, gradient_accumulation_steps: count, recomputed_layers, .. } = *choice;
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    let peak = |rows, count, recomputed_layers| {
        let step = Step { largest: largest(rows, count), accumulates: count > 1, recomputed_layers };
        gigabytes(run.plan(step).peak)
    };
    let mut ways = Vec::new();
    if recomputed_layers < run.layers() {
        ways.push(format!("training.recompute: full would take {:.2} GB", peak(rows, count, run.layers())));
    }
    if rows > 1 {
        let (fewer, more) = (rows.div_ceil(2), count * 2);
        let layers = run.layers();
        ways.push(format!(
            "training.micro_batch_size: {fewer} with gradient_accumulation_steps: {more} {:.2} GB, recomputed {:.2} GB",
            peak(fewer, more, recomputed_layers),
            peak(fewer, more, layers)
        ));
    }
    ways.push("a lower dataset.max_length or adapter.r, `method: qlora` or a smaller base take less, too".into());
    format!("{:.2} GB are planned; {}", gigabytes(choice.memory.peak), ways.join("; "))
}

/// Refuses a run that takes more than is `free`.
///
/// # Errors
/// [`Error::Device`] with both numbers and `advice`.
pub fn refuse_what_does_not_fit(memory: &MemoryPlan, free: u64, advice: &str) -> Result<()> {
    if memory.peak <= free {
        return Ok(());
    }
    let [peak, free] = [memory.peak, free].map(|bytes| bytes as f64 / 1e9);
    let what = format!("the run would take {peak:.2} GB at most, {free:.2} GB are free");
    Err(Error::Device(
        Fault::new("memory", what).hint(format!("{advice}; --ignore-memory-plan starts it all the same")),
    ))
}
