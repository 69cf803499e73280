//! What a feed-forward does between its products, in one pass.

use multiversion::multiversion;
use multiversion::target::target_cfg_f;
use tch::Tensor;

use super::{Stored, exp, multiply_add, sigmoid};
use crate::ops::gated::Activation;
use crate::torch_ext::{elements, filled, filled_many};

/// Calls a generic kernel for an activation and the number type of a tensor that the kernels serve; the curve is its first argument.
macro_rules! by_curve {
    ($activation:expr, $kind:expr, $kernel:ident($($argument:expr),*)) => {{
        use $crate::ops::cpu::activation::{Clamped, Gelu, GeluTanh, Sigmoid, Silu};
        match $activation {
            Activation::Silu => by_kind!($kind, $kernel(Silu, $($argument),*)),
            Activation::Gelu => by_kind!($kind, $kernel(Gelu, $($argument),*)),
            Activation::GeluTanh => by_kind!($kind, $kernel(GeluTanh, $($argument),*)),
            Activation::Sigmoid => by_kind!($kind, $kernel(Sigmoid, $($argument),*)),
            Activation::Clamped { limit, slope, offset } => {
                let clamped = Clamped { limit: limit as f32, slope: slope as f32, offset: offset as f32 };
                by_kind!($kind, $kernel(clamped, $($argument),*))
            }
        }
    }};
}
pub(super) use by_curve;

/// `act(g) * u`, or `act(g)` without u, all (T, F).
pub(in crate::ops) fn gated(activation: Activation, gate: &Tensor, up: Option<&Tensor>) -> Tensor {
    by_curve!(activation, gate.kind(), gated_of(gate, up))
}

/// dg and du (T, F) of [`gated`] from dy (T, F), and y itself again: one exponential serves all three.
pub(in crate::ops) fn gated_backward(
    activation: Activation,
    dy: &Tensor,
    gate: &Tensor,
    up: Option<&Tensor>,
) -> (Tensor, Option<Tensor>, Tensor) {
    by_curve!(activation, gate.kind(), gated_backward_of(dy, gate, up))
}

/// An activation, compiled into the loops that apply it.
pub(super) trait Curve: Copy + Sync {
    /// Its value and its derivative at x.
    fn at(self, x: f32, fused: bool) -> (f32, f32);

    /// What the value is multiplied with, made of up, and its derivative.
    #[inline(always)]
    fn up(self, up: f32) -> (f32, f32) {
        (up, 1.0)
    }
}

#[derive(Clone, Copy)]
pub(super) struct Silu;
#[derive(Clone, Copy)]
pub(super) struct Gelu;
#[derive(Clone, Copy)]
pub(super) struct GeluTanh;
#[derive(Clone, Copy)]
pub(super) struct Sigmoid;
/// The fields of [`Activation::Clamped`].
#[derive(Clone, Copy)]
pub(super) struct Clamped {
    pub(super) limit: f32,
    pub(super) slope: f32,
    pub(super) offset: f32,
}

impl Curve for Sigmoid {
    #[inline(always)]
    fn at(self, x: f32, fused: bool) -> (f32, f32) {
        let s = sigmoid(x, fused);
        (s, s * (1.0 - s))
    }
}

impl Curve for Silu {
    #[inline(always)]
    fn at(self, x: f32, fused: bool) -> (f32, f32) {
        let s = sigmoid(x, fused);
        (x * s, s + x * s * (1.0 - s))
    }
}

impl Curve for Clamped {
    #[inline(always)]
    fn at(self, x: f32, fused: bool) -> (f32, f32) {
        let kept = if x > self.limit { self.limit } else { x };
        let s = sigmoid(kept * self.slope, fused);
        let derivative = s + kept * self.slope * s * (1.0 - s);
        (kept * s, if x > self.limit { 0.0 } else { derivative })
    }

    #[inline(always)]
    fn up(self, up: f32) -> (f32, f32) {
        let inside = if up.abs() <= self.limit { 1.0 } else { 0.0 };
        let kept = if up > self.limit { self.limit } else { up };
        let kept = if kept < -self.limit { -self.limit } else { kept };
        (kept + self.offset, inside)
    }
}

impl Curve for GeluTanh {
    // (1 + tanh z) / 2 is the sigmoid of 2z.
    #[inline(always)]
    fn at(self, x: f32, fused: bool) -> (f32, f32) {
        const TWICE: f32 = 1.595_769; // 2 sqrt(2 / pi)
        let s = sigmoid(TWICE * (x + 0.044_715 * x * x * x), fused);
        (x * s, s + x * s * (1.0 - s) * TWICE * (1.0 + 3.0 * 0.044_715 * x * x))
    }
}

impl Curve for Gelu {
    // The error function by Abramowitz and Stegun 7.1.26, to 1.5e-7: its exponential is the density of the derivative, too.
    #[inline(always)]
    fn at(self, x: f32, fused: bool) -> (f32, f32) {
        let e = exp(-0.5 * x * x, fused);
        let t = 1.0 / (1.0 + 0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2 * x.abs());
        let p = multiply_add(fused, 1.061_405_4, t, -1.453_152_1);
        let p = multiply_add(fused, p, t, 1.421_413_8);
        let p = multiply_add(fused, p, t, -0.284_496_72);
        let p = multiply_add(fused, p, t, 0.254_829_6);
        let beyond = 0.5 * p * t * e; // of the normal distribution, above |x|
        let below = if x >= 0.0 { 1.0 - beyond } else { beyond };
        const DENSITY: f32 = 0.398_942_3; // 1 / sqrt(2 pi)
        (x * below, below + x * e * DENSITY)
    }
}

fn gated_of<S: Stored>(curve: impl Curve, gate: &Tensor, up: Option<&Tensor>) -> Tensor {
    let (rows, width) = gate.size2().expect("(T, F)");
    let (g, u, f) = (elements::<S>(gate), up.map(elements::<S>), width as usize);
    filled::<S>(&[rows, width], |range, y| {
        let span = range.start * f..range.end * f;
        gated_elements(curve, &g[span.clone()], u.map(|u| &u[span]), y);
    })
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn gated_elements<S: Stored, C: Curve>(curve: C, g: &[S], u: Option<&[S]>, y: &mut [S]) {
    let fused = target_cfg_f!(target_feature = "fma");
    match u {
        Some(u) => {
            for ((g, u), y) in g.iter().zip(u).zip(y) {
                *y = S::rounded(curve.at(g.wide(), fused).0 * curve.up(u.wide()).0);
            }
        }
        None => {
            for (g, y) in g.iter().zip(y) {
                *y = S::rounded(curve.at(g.wide(), fused).0);
            }
        }
    }
}

fn gated_backward_of<S: Stored>(
    curve: impl Curve,
    dy: &Tensor,
    gate: &Tensor,
    up: Option<&Tensor>,
) -> (Tensor, Option<Tensor>, Tensor) {
    let (size, f) = (gate.size(), gate.size()[1] as usize);
    let (dy, g) = (elements::<S>(dy), elements::<S>(gate));
    match up {
        Some(up) => {
            let u = elements::<S>(up);
            let [dg, du, y] = filled_many::<S, 3>(&size, |range, outputs| {
                let span = range.start * f..range.end * f;
                gated_backward_elements(curve, &dy[span.clone()], &g[span.clone()], &u[span], outputs);
            });
            (dg, Some(du), y)
        }
        None => {
            let [dg, y] = filled_many::<S, 2>(&size, |range, outputs| {
                let span = range.start * f..range.end * f;
                activated_backward_elements(curve, &dy[span.clone()], &g[span], outputs);
            });
            (dg, None, y)
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn gated_backward_elements<S: Stored, C: Curve>(curve: C, dy: &[S], g: &[S], u: &[S], [dg, du, y]: [&mut [S]; 3]) {
    let fused = target_cfg_f!(target_feature = "fma");
    for (((((dy, g), u), dg), du), y) in dy.iter().zip(g).zip(u).zip(dg).zip(du).zip(y) {
        let dy = dy.wide();
        let (value, slope) = curve.at(g.wide(), fused);
        let (u, slope_of_up) = curve.up(u.wide());
        *y = S::rounded(value * u);
        *du = S::rounded(dy * value * slope_of_up);
        *dg = S::rounded(dy * u * slope);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn activated_backward_elements<S: Stored, C: Curve>(curve: C, dy: &[S], g: &[S], [dg, y]: [&mut [S]; 2]) {
    let fused = target_cfg_f!(target_feature = "fma");
    for (((dy, g), dg), y) in dy.iter().zip(g).zip(dg).zip(y) {
        let (value, slope) = curve.at(g.wide(), fused);
        *y = S::rounded(value);
        *dg = S::rounded(dy.wide() * slope);
    }
}
