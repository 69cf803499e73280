//! Mixtures of experts whose base is stored quantised: kept so, they compute what they do with plain numbers. The weights are those of
//! the families' fixtures, quantised here.

mod generator;

use std::path::Path;

use engraft::model::{Decoder, Documents, Forward};
use engraft::quant::{Form, FourBitType, Layout, Products, Quantised, Scheme, Weight};
use engraft::recipe::BaseSource;
use engraft::weights::Checkpoint;
use engraft::weights::writer::{self, TensorSpec};
use generator::values;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

type Tensors = Vec<(String, Tensor)>;

/// A checkpoint of these, in a folder that lives as long as the first.
fn checkpoint(tensors: &Tensors, config: &Value) -> (tempfile::TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let specs: Vec<_> = tensors.iter().map(|(name, tensor)| TensorSpec::of(name.as_str(), tensor)).collect();
    writer::write_model(folder.path(), &specs, 1 << 30, |index| Ok(tensors[index].1.shallow_clone())).unwrap();
    let checkpoint = Checkpoint::open(&BaseSource::Folder(folder.path().to_path_buf())).unwrap();
    (folder, checkpoint)
}

/// A fixture's tensors and config, its widths changed by `width`.
fn fixture(name: &str, width: impl Fn(i64) -> i64) -> (Tensors, Value) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families").join(name);
    let read = |file: &str| serde_json::from_slice::<Value>(&std::fs::read(source.join(file)).unwrap()).unwrap();
    let lines: Vec<(String, Vec<i64>, f32, f32)> = serde_json::from_value(read("tensors.json")).unwrap();
    let tensors = lines.into_iter().map(|(name, shape, offset, scale)| {
        let shape: Vec<i64> = shape.into_iter().map(&width).collect();
        let numbers = values(&name, shape.iter().product::<i64>() as usize, offset, scale);
        let tensor = Tensor::from_slice(&numbers).view(&shape[..]);
        (name, tensor)
    });
    (tensors.collect(), read("config.json"))
}

/// The logits of a checkpoint of these, its base kept as it is stored and as plain numbers; and which linears were kept.
fn logits(tensors: &Tensors, config: &Value, layout: Layout) -> ([Tensor; 2], Vec<(String, bool)>) {
    let (_folder, checkpoint) = checkpoint(tensors, config);
    let scheme = Scheme {
        form: Form::Stored(layout),
        kind: Kind::Float,
        skip: Vec::new(),
        products: Products::Dequantised,
        after_start: false,
    };
    let mut kept = Vec::new();
    let logits = [Some(&scheme), None].map(|scheme| {
        let model = Decoder::load_kept(&checkpoint, Kind::Float, Device::Cpu, scheme, &|_, _| ()).unwrap();
        if scheme.is_some() {
            let of = |weight: &Weight| matches!(weight, Weight::Quantised(Quantised::Experts(_)));
            let linears = model.linears().into_iter().filter(|linear| matches!(linear.weight, Weight::Quantised(_)));
            kept = linears.map(|linear| (linear.name.clone(), of(&linear.weight))).collect();
        }
        let ids = Tensor::arange(23, (Kind::Int64, Device::Cpu)) + 3;
        let positions = Tensor::arange(23, (Kind::Int64, Device::Cpu));
        model.logits(&model.hidden(&ids, &positions, &Documents::one(23), Forward::default()))
    });
    (logits, kept)
}

#[track_caller]
fn assert_same([kept, plain]: &[Tensor; 2]) {
    let off = (kept - plain).abs().max().double_value(&[]) / plain.abs().max().double_value(&[]);
    assert!(off < 1e-6, "off by {off:e} of the largest");
}

/// Quantised as they are read, each by itself, and the same numbers where products are of another type.
#[test]
fn experts_apart_are_quantised_one_by_one() {
    let (tensors, config) = fixture("qwen3_moe", |width| width);
    let (_folder, checkpoint) = checkpoint(&tensors, &config);
    let form = Form::FourBit { code: FourBitType::Nf4, block: 32, double_quant: true };
    let skip = vec!["lm_head".to_string()];
    let scheme = Scheme { form, kind: Kind::BFloat16, skip, products: Products::Dequantised, after_start: false };
    let load = |kind, scheme| Decoder::load_kept(&checkpoint, kind, Device::Cpu, scheme, &|_, _| ()).unwrap();
    let (plain, kept) = (load(Kind::Float, None), load(Kind::BFloat16, Some(&scheme)));
    let asked = load(Kind::Float, Some(&scheme));
    let mut experts = 0;
    for ((plain, kept), asked) in plain.linears().into_iter().zip(kept.linears()).zip(asked.linears()) {
        let Weight::Quantised(Quantised::Experts(_)) = &kept.weight else { continue };
        experts += 1;
        let expected = scheme.numbers(&plain.weight.dense());
        assert_eq!(kept.weight.dense(), expected, "{}", kept.name);
        assert_eq!(asked.weight.dense(), expected.to_kind(Kind::Float), "{}", kept.name);
    }
    assert_eq!(experts, 6);
}

#[test]
fn experts_apart_in_integers_of_compressed_tensors() {
    let (tensors, mut config) = fixture("qwen3_moe", |width| width);
    let mut stored = Vec::new();
    for (name, tensor) in tensors {
        if name.ends_with("_proj.weight") {
            let scale = tensor.abs().amax([1], true) / 127.0;
            stored.push((name.clone(), (&tensor / &scale).round().to_kind(Kind::Int8)));
            stored.push((format!("{name}_scale"), scale));
        } else {
            stored.push((name, tensor));
        }
    }
    let weights = json!({"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": true});
    config["quantization_config"] = json!({
        "quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    });
    let (logits, kept) = logits(&stored, &config, Layout::CompressedTensors);
    assert_same(&logits);
    // Four of attention in each of three layers, three of the plain feed-forward, three of experts in each of the others.
    assert_eq!((kept.len(), kept.iter().filter(|(_, experts)| *experts).count()), (12 + 3 + 6, 6), "{kept:?}");
}

#[test]
fn experts_apart_in_blocks_of_fp8() {
    let (tensors, mut config) = fixture("deepseek_v3", |width| width);
    let block = 16;
    let mut stored = Vec::new();
    for (name, tensor) in tensors {
        if !name.contains("_proj") || !name.ends_with(".weight") {
            stored.push((name, tensor));
            continue;
        }
        let size = tensor.size();
        let across: Vec<i64> = size.iter().map(|size| (size + block - 1) / block).collect();
        let scales = Tensor::full(&across[..], 1.0 / 256.0, (Kind::Float, Device::Cpu));
        stored.push((name.clone(), (tensor * 256.0).clamp(-448.0, 448.0).to_kind(Kind::Float8e4m3fn)));
        stored.push((format!("{name}_scale_inv"), scales));
    }
    config["quantization_config"] = json!({"quant_method": "fp8", "weight_block_size": [block, block]});
    let (logits, kept) = logits(&stored, &config, Layout::Fp8);
    assert_same(&logits);
    assert!(kept.iter().any(|(_, experts)| *experts) && kept.iter().any(|(_, experts)| !experts), "{kept:?}");
}

#[test]
fn experts_together_in_mxfp4() {
    // Blocks are of 32 numbers.
    let wide = |width| match width {
        30 | 28 => 64,
        14 => 32,
        other => other,
    };
    let (tensors, mut config) = fixture("gpt_oss", wide);
    config["hidden_size"] = 64.into();
    config["intermediate_size"] = 32.into();
    let mut stored = Vec::new();
    for (number, (name, tensor)) in tensors.into_iter().enumerate() {
        let &[experts, columns, rows] = &tensor.size()[..] else {
            stored.push((name, tensor));
            continue;
        };
        let drawn = |shape: &[i64], limit: f64| {
            let count = shape.iter().product::<i64>();
            let hashed = Tensor::arange(count, (Kind::Int64, Device::Cpu)) * 2_654_435_761i64 + number as i64 * 97;
            let hashed = hashed.remainder(65_521.0);
            hashed.remainder(limit).to_kind(Kind::Uint8).view(shape)
        };
        stored.push((format!("{name}_blocks"), drawn(&[experts, rows, columns / 32, 16], 256.0)));
        stored.push((format!("{name}_scales"), drawn(&[experts, rows, columns / 32], 3.0) + 122));
    }
    config["quantization_config"] = json!({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]});
    let (logits, kept) = logits(&stored, &config, Layout::Mxfp4);
    assert_same(&logits);
    assert_eq!((kept.len(), kept.iter().all(|(_, experts)| *experts)), (6, true), "{kept:?}");
}
