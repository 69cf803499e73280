//! Rotary position embedding (arXiv:2104.09864): pairs (x1, x2) of the rotated part of a head become
//! `(x1 cos - x2 sin, x2 cos + x1 sin)`. Linear in x, so backward is the rotation the other way and keeps nothing of x.
//!
//! Heads that are normed before are so on the way, where there is a kernel: what is kept is x before its norm, as a norm alone keeps it.

use tch::{Kind, Tensor};

use super::{Norm, cpu, cuda};
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

/// [`rope`] of heads (T, heads, H) that are normed first, each by itself.
pub fn normed_rope<const X: usize>(x: [&Tensor; X], norms: [&Norm; X], rotation: &Rotation) -> [Tensor; X] {
    norm_and_rotate_from(x, norms, rotation, |_| 0)
}

/// [`rope_last`] of heads (T, heads, H) that are normed first, each by itself.
pub fn normed_rope_last<const X: usize>(x: [&Tensor; X], norms: [&Norm; X], rotation: &Rotation) -> [Tensor; X] {
    let rotated = 2 * rotation.cos.size()[1];
    norm_and_rotate_from(x, norms, rotation, |head| head - rotated)
}

fn norm_and_rotate_from<const X: usize>(
    x: [&Tensor; X],
    norms: [&Norm; X],
    rotation: &Rotation,
    first: impl Fn(i64) -> i64,
) -> [Tensor; X] {
    let heads = Heads {
        x: x.map(Tensor::detach).into(),
        norms: norms.map(Norm::clone).into(),
        rotation: rotation.shallow_clone(),
        first: x.map(|x| first(x.size()[2])).into(),
    };
    let Some(outputs) = tch::no_grad(|| heads.forward()) else {
        let mut norms = norms.into_iter();
        let normed = x.map(|x| norms.next().expect("one of each").apply_to_heads(x));
        return rotate_from(normed.each_ref(), rotation, first);
    };
    let outputs = custom(c"engraft::normed_rope", &x, outputs, move |grads| {
        heads.backward(&grads.iter().map(Tensor::contiguous).collect::<Vec<_>>()).into_iter().map(Some).collect()
    });
    outputs.try_into().expect("an output for every x")
}

/// Heads that are normed and rotated on the way.
struct Heads {
    x: Vec<Tensor>,
    norms: Vec<Norm>,
    rotation: Rotation,
    /// The element of a head from which on it turns.
    first: Vec<i64>,
}

impl Heads {
    /// Nothing where no kernel serves.
    fn forward(&self) -> Option<Vec<Tensor>> {
        if self.norms.iter().any(|norm| norm.trained.is_some() || norm.bias.is_some()) {
            return None;
        }
        let (on_cuda, angles) = (self.on_cuda(), self.angles());
        if cuda::norms_and_rotates(&on_cuda, angles) {
            return Some(cuda::norm_and_rotate(&on_cuda, angles));
        }
        cpu::serves(&self.x.iter().collect::<Vec<_>>())
            .then(|| self.each().map(|(x, norm, first)| cpu::norm_and_rotate(x, norm, &self.rotation, first)).collect())
    }

    fn backward(&self, dy: &[Tensor]) -> Vec<Tensor> {
        let (on_cuda, angles) = (self.on_cuda(), self.angles());
        if cuda::norms_and_rotates(&on_cuda, angles) {
            return cuda::norm_and_rotate_backward(&dy.iter().collect::<Vec<_>>(), &on_cuda, angles);
        }
        let back = |((x, norm, first), dy)| cpu::norm_and_rotate_backward(dy, x, norm, &self.rotation, first);
        self.each().zip(dy).map(back).collect()
    }

    fn each(&self) -> impl Iterator<Item = (&Tensor, &Norm, i64)> {
        self.x.iter().zip(&self.norms).zip(&self.first).map(|((x, norm), first)| (x, norm, *first))
    }

    fn on_cuda(&self) -> Vec<cuda::NormedHeads<'_>> {
        self.each()
            .map(|(x, norm, first)| {
                let Norm { weight, eps, centred, .. } = norm;
                cuda::NormedHeads { x, weight, eps: *eps, centred: *centred, first }
            })
            .collect()
    }

    fn angles(&self) -> cuda::Angles<'_> {
        let Rotation { layout, cos, sin } = &self.rotation;
        cuda::Angles { pairs: *layout == RopeLayout::Pairs, cos, sin }
    }
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

    /// RMSNorm with one weight, LayerNorm with a weight for each head; heads of whole vectors and not, of which all turns, or a part.
    #[test]
    fn heads_that_are_normed_on_the_way_equal_plain_autograd() {
        for (layout, head, half, centred) in [
            (RopeLayout::Halves, 16, 8, false),
            (RopeLayout::Pairs, 16, 8, true),
            (RopeLayout::Halves, 40, 8, true),
            (RopeLayout::Pairs, 40, 8, false),
            (RopeLayout::Halves, 13, 3, false),
            (RopeLayout::Pairs, 13, 3, true),
        ] {
            let angle = randn(&[9, half], 3);
            let rotation = Rotation { layout, cos: angle.cos(), sin: angle.sin() };
            let norm = |heads, seed| {
                let weight = randn(&[if centred { heads } else { 1 }, head], seed) * 0.3 + 1.0;
                crate::ops::norm::tests::frozen(weight, None, 1e-5, centred)
            };
            let norms = [norm(4, 4), norm(2, 5)];
            let inputs = [randn(&[9, 4, head], 1) + 0.3, randn(&[9, 2, head], 2)];
            let twin_of = |x: &Tensor, norm: &Norm| {
                let x = if centred { x - x.mean_dim([-1i64].as_slice(), true, Kind::Float) } else { x.shallow_clone() };
                let rms = (x.square().mean_dim([-1i64].as_slice(), true, Kind::Float) + 1e-5).sqrt();
                x / rms * &norm.weight
            };
            check(
                &inputs,
                |_, x| normed_rope([&x[0], &x[1]], [&norms[0], &norms[1]], &rotation).into(),
                |_, x| [0, 1].map(|i| twin(&twin_of(&x[i], &norms[i]), &rotation)).into(),
            );
            let still = head - 2 * half;
            let last =
                |x: &Tensor| Tensor::cat(&[x.narrow(2, 0, still), twin(&x.narrow(2, still, 2 * half), &rotation)], 2);
            check(
                &inputs,
                |_, x| normed_rope_last([&x[0], &x[1]], [&norms[0], &norms[1]], &rotation).into(),
                |_, x| [0, 1].map(|i| last(&twin_of(&x[i], &norms[i]))).into(),
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
