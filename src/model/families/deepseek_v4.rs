//! DeepSeek V4: copies of the stream, keys that are values, windows compressed to entries, experts chosen by a table in the first
//! layers.

use serde_json::{Value, json};

use super::config::{Config, wrong};
use super::experts::{self, Apart, router};
use super::{assembly, block, layers, rope};
use crate::model::names::{Names, Rename};
use crate::model::spec::{
    Attention, CompressedAttention, Compressor, Ending, Entries, Experts, FeedForward, GateUp, Indexer, LayerSpec,
    LinearSpec, Mask, ModelSpec, NormKind, NormSpec, Position, Residual, Rope, RopeScaling, Routing, Scores,
    SharedExpert, StreamMap, StreamMix, Streams,
};
use crate::ops::{Activation, LogitMap, RopeLayout, Weighted};
use crate::{Error, Fault, Result};

/// More copies of the stream than any model has.
const MOST_COPIES: i64 = 64;

/// `DeepseekV4Config`. Names are those of the published files.
pub(super) fn deepseek_v4(config: &Config<'_>) -> Result<ModelSpec> {
    let sizes = Sizes::read(config)?;
    let experts = ExpertSizes::read(config)?;
    let count = layers::count(config, "num_hidden_layers")?;
    let kinds = Kind::of_layers(config, count)?;
    let by_table = by_table(config, count)?;
    let ropes = ropes(config, sizes.rotated)?;
    let window = config.size_or("sliding_window", 128)?;
    let blocks = kinds.into_iter().zip(by_table).enumerate().map(|(i, (kind, by_table))| {
        let at = |part: &str| format!("layers.{i}.{part}");
        LayerSpec {
            attention: Attention::Compressed(Box::new(sizes.attention(&at("attn"), kind))),
            position: Position::Rope(if kind == Kind::Sliding { ropes.main.clone() } else { ropes.compress.clone() }),
            mask: Mask::Sliding { window },
            feed_forward: experts.feed_forward(&at("ffn"), sizes.hidden, by_table),
            residual: Residual::Streams {
                attention: Box::new(sizes.mix(&at("hc_attn"), at("attn_norm"))),
                feed_forward: Box::new(sizes.mix(&at("hc_ffn"), at("ffn_norm"))),
            },
            ending: Ending::default(),
        }
    });
    let (embedding, final_norm) = (assembly::embedding("embed.weight"), sizes.norm("norm".into(), sizes.hidden));
    let spec = assembly::model(config, embedding, blocks.collect(), final_norm, ("head", false), LogitMap::PLAIN)?;
    // Layers that predict further tokens; the model is computed without them.
    let _ = config.count_or("num_nextn_predict_layers", 1)?;
    Ok(ModelSpec {
        max_position_embeddings: config.size_or("max_position_embeddings", 1 << 20)?,
        streams: Some(Streams { count: sizes.copies, gather: sizes.map("hc_head"), floor: sizes.floor }),
        ignored_prefixes: vec!["mtp.".into()],
        names: names(),
        ..spec
    })
}

fn names() -> Names {
    Names {
        // In this order each undoes what the later ones have left: the names of an indexer's compressor are given to the indexer.
        modules: vec![
            Rename::Start("layers", "model.layers"),
            Rename::Start("embed", "model.embed_tokens"),
            Rename::Start("norm", "model.norm"),
            Rename::Start("head", "lm_head"),
            Rename::Part("indexer.compressor", "compressor.indexer"),
            Rename::Part("indexer.wq_b", "compressor.indexer.wq_b"),
            Rename::Part("indexer.weights_proj", "compressor.indexer.scorer.weights_proj"),
            Rename::Part("attn", "self_attn"),
            Rename::Part("ffn", "mlp"),
            Rename::Part("wq_a", "q_a_proj"),
            Rename::Part("wq_b", "q_b_proj"),
            Rename::Part("wkv", "kv_proj"),
            Rename::Part("wgate", "gate_proj"),
            Rename::Part("wo_a", "o_a_proj"),
            Rename::Part("wo_b", "o_b_proj"),
            Rename::Part("shared_experts.w1", "shared_experts.gate_proj"),
            Rename::Part("shared_experts.w3", "shared_experts.up_proj"),
            Rename::Part("shared_experts.w2", "shared_experts.down_proj"),
        ],
        // As published, and as transformers writes it.
        layouts: vec![Vec::new(), vec![Rename::Part("attn.kv_norm", "attn.norm")]],
        ..Names::default()
    }
}

/// A field that changes the computation elsewhere and is always this here.
fn only(config: &Config<'_>, field: &str, expected: Value) -> Result<()> {
    match config.field(field).filter(|found| **found != expected) {
        None => Ok(()),
        Some(found) => Err(wrong(field, found, &expected.to_string())),
    }
}

/// A size that transformers also knows by another name.
fn size_of(config: &Config<'_>, field: &str, alias: &str, default: i64) -> Result<i64> {
    let own = config.size_or(field, default)?;
    let other = config.size_or(alias, own)?;
    match config.field(field) {
        None => Ok(other),
        Some(_) if own == other => Ok(own),
        Some(_) => {
            let what = format!("is {other}, but {field}, which means the same, is {own}");
            Err(Error::Model(Fault::new(format!("config.json: {alias}"), what)))
        }
    }
}

/// What attention sees besides the latest tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Sliding,
    Sparse,
    Heavy,
}

impl Kind {
    /// `layer_types`, or else `compress_ratios`, which may go on for layers that predict further tokens; or else what transformers takes.
    fn of_layers(config: &Config<'_>, count: i64) -> Result<Vec<Self>> {
        let list = |field: &str, expected: &str, kind: &dyn Fn(&Value) -> Option<Self>| -> Result<Option<Vec<Self>>> {
            let Some(value) = config.field(field) else { return Ok(None) };
            let list = value.as_array().filter(|list| list.len() as i64 >= count);
            let list = list.ok_or_else(|| wrong(field, value, &format!("a list of {count} or more")))?;
            let kinds = list.iter().take(count as usize).map(|v| kind(v).ok_or_else(|| wrong(field, v, expected)));
            kinds.collect::<Result<_>>().map(Some)
        };
        let expected = "sliding_attention, compressed_sparse_attention or heavily_compressed_attention";
        let types = list("layer_types", expected, &|value| match value.as_str() {
            Some("sliding_attention") => Some(Self::Sliding),
            Some("compressed_sparse_attention") => Some(Self::Sparse),
            Some("heavily_compressed_attention") => Some(Self::Heavy),
            _ => None,
        })?;
        let ratios = list("compress_ratios", "0, 4 or 128", &|value| match value.as_i64() {
            Some(0) => Some(Self::Sliding),
            Some(4) => Some(Self::Sparse),
            Some(128) => Some(Self::Heavy),
            _ => None,
        })?;
        let taken = |i: i64| if i > 1 && i % 2 == 1 { Self::Sparse } else { Self::Heavy };
        Ok(types.or(ratios).unwrap_or_else(|| (0..count).map(taken).collect()))
    }
}

/// Which layers take experts from a table: `mlp_layer_types`, or else the first `num_hash_layers`.
fn by_table(config: &Config<'_>, count: i64) -> Result<Vec<bool>> {
    let first = config.count_or("num_hash_layers", 3)?;
    let Some(value) = config.field("mlp_layer_types") else { return Ok((0..count).map(|i| i < first).collect()) };
    let expected = "hash_moe or moe for each layer";
    let types = value.as_array().filter(|types| types.len() as i64 >= count);
    let types = types.ok_or_else(|| wrong("mlp_layer_types", value, expected))?;
    let of_layer = |kind: &Value| match kind.as_str() {
        Some("hash_moe") => Ok(true),
        Some("moe") => Ok(false),
        _ => Err(wrong("mlp_layer_types", kind, expected)),
    };
    types.iter().take(count as usize).map(of_layer).collect()
}

/// The rotation of layers that see the latest tokens only, and of those that have entries.
struct Ropes {
    main: Rope,
    compress: Rope,
}

/// `rope_parameters` with `main` and `compress` (transformers 5), or `rope_theta`, `compress_rope_theta` and `rope_scaling`, which is of
/// the second alone.
fn ropes(config: &Config<'_>, rotated: i64) -> Result<Ropes> {
    let plain = |theta| Rope { theta, rotated, layout: RopeLayout::Pairs, scaling: RopeScaling::None };
    let main = plain(config.positive_or("rope_theta", 10_000.0)?);
    let compress = plain(config.positive_or("compress_rope_theta", 160_000.0)?);
    let (parameters, scaling) = (config.object("rope_parameters")?, config.object("rope_scaling")?);
    let nested = match &parameters {
        Some(p) => p.object("main")?.zip(p.object("compress")?),
        None => None,
    };
    if let Some((of_main, of_compress)) = nested {
        let own = |p: &Config<'_>, part: &str| -> Result<Rope> {
            let field = format!("rope_parameters.{part}");
            let head = config.size_or("head_dim", 512)?;
            let own = p.optional("partial_rotary_factor")?.map_or(rotated, |factor| (head as f64 * factor) as i64);
            if own != rotated {
                let what = format!("{own} elements rotate, {rotated} by the other fields");
                let place = format!("config.json: {field}.partial_rotary_factor");
                return Err(Error::Model(Fault::new(place, what)));
            }
            Ok(Rope { scaling: stretched(config, &field, p, rotated)?, ..plain(p.positive("rope_theta")?) })
        };
        return Ok(Ropes { main: own(&of_main, "main")?, compress: own(&of_compress, "compress")? });
    }
    let (field, flat) = match parameters {
        Some(parameters) => ("rope_parameters", Some(parameters)),
        None => ("rope_scaling", scaling),
    };
    let Some(p) = flat else { return Ok(Ropes { main, compress }) };
    let mut stretch = stretched(config, field, &p, rotated)?;
    if let RopeScaling::Yarn { attention_factor, .. } = &mut stretch {
        // Not the one that is inferred from the factor.
        *attention_factor = p.positive_or("attention_factor", 1.0)?;
    }
    Ok(Ropes { main, compress: Rope { scaling: stretch, ..compress } })
}

/// How `parameters`, which the config calls `field`, scale: not at all or by YaRN.
fn stretched(config: &Config<'_>, field: &str, p: &Config<'_>, rotated: i64) -> Result<RopeScaling> {
    match rope::scaling(config, field, p, rotated)? {
        scaling @ (RopeScaling::None | RopeScaling::Yarn { .. }) => Ok(scaling),
        RopeScaling::Linear { .. }
        | RopeScaling::Dynamic { .. }
        | RopeScaling::LongRope { .. }
        | RopeScaling::Proportional { .. }
        | RopeScaling::Llama3 { .. } => {
            let (name, found) = match p.field("rope_type") {
                Some(found) => ("rope_type", found),
                None => ("type", p.field("type").unwrap_or(&Value::Null)),
            };
            Err(wrong(&format!("{field}.{name}"), found, "default or yarn"))
        }
    }
}

/// What all layers share.
struct Sizes {
    hidden: i64,
    eps: f64,
    /// Copies of the stream.
    copies: i64,
    floor: f64,
    rounds: i64,
    heads: i64,
    head: i64,
    rotated: i64,
    query_latent: i64,
    groups: i64,
    group_rank: i64,
    /// Tokens to an entry where entries are chosen, and where all are seen.
    rates: [i64; 2],
    index_heads: i64,
    index_head: i64,
    index_chosen: i64,
}

impl Sizes {
    fn read(config: &Config<'_>) -> Result<Self> {
        for (field, expected) in [("num_key_value_heads", json!(1)), ("attention_bias", json!(false))] {
            only(config, field, expected)?;
        }
        let fault = |field: &str, what: String| Err(Error::Model(Fault::new(format!("config.json: {field}"), what)));
        let head = config.size_or("head_dim", 512)?;
        let of_head = |factor: f64| (head as f64 * factor) as i64;
        let rotated = match config.optional("partial_rotary_factor")? {
            Some(factor) => of_head(factor),
            None => config.size_or("qk_rope_head_dim", of_head(64.0 / 512.0))?,
        };
        let _ = config.field("qk_rope_head_dim");
        let index_head = config.size_or("index_head_dim", 128)?;
        if rotated < 2 || rotated % 2 != 0 || rotated > head.min(index_head) {
            let what =
                format!("{rotated} of {head} elements rotate, of {index_head} of the indexer's; pairs are needed");
            return fault("qk_rope_head_dim", what);
        }
        let (heads, groups) = (config.size("num_attention_heads")?, config.size_or("o_groups", 8)?);
        if heads % groups != 0 {
            return fault("o_groups", format!("{groups} does not divide num_attention_heads = {heads}"));
        }
        let copies = config.size_or("hc_mult", 4)?;
        if copies > MOST_COPIES {
            return fault("hc_mult", format!("{copies} copies of the stream; no model has more than {MOST_COPIES}"));
        }
        let named = config.object("compress_rates")?;
        let rate = |name: &str, alone: &str, default: i64| match &named {
            Some(rates) => config.size_or(alone, rates.size_or(name, default)?),
            None => config.size_or(alone, default),
        };
        Ok(Self {
            hidden: config.size("hidden_size")?,
            eps: config.positive_or("rms_norm_eps", 1e-6)?,
            copies,
            floor: config.number_or("hc_eps", 1e-6)?,
            rounds: config.size_or("hc_sinkhorn_iters", 20)?,
            heads,
            head,
            rotated,
            query_latent: config.size_or("q_lora_rank", 1024)?,
            groups,
            group_rank: config.size_or("o_lora_rank", 1024)?,
            rates: [
                rate("compressed_sparse_attention", "compress_rate_csa", 4)?,
                rate("heavily_compressed_attention", "compress_rate_hca", 128)?,
            ],
            index_heads: config.size_or("index_n_heads", 64)?,
            index_head,
            index_chosen: config.size_or("index_topk", 512)?,
        })
    }

    fn norm(&self, name: String, width: i64) -> NormSpec {
        block::norm(name, width, self.eps, NormKind::Rms)
    }

    fn map(&self, at: &str) -> StreamMap {
        StreamMap {
            function: format!("{at}_fn"),
            base: format!("{at}_base"),
            scale: format!("{at}_scale"),
            eps: self.eps,
        }
    }

    fn mix(&self, at: &str, norm: String) -> StreamMix {
        StreamMix {
            count: self.copies,
            map: self.map(at),
            floor: self.floor,
            rounds: self.rounds,
            norm: self.norm(norm, self.hidden),
        }
    }

    fn attention(&self, at: &str, kind: Kind) -> CompressedAttention {
        let linear = |name: &str, input, output| linear(format!("{at}.{name}"), input, output, false);
        let norm = |name: &str, width| self.norm(format!("{at}.{name}"), width);
        let queries = self.heads * self.head;
        let parts = self.groups * self.group_rank;
        let [sparse, heavy] = self.rates;
        CompressedAttention {
            heads: self.heads,
            head_size: self.head,
            scale: (self.head as f64).powf(-0.5),
            query_down: linear("wq_a", self.hidden, self.query_latent),
            query_norm: norm("q_norm", self.query_latent),
            query_up: linear("wq_b", self.query_latent, queries),
            query_head_norm: NormSpec { weights: Vec::new(), ..norm("", self.head) },
            key_value: linear("wkv", self.hidden, self.head),
            key_value_norm: norm("kv_norm", self.head),
            sinks: format!("{at}.attn_sink"),
            entries: match kind {
                Kind::Sliding => Entries::None,
                Kind::Heavy => Entries::All(self.compressor(at, heavy, self.head, false)),
                Kind::Sparse => Entries::Chosen {
                    compressor: self.compressor(at, sparse, self.head, true),
                    indexer: Box::new(Indexer {
                        heads: self.index_heads,
                        head_size: self.index_head,
                        chosen: self.index_chosen,
                        compressor: self.compressor(&format!("{at}.indexer"), sparse, self.index_head, true),
                        query: linear("indexer.wq_b", self.query_latent, self.index_heads * self.index_head),
                        weights: linear("indexer.weights_proj", self.hidden, self.index_heads),
                    }),
                },
            },
            groups: self.groups,
            group: linear("wo_a", queries / self.groups, parts),
            output: linear("wo_b", parts, self.hidden),
        }
    }

    fn compressor(&self, below: &str, rate: i64, width: i64, overlapping: bool) -> Compressor {
        let at = |name: &str| format!("{below}.compressor.{name}");
        let given = if overlapping { 2 * width } else { width };
        Compressor {
            rate,
            width,
            overlapping,
            key_value: linear(at("wkv"), self.hidden, given, false),
            gate: linear(at("wgate"), self.hidden, given, false),
            bias: at("ape"),
            norm: self.norm(at("norm"), width),
        }
    }
}

fn linear(name: String, input: i64, output: i64, bias: bool) -> LinearSpec {
    LinearSpec { name, input, output, bias }
}

/// Experts, as all layers share them.
struct ExpertSizes {
    count: i64,
    width: i64,
    chosen: i64,
    scale: f64,
    activation: Activation,
    shared_bias: bool,
    balance: f64,
}

impl ExpertSizes {
    fn read(config: &Config<'_>) -> Result<Self> {
        for (field, expected) in [
            ("scoring_func", json!("sqrtsoftplus")),
            ("topk_method", json!("noaux_tc")),
            ("norm_topk_prob", json!(true)),
            ("n_shared_experts", json!(1)),
            ("hidden_act", json!("silu")),
        ] {
            only(config, field, expected)?;
        }
        let count =
            experts::credible(size_of(config, "n_routed_experts", "num_local_experts", 256)?, "n_routed_experts")?;
        Ok(Self {
            count,
            width: size_of(config, "moe_intermediate_size", "intermediate_size", 2048)?,
            chosen: experts::chosen(config, "num_experts_per_tok", 6, count)?,
            scale: config.positive_or("routed_scaling_factor", 1.5)?,
            activation: Activation::Clamped {
                limit: config.positive_or("swiglu_limit", 10.0)?,
                slope: 1.0,
                offset: 0.0,
            },
            shared_bias: config.flag_or("mlp_bias", false)?,
            balance: experts::balance(config)?,
        })
    }

    /// With their names below `at`.
    fn feed_forward(&self, at: &str, hidden: i64, by_table: bool) -> FeedForward {
        let gate = format!("{at}.gate");
        let (chosen, scores, scale) = (self.chosen, Scores::SqrtSoftplus, self.scale);
        // transformers collects the logits of routers that choose, for the loss that balances them.
        let (routing, balance) = if by_table {
            (Routing::OfToken { chosen, table: format!("{gate}.tid2eid"), scores, normalised: 1e-20, scale }, 0.0)
        } else {
            let routing = Routing::Largest {
                chosen,
                scores,
                correction: Some(format!("{gate}.bias")),
                groups: None,
                normalised: Some(1e-20),
                scale,
                expert_scale: None,
            };
            (routing, self.balance)
        };
        let names =
            Apart { experts: format!("{at}.experts"), parts: ["w1", "w3", "w2"], module: format!("{at}.experts") };
        let (projection, down) = names.linears(self.count, hidden, self.width);
        let shared =
            |part: &str, input, output| linear(format!("{at}.shared_experts.{part}"), input, output, self.shared_bias);
        FeedForward::Experts(Box::new(Experts {
            router: router(gate, hidden, self.count, routing, balance),
            activation: self.activation,
            projection,
            down,
            weighted: Weighted::Output,
            shared: Some(SharedExpert {
                feed_forward: FeedForward::Gated {
                    activation: self.activation,
                    projection: GateUp::Separate {
                        gate: shared("w1", hidden, self.width),
                        up: shared("w3", hidden, self.width),
                    },
                    down: shared("w2", self.width, hidden),
                },
                gate: None,
            }),
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::{Value, json};

    use crate::model::families::from_config;
    use crate::model::families::tests::answer_of;
    use crate::model::spec::{Attention, Entries, FeedForward, Position, RopeScaling, Routing};

    fn config(change: Value) -> Value {
        let mut config = json!({
            "model_type": "deepseek_v4", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 8,
            "vocab_size": 11, "head_dim": 16, "qk_rope_head_dim": 4, "n_routed_experts": 8, "moe_intermediate_size": 12,
        });
        config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        config
    }

    fn fault(change: Value) -> String {
        from_config(&config(change)).unwrap_err().to_string()
    }

    /// What each layer sees: l the latest tokens, c chosen entries too, a all entries too; and whether a table names its experts.
    fn layers(change: Value) -> Vec<(char, bool)> {
        let spec = from_config(&config(change)).unwrap();
        let of_layer = |layer: &crate::model::spec::LayerSpec| {
            let Attention::Compressed(attention) = &layer.attention else { panic!("compressed attention") };
            let FeedForward::Experts(experts) = &layer.feed_forward else { panic!("experts") };
            let seen = match attention.entries {
                Entries::None => 'l',
                Entries::All(_) => 'a',
                Entries::Chosen { .. } => 'c',
            };
            (seen, matches!(experts.router.routing, Routing::OfToken { .. }))
        };
        spec.layers.iter().map(of_layer).collect()
    }

    #[test]
    fn kinds_of_layers_are_read_in_every_spelling() {
        assert_eq!(layers(json!({})), [('a', true), ('a', true), ('a', true), ('c', false)]);
        // One more for a layer that predicts further ahead.
        let ratios = json!({"compress_ratios": [0, 4, 128, 4, 0], "num_hash_layers": 1});
        assert_eq!(layers(ratios), [('l', true), ('c', false), ('a', false), ('c', false)]);
        let sparse = "compressed_sparse_attention";
        let types = json!({
            "layer_types": [sparse, "sliding_attention", "heavily_compressed_attention", sparse],
            "compress_ratios": [0, 0, 0, 0], "mlp_layer_types": ["moe", "hash_moe", "moe", "moe"],
        });
        assert_eq!(layers(types), [('c', false), ('l', true), ('a', false), ('c', false)]);
    }

    #[test]
    fn yarn_is_of_layers_with_entries_and_keeps_the_magnitude_of_angles() {
        let yarn = json!({"type": "yarn", "factor": 16, "original_max_position_embeddings": 64, "beta_fast": 32});
        let nested = json!({
            "main": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
            "compress": {"rope_type": "yarn", "rope_theta": 1.6e5, "factor": 16, "original_max_position_embeddings": 64,
                "beta_fast": 32, "attention_factor": 1.0},
        });
        let flat = from_config(&config(json!({"compress_ratios": [0, 4, 128, 4], "rope_scaling": yarn}))).unwrap();
        let same = from_config(&config(json!({"compress_ratios": [0, 4, 128, 4], "rope_parameters": nested}))).unwrap();
        let ropes = |spec: &crate::model::ModelSpec| {
            let positions = spec.layers.iter().map(|layer| layer.position.clone());
            positions.collect::<Vec<_>>()
        };
        assert_eq!(ropes(&flat), ropes(&same));
        let Position::Rope(main) = &flat.layers[0].position else { panic!("rotation") };
        assert_eq!((main.theta, main.rotated, &main.scaling), (1e4, 4, &RopeScaling::None));
        let Position::Rope(compress) = &flat.layers[1].position else { panic!("rotation") };
        let RopeScaling::Yarn { attention_factor, .. } = compress.scaling else { panic!("YaRN") };
        assert_eq!((compress.theta, attention_factor), (1.6e5, 1.0));
    }

    /// Layers that predict further ahead have a name of their own.
    #[test]
    fn layers_that_predict_further_tokens_are_passed_over_by_name() {
        let config = config(json!({"compress_ratios": [0, 4, 128, 4]}));
        let with = |name: &str| answer_of(&config, |tensors| drop(tensors.insert(name.into(), vec![8])));
        assert_eq!(with("mtp.0.attn.wkv.weight"), "fits");
        for other in ["mtp_norm.weight", "layers.4.attn.wkv.weight", "layers.0.attn.norm.weight"] {
            assert!(with(other).contains(other), "{other}");
        }
    }

    /// Every module is found again from what transformers calls it, and no two are called the same.
    #[test]
    fn names_of_transformers_are_those_of_one_module_each() {
        let spec = from_config(&config(json!({"compress_ratios": [0, 4, 128, 4]}))).unwrap();
        let mut called = BTreeSet::new();
        for site in spec.sites() {
            assert!(called.insert(site.name.clone()), "{}", site.name);
            let found = spec.names.spec_names(&site.name).next().unwrap();
            assert_eq!(spec.names.module(&found), site.name);
            let tensors = spec.tensors();
            let weight = format!("{}.weight", found.replacen('*', "0", 1));
            assert!(tensors.contains_key(&weight), "{} is {weight}", site.name);
        }
        for name in [
            "model.layers.1.self_attn.compressor.indexer.q_b_proj",
            "model.layers.1.self_attn.compressor.indexer.kv_proj",
            "model.layers.1.self_attn.compressor.indexer.scorer.weights_proj",
            "model.layers.2.self_attn.compressor.gate_proj",
            "model.layers.0.self_attn.o_a_proj",
            "model.layers.0.mlp.shared_experts.up_proj",
            "lm_head",
        ] {
            assert!(called.contains(name), "{name}: {called:?}");
        }
    }

    #[test]
    fn what_cannot_be_computed_is_refused_with_both_values() {
        let cases = [
            (json!({"scoring_func": "sigmoid"}), r#"scoring_func: "sigmoid" found, "sqrtsoftplus" expected"#),
            (json!({"num_key_value_heads": 2}), "num_key_value_heads: 2 found, 1 expected"),
            (json!({"n_shared_experts": 2}), "n_shared_experts: 2 found, 1 expected"),
            (json!({"norm_topk_prob": false}), "norm_topk_prob: false found, true expected"),
            (json!({"attention_bias": true}), "attention_bias: true found, false expected"),
            (json!({"hidden_act": "gelu"}), r#"hidden_act: "gelu" found, "silu" expected"#),
            (json!({"o_groups": 3}), "o_groups: 3 does not divide num_attention_heads = 8"),
            (json!({"qk_rope_head_dim": 5}), "5 of 16 elements rotate"),
            (json!({"index_head_dim": 2}), "of 2 of the indexer's"),
            (json!({"hc_mult": 100_000}), "hc_mult: 100000 copies"),
            (json!({"num_experts_per_tok": 9}), "9 experts for each token, but there are 8"),
            (json!({"n_routed_experts": 1 << 20}), "n_routed_experts: 1048576 experts"),
            (json!({"intermediate_size": 13}), "intermediate_size: is 13, but moe_intermediate_size"),
            (json!({"compress_ratios": [0, 4, 8, 4]}), "compress_ratios: 8 found, 0, 4 or 128 expected"),
            (json!({"compress_ratios": [0, 4, 4]}), "a list of 4 or more expected"),
            (json!({"mlp_layer_types": ["moe", "moe", "moe", "dense"]}), r#""dense" found, hash_moe or moe"#),
            (json!({"router_jitter_noise": 0.1}), "router_jitter_noise"),
            (json!({"kv_lora_rank": 512}), "kv_lora_rank"),
            (
                json!({"rope_scaling": {"type": "linear", "factor": 2.0}}),
                r#"rope_scaling.type: "linear" found, default or yarn expected"#,
            ),
            (
                json!({"rope_parameters": {"main": {"rope_theta": 1e4}, "compress": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}}),
                "rope_parameters.compress.partial_rotary_factor: 8 elements rotate, 4 by the other fields",
            ),
        ];
        for (change, expected) in cases {
            let found = fault(change.clone());
            assert!(found.contains(expected), "{change}: {found}");
        }
    }
}
