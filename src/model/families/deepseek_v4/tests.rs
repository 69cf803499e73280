use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::model::families::from_config;
use crate::model::families::tests::answer_of;
use crate::model::spec::{Attention, Entries, FeedForward, Position, RopeScaling, Routing};

fn config(change: Value) -> Value {
    let mut config = json!({
        "model_type": "deepseek_v4", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 8,
        "vocab_size": 11, "head_dim": 16, "qk_rope_head_dim": 4, "n_routed_experts": 8, "moe_intermediate_size": 12,
    });
    config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    config
}

fn fault(change: Value) -> String {
    from_config(&config(change)).unwrap_err().to_string()
}

/// What each layer sees: l the latest tokens, c chosen entries too, a all entries too; and whether a table names its experts.
fn layers(change: Value) -> Vec<(char, bool)> {
    let spec = from_config(&config(change)).unwrap();
    let of_layer = |layer: &crate::model::spec::LayerSpec| {
        let Attention::Compressed(attention) = &layer.attention else { panic!("compressed attention") };
        let FeedForward::Experts(experts) = &layer.feed_forward else { panic!("experts") };
        let seen = match attention.entries {
            Entries::None => 'l',
            Entries::All(_) => 'a',
            Entries::Chosen { .. } => 'c',
        };
        (seen, matches!(experts.router.routing, Routing::OfToken { .. }))
    };
    spec.layers.iter().map(of_layer).collect()
}

#[test]
fn kinds_of_layers_are_read_in_every_spelling() {
    assert_eq!(layers(json!({})), [('a', true), ('a', true), ('a', true), ('c', false)]);
    // One more for a layer that predicts further ahead.
    let ratios = json!({"compress_ratios": [0, 4, 128, 4, 0], "num_hash_layers": 1});
    assert_eq!(layers(ratios), [('l', true), ('c', false), ('a', false), ('c', false)]);
    let sparse = "compressed_sparse_attention";
    let types = json!({
        "layer_types": [sparse, "sliding_attention", "heavily_compressed_attention", sparse],
        "compress_ratios": [0, 0, 0, 0], "mlp_layer_types": ["moe", "hash_moe", "moe", "moe"],
    });
    assert_eq!(layers(types), [('c', false), ('l', true), ('a', false), ('c', false)]);
}

#[test]
fn yarn_is_of_layers_with_entries_and_keeps_the_magnitude_of_angles() {
    let yarn = json!({"type": "yarn", "factor": 16, "original_max_position_embeddings": 64, "beta_fast": 32});
    let nested = json!({
        "main": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        "compress": {"rope_type": "yarn", "rope_theta": 1.6e5, "factor": 16, "original_max_position_embeddings": 64,
            "beta_fast": 32, "attention_factor": 1.0},
    });
    let flat = from_config(&config(json!({"compress_ratios": [0, 4, 128, 4], "rope_scaling": yarn}))).unwrap();
    let same = from_config(&config(json!({"compress_ratios": [0, 4, 128, 4], "rope_parameters": nested}))).unwrap();
    let ropes = |spec: &crate::model::ModelSpec| {
        let positions = spec.layers.iter().map(|layer| layer.position.clone());
        positions.collect::<Vec<_>>()
    };
    assert_eq!(ropes(&flat), ropes(&same));
    let Position::Rope(main) = &flat.layers[0].position else { panic!("rotation") };
    assert_eq!((main.theta, main.rotated, &main.scaling), (1e4, 4, &RopeScaling::None));
    let Position::Rope(compress) = &flat.layers[1].position else { panic!("rotation") };
    let RopeScaling::Yarn { attention_factor, .. } = compress.scaling else { panic!("YaRN") };
    assert_eq!((compress.theta, attention_factor), (1.6e5, 1.0));
}

/// Layers that predict further ahead have a name of their own.
#[test]
fn layers_that_predict_further_tokens_are_passed_over_by_name() {
    let config = config(json!({"compress_ratios": [0, 4, 128, 4]}));
    let with = |name: &str| answer_of(&config, |tensors| drop(tensors.insert(name.into(), vec![8])));
    assert_eq!(with("mtp.0.attn.wkv.weight"), "fits");
    for other in ["mtp_norm.weight", "layers.4.attn.wkv.weight", "layers.0.attn.norm.weight"] {
        assert!(with(other).contains(other), "{other}");
    }
}

/// Every module is found again from what transformers calls it, and no two are called the same.
#[test]
fn names_of_transformers_are_those_of_one_module_each() {
    let spec = from_config(&config(json!({"compress_ratios": [0, 4, 128, 4]}))).unwrap();
    let mut called = BTreeSet::new();
    for site in spec.sites() {
        assert!(called.insert(site.name.clone()), "{}", site.name);
        let found = spec.names.spec_names(&site.name).next().unwrap();
        assert_eq!(spec.names.module(&found), site.name);
        let tensors = spec.tensors();
        let weight = format!("{}.weight", found.replacen('*', "0", 1));
        assert!(tensors.contains_key(&weight), "{} is {weight}", site.name);
    }
    for name in [
        "model.layers.1.self_attn.compressor.indexer.q_b_proj",
        "model.layers.1.self_attn.compressor.indexer.kv_proj",
        "model.layers.1.self_attn.compressor.indexer.scorer.weights_proj",
        "model.layers.2.self_attn.compressor.gate_proj",
        "model.layers.0.self_attn.o_a_proj",
        "model.layers.0.mlp.shared_experts.up_proj",
        "lm_head",
    ] {
        assert!(called.contains(name), "{name}: {called:?}");
    }
}

#[test]
fn what_cannot_be_computed_is_refused_with_both_values() {
    let cases = [
        (json!({"scoring_func": "sigmoid"}), r#"scoring_func: "sigmoid" found, "sqrtsoftplus" expected"#),
        (json!({"num_key_value_heads": 2}), "num_key_value_heads: 2 found, 1 expected"),
        (json!({"n_shared_experts": 2}), "n_shared_experts: 2 found, 1 expected"),
        (json!({"norm_topk_prob": false}), "norm_topk_prob: false found, true expected"),
        (json!({"attention_bias": true}), "attention_bias: true found, false expected"),
        (json!({"hidden_act": "gelu"}), r#"hidden_act: "gelu" found, "silu" expected"#),
        (json!({"o_groups": 3}), "o_groups: 3 does not divide num_attention_heads = 8"),
        (json!({"qk_rope_head_dim": 5}), "5 of 16 elements rotate"),
        (json!({"index_head_dim": 2}), "of 2 of the indexer's"),
        (json!({"hc_mult": 100_000}), "hc_mult: 100000 copies"),
        (json!({"num_experts_per_tok": 9}), "9 experts for each token, but there are 8"),
        (json!({"n_routed_experts": 1 << 20}), "n_routed_experts: 1048576 experts"),
        (json!({"intermediate_size": 13}), "intermediate_size: is 13, but moe_intermediate_size"),
        (json!({"compress_ratios": [0, 4, 8, 4]}), "compress_ratios: 8 found, 0, 4 or 128 expected"),
        (json!({"compress_ratios": [0, 4, 4]}), "a list of 4 or more expected"),
        (json!({"mlp_layer_types": ["moe", "moe", "moe", "dense"]}), r#""dense" found, hash_moe or moe"#),
        (json!({"router_jitter_noise": 0.1}), "router_jitter_noise"),
        (json!({"kv_lora_rank": 512}), "kv_lora_rank"),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 2.0}}),
            r#"rope_scaling.type: "linear" found, default or yarn expected"#,
        ),
        (
            json!({"rope_parameters": {"main": {"rope_theta": 1e4}, "compress": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}}),
            "rope_parameters.compress.partial_rotary_factor: 8 elements rotate, 4 by the other fields",
        ),
    ];
    for (change, expected) in cases {
        let found = fault(change.clone());
        assert!(found.contains(expected), "{change}: {found}");
    }
}

#[test]
fn what_transformers_has_read_and_saved_is_found_under_its_names() {
    let mut names = from_config(&config(json!({}))).unwrap().names;
    names.layout = 2;
    for (own, saved) in [
        ("embed.weight", "model.embed_tokens.weight"),
        ("head.weight", "head.weight"),
        ("hc_head_fn", "model.hc_head.hc_fn"),
        ("norm.weight", "model.norm.weight"),
        ("layers.3.attn.kv_norm.weight", "model.layers.3.attn.norm.weight"),
        ("layers.3.ffn.experts.7.w1.weight", "model.layers.3.ffn.experts.7.w1.weight"),
    ] {
        assert_eq!(names.stored(own), saved);
        assert!(names.spec_names(saved).any(|name| name == own), "{saved}");
    }
}
