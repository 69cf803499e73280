//! Experts against every expert over all tokens.

use tch::{Device, Kind};

use super::*;
use crate::ops::LowRank;
use crate::ops::testing::{check, randn};
use crate::quant::Weight;

const T: i64 = 29;
const D: i64 = 12;
const F: i64 = 10;
const E: i64 = 5;
const C: i64 = 2;
const RANK: i64 = 4;

/// Experts 0 to 3: the last one has no row.
fn chosen() -> Tensor {
    let pairs: Vec<i64> = (0..T).flat_map(|t| [t % 3, (t % 3 + 1 + t % 2) % 4]).collect();
    Tensor::from_slice(&pairs).view([T, C])
}

/// Shapes (out, in) of the banks, down last.
fn shapes(fused: bool) -> Vec<(i64, i64)> {
    if fused { vec![(2 * F, D), (D, F)] } else { vec![(F, D), (F, D), (D, F)] }
}

fn weight(i: usize, (rows, columns): (i64, i64), kind: Kind) -> Tensor {
    (randn(&[E, rows, columns], 10 + i as u64) * 0.3).to_kind(kind)
}

fn bias(i: usize, rows: i64, kind: Kind) -> Tensor {
    randn(&[E, rows], 20 + i as u64).to_kind(kind)
}

/// Leaves: X, weights of the router, the residual, then A and B of each bank.
fn leaves(fused: bool) -> Vec<Tensor> {
    let mut leaves = vec![randn(&[T, D], 1), randn(&[T, C], 2).abs() + 0.1, randn(&[T, D], 3)];
    for (i, (rows, columns)) in shapes(fused).into_iter().enumerate() {
        leaves.push(randn(&[E, RANK, columns], 30 + i as u64) * 0.3);
        leaves.push(randn(&[E, rows, RANK], 40 + i as u64) * 0.3);
    }
    leaves
}

/// Every expert over all tokens, under plain autograd; then the chosen ones are picked.
fn twin(kind: Kind, x: &[Tensor], input: Fusion, weighted: Weighted, biased: bool) -> Tensor {
    let fused = !matches!(input, Fusion::Separate);
    let linear = |i: usize, e: i64, rows: &Tensor| {
        let shape = shapes(fused)[i];
        let y = rows.matmul(&weight(i, shape, kind).select(0, e).tr());
        let low = rows.matmul(&x[3 + 2 * i].select(0, e).tr()).matmul(&x[4 + 2 * i].select(0, e).tr()) * 1.5;
        let y = y + low;
        if biased { y + bias(i, shape.0, kind).select(0, e) } else { y }
    };
    let mut sum = x[2].shallow_clone();
    for (e, c) in (0..E).flat_map(|e| (0..C).map(move |c| (e, c))) {
        let here = chosen().select(1, c).eq(e).to_kind(kind).unsqueeze(1); // (T, 1)
        let weights = x[1].select(1, c).unsqueeze(1);
        let rows = if weighted == Weighted::Input { &x[0] * &weights } else { x[0].shallow_clone() };
        let (gate, up) = match input {
            Fusion::Separate => (linear(0, e, &rows), linear(1, e, &rows)),
            Fusion::Halves => {
                let both = linear(0, e, &rows);
                (both.narrow(1, 0, F), both.narrow(1, F, F))
            }
            Fusion::Interleaved => {
                let both = linear(0, e, &rows).view([T, F, 2]);
                (both.select(2, 0), both.select(2, 1))
            }
        };
        let y = linear(shapes(fused).len() - 1, e, &(gate.silu() * up));
        let y = if weighted == Weighted::Output { y * &weights } else { y };
        sum = y * here + sum;
    }
    sum
}

fn compare(input: Fusion, weighted: Weighted, biased: bool) {
    let fused = !matches!(input, Fusion::Separate);
    check(
        &leaves(fused),
        |kind, x| {
            let low_ranks: Vec<LowRank> = (0..shapes(fused).len())
                .map(|i| LowRank {
                    a: x[3 + 2 * i].to_kind(Kind::Float),
                    b: x[4 + 2 * i].to_kind(Kind::Float),
                    scale: 1.5,
                    dropout: 0.0,
                    magnitude: None,
                })
                .collect();
            let tensors: Vec<(Weight, Tensor)> = shapes(fused)
                .into_iter()
                .enumerate()
                .map(|(i, shape)| (Weight::from(weight(i, shape, kind)), bias(i, shape.0, kind)))
                .collect();
            let operand = |i: usize| Operand {
                weight: &tensors[i].0,
                trained: None,
                bias: biased.then_some(&tensors[i].1),
                low_rank: Some(&low_ranks[i]),
                dropout_seed: None,
            };
            let all = Experts {
                activation: Activation::Silu,
                input: match input {
                    Fusion::Separate => ExpertInput::Separate([operand(0), operand(1)]),
                    Fusion::Halves => ExpertInput::Fused { operand: operand(0), interleaved: false },
                    Fusion::Interleaved => ExpertInput::Fused { operand: operand(0), interleaved: true },
                },
                down: operand(tensors.len() - 1),
                weighted,
            };
            vec![experts(&x[0], &chosen(), &x[1].to_kind(Kind::Float), &all, Some(&x[2]))]
        },
        |kind, x| vec![twin(kind, x, input, weighted, biased)],
    );
}

#[test]
fn equal_every_expert_over_all_tokens_with_the_chosen_ones_picked() {
    for input in [Fusion::Separate, Fusion::Halves, Fusion::Interleaved] {
        for weighted in [Weighted::Output, Weighted::Input] {
            for biased in [false, true] {
                compare(input, weighted, biased);
            }
        }
    }
}

#[test]
fn dropped_rows_are_the_same_in_backward() {
    // With a probability of dropping, gradients by differences must still fit.
    let weights = [0, 1].map(|i| Weight::from(weight(i, (F, D), Kind::Double)));
    let low = |x: &[Tensor], dropout| LowRank {
        a: x[0].shallow_clone(),
        b: x[1].shallow_clone(),
        scale: 0.7,
        dropout,
        magnitude: None,
    };
    let value = |x: &[Tensor]| {
        // Of the two, one alone drops.
        let lows = [low(&x[1..], 0.4), low(&x[3..], 0.0)];
        let operand = |i: usize| Operand {
            weight: &weights[i],
            trained: None,
            bias: None,
            low_rank: Some(&lows[i]),
            dropout_seed: Some(9 + i as u64),
        };
        let bank = Bank::of(&[operand(0), operand(1)]);
        let sorted = Sorted::new(&chosen(), E, (Kind::Double, Device::Cpu));
        let (ys, u) = bank.forward(&x[0], &sorted);
        let dys = [ys[0].ones_like(), ys[1].full_like(2.0)];
        let (dx, du) = bank.backward(&dys, &sorted);
        let mut grads = vec![dx];
        grads.extend(bank.factors(&x[0], u.as_ref(), &dys, du.as_ref(), &sorted));
        let sum = |y: &Tensor| y.sum(Kind::Double).double_value(&[]);
        (sum(&ys[0]) + 2.0 * sum(&ys[1]), grads)
    };
    let double = |shape: &[i64], seed| randn(shape, seed).to_kind(Kind::Double);
    let factors =
        [double(&[E, RANK, D], 2), double(&[E, F, RANK], 3), double(&[E, RANK, D], 4), double(&[E, F, RANK], 5)];
    let x: Vec<Tensor> = std::iter::once(double(&[T * C, D], 1)).chain(factors).collect();
    let (_, grads) = value(&x);
    for (i, at) in [(0, 17), (1, 5), (2, 40), (3, 6), (4, 33)] {
        let moved = |step: f64| {
            let mut copies: Vec<Tensor> = x.iter().map(Tensor::copy).collect();
            let flat = copies[i].view([-1]);
            let _ = flat.narrow(0, at, 1).g_add_scalar_(step);
            copies[i] = flat.view(x[i].size().as_slice());
            value(&copies).0
        };
        let slope = (moved(1e-4) - moved(-1e-4)) / 2e-4;
        let found = grads[i].view([-1]).double_value(&[at]);
        assert!(
            (slope - found).abs() < 1e-4 * slope.abs().max(1.0),
            "{i}: {slope} by differences, {found} by backward"
        );
    }
}
