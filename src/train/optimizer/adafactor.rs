//! Adafactor (arXiv:1804.04235): of the second moment only the means of rows and columns are kept.
//!
//! ```text
//! b  = 1 - t^-0.8
//! R  <- b R + (1 - b) mean over columns of (g^2 + 1e-30)       C likewise, over rows
//! u  = g / sqrt(R C / mean R)                                  vectors keep V itself: u = g / sqrt(V)
//! p  <- p - lr * weight_decay * p
//! p  <- p - lr * u / max(1, rms(u))
//! ```
//!
//! The reference is transformers 5.17's `Adafactor` as its Trainer makes it (`scale_parameter=False, relative_step=False`): the
//! learning rate is the recipe's. Scaled by the size of the parameter, B, which starts at zero, would hardly move.

use tch::{Kind, Tensor};

use super::{Rule, State, Update, decayed};
use crate::Result;
use crate::recipe::TrainingRecipe;

const DECAY_RATE: f64 = -0.8;
/// Added to the squared gradient.
const EPSILON: f64 = 1e-30;
/// The largest root mean square of an update.
const CLIP_THRESHOLD: f64 = 1.0;

/// Fp32 means of rows and columns, or as many numbers as a vector has.
pub(super) fn state_bytes(shape: &[i64]) -> u64 {
    let numbers: i64 = shape_of_factors(shape).iter().map(|factor| factor.iter().product::<i64>()).sum();
    4 * numbers as u64
}

/// The shapes of what is kept: (.., rows) and (.., columns), or the vector's own.
fn shape_of_factors(shape: &[i64]) -> Vec<Vec<i64>> {
    match shape {
        [stack @ .., rows, columns] => [rows, columns].map(|last| [stack, &[*last]].concat()).to_vec(),
        vector => vec![vector.to_vec()],
    }
}

pub(super) struct Adafactor {
    /// Of each parameter its row and column means, or the second moment of a vector.
    factors: Vec<Vec<Tensor>>,
    weight_decay: f64,
}

impl Adafactor {
    pub(super) fn new(parameters: &[Tensor], training: &TrainingRecipe) -> Self {
        let factors = |p: &Tensor| {
            let shapes = shape_of_factors(&p.size()).into_iter();
            shapes.map(|shape| Tensor::zeros(shape, (Kind::Float, p.device()))).collect()
        };
        Self { factors: parameters.iter().map(factors).collect(), weight_decay: training.weight_decay }
    }
}

impl Rule for Adafactor {
    fn update(&mut self, parameters: &[Tensor], update: &Update<'_>) -> Result<()> {
        let rate = update.learning_rate;
        let new = update.number().pow_tensor_scalar(DECAY_RATE);
        let old = 1.0 - &new;
        for (index, parameter) in parameters.iter().enumerate() {
            let gradient = update.gradient(index);
            let square = gradient.square() + EPSILON;
            let moved = |live: &Tensor, value: Tensor| live * &old + value * &new;
            let mean = |dim: i64| square.mean_dim([dim].as_slice(), false, Kind::Float);
            let (scale, moved) = match &self.factors[index][..] {
                [row, column] => {
                    let (row, column) = (moved(row, mean(-1)), moved(column, mean(-2)));
                    let across = (&row / row.mean_dim([-1i64].as_slice(), true, Kind::Float)).rsqrt().unsqueeze(-1);
                    (across * column.unsqueeze(-2).rsqrt(), vec![row, column])
                }
                factors => {
                    let second = moved(&factors[0], square.shallow_clone());
                    (second.rsqrt(), vec![second])
                }
            };
            let change = scale * &gradient;
            let rms = change.norm() / (change.numel() as f64).sqrt();
            let change = change / (rms / CLIP_THRESHOLD).clamp_min(1.0) * rate;
            update.set(parameter, &(decayed(parameter, rate, self.weight_decay) - change));
            self.factors[index].iter().zip(&moved).for_each(|(live, new)| update.set(live, new));
        }
        Ok(())
    }

    fn state(&self, _parameters: &[Tensor]) -> Vec<State> {
        let of = |(index, factors): (usize, &Vec<Tensor>)| {
            let names: &[&str] =
                if factors.len() == 2 { &["exp_avg_sq_row", "exp_avg_sq_col"] } else { &["exp_avg_sq"] };
            let named = names.iter().zip(factors);
            let states = named.map(|(name, tensor)| State { of: Some(index), name, tensor: tensor.shallow_clone() });
            states.collect::<Vec<_>>()
        };
        self.factors.iter().enumerate().flat_map(of).collect()
    }
}
