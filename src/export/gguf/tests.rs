//! Files written here and read again, on the small models of `tests/fixtures/peft`; every family is in `tests/gguf_families.rs`.

use std::fs;
use std::path::PathBuf;

use serde_json::json;
use tch::{Device, Tensor};

use super::*;
use crate::adapter::{LoadedAdapter, Update};
use crate::export::{merged, sidecars};
use crate::model::sites::Role;
use crate::recipe::BaseSource;

pub(super) fn fixtures(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A base of `tests/fixtures/peft`, with a tokenizer of as many tokens as it has.
pub(super) fn base(name: &str) -> Checkpoint {
    let mut base = Checkpoint::open(&BaseSource::Folder(fixtures(&format!("peft/base-{name}")))).unwrap();
    let vocabulary: serde_json::Map<String, Json> =
        (0..16u8).map(|id| (char::from(b'a' + id).to_string(), json!(id))).collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "added_tokens": [], "normalizer": null, "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    });
    base.sidecars.insert("tokenizer.json".into(), tokenizer.to_string().into_bytes());
    base
}

fn write(path: &Path, base: &Checkpoint, updates: &[Update], file_type: FileType) -> Result<Vec<String>> {
    let texts = Texts { name: None, sidecars: &sidecars(base, None) };
    write_model(path, base, updates.into(), None, file_type, texts, &|_, _| ())
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

#[test]
fn a_merged_model_in_gguf_is_the_merged_model() {
    let root = tempfile::tempdir().unwrap();
    let (base, loaded) = (base("tied"), LoadedAdapter::read(&fixtures("peft/all-linear")).unwrap());
    let folder = root.path().join("merged");
    let updates = loaded.updates.as_slice();
    merged::write(&folder, &base, updates.into(), None, Kind::Float, &sidecars(&base, None), &|_, _| ()).unwrap();
    let expected = Checkpoint::open(&BaseSource::Folder(folder)).unwrap();
    for (file_type, tolerance) in [(FileType::F32, 0.0), (FileType::F16, 1e-3), (FileType::Bf16, 1e-2)] {
        let path = root.path().join(format!("model-{file_type}.gguf"));
        let progress = std::cell::RefCell::new(Vec::new());
        let count = |done, total| progress.borrow_mut().push((done, total));
        let texts = Texts { name: None, sidecars: &sidecars(&base, None) };
        let notices = write_model(&path, &base, updates.into(), None, file_type, texts, &count).unwrap();
        assert!(notices.is_empty(), "{notices:?}");
        let total = progress.borrow().last().unwrap().1;
        assert_eq!(progress.borrow().last(), Some(&(total, total)));
        let found = Checkpoint::open(&BaseSource::Gguf(path)).unwrap();
        assert_eq!(found.names().len(), expected.names().len());
        for name in expected.names() {
            let [found, expected] =
                [&found, &expected].map(|from| from.tensor(name, Kind::Float, Device::Cpu).unwrap());
            assert!(difference(&found, &expected) <= tolerance, "{file_type} {name}");
        }
        let stored = found.stored_as("model.layers.0.mlp.up_proj.weight").unwrap().to_lowercase();
        assert_eq!((stored.as_str(), found.stored_as("model.norm.weight")), (file_type.name(), Some("F32")));
    }
}

/// Rows of 8 or 12 numbers are no whole blocks of anything: they are stored as halves, and it is said.
#[test]
fn rows_too_short_for_blocks_are_announced() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("m.gguf");
    let notices = write(&path, &base("tied"), &[], FileType::Q4KM).unwrap();
    assert!(notices[0].contains("no whole blocks of q4_k_m"), "{notices:?}");
    let found = Checkpoint::open(&BaseSource::Gguf(path)).unwrap();
    assert_eq!(found.stored_as("model.layers.0.mlp.up_proj.weight"), Some("F16"));
}

/// A base with rows long enough for blocks.
fn wide(folder: &Path) -> Checkpoint {
    let mut config = base("tied").config;
    for (field, value) in
        [("hidden_size", 256), ("intermediate_size", 512), ("head_dim", 64), ("num_attention_heads", 4)]
    {
        config[field] = value.into();
    }
    config["num_hidden_layers"] = 2.into();
    let spec = families::from_config(&config).unwrap();
    tch::manual_seed(3);
    let normal = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu)) * 0.05;
    let tensors: Vec<(String, Tensor)> =
        spec.tensors().into_iter().map(|(name, shape)| (name, normal(&shape))).collect();
    fs::create_dir(folder).unwrap();
    Tensor::write_safetensors(&tensors, folder.join("model.safetensors")).unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut wide = Checkpoint::open(&BaseSource::Folder(folder.to_path_buf())).unwrap();
    wide.sidecars.insert("tokenizer.json".into(), base("tied").sidecars["tokenizer.json"].clone());
    wide
}

#[test]
fn quantised_types_store_what_they_say_and_read_back_near() {
    let root = tempfile::tempdir().unwrap();
    let base = wide(&root.path().join("base"));
    let down = "model.layers.1.mlp.down_proj.weight";
    let query = "model.layers.1.self_attn.q_proj.weight";
    for (file_type, of_down, of_query, tolerance) in [
        (FileType::Q8_0, "Q8_0", "Q8_0", 0.0015),
        (FileType::Q4_0, "Q4_0", "Q4_0", 0.04),
        (FileType::Q4_1, "Q4_1", "Q4_1", 0.02),
        (FileType::Q5_0, "Q5_0", "Q5_0", 0.02),
        (FileType::Q5_1, "Q5_1", "Q5_1", 0.01),
        (FileType::Q4KM, "Q6_K", "Q4_K", 0.03),
        (FileType::Q5KM, "Q6_K", "Q5_K", 0.015),
        (FileType::Q6K, "Q6_K", "Q6_K", 0.01),
    ] {
        let path = root.path().join("m.gguf");
        assert_eq!(write(&path, &base, &[], file_type).unwrap(), [""; 0]);
        let found = Checkpoint::open(&BaseSource::Gguf(path)).unwrap();
        let stored = [down, query].map(|name| found.stored_as(name).unwrap());
        assert_eq!(stored, [of_down, of_query], "{file_type}");
        for name in base.names() {
            let [a, b] = [&found, &base].map(|from| from.tensor(name, Kind::Float, Device::Cpu).unwrap());
            let off = difference(&a, &b);
            assert!(off <= tolerance, "{file_type} {name}: {off}");
        }
    }
}

#[test]
fn tokenizers_encode_as_before() {
    let root = tempfile::tempdir().unwrap();
    let texts =
        ["Hello, world! It's 12345.", "  two  spaces\n\n\ttabs", "Zażółć gęślą 你好 😀", "def f(x): return x**2", ""];
    for name in ["bytes", "pieces"] {
        let mut base = wide(&root.path().join(name));
        base.sidecars.remove("tokenizer.json");
        for entry in fs::read_dir(fixtures(&format!("tokenizer/{name}"))).unwrap() {
            let path = entry.unwrap().path();
            base.sidecars.insert(path.file_name().unwrap().to_string_lossy().into(), fs::read(&path).unwrap());
        }
        base.sidecars.insert("config.json".into(), b"{}".to_vec());
        base.vocabulary = 704;
        let path = root.path().join(format!("{name}.gguf"));
        let notices = write(&path, &base, &[], FileType::F16).unwrap();
        // The pieces' merges were trained, not made from scores.
        assert_eq!(notices.len(), usize::from(name == "pieces"), "{notices:?}");
        let found = Checkpoint::open(&BaseSource::Gguf(path)).unwrap();
        let [before, after] = [&base, &found]
            .map(|from| crate::data::Tokenizer::new(&from.sidecars).unwrap_or_else(|e| panic!("{name}: {e}")));
        for text in texts {
            assert_eq!(before.encode(text).unwrap().ids, after.encode(text).unwrap().ids, "{name}: {text:?}");
        }
        assert_eq!(before.adds_bos(), after.adds_bos(), "{name}");
        assert_eq!((before.bos(), before.eos()), (after.bos(), after.eos()), "{name}");
    }
}

#[test]
fn a_model_that_llama_cpp_would_compute_otherwise_is_refused_or_announced() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("m.gguf");
    let mut odd = base("tied");
    odd.config["rope_parameters"] = json!({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0});
    let error = write(&path, &odd, &[], FileType::F32).unwrap_err().to_string();
    assert!(error.contains("would compute another model") && error.contains("scaling: Dynamic"), "{error}");
    assert!(error.contains("scaling: None there"), "{error}");

    let mut mistral = base("tied");
    mistral.config["model_type"] = "mistral".into();
    mistral.config["sliding_window"] = 4.into();
    let notices = write(&path, &mistral, &[], FileType::F32).unwrap();
    assert!(notices[0].contains("this model 4 of them"), "{notices:?}");

    let mut unknown = base("tied");
    unknown.config["model_type"] = "ministral".into();
    unknown.config["sliding_window"] = Json::Null;
    let error = write(&path, &unknown, &[], FileType::F32).unwrap_err().to_string();
    assert!(error.contains("ministral is not written as GGUF") && error.contains("written: bloom, cohere"), "{error}");
}

#[test]
fn llama_3s_scaling_is_in_its_tensor() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("m.gguf");
    let mut scaled = wide(&root.path().join("base"));
    let scaling = json!({"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
    scaled.config["rope_parameters"] = scaling;
    write(&path, &scaled, &[], FileType::Q8_0).unwrap();
    let found = Checkpoint::open(&BaseSource::Gguf(path)).unwrap();
    assert_eq!(found.config["rope_scaling"]["factor"], 32.0);
    assert_eq!(found.config["rope_theta"], 500000.0);
}

#[test]
fn an_adapter_in_gguf_is_the_adapter() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("adapter.gguf");
    let base = base("tied");
    for name in ["all-linear-short", "names", "patterns"] {
        let loaded = LoadedAdapter::read(&fixtures(&format!("peft/{name}"))).unwrap();
        write_adapter(&path, None, &base, &loaded.updates, &|_, _| ()).unwrap();
        let found = read_adapter(&path, &base).unwrap();
        assert_eq!(found.len(), loaded.updates.len(), "{name}");
        for expected in &loaded.updates {
            let update = found.iter().find(|update| update.module == expected.module).unwrap();
            let whole = |update: &Update| update.b.matmul(&update.a) * update.scale;
            assert!(difference(&whole(update), &whole(expected)) < 1e-6, "{name}: {}", update.module);
        }
    }
    // Plain ones keep their numbers.
    let loaded = LoadedAdapter::read(&fixtures("peft/names")).unwrap();
    write_adapter(&path, None, &base, &loaded.updates, &|_, _| ()).unwrap();
    let found = read_adapter(&path, &base).unwrap();
    let [one, other] = [&found, &loaded.updates].map(|all| all.iter().find(|u| u.module.ends_with("q_proj")).unwrap());
    assert_eq!((&one.b, &one.a, one.scale), (&other.b, &other.a, other.scale));
    assert!(Checkpoint::open(&BaseSource::Gguf(path)).is_err());
}

/// llama.cpp reads B's rows as the base's: its rotary pairs side by side.
#[test]
fn an_adapters_rows_are_in_the_bases_order() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("adapter.gguf");
    let base = base("tied");
    let b = Tensor::arange(8, (Kind::Float, Device::Cpu)).reshape([8, 1]);
    let update = |module: &str, b: &Tensor| Update {
        module: module.into(),
        role: Role::Linear,
        a: Tensor::ones([1, 8], (Kind::Float, Device::Cpu)),
        b: b.shallow_clone(),
        scale: 2.0,
        lengths: None,
        taken: None,
    };
    let updates =
        [update("model.layers.0.self_attn.q_proj", &b), update("model.layers.0.self_attn.k_proj", &b.narrow(0, 0, 4))];
    write_adapter(&path, None, &base, &updates, &|_, _| ()).unwrap();
    let file = crate::weights::gguf::AdapterFile::read(&path, "llama", |_, _| Ok(Conversion::Same)).unwrap();
    let rows = |name: &str| {
        let tensor = &file.tensors.iter().find(|(known, _)| known == name).unwrap().1;
        Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap()
    };
    assert_eq!(rows("blk.0.attn_q.weight.lora_b"), [0., 2., 1., 3., 4., 6., 5., 7.]);
    assert_eq!(rows("blk.0.attn_k.weight.lora_b"), [0., 2., 1., 3.]);
    assert_eq!(file.alpha, 2.0);
}

#[test]
fn what_llama_cpp_cannot_add_at_run_time_is_to_be_merged() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("adapter.gguf");
    let loaded = LoadedAdapter::read(&fixtures("peft/names")).unwrap();
    let fault = |base: &Checkpoint, update: Update| {
        let error = write_adapter(&path, None, base, &[update], &|_, _| ()).unwrap_err().to_string();
        assert!(!path.exists());
        error
    };
    let first = || loaded.updates[0].shallow_clone();
    let lengths = Some(Tensor::ones([8], (Kind::Float, Device::Cpu)));
    let text = fault(&base("tied"), Update { lengths, ..first() });
    assert!(text.contains("DoRA") && text.contains("merge it"), "{text}");
    let rank = first().rank();
    let head = Update { module: "lm_head".into(), b: Tensor::zeros([16, rank], (Kind::Float, Device::Cpu)), ..first() };
    let text = fault(&base("tied"), head);
    assert!(text.contains("lm_head") && text.contains("is the embedding, too"), "{text}");
    let text = fault(&base("tied"), Update { module: "model.layers.9.mlp.up_proj".into(), ..first() });
    assert!(text.contains("is no module of this base"), "{text}");
    let b = Tensor::zeros([5, rank], (Kind::Float, Device::Cpu));
    let text = fault(&base("tied"), Update { b, ..first() });
    assert!(text.contains("but the adapter fits [5,"), "{text}");
    assert!(
        write_adapter(&path, None, &base("tied"), &[], &|_, _| ()).unwrap_err().to_string().contains("holds no update")
    );
}

/// An adapter's file as another program may write it.
fn foreign(path: &Path, architecture: &str, alpha: Option<f32>, tensors: &[(&str, [i64; 2])]) {
    let text = |key: &str, text: &str| (key.to_string(), gguf::Written::Text(text.into()));
    let mut pairs: gguf::Pairs =
        vec![text("general.architecture", architecture), text("general.type", "adapter"), text("adapter.type", "lora")];
    pairs.extend(alpha.map(|alpha| ("adapter.lora.alpha".to_string(), gguf::Written::F32(alpha))));
    let format = Quantisation::called("F32");
    let described: Vec<Described> = tensors
        .iter()
        .map(|(name, shape)| Described { name: (*name).to_string(), shape: shape.to_vec(), format })
        .collect();
    gguf::write(path, &pairs, &described, |index, take| {
        let count = described[index].shape.iter().product::<i64>();
        (0..count).try_for_each(|number| take(&(number as f32).to_le_bytes()))
    })
    .unwrap();
}

#[test]
fn adapters_of_other_programs_are_read_or_refused_with_what_is_wrong() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("adapter.gguf");
    let base = base("tied");
    let up = |end: &str| format!("blk.0.ffn_up.weight.{end}");
    let (up_a, up_b) = (up("lora_a"), up("lora_b"));
    let whole: &[(&str, [i64; 2])] = &[(&up_a, [2, 8]), (&up_b, [12, 2])];
    // Without an alpha, or with 0, llama.cpp multiplies with nothing.
    for (alpha, scale) in [(None, 1.0), (Some(0.0), 1.0), (Some(6.0), 3.0)] {
        foreign(&path, "llama", alpha, whole);
        let found = read_adapter(&path, &base).unwrap();
        assert_eq!((found.len(), found[0].module.as_str()), (1, "model.layers.0.mlp.up_proj"));
        assert_eq!((found[0].scale, found[0].rank()), (scale, 2), "{alpha:?}");
        assert_eq!(found[0].b.get(11), Tensor::from_slice(&[22f32, 23.0]));
    }
    let refused = |part: &str| {
        let error = read_adapter(&path, &base).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("adapter.gguf") && text.contains(part), "{part}: {text}");
        assert_eq!(error.exit_code(), 5, "{text}");
    };
    // Cut in its numbers, in its header, in its first bytes.
    let bytes = fs::read(&path).unwrap();
    for length in [bytes.len() - 40, 200, 30, 4, 0] {
        fs::write(&path, &bytes[..length]).unwrap();
        refused("");
    }
    foreign(&path, "qwen2", None, whole);
    refused("is an adapter of a qwen2, but this base is a llama");
    foreign(&path, "llama", Some(f32::NAN), whole);
    refused("adapter.lora.alpha");
    for one in [&whole[..1], &whole[1..]] {
        foreign(&path, "llama", None, one);
        refused("model.layers.0.mlp.up_proj: has one of its two factors");
    }
    foreign(&path, "llama", None, &[(&up_a, [2, 8]), (&up_b, [12, 3])]);
    refused("model.layers.0.mlp.up_proj: fits");
    foreign(&path, "llama", None, &[(&up_a, [0, 8]), (&up_b, [12, 0])]);
    refused("model.layers.0.mlp.up_proj: has rank 0");
    foreign(&path, "llama", None, &[(&up_a, [2, 8]), (&up_b, [13, 2])]);
    refused("fits (13, 8), but the base has (12, 8)");
    foreign(&path, "llama", None, &[("blk.0.ffn_in.weight.lora_a", [2, 8])]);
    refused("blk.0.ffn_in.weight.lora_a: no tensor of this name");
    foreign(&path, "llama", None, &[("blk.9.ffn_up.weight.lora_a", [2, 8]), ("blk.9.ffn_up.weight.lora_b", [12, 2])]);
    refused("1 of its updates fit no linear of this base, model.layers.9.mlp.up_proj.weight among them");
    // Rows of queries that are no whole heads.
    let query = |end: &str| format!("blk.0.attn_q.weight.{end}");
    foreign(&path, "llama", None, &[(&query("lora_a"), [2, 8]), (&query("lora_b"), [7, 2])]);
    refused("its 7 rows are not whole heads");
    write(&path, &base, &[], FileType::F32).unwrap();
    refused("is a model, not an adapter");
}
