//! Rotary position embedding (arXiv:2104.09864): pairs (x1, x2) of the rotated part of a head become
//! `(x1 cos - x2 sin, x2 cos + x1 sin)`. Linear in x, so backward is the rotation the other way and keeps nothing of x.

use tch::{Kind, Tensor};

use super::{cpu, cuda};
use crate::torch_ext::custom;

/// Which elements of the rotated part of a head turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeLayout {
    /// i and i + H/2: GPT-NeoX's.
    Halves,
    /// 2i and 2i + 1: GPT-J's, also called interleaved.
    Pairs,
}

/// Cosines and sines of a micro-batch's positions: (T, H/2) each, fp32; H the rotated part of a head.
#[derive(Debug)]
pub struct Rotation {
    /// Which elements turn together.
    pub layout: RopeLayout,
    /// (T, H/2).
    pub cos: Tensor,
    /// (T, H/2).
    pub sin: Tensor,
}

impl Rotation {
    /// Another handle to the same tables.
    pub fn shallow_clone(&self) -> Self {
        Self { layout: self.layout, cos: self.cos.shallow_clone(), sin: self.sin.shallow_clone() }
    }
}

/// Rotates the first elements of the heads of every x (T, heads, H): queries and keys, or queries alone.
pub fn rope<const X: usize>(x: [&Tensor; X], rotation: &Rotation) -> [Tensor; X] {
    rotate_from(x, rotation, |_| 0)
}

/// Rotates the last elements of the heads of every x (T, heads, H), whose sizes may differ.
pub fn rope_last<const X: usize>(x: [&Tensor; X], rotation: &Rotation) -> [Tensor; X] {
    let rotated = 2 * rotation.cos.size()[1];
    rotate_from(x, rotation, |head| head - rotated)
}

/// Rotates from the element on that `first` gives for a head's size.
fn rotate_from<const X: usize>(x: [&Tensor; X], rotation: &Rotation, first: impl Fn(i64) -> i64) -> [Tensor; X] {
    let first = x.map(|x| first(x.size()[2]));
    let outputs = tch::no_grad(|| rotate_all(&x, rotation, &first, 1.0));
    let rotation = rotation.shallow_clone();
    let outputs = custom(c"engraft::rope", &x, outputs, move |grads| {
        let grads: Vec<&Tensor> = grads.iter().collect();
        rotate_all(&grads, &rotation, &first, -1.0).into_iter().map(Some).collect()
    });
    outputs.try_into().expect("an output for every x")
}

fn rotate_all(x: &[&Tensor], rotation: &Rotation, first: &[i64], direction: f64) -> Vec<Tensor> {
    let Rotation { layout, cos, sin } = rotation;
    let angles = cuda::Angles { pairs: *layout == RopeLayout::Pairs, cos, sin };
    if cuda::rotates(x, angles) {
        return cuda::rotate(x, angles, first, direction as f32);
    }
    x.iter().zip(first).map(|(x, first)| rotate(x, rotation, *first, direction)).collect()
}

pub(super) fn rotate(x: &Tensor, rotation: &Rotation, first: i64, direction: f64) -> Tensor {
    if cpu::serves(&[x]) {
        return cpu::rotate(x, rotation, first, direction as f32);
    }
    let half = rotation.cos.size()[1];
    let head = x.size()[2] - first;
    let (cos, sin) = (rotation.cos.unsqueeze(1), rotation.sin.unsqueeze(1) * direction); // (T, 1, H/2)
    let whole = x.to_kind(Kind::Float);
    let wide = whole.narrow(2, first, head);
    let (x1, x2) = match rotation.layout {
        RopeLayout::Halves => (wide.narrow(2, 0, half), wide.narrow(2, half, half)), // (T, N, H/2)
        RopeLayout::Pairs => (wide.slice(2, 0, 2 * half, 2), wide.slice(2, 1, 2 * half, 2)), // (T, N, H/2)
    };
    let mut parts = vec![&x1 * &cos - &x2 * &sin, &x2 * &cos + &x1 * &sin];
    if rotation.layout == RopeLayout::Pairs {
        parts = vec![Tensor::stack(&parts, 3).flatten(2, 3)]; // (T, N, H)
    }
    if 2 * half < head {
        parts.push(wide.narrow(2, 2 * half, head - 2 * half));
    }
    if first > 0 {
        parts.insert(0, whole.narrow(2, 0, first));
    }
    Tensor::cat(&parts, 2).to_kind(x.kind())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, randn};

    /// The slow twin, as the paper's code writes it: x cos + rotate_half(x) sin.
    fn twin(x: &Tensor, rotation: &Rotation) -> Tensor {
        let half = rotation.cos.size()[1];
        if rotation.layout == RopeLayout::Pairs {
            let order: Vec<i64> = (0..half).flat_map(|i| [i, half + i]).chain(2 * half..x.size()[2]).collect();
            let order = Tensor::from_slice(&order);
            let halves = x.index_select(2, &order.argsort(0, false));
            let halves_rotation = Rotation { layout: RopeLayout::Halves, ..rotation.shallow_clone() };
            return twin(&halves, &halves_rotation).index_select(2, &order);
        }
        let rotated = x.narrow(2, 0, 2 * half);
        let (x1, x2) = (rotated.narrow(2, 0, half), rotated.narrow(2, half, half));
        let double = |t: &Tensor| Tensor::cat(&[t, t], 1).unsqueeze(1);
        let turned = Tensor::cat(&[-x2, x1], 2);
        let y = &rotated * double(&rotation.cos) + turned * double(&rotation.sin);
        Tensor::cat(&[y, x.narrow(2, 2 * half, x.size()[2] - 2 * half)], 2)
    }

    #[test]
    fn equals_plain_autograd_also_when_only_a_part_of_the_head_rotates() {
        for (half, layout) in
            [(6, RopeLayout::Halves), (4, RopeLayout::Halves), (6, RopeLayout::Pairs), (4, RopeLayout::Pairs)]
        {
            let angle = randn(&[9, half], 3);
            let rotation = Rotation { layout, cos: angle.cos(), sin: angle.sin() };
            check(
                &[randn(&[9, 4, 12], 1), randn(&[9, 2, 12], 2)],
                |_, x| rope([&x[0], &x[1]], &rotation).into(),
                |_, x| vec![twin(&x[0], &rotation), twin(&x[1], &rotation)],
            );
        }
    }

    #[test]
    fn the_last_elements_of_heads_of_two_sizes_equal_plain_autograd() {
        for layout in [RopeLayout::Halves, RopeLayout::Pairs] {
            let angle = randn(&[9, 3], 3);
            let rotation = Rotation { layout, cos: angle.cos(), sin: angle.sin() };
            let last = |x: &Tensor| {
                let still = x.size()[2] - 6;
                Tensor::cat(&[x.narrow(2, 0, still), twin(&x.narrow(2, still, 6), &rotation)], 2)
            };
            check(
                &[randn(&[9, 4, 13], 1), randn(&[9, 1, 6], 2)],
                |_, x| rope_last([&x[0], &x[1]], &rotation).into(),
                |_, x| vec![last(&x[0]), last(&x[1])],
            );
        }
    }
}
