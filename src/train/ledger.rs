//! What a run has done so far and what it is a run of: the part of a state that is not tensors.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Energy, Scaler};
use crate::data::Cursor;
use crate::{Error, Fault, Result};

/// The layout of `state.json` and of the tensors beside it.
pub const VERSION: u32 = 2;

/// What a run has done so far. With the tensors this is all there is: dropout is a function of the seed and the step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ledger {
    /// [`VERSION`] of the writer.
    pub version: u32,
    /// What this is a run of.
    pub identity: Identity,
    /// Optimizer steps done, skipped ones included.
    pub step: u64,
    /// The next micro-batch.
    pub cursor: Cursor,
    /// What the recipe left to the memory plan: a run goes on with what it began with, whatever memory there is then.
    #[serde(default)]
    pub chosen: Option<Chosen>,
    /// fp16's loss scale.
    pub scaler: Option<Scaler>,
    /// Tokens seen.
    pub tokens: u64,
    /// Tokens trained on.
    pub trained_tokens: u64,
    /// Seconds of all parts of the run, up to here.
    pub elapsed_seconds: f64,
    /// When the first part began, RFC 3339, UTC.
    #[serde(default)]
    pub began: Option<String>,
    /// Energy that all parts took, where the machine counts it.
    #[serde(default)]
    pub energy: Option<Energy>,
    /// The last logged loss.
    pub loss: Option<f64>,
    /// Loss since then: a state may be saved between two logged steps.
    pub unlogged: LossSum,
    /// The same of the loss that balances experts.
    #[serde(default)]
    pub unlogged_balance: LossSum,
    /// Loss of the last evaluation.
    pub eval_loss: Option<f64>,
    /// Step of the last evaluation.
    pub evaluated_at: Option<u64>,
    /// The evaluation with the lowest loss.
    pub best: Option<Best>,
    /// Evaluations in a row that did not improve by more than the threshold.
    pub evaluations_without_improvement: u32,
    /// Whether early stopping ended the run.
    pub stopped_early: bool,
    /// Steps skipped for a non-finite loss or gradient.
    pub skipped_steps: u64,
    /// The part of them that counts towards `max_nonfinite_steps`, up to the last step.
    pub nonfinite_in_a_row: u32,
    /// Length of `metrics.jsonl`: what lies beyond was written by steps this state has not done.
    pub metrics_bytes: u64,
}

/// How a step is cut, where the recipe leaves it to the memory plan: into micro-batches, and these into tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chosen {
    /// Rows of a micro-batch.
    pub micro_batch_size: u32,
    /// Micro-batches of a step.
    pub gradient_accumulation_steps: u32,
    /// Tokens that go through a dense feed-forward at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub feed_forward_tile: Option<u64>,
}

/// Losses of steps, weighed by their trained tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossSum {
    /// Sum over the trained tokens, in nats.
    pub nats: f64,
    /// Those tokens.
    pub trained_tokens: u64,
}

impl LossSum {
    /// Adds a step: its mean loss over its trained tokens.
    pub fn add(&mut self, loss: f64, trained_tokens: u64) {
        self.nats += loss * trained_tokens as f64;
        self.trained_tokens += trained_tokens;
    }

    /// The mean over all trained tokens; `None` where there are none.
    pub fn mean(&self) -> Option<f64> {
        (self.trained_tokens > 0).then(|| self.nats / self.trained_tokens as f64)
    }
}

/// The best evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// Its step.
    pub step: u64,
    /// Its loss.
    pub eval_loss: f64,
}

/// What a run is a run of. A state continues only a run of the same recipe, data and base.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// The recipe, overrides applied.
    pub recipe: Value,
    /// Fingerprint of the dataset.
    pub data: String,
    /// Fingerprint of the eval set, where there is one: it decides early stopping and which state is the best.
    pub eval: Option<String>,
    /// Fingerprint of the base model.
    pub base: String,
    /// Where it runs, in words that tell apart what computes differently.
    pub device: String,
}

/// Keys of the recipe that change what is written, shown or kept in memory but no number of the training.
/// (`device` and `threads` do change the last bits: that is said by [`Identity::device`], and a weaker promise is stated.)
const FREE: &[&str] = &[
    "output",
    "device",
    "quantization.cache_dequantized",
    "training.threads",
    "training.recompute",
    "training.offload",
    "training.logging_steps",
    "training.save_steps",
    "training.save_total_limit",
    "training.max_nonfinite_steps",
];

impl Ledger {
    /// The ledger of a run about to begin.
    pub fn new(identity: Identity, half: bool) -> Self {
        Self {
            version: VERSION,
            identity,
            step: 0,
            cursor: Cursor::default(),
            chosen: None,
            scaler: half.then(Scaler::default),
            tokens: 0,
            trained_tokens: 0,
            elapsed_seconds: 0.0,
            began: None,
            energy: None,
            loss: None,
            unlogged: LossSum::default(),
            unlogged_balance: LossSum::default(),
            eval_loss: None,
            evaluated_at: None,
            best: None,
            evaluations_without_improvement: 0,
            stopped_early: false,
            skipped_steps: 0,
            nonfinite_in_a_row: 0,
            metrics_bytes: 0,
        }
    }

    /// The step whose parameters are the run's result: the last, or the best with `load_best_model_at_end`.
    pub fn taken(&self, load_best: bool) -> u64 {
        self.best.filter(|_| load_best).map_or(self.step, |best| best.step)
    }

    /// Takes note of an evaluation: the best so far, and whether patience runs out (transformers' rule: the best
    /// is the lowest loss at all, patience starts again only when it falls by more than the threshold).
    pub fn note_evaluation(&mut self, eval_loss: f64, patience: Option<u32>, threshold: f64) {
        let best = self.best.map_or(f64::INFINITY, |best| best.eval_loss);
        let improved = eval_loss < best - threshold;
        self.evaluations_without_improvement = if improved { 0 } else { self.evaluations_without_improvement + 1 };
        if eval_loss < best {
            self.best = Some(Best { step: self.step, eval_loss });
        }
        self.eval_loss = Some(eval_loss);
        self.evaluated_at = Some(self.step);
        self.stopped_early = patience.is_some_and(|patience| self.evaluations_without_improvement >= patience);
    }
}

impl Identity {
    /// Refuses the state in `path` when it is one of another run.
    ///
    /// # Errors
    /// [`Error::State`] that names everything that differs.
    pub fn check(&self, state: &Identity, path: &Path) -> Result<()> {
        let differences = self.differences(state);
        if differences.is_empty() {
            return Ok(());
        }
        let what = format!("belongs to another run:\n  {}", differences.join("\n  "));
        let hint = "bring back what has changed, or begin a new run in another output.dir";
        Err(Error::State(Fault::at(path, what).hint(hint)))
    }

    /// What differs between this run and the one a state belongs to, one line each; empty when the state may continue it.
    pub fn differences(&self, state: &Identity) -> Vec<String> {
        let mut found = Vec::new();
        compare("", &state.recipe, &self.recipe, &mut found);
        let none = String::from("none");
        let eval = |identity: &Identity| identity.eval.clone().unwrap_or(none.clone());
        let fingerprints = [
            ("the dataset", state.data.clone(), self.data.clone()),
            ("the eval set", eval(state), eval(self)),
            ("the base model", state.base.clone(), self.base.clone()),
        ];
        for (what, then, now) in fingerprints.into_iter().filter(|(_, then, now)| then != now) {
            found.push(format!("{what} has changed: its fingerprint was {then}, it is {now}"));
        }
        found
    }
}

/// Walks two recipes side by side, nested or with dotted keys; `key` is the dotted path so far.
fn compare(key: &str, then: &Value, now: &Value, found: &mut Vec<String>) {
    let free = |free: &&str| key.strip_prefix(*free).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    if FREE.iter().any(free) || then == now {
        return;
    }
    let (Value::Object(old), Value::Object(new)) = (then, now) else {
        found.push(format!("{key} was {then}, it is {now}"));
        return;
    };
    let added = new.keys().filter(|name| !old.contains_key(*name));
    for name in old.keys().chain(added) {
        let path = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
        // A key left out means the same as null: neither is a difference to the other.
        compare(&path, old.get(name).unwrap_or(&Value::Null), new.get(name).unwrap_or(&Value::Null), found);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn identity(recipe: Value) -> Identity {
        Identity { recipe, data: "d".into(), eval: None, base: "b".into(), device: "cpu".into() }
    }

    #[test]
    fn differences_name_the_key_and_both_values() {
        let then = identity(
            json!({"dtype": "bf16", "training": {"learning_rate": 1e-4, "seed": 1, "max_steps": null}, "adapter": {"r": 8}}),
        );
        let mut now =
            identity(json!({"dtype": "bf16", "training": {"learning_rate": 2e-4, "seed": 1}, "adapter": {"r": 16}}));
        now.data = "e".into();
        now.eval = Some("f".into());
        assert_eq!(
            now.differences(&then),
            [
                "training.learning_rate was 0.0001, it is 0.0002",
                "adapter.r was 8, it is 16",
                "the dataset has changed: its fingerprint was d, it is e",
                "the eval set has changed: its fingerprint was none, it is f"
            ]
        );
    }

    #[test]
    fn what_changes_no_number_is_no_difference() {
        let then = identity(
            json!({"output": {"dir": "a"}, "training": {"save_steps": 5, "recompute": "none"}, "device": "cpu"}),
        );
        let now = identity(
            json!({"output": {"dir": "b", "save": []}, "training": {"save_steps": null, "recompute": "full"}, "device": "cuda"}),
        );
        assert_eq!(now.differences(&then), Vec::<String>::new());
        let now = identity(json!({"output.dir": "b", "training.threads": 4, "training.seed": 2}));
        let then = identity(json!({"output.dir": "a", "training.threads": 2, "training.seed": 1}));
        assert_eq!(now.differences(&then), ["training.seed was 1, it is 2"]);
    }

    #[test]
    fn patience_is_counted_as_transformers_does() {
        let mut ledger = Ledger::new(identity(Value::Null), false);
        let mut note = |step, loss| {
            ledger.step = step;
            ledger.note_evaluation(loss, Some(2), 0.1);
            (ledger.best.map(|best| best.step), ledger.evaluations_without_improvement, ledger.stopped_early)
        };
        assert_eq!(note(1, 2.0), (Some(1), 0, false));
        assert_eq!(note(2, 1.95), (Some(2), 1, false), "better, but not by the threshold");
        assert_eq!(note(3, 1.5), (Some(3), 0, false));
        assert_eq!(note(4, f64::NAN), (Some(3), 1, false), "not a number is no improvement");
        assert_eq!(note(5, 1.6), (Some(3), 2, true));
    }

    #[test]
    fn every_float_comes_back_bit_for_bit() {
        let mut ledger = Ledger::new(identity(Value::Null), true);
        ledger.best = Some(Best { step: 7, eval_loss: 0.1 + 0.2 });
        ledger.loss = Some(f64::from(2.5f32.sqrt()) / 3.0);
        ledger.unlogged.add(f64::from(2.7f32.sqrt()), 7);
        ledger.elapsed_seconds = 1.0 / 3.0;
        let text = serde_json::to_string(&ledger).unwrap();
        assert_eq!(serde_json::from_str::<Ledger>(&text).unwrap(), ledger);
    }
}
