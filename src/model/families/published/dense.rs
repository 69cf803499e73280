//! Models of one feed-forward in each layer.

use serde_json::json;

use super::Published;

pub(super) fn models() -> Vec<Published> {
    vec![
        (
            "Llama-2-7b",
            6_738_415_616,
            json!({
                "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11_008,
                "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
                "rms_norm_eps": 1e-5, "rope_scaling": null, "tie_word_embeddings": false, "vocab_size": 32_000,
            }),
            vec![],
        ),
        (
            "Yi-6B",
            6_061_035_520,
            json!({
                "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11_008,
                "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 4,
                "rms_norm_eps": 1e-5, "rope_scaling": null, "rope_theta": 5_000_000.0, "tie_word_embeddings": false,
                "vocab_size": 64_000,
            }),
            vec![],
        ),
        (
            "Mistral-7B-v0.1",
            7_241_732_096,
            json!({
                "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14_336,
                "max_position_embeddings": 32_768, "num_attention_heads": 32, "num_hidden_layers": 32,
                "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "sliding_window": 4096,
                "tie_word_embeddings": false, "vocab_size": 32_000,
            }),
            vec![json!({"attention_chunk_size": 8192}), json!({"num_local_experts": 8})],
        ),
        (
            "Mistral-Nemo",
            12_247_782_400,
            json!({
                "model_type": "mistral", "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
                "intermediate_size": 14_336, "max_position_embeddings": 131_072, "num_attention_heads": 32,
                "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0,
                "sliding_window": null, "tie_word_embeddings": false, "vocab_size": 131_072,
            }),
            vec![],
        ),
        (
            "Qwen3-0.6B",
            596_049_920,
            json!({
                "model_type": "qwen3", "attention_bias": false, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
                "intermediate_size": 3072, "max_position_embeddings": 40_960, "max_window_layers": 28,
                "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
                "rope_scaling": null, "rope_theta": 1_000_000, "sliding_window": null, "tie_word_embeddings": true,
                "use_sliding_window": false, "vocab_size": 151_936,
            }),
            vec![json!({"qk_norm": true}), json!({"partial_rotary_factor": 0.5})],
        ),
        (
            "gemma-2b",
            2_506_172_416,
            json!({
                "model_type": "gemma", "attention_bias": false, "head_dim": 256, "hidden_act": "gelu",
                "hidden_activation": null, "hidden_size": 2048, "intermediate_size": 16_384, "max_position_embeddings": 8192,
                "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
                "rope_scaling": null, "rope_theta": 10_000.0, "vocab_size": 256_000,
            }),
            vec![json!({"use_bidirectional_attention": true})],
        ),
        (
            "Phi-4",
            14_659_507_200,
            json!({
                "model_type": "phi3", "attention_bias": false, "embd_pdrop": 0.0, "hidden_act": "silu", "hidden_size": 5120,
                "intermediate_size": 17_920, "max_position_embeddings": 16_384, "num_attention_heads": 40,
                "num_hidden_layers": 40, "num_key_value_heads": 10, "original_max_position_embeddings": 16_384,
                "resid_pdrop": 0.0, "rms_norm_eps": 1e-5, "rope_scaling": null, "rope_theta": 250_000, "sliding_window": null,
                "tie_word_embeddings": false, "vocab_size": 100_352,
            }),
            vec![],
        ),
        (
            "gpt-neox-20b",
            20_554_567_680,
            json!({
                "model_type": "gpt_neox", "attention_probs_dropout_prob": 0, "hidden_act": "gelu_fast",
                "hidden_dropout_prob": 0, "hidden_size": 6144, "intermediate_size": 24_576, "layer_norm_eps": 1e-5,
                "max_position_embeddings": 2048, "num_attention_heads": 64, "num_hidden_layers": 44, "rotary_emb_base": 10_000,
                "rotary_pct": 0.25, "tie_word_embeddings": false, "use_parallel_residual": true, "vocab_size": 50_432,
            }),
            vec![],
        ),
        (
            "falcon-40b",
            41_303_293_952,
            json!({
                "model_type": "falcon", "alibi": false, "apply_residual_connection_post_layernorm": false, "bias": false,
                "hidden_dropout": 0.0, "hidden_size": 8192, "layer_norm_epsilon": 1e-5, "multi_query": true,
                "new_decoder_architecture": true, "num_attention_heads": 128, "num_hidden_layers": 60, "num_kv_heads": 8,
                "parallel_attn": true, "vocab_size": 65_024,
            }),
            vec![json!({"parallel_attn": false})],
        ),
        (
            "falcon-rw-1b",
            1_311_625_216,
            json!({
                "model_type": "falcon", "alibi": true, "apply_residual_connection_post_layernorm": false, "bias": true,
                "hidden_dropout": 0.0, "hidden_size": 2048, "layer_norm_epsilon": 1e-5, "multi_query": false,
                "new_decoder_architecture": false, "num_attention_heads": 32, "num_hidden_layers": 24, "parallel_attn": false,
                "vocab_size": 50_304,
            }),
            vec![],
        ),
        (
            "falcon-11B",
            11_102_822_400,
            json!({
                "model_type": "falcon", "activation": "gelu", "alibi": false, "bias": false, "ff_factor": 4,
                "ffn_hidden_size": 16_384, "hidden_dropout": 0.0, "hidden_size": 4096, "layer_norm_epsilon": 1e-5,
                "max_position_embeddings": 8192, "multi_query": true, "new_decoder_architecture": true,
                "num_attention_heads": 32, "num_hidden_layers": 60, "num_kv_heads": 8, "num_ln_in_parallel_attn": 1,
                "parallel_attn": true, "rope_scaling": null, "rope_theta": 500_042.0, "tie_word_embeddings": false,
                "vocab_size": 65_024,
            }),
            vec![],
        ),
        (
            "GLM-4-9B",
            9_399_951_360,
            json!({
                "model_type": "glm", "attention_bias": true, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
                "intermediate_size": 13_696, "max_position_embeddings": 131_072, "num_attention_heads": 32,
                "num_hidden_layers": 40, "num_key_value_heads": 2, "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-7,
                "rope_theta": 10_000.0, "tie_word_embeddings": false, "vocab_size": 151_552,
            }),
            vec![json!({"add_qkv_bias": true}), json!({"use_qk_norm": true})],
        ),
        (
            "GLM-4-9B-0414",
            9_400_279_040,
            json!({
                "model_type": "glm4", "attention_bias": true, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
                "intermediate_size": 13_696, "max_position_embeddings": 32_768, "num_attention_heads": 32,
                "num_hidden_layers": 40, "num_key_value_heads": 2, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5,
                "rope_theta": 10_000.0, "tie_word_embeddings": false, "vocab_size": 151_552,
            }),
            vec![],
        ),
        (
            "Granite-3.1-2B",
            2_533_531_648,
            json!({
                "model_type": "granite", "attention_bias": false, "attention_dropout": 0.1, "attention_multiplier": 0.015625,
                "embedding_multiplier": 12.0, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
                "logits_scaling": 8.0, "max_position_embeddings": 131_072, "mlp_bias": false, "num_attention_heads": 32,
                "num_hidden_layers": 40, "num_key_value_heads": 8, "residual_multiplier": 0.22, "rms_norm_eps": 1e-5,
                "rope_scaling": null, "rope_theta": 5_000_000.0, "tie_word_embeddings": true, "vocab_size": 49_155,
            }),
            vec![json!({"num_local_experts": 40})],
        ),
        (
            "OLMo-3-7B",
            7_298_011_136,
            json!({
                "model_type": "olmo3", "attention_bias": false, "hidden_act": "silu", "hidden_size": 4096,
                "intermediate_size": 11_008,
                "layer_types": (1..=32).map(|i| if i % 4 == 0 { "full_attention" } else { "sliding_attention" }).collect::<Vec<_>>(),
                "max_position_embeddings": 65_536, "num_attention_heads": 32, "num_hidden_layers": 32,
                "num_key_value_heads": 32, "rms_norm_eps": 1e-6,
                "rope_scaling": {
                    "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
                    "original_max_position_embeddings": 8192, "rope_type": "yarn",
                },
                "rope_theta": 500_000, "sliding_window": 4096, "tie_word_embeddings": false, "vocab_size": 100_278,
            }),
            vec![json!({"clip_qkv": 8.0})],
        ),
        (
            "Command R",
            34_980_831_232,
            json!({
                "model_type": "cohere", "attention_bias": false, "hidden_act": "silu", "hidden_size": 8192,
                "intermediate_size": 22_528, "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "max_position_embeddings": 8192,
                "model_max_length": 131_072, "num_attention_heads": 64, "num_hidden_layers": 40, "num_key_value_heads": 64,
                "rope_theta": 8_000_000.0, "vocab_size": 256_000,
            }),
            vec![json!({"layer_types": ["full_attention"]})],
        ),
        (
            "Command R+",
            103_810_674_688,
            json!({
                "model_type": "cohere", "attention_bias": false, "hidden_act": "silu", "hidden_size": 12_288,
                "intermediate_size": 33_792, "layer_norm_eps": 1e-5, "logit_scale": 0.8333333333333334,
                "max_position_embeddings": 8192, "model_max_length": 131_072, "num_attention_heads": 96,
                "num_hidden_layers": 64, "num_key_value_heads": 8, "rope_theta": 75_000_000.0, "use_qk_norm": true,
                "vocab_size": 256_000,
            }),
            vec![],
        ),
        (
            "Command A",
            111_057_580_032,
            json!({
                "model_type": "cohere2", "attention_bias": false, "cache_implementation": "hybrid", "head_dim": 128,
                "hidden_act": "silu", "hidden_size": 12_288, "intermediate_size": 36_864, "layer_norm_eps": 1e-5,
                "layer_switch": 4, "logit_scale": 0.25, "max_position_embeddings": 131_072, "num_attention_heads": 96,
                "num_hidden_layers": 64, "num_key_value_heads": 8, "order_of_interleaved_layers": "local_attn_first",
                "position_embedding_type": "rope_gptj", "rope_scaling": null, "rope_theta": 50_000, "rotary_pct": 1.0,
                "sliding_window": 4096, "sliding_window_pattern": 4, "use_embedding_sharing": true,
                "use_gated_activation": true, "use_parallel_block": true, "use_parallel_embedding": true,
                "vocab_size": 256_000,
            }),
            vec![],
        ),
        (
            "stablelm-2-1.6b",
            1_644_515_328,
            json!({
                "model_type": "stablelm", "hidden_act": "silu", "hidden_dropout": 0.0, "hidden_size": 2048,
                "intermediate_size": 5632, "layer_norm_eps": 1e-5, "max_position_embeddings": 4096, "num_attention_heads": 32,
                "num_hidden_layers": 24, "num_key_value_heads": 32, "partial_rotary_factor": 0.25, "qk_layernorm": false,
                "rope_scaling": null, "rope_theta": 10_000, "tie_word_embeddings": false, "use_parallel_residual": false,
                "use_qkv_bias": true, "vocab_size": 100_352,
            }),
            vec![],
        ),
    ]
}
