//! What a config says of each layer: what its attention sees, where its experts come from, how it rotates.

use serde_json::Value;

use crate::model::families::config::{Config, wrong};
use crate::model::families::rope;
use crate::model::spec::{Rope, RopeScaling};
use crate::ops::RopeLayout;
use crate::{Error, Fault, Result};

/// What attention sees besides the latest tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Sliding,
    Sparse,
    Heavy,
}

impl Kind {
    /// `layer_types`, or else `compress_ratios`, which may go on for layers that predict further tokens; or else what transformers takes.
    pub(super) fn of_layers(config: &Config<'_>, count: i64) -> Result<Vec<Self>> {
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
pub(super) fn by_table(config: &Config<'_>, count: i64) -> Result<Vec<bool>> {
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
pub(super) struct Ropes {
    pub(super) main: Rope,
    pub(super) compress: Rope,
}

/// `rope_parameters` with `main` and `compress` (transformers 5), or `rope_theta`, `compress_rope_theta` and `rope_scaling`, which is of
/// the second alone; where both are there, `rope_scaling` comes first, as it does everywhere.
pub(super) fn ropes(config: &Config<'_>, rotated: i64) -> Result<Ropes> {
    let plain = |theta| Rope { theta, rotated, layout: RopeLayout::Pairs, scaling: RopeScaling::None };
    let main = plain(config.positive_or("rope_theta", 10_000.0)?);
    let compress = plain(config.positive_or("compress_rope_theta", 160_000.0)?);
    let Some((field, p)) = rope::parameters(config)? else { return Ok(Ropes { main, compress }) };
    let parts = ["main", "compress"].map(|part| p.object(part));
    if let [Ok(None), Ok(None)] = parts {
        let mut stretch = stretched(config, field, &p, rotated)?;
        if let RopeScaling::Yarn { attention_factor, .. } = &mut stretch {
            // Not the one that is inferred from the factor.
            *attention_factor = p.positive_or("attention_factor", 1.0)?;
        }
        return Ok(Ropes { main, compress: Rope { scaling: stretch, ..compress } });
    }
    let own = |part: &str, found: Result<Option<Config<'_>>>| -> Result<Rope> {
        let place = format!("{field}.{part}");
        let fault = |place: &str, what: String| Error::Model(Fault::new(format!("config.json: {place}"), what));
        let p = found?.ok_or_else(|| fault(&place, "missing; there is the other one of main and compress".into()))?;
        let head = config.size_or("head_dim", 512)?;
        let own = p.optional("partial_rotary_factor")?.map_or(rotated, |factor| (head as f64 * factor) as i64);
        if own != rotated {
            let what = format!("{own} elements rotate, {rotated} by the other fields");
            return Err(fault(&format!("{place}.partial_rotary_factor"), what));
        }
        Ok(Rope { scaling: stretched(config, &place, &p, rotated)?, ..plain(p.positive_or("rope_theta", main.theta)?) })
    };
    let [of_main, of_compress] = parts;
    Ok(Ropes { main: own("main", of_main)?, compress: own("compress", of_compress)? })
}

/// How `parameters`, which the config calls `field`, scale: not at all or by YaRN.
fn stretched(config: &Config<'_>, field: &str, p: &Config<'_>, rotated: i64) -> Result<RopeScaling> {
    match rope::of_some_layers(config, field, p, rotated)? {
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
