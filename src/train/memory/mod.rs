//! The memory plan: what a run will take, known before a weight is read; and what it chooses by that.
//!
//! A step is walked through as it will run: forward, block by block, each keeping what it must ([`blocks`]); the head, a chunk of
//! logits at a time; backward, block by block, each giving back what it kept and leaving gradients; the update. The most that is alive
//! at any moment is the peak. On the CPU freed memory is kept for the next step, so what loading the base took at most counts, too.

mod blocks;
mod choice;
mod room;
mod weights;

use std::collections::{HashMap, HashSet};
use std::fmt;

use serde::Serialize;
use tch::{Device, Kind};

use super::optimizer::bytes_of_state;
use crate::adapter::{PlannedAdapters, PlannedUpdate};
use crate::data::MicroBatchSize;
use crate::model::spec::Position;
use crate::model::{ModelSpec, Thrift};
use crate::ops::offload::BUFFERS;
use crate::ops::rows_of_logits;
use crate::quant::{Products, Scheme};
use crate::recipe::TrainingRecipe;
use crate::torch_ext::FEW_SHAPES;
use crate::weights::Checkpoint;

use blocks::{Block, Costs, Flash};
pub use choice::{Choice, Wish, advice, choices, choose, divisors, overhead, refuse_what_does_not_fit, sizes};
pub use room::{budget, caches_dequantised, free_bytes};
use weights::Weights;

/// Bytes that libtorch takes on the CPU besides tensors once it computes: code that is read in, the scratch of its threads.
const OF_LIBTORCH: u64 = 8 << 20;

/// Bytes that cuBLAS and cuBLASLt work in on a GPU, at most: 32 MiB each, as libtorch asks for them.
const OF_CUBLAS: u64 = 64 << 20;

/// Bytes of what oneDNN compiled for the shape of a product: measured, as its size is not told.
const OF_A_SHAPE: u64 = 270_000;

/// Shapes that steps with experts have met by the time they repeat, about; more are kept where there are more.
const SHAPES_OF_EXPERTS: u64 = 1024;

/// Bytes that a step is expected to take, by what they are for: each at its most, which need not be at the same moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// The base as it is kept.
    pub weights: u64,
    /// What is trained.
    pub adapters: u64,
    /// Its gradients: made in backward, while activations go.
    pub gradients: u64,
    /// The optimizer's state.
    pub optimizer: u64,
    /// What the blocks keep of the largest micro-batch for backward.
    pub activations: u64,
    /// The head: hidden states, and a chunk of logits with its gradient.
    pub logits: u64,
    /// What is alive beside what is kept while a block runs backward; with what it keeps, where it runs again.
    pub working: u64,
    /// The most at once while the base is read.
    pub loading: u64,
    /// What libtorch takes besides tensors: on the CPU what it compiles, above all; on a GPU what its products work in.
    pub libtorch: u64,
    /// What waits in the host's memory for backward, pinned, as libtorch's allocator rounds it; no part of the peak on a GPU.
    pub host: u64,
    /// A state while it is saved: on the CPU beside all that a step has taken, as freed memory is kept.
    pub saving: u64,
    /// The most at once of all of it, beyond what the process has before the base is read.
    pub peak: u64,
}

/// What a plan is made of.
#[derive(Clone, Copy)]
pub struct Planned<'a> {
    /// The model.
    pub spec: &'a ModelSpec,
    /// Its files; without them, weights are taken to be stored in `kind`.
    pub checkpoint: Option<&'a Checkpoint>,
    /// Number type of weights and activations.
    pub kind: Kind,
    /// Where it runs.
    pub device: Device,
    /// How the base is kept; as plain numbers where there is none.
    pub scheme: Option<&'a Scheme>,
    /// What is trained.
    pub adapters: &'a PlannedAdapters,
    /// How.
    pub training: &'a TrainingRecipe,
}

/// A step as far as its memory goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// The largest micro-batch.
    pub largest: MicroBatchSize,
    /// Whether it has several micro-batches, so that gradients are there while activations are kept.
    pub accumulates: bool,
    /// What blocks do to take less memory.
    pub thrift: Thrift,
}

/// What does not depend on the step: made once, asked for many.
pub struct RunMemory<'a> {
    planned: Planned<'a>,
    tuned: Tuned<'a>,
    weights: Weights,
    adapters: u64,
    gradients: u64,
    optimizer: u64,
    libtorch: u64,
    saving: u64,
}

/// What is trained and what is quantised, by module.
pub(super) struct Tuned<'a> {
    updates: HashMap<&'a str, &'a PlannedUpdate>,
    whole: Vec<&'a str>,
    quantised: HashSet<String>,
}

impl Tuned<'_> {
    fn rank(&self, module: &str) -> Option<i64> {
        self.updates.get(module).map(|update| update.rank)
    }

    fn decomposes(&self, module: &str) -> bool {
        self.updates.get(module).is_some_and(|update| update.decomposed)
    }

    fn is_whole(&self, module: &str) -> bool {
        self.whole.contains(&module)
    }

    /// Whether products make its weight whole.
    fn is_quantised(&self, module: &str) -> bool {
        self.quantised.contains(module)
    }

    /// Bytes of every A and B in the activations' type and of their gradients; and the rank.
    fn of_experts(&self, module: &str, element: u64) -> ((u64, u64), u64) {
        self.updates.get(module).map_or(((0, 0), 0), |update| {
            let (rows, columns) = update.shape;
            let numbers = (update.experts.unwrap_or(1) * update.rank * (rows + columns)) as u64;
            ((numbers * element, 4 * numbers), update.rank as u64)
        })
    }
}

impl<'a> RunMemory<'a> {
    /// Reads nothing but headers, which the checkpoint has read.
    pub fn new(planned: Planned<'a>) -> Self {
        let Planned { spec, checkpoint, kind, device, scheme, adapters, training } = planned;
        let parameters = adapters.parameters();
        let numbers: u64 = parameters.iter().map(|(_, shape)| shape.iter().product::<i64>() as u64).sum();
        let optimizer = bytes_of_state(&parameters, training);
        let squares: i64 =
            adapters.updates.iter().filter(|update| update.decomposed).map(|update| update.shape.0).sum();
        // What was taken off the weights, and once more as it is written.
        let start = if adapters.keeps_start { 2 * 4 * numbers } else { 0 };
        let whole = adapters.saved.iter().filter(|saved| !saved.rows);
        let whole = whole.flat_map(|saved| [Some(saved.module.as_str()), saved.shared_with.as_deref()]).flatten();
        let kept_quantised = |scheme: &Scheme| {
            let whole = match scheme.products {
                Products::Dequantised => true,
                Products::Cached => false,
                // GPUs multiply the codes themselves.
                Products::Fp8 => device == Device::Cpu,
            };
            scheme.kind == kind && whole
        };
        let quantised = scheme.filter(|scheme| kept_quantised(scheme)).map_or_else(HashSet::new, |scheme| {
            let sites = spec.sites().into_iter();
            let kept = sites.filter(|site| site.quantisable(spec.head.tied) && !scheme.skips(&site.name));
            kept.map(|site| site.name).collect()
        });
        let tuned = Tuned {
            updates: adapters.updates.iter().map(|update| (update.module.as_str(), update)).collect(),
            whole: whole.collect(),
            quantised,
        };
        let shapes = if spec.has_few_shapes() { u64::from(FEW_SHAPES) } else { SHAPES_OF_EXPERTS };
        let libtorch = OF_LIBTORCH + OF_A_SHAPE * 2 * shapes;
        // The adapter's file, then the optimizer's: tensor by tensor, and once more as a file.
        let file = 4 * numbers;
        let saving = (2 * file).max(file + 2 * optimizer);
        let (libtorch, saving) = if device == Device::Cpu { (libtorch, saving) } else { (OF_CUBLAS, 0) };
        Self {
            planned,
            tuned,
            weights: Weights::of(spec, checkpoint, kind, scheme),
            adapters: 4 * numbers + 4 * squares as u64 + start,
            gradients: 4 * numbers,
            optimizer,
            libtorch,
            saving,
        }
    }

    /// Whether there is another memory than the host's.
    fn on_gpu(&self) -> bool {
        self.planned.device != Device::Cpu
    }

    /// Blocks.
    pub fn layers(&self) -> usize {
        self.planned.spec.layers.len()
    }

    /// What a step takes.
    pub fn plan(&self, step: Step) -> MemoryPlan {
        let Self { weights, adapters, gradients, optimizer, libtorch, saving, .. } = *self;
        let walked = self.walk(&self.blocks(step), step);
        let always = weights.kept + adapters + optimizer;
        let step_peak = always + walked.peak.max(gradients);
        let peak = weights.loading.max(step_peak) + libtorch + saving;
        MemoryPlan {
            weights: weights.kept,
            adapters,
            gradients,
            optimizer,
            activations: walked.activations,
            logits: walked.logits,
            working: walked.working,
            loading: weights.loading,
            libtorch,
            host: walked.host,
            saving,
            peak,
        }
    }

    fn blocks(&self, step: Step) -> Vec<Block> {
        let spec = self.planned.spec;
        let block = |(index, layer)| {
            let again = index < step.thrift.recomputed_layers;
            self.costs(step.largest, step.thrift.feed_forward_tile.filter(|_| again)).block(layer)
        };
        let blocks = spec.layers.iter().enumerate().map(block);
        // A block that is gone through several times keeps all of it each time.
        blocks.flat_map(|block| std::iter::repeat_n(block, spec.passes)).collect()
    }

    fn costs(&self, micro: MicroBatchSize, tile: Option<u64>) -> Costs<'_> {
        let Planned { spec, kind, training, .. } = self.planned;
        let flash = Flash { documents: micro.documents, deterministic: training.deterministic };
        Costs {
            tokens: micro.tokens,
            tile,
            element: kind.elt_size_in_bytes() as u64,
            flash: self.on_gpu().then_some(flash),
            spec,
            tuned: &self.tuned,
        }
    }

    /// Walks through a step; bytes beyond weights, adapters and the optimizer's state.
    fn walk(&self, blocks: &[Block], step: Step) -> Walked {
        let Step { largest, accumulates, thrift } = step;
        let MicroBatchSize { tokens, trained, .. } = largest;
        let Planned { spec, device, .. } = self.planned;
        let costs = self.costs(largest, None);
        let stream = blocks.first().map_or(0, |block| block.input);
        let recomputed = |index: usize| index / spec.passes < thrift.recomputed_layers;
        let gradients = if accumulates { self.gradients } else { 0 };
        // Those of a block are there from its last pass on, which backward meets first.
        let made = |index: usize, of_a_block: u64| {
            if accumulates || index % spec.passes + 1 < spec.passes { 0 } else { of_a_block }
        };
        // Inputs that wait on the host are here for as long as they are copied.
        let away =
            if thrift.offload { blocks.iter().enumerate().filter(|(index, _)| recomputed(*index)).count() } else { 0 };
        let here = away.min(BUFFERS) as u64 * stream;
        let of_input = |block: &Block| if thrift.offload { 0 } else { block.input };
        let mut alive = costs.of_all_blocks() + gradients + here;
        let mut walked = Walked { host: away as u64 * stream.next_power_of_two(), ..Walked::default() };
        for (index, block) in blocks.iter().enumerate() {
            let kept = if recomputed(index) { of_input(block) } else { block.kept };
            walked.peak = walked.peak.max(alive + block.kept + block.forward);
            alive += kept;
        }
        walked.activations = alive - gradients;
        let (vocabulary, hidden) = (spec.vocab_size as u64, spec.hidden_size as u64 * costs.element);
        let chunk = trained.min(rows_of_logits(spec.vocab_size, device) as u64).max(1);
        // GPUs keep logits in fp32.
        let logit = if device == Device::Cpu { costs.element } else { 4 };
        // Logits and their gradient; the last stream, hidden states, the trained ones of these and their gradient.
        let head_module = spec.names.module(&spec.head.name);
        let head_weight = if self.tuned.is_quantised(&head_module) { vocabulary * hidden } else { 0 };
        walked.logits = chunk * vocabulary * (logit + costs.element)
            + stream
            + tokens * hidden
            + 2 * trained * hidden
            + chunk * hidden
            + head_weight
            + self.of_a_trained_head(&head_module, vocabulary, spec.hidden_size as u64, costs.element);
        walked.peak = walked.peak.max(alive + walked.logits);
        for (index, block) in blocks.iter().enumerate().rev() {
            let again = if recomputed(index) { block.kept.saturating_sub(block.input) + stream } else { 0 };
            let working = again + block.backward + block.gradients;
            walked.working = walked.working.max(working);
            walked.peak = walked.peak.max(alive + working);
            alive -= if recomputed(index) { of_input(block) } else { block.kept };
            alive += made(index, block.gradients);
        }
        walked
    }

    /// What training the head takes while the loss is made: its weight in the activations' type, and its gradient twice.
    fn of_a_trained_head(&self, module: &str, vocabulary: u64, hidden: u64, element: u64) -> u64 {
        let whole = if self.tuned.is_whole(module) { vocabulary * hidden * (element + 8) } else { 0 };
        whole + self.tuned.rank(module).map_or(0, |rank| rank as u64 * (vocabulary + hidden) * (element + 4))
    }
}

impl Costs<'_> {
    /// What is made once for all blocks: angles, token ids and positions, and what blocks are given of their own.
    fn of_all_blocks(&self) -> u64 {
        let mut ropes = Vec::new();
        for layer in &self.spec.layers {
            if let Position::Rope(rope) = &layer.position
                && !ropes.contains(&rope)
            {
                ropes.push(rope);
            }
        }
        let angles: i64 = ropes.iter().map(|rope| rope.rotated).sum();
        let own = self.spec.layer_inputs.as_ref().map_or(0, |inputs| 3 * inputs.projection.output);
        self.fp32(angles) + self.fp32(4) + self.numbers(own)
    }
}

/// The most of a step beyond what is always there.
#[derive(Debug, Clone, Copy, Default)]
struct Walked {
    host: u64,
    activations: u64,
    logits: u64,
    working: u64,
    peak: u64,
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gigabytes = |bytes: u64| bytes as f64 / 1e9;
        let Self {
            weights,
            adapters,
            gradients,
            optimizer,
            activations,
            logits,
            working,
            libtorch,
            saving,
            host,
            peak,
            ..
        } = *self;
        write!(
            f,
            "memory planned: {:.2} GB at most (weights {:.2}, adapters {:.2}, gradients {:.2}, optimizer {:.2}, activations {:.2}, \
             logits {:.2}, at work {:.2}, libtorch {:.2}, saving {:.2})",
            gigabytes(peak),
            gigabytes(weights),
            gigabytes(adapters),
            gigabytes(gradients),
            gigabytes(optimizer),
            gigabytes(activations),
            gigabytes(logits),
            gigabytes(working),
            gigabytes(libtorch),
            gigabytes(saving),
        )?;
        if host > 0 {
            write!(f, "; {:.2} GB of activations wait in the host's memory", gigabytes(host))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
