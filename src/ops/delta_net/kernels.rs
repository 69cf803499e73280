//! CPU kernels of the delta rule.

use tch::Tensor;

/// `(I + A)^-1` of lower triangular A (..., C, C) with zeros on its diagonal.
pub(super) fn inverse(system: &Tensor) -> Tensor {
    let size = system.size()[3];
    let one = Tensor::eye(size, (system.kind(), system.device()));
    system.linalg_solve_triangular(&one.expand(system.size().as_slice(), false), false, true, true)
}
