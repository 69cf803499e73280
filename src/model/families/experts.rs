//! Llama's layout with experts in the place of the feed-forward: Mixtral, Phi-3.5-MoE, Qwen 2 MoE and Qwen 3 MoE.

use super::block::{self, activation};
use super::config::{Config, wrong};
use super::layers;
use super::llama::{self, Differences};
use super::rope;
use crate::model::names::Rename;
use crate::model::spec::{
    ExpertGateUp, ExpertLinear, Experts, FeedForward, LinearSpec, ModelSpec, NormKind, NormSpec, Position, Residual,
    RopeScaling, Router, Routing, Scores, SharedExpert, Stored,
};
use crate::ops::{Activation, Weighted};
use crate::{Error, Fault, Result};

/// More experts than any model has.
const MOST_EXPERTS: i64 = 1 << 16;

/// What PEFT takes for experts in models of the types that transformers reads as it does Qwen 2 MoE.
pub(super) const TAKEN_FOR_EXPERTS: &[&str] = &["gate", "gate_proj", "up_proj", "down_proj"];

/// `MixtralConfig`: every layer has experts, whose weights add up to 1.
pub(super) fn mixtral(config: &Config<'_>) -> Result<ModelSpec> {
    refuse_jitter(config)?;
    let window = llama::window(config)?;
    let differences = Differences {
        biases: (false, false),
        theta: 1e6,
        eps: 1e-5,
        layers: llama::every(config, window)?,
        ..llama::plain(config)?
    };
    let mut spec = llama::build(config, differences)?;
    let count = count(config, "num_local_experts", 8)?;
    let routing = softmax(config, "num_experts_per_tok", 2, count, Some(0.0))?;
    every_block(config, &mut spec, count, &routing)?;
    spec.names.modules.push(Rename::Part("block_sparse_moe.gate", "mlp.gate"));
    spec.names.taken_for_experts = &["gate", "w1", "w2", "w3"];
    Ok(spec)
}

/// `PhimoeConfig` (Phi-3.5-MoE): Mixtral's names, LayerNorm, biases, two experts chosen by SparseMixer.
pub(super) fn phimoe(config: &Config<'_>) -> Result<ModelSpec> {
    let window = llama::window(config)?;
    let bias = config.flag_or("attention_bias", false)?;
    let differences = Differences {
        biases: (bias, bias),
        theta: 1e6,
        eps: 1e-5,
        layers: llama::every(config, window)?,
        ..llama::plain(config)?
    };
    let mut spec = llama::build(config, differences)?;
    let count = count(config, "num_local_experts", 16)?;
    if count < 2 {
        return Err(Error::Model(Fault::new("config.json: num_local_experts", "1 expert; SparseMixer chooses two")));
    }
    // Always two, whatever this says.
    config.passed_over(&["num_experts_per_tok"]);
    let routing = Routing::SparseMixer { jitter: config.number_or("router_jitter_noise", 0.01)? };
    every_block(config, &mut spec, count, &routing)?;
    let magnitudes = magnitudes(config)?;
    for layer in &mut spec.layers {
        if let Residual::Sequential { attention, feed_forward, .. } = &mut layer.residual {
            [attention, feed_forward].into_iter().filter_map(|around| around.before.as_mut()).for_each(centre);
        }
        if let (Position::Rope(rope), Some(magnitudes)) = (&mut layer.position, &magnitudes)
            && let RopeScaling::LongRope { attention_factors, original, .. } = &mut rope.scaling
        {
            (*attention_factors, *original) = (magnitudes.factors, magnitudes.trained);
        }
    }
    centre(&mut spec.final_norm);
    spec.head.bias = config.flag_or("lm_head_bias", false)?;
    spec.names.modules.push(Rename::Part("block_sparse_moe.gate", "mlp.router"));
    Ok(spec)
}

/// Mixtral's experts, none of them shared, in every block; their tensors are Mixtral's.
fn every_block(config: &Config<'_>, spec: &mut ModelSpec, count: i64, routing: &Routing) -> Result<()> {
    let balance = balance(config)?;
    let (hidden, width) = (spec.hidden_size, config.size("intermediate_size")?);
    let act = activation(config, "hidden_act", Activation::Silu)?;
    for (i, layer) in spec.layers.iter_mut().enumerate() {
        let at = format!("model.layers.{i}.block_sparse_moe");
        let names = Apart {
            experts: format!("{at}.experts"),
            parts: ["w1", "w3", "w2"],
            module: format!("model.layers.{i}.mlp.experts"),
        };
        let (projection, down) = names.linears(count, hidden, width);
        layer.feed_forward = FeedForward::Experts(Box::new(Experts {
            router: router(format!("{at}.gate"), hidden, count, routing.clone(), balance),
            activation: act,
            projection,
            down,
            weighted: Weighted::Output,
            shared: None,
        }));
    }
    Ok(())
}

/// A norm of the same name that is a LayerNorm.
fn centre(norm: &mut NormSpec) {
    norm.bias = norm.weights.first().map(|weight| weight.replace(".weight", ".bias"));
    norm.kind = NormKind::Layer;
}

/// What cosines and sines are multiplied by: up to the length that was trained, and beyond it.
struct Magnitudes {
    factors: [f64; 2],
    trained: i64,
}

/// `short_mscale` and `long_mscale`; a length outside, which comes first elsewhere, is not read here.
fn magnitudes(config: &Config<'_>) -> Result<Option<Magnitudes>> {
    let Some((_, p)) = rope::parameters(config)?.filter(|(_, p)| p.field("short_mscale").is_some()) else {
        return Ok(None);
    };
    let own = p.optional_size("original_max_position_embeddings")?;
    let trained = own.map_or_else(|| config.size("max_position_embeddings"), Ok)?;
    Ok(Some(Magnitudes { factors: [p.positive("short_mscale")?, p.positive("long_mscale")?], trained }))
}

/// `Qwen2MoeConfig`: some layers have experts, with a shared one that a gate lets through.
pub(super) fn qwen2_moe(config: &Config<'_>) -> Result<ModelSpec> {
    let layers = layers::count(config, "num_hidden_layers")?;
    let window = llama::qwen_window(config)?;
    let first_full = config.count_or("max_window_layers", 28)?;
    let slides = layers::layer_types(config, layers, |i| window.is_some() && i % 2 == 0 && i < first_full)?;
    let bias = config.flag_or("qkv_bias", true)?;
    let differences = Differences {
        biases: (bias, false),
        layers: llama::masks(&slides, window)?.into_iter().map(|mask| (true, mask)).collect(),
        ..llama::plain(config)?
    };
    let mut spec = llama::build(config, differences)?;
    let shared = config.size("shared_expert_intermediate_size")?;
    qwen_experts(config, &mut spec, Some(shared), (4, false))?;
    Ok(spec)
}

/// `Qwen3MoeConfig`: Qwen 3 with experts in some layers, none of them shared.
pub(super) fn qwen3_moe(config: &Config<'_>) -> Result<ModelSpec> {
    let window = llama::qwen_window(config)?;
    let differences =
        Differences { query_key_norm: true, layers: llama::every(config, window)?, ..llama::plain(config)? };
    let mut spec = llama::build(config, differences)?;
    // Read by the config's class, used by none of its layers.
    config.passed_over(&["max_window_layers"]);
    qwen_experts(config, &mut spec, None, (8, false))?;
    Ok(spec)
}

/// Qwen's experts in the layers that have them: those that `mlp_only_layers` does not name, every `decoder_sparse_step`. `shared` is
/// the width of the shared expert; `defaults` say, where the config does not, how many a token goes through and whether their weights add
/// up to 1.
pub(super) fn qwen_experts(
    config: &Config<'_>,
    spec: &mut ModelSpec,
    shared: Option<i64>,
    defaults: (i64, bool),
) -> Result<()> {
    spec.names.taken_for_experts = TAKEN_FOR_EXPERTS;
    config.passed_over(&["decoder_sparse_step", "mlp_only_layers", "norm_topk_prob", "num_experts_per_tok"]);
    config.passed_over(&["moe_intermediate_size"]);
    // transformers 5 saves what it has read under the first name under the second.
    let field = ["num_experts", "num_local_experts"].into_iter().find(|field| config.field(field).is_some());
    let field = field.unwrap_or("num_experts");
    if config.count_or(field, 60)? == 0 {
        return Ok(());
    }
    let step = config.size_or("decoder_sparse_step", 1)?;
    let dense = match config.field("mlp_only_layers") {
        None => Vec::new(),
        Some(value) => {
            let list = value.as_array().and_then(|list| list.iter().map(serde_json::Value::as_i64).collect());
            list.ok_or_else(|| wrong("mlp_only_layers", value, "a list of layer numbers"))?
        }
    };
    let count = count(config, field, 60)?;
    let normalised = config.flag_or("norm_topk_prob", defaults.1)?.then_some(0.0);
    let routing = softmax(config, "num_experts_per_tok", defaults.0, count, normalised)?;
    let balance = balance(config)?;
    let (hidden, width) = (spec.hidden_size, config.size("moe_intermediate_size")?);
    let act = activation(config, "hidden_act", Activation::Silu)?;
    for (i, layer) in (0i64..).zip(&mut spec.layers) {
        if dense.contains(&i) || (i + 1) % step != 0 {
            continue;
        }
        let at = format!("model.layers.{i}.mlp");
        let names = Apart::below(&at);
        let (projection, down) = names.linears(count, hidden, width);
        layer.feed_forward = FeedForward::Experts(Box::new(Experts {
            router: router(format!("{at}.gate"), hidden, count, routing.clone(), balance),
            activation: act,
            projection,
            down,
            weighted: Weighted::Output,
            shared: shared.map(|width| gated_shared(&at, act, hidden, width)),
        }));
    }
    Ok(())
}

/// Qwen's shared expert below `at`, let through by the sigmoid of `shared_expert_gate`.
pub(super) fn gated_shared(at: &str, activation: Activation, hidden: i64, width: i64) -> SharedExpert {
    let gate = LinearSpec { name: format!("{at}.shared_expert_gate"), input: hidden, output: 1, bias: false };
    SharedExpert {
        feed_forward: block::gated(&format!("{at}.shared_expert"), activation, hidden, width, false),
        gate: Some(gate),
    }
}

/// How a checkpoint names experts that it stores apart.
pub(super) struct Apart {
    /// Path before the number of an expert.
    pub(super) experts: String,
    /// Names of gate, up and down after it.
    pub(super) parts: [&'static str; 3],
    /// Path of transformers' module that holds them all.
    pub(super) module: String,
}

impl Apart {
    /// As most spell it: `experts.0.gate_proj` below `at`.
    pub(super) fn below(at: &str) -> Self {
        let experts = format!("{at}.experts");
        Self { module: experts.clone(), experts, parts: ["gate_proj", "up_proj", "down_proj"] }
    }

    /// Gate and up, and down, of `count` experts of `width`.
    pub(super) fn linears(&self, count: i64, hidden: i64, width: i64) -> (ExpertGateUp, ExpertLinear) {
        let linear = |part: &str, parameter: &str, input, output| ExpertLinear {
            name: format!("{}.*.{part}", self.experts),
            experts: count,
            input,
            output,
            bias: false,
            stored: Stored::Apart,
            parameter: format!("{}.{parameter}", self.module),
        };
        let [gate, up, down] = self.parts;
        let [gate, up] = [gate, up].map(|part| linear(part, "gate_up_proj", hidden, width));
        (ExpertGateUp::Separate { gate, up }, linear(down, "down_proj", width, hidden))
    }
}

/// A router without a bias, in the model's number type.
pub(super) fn router(name: String, hidden: i64, count: i64, routing: Routing, balance: f64) -> Router {
    Router {
        norm: None,
        linear: LinearSpec { name, input: hidden, output: count, bias: false },
        wide: false,
        routing,
        balance,
    }
}

/// The `field` largest of a softmax over `count` experts; `default` where the config does not say.
pub(super) fn softmax(
    config: &Config<'_>,
    field: &str,
    default: i64,
    count: i64,
    normalised: Option<f64>,
) -> Result<Routing> {
    let chosen = chosen(config, field, default, count)?;
    Ok(Routing::Largest {
        chosen,
        scores: Scores::Softmax,
        correction: None,
        groups: None,
        normalised,
        scale: 1.0,
        expert_scale: None,
    })
}

/// How many experts a token goes through: at most all of them.
pub(super) fn chosen(config: &Config<'_>, field: &str, default: i64, count: i64) -> Result<i64> {
    let chosen = config.size_or(field, default)?;
    if chosen > count {
        let what = format!("{chosen} experts for each token, but there are {count}");
        return Err(Error::Model(Fault::new(format!("config.json: {field}"), what)));
    }
    Ok(chosen)
}

/// The number of experts.
pub(super) fn count(config: &Config<'_>, field: &str, default: i64) -> Result<i64> {
    credible(config.size_or(field, default)?, field)
}

/// A number of experts that `field` may well mean.
pub(super) fn credible(count: i64, field: &str) -> Result<i64> {
    if count > MOST_EXPERTS {
        let what = format!("{count} experts; no model has more than {MOST_EXPERTS}");
        return Err(Error::Model(Fault::new(format!("config.json: {field}"), what)));
    }
    Ok(count)
}

/// The coefficient of the balancing loss: transformers adds it where `output_router_logits` is set.
pub(super) fn balance(config: &Config<'_>) -> Result<f64> {
    let used = config.flag_or("output_router_logits", false)?;
    let coefficient = config.number_or("router_aux_loss_coef", 0.001)?;
    Ok(if used { coefficient } else { 0.0 })
}

/// Noise on what routers read makes a run another one each time.
fn refuse_jitter(config: &Config<'_>) -> Result<()> {
    let jitter = config.number_or("router_jitter_noise", 0.0)?;
    if jitter == 0.0 {
        return Ok(());
    }
    let what = format!("{jitter} asks for noise on the stream while training, which is not supported");
    Err(Error::Model(Fault::new("config.json: router_jitter_noise", what).hint("set it to 0")))
}
