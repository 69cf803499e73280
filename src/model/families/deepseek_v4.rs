//! DeepSeek V4: copies of the stream, keys that are values, windows compressed to entries, experts chosen by a table in the first
//! layers.

mod layers;

use serde_json::json;

use super::config::Config;
use super::experts::{self, Apart, router};
use super::{assembly, block};
use crate::model::names::{Names, Rename};
use crate::model::spec::{
    Attention, CompressedAttention, Compressor, Ending, Entries, Experts, FeedForward, GateUp, Indexer, LayerSpec,
    LinearSpec, Mask, ModelSpec, NormKind, NormSpec, Position, Residual, Routing, Scores, SharedExpert, StreamMap,
    StreamMix, Streams,
};
use crate::ops::{Activation, LogitMap, Weighted};
use crate::{Error, Fault, Result};
use layers::{Kind, by_table, ropes};

/// More copies of the stream than any model has.
const MOST_COPIES: i64 = 64;

/// `DeepseekV4Config`. Names are those of the published files.
pub(super) fn deepseek_v4(config: &Config<'_>) -> Result<ModelSpec> {
    let sizes = Sizes::read(config)?;
    let experts = ExpertSizes::read(config)?;
    let count = super::layers::count(config, "num_hidden_layers")?;
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

/// Every name by which PEFT's tables may know a part of an expert.
const TAKEN_FOR_EXPERTS: &[&str] = &["gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"];

fn names() -> Names {
    let key_norm = Rename::Part("attn.kv_norm", "attn.norm");
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
        // As published, and as transformers writes it: made anew, or as it has read it.
        layouts: vec![
            Vec::new(),
            vec![key_norm],
            vec![
                key_norm,
                Rename::Start("layers", "model.layers"),
                Rename::Start("embed", "model.embed_tokens"),
                Rename::Start("norm", "model.norm"),
                Rename::Start("hc_head_fn", "model.hc_head.hc_fn"),
                Rename::Start("hc_head_base", "model.hc_head.hc_base"),
                Rename::Start("hc_head_scale", "model.hc_head.hc_scale"),
            ],
        ],
        taken_for_experts: TAKEN_FOR_EXPERTS,
        ..Names::default()
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
        config.always(&[("num_key_value_heads", &[json!(1)]), ("attention_bias", &[json!(false)])])?;
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
        config.always(&[
            ("scoring_func", &[json!("sqrtsoftplus")]),
            ("topk_method", &[json!("noaux_tc")]),
            ("norm_topk_prob", &[json!(true)]),
            ("n_shared_experts", &[json!(1)]),
            ("hidden_act", &[json!("silu")]),
        ])?;
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
mod tests;
