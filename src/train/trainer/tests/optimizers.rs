//! Every optimizer in a run: stopped and taken up, evaluated and left.

use std::path::Path;

use tch::Kind;

use super::toy::{Toy, Toys, VOCABULARY, WIDTH, run_of, series, train, training};
use crate::recipe::{Optimizer, Scheduler};
use crate::train::Start;
use crate::train::trainer::*;

/// A toy whose matrices are large enough for a state of 8 bits.
fn large_toy() -> Toy {
    let a = (Tensor::arange(700 * WIDTH, (Kind::Float, Device::Cpu)) * 2.3).sin().reshape([700, WIDTH]);
    let b = Tensor::zeros([VOCABULARY, 700], (Kind::Float, Device::Cpu));
    Toy { a: a.set_requires_grad(true), b: b.set_requires_grad(true), ..Toy::new() }
}

/// The mean over the trained tokens of the eval set, as the trainer takes it.
fn eval_loss(toy: &Toy) -> f64 {
    let (mut sum, mut tokens) = (0.0, 0);
    for batch in Toys::new().evaluation().unwrap() {
        let batch = batch.unwrap();
        sum += no_grad(|| toy.loss(&batch, None, 1.0).value).double_value(&[]);
        tokens += batch.rows.size()[0];
    }
    sum / tokens as f64
}

/// A recipe for every optimizer, two with LoRA+.
fn optimizers() -> Vec<TrainingRecipe> {
    let recipe = |optimizer, learning_rate| TrainingRecipe { optimizer, learning_rate, ..training() };
    let free = TrainingRecipe { lr_scheduler: Scheduler::Constant, ..recipe(Optimizer::ScheduleFreeAdamw, 1e-3) };
    vec![
        TrainingRecipe { loraplus_lr_ratio: Some(4.0), ..recipe(Optimizer::Adamw, 3e-4) },
        recipe(Optimizer::Adamw8bit, 1e-3),
        recipe(Optimizer::Adafactor, 1e-3),
        recipe(Optimizer::Lion, 3e-4),
        TrainingRecipe { momentum: Some(0.9), ..recipe(Optimizer::Sgd, 1e-3) },
        TrainingRecipe { loraplus_lr_ratio: Some(4.0), ..free.clone() },
        free,
        recipe(Optimizer::Muon, 1e-2),
    ]
}

#[test]
fn with_any_optimizer_a_killed_run_ends_as_the_uninterrupted_one_and_as_it_was_evaluated() {
    for training in optimizers() {
        let run = |folder: &Path, start, toys: &Toys| {
            let toy = large_toy();
            let outcome = Trainer::new(run_of(folder, start, &training), &toy).run(toys);
            outcome.map(|_| (toy.numbers(), series(folder), toy))
        };
        let folder = tempfile::tempdir().unwrap();
        let (numbers, all, toy) = run(folder.path(), Start::Fresh, &Toys::new()).unwrap();
        let when = format!("{:?}, B times {:?}", training.optimizer, training.loraplus_lr_ratio);
        let losses: Vec<f64> = all.iter().filter_map(|record| record["eval_loss"].as_f64()).collect();
        let before = eval_loss(&large_toy());
        assert!(losses.len() == 3 && losses[2] < before, "{when} learns: {before}, then {losses:?}");
        assert_eq!(eval_loss(&toy), losses[2], "{when}: what is left is what was evaluated");

        for killed in [6, 13] {
            let folder = tempfile::tempdir().unwrap();
            let toys = Toys { killed_before: Some(killed), ..Toys::new() };
            assert!(run(folder.path(), Start::Fresh, &toys).is_err());
            let (found, again, _) = run(folder.path(), Start::Resume, &Toys::new()).unwrap();
            assert_eq!(again, all, "{when}, killed before micro-batch {killed}");
            assert!(found == numbers, "{when}, killed before micro-batch {killed}");
        }
    }
}

#[test]
fn resuming_with_another_optimizer_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let toys = Toys { killed_before: Some(8), ..Toys::new() };
    train(folder.path(), Start::Fresh, &Toy::new(), &toys).unwrap_err();
    let other = TrainingRecipe { optimizer: Optimizer::Lion, ..training() };
    let toy = Toy::new();
    let mut trainer = Trainer::new(run_of(folder.path(), Start::Resume, &other), &toy);
    let error = trainer.resume(&mut Vec::new()).unwrap_err().to_string();
    assert!(error.contains("training.optimizer was \"adamw\", it is \"lion\""), "{error}");
}
