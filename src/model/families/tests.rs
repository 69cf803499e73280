//! What fits a config and what does not, on bases of zeros.

use std::collections::BTreeMap;
use std::path::Path;

use tch::Kind;

use super::*;
use crate::recipe::BaseSource;
use crate::weights::writer::{self, TensorSpec};

fn config() -> serde_json::Value {
    serde_json::json!({
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2, "vocab_size": 11, "tie_word_embeddings": false,
    })
}

/// What a folder with these tensors is answered, `change` made to what its config asks for.
fn answer(change: impl Fn(&mut BTreeMap<String, Vec<i64>>)) -> String {
    answer_of(&config(), change)
}

pub(super) fn answer_of(config: &serde_json::Value, change: impl Fn(&mut BTreeMap<String, Vec<i64>>)) -> String {
    let folder = tempfile::tempdir().unwrap();
    let spec = from_config(config).unwrap();
    let mut tensors = spec.tensors();
    change(&mut tensors);
    write(folder.path(), config, &tensors);
    let checkpoint = Checkpoint::open(&BaseSource::Folder(folder.path().to_path_buf())).unwrap();
    match spec.prove(&checkpoint) {
        Ok(()) => "fits".into(),
        Err(error) => error.to_string(),
    }
}

/// Makes `folder` a base of zeros.
pub(super) fn write(folder: &Path, config: &serde_json::Value, tensors: &BTreeMap<String, Vec<i64>>) {
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .map(|(name, shape)| TensorSpec { name: name.clone(), kind: Kind::Float, shape: shape.clone() })
        .collect();
    let zeros = |index: usize| Ok(tch::Tensor::zeros(specs[index].shape.as_slice(), (Kind::Float, tch::Device::Cpu)));
    writer::write(&folder.join("model.safetensors"), &specs, &BTreeMap::new(), zeros).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

#[test]
fn a_base_that_is_whole_fits() {
    assert_eq!(answer(|_| ()), "fits");
    let buffer = "model.layers.0.self_attn.rotary_emb.inv_freq";
    assert_eq!(answer(|tensors| drop(tensors.insert(buffer.into(), vec![2]))), "fits");
}

#[test]
fn a_norm_of_the_wrong_length_is_named_with_both_shapes() {
    let found = answer(|tensors| drop(tensors.insert("model.norm.weight".into(), vec![16])));
    assert!(found.contains("model.norm.weight is [16] in the file, [8] by config.json"), "{found}");
}

#[test]
fn a_missing_tensor_is_named() {
    let found = answer(|tensors| drop(tensors.remove("lm_head.weight")));
    assert!(found.contains("lacks 1 tensor(s)") && found.contains("lm_head.weight"), "{found}");
}

#[test]
fn tensors_that_the_config_does_not_account_for_are_an_error() {
    let bias = "model.layers.1.self_attn.q_proj.bias";
    let found = answer(|tensors| drop(tensors.insert(bias.into(), vec![8])));
    assert!(found.contains("does not account for") && found.contains(bias), "{found}");
    let third = "model.layers.2.mlp.up_proj.weight";
    assert!(answer(|tensors| drop(tensors.insert(third.into(), vec![12, 8]))).contains(third));
}
