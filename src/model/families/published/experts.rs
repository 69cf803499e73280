//! Models of experts.

use serde_json::json;

use super::Published;

pub(super) fn models() -> Vec<Published> {
    vec![
        (
            "Mixtral-8x7B",
            46_702_792_704,
            json!({
                "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14_336,
                "max_position_embeddings": 32_768, "num_attention_heads": 32, "num_experts_per_tok": 2,
                "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
                "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0, "router_aux_loss_coef": 0.02, "sliding_window": null,
                "tie_word_embeddings": false, "vocab_size": 32_000,
            }),
            vec![json!({"router_jitter_noise": 0.1}), json!({"shared_expert_intermediate_size": 512})],
        ),
        (
            "Qwen1.5-MoE-A2.7B",
            14_315_784_192,
            json!({
                "model_type": "qwen2_moe", "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 2048,
                "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
                "moe_intermediate_size": 1408, "norm_topk_prob": false, "num_attention_heads": 16, "num_experts": 60,
                "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "output_router_logits": false,
                "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "router_aux_loss_coef": 0.001,
                "shared_expert_intermediate_size": 5632, "sliding_window": 32_768, "tie_word_embeddings": false,
                "use_sliding_window": false, "vocab_size": 151_936,
            }),
            vec![json!({"sliding_window": 0, "use_sliding_window": true})],
        ),
        (
            "Qwen3-Next-80B-A3B",
            79_674_391_296,
            json!({
                "model_type": "qwen3_next", "attention_bias": false, "decoder_sparse_step": 1, "full_attention_interval": 4,
                "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5120,
                "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
                "linear_num_value_heads": 32, "linear_value_head_dim": 128, "max_position_embeddings": 262_144,
                "mlp_only_layers": [], "moe_intermediate_size": 512, "norm_topk_prob": true, "num_attention_heads": 16,
                "num_experts": 512, "num_experts_per_tok": 10, "num_hidden_layers": 48, "num_key_value_heads": 2,
                "output_router_logits": false, "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-6, "rope_scaling": null,
                "rope_theta": 10_000_000, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512,
                "tie_word_embeddings": false, "use_sliding_window": false, "vocab_size": 151_936,
            }),
            vec![],
        ),
        (
            "DeepSeek-V2",
            235_741_434_880,
            json!({
                "model_type": "deepseek_v2", "attention_bias": false, "aux_loss_alpha": 0.001, "ep_size": 1,
                "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 12_288,
                "kv_lora_rank": 512, "max_position_embeddings": 163_840, "moe_intermediate_size": 1536, "moe_layer_freq": 1,
                "n_group": 8, "n_routed_experts": 160, "n_shared_experts": 2, "norm_topk_prob": false,
                "num_attention_heads": 128, "num_experts_per_tok": 6, "num_hidden_layers": 60, "num_key_value_heads": 128,
                "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6,
                "rope_scaling": {
                    "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                    "original_max_position_embeddings": 4096, "type": "yarn",
                },
                "rope_theta": 10_000, "routed_scaling_factor": 16.0, "scoring_func": "softmax", "seq_aux": true,
                "tie_word_embeddings": false, "topk_group": 3, "topk_method": "group_limited_greedy", "v_head_dim": 128,
                "vocab_size": 102_400,
            }),
            vec![],
        ),
        (
            "DeepSeek-V3",
            671_026_419_200,
            json!({
                "model_type": "deepseek_v3", "attention_bias": false, "aux_loss_alpha": 0.001, "ep_size": 1,
                "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18_432,
                "kv_lora_rank": 512, "max_position_embeddings": 163_840, "moe_intermediate_size": 2048, "moe_layer_freq": 1,
                "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true,
                "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
                "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
                "quantization_config": {
                    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
                },
                "rms_norm_eps": 1e-6,
                "rope_scaling": {
                    "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                    "original_max_position_embeddings": 4096, "type": "yarn",
                },
                "rope_theta": 10_000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": true,
                "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128,
                "vocab_size": 129_280,
            }),
            vec![json!({"scoring_func": "softmax"}), json!({"topk_method": "greedy"}), json!({"index_topk": 2048})],
        ),
    ]
}
