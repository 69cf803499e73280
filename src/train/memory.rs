//! The memory plan: which blocks keep their activations, and which run again in backward because all would not fit.
//!
//! What a block keeps per token, in elements of the activations' type, is what the operations of [`crate::ops`] keep: the
//! stream twice (before each norm), q, k, v, the attention's output, gate and up; and in fp32 one logsumexp per head and two
//! norm statistics. A block that reads another's k and v keeps none of its own; one with an input of its own keeps the stream,
//! what the gate gives and what is added once more. A delta-net keeps q, k, v before their convolution and after it, the output's
//! gate, what its heads read and that normed; and in fp32 two gates of each head, norm statistics, and its state every
//! [`DELTA_RUN`] tokens. Of several copies of the stream, each half keeps all, and what it gives. Recomputed, it keeps the stream once. The most that is alive beside that is one block's worth of
//! gradients and the head's chunk of logits. A block that is gone through several times keeps all of it each time.

use std::fmt;

use serde::Serialize;
use tch::{Device, Kind};

use crate::data::MicroBatchSize;
use crate::model::spec::{
    Attention, CompressedAttention, DeltaNet, ExpertGateUp, Experts, FeedForward, GateUp, GroupedAttention,
    LatentQuery, Projection, Residual, Routing,
};
use crate::model::{Decoder, ModelSpec};
use crate::ops::delta_net::TOKENS_OF_A_RUN as DELTA_RUN;
use crate::recipe::Recompute;
use crate::torch_ext::{cpu_memory, cuda_memory};

/// Share of the memory that is free which activations may take: the rest is for what the allocator cannot reuse.
const SHARE: f64 = 0.85;

/// Bytes that libtorch takes besides tensors once it computes: code that is read in, products that oneDNN compiles, their scratch.
const OF_LIBTORCH: u64 = 115 << 20;

/// What a run is expected to take beyond what the process has before the base is read, in bytes; made before the first step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// The base as it is kept, and the adapter: measured, as they are there.
    pub weights: u64,
    /// The adapter's gradients: made in backward, while activations go.
    pub gradients: u64,
    /// The optimizer's state.
    pub optimizer: u64,
    /// What the blocks keep of the largest micro-batch for backward.
    pub activations: u64,
    /// What is alive beside that: a block's worth of gradients, or a chunk of logits and their gradient.
    pub working: u64,
    /// The most that was alive at once while the base was read; a step takes it over.
    pub loading: u64,
    /// What libtorch takes besides tensors.
    pub libtorch: u64,
    /// The most at once of all of it.
    pub peak: u64,
}

/// What the plan depends on.
pub struct Planned<'a> {
    /// The model with its adapters.
    pub model: &'a Decoder,
    /// Gradients and the optimizer's state ([`super::bytes_beside`]).
    pub beside: u64,
    /// Whether a step has several micro-batches, so that gradients are there while activations are kept.
    pub accumulates: bool,
    /// The largest micro-batch.
    pub largest: MicroBatchSize,
    /// Blocks that run again in backward.
    pub recomputed_layers: usize,
}

impl MemoryPlan {
    /// Call it when the model and its adapters are loaded; `None` where the device does not tell what they take.
    pub fn of(planned: &Planned<'_>) -> Option<Self> {
        let Planned { model, beside, accumulates, largest: MicroBatchSize { tokens, trained }, recomputed_layers } =
            *planned;
        let (weights, loading, libtorch) = match model.device {
            Device::Cpu => {
                let memory = cpu_memory();
                (memory.allocated, memory.used, OF_LIBTORCH)
            }
            Device::Cuda(index) => {
                let memory = cuda_memory(index).ok()?;
                (memory.allocated as u64, memory.peak as u64, 0)
            }
            _ => return None,
        };
        let (spec, element) = (&model.spec, model.kind.elt_size_in_bytes() as u64);
        let kept = kept_by_blocks(spec, model.kind);
        let (ranks, numbers) = model.linears().iter().filter_map(|linear| linear.adapter.as_ref()).fold(
            (0, 0),
            |(ranks, numbers), adapter| {
                let rank = adapter.b.size().last().copied().unwrap_or(0) as u64;
                (ranks + rank, numbers + (adapter.a.numel() + adapter.b.numel()) as u64)
            },
        );
        let share = (kept.len() - recomputed_layers) as u64;
        let layers = kept.len().max(1) as u64;
        // X A^T of every adapter, and A and B in the activations' type.
        let passes = spec.passes as u64;
        let of_adapters = (ranks * tokens + numbers) * passes * element * share / layers;
        let copies = spec.streams.as_ref().map_or(1, |streams| streams.count as u64);
        let hidden = spec.hidden_size as u64 * element;
        let recomputed = recomputed_layers as u64 * copies * passes * hidden;
        let activations = (kept[recomputed_layers..].iter().sum::<u64>() + recomputed) * tokens + of_adapters;
        let vocabulary = spec.vocab_size as u64;
        let chunk = trained.min((64 << 20) / (4 * vocabulary)).max(1);
        // Logits and their gradient; the last hidden states before and after their norm, the trained ones and their gradient.
        let head = 2 * chunk * vocabulary * element + (2 * tokens + 2 * trained) * hidden;
        let again = if recomputed_layers > 0 { 2 } else { 1 };
        let block = again * kept.iter().max().copied().unwrap_or(0) / passes * tokens;
        let working = head.max(block);
        let gradients = 4 * numbers;
        let optimizer = beside.saturating_sub(gradients);
        let forward = activations + working + if accumulates { gradients } else { 0 };
        let step = weights + optimizer + forward.max(gradients + block);
        let peak = loading.max(step) + libtorch;
        Some(Self { weights, gradients, optimizer, activations, working, loading, libtorch, peak })
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gigabytes = |bytes: u64| bytes as f64 / 1e9;
        let Self { weights, gradients, optimizer, activations, working, libtorch, peak, .. } = *self;
        write!(
            f,
            "memory planned: {:.2} GB at most (weights {:.2}, gradients {:.2}, optimizer {:.2}, activations {:.2}, at work {:.2}, \
             libtorch {:.2})",
            gigabytes(peak),
            gigabytes(weights),
            gigabytes(gradients),
            gigabytes(optimizer),
            gigabytes(activations),
            gigabytes(working),
            gigabytes(libtorch),
        )
    }
}

/// How many of the first blocks run again in backward, for micro-batches of at most `tokens` tokens.
///
/// Call it when the model and its adapters are loaded: it looks at what is free then. Of that, gradients and the optimizer's
/// state will take `beside` bytes ([`super::bytes_beside`]).
pub fn recomputed_layers(
    choice: Recompute,
    spec: &ModelSpec,
    kind: Kind,
    device: Device,
    tokens: u64,
    beside: u64,
) -> usize {
    match choice {
        Recompute::None => 0,
        Recompute::Full => spec.layers.len(),
        Recompute::Auto => match free_bytes(device) {
            Some(free) => fewest(spec, kind, tokens, budget(free, beside)),
            None => 0,
        },
    }
}

/// What activations may take of `free` bytes, of which `beside` will not be free.
fn budget(free: u64, beside: u64) -> u64 {
    (free.saturating_sub(beside) as f64 * SHARE) as u64
}

/// Whether the linears' weights, made whole, fit into half of the memory that is free on the CPU. On a GPU they are made whole at the
/// speed of its memory, so that there is little to gain.
pub fn caches_dequantised(spec: &ModelSpec, kind: Kind, device: Device) -> bool {
    let numbers: i64 = spec.sites().iter().map(|site| site.numbers()).sum();
    let bytes = numbers as u64 * kind.elt_size_in_bytes() as u64;
    device == Device::Cpu && free_bytes(device).is_some_and(|free| bytes < free / 2)
}

/// The fewest recomputed blocks with which a micro-batch fits into `budget` bytes; all of them where nothing does.
fn fewest(spec: &ModelSpec, kind: Kind, tokens: u64, budget: u64) -> usize {
    let element = kind.elt_size_in_bytes() as u64;
    let kept = kept_by_blocks(spec, kind);
    let copies = spec.streams.as_ref().map_or(1, |streams| streams.count as u64);
    let passes = spec.passes as u64;
    let recomputed = copies * passes * spec.hidden_size as u64 * element;
    // While a block runs backward: its activations, and as much again of gradients.
    let working = 2 * kept.iter().max().copied().unwrap_or(0) / passes * tokens + 3 * (64 << 20);
    let need = |n: usize| {
        let saved: u64 = kept[n..].iter().sum();
        (saved + n as u64 * recomputed) * tokens + working
    };
    (0..=kept.len()).find(|n| need(*n) <= budget).unwrap_or(kept.len())
}

/// Bytes that each block keeps per token, in all its passes.
fn kept_by_blocks(spec: &ModelSpec, kind: Kind) -> Vec<u64> {
    let element = kind.elt_size_in_bytes() as u64;
    let passes = spec.passes as u64;
    spec.layers.iter().map(|layer| passes * kept_bytes(layer, spec.hidden_size as u64, element)).collect()
}

fn kept_bytes(layer: &crate::model::spec::LayerSpec, hidden: u64, element: u64) -> u64 {
    let wide = feed_forward_width(&layer.feed_forward);
    // Numbers per token, in the activations' type and in fp32.
    let (attention, statistics) = match &layer.attention {
        Attention::Grouped(GroupedAttention { heads, kv_heads, head_size, projection, .. }) => {
            let own = if matches!(projection, Projection::QueryOnly { .. }) { 0 } else { 2 * kv_heads };
            ((2 * heads + own) * head_size, *heads)
        }
        Attention::Latent(latent) => {
            // Query, key, value and output as wide as the key, the output cut to its size, and both latents.
            let key = latent.unrotated + latent.rotated;
            let low_rank = match &latent.query {
                LatentQuery::Direct(_) => 0,
                LatentQuery::LowRank { down, .. } => down.output,
            };
            (latent.heads * (4 * key + latent.value_size) + latent.latent_size + low_rank, latent.heads)
        }
        Attention::DeltaNet(DeltaNet { key_heads, value_heads, key_size, value_size, .. }) => {
            let values = value_heads * value_size;
            (2 * (2 * key_heads * key_size + values) + 3 * values, 5 * value_heads + values * key_size / DELTA_RUN)
        }
        Attention::Compressed(compressed) => {
            // Query before its norm and after it, output before it is turned back and after it, the latent, the key twice, k and g.
            let CompressedAttention { heads, head_size, query_down, group, entries, .. } = &**compressed;
            let of_windows = entries.compressor().map_or(0, |c| c.key_value.output + c.gate.output);
            (4 * heads * head_size + query_down.output + 2 * head_size + of_windows + group.output, 3 * heads)
        }
    };
    let (copies, weights) = match &layer.residual {
        Residual::Sequential { .. } | Residual::Parallel { .. } => (0, 0),
        // Before each half the copies, what it gives, and in fp32 the numbers of its map three times over.
        Residual::Streams { attention, .. } => {
            (2 * (attention.count as u64 + 1) * hidden, 6 * (2 + attention.count) * attention.count)
        }
    };
    let input = layer.ending.input.as_ref().map_or(0, |input| 2 * (input.gate.input + input.gate.output));
    (2 * hidden + copies + (attention + wide + input) as u64) * element + ((statistics + weights) as u64 + 4) * 4
}

/// Elements a token keeps of gate and up; of the experts it goes through, also their shared input.
fn feed_forward_width(feed_forward: &FeedForward) -> i64 {
    match feed_forward {
        FeedForward::Plain { up, .. } => up.output,
        FeedForward::Gated { projection: GateUp::Separate { gate, up }, .. } => gate.output + up.output,
        FeedForward::Gated { projection: GateUp::Fused(both), .. } => both.output,
        FeedForward::Experts(experts) => {
            let Experts { router, projection, down, shared, .. } = &**experts;
            let width = match projection {
                ExpertGateUp::Separate { gate, up } => gate.output + up.output,
                ExpertGateUp::Fused { linear, .. } => linear.output,
            };
            let chosen = match router.routing {
                Routing::Largest { chosen, .. } | Routing::OfToken { chosen, .. } => chosen,
                Routing::SparseMixer { .. } => 2,
            };
            let shared = shared.as_ref().map_or(0, |shared| feed_forward_width(&shared.feed_forward));
            chosen * width + shared + down.output
        }
        FeedForward::Sum(branches) => branches.iter().map(|branch| feed_forward_width(&branch.feed_forward)).sum(),
    }
}

/// Bytes free on the device; what the kernel says is available, within the cgroup's limit, for the CPU.
pub fn free_bytes(device: Device) -> Option<u64> {
    match device {
        Device::Cuda(index) => u64::try_from(cuda_memory(index).ok()?.free).ok(),
        Device::Cpu => {
            let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
            let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
            let available = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024;
            Some(cgroup_free().map_or(available, |free| free.min(available)))
        }
        _ => None,
    }
}

fn cgroup_free() -> Option<u64> {
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let limit = number("/sys/fs/cgroup/memory.max")?;
    Some(limit.saturating_sub(number("/sys/fs/cgroup/memory.current")?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::families;
    use serde_json::json;

    fn eight_billion() -> ModelSpec {
        let config = json!({
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": false,
        });
        families::from_config(&config).unwrap()
    }

    #[test]
    fn an_8b_model_keeps_three_megabytes_per_token_as_the_formula_says() {
        let spec = eight_billion();
        let per_token: u64 = spec.layers.iter().map(|layer| kept_bytes(layer, 4096, 2)).sum();
        assert!((3_000_000..3_050_000).contains(&per_token), "{per_token}");
    }

    #[test]
    fn a_block_that_is_gone_through_twice_keeps_twice_as_much() {
        let once = eight_billion();
        let twice = ModelSpec { passes: 2, ..once.clone() };
        let kept = |spec: &ModelSpec| kept_by_blocks(spec, Kind::BFloat16).iter().sum::<u64>();
        assert_eq!(kept(&twice), 2 * kept(&once));
        assert!(fewest(&twice, Kind::BFloat16, 16_384, 60 << 30) > fewest(&once, Kind::BFloat16, 16_384, 60 << 30));
    }

    #[test]
    fn what_the_optimizer_takes_is_not_the_activations() {
        assert_eq!([budget(1000, 0), budget(1000, 200), budget(1000, 2000)], [850, 680, 0]);
    }

    #[test]
    fn blocks_are_recomputed_only_as_far_as_memory_asks() {
        let spec = eight_billion();
        let layers = |budget| fewest(&spec, Kind::BFloat16, 16_384, budget);
        assert_eq!(layers(100 << 30), 0);
        let some = layers(30 << 30);
        assert!((1..32).contains(&some), "{some}");
        assert!(layers(20 << 30) > some);
        assert_eq!(layers(1 << 30), 32);
    }
}
