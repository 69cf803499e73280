//! Phi-3, GLM and GLM-4: projections stored fused, a part of each head rotating.

use super::block::{self, activation};
use super::config::{Config, wrong};
use super::heads::Heads;
use super::{assembly, layers, rope};
use crate::Result;
use crate::model::spec::{
    Around, Attention, Ending, FeedForward, GateUp, LayerSpec, LinearSpec, Mask, ModelSpec, NormKind, Position,
    Projection, Residual, Rope,
};
use crate::ops::{Activation, LogitMap, RopeLayout};

/// How positions of Phi-3 may be stretched; the second and the third are the same.
const KINDS: [&str; 3] = ["default", "longrope", "su"];

/// `Phi3Config`, also of Phi-3.5 and Phi-4.
pub(super) fn phi3(config: &Config<'_>) -> Result<ModelSpec> {
    // The length outside comes before the one of `rope_scaling`, and is this where the config does not say.
    let config = &config.with_defaults(&[("original_max_position_embeddings", 4096)]);
    if let Some((field, p)) = rope::parameters(config)? {
        for name in ["rope_type", "type"] {
            if let Some(kind) = p.field(name).filter(|kind| !KINDS.contains(&kind.as_str().unwrap_or_default())) {
                return Err(wrong(&format!("{field}.{name}"), kind, &format!("one of {}", KINDS.join(", "))));
            }
        }
    }
    let heads = Heads::read(config, None)?;
    let rope = heads.rope(config, 10_000.0, heads.partial(config, 1.0)?)?;
    let mask = config.window_or(0)?.filter(|window| *window > 0).map_or(Mask::Full, |window| Mask::Sliding { window });
    let projection = |at: &str| Projection::Fused(heads.fused(format!("{at}.qkv_proj"), false));
    build(config, heads, 1e-5, (rope, mask), &projection, false)
}

/// `GlmConfig`.
pub(super) fn glm(config: &Config<'_>) -> Result<ModelSpec> {
    glm_of(config, false)
}

/// `Glm4Config`: norms on both sides of each half.
pub(super) fn glm4(config: &Config<'_>) -> Result<ModelSpec> {
    glm_of(config, true)
}

fn glm_of(config: &Config<'_>, sandwich: bool) -> Result<ModelSpec> {
    let heads = Heads::read(config, Some(128))?;
    let rope = heads.rope(config, 10_000.0, heads.partial(config, 0.5)?)?;
    let rope = Rope { layout: RopeLayout::Pairs, ..rope };
    let bias = config.flag_or("attention_bias", true)?;
    build(config, heads, 1.5625e-7, (rope, Mask::Full), &|at: &str| heads.separate(at, bias), sandwich)
}

fn build(
    config: &Config<'_>,
    heads: Heads,
    eps: f64,
    (rope, mask): (Rope, Mask),
    projection: &dyn Fn(&str) -> Projection,
    sandwich: bool,
) -> Result<ModelSpec> {
    let hidden = heads.hidden_size;
    let eps = config.positive_or("rms_norm_eps", eps)?;
    let width = config.size("intermediate_size")?;
    let act = activation(config, "hidden_act", Activation::Silu)?;
    let layers = (0..layers::count(config, "num_hidden_layers")?).map(|i| {
        let at = |part: &str| format!("model.layers.{i}.{part}");
        let norm = |part: &str| block::norm(at(part), hidden, eps, NormKind::Rms);
        let around = |before: &str, after: &str| Around { before: Some(norm(before)), after: Some(norm(after)) };
        let linear = |part: &str, input, output| LinearSpec { name: at(part), input, output, bias: false };
        LayerSpec {
            attention: Attention::Grouped(
                heads.attention(projection(&at("self_attn")), heads.output(at("self_attn.o_proj"), false)),
            ),
            position: Position::Rope(rope.clone()),
            mask,
            feed_forward: FeedForward::Gated {
                activation: act,
                projection: GateUp::Fused(linear("mlp.gate_up_proj", hidden, 2 * width)),
                down: linear("mlp.down_proj", width, hidden),
            },
            residual: if sandwich {
                Residual::Sequential {
                    attention: around("input_layernorm", "post_self_attn_layernorm"),
                    feed_forward: around("post_attention_layernorm", "post_mlp_layernorm"),
                    multiplier: 1.0,
                }
            } else {
                block::pre_norm(norm("input_layernorm"), norm("post_attention_layernorm"))
            },
            ending: Ending::default(),
        }
    });
    let embedding = assembly::embedding("model.embed_tokens.weight");
    let final_norm = block::norm("model.norm".into(), hidden, eps, NormKind::Rms);
    assembly::model(config, embedding, layers.collect(), final_norm, ("lm_head", false), LogitMap::PLAIN)
}
