//! Verbs of adapters and of what was exported: combine, extract, diff, verify.

use std::path::PathBuf;

use clap::Args;

use super::finite;
use crate::adapter::combine::{MajoritySign, Method};

/// `engraft combine`
#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "Examples:
  engraft combine runs/a/adapter runs/b/adapter --by cat --weights 0.7,0.3 --out both
  engraft combine a b c --by ties --density 0.5 --out one

Kinds and numbers are those of PEFT's add_weighted_adapter. `cat` and `svd` are exact or nearly so; `linear` is rough.")]
pub struct Combine {
    /// Adapter folders, as PEFT writes them.
    #[arg(value_name = "ADAPTER", required = true)]
    pub adapters: Vec<PathBuf>,
    /// How
    #[arg(long, value_name = "KIND", default_value = "svd")]
    pub by: Method,
    /// A weight for each adapter; it may be negative [default: 1 each]
    #[arg(long, value_name = "W,W,...", value_delimiter = ',', allow_hyphen_values = true, value_parser = finite)]
    pub weights: Vec<f64>,
    /// Share of the numbers that are kept, where some are dropped: above 0, at most 1
    #[arg(long, value_name = "SHARE", value_parser = finite)]
    pub density: Option<f64>,
    /// Whose sign counts, with ties
    #[arg(long, value_name = "SIGN", default_value = "total")]
    pub majority_sign: MajoritySign,
    /// Rank of what is split by its singular values [default: the largest of the adapters]
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).range(1..))]
    pub rank: Option<u32>,
    /// Seed of what is dropped at random, with dare
    #[arg(long, value_name = "N", default_value_t = 42)]
    pub seed: u64,
    /// Folder to write; it must be empty or not exist
    #[arg(long, short, value_name = "DIR")]
    pub out: PathBuf,
    /// Replace the adapter that the folder holds
    #[arg(long)]
    pub overwrite: bool,
    /// Print what was written as one JSON object: rank, modules, what splitting missed, notices
    #[arg(long)]
    pub json: bool,
}

/// `engraft extract`
#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "Example:
  engraft extract --tuned my-finetune --model HuggingFaceTB/SmolLM2-135M-Instruct --rank 64 --out adapter")]
pub struct Extract {
    /// The fine-tuned model: hub id, folder of safetensors or .gguf file
    #[arg(long, value_name = "MODEL")]
    pub tuned: String,
    /// The base it was made of
    #[arg(long, short, value_name = "MODEL")]
    pub model: String,
    /// Rank of every linear's update
    #[arg(long, short, value_name = "R", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub rank: u32,
    /// Keep what is no linear and became another whole, in modules_to_save
    #[arg(long)]
    pub save_others: bool,
    /// Folder to write; it must be empty or not exist
    #[arg(long, short, value_name = "DIR")]
    pub out: PathBuf,
    /// Replace the adapter that the folder holds
    #[arg(long)]
    pub overwrite: bool,
    /// Print the report as one JSON object: the error of each linear, what is kept whole, what is lost
    #[arg(long)]
    pub json: bool,
}

/// `engraft diff`
#[derive(Debug, Clone, PartialEq, Args)]
#[command(
    after_help = "Ends with 12 where something differs. Of adapters, what their configs say of the scale counts, too.

Example:
  engraft diff runs/a/adapter runs/b/adapter --tolerance 1e-5"
)]
pub struct Diff {
    /// Model (hub id, folder, .gguf file), adapter or .safetensors file
    #[arg(value_name = "A")]
    pub first: String,
    /// Another
    #[arg(value_name = "B")]
    pub second: String,
    /// Tensors whose relative difference is at most this count as equal, whatever number type they are stored in
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = tolerance)]
    pub tolerance: f64,
    /// Print one JSON object with every difference
    #[arg(long)]
    pub json: bool,
}

/// `engraft verify`
#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "Examples:
  engraft verify runs/a                                    every file of manifest.json, by its SHA-256
  engraft verify runs/a --key public.pem                   and who signed it
  engraft verify exports/a                                 the probes, asked of the exported files
  engraft verify exports/a --server http://localhost:8000  the same, asked of what runs there

Ends with 12 where something changed, or where it is not the trained model that answers.")]
pub struct Verify {
    /// A run's folder, or the folder of an adapter or model, or a .gguf file, with probe.json beside it
    #[arg(value_name = "RUN|EXPORT")]
    pub folder: PathBuf,
    /// Base of an exported adapter: hub id, folder of safetensors or .gguf file [default: as the adapter names it]
    #[arg(long, short, value_name = "MODEL", conflicts_with = "server")]
    pub model: Option<String>,
    /// Revision of a hub id: branch, tag or commit
    #[arg(long, value_name = "REVISION", requires = "model")]
    pub revision: Option<String>,
    /// Ask this server instead of the files: vLLM, SGLang, llama.cpp, TGI, Ollama or another that speaks OpenAI's API
    #[arg(long, value_name = "URL")]
    pub server: Option<String>,
    /// What the server calls the model [default: the only one it has]
    #[arg(long, value_name = "NAME", requires = "server")]
    pub served_model: Option<String>,
    /// Environment variable that holds the server's key
    #[arg(long, value_name = "VARIABLE", requires = "server")]
    pub api_key_env: Option<String>,
    /// How long the server may take for an answer, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86400))]
    pub timeout: u64,
    /// Public key (PEM) that the manifest must be signed with
    #[arg(long, value_name = "FILE", conflicts_with = "server")]
    pub key: Option<PathBuf>,
    /// Print the result as one JSON object
    #[arg(long)]
    pub json: bool,
}

fn tolerance(typed: &str) -> Result<f64, String> {
    finite(typed).and_then(|t| if t >= 0.0 { Ok(t) } else { Err("must be at least 0".into()) })
}
