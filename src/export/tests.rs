//! Written folders, against PEFT's and transformers' own in `tests/fixtures/peft` (made by `tests/python/peft_adapter.py`).

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use super::*;
use crate::adapter::{Adapters, LoadedAdapter, Update};
use crate::model::Decoder;
use crate::recipe::{AdapterRecipe, BaseSource, Targets};
use crate::weights::writer::{self, TensorSpec};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft")
}

fn base(name: &str) -> Checkpoint {
    Checkpoint::open(&BaseSource::Folder(fixtures().join(format!("base-{name}")))).unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}

#[test]
fn an_adapter_read_and_written_again_is_pefts_file() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["all-linear", "all-linear-short", "names", "regex", "patterns", "layers"] {
        let place = folder.path().join(name);
        let loaded = LoadedAdapter::read(&fixtures().join(name)).unwrap();
        peft::write(&place, &loaded.config, loaded.updates.as_slice().into(), None, &BTreeMap::new()).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            let [ours, theirs] = [&place, &fixtures().join(name)].map(|folder| fs::read(folder.join(file)).unwrap());
            assert!(ours == theirs, "{name}/{file} differs");
        }
    }
}

const TOKENIZER_CONFIG: &str = r#"{
  "about": "\"chat_template\": 1", "deeper": {"chat_template": "kept"},
  "model_max_length": 1000000000000000019884624838656,
  "chat_template" : "{{ \"old\" }}" , "b": 1e-05
}
"#;

#[test]
fn an_adapters_folder_carries_the_tokenizer_and_the_template_it_was_trained_with() {
    let root = tempfile::tempdir().unwrap();
    let mut checkpoint = base("tied");
    for (name, text) in [
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
        ("generation_config.json", "{}"),
        ("chat_template.jinja", "old"),
    ] {
        checkpoint.sidecars.insert(name.into(), text.into());
    }
    let loaded = LoadedAdapter::read(&fixtures().join("names")).unwrap();
    let place = root.path().join("adapter");
    let files = sidecars(&checkpoint, Some("new"));
    peft::write(&place, &loaded.config, loaded.updates.as_slice().into(), None, &files).unwrap();
    assert_eq!(
        names(&place),
        [
            "adapter_config.json",
            "adapter_model.safetensors",
            "chat_template.jinja",
            "tokenizer.json",
            "tokenizer_config.json"
        ]
    );
    assert_eq!(fs::read_to_string(place.join("chat_template.jinja")).unwrap(), "new");
    // Nothing else of it changes, not even where the same words occur.
    let expected = TOKENIZER_CONFIG.replace(r#""{{ \"old\" }}""#, r#""new""#);
    assert_eq!(fs::read_to_string(place.join("tokenizer_config.json")).unwrap(), expected);
    assert_eq!(sidecars(&checkpoint, None), checkpoint.sidecars);
    // Again over itself.
    peft::write(&place, &loaded.config, loaded.updates.as_slice().into(), None, &files).unwrap();
    assert_eq!(names(root.path()), ["adapter"]);
}

#[test]
fn merged_weights_are_pefts_and_heads_stay_right() {
    let root = tempfile::tempdir().unwrap();
    for (name, model) in [("all-linear", "tied"), ("patterns", "tied"), ("head", "untied")] {
        let checkpoint = base(model);
        let loaded = LoadedAdapter::read(&fixtures().join(name)).unwrap();
        let place = root.path().join(name);
        let calls = RefCell::new(Vec::new());
        let progress = |done, total| calls.borrow_mut().push((done, total));
        merged::write(
            &place,
            &checkpoint,
            loaded.updates.as_slice().into(),
            None,
            Kind::Float,
            &sidecars(&checkpoint, None),
            &progress,
        )
        .unwrap();
        let ours = Checkpoint::open(&BaseSource::Folder(place.clone())).unwrap();
        let theirs = Checkpoint::open_file(&fixtures().join(name).join("merged.safetensors")).unwrap();
        let sorted = |checkpoint: &Checkpoint| {
            let mut names: Vec<String> = checkpoint.names().into_iter().map(String::from).collect();
            names.sort();
            names
        };
        assert_eq!(sorted(&ours), sorted(&theirs), "{name}");
        for tensor in ours.names() {
            let [a, b] = [&ours, &theirs].map(|from| from.tensor(tensor, Kind::Float, Device::Cpu).unwrap());
            assert!(difference(&a, &b) < 1e-6, "{name}: {tensor}");
        }
        assert_eq!(ours.config, checkpoint.config, "{name}");
        let total = calls.borrow().last().unwrap().1;
        assert_eq!(calls.borrow().last(), Some(&(total, total)));
    }
}

/// peft#2777: a trained head of a tied model must not be lost, nor spoil the embedding.
#[test]
fn an_adapted_tied_head_is_untied() {
    let root = tempfile::tempdir().unwrap();
    let checkpoint = base("tied");
    let mut model = Decoder::load(&checkpoint, Kind::Float, Device::Cpu, &|_, _| ()).unwrap();
    let recipe = AdapterRecipe { target_modules: Targets::Names(vec!["lm_head".into()]), r: 2, ..Default::default() };
    let adapters = Adapters::attach(&mut model, &recipe, 1, None).unwrap();
    assert!(adapters.notices[0].contains("shares its weight with the embedding"), "{:?}", adapters.notices);
    for (_, tensor) in adapters.parameters() {
        let _ = tch::no_grad(|| tensor.shallow_clone().fill_(0.5));
    }
    let place = root.path().join("merged");
    merged::write(&place, &checkpoint, adapters.learned(), None, Kind::Float, &sidecars(&checkpoint, None), &|_, _| ())
        .unwrap();
    let merged = Checkpoint::open(&BaseSource::Folder(place)).unwrap();
    assert_eq!(merged.config["tie_word_embeddings"], Value::Bool(false));
    let read = |from: &Checkpoint, name: &str| from.tensor(name, Kind::Float, Device::Cpu).unwrap();
    let embedding = read(&checkpoint, "model.embed_tokens.weight");
    assert_eq!(read(&merged, "model.embed_tokens.weight"), embedding);
    assert!(difference(&read(&merged, "lm_head.weight"), &(embedding + 0.5 * 0.5 * 2.0 * 16.0)) < 1e-5);

    let ids = Tensor::from_slice(&[1i64, 5, 9, 3]);
    let positions = Tensor::arange(4, (Kind::Int64, Device::Cpu));
    let logits = |model: &Decoder| {
        model.logits(&model.hidden(&ids, &positions, &crate::ops::Documents::one(4), Default::default()))
    };
    let alone = Decoder::load(&merged, Kind::Float, Device::Cpu, &|_, _| ()).unwrap();
    assert!(difference(&logits(&model), &logits(&alone)) < 1e-4);
}

/// Unless it holds other numbers than the embedding: then it is what the model answers with, whatever its config says.
#[test]
fn a_tied_head_that_was_stored_all_the_same_is_not_stored_again() {
    for same in [true, false] {
        let root = tempfile::tempdir().unwrap();
        let from = base("tied");
        let folder = root.path().join("base");
        fs::create_dir(&folder).unwrap();
        fs::copy(fixtures().join("base-tied/config.json"), folder.join("config.json")).unwrap();
        let read = |name: &str| from.tensor(name, Kind::Float, Device::Cpu).unwrap();
        let mut tensors: Vec<(String, Tensor)> = from.names().iter().map(|n| (n.to_string(), read(n))).collect();
        let embedding = read("model.embed_tokens.weight");
        tensors.push(("lm_head.weight".into(), if same { embedding } else { embedding + 1.0 }));
        Tensor::write_safetensors(&tensors, folder.join("model.safetensors")).unwrap();
        let checkpoint = Checkpoint::open(&BaseSource::Folder(folder)).unwrap();
        let place = root.path().join("merged");
        let sidecars = sidecars(&checkpoint, None);
        merged::write(&place, &checkpoint, [].as_slice().into(), None, Kind::Float, &sidecars, &|_, _| ()).unwrap();
        let merged = Checkpoint::open(&BaseSource::Folder(place)).unwrap();
        assert_eq!(merged.shape("lm_head.weight").is_none(), same);
        assert_eq!(merged.names().len(), from.names().len() + usize::from(!same));
        assert_eq!(merged.config["tie_word_embeddings"], Value::Bool(same));
    }
}

#[test]
fn merging_to_bf16_says_so_and_keeps_the_rest_of_the_config() {
    let root = tempfile::tempdir().unwrap();
    let mut checkpoint = base("tied");
    checkpoint.config["torch_dtype"] = Value::from("float32");
    checkpoint.config["transformers.js_config"] = serde_json::json!({"kept": [1, 2.5]});
    let loaded = LoadedAdapter::read(&fixtures().join("all-linear")).unwrap();
    let place = root.path().join("merged");
    merged::write(
        &place,
        &checkpoint,
        loaded.updates.as_slice().into(),
        None,
        Kind::BFloat16,
        &sidecars(&checkpoint, None),
        &|_, _| (),
    )
    .unwrap();
    let config = json(&place.join("config.json"));
    assert_eq!((&config["dtype"], &config["torch_dtype"]), (&Value::from("bfloat16"), &Value::from("bfloat16")));
    assert_eq!(config["transformers.js_config"], serde_json::json!({"kept": [1, 2.5]}));
    let merged = Checkpoint::open(&BaseSource::Folder(place)).unwrap();
    assert!(merged.names().iter().all(|name| merged.stored_as(name) == Some("BF16")));
}

/// What a base in fp8 stands for is what it trains on and what is merged; scales and `quantization_config` stay behind.
#[test]
fn a_base_in_fp8_is_merged_to_plain_numbers() {
    let root = tempfile::tempdir().unwrap();
    let from = base("untied");
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    for name in from.names() {
        let tensor = from.tensor(name, Kind::Float, Device::Cpu).unwrap();
        if name.contains("proj") {
            let size = tensor.size();
            let scales = Tensor::rand([(size[0] + 2) / 3, (size[1] + 4) / 5], (Kind::Float, Device::Cpu)) + 0.5;
            tensors.push((name.to_string(), (tensor * 8.0).to_kind(Kind::Float8e4m3fn)));
            tensors.push((format!("{name}_scale_inv"), scales / 8.0));
        } else {
            tensors.push((name.to_string(), tensor));
        }
    }
    let folder = root.path().join("base");
    let specs: Vec<TensorSpec> = tensors.iter().map(|(name, tensor)| TensorSpec::of(name.as_str(), tensor)).collect();
    fs::create_dir(&folder).unwrap();
    writer::write_model(&folder, &specs, 1 << 20, |index| Ok(tensors[index].1.shallow_clone())).unwrap();
    let mut config = from.config.clone();
    config["quantization_config"] = serde_json::json!({"quant_method": "fp8", "weight_block_size": [3, 5]});
    fs::write(folder.join("config.json"), config.to_string()).unwrap();

    let checkpoint = Checkpoint::open(&BaseSource::Folder(folder)).unwrap();
    let mut model = Decoder::load(&checkpoint, Kind::Float, Device::Cpu, &|_, _| ()).unwrap();
    let recipe = AdapterRecipe { target_modules: Targets::Names(vec!["q_proj".into()]), r: 2, ..Default::default() };
    let adapters = Adapters::attach(&mut model, &recipe, 1, None).unwrap();
    for (_, tensor) in adapters.parameters() {
        let _ = tch::no_grad(|| tensor.shallow_clone().fill_(0.1));
    }
    let ids = Tensor::from_slice(&[1i64, 5, 9, 3]);
    let positions = Tensor::arange(4, (Kind::Int64, Device::Cpu));
    let logits = |model: &Decoder| {
        model.logits(&model.hidden(&ids, &positions, &crate::ops::Documents::one(4), Default::default()))
    };
    for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 0.05)] {
        let place = root.path().join(format!("{kind:?}"));
        merged::write(&place, &checkpoint, adapters.learned(), None, kind, &sidecars(&checkpoint, None), &|_, _| ())
            .unwrap();
        let merged = Checkpoint::open(&BaseSource::Folder(place)).unwrap();
        assert_eq!(merged.config.get("quantization_config"), None);
        assert_eq!(merged.names().len(), from.names().len());
        let alone = Decoder::load(&merged, Kind::Float, Device::Cpu, &|_, _| ()).unwrap();
        let expected = logits(&model);
        let off = difference(&logits(&alone), &expected) / expected.abs().max().double_value(&[]);
        assert!(off < tolerance, "{kind:?}: {off}");
    }
}

#[test]
fn a_merge_that_cannot_be_right_writes_nothing() {
    let root = tempfile::tempdir().unwrap();
    let place = root.path().join("merged");
    let merge = |folder: &Path, checkpoint: &Checkpoint, updates: &[Update], kind| {
        let error =
            merged::write(folder, checkpoint, updates.into(), None, kind, &sidecars(checkpoint, None), &|_, _| ())
                .unwrap_err();
        (error.exit_code(), error.to_string())
    };
    let loaded = LoadedAdapter::read(&fixtures().join("all-linear")).unwrap();
    let (code, text) = merge(&place, &base("untied"), &loaded.updates, Kind::Float);
    assert!(code == 5 && text.contains("7 of the adapter's modules are not in this base"), "{text}");

    let mut wrong: Vec<Update> = loaded.updates.iter().map(Update::shallow_clone).collect();
    wrong[0].b = Tensor::zeros([9, 2], (Kind::Float, Device::Cpu));
    let (code, text) = merge(&place, &base("tied"), &wrong, Kind::Float);
    assert!(code == 5 && text.contains("is [8, 12] in this base, but the adapter fits [9, 12]"), "{text}");

    wrong = loaded.updates.iter().map(Update::shallow_clone).collect();
    wrong[3].scale = 1e9;
    let (code, text) = merge(&place, &base("tied"), &wrong, Kind::Half);
    assert!(code == 5 && text.contains("too large for Half"), "{text}");
    assert!(names(root.path()).is_empty(), "{:?}", names(root.path()));

    // Not into the base's own folder.
    let folder = root.path().join("base");
    fs::create_dir(&folder).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(fixtures().join("base-tied").join(name), folder.join(name)).unwrap();
    }
    let checkpoint = Checkpoint::open(&BaseSource::Folder(folder.clone())).unwrap();
    let (code, text) = merge(&folder, &checkpoint, &loaded.updates, Kind::Float);
    assert!(code == 6 && text.contains("is the base model's own folder"), "{text}");
    assert_eq!(names(&folder), ["config.json", "model.safetensors"]);
}

/// A model that learned to end its turns with another token must be stopped there by servers.
#[test]
fn what_ends_a_turn_of_the_own_template_joins_the_generation_config() {
    let mut checkpoint = base("tied");
    let tokenizer = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer/bytes");
    for entry in fs::read_dir(tokenizer).unwrap() {
        let path = entry.unwrap().path();
        checkpoint.sidecars.insert(path.file_name().unwrap().to_string_lossy().into(), fs::read(&path).unwrap());
    }
    // The base's own config has fewer tokens than this tokenizer.
    checkpoint.sidecars.insert("config.json".into(), b"{}".to_vec());
    checkpoint.sidecars.insert("generation_config.json".into(), br#"{"eos_token_id": 0, "top_p": 0.9}"#.to_vec());
    let template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}\
                    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let files = sidecars(&checkpoint, Some(template));
    let config: serde_json::Value = serde_json::from_slice(&files["generation_config.json"]).unwrap();
    let ids: Vec<u64> = serde_json::from_value(config["eos_token_id"].clone()).unwrap();
    assert!(ids.len() > 1 && ids[0] == 0, "{config}");
    assert_eq!(config["top_p"], 0.9);
}
