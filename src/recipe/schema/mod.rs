//! The recipe's structs. Their doc comments are the reference: `engraft schema` and the README print them.

mod adapter;
mod dataset;
mod output;
mod quantization;
mod training;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use adapter::*;
pub use dataset::*;
pub use output::*;
pub use quantization::*;
pub use training::*;

/// A fine-tuning run: which base, which adapter, which data, how trained, what written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Hub id (`owner/name`), folder of safetensors, or `.gguf` file. A bare `.gguf` name is also looked for in the cache's `models` folder.
    #[schemars(length(min = 1))]
    pub base_model: String,
    /// Hub revision: branch, tag or commit.
    #[schemars(length(min = 1))]
    #[serde(default)]
    pub revision: Option<String>,
    /// Number type of the frozen base and of the activations.
    #[serde(default)]
    pub dtype: Dtype,
    /// Where to train.
    #[serde(default)]
    pub device: DeviceChoice,
    /// What is grafted. Names are PEFT's.
    #[serde(default)]
    pub adapter: AdapterRecipe,
    /// How the frozen base is quantised, with `adapter.method: qlora`. Names are bitsandbytes'.
    #[serde(default)]
    pub quantization: Option<QuantizationRecipe>,
    /// What is learned from.
    pub dataset: DatasetRecipe,
    /// How to train. Names are TRL's and transformers'.
    #[serde(default)]
    pub training: TrainingRecipe,
    /// What to write.
    pub output: OutputRecipe,
}

/// Number type of the frozen base and of the activations; adapters, optimizer and loss are always fp32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// bfloat16.
    #[default]
    Bf16,
    /// IEEE half, with dynamic loss scaling.
    Fp16,
    /// IEEE single.
    Fp32,
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Dtype::Bf16 => "bf16",
            Dtype::Fp16 => "fp16",
            Dtype::Fp32 => "fp32",
        })
    }
}

/// Where to train. `auto` takes CUDA when there is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// CUDA when there is one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The first CUDA device; an error where there is none.
    Cuda,
}
