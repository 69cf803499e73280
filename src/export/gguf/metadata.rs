//! What a file says of its model: general keys, and the architecture's settings, made of the model's spec, in which every default is
//! filled in.

use std::f64::consts::PI;

use serde_json::Value as Json;

use super::FileType;
use crate::export::licence::Licence;
use crate::model::ModelSpec;
use crate::model::spec::{
    Attention, ExpertGateUp, Experts, FeedForward, GateUp, GroupedAttention, LayerSpec, Mask, Position, Residual, Rope,
    RopeScaling, Routing,
};
use crate::recipe::BaseSource;
use crate::weights::Checkpoint;
use crate::weights::gguf::{Architecture, Field, Pairs, Rotary, Written};
use crate::{Error, Fault, Result};

/// ggml's number for the layout of its blocks.
const QUANTIZATION_VERSION: u32 = 2;

/// Keys of every file: what it is, what it is called, what it was made of. `kind` is `model` or `adapter`; without a `name` it is called
/// as its base.
pub(super) fn general(
    architecture: &Architecture,
    kind: &str,
    name: Option<&str>,
    checkpoint: &Checkpoint,
    size_label: String,
) -> Pairs {
    let mut pairs = Pairs::new();
    let mut text = |key: &str, value: String| pairs.push((format!("general.{key}"), Written::Text(value)));
    text("architecture", architecture.name.into());
    text("type", kind.into());
    let base = base_name(checkpoint).unwrap_or_else(|| architecture.name.into());
    text("name", name.map_or_else(|| base.clone(), ToString::to_string));
    text("size_label", size_label);
    let Licence { id, name, link, .. } = Licence::of(checkpoint);
    for (key, said) in [("license", id), ("license.name", name), ("license.link", link)] {
        if let Some(said) = said {
            text(key, said);
        }
    }
    text("base_model.0.name", base);
    if let BaseSource::Hub { id, .. } = &checkpoint.source {
        if let Some((owner, _)) = id.split_once('/') {
            text("base_model.0.organization", owner.into());
        }
        text("base_model.0.repo_url", format!("https://huggingface.co/{id}"));
    }
    pairs.push(("general.base_model.count".into(), Written::U32(1)));
    pairs
}

/// What a base is called: the last part of where it is.
pub(super) fn base_name(checkpoint: &Checkpoint) -> Option<String> {
    match &checkpoint.source {
        BaseSource::Hub { id, .. } => id.rsplit('/').next().map(ToString::to_string),
        BaseSource::Folder(path) => path.file_name().map(|name| name.to_string_lossy().into_owned()),
        BaseSource::Gguf(path) => path.file_stem().map(|name| name.to_string_lossy().into_owned()),
    }
}

/// A name by which llama.cpp reads the tokenizer as it is: it passes over spaces behind added tokens where a model's name says that it is a
/// Phi 3, and nowhere else (and refuses a model called so that lacks Phi 3's tokens).
pub(super) fn named_for_llama_cpp(name: &str, passes_over_spaces: bool) -> String {
    let said = |name: &str| ["phi-3", "phi3"].iter().find_map(|part| name.to_ascii_lowercase().find(part));
    let mut name = name.to_string();
    if passes_over_spaces && said(&name).is_none() {
        name.push_str(" (Phi-3)");
    }
    while let Some(at) = said(&name).filter(|_| !passes_over_spaces) {
        // `phi 3` is neither of them.
        name.replace_range(at + 3..=at + 3, if name.as_bytes()[at + 3] == b'-' { " " } else { " 3" });
    }
    name
}

/// The keys that say how numbers are stored.
pub(super) fn stored(file_type: FileType) -> Pairs {
    vec![
        ("general.file_type".into(), Written::U32(file_type.number())),
        ("general.quantization_version".into(), Written::U32(QUANTIZATION_VERSION)),
    ]
}

/// How large the model is, as its name would say it: `8x7B`, `135M`. Source: `size_label` of llama.cpp's gguf package.
pub(super) fn size_label(tensors: &[(String, Vec<i64>)]) -> String {
    let (mut all, mut experts, mut expert_tensors) = (0u64, 0u64, 0u64);
    for (name, shape) in tensors {
        let numbers = shape.iter().product::<i64>() as u64;
        match shape[..] {
            [count, ..] if name.contains("_exps.") => {
                all += numbers / count as u64;
                experts += count as u64;
                expert_tensors += 1;
            }
            _ => all += numbers,
        }
    }
    match experts.checked_div(expert_tensors) {
        Some(count) => format!("{count}x{}", rounded(all)),
        None => rounded(all),
    }
}

/// At least two digits.
fn rounded(count: u64) -> String {
    let (scale, letter) = match count {
        1_000_000_000_001.. => (1e-12, "T"),
        1_000_000_001.. => (1e-9, "B"),
        1_000_001.. => (1e-6, "M"),
        _ => (1e-3, "K"),
    };
    let scaled = count as f64 * scale;
    let digits = format!("{scaled:.0}").trim_start_matches('0').len();
    format!("{scaled:.*}{letter}", 2usize.saturating_sub(digits))
}

/// Tensors that hold settings, by GGUF name.
pub(super) type Derived = Vec<(&'static str, Vec<f32>)>;

/// The architecture's settings, and the tensors that hold some of them. `config` is the text model's own.
pub(super) fn settings(spec: &ModelSpec, architecture: &Architecture, config: &Json) -> Result<(Pairs, Derived)> {
    let attention = attention(spec)?;
    let mut settings = Settings { architecture: architecture.name, pairs: Pairs::new() };
    settings.count("block_count", spec.layers.len() as i64);
    settings.count("context_length", spec.max_position_embeddings);
    settings.count("embedding_length", spec.hidden_size);
    settings.count("vocab_size", spec.vocab_size);
    let experts = spec.layers.iter().find_map(|layer| experts(&layer.feed_forward));
    let width = config["intermediate_size"].as_i64().filter(|_| experts.is_some());
    if let Some(width) = width.or_else(|| spec.layers.first().and_then(|layer| width_of(&layer.feed_forward))) {
        settings.count("feed_forward_length", width);
    }
    settings.count("attention.head_count", attention.heads);
    settings.count("attention.head_count_kv", attention.kv_heads);
    settings.count("attention.key_length", attention.head_size);
    settings.count("attention.value_length", attention.head_size);
    if let Some(experts) = experts {
        settings.count("expert_feed_forward_length", expert_width(experts));
        if let Some(width) = experts.shared.as_ref().and_then(|shared| width_of(&shared.feed_forward)) {
            settings.count("expert_shared_feed_forward_length", width);
        }
    }
    for field in architecture.fields.iter().copied().flatten() {
        let (Field::Required(key, to) | Field::Optional(key, to) | Field::Flag(key, to)) = field else { continue };
        if settings.has(key) {
            continue;
        }
        match (said(spec, attention, experts, config, (key, to)), field) {
            (Some(value), _) => settings.set(key, value),
            (None, Field::Optional(..)) => {}
            // Without a window, a block that may have one has none.
            (None, _) if *key == "attention.sliding_window" => {}
            (None, _) => {
                let what = format!("llama.cpp's {} needs {key}, but this model has none", architecture.name);
                return Err(Error::Model(Fault::new(format!("config.json: {to}"), what)));
            }
        }
    }
    sliding(spec, &mut settings);
    let derived = match rope_of(spec) {
        Some((rope, rest)) if architecture.rotary != Rotary::None => rotary(attention, rope, rest, &mut settings),
        _ => Vec::new(),
    };
    for (key, value) in architecture.constant {
        if !settings.has(key) {
            settings.set(key, Written::Text(value.to_string()));
        }
    }
    Ok((settings.pairs, derived))
}

/// Keys after the architecture's name.
struct Settings {
    architecture: &'static str,
    pairs: Pairs,
}

impl Settings {
    fn has(&self, key: &str) -> bool {
        self.pairs.iter().any(|(known, _)| known.strip_prefix(self.architecture).is_some_and(|rest| rest[1..] == *key))
    }

    fn set(&mut self, key: &str, value: Written) {
        self.pairs.push((format!("{}.{key}", self.architecture), value));
    }

    fn count(&mut self, key: &str, value: i64) {
        self.set(key, Written::U32(u32::try_from(value).unwrap_or(u32::MAX)));
    }

    fn number(&mut self, key: &str, value: f64) {
        self.set(key, Written::F32(value as f32));
    }
}

/// The first block's attention: what is not alike in all blocks is seen when the settings are read again.
pub(super) fn attention(spec: &ModelSpec) -> Result<&GroupedAttention> {
    let grouped = spec.layers.iter().find_map(|layer| match &layer.attention {
        Attention::Grouped(attention) => Some(attention),
        _ => None,
    });
    grouped.ok_or_else(|| Error::Model(Fault::new("config.json", "no block has heads, which GGUF counts")))
}

/// Experts of a block; 0 for none.
pub(super) fn experts_of(spec: &ModelSpec) -> i64 {
    spec.layers.iter().find_map(|layer| experts(&layer.feed_forward)).map_or(0, |experts| experts.router.linear.output)
}

fn experts(feed_forward: &FeedForward) -> Option<&Experts> {
    match feed_forward {
        FeedForward::Experts(experts) => Some(experts),
        FeedForward::Plain { .. } | FeedForward::Gated { .. } | FeedForward::Sum(_) => None,
    }
}

fn expert_width(experts: &Experts) -> i64 {
    match &experts.projection {
        ExpertGateUp::Separate { gate, .. } => gate.output,
        ExpertGateUp::Fused { linear, .. } => linear.output / 2,
    }
}

fn width_of(feed_forward: &FeedForward) -> Option<i64> {
    match feed_forward {
        FeedForward::Plain { up, .. } => Some(up.output),
        FeedForward::Gated { projection: GateUp::Separate { gate, .. }, .. } => Some(gate.output),
        FeedForward::Gated { projection: GateUp::Fused(linear), .. } => Some(linear.output / 2),
        FeedForward::Experts(experts) => Some(expert_width(experts)),
        FeedForward::Sum(_) => None,
    }
}

/// The value of a setting, given by its key and the config's name of it.
fn said(
    spec: &ModelSpec,
    attention: &GroupedAttention,
    experts: Option<&Experts>,
    config: &Json,
    (key, to): (&str, &str),
) -> Option<Written> {
    let number = |value: f64| Some(Written::F32(value as f32));
    let count = |value: i64| u32::try_from(value).ok().map(Written::U32);
    let first = spec.layers.first();
    match key {
        "attention.layer_norm_epsilon" | "attention.layer_norm_rms_epsilon" => number(spec.final_norm.eps),
        "attention.sliding_window" => {
            let windows = spec.layers.iter().filter_map(window);
            windows.max().and_then(count)
        }
        "attention.scale" => number(attention.scale),
        "attn_logit_softcapping" => attention.soft_cap.and_then(number),
        "final_logit_softcapping" => spec.head.map.soft_cap.and_then(number),
        "embedding_scale" => number(spec.embedding.scale),
        "residual_scale" => first.and_then(|layer| match &layer.residual {
            Residual::Sequential { multiplier, .. } => number(*multiplier),
            _ => None,
        }),
        // What logits are divided by, or multiplied by.
        "logit_scale" if to == "logits_scaling" => number(1.0 / spec.head.map.scale),
        "logit_scale" => number(spec.head.map.scale),
        "expert_count" => experts.and_then(|experts| count(experts.router.linear.output)),
        "expert_used_count" => experts.and_then(|experts| match &experts.router.routing {
            Routing::Largest { chosen, .. } | Routing::OfToken { chosen, .. } => count(*chosen),
            Routing::SparseMixer { .. } => count(2),
        }),
        "rope.scaling.original_context_length" => {
            let original = rope_of(spec).and_then(|(rope, _)| match rope.scaling {
                RopeScaling::LongRope { original, .. } => Some(original),
                _ => None,
            });
            let length = original.or(config[to].as_i64()).unwrap_or(spec.max_position_embeddings);
            count(length)
        }
        "use_parallel_residual" => {
            first.map(|layer| Written::Bool(matches!(layer.residual, Residual::Parallel { .. })))
        }
        _ => None,
    }
}

/// What a block that slides has in sight.
pub(super) fn window(layer: &LayerSpec) -> Option<i64> {
    match layer.mask {
        Mask::Sliding { window } => Some(window),
        Mask::Full | Mask::Chunked { .. } => None,
    }
}

/// Which blocks slide, where some do and the others do not.
fn sliding(spec: &ModelSpec, settings: &mut Settings) {
    let slides: Vec<bool> = spec.layers.iter().map(|layer| window(layer).is_some()).collect();
    if settings.has("attention.sliding_window") && slides.contains(&true) && slides.contains(&false) {
        settings.set("attention.sliding_window_pattern", Written::Bools(slides));
    }
}

/// The rotary embedding of blocks that see everything, else of the first that has one; and that of blocks that slide, where it differs.
fn rope_of(spec: &ModelSpec) -> Option<(&Rope, Option<&Rope>)> {
    let ropes = |slides: bool| {
        spec.layers.iter().filter(move |layer| window(layer).is_some() == slides).find_map(|layer| {
            match &layer.position {
                Position::Rope(rope) => Some(rope),
                Position::Alibi { .. } | Position::None => None,
            }
        })
    };
    match (ropes(false), ropes(true)) {
        (Some(all), sliding) => Some((all, sliding.filter(|sliding| *sliding != all))),
        (None, sliding) => Some((sliding?, None)),
    }
}

/// How positions turn.
fn rotary(attention: &GroupedAttention, rope: &Rope, sliding: Option<&Rope>, settings: &mut Settings) -> Derived {
    settings.count("rope.dimension_count", rope.rotated);
    settings.number("rope.freq_base", rope.theta);
    if let Some(sliding) = sliding.filter(|sliding| sliding.theta != rope.theta) {
        settings.number("rope.freq_base_swa", sliding.theta);
    }
    if let Some(temperature) = &attention.temperature {
        settings.number("attention.temperature_scale", temperature.growth);
    }
    let mut scaling = |kind: &str, factor: f64| {
        settings.set("rope.scaling.type", Written::Text(kind.into()));
        settings.number("rope.scaling.factor", factor);
    };
    match &rope.scaling {
        // What GGUF has no name for is seen when the settings are read again.
        RopeScaling::None | RopeScaling::Dynamic { .. } | RopeScaling::Proportional { .. } => Vec::new(),
        RopeScaling::Linear { factor } => {
            scaling("linear", *factor);
            Vec::new()
        }
        RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor, .. } => {
            scaling("yarn", *factor);
            settings.count("rope.scaling.original_context_length", *original);
            settings.number("rope.scaling.yarn_beta_fast", *beta_fast);
            settings.number("rope.scaling.yarn_beta_slow", *beta_slow);
            let growth = 0.1 * factor.ln();
            if (attention_factor - growth - 1.0).abs() > 1e-9 {
                if attention.temperature.is_some() {
                    // (1 + g) / (1 + m g)
                    let all = ((growth + 1.0) / attention_factor - 1.0) / growth;
                    settings.number("rope.scaling.yarn_log_multiplier", (all * 1e6).round() / 1e6);
                } else {
                    settings.number("rope.scaling.yarn_attn_factor", *attention_factor);
                }
            }
            Vec::new()
        }
        RopeScaling::LongRope { short, long, attention_factors, original } => {
            if !settings.has("rope.scaling.original_context_length") {
                settings.count("rope.scaling.original_context_length", *original);
            }
            settings.number("rope.scaling.attn_factor", attention_factors[1]);
            let numbers = |factors: &[f64]| factors.iter().map(|factor| *factor as f32).collect();
            vec![("rope_factors_long.weight", numbers(long)), ("rope_factors_short.weight", numbers(short))]
        }
        RopeScaling::Llama3 { factor, original, low_freq_factor, high_freq_factor } => {
            let divisor = |i: i64| {
                let wavelength = 2.0 * PI * rope.theta.powf(2.0 * i as f64 / rope.rotated as f64);
                let share = *original as f64 / wavelength;
                let ramp = (share - low_freq_factor) / (high_freq_factor - low_freq_factor);
                if share > *high_freq_factor {
                    1.0
                } else if share < *low_freq_factor {
                    *factor
                } else {
                    1.0 / ((1.0 - ramp) / factor + ramp)
                }
            };
            vec![("rope_freqs.weight", (0..rope.rotated / 2).map(|i| divisor(i) as f32).collect())]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_phi_3_where_llama_cpp_must_read_it_and_nowhere_else() {
        for (name, passed_over, kept) in [
            ("run", true, "run (Phi-3)"),
            ("Phi-3-mini", true, "Phi-3-mini"),
            ("my-phi3.5", true, "my-phi3.5"),
            ("run", false, "run"),
            ("Phi-3 beside phi3", false, "Phi 3 beside phi 3"),
            ("phi-4-mini", false, "phi-4-mini"),
        ] {
            assert_eq!(named_for_llama_cpp(name, passed_over), kept);
        }
    }

    #[test]
    fn sizes_are_rounded_as_llama_cpp_rounds_them() {
        let label = |count: u64| rounded(count);
        assert_eq!(label(134_515_008), "135M");
        assert_eq!(label(8_030_261_248), "8.0B");
        assert_eq!(label(19_700), "20K");
        assert_eq!(label(1_235_814_400), "1.2B");
        let experts = [("blk.0.ffn_up_exps.weight".to_string(), vec![8, 1000, 1000]), ("a".to_string(), vec![500_000])];
        assert_eq!(size_label(&experts), "8x1.5M");
    }
}
