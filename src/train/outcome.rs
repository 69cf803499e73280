//! How a run went.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use super::{Best, Energy, Ledger, States};

/// How a run went.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// Optimizer steps done, skipped ones included.
    pub steps: u64,
    /// Of these, skipped for a non-finite loss or gradient.
    pub skipped_steps: u64,
    /// The last logged loss.
    pub loss: Option<f64>,
    /// Loss of the last evaluation.
    pub eval_loss: Option<f64>,
    /// The best evaluation.
    pub best: Option<Best>,
    /// Step whose parameters the model now has: the last, or the best with `load_best_model_at_end`.
    pub taken: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Tokens trained on.
    pub trained_tokens: u64,
    /// Seconds of all parts of the run.
    pub seconds: f64,
    /// When it began, RFC 3339, UTC.
    pub began: Option<String>,
    /// Energy that it took, of the whole machine; absent where the machine does not count it.
    pub energy: Option<Energy>,
    /// Whether early stopping ended it.
    pub stopped_early: bool,
    /// The last state.
    pub state: PathBuf,
}

impl Outcome {
    /// How the run of `ledger` went, whose result are the parameters of the step `taken` ([`Ledger::taken`]).
    pub fn of(ledger: &Ledger, taken: u64, states: &States) -> Self {
        Self {
            steps: ledger.step,
            skipped_steps: ledger.skipped_steps,
            loss: ledger.loss,
            eval_loss: ledger.eval_loss,
            best: ledger.best,
            taken,
            tokens: ledger.tokens,
            trained_tokens: ledger.trained_tokens,
            seconds: ledger.elapsed_seconds,
            began: ledger.began.clone(),
            energy: ledger.energy.clone(),
            stopped_early: ledger.stopped_early,
            state: states.path(ledger.step),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} steps, {} trained tokens in {:.0} s", self.steps, self.trained_tokens, self.seconds)?;
        if let Some(loss) = self.loss {
            write!(f, "; loss {loss:.4}")?;
        }
        if let Some(loss) = self.eval_loss {
            write!(f, "; eval loss {loss:.4}")?;
        }
        if let Some(best) = self.best.filter(|best| best.step != self.steps) {
            write!(f, ", best {:.4} at step {}", best.eval_loss, best.step)?;
        }
        if self.stopped_early {
            write!(f, "; stopped early")?;
        }
        if self.skipped_steps > 0 {
            write!(f, "; {} steps skipped as not finite", self.skipped_steps)?;
        }
        if self.taken != self.steps {
            write!(f, "; the adapter is that of step {}", self.taken)?;
        }
        Ok(())
    }
}
