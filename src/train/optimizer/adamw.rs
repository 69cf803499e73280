//! AdamW (arXiv:1711.05101): libtorch's fused kernel over all parameters at once, unscaling, clipping and skipping inside.
//!
//! ```text
//! p  <- p - lr * weight_decay * p
//! m  <- beta1 m + (1 - beta1) g                  v <- beta2 v + (1 - beta2) g^2
//! p  <- p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
//! ```

use tch::Tensor;

use super::{Rule, State, Update, betas, each, zeros_like};
use crate::Result;
use crate::recipe::TrainingRecipe;
use crate::torch_ext::{self, fused_adamw_};

pub(super) struct AdamW {
    first_moments: Vec<Tensor>,
    second_moments: Vec<Tensor>,
    betas: (f64, f64),
    epsilon: f64,
    weight_decay: f64,
}

impl AdamW {
    pub(super) fn new(parameters: &[Tensor], training: &TrainingRecipe) -> Self {
        Self {
            first_moments: zeros_like(parameters),
            second_moments: zeros_like(parameters),
            betas: betas(training),
            epsilon: training.adam_epsilon,
            weight_decay: training.weight_decay,
        }
    }
}

impl Rule for AdamW {
    fn update(&mut self, parameters: &[Tensor], update: &Update<'_>) -> Result<()> {
        let steps: Vec<Tensor> = parameters.iter().map(|_| update.step.shallow_clone()).collect();
        let settings = torch_ext::AdamW {
            learning_rate: update.learning_rate,
            beta1: self.betas.0,
            beta2: self.betas.1,
            weight_decay: self.weight_decay,
            epsilon: self.epsilon,
        };
        let guard = Some((update.divisor, update.skip));
        fused_adamw_(parameters, update.gradients, &self.first_moments, &self.second_moments, &steps, settings, guard)
    }

    fn state(&self, _parameters: &[Tensor]) -> Vec<State> {
        each(["exp_avg", "exp_avg_sq"], [&self.first_moments, &self.second_moments])
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    /// AdamW in plain operations: what the fused kernel must equal.
    fn slow_twin(
        [parameters, gradients, first_moments, second_moments]: [&[Tensor]; 4],
        step: f64,
        settings: torch_ext::AdamW,
        divisor: f64,
    ) {
        let torch_ext::AdamW { learning_rate, beta1, beta2, weight_decay, epsilon } = settings;
        for (i, parameter) in parameters.iter().enumerate() {
            let mut parameter = parameter.shallow_clone();
            let gradient = &gradients[i] / divisor;
            let (mut first, mut second) = (first_moments[i].shallow_clone(), second_moments[i].shallow_clone());
            parameter *= 1.0 - learning_rate * weight_decay;
            first *= beta1;
            first += &gradient * (1.0 - beta1);
            second *= beta2;
            second += gradient.square() * (1.0 - beta2);
            let root = second.sqrt() / (1.0 - beta2.powf(step)).sqrt() + epsilon;
            parameter -= first / root * (learning_rate / (1.0 - beta1.powf(step)));
        }
    }

    #[test]
    fn the_fused_kernel_equals_its_slow_twin() {
        let wave = |shape: &[i64], speed: f64| {
            let count = shape.iter().product::<i64>();
            (Tensor::arange(count, (Kind::Float, tch::Device::Cpu)) * speed).sin().reshape(shape)
        };
        // Sizes on both sides of the kernel's vector width.
        let shapes: [&[i64]; 4] = [&[1], &[7], &[16, 33], &[128, 64]];
        let make = |speed: f64| Vec::from(shapes.map(|shape| wave(shape, speed)));
        let sets: [[Vec<Tensor>; 4]; 2] = [(); 2].map(|()| [make(0.7), make(1.3), make(0.0), make(0.0)]);
        let settings =
            torch_ext::AdamW { learning_rate: 1e-2, beta1: 0.9, beta2: 0.95, weight_decay: 0.1, epsilon: 1e-8 };
        for step in 1..=4 {
            let [p, g, m, v] = &sets[0];
            slow_twin([p, g, m, v], f64::from(step), settings, 3.0);
            let [p, _, m, v] = &sets[1];
            let steps = shapes.map(|_| Tensor::from(step as f32));
            let (divisor, skip) = (Tensor::from(3.0f32), Tensor::from(0.0f32));
            // The kernel divides its gradients in place.
            fused_adamw_(p, &make(1.3), m, v, &steps, settings, Some((&divisor, &skip))).unwrap();
        }
        for (slow, fused) in sets[0].iter().zip(&sets[1]) {
            for (slow, fused) in slow.iter().zip(fused) {
                assert!((slow - fused).abs().max().double_value(&[]) < 1e-6, "{:?}", slow.size());
            }
        }
    }
}
