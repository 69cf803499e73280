//! What it costs that equal runs are equal bit for bit.

use std::time::Instant;

use tch::{Device, Kind, Tensor};

use super::{Trainer, place};
use crate::Result;
use crate::data::Batch;
use crate::torch_ext::{catching, clear_gradients, set_deterministic};
use crate::train::BatchSource;
use crate::train::metrics::Metrics;

/// Steps of each way that are timed, after one of each that is not.
const TIMED: u32 = 3;

impl Trainer<'_> {
    /// Says what `training.deterministic` costs here, where the recipe asks for it.
    pub(super) fn say_what_determinism_costs(&mut self, source: &dyn BatchSource, metrics: &mut Metrics) -> Result<()> {
        if !self.run.training.deterministic || self.ledger.step >= self.total_steps(source)? {
            return Ok(());
        }
        let said = match self.device() {
            Device::Cpu => "nothing: on the CPU every run is, with as many threads".to_owned(),
            _ => {
                let batch = source.batches(self.ledger.cursor)?.next().transpose()?;
                let Some(batch) = batch else { return Ok(()) };
                let cost = self.times_as_long(&batch, &set_deterministic)?;
                format!("a micro-batch takes {cost:.2} times as long as otherwise (median of {TIMED}, just measured)")
            }
        };
        metrics.notice(&format!("deterministic: {said}"))?;
        self.run.facts.push(("deterministic".into(), said));
        Ok(())
    }

    /// How many times as long forward and backward of `batch` take with `switch` on as with it off; it is left on. Nothing that is
    /// trained or saved changes: what is random comes from seeds, and the gradients are dropped.
    pub(super) fn times_as_long(&self, batch: &Batch, switch: &dyn Fn(bool)) -> Result<f64> {
        let tensors: Vec<Tensor> = self.parameters.iter().map(|(_, tensor)| tensor.shallow_clone()).collect();
        let once = || {
            let began = Instant::now();
            let made = catching(&place(batch), || {
                self.learner.loss(batch, Some(0), 1.0).value.backward();
                // Reading a number that is asked for last waits for all before it.
                Ok(tensors
                    .iter()
                    .map(Tensor::grad)
                    .find(Tensor::defined)
                    .map(|grad| grad.sum(Kind::Float).double_value(&[])))
            });
            clear_gradients(&tensors);
            made.map(|_| began.elapsed().as_secs_f64())
        };
        let (mut with, mut without) = (Vec::new(), Vec::new());
        let timed = (0..=TIMED).try_for_each(|round| {
            for (on, times) in [(false, &mut without), (true, &mut with)] {
                switch(on);
                let seconds = once()?;
                if round > 0 {
                    times.push(seconds);
                }
            }
            Ok(())
        });
        switch(true);
        timed.map(|()| median(with) / median(without).max(1e-9))
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
