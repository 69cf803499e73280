//! What a `config.json` says that is not of what the model computes: how its base was trained, how it generates, who made the file.

use serde_json::Value;

use crate::model::spec::{FeedForward, Router, Routing};

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
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "bad_words_ids",
    "begin_suppress_tokens",
    "cache_implementation",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "no_repeat_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "remove_invalid_values",
    "repetition_penalty",
    "suppress_tokens",
    "target_lookbehind",
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
    // Losses that transformers does not add: [`notices`] tells of them.
    "aux_loss_alpha",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "seq_aux",
    // Layers that predict further tokens, which are carried along only.
    "mtp_num_hidden_layers",
    "num_mtp_layers",
    "mtp_use_dedicated_embeddings",
    // Attention in chunks far beyond what is trained on, which transformers does not do.
    "dual_chunk_attention_config",
];

/// What models have that do not say: where a field says no to it, another one is meant. Fields of biases and of norms are not here, whose
/// tensors tell.
const UNLESS_SAID: &[&str] = &[
    // Attention to earlier tokens only; transformers reads the first of every config.
    "is_causal",
    "causal",
    "causal_attention",
    "causal_mask",
    "use_causal_mask",
    "use_causal_attention",
    // Norms before the halves of a block.
    "do_layer_norm_before",
    "norm_before",
    "normalize_before",
    "pre_norm",
    "use_pre_norm",
    // Weights of the chosen experts that add up to 1.
    "norm_topk_prob",
    // Scores that are scaled, and positions that turn.
    "scale_attn_weights",
    "scale_attention_scores",
    "use_rope",
    "use_rotary",
    "use_rotary_embedding",
    "use_rotary_embeddings",
    "use_rotary_position_embeddings",
    // Gates of feed-forwards and of attention.
    "attn_output_gate",
    "gated_mlp",
    "use_gated_activation",
    "use_gated_mlp",
];

/// Numbers that ask for something also where they are 1 and look like a factor.
const EVEN_ONCE: &[&str] = &[
    "attention_multiplier",
    "attn_logit_softcapping",
    "clip_qkv",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "router_jitter_noise",
];

/// Whole numbers that ask for nothing where they are 1, beside those that [`OF_FACTORS`] names: one group, each layer, every second of one.
const ONCE: &[&str] = &[
    "alpha",
    "beta_fast",
    "beta_slow",
    "factor",
    "full_attn_mod",
    "hc_mult",
    "moe_layer_freq",
    "mscale",
    "mscale_all_dim",
    "n_group",
    "num_groups",
    "rope_pct",
    "rotary_pct",
    "topk_group",
];

/// How the names of factors, shares and steps end.
const OF_FACTORS: &[&str] = &["_factor", "_interval", "_multiplier", "_ratio", "_scale", "_scaling", "_step"];

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

/// Whether `field` asks for anything as it says `value`: off, none and nothing do not, unless all models have it that do not say; nor
/// does once, of a factor.
pub(super) fn asks(field: &str, value: &Value) -> bool {
    let says = match value {
        Value::Null => false,
        Value::Bool(on) => *on,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::Array(list) => !list.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::String(text) => !text.is_empty(),
    };
    if UNLESS_SAID.contains(&field) {
        return !says;
    }
    says && value.as_f64().is_none_or(|number| number != 1.0 || asks_once(field, value.is_f64()))
}

/// Whether `field` asks for anything as it says 1: a whole 1 may also be a yes.
fn asks_once(field: &str, broken: bool) -> bool {
    let factor = broken || ONCE.contains(&field) || OF_FACTORS.iter().any(|end| field.ends_with(end));
    EVEN_ONCE.contains(&field) || !factor
}

/// What a `config.json` asks for that engraft knows and does otherwise, in plain sentences.
pub fn notices(config: &Value) -> Vec<String> {
    let text = config.get("text_config").filter(|text| text.is_object()).unwrap_or(config);
    let mut notices = Vec::new();
    if let Some(all) = said(text, NOISE) {
        notices.push(format!(
            "config.json tells how the base was trained ({all}): adapters train without; adapter.lora_dropout is theirs"
        ));
    }
    let Ok(spec) = super::from_config(config) else { return notices };
    let routers: Vec<&Router> = spec.layers.iter().filter_map(|layer| router(&layer.feed_forward)).collect();
    let balanced = routers.iter().any(|router| router.balance > 0.0);
    if let Some(all) = balancing(text).filter(|_| !routers.is_empty() && !balanced) {
        notices.push(format!(
            "config.json names a balancing loss ({all}); it is not added, as in transformers; training.router_aux_loss_coef adds one"
        ));
    }
    if routers.iter().any(|router| matches!(router.routing, Routing::SparseMixer { .. })) {
        notices.push(
            "the experts of this base were drawn at random while it was trained (SparseMixer); adapters train with those it chooses when \
             it answers, and with plain gradients of their weights"
                .into(),
        );
    }
    notices
}

/// What chooses among the experts of a feed-forward, if it has such.
fn router(feed_forward: &FeedForward) -> Option<&Router> {
    match feed_forward {
        FeedForward::Experts(experts) => Some(&experts.router),
        FeedForward::Sum(branches) => branches.iter().find_map(|branch| router(&branch.feed_forward)),
        FeedForward::Plain { .. } | FeedForward::Gated { .. } => None,
    }
}

/// Those of `fields` that say a number above 0, with what they say.
fn said(config: &Value, fields: &[&str]) -> Option<String> {
    let above = |field: &&&str| config.get(**field).is_some_and(|value| value.as_f64().is_some_and(|part| part > 0.0));
    let all: Vec<String> = fields.iter().filter(above).map(|field| format!("{field} {}", config[*field])).collect();
    (!all.is_empty()).then(|| all.join(", "))
}

/// The losses over routers that a base was trained with. Coefficients that transformers writes whether used or not are told of where
/// `output_router_logits` says that they are.
fn balancing(config: &Value) -> Option<String> {
    let used = config.get("output_router_logits").and_then(Value::as_bool).unwrap_or(false);
    let fields: &[&str] =
        if used { &["aux_loss_alpha", "router_aux_loss_coef", "router_z_loss_coef"] } else { &["aux_loss_alpha"] };
    said(config, fields)
}
