//! What is read from several copies of the stream and written to them, a token at a time: its copies stay in the nearest cache.

use multiversion::multiversion;
use multiversion::target::target_cfg_f;
use tch::Tensor;

use super::{LANES, Stored, dot, multiply_add};
use crate::torch_ext::{elements, filled, filled_pair, filled_pair_worth};

/// Tokens handled together: what all share is read once for all of them, and their sums stay in registers, of which backward has
/// enough for half as many where they are half as wide.
const TOKENS: usize = 8;
const HALF: usize = TOKENS / 2;

/// Columns of a tile.
const COLUMNS: usize = 32;

/// `sum_m pre_m h_m` (T, D) of h (T, M, D) and pre (T, M), fp32.
pub(in crate::ops) fn read(h: &Tensor, pre: &Tensor) -> Tensor {
    by_kind!(h.kind(), read_of(h, pre))
}

/// `post_m y + sum_k mix[k, m] h_k` (T, M, D) of h (T, M, D), y (T, D), post (T, M) and mix (T, M, M), both fp32.
pub(in crate::ops) fn spread(h: &Tensor, y: &Tensor, post: &Tensor, mix: &Tensor) -> Tensor {
    by_kind!(h.kind(), spread_of(h, y, post, mix))
}

/// dh (T, M, D), dy (T, D), dpost (T, M) and dmix (T, M, M), both fp32, of [`spread`].
pub(in crate::ops) fn spread_backward(
    grad: &Tensor,
    h: &Tensor,
    y: &Tensor,
    post: &Tensor,
    mix: &Tensor,
) -> [Tensor; 4] {
    by_kind!(h.kind(), spread_backward_of(grad, h, y, post, mix))
}

/// `dx . h_m` (T, M), fp32, of dx (T, D) and h (T, M, D).
pub(in crate::ops) fn products_with_copies(dx: &Tensor, h: &Tensor) -> Tensor {
    by_kind!(h.kind(), products_of(dx, h))
}

/// The products of each token's copies h (T, M, D), as one row, with those of `function` (n, M D), fp32: (T, n), and the row's sum of
/// squares (T, 1); both fp32.
pub(in crate::ops) fn mapped(h: &Tensor, function: &Tensor) -> (Tensor, Tensor) {
    by_kind!(h.kind(), mapped_of(h, function))
}

/// The gradient of what is read of a token's copies by weights that a map makes.
pub(in crate::ops) struct ReadGradient<'a> {
    /// (T, n), fp32, of `function` (n, M D), fp32.
    pub weights: &'a Tensor,
    pub function: &'a Tensor,
    /// Of the copies themselves: (T, 1), fp32.
    pub factor: &'a Tensor,
    /// (T, M), fp32.
    pub pre: &'a Tensor,
}

/// `weights function + factor h + pre_m dx + more` (T, M, D) of h and, if given, `more` (T, M, D), and dx (T, D).
pub(in crate::ops) fn read_gradient(of: &ReadGradient<'_>, h: &Tensor, dx: &Tensor, more: Option<&Tensor>) -> Tensor {
    by_kind!(h.kind(), read_gradient_of(of, h, dx, more))
}

/// T, M, D.
fn sizes(h: &Tensor) -> (i64, usize, usize) {
    let (tokens, copies, width) = h.size3().expect("(T, M, D)");
    (tokens, copies as usize, width as usize)
}

fn read_of<S: Stored>(h: &Tensor, pre: &Tensor) -> Tensor {
    let (tokens, copies, d) = sizes(h);
    let (h, pre) = (elements::<S>(h), elements::<f32>(pre));
    filled::<S>(&[tokens, d as i64], |range, out| {
        let h = &h[range.start * copies * d..range.end * copies * d];
        weighted_rows(h, &pre[range.start * copies..range.end * copies], (copies, d), out);
    })
}

/// Rows of `sum_m w_m h_m`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn weighted_rows<S: Stored>(h: &[S], weights: &[f32], (copies, d): (usize, usize), out: &mut [S]) {
    let mut sums = vec![0f32; d];
    let tokens = h.chunks_exact(copies * d).zip(weights.chunks_exact(copies)).zip(out.chunks_exact_mut(d));
    for ((h, weights), out) in tokens {
        sums.fill(0.0);
        for (h, weight) in h.chunks_exact(d).zip(weights) {
            (0..d).for_each(|i| sums[i] += h[i].wide() * weight);
        }
        (0..d).for_each(|i| out[i] = S::rounded(sums[i]));
    }
}

fn spread_of<S: Stored>(h: &Tensor, y: &Tensor, post: &Tensor, mix: &Tensor) -> Tensor {
    let (shape, (_, copies, d)) = (h.size(), sizes(h));
    let (h, y) = (elements::<S>(h), elements::<S>(y));
    let (post, mix) = (elements::<f32>(post), elements::<f32>(mix));
    filled::<S>(&shape, |range, out| {
        let of = |width: usize| range.start * width..range.end * width;
        let weights = (&post[of(copies)], &mix[of(copies * copies)]);
        spread_rows(&h[of(copies * d)], &y[of(d)], weights, (copies, d), out);
    })
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn spread_rows<S: Stored>(h: &[S], y: &[S], (post, mix): (&[f32], &[f32]), (copies, d): (usize, usize), out: &mut [S]) {
    let mut sums = vec![0f32; d];
    let tokens = h.chunks_exact(copies * d).zip(y.chunks_exact(d)).zip(out.chunks_exact_mut(copies * d));
    let weights = post.chunks_exact(copies).zip(mix.chunks_exact(copies * copies));
    for (((h, y), out), (post, mix)) in tokens.zip(weights) {
        for (m, out) in out.chunks_exact_mut(d).enumerate() {
            (0..d).for_each(|i| sums[i] = y[i].wide() * post[m]);
            for (k, h) in h.chunks_exact(d).enumerate() {
                let weight = mix[k * copies + m];
                (0..d).for_each(|i| sums[i] += h[i].wide() * weight);
            }
            (0..d).for_each(|i| out[i] = S::rounded(sums[i]));
        }
    }
}

fn spread_backward_of<S: Stored>(grad: &Tensor, h: &Tensor, y: &Tensor, post: &Tensor, mix: &Tensor) -> [Tensor; 4] {
    let (shape, (tokens, copies, d)) = (h.size(), sizes(h));
    let (grad, h, y) = (elements::<S>(grad), elements::<S>(h), elements::<S>(y));
    let (post, mix) = (elements::<f32>(post), elements::<f32>(mix));
    let [dh, dy] = filled_pair::<S, S>(&shape, &[tokens, d as i64], |range, dh, dy| {
        // Both read the gradient while it is near.
        let blocks = dh.chunks_mut(TOKENS * copies * d).zip(dy.chunks_mut(TOKENS * d));
        for (first, (dh, dy)) in range.clone().step_by(TOKENS).zip(blocks) {
            let end = range.end.min(first + TOKENS);
            let of = |width: usize| first * width..end * width;
            let grad = &grad[of(copies * d)];
            weighted_rows(grad, &post[of(copies)], (copies, d), dy);
            mixed_back(grad, &mix[of(copies * copies)], (copies, d), dh);
        }
    });
    let m = copies as i64;
    let work = copies * (copies + 1) * d;
    let [dpost, dmix] = filled_pair_worth::<f32, f32>(&[tokens, m], &[tokens, m, m], work, |range, dpost, dmix| {
        let blocks = dpost.chunks_mut(TOKENS * copies).zip(dmix.chunks_mut(TOKENS * copies * copies));
        for (first, (dpost, dmix)) in range.clone().step_by(TOKENS).zip(blocks) {
            let end = range.end.min(first + TOKENS);
            let of = |width: usize| first * width..end * width;
            let grad = &grad[of(copies * d)];
            dots(&y[of(d)], grad, (1, copies, d), dpost);
            dots(&h[of(copies * d)], grad, (copies, copies, d), dmix);
        }
    });
    [dh, dy, dpost, dmix]
}

/// Rows of `dh_k = sum_m mix[k, m] grad_m`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn mixed_back<S: Stored>(grad: &[S], mix: &[f32], (copies, d): (usize, usize), dh: &mut [S]) {
    let mut sums = vec![0f32; d];
    let tokens = grad.chunks_exact(copies * d).zip(mix.chunks_exact(copies * copies));
    for ((grad, mix), dh) in tokens.zip(dh.chunks_exact_mut(copies * d)) {
        for (mix, dh) in mix.chunks_exact(copies).zip(dh.chunks_exact_mut(d)) {
            sums.fill(0.0);
            for (grad, weight) in grad.chunks_exact(d).zip(mix) {
                (0..d).for_each(|i| sums[i] += grad[i].wide() * weight);
            }
            (0..d).for_each(|i| dh[i] = S::rounded(sums[i]));
        }
    }
}

/// Of every token the products (left, right) of its `left` rows of a with its `right` rows of b.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn dots<S: Stored>(a: &[S], b: &[S], (left, right, d): (usize, usize, usize), out: &mut [f32]) {
    let fused = target_cfg_f!(target_feature = "fma");
    let tokens = a.chunks_exact(left * d).zip(b.chunks_exact(right * d)).zip(out.chunks_exact_mut(left * right));
    for ((a, b), out) in tokens {
        match (left, right) {
            (4, 4) => dots_of_token::<S, 4, 4>(a, b, d, out, fused),
            (1, 4) => dots_of_token::<S, 1, 4>(a, b, d, out, fused),
            _ => {
                for (a, out) in a.chunks_exact(d).zip(out.chunks_exact_mut(right)) {
                    for (b, out) in b.chunks_exact(d).zip(out) {
                        *out = dot(a, b, fused);
                    }
                }
            }
        }
    }
}

/// The products of L rows with R rows: each number is made wide once, and all sums stay in registers.
#[inline(always)]
fn dots_of_token<S: Stored, const L: usize, const R: usize>(a: &[S], b: &[S], d: usize, out: &mut [f32], fused: bool) {
    let a: [&[S]; L] = std::array::from_fn(|row| &a[row * d..][..d]);
    let b: [&[S]; R] = std::array::from_fn(|row| &b[row * d..][..d]);
    let mut sums = [[[0f32; LANES]; R]; L];
    let whole = d - d % LANES;
    let wide = |row: &[S], at: usize| -> [f32; LANES] {
        let row: &[S; LANES] = row[at..][..LANES].try_into().expect("as many lanes");
        std::array::from_fn(|lane| row[lane].wide())
    };
    for at in (0..whole).step_by(LANES) {
        let b: [[f32; LANES]; R] = std::array::from_fn(|row| wide(b[row], at));
        for (a, sums) in a.iter().zip(&mut sums) {
            let a = wide(a, at);
            for (b, sums) in b.iter().zip(sums) {
                (0..LANES).for_each(|lane| sums[lane] = multiply_add(fused, a[lane], b[lane], sums[lane]));
            }
        }
    }
    for (row, (a, out)) in a.iter().zip(out.chunks_exact_mut(R)).enumerate() {
        for (column, (b, out)) in b.iter().zip(out).enumerate() {
            let rest: f32 = (whole..d).map(|at| a[at].wide() * b[at].wide()).sum();
            *out = sums[row][column].iter().sum::<f32>() + rest;
        }
    }
}

fn mapped_of<S: Stored>(h: &Tensor, function: &Tensor) -> (Tensor, Tensor) {
    let (tokens, copies, d) = sizes(h);
    let (width, numbers) = (copies * d, function.size()[0]);
    let function = Function::of(elements::<f32>(function), width);
    let (h, n, work) = (elements::<S>(h), numbers as usize, width * (numbers as usize + 2));
    let [products, squares] =
        filled_pair_worth::<f32, f32>(&[tokens, numbers], &[tokens, 1], work, |range, products, squares| {
            mapped_rows(&h[range.start * width..range.end * width], &function, (width, n), products, squares);
        });
    (products, squares)
}

/// The transpose of a function (n, width) in tiles of columns, zeros where there are no more.
struct Function {
    /// Sixteen rows at a time: (n / 16, width, 16).
    whole: Vec<[f32; LANES]>,
    /// Those left, eight at a time, as half a register holds them: (0 to 2, width, 8).
    rest: Vec<[f32; LANES / 2]>,
}

impl Function {
    fn of(function: &[f32], width: usize) -> Self {
        let n = function.len() / width;
        let whole = n - n % LANES;
        let (first, rest) = function.split_at(whole * width);
        Self { whole: side_by_side(first, width), rest: side_by_side(rest, width) }
    }
}

fn side_by_side<const W: usize>(function: &[f32], width: usize) -> Vec<[f32; W]> {
    let n = function.len() / width;
    let mut columns = vec![[0f32; W]; n.div_ceil(W) * width];
    for (row, function) in function.chunks_exact(width).enumerate() {
        let columns = &mut columns[row / W * width..][..width];
        columns.iter_mut().zip(function).for_each(|(column, value)| column[row % W] = *value);
    }
    columns
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn mapped_rows<S: Stored>(
    h: &[S],
    function: &Function,
    (width, n): (usize, usize),
    products: &mut [f32],
    squares: &mut [f32],
) {
    let fused = target_cfg_f!(target_feature = "fma");
    let mut rows = vec![0f32; TOKENS * width];
    let tokens = h.chunks(TOKENS * width).zip(products.chunks_mut(TOKENS * n)).zip(squares.chunks_mut(TOKENS));
    for ((h, products), squares) in tokens {
        rows.iter_mut().zip(h).for_each(|(wide, h)| *wide = h.wide());
        tiles(&rows, &function.whole, (width, n, 0), products, fused);
        tiles(&rows, &function.rest, (width, n, n - n % LANES), products, fused);
        for (row, square) in rows.chunks_exact(width).zip(squares) {
            *square = dot(row, row, fused);
        }
    }
}

/// The products of [`TOKENS`] rows with tiles of columns, the first of which is the function's column `from`.
#[inline(always)]
fn tiles<const W: usize>(
    rows: &[f32],
    columns: &[[f32; W]],
    (width, n, from): (usize, usize, usize),
    products: &mut [f32],
    fused: bool,
) {
    for (i, columns) in columns.chunks_exact(width).enumerate() {
        let sums = products_of_tile(rows, columns, fused);
        let at = from + i * W;
        let count = W.min(n - at);
        for (products, sums) in products.chunks_exact_mut(n).zip(&sums) {
            products[at..][..count].copy_from_slice(&sums[..count]);
        }
    }
}

/// The products of [`TOKENS`] rows with a tile of columns: all sums stay in registers.
#[inline(always)]
fn products_of_tile<const W: usize>(rows: &[f32], columns: &[[f32; W]], fused: bool) -> [[f32; W]; TOKENS] {
    let width = columns.len();
    let rows: [&[f32]; TOKENS] = std::array::from_fn(|row| &rows[row * width..][..width]);
    let mut sums = [[0f32; W]; TOKENS];
    for (at, column) in columns.iter().enumerate() {
        for (row, sums) in rows.iter().zip(&mut sums) {
            let value = row[at];
            for (sum, column) in sums.iter_mut().zip(column) {
                *sum = multiply_add(fused, value, *column, *sum);
            }
        }
    }
    sums
}

fn products_of<S: Stored>(dx: &Tensor, h: &Tensor) -> Tensor {
    let (tokens, copies, d) = sizes(h);
    let (dx, h) = (elements::<S>(dx), elements::<S>(h));
    let [products, _] = filled_pair_worth::<f32, f32>(&[tokens, copies as i64], &[0], copies * d, |range, out, _| {
        let of = |width: usize| range.start * width..range.end * width;
        dots(&dx[of(d)], &h[of(copies * d)], (1, copies, d), out);
    });
    products
}

fn read_gradient_of<S: Stored>(of: &ReadGradient<'_>, h: &Tensor, dx: &Tensor, more: Option<&Tensor>) -> Tensor {
    let (shape, (_, copies, d)) = (h.size(), sizes(h));
    let n = of.function.size()[0] as usize;
    let function = (in_tiles(elements::<f32>(of.function), (copies, d)), n);
    let [weights, factor, pre] = [of.weights, of.factor, of.pre].map(elements::<f32>);
    let (h, dx, more) = (elements::<S>(h), elements::<S>(dx), more.map(elements::<S>));
    filled::<S>(&shape, |range, out| {
        for (first, out) in range.clone().step_by(TOKENS).zip(out.chunks_mut(TOKENS * copies * d)) {
            let tokens = TOKENS.min(range.end - first);
            let of = |width: usize| first * width..(first + tokens) * width;
            let taken = Taken {
                weights: &weights[of(function.1)],
                factor: &factor[of(1)],
                pre: &pre[of(copies)],
                h: &h[of(copies * d)],
                dx: &dx[of(d)],
                more: more.map(|more| &more[of(copies * d)]),
            };
            read_rows_back(&taken, &function.0, (copies, d), out);
        }
    })
}

/// A function (n, M D) in the order in which [`read_tile_back`] goes through it: of each tile of columns all rows, one after the other.
fn in_tiles(function: &[f32], (copies, d): (usize, usize)) -> Vec<f32> {
    let width = copies * d;
    let whole = d - d % COLUMNS;
    let mut tiles = Vec::with_capacity(function.len());
    for copy in 0..copies {
        let mut tile = |at: usize, columns: usize| {
            function.chunks_exact(width).for_each(|row| tiles.extend_from_slice(&row[copy * d + at..][..columns]));
        };
        (0..whole).step_by(COLUMNS).for_each(|at| tile(at, COLUMNS));
        (whole..d).for_each(|at| tile(at, 1));
    }
    tiles
}

/// What the gradients of some tokens' copies are made of.
struct Taken<'a, S> {
    weights: &'a [f32],
    factor: &'a [f32],
    pre: &'a [f32],
    h: &'a [S],
    dx: &'a [S],
    more: Option<&'a [S]>,
}

/// Of at most [`TOKENS`] tokens.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn read_rows_back<S: Stored>(taken: &Taken<'_, S>, function: &[f32], size: (usize, usize), out: &mut [S]) {
    let fused = target_cfg_f!(target_feature = "fma");
    let wide = target_cfg_f!(target_feature = "avx512f");
    let (tokens, mut first) = (taken.factor.len(), 0);
    while first < tokens {
        match tokens - first {
            TOKENS if wide => {
                read_tiles_back::<S, TOKENS>(taken, first, function, size, out, fused);
                first += TOKENS;
            }
            HALF.. => {
                read_tiles_back::<S, HALF>(taken, first, function, size, out, fused);
                first += HALF;
            }
            _ => {
                read_tiles_back::<S, 1>(taken, first, function, size, out, fused);
                first += 1;
            }
        }
    }
}

/// Of the R tokens from `first` on.
#[inline(always)]
fn read_tiles_back<S: Stored, const R: usize>(
    taken: &Taken<'_, S>,
    first: usize,
    function: &[f32],
    (copies, d): (usize, usize),
    out: &mut [S],
    fused: bool,
) {
    let whole = d - d % COLUMNS;
    for copy in 0..copies {
        for at in (0..whole).step_by(COLUMNS) {
            read_tile_back::<S, R, COLUMNS>(taken, first, function, (copies, d), (copy, at), out, fused);
        }
        for at in whole..d {
            read_tile_back::<S, R, 1>(taken, first, function, (copies, d), (copy, at), out, fused);
        }
    }
}

/// N columns from `at` on of a copy: their sums stay in registers through all rows of the function.
#[inline(always)]
fn read_tile_back<S: Stored, const R: usize, const N: usize>(
    taken: &Taken<'_, S>,
    first: usize,
    function: &[f32],
    (copies, d): (usize, usize),
    (copy, at): (usize, usize),
    out: &mut [S],
    fused: bool,
) {
    let width = copies * d;
    let n = function.len() / width;
    let place = |row: usize| row * width + copy * d + at;
    let weights: [&[f32]; R] = std::array::from_fn(|row| &taken.weights[(first + row) * n..][..n]);
    let mut sums = [[0f32; N]; R];
    for (row, sums) in sums.iter_mut().enumerate() {
        let token = first + row;
        let (factor, pre) = (taken.factor[token], taken.pre[token * copies + copy]);
        let h: &[S; N] = taken.h[place(token)..][..N].try_into().expect("N columns");
        let dx: &[S; N] = taken.dx[token * d + at..][..N].try_into().expect("N columns");
        (0..N).for_each(|i| sums[i] = multiply_add(fused, h[i].wide(), factor, dx[i].wide() * pre));
        if let Some(more) = taken.more {
            let more: &[S; N] = more[place(token)..][..N].try_into().expect("N columns");
            (0..N).for_each(|i| sums[i] += more[i].wide());
        }
    }
    let tile = &function[(copy * d + at) * n..][..n * N];
    for (p, function) in tile.chunks_exact(N).enumerate() {
        let function: &[f32; N] = function.try_into().expect("N columns");
        for (weights, sums) in weights.iter().zip(&mut sums) {
            let weight = weights[p];
            (0..N).for_each(|i| sums[i] = multiply_add(fused, function[i], weight, sums[i]));
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        let out: &mut [S; N] = (&mut out[place(first + row)..][..N]).try_into().expect("N columns");
        (0..N).for_each(|i| out[i] = S::rounded(sums[i]));
    }
}
