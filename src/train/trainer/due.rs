//! What is due at a step, and how many there are.

use super::Trainer;
use crate::data::Cursor;
use crate::train::BatchSource;
use crate::train::ledger::Ledger;
use crate::{Error, Result};

impl Trainer<'_> {
    /// Optimizer steps of the whole run: `max_steps`, or as many as the passes take (a part of a pass is rounded up).
    pub(super) fn total_steps(&self, source: &dyn BatchSource) -> Result<u64> {
        let training = &self.run.training;
        if let Some(steps) = training.max_steps {
            return Ok(steps);
        }
        let steps_of = |epoch| {
            Ok::<_, Error>(
                source.micro_batches(epoch)?.div_ceil(u64::from(training.gradient_accumulation_steps.max(1))),
            )
        };
        let whole = training.epochs.floor() as u64;
        let part = training.epochs - training.epochs.floor();
        let steps = (0..whole).map(steps_of).sum::<Result<u64>>()?;
        Ok(if part > 0.0 { steps + (part * steps_of(whole)? as f64).ceil() as u64 } else { steps })
    }

    pub(super) fn is_over(&self, total: u64) -> bool {
        self.ledger.step >= total || self.ledger.stopped_early
    }

    pub(super) fn is_logged(&self, total: u64) -> bool {
        self.ledger.step.is_multiple_of(self.run.training.logging_steps.max(1)) || self.ledger.step == total
    }

    /// Every `eval_steps`, or at the end of a pass; and at the end of the run.
    pub(super) fn evaluation_is_due(&self, total: u64) -> bool {
        let Ledger { step, cursor, evaluated_at, .. } = self.ledger;
        let regular =
            self.run.training.eval_steps.map_or(cursor.micro_batch == 0, |every| step.is_multiple_of(every.max(1)));
        step > 0 && evaluated_at != Some(step) && (regular || step >= total)
    }

    pub(super) fn save_is_due(&self) -> bool {
        let step = self.ledger.step;
        self.run.training.save_steps.is_some_and(|every| step > 0 && step.is_multiple_of(every.max(1)))
    }

    pub(super) fn epoch(&self, source: &dyn BatchSource) -> Result<f64> {
        let Cursor { epoch, micro_batch } = self.ledger.cursor;
        Ok(epoch as f64 + micro_batch as f64 / source.micro_batches(epoch)?.max(1) as f64)
    }
}
