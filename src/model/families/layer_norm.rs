//! Families with LayerNorm, most with a plain feed-forward: StarCoder 2, GPT-NeoX (Pythia), StableLM, Phi, Falcon, BLOOM.

use serde_json::json;

use super::assembly::{self, embedding};
use super::block::{self, activation, layer_norm};
use super::config::{Config, wrong};
use super::heads::Heads;
use super::layers;
use crate::model::names::Rename;
use crate::model::spec::{
    Attention, EmbeddingSpec, Ending, FeedForward, LayerSpec, LinearSpec, Mask, ModelSpec, NormKind, NormSpec,
    Position, Projection, QueryKeyNorm, Residual,
};
use crate::ops::{Activation, LogitMap};
use crate::{Error, Fault, Result};

/// `Starcoder2Config`.
pub(super) fn starcoder2(config: &Config<'_>) -> Result<ModelSpec> {
    config.always(&[
        ("norm_type", &[json!("layer_norm")]),
        ("mlp_type", &[json!("default")]),
        ("scale_attn_weights", &[json!(true)]),
    ])?;
    config.passed_over(&["layer_norm_epsilon", "activation_function"]);
    let heads = Heads::read(config, None)?;
    let (hidden, eps) = (heads.hidden_size, config.positive_or("norm_epsilon", 1e-5)?);
    let bias = config.flag_or("use_bias", true)?;
    let width = config.size("intermediate_size")?;
    let act = activation(config, "hidden_act", Activation::GeluTanh)?;
    let rope = heads.rope(config, 10_000.0, heads.head_size)?;
    let mask = config.window_or(0)?.filter(|window| *window > 0).map_or(Mask::Full, |window| Mask::Sliding { window });
    let layers = (0..layers::count(config, "num_hidden_layers")?).map(|i| {
        let at = |part: &str| format!("model.layers.{i}.{part}");
        let norm = |part: &str| layer_norm(at(part), hidden, eps);
        LayerSpec {
            attention: Attention::Grouped(
                heads.attention(heads.separate(&at("self_attn"), bias), heads.output(at("self_attn.o_proj"), bias)),
            ),
            position: Position::Rope(rope.clone()),
            mask,
            feed_forward: plain(act, (at("mlp.c_fc"), at("mlp.c_proj")), hidden, width, bias),
            residual: block::pre_norm(norm("input_layernorm"), norm("post_attention_layernorm")),
            ending: Ending::default(),
        }
    });
    let final_norm = layer_norm("model.norm".into(), hidden, eps);
    let embedding = embedding("model.embed_tokens.weight");
    assembly::model(config, embedding, layers.collect(), final_norm, ("lm_head", true), LogitMap::PLAIN)
}

/// `GPTNeoXConfig`: query, key and value of each head together, both halves side by side.
pub(super) fn gpt_neox(config: &Config<'_>) -> Result<ModelSpec> {
    let heads = Heads::read(config, None)?;
    let (hidden, eps) = (heads.hidden_size, config.positive_or("layer_norm_eps", 1e-5)?);
    let bias = config.flag_or("attention_bias", true)?;
    let width = config.size("intermediate_size")?;
    let act = activation(config, "hidden_act", Activation::Gelu)?;
    let (part, base) = (config.positive_or("rotary_pct", 0.25)?, config.positive_or("rotary_emb_base", 10_000.0)?);
    // transformers 4 has also written the names of other families; the reference goes by these.
    for (field, own, expected) in
        [("partial_rotary_factor", "rotary_pct", part), ("rope_theta", "rotary_emb_base", base)]
    {
        if let Some(value) = config.field(field).filter(|value| value.as_f64() != Some(expected)) {
            return Err(wrong(field, value, &format!("{expected}, as {own} has it,")));
        }
    }
    let rope = heads.rope(config, base, heads.partial(config, part)?)?;
    let parallel = config.flag_or("use_parallel_residual", true)?;
    let layers = (0..layers::count(config, "num_hidden_layers")?).map(|i| {
        let at = |part: &str| format!("gpt_neox.layers.{i}.{part}");
        let first = layer_norm(at("input_layernorm"), hidden, eps);
        let second = layer_norm(at("post_attention_layernorm"), hidden, eps);
        let projection = Projection::PerHead(heads.fused(at("attention.query_key_value"), bias));
        LayerSpec {
            attention: Attention::Grouped(heads.attention(projection, heads.output(at("attention.dense"), bias))),
            position: Position::Rope(rope.clone()),
            mask: Mask::Full,
            feed_forward: plain(act, (at("mlp.dense_h_to_4h"), at("mlp.dense_4h_to_h")), hidden, width, true),
            residual: match parallel {
                true => Residual::Parallel { norm: first, feed_forward_norm: Some(second) },
                false => block::pre_norm(first, second),
            },
            ending: Ending::default(),
        }
    });
    let final_norm = layer_norm("gpt_neox.final_layer_norm".into(), hidden, eps);
    let embedding = embedding("gpt_neox.embed_in.weight");
    let mut spec =
        assembly::model(config, embedding, layers.collect(), final_norm, ("lm_head", false), LogitMap::PLAIN)?;
    // transformers 5 calls the head as other families do, and writes it as it always was.
    spec.names.layouts = vec![vec![Rename::Start("lm_head", "embed_out")]];
    spec.ignored_suffixes.extend(["attention.bias", "attention.masked_bias"].map(String::from));
    Ok(spec)
}

/// `StableLmConfig`.
pub(super) fn stablelm(config: &Config<'_>) -> Result<ModelSpec> {
    let heads = Heads::read(config, None)?;
    let (hidden, eps) = (heads.hidden_size, config.positive_or("layer_norm_eps", 1e-5)?);
    let bias = config.flag_or("use_qkv_bias", false)?;
    let width = config.size("intermediate_size")?;
    let act = activation(config, "hidden_act", Activation::Silu)?;
    let rope = heads.rope(config, 10_000.0, heads.partial(config, 0.25)?)?;
    let normed = config.flag_or("qk_layernorm", false)?;
    let parallel = config.flag_or("use_parallel_residual", false)?;
    // Older names of what is there under the names above.
    config.passed_over(&["rope_pct", "norm_eps", "rotary_scaling_factor"]);
    let layers = (0..layers::count(config, "num_hidden_layers")?).map(|i| {
        let at = |part: &str| format!("model.layers.{i}.{part}");
        let norm = |part: &str| layer_norm(at(part), hidden, eps);
        // A weight of its own for every head.
        let of_heads = |part: &str, count| NormSpec {
            weights: (0..count).map(|head| at(&format!("self_attn.{part}.norms.{head}.weight"))).collect(),
            ..block::norm(String::new(), heads.head_size, eps, NormKind::Layer)
        };
        let mut attention =
            heads.attention(heads.separate(&at("self_attn"), bias), heads.output(at("self_attn.o_proj"), false));
        attention.query_key_norm = normed.then(|| QueryKeyNorm {
            query: of_heads("q_layernorm", heads.heads),
            key: Some(of_heads("k_layernorm", heads.kv_heads)),
            after_rotation: false,
        });
        LayerSpec {
            attention: Attention::Grouped(attention),
            position: Position::Rope(rope.clone()),
            mask: Mask::Full,
            feed_forward: block::gated(&at("mlp"), act, hidden, width, false),
            residual: match parallel {
                true => Residual::Parallel { norm: norm("input_layernorm"), feed_forward_norm: None },
                false => block::pre_norm(norm("input_layernorm"), norm("post_attention_layernorm")),
            },
            ending: Ending::default(),
        }
    });
    let final_norm = layer_norm("model.norm".into(), hidden, eps);
    let embedding = embedding("model.embed_tokens.weight");
    assembly::model(config, embedding, layers.collect(), final_norm, ("lm_head", false), LogitMap::PLAIN)
}

/// `PhiConfig` (Phi-1, 1.5 and 2).
pub(super) fn phi(config: &Config<'_>) -> Result<ModelSpec> {
    let heads = Heads::read(config, None)?;
    let (hidden, eps) = (heads.hidden_size, config.positive_or("layer_norm_eps", 1e-5)?);
    let width = config.size("intermediate_size")?;
    let act = activation(config, "hidden_act", Activation::GeluTanh)?;
    let rope = heads.rope(config, 10_000.0, heads.partial(config, 0.5)?)?;
    let normed = config.flag_or("qk_layernorm", false)?;
    let layers = (0..layers::count(config, "num_hidden_layers")?).map(|i| {
        let at = |part: &str| format!("model.layers.{i}.{part}");
        let mut attention =
            heads.attention(heads.separate(&at("self_attn"), true), heads.output(at("self_attn.dense"), true));
        attention.query_key_norm = normed.then(|| QueryKeyNorm {
            query: layer_norm(at("self_attn.q_layernorm"), heads.head_size, eps),
            key: Some(layer_norm(at("self_attn.k_layernorm"), heads.head_size, eps)),
            after_rotation: false,
        });
        LayerSpec {
            attention: Attention::Grouped(attention),
            position: Position::Rope(rope.clone()),
            mask: Mask::Full,
            feed_forward: plain(act, (at("mlp.fc1"), at("mlp.fc2")), hidden, width, true),
            residual: Residual::Parallel {
                norm: layer_norm(at("input_layernorm"), hidden, eps),
                feed_forward_norm: None,
            },
            ending: Ending::default(),
        }
    });
    let final_norm = layer_norm("model.final_layernorm".into(), hidden, eps);
    let embedding = embedding("model.embed_tokens.weight");
    let mut spec =
        assembly::model(config, embedding, layers.collect(), final_norm, ("lm_head", false), LogitMap::PLAIN)?;
    spec.head.bias = true;
    Ok(spec)
}

/// `FalconConfig` in its three shapes: 7B, 40B and 180B, RW.
pub(super) fn falcon(config: &Config<'_>) -> Result<ModelSpec> {
    let (hidden, n) = (config.size("hidden_size")?, config.size("num_attention_heads")?);
    let grouped = config.flag_or("new_decoder_architecture", false)?;
    let multi_query = config.flag_or_null("multi_query", true)?;
    let parallel = config.flag_or_null("parallel_attn", true)?;
    let alibi = config.flag_or("alibi", false)?;
    config.always(&[("apply_residual_connection_post_layernorm", &[json!(false)])])?;
    // The reference has nothing between the halves of grouped blocks, and one norm before the others'.
    match grouped {
        true => config.always(&[("parallel_attn", &[json!(true)])])?,
        false => config.always(&[("num_ln_in_parallel_attn", &[json!(1)])])?,
    }
    // Said of every shape, read in one; and by how much the feed-forward is wider, which `ffn_hidden_size` tells.
    config.passed_over(&["num_kv_heads", "ff_factor", "rope_theta", "rope_scaling", "rope_parameters"]);
    let kv_heads = match (grouped, multi_query) {
        (true, _) => config.size_or("num_kv_heads", n)?,
        (false, true) => 1,
        (false, false) => n,
    };
    let heads = Heads { kv_heads, ..equal_heads(hidden, n)? };
    if n % kv_heads != 0 {
        let what = format!("{kv_heads} does not divide num_attention_heads = {n}");
        return Err(Error::Model(Fault::new("config.json: num_kv_heads", what)));
    }
    let bias = config.flag_or("bias", false)?;
    let eps = config.positive_or("layer_norm_epsilon", 1e-5)?;
    let width = config.size_or("ffn_hidden_size", 4 * hidden)?;
    let act = activation(config, "activation", Activation::Gelu)?;
    let norms = match config.field("num_ln_in_parallel_attn").map(|value| (value, value.as_i64())) {
        None => 2,
        Some((_, Some(count @ 1..=2))) => count,
        Some((value, _)) => return Err(wrong("num_ln_in_parallel_attn", value, "1 or 2")),
    };
    let position = if alibi {
        Position::Alibi { slopes: slopes(n), rounded: true, scale: (heads.head_size as f64).powf(-0.5) }
    } else {
        Position::Rope(heads.rope(config, 10_000.0, heads.head_size)?)
    };
    let layers = (0..layers::count(config, "num_hidden_layers")?).map(|i| {
        let at = |part: &str| format!("transformer.h.{i}.{part}");
        let norm = |part: &str| layer_norm(at(part), hidden, eps);
        let linear = heads.fused(at("self_attention.query_key_value"), bias);
        // With one key for all queries the two layouts are the same.
        let projection = Projection::PerHead(linear);
        LayerSpec {
            attention: Attention::Grouped(heads.attention(projection, heads.output(at("self_attention.dense"), bias))),
            position: position.clone(),
            mask: Mask::Full,
            feed_forward: plain(act, (at("mlp.dense_h_to_4h"), at("mlp.dense_4h_to_h")), hidden, width, bias),
            residual: match (grouped, parallel) {
                (true, _) if norms == 2 => {
                    Residual::Parallel { norm: norm("ln_attn"), feed_forward_norm: Some(norm("ln_mlp")) }
                }
                (true, _) | (false, true) => {
                    Residual::Parallel { norm: norm("input_layernorm"), feed_forward_norm: None }
                }
                (false, false) => block::pre_norm(norm("input_layernorm"), norm("post_attention_layernorm")),
            },
            ending: Ending::default(),
        }
    });
    let final_norm = layer_norm("transformer.ln_f".into(), hidden, eps);
    let embedding = embedding("transformer.word_embeddings.weight");
    assembly::model(config, embedding, layers.collect(), final_norm, ("lm_head", true), LogitMap::PLAIN)
}

/// `BloomConfig`: linear biases, a norm on the embeddings, and the oldest names for its sizes.
pub(super) fn bloom(config: &Config<'_>) -> Result<ModelSpec> {
    // Two names for one thing, of which the reference takes the older here, the newer there.
    let either = |name: &'static str, other: &'static str| match (config.field(name), config.field(other)) {
        (Some(one), Some(two)) if one != two => Err(wrong(other, two, &format!("{one}, as {name} says,"))),
        (None, Some(_)) => Ok(other),
        _ => Ok(name),
    };
    let hidden = config.size(either("hidden_size", "n_embed")?)?;
    let heads = equal_heads(hidden, config.size(either("n_head", "num_attention_heads")?)?)?;
    let count = either("n_layer", "num_hidden_layers")?;
    for (field, what) in [
        ("apply_residual_connection_post_layernorm", "residuals taken after the norm"),
        ("slow_but_exact", "products summed in slices"),
    ] {
        if config.flag_or(field, false)? {
            let what = format!("asks for {what}, which is not supported");
            return Err(Error::Model(Fault::new(format!("config.json: {field}"), what).hint("use a base without it")));
        }
    }
    config.passed_over(&["hidden_size", "n_embed", "n_head", "num_attention_heads", "n_layer", "num_hidden_layers"]);
    // How the same is computed; the biases are those of a position whatever the padding.
    config.passed_over(&["offset_alibi", "skip_bias_add"]);
    let eps = config.positive_or("layer_norm_epsilon", 1e-5)?;
    let position = Position::Alibi { slopes: slopes(heads.heads), rounded: false, scale: 1.0 };
    let layers = (0..layers::count(config, count)?).map(|i| {
        let at = |part: &str| format!("transformer.h.{i}.{part}");
        let norm = |part: &str| layer_norm(at(part), hidden, eps);
        let projection = Projection::PerHead(heads.fused(at("self_attention.query_key_value"), true));
        LayerSpec {
            attention: Attention::Grouped(heads.attention(projection, heads.output(at("self_attention.dense"), true))),
            position: position.clone(),
            mask: Mask::Full,
            feed_forward: plain(
                Activation::GeluTanh,
                (at("mlp.dense_h_to_4h"), at("mlp.dense_4h_to_h")),
                hidden,
                4 * hidden,
                true,
            ),
            residual: block::pre_norm(norm("input_layernorm"), norm("post_attention_layernorm")),
            ending: Ending::default(),
        }
    });
    let embedding = EmbeddingSpec {
        norm: Some(layer_norm("transformer.word_embeddings_layernorm".into(), hidden, eps)),
        ..embedding("transformer.word_embeddings.weight")
    };
    let sizes = [("hidden_size", hidden)];
    let config = config.with_defaults(&sizes);
    let final_norm = layer_norm("transformer.ln_f".into(), hidden, eps);
    let mut spec =
        assembly::model(&config, embedding, layers.collect(), final_norm, ("lm_head", true), LogitMap::PLAIN)?;
    // As published, and as transformers writes it.
    spec.names.layouts = vec![vec![Rename::Start("transformer", "")], Vec::new()];
    Ok(spec)
}

/// A feed-forward without a gate.
fn plain(activation: Activation, (up, down): (String, String), hidden: i64, width: i64, bias: bool) -> FeedForward {
    FeedForward::Plain {
        activation,
        up: LinearSpec { name: up, input: hidden, output: width, bias },
        down: LinearSpec { name: down, input: width, output: hidden, bias },
    }
}

/// `n` heads that divide the width among them, each with its own key and value.
fn equal_heads(hidden_size: i64, n: i64) -> Result<Heads> {
    if hidden_size % n != 0 {
        let what = format!("{hidden_size} is not divisible by the number of heads, {n}");
        return Err(Error::Model(Fault::new("config.json: hidden_size", what)));
    }
    Ok(Heads { hidden_size, heads: n, kv_heads: n, head_size: hidden_size / n })
}

/// The slopes of n heads (arXiv:2108.12409): a geometric series for a power of two, and every other term of the next one for
/// the heads beyond.
fn slopes(n: i64) -> Vec<f64> {
    let power = 1i64 << n.ilog2();
    let base = |heads: i64| 2f64.powf(-(2f64.powf(3.0 - (heads as f64).log2())));
    let first = (1..=power).map(|i| base(power).powi(i as i32));
    let rest = (0..n - power).map(|i| base(2 * power).powi(2 * i as i32 + 1));
    first.chain(rest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_those_of_the_paper_and_of_its_code_for_other_numbers_of_heads() {
        assert_eq!(slopes(8), [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]);
        let twelve = slopes(12);
        assert_eq!(twelve[..8], slopes(8)[..]);
        assert!((twelve[8] - 2f64.powf(-0.5)).abs() < 1e-12 && (twelve[9] - 2f64.powf(-1.5)).abs() < 1e-12);
    }
}
