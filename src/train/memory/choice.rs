//! What a recipe leaves to the plan: how many rows a micro-batch has, and what blocks do to take less memory.

use serde::Serialize;
use tch::Device;

use super::{MemoryPlan, RunMemory, Step};
use crate::data::MicroBatchSize;
use crate::model::Thrift;
use crate::recipe::{Offload, Recompute, TileFeedForward, Tiling, TrainingRecipe};
use crate::{Error, Fault, Result};

/// What a recomputed block costs of its time in a step: forward once more, of forward, and backward of twice that.
const AGAIN: f64 = 1.0 / 3.0;

/// No smaller tiles are chosen: products of fewer tokens wait for the weights.
const SMALLEST_TILE: u64 = 1024;

/// What there is to choose from.
pub struct Wish<'a> {
    /// Rows of a micro-batch with the number of micro-batches that make up a step.
    pub sizes: &'a [(u32, u32)],
    /// What the recipe says of recomputing.
    pub recompute: Recompute,
    /// What it says of tiles.
    pub tile: TileFeedForward,
    /// What it says of the host's memory.
    pub offload: Offload,
    /// Bytes of that which may be taken; without it, everything fits.
    pub host: Option<u64>,
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
    /// What blocks do to take less memory.
    #[serde(flatten)]
    pub thrift: Thrift,
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
/// Every size has as few recomputed blocks as it needs to fit. Offloading is for what does not fit then, tiles for what does not fit
/// otherwise.
pub fn choose(run: &RunMemory<'_>, wish: &Wish<'_>) -> Choice {
    let all = choices(run, wish);
    let layers = run.layers();
    let time = |choice: &Choice| {
        let again = AGAIN * choice.thrift.recomputed_layers as f64 / layers.max(1) as f64;
        f64::from(choice.gradient_accumulation_steps) * (choice.largest_tokens as f64 + wish.overhead) * (1.0 + again)
    };
    let means = |choice: &Choice| (choice.thrift.feed_forward_tile.is_some(), choice.thrift.offload);
    let order = |a: &&Choice, b: &&Choice| means(a).cmp(&means(b)).then(time(a).total_cmp(&time(b)));
    let best = all.iter().filter(|choice| choice.fits).min_by(order);
    let least = || all.iter().min_by_key(|choice| choice.memory.peak);
    *best.or_else(least).expect("a recipe names a size, or a number of rows that has divisors")
}

/// Every size, with as few recomputed blocks as it needs to fit, and offloaded and in tiles where it needs that.
pub fn choices(run: &RunMemory<'_>, wish: &Wish<'_>) -> Vec<Choice> {
    let of_size = |&(rows, count): &(u32, u32)| {
        let largest = (wish.largest)(rows, count);
        let plan = |thrift| run.plan(Step { largest, accumulates: count > 1, thrift });
        let has_host = |thrift| {
            let host = plan(thrift).host;
            host == 0 || wish.host.is_none_or(|budget| host <= budget)
        };
        let has_room = |thrift| wish.budget.is_none_or(|budget| plan(thrift).peak <= budget);
        let fits = |thrift| has_room(thrift) && has_host(thrift);
        let all = || ways(run, wish, largest.tokens, &has_room);
        // Where nothing fits, the first of those that take least.
        let least = || all().min_by_key(|thrift| (!has_host(*thrift), plan(*thrift).peak));
        let thrift = all().find(|thrift| fits(*thrift)).or_else(least);
        let thrift = thrift.expect("a layer's activations are kept, or made again");
        Choice {
            micro_batch_size: rows,
            gradient_accumulation_steps: count,
            thrift,
            largest_tokens: largest.tokens,
            memory: plan(thrift),
            fits: fits(thrift),
        }
    };
    wish.sizes.iter().map(of_size).collect()
}

/// Ways for blocks to take less memory that the recipe allows, those that cost least time first; `has_room` is asked how many blocks need
/// run again. What they send to the host is not: the fewest blocks send least.
fn ways(
    run: &RunMemory<'_>,
    wish: &Wish<'_>,
    tokens: u64,
    has_room: &dyn Fn(Thrift) -> bool,
) -> impl Iterator<Item = Thrift> {
    let layers = run.layers();
    let again = wish.recompute != Recompute::None;
    let sizes: Vec<Option<u64>> = match wish.tile {
        TileFeedForward::Tokens(tile) => vec![Some(tile.into())],
        TileFeedForward::Left(Tiling::Auto) if again => [None].into_iter().chain(tiles(tokens).map(Some)).collect(),
        TileFeedForward::Left(_) => vec![None],
    };
    let offloads: &[bool] = match wish.offload {
        Offload::On if run.on_gpu() => &[true],
        Offload::Auto if run.on_gpu() && again => &[false, true],
        _ => &[false],
    };
    let pairs = sizes.into_iter().flat_map(|tile| offloads.iter().map(move |offload| (tile, *offload)));
    pairs.map(move |(feed_forward_tile, offload)| {
        let with = |recomputed_layers| Thrift { recomputed_layers, feed_forward_tile, offload };
        match (wish.recompute, feed_forward_tile) {
            // With tiles every layer is recomputed: which ones are changes how sums are rounded, and must not depend on what is free.
            (_, Some(_)) | (Recompute::Full, None) => with(layers),
            (Recompute::None, None) => with(0),
            (Recompute::Auto, None) => with(fewest(layers, |layers| has_room(with(layers)))),
        }
    })
}

/// Tiles of so many tokens, the largest first: powers of two, several to a micro-batch.
fn tiles(tokens: u64) -> impl Iterator<Item = u64> {
    let largest = tokens.div_ceil(2).next_power_of_two();
    std::iter::successors(Some(largest), |tile| Some(tile / 2)).take_while(|tile| *tile >= SMALLEST_TILE)
}

/// The fewest recomputed blocks with which there is room; all of them where there never is. More never take more.
fn fewest(layers: usize, has_room: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, layers);
    while low < high {
        let middle = (low + high) / 2;
        if has_room(middle) { high = middle } else { low = middle + 1 }
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
    let Choice { micro_batch_size: rows, gradient_accumulation_steps: count, thrift, .. } = *choice;
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    let peak = |rows, count, thrift| {
        let step = Step { largest: largest(rows, count), accumulates: count > 1, thrift };
        gigabytes(run.plan(step).peak)
    };
    let mut ways = Vec::new();
    let full = Thrift { recomputed_layers: run.layers(), ..thrift };
    if thrift.recomputed_layers < run.layers() {
        ways.push(format!("training.recompute: full would take {:.2} GB", peak(rows, count, full)));
    }
    let offloaded = Thrift { offload: true, ..full };
    if run.on_gpu() && !thrift.offload && peak(rows, count, offloaded) < 0.99 * peak(rows, count, full) {
        let offloaded = peak(rows, count, offloaded);
        ways.push(format!("training.offload: on with every layer recomputed {offloaded:.2} GB"));
    }
    let tiled = Thrift { feed_forward_tile: Some(SMALLEST_TILE), ..full };
    if thrift.feed_forward_tile.is_none_or(|tile| tile > SMALLEST_TILE)
        && peak(rows, count, tiled) < 0.99 * peak(rows, count, full)
    {
        let tiled = peak(rows, count, tiled);
        ways.push(format!("training.tile_feed_forward: {SMALLEST_TILE} with every layer recomputed {tiled:.2} GB"));
    }
    if rows > 1 {
        let (fewer, more) = (rows.div_ceil(2), count * 2);
        ways.push(format!(
            "training.micro_batch_size: {fewer} with gradient_accumulation_steps: {more} {:.2} GB, recomputed {:.2} GB",
            peak(fewer, more, thrift),
            peak(fewer, more, full)
        ));
    }
    ways.push("a lower dataset.max_length or adapter.r, `method: qlora` or a smaller base take less, too".into());
    format!("{:.2} GB are planned; {}", gigabytes(choice.memory.peak), ways.join("; "))
}

/// Refuses a run that takes more than is `free`, or sends more to the host than is free there.
///
/// # Errors
/// [`Error::Device`] with both numbers and `advice`.
pub fn refuse_what_does_not_fit(memory: &MemoryPlan, free: u64, on_host: Option<u64>, advice: &str) -> Result<()> {
    let refused = |place: &str, doing: &str, bytes: u64, free: u64| {
        let [bytes, free] = [bytes, free].map(|bytes| bytes as f64 / 1e9);
        let what = format!("the run would {doing} {bytes:.2} GB at most, {free:.2} GB are free");
        let hint = format!("{advice}; --ignore-memory-plan starts it all the same");
        Err(Error::Device(Fault::new(place, what).hint(hint)))
    };
    match on_host.filter(|free| memory.host > *free) {
        _ if memory.peak > free => refused("memory", "take", memory.peak, free),
        Some(free) => refused("host memory", "keep inputs of layers in", memory.host, free),
        None => Ok(()),
    }
}
