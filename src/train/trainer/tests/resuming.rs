//! A run that was stopped, however it was, ends as if it had not been.

use std::fs;
use std::io;
use std::path::Path;

use tch::Kind;

use super::toy::{Toy, Toys, VOCABULARY, finishes_the_same, run_of, series, train, training, uninterrupted};
use crate::train::Start;
use crate::train::disk::faults;
use crate::train::trainer::*;
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
fn out_of_memory_in_any_micro_batch_leaves_a_state_and_advice_and_a_resumed_run_equals_the_uninterrupted_one() {
    let expected = uninterrupted();
    for at in 0..15 {
        let folder = tempfile::tempdir().unwrap();
        let toy = Toy { exhausted_at: Some(at), ..Toy::new() };
        let error = train(folder.path(), Start::Fresh, &toy, &Toys::new()).unwrap_err();
        assert_eq!(error.exit_code(), 8, "{error}");
        let Error::Device(fault) = &error else { panic!("{error}") };
        assert!(fault.what.ends_with(" is saved") && fault.what.contains("memory"), "{error}");
        assert!(fault.hint.starts_with("less would do") && fault.hint.contains("--resume"), "{error}");
        let steps = States::of(folder.path()).steps().unwrap();
        // Five micro-batches to a pass, in steps of two, two and one.
        let done = at / 5 * 3 + at % 5 / 2;
        assert_eq!(steps.last(), Some(&done), "micro-batch {at}");
        finishes_the_same(folder.path(), &expected, &format!("out of memory in micro-batch {at}"));
    }
}

#[test]
fn a_run_keeps_how_its_steps_are_cut() {
    let folder = tempfile::tempdir().unwrap();
    let chosen = Some(Chosen { micro_batch_size: 3, gradient_accumulation_steps: 2, feed_forward_tile: Some(512) });
    let run = Run { chosen, ..run_of(folder.path(), Start::Fresh, &training()) };
    let toys = Toys { killed_before: Some(8), ..Toys::new() };
    Trainer::new(run, &Toy::new()).run(&toys).unwrap_err();
    let resumed = run_of(folder.path(), Start::Resume, &training());
    assert_eq!(resumed.folder.chosen().unwrap(), chosen);
    Trainer::new(Run { chosen, ..resumed }, &Toy::new()).run(&Toys::new()).unwrap();
    assert_eq!(RunFolder::existing(folder.path()).unwrap().1.chosen, chosen);
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
fn numbers_that_are_read_late_are_the_same_wherever_the_run_stops() {
    let late = |folder: &Path, start, toy: &Toy, toys: &Toys, logging_steps| {
        let training = TrainingRecipe { logging_steps, ..training() };
        let mut trainer = Trainer::new(run_of(folder, start, &training), toy);
        trainer.reads_late = true;
        trainer.run(toys)
    };
    for logging_steps in [1, 2, 4] {
        let soon = tempfile::tempdir().unwrap();
        let toy = Toy::new();
        let training = TrainingRecipe { logging_steps, ..training() };
        Trainer::new(run_of(soon.path(), Start::Fresh, &training), &toy).run(&Toys::new()).unwrap();
        let expected = (toy.numbers(), series(soon.path()));

        let folder = tempfile::tempdir().unwrap();
        let toy = Toy::new();
        late(folder.path(), Start::Fresh, &toy, &Toys::new(), logging_steps).unwrap();
        assert!((toy.numbers(), series(folder.path())) == expected, "{logging_steps}");
        // Killed, out of memory, and told to stop.
        for at in 0..15 {
            let killed = Toys { killed_before: Some(at), ..Toys::new() };
            let interrupts = Interrupts::default();
            let stopped = Toys { interrupts: Some((interrupts.share(), at)), ..Toys::new() };
            let exhausted = Toy { exhausted_at: Some(at), ..Toy::new() };
            for (toy, toys) in [(Toy::new(), &killed), (exhausted, &Toys::new()), (Toy::new(), &stopped)] {
                let folder = tempfile::tempdir().unwrap();
                let run = Run { interrupts: interrupts.share(), ..run_of(folder.path(), Start::Fresh, &training) };
                let mut trainer = Trainer::new(run, &toy);
                trainer.reads_late = true;
                let ended = trainer.run(toys);
                // A signal in the last step comes too late to stop anything.
                assert!(ended.is_err() || at >= 13, "{at}");
                let toy = Toy::new();
                late(folder.path(), Start::Resume, &toy, &Toys::new(), logging_steps).unwrap();
                assert!(series(folder.path()) == expected.1, "{logging_steps}, stopped at {at}");
                assert!(toy.numbers() == expected.0, "{logging_steps}, stopped at {at}");
            }
        }
    }
}

#[test]
fn a_loss_that_is_read_late_and_not_finite_ends_the_run_a_step_later_with_a_state_that_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let training = TrainingRecipe { max_nonfinite_steps: 1, ..training() };
    // Row 8 is in step 2.
    let toy = Toy { poisoned: vec![8], ..Toy::new() };
    let mut trainer = Trainer::new(run_of(folder.path(), Start::Fresh, &training), &toy);
    trainer.reads_late = true;
    let error = trainer.run(&Toys::new()).unwrap_err();
    assert!(matches!(&error, Error::Diverged(_)) && error.to_string().starts_with("step 2: "), "{error}");
    let newest = States::of(folder.path()).newest().unwrap().unwrap().state.ledger;
    assert!((newest.step == 2 || newest.step == 3) && newest.skipped_steps == 1, "{newest:?}");
}
