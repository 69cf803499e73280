//! Against AutoGPTQ 0.7.1 (`tests/python/layouts.py`), and damaged.

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::super::golden::{Tensors, answer, assert_reads, case, cases, open, place};
use crate::quant::{Form, Layout};

/// What a case's name says: format, bits, size of groups, and whether columns lie in another order.
fn config(name: &str) -> Value {
    let parts: Vec<&str> = name.split('.').collect();
    let (bits, group): (i64, i64) = (parts[1].parse().unwrap(), parts[2].parse().unwrap());
    json!({
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": name.ends_with("order"),
        "sym": name.ends_with("sym"), "checkpoint_format": parts[0],
    })
}

#[test]
fn numbers_are_those_of_autogptq_bit_for_bit() {
    for name in cases("gptq") {
        let checkpoint = assert_reads(&name, &config(&name));
        assert_eq!(checkpoint.quantised_form(), Some(Form::Stored(Layout::Gptq)));
        assert!(checkpoint.stored_as("m.x.weight").unwrap().starts_with("GPTQ"), "{name}");
        assert!(checkpoint.notices()[0].contains("quantised by GPTQ (1)"), "{:?}", checkpoint.notices());
    }
}

#[test]
fn the_format_is_the_first_unless_the_config_says_another() {
    let (tensors, whole) = case("gptq.4.32");
    for (without, name) in [("checkpoint_format", "format"), ("desc_act", "checkpoint_format")] {
        let mut said = config("gptq.4.32");
        said.as_object_mut().unwrap().remove(without);
        let (_folder, checkpoint) = open(&tensors, &said).unwrap();
        assert!(checkpoint.tensor("m.x.weight", Kind::Half, Device::Cpu).unwrap().equal(&whole));
        said[name] = "gptq_v2".into();
        let (_folder, checkpoint) = open(&tensors, &said).unwrap();
        assert!(!checkpoint.tensor("m.x.weight", Kind::Half, Device::Cpu).unwrap().equal(&whole));
    }
}

/// AutoGPTQ's and AutoAWQ's own files, where the model's config says nothing.
#[test]
fn what_config_json_does_not_say_a_file_beside_it_may() {
    let open_with = |name: &str, file: &str, said: &Value| {
        let (tensors, whole) = case(name);
        let (folder, silent) = open(&tensors, &Value::Null).unwrap();
        assert_eq!(silent.quantised_form(), None);
        std::fs::write(folder.path().join(file), said.to_string()).unwrap();
        let source = crate::recipe::BaseSource::Folder(folder.path().to_path_buf());
        let checkpoint = crate::weights::Checkpoint::open(&source).map_err(|error| error.to_string())?;
        assert!(checkpoint.notices()[0].starts_with(file), "{:?}", checkpoint.notices());
        assert!(checkpoint.tensor("m.x.weight", whole.kind(), Device::Cpu).unwrap().equal(&whole), "{name}");
        Ok::<_, String>(())
    };
    let (gptq, awq) = ("quantize_config.json", "quant_config.json");
    open_with("gptq.4.32", gptq, &json!({"bits": 4, "group_size": 32, "desc_act": false, "sym": false})).unwrap();
    open_with("awq.gemm.32", awq, &json!({"w_bit": 4, "q_group_size": 32, "version": "GEMM"})).unwrap();
    let error = open_with("gptq.4.32", gptq, &json!({"bits": 5, "group_size": 32})).unwrap_err();
    assert!(error.contains("quantize_config.json: bits: is 5"), "{error}");
}

#[test]
fn modules_may_differ_by_name() {
    let (mut tensors, _) = case("gptq.4.32");
    let (other, whole) = case("gptq.8.64");
    tensors.extend(other.into_iter().map(|(name, tensor)| (name.replace("m.x", "m.down_proj"), tensor)));
    let mut said = config("gptq.4.32");
    assert!(answer(&tensors, &said).contains("m.down_proj.scales: is F16"), "{}", answer(&tensors, &said));
    said["dynamic"] = json!({"+:.*down_proj": {"bits": 8, "group_size": 64}, "-:lm_head": {}});
    let (_folder, checkpoint) = open(&tensors, &said).unwrap();
    assert!(checkpoint.tensor("m.down_proj.weight", Kind::Half, Device::Cpu).unwrap().equal(&whole));
    said["dynamic"] = json!({"(?=x)": {"bits": 8}});
    assert!(answer(&tensors, &said).contains("is no regular expression"), "{}", answer(&tensors, &said));
}

#[test]
fn a_bias_of_zeros_is_spare_and_another_is_not() {
    let (mut tensors, _) = case("gptq.4.32");
    tensors.push(("m.x.bias".into(), Tensor::zeros([64], (Kind::Half, Device::Cpu))));
    tensors.push(("m.norm.bias".into(), Tensor::zeros([64], (Kind::Half, Device::Cpu))));
    let (_folder, checkpoint) = open(&tensors, &config("gptq.4.32")).unwrap();
    assert!(checkpoint.is_spare("m.x.bias") && !checkpoint.is_spare("m.norm.bias"));
    *place(&mut tensors, "bias") = Tensor::ones([64], (Kind::Half, Device::Cpu));
    let (_folder, checkpoint) = open(&tensors, &config("gptq.4.32")).unwrap();
    assert!(!checkpoint.is_spare("m.x.bias"));
}

#[test]
fn a_config_that_asks_for_what_is_not_read_is_named() {
    let (tensors, _) = case("gptq.4.32");
    for (key, value, what) in [
        ("bits", json!(5), "quantization_config.bits: is 5; 2, 3, 4 or 8 expected"),
        ("bits", Value::Null, "quantization_config.bits: is null"),
        ("group_size", json!(0), "group_size: is 0; -1 or a whole number from 1"),
        ("group_size", json!("32"), "group_size: is \"32\""),
        ("desc_act", json!("yes"), "desc_act: is \"yes\"; true or false expected"),
        ("checkpoint_format", json!("marlin"), "checkpoint_format: is \"marlin\"; \"gptq\" or \"gptq_v2\" expected"),
        ("is_marlin_format", json!(true), "is_marlin_format: is true"),
        // Said otherwise than the tensors are.
        ("bits", json!(8), "is F16 [4, 64], but F16 [2, 64] belongs to m.x.qweight [16, 64] (8 bits in groups of 32)"),
        ("bits", json!(3), "is I32 [16, 64]; I32 (in * 3 / 32, out) expected"),
        ("group_size", json!(64), "m.x.scales: is F16 [4, 64], but F16 [2, 64] belongs to m.x.qweight [16, 64]"),
    ] {
        let mut said = config("gptq.4.32");
        said[key] = value;
        let found = answer(&tensors, &said);
        assert!(found.contains(what), "{key}: {found}");
    }
}

#[test]
fn what_is_missing_or_of_another_size_is_named() {
    let name = "gptq.4.32.order";
    let fault = |change: &dyn Fn(&mut Tensors)| {
        let (mut tensors, _) = case(name);
        change(&mut tensors);
        answer(&tensors, &config(name))
    };
    assert_eq!(fault(&|_| ()), "reads");
    for (part, what) in [
        ("qzeros", "m.x.qweight: needs m.x.qzeros, which is missing"),
        ("scales", "m.x.qweight: needs m.x.scales, which is missing"),
        ("g_idx", "m.x.qweight: needs m.x.g_idx, which is missing (desc_act)"),
        ("qweight", "belongs to m.x.qweight, which is missing"),
    ] {
        let found = fault(&|tensors| tensors.retain(|(found, _)| *found != format!("m.x.{part}")));
        assert!(found.contains(what), "{part}: {found}");
    }
    for (part, dimension, what) in [
        ("qweight", 0, "m.x.scales: is F16 [4, 64], but F16 [4, 64]"),
        ("qweight", 1, "is I32 [16, 63]; I32 (in * 4 / 32, out) expected"),
        ("qzeros", 1, "m.x.qzeros: is I32 [4, 7], but I32 [4, 8] belongs to m.x.qweight"),
        ("scales", 0, "m.x.scales: is F16 [3, 64], but F16 [4, 64] belongs to m.x.qweight"),
        ("g_idx", 0, "m.x.g_idx: is I32 [127], but I32 [128] belongs to m.x.qweight"),
    ] {
        let found = fault(&|tensors| {
            let tensor = place(tensors, part);
            *tensor = tensor.narrow(dimension, 0, tensor.size()[dimension as usize] - 1).contiguous();
        });
        // 15 words of a column hold 120 codes: as many groups, but fewer columns than the order has.
        let what = if (part, dimension) == ("qweight", 0) { "m.x.g_idx: is I32 [128], but I32 [120]" } else { what };
        assert!(found.contains(what), "{part}: {found}");
    }
    for (part, value, what) in [
        ("g_idx", 4.0, "m.x.g_idx: holds the group 4, but groups are from 0 to 3"),
        ("g_idx", -2.0, "m.x.g_idx: holds the group -2"),
        ("scales", f64::NAN, "m.x.scales: 256 values are NaN or infinite as F16"),
        ("scales", f64::INFINITY, "m.x.scales: 256 values are NaN or infinite as F16"),
    ] {
        let found = fault(&|tensors| drop(place(tensors, part).fill_(value)));
        assert!(found.contains(what), "{part}: {found}");
    }
    let found = fault(&|tensors| *place(tensors, "qweight") = place(tensors, "qweight").to_kind(Kind::Float));
    assert!(found.contains("is F32 [16, 64]; I32"), "{found}");
    let found =
        fault(&|tensors| tensors.push(("m.x.weight".into(), Tensor::zeros([64, 128], (Kind::Half, Device::Cpu)))));
    assert!(found.contains("m.x.weight is there as plain numbers, too"), "{found}");
    // Products that no fp16 number is.
    let found = fault(&|tensors| drop(place(tensors, "scales").fill_(60_000.0)));
    assert!(found.contains("NaN or infinite"), "{found}");
}

#[test]
fn a_file_cut_after_it_was_opened_is_an_error() {
    let (tensors, _) = case("gptq.4.32");
    let (folder, checkpoint) = open(&tensors, &config("gptq.4.32")).unwrap();
    for file in &checkpoint.files {
        let length = std::fs::metadata(file).unwrap().len();
        std::fs::OpenOptions::new().write(true).open(file).unwrap().set_len(length - 2).unwrap();
    }
    let error = checkpoint.tensor("m.x.weight", Kind::Float, Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("the file ends inside this tensor") && error.contains("m.x."), "{error}");
    drop(folder);
}
