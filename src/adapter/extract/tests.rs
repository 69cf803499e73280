use std::collections::BTreeMap;
use std::path::Path;

use super::*;
use crate::adapter::LoadedAdapter;
use crate::export::{merged, peft, sidecars};
use crate::model::families;
use crate::recipe::BaseSource;

fn open(folder: &Path) -> Checkpoint {
    Checkpoint::open(&BaseSource::Folder(folder.to_path_buf())).unwrap()
}

fn fixtures() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft")
}

/// The model that an adapter of the fixtures makes of its base, in a folder.
fn tuned(name: &str, base: &Checkpoint) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let adapter = LoadedAdapter::read(&fixtures().join(name)).unwrap();
    let place = folder.path().join("tuned");
    let files = sidecars(base, None);
    merged::write(&place, base, adapter.updates.as_slice().into(), None, Kind::Float, &files, &|_, _| ()).unwrap();
    folder
}

const QUIET: &dyn Fn(u64, u64) = &|_, _| ();

#[test]
fn an_adapter_that_was_merged_is_found_again() {
    let base = open(&fixtures().join("base-tied"));
    let spec = families::spec(&base).unwrap();
    let folder = tuned("patterns", &base);
    let merged = open(&folder.path().join("tuned"));
    let found = extract(&merged, &base, &spec, Wish { rank: 3, save_others: false }, QUIET).unwrap();
    let original = LoadedAdapter::read(&fixtures().join("patterns")).unwrap();
    let modules = |updates: &[Update]| updates.iter().map(|update| update.module.clone()).collect::<BTreeSet<_>>();
    assert_eq!(modules(&found.updates), modules(&original.updates));
    assert!(found.report.relative_error < 1e-5 && found.report.energy > 1.0 - 1e-9, "{:?}", found.report);
    assert_eq!(found.report.unchanged + found.updates.len(), spec.sites().len() - 1, "the head is the embedding");
    for update in &found.updates {
        let before = original.updates.iter().find(|other| other.module == update.module).unwrap();
        let [ours, theirs] = [update, before].map(|update| update.b.mm(&update.a) * update.scale);
        assert!((ours - theirs).abs().max().double_value(&[]) < 1e-5, "{}", update.module);
    }
    // It is a file that is read again, with a rank for each.
    let place = folder.path().join("adapter");
    peft::write(&place, &found.config, found.updates.as_slice().into(), None, &BTreeMap::new()).unwrap();
    assert_eq!(
        LoadedAdapter::read(&place).unwrap().fit(&spec.sites(), &spec.names).unwrap().len(),
        found.updates.len()
    );
}

#[test]
fn what_is_no_linear_is_reported_or_kept_whole() {
    let base = open(&fixtures().join("base-tied"));
    let spec = families::spec(&base).unwrap();
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(fixtures().join("base-tied/config.json"), folder.path().join("config.json")).unwrap();
    let tensors: Vec<(String, Tensor)> = base
        .names()
        .into_iter()
        .map(|name| {
            let tensor = base.tensor(name, Kind::Float, Device::Cpu).unwrap();
            let changed =
                ["model.norm.weight", "model.embed_tokens.weight"].contains(&name) || name.contains("0.mlp.up");
            (name.to_string(), if changed { tensor + 0.25 } else { tensor })
        })
        .collect();
    Tensor::write_safetensors(&tensors, folder.path().join("model.safetensors")).unwrap();
    let tuned = open(folder.path());
    let found = extract(&tuned, &base, &spec, Wish { rank: 2, save_others: false }, QUIET).unwrap();
    assert_eq!((found.updates.len(), found.saved.len(), found.report.lost.len()), (1, 0, 2), "{:?}", found.report);
    assert!(found.report.to_string().contains("lost: model.embed_tokens.weight"), "{}", found.report);

    let found = extract(&tuned, &base, &spec, Wish { rank: 2, save_others: true }, QUIET).unwrap();
    assert_eq!((found.updates.len(), found.saved.len(), found.report.lost.len()), (1, 2, 0), "{:?}", found.report);
    assert!(found.config.ensure_weight_tying, "the head goes on sharing the embedding");
    // Merged again, it is the tuned model.
    let learned = crate::adapter::Learned { updates: &found.updates, saved: &found.saved };
    let place = folder.path().join("again");
    merged::write(&place, &base, learned, None, Kind::Float, &sidecars(&base, None), QUIET).unwrap();
    let again = open(&place);
    for name in tuned.names() {
        let [one, other] = [&tuned, &again].map(|from| from.tensor(name, Kind::Float, Device::Cpu).unwrap());
        assert!((one - other).abs().max().double_value(&[]) < 1e-5, "{name}");
    }
}

#[test]
fn another_model_and_the_base_itself_are_errors() {
    let [tied, untied] = ["base-tied", "base-untied"].map(|name| open(&fixtures().join(name)));
    let wish = Wish { rank: 2, save_others: false };
    let spec = families::spec(&tied).unwrap();
    let error = extract(&tied, &tied, &spec, wish, QUIET).unwrap_err().to_string();
    assert!(error.contains("no tensor differs"), "{error}");
    let error = extract(&untied, &tied, &spec, wish, QUIET).unwrap_err().to_string();
    assert!(error.contains("there is no tensor"), "{error}");
}

/// A head of its own that has more tokens than the base's: what its rows became is lost, and that is said; the rest is taken.
#[test]
fn of_a_model_with_more_tokens_the_linears_are_taken() {
    let base = open(&fixtures().join("base-untied"));
    let spec = families::spec(&base).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut config = base.config.clone();
    config["vocab_size"] = (spec.vocab_size + 3).into();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let write = |columns: i64| {
        let tensors: Vec<(String, Tensor)> = base
            .names()
            .into_iter()
            .map(|name| {
                let tensor = base.tensor(name, Kind::Float, Device::Cpu).unwrap();
                let tensor = match name {
                    "lm_head.weight" => tensor.constant_pad_nd([0, columns, 0, 3]),
                    "model.embed_tokens.weight" => tensor.constant_pad_nd([0, 0, 0, 3]),
                    name if name.contains("0.mlp.up") => tensor + 0.25,
                    _ => tensor,
                };
                (name.to_string(), tensor)
            })
            .collect();
        Tensor::write_safetensors(&tensors, folder.path().join("model.safetensors")).unwrap();
        open(folder.path())
    };
    for save_others in [false, true] {
        let found = extract(&write(0), &base, &spec, Wish { rank: 2, save_others }, QUIET).unwrap();
        assert_eq!((found.updates.len(), found.saved.len()), (1, 0), "{:?}", found.report);
        let lost = found.report.lost.join("; ");
        assert!(lost.contains("lm_head.weight: 19 rows, of which the base has 16"), "{lost}");
        assert!(lost.contains("model.embed_tokens.weight"), "{lost}");
    }
    // Of another width it is another model.
    let error = extract(&write(1), &base, &spec, Wish { rank: 2, save_others: false }, QUIET).unwrap_err();
    assert!(error.to_string().contains("lm_head.weight"), "{error}");
}
