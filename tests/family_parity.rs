//! Every family against transformers and PEFT: full tensors recorded by `tests/python/families.py`, in fp32. Weights are not
//! stored: both sides make them from a tensor's name and an element's index.

mod generator;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use engraft::adapter::{Adapters, LoadedAdapter, Update, layout};
use engraft::export::{merged, peft};
use engraft::model::{Balance, Decoder, Documents, Forward, Sampling, Thrift, families};
use engraft::quant::{Form, FourBitType, Products, Scheme};
use engraft::recipe::{AdapterRecipe, BaseSource, Targets};
use engraft::weights::Checkpoint;
use engraft::weights::writer::{self, TensorSpec};
use generator::{values, whole_numbers};
use tch::{Device, Kind, Tensor};

/// The fixtures that are compared; the README's table is made of them.
const VERIFIED: &[&str] = &[
    "llama",
    "mobilellm",
    "smollm3",
    "mistral",
    "mistral3",
    "ministral",
    "ministral3",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen2_moe",
    "qwen2_moe-normalised",
    "qwen3_moe",
    "qwen3_moe-sliding",
    "phimoe",
    "llama4",
    "gpt_oss",
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_text-long",
    "qwen3_5",
    "qwen3_5_moe_text",
    "qwen3_5_moe",
    "granite",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "gemma4_text",
    "gemma4_text-experts",
    "gemma4",
    "phi3",
    "phi3-longrope",
    "glm",
    "glm4",
    "olmo2",
    "olmo3",
    "cohere",
    "cohere2",
    "starcoder2",
    "gpt_neox",
    "gpt_neox-sequential",
    "stablelm",
    "stablelm-sequential",
    "phi",
    "falcon",
    "falcon-grouped",
    "falcon-alibi",
    "bloom",
    "deepseek_v2",
    "deepseek_v2-lite",
    "deepseek_v2-dense",
    "deepseek_v3",
    "deepseek_v3-halves",
    "deepseek_v3-dense",
    "deepseek_v4",
];
const TOLERANCE: f64 = 3e-5;

/// A fixture's model and adapter, written out as a checkpoint and an adapter's folder.
struct Fixture {
    name: &'static str,
    folder: tempfile::TempDir,
    reference: HashMap<String, Tensor>,
}

impl Fixture {
    fn new(name: &'static str) -> Self {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families").join(name);
        let folder = tempfile::tempdir().unwrap();
        let adapter = folder.path().join("adapter");
        std::fs::create_dir(&adapter).unwrap();
        std::fs::copy(source.join("config.json"), folder.path().join("config.json")).unwrap();
        let config = "adapter/adapter_config.json";
        std::fs::copy(source.join(config), folder.path().join(config)).unwrap();
        write(&source.join("tensors.json"), &folder.path().join("model.safetensors"));
        write(&source.join("adapter/adapter_tensors.json"), &adapter.join("adapter_model.safetensors"));
        if source.join("peft").is_dir() {
            let own = folder.path().join("peft");
            std::fs::create_dir(&own).unwrap();
            std::fs::copy(source.join("peft/adapter_config.json"), own.join("adapter_config.json")).unwrap();
            write(&source.join("peft/adapter_tensors.json"), &own.join("adapter_model.safetensors"));
        }
        Self { name, folder, reference: read(&source.join("reference.safetensors")) }
    }

    fn checkpoint(&self) -> Checkpoint {
        Checkpoint::open(&BaseSource::Folder(self.folder.path().to_path_buf())).unwrap()
    }

    fn base(&self) -> Decoder {
        load(&self.checkpoint(), self.name)
    }

    fn adapter(&self) -> LoadedAdapter {
        self.adapter_in("adapter")
    }

    fn adapter_in(&self, folder: &str) -> LoadedAdapter {
        let adapter = LoadedAdapter::read(&self.folder.path().join(folder));
        adapter.unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }

    fn documents(&self) -> Documents {
        Documents { offsets: Vec::<i64>::try_from(&self.reference["offsets"]).unwrap() }
    }

    fn logits(&self, model: &Decoder) -> Tensor {
        model.logits(&self.hidden(model, Forward::default()))
    }

    fn hidden(&self, model: &Decoder, forward: Forward) -> Tensor {
        let documents = self.documents();
        let positions: Vec<i64> = documents.spans().flat_map(|(_, length)| 0..length).collect();
        model.hidden(&self.reference["ids"], &Tensor::from_slice(&positions), &documents, forward)
    }

    #[track_caller]
    fn assert_close(&self, what: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
        let name = self.name;
        assert_eq!(found.size(), expected.size(), "{name}: {what}: shapes");
        let scale = expected.abs().max().double_value(&[]).max(1e-30);
        let worst = (found - expected).abs().max().double_value(&[]) / scale;
        assert!(worst < tolerance, "{name}: {what} is off by {worst:e} of its largest value");
    }
}

fn load(checkpoint: &Checkpoint, name: &str) -> Decoder {
    let model = Decoder::load(checkpoint, Kind::Float, Device::Cpu, &|_, _| ());
    model.unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn read(path: &Path) -> HashMap<String, Tensor> {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |view: &safetensors::tensor::TensorView<'_>| {
        let kind = if view.dtype() == safetensors::Dtype::I64 { Kind::Int64 } else { Kind::Float };
        let shape: Vec<i64> = view.shape().iter().map(|n| *n as i64).collect();
        Tensor::from_data_size(view.data(), &shape, kind)
    };
    file.tensors().into_iter().map(|(name, view)| (name, tensor(&view))).collect()
}

/// Makes every tensor of a list `[[name, shape, offset, scale]]`, or `[[name, shape, "i64", limit]]`, and writes them as safetensors.
fn write(list: &Path, to: &Path) {
    type Line = (String, Vec<i64>, serde_json::Value, f32);
    let lines: Vec<Line> = serde_json::from_slice(&std::fs::read(list).unwrap()).unwrap();
    let spec = |(name, shape, offset, _): &Line| {
        let kind = if offset == "i64" { Kind::Int64 } else { Kind::Float };
        TensorSpec { name: name.clone(), kind, shape: shape.clone() }
    };
    let specs: Vec<TensorSpec> = lines.iter().map(spec).collect();
    let tensor = |index: usize| {
        let (name, shape, offset, scale) = &lines[index];
        let made = match offset.as_f64() {
            Some(offset) => {
                Tensor::from_slice(&values(name, shape.iter().product::<i64>() as usize, offset as f32, *scale))
            }
            None => Tensor::from_slice(&whole_numbers(name, shape[0] as usize, shape[1] as usize, *scale as i64)),
        };
        Ok(made.view(&shape[..]))
    };
    writer::write(to, &specs, &BTreeMap::new(), tensor).unwrap();
}

#[test]
fn the_generator_is_that_of_python() {
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<u32>>();
    let found = bits(values("model.embed_tokens.weight", 4, 0.0, 0.8));
    assert_eq!(found, [0xbe52_e0b3, 0xbe93_70ed, 0x3cae_21cd, 0xbece_138a]);
    assert_eq!(whole_numbers("layers.0.ffn.gate.tid2eid", 3, 2, 5), [0, 1, 4, 0, 2, 3]);
}

#[test]
fn logits_are_those_of_transformers_and_peft() {
    for fixture in VERIFIED.iter().map(|name| Fixture::new(name)) {
        let mut model = fixture.base();
        fixture.assert_close("logits", &fixture.logits(&model), &fixture.reference["base_logits"], TOLERANCE);
        Adapters::attach_loaded(&mut model, &fixture.adapter(), 0.0, None).unwrap();
        fixture.assert_close("adapted logits", &fixture.logits(&model), &fixture.reference["logits"], TOLERANCE);
    }
}

#[test]
fn the_loss_and_every_adapter_gradient_are_those_of_peft_also_when_recomputed() {
    for fixture in VERIFIED.iter().map(|name| Fixture::new(name)) {
        let layers = fixture.base().spec.layers.len();
        let tiled = Thrift { feed_forward_tile: Some(3), offload: true, ..Thrift::recomputing(layers) };
        for thrift in [0, layers.div_ceil(2), layers].map(Thrift::recomputing).into_iter().chain([tiled]) {
            let mut model = fixture.base();
            let adapters = Adapters::attach_loaded(&mut model, &fixture.adapter(), 0.0, None).unwrap();
            let forward = Forward { thrift, ..Forward::default() };
            let targets_at = fixture.reference["mask"].nonzero().squeeze_dim(1);
            let rows = fixture.hidden(&model, forward).index_select(0, &(&targets_at - 1));
            let targets = fixture.reference["ids"].index_select(0, &targets_at);
            let loss = model.cross_entropy(&rows, &targets, forward, 1.0 / targets.size()[0] as f64);
            fixture.assert_close("loss", &loss.view([1]), &fixture.reference["loss"], TOLERANCE);
            loss.backward();
            let found = gradients(&adapters);
            assert_eq!(found.len(), fixture.reference.keys().filter(|key| key.starts_with("grad.")).count());
            for (key, gradient) in found {
                let expected = &fixture.reference;
                let expected =
                    expected.get(&format!("grad.{key}")).or(expected.get(&format!("grad.{}", published(&key))));
                fixture.assert_close(
                    &key,
                    &gradient,
                    expected.unwrap_or_else(|| panic!("{}: {key}", fixture.name)),
                    1e-4,
                );
            }
        }
    }
}

/// The gradients of all adapters, under the keys and in the shapes of PEFT's files.
fn gradients(adapters: &Adapters) -> Vec<(String, Tensor)> {
    let of = |update: &Update| {
        let [a, b] = [&update.a, &update.b].map(|leaf| {
            let gradient = leaf.grad();
            if gradient.defined() { gradient } else { leaf.zeros_like() }
        });
        Update { a, b, ..update.shallow_clone() }
    };
    layout::tensors(&adapters.updates().iter().map(of).collect::<Vec<_>>())
}

/// Fixtures call Mixtral's router as its checkpoints do, engraft as PEFT itself does; PEFT reads both.
fn published(key: &str) -> String {
    if key.contains("experts") { key.into() } else { key.replace(".mlp.gate.", ".block_sparse_moe.gate.") }
}

/// What PEFT itself saves for experts, which is not how the checkpoint has them.
#[test]
fn adapters_that_peft_saved_for_experts_give_its_logits() {
    let with_one: Vec<Fixture> = VERIFIED.iter().map(|name| Fixture::new(name)).collect();
    for fixture in with_one.iter().filter(|fixture| fixture.folder.path().join("peft").is_dir()) {
        let mut model = fixture.base();
        Adapters::attach_loaded(&mut model, &fixture.adapter_in("peft"), 0.0, None).unwrap();
        fixture.assert_close("logits", &fixture.logits(&model), &fixture.reference["peft_logits"], TOLERANCE);
    }
}

#[test]
fn the_balancing_loss_of_routers_and_its_gradient_are_those_of_transformers() {
    let all: Vec<Fixture> = VERIFIED.iter().map(|name| Fixture::new(name)).collect();
    let routed: Vec<&Fixture> = all.iter().filter(|f| f.reference.contains_key("aux_loss")).collect();
    assert!(!routed.is_empty());
    for fixture in routed {
        for (recomputed_layers, by_recipe) in [(0, false), (100, true)] {
            // The first document alone, with a coefficient of 1: the config's, or one that a recipe gives.
            let mut config: serde_json::Value =
                serde_json::from_slice(&std::fs::read(fixture.folder.path().join("config.json")).unwrap()).unwrap();
            let text = if config.get("text_config").is_some() { &mut config["text_config"] } else { &mut config };
            text["output_router_logits"] = (!by_recipe).into();
            text["router_aux_loss_coef"] = 1.0.into();
            let mut checkpoint = fixture.checkpoint();
            checkpoint.config = config;
            let mut model = load(&checkpoint, fixture.name);
            if by_recipe {
                assert!(!model.balances_experts() && model.balance_experts(1.0), "{}", fixture.name);
            }
            let adapters = Adapters::attach_loaded(&mut model, &fixture.adapter(), 0.0, None).unwrap();
            let (_, length) = fixture.documents().spans().next().unwrap();
            let documents = Documents::one(length);
            let balance = Balance::new(&[1.0], Device::Cpu);
            let forward = Forward {
                thrift: Thrift::recomputing(recomputed_layers),
                balance: Some(&balance),
                ..Forward::default()
            };
            let ids = fixture.reference["ids"].narrow(0, 0, length);
            let positions = Tensor::arange(length, (Kind::Int64, Device::Cpu));
            let hidden = model.hidden(&ids, &positions, &documents, forward);
            let expected = fixture.reference["aux_loss"].narrow(0, 1, 1);
            fixture.assert_close("balancing loss", &balance.loss(&documents).view([1]), &expected, TOLERANCE);
            // Nothing else is in the gradient.
            (hidden * 0.0).sum(Kind::Float).backward();
            let found: HashMap<String, Tensor> =
                gradients(&adapters).into_iter().flat_map(|(key, t)| [(published(&key), t.copy()), (key, t)]).collect();
            let wanted = fixture.reference.iter().filter_map(|(key, t)| Some((key.strip_prefix("aux_grad.")?, t)));
            for (key, expected) in wanted {
                fixture.assert_close(key, &found[key], expected, 1e-4);
            }
        }
    }
}

#[test]
fn greedy_generation_with_a_cache_gives_the_tokens_of_transformers() {
    for fixture in VERIFIED.iter().map(|name| Fixture::new(name)) {
        let mut model = fixture.base();
        Adapters::attach_loaded(&mut model, &fixture.adapter(), 0.0, None).unwrap();
        let ids = |key: &str| -> Vec<u32> {
            Vec::<i64>::try_from(&fixture.reference[key]).unwrap().into_iter().map(|id| id as u32).collect()
        };
        let sampling = Sampling { max_tokens: ids("generated").len(), ..Sampling::default() };
        // Beside others of other lengths, which must make no difference.
        let prompts = vec![ids("prompt")[..5].to_vec(), ids("prompt"), ids("prompt")[..9].to_vec()];
        let answers = model.generate(&prompts, &sampling, &mut |_, _| std::ops::ControlFlow::Continue(()));
        assert_eq!(answers[1].ids, ids("generated"), "{}", fixture.name);
    }
}

/// Three sequences at once, by pieces of uneven lengths (none, one token, more than a window), of which the first is dropped
/// halfway while the other two change places. All are shorter than the original context where positions are stretched by length.
#[test]
fn a_cache_gives_the_hidden_states_of_the_full_forward_for_the_sequences_it_is_told_to_keep() {
    for fixture in VERIFIED.iter().map(|name| Fixture::new(name)) {
        let mut model = fixture.base();
        Adapters::attach_loaded(&mut model, &fixture.adapter(), 0.0, None).unwrap();
        let whole = Documents { offsets: vec![0, 8, 15, 30] };
        let spans: Vec<(i64, i64)> = whole.spans().collect();
        let positions: Vec<i64> = spans.iter().flat_map(|(_, length)| 0..*length).collect();
        let ids = fixture.reference["ids"].narrow(0, 0, 30);
        let expected = model.hidden(&ids, &Tensor::from_slice(&positions), &whole, Forward::default());
        let mut cache = model.cache(3);
        let mut seen = [0i64; 3];
        let steps: [&[i64]; 6] = [&[5, 3, 1], &[2, 1, 11], &[1, 1, 1], &[1, 1], &[1, 0], &[0, 1]];
        for (step, pieces) in steps.into_iter().enumerate() {
            let order = if step < 3 { &[0usize, 1, 2][..] } else { &[2, 1] };
            if step == 3 {
                cache.keep(order);
            }
            let rows: Vec<i64> = order
                .iter()
                .zip(pieces)
                .flat_map(|(which, piece)| {
                    let from = spans[*which].0 + seen[*which];
                    seen[*which] += piece;
                    from..from + piece
                })
                .collect();
            let ends = pieces.iter().scan(0, |end, piece| {
                *end += piece;
                Some(*end)
            });
            let documents = Documents { offsets: std::iter::once(0).chain(ends).collect() };
            let rows = Tensor::from_slice(&rows);
            let found = model.hidden_cached(&ids.index_select(0, &rows), &documents, &mut cache);
            fixture.assert_close("cached", &found, &expected.index_select(0, &rows), TOLERANCE);
        }
        assert_eq!(seen, [8, 7, 15]);
    }
}

/// transformers means to read all again there, and in 5.17 goes on from the last token alone: the full forward is what is right.
#[test]
fn a_sequence_that_outgrows_the_original_context_is_continued_as_the_full_forward_continues_it() {
    for fixture in ["phi3-longrope", "phimoe"].map(Fixture::new) {
        let model = fixture.base();
        let last_logits = |hidden: &Tensor| model.logits(&hidden.narrow(0, hidden.size()[0] - 1, 1)); // (1, V)
        let tensor = |ids: &[u32]| Tensor::from_slice(&ids.iter().map(|id| i64::from(*id)).collect::<Vec<_>>());
        let full = |ids: &[u32]| {
            let length = ids.len() as i64;
            let positions = Tensor::arange(length, (Kind::Int64, Device::Cpu));
            last_logits(&model.hidden(&tensor(ids), &positions, &Documents::one(length), Forward::default()))
        };
        let ids: Vec<u32> =
            Vec::<i64>::try_from(&fixture.reference["ids"]).unwrap().iter().map(|id| *id as u32).collect();
        // The original context has 16 tokens; the second sequence outgrows it at another step, the third has done so.
        let prompts: Vec<Vec<u32>> = vec![ids[..9].to_vec(), ids[3..14].to_vec(), ids[1..19].to_vec()];
        let sampling = Sampling { max_tokens: 16, ..Sampling::default() };
        let answers = model.generate(&prompts, &sampling, &mut |_, _| std::ops::ControlFlow::Continue(()));
        let mut kept_alone_differs = false;
        for (prompt, answer) in prompts.iter().zip(&answers) {
            let (mut cache, mut new) = (model.cache(1), prompt.clone());
            let mut so_far = prompt.clone();
            for (place, found) in answer.ids.iter().enumerate() {
                let logits = full(&so_far);
                let expected = logits.argmax(-1, false).int64_value(&[0]) as u32;
                assert_eq!(*found, expected, "{}: token {place} after {} tokens", fixture.name, prompt.len());
                let length = new.len() as i64;
                let kept = last_logits(&model.hidden_cached(&tensor(&new), &Documents::one(length), &mut cache));
                let off = (kept - &logits).abs().max() / logits.abs().max();
                kept_alone_differs |= off.double_value(&[]) > 1e-2;
                so_far.push(*found);
                new = vec![*found];
            }
        }
        assert!(
            kept_alone_differs,
            "{}: keys that stay as they were give the same, so this shows nothing",
            fixture.name
        );
    }
}

/// PEFT loses adapters of what it takes for experts, unless they are called parameters: also in a model of such a type that has
/// no experts. The fixtures' configurations are those with which it has them; routers may be either.
#[test]
fn what_peft_must_adapt_as_a_parameter_is_called_one() {
    for fixture in VERIFIED.iter().map(|name| Fixture::new(name)) {
        let config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(fixture.folder.path().join("adapter/adapter_config.json")).unwrap())
                .unwrap();
        let expected: Option<Vec<String>> = serde_json::from_value(config["target_parameters"].clone()).unwrap();
        let mut model = fixture.base();
        let found =
            Adapters::attach_loaded(&mut model, &fixture.adapter(), 0.0, None).unwrap().config.target_parameters;
        assert_eq!(found.is_some(), expected.is_some(), "{}", fixture.name);
        let found: BTreeSet<String> = found.unwrap_or_default().into_iter().collect();
        let expected: BTreeSet<String> = expected.unwrap_or_default().into_iter().collect();
        assert_eq!(expected.difference(&found).next(), None, "{}", fixture.name);
        let more = found.difference(&expected).find(|name| !name.ends_with(".router.proj.weight"));
        assert_eq!(more, None, "{}", fixture.name);
    }
}

/// The fixtures that have experts, with the keys of their adapters: those of every linear, expert and router.
fn with_experts() -> Vec<(Fixture, BTreeSet<String>)> {
    let keys = |fixture: &Fixture| {
        let keys = read(&fixture.folder.path().join("adapter/adapter_model.safetensors")).into_keys();
        keys.map(|key| key.replace("block_sparse_moe.gate.", "mlp.gate.")).collect::<BTreeSet<String>>()
    };
    let all = VERIFIED.iter().map(|name| Fixture::new(name)).map(|fixture| (keys(&fixture), fixture));
    let all = all.filter(|(keys, _)| keys.iter().any(|key| key.contains(".experts.")));
    all.map(|(keys, fixture)| (fixture, keys)).collect()
}

/// Whether a key or a parameter is of a router, as the families call theirs.
fn of_router(name: &str) -> bool {
    let parts: Vec<&str> = name.split('.').collect();
    parts.contains(&"router") || parts.windows(2).any(|pair| pair == ["mlp", "gate"])
}

/// What training would begin with.
fn attached(fixture: &Fixture, target_modules: Targets) -> engraft::Result<Adapters> {
    let recipe = AdapterRecipe { r: 3, lora_alpha: 6.0, target_modules, ..AdapterRecipe::default() };
    Adapters::attach(&mut fixture.base(), &recipe, 1, None)
}

fn named(names: &[&str]) -> Targets {
    Targets::Names(names.iter().map(ToString::to_string).collect())
}

fn keys_of(adapters: &Adapters) -> BTreeSet<String> {
    layout::tensors(adapters.updates()).into_iter().map(|(key, _)| key).collect()
}

/// What the adapter's config of a fixture says of a field, and what is said of the same now.
fn described(fixture: &Fixture, adapters: &Adapters, field: &str) -> [serde_json::Value; 2] {
    let ours = fixture.folder.path().join("described");
    peft::write(&ours, &adapters.config, adapters.learned(), None, &BTreeMap::new()).unwrap();
    [fixture.folder.path().join("adapter"), ours].map(|folder| {
        let text = std::fs::read(folder.join("adapter_config.json")).unwrap();
        serde_json::from_slice::<serde_json::Value>(&text).unwrap()[field].take()
    })
}

#[test]
fn all_linear_is_every_expert_and_no_router_and_is_described_as_peft_reads_it() {
    let all = with_experts();
    assert!(all.len() > 15);
    for (fixture, keys) in all {
        let name = fixture.name;
        let adapters = attached(&fixture, Targets::Pattern("all-linear".into())).unwrap();
        // No gradient reaches what chooses entries.
        let trained = |key: &&String| !of_router(key) && !key.contains(".indexer.");
        let expected: BTreeSet<String> = keys.iter().filter(trained).cloned().collect();
        assert_eq!(keys_of(&adapters), expected, "{name}");
        let names = |value: &serde_json::Value| {
            let names: Option<Vec<String>> = serde_json::from_value(value.clone()).unwrap();
            names.unwrap_or_default().into_iter().filter(|name| trained(&name)).collect::<BTreeSet<String>>()
        };
        let parameters = described(&fixture, &adapters, "target_parameters");
        assert_eq!(names(&parameters[1]), names(&parameters[0]), "{name}");
        let routers = parameters[1].as_array().unwrap().iter().filter(|name| of_router(name.as_str().unwrap()));
        assert_eq!(routers.count(), 0, "{name}");
        for field in ["rank_pattern", "alpha_pattern", "r", "lora_alpha"] {
            let [theirs, ours] = described(&fixture, &adapters, field);
            let number = |value: &serde_json::Value| value.to_string().replace(".0", "");
            assert_eq!(number(&ours), number(&theirs), "{name}: {field}");
        }
    }
}

#[test]
fn a_router_is_trained_where_it_is_named() {
    for (fixture, keys) in with_experts() {
        let ends = |key: &str| {
            let path = key.split(".lora_").next().unwrap();
            path.rmatch_indices('.').nth(1).map_or(path, |(at, _)| &path[at + 1..]).to_string()
        };
        let attention = keys.iter().find(|key| key.contains("self_attn") && !key.contains("compressor")).unwrap();
        let router = keys.iter().find(|key| of_router(key)).unwrap();
        let both = [ends(attention), ends(router)];
        let adapters = attached(&fixture, named(&[both[0].as_str(), both[1].as_str()])).unwrap();
        let expected: BTreeSet<String> = keys.iter().filter(|key| both.contains(&ends(key))).cloned().collect();
        assert!(expected.iter().any(|key| of_router(key)) && expected.iter().any(|key| !of_router(key)));
        assert_eq!(keys_of(&adapters), expected, "{}: {both:?}", fixture.name);
        let [_, parameters] = described(&fixture, &adapters, "target_parameters");
        let called = |name: &serde_json::Value| of_router(name.as_str().unwrap());
        assert!(parameters.as_array().unwrap().iter().any(called), "{}: {parameters}", fixture.name);
    }
}

/// PEFT fuses what transformers has in one parameter: neither a part of the experts nor a part of that parameter is an adapter to it.
#[test]
fn a_part_of_what_peft_fuses_is_refused() {
    let mut apart = 0;
    for (fixture, keys) in with_experts() {
        let of = |part: &str| keys.iter().any(|key| key.contains(&format!(".experts.0.{part}.lora_A")));
        let Some((gate, down)) = [("gate_proj", "down_proj"), ("w1", "w2")].into_iter().find(|(gate, _)| of(gate))
        else {
            continue;
        };
        apart += 1;
        let fault = |names: &[&str]| attached(&fixture, named(names)).map(|_| ()).unwrap_err().to_string();
        let one = fault(&[&format!("experts.0.{down}")]);
        assert!(one.contains("names 1 of the"), "{}: {one}", fixture.name);
        let half = fault(&[gate]);
        assert!(half.contains("PEFT fuses them") && half.contains(gate), "{}: {half}", fixture.name);
        // Down alone is a parameter of its own.
        let only = attached(&fixture, named(&[down])).unwrap();
        assert!(keys_of(&only).iter().any(|key| key.contains(&format!(".experts.4.{down}."))), "{}", fixture.name);
    }
    assert!(apart > 8, "{apart}");
}

#[test]
fn adapters_and_merged_models_read_back_as_what_was_written() {
    for fixture in VERIFIED.iter().map(|name| Fixture::new(name)) {
        let checkpoint = fixture.checkpoint();
        let mut model = fixture.base();
        let adapters = Adapters::attach_loaded(&mut model, &fixture.adapter(), 0.0, None).unwrap();
        let place = |name: &str| -> PathBuf { fixture.folder.path().join("written").join(name) };
        peft::write(&place("adapter"), &adapters.config, adapters.learned(), None, &BTreeMap::new()).unwrap();
        let [ours, theirs] = [place("adapter"), fixture.folder.path().join("adapter")]
            .map(|folder| read(&folder.join("adapter_model.safetensors")));
        assert_eq!(ours.len(), theirs.len());
        for (key, tensor) in &ours {
            let expected = theirs.get(key).or(theirs.get(&published(key)));
            assert_eq!(expected, Some(tensor), "{}: {key}", fixture.name);
        }

        let config = BTreeMap::from([("config.json".to_string(), checkpoint.sidecars["config.json"].clone())]);
        merged::write(&place("merged"), &checkpoint, adapters.learned(), None, Kind::Float, &config, &|_, _| ())
            .unwrap();
        let merged = Checkpoint::open(&BaseSource::Folder(place("merged"))).unwrap();
        let logits = fixture.logits(&load(&merged, fixture.name));
        fixture.assert_close("merged logits", &logits, &fixture.reference["logits"], TOLERANCE);
    }
}

/// What is computed in fp32 is merged as it is stored: rounded to the type of the quantised numbers it would be another model.
#[test]
fn a_model_merged_onto_quantised_numbers_answers_as_the_quantised_one() {
    let form = Form::FourBit { code: FourBitType::Nf4, block: 64, double_quant: true };
    let kind = Kind::BFloat16;
    let products = Products::Dequantised;
    let scheme = Scheme { form, kind, skip: vec!["lm_head".into()], products, after_start: false };
    for fixture in VERIFIED.iter().map(|name| Fixture::new(name)) {
        let checkpoint = fixture.checkpoint();
        let load_kept = Decoder::load_kept(&checkpoint, Kind::Float, Device::Cpu, Some(&scheme), &|_, _| ());
        let expected = fixture.logits(&load_kept.unwrap_or_else(|error| panic!("{}: {error}", fixture.name)));
        let folder = fixture.folder.path().join("merged");
        let config = BTreeMap::from([("config.json".to_string(), checkpoint.sidecars["config.json"].clone())]);
        let nothing: &[Update] = &[];
        merged::write(&folder, &checkpoint, nothing.into(), Some(&scheme), Kind::Float, &config, &|_, _| ()).unwrap();
        let merged = Checkpoint::open(&BaseSource::Folder(folder)).unwrap();
        fixture.assert_close("merged", &fixture.logits(&load(&merged, fixture.name)), &expected, 1e-5);
    }
}

/// transformers writes a config otherwise than it is published: positions in one object, derived lists in full.
#[test]
fn a_config_that_transformers_has_saved_again_is_the_same_model() {
    for name in VERIFIED {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families").join(name);
        let [published, saved] = ["config.json", "saved.json"].map(|file| {
            let config: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.join(file)).unwrap()).unwrap();
            families::from_config(&config).unwrap_or_else(|error| panic!("{name}: {file}: {error}"))
        });
        assert_eq!(saved, published, "{name}");
    }
}

/// A config may say that the head is the embedding where the files have one of its own: transformers goes by the files.
#[test]
fn a_head_that_differs_from_the_embedding_it_is_said_to_be_is_its_own() {
    let fixture = Fixture::new("llama");
    let mut checkpoint = fixture.checkpoint();
    checkpoint.config["tie_word_embeddings"] = true.into();
    let model = load(&checkpoint, fixture.name);
    fixture.assert_close("logits", &fixture.logits(&model), &fixture.reference["base_logits"], TOLERANCE);
    assert!(!model.spec.head.tied);

    // The same numbers twice are one head.
    let again = tempfile::tempdir().unwrap();
    let names = checkpoint.names().iter().map(ToString::to_string).collect::<Vec<_>>();
    let embedding = checkpoint.tensor("model.embed_tokens.weight", Kind::Float, Device::Cpu).unwrap();
    let tensors: Vec<(String, Tensor)> = names
        .into_iter()
        .map(|name| {
            let own = checkpoint.tensor(&name, Kind::Float, Device::Cpu).unwrap();
            let tensor = if name == "lm_head.weight" { embedding.copy() } else { own };
            (name, tensor)
        })
        .collect();
    Tensor::write_safetensors(&tensors, again.path().join("model.safetensors")).unwrap();
    std::fs::write(again.path().join("config.json"), checkpoint.config.to_string()).unwrap();
    let checkpoint = Checkpoint::open(&BaseSource::Folder(again.path().to_path_buf())).unwrap();
    assert!(families::spec(&checkpoint).unwrap().head.tied);
}

/// Everything under `tests/fixtures` is fetched by everyone who clones.
#[test]
fn fixtures_stay_small() {
    fn bytes(folder: &Path) -> u64 {
        let entries = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
        entries
            .map(|entry| if entry.path().is_dir() { bytes(&entry.path()) } else { entry.metadata().unwrap().len() })
            .sum()
    }
    // What shows that families are right; and the rest: quantisers, optimizers, adapters.
    let of_families = ["families", "llama", "gguf", "tokenizer", "templates", "chat-families"];
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let found: u64 = of_families.iter().map(|folder| bytes(&fixtures.join(folder))).sum();
    assert!(found < 15_000_000, "{found} bytes");
    let rest = bytes(&fixtures) - found;
    assert!(rest < 3_000_000, "{rest} bytes of others");
}

/// One row of the README for each family, made of what is compared here.
fn table() -> String {
    let mut text = String::from("| `model_type` | Known as | Compared with transformers and PEFT |\n|---|---|---|\n");
    for (model_type, known_as) in families::supported() {
        let of = |name: &&&str| name.split('-').next() == Some(model_type);
        let variants: Vec<&str> =
            VERIFIED.iter().filter(of).map(|name| name.split_once('-').map_or("", |v| v.1)).collect();
        let what = match variants.iter().filter(|variant| !variant.is_empty()).copied().collect::<Vec<_>>()[..] {
            _ if variants.is_empty() => "not by itself: it has the page of another".to_string(),
            [] => "logits, gradients, generation, adapter, merge".into(),
            ref more => format!("the same, also {}", more.join(", ")),
        };
        text += &format!("| `{model_type}` | {known_as} | {what} |\n");
    }
    text
}

#[test]
fn the_readmes_table_is_made_of_what_is_compared_here() {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let (begin, end) = ("<!-- families -->\n", "<!-- /families -->");
    let written = readme.split(begin).nth(1).and_then(|rest| rest.split(end).next());
    assert_eq!(written, Some(table().as_str()), "put this between `{begin}` and `{end}` in README.md:\n{}", table());
}
