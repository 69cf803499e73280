//! Configs as models are published with them: read with all that they say besides, to models of as many numbers as these have; and
//! refused where they say something else.

mod dense;
mod experts;
mod larger;

use serde_json::{Value, json};

use super::from_config;

/// What most configs say besides.
fn besides() -> Value {
    json!({
        "architectures": ["SomeForCausalLM"], "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_some.SomeConfig"},
        "bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": null, "initializer_range": 0.02, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": true, "_name_or_path": "some/where", "unsloth_fixed": true,
        "transformers.js_config": {"dtype": "q4"}, "pretraining_tp": 4, "torchscript": false, "pruned_heads": {}, "num_beams": 1,
        "tf_legacy_loss": false, "use_bfloat16": false, "add_cross_attention": false, "cross_attention_hidden_size": null,
        "encoder_repetition_penalty": 1.0, "gradient_checkpointing": false, "is_decoder": false, "tie_encoder_decoder": false,
        "diversity_penalty": 0.0, "remove_invalid_values": false, "top_p": 1.0, "typical_p": 1.0, "is_causal": true,
    })
}

/// What transformers says of every model, and most files of the language model.
fn besides_text() -> Value {
    json!({
        "attention_dropout": 0.0, "dtype": "bfloat16", "initializer_range": 0.02, "use_cache": true, "output_attentions": false,
        "output_hidden_states": false, "return_dict": true, "chunk_size_feed_forward": 0, "is_encoder_decoder": false,
        "problem_type": null, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    })
}

fn with(mut config: Value, more: Value) -> Value {
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

/// The same said of the language model, which may be a part of what the config tells of.
fn with_text(mut config: Value, more: Value) -> Value {
    match config.get_mut("text_config") {
        Some(text) => *text = with(text.take(), more),
        None => config = with(config, more),
    }
    config
}

/// Name, numbers of the language model, config, and fields that make it another model.
type Published = (&'static str, i64, Value, Vec<Value>);

fn models() -> Vec<Published> {
    [firsts(), dense::models(), experts::models(), larger::models()].concat()
}

fn firsts() -> Vec<Published> {
    let changed = |fields: &[Value]| fields.to_vec();
    vec![
        (
            "Llama-3.2-1B",
            1_235_814_400,
            json!({
                "model_type": "llama", "attention_bias": false, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
                "intermediate_size": 8192, "max_position_embeddings": 131_072, "mlp_bias": false, "num_attention_heads": 32,
                "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
                "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                    "original_max_position_embeddings": 8192, "rope_type": "llama3"},
                "tie_word_embeddings": true, "vocab_size": 128_256,
            }),
            changed(&[
                json!({"rope_interleaved": true}),
                json!({"norm_type": "layernorm"}),
                json!({"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "partial_rotary_factor": 0.5}}),
                json!({"sliding_window": 4096}),
                json!({"qk_norm": true}),
                json!({"num_experts": 8}),
            ]),
        ),
        (
            "SmolLM2-135M",
            134_515_008,
            json!({
                "model_type": "llama", "attention_bias": false, "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536,
                "is_llama_config": true, "max_position_embeddings": 8192, "mlp_bias": false, "num_attention_heads": 9,
                "num_hidden_layers": 30, "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "rope_interleaved": false,
                "rope_scaling": null, "rope_theta": 100_000, "tie_word_embeddings": true, "vocab_size": 49_152,
            }),
            vec![],
        ),
        (
            "Falcon3-7B",
            7_455_550_464,
            json!({
                "model_type": "llama", "activation": "swiglu", "attention_bias": false, "head_dim": 256, "hidden_act": "silu",
                "hidden_size": 3072, "intermediate_size": 23_040, "max_position_embeddings": 32_768, "mlp_bias": false,
                "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
                "rope_scaling": null, "rope_theta": 1_000_042, "tie_word_embeddings": false, "vocab_size": 131_072,
            }),
            changed(&[json!({"activation": "geglu"})]),
        ),
        (
            "MobileLLM-125M",
            124_635_456,
            json!({
                "model_type": "mobilellm", "attention_bias": false, "head_dim": 64, "hidden_act": "silu", "hidden_size": 576,
                "intermediate_size": 1536, "layer_sharing": false, "max_position_embeddings": 2048, "mlp_bias": false,
                "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
                "rope_scaling": null, "rope_theta": 10_000.0, "share_embedding": true, "tie_word_embeddings": false,
                "vocab_size": 32_000,
            }),
            vec![],
        ),
        (
            "Qwen2.5-0.5B with a long context",
            494_032_768,
            json!({
                "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
                "max_position_embeddings": 32_768, "max_window_layers": 21, "num_attention_heads": 14, "num_hidden_layers": 24,
                "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "sliding_window": 32_768,
                "tie_word_embeddings": true, "use_mrope": false, "use_sliding_window": false, "vocab_size": 151_936,
                "dual_chunk_attention_config": {"chunk_size": 262_144, "local_size": 8192},
            }),
            changed(&[json!({"use_mrope": true})]),
        ),
        (
            "Qwen3-30B-A3B",
            30_532_122_624,
            json!({
                "model_type": "qwen3_moe", "attention_bias": false, "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu",
                "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40_960, "max_window_layers": 48,
                "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": true, "num_attention_heads": 32,
                "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
                "output_router_logits": false, "rms_norm_eps": 1e-6, "rope_scaling": null, "rope_theta": 1_000_000.0,
                "router_aux_loss_coef": 0.001, "sliding_window": null, "tie_word_embeddings": false,
                "use_sliding_window": false, "vocab_size": 151_936,
            }),
            changed(&[json!({"shared_expert_intermediate_size": 512}), json!({"n_group": 8})]),
        ),
        (
            "SmolLM3-3B",
            3_075_098_624,
            json!({
                "model_type": "smollm3", "attention_bias": false, "hidden_act": "silu", "hidden_size": 2048,
                "intermediate_size": 11_008, "layer_types": vec!["full_attention"; 36], "max_position_embeddings": 65_536,
                "max_window_layers": 28, "mlp_bias": false, "no_rope_layer_interval": 4,
                "no_rope_layers": (1..=36).map(|i| i32::from(i % 4 != 0)).collect::<Vec<_>>(), "num_attention_heads": 16,
                "num_hidden_layers": 36, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_scaling": null,
                "rope_theta": 5_000_000.0, "sliding_window": null, "use_sliding_window": false, "vocab_size": 128_256,
            }),
            vec![],
        ),
        (
            "gemma-2-2b",
            2_614_341_888,
            json!({
                "model_type": "gemma2", "attention_bias": false, "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
                "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
                "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216,
                "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4,
                "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "sliding_window": 4096,
                "sliding_window_size": 4096, "vocab_size": 256_000,
            }),
            changed(&[json!({"use_bidirectional_attention": true}), json!({"rope_local_base_freq": 5.0})]),
        ),
        (
            "gemma-3-270m",
            268_098_176,
            json!({
                "model_type": "gemma3_text", "_sliding_window_pattern": 6, "attention_bias": false,
                "attn_logit_softcapping": null, "final_logit_softcapping": null, "head_dim": 256,
                "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 640, "intermediate_size": 2048,
                "layer_types": (1..=18).map(|i| if i % 6 == 0 { "full_attention" } else { "sliding_attention" }).collect::<Vec<_>>(),
                "max_position_embeddings": 32_768, "num_attention_heads": 4, "num_hidden_layers": 18, "num_key_value_heads": 1,
                "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10_000.0, "rope_scaling": null,
                "rope_theta": 1_000_000.0, "sliding_window": 512, "use_bidirectional_attention": false, "vocab_size": 262_144,
            }),
            changed(&[json!({"use_bidirectional_attention": true})]),
        ),
        (
            "Phi-3-mini-4k",
            3_821_079_552,
            json!({
                "model_type": "phi3", "attention_bias": false, "embd_pdrop": 0.0, "hidden_act": "silu", "hidden_size": 3072,
                "intermediate_size": 8192, "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
                "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "resid_pdrop": 0.0, "rms_norm_eps": 1e-5,
                "rope_scaling": null, "rope_theta": 10_000.0, "sliding_window": 2047, "tie_word_embeddings": false,
                "vocab_size": 32_064,
            }),
            changed(&[json!({"attention_bias": true}), json!({"lm_head_bias": true}), json!({"mlp_bias": true})]),
        ),
        (
            "Phi-4-mini",
            3_836_021_760,
            json!({
                "model_type": "phi3", "attention_bias": false, "embd_pdrop": 0.0, "full_attn_mod": 1, "hidden_act": "silu",
                "hidden_size": 3072, "intermediate_size": 8192, "interpolate_factor": 1, "lm_head_bias": false,
                "max_position_embeddings": 131_072, "mlp_bias": false, "num_attention_heads": 24, "num_hidden_layers": 32,
                "num_key_value_heads": 8, "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
                "resid_pdrop": 0.0, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "sliding_window": 262_144,
                "rope_scaling": {"long_factor": vec![2.0; 48], "short_factor": vec![1.0; 48], "type": "longrope"},
                "tie_word_embeddings": true, "vocab_size": 200_064,
            }),
            changed(&[json!({"full_attn_mod": 2})]),
        ),
        (
            "Phi-3.5-MoE",
            41_873_153_344,
            json!({
                "model_type": "phimoe", "attention_bias": true, "hidden_act": "silu", "hidden_dropout": 0.0, "hidden_size": 4096,
                "input_jitter_noise": 0.01, "intermediate_size": 6400, "lm_head_bias": true, "max_position_embeddings": 131_072,
                "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
                "num_local_experts": 16, "original_max_position_embeddings": 4096, "output_router_logits": false,
                "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.01,
                "rope_scaling": {"long_factor": vec![2.0; 64], "long_mscale": 1.243, "original_max_position_embeddings": 4096,
                    "short_factor": vec![1.0; 64], "short_mscale": 1.243, "type": "longrope"},
                "sliding_window": 131_072, "tie_word_embeddings": false, "vocab_size": 32_064,
            }),
            vec![],
        ),
        (
            "gpt-oss-20b",
            20_914_757_184,
            json!({
                "model_type": "gpt_oss", "attention_bias": true, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu",
                "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880, "max_position_embeddings": 131_072,
                "layer_types": (0..24).map(|i| if i % 2 == 0 { "sliding_attention" } else { "full_attention" }).collect::<Vec<_>>(),
                "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
                "num_local_experts": 32, "output_router_logits": false, "rms_norm_eps": 1e-5, "rope_theta": 150_000,
                "quantization_config": {"quant_method": "mxfp4"},
                "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                    "rope_type": "yarn", "truncate": false},
                "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": false,
                "vocab_size": 201_088,
            }),
            changed(&[json!({"swiglu_limit": 5.0}), json!({"hidden_act": "gelu"}), json!({"experts_per_token": 2})]),
        ),
        (
            "DeepSeek-V2-Lite",
            15_706_484_224,
            json!({
                "model_type": "deepseek_v2", "attention_bias": false, "aux_loss_alpha": 0.001, "ep_size": 1,
                "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10_944,
                "kv_lora_rank": 512, "max_position_embeddings": 163_840, "moe_intermediate_size": 1408, "moe_layer_freq": 1,
                "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": false, "num_attention_heads": 16,
                "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": null,
                "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 10_000,
                "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                    "original_max_position_embeddings": 4096, "type": "yarn"},
                "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": true, "tie_word_embeddings": false,
                "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102_400,
            }),
            changed(&[json!({"scoring_func": "sigmoid"}), json!({"moe_layer_freq": 2}), json!({"index_topk": 2048})]),
        ),
        (
            "pythia-70m",
            70_426_624,
            json!({
                "model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 512, "intermediate_size": 2048,
                "layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "num_attention_heads": 8, "num_hidden_layers": 6,
                "rotary_emb_base": 10_000, "rotary_pct": 0.25, "tie_word_embeddings": false, "use_parallel_residual": true,
                "vocab_size": 50_304, "attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0,
            }),
            vec![],
        ),
        (
            "falcon-7b",
            6_921_720_704,
            json!({
                "model_type": "falcon", "alibi": false, "apply_residual_connection_post_layernorm": false, "bias": false,
                "hidden_dropout": 0.0, "hidden_size": 4544, "layer_norm_epsilon": 1e-5, "multi_query": true,
                "new_decoder_architecture": false, "num_attention_heads": 71, "num_hidden_layers": 32, "num_kv_heads": 71,
                "parallel_attn": true, "vocab_size": 65_024,
            }),
            changed(&[
                json!({"apply_residual_connection_post_layernorm": true}),
                json!({"activation": "relu2"}),
                json!({"num_ln_in_parallel_attn": 2}),
            ]),
        ),
        (
            "bloom-560m",
            559_214_592,
            json!({
                "model_type": "bloom", "apply_residual_connection_post_layernorm": false, "attention_softmax_in_fp32": true,
                "bias_dropout_fusion": true, "hidden_dropout": 0.0, "layer_norm_epsilon": 1e-5, "masked_softmax_fusion": true,
                "n_embed": 1024, "n_head": 16, "n_inner": null, "n_layer": 24, "num_attention_heads": 16, "offset_alibi": 100,
                "seq_length": 2048, "skip_bias_add": true, "skip_bias_add_qkv": false, "slow_but_exact": false, "unk_token_id": 0,
                "vocab_size": 250_880,
            }),
            changed(&[json!({"skip_bias_add_qkv": true}), json!({"n_inner": 2048})]),
        ),
        (
            "starcoder2-3b",
            3_030_371_328,
            json!({
                "model_type": "starcoder2", "attention_dropout": 0.1, "attention_softmax_in_fp32": true, "embedding_dropout": 0.1,
                "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3072, "intermediate_size": 12_288, "layer_norm_epsilon": 1e-5,
                "max_position_embeddings": 16_384, "mlp_type": "default", "norm_epsilon": 1e-5, "norm_type": "layer_norm",
                "num_attention_heads": 24, "num_hidden_layers": 30, "num_key_value_heads": 2, "residual_dropout": 0.1,
                "rope_theta": 999_999.44, "scale_attention_softmax_in_fp32": true, "scale_attn_weights": true,
                "sliding_window": 4096, "use_bias": true, "vocab_size": 49_152,
            }),
            changed(&[
                json!({"norm_type": "rms_norm"}),
                json!({"mlp_type": "gated"}),
                json!({"scale_attn_weights": false}),
            ]),
        ),
        (
            "Command R7B",
            8_028_033_024,
            json!({
                "model_type": "cohere2", "attention_bias": false, "cache_implementation": "hybrid", "head_dim": 128,
                "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14_336, "layer_norm_eps": 1e-5, "layer_switch": 4,
                "logit_scale": 0.25, "max_position_embeddings": 132_096, "num_attention_heads": 32, "num_hidden_layers": 32,
                "num_key_value_heads": 8, "order_of_interleaved_layers": "local_attn_first",
                "position_embedding_type": "rope_gptj", "rope_scaling": null, "rope_theta": 50_000, "rotary_pct": 1.0,
                "sliding_window": 4096, "sliding_window_pattern": 4, "use_embedding_sharing": true, "use_gated_activation": true,
                "use_parallel_block": true, "use_parallel_embedding": true, "vocab_size": 256_000,
            }),
            changed(&[
                json!({"use_parallel_block": false}),
                json!({"position_embedding_type": "rope_neox"}),
                json!({"rotary_pct": 0.5}),
                json!({"layer_switch": 2}),
                json!({"use_qk_norm": true}),
            ]),
        ),
        (
            "phi-2",
            2_779_683_840,
            json!({
                "model_type": "phi", "embd_pdrop": 0.0, "hidden_act": "gelu_new", "hidden_size": 2560, "intermediate_size": 10_240,
                "layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 32,
                "num_key_value_heads": 32, "partial_rotary_factor": 0.4, "qk_layernorm": false, "resid_pdrop": 0.1,
                "rope_scaling": null, "rope_theta": 10_000.0, "tie_word_embeddings": false, "vocab_size": 51_200,
            }),
            vec![],
        ),
        (
            "OLMo-2-7B",
            7_298_617_344,
            json!({
                "model_type": "olmo2", "attention_bias": false, "hidden_act": "silu", "hidden_size": 4096,
                "intermediate_size": 11_008, "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
                "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "rope_scaling": null, "rope_theta": 500_000,
                "tie_word_embeddings": false, "vocab_size": 100_352,
            }),
            changed(&[json!({"clip_qkv": 8.0})]),
        ),
    ]
}

#[test]
fn published_configs_are_read_with_all_they_say() {
    for (name, numbers, config, _) in models() {
        let spec = from_config(&with(besides(), with_text(config, besides_text())))
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let found: i64 = spec.tensors().values().map(|shape| shape.iter().product::<i64>()).sum();
        assert_eq!(found, numbers, "{name}");
    }
}

#[track_caller]
fn fault(name: &str, config: Value) -> String {
    from_config(&config).map(|_| ()).expect_err(name).to_string()
}

/// A number that a page asks for where it is 1, or that is a factor of once.
#[test]
fn once_asks_for_what_is_more_than_a_factor() {
    let llama = || models().into_iter().next().unwrap().2;
    for field in ["attn_temperature_tuning", "num_hash_layers", "num_local_experts", "num_nextn_predict_layers"] {
        let error = fault(field, with(llama(), json!({ field: 1 })));
        assert!(error.contains(field) && error.contains("not supported for this model_type"), "{error}");
    }
    for field in ["attn_logit_softcapping", "attention_multiplier", "clip_qkv", "query_pre_attn_scalar"] {
        assert!(fault(field, with(llama(), json!({ field: 1.0 }))).contains(field));
    }
    for field in
        ["residual_multiplier", "logit_scale", "partial_rotary_factor", "rotary_pct", "full_attention_interval"]
    {
        for once in [json!(1), json!(1.0)] {
            assert!(from_config(&with(llama(), json!({ field: once }))).is_ok(), "{field}");
        }
    }
}

#[test]
fn a_field_that_asks_for_another_model_is_an_error_that_names_it() {
    for (name, _, config, changes) in models() {
        for change in changes {
            let field = change.as_object().unwrap().keys().next().unwrap().clone();
            let error = fault(name, with_text(config.clone(), change));
            assert!(error.contains(&format!("config.json: {field}")), "{name}: {error}");
        }
        // Whatever its name; a whole 1 is a yes, and a no to what models have that do not say is one to this model.
        for (field, value) in [
            ("norm_placement", json!(0.5)),
            ("residual_scale", json!(0.5)),
            ("use_some_gate", json!(true)),
            ("use_some_gate", json!(1)),
            ("use_causal_mask", json!(false)),
            ("causal", json!(0)),
        ] {
            let error = fault(name, with_text(config.clone(), json!({ field: value })));
            assert!(error.contains(field) && error.contains("is not understood"), "{name}: {error}");
        }
        // transformers goes by the truth of this one in every config, and null is none.
        for value in [json!(false), json!(0), json!(null)] {
            let said = json!({ "is_causal": value });
            for config in [with(config.clone(), said.clone()), with_text(config.clone(), said)] {
                let error = fault(name, config);
                assert!(error.contains("is_causal") && error.contains("attention to later tokens"), "{name}: {error}");
            }
        }
        assert!(from_config(&with_text(config, json!({"is_causal": true}))).is_ok(), "{name}");
    }
}

#[test]
fn what_a_base_was_trained_with_is_said_not_refused() {
    let said = super::notices(&json!({"attention_dropout": 0.1, "resid_pdrop": 0.0, "hidden_size": 8}));
    assert!(
        said.len() == 1 && said[0].contains("attention_dropout 0.1") && !said[0].contains("resid_pdrop"),
        "{said:?}"
    );
    assert_eq!(super::notices(&json!({"attention_dropout": 0.0})), Vec::<String>::new());
    assert_eq!(super::notices(&json!({"text_config": {"hidden_dropout": 0.2}})).len(), 1);
}

/// Of the losses that balance experts, and of experts that are drawn.
#[test]
fn what_routers_were_trained_with_is_said_where_it_is_not_done() {
    let said = |name: &str, more: Value| {
        let (.., config, _) = models().into_iter().find(|(known, ..)| *known == name).unwrap();
        super::notices(&with_text(config, more)).join("; ")
    };
    for name in ["DeepSeek-V2-Lite", "DeepSeek-V3"] {
        let found = said(name, json!({}));
        assert!(found.contains("(aux_loss_alpha 0.001)") && found.contains("training.router_aux_loss_coef"), "{found}");
        assert_eq!(said(name, json!({"aux_loss_alpha": 0.0})), "");
        assert_eq!(said(name, json!({"first_k_dense_replace": 61})), "", "no layer has experts");
    }
    // Written by transformers whether it is used or not; not added where it is used, and added.
    assert_eq!(said("Llama-4-Scout", json!({})), "");
    assert!(said("Llama-4-Scout", json!({"output_router_logits": true})).contains("(router_aux_loss_coef 0.001)"));
    assert_eq!(said("Mixtral-8x7B", json!({"output_router_logits": true})), "");
    assert!(said("Phi-3.5-MoE", json!({})).contains("SparseMixer"));
    assert!(!said("Mixtral-8x7B", json!({})).contains("SparseMixer"));
}

#[test]
fn an_unknown_model_type_is_told_with_what_its_config_asks_for() {
    let config =
        json!({"model_type": "mamba2", "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "conv_kernel": 4});
    let error = from_config(&config).unwrap_err().to_string();
    for part in ["'mamba2' is not supported", "state_size", "conv_kernel", "qwen3_moe"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(!error.contains("hidden_size"), "{error}");
}
