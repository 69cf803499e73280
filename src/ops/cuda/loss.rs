//! Cross-entropy of logits and its gradient, by `loss.cu`; shapes are those of `ops::cross_entropy`.

use tch::{Kind, Tensor};

use super::launch::{Argument, launch};

/// Each row's loss (C, 1), fp32, and the gradient (C, V), of `kind`, of `scale` times it, of products (C, V), of that kind or fp32, and
/// targets (C) i64. Products times `factor` are logits, or `cap tanh(logit / cap)` of that.
pub(crate) fn softmax_cross_entropy(
    products: &Tensor,
    targets: &Tensor,
    (factor, cap): (f64, Option<f64>),
    scale: f64,
    kind: Kind,
) -> (Tensor, Tensor) {
    let (rows, width) = products.size2().expect("(C, V)");
    assert!(targets.kind() == Kind::Int64 && targets.device() == products.device(), "targets beside products");
    assert!(targets.numel() as i64 == rows && width < 1 << 31, "a target of every row");
    let losses = Tensor::empty([rows, 1], (Kind::Float, products.device()));
    let gradient = Tensor::empty([rows, width], (kind, products.device()));
    let kernel = if products.kind() == kind { "cross_entropy" } else { "cross_entropy_of_fp32" };
    assert!(products.kind() == kind || products.kind() == Kind::Float, "products of the gradient's kind, or in fp32");
    let map = [factor, cap.unwrap_or(0.0)].map(|number| (number as f32).to_bits());
    let arguments = [
        products.into(),
        targets.into(),
        Argument::Words(map.to_vec()),
        Argument::Float(scale as f32),
        Argument::Int(width as i32),
        (&losses).into(),
        (&gradient).into(),
    ];
    // SAFETY: what `cross_entropy` takes, a block for each row; sizes as just asserted.
    unsafe { launch(products.device(), kernel, kind, rows, &arguments) };
    (losses, gradient)
}
