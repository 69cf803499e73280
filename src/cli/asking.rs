//! Verbs that ask a model, and how it is named.

use std::path::PathBuf;

use clap::Args;

use super::{Quantizing, finite};
use crate::recipe::{DeviceChoice, Dtype, QuantizationType};

/// `engraft chat`
#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "Examples:
  engraft chat --model HuggingFaceTB/SmolLM2-135M-Instruct
  engraft chat --model SmolLM2-135M-Instruct.Q4_1.gguf --adapter runs/quickstart/adapter")]
pub struct Chat {
    /// Which model.
    #[command(flatten)]
    pub model: ModelChoice,
    /// How to choose tokens.
    #[command(flatten)]
    pub sampling: Sampling,
    /// System message
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
}

/// `engraft generate`
#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "Examples:
  engraft generate --model m.gguf --prompt 'The capital of France is'
  cat question.txt | engraft generate --model m.gguf --adapter runs/a/adapter --prompt - --json")]
pub struct Generate {
    /// Which model.
    #[command(flatten)]
    pub model: ModelChoice,
    /// The user's message; `-` reads it from standard input
    #[arg(long, short, value_name = "TEXT", default_value = "-")]
    pub prompt: String,
    /// System message
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub system: Option<String>,
    /// Use the prompt as it is, without the chat template
    #[arg(long)]
    pub raw: bool,
    /// How to choose tokens.
    #[command(flatten)]
    pub sampling: Sampling,
    /// Print one JSON object: text, token counts, why it stopped
    #[arg(long)]
    pub json: bool,
}

/// `engraft logits`
#[derive(Debug, Clone, PartialEq, Args)]
pub struct Logits {
    /// Which model.
    #[command(flatten)]
    pub model: ModelChoice,
    /// Token ids of one document, or of several end to end
    #[arg(long, value_name = "ID,ID,...", value_delimiter = ',', required = true)]
    pub ids: Vec<u32>,
    /// Tokens of each document, which sees nothing of the others; all are one document where not given
    #[arg(long, value_name = "N,N,...", value_delimiter = ',')]
    pub lengths: Vec<u32>,
    /// Safetensors file to write: `logits` (T, V), fp32
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
}

/// `engraft codes`
#[derive(Debug, Clone, PartialEq, Args)]
pub struct Codes {
    /// Safetensors file of tensors in bf16, fp16 or fp32
    #[arg(long, value_name = "FILE")]
    pub tensors: PathBuf,
    /// The form to quantise to
    #[arg(long = "type", value_name = "TYPE", default_value = "nf4")]
    pub form: QuantizationType,
    /// How finely.
    #[command(flatten)]
    pub quantizing: Quantizing,
    /// Safetensors file to write: codes, scales and numbers
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Where it is done
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: DeviceChoice,
    /// Quantise, make whole and copy each tensor so many times, and print the seconds of each
    #[arg(long, value_name = "N")]
    pub repeat: Option<u32>,
    /// CPU threads [default: all that this process may use]
    #[arg(long, value_name = "N")]
    pub threads: Option<u32>,
}

/// Which model to run, and where.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct ModelChoice {
    /// Hub id, folder of safetensors or .gguf file
    #[arg(long, short, value_name = "MODEL")]
    pub model: String,
    /// Revision of a hub id: branch, tag or commit
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
    /// Adapter folder, as PEFT writes it
    #[arg(long, short, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Number type of weights and activations [default: bf16, or what the adapter's quantised base was made whole in]
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<Dtype>,
    /// Where to run
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: DeviceChoice,
}

/// How to choose tokens, and when to stop.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct Sampling {
    /// Longest answer, in tokens
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: u32,
    /// 0 always takes the likeliest token; higher is more varied
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = temperature)]
    pub temperature: f64,
    /// Choose among the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = probability)]
    pub top_p: f64,
    /// Stop before this text (repeatable); the model's own end of turn always stops
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Seed of the choices
    #[arg(long, value_name = "N", default_value_t = 42)]
    pub seed: u64,
}

fn temperature(typed: &str) -> Result<f64, String> {
    finite(typed).and_then(|t| if t >= 0.0 { Ok(t) } else { Err("must be at least 0".into()) })
}

fn probability(typed: &str) -> Result<f64, String> {
    finite(typed).and_then(|p| if p > 0.0 && p <= 1.0 { Ok(p) } else { Err("must be above 0 and at most 1".into()) })
}
