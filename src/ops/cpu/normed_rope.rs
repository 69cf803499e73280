//! Heads normed and rotated: what lies between stays in fp32 and near, a token at a time.

use tch::Tensor;

use super::{Stored, Turns, norm_backward_rows, norm_rows, norm_stats, rotate_halves, rotate_pairs};
use crate::ops::Norm;
use crate::ops::rope::{RopeLayout, Rotation};
use crate::torch_ext::{elements, filled};

/// x (T, N, H), each head normed, then rotated from element `first` on. The norm has no bias and is not trained.
pub(in crate::ops) fn norm_and_rotate(x: &Tensor, norm: &Norm, rotation: &Rotation, first: i64) -> Tensor {
    by_kind!(x.kind(), norm_and_rotate_of(x, norm, rotation, first as usize))
}

fn norm_and_rotate_of<S: Stored>(x: &Tensor, norm: &Norm, rotation: &Rotation, first: usize) -> Tensor {
    let (size, shape) = (x.size(), Shape::of(x, norm, rotation, first));
    let x = elements::<S>(x);
    filled::<S>(&size, |tokens, y| {
        let mut normed = vec![0f32; shape.row];
        for (token, y) in tokens.zip(y.chunks_exact_mut(shape.row)) {
            let (x, weights) = (&x[token * shape.row..][..shape.row], shape.weights.from(token * shape.heads));
            norm_rows(x, weights, None, &shape.stats(x), &mut normed);
            shape.rotate(&normed, token, 1.0, y);
        }
    })
}

/// dx (T, N, H) of [`norm_and_rotate`].
pub(in crate::ops) fn norm_and_rotate_backward(
    dy: &Tensor,
    x: &Tensor,
    norm: &Norm,
    rotation: &Rotation,
    first: i64,
) -> Tensor {
    by_kind!(x.kind(), norm_and_rotate_backward_of(dy, x, norm, rotation, first as usize))
}

fn norm_and_rotate_backward_of<S: Stored>(
    dy: &Tensor,
    x: &Tensor,
    norm: &Norm,
    rotation: &Rotation,
    first: usize,
) -> Tensor {
    let (size, shape) = (x.size(), Shape::of(x, norm, rotation, first));
    let (dy, x) = (elements::<S>(dy), elements::<S>(x));
    filled::<S>(&size, |tokens, dx| {
        let mut back = vec![0f32; shape.row];
        for (token, dx) in tokens.zip(dx.chunks_exact_mut(shape.row)) {
            let span = token * shape.row..(token + 1) * shape.row;
            let (x, weights) = (&x[span.clone()], shape.weights.from(token * shape.heads));
            shape.rotate(&dy[span], token, -1.0, &mut back);
            norm_backward_rows(&back, x, weights, &shape.stats(x), shape.centred, None, dx);
        }
    })
}

struct Shape<'a> {
    weights: Turns<'a>,
    eps: f32,
    centred: bool,
    layout: RopeLayout,
    cos: &'a [f32],
    sin: &'a [f32],
    half: usize,
    first: usize,
    heads: usize,
    head: usize,
    /// Elements of a token.
    row: usize,
}

impl<'a> Shape<'a> {
    fn of(x: &Tensor, norm: &'a Norm, rotation: &'a Rotation, first: usize) -> Self {
        let (_, heads, head) = x.size3().expect("(T, N, H)");
        Self {
            weights: Turns::new(&norm.weight, head),
            eps: norm.eps as f32,
            centred: norm.centred,
            layout: rotation.layout,
            cos: elements::<f32>(&rotation.cos),
            sin: elements::<f32>(&rotation.sin),
            half: rotation.cos.size()[1] as usize,
            first,
            heads: heads as usize,
            head: head as usize,
            row: (heads * head) as usize,
        }
    }

    /// Mean and 1/deviation of each head of a token.
    fn stats<S: Stored>(&self, x: &[S]) -> Vec<f32> {
        let mut stats = vec![0f32; 2 * self.heads];
        norm_stats(x, self.head, self.eps, self.centred, &mut stats);
        stats
    }

    /// A token's heads, turned by its angles.
    fn rotate<X: Stored, Y: Stored>(&self, x: &[X], token: usize, direction: f32, y: &mut [Y]) {
        let angles = token * self.half..(token + 1) * self.half;
        let (tables, sizes) = ((&self.cos[angles.clone()], &self.sin[angles]), (self.row, self.head, self.first));
        match self.layout {
            RopeLayout::Halves => rotate_halves(x, tables, sizes, direction, y),
            RopeLayout::Pairs => rotate_pairs(x, tables, sizes, direction, y),
        }
    }
}
