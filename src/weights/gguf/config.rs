//! `config.json` from GGUF metadata, as transformers' own GGUF loader makes it, with the rope scaling it leaves out.

use std::collections::HashMap;
use std::f64::consts::PI;
use std::fs::File;
use std::path::Path;

use serde_json::{Map, Value as Json, json};
use tch::Kind;

use super::header::{Entry, Value, shortest};
use super::names::{Architecture, Field, Heads, Rotary};
use super::{Conversion, Form, Metadata, Quantisation, Stored, read_blocks};
use crate::weights::storage::{self, Source};
use crate::{Error, Result};

/// The tensor into which llama.cpp's converter bakes Llama 3's rope scaling: one divisor per rotary frequency.
const ROPE_FACTORS: &str = "rope_freqs.weight";
/// LongRoPE's factors, of short documents and of long ones.
const LONG_ROPE: [&str; 2] = ["rope_factors_short.weight", "rope_factors_long.weight"];
/// By what queries grow with their positions.
const TEMPERATURE: &str = "attention.temperature_scale";
/// The tensors that the config is made of.
pub(super) const FACTORS: [&str; 3] = [ROPE_FACTORS, LONG_ROPE[0], LONG_ROPE[1]];

/// What those tensors hold.
pub(super) type Factors = HashMap<String, Vec<f64>>;

/// The head counts, both positive.
pub(super) fn heads(architecture: &Architecture, metadata: &Metadata) -> Result<Heads> {
    let key = format!("{}.attention.head_count", architecture.name);
    let query = positive(metadata, &key)?;
    let key = format!("{key}_kv");
    let heads = match metadata.integer(&key)? {
        None => query,
        Some(heads) if heads > 0 => heads,
        Some(heads) => return Err(Error::Model(metadata.fault(&key, format_args!("must be positive, is {heads}")))),
    };
    Ok(Heads { query, key: heads })
}

/// Reads one of [`FACTORS`].
pub(super) fn read_factors(path: &Path, file: &File, entry: &Entry) -> Result<Vec<f64>> {
    let source = Source { path, file, name: &entry.name, offset: entry.offset };
    let tensor = read_blocks(source, entry.quantisation, Conversion::Same, &entry.shape, Kind::Float)?;
    let numbers = storage::bytes(&tensor).as_chunks().0.iter();
    Ok(numbers.map(|bytes| shortest(f32::from_le_bytes(*bytes))).collect())
}

/// Makes `config.json`.
pub(super) fn make(
    architecture: &Architecture,
    metadata: &Metadata,
    heads: Heads,
    tensors: &[Stored],
    factors: &Factors,
) -> Result<Json> {
    let key = |name: &str| format!("{}.{name}", architecture.name);
    if let Some(experts) = metadata.integer(&key("expert_count"))?
        && experts > 0
        && !architecture.has_experts()
    {
        let fault = metadata.fault(&key("expert_count"), format_args!("{experts} experts are not supported from GGUF"));
        return Err(Error::Model(fault.hint("use the model's safetensors")));
    }
    let mut config = Map::new();
    config.insert("architectures".into(), json!([architecture.class]));
    config.insert("model_type".into(), json!(architecture.model_type));
    for field in architecture.fields.iter().copied().flatten() {
        let (name, value) = field_value(field, architecture, metadata, heads, tensors)?;
        config.insert(name.into(), value);
    }
    // Where a family has its own pattern of blocks that slide, a file may have another.
    if let Some(Value::Bools(slides)) = metadata.values.get(&key("attention.sliding_window_pattern")) {
        let kind = |slides: &bool| if *slides { "sliding_attention" } else { "full_attention" };
        config.insert("layer_types".into(), slides.iter().map(kind).collect());
    }
    if architecture.rotary != Rotary::None {
        let head_size = head_size(architecture, metadata, heads)?;
        let rotated = rotated(architecture, metadata, head_size)?;
        if let Rotary::Share(field) = architecture.rotary {
            config.insert(field.into(), json!(fraction(rotated, head_size)));
        }
        let theta = metadata.number(&key("rope.freq_base"))?.unwrap_or(10_000.0);
        config.insert("rope_theta".into(), json!(theta));
        let scaling = rope_scaling(architecture, metadata, theta, rotated, factors)?;
        config.insert("rope_scaling".into(), scaling);
    }

    let has = |name: &str| tensors.iter().any(|tensor| tensor.stored_name == name);
    config.insert("tie_word_embeddings".into(), json!(!has("output.weight")));
    let embedding = tensors.iter().find(|tensor| tensor.stored_name == "token_embd.weight");
    let Some(&[vocabulary, _]) = embedding.map(|tensor| tensor.shape.as_slice()) else {
        let fault = crate::Fault::at(metadata.path, "there is no tensor token_embd.weight of 2 dimensions");
        return Err(Error::Model(fault));
    };
    config.insert("vocab_size".into(), json!(vocabulary));
    for (from, to) in
        [("bos_token_id", "bos_token_id"), ("eos_token_id", "eos_token_id"), ("padding_token_id", "pad_token_id")]
    {
        if let Some(id) = metadata.integer(&format!("tokenizer.ggml.{from}"))? {
            config.insert(to.into(), json!(id));
        }
    }
    config.insert("torch_dtype".into(), json!(dtype(tensors)));
    Ok(Json::Object(config))
}

/// The dtype most numbers are stored in; quantised weights have none of their own and are computed with in bfloat16.
fn dtype(tensors: &[Stored]) -> &'static str {
    let largest = tensors.iter().max_by_key(|tensor| tensor.shape.iter().product::<i64>());
    let name = largest.map(|tensor| match &tensor.form {
        Form::Plain(dtype) | Form::Scaled(dtype, _) => dtype.name,
        Form::Blocks(Quantisation { name, .. }, _) => name,
        Form::Mxfp4(_) => "MXFP4",
        Form::Bitsandbytes(_, _, parts) => parts.name(),
        Form::Grouped(parts) => parts.name(),
    });
    match name {
        Some("F32") => "float32",
        Some("F16") => "float16",
        _ => "bfloat16",
    }
}

/// Name and value of a field.
fn field_value(
    field: &Field,
    architecture: &Architecture,
    metadata: &Metadata,
    heads: Heads,
    tensors: &[Stored],
) -> Result<(&'static str, Json)> {
    let key = |name: &str| format!("{}.{name}", architecture.name);
    // Counts are integers in the metadata and must be in the config.
    let json_of =
        |key: &str, value: f64| metadata.integer(key).ok().flatten().map_or_else(|| json!(value), |count| json!(count));
    Ok(match *field {
        Field::Required(from, to) => {
            let key = key(from);
            let value = metadata.number(&key)?.ok_or_else(|| metadata.missing(&key))?;
            if value <= 0.0 {
                return Err(Error::Model(metadata.fault(&key, format_args!("must be positive, is {value}"))));
            }
            (to, json_of(&key, value))
        }
        Field::Optional(from, to) => {
            let key = key(from);
            let value = metadata.number(&key)?.filter(|value| *value != 0.0);
            (to, value.map_or(Json::Null, |value| json_of(&key, value)))
        }
        Field::Flag(from, to) => {
            let key = key(from);
            (to, json!(metadata.bool(&key)?.ok_or_else(|| metadata.missing(&key))?))
        }
        Field::Text(to, text) => (to, json!(text)),
        Field::Number(to, number) => (to, json!(number)),
        Field::Fixed(to, answer) => (to, json!(answer)),
        Field::Has(to, end) => (to, json!(tensors.iter().any(|tensor| tensor.name.ends_with(end)))),
        Field::RowsOf(to, end) => {
            let rows = tensors.iter().find(|tensor| tensor.name.ends_with(end)).and_then(|tensor| tensor.shape.first());
            (to, rows.map_or(Json::Null, |rows| json!(rows)))
        }
        Field::KeyHeadsIn(to, end) => {
            let rows = tensors.iter().find(|tensor| tensor.name.ends_with(end)).and_then(|tensor| tensor.shape.first());
            let size = head_size(architecture, metadata, heads)?;
            (to, rows.map_or(Json::Null, |rows| json!(rows / size)))
        }
        Field::HeadSize(to) => (to, json!(head_size(architecture, metadata, heads)?)),
        Field::KeyHeads(to) => (to, json!(heads.key)),
        Field::Scale { field, of_the_width } => {
            let whole = metadata.integer(&key("block_count"))? == Some(of_the_width);
            let size = if whole {
                positive(metadata, &key("embedding_length"))? / heads.query
            } else {
                head_size(architecture, metadata, heads)?
            };
            (field, json!(size))
        }
    })
}

fn positive(metadata: &Metadata, key: &str) -> Result<i64> {
    let value = metadata.integer(key)?.ok_or_else(|| metadata.missing(key))?;
    if value <= 0 {
        return Err(Error::Model(metadata.fault(key, format_args!("must be positive, is {value}"))));
    }
    Ok(value)
}

fn head_size(architecture: &Architecture, metadata: &Metadata, heads: Heads) -> Result<i64> {
    let key = |name: &str| format!("{}.{name}", architecture.name);
    let size = match metadata.integer(&key("attention.key_length"))? {
        Some(size) => size,
        None => positive(metadata, &key("embedding_length"))? / heads.query,
    };
    if let Some(value) = metadata.integer(&key("attention.value_length"))?
        && value != size
    {
        let what = format_args!("is {value}, but a head is {size}: not supported for {}", architecture.name);
        return Err(Error::Model(metadata.fault(&key("attention.value_length"), what)));
    }
    if size <= 0 || size % 2 != 0 {
        let what = format_args!("heads of size {size} cannot be rotated: it must be even and positive");
        return Err(Error::Model(metadata.fault(&key("attention.key_length"), what)));
    }
    Ok(size)
}

/// How many elements of a head rotate.
fn rotated(architecture: &Architecture, metadata: &Metadata, head_size: i64) -> Result<i64> {
    let key = format!("{}.rope.dimension_count", architecture.name);
    let rotated = metadata.integer(&key)?.unwrap_or(head_size);
    let partial = matches!(architecture.rotary, Rotary::Share(_));
    if rotated == head_size || (partial && rotated > 0 && rotated < head_size && rotated % 2 == 0) {
        return Ok(rotated);
    }
    let what = format_args!("is {rotated}, but a head is {head_size}: not supported for {}", architecture.name);
    Err(Error::Model(metadata.fault(&key, what)))
}

/// The share that gives `part` of `whole` when it is multiplied and rounded down.
fn fraction(part: i64, whole: i64) -> f64 {
    let exact = part as f64 / whole as f64;
    if (whole as f64 * exact) as i64 == part { exact } else { exact.next_up() }
}

/// transformers' `rope_scaling`: from the metadata's keys, or from the factors baked into a tensor.
fn rope_scaling(
    architecture: &Architecture,
    metadata: &Metadata,
    theta: f64,
    rotated: i64,
    factors: &Factors,
) -> Result<Json> {
    let key = |name: &str| format!("{}.rope.{name}", architecture.name);
    if let [Some(short), Some(long)] = LONG_ROPE.map(|name| factors.get(name)) {
        let mut scaling = Map::from_iter([
            ("rope_type".to_string(), json!("longrope")),
            ("short_factor".to_string(), json!(short)),
            ("long_factor".to_string(), json!(long)),
        ]);
        let lengths = (
            metadata.number(&format!("{}.context_length", architecture.name))?,
            metadata.number(&key("scaling.original_context_length"))?,
        );
        // What follows from the lengths is left to follow from them, unrounded.
        let inferred = match lengths {
            (Some(whole), Some(original)) if whole > original => (1.0 + (whole / original).ln() / original.ln()).sqrt(),
            _ => 1.0,
        };
        if let Some(factor) = metadata.number(&key("scaling.attn_factor"))?
            && (factor - inferred).abs() > 1e-6
        {
            scaling.insert("attention_factor".into(), json!(factor));
        }
        return Ok(Json::Object(scaling));
    }
    if let Some(factors) = factors.get(ROPE_FACTORS)
        && factors.iter().any(|factor| *factor != 1.0)
    {
        return llama3(theta, rotated, factors).ok_or_else(|| {
            let fault = metadata.fault(ROPE_FACTORS, "these frequency factors are not those of Llama 3's rope scaling");
            Error::Model(fault.hint("use the model's safetensors"))
        });
    }
    // The old spelling of a linear scaling.
    if let Some(factor) = metadata.number(&key("scale_linear"))?
        && factor != 1.0
    {
        return Ok(json!({"rope_type": "linear", "factor": factor}));
    }
    let kind_key = key("scaling.type");
    let kind = metadata.optional_text(&kind_key)?.unwrap_or("none");
    let factor = metadata.number(&key("scaling.factor"))?;
    let needed = || factor.ok_or_else(|| metadata.missing(&key("scaling.factor")));
    match kind {
        "none" => Ok(Json::Null),
        "linear" => Ok(json!({"rope_type": "linear", "factor": needed()?})),
        "yarn" => {
            let factor = needed()?;
            let mut scaling = Map::new();
            scaling.insert("rope_type".into(), json!("yarn"));
            scaling.insert("factor".into(), json!(factor));
            if let Some(length) = metadata.integer(&key("scaling.original_context_length"))? {
                scaling.insert("original_max_position_embeddings".into(), json!(length));
            }
            for (from, to) in [("scaling.yarn_beta_fast", "beta_fast"), ("scaling.yarn_beta_slow", "beta_slow")] {
                if let Some(value) = metadata.number(&key(from))? {
                    scaling.insert(to.into(), json!(value));
                }
            }
            if let Some(attention) = metadata.number(&key("scaling.yarn_attn_factor"))? {
                scaling.insert("attention_factor".into(), json!(attention));
            } else if let Some(attention) = metadata.number(&key("scaling.attn_factor"))? {
                // llama.cpp multiplies the paper's factor by this one; transformers' key replaces it.
                scaling.insert("attention_factor".into(), json!(attention * (0.1 * factor.ln() + 1.0)));
            }
            // llama.cpp divides the scale of 1 by that of this one.
            if let Some(all) = metadata.number(&key("scaling.yarn_log_multiplier"))? {
                scaling.insert("mscale".into(), json!(1.0));
                scaling.insert("mscale_all_dim".into(), json!(all));
            }
            if let Some(growth) = metadata.number(&format!("{}.{TEMPERATURE}", architecture.name))? {
                scaling.insert("llama_4_scaling_beta".into(), json!(growth));
            }
            Ok(Json::Object(scaling))
        }
        other => {
            let fault = metadata.fault(&kind_key, format_args!("{other} is not supported"));
            Err(Error::Model(fault.hint("supported: none, linear, yarn, and Llama 3's in rope_freqs.weight")))
        }
    }
}

/// The `llama3` scaling whose factors these are; `None` when there is none.
///
/// With x = original length / wavelength, the factor is 1 where x > high, `factor` where x < low, and between them
/// 1 / ((1 - s) / factor + s) with s = (x - low) / (high - low) (`generate_extra_tensors` of llama.cpp's converter). So s is
/// a line in x, which two of the factors between determine. The scaling does not change when the original length, low and high
/// are multiplied by one number, so the original length is Llama 3's own 8192.
fn llama3(theta: f64, head_size: i64, factors: &[f64]) -> Option<Json> {
    const ORIGINAL: f64 = 8192.0;
    let valid =
        factors.len() as i64 == head_size / 2 && factors.iter().all(|factor| factor.is_finite() && *factor >= 1.0);
    let factor = factors.iter().copied().fold(1.0, f64::max);
    if !valid || factor == 1.0 {
        return None;
    }
    let x = |i: usize| ORIGINAL / (2.0 * PI * theta.powf(2.0 * i as f64 / head_size as f64));
    let between: Vec<(f64, f64)> = factors
        .iter()
        .enumerate()
        .filter(|(_, f)| **f > 1.0 && **f < factor)
        .map(|(i, f)| (x(i), (1.0 / f - 1.0 / factor) / (1.0 - 1.0 / factor)))
        .collect();
    let fitted = match (between.first(), between.last()) {
        (Some((x0, s0)), Some((x1, s1))) if between.len() > 1 => {
            let slope = (s1 - s0) / (x1 - x0);
            let low = x0 - s0 / slope;
            Some((tidy(low), tidy(low + 1.0 / slope)))
        }
        _ => None,
    };
    let agrees = |(low, high): (f64, f64)| {
        low < high
            && factors.iter().enumerate().all(|(i, stored)| {
                let s = (x(i) - low) / (high - low);
                let expected = if s > 1.0 {
                    1.0
                } else if s < 0.0 {
                    factor
                } else {
                    1.0 / ((1.0 - s) / factor + s)
                };
                (expected - stored).abs() <= 1e-4 * stored
            })
    };
    let (low, high) = [Some((1.0, 4.0)), fitted].into_iter().flatten().find(|bounds| agrees(*bounds))?;
    Some(json!({
        "rope_type": "llama3",
        "factor": tidy(factor),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": ORIGINAL as i64,
    }))
}

/// Undoes the rounding of a number that was short before it went through f32.
fn tidy(number: f64) -> f64 {
    let short = (number * 1000.0).round() / 1000.0;
    if (short - number).abs() < 1e-4 * number.abs() { short } else { number }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// llama.cpp's `generate_extra_tensors`, in f64 and then stored as f32.
    fn baked(theta: f64, head_size: i64, factor: f64, low: f64, high: f64, original: f64) -> Vec<f64> {
        let one = |i: i64| {
            let wavelength = 2.0 * PI * theta.powf(2.0 * i as f64 / head_size as f64);
            if wavelength < original / high {
                1.0
            } else if wavelength > original / low {
                factor
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        };
        (0..head_size / 2).map(|i| f64::from(one(i) as f32)).collect()
    }

    #[test]
    fn llama3_scaling_is_recovered_from_its_factors() {
        for (factor, head_size) in [(8.0, 128), (32.0, 64)] {
            let scaling = llama3(500_000.0, head_size, &baked(500_000.0, head_size, factor, 1.0, 4.0, 8192.0)).unwrap();
            assert_eq!(scaling["factor"], factor);
            assert_eq!((&scaling["low_freq_factor"], &scaling["high_freq_factor"]), (&json!(1.0), &json!(4.0)));
            assert_eq!(scaling["original_max_position_embeddings"], 8192);
        }
        // Another original length: the same scaling, written with 8192 and with low and high in proportion.
        let scaling = llama3(500_000.0, 128, &baked(500_000.0, 128, 16.0, 1.0, 4.0, 4096.0)).unwrap();
        assert_eq!((&scaling["low_freq_factor"], &scaling["high_freq_factor"]), (&json!(2.0), &json!(8.0)));
        let mut other = baked(500_000.0, 128, 8.0, 1.0, 4.0, 8192.0);
        other[40] *= 1.1;
        assert_eq!(llama3(500_000.0, 128, &other), None);
    }
}
