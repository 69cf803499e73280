//! How a run's data is cut into micro-batches and steps, as far as a plan asks.

use super::Choice;
use super::speed::{self, Lengths, Schedule};
use crate::data::{Dataset, MicroBatchSize};
use crate::model::ModelSpec;
use crate::recipe::TrainingRecipe;

/// How a run's data is cut, known from its tokens, or from `max_length` alone.
pub struct Cut<'a> {
    /// How it is trained on.
    pub training: &'a TrainingRecipe,
    /// Tokens of a row at most.
    pub max_length: u32,
    /// The training set, where it is tokenised.
    pub dataset: Option<&'a Dataset>,
}

impl Cut<'_> {
    /// The largest micro-batch of `rows` rows, where `count` of them make up a step.
    pub fn largest(&self, rows: u32, count: u32) -> MicroBatchSize {
        let Some(dataset) = self.dataset else {
            let tokens = u64::from(rows) * u64::from(self.max_length);
            return MicroBatchSize { tokens, trained: tokens, documents: rows.into() };
        };
        let of_a_pass = dataset.micro_batches_in_epoch(0, rows.into()) as f64;
        let of_passes = || (self.training.epochs * of_a_pass).ceil() as u64;
        let all = self.training.max_steps.map_or_else(of_passes, |steps| steps * u64::from(count));
        dataset.largest_micro_batch(rows.into(), all)
    }

    /// Documents and tokens of a pass.
    pub fn lengths(&self, spec: &ModelSpec) -> Lengths {
        let none = Lengths { documents: 0.0, tokens: 0.0, trained: 0.0, attention: 0.0 };
        let Some(dataset) = self.dataset else {
            let length = self.max_length.into();
            let attention = speed::attention_of(spec, length);
            return Lengths { documents: 1.0, tokens: length as f64, trained: length as f64, attention };
        };
        dataset.lengths().fold(none, |sum, (tokens, trained, weight)| Lengths {
            documents: sum.documents + weight,
            tokens: sum.tokens + weight * tokens as f64,
            trained: sum.trained + weight * trained as f64,
            attention: sum.attention + weight * speed::attention_of(spec, tokens),
        })
    }

    /// How a choice cuts a pass, and the steps of the run; without the data's lengths a pass is taken to be one row.
    pub fn schedule(&self, choice: &Choice) -> Schedule {
        let (rows, accumulated) = (choice.micro_batch_size, f64::from(choice.gradient_accumulation_steps));
        let training = self.training;
        let micro_batches = match self.dataset {
            Some(dataset) => dataset.micro_batches_in_epoch(0, rows.into()) as f64,
            None => 1.0 / f64::from(rows),
        };
        let of_passes = || match self.dataset {
            Some(_) => (training.epochs * (micro_batches / accumulated).ceil()).ceil(),
            None => 0.0,
        };
        let steps = training.max_steps.map_or_else(of_passes, |steps| steps as f64);
        Schedule { micro_batches, accumulated, steps, largest: choice.largest_tokens as f64 }
    }
}
