//! How a run is saved and taken up again.

use super::Trainer;
use crate::train::ledger::Ledger;
use crate::train::metrics::{Event, Metrics};
use crate::train::optimizer::restore;
use crate::train::state::{Newest, State};
use crate::train::{BatchSource, Meter, Schedule, Start};
use crate::{Error, Fault, Result};

impl Trainer<'_> {
    /// Writes a state, if there is none of this step yet.
    pub(super) fn save(&mut self, source: &dyn BatchSource, metrics: &mut Metrics) -> Result<()> {
        self.settle(source)?;
        self.write_state(metrics)?;
        self.states.retain(self.run.training.save_total_limit, self.ledger.best.map(|best| best.step))
    }

    pub(super) fn write_state(&mut self, metrics: &mut Metrics) -> Result<()> {
        if self.saved_at == Some(self.ledger.step) {
            return Ok(());
        }
        self.ledger.metrics_bytes = metrics.flush()?;
        self.note_time();
        let state = State {
            ledger: self.ledger.clone(),
            adapter: self.optimizer.evaluated(),
            optimizer: self.optimizer.tensors(),
        };
        let path = self.states.save(&state)?;
        self.saved_at = Some(self.ledger.step);
        metrics.tell(&Event::State { step: self.ledger.step, path: &path })
    }

    /// On a resume takes up the newest state; then, as nothing is left that could refuse the run, takes the folder over and
    /// opens the metrics.
    pub(super) fn begin(&mut self, schedule: &Schedule, total: u64) -> Result<Metrics> {
        let mut notices = Vec::new();
        if self.run.folder.start == Start::Resume {
            self.resume(&mut notices)?;
        }
        self.run.folder.begin()?;
        self.ledger.began.get_or_insert_with(|| jiff::Timestamp::now().to_string());
        self.meter = Meter::start(self.device());
        notices.extend(schedule.notice());
        let progress = std::mem::take(&mut self.run.progress);
        let (bytes, step) = (self.ledger.metrics_bytes, self.ledger.step);
        let mut metrics =
            Metrics::open(&self.run.folder.path, bytes, step, self.run.tensorboard, self.run.events, progress)?;
        notices.iter().try_for_each(|notice| metrics.notice(notice))?;
        let trained_parameters = self.parameters.iter().map(|(_, tensor)| tensor.numel() as u64).sum();
        metrics.tell(&Event::Start {
            step,
            total_steps: total,
            trained_tensors: self.parameters.len(),
            trained_parameters,
        })?;
        Ok(metrics)
    }

    pub(super) fn resume(&mut self, notices: &mut Vec<String>) -> Result<()> {
        let Some(Newest { state, damaged }) = self.states.newest()? else {
            notices.push(format!("nothing to resume in {}: the run begins at step 0", self.run.folder.path.display()));
            return Ok(());
        };
        let path = self.states.path(state.ledger.step);
        self.run.identity.check(&state.ledger.identity, &path)?;
        restore(&self.parameters, &state.adapter, &path)?;
        restore(&self.optimizer.tensors(), &state.optimizer, &path)?;
        for (step, error) in damaged {
            let aside = self.states.set_aside(step)?;
            notices
                .push(format!("the state of step {step} is damaged and was set aside as {}: {error}", aside.display()));
        }
        let (then, now) = (&state.ledger.identity.device, &self.run.identity.device);
        if then != now {
            notices.push(format!(
                "the state was saved on {then}, this is {now}: the run continues from the same numbers, but its last bits may differ from an uninterrupted one"
            ));
        }
        notices.push(format!("continuing from {}", path.display()));
        self.saved_at = Some(state.ledger.step);
        self.elapsed_before = state.ledger.elapsed_seconds;
        self.energy_before = state.ledger.energy.clone();
        self.ledger = Ledger { identity: self.run.identity.clone(), ..state.ledger };
        Ok(())
    }

    /// Saves on a signal; the error to end with.
    pub(super) fn interrupted(
        &mut self,
        signal: &str,
        source: &dyn BatchSource,
        metrics: &mut Metrics,
    ) -> Result<Error> {
        metrics.notice(&format!("{signal}: saving the state of step {}", self.ledger.step))?;
        self.save(source, metrics)?;
        let what = format!("{signal} stopped the run after step {}; its state is saved", self.ledger.step);
        Ok(Error::Interrupted(Fault::at(&self.states.path(self.ledger.step), what).hint("continue with --resume")))
    }
}
