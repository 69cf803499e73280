//! What the tests of the operations share: an operation against its slow twin, values and gradients, full tensors.

use tch::{Device, Kind, Tensor};

use super::cpu::tests::without_kernels;
use super::cuda::emulator::emulated;
use crate::torch_ext::uniform;

/// Roughly normal fp32 values from a seed.
pub(crate) fn randn(shape: &[i64], seed: u64) -> Tensor {
    let like = Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    (0..4)
        .map(|i| uniform(&like, -1.0, 1.0, seed * 4 + i))
        .fold(Tensor::zeros(shape, (Kind::Float, Device::Cpu)), |sum, u| sum + u)
        * 0.9
}

thread_local! {
    static OFF: std::cell::Cell<&'static str> = const { std::cell::Cell::new("") };
}

/// Runs `body` with the operations of one source file, `norm.rs` say, by their plain twins.
pub(crate) fn without<T>(file: &'static str, body: impl FnOnce() -> T) -> T {
    OFF.set(file);
    let result = body();
    OFF.set("");
    result
}

/// Whether the operation that asks at `place` is to run by its plain twin.
pub(super) fn is_off(place: &std::panic::Location<'_>) -> bool {
    let file = OFF.get();
    !file.is_empty() && place.file().ends_with(file)
}

/// A row this much smaller than the largest value is judged by that share of it: sums that cancel leave rounding behind.
const SMALL_ROW: f64 = 0.1;

/// Largest absolute difference, relative to the largest magnitude of `expected`: of all, and of the worst row (along the last
/// dimension) relative to its own. Late rows of a long document are small, and being wrong there must not drown in the first ones.
fn differences(found: &Tensor, expected: &Tensor) -> (f64, f64) {
    assert_eq!(found.size(), expected.size(), "shapes");
    if expected.numel() == 0 {
        return (0.0, 0.0);
    }
    let width = expected.size().last().copied().unwrap_or(1);
    let rows = |t: &Tensor| t.to_kind(Kind::Double).reshape([-1, width]);
    let (found, expected) = (rows(found), rows(expected));
    let largest = expected.abs().max().double_value(&[]).max(1e-30);
    let own = expected.abs().amax([1i64].as_slice(), false).clamp_min(largest * SMALL_ROW); // (rows)
    let off = (found - expected).abs().amax([1i64].as_slice(), false); // (rows)
    (off.max().double_value(&[]) / largest, (off / own).max().double_value(&[]))
}

/// Checks `op` against `twin` in fp32 (1e-5) and in bf16 (against the twin in fp32: 3e-2, and 8e-2 of a row's own size), outputs
/// and input gradients, with the CPU kernels, with the compositions that serve other devices, and with the CUDA kernels, emulated.
///
/// Both get leaves with gradient in the given number type and return tensors; the loss is a fixed weighting of them.
pub(crate) fn check(
    inputs: &[Tensor],
    op: impl Fn(Kind, &[Tensor]) -> Vec<Tensor>,
    twin: impl Fn(Kind, &[Tensor]) -> Vec<Tensor>,
) {
    let run = |kind: Kind, f: &dyn Fn(Kind, &[Tensor]) -> Vec<Tensor>| {
        let leaves: Vec<Tensor> = inputs.iter().map(|x| x.to_kind(kind).copy().set_requires_grad(true)).collect();
        let outputs = f(kind, &leaves);
        let loss = outputs
            .iter()
            .enumerate()
            .map(|(i, y)| (y.to_kind(Kind::Float) * randn(&y.size(), 100 + i as u64)).sum(Kind::Float))
            .fold(Tensor::from(0f32), |sum, l| sum + l);
        loss.backward();
        let gradients: Vec<Tensor> = leaves.iter().map(Tensor::grad).collect();
        (outputs, gradients)
    };
    let expected = run(Kind::Float, &twin);
    let (exact, rounded) = ((Kind::Float, (1e-5, 3e-5)), (Kind::BFloat16, (3e-2, 8e-2)));
    let ways = ["CPU kernels", "compositions", "CUDA kernels"];
    for ((kind, tolerance), way) in ways.into_iter().flat_map(|way| [(exact, way), (rounded, way)]) {
        let found = match way {
            "CPU kernels" => run(kind, &op),
            "compositions" => without_kernels(|| run(kind, &op)),
            _ => emulated(|| run(kind, &op)),
        };
        assert_eq!(found.0.len(), expected.0.len());
        let close = |what: &str, i: usize, found: &Tensor, expected: &Tensor| {
            let (all, row) = differences(found, expected);
            let good = all < tolerance.0 && row < tolerance.1;
            assert!(good, "{what} {i} in {kind:?} ({way}) is off by {all:e}, its worst row by {row:e}");
        };
        for (i, (f, e)) in found.0.iter().zip(&expected.0).enumerate() {
            close("output", i, f, e);
        }
        for (i, (f, e)) in found.1.iter().zip(&expected.1).enumerate() {
            assert!(f.defined(), "gradient {i} in {kind:?} is missing");
            close("gradient", i, f, e);
        }
    }
}
