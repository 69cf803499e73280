//! A checkpoint as a whole: folders of safetensors, good and bad.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::writer::{TensorSpec, write, write_model};
use super::*;

fn numbers(kind: Kind, shape: &[i64]) -> Tensor {
    let count: i64 = shape.iter().product();
    (Tensor::arange(count, (Kind::Float, Device::Cpu)) - 5.0).reshape(shape).to_kind(kind)
}

fn save(path: &Path, tensors: &[(&str, Tensor)]) {
    let specs: Vec<_> = tensors.iter().map(|(name, tensor)| TensorSpec::of(*name, tensor)).collect();
    write(path, &specs, &BTreeMap::new(), |index| Ok(tensors[index].1.shallow_clone())).unwrap();
}

fn model(tensors: &[(&str, Tensor)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    save(&folder.path().join("model.safetensors"), tensors);
    folder
}

/// Two shards: `a` in the first, `b` in the second.
fn sharded() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), "{}").unwrap();
    let tensors = [numbers(Kind::Float, &[4]), numbers(Kind::Float, &[5])];
    let specs = [TensorSpec::of("a", &tensors[0]), TensorSpec::of("b", &tensors[1])];
    write_model(folder.path(), &specs, 20, |index| Ok(tensors[index].shallow_clone())).unwrap();
    folder
}

fn open(folder: &Path) -> Result<Checkpoint> {
    Checkpoint::open(&BaseSource::Folder(folder.to_path_buf()))
}

fn fault(folder: &Path) -> String {
    let error = open(folder).unwrap_err();
    assert_eq!(error.exit_code(), 5, "{error}");
    error.to_string()
}

fn index(folder: &Path, weight_map: &str) {
    fs::write(folder.join("model.safetensors.index.json"), format!("{{\"weight_map\": {weight_map}}}")).unwrap();
}

#[test]
fn a_checkpoint_may_be_read_by_many_threads() {
    fn check<T: Send + Sync>() {}
    check::<Checkpoint>();
}

#[test]
fn tensors_come_back_in_every_kind() {
    let stored = [
        ("bf16", numbers(Kind::BFloat16, &[300, 700])),
        ("f16", numbers(Kind::Half, &[40])),
        ("f32", numbers(Kind::Float, &[2, 3])),
        ("f64", numbers(Kind::Double, &[5])),
        ("i32", numbers(Kind::Int, &[9])),
        ("i64", numbers(Kind::Int64, &[4])),
        ("u8", numbers(Kind::Int, &[9]).abs().to_kind(Kind::Uint8)),
        ("bool", numbers(Kind::Int, &[9]).gt(0)),
        ("e4m3", numbers(Kind::Float, &[9]).to_kind(Kind::Float8e4m3fn)),
        ("e5m2", numbers(Kind::Float, &[9]).to_kind(Kind::Float8e5m2)),
        ("empty", numbers(Kind::Float, &[0, 3])),
        ("scalar", numbers(Kind::Float, &[])),
    ];
    let folder = model(&stored);
    let checkpoint = open(folder.path()).unwrap();
    assert_eq!(checkpoint.names().len(), stored.len());
    assert_eq!(checkpoint.shape("bf16"), Some(vec![300, 700]));
    assert_eq!(checkpoint.shape("none"), None);
    assert_eq!(checkpoint.stored_as("e4m3"), Some("F8_E4M3"));
    assert_eq!(checkpoint.config["model_type"], "llama");
    assert!(checkpoint.sidecars.contains_key("config.json"));
    for (name, tensor) in &stored {
        for kind in [tensor.kind(), Kind::Float, Kind::BFloat16, Kind::Half] {
            let read = checkpoint.tensor(name, kind, Device::Cpu);
            let whole = ["i32", "i64", "u8", "bool"].contains(name);
            if whole && kind != tensor.kind() {
                let error = read.unwrap_err().to_string();
                assert!(error.contains(&format!("{name}: holds whole numbers")), "{error}");
                continue;
            }
            let lost =
                tensor.to_kind(kind).to_kind(Kind::Float).isfinite().logical_not().sum(Kind::Int64).int64_value(&[]);
            if lost > 0 {
                // 209994 is more than 65504.
                assert_eq!((*name, kind), ("bf16", Kind::Half));
                let expected = format!("bf16: {lost} values are NaN or infinite as F16");
                assert!(read.unwrap_err().to_string().contains(&expected));
                continue;
            }
            let (read, expected) = (read.unwrap(), tensor.to_kind(kind));
            assert_eq!((read.kind(), read.size()), (kind, expected.size()), "{name}");
            assert_eq!(storage::bytes(&read), storage::bytes(&expected), "{name} as {kind:?}");
        }
    }
    let error = checkpoint.tensor("bf17", Kind::Float, Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("no tensor bf17") && error.contains("bf16"), "{error}");
}

#[test]
fn nan_and_infinite_weights_are_counted_and_named() {
    let damaged = numbers(Kind::BFloat16, &[100, 100]);
    let _ = damaged.get(7).fill_(f64::NAN);
    let _ = damaged.get(9).get(3).fill_(f64::NEG_INFINITY);
    let folder = model(&[("good", numbers(Kind::Float, &[3])), ("model.norm.weight", damaged)]);
    let checkpoint = open(folder.path()).unwrap();
    assert!(checkpoint.tensor("good", Kind::Float, Device::Cpu).is_ok());
    let error = checkpoint.tensor("model.norm.weight", Kind::BFloat16, Device::Cpu).unwrap_err();
    assert_eq!(error.exit_code(), 5);
    let text = error.to_string();
    assert!(text.contains("model.safetensors: model.norm.weight: 101 values are NaN or infinite as BF16"), "{text}");
}

#[test]
fn a_file_truncated_after_opening_is_an_error_not_a_crash() {
    let folder = model(&[("a", numbers(Kind::Float, &[1000])), ("b", numbers(Kind::Float, &[1000]))]);
    let checkpoint = open(folder.path()).unwrap();
    let file = fs::File::options().write(true).open(&checkpoint.files[0]).unwrap();
    file.set_len(file.metadata().unwrap().len() - 100).unwrap();
    assert!(checkpoint.tensor("a", Kind::Float, Device::Cpu).is_ok());
    let error = checkpoint.tensor("b", Kind::Float, Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("model.safetensors: b") && error.contains("truncated after it was opened"), "{error}");
    assert!(fault(folder.path()).contains("truncated"));
}

#[test]
fn shards_are_read_by_their_index() {
    let folder = sharded();
    let checkpoint = open(folder.path()).unwrap();
    assert_eq!(checkpoint.names(), ["a", "b"]);
    assert_eq!(checkpoint.files.len(), 2);
    assert_eq!(checkpoint.tensor("b", Kind::Float, Device::Cpu).unwrap(), numbers(Kind::Float, &[5]));
}

#[test]
fn shards_outside_of_the_folder_are_refused() {
    let folder = sharded();
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().join("x.safetensors");
    save(&target, &[("b", numbers(Kind::Float, &[5]))]);
    let first = "model-00001-of-00002.safetensors";
    for name in ["../x.safetensors", target.to_str().unwrap(), "a/../../x.safetensors", "", "./x.safetensors", "a\\b"] {
        index(folder.path(), &serde_json::json!({"a": first, "b": name}).to_string());
        assert!(fault(folder.path()).contains("not a plain name inside the folder"), "{name}");
    }
    let link = folder.path().join("link.safetensors");
    std::os::unix::fs::symlink(&target, &link).unwrap();
    index(folder.path(), &serde_json::json!({"a": first, "b": "link.safetensors"}).to_string());
    assert!(fault(folder.path()).contains("outside of the folder"));
    fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink("model-00002-of-00002.safetensors", &link).unwrap();
    assert_eq!(open(folder.path()).unwrap().names(), ["b", "a"]);
    index(folder.path(), &serde_json::json!({"a": first, "b": "b.bin"}).to_string());
    assert!(fault(folder.path()).contains("b.bin, a pickle"));
}

#[test]
fn links_of_the_hub_cache_are_followed() {
    let cache = tempfile::tempdir().unwrap();
    let repository = cache.path().join("models--o--n");
    let (blobs, snapshot) = (repository.join("blobs"), repository.join("snapshots/0123"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    let folder = sharded();
    for (number, file) in fs::read_dir(folder.path()).unwrap().enumerate() {
        let file = file.unwrap();
        fs::copy(file.path(), blobs.join(number.to_string())).unwrap();
        std::os::unix::fs::symlink(format!("../../blobs/{number}"), snapshot.join(file.file_name())).unwrap();
    }
    assert_eq!(open(&snapshot).unwrap().names(), ["a", "b"]);
}

#[test]
fn an_index_that_disagrees_with_its_shards_is_refused() {
    let folder = sharded();
    let (one, two) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    index(folder.path(), &format!(r#"{{"a": "{one}", "b": "{one}"}}"#));
    assert!(fault(folder.path()).contains("b should be in model-00001"));
    index(folder.path(), &format!(r#"{{"a": "{one}", "b": "{two}", "c": "{two}"}}"#));
    assert!(fault(folder.path()).contains("c should be in model-00002"));
    index(folder.path(), &format!(r#"{{"a": "{one}", "a": "{two}"}}"#));
    assert!(fault(folder.path()).contains("a appears twice in the weight_map"));
    index(folder.path(), r#"{"a": 1}"#);
    assert!(fault(folder.path()).contains("expected a string"));
    index(folder.path(), "{}");
    assert!(fault(folder.path()).contains("weight_map is empty"));
    fs::write(folder.path().join("model.safetensors.index.json"), "{}").unwrap();
    assert!(fault(folder.path()).contains("missing field `weight_map`"));

    index(folder.path(), &format!(r#"{{"a": "{one}", "b": "{two}"}}"#));
    save(&folder.path().join(two), &[("a", numbers(Kind::Float, &[4])), ("b", numbers(Kind::Float, &[5]))]);
    let text = fault(folder.path());
    assert!(text.contains("a: is in two files") && text.contains(one) && text.contains(two), "{text}");
    fs::remove_file(folder.path().join(two)).unwrap();
    assert!(fault(folder.path()).contains("names the shard model-00002-of-00002.safetensors, which is missing"));
}

#[test]
fn folders_without_safetensors_say_what_they_hold() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    assert!(fault(&path.join("no")).contains("no such folder"));
    assert!(fault(path).contains("config.json: there is no such file"));
    fs::write(path.join("adapter_config.json"), "{}").unwrap();
    assert!(fault(path).contains("this folder holds an adapter"));
    fs::write(path.join("config.json"), "{}").unwrap();
    assert!(fault(path).contains("holds neither model.safetensors"));
    for name in ["pytorch_model.bin", "consolidated.00.pth", "model.pt"] {
        fs::write(path.join(name), "").unwrap();
        let text = fault(path);
        assert!(text.contains(name) && text.contains("pickle"), "{text}");
        fs::remove_file(path.join(name)).unwrap();
    }
    fs::write(path.join("model-00001-of-00002.safetensors"), "").unwrap();
    assert!(fault(path).contains("holds model-00001-of-00002.safetensors, but neither"));
    fs::create_dir(path.join("model.safetensors")).unwrap();
    assert!(fault(path).contains("is a folder, not a file"));
}

#[test]
fn configs_are_checked_and_remote_code_is_ignored_with_a_notice() {
    let folder = model(&[("a", numbers(Kind::Float, &[1]))]);
    let config = folder.path().join("config.json");
    let with = |text: &[u8]| {
        fs::write(&config, text).unwrap();
        fault(folder.path())
    };
    assert!(with(b"").contains("config.json:1:0"));
    assert!(with(b"\xef\xbb\xbf{}").contains("byte order mark"));
    assert!(with(b"[]").contains("not an object"));
    assert!(with("{\"a\":".repeat(200_000).as_bytes()).contains("recursion limit"));
    assert!(with(b"{\"hidden_size\": 1e400}").contains("out of range"));
    assert!(with(&vec![b' '; (16 << 20) + 1]).contains("at most 16777216"));
    fs::write(&config, r#"{"auto_map": {"AutoModel": "x.py"}}"#).unwrap();
    let checkpoint = open(folder.path()).unwrap();
    assert!(checkpoint.notices()[0].contains("auto_map"), "{:?}", checkpoint.notices());
}
