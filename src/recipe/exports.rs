//! What is written for servers: `output.export`, and what `engraft export` is told.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Dtype, OutputRecipe};
use crate::Fault;

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
    /// llama.cpp.
    #[serde(rename = "llama.cpp")]
    #[value(name = "llama.cpp")]
    LlamaCpp,
    /// Ollama.
    Ollama,
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
            Self::LlamaCpp => "llama.cpp",
            Self::Ollama => "ollama",
        }
    }

    /// Whether it loads GGUF files.
    pub fn loads_gguf(self) -> bool {
        matches!(self, Self::LlamaCpp | Self::Ollama)
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// How the numbers of a whole model are stored. In a GGUF file norms, biases and routers are always fp32; the other targets load the
/// first three.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum FileType {
    /// IEEE single.
    #[serde(alias = "fp32")]
    #[value(alias = "fp32")]
    F32,
    /// IEEE half.
    #[serde(alias = "fp16")]
    #[value(alias = "fp16")]
    F16,
    /// bfloat16.
    Bf16,
    /// 8 bits, blocks of 32.
    #[serde(rename = "q8_0")]
    #[value(name = "q8_0")]
    Q8_0,
    /// 4 bits, blocks of 32.
    #[serde(rename = "q4_0")]
    #[value(name = "q4_0")]
    Q4_0,
    /// 4 bits, blocks of 32 with a minimum.
    #[serde(rename = "q4_1")]
    #[value(name = "q4_1")]
    Q4_1,
    /// 5 bits, blocks of 32.
    #[serde(rename = "q5_0")]
    #[value(name = "q5_0")]
    Q5_0,
    /// 5 bits, blocks of 32 with a minimum.
    #[serde(rename = "q5_1")]
    #[value(name = "q5_1")]
    Q5_1,
    /// 4 bits, with 6 where it matters most: llama.cpp's usual choice.
    #[serde(rename = "q4_k_m")]
    #[value(name = "q4_k_m")]
    Q4KM,
    /// 5 bits, with 6 where it matters most.
    #[serde(rename = "q5_k_m")]
    #[value(name = "q5_k_m")]
    Q5KM,
    /// 6 bits.
    #[serde(rename = "q6_k")]
    #[value(name = "q6_k")]
    Q6K,
}

impl FileType {
    /// As it is typed, and as file names have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q4KM => "q4_k_m",
            Self::Q5KM => "q5_k_m",
            Self::Q6K => "q6_k",
        }
    }

    /// The number type, where it is a plain one; `None` for blocks.
    pub fn plain(self) -> Option<Dtype> {
        match self {
            Self::F32 => Some(Dtype::Fp32),
            Self::F16 => Some(Dtype::Fp16),
            Self::Bf16 => Some(Dtype::Bf16),
            _ => None,
        }
    }
}

impl From<Dtype> for FileType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Fp32 => Self::F32,
            Dtype::Fp16 => Self::F16,
            Dtype::Bf16 => Self::Bf16,
        }
    }
}

impl std::fmt::Display for FileType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What is written for a server: a name, or a name and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum ExportRecipe {
    /// The adapter, as this target loads it.
    Named(Target),
    /// `{target, merge, type, from}`.
    Chosen(ExportChoice),
}

/// What is written for a server, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExportChoice {
    /// The program that is to load it.
    pub target: Target,
    /// The whole model with the adapter folded in, instead of the adapter.
    #[serde(default)]
    pub merge: bool,
    /// Number type of a merged model; absent: the recipe's `dtype`.
    #[serde(default, rename = "type")]
    pub numbers: Option<FileType>,
    /// Of an adapter for Ollama: what Ollama calls its base, as `ollama list` has it. Absent: the base's own files.
    #[serde(default)]
    pub from: Option<String>,
}

impl ExportRecipe {
    /// The same with what a bare name leaves unsaid.
    pub fn choice(&self) -> ExportChoice {
        match self {
            Self::Named(target) => ExportChoice { target: *target, merge: false, numbers: None, from: None },
            Self::Chosen(choice) => choice.clone(),
        }
    }
}

impl OutputRecipe {
    /// What is written for servers.
    pub fn exports(&self) -> Vec<ExportChoice> {
        self.export.iter().flatten().map(ExportRecipe::choice).collect()
    }
}

impl ExportChoice {
    /// The folder it is written into, below `<dir>/export`: `vllm`, `vllm-merged`, `llama.cpp-merged-q4_k_m`.
    pub fn folder(&self) -> String {
        let merged = if self.merge { "-merged" } else { "" };
        let numbers = self.numbers.map(|numbers| format!("-{numbers}")).unwrap_or_default();
        format!("{}{merged}{numbers}", self.target)
    }

    /// Refuses a choice that contradicts itself, whatever is exported: a number type that its target does not load, or without a model
    /// to store in it.
    pub fn prove(&self) -> Result<(), Fault> {
        let Self { target, merge, numbers, from } = self;
        let refused = |key: &str, what: String, hint: &str| {
            Err(Fault::new(format!("{key} of the export for {target}"), what).hint(hint))
        };
        match (numbers, merge) {
            (Some(numbers), false) => {
                let what = format!("is {numbers}, but an adapter is written as it was trained, in fp32");
                refused("the type", what, "ask for the whole model (merge), or leave the type out")
            }
            (Some(numbers), true) if numbers.plain().is_none() && !target.loads_gguf() => {
                let what = format!("is {numbers}, which only GGUF files have");
                refused("the type", what, "choose bf16, f16 or f32, or the target llama.cpp or ollama")
            }
            _ if from.is_some() && (*target != Target::Ollama || *merge) => {
                let what = "names a base in Ollama, which only an adapter for Ollama needs".into();
                refused("`from`", what, "leave it out")
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_may_not_contradict_itself() {
        let adapter = |target| ExportChoice { target, merge: false, numbers: None, from: None };
        let model = |target, numbers| ExportChoice { merge: true, numbers, ..adapter(target) };
        let from = |choice| ExportChoice { from: Some("llama3".into()), ..choice };
        for fits in [
            model(Target::Vllm, None),
            model(Target::Vllm, Some(FileType::F16)),
            model(Target::Ollama, Some(FileType::Q4KM)),
            from(adapter(Target::Ollama)),
        ] {
            assert_eq!(fits.prove(), Ok(()));
        }
        for (bad, part) in [
            (model(Target::Vllm, Some(FileType::Q4KM)), "is q4_k_m, which only GGUF files have"),
            (ExportChoice { numbers: Some(FileType::F16), ..adapter(Target::LlamaCpp) }, "an adapter is written"),
            (from(model(Target::Ollama, None)), "only an adapter for Ollama"),
            (from(adapter(Target::Vllm)), "only an adapter for Ollama"),
        ] {
            let fault = bad.prove().unwrap_err();
            assert!(fault.what.contains(part) && !fault.hint.is_empty(), "{fault:?}");
        }
    }

    #[test]
    fn number_types_go_by_their_other_names_too() {
        let choice: ExportChoice = serde_yaml::from_str("{target: llama.cpp, merge: true, type: fp16}").unwrap();
        assert_eq!((choice.target, choice.numbers), (Target::LlamaCpp, Some(FileType::F16)));
        assert_eq!(choice.folder(), "llama.cpp-merged-f16");
        let named: ExportRecipe = serde_yaml::from_str("ollama").unwrap();
        assert_eq!(named.choice().folder(), "ollama");
    }
}
