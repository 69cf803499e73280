//! The activated product of experts and its gradients in one pass over gate and up, apart or together as the product gave them.

use multiversion::multiversion;
use multiversion::target::target_cfg_f;
use tch::Tensor;

use super::activation::{Curve, by_curve};
use super::{Stored, dot};
use crate::ops::experts::Fusion;
use crate::ops::gated::Activation;
use crate::torch_ext::{elements, filled, filled_beside};

/// `act(gate) * up` (S, F) of gate and up (S, F) each, or of the two together (S, 2 F).
pub(in crate::ops) fn gated(activation: Activation, fusion: Fusion, products: &[Tensor]) -> Tensor {
    by_curve!(activation, products[0].kind(), gated_of(fusion, products))
}

/// The gradients of what [`gated`] took, y itself again and `y . dy` (S, 1), fp32, from dy (S, F); the gradients are those for dy
/// times the weights (S, 1), fp32, if given.
pub(in crate::ops) fn gated_backward(
    activation: Activation,
    fusion: Fusion,
    dy: &Tensor,
    weights: Option<&Tensor>,
    products: &[Tensor],
) -> (Vec<Tensor>, Tensor, Tensor) {
    by_curve!(activation, products[0].kind(), gated_backward_of(fusion, dy, weights, products))
}

fn gated_of<S: Stored>(curve: impl Curve, fusion: Fusion, products: &[Tensor]) -> Tensor {
    let source = Source::<S>::new(fusion, products);
    filled::<S>(&[source.rows as i64, source.width as i64], |range, y| {
        for (row, y) in range.zip(y.chunks_exact_mut(source.width)) {
            gated_row(curve, source.row(row), y);
        }
    })
}

fn gated_backward_of<S: Stored>(
    curve: impl Curve,
    fusion: Fusion,
    dy: &Tensor,
    weights: Option<&Tensor>,
    products: &[Tensor],
) -> (Vec<Tensor>, Tensor, Tensor) {
    let source = Source::<S>::new(fusion, products);
    let (f, dy, weights) = (source.width, elements::<S>(dy), weights.map(elements::<f32>));
    let shape = [source.rows as i64, f as i64];
    let first = products[0].size();
    let second = if products.len() == 2 { shape } else { [0, 0] };
    let ([dfirst, dsecond, y], dots) =
        filled_beside::<S, f32, 3>([&first, &second, &shape], &[shape[0], 1], |range, [dfirst, dsecond, y], dots| {
            for (i, row) in range.enumerate() {
                let own = i * f..(i + 1) * f;
                let into = match fusion {
                    Fusion::Separate => PairMut::Apart(&mut dfirst[own.clone()], &mut dsecond[own.clone()]),
                    Fusion::Halves => {
                        let (gate, up) = dfirst[2 * i * f..2 * (i + 1) * f].split_at_mut(f);
                        PairMut::Apart(gate, up)
                    }
                    Fusion::Interleaved => PairMut::InTurn(dfirst[2 * i * f..2 * (i + 1) * f].as_chunks_mut().0),
                };
                let weight = weights.map_or(1.0, |weights| weights[row]);
                dots[i] = gated_backward_row(curve, &dy[row * f..][..f], weight, source.row(row), into, &mut y[own]);
            }
        });
    let gradients = if products.len() == 2 { vec![dfirst, dsecond] } else { vec![dfirst] };
    (gradients, y, dots)
}

/// What gate and up are read from.
struct Source<'a, S> {
    fusion: Fusion,
    first: &'a [S],
    second: &'a [S],
    /// S.
    rows: usize,
    /// F.
    width: usize,
}

/// Gate and up of a row.
#[derive(Clone, Copy)]
enum Pair<'a, S> {
    Apart(&'a [S], &'a [S]),
    InTurn(&'a [[S; 2]]),
}

/// Their gradients.
enum PairMut<'a, S> {
    Apart(&'a mut [S], &'a mut [S]),
    InTurn(&'a mut [[S; 2]]),
}

impl<'a, S: Stored> Source<'a, S> {
    fn new(fusion: Fusion, products: &'a [Tensor]) -> Self {
        let (rows, width) = products[0].size2().expect("(S, F) or (S, 2 F)");
        let (first, second) = (elements::<S>(&products[0]), products.get(1).map_or(&[][..], elements::<S>));
        let width = if matches!(fusion, Fusion::Separate) { width } else { width / 2 };
        Self { fusion, first, second, rows: rows as usize, width: width as usize }
    }

    #[inline(always)]
    fn row(&self, row: usize) -> Pair<'a, S> {
        let f = self.width;
        let whole = || &self.first[2 * row * f..2 * (row + 1) * f];
        match self.fusion {
            Fusion::Separate => Pair::Apart(&self.first[row * f..][..f], &self.second[row * f..][..f]),
            Fusion::Halves => Pair::Apart(&whole()[..f], &whole()[f..]),
            Fusion::Interleaved => Pair::InTurn(whole().as_chunks().0),
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn gated_row<S: Stored, C: Curve>(curve: C, source: Pair<'_, S>, y: &mut [S]) {
    let fused = target_cfg_f!(target_feature = "fma");
    match source {
        Pair::Apart(gate, up) => {
            for ((g, u), y) in gate.iter().zip(up).zip(y) {
                *y = S::rounded(curve.at(g.wide(), fused).0 * curve.up(u.wide()).0);
            }
        }
        Pair::InTurn(pairs) => {
            for ([g, u], y) in pairs.iter().zip(y) {
                *y = S::rounded(curve.at(g.wide(), fused).0 * curve.up(u.wide()).0);
            }
        }
    }
}

/// Returns `y . dy`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn gated_backward_row<S: Stored, C: Curve>(
    curve: C,
    dy: &[S],
    weight: f32,
    source: Pair<'_, S>,
    into: PairMut<'_, S>,
    y: &mut [S],
) -> f32 {
    let fused = target_cfg_f!(target_feature = "fma");
    match (source, into) {
        (Pair::Apart(gate, up), PairMut::Apart(dgate, dup)) => {
            for (((((dy, g), u), dg), du), y) in dy.iter().zip(gate).zip(up).zip(dgate).zip(dup).zip(&mut *y) {
                (*dg, *du, *y) = gradients(curve, dy.wide() * weight, *g, *u, fused);
            }
        }
        (Pair::InTurn(pairs), PairMut::InTurn(dpairs)) => {
            for (((dy, [g, u]), [dg, du]), y) in dy.iter().zip(pairs).zip(dpairs).zip(&mut *y) {
                (*dg, *du, *y) = gradients(curve, dy.wide() * weight, *g, *u, fused);
            }
        }
        _ => unreachable!("gradients lie as what they are of"),
    }
    // A pass of its own over what is still in the nearest cache: with a sum, the loops above would not become vector instructions.
    dot(dy, y, fused)
}

/// The gradients of a gate and its up from that of their product, and the product.
#[inline(always)]
fn gradients<S: Stored>(curve: impl Curve, dy: f32, gate: S, up: S, fused: bool) -> (S, S, S) {
    let (activated, slope) = curve.at(gate.wide(), fused);
    let (shown, slope_of_up) = curve.up(up.wide());
    (S::rounded(dy * shown * slope), S::rounded(dy * activated * slope_of_up), S::rounded(activated * shown))
}
