//! What other tools store and make of it (`tests/python/layouts.py`), as small checkpoints.

use std::path::Path;

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::recipe::BaseSource;
use crate::weights::Checkpoint;
use crate::weights::storage::Dtype;
use crate::weights::writer::{self, TensorSpec};

pub(super) type Tensors = Vec<(String, Tensor)>;

fn fixture() -> Checkpoint {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/layouts.safetensors");
    Checkpoint::open_file(Path::new(path)).expect("the fixture is committed")
}

/// Names of the cases that begin so.
pub(super) fn cases(beginning: &str) -> Vec<String> {
    let fixture = fixture();
    let names = fixture.names().into_iter().filter_map(|name| name.strip_suffix("|whole"));
    let names: Vec<String> = names.filter(|name| name.starts_with(beginning)).map(str::to_string).collect();
    assert!(!names.is_empty(), "{beginning}");
    names
}

/// The parts of a case as those of the module `m.x`, and what they stand for.
pub(super) fn case(name: &str) -> (Tensors, Tensor) {
    let fixture = fixture();
    let mut parts = Vec::new();
    let mut whole = None;
    for full in fixture.names() {
        let Some(part) = full.strip_prefix(&format!("{name}|")) else { continue };
        let kind = Dtype::named(fixture.stored_as(full).unwrap()).unwrap().kind.unwrap();
        let tensor = fixture.tensor(full, kind, Device::Cpu).unwrap();
        match part {
            "whole" => whole = Some(tensor),
            part => parts.push((format!("m.x.{part}"), tensor)),
        }
    }
    (parts, whole.expect("a case of the fixture"))
}

pub(super) fn place<'a>(tensors: &'a mut Tensors, part: &str) -> &'a mut Tensor {
    let name = format!("m.x.{part}");
    &mut tensors.iter_mut().find(|(found, _)| *found == name).expect("a tensor of the case").1
}

/// A checkpoint of these, in shards of a tensor each: what belongs together need not lie together.
pub(super) fn open(tensors: &Tensors, quantisation: &Value) -> Result<(tempfile::TempDir, Checkpoint)> {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), tensors, quantisation);
    Checkpoint::open(&BaseSource::Folder(folder.path().to_path_buf())).map(|checkpoint| (folder, checkpoint))
}

fn write(folder: &Path, tensors: &Tensors, quantisation: &Value) {
    let config = json!({"model_type": "llama", "quantization_config": quantisation});
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let specs: Vec<_> = tensors.iter().map(|(name, tensor)| TensorSpec::of(name.as_str(), tensor)).collect();
    writer::write_model(folder, &specs, 1, |index| Ok(tensors[index].1.shallow_clone())).unwrap();
}

/// What opening answers, and if it opens, reading the weight.
pub(super) fn answer(tensors: &Tensors, quantisation: &Value) -> String {
    match open(tensors, quantisation) {
        Err(error) => {
            assert_eq!(error.exit_code(), 5);
            error.to_string()
        }
        Ok((_folder, checkpoint)) => match checkpoint.tensor("m.x.weight", Kind::Float, Device::Cpu) {
            Ok(_) => "reads".into(),
            Err(error) => error.to_string(),
        },
    }
}

/// That a case reads as its tool has it, whole and kept, in every number type.
pub(super) fn assert_reads(name: &str, quantisation: &Value) -> Checkpoint {
    let (tensors, whole) = case(name);
    let (_folder, checkpoint) = open(&tensors, quantisation).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(checkpoint.names(), ["m.x.weight"], "{name}");
    assert_eq!(checkpoint.shape("m.x.weight"), Some(whole.size()), "{name}");
    for kind in [whole.kind(), Kind::Float, Kind::BFloat16, Kind::Half] {
        let expected = whole.to_kind(kind);
        let found =
            checkpoint.tensor("m.x.weight", kind, Device::Cpu).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!((found.kind(), found.size()), (kind, whole.size()), "{name}");
        let differ = found.ne_tensor(&expected).sum(Kind::Int64).int64_value(&[]);
        assert_eq!(differ, 0, "{name} as {kind:?}: {differ} of {} differ", whole.numel());
        let kept = checkpoint.quantised("m.x.weight", kind, Device::Cpu).unwrap().expect("a form that is kept");
        assert_eq!(kept.size(), whole.size());
        assert!(kept.dequantised().equal(&expected), "{name} kept, as {kind:?}");
    }
    checkpoint
}
