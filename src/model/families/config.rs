//! Typed reading of `config.json`: every error names the field, what was found and what is expected.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::Value;

use super::said::{asks, elsewhere};
use crate::{Error, Fault, Result};

/// A `config.json`, or an object inside it.
#[derive(Clone, Copy)]
pub(super) struct Config<'a> {
    value: &'a Value,
    /// Names of the fields that were asked for, at any depth.
    asked: &'a RefCell<BTreeSet<String>>,
    /// Sizes of fields that the config leaves out.
    defaults: &'a [(&'static str, i64)],
}

/// Fields that change what some family computes, and what they ask for. These and every other field that is set in a config whose page
/// never asks for it are an error, unless they speak of something else ([`elsewhere`]).
const COMPUTES: &[(&str, &str)] = &[
    ("attention_k_eq_v", "values that are the keys"),
    ("attention_bias", "biases of the attention's projections"),
    ("attention_multiplier", "a scale of the scores"),
    ("attn_logit_softcapping", "soft caps of the scores"),
    ("attn_temperature_tuning", "queries that grow with their position"),
    ("attention_chunk_size", "attention in chunks"),
    ("alibi", "linear biases"),
    ("clip_qkv", "clipped queries, keys and values"),
    ("compress_ratios", "windows of tokens compressed to entries"),
    ("embedding_multiplier", "scaled embeddings"),
    ("enable_moe_block", "experts"),
    ("final_logit_softcapping", "soft caps of the logits"),
    ("full_attention_interval", "layers of different kinds"),
    ("global_head_dim", "heads of different sizes"),
    ("hc_mult", "copies of the stream"),
    ("hidden_size_per_layer_input", "inputs of each layer's own"),
    ("is_causal", "attention to later tokens"),
    ("index_topk", "an indexer that chooses what is looked at"),
    ("kv_lora_rank", "latent attention"),
    ("layer_sharing", "shared blocks"),
    ("layer_types", "layers of different kinds"),
    ("linear_num_key_heads", "linear attention"),
    ("logit_scale", "scaled logits"),
    ("logits_scaling", "scaled logits"),
    ("mlp_bias", "biases of the feed-forward"),
    ("moe_intermediate_size", "experts"),
    ("n_routed_experts", "experts"),
    ("no_rope_layers", "layers without positions"),
    ("num_experts", "experts"),
    ("num_global_key_value_heads", "heads of different sizes"),
    ("num_hash_layers", "experts chosen by a table"),
    ("num_kv_shared_layers", "shared keys and values"),
    ("num_local_experts", "experts"),
    ("num_nextn_predict_layers", "heads for several tokens"),
    ("partial_rotary_factor", "a part of each head rotating"),
    ("per_layer_config", "layers of different sizes"),
    ("qk_layernorm", "norms of queries and keys"),
    ("qk_norm", "norms of queries and keys"),
    ("query_pre_attn_scalar", "a scale of the scores"),
    ("residual_multiplier", "scaled halves of a block"),
    ("rope_scaling", "stretched positions"),
    ("rope_parameters", "positions of its own kind"),
    ("rotary_pct", "a part of each head rotating"),
    ("sliding_window", "a sliding window"),
    ("use_bidirectional_attention", "attention to later tokens"),
    ("use_double_wide_mlp", "layers of different widths"),
    ("use_qk_norm", "norms of queries and keys"),
    ("shared_expert_intermediate_size", "a shared expert"),
    ("router_jitter_noise", "noise on the stream"),
    ("vision_config", "pictures"),
    ("audio_config", "sound"),
];

/// Fields of positions that say the kind, or what is so of text whatever they say: all sections have a token's one position.
const OF_POSITIONS: &[&str] = &["rope_type", "type", "finetuned", "mrope_section", "mrope_interleaved"];

/// Larger sizes than any model's; keeps products of two of them within i64.
const LARGEST: i64 = 1 << 30;

impl<'a> Config<'a> {
    pub(super) fn new(value: &'a Value, asked: &'a RefCell<BTreeSet<String>>) -> Self {
        Self { value, asked, defaults: &[] }
    }

    /// The same, with these sizes where it has none.
    pub(super) fn with_defaults(self, defaults: &'a [(&'static str, i64)]) -> Self {
        Self { defaults, ..self }
    }

    /// An error for a field that may change the computation and was not asked for, also of how positions are encoded.
    pub(super) fn prove_understood(&self) -> Result<()> {
        self.prove_featureless()?;
        let own = self.unknown().into_iter().map(|(name, value)| (name.to_string(), value));
        let positions = ["rope_scaling", "rope_parameters"].into_iter();
        let positions = positions.filter_map(|name| Some((name, self.value.get(name)?)));
        let nested = positions.flat_map(|(field, value)| self.unknown_below(field, value));
        own.chain(nested).next().map_or(Ok(()), |(name, value)| {
            let what = format!("{} is not understood: it may change what this model_type computes", short(value));
            let hint = "use a base without it; if it changes nothing, take it out of config.json";
            Err(Error::Model(Fault::new(format!("config.json: {name}"), what).hint(hint)))
        })
    }

    /// An error for the first field of those that are known to change the computation, where it was not asked for.
    pub(super) fn prove_featureless(&self) -> Result<()> {
        let asked = self.asked.borrow();
        let found = COMPUTES.iter().find_map(|(name, feature)| {
            let value = self.value.get(name).filter(|value| asks(name, value) && !asked.contains(*name))?;
            Some((name, feature, value))
        });
        found.map_or(Ok(()), |(name, feature, value)| {
            let what = format!("{} asks for {feature}, which is not supported for this model_type", short(value));
            Err(Error::Model(Fault::new(format!("config.json: {name}"), what).hint("use a base without it")))
        })
    }

    /// Fields that are set, were not asked for, and are known to nobody.
    pub(super) fn unknown(&self) -> Vec<(&'a str, &'a Value)> {
        let asked = self.asked.borrow();
        let fields = self.value.as_object().into_iter().flatten();
        let unknown = fields.filter(|(name, value)| asks(name, value) && !asked.contains(*name) && !elsewhere(name));
        unknown.map(|(name, value)| (name.as_str(), value)).collect()
    }

    /// The same below `field`, which tells how positions are encoded, perhaps of each kind of layer.
    fn unknown_below(&self, field: &str, value: &'a Value) -> Vec<(String, &'a Value)> {
        let asked = self.asked.borrow();
        let mut found = Vec::new();
        for (name, value) in value.as_object().into_iter().flatten().filter(|(name, value)| asks(name, value)) {
            let place = format!("{field}.{name}");
            match value {
                Value::Object(_) => found.extend(self.unknown_below(&place, value)),
                _ if asked.contains(name) || OF_POSITIONS.contains(&name.as_str()) => {}
                _ => found.push((place, value)),
            }
        }
        found
    }

    /// Fields that the published configs have and that the reference passes over, as if they were always one of these values, or null.
    pub(super) fn always(&self, fields: &[(&str, &[Value])]) -> Result<()> {
        for (field, expected) in fields {
            if let Some(found) = self.field(field).filter(|found| !expected.contains(found)) {
                let expected: Vec<String> =
                    expected.iter().chain(expected.is_empty().then_some(&Value::Null)).map(Value::to_string).collect();
                return Err(wrong(field, found, &expected.join(" or ")));
            }
        }
        Ok(())
    }

    /// Fields that nothing reads, whatever they say.
    pub(super) fn passed_over(&self, fields: &[&str]) {
        self.asked.borrow_mut().extend(fields.iter().map(ToString::to_string));
    }

    /// The field, unless absent or null.
    pub(super) fn field(&self, name: &str) -> Option<&'a Value> {
        self.asked.borrow_mut().insert(name.to_string());
        self.value.get(name).filter(|v| !v.is_null())
    }

    pub(super) fn text(&self, name: &str) -> Result<&'a str> {
        let value = self.required(name)?;
        value.as_str().ok_or_else(|| wrong(name, value, "a string"))
    }

    /// A size: a whole number from 1 to 2^30.
    pub(super) fn size(&self, name: &str) -> Result<i64> {
        if let Some((_, default)) = self.defaults.iter().find(|(known, _)| *known == name && self.field(name).is_none())
        {
            return Ok(*default);
        }
        let value = self.required(name)?;
        value
            .as_i64()
            .filter(|n| (1..=LARGEST).contains(n))
            .ok_or_else(|| wrong(name, value, "a whole number from 1 to 2^30"))
    }

    pub(super) fn size_or(&self, name: &str, default: i64) -> Result<i64> {
        Ok(self.optional_size(name)?.unwrap_or(default))
    }

    /// A whole number from 0 to 2^30.
    pub(super) fn count_or(&self, name: &str, default: i64) -> Result<i64> {
        match self.field(name) {
            None => Ok(default),
            Some(value) => value
                .as_i64()
                .filter(|n| (0..=LARGEST).contains(n))
                .ok_or_else(|| wrong(name, value, "a whole number from 0 to 2^30")),
        }
    }

    /// A size, or the default there is for it, if any.
    pub(super) fn optional_size(&self, name: &str) -> Result<Option<i64>> {
        let known = self.defaults.iter().any(|(known, _)| *known == name);
        if known || self.field(name).is_some() { self.size(name).map(Some) } else { Ok(None) }
    }

    /// `sliding_window`: none where it is null, `default` where it is absent.
    pub(super) fn window_or(&self, default: i64) -> Result<Option<i64>> {
        self.size_or_null("sliding_window", default)
    }

    /// A size: none where it is null, `default` where it is absent.
    pub(super) fn size_or_null(&self, name: &str, default: i64) -> Result<Option<i64>> {
        let absent = self.value.get(name).is_none();
        match self.field(name) {
            Some(_) => self.size(name).map(Some),
            None => Ok(absent.then_some(default)),
        }
    }

    /// A finite number above 0.
    pub(super) fn positive(&self, name: &str) -> Result<f64> {
        let value = self.required(name)?;
        value
            .as_f64()
            .filter(|x| x.is_finite() && *x > 0.0)
            .ok_or_else(|| wrong(name, value, "a finite number above 0"))
    }

    pub(super) fn positive_or(&self, name: &str, default: f64) -> Result<f64> {
        if self.field(name).is_some() { self.positive(name) } else { Ok(default) }
    }

    /// A finite number of at least 0.
    pub(super) fn number_or(&self, name: &str, default: f64) -> Result<f64> {
        match self.field(name) {
            None => Ok(default),
            Some(value) => value
                .as_f64()
                .filter(|x| x.is_finite() && *x >= 0.0)
                .ok_or_else(|| wrong(name, value, "a finite number of at least 0")),
        }
    }

    pub(super) fn flag_or(&self, name: &str, default: bool) -> Result<bool> {
        match self.field(name) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| wrong(name, value, "true or false")),
        }
    }

    /// A flag that transformers takes for off where it is null; `default` where it is absent.
    pub(super) fn flag_or_null(&self, name: &str, default: bool) -> Result<bool> {
        let absent = self.value.get(name).is_none();
        self.flag_or(name, absent && default)
    }

    /// Whether the field was asked for and is there.
    pub(super) fn has(&self, name: &str) -> bool {
        self.asked.borrow().contains(name) && self.value.get(name).is_some()
    }

    /// All that it says.
    pub(super) fn value(&self) -> &'a Value {
        self.value
    }

    /// An object of this config that is put together from several.
    pub(super) fn inside<'b>(&self, value: &'b Value) -> Config<'b>
    where
        'a: 'b,
    {
        Config { value, asked: self.asked, defaults: &[] }
    }

    /// Whether it has no fields.
    pub(super) fn is_empty(&self) -> bool {
        self.value.as_object().is_none_or(serde_json::Map::is_empty)
    }

    /// Whether the field is there and null.
    pub(super) fn is_null(&self, name: &str) -> bool {
        self.value.get(name).is_some_and(Value::is_null)
    }

    /// An error for the first field of this object, which the config calls `place`, that is none of `names`.
    pub(super) fn only(&self, place: &str, names: &[&str]) -> Result<()> {
        let mut fields = self.value.as_object().into_iter().flatten();
        fields.find(|(name, _)| !names.contains(&name.as_str())).map_or(Ok(()), |(name, value)| {
            let what = format!("{} is not understood here", short(value));
            Err(Error::Model(Fault::new(format!("config.json: {place}.{name}"), what).hint("use a base without it")))
        })
    }

    pub(super) fn object(&self, name: &str) -> Result<Option<Config<'a>>> {
        match self.field(name) {
            None => Ok(None),
            Some(value) if value.is_object() => Ok(Some(Config { value, asked: self.asked, defaults: &[] })),
            Some(value) => Err(wrong(name, value, "an object")),
        }
    }

    /// A list of finite numbers.
    pub(super) fn numbers(&self, name: &str) -> Result<Vec<f64>> {
        let value = self.required(name)?;
        let numbers: Option<Vec<f64>> = value
            .as_array()
            .and_then(|list| list.iter().map(|number| number.as_f64().filter(|number| number.is_finite())).collect());
        numbers.ok_or_else(|| wrong(name, value, "a list of finite numbers"))
    }

    /// A list of true and false, also spelled 1 and 0.
    pub(super) fn flags(&self, name: &str) -> Result<Vec<bool>> {
        let value = self.required(name)?;
        let flag = |value: &Value| value.as_bool().or_else(|| value.as_i64().map(|number| number != 0));
        let flags: Option<Vec<bool>> = value.as_array().and_then(|list| list.iter().map(flag).collect());
        flags.ok_or_else(|| wrong(name, value, "a list of 0 and 1"))
    }

    /// A finite number above 0: none where it is null, `default` where it is absent.
    pub(super) fn optional_or(&self, name: &str, default: f64) -> Result<Option<f64>> {
        let absent = self.value.get(name).is_none();
        Ok(self.optional(name)?.or_else(|| absent.then_some(default)))
    }

    /// A finite number above 0, unless absent or null.
    pub(super) fn optional(&self, name: &str) -> Result<Option<f64>> {
        if self.field(name).is_some() { self.positive(name).map(Some) } else { Ok(None) }
    }

    fn required(&self, name: &str) -> Result<&'a Value> {
        self.field(name).ok_or_else(|| Error::Model(Fault::new(format!("config.json: {name}"), "missing")))
    }
}

/// The field's value is not of the expected sort.
pub(super) fn wrong(name: &str, found: &Value, expected: &str) -> Error {
    Error::Model(Fault::new(format!("config.json: {name}"), format!("{} found, {expected} expected", short(found))))
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 60 { text } else { text.chars().take(57).chain("...".chars()).collect() }
}
