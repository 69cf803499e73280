//! The parts of a block that nearly every family spells the same way in `config.json` and in its tensor names.

use super::config::{Config, wrong};
use crate::Result;
use crate::model::spec::{Around, FeedForward, GateUp, LinearSpec, NormKind, NormSpec, Residual};
use crate::ops::Activation;

/// A norm with one weight (D).
pub(super) fn norm(name: String, width: i64, eps: f64, kind: NormKind) -> NormSpec {
    NormSpec { weights: vec![format!("{name}.weight")], shape: vec![width], bias: None, eps, kind }
}

/// A LayerNorm with weight and bias.
pub(super) fn layer_norm(name: String, width: i64, eps: f64) -> NormSpec {
    NormSpec { bias: Some(format!("{name}.bias")), ..norm(name, width, eps, NormKind::Layer) }
}

/// Both halves after a norm.
pub(super) fn pre_norm(attention: NormSpec, feed_forward: NormSpec) -> Residual {
    let before = |norm| Around { before: Some(norm), after: None };
    Residual::Sequential { attention: before(attention), feed_forward: before(feed_forward), multiplier: 1.0 }
}

/// A gated feed-forward of `gate_proj`, `up_proj` and `down_proj` below `at`.
pub(super) fn gated(at: &str, activation: Activation, hidden: i64, width: i64, bias: bool) -> FeedForward {
    let linear = |part: &str, input, output| LinearSpec { name: format!("{at}.{part}"), input, output, bias };
    FeedForward::Gated {
        activation,
        projection: GateUp::Separate { gate: linear("gate_proj", hidden, width), up: linear("up_proj", hidden, width) },
        down: linear("down_proj", width, hidden),
    }
}

/// The activation named by `field`.
pub(super) fn activation(config: &Config<'_>, field: &str, default: Activation) -> Result<Activation> {
    let Some(value) = config.field(field) else { return Ok(default) };
    match value.as_str() {
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu" | "gelu_python") => Ok(Activation::Gelu),
        Some("gelu_new" | "gelu_fast" | "gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
        _ => Err(wrong(field, value, "one of silu, gelu, gelu_new, gelu_fast, gelu_pytorch_tanh")),
    }
}
