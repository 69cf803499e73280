//! What a recipe means: names looked up, paths made absolute, devices chosen, defaults resolved. Made once, read by every room.

use std::path::PathBuf;

use tch::{Device, Kind};

use super::{AdapterRecipe, DatasetRecipe, OutputRecipe, Recipe, TrainingRecipe};

/// A recipe with everything resolved.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The recipe as typed, with `--set` overrides applied.
    pub recipe: Recipe,
    /// The recipe's file.
    pub path: PathBuf,
    /// Where the base model's files are.
    pub base: BaseSource,
    /// Number type of the base and the activations.
    pub kind: Kind,
    /// Where to train.
    pub device: Device,
    /// The adapter's part of the recipe.
    pub adapter: AdapterRecipe,
    /// The dataset's part of the recipe.
    pub dataset: DatasetRecipe,
    /// Training files, in a stable order.
    pub train: Vec<DataSource>,
    /// Evaluation files, in a stable order; empty when there is no eval set.
    pub eval: Vec<DataSource>,
    /// The training part of the recipe.
    pub training: TrainingRecipe,
    /// The output part of the recipe, `dir` made absolute.
    pub output: OutputRecipe,
}

/// Where a base model's files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BaseSource {
    /// A hub repository.
    Hub {
        /// `owner/name`.
        id: String,
        /// Branch, tag or commit.
        revision: String,
    },
    /// A folder with `config.json`, safetensors and tokenizer.
    Folder(PathBuf),
    /// One `.gguf` file.
    Gguf(PathBuf),
}

/// One parquet file of a dataset.
#[derive(Debug, Clone, PartialEq)]
pub struct DataSource {
    /// The file.
    pub path: PathBuf,
    /// How often each row is seen per epoch.
    pub weight: f64,
}
