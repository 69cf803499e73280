//! A low-rank update of a bigram model, with dropout drawn from the seed as the real one's is; and runs of it.

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::rc::Rc;

use serde_json::{Value, json};
use tch::Kind;

use crate::model::Documents;
use crate::train::trainer::seed::mix;
use crate::train::trainer::*;
use crate::train::{MicroBatches, Start};
pub(super) const VOCABULARY: i64 = 11;
pub(super) const WIDTH: i64 = 6;

pub(super) struct Toy {
    pub(super) embedding: Tensor,
    pub(super) base: Tensor,
    pub(super) a: Tensor,
    pub(super) b: Tensor,
    pub(super) dropout: bool,
    /// Rows whose loss is not a number.
    pub(super) poisoned: Vec<u64>,
    /// Whether the loss of an evaluation is not a number.
    pub(super) eval_poisoned: bool,
    /// A loss scale beyond which gradients overflow, as fp16's do.
    pub(super) overflows_beyond: f64,
    /// The micro-batch of this count, evaluations not counted, is given more memory than there is.
    pub(super) exhausted_at: Option<u64>,
    pub(super) seen: Cell<u64>,
}

impl Toy {
    pub(super) fn new() -> Self {
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
            exhausted_at: None,
            seen: Cell::default(),
        }
    }

    pub(super) fn numbers(&self) -> Vec<f32> {
        let (a, b) = (self.a.detach().flatten(0, -1), self.b.detach().flatten(0, -1));
        Vec::try_from(Tensor::cat(&[a, b], 0)).unwrap()
    }
}

impl Learner for Toy {
    fn parameters(&self) -> Vec<(String, Tensor)> {
        vec![("toy.a".into(), self.a.shallow_clone()), ("toy.b".into(), self.b.shallow_clone())]
    }

    fn loss(&self, batch: &Batch, dropout_seed: Option<u64>, scale: f64) -> Loss {
        if dropout_seed.is_some() {
            let seen = self.seen.replace(self.seen.get() + 1);
            if self.exhausted_at == Some(seen) {
                drop(Tensor::zeros([1 << 50], (Kind::Float, Device::Cpu)));
            }
        }
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
        // Something else that differs from token to token.
        Loss { value: loss, balance: dropout_seed.map(|_| batch.targets.sum(Kind::Float) * scale) }
    }
}

/// Documents made from their number, `per_batch` to a micro-batch, in another order in every pass.
pub(super) struct Toys {
    pub(super) documents: u64,
    pub(super) per_batch: u64,
    pub(super) evaluation: bool,
    /// Ends the run with an error before the micro-batch of this count, as a kill would.
    pub(super) killed_before: Option<u64>,
    /// Asks the run to stop when the micro-batch of this count is read.
    pub(super) interrupts: Option<(Interrupts, u64)>,
    /// Likewise when an evaluation is read.
    pub(super) interrupts_evaluation: Option<Interrupts>,
    pub(super) read: Rc<Cell<u64>>,
}

impl Toys {
    pub(super) fn new() -> Self {
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

    pub(super) fn batch(&self, epoch: u64, index: u64) -> Batch {
        let numbers =
            (index * self.per_batch..(index + 1) * self.per_batch).map(|i| (i * 7 + epoch * 3) % self.documents);
        document_batch(numbers.collect())
    }
}

pub(super) fn document_batch(documents: Vec<u64>) -> Batch {
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
pub(super) fn training() -> TrainingRecipe {
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

pub(super) fn run_of(folder: &Path, start: Start, training: &TrainingRecipe) -> Run {
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
        chosen: None,
        advice: "less would do".into(),
    }
}

pub(super) fn train(folder: &Path, start: Start, toy: &Toy, toys: &Toys) -> Result<Outcome> {
    Trainer::new(run_of(folder, start, &training()), toy).run(toys)
}

/// The numbers of a run that must not depend on when it was stopped.
pub(super) fn series(folder: &Path) -> Vec<Value> {
    let text = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let kept = [
        "step",
        "epoch",
        "loss",
        "router_aux_loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "trained_tokens",
        "eval_loss",
        "eval_tokens",
    ];
    let strip = |line: &str| {
        let record: serde_json::Map<String, Value> = serde_json::from_str(line).unwrap();
        Value::Object(record.into_iter().filter(|(key, _)| kept.contains(&key.as_str())).collect())
    };
    text.lines().map(strip).collect()
}

/// The run nobody stopped: final numbers and series.
pub(super) fn uninterrupted() -> (Vec<f32>, Vec<Value>) {
    let folder = tempfile::tempdir().unwrap();
    let toy = Toy::new();
    let outcome = train(folder.path(), Start::Fresh, &toy, &Toys::new()).unwrap();
    assert_eq!((outcome.steps, outcome.taken, outcome.skipped_steps), (9, 9, 0));
    assert!(folder.path().join("report.html").exists());
    (toy.numbers(), series(folder.path()))
}

/// Finishes what is in `folder` with a fresh model and compares with the run nobody stopped.
pub(super) fn finishes_the_same(folder: &Path, expected: &(Vec<f32>, Vec<Value>), when: &str) {
    let toy = Toy::new();
    train(folder, Start::Resume, &toy, &Toys::new()).unwrap();
    assert_eq!(series(folder), expected.1, "{when}");
    assert_eq!(toy.numbers(), expected.0, "{when}");
}
