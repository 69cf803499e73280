//! What a chunk of tokens is made into, of a key head and of each of its value heads.

use multiversion::multiversion;
use multiversion::target::target_cfg_f;

use super::{C, Inputs, Place};
use crate::ops::cpu::products::{Left, Part, ROWS, product, solve, transpose};
use crate::ops::cpu::{self, LANES, Stored, exp, sum};
use crate::ops::delta_net::EPS;

/// Queries and keys of a chunk, of length 1, and their products.
pub(super) struct Keys {
    /// Tokens.
    pub(super) count: usize,
    /// Tokens, filled up for the products.
    pub(super) rows: usize,
    /// q over the root of P: (C, P').
    pub(super) q: Vec<f32>,
    /// (C, P').
    pub(super) k: Vec<f32>,
    /// What made q and k of length 1.
    pub(super) scales: [[f32; C]; 2],
    /// Of keys with keys and of queries with keys, on and below the diagonal: (C, C).
    pub(super) products: [Vec<f32>; 2],
}

/// How much the tokens of a chunk forget and learn, of a value head. Letters as in the formulas.
pub(super) struct Gates {
    /// c, the last one again for what is filled up.
    sums: [f32; C],
    /// b; 0 for what is filled up.
    pub(super) beta: [f32; C],
    /// exp(c).
    pub(super) entering: [f32; C],
    /// exp(c_C - c).
    pub(super) leaving: [f32; C],
    /// exp(c_C).
    pub(super) passing: f32,
}

impl Keys {
    pub(super) fn new(key_wide: usize) -> Self {
        let matrix = |width: usize| vec![0f32; C * width];
        Self {
            count: 0,
            rows: 0,
            q: matrix(key_wide),
            k: matrix(key_wide),
            scales: [[0.0; C]; 2],
            products: [matrix(C), matrix(C)],
        }
    }

    /// Makes them of `count` tokens from the document's token `first` on; `turned` (P', C) is room for a transpose.
    pub(super) fn read<S: Stored>(
        &mut self,
        inputs: &Inputs<'_, S>,
        place: Place<'_>,
        (first, count): (usize, usize),
        turned: &mut [f32],
    ) {
        let Place { shape, document, head } = place;
        let wide = shape.key_wide();
        (self.count, self.rows) = (count, count.next_multiple_of(ROWS));
        let stride = shape.key_heads * shape.key;
        let from = (document.start + first) * stride + head * shape.key;
        let of = |x| Source { x, stride, width: shape.key, count };
        let [q_scales, k_scales] = &mut self.scales;
        unit_rows(of(&inputs.q[from..]), (shape.key as f32).sqrt().recip(), (&mut self.q, wide), q_scales);
        unit_rows(of(&inputs.k[from..]), 1.0, (&mut self.k, wide), k_scales);
        transpose([C, wide], (&self.k, wide), (turned, C));
        for (left, products) in [&self.k, &self.q].into_iter().zip(&mut self.products) {
            let (left, size) = (Left::plain(left, wide), [self.rows, C, shape.key]);
            product(size, Part::LowerResult, left, (turned, C), (products, C), false);
        }
    }
}

impl Gates {
    pub(super) fn new() -> Self {
        Self { sums: [0.0; C], beta: [0.0; C], entering: [0.0; C], leaving: [0.0; C], passing: 0.0 }
    }

    /// Reads those of `count` tokens from the document's token `first` on, of value head `g` of the group.
    pub(super) fn read<S>(
        &mut self,
        inputs: &Inputs<'_, S>,
        Place { shape, document, head }: Place<'_>,
        g: usize,
        (first, count): (usize, usize),
    ) {
        let value_heads = shape.key_heads * shape.group;
        let at = |i: usize| (document.start + first + i) * value_heads + head * shape.group + g;
        let mut sum = 0f32;
        for i in 0..C {
            if i < count {
                sum += inputs.log_decay[at(i)];
            }
            self.sums[i] = sum;
            self.beta[i] = if i < count { inputs.beta[at(i)] } else { 0.0 };
        }
        self.exponentials();
        self.passing = self.entering[C - 1];
    }

    fn exponentials(&mut self) {
        exponentials(&self.sums, &mut self.entering, &mut self.leaving);
    }

    /// D (C, C), on and below the diagonal, and zeros beyond as far as a register reaches.
    pub(super) fn decay(&self, rows: usize, decay: &mut [f32]) {
        decays(&self.sums, rows, decay);
    }
}

/// Rows of a head, of a tensor in which the rows of all heads follow each other.
struct Source<'a, S> {
    x: &'a [S],
    stride: usize,
    width: usize,
    count: usize,
}

/// Rows of fp32 (C, wide), each `factor` long, and what made them 1 long.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn unit_rows<S: Stored>(source: Source<'_, S>, factor: f32, (out, wide): (&mut [f32], usize), scales: &mut [f32; C]) {
    for (i, out) in out.chunks_exact_mut(wide).enumerate() {
        if i >= source.count {
            out.fill(0.0);
            continue;
        }
        let x = &source.x[i * source.stride..][..source.width];
        scales[i] = 1.0 / (sum(x, |x| x * x) + EPS as f32).sqrt();
        let scale = scales[i] * factor;
        out.iter_mut().zip(x).for_each(|(out, x)| *out = x.wide() * scale);
    }
}

/// Rows of fp32 (C, H') of a value head, of `count` tokens from the document's token `first` on, times their factor; zeros after them.
pub(super) fn value_rows<S: Stored>(
    x: &[S],
    Place { shape, document, head }: Place<'_>,
    g: usize,
    (first, count): (usize, usize),
    factors: Option<&[f32; C]>,
    out: &mut [f32],
) {
    let stride = shape.key_heads * shape.group * shape.value;
    let from = (document.start + first) * stride + (head * shape.group + g) * shape.value;
    widened(Source { x: &x[from..], stride, width: shape.value, count }, factors, (out, shape.value_wide()));
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn widened<S: Stored>(source: Source<'_, S>, factors: Option<&[f32; C]>, (out, wide): (&mut [f32], usize)) {
    for (i, out) in out.chunks_exact_mut(wide).enumerate() {
        if i >= source.count {
            out.fill(0.0);
            continue;
        }
        let (x, factor) = (&source.x[i * source.stride..][..source.width], factors.map_or(1.0, |factors| factors[i]));
        out.iter_mut().zip(x).for_each(|(out, x)| *out = x.wide() * factor);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn exponentials(sums: &[f32; C], entering: &mut [f32; C], leaving: &mut [f32; C]) {
    let fused = target_cfg_f!(target_feature = "fma");
    for i in 0..C {
        entering[i] = exp(sums[i], fused);
        leaving[i] = exp(sums[C - 1] - sums[i], fused);
    }
}

/// Columns of row i that hold what is on and below the diagonal, in registers of [`LANES`]: where each begins.
#[inline(always)]
fn registers(i: usize) -> impl Iterator<Item = usize> {
    (0..=i).step_by(LANES)
}

/// Numbers of a register.
#[inline(always)]
fn lanes(x: &[f32], at: usize) -> &[f32; LANES] {
    x[at..at + LANES].try_into().expect("as many")
}

#[inline(always)]
fn lanes_mut(x: &mut [f32], at: usize) -> &mut [f32; LANES] {
    (&mut x[at..at + LANES]).try_into().expect("as many")
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn decays(sums: &[f32; C], rows: usize, decay: &mut [f32]) {
    let fused = target_cfg_f!(target_feature = "fma");
    for i in 0..rows {
        for from in registers(i) {
            let (before, decay) = (lanes(sums, from), lanes_mut(decay, i * C + from));
            for l in 0..LANES {
                let faded = exp(sums[i] - before[l], fused);
                decay[l] = if from + l <= i { faded } else { 0.0 };
            }
        }
    }
}

/// A and B (C, C), on and below the diagonal, of the products of keys with keys and queries with keys, D and b.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
pub(super) fn seen(keys: &Keys, decay: &[f32], beta: &[f32; C], system: &mut [f32], seen: &mut [f32]) {
    let [by_keys, by_queries] = &keys.products;
    for (i, beta) in beta.iter().enumerate().take(keys.rows) {
        for from in registers(i) {
            let at = i * C + from;
            let (decay, by_keys, by_queries) = (lanes(decay, at), lanes(by_keys, at), lanes(by_queries, at));
            let (system, seen) = (lanes_mut(system, at), lanes_mut(seen, at));
            for l in 0..LANES {
                seen[l] = by_queries[l] * decay[l];
                system[l] = if from + l < i { by_keys[l] * decay[l] * beta } else { 0.0 };
            }
        }
    }
}

/// The gradients within a chunk, of one value head.
pub(super) struct Within<'a> {
    pub(super) decay: &'a [f32],
    pub(super) beta: &'a [f32; C],
    /// dB, and -dA: (C, C), on and below the diagonal.
    pub(super) gradients: [&'a [f32]; 2],
}

/// Adds to the gradients of the products of keys with keys and queries with keys (C, C) and of the sums c; returns what tokens learn by:
/// of each b the gradient of A, negative.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
pub(super) fn within(
    keys: &Keys,
    within: &Within<'_>,
    [dkeys, dqueries]: [&mut [f32]; 2],
    dsums: &mut [f32; C],
) -> [f32; C] {
    let [by_keys, by_queries] = &keys.products;
    let [dseen, dsystem] = within.gradients;
    let (mut learning, mut columns) = ([0f32; C], [0f32; C]);
    for i in 0..keys.rows {
        let beta = within.beta[i];
        let (mut learned, mut row) = ([0f32; LANES], [0f32; LANES]);
        for from in registers(i) {
            let at = i * C + from;
            let (decay, by_keys, by_queries) = (lanes(within.decay, at), lanes(by_keys, at), lanes(by_queries, at));
            let (dseen, dsystem) = (lanes(dseen, at), lanes(dsystem, at));
            let (dkeys, dqueries) = (lanes_mut(dkeys, at), lanes_mut(dqueries, at));
            let columns = lanes_mut(&mut columns, from);
            for l in 0..LANES {
                let of_queries = dseen[l] * decay[l];
                let of_keys = if from + l < i { dsystem[l] * decay[l] } else { 0.0 };
                let through_keys = of_keys * by_keys[l];
                let through = of_queries * by_queries[l] - through_keys * beta;
                learned[l] += through_keys;
                row[l] += through;
                columns[l] += through;
                dqueries[l] += of_queries;
                dkeys[l] -= of_keys * beta;
            }
        }
        learning[i] = learned.iter().sum();
        dsums[i] += row.iter().sum::<f32>();
    }
    dsums.iter_mut().zip(&columns).for_each(|(dsum, column)| *dsum -= column);
    learning
}

/// Solves for U (C, H') of a chunk, from b V in its place and from the state (P', H') it begins with; `known` (C, H') is room.
pub(super) fn learn(
    keys: &Keys,
    (key, key_wide, value_wide): (usize, usize, usize),
    gates: &Gates,
    system: &[f32],
    state: Option<&[f32]>,
    learned: &mut [f32],
    known: &mut [f32],
) {
    if let Some(state) = state {
        let size = [keys.rows, value_wide, key];
        product(size, Part::Whole, Left::plain(&keys.k, key_wide), (state, value_wide), (known, value_wide), false);
        let factors: [f32; C] = std::array::from_fn(|i| -gates.beta[i] * gates.entering[i]);
        add_rows(known, &factors, (keys.rows, value_wide), learned);
    }
    solve([keys.rows, value_wide], (system, C), false, (learned, value_wide));
}

/// The state (P', H') after a chunk, in place of that before it times exp(c_C), or anew where `fresh`; `faded` (C, H') is room.
pub(super) fn write(
    keys: &Keys,
    (key_wide, value_wide): (usize, usize),
    gates: &Gates,
    learned: &[f32],
    state: &mut [f32],
    fresh: bool,
    faded: &mut [f32],
) {
    scale_rows(learned, &gates.leaving, (keys.rows, value_wide), faded);
    let (left, size) = (Left::turned(&keys.k, key_wide), [key_wide, value_wide, keys.rows]);
    product(size, Part::Whole, left, (faded, value_wide), (state, value_wide), !fresh);
}

/// Rows of x (rows, wide) times their factors.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
pub(super) fn scale_rows(x: &[f32], factors: &[f32; C], (rows, wide): (usize, usize), out: &mut [f32]) {
    for ((x, out), factor) in x.chunks_exact(wide).zip(out.chunks_exact_mut(wide)).zip(&factors[..rows]) {
        out.iter_mut().zip(x).for_each(|(out, x)| *out = x * factor);
    }
}

/// Adds rows of x (rows, wide) times their factors.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
pub(super) fn add_rows(x: &[f32], factors: &[f32; C], (rows, wide): (usize, usize), out: &mut [f32]) {
    for ((x, out), factor) in x.chunks_exact(wide).zip(out.chunks_exact_mut(wide)).zip(&factors[..rows]) {
        out.iter_mut().zip(x).for_each(|(out, x)| *out += x * factor);
    }
}

/// The products of rows of a (rows, wide) with those of b.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
pub(super) fn dot_rows(a: &[f32], b: &[f32], (rows, wide): (usize, usize)) -> [f32; C] {
    let mut dots = [0f32; C];
    for ((a, b), dot) in a.chunks_exact(wide).zip(b.chunks_exact(wide)).zip(&mut dots[..rows]) {
        *dot = cpu::dot(a, b, target_cfg_f!(target_feature = "fma"));
    }
    dots
}

/// x times a factor, in place.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
pub(super) fn scale(x: &mut [f32], factor: f32) {
    x.iter_mut().for_each(|x| *x *= factor);
}

/// The product of a with b, number by number, summed.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    cpu::dot(a, b, target_cfg_f!(target_feature = "fma"))
}

/// Rounds rows (count, width) of x, whose rows are `wide`, to rows `stride` apart.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
pub(super) fn rounded<S: Stored>(
    (x, wide): (&[f32], usize),
    (count, width): (usize, usize),
    factors: Option<&[f32; C]>,
    (out, stride): (&mut [S], usize),
) {
    for (i, x) in x.chunks_exact(wide).take(count).enumerate() {
        let factor = factors.map_or(1.0, |factors| factors[i]);
        out[i * stride..][..width].iter_mut().zip(x).for_each(|(out, x)| *out = S::rounded(x * factor));
    }
}

/// The states (G, P, H) of a group, as they are kept, in rows and columns filled up (P', H') each.
pub(super) fn unpack(kept: &[f32], (key, value): (usize, usize), (room, room_size, wide): (&mut [f32], usize, usize)) {
    for (kept, room) in kept.chunks_exact(key * value).zip(room.chunks_exact_mut(room_size)) {
        for (kept, room) in kept.chunks_exact(value).zip(room.chunks_exact_mut(wide)) {
            room[..value].copy_from_slice(kept);
        }
    }
}

/// The opposite of [`unpack`].
pub(super) fn pack(room: &[f32], room_size: usize, wide: usize, (key, value): (usize, usize), kept: &mut [f32]) {
    for (kept, room) in kept.chunks_exact_mut(key * value).zip(room.chunks_exact(room_size)) {
        for (kept, room) in kept.chunks_exact_mut(value).zip(room.chunks_exact(wide)) {
            kept.copy_from_slice(&room[..value]);
        }
    }
}
