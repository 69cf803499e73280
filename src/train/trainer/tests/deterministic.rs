//! What is said of `training.deterministic`, and that measuring it leaves no trace.

use std::cell::RefCell;

use super::toy::{Toy, Toys, run_of, series, training, uninterrupted};
use crate::train::Start;
use crate::train::trainer::*;

#[test]
fn measuring_its_cost_changes_nothing_and_leaves_it_on() {
    let folder = tempfile::tempdir().unwrap();
    let toy = Toy::new();
    let trainer = Trainer::new(run_of(folder.path(), Start::Fresh, &training()), &toy);
    let before = toy.numbers();
    let switched = RefCell::new(Vec::new());
    let cost = trainer.times_as_long(&Toys::new().batch(0, 0), &|on| switched.borrow_mut().push(on)).unwrap();
    assert!(cost > 0.0 && cost.is_finite(), "{cost}");
    assert_eq!(switched.into_inner(), [false, true, false, true, false, true, false, true, true]);
    assert!(toy.numbers() == before && !toy.a.grad().defined() && !toy.b.grad().defined());
}

#[test]
fn measuring_that_runs_out_of_memory_leaves_it_on_and_no_gradient() {
    let folder = tempfile::tempdir().unwrap();
    let toy = Toy { exhausted_at: Some(3), ..Toy::new() };
    let trainer = Trainer::new(run_of(folder.path(), Start::Fresh, &training()), &toy);
    let last = RefCell::new(None);
    let error = trainer.times_as_long(&Toys::new().batch(0, 0), &|on| *last.borrow_mut() = Some(on)).unwrap_err();
    assert_eq!((error.exit_code(), last.into_inner()), (8, Some(true)));
    assert!(!toy.a.grad().defined());
}

#[test]
fn on_the_cpu_it_costs_nothing_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let toy = Toy::new();
    let training = TrainingRecipe { deterministic: true, ..training() };
    Trainer::new(run_of(folder.path(), Start::Fresh, &training), &toy).run(&Toys::new()).unwrap();
    assert!((toy.numbers(), series(folder.path())) == uninterrupted());
    let report = std::fs::read_to_string(folder.path().join("report.html")).unwrap();
    assert!(report.contains("deterministic") && report.contains("nothing: on the CPU every run is"));
}
