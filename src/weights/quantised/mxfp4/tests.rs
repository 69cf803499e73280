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

/// A model in fp8 whose `a.weight` lies in rows beside `a.scale`, whose shape is `scale_shape`.
fn rows(codes: &Tensor, exponents: &Tensor, scale_shape: &[usize]) -> Result<Checkpoint> {
    use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
    let folder = tempfile::tempdir().unwrap();
    let quantisation = json!({"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]});
    let config = json!({"model_type": "deepseek_v4", "quantization_config": quantisation});
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let shape: Vec<usize> = codes.size().iter().map(|n| *n as usize).collect();
    let views = [
        ("a.scale", TensorView::new(Dtype::F8_E8M0, scale_shape.to_vec(), storage::bytes(exponents)).unwrap()),
        ("a.weight", TensorView::new(Dtype::I8, shape, storage::bytes(codes)).unwrap()),
    ];
    serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    Checkpoint::open(&BaseSource::Folder(folder.path().to_path_buf()))
}

/// DeepSeek V4's experts: the numbers of gpt-oss's blocks, as they lie.
#[test]
fn rows_beside_their_exponents_are_the_numbers_of_transformers() {
    let fixture = fixture();
    let [blocks, exponents] = ["blocks", "scales"]
        .map(|part| fixture.tensor(part, Kind::Uint8, Device::Cpu).unwrap().select(0, 0).contiguous());
    let codes = blocks.flatten(1, 2); // (out, in / 2)
    let shape: Vec<usize> = exponents.size().iter().map(|n| *n as usize).collect();
    let checkpoint = rows(&codes, &exponents, &shape).unwrap();
    assert_eq!(checkpoint.names(), ["a.weight"]);
    for (kind, name) in [(Kind::Float, "float32"), (Kind::BFloat16, "bfloat16")] {
        let expected = fixture.tensor(name, kind, Device::Cpu).unwrap().select(0, 0).tr().contiguous(); // (out, in)
        assert_eq!(checkpoint.shape("a.weight"), Some(expected.size()));
        assert_eq!(checkpoint.tensor("a.weight", kind, Device::Cpu).unwrap(), expected, "{name}");
    }
    let flat = [shape[0] * shape[1], 1];
    let found = rows(&codes, &exponents, &flat).unwrap_err().to_string();
    assert!(found.contains("a.scale: is") && found.contains("two to a byte"), "{found}");
}
