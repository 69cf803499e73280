//! Against compressed-tensors 0.20.1 (`tests/python/layouts.py`), and damaged.

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::super::golden::{Tensors, answer, assert_reads, case, cases, open, place};
use crate::quant::{Form, Layout};

/// What a case's name says: its format, its numbers, and what shares a scale.
fn config(name: &str) -> Value {
    let parts: Vec<&str> = name.split('.').collect();
    let (format, numbers) = (parts[0], parts[1]);
    let strategy = parts.iter().find(|part| ["tensor", "channel", "group", "block"].contains(part)).unwrap();
    let bits: u64 = numbers[numbers.len() - 1..].parse().unwrap();
    let mut weights = json!({
        "num_bits": bits, "type": if numbers.starts_with("fp") { "float" } else { "int" }, "strategy": strategy,
        "symmetric": !name.ends_with("zeros"), "dynamic": false, "observer": "minmax",
    });
    if *strategy == "group" {
        weights["group_size"] = 32.into();
    }
    if *strategy == "block" {
        weights["block_structure"] = json!([40, 48]);
    }
    json!({
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed", "kv_cache_scheme": null,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": null}},
        "ignore": ["lm_head", "re:.*gate$"],
    })
}

#[test]
fn numbers_are_those_of_compressed_tensors_bit_for_bit() {
    let all = ["pack", "int", "float", "naive"].map(|format| cases(&format!("{format}-quantized"))).concat();
    assert!(all.len() > 15);
    for name in all {
        let checkpoint = assert_reads(&name, &config(&name));
        assert_eq!(checkpoint.quantised_form(), Some(Form::Stored(Layout::CompressedTensors)));
        assert_eq!(checkpoint.notices().len(), 1, "{:?}", checkpoint.notices());
    }
}

#[test]
fn a_block_may_be_spelled_as_earlier_versions_do_and_scales_need_no_strategy() {
    let mut said = config("float-quantized.fp8.block");
    said["config_groups"]["group_0"]["weights"]["block_structure"] = "40x48".into();
    assert_reads("float-quantized.fp8.block", &said);
    let mut said = config("pack-quantized.int4.group");
    said["config_groups"]["group_0"]["weights"].as_object_mut().unwrap().remove("strategy");
    assert_reads("pack-quantized.int4.group", &said);
}

/// Earlier versions mix the groups of columns: each column then has the scale of the group that the table names.
#[test]
fn columns_may_have_groups_in_another_order() {
    let name = "pack-quantized.int4.group";
    let (mut tensors, whole) = case(name);
    let mut said = config(name);
    said["config_groups"]["group_0"]["weights"]["actorder"] = "group".into();
    assert!(answer(&tensors, &said).contains("needs m.x.weight_g_idx, which is missing"));
    let read = |tensors: &Tensors| {
        let (_folder, checkpoint) = open(tensors, &said).unwrap();
        checkpoint.tensor("m.x.weight", Kind::Float, Device::Cpu).unwrap()
    };
    tensors.push(("m.x.weight_g_idx".into(), Tensor::full([128], -1, (Kind::Int, Device::Cpu))));
    assert!(read(&tensors).equal(&whole.to_kind(Kind::Float)), "all -1 is none");
    let order = Tensor::arange(128, (Kind::Int64, Device::Cpu)).remainder(4);
    *place(&mut tensors, "weight_g_idx") = order.to_kind(Kind::Int);
    let scale = place(&mut tensors, "weight_scale").shallow_clone();
    let own = scale.repeat_interleave_self_int(32, 1, None);
    let codes = (whole.to_kind(Kind::Float) / own.to_kind(Kind::Float)).round(); // (out, in)
    let expected = (codes.to_kind(Kind::BFloat16) * scale.index_select(1, &order)).to_kind(Kind::Float);
    assert!(read(&tensors).equal(&expected));
}

#[test]
fn modules_go_by_their_own_group_and_what_is_ignored_stays() {
    let (mut tensors, whole) = case("pack-quantized.int4.group");
    let (other, fp8) = case("float-quantized.fp8.channel");
    tensors.extend(other.into_iter().map(|(name, tensor)| (name.replace("m.x", "m.down_proj"), tensor)));
    tensors.push(("m.lm_head.weight".into(), Tensor::ones([3, 4], (Kind::Half, Device::Cpu))));
    tensors.push(("m.down_proj.input_scale".into(), Tensor::ones([1], (Kind::Float, Device::Cpu))));
    tensors.push(("m.self_attn.k_scale".into(), Tensor::ones([1], (Kind::Float, Device::Cpu))));
    let mut said = config("pack-quantized.int4.group");
    said["format"] = "mixed-precision".into();
    said["config_groups"]["group_0"]["targets"] = json!(["re:.*x$"]);
    said["config_groups"]["group_0"]["format"] = "pack-quantized".into();
    said["config_groups"]["group_1"] = config("float-quantized.fp8.channel")["config_groups"]["group_0"].clone();
    said["config_groups"]["group_1"]["targets"] = json!(["m.down_proj"]);
    let (_folder, checkpoint) = open(&tensors, &said).unwrap();
    let mut names = checkpoint.names();
    names.sort_unstable();
    assert_eq!(names, ["m.down_proj.weight", "m.lm_head.weight", "m.x.weight"]);
    let read = |name: &str| checkpoint.tensor(name, Kind::BFloat16, Device::Cpu).unwrap();
    assert!(read("m.x.weight").equal(&whole) && read("m.down_proj.weight").equal(&fp8));
    assert!(
        checkpoint.notices().iter().any(|notice| notice.contains("quantised inputs")),
        "{:?}",
        checkpoint.notices()
    );

    said["config_groups"]["group_1"]["targets"] = json!(["m.other"]);
    assert!(answer(&tensors, &said).contains("m.down_proj.weight: is quantised, but no target"));
    said["ignore"] = json!(["re:.*down_proj"]);
    assert!(
        answer(&tensors, &said).contains("m.down_proj.weight: is quantised, but config.json has it under `ignore`")
    );
    said["ignore"] = json!(["re:(?=x)"]);
    said["config_groups"]["group_1"]["targets"] = json!(["m.down_proj"]);
    assert!(open(&tensors, &said).is_ok(), "the tensors say what is left");
    said["config_groups"]["group_1"]["targets"] = json!(["re:(?=x)"]);
    let found = answer(&tensors, &said);
    assert!(found.contains("config_groups.group_1.targets: \"re:(?=x)\" is no regular expression"), "{found}");
}

#[test]
fn a_config_that_asks_for_what_is_not_read_is_named() {
    let name = "pack-quantized.int4.group";
    let (tensors, _) = case(name);
    let weights = "quantization_config.config_groups.group_0.weights";
    for (pointer, value, what) in [
        (
            "/format",
            json!("nvfp4-pack-quantized"),
            "quantization_config.format: is \"nvfp4-pack-quantized\"; pack-quantized, ".to_string(),
        ),
        ("/format", json!("marlin-24"), "quantization_config.format: is \"marlin-24\"".into()),
        (
            "/sparsity_config",
            json!({"format": "sparse-24-bitmask"}),
            "sparsity_config.format: is \"sparse-24-bitmask\"".into(),
        ),
        (
            "/transform_config",
            json!({"config_groups": {"u": {"type": "hadamard"}}}),
            "quantization_config.transform_config: is".into(),
        ),
        (
            "/config_groups/group_0/format",
            json!("mxfp4-pack-quantized"),
            "group_0.format: is \"mxfp4-pack-quantized\"".into(),
        ),
        ("/config_groups/group_0/weights/num_bits", json!(3), format!("{weights}.num_bits: is 3; 2, 4 or 8 expected")),
        (
            "/config_groups/group_0/weights/type",
            json!("float"),
            format!("{weights}.num_bits: is 4; 8 (of floats) expected"),
        ),
        ("/config_groups/group_0/weights/type", json!("log"), format!("{weights}.type: is \"log\"")),
        (
            "/config_groups/group_0/weights/strategy",
            json!("tensor_group"),
            format!("{weights}.strategy: is \"tensor_group\""),
        ),
        (
            "/config_groups/group_0/weights/strategy",
            json!("block"),
            format!("{weights}.block_structure: is null; two whole"),
        ),
        ("/config_groups/group_0/weights/group_size", json!(-1), format!("{weights}.group_size: is -1")),
        ("/config_groups/group_0/weights/symmetric", json!(1), format!("{weights}.symmetric: is 1; true or false")),
        ("/ignore", json!("lm_head"), "quantization_config.ignore: is \"lm_head\"; a list of names".into()),
        // Said otherwise than the tensors are.
        (
            "/config_groups/group_0/weights/num_bits",
            json!(8),
            "is I32 [64, 16], but [64, 128] numbers (weight_shape) of 8 bits are I32 [64, 32]".into(),
        ),
        (
            "/config_groups/group_0/weights/group_size",
            json!(64),
            "m.x.weight_scale: is BF16 [64, 4], but F16 [64, 2] belongs to".into(),
        ),
        (
            "/config_groups/group_0/weights/strategy",
            json!("channel"),
            "m.x.weight_scale: is BF16 [64, 4], but F16 [64, 1]".into(),
        ),
        (
            "/config_groups/group_0/weights/symmetric",
            json!(false),
            "needs m.x.weight_zero_point, which is missing".into(),
        ),
    ] {
        let mut said = config(name);
        match said.pointer_mut(pointer) {
            Some(place) => *place = value,
            None => said[&pointer[1..]] = value,
        }
        if pointer.ends_with("/format") && pointer.len() > 8 {
            said["config_groups"]["group_0"]["format"] = "mxfp4-pack-quantized".into();
        }
        let found = answer(&tensors, &said);
        assert!(found.contains(&what), "{pointer}: {found}");
    }
}

#[test]
fn what_is_missing_or_of_another_size_is_named() {
    let fault = |name: &str, change: &dyn Fn(&mut Tensors)| {
        let (mut tensors, _) = case(name);
        change(&mut tensors);
        answer(&tensors, &config(name))
    };
    let packed = "pack-quantized.int4.group.zeros";
    for (name, part, what) in [
        (packed, "weight_shape", "m.x.weight_packed: needs m.x.weight_shape, which is missing"),
        (packed, "weight_scale", "m.x.weight_packed: needs m.x.weight_scale, which is missing"),
        (packed, "weight_zero_point", "m.x.weight_packed: needs m.x.weight_zero_point, which is missing"),
        (packed, "weight_packed", "belongs to m.x.weight, which is missing"),
        ("int-quantized.int8.channel", "weight_scale", "m.x.weight: needs m.x.weight_scale, which is missing"),
        ("float-quantized.fp8.block", "weight_scale", "m.x.weight: needs m.x.weight_scale, which is missing"),
    ] {
        let found = fault(name, &|tensors| tensors.retain(|(found, _)| *found != format!("m.x.{part}")));
        assert!(found.contains(what), "{name} {part}: {found}");
    }
    for (name, part, what) in [
        (packed, "weight_packed", "is I32 [63, 16], but [64, 128] numbers (weight_shape) of 4 bits are I32 [64, 16]"),
        (
            packed,
            "weight_zero_point",
            "m.x.weight_zero_point: is I32 [7, 4], but I32 [8, 4] belongs to m.x.weight_packed",
        ),
        (
            packed,
            "weight_scale",
            "m.x.weight_scale: is BF16 [63, 4], but F16 [64, 4] belongs to m.x.weight_packed [64, 16]",
        ),
        (
            "int-quantized.int8.channel",
            "weight",
            "m.x.weight_scale: is BF16 [56, 1], but F16 [55, 1] belongs to m.x.weight [55, 76]",
        ),
        (
            "naive-quantized.int8.channel.zeros",
            "weight_zero_point",
            "m.x.weight_zero_point: is I8 [55, 1], but I8 [56, 1]",
        ),
        (
            "float-quantized.fp8.block",
            "weight_scale",
            "m.x.weight_scale: is BF16 [1, 2], but F16 [2, 2] belongs to m.x.weight",
        ),
    ] {
        let found = fault(name, &|tensors| {
            let tensor = place(tensors, part);
            *tensor = tensor.narrow(0, 0, tensor.size()[0] - 1).contiguous();
        });
        assert!(found.contains(what), "{name} {part}: {found}");
    }
    for name in [packed, "int-quantized.int8.tensor", "float-quantized.fp8.channel"] {
        let found = fault(name, &|tensors| drop(place(tensors, "weight_scale").fill_(f64::INFINITY)));
        assert!(found.contains("m.x.weight_scale: ") && found.contains("NaN or infinite"), "{found}");
    }
    let found = fault(packed, &|tensors| *place(tensors, "weight_shape") = Tensor::from_slice(&[64i64, -128]));
    assert!(found.contains("[64, -128] numbers (weight_shape)"), "{found}");
    let found = fault(packed, &|tensors| *place(tensors, "weight_shape") = Tensor::from_slice(&[i64::MAX, i64::MAX]));
    assert!(found.contains("(weight_shape)"), "{found}");
    let found = fault("int-quantized.int8.channel", &|tensors| {
        *place(tensors, "weight") = place(tensors, "weight").to_kind(Kind::Half)
    });
    assert!(found.contains("m.x.weight: is F16 [56, 76]; I8 (out, in) expected by config.json"), "{found}");
    let found = fault("float-quantized.fp8.channel", &|tensors| {
        tensors.push(("m.x.weight_zero_point".into(), Tensor::ones([56, 1], (Kind::Int8, Device::Cpu))));
    });
    assert!(found.contains("m.x.weight_zero_point: holds zeros of floating-point numbers"), "{found}");
    let found = fault("float-quantized.fp8.channel", &|tensors| {
        let codes = Tensor::full([56, 76], 0x7f, (Kind::Uint8, Device::Cpu));
        *place(tensors, "weight") = codes.view_dtype(Kind::Float8e4m3fn);
    });
    assert!(found.contains("m.x.weight: 4256 values are NaN or infinite as F8_E4M3"), "{found}");
}
