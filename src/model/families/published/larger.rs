//! Larger models, with the language model as a part; numbers without the head where the config does not say whether it is tied.

use serde_json::json;

use super::Published;

pub(super) fn models() -> Vec<Published> {
    vec![
        (
            "Mistral Small 3.1",
            22_901_314_560,
            json!({
                "model_type": "mistral3", "image_token_index": 10, "multimodal_projector_bias": false,
                "projector_hidden_act": "gelu", "spatial_merge_size": 2,
                "text_config": {
                    "model_type": "mistral", "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu",
                    "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 32_768,
                    "max_position_embeddings": 131_072, "num_attention_heads": 32, "num_hidden_layers": 40,
                    "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000_000.0, "sliding_window": null,
                    "use_cache": true, "vocab_size": 131_072,
                },
                "vision_config": {
                    "model_type": "pixtral", "attention_dropout": 0.0, "head_dim": 64, "hidden_act": "silu",
                    "hidden_size": 1024, "image_size": 1540, "initializer_range": 0.02, "intermediate_size": 4096,
                    "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 24, "patch_size": 14,
                    "rope_theta": 10_000.0,
                },
                "vision_feature_layer": -1,
            }),
            vec![],
        ),
        (
            "Ministral 3 8B",
            8_489_553_920,
            json!({
                "model_type": "mistral3", "image_token_index": 10, "multimodal_projector_bias": false,
                "projector_hidden_act": "gelu", "spatial_merge_size": 2,
                "text_config": {
                    "model_type": "ministral3", "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu",
                    "hidden_size": 4096, "intermediate_size": 14_336, "max_position_embeddings": 262_144,
                    "num_attention_heads": 32, "num_hidden_layers": 34, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
                    "rope_parameters": {
                        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0,
                        "mscale_all_dim": 1.0, "original_max_position_embeddings": 16_384, "rope_theta": 1_000_000.0,
                        "rope_type": "yarn", "type": "yarn",
                    },
                    "sliding_window": null, "tie_word_embeddings": false, "vocab_size": 131_072,
                },
                "vision_config": {
                    "model_type": "pixtral", "head_dim": 64, "hidden_act": "silu", "hidden_size": 1024, "image_size": 1540,
                    "intermediate_size": 4096, "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 24,
                    "patch_size": 14,
                },
                "vision_feature_layer": -1,
            }),
            vec![],
        ),
        (
            "gemma-3-4b",
            3_880_263_168,
            json!({
                "model_type": "gemma3", "boi_token_index": 255_999, "eoi_token_index": 256_000, "image_token_index": 262_144,
                "mm_tokens_per_image": 256,
                "text_config": {
                    "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34,
                    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
                },
                "vision_config": {
                    "model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
                    "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": false,
                },
            }),
            vec![],
        ),
        (
            "Llama-4-Scout",
            107_769_861_120,
            json!({
                "model_type": "llama4", "boi_token_index": 200_080, "eoi_token_index": 200_081, "image_token_index": 200_092,
                "text_config": {
                    "model_type": "llama4_text", "attention_bias": false, "attention_chunk_size": 8192,
                    "attention_dropout": 0.0, "attn_scale": 0.1, "attn_temperature_tuning": 4, "floor_scale": 8192,
                    "for_llm_compressor": false, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
                    "interleave_moe_layer_step": 1, "intermediate_size": 8192, "intermediate_size_mlp": 16_384,
                    "max_position_embeddings": 10_485_760, "moe_layers": (0..48).collect::<Vec<_>>(),
                    "no_rope_layers": (1..=48).map(|i| i32::from(i % 4 != 0)).collect::<Vec<_>>(), "num_attention_heads": 40,
                    "num_experts_per_tok": 1, "num_hidden_layers": 48, "num_key_value_heads": 8, "num_local_experts": 16,
                    "output_router_logits": false, "rms_norm_eps": 1e-5,
                    "rope_scaling": {
                        "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
                        "original_max_position_embeddings": 8192, "rope_type": "llama3",
                    },
                    "rope_theta": 500_000.0, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
                    "tie_word_embeddings": false, "use_cache": true, "use_qk_norm": true, "vocab_size": 202_048,
                },
                "vision_config": {
                    "model_type": "llama4_vision_model", "hidden_size": 1408, "image_size": 336, "intermediate_size": 5632,
                    "num_attention_heads": 16, "num_hidden_layers": 34, "patch_size": 14,
                },
            }),
            vec![],
        ),
    ]
}
