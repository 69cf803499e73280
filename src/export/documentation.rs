//! What whoever publishes a fine-tuned model has to document of it, as far as the run knows it.
//!
//! The fields are those of Regulation (EU) 2024/1689, Annex XI, section 1 (technical documentation of a general-purpose model, of
//! which one who modifies a model documents the modification): tasks, architecture and number of parameters, modality and format of
//! inputs and outputs, licence; how it was trained, with which key choices; the data's type, provenance, number and preparation; the
//! computation in floating-point operations, its time; its energy. Annex IV (systems of high risk) and the public summary of the
//! training's content ask for the same of the data. What only a person can say is listed under `left_to_say`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::licence::Licence;
use crate::data::Dataset;
use crate::recipe::Plan;
use crate::train::{Energy, Outcome};

/// The documentation that a manifest carries.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Documentation {
    /// What the model does.
    pub tasks: String,
    /// Modality and format of inputs and outputs.
    pub inputs_and_outputs: String,
    /// The base's kind (`model_type`).
    pub architecture: String,
    /// Parameters of the base.
    pub base_parameters: u64,
    /// Parameters that were trained.
    pub trained_parameters: u64,
    /// Tokens that the model was made for.
    pub context: i64,
    /// The base's licence.
    pub base_licence: Licence,
    /// How it was trained, with the key choices; all of them are in `resolved_recipe`.
    pub method: String,
    /// What was trained and evaluated on, by `training` and `eval`.
    pub data: BTreeMap<String, DataUsed>,
    /// When training began, RFC 3339, UTC.
    pub began: Option<String>,
    /// When the manifest was written.
    pub ended: String,
    /// Seconds of training, over all parts of the run.
    pub seconds: f64,
    /// What it ran on.
    pub device: String,
    /// Floating-point operations of the training, estimated: those of the model itself, forward and backward, without recomputing.
    pub floating_point_operations: f64,
    /// Energy, of the whole machine; absent where it does not count it.
    pub energy: Option<Energy>,
    /// What that gave off; absent without energy.
    pub emissions: Option<Emissions>,
    /// What whoever publishes the model has to add.
    pub left_to_say: Vec<String>,
}

/// What was trained or evaluated on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DataUsed {
    /// Its type.
    pub modality: String,
    /// Files, with their digests under `train` and `eval` of the manifest.
    pub files: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// Rows.
    pub rows: u64,
    /// Rows left out, and why, are under `datasets` of the manifest.
    pub left_out: u64,
    /// Tokens of what was left.
    pub tokens: u64,
    /// Of these, learned from.
    pub trained_tokens: u64,
    /// How rows became tokens.
    pub preparation: Vec<String>,
}

/// Carbon dioxide.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Emissions {
    /// Grams of CO2 equivalent.
    pub grams: f64,
    /// Grams per kilowatt-hour that were taken.
    pub grams_per_kilowatt_hour: f64,
    /// Where that number is from.
    pub source: String,
}

/// The variable that says what a kilowatt-hour gives off where the machine stands.
pub const INTENSITY: &str = "ENGRAFT_GRID_INTENSITY";
/// The world's mean of 2024 in grams per kilowatt-hour (Ember, Global Electricity Review 2025).
const WORLD: f64 = 473.0;

impl Emissions {
    /// Of energy; `said` is what [`INTENSITY`] says, in grams per kilowatt-hour.
    pub fn of(energy: &Energy, said: Option<&str>) -> Self {
        let own =
            said.and_then(|said| said.trim().parse::<f64>().ok()).filter(|number| (0.0..10_000.0).contains(number));
        let (grams_per_kilowatt_hour, source) = match own {
            Some(number) => (number, format!("{INTENSITY}, set where it was trained")),
            None => (WORLD, "the world's mean of 2024 (Ember), as the grid is not known".into()),
        };
        Self { grams: energy.joules / 3.6e6 * grams_per_kilowatt_hour, grams_per_kilowatt_hour, source }
    }
}

/// What is known of the model itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// `model_type`.
    pub architecture: String,
    /// Parameters of the base.
    pub parameters: u64,
    /// Those trained.
    pub trained: u64,
    /// Tokens it was made for.
    pub context: i64,
    /// Floating-point operations of the whole training.
    pub operations: f64,
    /// The base's licence.
    pub licence: Licence,
}

impl Documentation {
    /// Of a run.
    pub fn new(model: Model, plan: &Plan, datasets: &[(&str, &Dataset)], outcome: &Outcome, device: &str) -> Self {
        let used = |dataset: &Dataset| {
            let report = dataset.report();
            let length =
                |file: &crate::data::DatasetFile| std::fs::metadata(&file.path).map_or(0, |metadata| metadata.len());
            DataUsed {
                modality: "text".into(),
                files: report.files,
                bytes: dataset.files().iter().map(length).sum(),
                rows: report.rows,
                left_out: report.dropped(),
                tokens: report.tokens,
                trained_tokens: report.trained_tokens,
                preparation: report.inference.clone(),
            }
        };
        let emissions =
            outcome.energy.as_ref().map(|energy| Emissions::of(energy, std::env::var(INTENSITY).ok().as_deref()));
        Self {
            tasks: "continues and answers text".into(),
            inputs_and_outputs: format!("text in, text out; {} tokens of context", model.context),
            architecture: model.architecture,
            base_parameters: model.parameters,
            trained_parameters: model.trained,
            context: model.context,
            base_licence: model.licence,
            method: method(plan),
            data: datasets.iter().map(|(set, dataset)| ((*set).to_string(), used(dataset))).collect(),
            began: outcome.began.clone(),
            ended: jiff::Timestamp::now().to_string(),
            seconds: outcome.seconds,
            device: device.into(),
            floating_point_operations: model.operations,
            energy: outcome.energy.clone(),
            emissions,
            left_to_say: [
                "what the model is meant for, and what it must not be used for",
                "where the data is from, who made it, and by what right it is used",
                "how bias in it was looked for",
                "how and when the model is published, and under which licence",
            ]
            .map(str::to_string)
            .to_vec(),
        }
    }
}

/// The training in a sentence.
fn method(plan: &Plan) -> String {
    let (adapter, training) = (&plan.adapter, &plan.training);
    let kind = match (&plan.scheme, adapter.decomposes()) {
        (None, false) => "low-rank adaptation (LoRA)".to_string(),
        (None, true) => "weight-decomposed low-rank adaptation (DoRA)".to_string(),
        (Some(scheme), false) => format!("low-rank adaptation of a base quantised as {} (QLoRA)", scheme.form),
        (Some(scheme), true) => format!("weight-decomposed low-rank adaptation of a base quantised as {}", scheme.form),
    };
    let optimizer = serde_json::to_value(training.optimizer).ok();
    let optimizer = optimizer.as_ref().and_then(|name| name.as_str()).unwrap_or("an optimizer");
    format!(
        "{kind}, rank {}, alpha {}, supervised, {optimizer} at a learning rate of {}, in {}",
        adapter.r, adapter.lora_alpha, training.learning_rate, plan.recipe.dtype
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn emissions_are_of_the_grid_that_is_said_or_the_worlds() {
        let energy = Energy { joules: 7.2e6, of: vec!["package-0".into()] };
        let own = Emissions::of(&energy, Some(" 50 "));
        assert!((own.grams - 100.0).abs() < 1e-9 && own.source.contains(INTENSITY), "{own:?}");
        for said in [None, Some(""), Some("-3"), Some("nan"), Some("much")] {
            assert!((Emissions::of(&energy, said).grams - 2.0 * WORLD).abs() < 1e-9, "{said:?}");
        }
    }
}
