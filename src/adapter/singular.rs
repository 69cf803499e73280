//! What comes nearest to a matrix at a rank: its largest singular values and their vectors. Eckart and Young (1936): no matrix of that
//! rank is nearer.
//!
//! In f64: of a matrix from the eigenvectors of the smaller of `M M^T` and `M^T M`, which is as exact as a decomposition of M in fp32 and
//! takes a fraction of its time; of a product of thin factors from these alone, which takes next to none.

use tch::{Kind, Tensor};

/// Numbers that are made wider at a time.
const CHUNK: i64 = 1 << 21;

/// The R largest singular values of a matrix (out, in), where it has so many, and their vectors; f64.
#[derive(Debug)]
pub(super) struct Largest {
    /// (out, R)
    left: Tensor,
    /// (R), the largest first.
    values: Tensor,
    /// (R, in)
    right: Tensor,
    /// The squares of all singular values, summed.
    pub all: f64,
    /// Those of the values that were left out.
    pub missed: f64,
}

impl Largest {
    /// Of a matrix (out, in), which may lie either way; memory beside it is that of the smaller square, and buffers.
    ///
    /// Panics as libtorch does, where its numbers are not finite.
    pub fn of(matrix: &Tensor, r: i64) -> Self {
        let (out, columns) = (matrix.size()[0], matrix.size()[1]);
        let wide = out <= columns;
        // The matrix as (side, long), a part of it at a time.
        let lying = if wide { matrix.shallow_clone() } else { matrix.tr() };
        let (side, long) = (out.min(columns), out.max(columns));
        let step = (CHUNK / side.max(1)).clamp(1, long.max(1));
        let parts = || (0..long).step_by(step as usize).map(move |first| (first, step.min(long - first)));
        let part = |(first, length): (i64, i64)| lying.narrow(1, first, length).to_kind(Kind::Double); // (side, length)
        let options = (Kind::Double, matrix.device());
        let mut square = Tensor::zeros([side, side], options);
        for place in parts() {
            let part = part(place);
            let _ = square.addmm_(&part, &part.tr());
        }
        let (squares, vectors) = square.linalg_eigh("L"); // ascending
        drop(square);
        let r = r.min(side);
        let kept = vectors.narrow(1, side - r, r).flip([1]); // (side, R)
        let squares = squares.clamp_min(0.0);
        let values = squares.narrow(0, side - r, r).flip([0]).sqrt();
        // Its transpose times them is the singular values times the vectors of the other side.
        let other = Tensor::empty([r, long], options);
        for place in parts() {
            other.narrow(1, place.0, place.1).copy_(&kept.tr().mm(&part(place)));
        }
        let other = other * inverse(&values).unsqueeze(1); // (R, long)
        let sum = |values: &Tensor| values.sum(Kind::Double).double_value(&[]);
        let (all, missed) = (sum(&squares), sum(&squares.narrow(0, 0, side - r)));
        match wide {
            true => Self { left: kept, values, right: other, all, missed },
            false => Self { left: other.tr(), values, right: kept.tr(), all, missed },
        }
    }

    /// Of the product of B (out, R') and A (R', in).
    pub fn of_product(b: &Tensor, a: &Tensor, r: i64) -> Self {
        let (left, from_left) = Tensor::linalg_qr(&b.to_kind(Kind::Double), "reduced"); // (out, K), (K, R')
        let (right, from_right) = Tensor::linalg_qr(&a.to_kind(Kind::Double).tr(), "reduced"); // (in, L), (L, R')
        let (u, values, v) = from_left.mm(&from_right.tr()).svd(true, true); // of (K, L)
        let found = values.size()[0];
        let r = r.min(found);
        let squares = values.square();
        let sum = |values: &Tensor| values.sum(Kind::Double).double_value(&[]);
        Self {
            left: left.mm(&u.narrow(1, 0, r)),
            values: values.narrow(0, 0, r),
            right: right.mm(&v.narrow(1, 0, r)).tr(),
            all: sum(&squares),
            missed: sum(&squares.narrow(0, r, found - r)),
        }
    }

    /// A (R, in) and B (out, R) whose product comes nearest, fp32, both of the same length.
    pub fn even(&self) -> (Tensor, Tensor) {
        let roots = self.values.sqrt();
        (plain(&(&self.right * roots.unsqueeze(1))), plain(&(&self.left * roots)))
    }

    /// The same, A's rows of length 1.
    pub fn in_b(&self) -> (Tensor, Tensor) {
        (plain(&self.right), plain(&(&self.left * &self.values)))
    }
}

/// Where there is nothing, there is nothing to be divided by: 0.
fn inverse(values: &Tensor) -> Tensor {
    values.reciprocal().where_self(&values.gt(0.0), &values.zeros_like())
}

fn plain(factor: &Tensor) -> Tensor {
    factor.to_kind(Kind::Float).contiguous()
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn normal(shape: [i64; 2]) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu))
    }

    fn squares(tensor: &Tensor) -> f64 {
        tensor.square().sum(Kind::Double).double_value(&[])
    }

    /// What is missed are the singular values that are left out.
    #[test]
    fn of_a_lower_rank_what_is_missed_are_the_smaller_singular_values() {
        tch::manual_seed(3);
        let near = |found: f64, expected: f64, whole: f64, what: &str| {
            assert!((found - expected).abs() < 1e-5 * whole, "{what}: {found} and {expected}");
        };
        for shape in [[9i64, 14], [14, 9], [3, CHUNK / 2], [CHUNK / 2, 3]] {
            let matrix = normal(shape);
            let side = shape[0].min(shape[1]);
            // A matrix that lies the other way is the same matrix.
            for matrix in [matrix.shallow_clone(), matrix.tr().contiguous().tr()] {
                let (_, values, _) = matrix.to_kind(Kind::Double).svd(true, true);
                for r in [1i64, 2, side] {
                    let found = Largest::of(&matrix, r);
                    let expected = squares(&values.narrow(0, r, side - r));
                    near(found.all, squares(&matrix), squares(&matrix), "all");
                    near(found.missed, expected, squares(&matrix), "missed");
                    for (a, b) in [found.even(), found.in_b()] {
                        assert_eq!((a.size(), b.size()), (vec![r, shape[1]], vec![shape[0], r]));
                        near(squares(&(&matrix - b.mm(&a))), expected, squares(&matrix), "of the factors");
                    }
                    let (a, b) = found.even();
                    near(squares(&a), squares(&b), squares(&a), "lengths");
                }
            }
        }
        let (a, b) = Largest::of(&Tensor::zeros([4, 5], (Kind::Float, Device::Cpu)), 2).even();
        assert_eq!(squares(&a) + squares(&b), 0.0);
    }

    #[test]
    fn of_factors_it_is_what_it_is_of_their_product() {
        tch::manual_seed(4);
        for (out, inner, columns) in [(20, 5, 30), (30, 5, 20), (4, 9, 12), (12, 9, 4), (6, 6, 6)] {
            let (b, a) = (normal([out, inner]), normal([inner, columns]));
            let product = b.mm(&a);
            for r in [1, 3, 9] {
                let (found, expected) = (Largest::of_product(&b, &a, r), Largest::of(&product, r));
                let r = r.min(out).min(columns);
                let [(a, b), (expected_a, expected_b)] = [found.in_b(), expected.in_b()];
                // Beyond the inner size there are only zeros, which need not be there.
                assert!(a.size()[0] <= r && a.size()[0] >= r.min(inner), "{:?}", a.size());
                let off = squares(&(b.mm(&a) - expected_b.mm(&expected_a)));
                assert!(off < 1e-9 * squares(&product), "({out}, {inner}, {columns}) at {r}: {off}");
                assert!((found.missed - expected.missed).abs() < 1e-6 * found.all, "{found:?} {expected:?}");
            }
        }
    }
}
