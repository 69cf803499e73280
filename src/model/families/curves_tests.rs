//! The losses and gradient norms of a run lie on each other, whatever computes its steps: every operation's kernel or its plain twin, and
//! what takes less memory.

use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::super::{Decoder, Documents, Forward, LowRank, Thrift};
use super::kernels_tests::write;
use crate::ops::cuda::emulator::emulated;
use crate::ops::testing::{randn, without};
use crate::quant::{Form, FourBitType, Products, Scheme};
use crate::recipe::{BaseSource, TrainingRecipe};
use crate::train::Optimizer;
use crate::weights::Checkpoint;

const STEPS: i64 = 16;
const VOCABULARY: i64 = 80;

/// The loss and the gradient norm of every step of a run over documents of two lengths.
fn curve(checkpoint: &Checkpoint, scheme: &Scheme, thrift: Thrift) -> Vec<[f64; 2]> {
    let mut model = Decoder::load_kept(checkpoint, scheme.kind, Device::Cpu, Some(scheme), &|_, _| ()).unwrap();
    let mut parameters = Vec::new();
    for (i, linear) in model.linears_mut().into_iter().enumerate().filter(|(_, linear)| linear.name != "lm_head") {
        let (out, input) = linear.shape();
        let a = (randn(&[4, input], 100 + i as u64) * 0.2).set_requires_grad(true);
        let b = Tensor::zeros([out, 4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let name = linear.name.clone();
        parameters.extend([
            (format!("{name}.lora_A.weight"), a.shallow_clone()),
            (format!("{name}.lora_B.weight"), b.shallow_clone()),
        ]);
        linear.adapter = Some(LowRank { a, b, scale: 1.0, dropout: 0.0, magnitude: None });
    }
    let mut optimizer = Optimizer::new(&parameters, &TrainingRecipe::default());
    let documents = Documents { offsets: vec![0, 13, 24] };
    let positions: Vec<i64> = documents.spans().flat_map(|(_, length)| 0..length).collect();
    let positions = Tensor::from_slice(&positions);
    let forward = Forward { thrift, ..Forward::default() };
    let step = |number: i64| {
        let ids: Vec<i64> = (0..24).map(|i| (i * 7 + number % 3 * 11) % VOCABULARY).collect();
        let ids = Tensor::from_slice(&ids);
        let hidden = model.hidden(&ids, &positions, &documents, forward);
        let loss = model.cross_entropy(&hidden.narrow(0, 0, 23), &ids.narrow(0, 1, 23), forward, 1.0 / 23.0);
        loss.backward();
        let norm = optimizer.update(3e-3, 1.0, &loss.detach()).unwrap().gradient_norm;
        [loss.double_value(&[]), norm.double_value(&[])]
    };
    (0..STEPS).map(step).collect()
}

#[test]
fn curves_of_every_way_to_compute_a_run_lie_on_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
    });
    write(folder.path(), &config);
    let checkpoint = Checkpoint::open(&BaseSource::Folder(folder.path().to_path_buf())).unwrap();
    let form = Form::FourBit { code: FourBitType::Nf4, block: 64, double_quant: true };
    let skip = vec!["lm_head".into()];
    let scheme = Scheme { form, kind: Kind::Float, skip, products: Products::Dequantised, after_start: false };
    let whole = Thrift::default();

    // Plain twins of all that has one.
    let expected = without(".rs", || curve(&checkpoint, &scheme, whole));
    let [first, last] = [expected[0][0], expected[STEPS as usize - 1][0]];
    assert!(last < 0.9 * first, "it learns: {first} to {last}");
    assert!(expected.iter().all(|[_, norm]| *norm > 1e-3), "{expected:?}");
    let compare = |found: Vec<[f64; 2]>, what: &str| {
        for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
            for (found, expected) in found.iter().zip(expected) {
                let off = (found - expected).abs() / expected;
                assert!(off < 2e-4, "{what}, step {step}: {found} where plain twins have {expected}");
            }
        }
    };

    compare(curve(&checkpoint, &scheme, whole), "the processor's kernels");
    compare(emulated(|| curve(&checkpoint, &scheme, whole)), "a GPU's kernels");
    for file in ["norm.rs", "rope.rs", "gated.rs", "cross_entropy.rs", "attention/mod.rs", "four_bit.rs"] {
        compare(without(file, || curve(&checkpoint, &scheme, whole)), &format!("the processor's without {file}"));
        let found = emulated(|| without(file, || curve(&checkpoint, &scheme, whole)));
        compare(found, &format!("a GPU's without {file}"));
    }
    let recomputed = Thrift::recomputing(2);
    for thrift in [
        Thrift::recomputing(1),
        recomputed,
        Thrift { offload: true, ..recomputed },
        Thrift { feed_forward_tile: Some(7), ..recomputed },
        Thrift { feed_forward_tile: Some(7), offload: true, ..recomputed },
    ] {
        compare(curve(&checkpoint, &scheme, thrift), &format!("{thrift:?}"));
    }
}
