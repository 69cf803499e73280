//! What is logged of a step, and when: on a GPU its numbers are fetched while the next step is already given to it, so that it never
//! waits for what the host does with them.

use std::time::Instant;

use tch::Tensor;

use super::{Pending, Trainer};
use crate::Result;
use crate::torch_ext::Transfer;
use crate::train::BatchSource;
use crate::train::metrics::{Event, Metrics, StepRecord, peak_memory_bytes};

/// A step that is logged once its numbers are here.
pub(super) struct Due {
    /// All of it but these numbers.
    record: StepRecord,
    /// It and those since the last logged one.
    pending: Vec<Pending>,
    /// Theirs: (steps, 2 or 3).
    numbers: Transfer,
}

impl Trainer<'_> {
    /// Logs the last step: now, or with [`Trainer::tell`].
    pub(super) fn log(&mut self, source: &dyn BatchSource, metrics: &mut Metrics) -> Result<()> {
        // The loss scale was read already.
        if self.reads_late && self.ledger.scaler.is_none() {
            let pending = std::mem::take(&mut self.pending);
            let numbers = Transfer::to_host(stacked(&pending));
            self.due = Some(Due { record: self.record(source)?, pending, numbers });
            return Ok(());
        }
        let reading = Instant::now();
        self.settle(source)?;
        self.window.seconds += reading.elapsed().as_secs_f64();
        let record = self.record(source)?;
        self.tell_record(record, metrics)
    }

    /// Logs the step that is due, if any. To be called when the next step is given to the device, and before anything else that is told
    /// or saved.
    pub(super) fn tell(&mut self, source: &dyn BatchSource, metrics: &mut Metrics) -> Result<()> {
        let Some(Due { record, pending, numbers }) = self.due.take() else { return Ok(()) };
        let reading = Instant::now();
        let numbers = numbers.read();
        if let Err(error) = self.count(pending, &numbers, source) {
            // The ledger must be that of the last step made.
            let _ = self.settle(source);
            return Err(error);
        }
        self.window.seconds += reading.elapsed().as_secs_f64();
        self.tell_record(record, metrics)
    }

    /// Of the last step what is known without its numbers; a new window begins.
    fn record(&mut self, source: &dyn BatchSource) -> Result<StepRecord> {
        let window = std::mem::take(&mut self.window);
        let seconds = window.seconds.max(1e-9);
        Ok(StepRecord {
            step: self.ledger.step,
            epoch: self.epoch(source)?,
            loss: f64::NAN,
            router_aux_loss: None,
            learning_rate: f64::NAN,
            grad_norm: f64::NAN,
            tokens: self.ledger.tokens,
            trained_tokens: self.ledger.trained_tokens,
            tokens_per_second: window.tokens as f64 / seconds,
            trained_tokens_per_second: window.trained_tokens as f64 / seconds,
            elapsed_seconds: self.elapsed(),
            peak_memory_bytes: peak_memory_bytes(self.device()),
        })
    }

    /// Tells a step whose numbers were the last to be counted.
    fn tell_record(&mut self, record: StepRecord, metrics: &mut Metrics) -> Result<()> {
        let Some(last) = self.last else { return Ok(()) };
        let loss = std::mem::take(&mut self.ledger.unlogged).mean();
        self.ledger.loss = loss;
        metrics.tell(&Event::Step(&StepRecord {
            loss: loss.unwrap_or(f64::NAN),
            router_aux_loss: std::mem::take(&mut self.ledger.unlogged_balance).mean(),
            learning_rate: last.learning_rate,
            grad_norm: last.gradient_norm,
            ..record
        }))
    }
}

/// The numbers of steps: (steps, 2 or 3).
pub(super) fn stacked(pending: &[Pending]) -> Tensor {
    Tensor::stack(&pending.iter().map(|step| &step.numbers).collect::<Vec<_>>(), 0)
}
