//! From what a map gives of a token's copies to the weights by which they are read and written, and back: sixteen tokens side by side,
//! whose numbers stay in the nearest cache through all rounds that normalise their matrices.

use multiversion::multiversion;
use multiversion::target::target_cfg_f;
use tch::Tensor;

use super::{LANES, exp, multiply_add, sigmoid};
use crate::torch_ext::{elements, filled_beside};

/// How a map's numbers become weights.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Rules<'a> {
    /// (n), fp32: each number's own factor, and what is added to it.
    pub scale: &'a Tensor,
    pub base: &'a Tensor,
    /// M; there are M + M + M M numbers.
    pub copies: usize,
    /// M D, of which the squares were summed.
    pub width: usize,
    /// Added to the mean square.
    pub eps: f64,
    /// Added to weights.
    pub floor: f64,
    /// How often the columns of the mixing matrix are normalised.
    pub rounds: i64,
}

/// The weights to read with (T, M), to write with (T, M) and to mix with (T, M, M), of products (T, n) with the map and the sums of
/// squares (T, 1); all fp32.
pub(in crate::ops) fn weights(products: &Tensor, squares: &Tensor, rules: Rules<'_>) -> [Tensor; 3] {
    let (tokens, m) = (products.size()[0], rules.copies as i64);
    let (known, n) = (Known::new(rules), rules.numbers());
    let (products, squares) = (elements::<f32>(products), elements::<f32>(squares));
    let shapes: [&[i64]; 3] = [&[tokens, m], &[tokens, m], &[tokens, m, m]];
    filled_beside(shapes, &[0], |range, outputs: [&mut [f32]; 3], _: &mut [f32]| {
        weights_rows(&products[range.start * n..range.end * n], &squares[range], &known, outputs);
    })
    .0
}

/// What the gradient of the copies is made of: weights (T, n) of the map's rows and the factor (T, 1) of the copies themselves, from
/// the gradients of what [`weights`] gave; all fp32.
pub(in crate::ops) fn weights_backward(
    gradients: [&Tensor; 3],
    products: &Tensor,
    squares: &Tensor,
    rules: Rules<'_>,
) -> [Tensor; 2] {
    let (tokens, m) = (products.size()[0], rules.copies);
    let (known, n) = (Known::new(rules), rules.numbers());
    let (products, squares) = (elements::<f32>(products), elements::<f32>(squares));
    let [dpre, dpost, dmix] = gradients.map(elements::<f32>);
    filled_beside([&[tokens, n as i64], &[tokens, 1]], &[0], |range, outputs: [&mut [f32]; 2], _: &mut [f32]| {
        let of = |width: usize| range.start * width..range.end * width;
        let gradients = [&dpre[of(m)], &dpost[of(m)], &dmix[of(m * m)]];
        weights_rows_back(gradients, &products[of(n)], &squares[range.clone()], &known, outputs);
    })
    .0
}

impl Rules<'_> {
    fn numbers(&self) -> usize {
        self.copies * (self.copies + 2)
    }
}

/// [`Rules`], read.
struct Known<'a> {
    scale: &'a [f32],
    base: &'a [f32],
    m: usize,
    width: f32,
    eps: f32,
    floor: f32,
    /// Divisions of the mixing matrix: columns and rows in turn, columns first and last.
    divisions: usize,
}

impl<'a> Known<'a> {
    fn new(rules: Rules<'a>) -> Self {
        let (scale, base) = (elements::<f32>(rules.scale), elements::<f32>(rules.base));
        assert!(scale.len() == rules.numbers() && base.len() == rules.numbers(), "reading, writing and mixing");
        Self {
            scale,
            base,
            m: rules.copies,
            width: rules.width as f32,
            eps: rules.eps as f32,
            floor: rules.floor as f32,
            divisions: 2 * rules.rounds as usize - 1,
        }
    }
}

/// A number of each of sixteen tokens.
type Lanes = [f32; LANES];

const ZEROS: Lanes = [0.0; LANES];

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn weights_rows(products: &[f32], squares: &[f32], known: &Known<'_>, [pre, post, mix]: [&mut [f32]; 3]) {
    let (fused, m, n) = (target_cfg_f!(target_feature = "fma"), known.m, known.scale.len());
    let (mut numbers, mut inverses) = (vec![ZEROS; n], vec![ZEROS; m]);
    for (i, squares) in squares.chunks(LANES).enumerate() {
        let (first, count) = (i * LANES, squares.len());
        side_by_side(&products[first * n..(first + count) * n], &mut numbers);
        let _ = scaled(&mut numbers, squares, known, fused);
        for a in &mut numbers[..m] {
            *a = a.map(|a| sigmoid(a, fused) + known.floor);
        }
        for b in &mut numbers[m..2 * m] {
            *b = b.map(|b| 2.0 * sigmoid(b, fused));
        }
        softmax(&mut numbers[2 * m..], m, fused);
        for c in &mut numbers[2 * m..] {
            *c = c.map(|c| c + known.floor);
        }
        for division in 0..known.divisions {
            divided(&mut numbers[2 * m..], m, division, known.floor, &mut inverses);
        }
        let of = |width: usize| first * width..(first + count) * width;
        one_after_the_other(&numbers[..m], &mut pre[of(m)]);
        one_after_the_other(&numbers[m..2 * m], &mut post[of(m)]);
        one_after_the_other(&numbers[2 * m..], &mut mix[of(m * m)]);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn weights_rows_back(
    [dpre, dpost, dmix]: [&[f32]; 3],
    products: &[f32],
    squares: &[f32],
    known: &Known<'_>,
    [weights, factors]: [&mut [f32]; 2],
) {
    let (fused, m, n) = (target_cfg_f!(target_feature = "fma"), known.m, known.scale.len());
    let square = m * m;
    let (mut plain, mut numbers, mut gradients) = (vec![ZEROS; n], vec![ZEROS; n], vec![ZEROS; n]);
    // The matrix after every division, the softmax first, and what each divided by.
    let mut after = vec![ZEROS; (known.divisions + 1) * square];
    let mut inverses = vec![ZEROS; known.divisions * m];
    for (i, squares) in squares.chunks(LANES).enumerate() {
        let (first, count) = (i * LANES, squares.len());
        let of = |width: usize| first * width..(first + count) * width;
        side_by_side(&products[of(n)], &mut plain);
        numbers.copy_from_slice(&plain);
        let inverse = scaled(&mut numbers, squares, known, fused);
        side_by_side(&dpre[of(m)], &mut gradients[..m]);
        side_by_side(&dpost[of(m)], &mut gradients[m..2 * m]);
        side_by_side(&dmix[of(square)], &mut gradients[2 * m..]);
        for (i, (gradient, number)) in gradients[..2 * m].iter_mut().zip(&numbers).enumerate() {
            let most = if i < m { 1.0 } else { 2.0 };
            for (gradient, number) in gradient.iter_mut().zip(number) {
                let s = sigmoid(*number, fused);
                *gradient *= most * s * (1.0 - s);
            }
        }
        softmax(&mut numbers[2 * m..], m, fused);
        after[..square].copy_from_slice(&numbers[2 * m..]);
        for c in &mut numbers[2 * m..] {
            *c = c.map(|c| c + known.floor);
        }
        for division in 0..known.divisions {
            divided(&mut numbers[2 * m..], m, division, known.floor, &mut inverses[division * m..][..m]);
            after[(division + 1) * square..][..square].copy_from_slice(&numbers[2 * m..]);
        }
        let dmix = &mut gradients[2 * m..];
        for division in (0..known.divisions).rev() {
            let after = &after[(division + 1) * square..][..square];
            divided_back(dmix, after, m, division, Some(&inverses[division * m..][..m]));
        }
        // A softmax over each row: divided by its sum, and grown by what it is.
        divided_back(dmix, &after[..square], m, 1, None);
        dmix.iter_mut().zip(&after).for_each(|(d, after)| d.iter_mut().zip(after).for_each(|(d, after)| *d *= after));

        // With z the products and r = 1 / rms: r scale dn of the map, -(r^3 / (M D)) (scale dn . z) of the copies.
        let mut along = ZEROS;
        for ((gradient, plain), scale) in gradients.iter_mut().zip(&plain).zip(known.scale) {
            for lane in 0..LANES {
                let scaled = gradient[lane] * scale;
                along[lane] = multiply_add(fused, scaled, plain[lane], along[lane]);
                gradient[lane] = scaled * inverse[lane];
            }
        }
        one_after_the_other(&gradients, &mut weights[of(n)]);
        for (lane, factor) in factors[first..first + count].iter_mut().enumerate() {
            *factor = -along[lane] * inverse[lane].powi(3) / known.width;
        }
    }
}

/// Rows of at most sixteen tokens turned: each number of all tokens; zeros of those that there are not.
#[inline(always)]
fn side_by_side(rows: &[f32], numbers: &mut [Lanes]) {
    let n = numbers.len();
    if rows.len() < n * LANES {
        numbers.fill(ZEROS);
    }
    for (lane, row) in rows.chunks_exact(n).enumerate() {
        for (number, value) in numbers.iter_mut().zip(row) {
            number[lane] = *value;
        }
    }
}

/// The opposite of [`side_by_side`].
#[inline(always)]
fn one_after_the_other(numbers: &[Lanes], rows: &mut [f32]) {
    for (lane, row) in rows.chunks_exact_mut(numbers.len()).enumerate() {
        for (number, value) in numbers.iter().zip(row) {
            *value = number[lane];
        }
    }
}

/// Makes `scale x / rms + base` of products x; 1 / rms.
#[inline(always)]
fn scaled(numbers: &mut [Lanes], squares: &[f32], known: &Known<'_>, fused: bool) -> Lanes {
    let mut inverse = ZEROS;
    inverse[..squares.len()].copy_from_slice(squares);
    let inverse = inverse.map(|squares| 1.0 / (squares / known.width + known.eps).sqrt());
    for ((number, scale), base) in numbers.iter_mut().zip(known.scale).zip(known.base) {
        for (number, inverse) in number.iter_mut().zip(&inverse) {
            *number = multiply_add(fused, *number * inverse, *scale, *base);
        }
    }
    inverse
}

/// The softmax of every row of matrices (M, M).
#[inline(always)]
fn softmax(matrix: &mut [Lanes], m: usize, fused: bool) {
    for row in matrix.chunks_exact_mut(m) {
        let mut largest = row[0];
        for other in &row[1..] {
            (0..LANES).for_each(|lane| largest[lane] = largest[lane].max(other[lane]));
        }
        let mut sum = ZEROS;
        for value in row.iter_mut() {
            for lane in 0..LANES {
                value[lane] = exp(value[lane] - largest[lane], fused);
                sum[lane] += value[lane];
            }
        }
        let inverse = sum.map(|sum| 1.0 / sum);
        for value in row {
            (0..LANES).for_each(|lane| value[lane] *= inverse[lane]);
        }
    }
}

/// Where the elements of line `line` of a matrix (M, M) are: first, and how far apart. Even divisions are of columns.
#[inline(always)]
fn line_of(division: usize, line: usize, m: usize) -> (usize, usize) {
    if division.is_multiple_of(2) { (line, m) } else { (line * m, 1) }
}

/// Divides every column, or row, by its sum plus the floor; what each was multiplied with.
#[inline(always)]
fn divided(matrix: &mut [Lanes], m: usize, division: usize, floor: f32, inverses: &mut [Lanes]) {
    for (line, inverse) in inverses.iter_mut().enumerate() {
        let (first, apart) = line_of(division, line, m);
        let mut sum = [floor; LANES];
        for i in 0..m {
            let value = &matrix[first + i * apart];
            (0..LANES).for_each(|lane| sum[lane] += value[lane]);
        }
        *inverse = sum.map(|sum| 1.0 / sum);
        for i in 0..m {
            let value = &mut matrix[first + i * apart];
            (0..LANES).for_each(|lane| value[lane] *= inverse[lane]);
        }
    }
}

/// The gradient before a division of columns, or rows, from that after it and from what it gave: y = x / (sum x + floor), so
/// `dx = (dy - sum(dy y)) / (sum x + floor)`; not divided without inverses.
#[inline(always)]
fn divided_back(gradient: &mut [Lanes], after: &[Lanes], m: usize, division: usize, inverses: Option<&[Lanes]>) {
    for line in 0..m {
        let (first, apart) = line_of(division, line, m);
        let mut along = ZEROS;
        for i in 0..m {
            let (d, y) = (&gradient[first + i * apart], &after[first + i * apart]);
            (0..LANES).for_each(|lane| along[lane] += d[lane] * y[lane]);
        }
        let inverse = inverses.map_or([1.0; LANES], |inverses| inverses[line]);
        for i in 0..m {
            let d = &mut gradient[first + i * apart];
            (0..LANES).for_each(|lane| d[lane] = (d[lane] - along[lane]) * inverse[lane]);
        }
    }
}
