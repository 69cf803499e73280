//! Command R (cohere) and its successors: one LayerNorm without bias before both halves, pairs rotating, scaled logits.

use serde_json::json;

use super::assembly;
use super::block::{self, activation};
use super::config::Config;
use super::heads::Heads;
use super::layers::{self, layer_types};
use super::llama::masks;
use crate::Result;
use crate::model::spec::{
    Attention, Ending, LayerSpec, Mask, ModelSpec, NormKind, NormSpec, Position, QueryKeyNorm, Residual, Rope,
};
use crate::ops::{Activation, LogitMap, RopeLayout};

/// `CohereConfig`.
pub(super) fn cohere(config: &Config<'_>) -> Result<ModelSpec> {
    let count = layers::count(config, "num_hidden_layers")?;
    let normed = config.flag_or("use_qk_norm", false)?;
    build(config, 500_000.0, normed, &vec![(true, Mask::Full); count as usize])
}

/// `Cohere2Config`: sliding layers rotate, full ones do not.
pub(super) fn cohere2(config: &Config<'_>) -> Result<ModelSpec> {
    let count = layers::count(config, "num_hidden_layers")?;
    let pattern = config.size_or("sliding_window_pattern", 4)?;
    let slides = layer_types(config, count, |i| (i + 1) % pattern != 0)?;
    // How the published files tell of the same; the last is what `layer_types` are derived from, which are there then.
    config.always(&[
        ("layer_switch", &[json!(pattern)]),
        ("order_of_interleaved_layers", &[json!("local_attn_first")]),
        ("use_qk_norm", &[json!(false)]),
    ])?;
    config.passed_over(&["_sliding_window_pattern"]);
    let masks = masks(&slides, config.window_or(4096)?)?;
    build(config, 10_000.0, false, &slides.into_iter().zip(masks).collect::<Vec<_>>())
}

fn build(config: &Config<'_>, theta: f64, normed: bool, layers: &[(bool, Mask)]) -> Result<ModelSpec> {
    config.always(&[
        ("position_embedding_type", &[json!("rope_gptj")]),
        ("rotary_pct", &[json!(1.0), json!(1)]),
        ("use_embedding_sharing", &[json!(true)]),
        ("use_gated_activation", &[json!(true)]),
        ("use_parallel_block", &[json!(true)]),
    ])?;
    let heads = Heads::read(config, None)?;
    let hidden = heads.hidden_size;
    let eps = config.positive_or("layer_norm_eps", 1e-5)?;
    let bias = config.flag_or("attention_bias", false)?;
    let width = config.size("intermediate_size")?;
    let act = activation(config, "hidden_act", Activation::Silu)?;
    let rope = Rope { layout: RopeLayout::Pairs, ..heads.rope(config, theta, heads.head_size)? };
    let layers = layers.iter().enumerate().map(|(i, (rotates, mask))| {
        let at = |part: &str| format!("model.layers.{i}.{part}");
        let of_heads = |part: &str, count| NormSpec {
            shape: vec![count, heads.head_size],
            ..block::norm(at(part), heads.head_size, eps, NormKind::Layer)
        };
        let mut attention =
            heads.attention(heads.separate(&at("self_attn"), bias), heads.output(at("self_attn.o_proj"), bias));
        attention.query_key_norm = normed.then(|| QueryKeyNorm {
            query: of_heads("self_attn.q_norm", heads.heads),
            key: Some(of_heads("self_attn.k_norm", heads.kv_heads)),
            after_rotation: false,
        });
        LayerSpec {
            attention: Attention::Grouped(attention),
            position: if *rotates { Position::Rope(rope.clone()) } else { Position::None },
            mask: *mask,
            feed_forward: block::gated(&at("mlp"), act, hidden, width, false),
            residual: Residual::Parallel {
                norm: block::norm(at("input_layernorm"), hidden, eps, NormKind::Layer),
                feed_forward_norm: None,
            },
            ending: Ending::default(),
        }
    });
    let embedding = assembly::embedding("model.embed_tokens.weight");
    let final_norm = block::norm("model.norm".into(), hidden, eps, NormKind::Layer);
    let map = LogitMap { scale: config.positive_or("logit_scale", 0.0625)?, soft_cap: None };
    assembly::model(config, embedding, layers.collect(), final_norm, ("lm_head", true), map)
}
