//! DeepSeek V2 and V3: latent attention, experts after the first layers.

use serde_json::json;

use super::block::{self, activation, gated, pre_norm};
use super::config::{Config, wrong};
use super::experts::{self, Apart, router};
use super::{assembly, layers, rope};
use crate::model::spec::{
    self, Attention, Ending, FeedForward, Groups, LatentAttention, LatentQuery, LayerSpec, LinearSpec, Mask, ModelSpec,
    NormKind, Position, Rope, RopeScaling, Router, Routing, Scores, SharedExpert,
};
use crate::ops::{Activation, LogitMap, RopeLayout, Weighted};
use crate::{Error, Fault, Result};

/// Of the norms of latents, whatever `rms_norm_eps` says.
const LATENT_EPS: f64 = 1e-6;

/// `DeepseekV2Config`, also of V2-Lite and V2.5.
pub(super) fn v2(config: &Config<'_>) -> Result<ModelSpec> {
    let mlp_bias = config.flag_or("mlp_bias", false)?;
    config.always(&[("rope_interleave", &[json!(true)])])?;
    build(config, Sizes::read(config, RopeLayout::Pairs)?, mlp_bias, 0, &|config| {
        config.always(&[("scoring_func", &[json!("softmax")])])?;
        let count = experts::count(config, "n_routed_experts", 64)?;
        let groups = match config.field("topk_method").map(|value| (value, value.as_str())) {
            None | Some((_, Some("greedy"))) => None,
            Some((_, Some("group_limited_greedy"))) => Some(groups(config, count, (1, 1), 1)?),
            Some((value, _)) => return Err(wrong("topk_method", value, "greedy or group_limited_greedy")),
        };
        config.passed_over(&["n_group", "topk_group", "norm_topk_prob"]);
        Ok(Experts {
            count,
            width: config.size_or("moe_intermediate_size", 1407)?,
            shared: config.count_or("n_shared_experts", 2)?,
            correction: false,
            routing: Routing::Largest {
                chosen: chosen(config, 6, count, groups)?,
                scores: Scores::Softmax,
                correction: None,
                groups,
                normalised: None,
                scale: config.positive_or("routed_scaling_factor", 1.0)?,
                expert_scale: None,
            },
        })
    })
}

/// `DeepseekV3Config`, also of R1. Pairs that turn together come out apart there: an order that queries and keys share makes no
/// difference.
pub(super) fn v3(config: &Config<'_>) -> Result<ModelSpec> {
    let layout = if config.flag_or_null("rope_interleave", true)? { RopeLayout::Pairs } else { RopeLayout::Halves };
    let mut spec = build(config, Sizes::read(config, layout)?, false, 3, &|config| {
        config.always(&[("scoring_func", &[json!("sigmoid")]), ("topk_method", &[json!("noaux_tc")])])?;
        let count = experts::count(config, "n_routed_experts", 256)?;
        let groups = Some(groups(config, count, (8, 4), 2)?);
        Ok(Experts {
            count,
            width: config.size_or("moe_intermediate_size", 2048)?,
            shared: config.count_or("n_shared_experts", 1)?,
            correction: true,
            routing: Routing::Largest {
                chosen: chosen(config, 8, count, groups)?,
                scores: Scores::Sigmoid,
                correction: None, // named in each layer
                groups,
                normalised: config.flag_or_null("norm_topk_prob", true)?.then_some(1e-20),
                scale: config.positive_or("routed_scaling_factor", 2.5)?,
                expert_scale: None,
            },
        })
    })?;
    // Layers after the last one predict further tokens; the model is computed without them.
    let field = "num_nextn_predict_layers";
    let ahead = layers::credible(config.count_or(field, 1)?, field)?;
    let first = spec.layers.len() as i64;
    spec.ignored_prefixes = (first..first + ahead).map(|i| format!("model.layers.{i}.")).collect();
    Ok(spec)
}

/// Experts, as all layers that have them share them.
struct Experts {
    count: i64,
    width: i64,
    /// How many times as wide the shared expert is; 0 where there is none.
    shared: i64,
    /// Whether a tensor is added to the scores for the choice.
    correction: bool,
    routing: Routing,
}

impl Experts {
    /// With their names below `at`.
    fn feed_forward(&self, at: &str, activation: Activation, hidden: i64, shared_bias: bool) -> FeedForward {
        let mut routing = self.routing.clone();
        if let Routing::Largest { correction, .. } = &mut routing {
            *correction = self.correction.then(|| format!("{at}.gate.e_score_correction_bias"));
        }
        let (projection, down) = Apart::below(at).linears(self.count, hidden, self.width);
        let router = router(format!("{at}.gate"), hidden, self.count, routing, 0.0);
        let shared = SharedExpert {
            feed_forward: gated(
                &format!("{at}.shared_experts"),
                activation,
                hidden,
                self.width * self.shared,
                shared_bias,
            ),
            gate: None,
        };
        FeedForward::Experts(Box::new(spec::Experts {
            router: Router { wide: true, ..router },
            activation,
            projection,
            down,
            weighted: Weighted::Output,
            shared: (self.shared > 0).then_some(shared),
        }))
    }
}

/// `n_group` groups of which `topk_group` are kept, each judged by its largest scores; `default` where the config does not say.
fn groups(config: &Config<'_>, experts: i64, default: (i64, i64), judged_by: i64) -> Result<Groups> {
    let groups = Groups {
        count: config.size_or("n_group", default.0)?,
        kept: config.size_or("topk_group", default.1)?,
        judged_by,
    };
    let fault = |field: &str, what: String| Err(Error::Model(Fault::new(format!("config.json: {field}"), what)));
    if experts % groups.count != 0 || experts / groups.count < judged_by {
        return fault(
            "n_group",
            format!("{} groups of {experts} experts; at least {judged_by} each expected", groups.count),
        );
    }
    if groups.kept > groups.count {
        return fault("topk_group", format!("{} of {} groups are kept", groups.kept, groups.count));
    }
    Ok(groups)
}

/// How many experts a token goes through: at most those of the groups that are kept.
fn chosen(config: &Config<'_>, default: i64, count: i64, groups: Option<Groups>) -> Result<i64> {
    let within = groups.map_or(count, |groups| count / groups.count * groups.kept);
    experts::chosen(config, "num_experts_per_tok", default, within)
}

/// What all layers share.
struct Sizes {
    hidden: i64,
    heads: i64,
    unrotated: i64,
    rotated: i64,
    value: i64,
    latent: i64,
    query_latent: Option<i64>,
    bias: bool,
    scale: f64,
    rope: Rope,
}

impl Sizes {
    fn read(config: &Config<'_>, layout: RopeLayout) -> Result<Self> {
        let (unrotated, rotated) = (config.size_or("qk_nope_head_dim", 128)?, config.size_or("qk_rope_head_dim", 64)?);
        if rotated % 2 != 0 {
            let what = format!("{rotated} elements rotate; rotary embedding needs pairs");
            return Err(Error::Model(Fault::new("config.json: qk_rope_head_dim", what)));
        }
        let rope = Rope { layout, ..rope::read(config, 10_000.0, rotated)? };
        Ok(Self {
            hidden: config.size("hidden_size")?,
            heads: config.size("num_attention_heads")?,
            unrotated,
            rotated,
            value: config.size_or("v_head_dim", 128)?,
            latent: config.size_or("kv_lora_rank", 512)?,
            query_latent: config.size_or_null("q_lora_rank", 1536)?,
            bias: config.flag_or("attention_bias", false)?,
            scale: ((unrotated + rotated) as f64).powf(-0.5) * magnitude(config, &rope)?.powi(2),
            rope,
        })
    }

    fn attention(&self, at: &str) -> LatentAttention {
        let linear = |name: &str, input, output, bias| LinearSpec { name: format!("{at}.{name}"), input, output, bias };
        let norm = |name: &str, width| block::norm(format!("{at}.{name}"), width, LATENT_EPS, NormKind::Rms);
        let queries = self.heads * (self.unrotated + self.rotated);
        LatentAttention {
            heads: self.heads,
            unrotated: self.unrotated,
            rotated: self.rotated,
            value_size: self.value,
            latent_size: self.latent,
            scale: self.scale,
            query: match self.query_latent {
                None => LatentQuery::Direct(linear("q_proj", self.hidden, queries, false)),
                Some(width) => LatentQuery::LowRank {
                    down: linear("q_a_proj", self.hidden, width, self.bias),
                    norm: norm("q_a_layernorm", width),
                    up: linear("q_b_proj", width, queries, false),
                },
            },
            down: linear("kv_a_proj_with_mqa", self.hidden, self.latent + self.rotated, self.bias),
            norm: norm("kv_a_layernorm", self.latent),
            up: linear("kv_b_proj", self.latent, self.heads * (self.unrotated + self.value), false),
            output: linear("o_proj", self.heads * self.value, self.hidden, self.bias),
        }
    }
}

/// What stretched positions make of queries and of keys: scores grow with its square.
fn magnitude(config: &Config<'_>, rope: &Rope) -> Result<f64> {
    let parameters = rope::parameters(config)?.map(|(_, parameters)| parameters);
    let Some(parameters) = parameters.filter(|_| rope.scaling != RopeScaling::None) else { return Ok(1.0) };
    match parameters.number_or("mscale_all_dim", 0.0)? {
        0.0 => Ok(1.0),
        mscale => Ok(rope::yarn_scale(parameters.positive("factor")?, mscale)),
    }
}

fn build(
    config: &Config<'_>,
    sizes: Sizes,
    mlp_bias: bool,
    dense_layers: i64,
    experts: &dyn Fn(&Config<'_>) -> Result<Experts>,
) -> Result<ModelSpec> {
    let hidden = sizes.hidden;
    let eps = config.positive_or("rms_norm_eps", 1e-6)?;
    let intermediate = config.size("intermediate_size")?;
    let act = activation(config, "hidden_act", Activation::Silu)?;
    let count = layers::count(config, "num_hidden_layers")?;
    let dense = config.count_or("first_k_dense_replace", dense_layers)?;
    // All of experts, which there may be none of; and sizes of heads, which the parts of latent attention tell.
    config.passed_over(&[
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        "n_shared_experts",
        "n_group",
    ]);
    config.passed_over(&["topk_group", "topk_method", "scoring_func", "norm_topk_prob", "routed_scaling_factor"]);
    config.passed_over(&["num_key_value_heads", "head_dim", "qk_head_dim"]);
    let experts = if dense < count { Some(experts(config)?) } else { None };
    config.always(&[("moe_layer_freq", &[json!(1)])])?;
    let layers = (0..count).map(|i| {
        let at = |part: &str| format!("model.layers.{i}.{part}");
        let norm = |part: &str| block::norm(at(part), hidden, eps, NormKind::Rms);
        LayerSpec {
            attention: Attention::Latent(sizes.attention(&at("self_attn"))),
            position: Position::Rope(sizes.rope.clone()),
            mask: Mask::Full,
            feed_forward: match &experts {
                Some(experts) if i >= dense => experts.feed_forward(&at("mlp"), act, hidden, mlp_bias),
                _ => gated(&at("mlp"), act, hidden, intermediate, mlp_bias),
            },
            residual: pre_norm(norm("input_layernorm"), norm("post_attention_layernorm")),
            ending: Ending::default(),
        }
    });
    let embedding = assembly::embedding("model.embed_tokens.weight");
    let final_norm = block::norm("model.norm".into(), hidden, eps, NormKind::Rms);
    let mut spec =
        assembly::model(config, embedding, layers.collect(), final_norm, ("lm_head", false), LogitMap::PLAIN)?;
    spec.names.taken_for_experts = experts::TAKEN_FOR_EXPERTS;
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::model::families::from_config;
    use crate::model::families::tests::answer_of;
    use crate::model::spec::{Attention, LatentQuery};

    fn config(change: Value) -> Value {
        let mut config = json!({
            "model_type": "deepseek_v3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "vocab_size": 11, "first_k_dense_replace": 2,
        });
        config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        config
    }

    fn fault(change: Value) -> String {
        from_config(&config(change)).unwrap_err().to_string()
    }

    /// Queries go through a latent unless the config says null: V2-Lite does, and a config that does not say means 1536.
    #[test]
    fn queries_without_a_latent_are_those_where_the_config_says_null() {
        let direct = |change: Value| {
            let spec = from_config(&config(change)).unwrap();
            let Attention::Latent(attention) = &spec.layers[0].attention else { panic!("latent attention") };
            matches!(attention.query, LatentQuery::Direct(_))
        };
        assert!(direct(json!({"q_lora_rank": null})));
        assert!(!direct(json!({})));
        let spec = from_config(&config(json!({}))).unwrap();
        assert_eq!(spec.tensors()["model.layers.0.self_attn.q_a_proj.weight"], [1536, 32]);
    }

    #[test]
    fn what_cannot_be_computed_is_refused_with_both_values() {
        assert!(fault(json!({"qk_rope_head_dim": 7})).contains("qk_rope_head_dim: 7"));
        assert!(fault(json!({"num_nextn_predict_layers": 1_000_000})).contains("num_nextn_predict_layers: 1000000"));
        assert!(fault(json!({"mlp_bias": true})).contains("mlp_bias"));
        let found = fault(json!({"first_k_dense_replace": 1, "scoring_func": "softmax"}));
        assert!(found.contains(r#"scoring_func: "softmax" found, "sigmoid" expected"#), "{found}");
        assert!(fault(json!({"moe_layer_freq": 2})).contains("moe_layer_freq: 2 found, 1 expected"));
        // A sum of more experts than the groups that are kept hold would have some that were not chosen.
        let few =
            json!({"first_k_dense_replace": 1, "n_routed_experts": 16, "topk_group": 1, "num_experts_per_tok": 3});
        assert!(fault(few).contains("3 experts for each token, but there are 2"));
    }

    /// Layers that predict further ahead lie after the last one; as many as the config tells of, and no more.
    #[test]
    fn layers_that_predict_further_tokens_are_passed_over_by_number() {
        let config = json!({
            "model_type": "deepseek_v3", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "vocab_size": 11, "first_k_dense_replace": 2, "num_nextn_predict_layers": 1,
        });
        let with = |name: &str| answer_of(&config, |tensors| drop(tensors.insert(name.into(), vec![8])));
        assert_eq!(with("model.layers.2.eh_proj.weight"), "fits");
        for other in ["model.layers.3.eh_proj.weight", "model.layers.1.eh_proj.weight", "model.layers.20.norm.weight"] {
            assert!(with(other).contains(other), "{other}");
        }
    }
}
