//! One model under all the names it is published with: files in every layout, adapters and recipes in every spelling.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use engraft::adapter::{Adapters, LoadedAdapter};
use engraft::export::{merged, peft};
use engraft::model::{Decoder, Documents, Forward, families};
use engraft::recipe::{AdapterRecipe, BaseSource, Targets};
use engraft::weights::Checkpoint;
use engraft::weights::writer::{self, TensorSpec};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// A folder with a small model: the config of a fixture, its tensors by their names in the spec, spelled by `spell`.
fn folder(fixture: &str, change: impl Fn(&mut Value), spell: impl Fn(&str) -> String) -> tempfile::TempDir {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families").join(fixture).join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(&mut config);
    let tensors = families::from_config(&config).unwrap().tensors();
    let made: Vec<(TensorSpec, Tensor)> = tensors
        .into_iter()
        .zip(0..)
        .map(|((name, shape), index)| {
            // Not libtorch's generator, which tests that run at the same time share.
            let numbers = Tensor::arange(shape.iter().product::<i64>(), (Kind::Double, Device::Cpu));
            let scattered = ((numbers + index * 1000) * 12.9898).sin() * 43758.5453;
            let tensor = ((&scattered - scattered.floor() - 0.5) * 0.7).to_kind(Kind::Float).view(&shape[..]);
            // A table of experts.
            let tensor = if name.ends_with("tid2eid") { tensor.abs().to_kind(Kind::Int64) } else { tensor };
            (TensorSpec { name: spell(&name), kind: tensor.kind(), shape }, tensor)
        })
        .chain(fixture.ends_with('3').then(|| {
            let name = "vision_tower.layers.0.q_proj.weight".to_string();
            (
                TensorSpec { name, kind: Kind::Float, shape: vec![3, 2] },
                Tensor::ones([3, 2], (Kind::Float, Device::Cpu)),
            )
        }))
        .collect();
    let specs: Vec<TensorSpec> = made
        .iter()
        .map(|(spec, _)| TensorSpec { name: spec.name.clone(), kind: spec.kind, shape: spec.shape.clone() })
        .collect();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let at = folder.path().join("model.safetensors");
    writer::write(&at, &specs, &BTreeMap::new(), |index| Ok(made[index].1.shallow_clone())).unwrap();
    folder
}

fn open(folder: &Path) -> Checkpoint {
    Checkpoint::open(&BaseSource::Folder(folder.to_path_buf())).unwrap()
}

fn load(folder: &Path) -> Decoder {
    Decoder::load(&open(folder), Kind::Float, Device::Cpu, &|_, _| ()).unwrap()
}

fn logits(model: &Decoder) -> Tensor {
    let ids = Tensor::from_slice(&[1i64, 5, 9, 3, 17, 4]);
    let positions = Tensor::arange(6, (Kind::Int64, Device::Cpu));
    model.logits(&model.hidden(&ids, &positions, &Documents::one(6), Forward::default()))
}

fn targets(names: &[&str]) -> AdapterRecipe {
    let target_modules = Targets::Names(names.iter().map(ToString::to_string).collect());
    AdapterRecipe { r: 2, target_modules, ..AdapterRecipe::default() }
}

fn modules(adapters: &Adapters) -> BTreeSet<String> {
    adapters.updates().iter().map(|update| update.module.clone()).collect()
}

fn apart(name: &str) -> String {
    format!("language_model.{name}")
}

fn inside(name: &str) -> String {
    name.strip_prefix("model.").map_or_else(|| name.to_string(), |rest| format!("model.language_model.{rest}"))
}

fn without(name: &str) -> String {
    name.trim_start_matches("transformer.").to_string()
}

#[test]
fn the_layouts_a_family_is_published_in_give_the_same_logits() {
    type Spell = fn(&str) -> String;
    let cases: [(&str, [Spell; 2]); 4] = [
        ("gemma3", [apart, inside]),
        ("mistral3", [apart, inside]),
        ("bloom", [without, ToString::to_string]),
        // As published, and as transformers saves it.
        ("deepseek_v4", [ToString::to_string, |name| name.replace("attn.kv_norm.", "attn.norm.")]),
    ];
    for (fixture, [one, other]) in cases {
        let [one, other] = [one, other].map(|spell| folder(fixture, |_| (), spell));
        assert!(logits(&load(one.path())) == logits(&load(other.path())), "{fixture}");
    }
}

/// An adapter under PEFT's keys, under those of the files and under those of the text model alone is the same adapter, and is
/// saved under PEFT's.
#[test]
fn an_adapter_is_read_in_every_spelling_and_written_in_transformers() {
    for (fixture, spell, theirs) in [
        (
            "gemma3",
            apart as fn(&str) -> String,
            "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight",
        ),
        ("mistral3", inside, "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"),
        ("bloom", without, "base_model.model.transformer.h.0.mlp.dense_h_to_4h.lora_A.weight"),
        ("gpt_neox", |name| name.replace("lm_head", "embed_out"), "base_model.model.lm_head.lora_A.weight"),
    ] {
        let base = folder(fixture, |_| (), spell);
        let mut model = load(base.path());
        let recipe = targets(match fixture {
            "gpt_neox" => &["lm_head", "dense"],
            "bloom" => &["dense_h_to_4h"],
            _ => &["q_proj", "down_proj"],
        });
        let adapters = Adapters::attach(&mut model, &recipe, 1, None).unwrap();
        for (_, parameter) in adapters.parameters() {
            tch::no_grad(|| {
                let _ = parameter.shallow_clone().uniform_(-0.3, 0.3);
            });
        }
        let expected = logits(&model);
        assert!(expected != logits(&load(base.path())), "{fixture}: the adapter changes nothing");
        let saved = base.path().join("saved");
        peft::write(&saved, &adapters.config, adapters.learned(), None, &BTreeMap::new()).unwrap();
        let keys = adapters.parameters().into_iter().map(|(key, _)| key).collect::<Vec<_>>();
        assert!(keys.iter().any(|key| key == theirs), "{fixture}: {keys:?}");

        // As the files spell it.
        let prefix = "base_model.model.";
        let respelled = |key: &str| {
            let module = key.strip_prefix(prefix).unwrap();
            let alone =
                if fixture.ends_with('3') { module.replace("model.language_model.", "model.") } else { module.into() };
            format!("{prefix}{}", spell(&alone))
        };
        let weights: Vec<(String, Tensor)> =
            adapters.parameters().into_iter().map(|(key, tensor)| (respelled(&key), tensor.detach())).collect();
        let other = base.path().join("other");
        std::fs::create_dir(&other).unwrap();
        Tensor::write_safetensors(&weights, other.join("adapter_model.safetensors")).unwrap();
        std::fs::copy(saved.join("adapter_config.json"), other.join("adapter_config.json")).unwrap();
        for place in [&saved, &other] {
            let mut again = load(base.path());
            let loaded = LoadedAdapter::read(place).unwrap();
            let attached = Adapters::attach_loaded(&mut again, &loaded, 0.0, None).unwrap();
            assert!(logits(&again) == expected, "{fixture}: {}", place.display());
            assert_eq!(attached.parameters().into_iter().map(|(key, _)| key).collect::<Vec<_>>(), keys, "{fixture}");

            let merged = base.path().join(format!("merged-{}", place.file_name().unwrap().display()));
            let base = open(base.path());
            merged::write(
                &merged,
                &base,
                loaded.updates.as_slice().into(),
                None,
                Kind::Float,
                &BTreeMap::new(),
                &|_, _| (),
            )
            .unwrap();
            let worst = (logits(&load(&merged)) - &expected).abs().max().double_value(&[]);
            assert!(worst < 1e-4, "{fixture}: merged is off by {worst:e}");
            let names =
                |checkpoint: &Checkpoint| checkpoint.names().iter().map(ToString::to_string).collect::<BTreeSet<_>>();
            assert_eq!(names(&open(&merged)), names(&base), "{fixture}: merging changes no names");
            assert_eq!(open(&merged).config["model_type"], base.config["model_type"]);
        }
    }
}

#[test]
fn what_is_typed_may_be_the_files_spelling_too() {
    let neox = folder("gpt_neox", |_| (), |name| name.replace("lm_head", "embed_out"));
    let mut model = load(neox.path());
    let typed =
        |model: &mut Decoder, names: &[&str]| modules(&Adapters::attach(model, &targets(names), 1, None).unwrap());
    assert_eq!(typed(&mut model, &["embed_out"]), BTreeSet::from(["lm_head".to_string()]));
    assert_eq!(typed(&mut model, &["embed_out", "lm_head"]), BTreeSet::from(["lm_head".to_string()]));
    let pattern =
        AdapterRecipe { target_modules: Targets::Pattern(".*layers\\.0.*dense|embed_out".into()), ..targets(&[]) };
    let adapters = Adapters::attach(&mut model, &pattern, 1, None).unwrap();
    let both = ["gpt_neox.layers.0.attention.dense", "lm_head"].map(String::from);
    assert_eq!(modules(&adapters), BTreeSet::from(both.clone()));
    assert_eq!(adapters.config.target_modules, Some(Targets::Names(both.to_vec())));

    let gemma = folder("gemma3", |_| (), apart);
    let mut model = load(gemma.path());
    let query = "model.language_model.layers.0.self_attn.q_proj".to_string();
    for one in [
        "language_model.model.layers.0.self_attn.q_proj",
        "model.language_model.layers.0.self_attn.q_proj",
        "layers.0.self_attn.q_proj",
    ] {
        assert_eq!(typed(&mut model, &[one]), BTreeSet::from([query.clone()]), "{one}");
    }
}

/// PEFT would find `q_proj` in the part that sees, too.
#[test]
fn the_targets_of_a_model_of_several_parts_are_written_in_full() {
    let base = folder("gemma3", |_| (), apart);
    let mut model = load(base.path());
    let adapters = Adapters::attach(&mut model, &targets(&["q_proj"]), 1, None).unwrap();
    let Some(Targets::Names(written)) = &adapters.config.target_modules else { panic!("a list") };
    assert_eq!(written.len(), 3);
    assert!(written.iter().all(|name| name.starts_with("model.language_model.layers.")), "{written:?}");
}

#[test]
fn a_tensor_of_the_text_model_is_never_passed_over() {
    let base = folder("gemma3", |_| (), apart);
    let refused = |extra: &str| {
        let mut tensors = vec![(extra.to_string(), Tensor::ones([2, 2], (Kind::Float, Device::Cpu)))];
        let checkpoint = open(base.path());
        tensors.extend(
            checkpoint
                .names()
                .iter()
                .map(|name| (name.to_string(), checkpoint.tensor(name, Kind::Float, Device::Cpu).unwrap())),
        );
        let other = tempfile::tempdir().unwrap();
        std::fs::copy(base.path().join("config.json"), other.path().join("config.json")).unwrap();
        Tensor::write_safetensors(&tensors, other.path().join("model.safetensors")).unwrap();
        families::spec(&open(other.path())).map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(refused("multi_modal_projector.mm_input_projection_weight"), Ok(()));
    for extra in ["language_model.model.layers.0.mlp.gate.weight", "model.norm.weight", "vision_towers.weight"] {
        assert!(refused(extra).unwrap_err().contains(extra));
    }
}

#[test]
fn what_the_first_gemma_3_leaves_out_of_its_config_is_what_transformers_assumes() {
    let config = json!({
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    });
    let spec = families::from_config(&config).unwrap();
    assert_eq!((spec.vocab_size, spec.max_position_embeddings, spec.head.tied), (262_208, 131_072, true));
    let tensors = spec.tensors();
    assert_eq!(tensors["model.layers.0.self_attn.q_proj.weight"], [2048, 2560]);
    assert_eq!(tensors["model.layers.0.self_attn.k_proj.weight"], [1024, 2560]);
    let unknown = json!({"model_type": "gemma3", "text_config": {"model_type": "gemma5_text"}});
    let error = families::from_config(&unknown).unwrap_err().to_string();
    assert!(error.contains("'gemma5_text' is not supported in a 'gemma3'") && error.contains("gemma3_text"), "{error}");
}

#[test]
fn what_bloom_can_be_asked_for_and_is_not_is_an_error() {
    let config = |extra: Value| {
        let mut config =
            json!({"model_type": "bloom", "n_embed": 24, "num_attention_heads": 3, "n_layer": 1, "vocab_size": 7});
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        families::from_config(&config).map(|spec| spec.tensors().len()).map_err(|error| error.to_string())
    };
    assert_eq!(config(json!({})), Ok(17));
    for field in ["apply_residual_connection_post_layernorm", "slow_but_exact"] {
        assert!(config(json!({ field: true })).unwrap_err().contains(field));
    }
}
