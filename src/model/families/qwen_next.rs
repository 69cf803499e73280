//! Qwen3-Next and Qwen 3.5: gated delta-nets, and every few layers attention whose output is gated. Norms of `1 + w`.

use serde_json::json;

use super::block::{self, activation, pre_norm};
use super::config::{Config, wrong};
use super::experts::{self, Apart};
use super::heads::Heads;
use super::{assembly, layers, wrapped};
use crate::model::spec::{
    Attention, DeltaNet, DeltaProjection, Ending, ExpertGateUp, ExpertLinear, Experts, FeedForward, LayerSpec,
    LinearSpec, Mask, ModelSpec, NormKind, Position, Projection, QueryKeyNorm, Stored,
};
use crate::ops::{Activation, LogitMap, Weighted};
use crate::{Error, Fault, Result};

/// `Qwen3NextConfig`: experts in most layers, with a shared one.
pub(super) fn qwen3_next(config: &Config<'_>) -> Result<ModelSpec> {
    let mut spec = build(config, &Net::interleaved, &dense(config)?)?;
    let shared = config.size("shared_expert_intermediate_size")?;
    experts::qwen_experts(config, &mut spec, Some(shared), (10, true))?;
    Ok(spec)
}

/// `Qwen3_5TextConfig`: a dense feed-forward in every layer; transformers saves what it has read from a larger model under names of that.
pub(super) fn qwen3_5(config: &Config<'_>) -> Result<ModelSpec> {
    let mut spec = build(config, &Net::separate, &dense(config)?)?;
    spec.names.layouts = vec![Vec::new(), wrapped::INSIDE.to_vec()];
    Ok(spec)
}

/// `Qwen3_5MoeTextConfig` as published, inside the larger model: the experts of a layer in one tensor.
pub(super) fn qwen3_5_moe(config: &Config<'_>) -> Result<ModelSpec> {
    let linears = |at: &str, count, hidden, width| {
        let linear = |part: &str, input, output| ExpertLinear {
            name: format!("{at}.experts.{part}"),
            experts: count,
            input,
            output,
            bias: false,
            stored: Stored::Together,
            parameter: format!("{at}.experts.{part}"),
        };
        let both = ExpertGateUp::Fused { linear: linear("gate_up_proj", hidden, 2 * width), interleaved: false };
        (both, linear("down_proj", width, hidden))
    };
    build(config, &Net::separate, &with_experts(config, &linears)?)
}

/// `Qwen3_5MoeTextConfig` as transformers saves the text model alone: every expert in tensors of its own.
pub(super) fn qwen3_5_moe_apart(config: &Config<'_>) -> Result<ModelSpec> {
    let linears = |at: &str, count, hidden, width| Apart::below(at).linears(count, hidden, width);
    let mut spec = build(config, &Net::separate, &with_experts(config, &linears)?)?;
    spec.names.taken_for_experts = experts::TAKEN_FOR_EXPERTS;
    Ok(spec)
}

/// `Qwen3_5MoeTextConfig` as transformers saves the text model that it has read from a larger one: in the files as those of that one.
pub(super) fn qwen3_5_moe_of_larger(config: &Config<'_>) -> Result<ModelSpec> {
    let mut spec = qwen3_5_moe(config)?;
    spec.names.layouts = vec![wrapped::INSIDE.to_vec()];
    Ok(spec)
}

/// The same in files that store every expert apart.
pub(super) fn qwen3_5_moe_apart_of_larger(config: &Config<'_>) -> Result<ModelSpec> {
    let mut spec = qwen3_5_moe_apart(config)?;
    spec.names.layouts = vec![wrapped::INSIDE.to_vec()];
    Ok(spec)
}

/// The same dense feed-forward in every layer, by where it is.
fn dense(config: &Config<'_>) -> Result<impl Fn(&str) -> FeedForward> {
    let (hidden, width) = (config.size("hidden_size")?, config.size("intermediate_size")?);
    let activation = activation(config, "hidden_act", Activation::Silu)?;
    Ok(move |at: &str| block::gated(at, activation, hidden, width, false))
}

/// Of the experts of a layer, by where they are, how many, the stream's width and theirs: gate and up, down.
type ExpertLinears<'a> = &'a dyn Fn(&str, i64, i64, i64) -> (ExpertGateUp, ExpertLinear);

/// Qwen 3.5's experts in every layer, with a shared one; their weights always add up to 1.
fn with_experts<'a>(config: &Config<'_>, linears: ExpertLinears<'a>) -> Result<impl Fn(&str) -> FeedForward + 'a> {
    let (hidden, width) = (config.size("hidden_size")?, config.size("moe_intermediate_size")?);
    let shared = config.size("shared_expert_intermediate_size")?;
    let count = experts::count(config, "num_experts", 256)?;
    config.always(&[("norm_topk_prob", &[json!(true)])])?;
    config.passed_over(&["intermediate_size"]);
    let routing = experts::softmax(config, "num_experts_per_tok", 8, count, Some(0.0))?;
    let balance = experts::balance(config)?;
    let activation = activation(config, "hidden_act", Activation::Silu)?;
    Ok(move |at: &str| {
        let (projection, down) = linears(at, count, hidden, width);
        FeedForward::Experts(Box::new(Experts {
            router: experts::router(format!("{at}.gate"), hidden, count, routing.clone(), balance),
            activation,
            projection,
            down,
            weighted: Weighted::Output,
            shared: Some(experts::gated_shared(at, activation, hidden, shared)),
        }))
    })
}

/// The sizes of a delta-net.
struct Net {
    hidden_size: i64,
    key_heads: i64,
    value_heads: i64,
    key_size: i64,
    value_size: i64,
    taps: i64,
    eps: f64,
}

impl Net {
    fn read(config: &Config<'_>, eps: f64) -> Result<Self> {
        let net = Self {
            hidden_size: config.size("hidden_size")?,
            key_heads: config.size_or("linear_num_key_heads", 16)?,
            value_heads: config.size_or("linear_num_value_heads", 32)?,
            key_size: config.size_or("linear_key_head_dim", 128)?,
            value_size: config.size_or("linear_value_head_dim", 128)?,
            taps: config.size_or("linear_conv_kernel_dim", 4)?,
            eps,
        };
        if net.value_heads % net.key_heads != 0 {
            let what = format!("{} does not divide linear_num_value_heads = {}", net.key_heads, net.value_heads);
            return Err(Error::Model(Fault::new("config.json: linear_num_key_heads", what)));
        }
        Ok(net)
    }

    fn linear(&self, name: String, output: i64) -> LinearSpec {
        LinearSpec { name, input: self.hidden_size, output, bias: false }
    }

    /// Qwen3-Next's.
    fn interleaved(&self, at: &str) -> DeltaProjection {
        let (keys, values) = (self.key_heads * self.key_size, self.value_heads * self.value_size);
        DeltaProjection::Interleaved {
            qkvz: self.linear(format!("{at}.in_proj_qkvz"), 2 * keys + 2 * values),
            ba: self.linear(format!("{at}.in_proj_ba"), 2 * self.value_heads),
        }
    }

    /// Qwen 3.5's.
    fn separate(&self, at: &str) -> DeltaProjection {
        let (keys, values) = (self.key_heads * self.key_size, self.value_heads * self.value_size);
        let linear = |part: &str, output| self.linear(format!("{at}.{part}"), output);
        DeltaProjection::Separate {
            qkv: linear("in_proj_qkv", 2 * keys + values),
            z: linear("in_proj_z", values),
            b: linear("in_proj_b", self.value_heads),
            a: linear("in_proj_a", self.value_heads),
        }
    }

    fn spec(&self, at: &str, projection: DeltaProjection) -> DeltaNet {
        let values = self.value_heads * self.value_size;
        DeltaNet {
            key_heads: self.key_heads,
            value_heads: self.value_heads,
            key_size: self.key_size,
            value_size: self.value_size,
            taps: self.taps,
            projection,
            convolution: format!("{at}.conv1d.weight"),
            pace: format!("{at}.A_log"),
            bias: format!("{at}.dt_bias"),
            norm: block::norm(format!("{at}.norm"), self.value_size, self.eps, NormKind::Rms),
            output: LinearSpec { name: format!("{at}.out_proj"), input: values, output: self.hidden_size, bias: false },
        }
    }
}

fn build(
    config: &Config<'_>,
    projection: &dyn Fn(&Net, &str) -> DeltaProjection,
    feed_forward: &dyn Fn(&str) -> FeedForward,
) -> Result<ModelSpec> {
    let heads = Heads::read(config, Some(256))?;
    let eps = config.positive_or("rms_norm_eps", 1e-6)?;
    let net = Net::read(config, eps)?;
    let bias = config.flag_or("attention_bias", false)?;
    if !config.flag_or("attn_output_gate", true)? {
        let what = "false found, but the attention of this family has a gate";
        return Err(Error::Model(Fault::new("config.json: attn_output_gate", what).hint("use a base with it")));
    }
    let rope = heads.rope(config, 10_000.0, heads.partial(config, 0.25)?)?;
    let recurrent = recurrent(config, layers::count(config, "num_hidden_layers")?)?;
    if recurrent.contains(&true) && activation(config, "hidden_act", Activation::Silu)? != Activation::Silu {
        let what = "only silu is supported where layers are of linear_attention: their convolution goes through it";
        return Err(Error::Model(Fault::new("config.json: hidden_act", what).hint("use a base with it")));
    }
    let layers = recurrent.iter().enumerate().map(|(i, recurrent)| {
        let at = |part: &str| format!("model.layers.{i}.{part}");
        let norm = |part: &str, width| block::norm(at(part), width, eps, NormKind::RmsOffset);
        let (attention, position) = if *recurrent {
            let at = at("linear_attn");
            (Attention::DeltaNet(net.spec(&at, projection(&net, &at))), Position::None)
        } else {
            let mut attention =
                heads.attention(gated(&heads, &at("self_attn"), bias), heads.output(at("self_attn.o_proj"), bias));
            attention.query_key_norm = Some(QueryKeyNorm {
                query: norm("self_attn.q_norm", heads.head_size),
                key: Some(norm("self_attn.k_norm", heads.head_size)),
                after_rotation: false,
            });
            (Attention::Grouped(attention), Position::Rope(rope.clone()))
        };
        LayerSpec {
            attention,
            position,
            mask: Mask::Full,
            feed_forward: feed_forward(&at("mlp")),
            residual: pre_norm(
                norm("input_layernorm", heads.hidden_size),
                norm("post_attention_layernorm", heads.hidden_size),
            ),
            ending: Ending::default(),
        }
    });
    let embedding = assembly::embedding("model.embed_tokens.weight");
    let final_norm = block::norm("model.norm".into(), heads.hidden_size, eps, NormKind::RmsOffset);
    let mut spec =
        assembly::model(config, embedding, layers.collect(), final_norm, ("lm_head", false), LogitMap::PLAIN)?;
    // Heads for several tokens at once.
    spec.names.other_parts = &["mtp"];
    Ok(spec)
}

/// Queries with their gates, keys, values.
fn gated(heads: &Heads, at: &str, bias: bool) -> Projection {
    let linear = |part: &str, heads_of: i64| LinearSpec {
        name: format!("{at}.{part}"),
        input: heads.hidden_size,
        output: heads_of * heads.head_size,
        bias,
    };
    Projection::Gated {
        query_gate: linear("q_proj", 2 * heads.heads),
        key: linear("k_proj", heads.kv_heads),
        value: linear("v_proj", heads.kv_heads),
    }
}

/// Which layers are delta-nets: by `layer_types`, also in its old spellings; else all but every `full_attention_interval`th.
fn recurrent(config: &Config<'_>, layers: i64) -> Result<Vec<bool>> {
    let interval = config.size_or("full_attention_interval", 4)?;
    let Some(value) = config.field("layer_types") else {
        return Ok((1..=layers).map(|i| i % interval != 0).collect());
    };
    let expected = "a list with linear_attention or full_attention for each layer";
    let types = value.as_array().filter(|types| types.len() as i64 == layers);
    let types = types.ok_or_else(|| wrong("layer_types", value, expected))?;
    types
        .iter()
        .map(|kind| match kind.as_str() {
            Some("linear_attention" | "mamba" | "conv") => Ok(true),
            Some("full_attention" | "attention") => Ok(false),
            _ => Err(wrong("layer_types", kind, expected)),
        })
        .collect()
}
