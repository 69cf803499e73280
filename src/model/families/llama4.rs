//! Llama 4 (text): chunked layers that rotate and full ones that do not, weightless norms of queries and keys, experts beside a
//! shared one in every few layers.

use super::block::{self, activation, gated, pre_norm};
use super::config::{Config, wrong};
use super::experts::{balance, chosen, count, router};
use super::heads::Heads;
use super::{assembly, layers};
use crate::model::spec::{
    Attention, Ending, ExpertGateUp, ExpertLinear, Experts, FeedForward, LayerSpec, Mask, ModelSpec, NormKind,
    NormSpec, Position, QueryKeyNorm, Rope, Routing, Scores, SharedExpert, Stored, Temperature,
};
use crate::ops::{Activation, LogitMap, RopeLayout, Weighted};
use crate::{Error, Fault, Result};

/// `Llama4TextConfig`.
pub(super) fn llama4(config: &Config<'_>) -> Result<ModelSpec> {
    let heads = Heads::read(config, Some(128))?;
    let (hidden, eps) = (heads.hidden_size, config.positive_or("rms_norm_eps", 1e-5)?);
    let layers = layers::count(config, "num_hidden_layers")?;
    let rotates = rotates(config, layers)?;
    let chunks = chunked(config, &rotates)?;
    let size = config.size_or("attention_chunk_size", 8192)?;
    let rope = Rope { layout: RopeLayout::Pairs, ..heads.rope(config, 500_000.0, heads.head_size)? };
    let bias = config.flag_or("attention_bias", false)?;
    let normed = config.flag_or("use_qk_norm", true)?;
    let temperature = Temperature {
        growth: config.positive_or("attn_scale", 0.1)?,
        every: config.size_or("floor_scale", 8192)?,
        first: 1,
    };
    let temperature = truthy(config, "attn_temperature_tuning", true).then_some(temperature);
    let act = activation(config, "hidden_act", Activation::Silu)?;
    let with_experts = with_experts(config, layers)?;
    let dense_width = config.size("intermediate_size_mlp")?;
    // The first is read by nothing in the reference; the others are of experts, which no layer may have.
    config.passed_over(&["router_jitter_noise", "intermediate_size", "num_local_experts", "num_experts_per_tok"]);
    let layers = (0..layers).map(|i| -> Result<LayerSpec> {
        let at = |part: &str| format!("model.layers.{i}.{part}");
        let norm = |part: &str| block::norm(at(part), hidden, eps, NormKind::Rms);
        let rotates = rotates[i as usize];
        let projection = heads.separate(&at("self_attn"), bias);
        let mut attention = heads.attention(projection, heads.output(at("self_attn.o_proj"), bias));
        if rotates {
            let weightless =
                || NormSpec { weights: Vec::new(), ..block::norm(String::new(), heads.head_size, eps, NormKind::Rms) };
            attention.query_key_norm =
                normed.then(|| QueryKeyNorm { query: weightless(), key: Some(weightless()), after_rotation: true });
        } else {
            attention.temperature = temperature;
        }
        let feed_forward = match with_experts.contains(&i) {
            true => experts(config, &at("feed_forward"), act, hidden)?,
            false => gated(&at("feed_forward"), act, hidden, dense_width, false),
        };
        Ok(LayerSpec {
            attention: Attention::Grouped(attention),
            position: if rotates { Position::Rope(rope.clone()) } else { Position::None },
            mask: if chunks[i as usize] { Mask::Chunked { size } } else { Mask::Full },
            feed_forward,
            residual: pre_norm(norm("input_layernorm"), norm("post_attention_layernorm")),
            ending: Ending::default(),
        })
    });
    let layers = layers.collect::<Result<Vec<_>>>()?;
    let embedding = assembly::embedding("model.embed_tokens.weight");
    let final_norm = block::norm("model.norm".into(), hidden, eps, NormKind::Rms);
    assembly::model(config, embedding, layers, final_norm, ("lm_head", false), LogitMap::PLAIN)
}

/// Experts whose input is scaled, and the one that every token goes through, below `at`.
fn experts(config: &Config<'_>, at: &str, activation: Activation, hidden: i64) -> Result<FeedForward> {
    let (count, width) = (count(config, "num_local_experts", 16)?, config.size("intermediate_size")?);
    let linear = |part: &str, input, output| ExpertLinear {
        name: format!("{at}.experts.{part}"),
        experts: count,
        input,
        output,
        bias: false,
        stored: Stored::Transposed { swapped: true },
        parameter: format!("{at}.experts.{part}"),
    };
    let routing = Routing::Largest {
        chosen: chosen(config, "num_experts_per_tok", 1, count)?,
        scores: Scores::Sigmoid,
        correction: None,
        groups: None,
        normalised: None,
        scale: 1.0,
        expert_scale: None,
    };
    // The reference's language model adds no balancing loss; the fields are there all the same.
    let _ = balance(config)?;
    Ok(FeedForward::Experts(Box::new(Experts {
        router: router(format!("{at}.router"), hidden, count, routing, 0.0),
        activation,
        projection: ExpertGateUp::Fused { linear: linear("gate_up_proj", hidden, 2 * width), interleaved: false },
        down: linear("down_proj", width, hidden),
        weighted: Weighted::Input,
        shared: Some(SharedExpert {
            feed_forward: gated(&format!("{at}.shared_expert"), activation, hidden, width, false),
            gate: None,
        }),
    })))
}

/// Which layers rotate: `no_rope_layers` says 1 for those that do.
fn rotates(config: &Config<'_>, layers: i64) -> Result<Vec<bool>> {
    let interval = config.size_or("no_rope_layer_interval", 4)?;
    let listed = match config.field("no_rope_layers") {
        Some(_) => config.flags("no_rope_layers")?,
        None => Vec::new(),
    };
    if listed.is_empty() {
        return Ok((0..layers).map(|i| (i + 1) % interval != 0).collect());
    }
    if listed.len() as i64 != layers {
        let what = format!("{} entries for num_hidden_layers = {layers}", listed.len());
        return Err(Error::Model(Fault::new("config.json: no_rope_layers", what)));
    }
    Ok(listed)
}

/// Which layers see their chunk only: those that rotate, unless `layer_types` says otherwise.
fn chunked(config: &Config<'_>, rotates: &[bool]) -> Result<Vec<bool>> {
    let Some(value) = config.field("layer_types") else { return Ok(rotates.to_vec()) };
    let expected = "a list with chunked_attention or full_attention for each layer";
    let kinds = value.as_array().filter(|kinds| kinds.len() == rotates.len());
    kinds
        .ok_or_else(|| wrong("layer_types", value, expected))?
        .iter()
        .map(|kind| match kind.as_str() {
            Some("chunked_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            _ => Err(wrong("layer_types", kind, expected)),
        })
        .collect()
}

/// The layers with experts: `moe_layers`, or every `interleave_moe_layer_step`.
fn with_experts(config: &Config<'_>, layers: i64) -> Result<Vec<i64>> {
    let step = config.size_or("interleave_moe_layer_step", 1)?;
    match config.field("moe_layers") {
        None => Ok((step - 1..layers).step_by(step as usize).collect()),
        Some(value) => {
            let list = value.as_array().and_then(|list| list.iter().map(serde_json::Value::as_i64).collect());
            list.ok_or_else(|| wrong("moe_layers", value, "a list of layer numbers"))
        }
    }
}

/// A flag that files also write as a number.
fn truthy(config: &Config<'_>, field: &str, default: bool) -> bool {
    config
        .field(field)
        .map_or(default, |value| value.as_bool().unwrap_or_else(|| value.as_f64().is_none_or(|number| number != 0.0)))
}
