//! What the pages share: the parts that nearly every family spells the same way in `config.json` and in its tensor names.

use super::config::{Config, wrong};
use crate::model::names::Names;
use crate::model::spec::{
    Around, EmbeddingSpec, FeedForward, GateUp, GroupedAttention, HeadSpec, LayerSpec, LinearSpec, ModelSpec, NormKind,
    NormSpec, Projection, Residual, Rope, RopeScaling,
};
use crate::ops::{Activation, LogitMap, RopeLayout};
use crate::{Error, Fault, Result};

/// More layers than any model has.
const MOST_LAYERS: i64 = 10_000;

/// The sizes of attention.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    pub(super) hidden_size: i64,
    pub(super) heads: i64,
    pub(super) kv_heads: i64,
    pub(super) head_size: i64,
}

impl Heads {
    /// `hidden_size`, `num_attention_heads`, `num_key_value_heads` and `head_dim`, which is `head_size` where the config has none.
    pub(super) fn read(config: &Config<'_>, head_size: Option<i64>) -> Result<Self> {
        let hidden_size = config.size("hidden_size")?;
        let heads = config.size("num_attention_heads")?;
        let kv_heads = config.size_or("num_key_value_heads", heads)?;
        if heads % kv_heads != 0 {
            return Err(Error::Model(Fault::new(
                "config.json: num_key_value_heads",
                format!("{kv_heads} does not divide num_attention_heads = {heads}"),
            )));
        }
        let head_size = match (config.field("head_dim"), head_size) {
            (Some(_), _) => config.size("head_dim")?,
            (None, Some(size)) => size,
            (None, None) if hidden_size % heads != 0 => {
                return Err(Error::Model(Fault::new(
                    "config.json: hidden_size",
                    format!(
                        "{hidden_size} is not divisible by num_attention_heads = {heads}, and there is no head_dim"
                    ),
                )));
            }
            (None, None) => hidden_size / heads,
        };
        Ok(Self { hidden_size, heads, kv_heads, head_size })
    }

    /// Separate projections `q_proj`, `k_proj`, `v_proj` below `at`.
    pub(super) fn separate(&self, at: &str, bias: bool) -> Projection {
        let linear = |name: &str, heads: i64| LinearSpec {
            name: format!("{at}.{name}"),
            input: self.hidden_size,
            output: heads * self.head_size,
            bias,
        };
        Projection::Separate {
            query: linear("q_proj", self.heads),
            key: linear("k_proj", self.kv_heads),
            value: linear("v_proj", self.kv_heads),
        }
    }

    /// One weight with all of them.
    pub(super) fn fused(&self, name: String, bias: bool) -> LinearSpec {
        let output = (self.heads + 2 * self.kv_heads) * self.head_size;
        LinearSpec { name, input: self.hidden_size, output, bias }
    }

    /// Back to the stream.
    pub(super) fn output(&self, name: String, bias: bool) -> LinearSpec {
        LinearSpec { name, input: self.heads * self.head_size, output: self.hidden_size, bias }
    }

    /// Plain attention of these sizes, scores scaled by 1 / sqrt(H).
    pub(super) fn attention(&self, projection: Projection, output: LinearSpec) -> GroupedAttention {
        GroupedAttention {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_size: self.head_size,
            scale: (self.head_size as f64).powf(-0.5),
            soft_cap: None,
            projection,
            output,
            query_key_norm: None,
            value_norm: None,
            hands_on: None,
            sinks: None,
            temperature: None,
        }
    }

    /// The rotary embedding of `rotated` elements of each head.
    pub(super) fn rope(&self, config: &Config<'_>, theta: f64, rotated: i64) -> Result<Rope> {
        if rotated % 2 != 0 || rotated > self.head_size {
            return Err(Error::Model(Fault::new(
                "config.json: head_dim",
                format!("{rotated} of {} elements rotate; rotary embedding needs pairs", self.head_size),
            )));
        }
        rope(config, theta, rotated)
    }

    /// The part of each head that rotates, by `partial_rotary_factor`.
    pub(super) fn partial(&self, config: &Config<'_>, default: f64) -> Result<i64> {
        let parameters = config.object("rope_parameters")?;
        let factor = match &parameters {
            Some(p) if p.field("partial_rotary_factor").is_some() => p.positive("partial_rotary_factor")?,
            _ => config.positive_or("partial_rotary_factor", default)?,
        };
        Ok((self.head_size as f64 * factor) as i64)
    }
}

/// `num_hidden_layers`, or the field a family calls it.
pub(super) fn layer_count(config: &Config<'_>, field: &str) -> Result<i64> {
    credible(config.size(field)?, field)
}

/// A number of layers that `field` may well mean.
pub(super) fn credible(count: i64, field: &str) -> Result<i64> {
    if count > MOST_LAYERS {
        let what = format!("{count} layers; no model has more than {MOST_LAYERS}");
        return Err(Error::Model(Fault::new(format!("config.json: {field}"), what)));
    }
    Ok(count)
}

/// A norm with one weight (D).
pub(super) fn norm(name: String, width: i64, eps: f64, kind: NormKind) -> NormSpec {
    NormSpec { weights: vec![format!("{name}.weight")], shape: vec![width], bias: None, eps, kind }
}

/// A LayerNorm with weight and bias.
pub(super) fn layer_norm(name: String, width: i64, eps: f64) -> NormSpec {
    NormSpec { bias: Some(format!("{name}.bias")), ..norm(name, width, eps, NormKind::Layer) }
}

/// The whole, from its parts; `head` is its name, and whether it is tied where the config does not say.
pub(super) fn model(
    config: &Config<'_>,
    embedding: EmbeddingSpec,
    layers: Vec<LayerSpec>,
    final_norm: NormSpec,
    (head, tied): (&str, bool),
    map: LogitMap,
) -> Result<ModelSpec> {
    Ok(ModelSpec {
        model_type: String::new(), // that of the whole config, which may hold this one
        hidden_size: config.size("hidden_size")?,
        vocab_size: config.size("vocab_size")?,
        max_position_embeddings: config.size_or("max_position_embeddings", 2048)?,
        embedding,
        layer_inputs: None,
        layers,
        final_norm,
        head: HeadSpec { name: head.into(), tied: config.flag_or("tie_word_embeddings", tied)?, bias: false, map },
        names: Names::default(),
        ignored_suffixes: vec!["rotary_emb.inv_freq".into()],
        ignored_prefixes: Vec::new(),
    })
}

/// The token embedding as it is stored in `weight`.
pub(super) fn embedding(weight: &str) -> EmbeddingSpec {
    EmbeddingSpec { weight: weight.into(), scale: 1.0, norm: None }
}

/// Both halves after a norm.
pub(super) fn pre_norm(attention: NormSpec, feed_forward: NormSpec) -> Residual {
    let before = |norm| Around { before: Some(norm), after: None };
    Residual::Sequential { attention: before(attention), feed_forward: before(feed_forward), multiplier: 1.0 }
}

/// A gated feed-forward of `gate_proj`, `up_proj` and `down_proj` below `at`.
pub(super) fn gated(at: &str, activation: Activation, hidden: i64, width: i64, bias: bool) -> FeedForward {
    let linear = |part: &str, input, output| LinearSpec { name: format!("{at}.{part}"), input, output, bias };
    FeedForward::Gated {
        activation,
        projection: GateUp::Separate { gate: linear("gate_proj", hidden, width), up: linear("up_proj", hidden, width) },
        down: linear("down_proj", width, hidden),
    }
}

/// The activation named by `field`.
pub(super) fn activation(config: &Config<'_>, field: &str, default: Activation) -> Result<Activation> {
    let Some(value) = config.field(field) else { return Ok(default) };
    match value.as_str() {
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu") => Ok(Activation::Gelu),
        Some("gelu_new" | "gelu_fast" | "gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
        _ => Err(wrong(field, value, "one of silu, gelu, gelu_new, gelu_fast, gelu_pytorch_tanh")),
    }
}

/// Which layers look at a window only, from `layer_types`; `derived` where the config has none.
pub(super) fn layer_types(config: &Config<'_>, layers: i64, derived: impl Fn(i64) -> bool) -> Result<Vec<bool>> {
    let Some(value) = config.field("layer_types") else { return Ok((0..layers).map(derived).collect()) };
    let expected = "a list with sliding_attention or full_attention for each layer";
    let types = value.as_array().filter(|types| types.len() as i64 == layers);
    let types = types.ok_or_else(|| wrong("layer_types", value, expected))?;
    types
        .iter()
        .map(|kind| match kind.as_str() {
            Some("sliding_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            _ => Err(wrong("layer_types", kind, expected)),
        })
        .collect()
}

/// `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before), as `standardize_rope_params` reads them.
pub(super) fn rope(config: &Config<'_>, default_theta: f64, rotated: i64) -> Result<Rope> {
    let (field, parameters) = match config.object("rope_parameters")? {
        Some(parameters) => ("rope_parameters", Some(parameters)),
        None => ("rope_scaling", config.object("rope_scaling")?),
    };
    // Where both are there, transformers reads the first.
    let _ = config.field("rope_scaling");
    let theta = match &parameters {
        Some(p) if p.field("rope_theta").is_some() => p.positive("rope_theta")?,
        _ => config.positive_or("rope_theta", default_theta)?,
    };
    let plain = Rope { theta, rotated, layout: RopeLayout::Halves, scaling: RopeScaling::None };
    let Some(parameters) = parameters else { return Ok(plain) };
    let scaling = scaling(config, field, &parameters, rotated)?;
    Ok(Rope { scaling, ..plain })
}

/// How `parameters`, which the config calls `field`, scale.
pub(super) fn scaling(config: &Config<'_>, field: &str, p: &Config<'_>, rotated: i64) -> Result<RopeScaling> {
    // Only what reaches beyond a length needs to know the length.
    let longest = || config.size_or("max_position_embeddings", 2048);
    let original = || -> Result<i64> {
        if config.field("original_max_position_embeddings").is_some() {
            return config.size("original_max_position_embeddings");
        }
        p.size_or("original_max_position_embeddings", longest()?)
    };
    let (kind_field, kind) = match p.field("rope_type") {
        Some(kind) => ("rope_type", Some(kind)),
        None => ("type", p.field("type")),
    };
    let scaling = match kind.map(|kind| (kind, kind.as_str())) {
        None | Some((_, Some("default" | "mrope"))) => RopeScaling::None,
        Some((_, Some("linear"))) => RopeScaling::Linear { factor: p.positive("factor")? },
        Some((_, Some("dynamic"))) => RopeScaling::Dynamic { factor: p.positive("factor")?, original: longest()? },
        Some((_, Some("llama3"))) => RopeScaling::Llama3 {
            factor: p.positive("factor")?,
            original: original()?,
            low_freq_factor: p.positive("low_freq_factor")?,
            high_freq_factor: p.positive("high_freq_factor")?,
        },
        Some((_, Some("yarn"))) => {
            let original = original()?;
            let factor = p.positive_or("factor", longest()? as f64 / original as f64)?;
            let inferred = match (p.field("mscale"), p.field("mscale_all_dim")) {
                (Some(_), Some(_)) => {
                    yarn_scale(factor, p.positive("mscale")?) / yarn_scale(factor, p.positive("mscale_all_dim")?)
                }
                _ => yarn_scale(factor, 1.0),
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
        Some((_, Some("longrope" | "su"))) => {
            let original = original()?;
            let factors = |name: &str| -> Result<Vec<f64>> {
                let list = p.numbers(name)?;
                if list.len() as i64 != rotated / 2 {
                    let what = format!("{} factors for {rotated} rotating elements; half as many expected", list.len());
                    return Err(Error::Model(Fault::new(format!("config.json: {field}.{name}"), what)));
                }
                Ok(list)
            };
            let factor = p.positive_or("factor", longest()? as f64 / original as f64)?;
            let inferred = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original as f64).ln()).sqrt() };
            RopeScaling::LongRope {
                short: factors("short_factor")?,
                long: factors("long_factor")?,
                original,
                attention_factors: [p.positive_or("attention_factor", inferred)?; 2],
            }
        }
        Some((value, _)) => {
            let field = format!("{field}.{kind_field}");
            return Err(wrong(&field, value, "one of default, linear, dynamic, yarn, llama3, longrope"));
        }
    };
    Ok(scaling)
}

/// YaRN's factor for a stretch of `factor`.
pub(super) fn yarn_scale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}
