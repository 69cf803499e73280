//! What a feed-forward does between its products, by `gated.cu`; shapes are those of `ops::gated`.

use tch::Tensor;

use super::launch::{Argument, blocks_of, launch};
use super::length;

/// An activation as `gated.cu` numbers them.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Curve {
    Silu,
    Gelu,
    GeluTanh,
    Sigmoid,
    /// Limit, slope and offset.
    Clamped(f32, f32, f32),
}

impl Curve {
    /// Its number and what the clamped one has besides.
    fn argument(self) -> Argument<'static> {
        let (number, rest) = match self {
            Self::Silu => (0, [0.0; 3]),
            Self::Gelu => (1, [0.0; 3]),
            Self::GeluTanh => (2, [0.0; 3]),
            Self::Sigmoid => (3, [0.0; 3]),
            Self::Clamped(limit, slope, offset) => (4, [limit, slope, offset]),
        };
        Argument::Words(std::iter::once(number).chain(rest.map(f32::to_bits)).collect())
    }
}

/// `act(gate) * up` (T, F), or `act(gate)` without `up`.
pub(crate) fn gated(curve: Curve, gate: &Tensor, up: Option<&Tensor>) -> Tensor {
    assert!(up.is_none_or(|up| up.size() == gate.size()), "as much up as gate");
    let (y, n) = (gate.empty_like(), gate.numel() as i64);
    let arguments = [curve.argument(), gate.into(), up.into(), (&y).into(), Argument::Long(n)];
    // SAFETY: what `gated` takes; sizes as just asserted.
    unsafe { launch(gate.device(), "gated", gate.kind(), blocks(gate), &arguments) };
    y
}

/// The gradients of gate and up from that of [`gated`], and its value again; in place of gate, up and the gradient if they are no longer
/// needed.
pub(crate) fn gated_backward(
    curve: Curve,
    grad: &Tensor,
    gate: &Tensor,
    up: Option<&Tensor>,
    in_place: bool,
) -> (Tensor, Option<Tensor>, Tensor) {
    assert!(up.is_none_or(|up| up.size() == gate.size()) && grad.size() == gate.size(), "as much of each as gate");
    let place = |of: &Tensor| if in_place { of.shallow_clone() } else { of.empty_like() };
    let (dgate, dup, y, n) = (place(gate), up.map(place), place(grad), gate.numel() as i64);
    let outputs = [(&dgate).into(), dup.as_ref().into(), (&y).into(), Argument::Long(n)];
    let arguments: Vec<Argument<'_>> =
        [curve.argument(), grad.into(), gate.into(), up.into()].into_iter().chain(outputs).collect();
    // SAFETY: what `gated_backward` takes; sizes as just asserted.
    unsafe { launch(gate.device(), "gated_backward", gate.kind(), blocks(gate), &arguments) };
    (dgate, dup, y)
}

fn blocks(gate: &Tensor) -> i64 {
    let vector = length(gate.kind());
    blocks_of((gate.numel() as i64 + vector - 1) / vector)
}
