//! AdamW (arXiv:1711.05101) over all adapter tensors at once, with unscaling, clipping and skipping decided on the device.
//!
//! ```text
//! g  <- gradient / divisor                       divisor = loss scale * max(1, norm / max_grad_norm)
//! p  <- p - lr * weight_decay * p
//! m  <- beta1 m + (1 - beta1) g                  v <- beta2 v + (1 - beta2) g^2
//! p  <- p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
//! ```

use tch::{Kind, Tensor, no_grad};

use crate::recipe::TrainingRecipe;
use crate::torch_ext::{self, clear_gradients, fused_adamw_, global_norm};
use crate::{Error, Fault, Result};

/// The optimizer and its moments, all fp32.
pub struct AdamW {
    names: Vec<String>,
    parameters: Vec<Tensor>,
    first_moments: Vec<Tensor>,
    second_moments: Vec<Tensor>,
    /// Updates applied, a scalar on the device: one for all parameters, as every update changes all of them.
    step: Tensor,
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    weight_decay: f64,
    max_grad_norm: f64,
}

/// What an update found, still on the device: reading it waits for the device, so that is left to the caller.
pub struct Verdict {
    /// L2 norm of all gradients, unscaled, before clipping; a scalar.
    pub gradient_norm: Tensor,
}

impl AdamW {
    /// An optimizer with zero moments for named fp32 leaves.
    pub fn new(parameters: &[(String, Tensor)], training: &TrainingRecipe) -> Self {
        let zeros = || parameters.iter().map(|(_, p)| no_grad(|| p.zeros_like())).collect::<Vec<_>>();
        let device = parameters.first().map_or(tch::Device::Cpu, |(_, p)| p.device());
        Self {
            names: parameters.iter().map(|(name, _)| name.clone()).collect(),
            parameters: parameters.iter().map(|(_, p)| p.shallow_clone()).collect(),
            first_moments: zeros(),
            second_moments: zeros(),
            step: Tensor::zeros([], (Kind::Float, device)),
            beta1: training.adam_beta1,
            beta2: training.adam_beta2,
            epsilon: training.adam_epsilon,
            weight_decay: training.weight_decay,
            max_grad_norm: training.max_grad_norm,
        }
    }

    /// One update from the gradients that backward left on the parameters, then drops them.
    ///
    /// The gradients are those of a loss multiplied by `loss_scale`. Nothing changes (parameters, moments or
    /// step) when `loss`, a scalar, or the gradient norm is not finite.
    pub fn update(&mut self, learning_rate: f64, loss_scale: f64, loss: &Tensor) -> Result<Verdict> {
        no_grad(|| {
            let gradients: Vec<Tensor> = self.parameters.iter().map(gradient).collect();
            let gradient_norm = global_norm(&gradients) / loss_scale;

            // Clipping is torch's clip_grad_norm_, folded into the one division the kernel makes anyway.
            let mut divisor = gradient_norm.full_like(loss_scale);
            if self.max_grad_norm > 0.0 {
                divisor *= ((&gradient_norm + 1e-6) / self.max_grad_norm).clamp_min(1.0);
            }
            let skip = (gradient_norm.isfinite().logical_and(&loss.isfinite())).logical_not().to_kind(Kind::Float);

            self.step += 1.0 - &skip;
            let steps: Vec<Tensor> = self.parameters.iter().map(|_| self.step.shallow_clone()).collect();
            let settings = torch_ext::AdamW {
                learning_rate,
                beta1: self.beta1,
                beta2: self.beta2,
                weight_decay: self.weight_decay,
                epsilon: self.epsilon,
            };
            fused_adamw_(
                &self.parameters,
                &gradients,
                &self.first_moments,
                &self.second_moments,
                &steps,
                settings,
                Some((&divisor, &skip)),
            )?;
            clear_gradients(&self.parameters);
            Ok(Verdict { gradient_norm })
        })
    }

    /// Step and moments under stable names, for a state.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let moments = self.names.iter().zip(&self.first_moments).zip(&self.second_moments);
        let moments = moments.flat_map(|((name, first), second)| {
            [(format!("{name}.exp_avg"), first.shallow_clone()), (format!("{name}.exp_avg_sq"), second.shallow_clone())]
        });
        std::iter::once(("step".to_owned(), self.step.shallow_clone())).chain(moments).collect()
    }
}

/// Copies saved tensors into live ones of the same names and shapes.
///
/// # Errors
/// [`Error::State`] naming the first tensor that is missing, left over or of another shape; nothing is copied then.
pub fn restore(live: &[(String, Tensor)], saved: &[(String, Tensor)], place: &std::path::Path) -> Result<()> {
    let refuse = |what: String| {
        let hint = "the state belongs to another adapter; train with the recipe it was saved under";
        Err(Error::State(Fault::at(place, what).hint(hint)))
    };
    let saved: std::collections::BTreeMap<_, _> = saved.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    for (name, tensor) in live {
        match saved.get(name.as_str()) {
            None => return refuse(format!("has no tensor `{name}`")),
            Some(found) if found.size() != tensor.size() => {
                return refuse(format!("`{name}` has shape {:?}, expected {:?}", found.size(), tensor.size()));
            }
            Some(_) => {}
        }
    }
    if let Some(name) = saved.keys().find(|name| !live.iter().any(|(other, _)| other == **name)) {
        return refuse(format!("has a tensor `{name}` that the adapter does not have"));
    }
    no_grad(|| live.iter().for_each(|(name, tensor)| tensor.shallow_clone().copy_(saved[name.as_str()])));
    Ok(())
}

/// A parameter that took no part in the loss counts as one with a zero gradient, so that whether an earlier step touched it never matters.
fn gradient(parameter: &Tensor) -> Tensor {
    let gradient = parameter.grad();
    if gradient.defined() { gradient } else { parameter.zeros_like() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(values: &[f32], shape: &[i64]) -> Tensor {
        Tensor::from_slice(values).reshape(shape).set_requires_grad(true)
    }

    fn two_parameters() -> Vec<(String, Tensor)> {
        vec![("p".into(), leaf(&[0.5, -1.25, 2.0, 0.1, 0.0, -0.3], &[2, 3])), ("q".into(), leaf(&[1.0, -2.0], &[2]))]
    }

    fn training() -> TrainingRecipe {
        TrainingRecipe {
            adam_beta1: 0.9,
            adam_beta2: 0.99,
            weight_decay: 0.1,
            max_grad_norm: 1.0,
            ..Default::default()
        }
    }

    /// Leaves the given gradients on the parameters.
    fn backward(parameters: &[(String, Tensor)], p: &[f32], q: &[f32]) -> Tensor {
        let p = (&parameters[0].1 * Tensor::from_slice(p).reshape([2, 3])).sum(Kind::Float);
        let loss = p + (&parameters[1].1 * Tensor::from_slice(q)).sum(Kind::Float);
        loss.backward();
        loss.detach()
    }

    fn close(found: &Tensor, expected: &[f64]) {
        let found: Vec<f64> = found.flatten(0, -1).to_kind(Kind::Double).try_into().unwrap();
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() <= 1e-6 * expected.abs().max(1e-6), "{found} is not {expected}");
        }
    }

    // torch 2.11: AdamW(lr=0.01, betas=(0.9, 0.99), weight_decay=0.1) after clip_grad_norm_(1.0), five steps, fused and not.
    #[test]
    fn five_steps_equal_torch() {
        let parameters = two_parameters();
        let mut optimizer = AdamW::new(&parameters, &training());
        let norms = [4.070626735687256, 7.588149070739746, 11.324751853942871, 15.118863105773926, 18.935945510864258];
        for (step, expected) in norms.into_iter().enumerate() {
            let step = step as i32;
            let p = [1.0, -2.0, 0.5, 3.0, 1e-3, 0.0].map(|g: f32| g * ((step + 1) * (-1i32).pow(step as u32)) as f32);
            let q = [0.3, 0.7].map(|g: f32| g * (step - 2) as f32);
            let loss = backward(&parameters, &p, &q);
            let verdict = optimizer.update(0.01, 1.0, &loss).unwrap();
            close(&verdict.gradient_norm, &[expected]);
        }
        let p = [0.48390156, -1.23015916, 1.97641683, 0.08589755, -0.013602904, -0.298503041];
        close(&parameters[0].1, &p);
        close(&parameters[1].1, &[1.02708161, -1.95794868]);
        let state = optimizer.tensors();
        assert_eq!(state[0].1.double_value(&[]), 5.0);
        close(&state[1].1, &[0.0209546536, -0.0419093072, 0.0104773268, 0.0628639683, 2.09546561e-05, 0.0]);
        close(&state[2].1, &[0.00333174947, 0.0133269979, 0.000832937367, 0.0299857426, 3.33174954e-09, 0.0]);
    }

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

    #[test]
    fn the_loss_scale_changes_nothing() {
        let (plain, scaled) = (two_parameters(), two_parameters());
        let (mut one, mut other) = (AdamW::new(&plain, &training()), AdamW::new(&scaled, &training()));
        let (p, q) = ([1.0, -2.0, 0.5, 3.0, 1e-3, 0.0], [0.3, 0.7]);
        let loss = backward(&plain, &p, &q);
        let expected = one.update(0.01, 1.0, &loss).unwrap();
        let loss = backward(&scaled, &p.map(|g| g * 1024.0), &q.map(|g| g * 1024.0));
        let found = other.update(0.01, 1024.0, &loss).unwrap();
        close(&found.gradient_norm, &[expected.gradient_norm.double_value(&[])]);
        close(&scaled[0].1, &Vec::<f64>::try_from(plain[0].1.flatten(0, -1).to_kind(Kind::Double)).unwrap());
    }

    #[test]
    fn a_gradient_or_loss_that_is_not_finite_changes_nothing() {
        let parameters = two_parameters();
        let mut optimizer = AdamW::new(&parameters, &training());
        let all = |optimizer: &AdamW| {
            let tensors =
                optimizer.tensors().into_iter().chain(parameters.iter().map(|(n, p)| (n.clone(), p.detach())));
            tensors.map(|(_, t)| Vec::<f32>::try_from(t.flatten(0, -1)).unwrap()).collect::<Vec<_>>()
        };
        let before = all(&optimizer);
        let loss = backward(&parameters, &[f32::NAN, 1.0, 1.0, 1.0, 1.0, 1.0], &[0.0, 0.0]);
        optimizer.update(0.01, 1.0, &loss.zeros_like()).unwrap();
        assert_eq!(all(&optimizer), before);
        let _ = backward(&parameters, &[1.0; 6], &[0.0, 0.0]);
        optimizer.update(0.01, 1.0, &Tensor::from(f32::INFINITY)).unwrap();
        assert_eq!(all(&optimizer), before);
        let loss = backward(&parameters, &[1.0; 6], &[0.0, 0.0]);
        optimizer.update(0.01, 1.0, &loss).unwrap();
        assert_ne!(all(&optimizer), before, "the gradients of skipped steps were not left behind");
    }

    #[test]
    fn restoring_refuses_other_shapes_and_names() {
        let live = two_parameters();
        let place = std::path::Path::new("adapter.safetensors");
        let text = |saved: &[(String, Tensor)]| restore(&live, saved, place).unwrap_err().to_string();
        let mut saved = two_parameters();
        saved[1].1 = leaf(&[1.0, 2.0, 3.0], &[3]);
        assert!(text(&saved).contains("`q` has shape [3], expected [2]"));
        saved.pop();
        assert!(text(&saved).contains("has no tensor `q`"));
        let mut saved = two_parameters();
        saved.push(("r".into(), leaf(&[1.0], &[1])));
        assert!(text(&saved).contains("`r` that the adapter does not have"));
    }
}
