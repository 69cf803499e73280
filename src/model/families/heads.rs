//! The sizes of attention, and what is made by them.

use super::config::Config;
use super::rope;
use crate::model::spec::{GroupedAttention, LinearSpec, Projection, Rope};
use crate::{Error, Fault, Result};

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
        rope::read(config, theta, rotated)
    }

    /// The part of each head that rotates, by `partial_rotary_factor`.
    pub(super) fn partial(&self, config: &Config<'_>, default: f64) -> Result<i64> {
        let factor = match rope::parameters(config)? {
            Some((_, p)) if p.field("partial_rotary_factor").is_some() => p.positive("partial_rotary_factor")?,
            _ => config.positive_or("partial_rotary_factor", default)?,
        };
        Ok((self.head_size as f64 * factor) as i64)
    }
}
