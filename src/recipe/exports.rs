//! What is written for servers when a run is over: `output.export`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Dtype, OutputRecipe};

/// A program that is to load what is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum Target {
    /// PEFT.
    Peft,
    /// vLLM.
    Vllm,
    /// SGLang.
    Sglang,
    /// Text Generation Inference.
    Tgi,
    /// transformers.
    Transformers,
    /// mlx-lm.
    Mlx,
}

impl Target {
    /// Its name, as it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Peft => "peft",
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
            Self::Tgi => "tgi",
            Self::Transformers => "transformers",
            Self::Mlx => "mlx",
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What is written for a server: a name, or a name and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum ExportRecipe {
    /// The adapter, as this target loads it.
    Named(Target),
    /// `{target, merge, type}`.
    Chosen(ExportChoice),
}

/// What is written for a server, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExportChoice {
    /// The program that is to load it.
    pub target: Target,
    /// The whole model with the adapter folded in, instead of the adapter.
    #[serde(default)]
    pub merge: bool,
    /// Number type of a merged model; absent: the recipe's `dtype`.
    #[serde(default, rename = "type")]
    pub numbers: Option<Dtype>,
}

impl ExportRecipe {
    /// The same with what a bare name leaves unsaid.
    pub fn choice(self) -> ExportChoice {
        match self {
            Self::Named(target) => ExportChoice { target, merge: false, numbers: None },
            Self::Chosen(choice) => choice,
        }
    }
}

impl OutputRecipe {
    /// What is written for servers.
    pub fn exports(&self) -> Vec<ExportChoice> {
        self.export.iter().flatten().map(|export| export.choice()).collect()
    }
}

impl ExportChoice {
    /// The folder it is written into, below `<dir>/export`: `vllm`, `vllm-merged`, `vllm-merged-fp16`.
    pub fn folder(self) -> String {
        let merged = if self.merge { "-merged" } else { "" };
        let numbers = self.numbers.map(|numbers| format!("-{numbers}")).unwrap_or_default();
        format!("{}{merged}{numbers}", self.target)
    }
}
