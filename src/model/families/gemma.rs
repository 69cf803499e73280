//! Gemma, Gemma 2 and the text of Gemma 3: norms of `1 + w`, scaled embeddings, GeGLU; then norms on both sides of each half.

use super::block::{self, activation};
use super::config::Config;
use super::heads::Heads;
use super::layers::{self, layer_types};
use super::llama::masks;
use super::{assembly, rope};
use crate::Result;
use crate::model::spec::{
    Around, Attention, EmbeddingSpec, Ending, LayerSpec, Mask, ModelSpec, NormKind, NormSpec, Position, QueryKeyNorm,
    Residual, Rope,
};
use crate::ops::{Activation, LogitMap};

/// `GemmaConfig`.
pub(super) fn gemma(config: &Config<'_>) -> Result<ModelSpec> {
    let heads = Heads::read(config, Some(256))?;
    let rope = heads.rope(config, 10_000.0, heads.head_size)?;
    let layers = layers::count(config, "num_hidden_layers")?;
    config.passed_over(&["hidden_activation"]);
    let kind = Kind { activation: "hidden_act", scale: None, soft_cap: None, sandwich: false, query_key_norm: false };
    build(config, heads, &kind, (0..layers).map(|_| (rope.clone(), Mask::Full)).collect(), None)
}

/// `Gemma2Config`: every other layer slides, scores and logits are capped.
pub(super) fn gemma2(config: &Config<'_>) -> Result<ModelSpec> {
    let heads = Heads::read(config, Some(256))?;
    let rope = heads.rope(config, 10_000.0, heads.head_size)?;
    let count = layers::count(config, "num_hidden_layers")?;
    let slides = layer_types(config, count, |i| i % 2 == 0)?;
    let masks = masks(&slides, config.window_or(4096)?)?;
    config.passed_over(&["hidden_act", "sliding_window_size"]);
    let kind = Kind {
        activation: "hidden_activation",
        scale: Some(config.positive_or("query_pre_attn_scalar", 256.0)?),
        soft_cap: config.optional_or("attn_logit_softcapping", 50.0)?,
        sandwich: true,
        query_key_norm: false,
    };
    let soft_cap = config.optional_or("final_logit_softcapping", 30.0)?;
    build(config, heads, &kind, masks.into_iter().map(|mask| (rope.clone(), mask)).collect(), soft_cap)
}

/// `Gemma3TextConfig`: queries and keys are normed, and sliding layers have a rotary embedding of their own.
pub(super) fn gemma3(config: &Config<'_>) -> Result<ModelSpec> {
    // The published files of the 4B leave out what transformers has for its own defaults.
    let config = &config.with_defaults(&[
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("vocab_size", 262_208),
        ("max_position_embeddings", 131_072),
    ]);
    let heads = Heads::read(config, Some(256))?;
    let count = layers::count(config, "num_hidden_layers")?;
    let pattern = config.size_or("sliding_window_pattern", 6)?;
    let slides = layer_types(config, count, |i| (i + 1) % pattern != 0)?;
    let masks = masks(&slides, config.window_or(4096)?)?;
    let local = config.positive_or("rope_local_base_freq", 10_000.0)?;
    let [full, sliding] = rope::by_kind(config, [1_000_000.0, local], heads.head_size)?;
    let layers = slides.iter().zip(masks).map(|(slides, mask)| (if *slides { &sliding } else { &full }.clone(), mask));
    // The reference reads the first and does not use it; the last it derives `layer_types` from, which are there then.
    config.passed_over(&["attn_logit_softcapping", "hidden_act", "_sliding_window_pattern"]);
    let kind = Kind {
        activation: "hidden_activation",
        scale: Some(config.positive_or("query_pre_attn_scalar", 256.0)?),
        soft_cap: None,
        sandwich: true,
        query_key_norm: true,
    };
    let soft_cap = config.optional("final_logit_softcapping")?;
    build(config, heads, &kind, layers.collect(), soft_cap)
}

/// The same inside a larger model, whose logits the reference does not cap.
pub(super) fn gemma3_within(config: &Config<'_>) -> Result<ModelSpec> {
    config.always(&[("final_logit_softcapping", &[])])?;
    gemma3(config)
}

/// What tells the generations apart.
struct Kind {
    /// The field that names the activation.
    activation: &'static str,
    /// Scores are scaled by the inverse root of this rather than of the head's size.
    scale: Option<f64>,
    soft_cap: Option<f64>,
    /// Whether norms stand on both sides of each half.
    sandwich: bool,
    query_key_norm: bool,
}

fn build(
    config: &Config<'_>,
    heads: Heads,
    kind: &Kind,
    layers: Vec<(Rope, Mask)>,
    soft_cap: Option<f64>,
) -> Result<ModelSpec> {
    let hidden = heads.hidden_size;
    let eps = config.positive_or("rms_norm_eps", 1e-6)?;
    let bias = config.flag_or("attention_bias", false)?;
    let intermediate = config.size("intermediate_size")?;
    let act = activation(config, kind.activation, Activation::GeluTanh)?;
    let layers = layers.into_iter().enumerate().map(|(i, (rope, mask))| {
        let at = |part: &str| format!("model.layers.{i}.{part}");
        let norm = |part: &str, width| block::norm(at(part), width, eps, NormKind::RmsOffset);
        let mut attention =
            heads.attention(heads.separate(&at("self_attn"), bias), heads.output(at("self_attn.o_proj"), bias));
        attention.scale = kind.scale.map_or(attention.scale, |scale| scale.powf(-0.5));
        attention.soft_cap = kind.soft_cap;
        attention.query_key_norm = kind.query_key_norm.then(|| QueryKeyNorm {
            query: norm("self_attn.q_norm", heads.head_size),
            key: Some(norm("self_attn.k_norm", heads.head_size)),
            after_rotation: false,
        });
        let residual = if kind.sandwich {
            let around = |before: &str, after: &str| Around {
                before: Some(norm(before, hidden)),
                after: Some(norm(after, hidden)),
            };
            Residual::Sequential {
                attention: around("input_layernorm", "post_attention_layernorm"),
                feed_forward: around("pre_feedforward_layernorm", "post_feedforward_layernorm"),
                multiplier: 1.0,
            }
        } else {
            block::pre_norm(norm("input_layernorm", hidden), norm("post_attention_layernorm", hidden))
        };
        LayerSpec {
            attention: Attention::Grouped(attention),
            position: Position::Rope(rope),
            mask,
            feed_forward: block::gated(&at("mlp"), act, hidden, intermediate, false),
            residual,
            ending: Ending::default(),
        }
    });
    let scale = (hidden as f64).sqrt();
    let embedding = EmbeddingSpec { scale, ..assembly::embedding("model.embed_tokens.weight") };
    let final_norm: NormSpec = block::norm("model.norm".into(), hidden, eps, NormKind::RmsOffset);
    let map = LogitMap { scale: 1.0, soft_cap };
    assembly::model(config, embedding, layers.collect(), final_norm, ("lm_head", true), map)
}
