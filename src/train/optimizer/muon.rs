//! Muon: momentum whose matrix is made orthogonal, so that all directions of it are learned equally fast.
//!
//! ```text
//! m  <- momentum m + (1 - momentum) g
//! u  = m, or with nesterov momentum m + (1 - momentum) g
//! O  = orthogonal(u): U V^T of u = U S V^T, about, by five steps of Newton and Schulz's iteration in bf16
//! p  <- p - lr * weight_decay * p
//! p  <- p - lr * a * O                           a = sqrt(max(1, rows / columns)), or 0.2 sqrt(max(rows, columns))
//! ```
//!
//! The reference is `torch.optim.Muon` of torch 2.11. It takes matrices; a stack of matrices, such as the experts of a block
//! have, is as many matrices here. What is neither is AdamW's.

use tch::{Kind, Tensor};

use super::{Rule, State, Update, decayed, each, zeros_like};
use crate::Result;
use crate::recipe::{AdjustLr, TrainingRecipe};
use crate::torch_ext::add_scaled;

/// Of the quintic polynomial a x + b x^3 + c x^5 that each step of the iteration takes of the singular values.
const COEFFICIENTS: (f64, f64, f64) = (3.4445, -4.775, 2.0315);
const ITERATIONS: usize = 5;
/// The least norm that is divided by.
const EPSILON: f64 = 1e-7;

/// Matrices and stacks of them.
pub(super) fn takes(shape: &[i64]) -> bool {
    matches!(shape.len(), 2 | 3)
}

pub(super) struct Muon {
    moments: Vec<Tensor>,
    momentum: f64,
    nesterov: bool,
    adjust_lr: AdjustLr,
    weight_decay: f64,
}

impl Muon {
    pub(super) fn new(parameters: &[Tensor], training: &TrainingRecipe) -> Self {
        Self {
            moments: zeros_like(parameters),
            momentum: training.momentum.unwrap_or(0.95),
            nesterov: training.nesterov.unwrap_or(true),
            adjust_lr: training.adjust_lr_fn.unwrap_or_default(),
            weight_decay: training.weight_decay,
        }
    }
}

impl Rule for Muon {
    fn update(&mut self, parameters: &[Tensor], update: &Update<'_>) -> Result<()> {
        let rate = update.learning_rate;
        for (index, (parameter, live)) in parameters.iter().zip(&self.moments).enumerate() {
            let gradient = update.gradient(index);
            let moment = live.lerp(&gradient, 1.0 - self.momentum);
            let direction =
                orthogonal(&if self.nesterov { gradient.lerp(&moment, self.momentum) } else { moment.shallow_clone() });
            let factor = factor(self.adjust_lr, &parameter.size());
            let decayed = decayed(parameter, rate, self.weight_decay);
            update.set(parameter, &add_scaled(&decayed, &direction, -rate * factor));
            update.set(live, &moment);
        }
        Ok(())
    }

    fn state(&self, _parameters: &[Tensor]) -> Vec<State> {
        each(["momentum_buffer"], [&self.moments])
    }
}

/// What the learning rate is multiplied by for a matrix, the last two dimensions of `shape`.
fn factor(adjust: AdjustLr, shape: &[i64]) -> f64 {
    let [.., rows, columns] = shape else { return 1.0 };
    let (rows, columns) = (*rows as f64, *columns as f64);
    match adjust {
        AdjustLr::Original => (rows / columns).max(1.0).sqrt(),
        AdjustLr::MatchRmsAdamw => 0.2 * rows.max(columns).sqrt(),
    }
}

/// The orthogonal matrix nearest to each of `matrices`, about: singular values come out between 0.7 and 1.2. bf16, shaped as they are.
fn orthogonal(matrices: &Tensor) -> Tensor {
    let (a, b, c) = COEFFICIENTS;
    let shape = matrices.size();
    let [rows, columns] = [shape[shape.len() - 2], shape[shape.len() - 1]];
    let tall = rows > columns;
    let mut x = matrices.to_kind(Kind::BFloat16).reshape([-1, rows, columns]); // (E, rows, columns)
    if tall {
        x = x.transpose(-2, -1).contiguous(); // (E, columns, rows)
    }
    x = &x / x.norm_scalaropt_dim(2.0, [-2i64, -1].as_slice(), true).clamp_min(EPSILON);
    for _ in 0..ITERATIONS {
        let gram = x.bmm(&x.transpose(-2, -1)); // (E, R, R), R the smaller of both
        let polynomial = gram.baddbmm(&gram, &gram, b, c);
        x = x.baddbmm(&polynomial, &x, a, 1.0);
    }
    if tall {
        x = x.transpose(-2, -1); // (E, rows, columns)
    }
    x.reshape(shape)
}
