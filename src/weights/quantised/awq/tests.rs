//! Against AutoAWQ 0.2.9 (`tests/python/layouts.py`), and damaged.

use serde_json::{Value, json};
use tch::Kind;

use super::super::golden::{Tensors, answer, assert_reads, case, cases, place};
use crate::quant::{Form, Layout};

fn config(name: &str) -> Value {
    let parts: Vec<&str> = name.split('.').collect();
    let group: i64 = parts[2].parse().unwrap();
    json!({"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": true, "version": parts[1]})
}

#[test]
fn numbers_are_those_of_autoawq_bit_for_bit() {
    for name in cases("awq") {
        let checkpoint = assert_reads(&name, &config(&name));
        assert_eq!(checkpoint.quantised_form(), Some(Form::Stored(Layout::Awq)));
        assert_eq!(checkpoint.stored_as("m.x.weight"), Some("AWQ4"));
    }
    // As earlier tools spell it.
    let early = json!({"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM"});
    assert_reads("awq.gemm.32", &early);
}

#[test]
fn a_config_that_asks_for_what_is_not_read_is_named() {
    let (tensors, _) = case("awq.gemm.32");
    for (key, value, what) in [
        ("bits", json!(8), "quantization_config.bits: is 8; 4 expected"),
        ("version", json!("marlin"), "quantization_config.version: is \"marlin\"; \"gemm\" or \"gemv\" expected"),
        ("group_size", json!(-7), "group_size: is -7"),
        // Said otherwise than the tensors are.
        (
            "group_size",
            json!(64),
            "m.x.scales: is F16 [4, 64], but F16 [2, 64] belongs to m.x.qweight [128, 8] (4 bits in groups of 64)",
        ),
        ("version", json!("gemv"), "m.x.scales: is F16 [4, 64], but F16 [128, 32] belongs to m.x.qweight"),
    ] {
        let mut said = config("awq.gemm.32");
        said[key] = value;
        let found = answer(&tensors, &said);
        assert!(found.contains(what), "{key}: {found}");
    }
}

#[test]
fn what_is_missing_or_of_another_size_is_named() {
    for name in ["awq.gemm.32", "awq.gemv.64"] {
        let fault = |change: &dyn Fn(&mut Tensors)| {
            let (mut tensors, _) = case(name);
            change(&mut tensors);
            answer(&tensors, &config(name))
        };
        assert_eq!(fault(&|_| ()), "reads");
        for part in ["qzeros", "scales"] {
            let found = fault(&|tensors| tensors.retain(|(found, _)| *found != format!("m.x.{part}")));
            assert!(found.contains(&format!("m.x.qweight: needs m.x.{part}, which is missing")), "{found}");
        }
        let found = fault(&|tensors| tensors.retain(|(found, _)| found != "m.x.qweight"));
        assert!(found.contains("belongs to m.x.qweight, which is missing"), "{found}");
        for part in ["qzeros", "scales"] {
            for dimension in [0, 1] {
                let found = fault(&|tensors| {
                    let tensor = place(tensors, part);
                    *tensor = tensor.narrow(dimension, 0, tensor.size()[dimension as usize] - 1).contiguous();
                });
                assert!(
                    found.contains(&format!("m.x.{part}: is ")) && found.contains("belongs to m.x.qweight"),
                    "{found}"
                );
            }
        }
        let found = fault(&|tensors| *place(tensors, "qweight") = place(tensors, "qweight").to_kind(Kind::Int64));
        assert!(found.contains("m.x.qweight: is I64"), "{found}");
        let found = fault(&|tensors| drop(place(tensors, "scales").fill_(f64::NAN)));
        assert!(found.contains("m.x.scales: ") && found.contains("NaN or infinite"), "{found}");
    }
}
