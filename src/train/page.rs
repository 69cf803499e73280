//! What a plan says of a run: memory by what it is for, the choice, speed and time.

use std::fmt::Write;
use std::path::Path;

use serde_json::{Value, json};

use super::speed::{Lengths, Machine, Prediction};
use super::{Choice, MemoryPlan};

/// A plan, to be read or as data.
pub struct Page<'a> {
    /// The recipe's file.
    pub recipe: &'a Path,
    /// Blocks of the model.
    pub layers: usize,
    /// Bytes free.
    pub free: Option<u64>,
    /// What was chosen.
    pub choice: Choice,
    /// The largest micro-batch of the same global batch that fits.
    pub largest_that_fits: Option<Choice>,
    /// Rows of a step.
    pub global: u32,
    /// Whether `lengths` are the data's own, and not taken from `max_length`.
    pub from_cache: bool,
    /// Of the data.
    pub lengths: Lengths,
    /// What it is to run on.
    pub machine: Option<Machine>,
    /// Where equal runs are asked to be equal bit for bit: whether that costs nothing on this device.
    pub deterministic: Option<bool>,
    /// How fast.
    pub prediction: Option<Prediction>,
}

impl Page<'_> {
    /// As data.
    pub fn facts(&self) -> Value {
        let layer = |index: usize| if index < self.choice.thrift.recomputed_layers { "recompute" } else { "save" };
        json!({
            "recipe": self.recipe,
            "machine": self.machine,
            "free_bytes": self.free,
            "memory": self.choice,
            "layers": (0..self.layers).map(layer).collect::<Vec<_>>(),
            "global_batch_size": self.global,
            "largest_micro_batch": self.largest_that_fits,
            "lengths": self.lengths,
            "lengths_from": if self.from_cache { "token cache" } else { "dataset.max_length" },
            "deterministic": self.deterministic.is_some(),
            "speed": self.prediction,
        })
    }

    /// To be read.
    pub fn text(&self) -> String {
        let gigabytes = |bytes: u64| format!("{:8.2} GB", bytes as f64 / 1e9);
        let Choice { micro_batch_size: rows, gradient_accumulation_steps: count, thrift, memory, .. } = self.choice;
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
            match thrift.recomputed_layers {
                0 => format!("all {} keep their activations", self.layers),
                some if some == self.layers => format!("all {some} are recomputed"),
                some => format!("1 to {some} are recomputed, {} to {} keep their activations", some + 1, self.layers),
            },
        );
        if thrift.offload {
            line(
                "host memory",
                gigabytes(memory.host) + " pinned: inputs of recomputed layers wait there for backward",
            );
        }
        if let Some(tile) = thrift.feed_forward_tile {
            let why = "what they keep is never whole, and they run once more";
            line("feed-forwards", format!(" {tile} tokens at a time: {why}"));
        }
        let tokens = self.choice.largest_tokens;
        line("micro-batch", format!("{rows} rows, {tokens} tokens at most; {count} to a step of {} rows", self.global));
        line(
            "",
            match &self.largest_that_fits {
                Some(largest) => format!(
                    "the largest that fits: {} rows, {} of {} layers recomputed, {}",
                    largest.micro_batch_size,
                    largest.thrift.recomputed_layers,
                    self.layers,
                    gigabytes(largest.memory.peak).trim_start()
                ),
                None => "none fits".into(),
            },
        );
        if let Some(free) = self.deterministic {
            let cost = match free {
                true => "at no cost: on the CPU every run is, with as many threads",
                false => "slower by what the run measures and says as it begins; the speed below is without it",
            };
            line("deterministic", format!(" {cost}"));
        }
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
