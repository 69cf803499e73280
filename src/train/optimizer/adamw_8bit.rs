//! AdamW whose moments have 8 bits (arXiv:2110.02861): a quarter of the state, for parameters of 4096 numbers and more.
//!
//! Each update takes the moments out of their codes ([`crate::quant::dynamic`]: signed for m, unsigned for v), makes AdamW's step
//! in fp32 and stores them as codes again. Smaller parameters keep fp32 moments: they are [`super::adamw`]'s.
//!
//! ```text
//! m  <- beta1 m + (1 - beta1) g                  v <- beta2 v + (1 - beta2) g^2
//! p  <- p - lr * weight_decay * p
//! p  <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//! ```
//!
//! The reference is bitsandbytes 0.50.2 (`AdamW8bit`, its CPU update with the nearest codes): the same bits in the state.

use tch::{Kind, Tensor};

use super::{Rule, State, Update, averaged, betas, decayed, each};
use crate::Result;
use crate::quant::dynamic::{Map, blocks, dequantise, quantise};
use crate::recipe::TrainingRecipe;

/// Below so many numbers the moments stay in fp32: `min_8bit_size`.
const SMALLEST: i64 = 4096;

pub(super) fn takes(shape: &[i64]) -> bool {
    shape.iter().product::<i64>() >= SMALLEST
}

/// Two codes for each number, two scales for each block.
pub(super) fn state_bytes(numbers: u64) -> u64 {
    2 * numbers + 8 * blocks(numbers as usize) as u64
}

pub(super) struct AdamW8bit {
    first: Moments,
    second: Moments,
    betas: (f64, f64),
    epsilon: f64,
    weight_decay: f64,
}

/// One moment of every parameter.
struct Moments {
    map: Map,
    /// uint8, shaped as the parameters.
    codes: Vec<Tensor>,
    absmax: Vec<Tensor>,
}

impl AdamW8bit {
    pub(super) fn new(parameters: &[Tensor], training: &TrainingRecipe) -> Self {
        let device = parameters[0].device();
        let moments = |map: Map| Moments {
            map,
            codes: parameters.iter().map(|p| Tensor::zeros(p.size(), (Kind::Uint8, device))).collect(),
            absmax: parameters
                .iter()
                .map(|p| Tensor::zeros([blocks(p.numel()) as i64], (Kind::Float, device)))
                .collect(),
        };
        Self {
            first: moments(Map::signed(device)),
            second: moments(Map::unsigned(device)),
            betas: betas(training),
            epsilon: training.adam_epsilon,
            weight_decay: training.weight_decay,
        }
    }
}

impl Moments {
    fn of(&self, index: usize) -> Tensor {
        dequantise(&self.codes[index], &self.absmax[index], &self.map)
    }

    fn set(&self, index: usize, moment: &Tensor, update: &Update<'_>) {
        let quantised = quantise(moment, &self.map);
        update.set(&self.codes[index], &quantised.codes);
        update.set(&self.absmax[index], &quantised.absmax);
    }
}

impl Rule for AdamW8bit {
    fn update(&mut self, parameters: &[Tensor], update: &Update<'_>) -> Result<()> {
        let (beta1, beta2) = self.betas;
        let rate = update.filled(beta1).reciprocal() * -update.learning_rate;
        let root = update.filled(beta2).sqrt();
        for (index, parameter) in parameters.iter().enumerate() {
            let gradient = update.gradient(index);
            let first = averaged(&self.first.of(index), beta1, &gradient);
            let second = (self.second.of(index) * beta2).addcmul(&(&gradient * (1.0 - beta2)), &gradient);
            let denominator = second.sqrt() / &root + self.epsilon;
            let decayed = decayed(parameter, update.learning_rate, self.weight_decay);
            update.set(parameter, &decayed.addcdiv(&(&first * &rate), &denominator));
            self.first.set(index, &first, update);
            self.second.set(index, &second, update);
        }
        Ok(())
    }

    fn state(&self, _parameters: &[Tensor]) -> Vec<State> {
        let Self { first, second, .. } = self;
        each(["state1", "absmax1", "state2", "absmax2"], [&first.codes, &first.absmax, &second.codes, &second.absmax])
    }
}
