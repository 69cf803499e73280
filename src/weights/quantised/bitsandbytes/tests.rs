//! Checkpoints that transformers 5.17 and bitsandbytes 0.50.2 wrote (`tests/python/qlora.py`), whole and damaged.

use std::path::Path;

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::quant::{Form, FourBitType, Products, Scheme};
use crate::recipe::BaseSource;
use crate::weights::Checkpoint;

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama").join(name)
}

fn open(folder: &Path) -> crate::Result<Checkpoint> {
    Checkpoint::open(&BaseSource::Folder(folder.to_path_buf()))
}

#[test]
fn a_stored_base_is_what_quantising_its_original_gives() {
    let four_bit = |code, double_quant| Form::FourBit { code, block: 64, double_quant };
    for (name, folder, form, called) in [
        ("qlora-nf4", "quantised", four_bit(FourBitType::Nf4, true), "NF4"),
        ("qlora-fp4", "quantised", four_bit(FourBitType::Fp4, false), "FP4"),
        ("qlora-nf4", "quantised-int8", Form::Int8, "INT8"),
    ] {
        let scheme =
            Scheme { form, kind: Kind::Float, skip: Vec::new(), products: Products::Dequantised, after_start: false };
        let (original, stored) = (open(&fixture(name)).unwrap(), open(&fixture(name).join(folder)).unwrap());
        assert!(
            stored.quantised_form() == Some(form) && stored.notices()[0].contains("by bitsandbytes (14)"),
            "{:?}",
            stored.notices()
        );
        let mut names = [original.names(), stored.names()];
        names.iter_mut().for_each(|names| names.sort_unstable());
        assert_eq!(names[0], names[1]);
        for tensor in stored.names() {
            let read = |checkpoint: &Checkpoint| checkpoint.tensor(tensor, Kind::Float, Device::Cpu).unwrap();
            let kept = stored.quantised(tensor, Kind::Float, Device::Cpu).unwrap();
            let Some(kept) = kept else {
                assert_eq!(read(&stored), read(&original), "{tensor}");
                continue;
            };
            assert_eq!(stored.stored_as(tensor), Some(called));
            let expected = scheme.numbers(&read(&original));
            assert_eq!(kept.dequantised(), expected, "{tensor}");
            assert_eq!(read(&stored), expected, "{tensor}");
        }
    }
}

/// Configs from before there was a `quant_method` say what is loaded by a flag.
#[test]
fn a_config_without_a_method_means_bitsandbytes_where_a_flag_says_so() {
    let from = fixture("qlora-nf4").join("quantised");
    let with = |change: &dyn Fn(&mut Value)| {
        let folder = tempfile::tempdir().unwrap();
        let mut config: Value = serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
        config["quantization_config"].as_object_mut().unwrap().remove("quant_method").unwrap();
        change(&mut config["quantization_config"]);
        std::fs::copy(from.join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let checkpoint = open(folder.path()).unwrap();
        let readable = super::super::prove_readable(&checkpoint.config);
        (checkpoint.quantised_form().is_some(), readable.map_err(|error| error.to_string()))
    };
    assert_eq!(with(&|_| ()), (true, Ok(())));
    let (found, error) = with(&|said| said["load_in_4bit"] = false.into());
    assert!(!found && error.unwrap_err().contains("no telling how the base is quantised"));
}

/// What a copy of the fixture answers, `change` made to its tensors.
fn answer(change: impl Fn(&mut Vec<(String, Tensor)>)) -> String {
    answer_of("quantised", change)
}

fn answer_of(base: &str, change: impl Fn(&mut Vec<(String, Tensor)>)) -> String {
    let folder = tempfile::tempdir().unwrap();
    let from = fixture("qlora-nf4").join(base);
    std::fs::copy(from.join("config.json"), folder.path().join("config.json")).unwrap();
    let mut tensors = Tensor::read_safetensors(from.join("model.safetensors")).unwrap();
    change(&mut tensors);
    Tensor::write_safetensors(&tensors, folder.path().join("model.safetensors")).unwrap();
    match open(folder.path()) {
        Ok(_) => "opens".into(),
        Err(error) => error.to_string(),
    }
}

const WEIGHT: &str = "model.layers.0.mlp.up_proj.weight";

fn place<'a>(tensors: &'a mut [(String, Tensor)], end: &str) -> &'a mut Tensor {
    let name = format!("{WEIGHT}{end}");
    &mut tensors.iter_mut().find(|(found, _)| *found == name).expect("a tensor of the fixture").1
}

#[test]
fn what_is_missing_or_of_another_size_is_named() {
    assert_eq!(answer(|_| ()), "opens");
    for (end, what) in [
        (".absmax", "needs model.layers.0.mlp.up_proj.weight.absmax, which is missing"),
        (".quant_map", "needs model.layers.0.mlp.up_proj.weight.quant_map, which is missing"),
        (".nested_absmax", "nested_absmax, which is missing"),
        (".quant_state.bitsandbytes__nf4", "is stored as U8, but what belongs to it"),
        ("", "belongs to model.layers.0.mlp.up_proj.weight, which is missing"),
    ] {
        let found = answer(|tensors| tensors.retain(|(name, _)| *name != format!("{WEIGHT}{end}")));
        assert!(found.contains(what) && found.contains(WEIGHT), "{end}: {found}");
    }
    for (end, what) in [
        (".absmax", "is U8 [191], but U8 of 192 numbers belongs to model.layers.0.mlp.up_proj.weight"),
        (".quant_map", "is F32 [15], but F32 of 16 numbers"),
        ("", "is 6143 bytes, but [192, 64] numbers of four bits are 6144"),
    ] {
        let found = answer(|tensors| {
            let tensor = place(tensors, end);
            *tensor = tensor.narrow(0, 0, tensor.size()[0] - 1).contiguous();
        });
        assert!(found.contains(what), "{end}: {found}");
    }
    let found = answer(|tensors| *place(tensors, ".absmax") = place(tensors, ".absmax").to_kind(Kind::Float));
    assert!(found.contains("is F32 [192], but U8 of 192 numbers"), "{found}");
    let found = answer(|tensors| *place(tensors, ".quant_map") = place(tensors, ".quant_map").flip([0]));
    assert!(found.contains("holds another code book than that of nf4"), "{found}");
}

type Change<'a> = &'a dyn Fn(&mut Vec<(String, Tensor)>);

#[test]
fn eight_bits_without_their_scales_or_with_others_are_named() {
    const SCALES: &str = "model.layers.0.mlp.up_proj.SCB";
    let with = |change: Change<'_>| answer_of("quantised-int8", change);
    assert_eq!(with(&|_| ()), "opens");
    let found = with(&|tensors| tensors.retain(|(name, _)| name != SCALES));
    assert!(
        found.contains(WEIGHT) && found.contains("is stored as I8, but what belongs to it (SCB) is missing"),
        "{found}"
    );
    let found = with(&|tensors| tensors.retain(|(name, _)| name != WEIGHT));
    assert!(found.contains(SCALES) && found.contains(&format!("belongs to {WEIGHT}, which is missing")), "{found}");
    let scales = |change: &dyn Fn(&Tensor) -> Tensor| {
        with(&|tensors| {
            let (_, scales) = tensors.iter_mut().find(|(name, _)| name == SCALES).expect("a tensor of the fixture");
            *scales = change(scales);
        })
    };
    let found = scales(&|scales| scales.narrow(0, 0, 191).contiguous());
    assert!(found.contains("is F32 [191], but") && found.contains("of 192 numbers"), "{found}");
    let found = scales(&|scales| scales.to_kind(Kind::Int));
    assert!(found.contains("is I32 [192], but"), "{found}");
    let found = with(&|tensors| {
        let (_, codes) = tensors.iter_mut().find(|(name, _)| name == WEIGHT).expect("a tensor of the fixture");
        *codes = codes.to_kind(Kind::Int);
    });
    assert!(found.contains("is I32 [192, 64]; I8 (out, in) expected"), "{found}");
}

#[test]
fn a_state_that_says_what_bitsandbytes_does_not_have_is_refused() {
    let with = |key: &str, value: Value| {
        answer(|tensors| {
            let state = place(tensors, ".quant_state.bitsandbytes__nf4");
            let mut said: Value = serde_json::from_slice(&Vec::<u8>::try_from(&*state).unwrap()).unwrap();
            said[key] = value.clone();
            *state = Tensor::from_slice(&serde_json::to_vec(&said).unwrap());
        })
    };
    for (key, value, what) in [
        ("quant_type", "nf3".into(), "quant_type is \"nf3\""),
        ("quant_type", "fp4".into(), "quant_type is \"fp4\", in a tensor for \"nf4\""),
        ("blocksize", 63.into(), "blocksize is 63"),
        ("blocksize", 128.into(), "of 96 numbers belongs to"),
        ("dtype", "int4".into(), "dtype is \"int4\""),
        ("shape", vec![64, -192].into(), "which is no weight's"),
        ("shape", vec![i64::MAX, 2].into(), "which is no weight's"),
        ("nested_blocksize", 128.into(), "nested_blocksize Some(128)"),
        ("nested_offset", Value::Null, "nested_offset is None"),
    ] {
        let found = with(key, value);
        assert!(found.contains(what) && found.contains(WEIGHT), "{key}: {found}");
    }
    let found = answer(|tensors| {
        let state = place(tensors, ".quant_state.bitsandbytes__nf4");
        *state = state.narrow(0, 0, 40).contiguous();
    });
    assert!(found.contains("is no state of bitsandbytes: EOF"), "{found}");
}

#[test]
fn magnitudes_that_are_not_finite_are_an_error_when_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let from = fixture("qlora-nf4").join("quantised");
    std::fs::copy(from.join("config.json"), folder.path().join("config.json")).unwrap();
    let mut tensors = Tensor::read_safetensors(from.join("model.safetensors")).unwrap();
    let _ = place(&mut tensors, ".nested_absmax").fill_(f64::NAN);
    Tensor::write_safetensors(&tensors, folder.path().join("model.safetensors")).unwrap();
    let error = open(folder.path()).unwrap().tensor(WEIGHT, Kind::Float, Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("nested_absmax: 1 value is NaN or infinite"), "{error}");
}
