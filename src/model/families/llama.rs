//! Llama 2 and 3 and what copies their architecture: Yi, SmolLM2, Falcon 3, TinyLlama, MobileLLM.

use super::config::{Config, wrong};
use crate::model::spec::{
    Attention, FeedForward, HeadSpec, LayerSpec, LinearSpec, Mask, ModelSpec, NormSpec, Position, Residual, Rope,
    RopeScaling,
};
use crate::ops::Activation;
use crate::{Error, Fault, Result};

pub(super) const MODEL_TYPES: &[&str] = &["llama", "mobilellm"];

/// `transformers`' `LlamaConfig`, field by field.
pub(super) fn spec(config: &Config<'_>) -> Result<ModelSpec> {
    config.refuse(&[
        ("quantization_config", "a quantised base"),
        ("attn_logit_softcapping", "soft caps"),
        ("final_logit_softcapping", "soft caps"),
        ("num_local_experts", "experts"),
        ("sliding_window", "a sliding window"),
        ("layer_sharing", "shared blocks"),
    ])?;
    let hidden_size = config.size("hidden_size")?;
    let heads = config.size("num_attention_heads")?;
    let kv_heads = config.size_or("num_key_value_heads", heads)?;
    if heads % kv_heads != 0 {
        return Err(Error::Model(Fault::new(
            "config.json: num_key_value_heads",
            format!("{kv_heads} does not divide num_attention_heads = {heads}"),
        )));
    }
    let head_size = match config.field("head_dim") {
        Some(_) => config.size("head_dim")?,
        None if hidden_size % heads != 0 => {
            return Err(Error::Model(Fault::new(
                "config.json: hidden_size",
                format!("{hidden_size} is not divisible by num_attention_heads = {heads}, and there is no head_dim"),
            )));
        }
        None => hidden_size / heads,
    };
    if head_size % 2 != 0 {
        return Err(Error::Model(Fault::new(
            "config.json: head_dim",
            format!("{head_size} is odd; rotary embedding needs pairs"),
        )));
    }
    let intermediate = config.size("intermediate_size")?;
    let max_position_embeddings = config.size_or("max_position_embeddings", 2048)?;
    let eps = config.positive_or("rms_norm_eps", 1e-6)?;
    let attention_bias = config.flag_or("attention_bias", false)?;
    let mlp_bias = config.flag_or("mlp_bias", false)?;
    let tied = config.flag_or("tie_word_embeddings", false)? || config.flag_or("share_embedding", false)?;
    let activation = activation(config)?;
    let rope = rope(config, head_size, max_position_embeddings)?;

    let layers = (0..config
        .size("num_hidden_layers")
        .and_then(|n| if n <= 10_000 { Ok(n) } else { Err(wrong("num_hidden_layers", &n.into(), "at most 10000")) })?)
        .map(|i| {
            let at = |part: &str| format!("model.layers.{i}.{part}");
            let linear = |part: &str, input, output, bias| LinearSpec { name: at(part), input, output, bias };
            let norm = |part: &str| NormSpec { weight: at(part), width: hidden_size, eps };
            LayerSpec {
                attention: Attention::Grouped {
                    heads,
                    kv_heads,
                    head_size,
                    scale: (head_size as f64).powf(-0.5),
                    query: linear("self_attn.q_proj", hidden_size, heads * head_size, attention_bias),
                    key: linear("self_attn.k_proj", hidden_size, kv_heads * head_size, attention_bias),
                    value: linear("self_attn.v_proj", hidden_size, kv_heads * head_size, attention_bias),
                    output: linear("self_attn.o_proj", heads * head_size, hidden_size, attention_bias),
                },
                position: Position::Rope(rope.clone()),
                mask: Mask::Full,
                feed_forward: FeedForward::Gated {
                    activation,
                    gate: linear("mlp.gate_proj", hidden_size, intermediate, mlp_bias),
                    up: linear("mlp.up_proj", hidden_size, intermediate, mlp_bias),
                    down: linear("mlp.down_proj", intermediate, hidden_size, mlp_bias),
                },
                residual: Residual::Sequential {
                    attention_norm: norm("input_layernorm.weight"),
                    feed_forward_norm: norm("post_attention_layernorm.weight"),
                },
            }
        })
        .collect();
    Ok(ModelSpec {
        model_type: config.text("model_type")?.to_string(),
        hidden_size,
        vocab_size: config.size("vocab_size")?,
        max_position_embeddings,
        embedding: "model.embed_tokens.weight".into(),
        layers,
        final_norm: NormSpec { weight: "model.norm.weight".into(), width: hidden_size, eps },
        head: HeadSpec { name: "lm_head".into(), tied },
        ignored_suffixes: vec!["rotary_emb.inv_freq"],
    })
}

fn activation(config: &Config<'_>) -> Result<Activation> {
    let Some(value) = config.field("hidden_act") else { return Ok(Activation::Silu) };
    match value.as_str() {
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu") => Ok(Activation::Gelu),
        Some("gelu_new" | "gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
        _ => Err(wrong("hidden_act", value, "one of silu, gelu, gelu_new, gelu_pytorch_tanh")),
    }
}

/// `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before), as `standardize_rope_params` reads them.
fn rope(config: &Config<'_>, head_size: i64, max_position_embeddings: i64) -> Result<Rope> {
    let (place, parameters) = match config.object("rope_parameters")? {
        Some(parameters) => ("rope_parameters", Some(parameters)),
        None => ("rope_scaling", config.object("rope_scaling")?),
    };
    let theta = match &parameters {
        Some(p) if p.field("rope_theta").is_some() => p.positive("rope_theta")?,
        _ => config.positive_or("rope_theta", 10_000.0)?,
    };
    let plain = Rope { theta, rotated: head_size, scaling: RopeScaling::None };
    let Some(p) = parameters else { return Ok(plain) };
    p.refuse(&[("partial_rotary_factor", "partial rotation")])?;
    let key = if p.field("rope_type").is_some() { "rope_type" } else { "type" };
    let kind = p.field(key);
    let factor = || p.positive("factor");
    let original = || -> Result<i64> {
        if config.field("original_max_position_embeddings").is_some() {
            return config.size("original_max_position_embeddings");
        }
        p.size_or("original_max_position_embeddings", max_position_embeddings)
    };
    let scaling = match kind.map(|k| (k, k.as_str())) {
        None | Some((_, Some("default"))) => RopeScaling::None,
        Some((_, Some("linear"))) => RopeScaling::Linear { factor: factor()? },
        Some((_, Some("dynamic"))) => RopeScaling::Dynamic { factor: factor()?, original: max_position_embeddings },
        Some((_, Some("llama3"))) => RopeScaling::Llama3 {
            factor: factor()?,
            original: original()?,
            low_freq_factor: p.positive("low_freq_factor")?,
            high_freq_factor: p.positive("high_freq_factor")?,
        },
        Some((_, Some("yarn"))) => {
            let original = original()?;
            let factor = p.positive_or("factor", max_position_embeddings as f64 / original as f64)?;
            let mscale = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
            let inferred = match (p.field("mscale"), p.field("mscale_all_dim")) {
                (Some(_), Some(_)) => mscale(p.positive("mscale")?) / mscale(p.positive("mscale_all_dim")?),
                _ => mscale(1.0),
            };
            RopeScaling::Yarn {
                factor,
                original,
                beta_fast: p.positive_or("beta_fast", 32.0)?,
                beta_slow: p.positive_or("beta_slow", 1.0)?,
                attention_factor: p.positive_or("attention_factor", inferred)?,
                truncate: p.flag_or("truncate", true)?,
            }
        }
        Some((value, _)) => {
            return Err(wrong(&format!("{place}.{key}"), value, "one of default, linear, dynamic, yarn, llama3"));
        }
    };
    Ok(Rope { scaling, ..plain })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn an_unknown_rope_type_is_named_as_the_config_spells_it() {
        let rope = |name: &str, parameters: Value| {
            let config = json!({ name: parameters });
            rope(&Config::new(&config), 64, 2048).unwrap_err().to_string()
        };
        for (name, key) in [("rope_parameters", "rope_type"), ("rope_scaling", "rope_type"), ("rope_scaling", "type")] {
            let said = rope(name, json!({ key: "longrope" }));
            assert!(said.starts_with(&format!("config.json: {name}.{key}: \"longrope\" found")), "{said}");
        }
    }
}
