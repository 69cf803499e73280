//! Every rule against its reference, run (`tests/python/optimizers.py`), and what the face does for all.

use std::path::Path;

use super::*;
use crate::recipe::{AdjustLr, Optimizer as Choice};
use crate::weights::Checkpoint;

fn leaf(values: &[f32], shape: &[i64]) -> Tensor {
    Tensor::from_slice(values).reshape(shape).set_requires_grad(true)
}

fn two_parameters() -> Vec<(String, Tensor)> {
    vec![("p".into(), leaf(&[0.5, -1.25, 2.0, 0.1, 0.0, -0.3], &[2, 3])), ("q".into(), leaf(&[1.0, -2.0], &[2]))]
}

fn training() -> TrainingRecipe {
    TrainingRecipe {
        adam_beta1: Some(0.9),
        adam_beta2: Some(0.99),
        weight_decay: 0.1,
        max_grad_norm: 1.0,
        ..Default::default()
    }
}

/// Leaves the given gradients on the parameters.
fn backward(parameters: &[(String, Tensor)], p: &[f32], q: &[f32]) -> Tensor {
    let p = (&parameters[0].1 * Tensor::from_slice(p).reshape([2, 3])).sum(Kind::Float);
    let loss = p + (&parameters[1].1 * Tensor::from_slice(q)).sum(Kind::Float);
    loss.backward();
    loss.detach()
}

fn close(found: &Tensor, expected: &[f64]) {
    let found: Vec<f64> = found.flatten(0, -1).to_kind(Kind::Double).try_into().unwrap();
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() <= 1e-6 * expected.abs().max(1e-6), "{found} is not {expected}");
    }
}

// torch 2.11: AdamW(lr=0.01, betas=(0.9, 0.99), weight_decay=0.1) after clip_grad_norm_(1.0), five steps, fused and not.
#[test]
fn five_steps_equal_torch() {
    let parameters = two_parameters();
    let mut optimizer = Optimizer::new(&parameters, &training());
    let norms = [4.070626735687256, 7.588149070739746, 11.324751853942871, 15.118863105773926, 18.935945510864258];
    for (step, expected) in norms.into_iter().enumerate() {
        let step = step as i32;
        let p = [1.0, -2.0, 0.5, 3.0, 1e-3, 0.0].map(|g: f32| g * ((step + 1) * (-1i32).pow(step as u32)) as f32);
        let q = [0.3, 0.7].map(|g: f32| g * (step - 2) as f32);
        let loss = backward(&parameters, &p, &q);
        let verdict = optimizer.update(0.01, 1.0, &loss).unwrap();
        close(&verdict.gradient_norm, &[expected]);
    }
    let p = [0.48390156, -1.23015916, 1.97641683, 0.08589755, -0.013602904, -0.298503041];
    close(&parameters[0].1, &p);
    close(&parameters[1].1, &[1.02708161, -1.95794868]);
    let state = optimizer.tensors();
    assert_eq!(state[0].1.double_value(&[]), 5.0);
    close(&state[1].1, &[0.0209546536, -0.0419093072, 0.0104773268, 0.0628639683, 2.09546561e-05, 0.0]);
    close(&state[2].1, &[0.00333174947, 0.0133269979, 0.000832937367, 0.0299857426, 3.33174954e-09, 0.0]);
}

#[test]
fn the_loss_scale_changes_nothing() {
    let (plain, scaled) = (two_parameters(), two_parameters());
    let (mut one, mut other) = (Optimizer::new(&plain, &training()), Optimizer::new(&scaled, &training()));
    let (p, q) = ([1.0, -2.0, 0.5, 3.0, 1e-3, 0.0], [0.3, 0.7]);
    let loss = backward(&plain, &p, &q);
    let expected = one.update(0.01, 1.0, &loss).unwrap();
    let loss = backward(&scaled, &p.map(|g| g * 1024.0), &q.map(|g| g * 1024.0));
    let found = other.update(0.01, 1024.0, &loss).unwrap();
    close(&found.gradient_norm, &[expected.gradient_norm.double_value(&[])]);
    close(&scaled[0].1, &Vec::<f64>::try_from(plain[0].1.flatten(0, -1).to_kind(Kind::Double)).unwrap());
}

#[test]
fn a_gradient_or_loss_that_is_not_finite_changes_nothing() {
    let parameters = two_parameters();
    let mut optimizer = Optimizer::new(&parameters, &training());
    let all = |optimizer: &Optimizer| {
        let tensors = optimizer.tensors().into_iter().chain(parameters.iter().map(|(n, p)| (n.clone(), p.detach())));
        tensors.map(|(_, t)| Vec::<f32>::try_from(t.flatten(0, -1)).unwrap()).collect::<Vec<_>>()
    };
    let before = all(&optimizer);
    let loss = backward(&parameters, &[f32::NAN, 1.0, 1.0, 1.0, 1.0, 1.0], &[0.0, 0.0]);
    optimizer.update(0.01, 1.0, &loss.zeros_like()).unwrap();
    assert_eq!(all(&optimizer), before);
    let _ = backward(&parameters, &[1.0; 6], &[0.0, 0.0]);
    optimizer.update(0.01, 1.0, &Tensor::from(f32::INFINITY)).unwrap();
    assert_eq!(all(&optimizer), before);
    let loss = backward(&parameters, &[1.0; 6], &[0.0, 0.0]);
    optimizer.update(0.01, 1.0, &loss).unwrap();
    assert_ne!(all(&optimizer), before, "the gradients of skipped steps were not left behind");
}

/// As the reference's: `RATES`, `SHAPES`, `LARGE` and `drawn`.
const RATES: [f64; 6] = [0.0, 0.01, 0.02, 0.015, 0.005, 0.002];
const SHAPES: &[(&str, &[i64])] =
    &[("matrix", &[5, 7]), ("vector", &[33]), ("wide", &[6, 40]), ("tall", &[40, 6]), ("stacked", &[3, 9, 14])];
const LARGE: &[(&str, &[i64])] =
    &[("small", &[5, 7]), ("almost", &[4095]), ("exact", &[64, 64]), ("odd", &[17, 271]), ("stacked", &[3, 40, 40])];
const LORA_PLUS: &[(&str, &[i64])] =
    &[("first.a", &[3, 7]), ("first.b", &[9, 3]), ("second.a", &[3, 9]), ("second.b", &[5, 3])];

fn drawn(shape: &[i64], seed: usize) -> Tensor {
    let whole = (0..shape.iter().product::<i64>()).map(|i| (i * 7919 + seed as i64 * 104_729) % 2003 - 1001);
    let values: Vec<f32> = whole.map(|whole| whole as f32 / 1001.0).map(|value| value * value * value).collect();
    Tensor::from_slice(&values).reshape(shape)
}

fn start(shapes: &[(&str, &[i64])]) -> Vec<(String, Tensor)> {
    let parameter = |(index, (name, shape)): (usize, &(&str, &[i64]))| {
        ((*name).to_owned(), drawn(shape, index).set_requires_grad(true))
    };
    shapes.iter().enumerate().map(parameter).collect()
}

/// Leaves the gradients of `step`, times `scale`, on the parameters.
fn backward_at(parameters: &[(String, Tensor)], step: usize, scale: f64) {
    for (index, (_, parameter)) in parameters.iter().enumerate() {
        let gradient = drawn(&parameter.size(), 100 * (step + 1) + index) * scale;
        (parameter * gradient).sum(Kind::Float).backward();
    }
}

fn step(optimizer: &mut Optimizer, parameters: &[(String, Tensor)], step: usize) {
    backward_at(parameters, step, 1.0);
    optimizer.update(RATES[step], 1.0, &Tensor::from(1.0f32)).unwrap();
}

/// All that a run depends on: parameters and state.
fn everything(optimizer: &Optimizer, parameters: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
    let copied = |(name, tensor): (String, Tensor)| (name, tensor.detach().copy());
    let own = parameters.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone()));
    optimizer.tensors().into_iter().chain(own).map(copied).collect()
}

fn assert_same(found: &[(String, Tensor)], expected: &[(String, Tensor)], when: &str) {
    assert_eq!(found.len(), expected.len());
    for ((name, found), (other, expected)) in found.iter().zip(expected) {
        assert!(name == other && found.equal(expected), "{when}: {name}");
    }
}

fn recipe(optimizer: Choice) -> TrainingRecipe {
    TrainingRecipe { optimizer, weight_decay: 0.1, max_grad_norm: 0.7, ..Default::default() }
}

/// Every optimizer with what is special about it.
fn recipes() -> Vec<TrainingRecipe> {
    let mut all: Vec<_> = [
        Choice::Adamw,
        Choice::Adamw8bit,
        Choice::Adafactor,
        Choice::Lion,
        Choice::Sgd,
        Choice::ScheduleFreeAdamw,
        Choice::Muon,
    ]
    .map(recipe)
    .into();
    all.push(TrainingRecipe { momentum: Some(0.9), nesterov: Some(true), ..recipe(Choice::Sgd) });
    all.push(TrainingRecipe { loraplus_lr_ratio: Some(16.0), ..recipe(Choice::ScheduleFreeAdamw) });
    all
}

/// Six steps beside the reference's; `tolerance` is relative to the largest number of each tensor, 0 asks for the same bits.
/// A name here is translated to the reference's with `theirs`.
fn equals_reference(
    case: &str,
    shapes: &[(&str, &[i64])],
    training: &TrainingRecipe,
    theirs: impl Fn(&str) -> String,
    tolerance: impl Fn(&str) -> f64,
) -> (Optimizer, Vec<(String, Tensor)>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/optimizers.safetensors");
    let reference = Checkpoint::open_file(&path).unwrap();
    let parameters = start(shapes);
    let mut optimizer = Optimizer::new(&parameters, training);
    (0..RATES.len()).for_each(|at| step(&mut optimizer, &parameters, at));

    let mut compared = Vec::new();
    for (name, found) in everything(&optimizer, &parameters) {
        let their_name = format!("{case}/{}", theirs(&name));
        if !reference.names().contains(&their_name.as_str()) {
            continue;
        }
        let expected = reference.tensor(&their_name, found.kind(), Device::Cpu).unwrap();
        assert_eq!(found.size(), expected.size(), "{name}");
        let [found, expected] = [found, expected].map(|tensor| tensor.to_kind(Kind::Double));
        let off = (found - &expected).abs().max().double_value(&[]);
        let allowed = tolerance(&name) * expected.abs().max().double_value(&[]);
        assert!(off <= allowed, "{case}: {name} is off by {off:e}, {allowed:e} is allowed");
        compared.push(their_name);
    }
    let theirs = reference.names().into_iter().filter(|name| name.starts_with(&format!("{case}/"))).count();
    let averages = reference.names().into_iter().filter(|name| name.starts_with(&format!("{case}/x."))).count();
    assert_eq!(compared.len(), theirs - averages, "{case}: all that the reference has was compared: {compared:?}");
    (optimizer, parameters)
}

fn same(name: &str) -> String {
    name.to_owned()
}

#[test]
fn adamw_8bit_equals_bitsandbytes_bit_for_bit() {
    let training = TrainingRecipe { adam_beta2: Some(0.99), max_grad_norm: 0.0, ..recipe(Choice::Adamw8bit) };
    // Below 4096 numbers it is libtorch's fused kernel, which rounds elsewhere.
    let fp32 = |name: &str| name.starts_with("small") || name.starts_with("almost");
    let theirs = |name: &str| match name.rsplit_once('.') {
        Some((parameter, "exp_avg")) => format!("{parameter}.state1"),
        Some((parameter, "exp_avg_sq")) => format!("{parameter}.state2"),
        _ => name.to_owned(),
    };
    equals_reference("adamw_8bit", LARGE, &training, theirs, |name| if fp32(name) { 1e-6 } else { 0.0 });
}

#[test]
fn adafactor_equals_transformers() {
    equals_reference("adafactor", SHAPES, &recipe(Choice::Adafactor), same, |_| 1e-6);
}

#[test]
fn lion_equals_bitsandbytes() {
    let theirs = |name: &str| name.replace("exp_avg", "state1");
    equals_reference("lion", SHAPES, &recipe(Choice::Lion), theirs, |_| 1e-6);
}

#[test]
fn sgd_equals_torch() {
    for (case, momentum, nesterov) in [("plain", 0.0, false), ("momentum", 0.9, false), ("nesterov", 0.9, true)] {
        let training = TrainingRecipe { momentum: Some(momentum), nesterov: Some(nesterov), ..recipe(Choice::Sgd) };
        equals_reference(&format!("sgd.{case}"), SHAPES, &training, same, |_| 1e-6);
    }
}

#[test]
fn schedule_free_adamw_equals_its_package_and_so_does_what_is_evaluated() {
    let training = TrainingRecipe { adam_beta2: Some(0.99), ..recipe(Choice::ScheduleFreeAdamw) };
    let (optimizer, parameters) = equals_reference("schedule_free_adamw", SHAPES, &training, same, |_| 1e-6);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/optimizers.safetensors");
    let reference = Checkpoint::open_file(&path).unwrap();
    let trained = everything(&optimizer, &parameters);
    optimizer.at_evaluated(|| {
        for ((name, at), (other, evaluated)) in parameters.iter().zip(optimizer.evaluated()) {
            assert_eq!(*name, other);
            let expected =
                reference.tensor(&format!("schedule_free_adamw/x.{name}"), Kind::Float, Device::Cpu).unwrap();
            let off = (at - &expected).abs().max().double_value(&[]);
            assert!(off <= 1e-6, "{name} is off by {off:e}");
            assert!(!at.equal(&evaluated), "at the average, an average of the average is another");
        }
    });
    assert_same(&everything(&optimizer, &parameters), &trained, "after an evaluation");
}

#[test]
fn muon_equals_torch_and_leaves_vectors_to_adamw() {
    for (case, adjust, nesterov) in
        [("original", AdjustLr::Original, true), ("match_rms_adamw", AdjustLr::MatchRmsAdamw, false)]
    {
        let training = TrainingRecipe {
            momentum: Some(0.9),
            nesterov: Some(nesterov),
            adjust_lr_fn: Some(adjust),
            ..recipe(Choice::Muon)
        };
        // The iteration is in bf16, whose sums another processor takes in another order.
        let state = |name: &str| name.contains('.') || name == "vector";
        equals_reference(
            &format!("muon.{case}"),
            SHAPES,
            &training,
            same,
            |name| if state(name) { 1e-6 } else { 5e-4 },
        );
    }
}

#[test]
fn lora_plus_equals_peft() {
    let training = TrainingRecipe { loraplus_lr_ratio: Some(16.0), ..recipe(Choice::Adamw) };
    equals_reference("loraplus", LORA_PLUS, &training, same, |_| 1e-6);
}

#[test]
fn the_defaults_are_the_references() {
    let momentum = |training: TrainingRecipe| TrainingRecipe { momentum: training.momentum.or(Some(0.95)), ..training };
    let run = |training: TrainingRecipe| {
        let parameters = start(SHAPES);
        let mut optimizer = Optimizer::new(&parameters, &training);
        (0..3).for_each(|at| step(&mut optimizer, &parameters, at));
        everything(&optimizer, &parameters)
    };
    let plain = recipe(Choice::Muon);
    let typed = TrainingRecipe {
        nesterov: Some(true),
        adjust_lr_fn: Some(AdjustLr::Original),
        adam_beta1: Some(0.9),
        adam_beta2: Some(0.999),
        ..momentum(plain.clone())
    };
    assert_same(&run(plain), &run(typed), "muon");
    let lion = recipe(Choice::Lion);
    assert_same(&run(TrainingRecipe { adam_beta2: Some(0.99), ..lion.clone() }), &run(lion), "lion");
}

#[test]
fn a_skipped_update_changes_nothing_of_any_optimizer() {
    for training in recipes() {
        let parameters = start(LARGE);
        let mut optimizer = Optimizer::new(&parameters, &training);
        for at in 0..3 {
            let before = everything(&optimizer, &parameters);
            backward_at(&parameters, at, f64::NAN);
            optimizer.update(0.01, 1.0, &Tensor::from(1.0f32)).unwrap();
            backward_at(&parameters, at, 1.0);
            optimizer.update(0.01, 1.0, &Tensor::from(f32::NAN)).unwrap();
            assert_same(&everything(&optimizer, &parameters), &before, &format!("{:?}", training.optimizer));
            step(&mut optimizer, &parameters, at);
        }
        let (_, first) = &parameters[0];
        assert!(!first.equal(&drawn(LARGE[0].1, 0)), "{:?} does something otherwise", training.optimizer);
    }
}

#[test]
fn the_loss_scale_changes_no_optimizers_bits() {
    for training in recipes() {
        let run = |scale: f64| {
            let parameters = start(LARGE);
            let mut optimizer = Optimizer::new(&parameters, &training);
            for (at, rate) in RATES.iter().enumerate() {
                backward_at(&parameters, at, scale);
                optimizer.update(*rate, scale, &Tensor::from(1.0f32)).unwrap();
            }
            everything(&optimizer, &parameters)
        };
        // A power of two, so that nothing is rounded.
        assert_same(&run(1024.0), &run(1.0), &format!("{:?}", training.optimizer));
    }
}

#[test]
fn a_restored_optimizer_goes_on_as_if_it_had_never_stopped() {
    let place = Path::new("optimizer.safetensors");
    for training in recipes() {
        let parameters = start(LARGE);
        let mut optimizer = Optimizer::new(&parameters, &training);
        (0..3).for_each(|at| step(&mut optimizer, &parameters, at));
        // As a state is saved: what is evaluated, and the optimizer's tensors.
        let copied = |tensors: Vec<(String, Tensor)>| -> Vec<(String, Tensor)> {
            tensors.into_iter().map(|(name, tensor)| (name, tensor.detach().copy())).collect()
        };
        let (adapter, state) = (copied(optimizer.evaluated()), copied(optimizer.tensors()));
        (3..6).for_each(|at| step(&mut optimizer, &parameters, at));

        let others = start(LARGE);
        let mut other = Optimizer::new(&others, &training);
        restore(&others, &adapter, place).unwrap();
        restore(&other.tensors(), &state, place).unwrap();
        (3..6).for_each(|at| step(&mut other, &others, at));
        let when = format!("{:?}", training.optimizer);
        assert_same(&everything(&other, &others), &everything(&optimizer, &parameters), &when);
    }
}

#[test]
fn the_state_of_another_optimizer_is_refused() {
    let parameters = start(LARGE);
    let all = recipes();
    for (i, one) in all.iter().enumerate() {
        for other in all.iter().skip(i + 1).filter(|other| other.optimizer != one.optimizer) {
            let [one, other] = [one, other].map(|training| Optimizer::new(&parameters, training).tensors());
            let error = restore(&one, &other, Path::new("optimizer.safetensors")).unwrap_err().to_string();
            assert!(error.contains("another adapter or optimizer"), "{error}");
        }
    }
}

#[test]
fn the_memory_plan_counts_what_the_state_takes() {
    for training in recipes() {
        let parameters = start(LARGE);
        let state = Optimizer::new(&parameters, &training).tensors().into_iter();
        let bytes = |tensor: &Tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64;
        // y is the parameter itself, and scalars are none.
        let state = state.filter(|(name, tensor)| !name.ends_with(".y") && tensor.dim() > 0);
        let state: u64 = state.map(|(_, tensor)| bytes(&tensor)).sum();
        let shapes: Vec<(String, Vec<i64>)> = parameters.iter().map(|(name, p)| (name.clone(), p.size())).collect();
        assert_eq!(bytes_of_state(&shapes, &training), state, "{:?}", training.optimizer);
    }
}
