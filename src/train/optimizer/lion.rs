//! Lion (arXiv:2302.06675): the sign of a momentum, so that every number moves equally far; one moment of state.
//!
//! ```text
//! p  <- p - lr * weight_decay * p
//! p  <- p - lr * sign(beta1 m + (1 - beta1) g)
//! m  <- beta2 m + (1 - beta2) g
//! ```
//!
//! The reference is bitsandbytes 0.50.2's `Lion` in 32 bits, which is the paper's.

use tch::Tensor;

use super::{Rule, State, Update, averaged, betas, decayed, each, zeros_like};
use crate::Result;
use crate::recipe::TrainingRecipe;
use crate::torch_ext::add_scaled;

pub(super) struct Lion {
    moments: Vec<Tensor>,
    betas: (f64, f64),
    weight_decay: f64,
}

impl Lion {
    pub(super) fn new(parameters: &[Tensor], training: &TrainingRecipe) -> Self {
        Self { moments: zeros_like(parameters), betas: betas(training), weight_decay: training.weight_decay }
    }
}

impl Rule for Lion {
    fn update(&mut self, parameters: &[Tensor], update: &Update<'_>) -> Result<()> {
        let (beta1, beta2) = self.betas;
        for (index, (parameter, moment)) in parameters.iter().zip(&self.moments).enumerate() {
            let gradient = update.gradient(index);
            let direction = averaged(moment, beta1, &gradient).sign();
            let decayed = decayed(parameter, update.learning_rate, self.weight_decay);
            update.set(parameter, &add_scaled(&decayed, &direction, -update.learning_rate));
            update.set(moment, &averaged(moment, beta2, &gradient));
        }
        Ok(())
    }

    fn state(&self, _parameters: &[Tensor]) -> Vec<State> {
        each(["exp_avg"], [&self.moments])
    }
}
