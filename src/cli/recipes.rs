//! Verbs that look at recipes, data, files and the machine.

use std::path::PathBuf;

use clap::Args;

use super::Overrides;

/// `engraft inspect`
#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "Names are those that recipes take. A hub id fetches the model, as training on it does.")]
pub struct Inspect {
    /// Models (hub ids, folders, .gguf files), adapters, runs, .safetensors files, data (parquet files, folders, globs)
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
    /// Print one JSON object per name
    #[arg(long)]
    pub json: bool,
}

/// `engraft preview`
#[derive(Debug, Clone, PartialEq, Args)]
pub struct Preview {
    /// The recipe.
    #[arg(value_name = "RECIPE")]
    pub recipe: PathBuf,
    /// Changes to the recipe.
    #[command(flatten)]
    pub overrides: Overrides,
    /// Show the eval set instead of the training set
    #[arg(long)]
    pub eval: bool,
    /// How many rows to show; the totals are always of all rows
    #[arg(long, short = 'n', value_name = "N", default_value_t = 3)]
    pub rows: u64,
    /// Print one JSON object per row, then one with the totals
    #[arg(long)]
    pub json: bool,
    /// Mark trained tokens with brackets instead of colour
    #[arg(long)]
    pub no_color: bool,
}

/// `engraft validate`
#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "Every problem of every recipe is listed, with file, line and what to write instead.")]
pub struct Validate {
    /// Recipes to check.
    #[arg(value_name = "RECIPE", required = true)]
    pub recipes: Vec<PathBuf>,
    /// Changes to the recipes.
    #[command(flatten)]
    pub overrides: Overrides,
    /// Print one JSON object per recipe
    #[arg(long)]
    pub json: bool,
}

/// `engraft schema`
#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "Name the schema in a recipe's first line and editors complete and check it:
  # yaml-language-server: $schema=recipe.schema.json")]
pub struct Schema {
    /// Print the reference as Markdown tables
    #[arg(long)]
    pub markdown: bool,
}

/// `engraft doctor`
#[derive(Debug, Clone, PartialEq, Args)]
pub struct Doctor {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}
