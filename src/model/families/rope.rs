//! How a config tells of rotary position embedding.

use serde_json::json;

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
    // Of the length that was trained, what stands outside comes first.
    let original = config.optional_size("original_max_position_embeddings")?;
    Ok(Rope { scaling: scaling(config, field, &parameters, rotated, original)?, ..plain })
}

/// The object that tells of positions, and its name: where both are there, transformers goes by the older one.
pub(super) fn parameters<'a>(config: &Config<'a>) -> Result<Option<(&'static str, Config<'a>)>> {
    let [older, newer] = ["rope_scaling", "rope_parameters"].map(|field| config.object(field).map(|p| (field, p)));
    Ok([older?, newer?].into_iter().find_map(|(field, p)| Some((field, p.filter(|p| !p.is_empty())?))))
}

/// The rotary embeddings of full and of sliding layers: `rope_parameters` by kind (transformers 5), or `rope_theta` and `rope_scaling`,
/// which are of full layers alone; `defaults` are the bases where the config has none.
pub(super) fn by_kind(config: &Config<'_>, defaults: [f64; 2], rotated: i64) -> Result<[Rope; 2]> {
    let kinds = ["full_attention", "sliding_attention"];
    config.passed_over(&["rope_theta"]);
    let by_kind = config.object("rope_parameters")?;
    if let Some(by_kind) = &by_kind {
        by_kind.only("rope_parameters", &kinds)?;
    }
    let of = |kind: &str| by_kind.as_ref().map_or(Ok(None), |by_kind| by_kind.object(kind));
    let full = config.positive_or("rope_theta", defaults[0])?;
    let rope = |place: &str, p: &Config<'_>, theta: f64| -> Result<Rope> {
        let theta = p.positive_or("rope_theta", theta)?;
        let scaling = of_some_layers(config, place, p, rotated)?;
        Ok(Rope { theta, rotated, layout: RopeLayout::Halves, scaling })
    };
    // Field by field, the older one comes before what is of full layers.
    let [own, sliding] = [of(kinds[0])?, of(kinds[1])?];
    let mut said = own.map_or_else(|| json!({"rope_type": "default"}), |own| own.value().clone());
    let place = match config.object("rope_scaling")? {
        Some(older) => {
            let fields =
                older.value().as_object().into_iter().flatten().map(|(name, value)| (name.clone(), value.clone()));
            said.as_object_mut().into_iter().for_each(|said| said.extend(fields.clone()));
            "rope_scaling"
        }
        None => "rope_parameters.full_attention",
    };
    let none = json!({});
    let sliding = sliding.unwrap_or_else(|| config.inside(&none));
    Ok([rope(place, &config.inside(&said), full)?, rope("rope_parameters.sliding_attention", &sliding, defaults[1])?])
}

/// The length that was trained, where positions are stretched by `p`; what stands outside comes first.
pub(super) fn trained_length(config: &Config<'_>, p: &Config<'_>) -> Result<i64> {
    let outer = config.optional_size("original_max_position_embeddings")?;
    let own = p.optional_size("original_max_position_embeddings")?;
    outer.or(own).map_or_else(|| config.size("max_position_embeddings"), Ok)
}

/// How `p`, which the config calls `field`, scales the positions of some of the layers.
pub(super) fn of_some_layers(config: &Config<'_>, field: &str, p: &Config<'_>, rotated: i64) -> Result<RopeScaling> {
    let mut scaling = scaling(config, field, p, rotated, None)?;
    if let RopeScaling::Yarn { truncate, .. } = &mut scaling {
        // The reference looks for it beside what is of these layers, where it cannot be.
        *truncate = true;
    }
    Ok(scaling)
}

/// How `p`, which the config calls `field`, scales; `original` is the length that was trained, where the config says so elsewhere.
fn scaling(
    config: &Config<'_>,
    field: &str,
    p: &Config<'_>,
    rotated: i64,
    original: Option<i64>,
) -> Result<RopeScaling> {
    // Only what reaches beyond a length needs to know the length: transformers has another for every family that does not say.
    let longest = || config.size("max_position_embeddings");
    let own = p.optional_size("original_max_position_embeddings")?;
    let original = || original.or(own).map_or_else(longest, Ok);
    let stretch = |original: i64| -> Result<f64> {
        Ok(if p.field("factor").is_some() { p.positive("factor")? } else { longest()? as f64 / original as f64 })
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
            let factor = stretch(original)?;
            // As in the reference, 0 says nothing.
            let said = |name: &str| Ok(Some(p.number_or(name, 0.0)?).filter(|number| *number > 0.0));
            let inferred = match (said("mscale")?, said("mscale_all_dim")?) {
                (Some(rotation), Some(scores)) => yarn_scale(factor, rotation) / yarn_scale(factor, scores),
                _ => yarn_scale(factor, 1.0),
            };
            RopeScaling::Yarn {
                factor,
                original,
                beta_fast: said("beta_fast")?.unwrap_or(32.0),
                beta_slow: said("beta_slow")?.unwrap_or(1.0),
                attention_factor: p.positive_or("attention_factor", inferred)?,
                truncate: p.flag_or_null("truncate", true)?,
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
            let factor = stretch(original)?;
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
