//! What is written: `output`.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::recipe::ExportRecipe;

/// What to write.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OutputRecipe {
    /// The run's folder: states, metrics, report, adapter, merged model, manifest.
    #[schemars(length(min = 1))]
    pub dir: PathBuf,
    /// What to write at the end.
    #[schemars(length(min = 1), extend("uniqueItems" = true))]
    #[serde(default = "save_adapter")]
    pub save: Vec<Save>,
    /// What to write for servers at the end, into `<dir>/export/<target>`, as `engraft export` does: names (`peft`, `vllm`, `sglang`,
    /// `tgi`, `transformers`, `mlx`, `llama.cpp`, `ollama`), or `{target, merge, type, from}`. What a target cannot load is refused
    /// before training.
    #[schemars(length(min = 1), extend("uniqueItems" = true))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub export: Option<Vec<ExportRecipe>>,
    /// What the adapter's config calls its base; absent: `base_model` as typed.
    #[schemars(length(min = 1))]
    #[serde(default)]
    pub base_model_name_or_path: Option<String>,
    /// Write TensorBoard events into `<dir>/tensorboard`.
    #[serde(default = "yes")]
    pub tensorboard: bool,
}

/// What to write at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Save {
    /// `<dir>/adapter`, as PEFT writes it.
    Adapter,
    /// `<dir>/merged`, as transformers expects it.
    Merged,
}

fn yes() -> bool {
    true
}

fn save_adapter() -> Vec<Save> {
    vec![Save::Adapter]
}
