//! The architectures that can be read and written, one entry each: tensors, and where the fields of `config.json` come from.
//!
//! Every entry was compared with what llama.cpp's own converter makes of a small model of the family
//! (`tests/python/gguf_families.py`, `tests/gguf_families.rs`). What a GGUF file does not say is what its converter takes for
//! granted: sliding windows of Mistral, Qwen and StarCoder 2 are lost on the way, as they are in llama.cpp.

use super::names::{Architecture, Field, Head, Name, Rotary, Rows};
use Field::{Has, Number, Optional, Required, RowsOf, Text};

const fn same(gguf: &'static str, checkpoint: &'static str) -> Name {
    Name { gguf, checkpoint, rows: Rows::Same }
}

const fn rows(gguf: &'static str, checkpoint: &'static str, rows: Rows) -> Name {
    Name { gguf, checkpoint, rows }
}

const ENDS: &[Name] =
    &[same("token_embd", "model.embed_tokens"), same("output_norm", "model.norm"), same("output", "lm_head")];
const PROJECTIONS: &[Name] = &[
    same("blk.{}.attn_q", "model.layers.{}.self_attn.q_proj"),
    same("blk.{}.attn_k", "model.layers.{}.self_attn.k_proj"),
    same("blk.{}.attn_v", "model.layers.{}.self_attn.v_proj"),
    same("blk.{}.attn_output", "model.layers.{}.self_attn.o_proj"),
];
/// llama.cpp turns adjacent pairs where transformers turns halves.
const PAIRED_PROJECTIONS: &[Name] = &[
    rows("blk.{}.attn_q", "model.layers.{}.self_attn.q_proj", Rows::QueryHeads),
    rows("blk.{}.attn_k", "model.layers.{}.self_attn.k_proj", Rows::KeyHeads),
    same("blk.{}.attn_v", "model.layers.{}.self_attn.v_proj"),
    same("blk.{}.attn_output", "model.layers.{}.self_attn.o_proj"),
];
const HEAD_NORMS: &[Name] = &[
    same("blk.{}.attn_q_norm", "model.layers.{}.self_attn.q_norm"),
    same("blk.{}.attn_k_norm", "model.layers.{}.self_attn.k_norm"),
];
const PRE_NORMS: &[Name] = &[
    same("blk.{}.attn_norm", "model.layers.{}.input_layernorm"),
    same("blk.{}.ffn_norm", "model.layers.{}.post_attention_layernorm"),
];
const GATED: &[Name] = &[
    same("blk.{}.ffn_gate", "model.layers.{}.mlp.gate_proj"),
    same("blk.{}.ffn_up", "model.layers.{}.mlp.up_proj"),
    same("blk.{}.ffn_down", "model.layers.{}.mlp.down_proj"),
];
const FUSED_GATED: &[Name] = &[
    same("blk.{}.ffn_up", "model.layers.{}.mlp.gate_up_proj"),
    same("blk.{}.ffn_down", "model.layers.{}.mlp.down_proj"),
];
const SANDWICH: &[Name] = &[
    same("blk.{}.attn_norm", "model.layers.{}.input_layernorm"),
    same("blk.{}.post_attention_norm", "model.layers.{}.post_attention_layernorm"),
    same("blk.{}.ffn_norm", "model.layers.{}.pre_feedforward_layernorm"),
    same("blk.{}.post_ffw_norm", "model.layers.{}.post_feedforward_layernorm"),
];

const EXPERTS: &[Name] = &[
    same("blk.{}.ffn_gate_inp", "model.layers.{}.mlp.gate"),
    same("blk.{}.ffn_gate_exps", "model.layers.{}.mlp.experts.*.gate_proj"),
    same("blk.{}.ffn_up_exps", "model.layers.{}.mlp.experts.*.up_proj"),
    same("blk.{}.ffn_down_exps", "model.layers.{}.mlp.experts.*.down_proj"),
];

/// Data llama.cpp derives, or that the config is made of.
const DERIVED: &[&str] =
    &["rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight", "blk.{}.attn_rot_embd"];

const SIZES: &[Field] = &[
    Required("context_length", "max_position_embeddings"),
    Required("embedding_length", "hidden_size"),
    Required("block_count", "num_hidden_layers"),
    Required("attention.head_count", "num_attention_heads"),
    Field::KeyHeads("num_key_value_heads"),
    Field::HeadSize("head_dim"),
];
/// Of architectures whose heads divide the width among them.
const EQUAL_HEADS: &[Field] = &[
    Required("context_length", "max_position_embeddings"),
    Required("embedding_length", "hidden_size"),
    Required("block_count", "num_hidden_layers"),
    Required("attention.head_count", "num_attention_heads"),
];
const FEED_FORWARD: &[Field] = &[Required("feed_forward_length", "intermediate_size")];
const RMS: &[Field] = &[Required("attention.layer_norm_rms_epsilon", "rms_norm_eps")];
const MANY_EXPERTS: &[Field] = &[
    Required("expert_count", "num_experts"),
    Required("expert_used_count", "num_experts_per_tok"),
    RowsOf("moe_intermediate_size", ".experts.0.gate_proj.weight"),
];
const SILU: &[Field] = &[Text("hidden_act", "silu")];
const NO_WINDOW: &[Field] = &[Optional("attention.sliding_window", "sliding_window")];
const BIASES: &[Field] = &[Has("attention_bias", ".self_attn.q_proj.bias"), Has("mlp_bias", ".mlp.gate_proj.bias")];

const FALCON: &[&[Field]] = &[
    EQUAL_HEADS,
    &[
        Required("attention.layer_norm_epsilon", "layer_norm_epsilon"),
        RowsOf("ffn_hidden_size", ".0.mlp.dense_h_to_4h.weight"),
        Required("attention.head_count_kv", "num_kv_heads"),
        Has("new_decoder_architecture", ".ln_attn.weight"),
        Has("bias", ".self_attention.dense.bias"),
        Text("activation", "gelu"),
    ],
];
const OLMO: &[&[Name]] = &[
    ENDS,
    &[
        same("blk.{}.post_attention_norm", "model.layers.{}.post_attention_layernorm"),
        same("blk.{}.post_ffw_norm", "model.layers.{}.post_feedforward_layernorm"),
    ],
    PROJECTIONS,
    HEAD_NORMS,
    GATED,
];

/// What nearly every entry begins with.
const LLAMA: Architecture = Architecture {
    name: "llama",
    only_with: None,
    class: "LlamaForCausalLM",
    model_type: "llama",
    tensors: &[ENDS, PRE_NORMS, PAIRED_PROJECTIONS, GATED],
    derived: DERIVED,
    norms_from_one: false,
    rotary: Rotary::Whole,
    fields: &[
        SIZES,
        FEED_FORWARD,
        RMS,
        SILU,
        BIASES,
        &[Number("attention_dropout", 0.0), Number("initializer_range", 0.02)],
    ],
    written_from: &[],
    head: Head::Either,
    constant: &[],
};

/// The architectures that can be read and written.
pub(crate) const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        only_with: Some("blk.0.ffn_gate_inp.weight"),
        class: "MixtralForCausalLM",
        model_type: "mixtral",
        tensors: &[
            ENDS,
            PRE_NORMS,
            PAIRED_PROJECTIONS,
            &[
                same("blk.{}.ffn_gate_inp", "model.layers.{}.block_sparse_moe.gate"),
                same("blk.{}.ffn_gate_exps", "model.layers.{}.block_sparse_moe.experts.*.w1"),
                same("blk.{}.ffn_up_exps", "model.layers.{}.block_sparse_moe.experts.*.w3"),
                same("blk.{}.ffn_down_exps", "model.layers.{}.block_sparse_moe.experts.*.w2"),
            ],
        ],
        fields: &[
            SIZES,
            FEED_FORWARD,
            RMS,
            SILU,
            &[
                Required("expert_count", "num_local_experts"),
                Required("expert_used_count", "num_experts_per_tok"),
                Optional("attention.sliding_window", "sliding_window"),
            ],
        ],
        ..LLAMA
    },
    // llama.cpp has no Mistral: without its window it is a Llama.
    Architecture { written_from: &["llama", "mistral", "mobilellm"], ..LLAMA },
    Architecture {
        name: "mistral3",
        only_with: Some("attention.temperature_scale"),
        class: "Ministral3ForCausalLM",
        model_type: "ministral3",
        written_from: &["ministral3", "mistral3/ministral3"],
        fields: &[SIZES, FEED_FORWARD, RMS, SILU, NO_WINDOW],
        ..LLAMA
    },
    // Mistral Small 3.1 and 3.2, whose text model is a Mistral.
    Architecture {
        name: "mistral3",
        class: "MistralForCausalLM",
        model_type: "mistral",
        written_from: &["mistral3/mistral"],
        fields: &[SIZES, FEED_FORWARD, RMS, SILU, NO_WINDOW],
        ..LLAMA
    },
    Architecture { name: "smollm3", class: "SmolLM3ForCausalLM", model_type: "smollm3", ..LLAMA },
    Architecture {
        name: "granite",
        class: "GraniteForCausalLM",
        model_type: "granite",
        fields: &[
            SIZES,
            FEED_FORWARD,
            RMS,
            SILU,
            BIASES,
            &[
                Required("attention.scale", "attention_multiplier"),
                Required("embedding_scale", "embedding_multiplier"),
                Required("residual_scale", "residual_multiplier"),
                Required("logit_scale", "logits_scaling"),
            ],
        ],
        ..LLAMA
    },
    Architecture {
        name: "qwen2",
        class: "Qwen2ForCausalLM",
        model_type: "qwen2",
        tensors: &[ENDS, PRE_NORMS, PROJECTIONS, GATED],
        fields: &[SIZES, FEED_FORWARD, RMS, SILU],
        ..LLAMA
    },
    Architecture {
        name: "qwen3",
        class: "Qwen3ForCausalLM",
        model_type: "qwen3",
        tensors: &[ENDS, PRE_NORMS, PROJECTIONS, HEAD_NORMS, GATED],
        fields: &[SIZES, FEED_FORWARD, RMS, SILU, &[Has("attention_bias", ".self_attn.q_proj.bias")]],
        ..LLAMA
    },
    // A token's weights are never made to add up to 1 here, in Qwen 3 always.
    Architecture {
        name: "qwen2moe",
        class: "Qwen2MoeForCausalLM",
        model_type: "qwen2_moe",
        head: Head::Own,
        tensors: &[
            ENDS,
            PRE_NORMS,
            PROJECTIONS,
            EXPERTS,
            &[
                same("blk.{}.ffn_gate_shexp", "model.layers.{}.mlp.shared_expert.gate_proj"),
                same("blk.{}.ffn_up_shexp", "model.layers.{}.mlp.shared_expert.up_proj"),
                same("blk.{}.ffn_down_shexp", "model.layers.{}.mlp.shared_expert.down_proj"),
                rows("blk.{}.ffn_gate_inp_shexp", "model.layers.{}.mlp.shared_expert_gate", Rows::One),
            ],
        ],
        fields: &[
            SIZES,
            FEED_FORWARD,
            RMS,
            SILU,
            MANY_EXPERTS,
            &[
                RowsOf("shared_expert_intermediate_size", ".shared_expert.gate_proj.weight"),
                Has("qkv_bias", ".self_attn.q_proj.bias"),
                Field::Fixed("norm_topk_prob", false),
            ],
        ],
        ..LLAMA
    },
    Architecture {
        name: "qwen3moe",
        class: "Qwen3MoeForCausalLM",
        model_type: "qwen3_moe",
        tensors: &[ENDS, PRE_NORMS, PROJECTIONS, HEAD_NORMS, EXPERTS],
        fields: &[
            SIZES,
            FEED_FORWARD,
            RMS,
            SILU,
            MANY_EXPERTS,
            &[Has("attention_bias", ".self_attn.q_proj.bias"), Field::Fixed("norm_topk_prob", true)],
        ],
        ..LLAMA
    },
    Architecture {
        name: "gemma",
        class: "GemmaForCausalLM",
        model_type: "gemma",
        head: Head::Embedding,
        tensors: &[ENDS, PRE_NORMS, PROJECTIONS, GATED],
        norms_from_one: true,
        fields: &[SIZES, FEED_FORWARD, RMS, &[Text("hidden_act", "gelu_pytorch_tanh")]],
        ..LLAMA
    },
    Architecture {
        name: "gemma2",
        class: "Gemma2ForCausalLM",
        model_type: "gemma2",
        head: Head::Embedding,
        tensors: &[ENDS, SANDWICH, PROJECTIONS, GATED],
        norms_from_one: true,
        fields: &[
            SIZES,
            FEED_FORWARD,
            RMS,
            &[
                Text("hidden_activation", "gelu_pytorch_tanh"),
                Required("attn_logit_softcapping", "attn_logit_softcapping"),
                Required("final_logit_softcapping", "final_logit_softcapping"),
                Required("attention.sliding_window", "sliding_window"),
                Field::Scale { field: "query_pre_attn_scalar", of_the_width: 46 },
            ],
        ],
        ..LLAMA
    },
    Architecture {
        name: "gemma3",
        class: "Gemma3ForCausalLM",
        model_type: "gemma3_text",
        written_from: &["gemma3_text", "gemma3/gemma3_text"],
        tensors: &[ENDS, SANDWICH, PROJECTIONS, HEAD_NORMS, GATED],
        norms_from_one: true,
        fields: &[
            SIZES,
            FEED_FORWARD,
            RMS,
            &[
                Text("hidden_activation", "gelu_pytorch_tanh"),
                Optional("final_logit_softcapping", "final_logit_softcapping"),
                Required("attention.sliding_window", "sliding_window"),
                Field::Scale { field: "query_pre_attn_scalar", of_the_width: 62 },
            ],
        ],
        ..LLAMA
    },
    Architecture {
        name: "phi3",
        class: "Phi3ForCausalLM",
        model_type: "phi3",
        tensors: &[
            ENDS,
            PRE_NORMS,
            &[
                same("blk.{}.attn_qkv", "model.layers.{}.self_attn.qkv_proj"),
                same("blk.{}.attn_output", "model.layers.{}.self_attn.o_proj"),
            ],
            FUSED_GATED,
        ],
        fields: &[
            SIZES,
            FEED_FORWARD,
            RMS,
            SILU,
            &[
                Required("rope.scaling.original_context_length", "original_max_position_embeddings"),
                Optional("attention.sliding_window", "sliding_window"),
            ],
        ],
        rotary: Rotary::Share("partial_rotary_factor"),
        ..LLAMA
    },
    Architecture {
        name: "phi2",
        class: "PhiForCausalLM",
        model_type: "phi",
        head: Head::Own,
        tensors: &[&[
            same("token_embd", "model.embed_tokens"),
            same("output_norm", "model.final_layernorm"),
            same("output", "lm_head"),
            same("blk.{}.attn_norm", "model.layers.{}.input_layernorm"),
            same("blk.{}.attn_q", "model.layers.{}.self_attn.q_proj"),
            same("blk.{}.attn_k", "model.layers.{}.self_attn.k_proj"),
            same("blk.{}.attn_v", "model.layers.{}.self_attn.v_proj"),
            same("blk.{}.attn_output", "model.layers.{}.self_attn.dense"),
            same("blk.{}.ffn_up", "model.layers.{}.mlp.fc1"),
            same("blk.{}.ffn_down", "model.layers.{}.mlp.fc2"),
        ]],
        rotary: Rotary::Share("partial_rotary_factor"),
        fields: &[
            EQUAL_HEADS,
            &[
                Field::KeyHeadsIn("num_key_value_heads", ".0.self_attn.k_proj.weight"),
                // The metadata say four times the width, whatever it is.
                RowsOf("intermediate_size", ".0.mlp.fc1.weight"),
                Required("attention.layer_norm_epsilon", "layer_norm_eps"),
                Text("hidden_act", "gelu_new"),
            ],
        ],
        ..LLAMA
    },
    Architecture {
        name: "glm4",
        class: "Glm4ForCausalLM",
        model_type: "glm4",
        tensors: &[
            ENDS,
            &[
                same("blk.{}.attn_norm", "model.layers.{}.input_layernorm"),
                same("blk.{}.post_attention_norm", "model.layers.{}.post_self_attn_layernorm"),
                same("blk.{}.ffn_norm", "model.layers.{}.post_attention_layernorm"),
                same("blk.{}.post_ffw_norm", "model.layers.{}.post_mlp_layernorm"),
            ],
            PROJECTIONS,
            FUSED_GATED,
        ],
        fields: &[SIZES, FEED_FORWARD, RMS, SILU, &[Has("attention_bias", ".self_attn.q_proj.bias")]],
        rotary: Rotary::Share("partial_rotary_factor"),
        ..LLAMA
    },
    Architecture {
        name: "olmo2",
        only_with: Some("attention.sliding_window"),
        class: "Olmo3ForCausalLM",
        model_type: "olmo3",
        head: Head::Own,
        tensors: OLMO,
        fields: &[
            SIZES,
            FEED_FORWARD,
            RMS,
            SILU,
            &[Required("attention.sliding_window", "sliding_window"), Has("attention_bias", ".self_attn.q_proj.bias")],
        ],
        ..LLAMA
    },
    Architecture {
        name: "olmo2",
        class: "Olmo2ForCausalLM",
        model_type: "olmo2",
        head: Head::Own,
        tensors: OLMO,
        fields: &[SIZES, FEED_FORWARD, RMS, SILU, &[Has("attention_bias", ".self_attn.q_proj.bias")]],
        ..LLAMA
    },
    Architecture {
        name: "command-r",
        class: "CohereForCausalLM",
        model_type: "cohere",
        constant: &[("rope.scaling.type", "none")],
        head: Head::Embedding,
        tensors: &[
            ENDS,
            &[same("blk.{}.attn_norm", "model.layers.{}.input_layernorm")],
            PROJECTIONS,
            HEAD_NORMS,
            GATED,
        ],
        fields: &[
            SIZES,
            FEED_FORWARD,
            SILU,
            &[
                Required("attention.layer_norm_epsilon", "layer_norm_eps"),
                Required("logit_scale", "logit_scale"),
                Has("use_qk_norm", ".self_attn.q_norm.weight"),
                Has("attention_bias", ".self_attn.q_proj.bias"),
            ],
        ],
        ..LLAMA
    },
    Architecture {
        name: "cohere2",
        class: "Cohere2ForCausalLM",
        model_type: "cohere2",
        constant: &[("rope.scaling.type", "none")],
        head: Head::Embedding,
        tensors: &[ENDS, &[same("blk.{}.attn_norm", "model.layers.{}.input_layernorm")], PROJECTIONS, GATED],
        fields: &[
            SIZES,
            FEED_FORWARD,
            SILU,
            &[
                Required("attention.layer_norm_epsilon", "layer_norm_eps"),
                Required("logit_scale", "logit_scale"),
                Required("attention.sliding_window", "sliding_window"),
            ],
        ],
        ..LLAMA
    },
    Architecture {
        name: "starcoder2",
        class: "Starcoder2ForCausalLM",
        model_type: "starcoder2",
        tensors: &[
            ENDS,
            PRE_NORMS,
            PROJECTIONS,
            &[same("blk.{}.ffn_up", "model.layers.{}.mlp.c_fc"), same("blk.{}.ffn_down", "model.layers.{}.mlp.c_proj")],
        ],
        fields: &[
            SIZES,
            FEED_FORWARD,
            &[
                Required("attention.layer_norm_epsilon", "norm_epsilon"),
                Text("hidden_act", "gelu_pytorch_tanh"),
                Has("use_bias", ".self_attn.q_proj.bias"),
            ],
        ],
        ..LLAMA
    },
    Architecture {
        name: "stablelm",
        class: "StableLmForCausalLM",
        model_type: "stablelm",
        head: Head::Own,
        tensors: &[ENDS, PRE_NORMS, PROJECTIONS, GATED],
        fields: &[
            SIZES,
            FEED_FORWARD,
            SILU,
            &[
                Required("attention.layer_norm_epsilon", "layer_norm_eps"),
                Has("use_qkv_bias", ".self_attn.q_proj.bias"),
                Field::Flag("use_parallel_residual", "use_parallel_residual"),
            ],
        ],
        rotary: Rotary::Share("partial_rotary_factor"),
        ..LLAMA
    },
    Architecture {
        name: "gptneox",
        class: "GPTNeoXForCausalLM",
        model_type: "gpt_neox",
        head: Head::Own,
        tensors: &[&[
            same("token_embd", "gpt_neox.embed_in"),
            same("output_norm", "gpt_neox.final_layer_norm"),
            same("output", "embed_out"),
            same("blk.{}.attn_norm", "gpt_neox.layers.{}.input_layernorm"),
            same("blk.{}.ffn_norm", "gpt_neox.layers.{}.post_attention_layernorm"),
            rows("blk.{}.attn_qkv", "gpt_neox.layers.{}.attention.query_key_value", Rows::Apart),
            same("blk.{}.attn_output", "gpt_neox.layers.{}.attention.dense"),
            same("blk.{}.ffn_up", "gpt_neox.layers.{}.mlp.dense_h_to_4h"),
            same("blk.{}.ffn_down", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
        ]],
        rotary: Rotary::Share("rotary_pct"),
        fields: &[
            EQUAL_HEADS,
            FEED_FORWARD,
            &[
                Required("attention.layer_norm_epsilon", "layer_norm_eps"),
                Text("hidden_act", "gelu"),
                Has("attention_bias", ".attention.dense.bias"),
                Field::Flag("use_parallel_residual", "use_parallel_residual"),
            ],
        ],
        ..LLAMA
    },
    // The 40B and 180B: a norm for each half of a block.
    Architecture {
        name: "falcon",
        only_with: Some("blk.0.attn_norm_2.weight"),
        class: "FalconForCausalLM",
        model_type: "falcon",
        constant: &[("tensor_data_layout", "jploski")],
        tensors: &[&[
            same("token_embd", "transformer.word_embeddings"),
            same("output_norm", "transformer.ln_f"),
            same("output", "lm_head"),
            same("blk.{}.attn_norm", "transformer.h.{}.ln_mlp"),
            same("blk.{}.attn_norm_2", "transformer.h.{}.ln_attn"),
            rows("blk.{}.attn_qkv", "transformer.h.{}.self_attention.query_key_value", Rows::Apart),
            same("blk.{}.attn_output", "transformer.h.{}.self_attention.dense"),
            same("blk.{}.ffn_up", "transformer.h.{}.mlp.dense_h_to_4h"),
            same("blk.{}.ffn_down", "transformer.h.{}.mlp.dense_4h_to_h"),
        ]],
        fields: FALCON,
        ..LLAMA
    },
    Architecture {
        name: "falcon",
        class: "FalconForCausalLM",
        model_type: "falcon",
        constant: &[("tensor_data_layout", "jploski")],
        tensors: &[&[
            same("token_embd", "transformer.word_embeddings"),
            same("output_norm", "transformer.ln_f"),
            same("output", "lm_head"),
            same("blk.{}.attn_norm", "transformer.h.{}.input_layernorm"),
            rows("blk.{}.attn_qkv", "transformer.h.{}.self_attention.query_key_value", Rows::Apart),
            same("blk.{}.attn_output", "transformer.h.{}.self_attention.dense"),
            same("blk.{}.ffn_up", "transformer.h.{}.mlp.dense_h_to_4h"),
            same("blk.{}.ffn_down", "transformer.h.{}.mlp.dense_4h_to_h"),
        ]],
        fields: FALCON,
        ..LLAMA
    },
    Architecture {
        name: "bloom",
        class: "BloomForCausalLM",
        model_type: "bloom",
        tensors: &[&[
            same("token_embd", "transformer.word_embeddings"),
            same("token_embd_norm", "transformer.word_embeddings_layernorm"),
            same("output_norm", "transformer.ln_f"),
            same("blk.{}.attn_norm", "transformer.h.{}.input_layernorm"),
            same("blk.{}.ffn_norm", "transformer.h.{}.post_attention_layernorm"),
            rows("blk.{}.attn_qkv", "transformer.h.{}.self_attention.query_key_value", Rows::Apart),
            same("blk.{}.attn_output", "transformer.h.{}.self_attention.dense"),
            same("blk.{}.ffn_up", "transformer.h.{}.mlp.dense_h_to_4h"),
            same("blk.{}.ffn_down", "transformer.h.{}.mlp.dense_4h_to_h"),
        ]],
        rotary: Rotary::None,
        fields: &[&[
            Required("context_length", "seq_length"),
            Required("context_length", "max_position_embeddings"),
            Required("embedding_length", "hidden_size"),
            Required("block_count", "n_layer"),
            Required("attention.head_count", "n_head"),
            Required("attention.layer_norm_epsilon", "layer_norm_epsilon"),
        ]],
        ..LLAMA
    },
];
