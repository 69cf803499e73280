//! What is learned from: `dataset`.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is learned from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DatasetRecipe {
    /// Parquet to train on: a file, folder, glob, or a list of these, each with an optional weight.
    pub train: Sources,
    /// Parquet to evaluate on.
    #[serde(default)]
    pub eval: Option<Sources>,
    /// What a row is; inferred from the columns when not named.
    #[serde(default)]
    pub format: Option<DataFormat>,
    /// Column names, where they differ from the format's own: `{messages: conversations}`, `{prompt: question, completion: answer}`.
    #[schemars(extend("additionalProperties" = {"type": "string", "minLength": 1}))]
    #[serde(default)]
    pub columns: BTreeMap<String, String>,
    /// Chat template: a built-in name, a file (`.jinja`), or absent for the model's own.
    #[schemars(length(min = 1))]
    #[serde(default)]
    pub chat_template: Option<String>,
    /// System message put before conversations that have none.
    #[serde(default)]
    pub system: Option<String>,
    /// Longest document, in tokens.
    #[schemars(range(min = 2, max = 16777216))]
    #[serde(default = "max_length")]
    pub max_length: u32,
    /// What to do with a row longer than `max_length`.
    #[serde(default)]
    pub overlong: Overlong,
    /// What to do with a row that has nothing to train on or is malformed.
    #[serde(default)]
    pub on_bad_row: OnBadRow,
    /// Fill each micro-batch row up to `max_length` with whole documents; they never attend to each other.
    #[serde(default)]
    pub packing: bool,
    /// Which tokens are trained.
    #[serde(default)]
    pub train_on: TrainOn,
    /// Encode special-token text inside user content as the special token instead of as plain text.
    #[serde(default)]
    pub allow_special_tokens: bool,
    /// Mix rows anew each epoch (from `training.seed`).
    #[serde(default = "yes")]
    pub shuffle: bool,
    /// Use at most this many rows (the first ones), for trials.
    #[schemars(range(min = 1))]
    #[serde(default)]
    pub limit: Option<u64>,
}

impl DatasetRecipe {
    /// Nothing but defaults, for what needs no recipe.
    pub fn defaults() -> Self {
        serde_json::from_value(serde_json::json!({"train": ""})).expect("every other key has a default")
    }
}

/// One source, or several.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Sources {
    /// A file, folder or glob.
    One(#[schemars(length(min = 1))] String),
    /// Several, each with an optional weight.
    Many(#[schemars(length(min = 1))] Vec<Source>),
}

/// A file, folder or glob, with an optional weight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Source {
    /// Weight 1.
    Path(#[schemars(length(min = 1))] String),
    /// `{path, weight}`.
    Weighted(WeightedSource),
}

/// A source with a weight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WeightedSource {
    /// A file, folder or glob.
    #[schemars(length(min = 1))]
    pub path: String,
    /// How often each row is seen per epoch: 2 sees every row twice, 0.5 a seeded half of them.
    #[schemars(range(max = 1000), extend("exclusiveMinimum" = 0))]
    #[serde(default = "one")]
    pub weight: f64,
}

/// What a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DataFormat {
    /// A list of `{role, content}` (or ShareGPT's `{from, value}`), or a JSON string of one.
    Messages,
    /// Two strings (or two message lists); the completion is trained. Strings are used as they are, without a chat template.
    PromptCompletion,
    /// Alpaca's `instruction`, optional `input`, `output`: one user turn and one assistant turn through the chat template.
    Instruction,
    /// Plain text, every token trained.
    Text,
}

/// A row longer than `max_length`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Overlong {
    /// Leave it out, counted (`text` is split into several documents instead, nothing lost).
    #[default]
    Drop,
    /// Keep its first `max_length` tokens, counted; a row whose answer is cut is named in the report.
    Truncate,
    /// Stop with the row.
    Error,
}

/// A row that is malformed or has nothing to train on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnBadRow {
    /// Stop with the row.
    #[default]
    Error,
    /// Leave it out, counted and named.
    Skip,
}

/// Which tokens are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TrainOn {
    /// The completion, or every assistant turn with its end-of-turn token (another name for `assistant`).
    #[default]
    Completion,
    /// Every assistant turn with its end-of-turn token.
    Assistant,
    /// The last assistant turn with its end-of-turn token.
    LastAssistant,
    /// Every token.
    All,
}

fn max_length() -> u32 {
    2048
}

fn yes() -> bool {
    true
}

fn one() -> f64 {
    1.0
}
