//! How many layers a config tells of, and which of them slide.

use super::config::{Config, wrong};
use crate::{Error, Fault, Result};

/// More layers than any model has.
const MOST_LAYERS: i64 = 10_000;

/// `num_hidden_layers`, or the field a family calls it.
pub(super) fn count(config: &Config<'_>, field: &str) -> Result<i64> {
    credible(config.size(field)?, field)
}

/// A number of layers that `field` may well mean.
pub(super) fn credible(count: i64, field: &str) -> Result<i64> {
    if count > MOST_LAYERS {
        let what = format!("{count} layers; no model has more than {MOST_LAYERS}");
        return Err(Error::Model(Fault::new(format!("config.json: {field}"), what)));
    }
    Ok(count)
}

/// Which layers look at a window only, from `layer_types`; `derived` where the config has none.
pub(super) fn layer_types(config: &Config<'_>, layers: i64, derived: impl Fn(i64) -> bool) -> Result<Vec<bool>> {
    let Some(value) = config.field("layer_types") else { return Ok((0..layers).map(derived).collect()) };
    let expected = "a list with sliding_attention or full_attention for each layer";
    let types = value.as_array().filter(|types| types.len() as i64 == layers);
    let types = types.ok_or_else(|| wrong("layer_types", value, expected))?;
    types
        .iter()
        .map(|kind| match kind.as_str() {
            Some("sliding_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            _ => Err(wrong("layer_types", kind, expected)),
        })
        .collect()
}
