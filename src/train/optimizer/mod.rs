//! The optimizers: a rule each, one face for the trainer.
//!
//! The face takes the gradients, finds their norm, clips and unscales them, and decides on the device whether the update is to
//! be skipped; a [`Rule`] knows only how parameters and its own state change. Parameters that learn alike form a group with a
//! rule of its own: LoRA+ (arXiv:2402.12354) gives B another learning rate than A, and what an optimizer does not take is AdamW's.
//!
//! ```text
//! g  <- gradient / divisor                       divisor = loss scale * max(1, norm / max_grad_norm)
//! ```

mod adafactor;
mod adamw;
mod adamw_8bit;
mod lion;
mod muon;
mod restore;
mod schedule_free_adamw;
mod sgd;
#[cfg(test)]
mod tests;

use tch::{Device, Kind, Tensor, no_grad};

use crate::Result;
use crate::recipe::{self, TrainingRecipe};
use crate::torch_ext::{add_scaled, clear_gradients, global_norm};

pub use restore::restore;

/// What the trainer sees of any optimizer. Parameters and state are fp32 but where a rule says otherwise.
pub struct Optimizer {
    groups: Vec<Group>,
    /// Updates applied, a scalar on the device: one for all parameters, as every update changes all of them.
    step: Tensor,
    max_grad_norm: f64,
}

/// What an update found, still on the device: reading it waits for the device, so that is left to the caller.
pub struct Verdict {
    /// L2 norm of all gradients, unscaled, before clipping; a scalar.
    pub gradient_norm: Tensor,
}

/// How the parameters of a group change.
trait Rule {
    /// One update. Nothing may change where it is to be skipped: [`Update::set`] sees to that.
    fn update(&mut self, parameters: &[Tensor], update: &Update<'_>) -> Result<()>;

    /// All that the next update depends on besides the parameters, in a stable order: handles, not copies.
    fn state(&self, parameters: &[Tensor]) -> Vec<State>;

    /// What is evaluated, saved and merged, where that is not the parameters themselves.
    fn evaluated(&self, _parameters: &[Tensor]) -> Option<Vec<Tensor>> {
        None
    }
}

/// A tensor of a rule's state.
struct State {
    /// The parameter it belongs to; `None` where it is the whole group's.
    of: Option<usize>,
    name: &'static str,
    tensor: Tensor,
}

/// An update of a group.
struct Update<'a> {
    learning_rate: f64,
    /// Of the group's parameters, scaled and not clipped.
    gradients: &'a [Tensor],
    /// What they are divided by: an fp32 scalar.
    divisor: &'a Tensor,
    /// Whether nothing is to change: an fp32 scalar, 0 or 1.
    skip: &'a Tensor,
    /// Updates applied, with this one: an fp32 scalar.
    step: &'a Tensor,
}

impl Update<'_> {
    /// The gradient of parameter `index`, divided in place: call it once for each.
    fn gradient(&self, index: usize) -> Tensor {
        self.gradients[index].shallow_clone().g_div_(self.divisor)
    }

    /// The number of this update, an fp64 scalar on the device.
    fn number(&self) -> Tensor {
        self.step.to_kind(Kind::Double)
    }

    /// `1 - decay^t`: the part of a running average that has been filled after t updates. An fp64 scalar on the device.
    fn filled(&self, decay: f64) -> Tensor {
        1.0 - Tensor::pow_scalar(decay, &self.number())
    }

    /// Puts `new` where `live` is, unless this update is skipped.
    fn set(&self, live: &Tensor, new: &Tensor) {
        let skip = self.skip.to_kind(Kind::Bool);
        live.shallow_clone().copy_(&live.where_self(&skip, new));
    }
}

/// `parameter` after decoupled weight decay (arXiv:1711.05101).
fn decayed(parameter: &Tensor, learning_rate: f64, weight_decay: f64) -> Tensor {
    parameter * (1.0 - learning_rate * weight_decay)
}

/// `decay * average + (1 - decay) * value`, as torch's optimizers round it.
fn averaged(average: &Tensor, decay: f64, value: &Tensor) -> Tensor {
    add_scaled(&(average * decay), value, 1.0 - decay)
}

fn zeros_like(parameters: &[Tensor]) -> Vec<Tensor> {
    parameters.iter().map(|parameter| no_grad(|| parameter.zeros_like())).collect()
}

/// The states `names`, one list each, of all parameters: parameter by parameter.
fn each<const N: usize>(names: [&'static str; N], lists: [&[Tensor]; N]) -> Vec<State> {
    let of = |index: usize| {
        let tensors = names.iter().zip(lists);
        tensors.map(move |(name, list)| State { of: Some(index), name, tensor: list[index].shallow_clone() })
    };
    (0..lists[0].len()).flat_map(of).collect()
}

/// Parameters that change by one rule and one learning rate.
struct Group {
    part: Part,
    /// What the run's learning rate is multiplied by.
    rate: f64,
    names: Vec<String>,
    parameters: Vec<Tensor>,
    rule: Box<dyn Rule>,
}

/// Which group a parameter is in.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Part {
    rule: recipe::Optimizer,
    /// Whether it is a B, or a vector, which LoRA+ treats alike.
    b: bool,
}

impl Part {
    fn of(name: &str, shape: &[i64], training: &TrainingRecipe) -> Self {
        let takes = match training.optimizer {
            recipe::Optimizer::Adamw8bit => adamw_8bit::takes(shape),
            recipe::Optimizer::Muon => muon::takes(shape),
            _ => true,
        };
        let rule = if takes { training.optimizer } else { recipe::Optimizer::Adamw };
        Self { rule, b: training.loraplus_lr_ratio.is_some() && (name.ends_with(".b") || shape.len() == 1) }
    }

    fn rule(self, parameters: &[Tensor], training: &TrainingRecipe) -> Box<dyn Rule> {
        match self.rule {
            recipe::Optimizer::Adamw => Box::new(adamw::AdamW::new(parameters, training)),
            recipe::Optimizer::Adamw8bit => Box::new(adamw_8bit::AdamW8bit::new(parameters, training)),
            recipe::Optimizer::Adafactor => Box::new(adafactor::Adafactor::new(parameters, training)),
            recipe::Optimizer::Lion => Box::new(lion::Lion::new(parameters, training)),
            recipe::Optimizer::Sgd => Box::new(sgd::Sgd::new(parameters, training)),
            recipe::Optimizer::ScheduleFreeAdamw => {
                Box::new(schedule_free_adamw::ScheduleFreeAdamW::new(parameters, training))
            }
            recipe::Optimizer::Muon => Box::new(muon::Muon::new(parameters, training)),
        }
    }

    /// Bytes of state for a parameter of `shape`.
    fn state_bytes(self, shape: &[i64], training: &TrainingRecipe) -> u64 {
        let numbers = shape.iter().product::<i64>() as u64;
        match self.rule {
            recipe::Optimizer::Adamw | recipe::Optimizer::ScheduleFreeAdamw => 8 * numbers,
            recipe::Optimizer::Adamw8bit => adamw_8bit::state_bytes(numbers),
            recipe::Optimizer::Adafactor => adafactor::state_bytes(shape),
            recipe::Optimizer::Lion | recipe::Optimizer::Muon => 4 * numbers,
            recipe::Optimizer::Sgd => sgd::state_bytes(numbers, training),
        }
    }
}

/// The decays of AdamW's kinds and of Lion: as typed, or as the papers have them.
fn betas(training: &TrainingRecipe) -> (f64, f64) {
    let second = if training.optimizer == recipe::Optimizer::Lion { 0.99 } else { 0.999 };
    (training.adam_beta1.unwrap_or(0.9), training.adam_beta2.unwrap_or(second))
}

/// Bytes of the optimizer's state for parameters of these names and shapes.
pub fn bytes_of_state(parameters: &[(String, Vec<i64>)], training: &TrainingRecipe) -> u64 {
    parameters.iter().map(|(name, shape)| Part::of(name, shape, training).state_bytes(shape, training)).sum()
}

impl Optimizer {
    /// The optimizer that `training` names, as it starts, for named fp32 leaves.
    pub fn new(parameters: &[(String, Tensor)], training: &TrainingRecipe) -> Self {
        let mut lists: Vec<(Part, Vec<String>, Vec<Tensor>)> = Vec::new();
        for (name, parameter) in parameters {
            let part = Part::of(name, &parameter.size(), training);
            let index = lists.iter().position(|(other, ..)| *other == part).unwrap_or_else(|| {
                lists.push((part, Vec::new(), Vec::new()));
                lists.len() - 1
            });
            lists[index].1.push(name.clone());
            lists[index].2.push(parameter.shallow_clone());
        }
        let groups = lists.into_iter().map(|(part, names, parameters)| {
            let rule = part.rule(&parameters, training);
            let rate = training.loraplus_lr_ratio.filter(|_| part.b).unwrap_or(1.0);
            Group { part, rate, names, parameters, rule }
        });
        let device = parameters.first().map_or(Device::Cpu, |(_, parameter)| parameter.device());
        Self {
            groups: groups.collect(),
            step: Tensor::zeros([], (Kind::Float, device)),
            max_grad_norm: training.max_grad_norm,
        }
    }

    /// One update from the gradients that backward left on the parameters, then drops them.
    ///
    /// The gradients are those of a loss multiplied by `loss_scale`. Nothing changes (parameters, state or
    /// step) when `loss`, a scalar, or the gradient norm is not finite.
    pub fn update(&mut self, learning_rate: f64, loss_scale: f64, loss: &Tensor) -> Result<Verdict> {
        no_grad(|| {
            let of = |group: &Group| group.parameters.iter().map(gradient).collect::<Vec<_>>();
            let gradients: Vec<Vec<Tensor>> = self.groups.iter().map(of).collect();
            let all: Vec<Tensor> = gradients.iter().flatten().map(Tensor::shallow_clone).collect();
            let gradient_norm = global_norm(&all) / loss_scale;

            // Clipping is torch's clip_grad_norm_, folded into the one division that is made anyway.
            let mut divisor = gradient_norm.full_like(loss_scale);
            if self.max_grad_norm > 0.0 {
                divisor *= ((&gradient_norm + 1e-6) / self.max_grad_norm).clamp_min(1.0);
            }
            let skip = (gradient_norm.isfinite().logical_and(&loss.isfinite())).logical_not().to_kind(Kind::Float);

            self.step += 1.0 - &skip;
            for (group, gradients) in self.groups.iter_mut().zip(&gradients) {
                let learning_rate = learning_rate * group.rate;
                let update = Update { learning_rate, gradients, divisor: &divisor, skip: &skip, step: &self.step };
                group.rule.update(&group.parameters, &update)?;
                clear_gradients(&group.parameters);
            }
            Ok(Verdict { gradient_norm })
        })
    }

    /// Step and state under stable names, for a saved state: handles, into which one can be restored.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let of = |group: &Group| {
            let name = |state: &State| match state.of {
                Some(index) => format!("{}.{}", group.names[index], state.name),
                None if group.part.b => format!("b.{}", state.name),
                None => state.name.to_owned(),
            };
            let states = group.rule.state(&group.parameters).into_iter();
            states.map(|state| (name(&state), state.tensor)).collect::<Vec<_>>()
        };
        std::iter::once(("step".to_owned(), self.step.shallow_clone())).chain(self.groups.iter().flat_map(of)).collect()
    }

    /// The parameters as they are evaluated, saved and merged: an average where the optimizer keeps one, else themselves.
    pub fn evaluated(&self) -> Vec<(String, Tensor)> {
        let of = |group: &Group| {
            let themselves = || group.parameters.iter().map(Tensor::shallow_clone).collect();
            let tensors = no_grad(|| group.rule.evaluated(&group.parameters)).unwrap_or_else(themselves);
            group.names.iter().cloned().zip(tensors).collect::<Vec<_>>()
        };
        self.groups.iter().flat_map(of).collect()
    }

    /// Runs `body` with the parameters as they are evaluated; afterwards they are, bit for bit, what is trained again.
    pub fn at_evaluated<T>(&self, body: impl FnOnce() -> T) -> T {
        let mut trained = Vec::new();
        no_grad(|| {
            for group in &self.groups {
                let evaluated = group.rule.evaluated(&group.parameters).into_iter().flatten();
                for (parameter, evaluated) in group.parameters.iter().zip(evaluated) {
                    trained.push((parameter, parameter.copy()));
                    parameter.shallow_clone().copy_(&evaluated);
                }
            }
        });
        let result = body();
        no_grad(|| trained.iter().for_each(|(parameter, before)| parameter.shallow_clone().copy_(before)));
        result
    }
}

/// A parameter that took no part in the loss counts as one with a zero gradient, so that whether an earlier step touched it never matters.
fn gradient(parameter: &Tensor) -> Tensor {
    let gradient = parameter.grad();
    if gradient.defined() { gradient } else { parameter.zeros_like() }
}
