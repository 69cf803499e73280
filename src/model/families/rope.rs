//! How a config tells of rotary position embedding.

use super::config::{Config, wrong};
use crate::model::spec::{Rope, RopeScaling};
use crate::ops::RopeLayout;
use crate::{Error, Fault, Result};

/// `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before), as `standardize_rope_params` reads them.
pub(super) fn read(config: &Config<'_>, default_theta: f64, rotated: i64) -> Result<Rope> {
    let (field, parameters) = match config.object("rope_parameters")? {
        Some(parameters) => ("rope_parameters", Some(parameters)),
        None => ("rope_scaling", config.object("rope_scaling")?),
    };
    // Where both are there, transformers reads the first.
    let _ = config.field("rope_scaling");
    let theta = match &parameters {
        Some(p) if p.field("rope_theta").is_some() => p.positive("rope_theta")?,
        _ => config.positive_or("rope_theta", default_theta)?,
    };
    let plain = Rope { theta, rotated, layout: RopeLayout::Halves, scaling: RopeScaling::None };
    let Some(parameters) = parameters else { return Ok(plain) };
    let scaling = scaling(config, field, &parameters, rotated)?;
    Ok(Rope { scaling, ..plain })
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
