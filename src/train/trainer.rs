//! The training loop.

mod determinism;
mod due;
mod logging;
mod saving;
mod seed;

use std::time::Instant;

use tch::{Device, Tensor, no_grad};

use super::ledger::{Chosen, Identity, Ledger};
use super::metrics::{EvalRecord, Event, Events, Metrics};
use super::optimizer::{Optimizer, restore};
use super::state::States;
use super::{BatchSource, Energy, Interrupts, Meter, Outcome, Progress, RunFolder, Schedule, report};
use crate::data::{Batch, Cursor, RowId};
use crate::objective::{Learner, Loss};
use crate::recipe::TrainingRecipe;
use crate::torch_ext::{catching, clear_gradients};
use crate::{Error, Fault, Result};
use logging::{Due, stacked};
use seed::dropout_seed;

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
    /// Where a program reads what happens.
    pub events: Events,
    /// What a person sees.
    pub progress: Progress,
    /// What asks it to stop.
    pub interrupts: Interrupts,
    /// Rows of the report's table: model, data and so on.
    pub facts: Vec<(String, String)>,
    /// How steps are cut, where the recipe leaves that to the memory plan: kept with the state.
    pub chosen: Option<Chosen>,
    /// What would take less memory, said where it ran out.
    pub advice: String,
}

/// A run in progress.
pub struct Trainer<'a> {
    learner: &'a dyn Learner,
    run: Run,
    parameters: Vec<(String, Tensor)>,
    optimizer: Optimizer,
    states: States,
    ledger: Ledger,
    /// Steps whose loss and gradient norm are still on the device.
    pending: Vec<Pending>,
    /// Whether a step is logged when the next one is given to the device.
    reads_late: bool,
    /// That step.
    due: Option<Due>,
    /// What the last settled step found.
    last: Option<Settled>,
    window: Window,
    began: Instant,
    elapsed_before: f64,
    /// Counts the energy of this part of the run, where the machine does.
    meter: Option<Meter>,
    energy_before: Option<Energy>,
    saved_at: Option<u64>,
    /// Whether an update was cut short: the parameters are then those of no step.
    torn: bool,
}

/// A step whose numbers have not been read: reading waits for the device, so it is done when they are needed.
struct Pending {
    step: u64,
    trained_tokens: u64,
    learning_rate: f64,
    /// Loss, gradient norm, and the loss that balances experts where there is one.
    numbers: Tensor,
    rows: Vec<RowId>,
}

#[derive(Clone, Copy)]
struct Settled {
    gradient_norm: f64,
    learning_rate: f64,
}

/// Speed since the last logged step; the loss since then is the ledger's, as a resumed run must log the same.
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
        let ledger = Ledger { chosen: run.chosen, ..Ledger::new(run.identity.clone(), run.half) };
        Self {
            learner,
            optimizer: Optimizer::new(&parameters, &run.training),
            states: States::of(&run.folder.path),
            ledger,
            run,
            pending: Vec::new(),
            reads_late: device_of(&parameters) != Device::Cpu,
            parameters,
            due: None,
            last: None,
            window: Window::default(),
            began: Instant::now(),
            elapsed_before: 0.0,
            meter: None,
            energy_before: None,
            saved_at: None,
            torn: false,
        }
    }

    /// Trains to the end, or to a signal.
    ///
    /// Each turn of the loop looks at what the ledger says is done, so a resumed run goes on exactly where the state left off,
    /// with an evaluation that was due, too.
    pub fn run(mut self, source: &dyn BatchSource) -> Result<Outcome> {
        let total = self.total_steps(source)?;
        let schedule = Schedule::new(&self.run.training, total);
        let mut metrics = self.begin(&schedule, total)?;
        let outcome = self.say_what_determinism_costs(source, &mut metrics);
        outcome.and_then(|()| self.steps(source, &schedule, total, &mut metrics)).map_err(|error| match error {
            Error::Diverged(fault) => self.diverged(fault, &mut metrics),
            Error::Device(fault) => self.out_of_memory(fault, source, &mut metrics),
            error => error,
        })
    }

    fn steps(
        &mut self,
        source: &dyn BatchSource,
        schedule: &Schedule,
        total: u64,
        metrics: &mut Metrics,
    ) -> Result<Outcome> {
        let mut batches = source.batches(self.ledger.cursor)?;
        loop {
            let signal = self.run.interrupts.received();
            let evaluates = source.has_evaluation() && self.evaluation_is_due(total);
            if signal.is_some() || evaluates || self.is_over(total) || self.save_is_due() {
                self.tell(source, metrics)?;
            }
            if let Some(signal) = signal {
                return Err(self.interrupted(signal, source, metrics)?);
            }
            if evaluates {
                self.evaluate(source, metrics)?;
                continue;
            }
            if self.is_over(total) {
                break;
            }
            if self.save_is_due() {
                self.save(source, metrics)?;
            }
            self.step(&mut *batches, source, schedule)?;
            self.tell(source, metrics)?;
            if self.is_logged(total) {
                self.log(source, metrics)?;
            }
        }
        self.finish(source, metrics)
    }

    /// One optimizer step: all its micro-batches first, so that each is weighed by the trained tokens of the whole step.
    fn step(
        &mut self,
        batches: &mut dyn Iterator<Item = Result<Batch>>,
        source: &dyn BatchSource,
        schedule: &Schedule,
    ) -> Result<()> {
        let began = Instant::now();
        let cursor = self.ledger.cursor;
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
        let Loss { value: loss, balance } = self.gradients(&group, loss_scale, trained).inspect_err(|_| {
            // The step is not made: a state that is saved now goes on with it.
            self.ledger.cursor = cursor;
            clear_gradients(&self.parameters.iter().map(|(_, tensor)| tensor.shallow_clone()).collect::<Vec<_>>());
        })?;
        let learning_rate = schedule.rate(self.ledger.step);
        let verdict = catching("the update", || self.optimizer.update(learning_rate, loss_scale, &loss));
        let verdict = verdict.inspect_err(|_| self.torn = true)?;

        self.ledger.step += 1;
        self.ledger.tokens += tokens;
        self.ledger.trained_tokens += trained;
        self.window.tokens += tokens;
        self.window.trained_tokens += trained;
        let numbers: Vec<Tensor> = [loss, verdict.gradient_norm].into_iter().chain(balance).collect();
        let numbers = Tensor::stack(&numbers, 0);
        let step = self.ledger.step;
        self.pending.push(Pending { step, trained_tokens: trained, learning_rate, numbers, rows });
        // The next step's loss scale depends on this one.
        if self.ledger.scaler.is_some() {
            self.settle(source)?;
        }
        self.window.seconds += began.elapsed().as_secs_f64();
        Ok(())
    }

    /// The loss of a step, its gradients left on the parameters.
    fn gradients(&self, group: &[Batch], loss_scale: f64, trained: u64) -> Result<Loss> {
        let (mut loss, mut balance): (Option<Tensor>, Option<Tensor>) = (None, None);
        let added =
            |sum: Option<Tensor>, part: Tensor| Some(sum.map_or_else(|| part.shallow_clone(), |sum| sum + &part));
        for (index, batch) in group.iter().enumerate() {
            let seed = dropout_seed(self.run.training.seed, self.ledger.step, index as u64);
            let part = catching(&place(batch), || {
                let part = self.learner.loss(batch, Some(seed), loss_scale / trained as f64);
                part.value.backward();
                Ok(Loss { value: part.value.detach(), ..part })
            })?;
            loss = added(loss, part.value);
            if let Some(part) = part.balance {
                balance = added(balance, part);
            }
        }
        let value = loss.expect("a group has at least one micro-batch") / loss_scale;
        Ok(Loss { value, balance: balance.map(|balance| balance / loss_scale) })
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

    /// Reads the numbers of all steps since the last time and counts those that were not finite. All of them are counted also
    /// where too many were not: the ledger is then that of the last step, so that its state can still be saved.
    fn settle(&mut self, source: &dyn BatchSource) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let pending = std::mem::take(&mut self.pending);
        let numbers = stacked(&pending).to_device(Device::Cpu);
        self.count(pending, &numbers, source)
    }

    /// Counts steps by their numbers (steps, 2 or 3), which are on the CPU.
    fn count(&mut self, pending: Vec<Pending>, numbers: &Tensor, source: &dyn BatchSource) -> Result<()> {
        let balanced = numbers.size()[1] > 2;
        let mut diverged = None;
        for (index, Pending { step, trained_tokens, learning_rate, rows, .. }) in pending.into_iter().enumerate() {
            let loss = numbers.double_value(&[index as i64, 0]);
            let gradient_norm = numbers.double_value(&[index as i64, 1]);
            self.last = Some(Settled { gradient_norm, learning_rate });
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
                self.ledger.unlogged.add(loss, trained_tokens);
                if balanced {
                    self.ledger.unlogged_balance.add(numbers.double_value(&[index as i64, 2]), trained_tokens);
                }
            } else if counts {
                self.ledger.nonfinite_in_a_row += 1;
            }
            let in_a_row = self.ledger.nonfinite_in_a_row;
            if diverged.is_none() && in_a_row >= self.run.training.max_nonfinite_steps.max(1) {
                let what = format!(
                    "loss {loss}, gradient norm {gradient_norm} at rows {}: step {in_a_row} in a row that is not finite; \
                     none of them changed the adapter",
                    list(&rows, source)
                );
                diverged = Some(not_finite(step, what));
            }
        }
        diverged.map_or(Ok(()), Err)
    }

    /// A run that diverged leaves the state it came to, which skipped steps have not changed, unless that is not finite
    /// itself. No state before makes room for it: that may be the better one.
    fn diverged(&mut self, fault: Fault, metrics: &mut Metrics) -> Error {
        let unsaved = self.write_state(metrics).err().map(|error| error.faults()[0].what.clone());
        let newest = self.states.steps().unwrap_or_default().last().map(|&step| self.states.path(step));
        let kept = match (unsaved, newest) {
            (_, Some(path)) => format!("the last state is {}", path.display()),
            (Some(why), None) => format!("no state was saved: {why}"),
            (None, None) => "no state was saved".into(),
        };
        Error::Diverged(Fault { what: format!("{}; {kept}", fault.what), ..fault })
    }

    /// A run whose device failed it, out of memory above all, leaves the state it came to, unless an update was cut short.
    fn out_of_memory(&mut self, fault: Fault, source: &dyn BatchSource, metrics: &mut Metrics) -> Error {
        let torn = self.torn;
        let mut save = || {
            self.tell(source, metrics)?;
            self.settle(source)?;
            self.write_state(metrics)
        };
        let saved = !torn && save().is_ok();
        let newest = self.states.steps().unwrap_or_default().last().map(|&step| self.states.path(step));
        let kept = match (saved, newest) {
            (true, _) => format!("the state of step {} is saved", self.ledger.step),
            (false, Some(path)) => format!("the last state is {}", path.display()),
            (false, None) => "no state was saved".into(),
        };
        let what = format!("{}; {kept}", fault.what);
        // A fault without a way out is none of memory.
        let hint = match fault.hint.is_empty() || self.run.advice.is_empty() {
            true => fault.hint,
            false => {
                format!("{}; the run goes on with --resume where training.recompute alone is changed", self.run.advice)
            }
        };
        Error::Device(Fault { what, hint, ..fault })
    }

    /// The mean loss over the trained tokens of the eval set. A signal ends it without a result; it is then still due.
    fn evaluate(&mut self, source: &dyn BatchSource, metrics: &mut Metrics) -> Result<()> {
        let began = Instant::now();
        let over_the_set = || {
            let (mut sum, mut tokens) = (0.0, 0u64);
            for batch in source.evaluation()? {
                let batch = batch?;
                let loss = || Ok(no_grad(|| self.learner.loss(&batch, None, 1.0).value).double_value(&[]));
                sum += catching(&place(&batch), loss)?;
                tokens += batch.rows.size()[0] as u64;
                if self.run.interrupts.received().is_some() {
                    return Ok(None);
                }
            }
            Ok::<_, Error>(Some((sum, tokens)))
        };
        let Some((sum, tokens)) = self.optimizer.at_evaluated(over_the_set)? else { return Ok(()) };
        if tokens == 0 {
            return Err(Error::Data(Fault::new("the eval set", "has no trained token")));
        }
        let eval_loss = sum / tokens as f64;
        if !eval_loss.is_finite() {
            // Steps that were not finite say more, where there were too many.
            self.settle(source)?;
            let what = format!("the loss of the eval set is {eval_loss}, over {tokens} tokens");
            return Err(not_finite(self.ledger.step, what));
        }
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

    /// Saves the last state, takes the best parameters if the recipe says so, and writes the report.
    fn finish(&mut self, source: &dyn BatchSource, metrics: &mut Metrics) -> Result<Outcome> {
        self.settle(source)?;
        if self.ledger.nonfinite_in_a_row > 0 {
            let what = format!(
                "the run ends with {} step(s) in a row whose loss or gradient is not finite; none of them changed the adapter",
                self.ledger.nonfinite_in_a_row
            );
            return Err(not_finite(self.ledger.step, what));
        }
        self.save(source, metrics)?;
        let taken = self.ledger.taken(self.run.training.load_best_model_at_end);
        let adapter = match taken == self.ledger.step {
            true => self.optimizer.evaluated(),
            false => self.states.load(taken)?.adapter,
        };
        restore(&self.parameters, &adapter, &self.states.path(taken))?;
        self.note_time();
        let outcome = Outcome::of(&self.ledger, taken, &self.states);
        report::write(&self.run.folder.path, &self.run.facts, &self.run.identity.recipe, &outcome)?;
        metrics.tell(&Event::End(&outcome))?;
        Ok(outcome)
    }

    /// Notes the time and the energy that all parts of the run have taken.
    fn note_time(&mut self) {
        self.ledger.elapsed_seconds = self.elapsed();
        // A part on a machine that does not count leaves what was counted before.
        self.ledger.energy = match &self.meter {
            Some(meter) => Some(meter.energy(self.energy_before.as_ref())),
            None => self.energy_before.clone(),
        };
    }

    fn elapsed(&self) -> f64 {
        self.elapsed_before + self.began.elapsed().as_secs_f64()
    }

    fn device(&self) -> Device {
        device_of(&self.parameters)
    }
}

fn device_of(parameters: &[(String, Tensor)]) -> Device {
    parameters.first().map_or(Device::Cpu, |(_, tensor)| tensor.device())
}

fn not_finite(step: u64, what: String) -> Error {
    let hint = "lower training.learning_rate, look at the rows with `engraft preview`, or use dtype bf16 or fp32";
    Error::Diverged(Fault::new(format_args!("step {step}"), what).hint(hint))
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
