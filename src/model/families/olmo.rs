//! OLMo 2 and 3: norms behind each half instead of before it, queries and keys normed over all heads at once.

use super::block::{self, activation};
use super::config::Config;
use super::heads::Heads;
use super::layers::{self, layer_types};
use super::llama::masks;
use super::{assembly, rope};
use crate::Result;
use crate::model::spec::{
    Around, Attention, Ending, LayerSpec, Mask, ModelSpec, NormKind, Position, QueryKeyNorm, Residual, Rope,
};
use crate::ops::{Activation, LogitMap};

/// `Olmo2Config`.
pub(super) fn olmo2(config: &Config<'_>) -> Result<ModelSpec> {
    let heads = Heads::read(config, None)?;
    let rope = heads.rope(config, 10_000.0, heads.head_size)?;
    let count = layers::count(config, "num_hidden_layers")?;
    build(config, heads, (0..count).map(|_| (rope.clone(), Mask::Full)).collect())
}

/// `Olmo3Config`: most layers slide, and only the full ones reach beyond the length trained for.
pub(super) fn olmo3(config: &Config<'_>) -> Result<ModelSpec> {
    let heads = Heads::read(config, None)?;
    // The reference keeps its base for sliding layers whatever `rope_theta` says.
    let [full, sliding] = rope::by_kind(config, [500_000.0; 2], heads.head_size)?;
    let count = layers::count(config, "num_hidden_layers")?;
    let slides = layer_types(config, count, |i| (i + 1) % 4 != 0)?;
    let masks = masks(&slides, config.window_or(4096)?)?;
    let layers = slides.iter().zip(masks).map(|(slides, mask)| (if *slides { &sliding } else { &full }.clone(), mask));
    build(config, heads, layers.collect())
}

fn build(config: &Config<'_>, heads: Heads, layers: Vec<(Rope, Mask)>) -> Result<ModelSpec> {
    let hidden = heads.hidden_size;
    let eps = config.positive_or("rms_norm_eps", 1e-5)?;
    let bias = config.flag_or("attention_bias", false)?;
    let width = config.size("intermediate_size")?;
    let act = activation(config, "hidden_act", Activation::Silu)?;
    let layers = layers.into_iter().enumerate().map(|(i, (rope, mask))| {
        let at = |part: &str| format!("model.layers.{i}.{part}");
        let norm = |part: &str, width| block::norm(at(part), width, eps, NormKind::Rms);
        let behind = |part: &str| Around { before: None, after: Some(norm(part, hidden)) };
        let mut attention =
            heads.attention(heads.separate(&at("self_attn"), bias), heads.output(at("self_attn.o_proj"), bias));
        attention.query_key_norm = Some(QueryKeyNorm {
            query: norm("self_attn.q_norm", heads.heads * heads.head_size),
            key: Some(norm("self_attn.k_norm", heads.kv_heads * heads.head_size)),
            after_rotation: false,
        });
        LayerSpec {
            attention: Attention::Grouped(attention),
            position: Position::Rope(rope),
            mask,
            feed_forward: block::gated(&at("mlp"), act, hidden, width, false),
            residual: Residual::Sequential {
                attention: behind("post_attention_layernorm"),
                feed_forward: behind("post_feedforward_layernorm"),
                multiplier: 1.0,
            },
            ending: Ending::default(),
        }
    });
    let embedding = assembly::embedding("model.embed_tokens.weight");
    let final_norm = block::norm("model.norm".into(), hidden, eps, NormKind::Rms);
    assembly::model(config, embedding, layers.collect(), final_norm, ("lm_head", false), LogitMap::PLAIN)
}
