//! Whole models with the CUDA kernels and without: the same numbers, and every kernel is met on the way. What a kernel does not serve, a
//! tensor that is not contiguous, say, would go the slow way unseen.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::super::{Decoder, Documents, Forward, LowRank, families};
use crate::ops::cuda::emulator::{emulated, gpu, launched};
use crate::ops::testing::randn;
use crate::quant::{Form, FourBitType, Products, Scheme};
use crate::recipe::BaseSource;
use crate::weights::Checkpoint;
use crate::weights::writer::{self, TensorSpec};

/// Writes a model of seeded numbers.
pub(super) fn write(folder: &Path, config: &Value) {
    let spec = families::from_config(config).unwrap();
    let tensors: Vec<TensorSpec> =
        spec.tensors().into_iter().map(|(name, shape)| TensorSpec { name, kind: Kind::Float, shape }).collect();
    let numbers = |index: usize| {
        let tensor = &tensors[index];
        let values = randn(&tensor.shape, index as u64) * 0.15;
        Ok(if tensor.name.contains("norm") { values + 1.0 } else { values })
    };
    writer::write(&folder.join("model.safetensors"), &tensors, &BTreeMap::new(), numbers).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

/// The loss of two documents and the gradients of every A and B.
fn step(folder: &Path, scheme: &Scheme, device: Device) -> Vec<Tensor> {
    let checkpoint = Checkpoint::open(&BaseSource::Folder(folder.to_path_buf())).unwrap();
    let mut model = Decoder::load_kept(&checkpoint, scheme.kind, device, Some(scheme), &|_, _| ()).unwrap();
    let mut leaves = Vec::new();
    for (i, linear) in model.linears_mut().into_iter().enumerate().filter(|(_, linear)| linear.name != "lm_head") {
        let (out, input) = linear.shape();
        let leaf = |shape: [i64; 2], seed| (randn(&shape, seed) * 0.2).to_device(device).set_requires_grad(true);
        let (a, b) = (leaf([4, input], 100 + i as u64), leaf([out, 4], 200 + i as u64));
        leaves.extend([a.shallow_clone(), b.shallow_clone()]);
        linear.adapter = Some(LowRank { a, b, scale: 0.5, dropout: 0.0, magnitude: None });
    }
    let documents = Documents { offsets: vec![0, 13, 24] };
    let positions: Vec<i64> = documents.spans().flat_map(|(_, length)| 0..length).collect();
    let ids: Vec<i64> = (0..24).map(|i| i * 7 % 80).collect();
    let [ids, positions] = [ids, positions].map(|numbers| Tensor::from_slice(&numbers).to_device(device));
    let hidden = model.hidden(&ids, &positions, &documents, Forward::default());
    let loss = model.cross_entropy(&hidden.narrow(0, 0, 23), &ids.narrow(0, 1, 23), Forward::default(), 1.0 / 23.0);
    loss.backward();
    let gradients = leaves.iter().map(|leaf| leaf.grad().to_device(Device::Cpu));
    std::iter::once(loss.detach().to_device(Device::Cpu)).chain(gradients).collect()
}

#[test]
fn a_step_of_whole_models_is_the_same_on_cuda_kernels_and_meets_them_all() {
    let shape = json!({
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "vocab_size": 80, "rms_norm_eps": 1e-5,
    });
    let of = |rest: Value| {
        let mut config = shape.clone();
        config.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        config
    };
    let four_bit = |double_quant| Form::FourBit { code: FourBitType::Nf4, block: 64, double_quant };
    let cases = [
        (of(json!({"model_type": "llama", "tie_word_embeddings": false})), four_bit(true)),
        (of(json!({"model_type": "qwen3", "tie_word_embeddings": false})), Form::Int8),
        (of(json!({"model_type": "mistral", "tie_word_embeddings": false, "sliding_window": 8})), Form::Fp8),
        (of(json!({"model_type": "gemma2", "query_pre_attn_scalar": 32, "sliding_window": 8})), four_bit(false)),
    ];
    for (config, form) in cases {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &config);
        for (kind, suffix, tolerance) in [(Kind::Float, "f32", 2e-5), (Kind::BFloat16, "bf16", 3e-2)] {
            let scheme = |kind| Scheme {
                form,
                kind,
                skip: vec!["lm_head".into()],
                products: Products::Dequantised,
                after_start: false,
            };
            let expected = step(folder.path(), &scheme(kind), Device::Cpu);
            let compare = |found: Vec<Tensor>, tolerance: f64, what: &str| {
                assert_eq!(found.len(), expected.len());
                for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    let largest = expected.abs().max().double_value(&[]);
                    let off = (found - expected).abs().max().double_value(&[]) / largest;
                    assert!(largest > 0.0 && off < tolerance, "{config}: {i} in {kind:?} {what} is off by {off:e}");
                }
            };
            launched();
            compare(emulated(|| step(folder.path(), &scheme(kind), Device::Cpu)), tolerance, "emulated");
            let met: BTreeSet<String> = launched();
            let whole = match form {
                Form::Int8 => "int8_dequantise",
                Form::Fp8 => "fp8_dequantise",
                Form::FourBit { .. } | Form::Stored(_) => "four_bit_dequantise",
            };
            for kernel in [whole, "norm", "norm_again", "norm_backward", "gated", "gated_backward"] {
                assert!(met.contains(&format!("{kernel}_{suffix}")), "{config}: {kernel} in {kind:?} was not met");
            }
            let rotations: &[&str] = match config["model_type"].as_str() {
                Some("qwen3") => &["normed_rope_halves", "normed_rope_backward_halves"],
                _ => &["rope_halves"],
            };
            let loss = if kind == Kind::Float { "cross_entropy" } else { "cross_entropy_of_fp32" };
            for kernel in rotations.iter().chain([&loss]) {
                assert!(met.contains(&format!("{kernel}_{suffix}")), "{config}: {kernel} in {kind:?} was not met");
            }
            if let Some(device) = gpu() {
                // Products and attention are another library's there.
                compare(step(folder.path(), &scheme(kind), device), 2.0 * tolerance, "on a GPU");
            }
        }
    }
}
