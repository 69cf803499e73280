//! Mixtures of experts whose base is stored quantised: kept so, they compute what they do with plain numbers. The weights are those of
//! the families' fixtures, quantised here.

mod generator;

use std::path::Path;

use engraft::model::{Decoder, Documents, Forward};
use engraft::quant::{Form, FourBitType, Layout, Products, Quantised, Scheme, Weight};
use engraft::recipe::BaseSource;
use engraft::weights::Checkpoint;
use engraft::weights::writer::{self, TensorSpec};
use generator::{values, whole_numbers};
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
    let lines: Vec<(String, Vec<i64>, Value, f32)> = serde_json::from_value(read("tensors.json")).unwrap();
    let tensors = lines.into_iter().map(|(name, shape, offset, scale)| {
        let shape: Vec<i64> = shape.into_iter().map(&width).collect();
        let tensor = match offset.as_f64() {
            Some(offset) => {
                let count = shape.iter().product::<i64>() as usize;
                Tensor::from_slice(&values(&name, count, offset as f32, scale))
            }
            None => Tensor::from_slice(&whole_numbers(&name, shape[0] as usize, shape[1] as usize, scale as i64)),
        };
        let tensor = tensor.view(&shape[..]);
        (name, tensor)
    });
    (tensors.collect(), read("config.json"))
}

/// The logits of a checkpoint of these, its base kept as it is stored and as plain numbers; and which linears were kept.
fn logits(tensors: &Tensors, config: &Value, layout: Layout) -> ([Tensor; 2], Vec<(String, bool)>) {
    let (_folder, checkpoint) = checkpoint(tensors, config);
    logits_of(&checkpoint, layout)
}

/// The same of a checkpoint.
fn logits_of(checkpoint: &Checkpoint, layout: Layout) -> ([Tensor; 2], Vec<(String, bool)>) {
    let scheme = Scheme {
        form: Form::Stored(layout),
        kind: Kind::Float,
        skip: Vec::new(),
        products: Products::Dequantised,
        after_start: false,
    };
    let mut kept = Vec::new();
    let logits = [Some(&scheme), None].map(|scheme| {
        let model = Decoder::load_kept(checkpoint, Kind::Float, Device::Cpu, scheme, &|_, _| ()).unwrap();
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

/// Rows and columns to a scale of fp8 weights, and the scale.
const BLOCK: i64 = 16;
const SCALE: f64 = 1.0 / 256.0;

/// How many blocks there are across each side of a weight, of each expert where they are stacked.
fn across(size: &[i64]) -> Vec<i64> {
    let (stack, of_one) = size.split_at(size.len() - 2);
    stack.iter().copied().chain(of_one.iter().map(|size| (size + BLOCK - 1) / BLOCK)).collect()
}

fn in_fp8(tensor: &Tensor) -> Tensor {
    (tensor / SCALE).clamp(-448.0, 448.0).to_kind(Kind::Float8e4m3fn)
}

/// Every projection in fp8 with its scales beside it, experts stacked or not.
fn blocks_of_fp8((tensors, mut config): (Tensors, Value)) -> (Tensors, Value) {
    let mut stored = Vec::new();
    for (name, tensor) in tensors {
        let stacked = name.ends_with(".experts.gate_up_proj") || name.ends_with(".experts.down_proj");
        if !(stacked || name.contains("_proj") && name.ends_with(".weight")) {
            stored.push((name, tensor));
            continue;
        }
        let scales = Tensor::full(&across(&tensor.size())[..], SCALE, (Kind::Float, Device::Cpu));
        stored.push((name.clone(), in_fp8(&tensor)));
        stored.push((format!("{name}_scale_inv"), scales));
    }
    config["quantization_config"] = json!({"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]});
    (stored, config)
}

#[test]
fn experts_in_blocks_of_fp8() {
    for name in ["deepseek_v3", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "qwen3_5_moe"] {
        let (stored, config) = blocks_of_fp8(fixture(name, |width| width));
        let (logits, kept) = logits(&stored, &config, Layout::Fp8);
        assert_same(&logits);
        assert!(
            kept.iter().any(|(_, experts)| *experts) && kept.iter().any(|(_, experts)| !experts),
            "{name}: {kept:?}"
        );
    }
}

/// The published files in fp8 of a larger model store apart what those in bf16 stack.
#[test]
fn experts_that_a_larger_model_stores_apart_in_fp8_are_those_it_stacks() {
    let (stacked, config) = fixture("qwen3_5_moe", |width| width);
    let mut apart = Vec::new();
    for (name, tensor) in &stacked {
        let Some(place) = ["gate_up_proj", "down_proj"].iter().find_map(|part| name.strip_suffix(part)) else {
            apart.push((name.clone(), tensor.shallow_clone()));
            continue;
        };
        let parts: &[&str] = if name.ends_with("gate_up_proj") { &["gate_proj", "up_proj"] } else { &["down_proj"] };
        for (number, expert) in (0..).zip(tensor.unbind(0)) {
            for (part, weight) in parts.iter().zip(expert.chunk(parts.len() as i64, 0)) {
                apart.push((format!("{place}{number}.{part}.weight"), weight.contiguous()));
            }
        }
    }
    assert!(apart.iter().any(|(name, _)| name == "model.language_model.layers.1.mlp.experts.4.up_proj.weight"));
    let [one, other] = [stacked, apart].map(|tensors| {
        let (stored, config) = blocks_of_fp8((tensors, config.clone()));
        let (logits, kept) = logits(&stored, &config, Layout::Fp8);
        assert_same(&logits);
        assert!(kept.iter().any(|(_, experts)| *experts), "{kept:?}");
        logits
    });
    assert_same(&[one[0].shallow_clone(), other[0].shallow_clone()]);
}

/// DeepSeek V4's files: attention and what is shared in fp8, experts in MXFP4, the scales of both exponents alone.
#[test]
fn experts_in_mxfp4_among_fp8() {
    use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
    let wide = |width| match width {
        30 => 64,
        90 => 192,
        14 => 32,
        other => other,
    };
    let (tensors, mut config) = fixture("deepseek_v4", wide);
    config["hidden_size"] = 64.into();
    config["moe_intermediate_size"] = 32.into();
    config["quantization_config"] =
        json!({"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [BLOCK, BLOCK]});
    let bytes = |tensor: &Tensor| {
        let mut bytes = vec![0u8; tensor.numel() * tensor.kind().elt_size_in_bytes()];
        tensor.contiguous().copy_data_u8(&mut bytes, tensor.numel());
        bytes
    };
    let mut stored: Vec<(String, Dtype, Vec<i64>, Vec<u8>)> = Vec::new();
    for (seed, (name, tensor)) in (0i64..).zip(tensors) {
        let (size, scale) = (tensor.size(), name.replace(".weight", ".scale"));
        let of_attention =
            ["wq_a", "wq_b", "wkv", "wo_a", "wo_b"].iter().any(|part| name.contains(&format!("attn.{part}")));
        if name.contains(".ffn.experts.") {
            let packed = vec![size[0], size[1] / 2];
            let codes =
                Tensor::arange(size[0] * size[1] / 2, (Kind::Int64, Device::Cpu)) * 2_654_435_761i64 + seed * 97;
            let codes = codes.remainder(65_521.0).remainder(256.0).to_kind(Kind::Uint8);
            stored.push((name, Dtype::I8, packed, bytes(&codes)));
            stored.push((
                scale,
                Dtype::F8_E8M0,
                vec![size[0], size[1] / 32],
                vec![124; (size[0] * size[1] / 32) as usize],
            ));
        } else if of_attention || name.contains(".shared_experts.") {
            let blocks = across(&size);
            let exponents = vec![119; blocks.iter().product::<i64>() as usize];
            stored.push((name, Dtype::F8_E4M3, size, bytes(&in_fp8(&tensor))));
            stored.push((scale, Dtype::F8_E8M0, blocks, exponents));
        } else {
            let dtype = if tensor.kind() == Kind::Int64 { Dtype::I64 } else { Dtype::F32 };
            stored.push((name, dtype, size, bytes(&tensor)));
        }
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let views = stored.iter().map(|(name, dtype, shape, bytes)| {
        let shape = shape.iter().map(|n| *n as usize).collect();
        (name.as_str(), TensorView::new(*dtype, shape, bytes).unwrap())
    });
    serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(&BaseSource::Folder(folder.path().to_path_buf())).unwrap();
    let (logits, kept) = logits_of(&checkpoint, Layout::Fp8);
    assert_same(&logits);
    // Gate, up and down of the experts of each of four layers; the same of what is shared, and five of attention.
    assert_eq!(kept.iter().filter(|(_, experts)| *experts).count(), 4 * 3, "{kept:?}");
    assert_eq!(kept.iter().filter(|(_, experts)| !experts).count(), 4 * (3 + 5), "{kept:?}");
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
