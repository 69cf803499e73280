//! Schedule-free AdamW (arXiv:2405.15682): instead of a falling learning rate, an average x of where the steps z have been.
//!
//! Gradients are taken at y, between the two; what is evaluated, saved and merged is x. The parameters hold y, and x is made of
//! y and z when it is asked for.
//!
//! ```text
//! v  <- beta2 v + (1 - beta2) g^2                at y = (1 - beta1) z + beta1 x
//! d  = g / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * y
//! c  = w / sum of all w so far                   w = (the largest lr so far)^2
//! z  <- z - lr * d
//! x  <- (1 - c) x + c z
//! ```
//!
//! The reference is the paper's own package, schedulefree 1.4.1.

use tch::{Kind, Tensor, no_grad};

use super::{Rule, State, Update, betas, each, zeros_like};
use crate::Result;
use crate::recipe::TrainingRecipe;
use crate::torch_ext::add_scaled;

pub(super) struct ScheduleFreeAdamW {
    /// z.
    steps: Vec<Tensor>,
    second_moments: Vec<Tensor>,
    /// The sum of all w: an fp64 scalar on the device, as a skipped update leaves it.
    weight_sum: Tensor,
    /// The largest learning rate so far, likewise.
    largest_rate: Tensor,
    betas: (f64, f64),
    epsilon: f64,
    weight_decay: f64,
}

impl ScheduleFreeAdamW {
    pub(super) fn new(parameters: &[Tensor], training: &TrainingRecipe) -> Self {
        let scalar = || Tensor::zeros([], (Kind::Double, parameters[0].device()));
        Self {
            steps: parameters.iter().map(|parameter| no_grad(|| parameter.detach().copy())).collect(),
            second_moments: zeros_like(parameters),
            weight_sum: scalar(),
            largest_rate: scalar(),
            betas: betas(training),
            epsilon: training.adam_epsilon,
            weight_decay: training.weight_decay,
        }
    }
}

impl Rule for ScheduleFreeAdamW {
    fn update(&mut self, parameters: &[Tensor], update: &Update<'_>) -> Result<()> {
        let (beta1, beta2) = self.betas;
        let rate = update.learning_rate;
        let filled = update.filled(beta2);
        let largest = self.largest_rate.clamp_min(rate);
        let weight = largest.square();
        let sum = &self.weight_sum + &weight;
        // As long as the learning rate has been 0, there is nothing to average.
        let part = (&weight / &sum).where_self(&sum.greater(0.0), &weight.zeros_like());
        let along = (1.0 - &part) * (rate * beta1) - rate;
        let part = part.to_kind(Kind::Float);
        for (index, parameter) in parameters.iter().enumerate() {
            let gradient = update.gradient(index);
            let (live, live_second) = (&self.steps[index], &self.second_moments[index]);
            let second = (live_second * beta2).addcmul(&(&gradient * (1.0 - beta2)), &gradient);
            let change = gradient / ((&second / &filled).sqrt() + self.epsilon);
            let change = add_scaled(&change, parameter, self.weight_decay);
            let moved = parameter.lerp_tensor(live, &part) + &change * &along;
            let step = add_scaled(live, &change, -rate);
            update.set(parameter, &moved);
            update.set(live, &step);
            update.set(live_second, &second);
        }
        update.set(&self.weight_sum, &sum);
        update.set(&self.largest_rate, &largest);
        Ok(())
    }

    /// With y, so that a saved state holds it beside x, which is saved as the adapter.
    fn state(&self, parameters: &[Tensor]) -> Vec<State> {
        let whole = |name, tensor: &Tensor| State { of: None, name, tensor: tensor.shallow_clone() };
        let mut states = each(["y", "z", "exp_avg_sq"], [parameters, &self.steps, &self.second_moments]);
        states.extend([whole("weight_sum", &self.weight_sum), whole("largest_rate", &self.largest_rate)]);
        states
    }

    /// x, from y = (1 - beta1) z + beta1 x.
    fn evaluated(&self, parameters: &[Tensor]) -> Option<Vec<Tensor>> {
        let back = 1.0 - 1.0 / self.betas.0;
        Some(parameters.iter().zip(&self.steps).map(|(y, z)| y.lerp(z, back)).collect())
    }
}
