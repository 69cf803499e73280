//! Products with fp8 numbers as they are, their inputs quantised row by row, too: `torch._scaled_mm`, where the device multiplies fp8.
//!
//! ```text
//! Y  = s_X s_W (X8 W8^T)                  X = s_X X8, a scale to each row; W = s_W W8 likewise
//! dX = s_G (G8 W8),  G = dY s_W = s_G G8  the scales of W lie along what is summed, so that they are in dY before it is quantised
//! ```
//!
//! The sums are fp32; another arithmetic than that of numbers made whole, by the three bits that a number of X or dY keeps.

use tch::{Device, Kind, Tensor};

use super::Fp8;
use crate::ops::cuda;

/// What both sizes of a matrix must be a multiple of for `torch._scaled_mm`.
const MULTIPLE: i64 = 16;

impl Fp8 {
    /// Whether [`Fp8::product`] can be made of it: a scale to each row of e4m3 numbers.
    pub fn has_rows(&self) -> bool {
        let columns = self.codes.size()[1];
        self.codes.kind() == Kind::Float8e4m3fn && self.block[0] == 1 && self.block[1] >= columns
    }

    /// `X W^T` (T, out) of X (T, in), in X's number type.
    pub fn product(&self, x: &Tensor) -> Tensor {
        let x8 = Self::of(x);
        scaled_product(&x8, &self.codes.tr(), &self.scales.tr()) // (T, out)
    }

    /// `dY W` (T, in) of dY (T, out), in dY's number type.
    pub fn product_back(&self, dy: &Tensor) -> Tensor {
        let scaled = dy.to_kind(Kind::Float) * self.scales.tr(); // (T, out)
        let dy8 = Self { kind: dy.kind(), ..Self::of(&scaled) };
        // The device multiplies with a matrix whose columns lie together.
        let columns = match cuda::multiplies_fp8(dy.device()) {
            true => self.codes.tr().contiguous().tr(),
            false => self.codes.shallow_clone(),
        };
        let ones = Tensor::ones([1, columns.size()[1]], (Kind::Float, dy.device()));
        scaled_product(&dy8, &columns, &ones) // (T, in)
    }
}

/// `s_L s_R (L8 R8)` (T, N) in the left's kind, of left codes (T, K) with their scales, right codes (K, N) and scales (1, N).
fn scaled_product(left: &Fp8, right: &Tensor, scales: &Tensor) -> Tensor {
    let (inner, columns) = right.size2().expect("(K, N)");
    let fits = inner % MULTIPLE == 0 && columns % MULTIPLE == 0 && left.kind == Kind::BFloat16;
    if fits && cuda::multiplies_fp8(left.codes.device()) {
        let scales = scales.contiguous();
        return left.codes.internal_scaled_mm(
            right,
            &left.scales,
            &scales,
            None::<Tensor>,
            None::<Tensor>,
            left.kind,
            false,
        );
    }
    scaled_plainly(left, right, scales)
}

/// [`scaled_product`] in products of fp32 numbers, for every device.
fn scaled_plainly(left: &Fp8, right: &Tensor, scales: &Tensor) -> Tensor {
    let products = left.codes.to_kind(Kind::Float).mm(&right.to_kind(Kind::Float)); // (T, N)
    (products * &left.scales * scales).to_kind(left.kind)
}

/// Whether products on a device are those of its own fp8 units, or made of fp32 numbers, slowly.
pub fn multiplies(device: Device) -> bool {
    cuda::multiplies_fp8(device)
}
