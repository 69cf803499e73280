//! How a config tells of rotary position embedding.

use super::config::{Config, wrong};
use crate::model::spec::{Rope, RopeScaling};
use crate::ops::RopeLayout;
use crate::{Error, Fault, Result};

/// `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before), as `standardize_rope_params` reads them.
pub(super) fn read(config: &Config<'_>, default_theta: f64, rotated: i64) -> Result<Rope> {
    let parameters = parameters(config)?;
    // What stands inside comes before what stands outside.
    config.passed_over(&["rope_theta"]);
    let theta = match &parameters {
        Some((_, p)) if p.field("rope_theta").is_some() => p.positive("rope_theta")?,
        _ => config.positive_or("rope_theta", default_theta)?,
    };
    let plain = Rope { theta, rotated, layout: RopeLayout::Halves, scaling: RopeScaling::None };
    let Some((field, parameters)) = parameters else { return Ok(plain) };
    let scaling = scaling(config, field, &parameters, rotated)?;
    Ok(Rope { scaling, ..plain })
}

/// The object that tells of positions, and its name: where both are there, transformers goes by the older one.
pub(super) fn parameters<'a>(config: &Config<'a>) -> Result<Option<(&'static str, Config<'a>)>> {
    for field in ["rope_scaling", "rope_parameters"] {
        if let Some(found) = config.object(field)?.filter(|found| !found.is_empty()) {
            return Ok(Some((field, found)));
        }
    }
    Ok(None)
}

/// The rotary embeddings of full and of sliding layers: `rope_parameters` by kind (transformers 5), or `rope_theta` and `rope_scaling`,
/// which are of full layers alone; `defaults` are the bases where the config has none.
pub(super) fn by_kind(config: &Config<'_>, defaults: [f64; 2], rotated: i64) -> Result<[Rope; 2]> {
    let plain = |theta| Rope { theta, rotated, layout: RopeLayout::Halves, scaling: RopeScaling::None };
    let kinds = ["full_attention", "sliding_attention"];
    config.passed_over(&["rope_theta"]);
    let by_kind = config.object("rope_parameters")?;
    let Some(by_kind) = by_kind.filter(|p| kinds.into_iter().any(|kind| p.field(kind).is_some())) else {
        return Ok([read(config, defaults[0], rotated)?, plain(defaults[1])]);
    };
    let full = config.positive_or("rope_theta", defaults[0])?;
    let of = |kind: &str, theta: f64| -> Result<Rope> {
        let Some(p) = by_kind.object(kind)? else { return Ok(plain(theta)) };
        let theta = p.positive_or("rope_theta", theta)?;
        Ok(Rope { scaling: scaling(config, &format!("rope_parameters.{kind}"), &p, rotated)?, ..plain(theta) })
    };
    let [mut full, sliding] = [of(kinds[0], full)?, of(kinds[1], defaults[1])?];
    // Beside it, the older one is of full layers.
    if let Some(older) = config.object("rope_scaling")?.filter(|older| !older.is_empty()) {
        full.scaling = scaling(config, "rope_scaling", &older, rotated)?;
    }
    Ok([full, sliding])
}

/// How `parameters`, which the config calls `field`, scale.
pub(super) fn scaling(config: &Config<'_>, field: &str, p: &Config<'_>, rotated: i64) -> Result<RopeScaling> {
    // Only what reaches beyond a length needs to know the length.
    let longest = || config.size_or("max_position_embeddings", 2048);
    let original = || -> Result<i64> {
        if config.field("original_max_position_embeddings").is_some() {
            return config.size("original_max_position_embeddings");
        }
        p.size_or("original_max_position_embeddings", longest()?)
    };
    let (kind_field, kind) = match p.field("rope_type") {
        Some(kind) => ("rope_type", Some(kind)),
        None => ("type", p.field("type")),
    };
    let scaling = match kind.map(|kind| (kind, kind.as_str())) {
        None | Some((_, Some("default" | "mrope"))) => RopeScaling::None,
        Some((_, Some("linear"))) => RopeScaling::Linear { factor: p.positive("factor")? },
        Some((_, Some("dynamic"))) => RopeScaling::Dynamic { factor: p.positive("factor")?, original: longest()? },
        Some((_, Some("llama3"))) => RopeScaling::Llama3 {
            factor: p.positive("factor")?,
            original: original()?,
            low_freq_factor: p.positive("low_freq_factor")?,
            high_freq_factor: p.positive("high_freq_factor")?,
        },
        Some((_, Some("yarn"))) => {
            let original = original()?;
            let factor = p.positive_or("factor", longest()? as f64 / original as f64)?;
            let inferred = match (p.field("mscale"), p.field("mscale_all_dim")) {
                (Some(_), Some(_)) => {
                    yarn_scale(factor, p.positive("mscale")?) / yarn_scale(factor, p.positive("mscale_all_dim")?)
                }
                _ => yarn_scale(factor, 1.0),
            };
            RopeScaling::Yarn {
                factor,
                original,
                beta_fast: p.positive_or("beta_fast", 32.0)?,
                beta_slow: p.positive_or("beta_slow", 1.0)?,
                attention_factor: p.positive_or("attention_factor", inferred)?,
                truncate: p.flag_or("truncate", true)?,
            }
        }
        Some((_, Some("longrope" | "su"))) => {
            let original = original()?;
            let factors = |name: &str| -> Result<Vec<f64>> {
                let list = p.numbers(name)?;
                if list.len() as i64 != rotated / 2 {
                    let what = format!("{} factors for {rotated} rotating elements; half as many expected", list.len());
                    return Err(Error::Model(Fault::new(format!("config.json: {field}.{name}"), what)));
                }
                Ok(list)
            };
            let factor = p.positive_or("factor", longest()? as f64 / original as f64)?;
            let inferred = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original as f64).ln()).sqrt() };
            RopeScaling::LongRope {
                short: factors("short_factor")?,
                long: factors("long_factor")?,
                original,
                attention_factors: [p.positive_or("attention_factor", inferred)?; 2],
            }
        }
        Some((value, _)) => {
            let field = format!("{field}.{kind_field}");
            return Err(wrong(&field, value, "one of default, linear, dynamic, yarn, llama3, longrope"));
        }
    };
    Ok(scaling)
}

/// YaRN's factor for a stretch of `factor`.
pub(super) fn yarn_scale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}
