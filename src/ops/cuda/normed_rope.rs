//! Queries and keys normed and rotated in one launch, by `normed_rope.cu`; shapes are those of `ops::rope`.

use tch::{Kind, Tensor};

use super::launch::{Argument, launch};
use super::{Angles, THREADS, WARP, holds, length, serves};

/// Heads (T, N, H), what each is normed by, and the element from which on it turns.
#[derive(Clone, Copy)]
pub(crate) struct NormedHeads<'a> {
    pub(crate) x: &'a Tensor,
    /// (P, H), fp32: of the T N heads one after the other, number i takes row i mod P.
    pub(crate) weight: &'a Tensor,
    pub(crate) eps: f64,
    pub(crate) centred: bool,
    pub(crate) first: i64,
}

/// Whether [`norm_and_rotate`] serves these.
pub(crate) fn norms_and_rotates(heads: &[NormedHeads<'_>], angles: Angles<'_>) -> bool {
    let x: Vec<&Tensor> = heads.iter().map(|heads| heads.x).collect();
    let of_fp32: Vec<&Tensor> = heads.iter().map(|heads| heads.weight).chain([angles.cos, angles.sin]).collect();
    x.len() <= 2
        && serves(&x)
        && holds(&[&[x[0]], &of_fp32[..]].concat())
        && x.iter().all(|x| x.numel() < 1 << 31)
        && of_fp32.iter().all(|tensor| tensor.kind() == Kind::Float)
}

/// One or two tensors of heads, normed and then rotated. Only where [`norms_and_rotates`] says so.
pub(crate) fn norm_and_rotate(heads: &[NormedHeads<'_>], angles: Angles<'_>) -> Vec<Tensor> {
    let y: Vec<Tensor> = heads.iter().map(|heads| heads.x.empty_like()).collect();
    let tensors = |i: usize| [Some(heads[i].x), Some(heads[i].weight), Some(&y[i])];
    run(
        ["normed_rope_halves", "normed_rope_pairs", "normed_rope_halves_odd", "normed_rope_pairs_odd"],
        heads,
        angles,
        tensors,
    );
    y
}

/// The gradients of the heads from those of [`norm_and_rotate`], contiguous.
pub(crate) fn norm_and_rotate_backward(dy: &[&Tensor], heads: &[NormedHeads<'_>], angles: Angles<'_>) -> Vec<Tensor> {
    for (dy, heads) in dy.iter().zip(heads) {
        assert!(dy.size() == heads.x.size() && dy.kind() == heads.x.kind(), "a gradient of every number");
    }
    let dx: Vec<Tensor> = heads.iter().map(|heads| heads.x.empty_like()).collect();
    let tensors = |i: usize| [Some(dy[i]), Some(heads[i].x), Some(heads[i].weight), Some(&dx[i])];
    let kernels = [
        "normed_rope_backward_halves",
        "normed_rope_backward_pairs",
        "normed_rope_backward_halves_odd",
        "normed_rope_backward_pairs_odd",
    ];
    run(kernels, heads, angles, tensors);
    dx
}

/// Launches the one of `kernels` (halves, pairs, and both for sizes that are no multiple of sixteen bytes) that fits.
fn run<'a, const N: usize>(
    kernels: [&'static str; 4],
    heads: &[NormedHeads<'a>],
    angles: Angles<'a>,
    tensors: impl Fn(usize) -> [Option<&'a Tensor>; N],
) {
    let (tokens, half) = angles.cos.size2().expect("(T, H/2)");
    let (device, kind) = (heads[0].x.device(), heads[0].x.kind());
    assert_eq!(angles.sin.size(), angles.cos.size(), "a sine of every cosine");
    let vector = length(kind);
    let whole =
        half % vector == 0 && heads.iter().all(|heads| heads.x.size()[2] % vector == 0 && heads.first % vector == 0);
    let kernel = kernels[usize::from(angles.pairs) + 2 * usize::from(!whole)];
    let shapes: Vec<Shape> =
        heads.iter().map(|heads| Shape::of(heads, tokens, half, if whole { vector } else { 1 })).collect();
    let mut arguments: Vec<Argument<'_>> = Vec::new();
    for i in 0..2 {
        match shapes.get(i) {
            Some(shape) => {
                arguments.push(shape.argument());
                arguments.extend(tensors(i).map(Argument::from));
            }
            None => {
                arguments.push(Shape::NONE.argument());
                arguments.extend([const { None::<&Tensor> }; N].map(Argument::from));
            }
        }
        if i == 0 {
            arguments.push(Argument::Int(shapes[0].blocks() as i32));
        }
    }
    arguments.extend([angles.cos.into(), angles.sin.into(), Argument::Int(half as i32)]);
    // SAFETY: what the kernels of `normed_rope.cu` take; sizes as asserted here and in `Shape::of`.
    unsafe { launch(device, kernel, kind, shapes.iter().map(Shape::blocks).sum(), &arguments) };
}

/// The `Heads` of `normed_rope.cu`.
struct Shape {
    rows: i64,
    heads: i64,
    head: i64,
    first: i64,
    turns: i64,
    /// Threads to a row, a power of two up to a warp.
    team: i64,
    centred: bool,
    eps: f32,
}

impl Shape {
    /// Where there is no second tensor.
    const NONE: Self = Self { rows: 0, heads: 1, head: 1, first: 0, turns: 1, team: 1, centred: false, eps: 0.0 };

    /// Of heads whose units are two vectors of so many numbers.
    fn of(heads: &NormedHeads<'_>, tokens: i64, half: i64, vector: i64) -> Self {
        let NormedHeads { x, weight, eps, centred, first } = *heads;
        let (own, count, head) = x.size3().expect("(T, N, H)");
        let turns = weight.numel() as i64 / head.max(1);
        assert_eq!(own, tokens, "angles of every token");
        assert!(first >= 0 && first + 2 * half <= head, "a head holds what is rotated");
        assert!(turns > 0 && weight.numel() as i64 == turns * head, "a norm's weight is as wide as a head");
        let units = half / vector + (head - 2 * half + 2 * vector - 1) / (2 * vector);
        let team = units.clamp(1, WARP).unsigned_abs().next_power_of_two() as i64;
        Self { rows: tokens * count, heads: count, head, first, turns, team, centred, eps: eps as f32 }
    }

    fn argument(&self) -> Argument<'static> {
        let Self { rows, heads, head, first, turns, team, centred, eps } = *self;
        let whole = [rows, heads, head, first, turns, team, i64::from(centred)].map(|value| value as u32);
        Argument::Words(whole.into_iter().chain([eps.to_bits()]).collect())
    }

    fn blocks(&self) -> i64 {
        let rows_of_a_block = THREADS / self.team;
        (self.rows + rows_of_a_block - 1) / rows_of_a_block
    }
}
