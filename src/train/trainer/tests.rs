//! The trainer on a toy: a low-rank update of a bigram model, with dropout drawn from the seed as the real one's is.

use std::cell::Cell;
use std::fs;
use std::io;
use std::path::Path;
use std::rc::Rc;

use serde_json::{Value, json};
use tch::Kind;

use super::*;
use crate::model::Documents;
use crate::train::disk::faults;
use crate::train::state::Newest;
use crate::train::{LossSum, MicroBatches};

const VOCABULARY: i64 = 11;
const WIDTH: i64 = 6;

struct Toy {
    embedding: Tensor,
    base: Tensor,
    a: Tensor,
    b: Tensor,
    dropout: bool,
    /// Rows whose loss is not a number.
    poisoned: Vec<u64>,
    /// Whether the loss of an evaluation is not a number.
    eval_poisoned: bool,
    /// A loss scale beyond which gradients overflow, as fp16's do.
    overflows_beyond: f64,
}

impl Toy {
    fn new() -> Self {
        let wave = |rows: i64, columns: i64, speed: f64| {
            (Tensor::arange(rows * columns, (Kind::Float, Device::Cpu)) * speed).sin().reshape([rows, columns])
        };
        Self {
            embedding: wave(VOCABULARY, WIDTH, 1.7),
            base: wave(VOCABULARY, WIDTH, 0.9),
            a: wave(3, WIDTH, 2.3).set_requires_grad(true),
            b: Tensor::zeros([VOCABULARY, 3], (Kind::Float, Device::Cpu)).set_requires_grad(true),
            dropout: true,
            poisoned: Vec::new(),
            eval_poisoned: false,
            overflows_beyond: f64::INFINITY,
        }
    }

    fn numbers(&self) -> Vec<f32> {
        let (a, b) = (self.a.detach().flatten(0, -1), self.b.detach().flatten(0, -1));
        Vec::try_from(Tensor::cat(&[a, b], 0)).unwrap()
    }
}

impl Learner for Toy {
    fn parameters(&self) -> Vec<(String, Tensor)> {
        vec![("toy.a".into(), self.a.shallow_clone()), ("toy.b".into(), self.b.shallow_clone())]
    }

    fn loss(&self, batch: &Batch, dropout_seed: Option<u64>, scale: f64) -> Tensor {
        let mut hidden = self.embedding.index_select(0, &batch.ids);
        if let (Some(seed), true) = (dropout_seed, self.dropout) {
            let kept: Vec<f32> =
                (0..hidden.numel() as u64).map(|i| f32::from(!mix(seed ^ i).is_multiple_of(4))).collect();
            hidden *= Tensor::from_slice(&kept).reshape_as(&hidden) / 0.75;
        }
        let rows = hidden.index_select(0, &batch.rows);
        let logits = rows.matmul(&self.base.tr()) + rows.matmul(&self.a.tr()).matmul(&self.b.tr());
        let chosen = logits.log_softmax(-1, Kind::Float).gather(-1, &batch.targets.unsqueeze(-1), false);
        let mut loss = chosen.sum(Kind::Float) * -scale;
        if batch.origins.iter().any(|origin| self.poisoned.contains(&origin.row)) && dropout_seed.is_some() {
            loss *= f64::NAN;
        }
        if self.eval_poisoned && dropout_seed.is_none() {
            loss *= f64::NAN;
        }
        if scale * batch.rows.size()[0] as f64 > self.overflows_beyond {
            loss += (&self.b - self.b.detach()).sum(Kind::Float) * f64::from(f32::MAX);
        }
        loss
    }
}

/// Documents made from their number, `per_batch` to a micro-batch, in another order in every pass.
struct Toys {
    documents: u64,
    per_batch: u64,
    evaluation: bool,
    /// Ends the run with an error before the micro-batch of this count, as a kill would.
    killed_before: Option<u64>,
    /// Asks the run to stop when the micro-batch of this count is read.
    interrupts: Option<(Interrupts, u64)>,
    /// Likewise when an evaluation is read.
    interrupts_evaluation: Option<Interrupts>,
    read: Rc<Cell<u64>>,
}

impl Toys {
    fn new() -> Self {
        Self {
            documents: 10,
            per_batch: 2,
            evaluation: true,
            killed_before: None,
            interrupts: None,
            interrupts_evaluation: None,
            read: Rc::default(),
        }
    }

    fn batch(&self, epoch: u64, index: u64) -> Batch {
        let numbers =
            (index * self.per_batch..(index + 1) * self.per_batch).map(|i| (i * 7 + epoch * 3) % self.documents);
        document_batch(numbers.collect())
    }
}

fn document_batch(documents: Vec<u64>) -> Batch {
    let (mut ids, mut positions, mut offsets, mut rows, mut targets) = (vec![], vec![], vec![0], vec![], vec![]);
    for number in &documents {
        let length = 3 + number % 4;
        for i in 0..length {
            let token = |i: u64| ((number * 5 + i * 3) % VOCABULARY as u64) as i64;
            if i + 1 < length && (i + number) % 3 != 0 {
                rows.push(ids.len() as i64);
                targets.push(token(i + 1));
            }
            ids.push(token(i));
            positions.push(i as i64);
        }
        offsets.push(ids.len() as i64);
    }
    Batch {
        ids: Tensor::from_slice(&ids),
        positions: Tensor::from_slice(&positions),
        documents: Documents { offsets },
        rows: Tensor::from_slice(&rows),
        targets: Tensor::from_slice(&targets),
        origins: documents.into_iter().map(|row| RowId { file: 0, row }).collect(),
    }
}

impl BatchSource for Toys {
    fn micro_batches(&self, _epoch: u64) -> Result<u64> {
        Ok(self.documents / self.per_batch)
    }

    fn batches<'a>(&'a self, from: Cursor) -> Result<MicroBatches<'a>> {
        let in_pass = self.documents / self.per_batch;
        let first = from.epoch * in_pass + from.micro_batch;
        Ok(Box::new((first..).map(move |count| {
            if self.killed_before.is_some_and(|killed| count >= killed) {
                return Err(Error::Data(Fault::new("test", "killed")));
            }
            if let Some((interrupts, at)) = &self.interrupts
                && count == *at
            {
                interrupts.raise(libc::SIGTERM);
            }
            self.read.set(self.read.get() + 1);
            Ok(self.batch(count / in_pass, count % in_pass))
        })))
    }

    fn has_evaluation(&self) -> bool {
        self.evaluation
    }

    fn evaluation<'a>(&'a self) -> Result<MicroBatches<'a>> {
        if let Some(interrupts) = &self.interrupts_evaluation {
            interrupts.raise(libc::SIGINT);
        }
        Ok(Box::new([vec![3, 4], vec![8]].into_iter().map(|documents| Ok(document_batch(documents)))))
    }

    fn describe(&self, row: RowId) -> String {
        format!("toys row {}", row.row)
    }
}

/// Three passes of five micro-batches, two to a step: 9 steps, the third of every pass a smaller one.
fn training() -> TrainingRecipe {
    TrainingRecipe {
        epochs: 3.0,
        gradient_accumulation_steps: 2,
        learning_rate: 0.05,
        weight_decay: 0.01,
        warmup_steps: Some(2),
        save_steps: Some(2),
        ..Default::default()
    }
}

fn run_of(folder: &Path, start: Start, training: &TrainingRecipe) -> Run {
    Run {
        folder: RunFolder::open(folder, start).unwrap(),
        identity: Identity {
            recipe: json!({ "training": serde_json::to_value(training).unwrap() }),
            data: "toys".into(),
            eval: Some("held out".into()),
            base: "toy".into(),
            device: "cpu".into(),
        },
        training: training.clone(),
        half: false,
        tensorboard: true,
        events: Events::default(),
        progress: Progress::silent(),
        interrupts: Interrupts::default(),
        facts: Vec::new(),
    }
}

fn train(folder: &Path, start: Start, toy: &Toy, toys: &Toys) -> Result<Outcome> {
    Trainer::new(run_of(folder, start, &training()), toy).run(toys)
}

/// The numbers of a run that must not depend on when it was stopped.
fn series(folder: &Path) -> Vec<Value> {
    let text = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let kept =
        ["step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens", "eval_loss", "eval_tokens"];
    let strip = |line: &str| {
        let record: serde_json::Map<String, Value> = serde_json::from_str(line).unwrap();
        Value::Object(record.into_iter().filter(|(key, _)| kept.contains(&key.as_str())).collect())
    };
    text.lines().map(strip).collect()
}

/// The run nobody stopped: final numbers and series.
fn uninterrupted() -> (Vec<f32>, Vec<Value>) {
    let folder = tempfile::tempdir().unwrap();
    let toy = Toy::new();
    let outcome = train(folder.path(), Start::Fresh, &toy, &Toys::new()).unwrap();
    assert_eq!((outcome.steps, outcome.taken, outcome.skipped_steps), (9, 9, 0));
    assert!(folder.path().join("report.html").exists());
    (toy.numbers(), series(folder.path()))
}

/// Finishes what is in `folder` with a fresh model and compares with the run nobody stopped.
fn finishes_the_same(folder: &Path, expected: &(Vec<f32>, Vec<Value>), when: &str) {
    let toy = Toy::new();
    train(folder, Start::Resume, &toy, &Toys::new()).unwrap();
    assert_eq!(series(folder), expected.1, "{when}");
    assert_eq!(toy.numbers(), expected.0, "{when}");
}

#[test]
fn the_toy_learns() {
    let (_, series) = uninterrupted();
    let losses: Vec<f64> = series.iter().filter_map(|record| record["eval_loss"].as_f64()).collect();
    assert_eq!(losses.len(), 3);
    assert!(losses[2] < losses[0] && losses[0] > 0.5, "{losses:?}");
    assert_eq!(series.len(), 12);
    assert_eq!(series[11]["epoch"], 3.0);
}

#[test]
fn killed_at_any_micro_batch_a_resumed_run_equals_the_uninterrupted_one() {
    let expected = uninterrupted();
    for killed in 0..15 {
        let folder = tempfile::tempdir().unwrap();
        let toys = Toys { killed_before: Some(killed), ..Toys::new() };
        train(folder.path(), Start::Fresh, &Toy::new(), &toys).unwrap_err();
        finishes_the_same(folder.path(), &expected, &format!("killed before micro-batch {killed}"));
    }
}

#[test]
fn killed_at_any_write_a_resumed_run_equals_the_uninterrupted_one() {
    // One pass of three steps, a state after each, one kept besides the best.
    let training = TrainingRecipe { epochs: 1.0, save_steps: Some(1), save_total_limit: 1, ..training() };
    let train = |folder: &Path, start, left: u64| {
        let run = run_of(folder, start, &training);
        let toy = Toy::new();
        let mut left = left;
        let killed = move |_: &str, _: &Path| {
            left = left.checked_sub(1).ok_or_else(|| io::Error::other("killed"))?;
            Ok(())
        };
        let result = faults::with(killed, || Trainer::new(run, &toy).run(&Toys::new()));
        result.map(|_| (series(folder), toy.numbers()))
    };
    let never = u64::MAX;
    let expected = train(tempfile::tempdir().unwrap().path(), Start::Fresh, never).unwrap();
    for operations in 0.. {
        let folder = tempfile::tempdir().unwrap();
        if train(folder.path(), Start::Fresh, operations).is_ok() {
            assert!(operations > 40, "only {operations} operations were tried");
            break;
        }
        let resumed = train(folder.path(), Start::Resume, never).unwrap();
        assert!(resumed == expected, "killed before operation {operations}");
    }
}

#[test]
fn a_signal_finishes_the_step_saves_and_a_resumed_run_equals_the_uninterrupted_one() {
    let expected = uninterrupted();
    for at in 0..15 {
        let folder = tempfile::tempdir().unwrap();
        let mut run = run_of(folder.path(), Start::Fresh, &training());
        let toys = Toys { interrupts: Some((run.interrupts.share(), at)), ..Toys::new() };
        run.interrupts = toys.interrupts.as_ref().unwrap().0.share();
        let error = Trainer::new(run, &Toy::new()).run(&toys).unwrap_err();
        assert!(matches!(&error, Error::Interrupted(fault) if fault.what.starts_with("SIGTERM")), "{error}");
        assert_eq!(error.exit_code(), 75);
        assert!(toys.read.get() <= at + 2, "no further step is begun");
        finishes_the_same(folder.path(), &expected, &format!("interrupted at micro-batch {at}"));
    }
}

#[test]
fn a_signal_during_an_evaluation_leaves_it_to_the_resumed_run() {
    let expected = uninterrupted();
    let folder = tempfile::tempdir().unwrap();
    let run = run_of(folder.path(), Start::Fresh, &training());
    let toys = Toys { interrupts_evaluation: Some(run.interrupts.share()), ..Toys::new() };
    let error = Trainer::new(run, &Toy::new()).run(&toys).unwrap_err();
    assert!(error.to_string().contains("SIGINT stopped the run after step 3"), "{error}");
    assert!(series(folder.path()).iter().all(|record| record.get("eval_loss").is_none()));
    finishes_the_same(folder.path(), &expected, "interrupted in an evaluation");
}

#[test]
fn a_damaged_newest_state_is_passed_over_and_said_so() {
    let expected = uninterrupted();
    let folder = tempfile::tempdir().unwrap();
    let toys = Toys { killed_before: Some(8), ..Toys::new() };
    train(folder.path(), Start::Fresh, &Toy::new(), &toys).unwrap_err();
    let states = States::of(folder.path());
    let newest = *states.steps().unwrap().last().unwrap();
    let path = states.path(newest).join("optimizer.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();

    let toy = Toy::new();
    let mut trainer = Trainer::new(run_of(folder.path(), Start::Resume, &training()), &toy);
    let mut notices = Vec::new();
    trainer.resume(&mut notices).unwrap();
    assert!(trainer.ledger.step < newest);
    assert!(notices[0].contains("damaged") && notices[0].contains("optimizer.safetensors"), "{notices:?}");
    drop(trainer);
    finishes_the_same(folder.path(), &expected, "fell back");
}

#[test]
fn a_finished_run_resumes_to_its_end() {
    let expected = uninterrupted();
    let folder = tempfile::tempdir().unwrap();
    train(folder.path(), Start::Fresh, &Toy::new(), &Toys::new()).unwrap();
    finishes_the_same(folder.path(), &expected, "nothing left to do");
}

#[test]
fn resuming_without_a_state_begins_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let toy = Toy::new();
    let mut trainer = Trainer::new(run_of(folder.path(), Start::Resume, &training()), &toy);
    let mut notices = Vec::new();
    trainer.resume(&mut notices).unwrap();
    assert!(notices[0].contains("nothing to resume"), "{notices:?}");
}

#[test]
fn resuming_refuses_another_recipe_data_or_adapter_and_states_the_weaker_promise_on_another_device() {
    let folder = tempfile::tempdir().unwrap();
    train(folder.path(), Start::Fresh, &Toy::new(), &Toys::new()).unwrap();
    let before = fs::read(folder.path().join("metrics.jsonl")).unwrap();
    let resume = |change: &dyn Fn(&mut Run)| {
        let toy = Toy::new();
        let mut run = run_of(folder.path(), Start::Resume, &training());
        change(&mut run);
        let mut notices = Vec::new();
        Trainer::new(run, &toy).resume(&mut notices).map(|()| notices)
    };
    type Change<'a> = &'a dyn Fn(&mut Run);
    let changes: [(Change, &str); 4] = [
        (&|run| run.identity.recipe["training"]["seed"] = 7.into(), "training.seed was 42, it is 7"),
        (&|run| run.identity.data = "other".into(), "dataset has changed"),
        (&|run| run.identity.eval = None, "eval set has changed: its fingerprint was held out, it is none"),
        (&|run| run.identity.base = "other".into(), "base model has changed"),
    ];
    for (change, expected) in changes {
        let error = resume(change).unwrap_err();
        assert!(matches!(error, Error::State(_)));
        assert!(error.to_string().contains(expected), "{error}");
    }
    let notices = resume(&|run| run.identity.device = "cuda".into()).unwrap();
    assert!(notices[0].contains("saved on cpu, this is cuda"), "{notices:?}");
    let mut wider = Toy::new();
    wider.b = Tensor::zeros([VOCABULARY, 4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let error = Trainer::new(run_of(folder.path(), Start::Resume, &training()), &wider).run(&Toys::new()).unwrap_err();
    assert!(error.to_string().contains("`toy.b` has shape [11, 3], expected [11, 4]"), "{error}");
    assert_eq!(fs::read(folder.path().join("metrics.jsonl")).unwrap(), before, "a refusal touches nothing");
}

#[test]
fn accumulation_changes_neither_loss_nor_gradient() {
    let results = [(8, 1), (4, 2), (2, 4), (1, 8)].map(|(per_batch, gradient_accumulation_steps)| {
        let folder = tempfile::tempdir().unwrap();
        let toy = Toy { dropout: false, ..Toy::new() };
        let toys = Toys { documents: 16, per_batch, ..Toys::new() };
        let training = TrainingRecipe { gradient_accumulation_steps, ..training() };
        Trainer::new(run_of(folder.path(), Start::Fresh, &training), &toy).run(&toys).unwrap();
        (series(folder.path()), toy.numbers())
    });
    let (expected, numbers) = &results[0];
    assert_eq!(expected.len(), 9);
    for (series, other) in &results[1..] {
        for (record, expected) in series.iter().zip(expected) {
            for key in ["loss", "grad_norm", "eval_loss"] {
                let (Some(found), Some(expected)) = (record[key].as_f64(), expected[key].as_f64()) else { continue };
                assert!((found - expected).abs() < 2e-6 * expected.abs(), "{key}: {record} is not {expected}");
            }
            assert_eq!(record["trained_tokens"], expected["trained_tokens"]);
        }
        assert!(other.iter().zip(numbers).all(|(a, b)| (a - b).abs() < 1e-5));
    }
}

#[test]
fn a_loss_that_stays_not_finite_ends_the_run_with_step_rows_and_last_state() {
    // With a state of every other step, room for one; with none at all; and with the numbers read late.
    for (save_steps, logging_steps) in [(Some(2), 1), (None, 1), (None, 100)] {
        let folder = tempfile::tempdir().unwrap();
        let training = TrainingRecipe {
            gradient_accumulation_steps: 1,
            max_nonfinite_steps: 2,
            save_steps,
            save_total_limit: 1,
            logging_steps,
            eval_steps: Some(5),
            ..training()
        };
        // Pass 0 reads rows 0 7, 4 1, 8 5, 2 9, 6 3.
        let toy = Toy { poisoned: vec![8, 9], ..Toy::new() };
        let error = Trainer::new(run_of(folder.path(), Start::Fresh, &training), &toy).run(&Toys::new()).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Diverged(_)));
        assert!(
            text.contains("step 4") && text.contains("toys row 2, toys row 9") && text.contains("2 in a row"),
            "{text}"
        );
        // Read late, the numbers are those of step 5 and before.
        let kept = if logging_steps == 1 { 4 } else { 5 };
        assert!(
            text.contains(&format!("the last state is {}", States::of(folder.path()).path(kept).display())),
            "{text}"
        );
        let states = States::of(folder.path());
        let all: Vec<u64> = save_steps.into_iter().chain([kept]).collect();
        assert_eq!(states.steps().unwrap(), all, "the state before does not make room for it");
        let Newest { state, .. } = states.newest().unwrap().unwrap();
        assert_eq!(state.ledger.skipped_steps, 2);
        let flat: Vec<_> = state.adapter.iter().map(|(_, tensor)| tensor.flatten(0, -1)).collect();
        let saved = Vec::<f32>::try_from(Tensor::cat(&flat, 0)).unwrap();
        assert_eq!(saved, toy.numbers(), "neither step changed the adapter");
        if logging_steps == 1 {
            assert_eq!(series(folder.path())[2]["loss"], Value::Null);
        }
    }
}

#[test]
fn an_evaluation_or_a_last_step_that_is_not_finite_ends_the_run_as_diverged() {
    let folder = tempfile::tempdir().unwrap();
    let toy = Toy { eval_poisoned: true, ..Toy::new() };
    let error = train(folder.path(), Start::Fresh, &toy, &Toys::new()).unwrap_err();
    let expected = "step 3: the loss of the eval set is NaN";
    assert!(matches!(&error, Error::Diverged(_)) && error.to_string().starts_with(expected), "{error}");
    assert!(error.to_string().contains("step-000003"), "{error}");
    // It is judged again by a run that goes on, and no number of it was logged.
    let again = train(folder.path(), Start::Resume, &toy, &Toys::new()).unwrap_err();
    assert!(again.to_string().starts_with(expected), "{again}");
    assert!(series(folder.path()).iter().all(|record| record.get("eval_loss").is_none()));
    finishes_the_same(folder.path(), &uninterrupted(), "the eval set is good again");

    // The last step reads rows 2 9.
    let folder = tempfile::tempdir().unwrap();
    let toy = Toy { poisoned: vec![9], ..Toy::new() };
    let training = TrainingRecipe { max_steps: Some(2), ..training() };
    let error = Trainer::new(run_of(folder.path(), Start::Fresh, &training), &toy).run(&Toys::new()).unwrap_err();
    assert!(error.to_string().starts_with("step 2: the run ends with 1 step(s)"), "{error}");
    assert_eq!(error.exit_code(), 9);
    assert!(!folder.path().join("report.html").exists());
}

#[test]
fn parameters_that_are_not_finite_are_no_state() {
    let folder = tempfile::tempdir().unwrap();
    let toy = Toy::new();
    let training = TrainingRecipe { learning_rate: f64::INFINITY, warmup_steps: None, ..training() };
    let error = Trainer::new(run_of(folder.path(), Start::Fresh, &training), &toy).run(&Toys::new()).unwrap_err();
    assert!(error.to_string().contains("no state was saved"), "{error}");
    assert_eq!(error.exit_code(), 9);
}

#[test]
fn the_logged_loss_is_that_of_all_steps_since_the_last_one() {
    let losses = |logging_steps, poisoned: Vec<u64>| {
        let folder = tempfile::tempdir().unwrap();
        let toy = Toy { poisoned, ..Toy::new() };
        let training = TrainingRecipe { logging_steps, ..training() };
        Trainer::new(run_of(folder.path(), Start::Fresh, &training), &toy).run(&Toys::new()).unwrap();
        let mut steps = series(folder.path());
        steps.retain(|record| record.get("eval_loss").is_none());
        (steps, toy.numbers())
    };
    // Row 8 is in step 2 of every pass.
    for poisoned in [vec![], vec![8]] {
        let (every, expected) = losses(1, poisoned.clone());
        let (windows, numbers) = losses(4, poisoned);
        assert_eq!(numbers, expected, "what is logged changes nothing");
        assert_eq!(windows.iter().map(|record| record["step"].as_u64().unwrap()).collect::<Vec<_>>(), [4, 8, 9]);
        let mut begin = 0;
        for window in &windows {
            let end = window["step"].as_u64().unwrap() as usize;
            let tokens = |at: usize| if at == 0 { 0 } else { every[at - 1]["trained_tokens"].as_u64().unwrap() };
            let mut sum = LossSum::default();
            for (at, record) in every.iter().enumerate().take(end).skip(begin) {
                if let Some(loss) = record["loss"].as_f64() {
                    sum.add(loss, tokens(at + 1) - tokens(at));
                }
            }
            let found = window["loss"].as_f64().unwrap();
            assert!((found - sum.mean().unwrap()).abs() < 1e-12, "steps {begin} to {end}: {found} is not {sum:?}");
            assert_eq!(window["grad_norm"], every[end - 1]["grad_norm"], "the norm is the last step's");
            begin = end;
        }
    }
}

#[test]
fn a_state_saved_between_two_logged_steps_resumes_to_the_same_metrics() {
    let training = TrainingRecipe { logging_steps: 4, save_steps: Some(1), ..training() };
    let run = |folder: &Path, start, toys: &Toys| {
        let toy = Toy::new();
        (Trainer::new(run_of(folder, start, &training), &toy).run(toys), toy.numbers())
    };
    let whole = tempfile::tempdir().unwrap();
    let (_, expected) = run(whole.path(), Start::Fresh, &Toys::new());
    for killed_before in 1..15 {
        let folder = tempfile::tempdir().unwrap();
        run(folder.path(), Start::Fresh, &Toys { killed_before: Some(killed_before), ..Toys::new() }).0.unwrap_err();
        let (_, numbers) = run(folder.path(), Start::Resume, &Toys::new());
        assert!(numbers == expected && series(folder.path()) == series(whole.path()), "killed before {killed_before}");
    }
}

#[test]
fn a_new_run_in_an_old_ones_folder_removes_it_only_when_nothing_can_refuse_it() {
    let folder = tempfile::tempdir().unwrap();
    train(folder.path(), Start::Fresh, &Toy::new(), &Toys::new()).unwrap();
    let toy = Toy::new();
    drop(Trainer::new(run_of(folder.path(), Start::Overwrite, &training()), &toy));
    assert!(States::of(folder.path()).steps().unwrap().contains(&9), "a run that never began");
    Trainer::new(run_of(folder.path(), Start::Overwrite, &training()), &toy)
        .run(&Toys { killed_before: Some(0), ..Toys::new() })
        .unwrap_err();
    assert!(States::of(folder.path()).steps().unwrap().is_empty());
}

#[test]
fn a_single_step_that_is_not_finite_is_skipped_and_counted_also_when_nobody_looks_at_every_step() {
    for logging_steps in [1, 4, 100] {
        let folder = tempfile::tempdir().unwrap();
        let toy = Toy { poisoned: vec![8], ..Toy::new() };
        let training = TrainingRecipe { logging_steps, ..training() };
        let outcome = Trainer::new(run_of(folder.path(), Start::Fresh, &training), &toy).run(&Toys::new()).unwrap();
        assert_eq!(outcome.skipped_steps, 3, "row 8 comes once in every pass");
        assert!(toy.numbers().iter().all(|number| number.is_finite()));
    }
}

#[test]
fn fp16_finds_its_loss_scale_and_a_resumed_run_remembers_it() {
    let half = |start, folder: &Path, toys: &Toys| {
        let toy = Toy { overflows_beyond: 5000.0, ..Toy::new() };
        let run = Run { half: true, ..run_of(folder, start, &training()) };
        let result = Trainer::new(run, &toy).run(toys);
        (result, toy.numbers())
    };
    let folder = tempfile::tempdir().unwrap();
    let (outcome, expected) = half(Start::Fresh, folder.path(), &Toys::new());
    let outcome = outcome.unwrap();
    assert!((1..=5).contains(&outcome.skipped_steps), "{outcome:?}");
    let Newest { state, .. } = States::of(folder.path()).newest().unwrap().unwrap();
    assert!(state.ledger.scaler.unwrap().scale < 65536.0);

    let other = tempfile::tempdir().unwrap();
    half(Start::Fresh, other.path(), &Toys { killed_before: Some(9), ..Toys::new() }).0.unwrap_err();
    let (_, numbers) = half(Start::Resume, other.path(), &Toys::new());
    assert_eq!(numbers, expected);
    assert_eq!(series(other.path()), series(folder.path()));
}

#[test]
fn fp16_that_overflows_at_any_scale_ends_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let toy = Toy { overflows_beyond: 0.0, ..Toy::new() };
    let run = Run { half: true, ..run_of(folder.path(), Start::Fresh, &TrainingRecipe { epochs: 20.0, ..training() }) };
    let error = Trainer::new(run, &toy).run(&Toys { evaluation: false, ..Toys::new() }).unwrap_err();
    assert!(
        matches!(&error, Error::Diverged(fault) if fault.place == "step 19"),
        "16 halvings, then 3 that count: {error}"
    );
}

#[test]
fn patience_stops_the_run_and_the_best_adapter_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let toy = Toy::new();
    // So high a rate that the loss soon rises.
    let training = TrainingRecipe {
        epochs: 40.0,
        learning_rate: 0.4,
        save_total_limit: 1,
        eval_steps: Some(1),
        early_stopping_patience: Some(3),
        load_best_model_at_end: true,
        ..training()
    };
    let outcome = Trainer::new(run_of(folder.path(), Start::Fresh, &training), &toy).run(&Toys::new()).unwrap();
    let best = outcome.best.unwrap();
    assert!(outcome.stopped_early && outcome.taken == best.step && best.step < outcome.steps, "{outcome:?}");
    let states = States::of(folder.path());
    assert_eq!(states.steps().unwrap(), [best.step, outcome.steps], "the best is kept besides the newest");
    let mut sum = 0.0;
    let mut tokens = 0;
    for batch in Toys::new().evaluation().unwrap().map(Result::unwrap) {
        sum += toy.loss(&batch, None, 1.0).double_value(&[]);
        tokens += batch.rows.size()[0];
    }
    assert!((sum / tokens as f64 - best.eval_loss).abs() < 1e-6, "the model has the best adapter");

    // Resumed, the same adapter is taken again.
    let again = Toy::new();
    Trainer::new(run_of(folder.path(), Start::Resume, &training), &again).run(&Toys::new()).unwrap();
    assert_eq!(again.numbers(), toy.numbers());
}

#[test]
fn steps_are_counted_by_passes_or_named() {
    let folder = tempfile::tempdir().unwrap();
    let toy = Toy::new();
    let count = |epochs, max_steps| {
        let training = TrainingRecipe { epochs, max_steps, ..training() };
        Trainer::new(run_of(folder.path(), Start::Fresh, &training), &toy).total_steps(&Toys::new()).unwrap()
    };
    assert_eq!(
        [count(1.0, None), count(3.0, None), count(1.5, None), count(0.1, None), count(3.0, Some(7))],
        [3, 9, 5, 1, 7]
    );
}

#[test]
fn a_step_without_a_trained_token_is_an_error_not_a_zero_loss() {
    struct Untrained;
    impl BatchSource for Untrained {
        fn micro_batches(&self, _epoch: u64) -> Result<u64> {
            Ok(1)
        }
        fn batches<'a>(&'a self, _from: Cursor) -> Result<MicroBatches<'a>> {
            let empty = || Tensor::zeros([0], (Kind::Int64, Device::Cpu));
            Ok(Box::new(std::iter::repeat_with(move || {
                Ok(Batch { rows: empty(), targets: empty(), ..document_batch(vec![5]) })
            })))
        }
        fn has_evaluation(&self) -> bool {
            false
        }
        fn evaluation<'a>(&'a self) -> Result<MicroBatches<'a>> {
            Ok(Box::new(std::iter::empty()))
        }
        fn describe(&self, row: RowId) -> String {
            format!("row {}", row.row)
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let error =
        Trainer::new(run_of(folder.path(), Start::Fresh, &training()), &Toy::new()).run(&Untrained).unwrap_err();
    assert!(matches!(&error, Error::Data(fault) if fault.place == "row 5"), "{error}");
}

#[test]
fn running_out_of_memory_is_an_error_that_leaves_the_state_alone() {
    struct Greedy(Toy);
    impl Learner for Greedy {
        fn parameters(&self) -> Vec<(String, Tensor)> {
            self.0.parameters()
        }
        fn loss(&self, batch: &Batch, dropout_seed: Option<u64>, scale: f64) -> Tensor {
            if batch.origins.iter().any(|origin| origin.row == 8) {
                let _ = Tensor::empty([1 << 60], (Kind::Float, Device::Cpu));
            }
            self.0.loss(batch, dropout_seed, scale)
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let training = TrainingRecipe { save_steps: Some(1), ..training() };
    let error = Trainer::new(run_of(folder.path(), Start::Fresh, &training), &Greedy(Toy::new()))
        .run(&Toys::new())
        .unwrap_err();
    assert!(matches!(&error, Error::Device(fault) if fault.place.contains("tokens in 2 documents")), "{error}");
    assert_eq!(States::of(folder.path()).steps().unwrap(), [1]);
}

#[test]
fn every_micro_batch_has_a_seed_of_its_own() {
    let mut seeds: Vec<u64> =
        (0..200).flat_map(|step| (0..8).map(move |index| dropout_seed(42, step, index))).collect();
    seeds.extend((0..200).map(|step| dropout_seed(43, step, 0)));
    let count = seeds.len();
    seeds.sort_unstable();
    seeds.dedup();
    assert_eq!(seeds.len(), count);
}
