use std::path::Path;

use serde_json::json;
use tch::Device;

use super::*;
use crate::recipe::BaseSource;
use crate::weights::Checkpoint;
use crate::weights::writer::{self, TensorSpec};

const NAME: &str = "model.layers.0.mlp.experts.gate_up_proj";

/// Blocks, scales and what transformers makes of them: `tests/python/mxfp4_blocks.py` writes it.
fn fixture() -> Checkpoint {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mxfp4_blocks.safetensors");
    Checkpoint::open_file(&path).unwrap()
}

fn parts() -> Vec<(String, Tensor)> {
    let fixture = fixture();
    let part = |part: &str| (format!("{NAME}_{part}"), fixture.tensor(part, Kind::Uint8, Device::Cpu).unwrap());
    vec![part("blocks"), part("scales")]
}

fn open(tensors: &[(String, Tensor)]) -> Result<Checkpoint> {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}});
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let specs: Vec<_> = tensors.iter().map(|(name, tensor)| TensorSpec::of(name.as_str(), tensor)).collect();
    // Shards of a tensor each: blocks and scales need not lie together.
    writer::write_model(folder.path(), &specs, 1, |index| Ok(tensors[index].1.shallow_clone())).unwrap();
    Checkpoint::open(&BaseSource::Folder(folder.path().to_path_buf()))
}

#[test]
fn numbers_are_those_of_transformers_bit_for_bit() {
    let checkpoint = open(&parts()).unwrap();
    assert_eq!(checkpoint.names(), [NAME]);
    for (kind, name) in [(Kind::Float, "float32"), (Kind::BFloat16, "bfloat16")] {
        let expected = fixture().tensor(name, kind, Device::Cpu).unwrap();
        assert_eq!(checkpoint.shape(NAME), Some(expected.size()));
        assert_eq!(checkpoint.tensor(NAME, kind, Device::Cpu).unwrap(), expected, "{name}");
    }
}

#[test]
fn parts_that_do_not_belong_together_are_named() {
    type Tensors = Vec<(String, Tensor)>;
    let fault = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = parts();
        change(&mut tensors);
        open(&tensors).unwrap_err().to_string()
    };
    assert!(fault(&|tensors| drop(tensors.pop())).contains("gate_up_proj_scales, are missing"));
    assert!(fault(&|tensors| drop(tensors.remove(0))).contains("gate_up_proj_blocks, are missing"));
    let found = fault(&|tensors| tensors[1].1 = tensors[1].1.narrow(1, 0, 3).contiguous());
    assert!(found.contains("for blocks of") && found.contains("expected"), "{found}");
    let found = fault(&|tensors| tensors[0].1 = tensors[0].1.narrow(3, 0, 8).contiguous());
    assert!(found.contains("of U8 expected"), "{found}");
    let found = fault(&|tensors| {
        let plain = (NAME.to_string(), Tensor::zeros([1], (Kind::Float, Device::Cpu)));
        tensors.push(plain);
    });
    assert!(found.contains("plain numbers, too"), "{found}");
}

#[test]
fn a_scale_that_is_no_number_is_an_error() {
    let tensors = parts();
    let _ = tensors[1].1.narrow(0, 0, 1).fill_(255);
    let found = open(&tensors).unwrap().tensor(NAME, Kind::Float, Device::Cpu).unwrap_err().to_string();
    assert!(found.contains("finite") || found.contains("NaN"), "{found}");
}
