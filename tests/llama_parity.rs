//! The decoder against transformers and PEFT: full tensors recorded by `tests/python/tiny_llama.py`, in fp32.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use engraft::adapter::numbers::Here;
use engraft::adapter::{Adapters, Learned, LoadedAdapter, Origin, TrainedOn, Update};
use engraft::data::{Batch, Cursor, RowId};
use engraft::model::{Decoder, Documents, Forward, Sampling, Thrift};
use engraft::objective::Supervised;
use engraft::quant::{Form, FourBitType, Layout, Products, Scheme, Weight};
use engraft::recipe::{AdapterRecipe, BaseSource, InitLora, Scheduler, TrainingRecipe};
use engraft::train::{BatchSource, Events, Identity, Interrupts, Progress, Run, RunFolder, Start, Trainer};
use engraft::weights::Checkpoint;
use tch::{Device, Kind, Tensor};

const MODELS: [&str; 22] = [
    "grouped-tied",
    "biases-untied",
    "linear",
    "dynamic",
    "yarn",
    "llama3-wide-heads",
    "dora",
    "whole-tied",
    "whole-untied",
    "whole-norms",
    "tokens-tied",
    "tokens-untied",
    "qlora-nf4",
    "qlora-fp4",
    "qlora-dora",
    "qlora-head",
    "qlora-tokens",
    STORED[0].0,
    STORED[1].0,
    STORED[2].0,
    STORED[3].0,
    STORED[4].0,
];
/// Where modules or rows of tokens are trained whole.
const WHOLE: [&str; 5] = ["whole-tied", "whole-untied", "whole-norms", "tokens-tied", "tokens-untied"];
/// Trained on bases that bitsandbytes quantises while they are loaded.
const QLORA: [&str; 5] = ["qlora-nf4", "qlora-fp4", "qlora-dora", "qlora-head", "qlora-tokens"];
/// Bases that other tools have quantised (`tests/python/layouts.py`).
const STORED: [(&str, Layout); 5] = [
    ("stored-gptq", Layout::Gptq),
    ("stored-awq", Layout::Awq),
    ("stored-int4", Layout::CompressedTensors),
    ("stored-fp8-rows", Layout::CompressedTensors),
    ("stored-fp8-blocks", Layout::Fp8),
];
const TOLERANCE: f64 = 2e-5;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama").join(name)
}

/// The base of a fixture: that of another one for those that `tests/python` gives none of their own.
fn base(name: &str) -> PathBuf {
    folder(match name {
        "whole-tied" | "tokens-tied" => "grouped-tied",
        "tokens-untied" => "whole-untied",
        "qlora-dora" | "qlora-head" | "qlora-tokens" => "qlora-nf4",
        own => own,
    })
}

fn tensors(path: &Path) -> HashMap<String, Tensor> {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.tensors()
        .into_iter()
        .map(|(name, view)| {
            let kind = match view.dtype() {
                safetensors::Dtype::F32 => Kind::Float,
                safetensors::Dtype::I64 => Kind::Int64,
                other => panic!("{name}: {other:?}"),
            };
            let shape: Vec<i64> = view.shape().iter().map(|n| *n as i64).collect();
            (name, Tensor::from_data_size(view.data(), &shape, kind))
        })
        .collect()
}

fn load(name: &str) -> Decoder {
    let checkpoint = Checkpoint::open(&BaseSource::Folder(base(name))).unwrap();
    Decoder::load_kept(&checkpoint, Kind::Float, Device::Cpu, scheme(name).as_ref(), &|_, _| ()).unwrap()
}

/// How the base was quantised that PEFT trained on: by bitsandbytes, or as its files have it.
fn scheme(name: &str) -> Option<Scheme> {
    let scheme = |form| Scheme {
        form,
        kind: Kind::Float,
        skip: vec!["lm_head".into()],
        products: Products::Dequantised,
        after_start: false,
    };
    if let Some((_, layout)) = STORED.iter().find(|(stored, _)| *stored == name) {
        return Some(scheme(Form::Stored(*layout)));
    }
    let (code, double_quant) = match name.strip_prefix("qlora-")? {
        "fp4" => (FourBitType::Fp4, false),
        _ => (FourBitType::Nf4, true),
    };
    Some(scheme(Form::FourBit { code, block: 64, double_quant }))
}

/// Puts PEFT's adapter on the decoder; gives its leaves by their key.
fn graft(model: &mut Decoder, name: &str) -> Vec<(String, Tensor)> {
    let folder = folder(name).join("adapter");
    let adapters = Adapters::attach_loaded(model, &LoadedAdapter::read(&folder).unwrap(), 0.0, None).unwrap();
    let leaves = adapters.parameters();
    let saved = tensors(&folder.join("adapter_model.safetensors"));
    // A head that shares what is trained of the embedding is stored, too.
    let again = usize::from(name == "whole-tied");
    assert_eq!(leaves.len() + again, saved.len(), "every tensor of the adapter found its place");
    leaves
}

struct Documented {
    ids: Tensor,
    positions: Tensor,
    documents: Documents,
    rows: Tensor,
    targets: Tensor,
}

fn documented(reference: &HashMap<String, Tensor>, prefix: &str) -> Documented {
    let get = |name: &str| &reference[&format!("{prefix}{name}")];
    let offsets = Vec::<i64>::try_from(get("offsets")).unwrap();
    let ids = get("ids").copy();
    let documents = Documents { offsets };
    let positions: Vec<i64> = documents.spans().flat_map(|(_, length)| 0..length).collect();
    let targets_at = get("mask").nonzero().squeeze_dim(1);
    Documented {
        positions: Tensor::from_slice(&positions),
        targets: ids.index_select(0, &targets_at),
        rows: targets_at - 1,
        ids,
        documents,
    }
}

fn loss(model: &Decoder, batch: &Documented, forward: Forward) -> Tensor {
    let hidden = model.hidden(&batch.ids, &batch.positions, &batch.documents, forward);
    let rows = hidden.index_select(0, &batch.rows);
    model.cross_entropy(&rows, &batch.targets, forward, 1.0 / batch.targets.size()[0] as f64)
}

#[track_caller]
fn assert_close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!(found.size(), expected.size(), "{what}: shapes");
    let scale = expected.abs().max().double_value(&[]);
    let worst = (found - expected).abs().max().double_value(&[]) / scale;
    assert!(worst < tolerance, "{what} is off by {worst:e} of its largest value");
}

#[test]
fn logits_are_those_of_transformers_and_peft() {
    for name in MODELS {
        let reference = tensors(&folder(name).join("reference.safetensors"));
        let batch = documented(&reference, "");
        let mut model = load(name);
        let logits = |model: &Decoder| {
            model.logits(&model.hidden(&batch.ids, &batch.positions, &batch.documents, Forward::default()))
        };
        assert_close(&format!("{name}: logits"), &logits(&model), &reference["base_logits"], TOLERANCE);
        graft(&mut model, name);
        assert_close(&format!("{name}: adapted logits"), &logits(&model), &reference["logits"], TOLERANCE);
    }
}

#[test]
fn the_loss_and_every_adapter_gradient_are_those_of_peft_also_when_recomputed() {
    for name in MODELS {
        let reference = tensors(&folder(name).join("reference.safetensors"));
        let batch = documented(&reference, "");
        for recomputed_layers in [0, 1, 100] {
            let mut model = load(name);
            let leaves = graft(&mut model, name);
            let loss =
                loss(&model, &batch, Forward { thrift: Thrift::recomputing(recomputed_layers), ..Forward::default() });
            assert_close(&format!("{name}: loss"), &loss.view([1]), &reference["loss"], TOLERANCE);
            loss.backward();
            for (key, leaf) in leaves {
                assert_close(&format!("{name}: {key}"), &leaf.grad(), &reference[&format!("grad.{key}")], TOLERANCE);
            }
        }
    }
}

#[test]
fn generation_with_a_cache_is_the_full_forward_token_by_token() {
    for name in MODELS {
        // Dynamic scaling turns the same key otherwise once the document has grown; cached keys keep their angle, in
        // transformers too, so within its original length the two agree and beyond it they need not.
        let length = if name == "dynamic" { 3 } else { 25 };
        let mut model = load(name);
        graft(&mut model, name);
        let prompts: Vec<Vec<u32>> = vec![vec![1, 17, 40, 8, 9], vec![1, 5], (1..12).collect()];
        let sampling = Sampling { max_tokens: length, ..Sampling::default() };
        let answers = model.generate(&prompts, &sampling, &mut |_, _| std::ops::ControlFlow::Continue(()));
        for (prompt, answer) in prompts.iter().zip(&answers) {
            let mut ids: Vec<i64> = prompt.iter().map(|id| i64::from(*id)).collect();
            for (n, found) in answer.ids.iter().enumerate() {
                let (flat, t) = (Tensor::from_slice(&ids), ids.len() as i64);
                let positions = Tensor::arange(t, (Kind::Int64, Device::Cpu));
                let hidden = model.hidden(&flat, &positions, &Documents::one(t), Forward::default());
                let expected = model.logits(&hidden.narrow(0, t - 1, 1)).argmax(-1, false).int64_value(&[0]);
                assert_eq!(i64::from(*found), expected, "{name}: token {n} after {prompt:?}");
                ids.push(expected);
            }
        }
    }
}

#[test]
fn a_sequence_continued_in_pieces_gives_the_hidden_states_of_one_pass() {
    let mut model = load("llama3-wide-heads");
    graft(&mut model, "llama3-wide-heads");
    let ids: Vec<i64> = (0..40).map(|i| (i * 7 + 3) % 97).collect();
    let whole = model.hidden(
        &Tensor::from_slice(&ids),
        &Tensor::arange(40, (Kind::Int64, Device::Cpu)),
        &Documents::one(40),
        Forward::default(),
    );
    let mut cache = model.cache(1);
    let pieces: Vec<Tensor> = [&ids[..13], &ids[13..14], &ids[14..31], &ids[31..]]
        .iter()
        .map(|piece| model.hidden_cached(&Tensor::from_slice(piece), &Documents::one(piece.len() as i64), &mut cache))
        .collect();
    assert_close("hidden states", &Tensor::cat(&pieces, 0), &whole, TOLERANCE);
}

/// The recorded batches in turn, step after step.
struct Recorded(HashMap<String, Tensor>);

impl BatchSource for Recorded {
    fn micro_batches(&self, _: u64) -> engraft::Result<u64> {
        Ok(1_000)
    }

    fn batches<'a>(&'a self, from: Cursor) -> engraft::Result<Box<dyn Iterator<Item = engraft::Result<Batch>> + 'a>> {
        Ok(Box::new((from.micro_batch..).map(|step| {
            let Documented { ids, positions, documents, rows, targets } =
                documented(&self.0, &format!("batch.{}.", step % 4));
            Ok(Batch { ids, positions, documents, rows, targets, origins: Vec::new() })
        })))
    }

    fn has_evaluation(&self) -> bool {
        false
    }

    fn evaluation<'a>(&'a self) -> engraft::Result<Box<dyn Iterator<Item = engraft::Result<Batch>> + 'a>> {
        Ok(Box::new(std::iter::empty()))
    }

    fn describe(&self, _: RowId) -> String {
        "a recorded batch".into()
    }
}

/// Trains as the reference does; gives what was logged.
fn twenty_steps(model: &Decoder, recorded: &Recorded) -> impl Fn(&str) -> Tensor {
    let place = tempfile::tempdir().unwrap();
    let identity =
        Identity { recipe: Default::default(), data: "".into(), eval: None, base: "".into(), device: "cpu".into() };
    let run = Run {
        folder: RunFolder::open(place.path(), Start::Fresh).unwrap(),
        identity,
        training: TrainingRecipe {
            max_steps: Some(20),
            learning_rate: 1e-2,
            lr_scheduler: Scheduler::Constant,
            weight_decay: 0.01,
            max_grad_norm: 1.0,
            ..Default::default()
        },
        half: false,
        tensorboard: false,
        events: Events::default(),
        progress: Progress::silent(),
        interrupts: Interrupts::listen().unwrap(),
        facts: Vec::new(),
        chosen: None,
        advice: String::new(),
    };
    let learner = Supervised { model, noise_alpha: 0.0, thrift: Thrift::recomputing(1) };
    Trainer::new(run, &learner).run(recorded).unwrap();
    let metrics = std::fs::read_to_string(place.path().join("metrics.jsonl")).unwrap();
    move |key: &str| {
        let of = |line| serde_json::from_str::<serde_json::Value>(line).unwrap()[key].as_f64().unwrap();
        Tensor::from_slice(&metrics.lines().map(of).collect::<Vec<f64>>()).to_kind(Kind::Float)
    }
}

/// The same on a base quantised by bitsandbytes: olora on what its numbers stand for, pissa on those it was made of.
#[test]
fn adapters_that_start_from_the_weights_of_a_quantised_base_learn_as_pefts() {
    let expected = tensors(&folder("").join("starts.safetensors"));
    let (name, quantised) = ("qlora-nf4", scheme("qlora-nf4").unwrap());
    let mut compared = 0;
    let recipe = |start| AdapterRecipe { r: 4, lora_alpha: 6.0, init_lora_weights: start, ..Default::default() };
    let started = |source: PathBuf, scheme: &Scheme, start| {
        let checkpoint = Checkpoint::open(&BaseSource::Folder(source)).unwrap();
        let origin = Origin { checkpoint: &checkpoint, scheme: Some(scheme), start: None, progress: &|_, _| () };
        let mut model = Decoder::load_kept(&checkpoint, Kind::Float, Device::Cpu, Some(scheme), &|_, _| ()).unwrap();
        let adapters = Adapters::attach(&mut model, &recipe(start), 1, Some(&origin)).unwrap();
        (model, adapters)
    };
    for (start, of, source) in
        [(InitLora::Olora, "olora-nf4", folder(name).join("quantised")), (InitLora::Pissa, "pissa-nf4", folder(name))]
    {
        let recorded = Recorded(tensors(&folder(name).join("reference.safetensors")));
        let (model, adapters) = started(source, &quantised, start);
        for linear in model.linears() {
            let Some(theirs) = expected.get(&format!("{of}.base.{}", linear.name)) else { continue };
            // A number, or a block's scale, at a bound between two codes may fall to either side.
            let off = (linear.weight.dense() - theirs).abs().view([-1, 64]); // (blocks, 64)
            let differ = off.gt(1e-5).any_dim(1, false).sum(Kind::Int64).int64_value(&[]);
            assert!(differ <= 2, "{of}: {differ} blocks of {} differ", linear.name);
            compared += 1;
        }
        let series = twenty_steps(&model, &recorded);
        assert_close(&format!("{of}: losses"), &series("loss"), &expected[&format!("{of}.losses")], 1e-3);
        for update in adapters.updates().iter().map(Update::of_the_original) {
            let found = update.b.matmul(&update.a) * update.scale;
            let what = format!("{of}.update.{}", update.module);
            if let Some(theirs) = expected.get(&what) {
                assert_close(&what, &found, theirs, 6e-2);
                compared += 1;
            }
        }
    }
    let eight_bit = Scheme { form: Form::Int8, ..quantised };
    let stored = tempfile::tempdir().unwrap();
    let base = Checkpoint::open(&BaseSource::Folder(folder(name))).unwrap();
    let sidecars = [("config.json".to_string(), base.sidecars["config.json"].clone())].into();
    let place = stored.path().join("int8");
    engraft::export::quantised::write(&place, &base, Learned::default(), None, &eight_bit, &sidecars, &|_, _| ())
        .unwrap();
    let (model, adapters) = started(place, &eight_bit, InitLora::Olora);
    for update in adapters.updates() {
        let linear = model.linears().into_iter().find(|linear| linear.name == update.module).unwrap();
        let Some(theirs) = expected.get(&format!("olora-int8.base.{}", update.module)) else { continue };
        let found = linear.weight.dense();
        compared += 1;
        // A step of a row is 1/127 of its largest; few numbers lie so near between two that they fall to the other.
        let step = theirs.abs().amax([1], true) / 127.0;
        let differ = ((&found - theirs).abs() / &step).gt(1e-3);
        let count = differ.sum(Kind::Int64).int64_value(&[]);
        assert!(count <= 2, "{}: {count} numbers differ", update.module);
        assert!(((found - theirs).abs() / step).max().double_value(&[]) < 1.01, "{}", update.module);
    }
    assert_eq!(compared, 8);
}

/// What PEFT's starts from the weights come to after the steps above, on the weights as they were.
#[test]
fn adapters_that_start_from_the_weights_learn_as_pefts() {
    let expected = tensors(&folder("").join("starts.safetensors"));
    for (start, name) in [(InitLora::Pissa, "pissa"), (InitLora::Olora, "olora")] {
        let recorded = Recorded(tensors(&folder("grouped-tied").join("reference.safetensors")));
        let mut model = load("grouped-tied");
        let recipe = AdapterRecipe { r: 4, lora_alpha: 6.0, init_lora_weights: start, ..Default::default() };
        let adapters = Adapters::attach(&mut model, &recipe, 1, None).unwrap();
        assert_eq!((adapters.config.r, adapters.config.lora_alpha), (8, 12.0));
        let series = twenty_steps(&model, &recorded);
        assert_close(&format!("{name}: losses"), &series("loss"), &expected[&format!("{name}.losses")], 1e-4);
        for update in adapters.updates().iter().map(Update::of_the_original) {
            let found = update.b.matmul(&update.a) * update.scale;
            let what = format!("{name}.update.{}", update.module);
            assert_close(&what, &found, &expected[&what], 1e-3);
        }
    }
}

/// Trained in bf16 and asked in fp32, as merging does: the numbers stay those of bf16.
#[test]
fn what_is_left_of_a_weight_is_the_same_where_products_are_of_another_type() {
    let scheme = Scheme { kind: Kind::BFloat16, ..scheme("qlora-nf4").unwrap() };
    let checkpoint = Checkpoint::open(&BaseSource::Folder(folder("qlora-nf4"))).unwrap();
    let origin = Origin { checkpoint: &checkpoint, scheme: Some(&scheme), start: None, progress: &|_, _| () };
    let load = |kind| Decoder::load_kept(&checkpoint, kind, Device::Cpu, Some(&scheme), &|_, _| ()).unwrap();
    let mut trained = load(Kind::BFloat16);
    let recipe = AdapterRecipe { r: 4, init_lora_weights: InitLora::Pissa, ..Default::default() };
    let adapters = Adapters::attach(&mut trained, &recipe, 1, Some(&origin)).unwrap();
    let place = tempfile::tempdir().unwrap();
    engraft::export::peft::write(
        place.path(),
        &adapters.config,
        adapters.learned(),
        Some(&TrainedOn::of(&checkpoint, &scheme, &trained.digests)),
        &Default::default(),
    )
    .unwrap();
    let mut asked = load(Kind::Float);
    Adapters::attach_loaded(&mut asked, &LoadedAdapter::read(place.path()).unwrap(), 0.0, Some(&origin)).unwrap();
    for (one, other) in trained.linears().into_iter().zip(asked.linears()) {
        assert_eq!(other.weight.kind(), Kind::Float, "{}", one.name);
        assert_eq!(one.weight.dense().to_kind(Kind::Float), other.weight.dense(), "{}", one.name);
    }
    // Merged, it has the numbers of norms as they are stored: those are never rounded.
    let sidecars = [("config.json".to_string(), checkpoint.sidecars["config.json"].clone())].into();
    let merged = place.path().join("merged");
    let onto = Scheme { after_start: true, ..scheme.clone() };
    let learned = adapters.learned();
    engraft::export::merged::write(&merged, &checkpoint, learned, Some(&onto), Kind::Float, &sidecars, &|_, _| ())
        .unwrap();
    let merged = Checkpoint::open(&BaseSource::Folder(merged)).unwrap();
    let read = |from: &Checkpoint, name| from.tensor(name, Kind::Float, Device::Cpu).unwrap();
    for name in ["model.norm.weight", "model.layers.1.input_layernorm.weight"] {
        assert_eq!(read(&merged, name), read(&checkpoint, name), "{name}");
    }
}

#[test]
fn starts_that_a_stored_base_cannot_have_are_refused_with_the_way_out() {
    let says = |name: &str, stored: &str, start| {
        let checkpoint = Checkpoint::open(&BaseSource::Folder(folder(name).join(stored))).unwrap();
        let scheme = scheme(name).unwrap();
        let origin = Origin { checkpoint: &checkpoint, scheme: Some(&scheme), start: None, progress: &|_, _| () };
        let mut model = Decoder::load_kept(&checkpoint, Kind::Float, Device::Cpu, Some(&scheme), &|_, _| ()).unwrap();
        let recipe = AdapterRecipe { r: 4, init_lora_weights: start, ..Default::default() };
        Adapters::attach(&mut model, &recipe, 1, Some(&origin)).unwrap_err().to_string()
    };
    for (name, stored, start, parts) in [
        ("stored-gptq", "", InitLora::Pissa, ["stored as gptq again", "adapter.method: lora"]),
        ("stored-awq", "", InitLora::Olora, ["stored as awq again", "the model the base was made of"]),
        ("stored-fp8-blocks", "", InitLora::Pissa, ["stored as stored fp8 again", "quantization.type"]),
        ("stored-int4", "", InitLora::Loftq, ["what it was before is not known", "name the model"]),
        // Nothing is lost of numbers that were quantised before: A and B would be zero, and stay so.
        ("qlora-nf4", "quantised", InitLora::Loftq, ["what it was before is not known", "name the model"]),
    ] {
        let text = says(name, stored, start);
        assert!(parts.iter().all(|part| text.contains(part)), "{name}: {text}");
    }
}

#[test]
fn what_is_left_of_a_weight_is_quantised_and_found_again_by_who_loads_or_merges_the_adapter() {
    let name = "qlora-nf4";
    let reference = tensors(&folder(name).join("reference.safetensors"));
    let batch = documented(&reference, "");
    let logits = |model: &Decoder| {
        model.logits(&model.hidden(&batch.ids, &batch.positions, &batch.documents, Forward::default()))
    };
    let scheme = scheme(name).unwrap();
    let place = tempfile::tempdir().unwrap();
    let mut nearness = Vec::new();
    let starts = [
        (InitLora::Pissa, false, 1),
        (InitLora::Olora, true, 1),
        (InitLora::Loftq, false, 1),
        (InitLora::Loftq, false, 4),
    ];
    for (start, stored, loftq_iter) in starts {
        let source = if stored { base(name).join("quantised") } else { base(name) };
        let checkpoint = Checkpoint::open(&BaseSource::Folder(source)).unwrap();
        let origin = Origin { checkpoint: &checkpoint, scheme: Some(&scheme), start: None, progress: &|_, _| () };
        let load = |scheme| Decoder::load_kept(&checkpoint, Kind::Float, Device::Cpu, scheme, &|_, _| ()).unwrap();
        let mut model = load(Some(&scheme));
        let recipe =
            AdapterRecipe { r: 4, lora_alpha: 6.0, init_lora_weights: start, loftq_iter, ..Default::default() };
        let adapters = Adapters::attach(&mut model, &recipe, 1, Some(&origin)).unwrap();
        assert_eq!(adapters.config.r, if recipe.takes_off() { 8 } else { 4 });
        if recipe.starts_from_weights() {
            // Begun again from what an earlier part of the run started with.
            let begun =
                Some(adapters.start().iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect());
            let mut again = load(Some(&scheme));
            Adapters::attach(&mut again, &recipe, 1, Some(&Origin { start: begun, ..origin })).unwrap();
            assert_eq!(logits(&again), logits(&model), "{start:?} {loftq_iter}");
        }
        if start == InitLora::Loftq {
            // Nearer to the base as it was than the quantised base is.
            let original = Decoder::load(&checkpoint, Kind::Float, Device::Cpu, &|_, _| ()).unwrap();
            let off =
                |model: &Decoder| (logits(model) - logits(&original)).square().mean(Kind::Float).double_value(&[]);
            let (with, without) = (off(&model), off(&load(Some(&scheme))));
            assert!(with < 0.8 * without, "off by {with} with, by {without} without the start");
            nearness.push(with);
        }
        for (i, update) in adapters.updates().iter().enumerate() {
            tch::no_grad(|| {
                let noise = &update.b * 0.3 * ((i % 3) as f64 - 1.0);
                let _ = update.b.shallow_clone().g_add_(&noise);
            });
        }
        let trained = logits(&model);

        let adapter = place.path().join(format!("{start:?}-{loftq_iter}"));
        let sidecars = std::collections::BTreeMap::new();
        let trained_on = TrainedOn::of(&checkpoint, &scheme, &model.digests);
        let learned = adapters.learned();
        engraft::export::peft::write(&adapter, &adapters.config, learned, Some(&trained_on), &sidecars).unwrap();
        let loaded = LoadedAdapter::read(&adapter).unwrap();
        let trained_on = loaded.trained_on().unwrap().unwrap();
        let onto = &trained_on.scheme;
        let mut again = load(Some(onto));
        Adapters::attach_loaded(&mut again, &loaded, 0.0, Some(&origin)).unwrap();
        assert_eq!(trained_on.differing(&again.digests), None);
        assert_close("loaded again", &logits(&again), &trained, 1e-6);

        let spec = &again.spec;
        let updates: Vec<Update> = loaded.fit(&spec.sites(), &spec.names).unwrap().into_values().collect();
        let merged = place.path().join(format!("{start:?}-{loftq_iter}-merged"));
        let config = [("config.json".to_string(), checkpoint.sidecars["config.json"].clone())].into();
        let made = engraft::export::merged::write(
            &merged,
            &checkpoint,
            updates.as_slice().into(),
            Some(onto),
            Kind::Float,
            &config,
            &|_, _| (),
        )
        .unwrap();
        assert_eq!(trained_on.differing(&made), None);
        let merged = Checkpoint::open(&BaseSource::Folder(merged)).unwrap();
        let merged = Decoder::load(&merged, Kind::Float, Device::Cpu, &|_, _| ()).unwrap();
        assert_close("merged", &logits(&merged), &trained, TOLERANCE);
    }
    assert!(nearness[1] < nearness[0], "further iterations come nearer to the base as it was: {nearness:?}");
}

#[test]
fn twenty_steps_are_those_of_peft_and_torchs_adamw() {
    let trained = ["grouped-tied", "llama3-wide-heads", "dora", "stored-gptq"];
    for name in trained.into_iter().chain(QLORA).chain(WHOLE) {
        let recorded = Recorded(tensors(&folder(name).join("reference.safetensors")));
        let mut model = load(name);
        let leaves = graft(&mut model, name);
        let series = twenty_steps(&model, &recorded);
        assert_close(&format!("{name}: losses"), &series("loss"), &recorded.0["train.losses"], 1e-4);
        assert_close(&format!("{name}: norms"), &series("grad_norm"), &recorded.0["train.gradient_norms"], 1e-4);
        for (key, leaf) in leaves {
            assert_close(&format!("{name}: {key}"), &leaf.detach(), &recorded.0[&format!("final.{key}")], 1e-4);
        }
    }
}

#[test]
fn a_base_stored_quantised_is_kept_so_and_answers_as_its_original_quantised_here() {
    for name in ["qlora-nf4", "qlora-fp4"] {
        let reference = tensors(&folder(name).join("reference.safetensors"));
        let batch = documented(&reference, "");
        let checkpoint = Checkpoint::open(&BaseSource::Folder(base(name).join("quantised"))).unwrap();
        for products in [Products::Dequantised, Products::Cached] {
            let scheme = Scheme { products, ..scheme(name).unwrap() };
            let load = |scheme| Decoder::load_kept(&checkpoint, Kind::Float, Device::Cpu, scheme, &|_, _| ()).unwrap();
            for model in [load(Some(&scheme)), load(None)] {
                let hidden = model.hidden(&batch.ids, &batch.positions, &batch.documents, Forward::default());
                assert_close(name, &model.logits(&hidden), &reference["base_logits"], TOLERANCE);
            }
        }
    }
}

/// Kept as they are stored, bases of other tools are what they are as plain numbers, bit for bit; so they are merged onto.
#[test]
fn a_base_in_another_tools_layout_is_kept_so_and_merged_onto_its_numbers() {
    for (name, layout) in STORED {
        let reference = tensors(&folder(name).join("reference.safetensors"));
        let batch = documented(&reference, "");
        let checkpoint = Checkpoint::open(&BaseSource::Folder(base(name))).unwrap();
        assert_eq!(checkpoint.quantised_form(), Some(Form::Stored(layout)));
        let plain = Decoder::load(&checkpoint, Kind::Float, Device::Cpu, &|_, _| ()).unwrap();
        let kept = load(name);
        let logits = |model: &Decoder| {
            model.logits(&model.hidden(&batch.ids, &batch.positions, &batch.documents, Forward::default()))
        };
        assert_eq!(logits(&plain), logits(&kept), "{name}");
        let mut quantised = 0;
        for (own, other) in kept.linears().into_iter().zip(plain.linears()) {
            assert!(matches!(other.weight, Weight::Dense(_)), "{name}: {}", other.name);
            assert_eq!(own.weight.dense(), other.weight.dense(), "{name}: {}", own.name);
            quantised += usize::from(matches!(own.weight, Weight::Quantised(_)));
        }
        assert_eq!(quantised, if name == "stored-int4" { 12 } else { 14 }, "{name}");

        let updates = updates(name, &kept);
        let place = tempfile::tempdir().unwrap();
        let config = [("config.json".to_string(), checkpoint.sidecars["config.json"].clone())].into();
        let write = |checkpoint: &Checkpoint, folder: &Path| {
            let onto = scheme(name);
            engraft::export::merged::write(
                folder,
                checkpoint,
                updates.as_slice().into(),
                onto.as_ref(),
                Kind::Float,
                &config,
                &|_, _| (),
            )
        };
        let merged = place.path().join("merged");
        write(&checkpoint, &merged).unwrap();
        let merged = Checkpoint::open(&BaseSource::Folder(merged)).unwrap();
        assert_eq!(merged.quantised_form(), None);
        assert!(!merged.names().iter().any(|name| name.ends_with(".bias")), "{name}: spare tensors are not written");
        let model = Decoder::load(&merged, Kind::Float, Device::Cpu, &|_, _| ()).unwrap();
        assert_close(name, &logits(&model), &reference["logits"], TOLERANCE);

        // What only its own tool makes cannot be made of the merged model's numbers.
        let error = write(&merged, &place.path().join("again")).unwrap_err().to_string();
        assert!(error.contains(&format!("trained on a base that is stored as {layout}")), "{error}");
        let error =
            Decoder::load_kept(&merged, Kind::Float, Device::Cpu, scheme(name).as_ref(), &|_, _| ()).unwrap_err();
        assert!(
            error.to_string().contains(&format!("is stored as plain numbers, but {layout} is asked for")),
            "{error}"
        );
    }
}

/// The same model quantised by the same tool, otherwise: in other groups, which its files' headers tell, or to other codes.
#[test]
fn a_base_that_its_tool_quantised_otherwise_is_another_base() {
    let name = "stored-gptq";
    let place = tempfile::tempdir().unwrap();
    let changed = |to: &str, group: u64, change: &dyn Fn(&str, Tensor) -> Tensor| {
        let folder = place.path().join(to);
        std::fs::create_dir(&folder).unwrap();
        let stored = Tensor::read_safetensors(base(name).join("model.safetensors")).unwrap();
        let stored: Vec<(String, Tensor)> =
            stored.into_iter().map(|(name, tensor)| (name.clone(), change(&name, tensor).contiguous())).collect();
        Tensor::write_safetensors(&stored, folder.join("model.safetensors")).unwrap();
        let mut config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(base(name).join("config.json")).unwrap()).unwrap();
        config["quantization_config"]["group_size"] = group.into();
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        Checkpoint::open(&BaseSource::Folder(folder)).unwrap()
    };
    let own = changed("own", 32, &|_, tensor| tensor);
    let model = |base: &Checkpoint| {
        Decoder::load_kept(base, Kind::Float, Device::Cpu, scheme(name).as_ref(), &|_, _| ()).unwrap()
    };
    let trained_on = TrainedOn::of(&own, &scheme(name).unwrap(), &model(&own).digests);
    assert_eq!(trained_on.weights.len(), 14);
    let adapter = Path::new("adapter");
    let here = |base| trained_on.prove_stored_alike(adapter, Here { checkpoint: base, spec: &model(base).spec });
    here(&own).unwrap();
    assert_eq!(trained_on.notice(adapter, &model(&own).digests).unwrap(), None);

    // The same numbers even, with every group cut in two.
    let halves = changed("halves", 16, &|name, tensor| match name.rsplit('.').next() {
        Some("scales" | "qzeros") => tensor.repeat_interleave_self_int(2, 0, None),
        Some("g_idx") => tensor * 2,
        _ => tensor,
    });
    let error = here(&halves).unwrap_err().to_string();
    assert!(error.contains("4 bits in groups of 32") && error.contains("4 bits in groups of 16"), "{error}");

    let one = "model.layers.1.self_attn.q_proj";
    let others = changed("others", 32, &|name, tensor| match name.strip_suffix(".qweight") == Some(one) {
        true => tensor.bitwise_xor(1),
        false => tensor,
    });
    here(&others).unwrap();
    let error = trained_on.notice(adapter, &model(&others).digests).unwrap_err().to_string();
    assert!(error.contains("1 of 14") && error.contains(one), "{error}");
}

/// A base in eight bits may be quantised to fewer, and to rows of fp8.
#[test]
fn a_base_in_fp8_may_be_quantised_again() {
    let checkpoint = Checkpoint::open(&BaseSource::Folder(folder("stored-fp8-blocks"))).unwrap();
    let plain = Decoder::load(&checkpoint, Kind::Float, Device::Cpu, &|_, _| ()).unwrap();
    let four_bit = Form::FourBit { code: FourBitType::Nf4, block: 64, double_quant: true };
    for form in [four_bit, Form::Fp8] {
        let scheme = Scheme { form, ..scheme("stored-fp8-blocks").unwrap() };
        let model = Decoder::load_kept(&checkpoint, Kind::Float, Device::Cpu, Some(&scheme), &|_, _| ()).unwrap();
        for (own, other) in model.linears().into_iter().zip(plain.linears()) {
            if scheme.skips(&own.name) {
                assert_eq!(own.weight.dense(), other.weight.dense(), "{}", own.name);
            } else {
                assert_eq!(own.weight.dense(), scheme.numbers(&other.weight.dense()), "{}", own.name);
                assert!(matches!(own.weight, Weight::Quantised(_)), "{}", own.name);
            }
        }
    }
}

/// The adapter of a fixture as what is merged.
fn updates(name: &str, model: &Decoder) -> Vec<Update> {
    let adapter = LoadedAdapter::read(&folder(name).join("adapter")).unwrap();
    adapter.fit(&model.spec.sites(), &model.spec.names).unwrap().into_values().collect()
}

#[test]
fn merged_onto_the_numbers_it_was_trained_on_the_model_answers_as_the_trained_one() {
    for name in ["dora"].into_iter().chain(QLORA).chain(WHOLE) {
        let reference = tensors(&folder(name).join("reference.safetensors"));
        let batch = documented(&reference, "");
        let checkpoint = Checkpoint::open(&BaseSource::Folder(base(name))).unwrap();
        let spec = load(name).spec;
        let adapter = LoadedAdapter::read(&folder(name).join("adapter")).unwrap();
        let updates: Vec<Update> = adapter.fit(&spec.sites(), &spec.names).unwrap().into_values().collect();
        let saved = adapter.saved(&spec).unwrap();
        let place = tempfile::tempdir().unwrap();
        let logits = |checkpoint: &Checkpoint, onto: Option<&Scheme>| {
            let merged = place.path().join(format!("{}-{}", onto.is_some(), checkpoint.quantised_form().is_some()));
            let config = [("config.json".to_string(), checkpoint.sidecars["config.json"].clone())].into();
            engraft::export::merged::write(
                &merged,
                checkpoint,
                Learned { updates: &updates, saved: &saved },
                onto,
                Kind::Float,
                &config,
                &|_, _| (),
            )
            .unwrap();
            let merged = Checkpoint::open(&BaseSource::Folder(merged)).unwrap();
            let model = Decoder::load(&merged, Kind::Float, Device::Cpu, &|_, _| ()).unwrap();
            model.logits(&model.hidden(&batch.ids, &batch.positions, &batch.documents, Forward::default()))
        };
        assert_close(name, &logits(&checkpoint, scheme(name).as_ref()), &reference["logits"], TOLERANCE);
        if scheme(name).is_none() {
            continue;
        }
        let stored = Checkpoint::open(&BaseSource::Folder(base(name).join("quantised"))).unwrap();
        // Stored quantised, its numbers are not quantised once more.
        assert_close(name, &logits(&stored, scheme(name).as_ref()), &reference["logits"], TOLERANCE);
        let drift = (logits(&checkpoint, None) - &reference["logits"]).abs().max().double_value(&[]);
        assert!(drift > 0.1, "{name}: the original's numbers are others, yet merging onto them drifts by {drift}");
    }
}
