//! Progress for a person, on standard error: a bar on a terminal, a line now and then elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

use super::metrics::{Event, StepRecord};

/// How often a line is written where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Shows how far a run is.
pub struct Progress {
    shown: Shown,
}

enum Shown {
    Bar(ProgressBar),
    Lines { total: u64, began: Instant, first: u64, last: Option<Instant> },
    Nothing,
}

impl Progress {
    /// A bar when standard error is a terminal, lines otherwise.
    pub fn new() -> Self {
        let lines = Shown::Lines { total: 0, began: Instant::now(), first: 0, last: None };
        Self { shown: if std::io::stderr().is_terminal() { Shown::Bar(ProgressBar::new(0)) } else { lines } }
    }

    /// Shows nothing.
    pub fn silent() -> Self {
        Self { shown: Shown::Nothing }
    }

    /// Says something in words, whatever else is shown.
    pub fn say(&self, message: &str) {
        match &self.shown {
            Shown::Bar(bar) => bar.println(message),
            // A closed standard error is no reason to stop.
            Shown::Lines { .. } => drop(writeln!(std::io::stderr(), "{message}")),
            Shown::Nothing => {}
        }
    }

    /// Shows what an event changes.
    pub fn tell(&mut self, event: &Event) {
        match event {
            Event::Start { step, total_steps, trained_parameters, .. } => {
                self.start(*step, *total_steps);
                let from = if *step == 0 { String::new() } else { format!(" from step {step}") };
                self.say(&format!("training {trained_parameters} parameters for {total_steps} steps{from}"));
            }
            Event::Step(record) => self.step(record),
            Event::Eval(record) => self.say(&format!(
                "step {}: eval loss {:.4} over {} tokens in {:.1} s",
                record.step, record.eval_loss, record.eval_tokens, record.eval_seconds
            )),
            Event::State { step, path } => self.say(&format!("step {step}: saved {}", path.display())),
            Event::Notice { message } => self.say(message),
            // The verb says these itself: they lie before and after the training.
            Event::Dataset { .. }
            | Event::MemoryPlan(_)
            | Event::Memory { .. }
            | Event::Wrote { .. }
            | Event::Error { .. } => {}
            Event::End(outcome) => {
                if let Shown::Bar(bar) = &self.shown {
                    bar.finish_and_clear();
                }
                self.say(&outcome.to_string());
            }
        }
    }

    fn start(&mut self, step: u64, total_steps: u64) {
        match &mut self.shown {
            Shown::Bar(bar) => {
                let style = ProgressStyle::with_template("{bar:28} {pos}/{len}  {msg}  {eta} left");
                bar.set_style(style.expect("the template is one of indicatif's examples with fewer fields"));
                bar.set_length(total_steps);
                bar.set_position(step);
                bar.reset_eta();
                bar.enable_steady_tick(Duration::from_secs(1));
            }
            Shown::Lines { total, began, first, .. } => (*total, *began, *first) = (total_steps, Instant::now(), step),
            Shown::Nothing => {}
        }
    }

    fn step(&mut self, record: &StepRecord) {
        let balance = record.router_aux_loss.map(|value| format!("balance {value:.3}  ")).unwrap_or_default();
        let numbers = format!(
            "loss {:.4}  {balance}rate {:.2e}  gradient norm {:.3}  {:.0} tokens/s",
            record.loss, record.learning_rate, record.grad_norm, record.tokens_per_second
        );
        match &mut self.shown {
            Shown::Bar(bar) => {
                bar.set_message(numbers);
                bar.set_position(record.step);
            }
            Shown::Lines { total, began, first, last } => {
                let due = last.is_none_or(|last| last.elapsed() >= LINE_EVERY) || record.step == *total;
                if !due {
                    return;
                }
                *last = Some(Instant::now());
                let done = record.step.saturating_sub(*first).max(1);
                let left = began.elapsed().mul_f64(total.saturating_sub(record.step) as f64 / done as f64);
                let line = format!("step {}/{total}  {numbers}  {} left", record.step, HumanDuration(left));
                self.say(&line);
            }
            Shown::Nothing => {}
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}
