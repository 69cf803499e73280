//! Rotary position embedding by `rope.cu`; shapes are those of `ops::rope`.

use tch::{Kind, Tensor};

use super::launch::{Argument, blocks_of, launch};
use super::{holds, length, serves};

/// Cosines and sines (T, H/2), and whether neighbours turn together or halves.
#[derive(Clone, Copy)]
pub(crate) struct Angles<'a> {
    pub(crate) pairs: bool,
    pub(crate) cos: &'a Tensor,
    pub(crate) sin: &'a Tensor,
}

/// Whether [`rotate`] serves these tensors.
pub(crate) fn rotates(x: &[&Tensor], angles: Angles<'_>) -> bool {
    let elements: usize = x.iter().map(|x| x.numel()).sum();
    x.len() <= 2 && serves(x) && holds(&[x[0], angles.cos, angles.sin]) && elements < 1 << 31
}

/// One or two tensors x (T, N, H), rotated in one launch, each from the element of a head on that `first` names; `direction` -1 turns
/// back. Only where [`rotates`] says so.
pub(crate) fn rotate(x: &[&Tensor], angles: Angles<'_>, first: &[i64], direction: f32) -> Vec<Tensor> {
    let (tokens, half) = angles.cos.size2().expect("(T, H/2)");
    let kind = x[0].kind();
    assert!(angles.cos.kind() == Kind::Float && angles.sin.kind() == Kind::Float, "tables in fp32");
    assert_eq!(angles.sin.size(), angles.cos.size(), "a sine of every cosine");
    let sizes: Vec<[i64; 3]> = x.iter().map(|x| x.size3().map(<[i64; 3]>::from).expect("(T, N, H)")).collect();
    for (size, first) in sizes.iter().zip(first) {
        assert_eq!(size[0], tokens, "angles of every token");
        assert!(*first >= 0 && first + 2 * half <= size[2], "a head holds what is rotated");
    }
    let vector = length(kind);
    let fits = |(size, first): (&[i64; 3], &i64)| size[2] % vector == 0 && first % vector == 0;
    let whole = half % vector == 0 && sizes.iter().zip(first).all(fits);
    let (kernel, turning) = match (angles.pairs, whole) {
        (false, true) => ("rope_halves", half / vector),
        (true, true) => ("rope_pairs", 2 * half / vector),
        (false, false) => ("rope_halves_odd", half),
        (true, false) => ("rope_pairs_odd", half),
    };
    let units = |size: &[i64; 3]| {
        let still = (size[2] - 2 * half) / if whole { vector } else { 1 };
        size[0] * size[1] * (turning + still)
    };
    let y: Vec<Tensor> = x.iter().map(|x| x.empty_like()).collect();
    let mut arguments: Vec<Argument<'_>> = Vec::new();
    for i in 0..2 {
        let [_, heads, head] = sizes.get(i).copied().unwrap_or([0, 1, 1]);
        let count = sizes.get(i).map_or(0, units);
        let first = first.get(i).copied().unwrap_or(0);
        arguments.extend([x.get(i).copied().into(), y.get(i).into()]);
        arguments.extend([heads, head, first, count].map(|value| Argument::Int(value as i32)));
    }
    arguments.extend([angles.cos.into(), angles.sin.into(), Argument::Int(half as i32), Argument::Float(direction)]);
    let threads = sizes.iter().map(units).sum();
    // SAFETY: what the kernels of `rope.cu` take; sizes as just asserted.
    unsafe { launch(x[0].device(), kernel, kind, blocks_of(threads), &arguments) };
    y
}
