//! Gemma 4 (text): heads of their own sizes where attention is full, keys and values that the last blocks take from earlier
//! ones, and inputs of each block's own.

use super::block::{self, activation};
use super::config::{Config, wrong};
use super::experts;
use super::heads::Heads;
use super::layers::{self, layer_types};
use super::llama::masks;
use super::{assembly, rope};
use crate::model::spec::{
    Around, Attention, Branch, EmbeddingSpec, Ending, ExpertGateUp, ExpertLinear, Experts, FeedForward, LayerInput,
    LayerInputs, LayerSpec, LinearSpec, Mask, ModelSpec, NormKind, NormSpec, Position, Projection, QueryKeyNorm,
    Residual, Rope, RopeScaling, Router, RouterNorm, Routing, Scores, Stored,
};
use crate::ops::{Activation, LogitMap, RopeLayout, Weighted};
use crate::{Error, Fault, Result};

/// What the fields of the whole say that every block needs.
struct Whole {
    heads: Heads,
    eps: f64,
    bias: bool,
    values_are_keys: bool,
    activation: Activation,
    /// P; 0 where blocks have no inputs of their own.
    input: i64,
    /// Beside the feed-forward, in every block.
    experts: Option<ExpertSizes>,
}

/// The sizes of experts.
#[derive(Debug, Clone, Copy)]
struct ExpertSizes {
    /// E.
    count: i64,
    /// How many a token goes through.
    chosen: i64,
    /// F.
    width: i64,
}

/// What tells one block from another.
struct Block {
    index: usize,
    slides: bool,
    heads: Heads,
    rope: Rope,
    mask: Mask,
    keys_values: KeysValues,
    /// F.
    width: i64,
}

/// Where a block's keys and values come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum KeysValues {
    Own,
    /// Later blocks find them in this slot.
    HandedOn(usize),
    /// An earlier block has left them in this slot.
    Found(usize),
}

/// `Gemma4TextConfig`.
pub(super) fn gemma4(config: &Config<'_>) -> Result<ModelSpec> {
    if let Some(value) = config.field("use_bidirectional_attention").filter(|value| value.as_str() != Some("vision")) {
        return Err(wrong("use_bidirectional_attention", value, "null, or \"vision\", which leaves text as it is"));
    }
    config.passed_over(&["hidden_act", "vocab_size_per_layer_input", "_sliding_window_pattern"]);
    let whole = Whole {
        heads: Heads::read(config, Some(256))?,
        eps: config.positive_or("rms_norm_eps", 1e-6)?,
        bias: config.flag_or("attention_bias", false)?,
        values_are_keys: config.flag_or("attention_k_eq_v", false)?,
        activation: activation(config, "hidden_activation", Activation::GeluTanh)?,
        experts: expert_sizes(config)?,
        input: if config.is_null("hidden_size_per_layer_input") {
            0
        } else {
            config.count_or("hidden_size_per_layer_input", 256)?
        },
    };
    let blocks = blocks(config, &whole)?;
    let hidden = whole.heads.hidden_size;
    let soft_cap = config.optional("final_logit_softcapping")?;
    let scale = (hidden as f64).sqrt();
    let embedding = EmbeddingSpec { scale, ..assembly::embedding("model.embed_tokens.weight") };
    let layers: Vec<LayerSpec> = blocks.iter().map(|block| layer(&whole, block)).collect();
    let final_norm = block::norm("model.norm".into(), hidden, whole.eps, NormKind::Rms);
    let map = LogitMap { scale: 1.0, soft_cap };
    let mut spec = assembly::model(config, embedding, layers, final_norm, ("lm_head", true), map)?;
    // Published files carry projections of blocks that read another's keys and values; nothing is computed with them.
    let reads = |block: &&Block| matches!(block.keys_values, KeysValues::Found(_));
    spec.ignored_suffixes.extend(blocks.iter().filter(reads).flat_map(|block| {
        let names = ["k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias", "k_norm.weight"];
        names.map(|name| format!("layers.{}.self_attn.{name}", block.index))
    }));
    spec.layer_inputs = if whole.input > 0 { Some(layer_inputs(config, &whole, blocks.len() as i64)?) } else { None };
    Ok(spec)
}

fn expert_sizes(config: &Config<'_>) -> Result<Option<ExpertSizes>> {
    let fields = ["num_experts", "top_k_experts", "moe_intermediate_size"];
    if !config.flag_or("enable_moe_block", false)? {
        // These speak of experts only.
        let _ = fields.map(|name| config.field(name));
        return Ok(None);
    }
    for field in fields {
        config.size(field)?;
    }
    let count = experts::count(config, "num_experts", 1)?;
    let chosen = experts::chosen(config, "top_k_experts", 1, count)?;
    Ok(Some(ExpertSizes { count, chosen, width: config.size("moe_intermediate_size")? }))
}

fn layer_inputs(config: &Config<'_>, whole: &Whole, blocks: i64) -> Result<LayerInputs> {
    let (rows, vocabulary) = (config.size_or("vocab_size_per_layer_input", 262_144)?, config.size("vocab_size")?);
    if rows < vocabulary {
        let what = format!("{rows} is less than vocab_size = {vocabulary}: some tokens would have no input");
        return Err(Error::Model(Fault::new("config.json: vocab_size_per_layer_input", what)));
    }
    let (hidden, width) = (whole.heads.hidden_size, whole.input);
    let name = "model.per_layer_model_projection".to_string();
    // The reference divides what is projected by the root of D before it is normed: the same as a larger eps.
    let eps = whole.eps * hidden as f64;
    Ok(LayerInputs {
        width,
        table: "model.embed_tokens_per_layer.weight".into(),
        rows,
        table_scale: (width as f64).sqrt(),
        projection: LinearSpec { name, input: hidden, output: blocks * width, bias: false },
        norm: block::norm("model.per_layer_projection_norm".into(), width, eps, NormKind::Rms),
        scale: 0.5f64.sqrt(),
    })
}

fn blocks(config: &Config<'_>, whole: &Whole) -> Result<Vec<Block>> {
    let count = layers::count(config, "num_hidden_layers")?;
    let mut slides = layer_types(config, count, |i| (i + 1) % 6 != 0)?;
    // The reference makes the last one full whatever the config says.
    slides[count as usize - 1] = false;
    let masks = masks(&slides, config.window_or(512)?)?;
    let heads = heads(config, whole, &slides)?;
    let keys_values = keys_values(&slides, config.count_or("num_kv_shared_layers", 0)?)?;
    let width = config.size("intermediate_size")?;
    let wider = config.flag_or("use_double_wide_mlp", false)?;
    (0..count as usize)
        .map(|index| {
            let reads = matches!(keys_values[index], KeysValues::Found(_));
            Ok(Block {
                index,
                slides: slides[index],
                heads: heads[index],
                rope: rope(config, slides[index], heads[index].head_size)?,
                mask: masks[index],
                keys_values: keys_values[index],
                width: if wider && reads { 2 * width } else { width },
            })
        })
        .collect()
}

/// Sizes of every block's heads: by `per_layer_config` (transformers 5), or those of full ones by `global_head_dim` and
/// `num_global_key_value_heads`.
fn heads(config: &Config<'_>, whole: &Whole, slides: &[bool]) -> Result<Vec<Heads>> {
    let by_layer = config.object("per_layer_config")?;
    if let Some(by_layer) = &by_layer {
        let indices: Vec<String> = (0..slides.len()).map(|index| index.to_string()).collect();
        by_layer.only("per_layer_config", &indices.iter().map(String::as_str).collect::<Vec<_>>())?;
    }
    let global_size = config.size_or("global_head_dim", 512)?;
    let global_heads = config.size_or("num_global_key_value_heads", whole.heads.kv_heads)?;
    let of = |index: usize| -> Result<(String, Heads)> {
        let plain = whole.heads;
        let Some(by_layer) = &by_layer else {
            let kv_heads = if whole.values_are_keys { global_heads } else { plain.kv_heads };
            let full = Heads { kv_heads, head_size: global_size, ..plain };
            return Ok(("num_global_key_value_heads".into(), if slides[index] { plain } else { full }));
        };
        let place = format!("per_layer_config.{index}");
        let Some(own) = by_layer.object(&index.to_string())? else { return Ok((place, plain)) };
        own.only(&place, &["head_dim", "num_key_value_heads"])?;
        let head_size = own.size_or("head_dim", plain.head_size)?;
        Ok((place, Heads { head_size, kv_heads: own.size_or("num_key_value_heads", plain.kv_heads)?, ..plain }))
    };
    (0..slides.len())
        .map(|index| {
            let (place, heads) = of(index)?;
            if heads.heads % heads.kv_heads != 0 {
                let what = format!("{} does not divide num_attention_heads = {}", heads.kv_heads, heads.heads);
                return Err(Error::Model(Fault::new(format!("config.json: {place}"), what)));
            }
            Ok(heads)
        })
        .collect()
}

/// The last `shared` blocks read what the last block of their kind before them has; a slot for each kind.
fn keys_values(slides: &[bool], shared: i64) -> Result<Vec<KeysValues>> {
    let own = slides.len() - (shared as usize).min(slides.len());
    let last = |kind: bool| slides[..own].iter().rposition(|slides| *slides == kind);
    let of = |(index, kind): (usize, &bool)| {
        let slot = usize::from(*kind);
        match last(*kind) {
            None if index >= own => {
                let kind = if *kind { "sliding_attention" } else { "full_attention" };
                let what = format!("{shared} leaves no {kind} layer before layer {index} whose keys it could share");
                Err(Error::Model(Fault::new("config.json: num_kv_shared_layers", what)))
            }
            Some(_) if index >= own => Ok(KeysValues::Found(slot)),
            Some(last) if index == last && slides[own..].contains(kind) => Ok(KeysValues::HandedOn(slot)),
            _ => Ok(KeysValues::Own),
        }
    };
    slides.iter().enumerate().map(of).collect()
}

/// The rotary embedding of one kind of block: `rope_parameters` by kind, or the family's own.
fn rope(config: &Config<'_>, slides: bool, head_size: i64) -> Result<Rope> {
    let kind = if slides { "sliding_attention" } else { "full_attention" };
    if head_size % 2 != 0 {
        let what = format!("{head_size}; rotary embedding needs pairs");
        return Err(Error::Model(Fault::new(format!("config.json: head_dim of {kind}"), what)));
    }
    let plain = |theta| Rope { theta, rotated: head_size, layout: RopeLayout::Halves, scaling: RopeScaling::None };
    let proportional =
        |part: f64, factor| RopeScaling::Proportional { turning: (part * head_size as f64) as i64 / 2, factor };
    let Some(by_kind) = config.object("rope_parameters")? else {
        return Ok(match slides {
            true => plain(10_000.0),
            false => Rope { scaling: proportional(0.25, 1.0), ..plain(1_000_000.0) },
        });
    };
    let p = by_kind.object(kind)?.ok_or_else(|| {
        Error::Model(Fault::new(format!("config.json: rope_parameters.{kind}"), "missing; this family needs it"))
    })?;
    let theta = p.positive_or("rope_theta", 10_000.0)?;
    if p.field("rope_type").and_then(|kind| kind.as_str()) != Some("proportional") {
        return Ok(Rope {
            scaling: rope::of_some_layers(config, &format!("rope_parameters.{kind}"), &p, head_size)?,
            ..plain(theta)
        });
    }
    let part = p.positive_or("partial_rotary_factor", 1.0)?;
    if part > 1.0 {
        let what = format!("{part} found, a part of the head from 0 to 1 expected");
        return Err(Error::Model(Fault::new(
            format!("config.json: rope_parameters.{kind}.partial_rotary_factor"),
            what,
        )));
    }
    Ok(Rope { scaling: proportional(part, p.positive_or("factor", 1.0)?), ..plain(theta) })
}

fn layer(whole: &Whole, block: &Block) -> LayerSpec {
    let (heads, hidden, input) = (block.heads, whole.heads.hidden_size, whole.input);
    let at = |part: &str| format!("model.layers.{}.{part}", block.index);
    let norm = |part: &str, width| block::norm(at(part), width, whole.eps, NormKind::Rms);
    let around =
        |before: &str, after: &str| Around { before: Some(norm(before, hidden)), after: Some(norm(after, hidden)) };
    let linear = |part: &str, input, output| LinearSpec { name: at(part), input, output, bias: false };

    let Projection::Separate { query, key, value } = heads.separate(&at("self_attn"), whole.bias) else {
        unreachable!("that is what `separate` makes")
    };
    let projection = match block.keys_values {
        KeysValues::Found(slot) => Projection::QueryOnly { query, slot },
        _ if whole.values_are_keys && !block.slides => Projection::ValuesAreKeys { query, key },
        _ => Projection::Separate { query, key, value },
    };
    let own = !matches!(block.keys_values, KeysValues::Found(_));
    let mut attention = heads.attention(projection, heads.output(at("self_attn.o_proj"), whole.bias));
    attention.scale = 1.0;
    attention.query_key_norm = Some(QueryKeyNorm {
        query: norm("self_attn.q_norm", heads.head_size),
        key: own.then(|| norm("self_attn.k_norm", heads.head_size)),
        after_rotation: false,
    });
    attention.value_norm = own.then(|| NormSpec { weights: Vec::new(), ..norm("", heads.head_size) });
    attention.hands_on = match block.keys_values {
        KeysValues::HandedOn(slot) => Some(slot),
        KeysValues::Own | KeysValues::Found(_) => None,
    };
    let dense = block::gated(&at("mlp"), whole.activation, hidden, block.width, false);
    let (feed_forward, around_both) = match whole.experts {
        None => (dense, around("pre_feedforward_layernorm", "post_feedforward_layernorm")),
        Some(sizes) => {
            let experts = FeedForward::Experts(Box::new(block_experts(whole, sizes, block.index)));
            let branches = [
                (around("pre_feedforward_layernorm", "post_feedforward_layernorm_1"), dense),
                (around("pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"), experts),
            ];
            let branches = branches.map(|(norms, feed_forward)| Branch { norms, feed_forward });
            let behind = Around { before: None, after: Some(norm("post_feedforward_layernorm", hidden)) };
            (FeedForward::Sum(branches.into()), behind)
        }
    };
    LayerSpec {
        attention: Attention::Grouped(attention),
        position: Position::Rope(block.rope.clone()),
        mask: block.mask,
        feed_forward,
        residual: Residual::Sequential {
            attention: around("input_layernorm", "post_attention_layernorm"),
            feed_forward: around_both,
            multiplier: 1.0,
        },
        ending: Ending {
            input: (input > 0).then(|| LayerInput {
                activation: whole.activation,
                gate: linear("per_layer_input_gate", hidden, input),
                projection: linear("per_layer_projection", input, hidden),
                norm: norm("post_per_layer_input_norm", hidden),
            }),
            scale: Some(at("layer_scalar")),
        },
    }
}

/// The experts of a block, whose router has a norm and scales of its own.
fn block_experts(whole: &Whole, sizes: ExpertSizes, index: usize) -> Experts {
    let hidden = whole.heads.hidden_size;
    let at = |part: &str| format!("model.layers.{index}.{part}");
    let linear = |part: &str, input, output| ExpertLinear {
        name: at(part),
        experts: sizes.count,
        input,
        output,
        bias: false,
        stored: Stored::Together,
        parameter: at(part),
    };
    let norm = block::norm(String::new(), hidden, whole.eps, NormKind::Rms);
    let norm = NormSpec { weights: vec![at("router.scale")], ..norm };
    Experts {
        router: Router {
            norm: Some(RouterNorm { norm, scale: (hidden as f64).powf(-0.5) }),
            linear: LinearSpec { name: at("router.proj"), input: hidden, output: sizes.count, bias: false },
            wide: false,
            routing: Routing::Largest {
                chosen: sizes.chosen,
                scores: Scores::Softmax,
                correction: None,
                groups: None,
                normalised: Some(0.0),
                scale: 1.0,
                expert_scale: Some(at("router.per_expert_scale")),
            },
            balance: 0.0,
        },
        activation: whole.activation,
        projection: ExpertGateUp::Fused {
            linear: linear("experts.gate_up_proj", hidden, 2 * sizes.width),
            interleaved: false,
        },
        down: linear("experts.down_proj", sizes.width, hidden),
        weighted: Weighted::Output,
        shared: None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use tch::{Device, Kind, Tensor};

    use crate::model::families::from_config;
    use crate::model::families::tests::write;
    use crate::model::{Decoder, Documents};
    use crate::recipe::BaseSource;
    use crate::weights::Checkpoint;

    /// The fixture `name`, with fields changed; null takes one away.
    fn config(name: &str, changes: Value) -> Value {
        let path = format!("{}/tests/fixtures/families/{name}/config.json", env!("CARGO_MANIFEST_DIR"));
        let mut config: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let fields = config.as_object_mut().unwrap();
        for (name, value) in changes.as_object().unwrap() {
            fields.insert(name.clone(), value.clone());
            fields.retain(|_, value| !value.is_null());
        }
        config
    }

    fn small(changes: Value) -> Value {
        config("gemma4_text", changes)
    }

    #[test]
    fn transformers_5_says_the_same_by_layer() {
        let by_layer = json!({"2": {"head_dim": 14}, "4": {"head_dim": 14}});
        let found = from_config(&small(json!({"global_head_dim": null, "per_layer_config": by_layer}))).unwrap();
        assert_eq!(found, from_config(&small(json!({}))).unwrap());
    }

    #[test]
    fn what_the_config_leaves_out_is_what_the_reference_takes() {
        let written = json!({
            "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "sliding_attention",
                "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "global_head_dim": 512, "sliding_window": 512, "num_kv_shared_layers": 0, "use_double_wide_mlp": false,
        });
        let left_out = written.as_object().unwrap().keys().map(|name| (name.clone(), Value::Null)).collect();
        assert_eq!(from_config(&small(Value::Object(left_out))).unwrap(), from_config(&small(written)).unwrap());
    }

    #[test]
    fn what_is_not_understood_is_named() {
        let answer = |changes: Value| from_config(&small(changes)).unwrap_err().to_string();
        for (changes, named) in [
            (json!({"use_bidirectional_attention": "all"}), "use_bidirectional_attention"),
            (json!({"per_layer_config": {"2": {"sliding_window": 3}}}), "per_layer_config.2.sliding_window"),
            (json!({"per_layer_config": {"7": {"head_dim": 14}}}), "per_layer_config.7"),
            (json!({"per_layer_config": {"2": {"num_key_value_heads": 4}}}), "num_attention_heads = 6"),
            (json!({"global_head_dim": 13}), "full_attention"),
            (json!({"enable_moe_block": true}), "num_experts"),
            (
                json!({"enable_moe_block": true, "num_experts": 2, "top_k_experts": 3, "moe_intermediate_size": 4}),
                "top_k_experts",
            ),
            (json!({"num_kv_shared_layers": 5}), "num_kv_shared_layers"),
            (json!({"num_kv_shared_layers": 3}), "no full_attention layer before layer 2"),
            (json!({"vocab_size_per_layer_input": 60}), "vocab_size = 61"),
            (json!({"rope_parameters": {"sliding_attention": {}}}), "rope_parameters.full_attention"),
        ] {
            let found = answer(changes.clone());
            assert!(found.contains(named), "{changes}: {found}");
        }
    }

    #[test]
    fn blocks_that_read_anothers_keys_keep_none_and_may_be_stored_with_projections_they_do_not_use() {
        let config = json!({
            "model_type": "gemma4_text", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 4,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "global_head_dim": 6, "vocab_size": 11,
            "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        });
        let mut tensors = from_config(&config).unwrap().tensors();
        let unused = "model.layers.3.self_attn.k_proj.weight";
        assert!(tensors.insert(unused.into(), vec![6, 8]).is_none());
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &config, &tensors);
        let checkpoint = Checkpoint::open(&BaseSource::Folder(folder.path().to_path_buf())).unwrap();
        let model = Decoder::load(&checkpoint, Kind::Float, Device::Cpu, &|_, _| ()).unwrap();
        let mut cache = model.cache(1);
        let _ = model.hidden_cached(&Tensor::from_slice(&[1i64, 2, 3]), &Documents::one(3), &mut cache);
        let heads = cache.layers.iter_mut().map(|cache| cache.keys_values().keys.size()[3]).collect::<Vec<_>>();
        assert_eq!(heads, [4, 6]);
    }
}
