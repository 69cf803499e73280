//! What a `config.json` says that is not of what the model computes: how its base was trained, how it generates, who made the file.

use serde_json::Value;

/// Fields of any config, by name.
const ELSEWHERE: &[&str] = &[
    // The file.
    "architectures",
    "auto_map",
    "base_model_ep_plan",
    "base_model_fsdp_plan",
    "base_model_pp_plan",
    "base_model_tp_plan",
    "dtype",
    "expert_dtype",
    "for_llm_compressor",
    "has_no_defaults_at_init",
    "is_llama_config",
    "model_type",
    "quantization_config",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "add_cross_attention",
    "is_decoder",
    "is_encoder_decoder",
    "tie_encoder_decoder",
    "tokenizer_class",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    // Other tasks than language, and what a forward gives besides logits.
    "classifier_dropout",
    "finetuning_task",
    "id2label",
    "label2id",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "prefix",
    "problem_type",
    "return_dict",
    "return_dict_in_generate",
    "task_specific_params",
    "use_return_dict",
    // Generation.
    "bad_words_ids",
    "begin_suppress_tokens",
    "cache_implementation",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "remove_invalid_values",
    "repetition_penalty",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "use_cache",
    // How weights began, and how a cluster shares them.
    "embedding_initializer_range",
    "ep_size",
    "init_std",
    "initializer_factor",
    "initializer_range",
    "pretraining_tp",
    "use_parallel_embedding",
    // Kernels and the order of the same sums.
    "attention_softmax_in_fp32",
    "attn_implementation",
    "bias_dropout_fusion",
    "chunk_size_feed_forward",
    "gradient_checkpointing",
    "mamba_ssm_dtype",
    "masked_softmax_fusion",
    "scale_attention_softmax_in_fp32",
    "use_bfloat16",
    "use_flash_attn",
    "use_flash_attention",
    // Lengths that were trained or that a tokenizer allows.
    "max_sequence_length",
    "model_max_length",
    "seq_length",
    "tokenizer_model_max_length",
    "original_max_position_embeddings",
    // Losses that transformers does not add.
    "aux_loss_alpha",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "seq_aux",
    // Layers that predict further tokens, which are carried along only.
    "mtp_num_hidden_layers",
    "mtp_use_dedicated_embeddings",
    // Attention in chunks far beyond what is trained on, which transformers does not do.
    "dual_chunk_attention_config",
];

/// Noise that transformers makes while it trains a base, as the fields of any config tell of it.
const NOISE: &[&str] = &[
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "input_jitter_noise",
    "resid_pdrop",
    "residual_dropout",
];

/// Whether `field` speaks of something else than what the model computes.
pub(super) fn elsewhere(field: &str) -> bool {
    let of_tokens = ["_token_id", "_token_ids", "_token_index"];
    // transformers' own notes.
    let noted = field.starts_with('_') && field != "_sliding_window_pattern";
    noted || ELSEWHERE.contains(&field) || NOISE.contains(&field) || of_tokens.iter().any(|end| field.ends_with(end))
}

/// Whether `value` asks for anything: off, none, nothing and once do not.
pub(super) fn asks(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(on) => *on,
        Value::Number(number) => number.as_f64().is_none_or(|number| number != 0.0 && number != 1.0),
        Value::Array(list) => !list.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::String(text) => !text.is_empty(),
    }
}

/// What a `config.json` asks for that engraft knows and does otherwise, in plain sentences.
pub fn notices(config: &Value) -> Vec<String> {
    let text = config.get("text_config").filter(|text| text.is_object()).unwrap_or(config);
    let of_noise = |field: &&&str| text.get(**field).is_some_and(|value| value.as_f64().is_some_and(|part| part > 0.0));
    let asked: Vec<String> = NOISE.iter().filter(of_noise).map(|field| format!("{field} {}", text[*field])).collect();
    if asked.is_empty() {
        return Vec::new();
    }
    let all = asked.join(", ");
    vec![format!(
        "config.json tells how the base was trained ({all}): adapters train without; adapter.lora_dropout is theirs"
    )]
}
