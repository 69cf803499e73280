//! Against PEFT's own answers, in `tests/fixtures/peft` (made by `tests/python/peft_adapter.py`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::*;
use crate::model::names::Names;
use crate::recipe::{BaseSource, Targets};
use crate::weights::Checkpoint;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft")
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn adapter_recipe(value: &Value) -> AdapterRecipe {
    serde_json::from_value(value.clone()).unwrap()
}

fn model(name: &str) -> Decoder {
    let checkpoint = Checkpoint::open(&BaseSource::Folder(fixtures().join(format!("base-{name}")))).unwrap();
    Decoder::load(&checkpoint, Kind::Float, Device::Cpu, &|_, _| ()).unwrap()
}

/// The saved adapters and the recipes that stand for them: name, base, recipe.
fn cases() -> Vec<(String, String, AdapterRecipe)> {
    let mut names: Vec<String> = fs::read_dir(fixtures())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| fixtures().join(name).join("recipe.json").exists())
        .collect();
    names.sort();
    assert!(names.len() >= 7);
    let case = |name: String| {
        let recipe = json(&fixtures().join(&name).join("recipe.json"));
        let base = recipe["model"].as_str().unwrap().to_string();
        (name, base, adapter_recipe(&recipe["adapter"]))
    };
    names.into_iter().map(case).collect()
}

#[derive(Deserialize)]
struct Listed {
    linears: Vec<(String, i64, i64)>,
    head: String,
}

impl Listed {
    fn resolve(&self, recipe: &Value) -> Result<targets::Selection> {
        let site = |(name, rows, columns): &(String, i64, i64)| {
            let role = if *name == self.head { Role::Head } else { Role::Linear };
            Site { name: name.clone(), shape: (*rows, *columns), role }
        };
        targets::resolve(&self.linears.iter().map(site).collect::<Vec<_>>(), &adapter_recipe(recipe))
    }

    fn faults(&self, recipe: Value) -> String {
        let error = self.resolve(&recipe).unwrap_err();
        assert_eq!(error.exit_code(), 3, "{error}");
        error.to_string()
    }
}

fn listed() -> (BTreeMap<String, Listed>, Value) {
    let targets = json(&fixtures().join("targets.json"));
    (serde_json::from_value(targets["models"].clone()).unwrap(), targets["cases"].clone())
}

#[test]
fn targets_ranks_scales_and_saved_names_are_pefts() {
    let (models, cases) = listed();
    for case in cases.as_array().unwrap() {
        let model = &models[case["model"].as_str().unwrap()];
        let selection = model.resolve(&case["recipe"]).unwrap_or_else(|error| panic!("{case}: {error}"));
        let expected: Vec<(usize, u32, f64, f64)> = serde_json::from_value(case["expected"].clone()).unwrap();
        let found: Vec<_> = selection.targets.iter().map(|t| (t.index, t.r, t.alpha, t.scale)).collect();
        assert_eq!(found, expected, "{}", case["recipe"]);
        let saved = match selection.target_modules {
            Targets::Names(names) => serde_json::to_value(names.into_iter().collect::<BTreeSet<_>>()).unwrap(),
            Targets::Pattern(text) => Value::String(text),
        };
        assert_eq!(saved, case["saved"], "{}", case["recipe"]);
    }
}

#[test]
fn what_matches_nothing_is_named_with_what_there_is() {
    let (models, _) = listed();
    let tied = &models["tied"];
    let text = tied.faults(serde_json::json!({"target_modules": ["q_proj", "q_prj", "W_pack"]}));
    assert!(text.contains("adapter.target_modules: 'q_prj' matches no linear"), "{text}");
    assert!(text.contains("the nearest is q_proj"), "{text}");
    assert!(text.contains("'W_pack'") && !text.contains("'q_proj'"), "{text}");
    assert!(text.contains("q_proj (3 layers)") && text.contains("lm_head"), "{text}");

    let text = tied.faults(serde_json::json!({"target_modules": "q_proj"}));
    assert!(text.contains("write names as a list: [q_proj]"), "{text}");
    assert!(tied.faults(serde_json::json!({"target_modules": ".*qkv"})).contains("must match the whole path"));
    assert!(tied.faults(serde_json::json!({"target_modules": ["all-linear"]})).contains("target_modules: all-linear"));
    assert!(tied.faults(serde_json::json!({"target_modules": []})).contains("empty list"));
    let text = tied.faults(serde_json::json!({"target_modules": "(?!.*lm_head).*"}));
    assert!(text.contains("exclude_modules instead"), "{text}");
    assert!(
        tied.faults(serde_json::json!({"target_modules": ".*q_proj)|(.*v_proj"})).contains("not a regular expression")
    );

    assert!(tied.faults(serde_json::json!({"exclude_modules": ["gate"]})).contains("exclude_modules: 'gate'"));
    assert!(
        tied.faults(serde_json::json!({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}))
            .contains("nothing to train")
    );
    let text = tied.faults(
        serde_json::json!({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 4}, "alpha_pattern": {"k": 1.0}}),
    );
    assert!(text.contains("adapter.rank_pattern.v_proj: matches no module that gets an adapter"), "{text}");
    assert!(text.contains("adapter.alpha_pattern.k:"), "{text}");
    let text = tied.faults(serde_json::json!({"layers_to_transform": [1, 3, 9]}));
    assert!(text.contains("there is no layer 3, 9") && text.contains("0 to 2"), "{text}");
    assert!(
        tied.faults(serde_json::json!({"target_modules": ".*q_proj", "layers_to_transform": [1]}))
            .contains("into the expression")
    );
    let text = tied.faults(serde_json::json!({"r": 0, "rank_pattern": {"q_proj": 0}}));
    assert!(text.contains("adapter.r: is 0") && text.contains("adapter.rank_pattern.q_proj: is 0"), "{text}");
}

#[test]
fn all_linear_of_some_layers_and_ranks_that_are_too_large() {
    let (models, _) = listed();
    let selection = models["tied"].resolve(&serde_json::json!({"r": 9, "layers_to_transform": [2]})).unwrap();
    assert_eq!(selection.targets.len(), 7);
    let Targets::Names(names) = &selection.target_modules else { panic!("a list") };
    assert!(names.iter().all(|name| name.starts_with("model.layers.2.")), "{names:?}");
    assert_eq!(selection.layers_to_transform, None);
    assert!(selection.notices[0].contains("rank 9 is above 8"), "{:?}", selection.notices);
    assert_eq!(selection.notices.len(), 4);
}

/// The lists of names are sets in PEFT: their order says nothing.
fn canonical(mut config: Value) -> Value {
    for key in ["target_modules", "exclude_modules"] {
        if let Some(list) = config[key].as_array_mut() {
            list.sort_by_key(Value::to_string);
        }
    }
    config
}

#[test]
fn the_config_is_pefts_byte_for_byte() {
    for (name, base, recipe) in cases() {
        let mut model = model(&base);
        let mut config = Adapters::attach(&mut model, &recipe, 0, None).unwrap().config;
        config.base_model_name_or_path = Some("owner/tiny".into());
        let theirs = fs::read_to_string(fixtures().join(&name).join(config::CONFIG)).unwrap();
        let expected: Value = serde_json::from_str(&theirs).unwrap();
        assert_eq!(canonical(serde_json::from_str(&config.to_json()).unwrap()), canonical(expected.clone()), "{name}");
        // With the names in PEFT's order, every byte.
        let named = |key: &str, own: Option<Targets>| match expected[key].as_array() {
            Some(_) => serde_json::from_value(expected[key].clone()).unwrap(),
            None => own,
        };
        config.target_modules = named("target_modules", config.target_modules.clone());
        config.exclude_modules = named("exclude_modules", config.exclude_modules.clone());
        assert_eq!(config.to_json(), theirs, "{name}");
    }
}

#[test]
fn names_that_are_not_ascii_are_escaped_as_python_does() {
    let (config, _) = AdapterConfig::read(&fixtures().join("names")).unwrap();
    let config = AdapterConfig { base_model_name_or_path: Some("modèle/😀".into()), ..config };
    assert!(config.to_json().contains(r#""mod\u00e8le/\ud83d\ude00""#));
}

#[test]
fn attached_parameters_have_pefts_keys_shapes_and_scales() {
    for (name, base, recipe) in cases() {
        let loaded = LoadedAdapter::read(&fixtures().join(&name)).unwrap();
        let mut model = model(&base);
        let adapters = Adapters::attach(&mut model, &recipe, 3, None).unwrap();
        let order: Vec<String> =
            model.linears().iter().filter(|l| l.adapter.is_some()).map(|l| l.name.clone()).collect();
        assert_eq!(order, adapters.updates().iter().map(|u| u.module.clone()).collect::<Vec<_>>(), "{name}");
        let theirs: BTreeMap<&str, &Update> = loaded.updates.iter().map(|u| (u.module.as_str(), u)).collect();
        assert_eq!(theirs.len(), adapters.updates().len(), "{name}");
        for update in adapters.updates() {
            let other = theirs[update.module.as_str()];
            assert_eq!(
                (update.a.size(), update.b.size()),
                (other.a.size(), other.b.size()),
                "{name}: {}",
                update.module
            );
            assert!((update.scale - other.scale).abs() < 1e-12, "{name}: {}", update.module);
            assert!(update.a.requires_grad() && update.b.requires_grad() && update.a.is_leaf());
            assert_eq!(update.b.abs().max().double_value(&[]), 0.0);
            assert!(update.a.abs().max().double_value(&[]) > 0.0);
        }
        let parameters = adapters.parameters();
        let weights = Checkpoint::open_file(&fixtures().join(&name).join(load::WEIGHTS)).unwrap();
        for (key, tensor) in &parameters {
            assert_eq!(weights.shape(key), Some(tensor.size()), "{name}: {key}");
        }
        assert_eq!(adapters.trainable(), parameters.iter().map(|(_, t)| t.numel()).sum::<usize>());
        adapters.detach(&mut model);
        assert!(model.linears().iter().all(|linear| linear.adapter.is_none()));
    }
}

#[test]
fn parameters_are_handles_to_what_the_model_uses() {
    let mut model = model("untied");
    let adapters = Adapters::attach(&mut model, &AdapterRecipe::default(), 3, None).unwrap();
    for (_, tensor) in adapters.parameters() {
        let _ = tch::no_grad(|| tensor.shallow_clone().fill_(0.25));
    }
    let used = model
        .linears()
        .iter()
        .filter_map(|l| l.adapter.as_ref())
        .map(|l| l.b.mean(Kind::Float).double_value(&[]))
        .sum::<f64>();
    assert_eq!(used, 14.0 * 0.25);
}

#[test]
fn a_loaded_adapter_is_attached_with_its_own_numbers() {
    let loaded = LoadedAdapter::read(&fixtures().join("patterns")).unwrap();
    assert_eq!(loaded.config.base_model_name_or_path.as_deref(), Some("owner/tiny"));
    let mut model = model("tied");
    let recipe =
        AdapterRecipe { adapter_name_or_path: Some(loaded.folder.clone()), lora_dropout: 0.25, ..Default::default() };
    let adapters = Adapters::attach(&mut model, &recipe, 0, None).unwrap();
    assert_eq!(adapters.config.lora_dropout, 0.25);
    assert_eq!((adapters.config.r, adapters.config.rank_pattern.len()), (2, 2));
    let order: Vec<&str> = model.linears().iter().filter(|l| l.adapter.is_some()).map(|l| l.name.as_str()).collect();
    assert_eq!(order, adapters.updates().iter().map(|u| u.module.as_str()).collect::<Vec<_>>());
    let mut by_name: Vec<&Update> = adapters.updates().iter().collect();
    by_name.sort_by(|a, b| a.module.cmp(&b.module));
    for (ours, theirs) in by_name.iter().zip(&loaded.updates) {
        assert_eq!((&ours.module, ours.scale), (&theirs.module, theirs.scale));
        assert_eq!((&ours.a, &ours.b), (&theirs.a, &theirs.b));
    }
    assert!(model.linears().iter().filter_map(|l| l.adapter.as_ref()).all(|l| l.dropout == 0.25));

    let says = |recipe: AdapterRecipe| Adapters::attach(&mut self::model("tied"), &recipe, 0, None).map(|_| ());
    says(AdapterRecipe { r: 2, lora_alpha: 6.0, use_rslora: true, ..recipe.clone() }).unwrap();
    let error = says(AdapterRecipe {
        r: 4,
        target_modules: Targets::Names(vec!["q_proj".into(), "v_proj".into()]),
        ..recipe.clone()
    });
    let text = error.unwrap_err().to_string();
    assert!(text.contains("adapter.r: is 4, but the adapter continued from has 2"), "{text}");
    assert!(text.contains("adapter.target_modules: is 6 modules, but the adapter continued from has 8"), "{text}");
}

/// A copy of a fixture that a test may spoil.
fn copy(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in [config::CONFIG, load::WEIGHTS] {
        fs::copy(fixtures().join(name).join(file), folder.path().join(file)).unwrap();
    }
    folder
}

fn spoil_config(folder: &Path, key: &str, value: Value) {
    let path = folder.join(config::CONFIG);
    let mut config = json(&path);
    config[key] = value;
    fs::write(path, config.to_string()).unwrap();
}

/// Rewrites an adapter's tensors; `change` gets and gives names and tensors.
fn spoil_weights(folder: &Path, change: impl Fn(&mut Vec<(String, Tensor)>)) {
    let path = folder.join(load::WEIGHTS);
    let mut tensors = Tensor::read_safetensors(&path).unwrap();
    change(&mut tensors);
    Tensor::write_safetensors(&tensors, &path).unwrap();
}

fn refusal(folder: &Path) -> String {
    let error = LoadedAdapter::read(folder).unwrap_err();
    assert_eq!(error.exit_code(), 5, "{error}");
    error.to_string()
}

#[test]
fn files_of_older_peft_and_other_tools_are_read() {
    let folder = copy("names");
    let old = serde_json::json!({
        "base_model_name_or_path": "owner/tiny", "bias": "none", "enable_lora": null, "fan_in_fan_out": false,
        "inference_mode": true, "lora_alpha": 4, "lora_dropout": 0.05, "merge_weights": false, "modules_to_save": null,
        "peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
        "layers_to_transform": 1,
    });
    fs::write(folder.path().join(config::CONFIG), old.to_string()).unwrap();
    spoil_weights(folder.path(), |tensors| {
        for (name, tensor) in tensors.iter_mut() {
            *name = name.replace(".weight", ".default.weight");
            *tensor = tensor.to_kind(Kind::BFloat16);
        }
    });
    let loaded = LoadedAdapter::read(folder.path()).unwrap();
    assert_eq!(loaded.updates.len(), 6);
    assert_eq!((loaded.updates[0].scale, loaded.updates[0].a.kind()), (2.0, Kind::Float));
    assert_eq!(loaded.config.layers_to_transform, Some(vec![1]));
    assert!(loaded.notices.is_empty(), "{:?}", loaded.notices);

    spoil_config(folder.path(), "use_next_years_trick", Value::Bool(true));
    let loaded = LoadedAdapter::read(folder.path()).unwrap();
    assert!(loaded.notices[0].contains("use_next_years_trick: true"), "{:?}", loaded.notices);
}

#[test]
fn what_engraft_cannot_train_is_refused_by_name() {
    for (name, feature) in [
        ("bias", "bias: lora_only"),
        ("lora-bias", "a bias on lora_B"),
        ("embedding", "an adapter on an embedding"),
        ("pissa", "began as pissa"),
    ] {
        let text = refusal(&fixtures().join("more").join(name));
        assert!(text.contains(feature) && text.contains("help:"), "{name}: {text}");
        if !["bias", "embedding", "pissa"].contains(&name) {
            // A config that hides it does not help.
            let folder = copy(&format!("more/{name}"));
            fs::copy(fixtures().join("names").join(config::CONFIG), folder.path().join(config::CONFIG)).unwrap();
            refusal(folder.path());
        }
    }
    // A config that says less or more than the file has.
    for (name, key, value, part) in [
        ("dora", "use_dora", Value::Bool(false), "does not say use_dora"),
        ("names", "use_dora", Value::Bool(true), "has no lora_magnitude_vector"),
        ("modules-to-save", "modules_to_save", Value::Null, "no part of a LoRA adapter"),
        ("trainable-tokens", "trainable_token_indices", Value::Null, "no part of a LoRA adapter"),
    ] {
        let folder = copy(&if name == "names" { name.to_string() } else { format!("more/{name}") });
        spoil_config(folder.path(), key, value);
        let text = refusal(folder.path());
        assert!(text.contains(part), "{name}: {text}");
    }
    let folder = copy("names");
    spoil_config(folder.path(), "peft_type", Value::from("LOHA"));
    assert!(refusal(folder.path()).contains("LOHA"));
}

#[test]
fn damaged_adapters_are_refused_with_both_values() {
    let config = |key: &str, value: Value| {
        let folder = copy("names");
        spoil_config(folder.path(), key, value);
        refusal(folder.path())
    };
    let text = config("r", Value::from(8));
    assert!(text.contains("have rank 2, but adapter_config.json says 8"), "{text}");
    assert!(config("r", Value::from(0)).contains("rank of 0"));
    assert!(config("r", Value::from(-3)).contains("-3"));
    assert!(config("r", Value::from("2")).contains("\"2\""));
    assert!(config("alpha_pattern", serde_json::json!({"(": 2})).contains("regular expression"));

    let folder = copy("names");
    for spoilt in ["NaN", "1e999", "Infinity"] {
        let text = fs::read_to_string(fixtures().join("names").join(config::CONFIG)).unwrap();
        fs::write(
            folder.path().join(config::CONFIG),
            text.replace("\"lora_alpha\": 5.5", &format!("\"lora_alpha\": {spoilt}")),
        )
        .unwrap();
        assert!(refusal(folder.path()).contains("adapter_config.json:20:"), "{}", refusal(folder.path()));
    }

    type Change = fn(&mut Vec<(String, Tensor)>);
    let weights = |change: Change| {
        let folder = copy("names");
        spoil_weights(folder.path(), change);
        refusal(folder.path())
    };
    let text = weights(|tensors| {
        tensors.retain(|(name, _)| name != "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight")
    });
    assert!(text.contains("model.layers.1.self_attn.q_proj: has lora_A but no lora_B"), "{text}");
    let text = weights(|tensors| {
        tensors.push(("base_model.model.score.weight".into(), Tensor::zeros([2], (Kind::Float, Device::Cpu))))
    });
    assert!(text.contains("base_model.model.score.weight"), "{text}");
    assert!(weights(|tensors| tensors.clear()).contains("nothing was trained"));
    let text = weights(|tensors| tensors.iter_mut().for_each(|(_, t)| *t = &*t * f64::NAN));
    assert!(text.contains("NaN"), "{text}");
    let text = weights(|tensors| tensors.iter_mut().for_each(|(_, t)| *t = t.to_kind(Kind::Int64)));
    assert!(text.contains("stored as I64"), "{text}");
    let text = weights(|tensors| {
        tensors.iter_mut().filter(|(n, _)| n.contains("lora_A")).for_each(|(_, t)| *t = t.narrow(0, 0, 1))
    });
    assert!(text.contains("lora_A has rank 1 (1 x 8) but lora_B 2"), "{text}");
    let text = weights(|tensors| tensors.iter_mut().for_each(|(_, t)| *t = t.flatten(0, 1)));
    assert!(text.contains("must be matrices"), "{text}");
    let text = weights(|tensors| {
        let (name, tensor) = &tensors[0];
        let twin = (name.replace(".weight", ".default.weight"), tensor.copy());
        tensors.push(twin);
    });
    assert!(text.contains("are the same matrix"), "{text}");

    let folder = copy("names");
    let path = folder.path().join(load::WEIGHTS);
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 2]).unwrap();
    assert!(refusal(folder.path()).contains("truncated"));
    fs::remove_file(&path).unwrap();
    assert!(refusal(folder.path()).contains("holds no adapter_model.safetensors"));
    fs::write(folder.path().join("adapter_model.bin"), "").unwrap();
    assert!(refusal(folder.path()).contains("adapter_model.bin, a Python pickle"));
    assert!(refusal(&folder.path().join("gone")).contains("no such folder"));
    assert!(refusal(&fixtures().join("base-tied")).contains("name it as base_model"));
}

#[test]
fn an_adapter_for_another_base_is_refused_naming_both() {
    let loaded = LoadedAdapter::read(&fixtures().join("head")).unwrap();
    let tied = model("tied");
    let mut sites = tied.spec.sites();
    assert_eq!(loaded.fit(&sites, &Names::default()).unwrap().len(), 3);
    for site in sites.iter_mut().filter(|site| site.name == "lm_head") {
        site.shape = (17, 8);
    }
    let text = loaded.fit(&sites, &Names::default()).unwrap_err().to_string();
    assert!(text.contains("lm_head ([16, 8] there, [17, 8] here)") && text.contains("owner/tiny"), "{text}");
    let loaded = LoadedAdapter::read(&fixtures().join("all-linear")).unwrap();
    let untied = model("untied");
    let text = loaded.fit(&untied.spec.sites(), &untied.spec.names).unwrap_err().to_string();
    assert!(
        text.contains("7 of its modules are not linears of this base, model.layers.2.mlp.down_proj among them"),
        "{text}"
    );
}

#[test]
fn what_is_trained_whole_must_be_there_in_its_shape() {
    let untied = model("untied");
    let loaded = |folder: &Path| LoadedAdapter::read(folder).unwrap();
    let place = fixtures().join("more/trainable-tokens");
    let saved = loaded(&place).saved(&untied.spec).unwrap();
    assert_eq!((saved.len(), saved[0].module.as_str()), (1, "model.embed_tokens"));
    for (value, part) in [
        (serde_json::json!([1]), "another base, or other tokens"),
        (serde_json::json!([1, 400]), "400 is no token of this base"),
        (serde_json::json!([1, 1]), "names 1 twice"),
        (serde_json::json!({"lm_head": [1, 2]}), "is not there"),
        (serde_json::json!({"q_proj": [1, 2]}), "'q_proj' neither makes"),
    ] {
        let folder = copy("more/trainable-tokens");
        spoil_config(folder.path(), "trainable_token_indices", value.clone());
        let text = loaded(folder.path()).saved(&untied.spec).unwrap_err().to_string();
        assert!(text.contains(part), "{value}: {text}");
    }
    let folder = copy("more/modules-to-save");
    for (typed, part) in [
        ("nrom", "'nrom' is no module that can be trained whole"),
        ("model.norm", "model.norm: is not there, but adapter_config.json says that it was trained"),
        // As PEFT has it, all whose paths end so.
        ("norm", "input_layernorm: is not there"),
    ] {
        spoil_config(folder.path(), "modules_to_save", serde_json::json!(["lm_head", typed]));
        let text = loaded(folder.path()).saved(&untied.spec).unwrap_err().to_string();
        assert!(text.contains(part), "{typed}: {text}");
    }
}

#[test]
fn dora_and_starts_are_refused_where_they_cannot_be() {
    let says = |recipe: Value| {
        let recipe = adapter_recipe(&recipe);
        Adapters::attach(&mut model("untied"), &recipe, 0, None).map(|_| ()).unwrap_err().to_string()
    };
    let text = says(serde_json::json!({"r": 9, "init_lora_weights": "olora"}));
    assert!(text.contains("no 9 directions") && text.contains("rank_pattern"), "{text}");
    let text = says(serde_json::json!({"target_modules": ["lm_head", "q_proj"], "modules_to_save": ["lm_head"]}));
    assert!(text.contains("lm_head is trained itself and has a low-rank adapter"), "{text}");
    let text = says(serde_json::json!({"modules_to_save": ["lm_head"], "trainable_token_indices": {"lm_head": [1]}}));
    assert!(text.contains("lm_head is to be trained whole and by its rows"), "{text}");
    let text = says(serde_json::json!({"modules_to_save": ["lm_heat"]}));
    assert!(text.contains("lm_head") && text.contains("model.embed_tokens"), "{text}");
}
