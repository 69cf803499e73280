//! What the memory plan says of tensors against what they take: a step of small random models, each in a process of its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use engraft::adapter::{Adapters, Learned, PlannedAdapters};
use engraft::data::{Batch, MicroBatchSize};
use engraft::export::quantised;
use engraft::model::{Decoder, Documents, Thrift, families};
use engraft::objective::{Learner, Supervised};
use engraft::ops::cuda::prepare;
use engraft::quant::{Form, FourBitType, Products, Scheme};
use engraft::recipe::{AdapterRecipe, BaseSource, TrainingRecipe};
use engraft::torch_ext::{cpu_memory, cuda_memory, keep_freed_memory};
use engraft::train::{Optimizer, Planned, RunMemory, Step};
use engraft::weights::Checkpoint;
use engraft::weights::writer::{self, TensorSpec};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// A model by its fixture's config, and how it is trained.
struct Case {
    family: &'static str,
    /// How the base is kept, and whether its files have it so.
    quantised: Option<Form>,
    stored: bool,
    adapter: fn(&mut AdapterRecipe),
    /// Of every four blocks.
    recomputed: usize,
    /// Tokens of a tile.
    tile: Option<u64>,
    /// Whether inputs of recomputed blocks wait on the host; on a GPU only.
    offload: bool,
    micro_batches: u32,
    tokens: i64,
}

const PLAIN: Case = Case {
    family: "qwen3",
    quantised: None,
    stored: false,
    adapter: |_| (),
    recomputed: 0,
    tile: None,
    offload: false,
    micro_batches: 1,
    tokens: 1024,
};

const NF4: Form = Form::FourBit { code: FourBitType::Nf4, block: 64, double_quant: true };

const CASES: &[Case] = &[
    PLAIN,
    Case { tokens: 64, ..PLAIN },
    Case { recomputed: 4, ..PLAIN },
    Case { recomputed: 4, tile: Some(128), ..PLAIN },
    Case { recomputed: 4, tile: Some(100), tokens: 4096, ..PLAIN },
    Case { recomputed: 4, offload: true, ..PLAIN },
    Case { recomputed: 2, micro_batches: 2, ..PLAIN },
    Case { quantised: Some(NF4), ..PLAIN },
    Case { quantised: Some(NF4), tokens: 64, adapter: |adapter| adapter.use_dora = true, ..PLAIN },
    Case { quantised: Some(NF4), stored: true, tokens: 64, ..PLAIN },
    Case { quantised: Some(Form::Int8), tokens: 64, ..PLAIN },
    Case { quantised: Some(Form::Int8), stored: true, tokens: 64, ..PLAIN },
    Case { quantised: Some(Form::Fp8), tokens: 64, ..PLAIN },
    Case { adapter: |adapter| adapter.use_dora = true, ..PLAIN },
    Case { adapter: |adapter| adapter.r = 128, tokens: 256, ..PLAIN },
    Case { adapter: |adapter| adapter.modules_to_save = Some(vec!["embed_tokens".into()]), ..PLAIN },
    Case { family: "llama", ..PLAIN },
    Case { family: "gemma3_text", ..PLAIN },
    Case { family: "gemma3_text", recomputed: 4, ..PLAIN },
    Case { family: "gemma3_text", recomputed: 4, tile: Some(256), ..PLAIN },
    Case { family: "phi3", ..PLAIN },
    Case { family: "cohere", ..PLAIN },
    Case { family: "qwen2_moe", ..PLAIN },
    Case { family: "qwen2_moe", quantised: Some(NF4), ..PLAIN },
    Case { family: "qwen2_moe", recomputed: 4, ..PLAIN },
];

/// Tokens of a case on a GPU are so many times as many, so that what cuBLAS works in is little beside them.
const ON_GPU: i64 = 32;

/// Off by at most so much.
const TOLERANCE: f64 = 0.05;

#[test]
fn the_plan_is_what_tensors_take() {
    let devices = if tch::Cuda::is_available() { &["cpu", "cuda"][..] } else { &["cpu"] };
    let folder = tempfile::tempdir().unwrap();
    let mut wrong = Vec::new();
    let cases = CASES.iter().enumerate();
    for ((number, case), device) in cases.flat_map(|case| devices.iter().map(move |device| (case, *device))) {
        if case.offload && device == "cpu" {
            continue;
        }
        let line = run("one_case", number, &model(folder.path(), case), device);
        let numbers: Vec<f64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let off = numbers[0] / numbers[1] - 1.0;
        if off.abs() > TOLERANCE {
            wrong.push(format!("case {number} ({}, {device}): {:+.1} %: {line}", case.family, 100.0 * off));
        }
        println!("case {number} ({}, {device}): {:+.1} %", case.family, 100.0 * off);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A base that is quantised while it is read takes what it is kept in, and one whole tensor.
#[test]
fn loading_takes_the_quantised_model_and_one_tensor() {
    let folder = tempfile::tempdir().unwrap();
    for (number, case) in CASES.iter().enumerate().filter(|(_, case)| case.quantised.is_some()) {
        let line = run("loading_alone", number, &model(folder.path(), case), "cpu");
        let numbers: Vec<f64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let (kept, largest, peak) = (numbers[0], numbers[1], numbers[2]);
        // Beside it what a file says of a tensor, what each thread computes with, and the ends of blocks of many small tensors.
        assert!(peak <= 1.05 * (kept + largest) + 65_536.0, "case {number} ({}): {line}", case.family);
        println!("case {number} ({}): {line}", case.family);
    }
}

/// What a test of this file, run for a case in a process of its own, says that was planned.
fn run(test: &str, number: usize, model: &Path, device: &str) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture"])
        .env("ENGRAFT_PLAN_CASE", number.to_string())
        .env("ENGRAFT_PLAN_MODEL", model)
        .env("ENGRAFT_PLAN_DEVICE", device)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    said.lines().find_map(|line| line.split_once("planned ")).expect("it says what it found").1.to_string()
}

/// The folder of a case's model, written where it is not there yet.
fn model(folder: &Path, case: &Case) -> PathBuf {
    let plain = folder.join(case.family);
    if !plain.exists() {
        write_model(case.family, &plain);
    }
    let Some(form) = case.quantised.filter(|_| case.stored) else { return plain };
    let stored = folder.join(format!("{}-{form}", case.family));
    if !stored.exists() {
        let checkpoint = Checkpoint::open(&BaseSource::Folder(plain)).unwrap();
        let (learned, sidecars) = (Learned::default(), &checkpoint.sidecars);
        quantised::write(&stored, &checkpoint, learned, None, &scheme(form, &["lm_head"]), sidecars, &|_, _| ())
            .unwrap();
    }
    stored
}

fn scheme(form: Form, skip: &[&str]) -> Scheme {
    let skip = skip.iter().map(ToString::to_string).collect();
    Scheme { form, kind: Kind::BFloat16, skip, products: Products::Dequantised, after_start: false }
}

/// The case that this process is to run, and where its model is.
fn own_case() -> Option<(&'static Case, PathBuf)> {
    let number = std::env::var("ENGRAFT_PLAN_CASE").ok()?;
    Some((&CASES[number.parse::<usize>().unwrap()], std::env::var_os("ENGRAFT_PLAN_MODEL")?.into()))
}

/// Run by `loading_takes_the_quantised_model_and_one_tensor`; the head, which is read last and is the largest, is quantised, too.
#[test]
#[ignore = "run by loading_takes_the_quantised_model_and_one_tensor"]
fn loading_alone() {
    let Some((case, model)) = own_case() else { return };
    keep_freed_memory();
    let checkpoint = Checkpoint::open(&BaseSource::Folder(model)).unwrap();
    let spec = families::spec(&checkpoint).unwrap();
    let largest = spec.tensors().values().map(|shape| 2 * shape.iter().product::<i64>()).max().unwrap();
    let scheme = case.quantised.map(|form| scheme(form, &[]));
    let kind = Kind::BFloat16;
    let model = Decoder::load_as(spec, &checkpoint, kind, Device::Cpu, scheme.as_ref(), &|_, _| ()).unwrap();
    println!("planned {} and {largest} took {}", cpu_memory().allocated, cpu_memory().peak);
    drop(model);
}

/// Run by the first test, in a process whose tensors are its own.
#[test]
#[ignore = "run by the_plan_is_what_tensors_take"]
fn one_case() {
    let Some((case, model)) = own_case() else { return };
    let device = match std::env::var("ENGRAFT_PLAN_DEVICE").as_deref() {
        Ok("cuda") => Device::Cuda(0),
        _ => Device::Cpu,
    };
    let tokens = if device == Device::Cpu { case.tokens } else { ON_GPU * case.tokens };
    keep_freed_memory();
    let kernels = tempfile::tempdir().unwrap();
    prepare(device, kernels.path(), &|_, _| ()).unwrap();
    let checkpoint = Checkpoint::open(&BaseSource::Folder(model)).unwrap();
    let spec = families::spec(&checkpoint).unwrap();
    let scheme = case.quantised.map(|form| scheme(form, &["lm_head"]));
    let scheme = scheme.as_ref();
    let mut adapter = AdapterRecipe::default();
    (case.adapter)(&mut adapter);
    let training = TrainingRecipe::default();
    let batch = batch(tokens, spec.vocab_size, device);
    let recomputed = Thrift::recomputing(spec.layers.len() * case.recomputed / 4);
    let thrift = Thrift { feed_forward_tile: case.tile, offload: case.offload, ..recomputed };

    let adapters = PlannedAdapters::of(&spec, &adapter).unwrap();
    let plan = RunMemory::new(Planned {
        spec: &spec,
        checkpoint: Some(&checkpoint),
        kind: Kind::BFloat16,
        device,
        scheme,
        adapters: &adapters,
        training: &training,
    })
    .plan(Step {
        largest: MicroBatchSize {
            tokens: tokens as u64,
            trained: batch.rows.size()[0] as u64,
            documents: batch.documents.offsets.len() as u64 - 1,
        },
        accumulates: case.micro_batches > 1,
        thrift,
    });

    let mut model = Decoder::load_as(spec, &checkpoint, Kind::BFloat16, device, scheme, &|_, _| ()).unwrap();
    let attached = Adapters::attach(&mut model, &adapter, 1, None).unwrap();
    let shapes: Vec<(String, Vec<i64>)> = attached.parameters().into_iter().map(|(name, t)| (name, t.size())).collect();
    assert_eq!(adapters.parameters(), shapes);
    let learner = Supervised { model: &model, noise_alpha: 0.0, thrift };
    let mut optimizer = Optimizer::new(&learner.parameters(), &training);
    for _ in 0..2 {
        let mut sum = Tensor::from(0f32).to_device(device);
        for _ in 0..case.micro_batches {
            let loss = learner.loss(&batch, Some(1), 1.0 / tokens as f64);
            loss.value.backward();
            sum += loss.value.detach();
        }
        optimizer.update(1e-3, 1.0, &sum).unwrap();
    }
    let (planned, measured) = match device {
        Device::Cpu => (plan.peak - plan.libtorch - plan.saving, cpu_memory().peak),
        // What cuBLAS works in is memory of libtorch's allocator, too.
        _ => (plan.peak, cuda_memory(0).unwrap().peak as u64),
    };
    println!("planned {planned} measured {measured} {plan:?}");
}

/// Documents of 128 tokens, every second one of them trained.
fn batch(tokens: i64, vocabulary: i64, device: Device) -> Batch {
    let put = |numbers: &[i64]| Tensor::from_slice(numbers).to_device(device);
    let length = tokens.min(128);
    let ids: Vec<i64> = (0..tokens).map(|i| i * 31 % vocabulary).collect();
    let rows: Vec<i64> = (0..tokens).filter(|i| i % length != length - 1 && i % 2 == 0).collect();
    let targets: Vec<i64> = rows.iter().map(|row| ids[*row as usize + 1]).collect();
    Batch {
        ids: put(&ids),
        positions: put(&(0..tokens).map(|i| i % length).collect::<Vec<_>>()),
        documents: Documents { offsets: (0..=tokens / length).map(|i| i * length).collect() },
        rows: put(&rows),
        targets: put(&targets),
        origins: Vec::new(),
    }
}

/// The family's fixture, wide enough for its tensors to be most of what it takes.
fn write_model(family: &str, folder: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families").join(family).join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(source).unwrap()).unwrap();
    let sizes = json!({
        "hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
        "vocab_size": 4000, "num_hidden_layers": 8, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 256,
        "num_experts": 8, "use_sliding_window": false,
    });
    for (key, value) in sizes.as_object().unwrap() {
        if config.get(key).is_some() {
            config[key] = value.clone();
        }
    }
    std::fs::create_dir(folder).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let spec = families::from_config(&config).unwrap();
    let tensors = spec.tensors().into_iter();
    let tensors: Vec<TensorSpec> = tensors
        .map(|(name, shape)| TensorSpec { name: spec.names.stored(&name), kind: Kind::BFloat16, shape })
        .collect();
    let random = |index: usize| {
        let shape = &tensors[index].shape;
        let numbers = Tensor::randn(&shape[..], (Kind::Float, Device::Cpu)) * 0.02;
        Ok(numbers.to_kind(Kind::BFloat16))
    };
    tch::manual_seed(1);
    writer::write(&folder.join("model.safetensors"), &tensors, &BTreeMap::new(), random).unwrap();
}
