//! Small models of every architecture that can be read from GGUF, as llama.cpp's own converter wrote them
//! (`tests/python/gguf_families.py`): config and tensors must be those of the transformers checkpoint they were made of. And what is
//! written of that checkpoint here must be what the converter wrote.

mod generator;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use engraft::adapter::Learned;
use engraft::export::gguf::{FileType, Texts, write_model};
use engraft::model::{Decoder, Documents, Forward, families};
use engraft::recipe::BaseSource;
use engraft::weights::Checkpoint;
use generator::values;
use serde_json::{Value, json as object};
use tch::{Device, Kind, Tensor};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))).unwrap()
}

fn names() -> Vec<String> {
    let files = std::fs::read_dir(fixtures().join("gguf")).unwrap();
    let stem = |file: std::io::Result<std::fs::DirEntry>| {
        let name = file.unwrap().file_name().into_string().unwrap();
        name.strip_suffix(".gguf").map(ToString::to_string)
    };
    let mut names: Vec<String> = files.filter_map(stem).collect();
    names.sort();
    assert!(names.len() >= 30, "{names:?}");
    names
}

fn open(name: &str) -> Checkpoint {
    let source = BaseSource::Gguf(fixtures().join("gguf").join(format!("{name}.gguf")));
    Checkpoint::open(&source).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn what_a_gguf_file_says_of_a_model_is_what_its_config_said() {
    let changes = json(&fixtures().join("gguf/changes.json"));
    for name in names() {
        let mut config = json(&fixtures().join("families").join(&name).join("config.json"));
        if let Some(changes) = changes[&name].as_object() {
            config.as_object_mut().unwrap().extend(changes.clone());
        }
        // llama.cpp has no Mistral: without its window it is a Llama.
        if name == "mistral" {
            config["model_type"] = "llama".into();
        }
        // Its pictures go into another file.
        if name == "mistral3" {
            config = config["text_config"].take();
        }
        let expected = families::from_config(&config).unwrap();
        let found = families::from_config(&open(&name).config).unwrap_or_else(|error| panic!("{name}: {error}"));
        let [found, expected] = [&found, &expected].map(|spec| format!("{spec:#?}"));
        let differing = found.lines().zip(expected.lines()).find(|(found, expected)| found != expected);
        assert_eq!(differing, None, "{name}");
        assert_eq!(found.len(), expected.len(), "{name}");
    }
}

#[test]
fn every_tensor_is_that_of_the_checkpoint_and_the_model_runs() {
    for name in names() {
        let checkpoint = open(&name);
        let rows: Vec<(String, Vec<i64>, f32, f32)> =
            serde_json::from_value(json(&fixtures().join("families").join(&name).join("tensors.json"))).unwrap();
        let stored: BTreeSet<&str> = checkpoint.names().into_iter().collect();
        let mut compared = 0;
        for (tensor, shape, offset, scale) in &rows {
            // BLOOM is published without the first part of its names, Mistral 3 with one that says which part it is of.
            let spelled = match name.as_str() {
                "bloom" => format!("transformer.{tensor}"),
                "mistral3" => tensor.replace("language_model.", ""),
                _ => tensor.clone(),
            };
            let Some(tensor_name) = stored.get(spelled.as_str()) else {
                assert!(left_out(&name, tensor), "{name} lacks {tensor}");
                continue;
            };
            compared += 1;
            let count = shape.iter().product::<i64>() as usize;
            let expected = Tensor::from_slice(&values(tensor, count, *offset, *scale)).view(&shape[..]);
            let found = checkpoint.tensor(tensor_name, Kind::Float, Device::Cpu).unwrap();
            assert_eq!(found.size(), *shape, "{name}: {tensor}");
            let worst = (found - expected).abs().max().double_value(&[]);
            // 1 + w, stored, has lost a bit of w.
            assert!(worst <= 1.2e-7, "{name}: {tensor} is off by {worst:e}");
        }
        assert_eq!(compared, stored.len(), "{name}: all that is there was compared");

        let model = Decoder::load(&checkpoint, Kind::Float, Device::Cpu, &|_, _| ());
        let model = model.unwrap_or_else(|error| panic!("{name}: {error}"));
        let ids = Tensor::from_slice(&[1i64, 5, 9, 3]);
        let positions = Tensor::arange(4, (Kind::Int64, Device::Cpu));
        let logits = model.logits(&model.hidden(&ids, &positions, &Documents::one(4), Forward::default()));
        assert!(logits.isfinite().all().double_value(&[]) == 1.0, "{name}");
    }
}

/// What the script left out of the checkpoint it converted.
fn left_out(name: &str, tensor: &str) -> bool {
    match name {
        "stablelm" | "phi" => tensor.contains("layernorm") && tensor.contains("self_attn"),
        "mistral3" => !tensor.starts_with("language_model."),
        "qwen2_moe" => tensor.contains(".layers.1.") || tensor.contains(".layers.2."),
        "falcon" | "falcon-grouped" => {
            tensor.ends_with(".bias") && !tensor.contains("ln_") && !tensor.contains("layernorm")
        }
        "cohere2" => tensor.ends_with("_proj.bias"),
        _ => false,
    }
}

/// The transformers checkpoint that the converter was given, with a tokenizer in place of the script's stand-in.
fn source(name: &str, folder: &Path) -> Checkpoint {
    let from = fixtures().join("families").join(name);
    let mut config = json(&from.join("config.json"));
    if let Some(changes) = json(&fixtures().join("gguf/changes.json"))[name].as_object() {
        config.as_object_mut().unwrap().extend(changes.clone());
    }
    let size = config.get("text_config").unwrap_or(&config)["vocab_size"].as_u64().unwrap();
    std::fs::create_dir(folder).unwrap();
    let rows: Vec<(String, Vec<i64>, f32, f32)> = serde_json::from_value(json(&from.join("tensors.json"))).unwrap();
    let kept = rows.iter().filter(|(tensor, ..)| name == "mistral3" || !left_out(name, tensor));
    let tensors: Vec<(String, Tensor)> = kept
        .map(|(tensor, shape, offset, scale)| {
            let count = shape.iter().product::<i64>() as usize;
            (tensor.clone(), Tensor::from_slice(&values(tensor, count, *offset, *scale)).view(&shape[..]))
        })
        .collect();
    Tensor::write_safetensors(&tensors, folder.join("model.safetensors")).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut vocabulary: serde_json::Map<String, Value> =
        (0..size - 1).map(|id| (char::from_u32(0x21 + id as u32).unwrap().to_string(), id.into())).collect();
    vocabulary.insert("!#".into(), (size - 1).into());
    let bytes = object!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = object!({
        "added_tokens": [], "normalizer": null, "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [["!", "#"]]},
    });
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    Checkpoint::open(&BaseSource::Folder(folder.to_path_buf())).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Where the converter says what is not so, or nothing of what is: the key's end, and why.
const OTHERWISE: &[(&str, &str, &str)] = &[
    ("", "general.name", "the folder's name, which was a temporary one"),
    ("phi", "feed_forward_length", "four times the width, whatever it is"),
    ("phi", "attention.head_count_kv", "all heads, whatever they are"),
    ("falcon-grouped", "feed_forward_length", "four times the width, whatever it is"),
    ("phi3-longrope", "attention.sliding_window", "0 where there is none"),
    ("gemma3_text", "rope.freq_base", "of blocks that do not slide, where all do"),
    ("gemma3_text", "rope.freq_base_swa", "the same"),
    ("gemma3_text", "rope.scaling.type", "the same"),
    ("gemma3_text", "rope.scaling.factor", "the same"),
];

#[test]
fn what_is_written_is_what_the_converter_writes() {
    let root = tempfile::tempdir().unwrap();
    for name in names() {
        let source = source(&name, &root.path().join(&name));
        let path = root.path().join(format!("{name}.gguf"));
        let texts = Texts { name: None, sidecars: &source.sidecars };
        write_model(&path, &source, Learned::default(), None, FileType::F32, texts, &|_, _| ())
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let ours = Raw::read(&path);
        let theirs = Raw::read(&fixtures().join("gguf").join(format!("{name}.gguf")));
        for (key, value) in &theirs.metadata {
            let otherwise =
                |&&(of, end, _): &&(&str, &str, &str)| [name.as_str(), ""].contains(&of) && key.ends_with(end);
            if OTHERWISE.iter().find(otherwise).is_none() {
                assert_eq!(ours.metadata.get(key), Some(value), "{name}: {key}");
            }
        }
        let names = |raw: &Raw| raw.tensors.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&ours), names(&theirs), "{name}");
        for (tensor, theirs) in &theirs.tensors {
            assert!(ours.tensors[tensor] == *theirs, "{name}: {tensor} differs");
        }
        // And it is read again as what it was.
        let again = Checkpoint::open(&BaseSource::Gguf(path)).unwrap_or_else(|error| panic!("{name}: {error}"));
        for tensor in again.names() {
            let spelled = match name.as_str() {
                "bloom" => tensor.replace("transformer.", ""),
                "mistral3" => format!("language_model.{tensor}"),
                _ => tensor.to_string(),
            };
            let read = |from: &Checkpoint, tensor: &str| from.tensor(tensor, Kind::Float, Device::Cpu).unwrap();
            let off = (read(&again, tensor) - read(&source, &spelled)).abs().max().double_value(&[]);
            assert!(off <= 1.2e-7, "{name}: {tensor} is off by {off:e}");
        }
    }
}

/// What a GGUF file holds, byte for byte: the type and bytes of each value; dimensions, format and bytes of each tensor.
struct Raw {
    metadata: BTreeMap<String, (u32, Vec<u8>)>,
    tensors: BTreeMap<String, (Vec<u64>, u32, Vec<u8>)>,
}

impl Raw {
    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let mut at = 8;
        let mut take = |count: usize| {
            at += count;
            bytes[at - count..at].to_vec()
        };
        let u64_of = |bytes: Vec<u8>| u64::from_le_bytes(bytes.try_into().unwrap());
        let u32_of = |bytes: Vec<u8>| u32::from_le_bytes(bytes.try_into().unwrap());
        let (tensors, pairs) = (u64_of(take(8)), u64_of(take(8)));
        fn text(take: &mut impl FnMut(usize) -> Vec<u8>) -> Vec<u8> {
            let length = take(8);
            let text = take(u64::from_le_bytes(length.clone().try_into().unwrap()) as usize);
            [length, text].concat()
        }
        fn value(kind: u32, take: &mut impl FnMut(usize) -> Vec<u8>) -> Vec<u8> {
            match kind {
                0 | 1 | 7 => take(1),
                2 | 3 => take(2),
                4..=6 => take(4),
                8 => text(take),
                9 => {
                    let head = take(12);
                    let kind = u32::from_le_bytes(head[..4].try_into().unwrap());
                    let count = u64::from_le_bytes(head[4..].try_into().unwrap());
                    let values: Vec<u8> = (0..count).flat_map(|_| value(kind, take)).collect();
                    [head, values].concat()
                }
                _ => take(8),
            }
        }
        let mut metadata = BTreeMap::new();
        for _ in 0..pairs {
            let key = String::from_utf8(text(&mut take)[8..].to_vec()).unwrap();
            let kind = u32_of(take(4));
            metadata.insert(key, (kind, value(kind, &mut take)));
        }
        let mut described = Vec::new();
        for _ in 0..tensors {
            let name = String::from_utf8(text(&mut take)[8..].to_vec()).unwrap();
            let count = u32_of(take(4));
            let dimensions: Vec<u64> = (0..count).map(|_| u64_of(take(8))).collect();
            let (format, offset) = (u32_of(take(4)), u64_of(take(8)));
            assert_eq!((format, offset % 32), (0, 0), "{name}");
            described.push((name, dimensions, format, offset as usize));
        }
        let data = at.next_multiple_of(32);
        let tensors = described
            .into_iter()
            .map(|(name, dimensions, format, offset)| {
                let length = dimensions.iter().product::<u64>() as usize * 4;
                let own = bytes[data + offset..][..length].to_vec();
                (name, (dimensions, format, own))
            })
            .collect();
        Self { metadata, tensors }
    }
}

/// By hand, for `tests/python/serving_gguf.py --files`: of the model in `ENGRAFT_GGUF_SOURCE` and the adapter in `ENGRAFT_GGUF_ADAPTER`,
/// every kind of file, into `ENGRAFT_GGUF_OUT`.
#[test]
#[ignore = "needs a model's folder"]
fn files_for_llama_cpp() {
    use clap::ValueEnum;
    let place = |name: &str| PathBuf::from(std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set")));
    let (folder, out) = (place("ENGRAFT_GGUF_SOURCE"), place("ENGRAFT_GGUF_OUT"));
    let source = match folder.is_file() {
        true => BaseSource::Gguf(folder),
        false => BaseSource::Folder(folder),
    };
    let checkpoint = Checkpoint::open(&source).unwrap();
    let loaded = std::env::var_os("ENGRAFT_GGUF_ADAPTER")
        .map(|folder| engraft::adapter::LoadedAdapter::read(Path::new(&folder)).unwrap());
    let updates = loaded.as_ref().map(|loaded| loaded.updates.as_slice()).unwrap_or_default();
    let write = |name: String, learned: Learned<'_>, file_type| {
        let start = std::time::Instant::now();
        let texts = Texts { name: None, sidecars: &checkpoint.sidecars };
        let notices = write_model(&out.join(&name), &checkpoint, learned, None, file_type, texts, &|_, _| ());
        println!("{name}: {:?} {:?}", start.elapsed(), notices.unwrap_or_else(|error| panic!("{error}")));
    };
    write("base-f32.gguf".into(), Learned::default(), FileType::F32);
    write("base-q8_0.gguf".into(), Learned::default(), FileType::Q8_0);
    for file_type in FileType::value_variants() {
        write(format!("model-{file_type}.gguf"), updates.into(), *file_type);
    }
    if loaded.is_some() {
        engraft::export::gguf::write_adapter(&out.join("adapter.gguf"), None, &checkpoint, updates, &|_, _| ())
            .unwrap();
    }
    let mut notices = Vec::new();
    let text = engraft::export::ollama::modelfile(
        engraft::export::ollama::Source::Model("model-q4_k_m.gguf"),
        &checkpoint.sidecars,
        &mut notices,
    );
    println!("{}{notices:?}", text.unwrap());
}
