//! How long a run will take: the work of a step, and how fast a machine does it.
//!
//! With N tokens of which a part rho is trained, P_L numbers in the blocks' linears that a token goes through, P_h in the head, P_A in
//! the low-rank updates, and for attention F floating-point operations forward over all pairs of tokens that see each other:
//!
//! ```text
//! F_model = N (4 P_L + 4 rho P_h + 6 P_A) + 3 F                a frozen weight has no gradient: 4, not 6
//! time    = products / matmul + F (1 + again) / forward + 2.5 F / backward + bytes / bandwidth
//! ```
//!
//! `again` is the part of the blocks that run again, which also makes the products `N (2 P_L + 2 P_A)` more. What reads and writes
//! memory: what blocks keep, five times (made, read, read again, its gradient made and read); quantised weights that are made whole in
//! each pass; the optimizer's update.

use std::collections::HashMap;

use serde::Serialize;

use super::MemoryPlan;
use crate::adapter::PlannedAdapters;
use crate::model::ModelSpec;
use crate::model::sites::Role;
use crate::model::spec::{Attention, ExpertGateUp, FeedForward, Mask, Routing};

/// How fast a machine is, and what it has.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Machine {
    /// What it is called.
    pub name: String,
    /// Where the figures are from, in a sentence.
    pub figures: String,
    /// Floating-point operations per second of large matrix products.
    pub matmul: f64,
    /// Of attention, forward.
    pub attention_forward: f64,
    /// Backward.
    pub attention_backward: f64,
    /// Bytes per second that memory is read and written with.
    pub bandwidth: f64,
}

/// What a run goes over: documents as they are cut into micro-batches.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Lengths {
    /// Documents of a pass.
    pub documents: f64,
    /// Their tokens.
    pub tokens: f64,
    /// The trained ones.
    pub trained: f64,
    /// Floating-point operations of attention over them, forward, of all layers.
    pub attention: f64,
}

/// How a run is cut.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Schedule {
    /// Micro-batches of a pass.
    pub micro_batches: f64,
    /// Micro-batches of a step.
    pub accumulated: f64,
    /// Steps of the run.
    pub steps: f64,
    /// Tokens of the largest micro-batch, which the memory plan is for.
    pub largest: f64,
}

/// What is predicted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Prediction {
    /// Tokens per second, trained or not.
    pub tokens_per_second: f64,
    /// Trained ones.
    pub trained_tokens_per_second: f64,
    /// Seconds of an optimizer step.
    pub seconds_per_step: f64,
    /// Seconds of all steps.
    pub total_seconds: f64,
    /// Optimizer steps.
    pub steps: u64,
    /// Part of the machine's matrix products that F_model makes use of.
    pub utilisation: f64,
}

/// How a run computes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct How {
    /// The part of the blocks that run again.
    pub recomputed: f64,
    /// Whether their dense feed-forwards do so once more, a tile at a time.
    pub tiled: bool,
    /// Whether products make their weights whole,
    pub quantised: bool,
    /// as numbers of so many bytes.
    pub element: u64,
}

/// A model's work.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    /// P_L.
    blocks: f64,
    /// P_h.
    head: f64,
    /// P_A.
    updates: f64,
    /// Numbers of all blocks' linears, whichever a token goes through.
    all: f64,
    /// Numbers of dense feed-forwards.
    feed_forwards: f64,
    /// Numbers that are trained.
    trained: f64,
}

impl Work {
    /// Of a model with adapters.
    pub fn of(spec: &ModelSpec, adapters: &PlannedAdapters) -> Self {
        let chosen = chosen_experts(spec);
        let share = |module: &str, count: i64| chosen.get(module).map_or(1.0, |chosen| *chosen as f64 / count as f64);
        let (mut blocks, mut head, mut all) = (0.0, 0.0, 0.0);
        for site in spec.sites() {
            let numbers = site.numbers() as f64;
            match site.role {
                Role::Head => head += numbers,
                Role::Experts { count, .. } => blocks += numbers * share(&site.name, count),
                Role::Linear | Role::Router | Role::Blocks | Role::Indexer => blocks += numbers,
            }
            all += if site.role == Role::Head { 0.0 } else { numbers };
        }
        let updates = adapters.updates.iter().map(|update| {
            let (rows, columns) = update.shape;
            let of_one = (update.rank * (rows + columns)) as f64;
            update.experts.map_or(of_one, |count| of_one * count as f64 * share(&update.module, count))
        });
        let trained = adapters.parameters().iter().map(|(_, shape)| shape.iter().product::<i64>() as f64).sum();
        let feed_forwards = spec.layers.iter().map(|layer| dense(&layer.feed_forward)).sum::<i64>() as f64;
        Self { blocks, head, updates: updates.sum(), all, feed_forwards, trained }
    }

    /// F_model of a run that has gone over `lengths`: floating-point operations of the model itself, without what was recomputed.
    pub fn operations(&self, lengths: &Lengths) -> f64 {
        let Lengths { tokens, trained, attention, .. } = *lengths;
        tokens * (4.0 * self.blocks + 6.0 * self.updates) + trained * 4.0 * self.head + 3.0 * attention
    }

    /// What a run will take on a machine.
    pub fn predict(
        &self,
        machine: &Machine,
        lengths: &Lengths,
        schedule: &Schedule,
        memory: &MemoryPlan,
        how: How,
    ) -> Prediction {
        let How { recomputed, tiled, quantised, element } = how;
        let Lengths { tokens, trained, attention, .. } = *lengths;
        let of_micro = 1.0 / schedule.micro_batches.max(1.0);
        let (n, rho) = (tokens * of_micro, if tokens > 0.0 { trained / tokens } else { 0.0 });
        let products = n * (4.0 * self.blocks + 4.0 * rho * self.head + 6.0 * self.updates)
            + recomputed * n * (2.0 * self.blocks + 2.0 * self.updates)
            + if tiled { recomputed * n * 2.0 * self.feed_forwards } else { 0.0 };
        let again = recomputed.ceil();
        let passes = 2.0 + again;
        // A small micro-batch waits for the weights.
        let of_weights = passes * self.all.min(self.blocks * n) * element as f64 / machine.bandwidth;
        let whole = if quantised {
            passes * (memory.weights as f64 + self.all * element as f64) / machine.bandwidth
        } else {
            0.0
        };
        let attended = attention * of_micro;
        let of_attention =
            attended * (1.0 + recomputed) / machine.attention_forward + 2.5 * attended / machine.attention_backward;
        let traffic = 5.0 * memory.activations as f64 * (n / schedule.largest.max(1.0)) / machine.bandwidth;
        let micro = (products / machine.matmul).max(of_weights) + of_attention + traffic + whole;
        let update = 28.0 * self.trained / machine.bandwidth;
        let seconds_per_step = schedule.accumulated * micro + update;
        let per_second = schedule.accumulated * n / seconds_per_step;
        let model = self.operations(&Lengths { documents: 0.0, tokens: n, trained: rho * n, attention: attended });
        Prediction {
            tokens_per_second: per_second,
            trained_tokens_per_second: per_second * rho,
            seconds_per_step,
            total_seconds: schedule.steps * seconds_per_step,
            steps: schedule.steps as u64,
            utilisation: schedule.accumulated * model / seconds_per_step / machine.matmul,
        }
    }
}

/// Numbers of what every token goes through of a feed-forward, routers left out.
fn dense(feed_forward: &FeedForward) -> i64 {
    match feed_forward {
        FeedForward::Plain { up, down, .. } => up.input * up.output + down.input * down.output,
        FeedForward::Gated { down, .. } => 3 * down.input * down.output,
        FeedForward::Experts(experts) => experts.shared.as_ref().map_or(0, |shared| dense(&shared.feed_forward)),
        FeedForward::Sum(branches) => branches.iter().map(|branch| dense(&branch.feed_forward)).sum(),
    }
}

/// Floating-point operations of attention forward over a document of `tokens` tokens, of all layers.
pub fn attention_of(spec: &ModelSpec, tokens: u64) -> f64 {
    let of_layer = |layer: &crate::model::spec::LayerSpec| {
        let length = tokens as f64;
        let triangle = |length: f64| length * (length + 1.0) / 2.0;
        let pairs = match layer.mask {
            Mask::Full => triangle(length),
            Mask::Sliding { window } => {
                let beyond = (length - window as f64).max(0.0);
                triangle(length) - triangle(beyond)
            }
            Mask::Chunked { size } => {
                let (whole, rest) = (tokens / size as u64, tokens % size as u64);
                whole as f64 * triangle(size as f64) + triangle(rest as f64)
            }
        };
        match &layer.attention {
            Attention::Grouped(grouped) => 4.0 * (grouped.heads * grouped.head_size) as f64 * pairs,
            Attention::Latent(latent) => {
                2.0 * (latent.heads * (latent.unrotated + latent.rotated + latent.value_size)) as f64 * pairs
            }
            // A state is read and written for each token.
            Attention::DeltaNet(net) => 8.0 * (net.value_heads * net.key_size * net.value_size) as f64 * length,
            Attention::Compressed(compressed) => {
                let entries = compressed.entries.compressor().map_or(0.0, |c| triangle(length) / c.rate as f64);
                4.0 * (compressed.heads * compressed.head_size) as f64 * (pairs + entries)
            }
        }
    };
    spec.layers.iter().map(of_layer).sum()
}

/// How many experts a token goes through, by the path of their linears.
fn chosen_experts(spec: &ModelSpec) -> HashMap<String, i64> {
    fn walk(spec: &ModelSpec, feed_forward: &FeedForward, found: &mut HashMap<String, i64>) {
        match feed_forward {
            FeedForward::Plain { .. } | FeedForward::Gated { .. } => {}
            FeedForward::Sum(branches) => branches.iter().for_each(|branch| walk(spec, &branch.feed_forward, found)),
            FeedForward::Experts(experts) => {
                let chosen = match experts.router.routing {
                    Routing::Largest { chosen, .. } | Routing::OfToken { chosen, .. } => chosen,
                    Routing::SparseMixer { .. } => 2,
                };
                let mut linears = match &experts.projection {
                    ExpertGateUp::Separate { gate, up } => vec![gate, up],
                    ExpertGateUp::Fused { linear, .. } => vec![linear],
                };
                linears.push(&experts.down);
                found.extend(linears.into_iter().map(|linear| (spec.names.module(&linear.name), chosen)));
            }
        }
    }
    let mut found = HashMap::new();
    spec.layers.iter().for_each(|layer| walk(spec, &layer.feed_forward, &mut found));
    found
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::families;
    use crate::recipe::AdapterRecipe;

    fn eight_billion() -> ModelSpec {
        let config = json!({
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": false,
        });
        families::from_config(&config).unwrap()
    }

    #[test]
    fn the_work_of_an_8b_model_is_that_of_the_formulas() {
        let spec = eight_billion();
        let work = Work::of(&spec, &PlannedAdapters::of(&spec, &AdapterRecipe::default()).unwrap());
        let (l, d, h, k, size, f, r) = (32.0, 4096.0, 32.0, 8.0, 128.0, 14336.0, 16.0);
        assert_eq!(work.blocks, l * (2.0 * d * h * size + 2.0 * d * k * size + 3.0 * d * f));
        assert_eq!(work.head, 128256.0 * d);
        let of_layer = (d + h * size) + 2.0 * (d + k * size) + (h * size + d) + 2.0 * (d + f) + (f + d);
        assert_eq!(work.updates, l * r * of_layer);
        assert_eq!(work.feed_forwards, l * 3.0 * d * f);
        // 4 L H h A
        assert_eq!(attention_of(&spec, 2048), 4.0 * l * h * size * (2048.0 * 2049.0 / 2.0));
    }

    #[test]
    fn a_window_hides_the_pairs_beyond_it() {
        let mut spec = eight_billion();
        spec.layers.truncate(1);
        let whole = attention_of(&spec, 10);
        spec.layers[0].mask = Mask::Sliding { window: 4 };
        assert_eq!(attention_of(&spec, 10) / whole, (1 + 2 + 3 + 4 + 6 * 4) as f64 / 55.0);
        spec.layers[0].mask = Mask::Chunked { size: 4 };
        assert_eq!(attention_of(&spec, 10) / whole, (10 + 10 + 3) as f64 / 55.0);
    }

    #[test]
    fn recomputing_costs_about_what_it_should_and_a_slow_memory_more() {
        let spec = eight_billion();
        let work = Work::of(&spec, &PlannedAdapters::of(&spec, &AdapterRecipe::default()).unwrap());
        let machine = Machine {
            name: "m".into(),
            figures: String::new(),
            matmul: 790e12,
            attention_forward: 350e12,
            attention_backward: 280e12,
            bandwidth: 4.3e12,
        };
        let lengths =
            Lengths { documents: 8.0, tokens: 16384.0, trained: 16384.0, attention: 8.0 * attention_of(&spec, 2048) };
        let schedule = Schedule { micro_batches: 1.0, accumulated: 1.0, steps: 10.0, largest: 16384.0 };
        let memory = MemoryPlan { activations: 49_500_000_000, weights: 16_060_000_000, ..MemoryPlan::default() };
        let predict = |machine: &Machine, recomputed| {
            let how = How { recomputed, tiled: false, quantised: false, element: 2 };
            work.predict(machine, &lengths, &schedule, &memory, how).tokens_per_second
        };
        let (saved, again) = (predict(&machine, 0.0), predict(&machine, 1.0));
        // facts measured on such a card: 18.6k and 13.1k tokens/s are the ceiling.
        assert!((17_000.0..21_500.0).contains(&saved), "{saved}");
        assert!((1.25..1.5).contains(&(saved / again)), "{saved} {again}");
        assert!(predict(&Machine { bandwidth: 1e12, ..machine }, 0.0) < saved);
    }
}
