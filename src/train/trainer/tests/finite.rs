//! Numbers that are not finite.

use std::path::Path;

use serde_json::Value;

use super::toy::{Toy, Toys, finishes_the_same, run_of, series, train, training, uninterrupted};
use crate::train::Start;
use crate::train::state::Newest;
use crate::train::trainer::*;
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
