//! Verbs of a recipe that is run: train, plan, eval.

use std::path::PathBuf;

use clap::Args;

use super::{Overrides, finite};
use crate::train::Card;

/// `engraft train`
#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "Examples:
  engraft train recipes/quickstart.yaml
  engraft train recipe.yaml --set training.learning_rate=1e-4 --set output.dir=runs/slow
  engraft train recipe.yaml --resume

SIGINT and SIGTERM save a resumable state and exit with 75.")]
pub struct Train {
    /// The recipe.
    #[arg(value_name = "RECIPE")]
    pub recipe: PathBuf,
    /// Changes to the recipe.
    #[command(flatten)]
    pub overrides: Overrides,
    /// Continue from the newest saved state in the output folder, bit for bit
    ///
    /// Refused when the recipe, the data or the base changed since; the difference is named.
    #[arg(long, conflicts_with = "overwrite")]
    pub resume: bool,
    /// Begin again in an output folder that holds a run: its states and metrics are removed
    #[arg(long)]
    pub overwrite: bool,
    /// Start also where the memory plan takes more than is free
    #[arg(long)]
    pub ignore_memory_plan: bool,
    /// Sign manifest.json with this private key (Ed25519, PKCS#8 in PEM)
    #[arg(long, value_name = "KEY")]
    pub sign: Option<PathBuf>,
    /// Print events as JSON, one object per line, instead of progress
    #[arg(long, conflicts_with = "quiet")]
    pub json: bool,
    /// Print errors only
    #[arg(long, short)]
    pub quiet: bool,
}

/// `engraft plan`
#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "Only headers and configs are read, and no GPU is needed for --gpu.

Examples:
  engraft plan recipe.yaml
  engraft plan recipe.yaml --gpu 4090 --set training.micro_batch_size=auto --set training.global_batch_size=32")]
pub struct Plan {
    /// The recipe.
    #[arg(value_name = "RECIPE")]
    pub recipe: PathBuf,
    /// Changes to the recipe.
    #[command(flatten)]
    pub overrides: Overrides,
    /// Plan for this GPU, by its published figures [default: the recipe's device]
    #[arg(long, value_name = "GPU", value_parser = Card::find)]
    pub gpu: Option<Card>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `engraft eval`
#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "Metrics: loss, perplexity; with --generate exact_match; with --match match.

Examples:
  engraft eval recipe.yaml                                  the run's own adapter, loss and perplexity
  engraft eval recipe.yaml --base                           the base alone, to compare with
  engraft eval recipe.yaml --generate --fail-under exact_match=0.8
  engraft eval recipe.yaml --match '^\\{.*\\}$' --limit 50 --json")]
pub struct Eval {
    /// The recipe whose base, data and template are used.
    #[arg(value_name = "RECIPE")]
    pub recipe: PathBuf,
    /// Adapter to measure [default: the one in the recipe's output folder]
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Measure the base without any adapter
    #[arg(long, conflicts_with = "adapter")]
    pub base: bool,
    /// Changes to the recipe.
    #[command(flatten)]
    pub overrides: Overrides,
    /// Use at most this many rows
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub limit: Option<u64>,
    /// Let the model answer each row and compare with the row's own answer
    #[arg(long)]
    pub generate: bool,
    /// Let the model answer each row and count the answers that this regular expression finds a match in
    #[arg(long = "match", value_name = "REGEX")]
    pub pattern: Option<String>,
    /// Longest answer, in tokens
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: u32,
    /// Exit with 10 when a metric ends below this value (repeatable)
    #[arg(long, value_name = "METRIC=VALUE")]
    pub fail_under: Vec<Threshold>,
    /// Exit with 10 when a metric ends above this value (repeatable)
    #[arg(long, value_name = "METRIC=VALUE")]
    pub fail_over: Vec<Threshold>,
    /// Print the result as one JSON object
    #[arg(long)]
    pub json: bool,
}

/// A metric and its limit, typed `exact_match=0.8`.
#[derive(Debug, Clone, PartialEq)]
pub struct Threshold {
    /// Which metric.
    pub metric: Metric,
    /// Its limit.
    pub value: f64,
}

/// What `engraft eval` measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Metric {
    /// Mean loss per trained token.
    Loss,
    /// Its exponential.
    Perplexity,
    /// Share of generated answers equal to the row's own.
    ExactMatch,
    /// Share of generated answers that `--match` finds a match in.
    Match,
}

impl std::str::FromStr for Threshold {
    type Err = String;

    fn from_str(typed: &str) -> Result<Self, String> {
        let (metric, value) = typed.split_once('=').ok_or("write it as METRIC=VALUE, as in exact_match=0.8")?;
        let metric = <Metric as clap::ValueEnum>::from_str(metric.trim(), false)
            .map_err(|_| format!("there is no metric {metric}: write loss, perplexity, exact_match or match"))?;
        Ok(Threshold { metric, value: finite(value)? })
    }
}
