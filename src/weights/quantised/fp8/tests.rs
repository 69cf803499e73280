use std::path::Path;

use serde_json::json;
use tch::Device;

use super::*;
use crate::recipe::BaseSource;
use crate::weights::writer::{self, TensorSpec};
use crate::weights::{Checkpoint, prove_readable};

/// Weights, scales and what torch makes of them: `tests/python/fp8_scales.py` writes it.
fn fixture() -> Checkpoint {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/fp8_scales.safetensors");
    Checkpoint::open_file(&path).unwrap()
}

/// The fixture's weight and scales called `name`.
fn pair_of(name: &str) -> Vec<(String, Tensor)> {
    let fixture = fixture();
    ["weight", "weight_scale_inv"]
        .map(|part| {
            let name = format!("{name}.{part}");
            let kind = Dtype::named(fixture.stored_as(&name).unwrap()).unwrap().kind.unwrap();
            let tensor = fixture.tensor(&name, kind, Device::Cpu).unwrap();
            (name, tensor)
        })
        .into()
}

fn model(tensors: &[(String, Tensor)], quantisation: &Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({"model_type": "llama", "quantization_config": quantisation});
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let specs: Vec<_> = tensors.iter().map(|(name, tensor)| TensorSpec::of(name.as_str(), tensor)).collect();
    // Shards of a tensor each: a weight and its scales need not lie together.
    writer::write_model(folder.path(), &specs, 1, |index| Ok(tensors[index].1.shallow_clone())).unwrap();
    folder
}

fn open(folder: &tempfile::TempDir) -> Result<Checkpoint> {
    Checkpoint::open(&BaseSource::Folder(folder.path().to_path_buf()))
}

fn fault(tensors: &[(String, Tensor)], quantisation: &Value) -> String {
    let error = open(&model(tensors, quantisation)).unwrap_err();
    assert_eq!(error.exit_code(), 5);
    error.to_string()
}

fn blocks() -> Value {
    json!({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]})
}

#[test]
fn numbers_are_those_of_torch_bit_for_bit() {
    let fixture = fixture();
    let one = json!({"quant_method": "fp8", "weight_block_size": null, "activation_scheme": "static"});
    for (name, quantisation) in [("odd", blocks()), ("narrow", blocks()), ("e5m2", blocks()), ("whole", one)] {
        let folder = model(&pair_of(name), &quantisation);
        let checkpoint = open(&folder).unwrap();
        let weight = format!("{name}.weight");
        assert_eq!(checkpoint.names(), [&weight]);
        let wide = fixture.tensor(&format!("{name}.float32"), Kind::Float, Device::Cpu).unwrap();
        let rounded = fixture.tensor(&format!("{name}.bfloat16"), Kind::BFloat16, Device::Cpu).unwrap();
        for expected in [&wide, &rounded, &wide.to_kind(Kind::Half), &wide.to_kind(Kind::Double)] {
            let found = checkpoint.tensor(&weight, expected.kind(), Device::Cpu).unwrap();
            assert_eq!(found.size(), expected.size());
            assert_eq!(storage::bytes(&found), storage::bytes(expected), "{name} as {:?}", expected.kind());
        }
    }
}

/// Scales that are exponents, as such and as bytes, and stacked experts: `tests/python/fp8_scales.py` writes them and what
/// transformers makes of them.
#[test]
fn exponents_and_stacked_experts_are_those_of_transformers_bit_for_bit() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/fp8_experts.safetensors");
    let expected = Checkpoint::open_file(&path).unwrap();
    let cases = [("exponents.weight", true), ("bytes.weight", true), ("stacked", true), ("parts", false)];
    for (weight, blocks) in cases {
        let folder = tempfile::tempdir().unwrap();
        let size = if blocks { json!([4, 8]) } else { Value::Null };
        let quantisation = json!({"quant_method": "fp8", "weight_block_size": size});
        let config = json!({"model_type": "llama", "quantization_config": quantisation});
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        // Without the cases that have their scales otherwise.
        let others: Vec<String> = cases.iter().filter(|(_, b)| *b != blocks).map(|(n, _)| (*n).to_string()).collect();
        only(&path, &folder.path().join("model.safetensors"), |name| {
            !others.iter().any(|other| name.starts_with(other))
        });
        let checkpoint = open(&folder).unwrap();
        assert!(!checkpoint.names().iter().any(|name| name.ends_with("_scale_inv")), "{:?}", checkpoint.names());
        for (kind, name) in [(Kind::Float, "float32"), (Kind::BFloat16, "bfloat16")] {
            let expected = expected.tensor(&format!("{weight}.{name}"), kind, Device::Cpu).unwrap();
            let found = checkpoint.tensor(weight, kind, Device::Cpu).unwrap();
            assert_eq!(
                (found.size(), storage::bytes(&found)),
                (expected.size(), storage::bytes(&expected)),
                "{weight}"
            );
        }
    }
}

/// Writes those tensors of a file whose names `keep` takes, also of types that are none of libtorch's here.
fn only(from: &Path, to: &Path, keep: impl Fn(&str) -> bool) {
    let bytes = std::fs::read(from).unwrap();
    let file = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let kept = file.tensors().into_iter().filter(|(name, _)| keep(name));
    ::safetensors::serialize_to_file(kept, None, to).unwrap();
}

#[test]
fn scales_of_stacked_experts_that_do_not_fit_and_exponents_that_are_none_are_named() {
    let weight = Tensor::ones([2, 6, 4], (Kind::Float, Device::Cpu)).to_kind(Kind::Float8e4m3fn);
    let with = |scales: Tensor, size: Value| {
        let tensors = [("x.experts".to_string(), weight.shallow_clone()), ("x.experts_scale_inv".to_string(), scales)];
        model(&tensors, &json!({"quant_method": "fp8", "weight_block_size": size}))
    };
    let ones = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
    for (scales, size, expected) in [
        (ones(&[2, 1]), json!([4, 4]), "is [2, 1] for a weight of [2, 6, 4]; [2, 2, 1] expected"),
        (ones(&[1, 2, 1]), json!([4, 4]), "is [1, 2, 1] for a weight of [2, 6, 4]; [2, 2, 1] expected"),
        (ones(&[2, 4, 1]), Value::Null, "is [2, 4, 1] for a weight of [2, 6, 4]; [2, 1, 1] expected"),
        (ones(&[1]), Value::Null, "is [1] for a weight of [2, 6, 4]; [2, 1, 1] expected"),
    ] {
        let found = open(&with(scales, size)).unwrap_err().to_string();
        assert!(found.contains(expected), "{found}");
    }
    let folder = with(Tensor::full([2, 1, 1], 255, (Kind::Uint8, Device::Cpu)), Value::Null);
    let error = open(&folder).unwrap().tensor("x.experts", Kind::Float, Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("x.experts_scale_inv: 2 values are NaN or infinite as F32"), "{error}");
}

/// Rows are made whole many at a time.
#[test]
fn rows_and_columns_get_the_right_scales() {
    let columns = 4396;
    let weight = Tensor::arange(100 * columns, (Kind::Float, Device::Cpu)).remainder(31.0).view([100, columns]);
    let weight = weight.to_kind(Kind::Float8e4m3fn);
    let across = (columns + 69) / 70;
    let scales = Tensor::rand([34, across], (Kind::Float, Device::Cpu)) + 0.5;
    let index =
        |size: i64, block: i64| Tensor::arange(size, (Kind::Int64, Device::Cpu)).divide_scalar_mode(block, "floor");
    let spread = scales.index_select(0, &index(100, 3)).index_select(1, &index(columns, 70));
    let expected = weight.to_kind(Kind::Float) * spread;
    let tensors = [("a.weight".to_string(), weight), ("a.weight_scale_inv".to_string(), scales)];
    let folder = model(&tensors, &json!({"quant_method": "fp8", "weight_block_size": [3, 70]}));
    let checkpoint = open(&folder).unwrap();
    assert_eq!(checkpoint.tensor("a.weight", Kind::Float, Device::Cpu).unwrap(), expected);
    assert_eq!(checkpoint.stored_as("a.weight"), Some("F8_E4M3"));
    assert!(checkpoint.notices()[0].starts_with("the base holds weights in fp8 (1)"));
}

/// As DeepSeek V4 has them: beside the module's name, exponents alone.
#[test]
fn scales_may_be_exponents_under_the_name_of_the_module() {
    use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
    let weight = pair_of("odd").remove(0).1; // (140, 131)
    let exponents: [u8; 4] = [127, 120, 130, 0];
    let factors = [1.0f64, 2f64.powi(-7), 8.0, 2f64.powi(-127)];
    let folder = tempfile::tempdir().unwrap();
    let config = json!({"model_type": "deepseek_v4", "quantization_config": blocks()});
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let views = [
        ("odd.scale", TensorView::new(Dtype::F8_E8M0, vec![2, 2], &exponents).unwrap()),
        ("odd.weight", TensorView::new(Dtype::F8_E4M3, vec![140, 131], storage::bytes(&weight)).unwrap()),
    ];
    serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    let checkpoint = open(&folder).unwrap();
    assert_eq!(checkpoint.names(), ["odd.weight"]);
    let expected = weight.to_kind(Kind::Double);
    for (i, factor) in factors.into_iter().enumerate() {
        let (row, column) = (i as i64 / 2 * 128, i as i64 % 2 * 128);
        let mut part = expected.slice(0, row, Some(row + 128), 1).slice(1, column, Some(column + 128), 1);
        let _ = part.g_mul_scalar_(factor);
    }
    let found = checkpoint.tensor("odd.weight", Kind::Float, Device::Cpu).unwrap();
    assert_eq!(found, expected.to_kind(Kind::Float));
}

#[test]
fn weights_and_scales_that_do_not_go_together_are_named() {
    let [weight, scales] = <[_; 2]>::try_from(pair_of("odd")).unwrap();
    let copy = |(name, tensor): &(String, Tensor)| (name.clone(), tensor.shallow_clone());

    let found = fault(&[copy(&weight)], &blocks());
    assert!(found.contains("odd.weight: is stored as F8_E4M3, but its scales, odd.weight_scale_inv, are missing"));

    let short = (scales.0.clone(), scales.1.narrow(0, 0, 1).contiguous());
    let found = fault(&[copy(&weight), short], &blocks());
    assert!(found.contains("is [1, 2] for a weight of [140, 131]; [2, 2] expected"), "{found}");

    let one = json!({"quant_method": "fp8", "weight_block_size": null});
    let found = fault(&[copy(&weight), copy(&scales)], &one);
    assert!(found.contains("is [2, 2] for a weight of [140, 131]; [] expected"), "{found}");

    let plain = (weight.0.clone(), weight.1.to_kind(Kind::BFloat16));
    let found = fault(&[plain, copy(&scales)], &blocks());
    assert!(found.contains("holds scales of odd.weight, which is stored as BF16, not in fp8"), "{found}");

    // Scales of nothing stay in sight, for whoever compares a model with its config.
    let checkpoint = open(&model(&[copy(&scales)], &blocks())).unwrap();
    assert_eq!(checkpoint.names(), ["odd.weight_scale_inv"]);

    let damaged = weight.1.to_kind(Kind::Float);
    let _ = damaged.get(139).get(130).fill_(f64::NAN);
    let damaged = (weight.0.clone(), damaged.to_kind(Kind::Float8e4m3fn));
    let folder = model(&[damaged, copy(&scales)], &blocks());
    let error = open(&folder).unwrap().tensor("odd.weight", Kind::BFloat16, Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("odd.weight: 1 value is NaN or infinite as F8_E4M3"), "{error}");
}

#[test]
fn what_was_not_quantised_needs_no_scales() {
    let weight = pair_of("odd").remove(0).1;
    for (field, pattern) in [
        ("modules_to_not_convert", "model.layers.1.mlp.gate"),
        ("modules_to_not_convert", "model.layers.1"),
        ("modules_to_not_convert", "gate"),
        ("ignored_layers", r"model\.layers\.\d+\.mlp\.gate$"),
    ] {
        let mut quantisation = blocks();
        quantisation[field] = json!(["lm_head", pattern]);
        let tensors = [("model.layers.1.mlp.gate.weight".to_string(), weight.shallow_clone())];
        let folder = model(&tensors, &quantisation);
        let checkpoint = open(&folder).unwrap_or_else(|error| panic!("{pattern}: {error}"));
        let found = checkpoint.tensor(&tensors[0].0, Kind::Float, Device::Cpu).unwrap();
        assert_eq!(found, weight.to_kind(Kind::Float));
        assert!(checkpoint.notices().is_empty());
        quantisation[field] = json!(["lm_head", "mlp.up_proj", "model.layers.2"]);
        assert!(fault(&tensors, &quantisation).contains("are missing"));
    }
}

#[test]
fn scales_of_activations_are_passed_over_and_said_to_be() {
    let mut tensors = pair_of("whole");
    tensors.push(("whole.activation_scale".into(), Tensor::from(0.5f32)));
    tensors.push(("other.activation_scale".into(), Tensor::from(0.5f32)));
    let experts = Tensor::ones([2, 3, 4], (Kind::Float, Device::Cpu));
    tensors.push(("experts.up_proj".into(), experts.to_kind(Kind::Float8e4m3fn)));
    tensors.push(("experts.up_proj_scale_inv".into(), experts.narrow(1, 0, 1).narrow(2, 0, 1).contiguous()));
    tensors.push(("experts.up_proj_activation_scale".into(), Tensor::from_slice(&[0.5f32, 0.5])));
    let folder =
        model(&tensors, &json!({"quant_method": "fp8", "weight_block_size": null, "activation_scheme": "static"}));
    let checkpoint = open(&folder).unwrap();
    let mut names = checkpoint.names();
    names.sort_unstable();
    assert_eq!(names, ["experts.up_proj", "other.activation_scale", "whole.weight"]);
    assert!(
        checkpoint.notices()[1].starts_with("the base holds scales of activations (2)"),
        "{:?}",
        checkpoint.notices()
    );
}

#[test]
fn other_quantisations_and_bad_block_sizes_are_refused_with_what_is_supported() {
    for (quantisation, parts) in [
        (
            json!({"quant_method": "aqlm", "bits": 2}),
            ["quantization_config.quant_method: ", "\"aqlm\"", "supported: bitsandbytes, gptq, awq"],
        ),
        (json!({"bits": 4}), ["quant_method", "missing", "compressed-tensors, fp8, mxfp4"]),
    ] {
        let error = prove_readable(&json!({"quantization_config": quantisation})).unwrap_err();
        let text = error.to_string();
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        let nested = json!({"text_config": {"quantization_config": quantisation}});
        assert!(prove_readable(&nested).unwrap_err().to_string().contains("text_config.quantization_config"));
    }
    assert!(prove_readable(&json!({"quantization_config": blocks()})).is_ok());
    assert!(prove_readable(&json!({"quantization_config": null})).is_ok());
    for size in [json!([128]), json!([0, 128]), json!([128, -1]), json!("128"), json!([1u64 << 40, 1])] {
        let found = fault(&pair_of("odd"), &json!({"quant_method": "fp8", "weight_block_size": size}));
        assert!(found.contains("weight_block_size") && found.contains("two whole numbers from 1 to 2^30"), "{found}");
    }
}
