//! The trainer on a toy.

mod deterministic;
mod finite;
mod optimizers;
mod resuming;
mod toy;

use tch::Kind;

use super::*;
use crate::train::{LossSum, MicroBatches, Start};
use toy::{Toy, Toys, document_batch, run_of, series, training, uninterrupted};

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
            for key in ["loss", "router_aux_loss", "grad_norm", "eval_loss"] {
                let (Some(found), Some(expected)) = (record[key].as_f64(), expected[key].as_f64()) else { continue };
                assert!((found - expected).abs() < 2e-6 * expected.abs(), "{key}: {record} is not {expected}");
            }
            assert_eq!(record["trained_tokens"], expected["trained_tokens"]);
        }
        assert!(other.iter().zip(numbers).all(|(a, b)| (a - b).abs() < 1e-5));
    }
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
            for key in ["loss", "router_aux_loss"] {
                let mut sum = LossSum::default();
                for (at, record) in every.iter().enumerate().take(end).skip(begin) {
                    if let Some(loss) = record[key].as_f64() {
                        sum.add(loss, tokens(at + 1) - tokens(at));
                    }
                }
                let found = window[key].as_f64().unwrap();
                let expected = sum.mean().unwrap();
                assert!((found - expected).abs() < 1e-12, "{key} of steps {begin} to {end}: {found} is not {sum:?}");
            }
            assert_eq!(window["grad_norm"], every[end - 1]["grad_norm"], "the norm is the last step's");
            begin = end;
        }
    }
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
        sum += toy.loss(&batch, None, 1.0).value.double_value(&[]);
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
        fn loss(&self, batch: &Batch, dropout_seed: Option<u64>, scale: f64) -> Loss {
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
