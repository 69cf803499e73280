//! Small models of every architecture that can be read from GGUF, as llama.cpp's own converter wrote them
//! (`tests/python/gguf_families.py`): config and tensors must be those of the transformers checkpoint they were made of.

mod generator;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use engraft::model::{Decoder, Documents, Forward, families};
use engraft::recipe::BaseSource;
use engraft::weights::Checkpoint;
use generator::values;
use serde_json::Value;
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
        "falcon" | "falcon-grouped" | "cohere2" => tensor.ends_with(".bias"),
        _ => false,
    }
}
