//! The training loop.

use std::time::Instant;

use tch::{Device, Tensor, no_grad};

use super::ledger::{Identity, Ledger};
use super::metrics::{EvalRecord, Event, Metrics, StepRecord, peak_memory_bytes};
use super::optimizer::{AdamW, restore};
use super::state::{Newest, State, States};
use super::{BatchSource, Interrupts, Outcome, Progress, RunFolder, Schedule, Start, report};
use crate::data::{Batch, Cursor, RowId};
use crate::objective::Learner;
use crate::recipe::TrainingRecipe;
use crate::torch_ext::catching;
use crate::{Error, Fault, Result};

/// Everything about a run but what is trained and on what.
pub struct Run {
    /// Where it writes.
    pub folder: RunFolder,
    /// What it is a run of.
    pub identity: Identity,
    /// The training part of the recipe.
    pub training: TrainingRecipe,
    /// Whether activations are fp16, so that the loss must be scaled.
    pub half: bool,
    /// Whether to write TensorBoard events.
    pub tensorboard: bool,
    /// Whether to print events as JSON on standard output.
    pub json: bool,
    /// What a person sees.
    pub progress: Progress,
    /// What asks it to stop.
    pub interrupts: Interrupts,
    /// Rows of the report's table: model, data and so on.
    pub facts: Vec<(String, String)>,
}

/// A run in progress.
pub struct Trainer<'a> {
    learner: &'a dyn Learner,
    run: Run,
    parameters: Vec<(String, Tensor)>,
    optimizer: AdamW,
    states: States,
    ledger: Ledger,
    /// Steps whose loss and gradient norm are still on the device.
    pending: Vec<Pending>,
    /// What the last settled step found.
    last: Option<Settled>,
    window: Window,
    began: Instant,
    elapsed_before: f64,
    saved_at: Option<u64>,
}

/// A step whose numbers have not been read: reading waits for the device, so it is done when they are needed.
struct Pending {
    step: u64,
    numbers: Tensor,
    rows: Vec<RowId>,
}

#[derive(Clone, Copy)]
struct Settled {
    loss: f64,
    gradient_norm: f64,
    learning_rate: f64,
}

/// Training since the last logged step.
#[derive(Default)]
struct Window {
    seconds: f64,
    tokens: u64,
    trained_tokens: u64,
}

impl<'a> Trainer<'a> {
    /// A trainer of `learner`'s parameters; nothing happens before [`Trainer::run`].
    pub fn new(run: Run, learner: &'a dyn Learner) -> Self {
        let parameters = learner.parameters();
        Self {
            learner,
            optimizer: AdamW::new(&parameters, &run.training),
            states: States::of(&run.folder.path),
            ledger: Ledger::new(run.identity.clone(), run.half),
            parameters,
            run,
            pending: Vec::new(),
            last: None,
            window: Window::default(),
            began: Instant::now(),
            elapsed_before: 0.0,
            saved_at: None,
        }
    }

    /// Trains to the end, or to a signal.
    ///
    /// Each turn of the loop looks at what the ledger says is done, so a resumed run goes on exactly where the state left off,
    /// with an evaluation that was due, too.
    pub fn run(mut self, source: &dyn BatchSource) -> Result<Outcome> {
        let total = self.total_steps(source)?;
        let schedule = Schedule::new(&self.run.training, total);
        let mut metrics = self.begin(total)?;
        let mut batches = source.batches(self.ledger.cursor)?;
        loop {
            if let Some(signal) = self.run.interrupts.received() {
                return Err(self.interrupted(signal, source, &mut metrics)?);
            }
            if source.has_evaluation() && self.evaluation_is_due(total) {
                self.evaluate(source, &mut metrics)?;
                continue;
            }
            if self.is_over(total) {
                break;
            }
            if self.save_is_due() {
                self.save(source, &mut metrics)?;
            }
            self.step(&mut *batches, source, &schedule)?;
            if self.is_logged(total) {
                self.log(source, &mut metrics)?;
            }
        }
        self.finish(source, &mut metrics)
    }

    /// One optimizer step: all its micro-batches first, so that each is weighed by the trained tokens of the whole step.
    fn step(
        &mut self,
        batches: &mut dyn Iterator<Item = Result<Batch>>,
        source: &dyn BatchSource,
        schedule: &Schedule,
    ) -> Result<()> {
        let began = Instant::now();
        let group = self.pull(batches, source)?;
        let rows: Vec<RowId> = group.iter().flat_map(|batch| batch.origins.iter().copied()).collect();
        let tokens: u64 = group.iter().map(|batch| batch.ids.size()[0] as u64).sum();
        let trained: u64 = group.iter().map(|batch| batch.rows.size()[0] as u64).sum();
        if trained == 0 {
            let what = format!("step {} has no trained token", self.ledger.step + 1);
            return Err(Error::Data(
                Fault::new(list(&rows, source), what).hint("see `engraft preview` for what is trained"),
            ));
        }

        let loss_scale = self.ledger.scaler.map_or(1.0, |scaler| scaler.scale);
        let mut loss: Option<Tensor> = None;
        for (index, batch) in group.iter().enumerate() {
            let seed = dropout_seed(self.run.training.seed, self.ledger.step, index as u64);
            let part = catching(&place(batch), || {
                let part = self.learner.loss(batch, Some(seed), loss_scale / trained as f64);
                part.backward();
                Ok(part.detach())
            })?;
            loss = Some(loss.map_or_else(|| part.shallow_clone(), |sum| sum + &part));
        }
        let loss = loss.expect("a group has at least one micro-batch") / loss_scale;
        let learning_rate = schedule.rate(self.ledger.step);
        let verdict = self.optimizer.update(learning_rate, loss_scale, &loss)?;

        self.ledger.step += 1;
        self.ledger.tokens += tokens;
        self.ledger.trained_tokens += trained;
        self.window.tokens += tokens;
        self.window.trained_tokens += trained;
        let numbers = Tensor::stack(&[loss, verdict.gradient_norm], 0);
        self.pending.push(Pending { step: self.ledger.step, numbers, rows });
        self.last = Some(Settled { loss: f64::NAN, gradient_norm: f64::NAN, learning_rate });
        // The next step's loss scale depends on this one.
        if self.ledger.scaler.is_some() {
            self.settle(source)?;
        }
        self.window.seconds += began.elapsed().as_secs_f64();
        Ok(())
    }

    /// The micro-batches of one step. A step never crosses the end of a pass: the last one of a pass may be smaller.
    fn pull(
        &mut self,
        batches: &mut dyn Iterator<Item = Result<Batch>>,
        source: &dyn BatchSource,
    ) -> Result<Vec<Batch>> {
        let in_pass = source.micro_batches(self.ledger.cursor.epoch)?;
        let left = in_pass.saturating_sub(self.ledger.cursor.micro_batch);
        let count = left.min(u64::from(self.run.training.gradient_accumulation_steps.max(1)));
        let group = batches.take(count as usize).collect::<Result<Vec<Batch>>>()?;
        if group.is_empty() || (group.len() as u64) < count {
            let what = format!("pass {} ended after fewer than its {in_pass} micro-batches", self.ledger.cursor.epoch);
            return Err(Error::Data(Fault::new("dataset", what)));
        }
        self.ledger.cursor.micro_batch += count;
        if self.ledger.cursor.micro_batch == in_pass {
            self.ledger.cursor = Cursor { epoch: self.ledger.cursor.epoch + 1, micro_batch: 0 };
        }
        Ok(group)
    }

    /// Reads the numbers of all steps since the last time and counts those that were not finite.
    fn settle(&mut self, source: &dyn BatchSource) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let pending = std::mem::take(&mut self.pending);
        let numbers: Vec<&Tensor> = pending.iter().map(|step| &step.numbers).collect();
        let numbers = Tensor::stack(&numbers, 0).to_device(Device::Cpu); // (steps, 2)
        for (index, Pending { step, rows, .. }) in pending.into_iter().enumerate() {
            let loss = numbers.double_value(&[index as i64, 0]);
            let gradient_norm = numbers.double_value(&[index as i64, 1]);
            if let Some(last) = &mut self.last {
                (last.loss, last.gradient_norm) = (loss, gradient_norm);
            }
            let finite = loss.is_finite() && gradient_norm.is_finite();
            let mut counts = !finite;
            if let Some(scaler) = &mut self.ledger.scaler {
                // A gradient that overflows under a scale above the floor is how the scale is found, not a fault.
                counts &= !loss.is_finite() || scaler.at_floor();
                scaler.update(!finite);
            }
            self.ledger.skipped_steps += u64::from(!finite);
            if finite {
                self.ledger.nonfinite_in_a_row = 0;
            } else if counts {
                self.ledger.nonfinite_in_a_row += 1;
            }
            if self.ledger.nonfinite_in_a_row >= self.run.training.max_nonfinite_steps.max(1) {
                return Err(self.diverged(step, loss, gradient_norm, &list(&rows, source)));
            }
        }
        Ok(())
    }

    fn diverged(&self, step: u64, loss: f64, gradient_norm: f64, rows: &str) -> Error {
        let steps = self.states.steps().unwrap_or_default();
        let state = steps.last().map_or_else(
            || "no state was saved".into(),
            |&step| format!("the last state is {}", self.states.path(step).display()),
        );
        let what = format!(
            "loss {loss}, gradient norm {gradient_norm} at rows {rows}: step {} in a row that is not finite; \
             none of them changed the adapter; {state}",
            self.ledger.nonfinite_in_a_row
        );
        let hint = "lower training.learning_rate, look at these rows with `engraft preview`, or use dtype bf16 or fp32";
        Error::Diverged(Fault::new(format_args!("step {step}"), what).hint(hint))
    }

    fn log(&mut self, source: &dyn BatchSource, metrics: &mut Metrics) -> Result<()> {
        let reading = Instant::now();
        self.settle(source)?;
        let Some(last) = self.last else { return Ok(()) };
        let window = std::mem::take(&mut self.window);
        let seconds = (window.seconds + reading.elapsed().as_secs_f64()).max(1e-9);
        self.ledger.loss = Some(last.loss);
        let record = StepRecord {
            step: self.ledger.step,
            epoch: self.epoch(source)?,
            loss: last.loss,
            learning_rate: last.learning_rate,
            grad_norm: last.gradient_norm,
            tokens: self.ledger.tokens,
            trained_tokens: self.ledger.trained_tokens,
            tokens_per_second: window.tokens as f64 / seconds,
            trained_tokens_per_second: window.trained_tokens as f64 / seconds,
            elapsed_seconds: self.elapsed(),
            peak_memory_bytes: peak_memory_bytes(self.device()),
        };
        metrics.tell(&Event::Step(&record))
    }

    /// The mean loss over the trained tokens of the eval set. A signal ends it without a result; it is then still due.
    fn evaluate(&mut self, source: &dyn BatchSource, metrics: &mut Metrics) -> Result<()> {
        let began = Instant::now();
        let (mut sum, mut tokens) = (0.0, 0u64);
        for batch in source.evaluation()? {
            let batch = batch?;
            sum += catching(&place(&batch), || Ok(no_grad(|| self.learner.loss(&batch, None, 1.0)).double_value(&[])))?;
            tokens += batch.rows.size()[0] as u64;
            if self.run.interrupts.received().is_some() {
                return Ok(());
            }
        }
        if tokens == 0 {
            return Err(Error::Data(Fault::new("the eval set", "has no trained token")));
        }
        let eval_loss = sum / tokens as f64;
        let training = &self.run.training;
        self.ledger.note_evaluation(eval_loss, training.early_stopping_patience, training.early_stopping_threshold);
        let record = EvalRecord {
            step: self.ledger.step,
            epoch: self.epoch(source)?,
            eval_loss,
            eval_tokens: tokens,
            eval_seconds: began.elapsed().as_secs_f64(),
            elapsed_seconds: self.elapsed(),
        };
        metrics.tell(&Event::Eval(&record))?;
        if self.ledger.best.is_some_and(|best| best.step == self.ledger.step) {
            self.save(source, metrics)?;
        }
        Ok(())
    }

    /// Writes a state, if there is none of this step yet.
    fn save(&mut self, source: &dyn BatchSource, metrics: &mut Metrics) -> Result<()> {
        if self.saved_at == Some(self.ledger.step) {
            return Ok(());
        }
        self.settle(source)?;
        self.ledger.metrics_bytes = metrics.flush()?;
        self.ledger.elapsed_seconds = self.elapsed();
        let cloned =
            |tensors: &[(String, Tensor)]| tensors.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
        let state = State {
            ledger: self.ledger.clone(),
            adapter: cloned(&self.parameters),
            optimizer: self.optimizer.tensors(),
        };
        let path = self.states.save(&state)?;
        self.saved_at = Some(self.ledger.step);
        self.states.retain(self.run.training.save_total_limit, self.ledger.best.map(|best| best.step))?;
        metrics.tell(&Event::State { step: self.ledger.step, path: &path })
    }

    /// Opens the metrics and, on a resume, takes up the newest state.
    fn begin(&mut self, total: u64) -> Result<Metrics> {
        let mut notices = Vec::new();
        if self.run.folder.start == Start::Resume {
            self.resume(&mut notices)?;
        }
        let progress = std::mem::take(&mut self.run.progress);
        let (bytes, step) = (self.ledger.metrics_bytes, self.ledger.step);
        let mut metrics =
            Metrics::open(&self.run.folder.path, bytes, step, self.run.tensorboard, self.run.json, progress)?;
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

    fn resume(&mut self, notices: &mut Vec<String>) -> Result<()> {
        let Some(Newest { state, damaged }) = self.states.newest()? else {
            notices.push(format!("nothing to resume in {}: the run begins at step 0", self.run.folder.path.display()));
            return Ok(());
        };
        let path = self.states.path(state.ledger.step);
        let differences = self.run.identity.differences(&state.ledger.identity);
        if !differences.is_empty() {
            let what = format!("belongs to another run:\n  {}", differences.join("\n  "));
            let hint = "bring back what has changed, or begin a new run in another output.dir";
            return Err(Error::State(Fault::at(&path, what).hint(hint)));
        }
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
        self.ledger = Ledger { identity: self.run.identity.clone(), ..state.ledger };
        Ok(())
    }

    /// Saves on a signal; the error to end with.
    fn interrupted(&mut self, signal: &str, source: &dyn BatchSource, metrics: &mut Metrics) -> Result<Error> {
        metrics.notice(&format!("{signal}: saving the state of step {}", self.ledger.step))?;
        self.save(source, metrics)?;
        let what = format!("{signal} stopped the run after step {}; its state is saved", self.ledger.step);
        Ok(Error::Interrupted(Fault::at(&self.states.path(self.ledger.step), what).hint("continue with --resume")))
    }

    /// Saves the last state, takes the best parameters if the recipe says so, and writes the report.
    fn finish(mut self, source: &dyn BatchSource, metrics: &mut Metrics) -> Result<Outcome> {
        self.save(source, metrics)?;
        let mut taken = self.ledger.step;
        if let (true, Some(best)) = (self.run.training.load_best_model_at_end, self.ledger.best) {
            restore(&self.parameters, &self.states.load(best.step)?.adapter, &self.states.path(best.step))?;
            taken = best.step;
        }
        let outcome = Outcome {
            steps: self.ledger.step,
            skipped_steps: self.ledger.skipped_steps,
            loss: self.ledger.loss,
            eval_loss: self.ledger.eval_loss,
            best: self.ledger.best,
            taken,
            tokens: self.ledger.tokens,
            trained_tokens: self.ledger.trained_tokens,
            seconds: self.elapsed(),
            stopped_early: self.ledger.stopped_early,
            state: self.states.path(self.ledger.step),
        };
        report::write(&self.run.folder.path, &self.run.facts, &outcome)?;
        metrics.tell(&Event::End(&outcome))?;
        Ok(outcome)
    }

    /// Optimizer steps of the whole run: `max_steps`, or as many as the passes take (a part of a pass is rounded up).
    fn total_steps(&self, source: &dyn BatchSource) -> Result<u64> {
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

    fn is_over(&self, total: u64) -> bool {
        self.ledger.step >= total || self.ledger.stopped_early
    }

    fn is_logged(&self, total: u64) -> bool {
        self.ledger.step.is_multiple_of(self.run.training.logging_steps.max(1)) || self.ledger.step == total
    }

    /// Every `eval_steps`, or at the end of a pass; and at the end of the run.
    fn evaluation_is_due(&self, total: u64) -> bool {
        let Ledger { step, cursor, evaluated_at, .. } = self.ledger;
        let regular =
            self.run.training.eval_steps.map_or(cursor.micro_batch == 0, |every| step.is_multiple_of(every.max(1)));
        step > 0 && evaluated_at != Some(step) && (regular || step >= total)
    }

    fn save_is_due(&self) -> bool {
        let step = self.ledger.step;
        self.run.training.save_steps.is_some_and(|every| step > 0 && step.is_multiple_of(every.max(1)))
    }

    fn epoch(&self, source: &dyn BatchSource) -> Result<f64> {
        let Cursor { epoch, micro_batch } = self.ledger.cursor;
        Ok(epoch as f64 + micro_batch as f64 / source.micro_batches(epoch)?.max(1) as f64)
    }

    fn elapsed(&self) -> f64 {
        self.elapsed_before + self.began.elapsed().as_secs_f64()
    }

    fn device(&self) -> Device {
        self.parameters.first().map_or(Device::Cpu, |(_, tensor)| tensor.device())
    }
}

/// A seed of its own for every micro-batch of a run: a counter hashed (SplitMix64), so there is no generator whose state to save.
fn dropout_seed(seed: u64, step: u64, micro_batch: u64) -> u64 {
    [step, micro_batch].into_iter().fold(mix(seed), |hash, counter| mix(hash ^ counter))
}

fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Names a micro-batch by what its memory depends on.
fn place(batch: &Batch) -> String {
    format!("a micro-batch of {} tokens in {} documents", batch.ids.size()[0], batch.documents.spans().count())
}

/// Names rows, the first few of many.
fn list(rows: &[RowId], source: &dyn BatchSource) -> String {
    const NAMED: usize = 8;
    let named: Vec<String> = rows.iter().take(NAMED).map(|row| source.describe(*row)).collect();
    let more = if rows.len() > NAMED { format!(" and {} more", rows.len() - NAMED) } else { String::new() };
    named.join(", ") + &more
}

#[cfg(test)]
mod tests;
