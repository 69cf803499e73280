//! What fields mean that a config may leave out, say twice, or say where they mean nothing: as transformers 5.17 reads them, or an error.
//! `make parity FAMILY=all FIELDS=1` asks it of every field.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::tests::write;
use super::{from_config, spec};
use crate::model::spec::{Attention, FeedForward, Mask, ModelSpec, Position, Rope, RopeScaling, Routing};
use crate::ops::RopeLayout;
use crate::recipe::BaseSource;
use crate::weights::Checkpoint;

/// A small model of a family, with what else its config says.
fn config(model_type: &str, more: Value) -> Value {
    let mut config = json!({
        "model_type": model_type, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 11, "max_position_embeddings": 128,
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

fn read(model_type: &str, more: Value) -> ModelSpec {
    from_config(&config(model_type, more)).unwrap()
}

fn fault(model_type: &str, more: Value) -> String {
    from_config(&config(model_type, more)).map(|_| ()).unwrap_err().to_string()
}

fn ropes(spec: &ModelSpec) -> Vec<Rope> {
    let rope = |position: &Position| match position {
        Position::Rope(rope) => rope.clone(),
        other => panic!("{other:?} does not rotate"),
    };
    spec.layers.iter().map(|layer| rope(&layer.position)).collect()
}

fn masks(spec: &ModelSpec) -> Vec<Mask> {
    spec.layers.iter().map(|layer| layer.mask).collect()
}

#[test]
fn of_two_that_tell_of_positions_the_older_one_counts() {
    let both = json!({
        "rope_scaling": {"rope_type": "linear", "factor": 3.0}, "rope_parameters": {"rope_type": "linear", "factor": 5.0},
    });
    assert_eq!(ropes(&read("llama", both))[0].scaling, RopeScaling::Linear { factor: 3.0 });

    let yarn = |factor: f64| json!({"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 16});
    let latent = json!({
        "num_key_value_heads": 1, "head_dim": 16, "qk_rope_head_dim": 4, "index_head_dim": 8, "o_groups": 2, "n_routed_experts": 6,
        "intermediate_size": 2048, "rope_scaling": yarn(4.0), "rope_parameters": yarn(2.0),
    });
    let compressed = &ropes(&read("deepseek_v4", latent))[0];
    assert!(
        matches!(compressed.scaling, RopeScaling::Yarn { factor: 4.0, attention_factor: 1.0, .. }),
        "{compressed:?}"
    );
}

#[test]
fn the_older_one_changes_full_layers_field_by_field() {
    let full = json!({
        "rope_type": "yarn", "factor": 8.0, "beta_fast": 4.0, "truncate": false, "rope_theta": 700.0,
        "original_max_position_embeddings": 16,
    });
    let said = json!({
        "rope_parameters": {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 90.0}},
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 64,
    });
    let ropes = ropes(&read("gemma3_text", json!({"sliding_window_pattern": 2}).merged(said)));
    assert_eq!((ropes[0].theta, &ropes[0].scaling), (90.0, &RopeScaling::None));
    assert_eq!(ropes[1].theta, 700.0);
    // A length outside is of models whose layers all rotate alike.
    let RopeScaling::Yarn { factor, beta_fast, original, truncate, .. } = ropes[1].scaling else {
        panic!("{:?}", ropes[1])
    };
    // And truncate is looked for where it cannot be.
    assert_eq!((factor, beta_fast, original, truncate), (2.0, 4.0, 16, true));
    // Positions of no kind of layer are nobody's here.
    let flat = json!({"rope_parameters": {"rope_type": "linear", "factor": 8.0}});
    assert!(fault("gemma3_text", flat).contains("rope_parameters.rope_type"));
}

#[test]
fn a_length_that_the_config_leaves_out_is_not_made_up() {
    let mut config = config("llama", json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}));
    config.as_object_mut().unwrap().remove("max_position_embeddings");
    let error = from_config(&config).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("max_position_embeddings") && error.contains("missing"), "{error}");
    // Positions that are not stretched by a length need none.
    config["rope_scaling"] = json!({"type": "linear", "factor": 2.0});
    assert!(from_config(&config).is_ok());
    config["rope_scaling"] = json!({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16});
    assert!(from_config(&config).is_ok());
}

#[test]
fn magnitudes_of_0_say_nothing() {
    let yarn = |mscale: f64| {
        let stretch = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": mscale});
        let RopeScaling::Yarn { attention_factor, .. } =
            ropes(&read("llama", json!({"rope_scaling": stretch})))[0].scaling
        else {
            panic!("yarn")
        };
        attention_factor
    };
    assert_eq!(yarn(0.0), 0.1 * 4f64.ln() + 1.0);
    assert_eq!(yarn(1.0), 1.0);
}

#[test]
fn queries_grow_beyond_the_length_outside() {
    let stretch = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.4});
    let every = |more: Value| {
        let spec = read("ministral3", json!({"rope_parameters": stretch}).merged(more));
        let Attention::Grouped(attention) = &spec.layers[0].attention else { panic!("grouped attention") };
        attention.temperature.unwrap().every
    };
    assert_eq!(every(json!({})), 16);
    assert_eq!(every(json!({"original_max_position_embeddings": 32})), 32);
}

#[test]
fn a_window_that_is_used_is_4096_where_the_config_does_not_say() {
    for model_type in ["qwen2", "qwen3"] {
        let used = json!({"use_sliding_window": true, "max_window_layers": 3});
        let expected = [Mask::Full, Mask::Full, Mask::Full, Mask::Sliding { window: 4096 }];
        assert_eq!(masks(&read(model_type, used.clone())), expected, "{model_type}");
        assert_eq!(masks(&read(model_type, used.clone().merged(json!({"sliding_window": null})))), [Mask::Full; 4]);
        assert!(fault(model_type, used.merged(json!({"sliding_window": 0}))).contains("sliding_window"));
        // As transformers writes what is not used.
        assert_eq!(masks(&read(model_type, json!({"sliding_window": 0}))), [Mask::Full; 4]);
    }
}

#[test]
fn a_layer_that_slides_needs_a_window() {
    let slides = json!({"layer_types": ["full_attention", "full_attention", "full_attention", "sliding_attention"]});
    for model_type in ["qwen2", "smollm3"] {
        assert!(fault(model_type, slides.clone()).contains("layer_types"), "{model_type}");
    }
    // SmolLM3 passes over use_sliding_window where the layers say which of them slide.
    let found = masks(&read("smollm3", slides.merged(json!({"sliding_window": 9, "use_sliding_window": false}))));
    assert_eq!(found[2..], [Mask::Full, Mask::Sliding { window: 9 }]);
}

#[test]
fn names_of_mobilellm_are_its_own() {
    assert_eq!(read("mobilellm", json!({"layer_sharing": true})).passes, 2);
    assert!(fault("llama", json!({"layer_sharing": true})).contains("layer_sharing"));
    assert!(fault("llama", json!({"share_embedding": true})).contains("share_embedding"));
}

#[test]
fn as_many_experts_are_chosen_as_in_the_family_where_the_config_does_not_say() {
    for (model_type, expected) in [("qwen2_moe", 4), ("qwen3_moe", 8), ("qwen3_next", 10)] {
        let experts = json!({"num_experts": 16, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8});
        let experts = if model_type == "qwen3_moe" {
            experts.merged(json!({"shared_expert_intermediate_size": null}))
        } else {
            experts
        };
        let spec = read(model_type, experts);
        let FeedForward::Experts(experts) = &spec.layers[0].feed_forward else { panic!("experts") };
        let Routing::Largest { chosen, .. } = experts.router.routing else { panic!("the largest") };
        assert_eq!(chosen, expected, "{model_type}");
    }
}

#[test]
fn a_null_is_off_where_transformers_takes_it_so() {
    let interleaved = |value: Value| {
        let latent = json!({"first_k_dense_replace": 4, "qk_rope_head_dim": 4, "rope_interleave": value});
        ropes(&read("deepseek_v3", latent))[0].layout
    };
    assert_eq!((interleaved(json!(true)), interleaved(json!(null))), (RopeLayout::Pairs, RopeLayout::Halves));
    let truncated = |value: Value| {
        let stretch =
            json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": value});
        let scaling = ropes(&read("llama", json!({"rope_scaling": stretch})))[0].scaling.clone();
        matches!(scaling, RopeScaling::Yarn { truncate: true, .. })
    };
    assert!(truncated(json!(true)) && !truncated(json!(null)));
    let norms = |value: Value| {
        let said = json!({
            "alibi": true, "intermediate_size": null, "num_key_value_heads": null, "head_dim": null, "parallel_attn": value,
        });
        read("falcon", said).tensors().len()
    };
    assert!(norms(json!(null)) == norms(json!(false)) && norms(json!(false)) > norms(json!(true)));
}

#[test]
fn phi_3_5_moe_changes_its_magnitude_at_the_length_inside() {
    let stretch = |original: Value| {
        let factors = vec![1.5; 4];
        let stretch = json!({
            "type": "longrope", "short_factor": factors, "long_factor": factors, "short_mscale": 1.1, "long_mscale": 1.4,
        });
        let said = json!({
            "intermediate_size": 8, "num_local_experts": 4, "rope_scaling": stretch.merged(original),
            "original_max_position_embeddings": 32,
        });
        let RopeScaling::LongRope { original, attention_factors, .. } = ropes(&read("phimoe", said))[0].scaling else {
            panic!("longrope")
        };
        assert_eq!(attention_factors, [1.1, 1.4]);
        original
    };
    assert_eq!(stretch(json!({"original_max_position_embeddings": 16})), 16);
    assert_eq!(stretch(json!({})), 128);
}

#[test]
fn positions_of_phi_3_are_stretched_by_longrope_alone_at_a_length_that_stands_outside() {
    let stretch = |kind: &str| json!({"type": kind, "short_factor": vec![1.5; 4], "long_factor": vec![2.5; 4]});
    let inside = stretch("su").merged(json!({"original_max_position_embeddings": 16}));
    let RopeScaling::LongRope { original, .. } = ropes(&read("phi3", json!({"rope_scaling": inside})))[0].scaling
    else {
        panic!("longrope")
    };
    assert_eq!(original, 4096);
    assert!(fault("phi3", json!({"rope_scaling": stretch("yarn")})).contains("rope_scaling.type"));
}

#[test]
fn bases_of_pythia_are_not_other_families() {
    let said = |theta: f64| json!({"rotary_emb_base": 700, "rope_theta": theta, "rotary_pct": 0.5});
    assert_eq!(ropes(&read("gpt_neox", said(700.0)))[0].theta, 700.0);
    assert!(fault("gpt_neox", said(900.0)).contains("rope_theta"));
}

#[test]
fn of_bloom_two_names_of_one_size_say_the_same() {
    let said = |heads: i64| json!({"n_head": 4, "num_attention_heads": heads, "intermediate_size": null, "num_key_value_heads": null, "head_dim": null});
    assert_eq!(read("bloom", said(4)).layers.len(), 4);
    assert!(fault("bloom", said(2)).contains("num_attention_heads: 2 found, 4, as n_head says, expected"));
}

#[test]
fn a_cap_that_a_larger_model_passes_over_is_an_error() {
    let text = config("gemma3_text", json!({"final_logit_softcapping": 9.0}));
    assert_eq!(from_config(&text).unwrap().head.map.soft_cap, Some(9.0));
    let larger = json!({"model_type": "gemma3", "text_config": text});
    assert!(from_config(&larger).map(|_| ()).unwrap_err().to_string().contains("final_logit_softcapping"));
}

/// A larger model of a type and the config of its text model.
fn larger(model_type: &str) -> (Value, Value) {
    let text_type = format!("{model_type}_text");
    let mut text = config(&text_type, json!({"linear_num_key_heads": 1, "linear_num_value_heads": 2}));
    if model_type == "qwen3_5_moe" {
        text = text.merged(json!({
            "intermediate_size": null, "num_experts": 8, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 6,
        }));
    }
    (json!({"model_type": model_type, "text_config": text.clone()}), text)
}

/// What is found in files that have these tensors.
fn found(config: &Value, stored: &BTreeMap<String, Vec<i64>>) -> ModelSpec {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), config, stored);
    let checkpoint = Checkpoint::open(&BaseSource::Folder(folder.path().to_path_buf())).unwrap();
    spec(&checkpoint).unwrap_or_else(|error| panic!("{}: {error}", config["model_type"]))
}

#[test]
fn a_text_model_that_was_read_from_a_larger_one_is_found_under_names_of_that() {
    for model_type in ["qwen3_5", "qwen3_5_moe"] {
        let (larger, text) = larger(model_type);
        let larger = from_config(&larger).unwrap();
        let stored = larger.tensors().into_iter().map(|(name, shape)| (larger.names.stored(&name), shape)).collect();
        let alone = found(&text, &stored);
        assert_eq!((alone.model_type.as_str(), alone.tensors()), (&*format!("{model_type}_text"), larger.tensors()));
    }
}

/// As the published files in fp8 have them, which stack those in bf16.
#[test]
fn experts_of_a_larger_model_are_found_apart_too() {
    let (larger, text) = larger("qwen3_5_moe");
    let apart = from_config(&text).unwrap().tensors();
    let inside = |name: &str| name.strip_prefix("model.").map(|rest| format!("model.language_model.{rest}"));
    let mut stored: BTreeMap<String, Vec<i64>> =
        apart.iter().map(|(name, shape)| (inside(name).unwrap_or(name.clone()), shape.clone())).collect();
    stored.insert("mtp.layers.0.mlp.experts.0.gate_proj.weight".into(), vec![6, 32]);
    assert!(stored.contains_key("model.language_model.layers.3.mlp.experts.7.down_proj.weight"));
    for config in [&larger, &text] {
        let spec = found(config, &stored);
        assert_eq!((&config["model_type"], &spec.tensors()), (&json!(spec.model_type), &apart));
        assert_eq!(spec.names.taken_for_experts, from_config(&text).unwrap().names.taken_for_experts);
    }
}

/// An object with the fields of another one.
trait Merged {
    fn merged(self, more: Value) -> Value;
}

impl Merged for Value {
    fn merged(mut self, more: Value) -> Value {
        self.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self
    }
}
