//! Gradient descent, with momentum where the recipe gives one; the reference is `torch.optim.SGD`.
//!
//! ```text
//! g  <- g + weight_decay * p                     not decoupled: the decay goes through the momentum
//! m  <- momentum m + g
//! p  <- p - lr * m                               with nesterov: p - lr * (g + momentum m)
//! ```

use tch::Tensor;

use super::{Rule, State, Update, each, zeros_like};
use crate::Result;
use crate::recipe::TrainingRecipe;
use crate::torch_ext::add_scaled;

fn momentum(training: &TrainingRecipe) -> f64 {
    training.momentum.unwrap_or(0.0)
}

/// Without momentum there is none.
pub(super) fn state_bytes(numbers: u64, training: &TrainingRecipe) -> u64 {
    if momentum(training) > 0.0 { 4 * numbers } else { 0 }
}

pub(super) struct Sgd {
    /// Empty without momentum.
    moments: Vec<Tensor>,
    momentum: f64,
    nesterov: bool,
    weight_decay: f64,
}

impl Sgd {
    pub(super) fn new(parameters: &[Tensor], training: &TrainingRecipe) -> Self {
        let momentum = momentum(training);
        Self {
            moments: if momentum > 0.0 { zeros_like(parameters) } else { Vec::new() },
            momentum,
            nesterov: training.nesterov.unwrap_or(false),
            weight_decay: training.weight_decay,
        }
    }
}

impl Rule for Sgd {
    fn update(&mut self, parameters: &[Tensor], update: &Update<'_>) -> Result<()> {
        for (index, parameter) in parameters.iter().enumerate() {
            let mut direction = add_scaled(&update.gradient(index), parameter, self.weight_decay);
            if let Some(live) = self.moments.get(index) {
                let moment = live * self.momentum + &direction;
                direction = match self.nesterov {
                    true => add_scaled(&direction, &moment, self.momentum),
                    false => moment.shallow_clone(),
                };
                update.set(live, &moment);
            }
            update.set(parameter, &add_scaled(parameter, &direction, -update.learning_rate));
        }
        Ok(())
    }

    fn state(&self, _parameters: &[Tensor]) -> Vec<State> {
        each(["momentum_buffer"], [&self.moments])
    }
}
