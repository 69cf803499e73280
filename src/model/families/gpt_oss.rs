//! gpt-oss: a sink in every head's softmax, sliding and full layers in turn, experts with biases and a clamped gate.

use serde_json::json;

use super::block::{self, pre_norm};
use super::config::Config;
use super::experts::{balance, count, router, softmax};
use super::heads::Heads;
use super::layers::{self, layer_types};
use super::llama::masks;
use super::{assembly, rope};
use crate::Result;
use crate::model::spec::{
    Attention, Ending, ExpertGateUp, ExpertLinear, Experts, FeedForward, LayerSpec, LinearSpec, ModelSpec, NormKind,
    Position, Rope, RopeScaling, Router, Stored,
};
use crate::ops::{Activation, LogitMap, RopeLayout, Weighted};

/// Of every expert; the config's `swiglu_limit` and `hidden_act` are read by nothing in the reference, and never say anything else.
const GATE: Activation = Activation::Clamped { limit: 7.0, slope: 1.702, offset: 1.0 };

/// `GptOssConfig`.
pub(super) fn gpt_oss(config: &Config<'_>) -> Result<ModelSpec> {
    let heads = Heads::read(config, Some(64))?;
    let (hidden, eps) = (heads.hidden_size, config.positive_or("rms_norm_eps", 1e-5)?);
    let layers = layers::count(config, "num_hidden_layers")?;
    let slides = layer_types(config, layers, |i| i % 2 == 0)?;
    let masks = masks(&slides, config.window_or(128)?)?;
    let bias = config.flag_or("attention_bias", true)?;
    let rope = rope(config, &heads)?;
    let count = count(config, "num_local_experts", 128)?;
    let width = config.size("intermediate_size")?;
    // A softmax over the chosen alone is one over all, divided by the sum of the chosen.
    let chosen = config.size_or("num_experts_per_tok", 4)?;
    config.always(&[
        ("swiglu_limit", &[json!(7.0), json!(7)]),
        ("hidden_act", &[json!("silu")]),
        ("experts_per_token", &[json!(chosen)]),
    ])?;
    config.passed_over(&["initial_context_length"]);
    let routing = softmax(config, "num_experts_per_tok", 4, count, Some(0.0))?;
    let balance = balance(config)?;
    let layers = masks.into_iter().enumerate().map(|(i, mask)| {
        let at = |part: &str| format!("model.layers.{i}.{part}");
        let norm = |part: &str| block::norm(at(part), hidden, eps, NormKind::Rms);
        let projection = heads.separate(&at("self_attn"), bias);
        let mut attention = heads.attention(projection, heads.output(at("self_attn.o_proj"), bias));
        attention.sinks = Some(at("self_attn.sinks"));
        let linear = |part: &str, input, output| ExpertLinear {
            name: at(&format!("mlp.experts.{part}")),
            experts: count,
            input,
            output,
            bias: true,
            stored: Stored::Transposed { swapped: false },
            parameter: at(&format!("mlp.experts.{part}")),
        };
        let router = router(at("mlp.router"), hidden, count, routing.clone(), balance);
        LayerSpec {
            attention: Attention::Grouped(attention),
            position: Position::Rope(rope.clone()),
            mask,
            feed_forward: FeedForward::Experts(Box::new(Experts {
                router: Router { linear: LinearSpec { bias: true, ..router.linear }, ..router },
                activation: GATE,
                projection: ExpertGateUp::Fused {
                    linear: linear("gate_up_proj", hidden, 2 * width),
                    interleaved: true,
                },
                down: linear("down_proj", width, hidden),
                weighted: Weighted::Output,
                shared: None,
            })),
            residual: pre_norm(norm("input_layernorm"), norm("post_attention_layernorm")),
            ending: Ending::default(),
        }
    });
    let layers = layers.collect();
    let embedding = assembly::embedding("model.embed_tokens.weight");
    let final_norm = block::norm("model.norm".into(), hidden, eps, NormKind::Rms);
    assembly::model(config, embedding, layers, final_norm, ("lm_head", false), LogitMap::PLAIN)
}

/// As the config says; where it says nothing, what the published models were made with.
fn rope(config: &Config<'_>, heads: &Heads) -> Result<Rope> {
    if rope::parameters(config)?.is_some() {
        return heads.rope(config, 150_000.0, heads.head_size);
    }
    Ok(Rope {
        theta: config.positive_or("rope_theta", 150_000.0)?,
        rotated: heads.head_size,
        layout: RopeLayout::Halves,
        scaling: RopeScaling::Yarn {
            factor: 32.0,
            original: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: rope::yarn_scale(32.0, 1.0),
            truncate: false,
        },
    })
}
