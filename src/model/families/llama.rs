//! Llama 2 and 3 and what keeps their layout: Yi, SmolLM2, Falcon 3, TinyLlama, MobileLLM; and with a difference or two SmolLM3,
//! Mistral, Ministral, Qwen 2 and 3, Granite.

use serde_json::json;

use super::assembly;
use super::block::{self, activation, pre_norm};
use super::config::Config;
use super::heads::Heads;
use super::layers::{self, layer_types};
use super::rope;
use crate::model::spec::{
    Attention, Ending, LayerSpec, Mask, ModelSpec, NormKind, Position, QueryKeyNorm, Residual, Temperature,
};
use crate::ops::{Activation, LogitMap};
use crate::{Error, Fault, Result};

/// What tells these families apart.
pub(super) struct Differences {
    /// Biases of query, key, value, and of the attention's output.
    pub(super) biases: (bool, bool),
    /// `head_dim` where the config has none; `None` is D / N.
    pub(super) head_size: Option<i64>,
    pub(super) theta: f64,
    pub(super) eps: f64,
    pub(super) tied: bool,
    /// Whether queries and keys are normed, head by head.
    pub(super) query_key_norm: bool,
    /// Of each layer: whether it rotates, and what it sees.
    pub(super) layers: Vec<(bool, Mask)>,
    pub(super) temperature: Option<Temperature>,
}

/// `transformers`' `LlamaConfig`, field by field.
pub(super) fn llama(config: &Config<'_>) -> Result<ModelSpec> {
    // Falcon 3 says what hidden_act is once more, with the gate.
    config.always(&[("activation", &[json!("swiglu"), json!("silu")])])?;
    build(config, plain(config)?)
}

/// MobileLLM's own config: its names for a tied head, and for blocks that are gone through twice (arXiv:2402.14905).
pub(super) fn mobilellm(config: &Config<'_>) -> Result<ModelSpec> {
    let mut spec = llama(config)?;
    spec.head.tied |= config.flag_or("share_embedding", false)?;
    spec.passes = if config.flag_or("layer_sharing", false)? { 2 } else { 1 };
    Ok(spec)
}

/// `SmolLM3Config`: some layers do not rotate.
pub(super) fn smollm3(config: &Config<'_>) -> Result<ModelSpec> {
    let count = layers::count(config, "num_hidden_layers")?;
    let interval = config.size_or("no_rope_layer_interval", 4)?;
    let rotates: Vec<bool> = match config.field("no_rope_layers") {
        Some(_) => config.flags("no_rope_layers")?,
        None => (0..count).map(|i| (i + 1) % interval != 0).collect(),
    };
    if rotates.len() as i64 != count {
        let what = format!("{} entries for num_hidden_layers = {count}", rotates.len());
        return Err(Error::Model(Fault::new("config.json: no_rope_layers", what)));
    }
    config.passed_over(&["max_window_layers"]);
    // `layer_types` that say so slide also where this says that none does.
    let (window, used) = (window(config)?, config.flag_or("use_sliding_window", false)?);
    let derived = |i: i64| used && window.is_some() && !rotates[i as usize];
    let slides = layer_types(config, count, derived)?;
    let layers = rotates.iter().zip(masks(&slides, window)?).map(|(rotates, mask)| (*rotates, mask)).collect();
    build(config, Differences { theta: 2e6, tied: true, layers, ..plain(config)? })
}

/// `MistralConfig`: every layer slides where there is a window, which is 4096 where the config does not say.
pub(super) fn mistral(config: &Config<'_>) -> Result<ModelSpec> {
    let window = config.window_or(4096)?;
    let _ = config.field("layer_types"); // transformers passes over it, too
    build(config, Differences { layers: every(config, window)?, biases: (false, false), ..plain(config)? })
}

/// `MinistralConfig`: some layers slide.
pub(super) fn ministral(config: &Config<'_>) -> Result<ModelSpec> {
    let count = layers::count(config, "num_hidden_layers")?;
    let window = config.window_or(4096)?;
    let slides = layer_types(config, count, |_| window.is_some())?;
    let layers = masks(&slides, window)?.into_iter().map(|mask| (true, mask)).collect();
    build(config, Differences { layers, biases: (false, false), ..plain(config)? })
}

/// `Ministral3Config`: queries grow with their position.
pub(super) fn ministral3(config: &Config<'_>) -> Result<ModelSpec> {
    let (_, parameters) = rope::parameters(config)?
        .ok_or_else(|| Error::Model(Fault::new("config.json: rope_parameters", "missing; this family needs them")))?;
    let temperature = match parameters.optional("llama_4_scaling_beta")? {
        Some(growth) => Some(Temperature { growth, every: rope::trained_length(config, &parameters)?, first: 0 }),
        None => None,
    };
    let window = window(config)?;
    let differences = Differences {
        layers: every(config, window)?,
        biases: (false, false),
        head_size: Some(128),
        eps: 1e-5,
        temperature,
        ..plain(config)?
    };
    build(config, differences)
}

/// `Qwen2Config`: biases of query, key and value; later layers may slide.
pub(super) fn qwen2(config: &Config<'_>) -> Result<ModelSpec> {
    build(config, Differences { biases: (true, false), layers: qwen_layers(config)?, ..plain(config)? })
}

/// `Qwen3Config`: queries and keys are normed.
pub(super) fn qwen3(config: &Config<'_>) -> Result<ModelSpec> {
    let differences =
        Differences { query_key_norm: true, head_size: Some(128), layers: qwen_layers(config)?, ..plain(config)? };
    build(config, differences)
}

/// `GraniteConfig`: four multipliers.
pub(super) fn granite(config: &Config<'_>) -> Result<ModelSpec> {
    let mut spec = build(config, plain(config)?)?;
    spec.embedding.scale = config.positive_or("embedding_multiplier", 1.0)?;
    spec.head.map.scale = 1.0 / config.positive_or("logits_scaling", 1.0)?;
    let scale = config.positive_or("attention_multiplier", 1.0)?;
    let added = config.positive_or("residual_multiplier", 1.0)?;
    for layer in &mut spec.layers {
        if let Attention::Grouped(attention) = &mut layer.attention {
            attention.scale = scale;
        }
        if let Residual::Sequential { multiplier, .. } = &mut layer.residual {
            *multiplier = added;
        }
    }
    Ok(spec)
}

/// Llama's own.
pub(super) fn plain(config: &Config<'_>) -> Result<Differences> {
    let bias = config.flag_or("attention_bias", false)?;
    Ok(Differences {
        biases: (bias, bias),
        head_size: None,
        theta: 10_000.0,
        eps: 1e-6,
        tied: false,
        query_key_norm: false,
        layers: every(config, None)?,
        temperature: None,
    })
}

fn qwen_layers(config: &Config<'_>) -> Result<Vec<(bool, Mask)>> {
    let count = layers::count(config, "num_hidden_layers")?;
    let window = qwen_window(config)?;
    let first = config.count_or("max_window_layers", 28)?;
    let slides = layer_types(config, count, |i| window.is_some() && i >= first)?;
    Ok(masks(&slides, window)?.into_iter().map(|mask| (true, mask)).collect())
}

/// `sliding_window`, 4096 where it is absent, unless `use_sliding_window` says that there is none: then it may say anything.
pub(super) fn qwen_window(config: &Config<'_>) -> Result<Option<i64>> {
    config.passed_over(&["sliding_window"]);
    if config.flag_or("use_sliding_window", false)? { config.window_or(4096) } else { Ok(None) }
}

/// `sliding_window`; none where it is absent or null.
pub(super) fn window(config: &Config<'_>) -> Result<Option<i64>> {
    config.optional_size("sliding_window")
}

pub(super) fn every(config: &Config<'_>, window: Option<i64>) -> Result<Vec<(bool, Mask)>> {
    let mask = window.map_or(Mask::Full, |window| Mask::Sliding { window });
    Ok((0..layers::count(config, "num_hidden_layers")?).map(|_| (true, mask)).collect())
}

/// The mask of each layer by whether it slides.
pub(super) fn masks(slides: &[bool], window: Option<i64>) -> Result<Vec<Mask>> {
    let mask = |slides: &bool| match (slides, window) {
        (false, _) => Ok(Mask::Full),
        (true, Some(window)) => Ok(Mask::Sliding { window }),
        (true, None) => {
            let what = "a layer slides, but sliding_window says that there is no window";
            Err(Error::Model(Fault::new("config.json: layer_types", what).hint("give sliding_window")))
        }
    };
    slides.iter().map(mask).collect()
}

pub(super) fn build(config: &Config<'_>, differences: Differences) -> Result<ModelSpec> {
    let heads = Heads::read(config, differences.head_size)?;
    let hidden = heads.hidden_size;
    let eps = config.positive_or("rms_norm_eps", differences.eps)?;
    let intermediate = config.size("intermediate_size")?;
    let mlp_bias = config.flag_or("mlp_bias", false)?;
    let act = activation(config, "hidden_act", Activation::Silu)?;
    let rope = heads.rope(config, differences.theta, heads.head_size)?;
    let layers = differences.layers.iter().enumerate().map(|(i, (rotates, mask))| {
        let at = |part: &str| format!("model.layers.{i}.{part}");
        let norm = |part: &str, width| block::norm(at(part), width, eps, NormKind::Rms);
        let (inward, outward) = differences.biases;
        let projection = heads.separate(&at("self_attn"), inward);
        let mut attention = heads.attention(projection, heads.output(at("self_attn.o_proj"), outward));
        attention.query_key_norm = differences.query_key_norm.then(|| QueryKeyNorm {
            query: norm("self_attn.q_norm", heads.head_size),
            key: Some(norm("self_attn.k_norm", heads.head_size)),
            after_rotation: false,
        });
        attention.temperature = differences.temperature;
        LayerSpec {
            attention: Attention::Grouped(attention),
            position: if *rotates { Position::Rope(rope.clone()) } else { Position::None },
            mask: *mask,
            feed_forward: block::gated(&at("mlp"), act, hidden, intermediate, mlp_bias),
            residual: pre_norm(norm("input_layernorm", hidden), norm("post_attention_layernorm", hidden)),
            ending: Ending::default(),
        }
    });
    let embedding = assembly::embedding("model.embed_tokens.weight");
    let final_norm = block::norm("model.norm".into(), hidden, eps, NormKind::Rms);
    assembly::model(config, embedding, layers.collect(), final_norm, ("lm_head", differences.tied), LogitMap::PLAIN)
}
