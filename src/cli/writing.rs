//! Verbs that write models: merge, quantize, export.

use std::path::PathBuf;

use clap::Args;

use super::Overrides;
use crate::recipe::{Dtype, FileType, QuantizationType, Save, Target};

/// `engraft merge`
#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "Examples:
  engraft merge --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter runs/a/adapter --out merged
  engraft merge --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter runs/a/adapter --out merged-4bit --quantize nf4

The merged model is asked some prompts beside the adapter on its base, both computed in fp32, and how far their logits are apart is
printed and written into the model's manifest.json.")]
pub struct Merge {
    /// Base model: hub id, folder of safetensors or .gguf file
    #[arg(long, short, value_name = "MODEL")]
    pub model: String,
    /// Revision of a hub id: branch, tag or commit
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
    /// Adapter folder, as PEFT writes it
    #[arg(long, short, value_name = "DIR")]
    pub adapter: PathBuf,
    /// Folder to write; it must be empty or not exist
    #[arg(long, short, value_name = "DIR")]
    pub out: PathBuf,
    /// Replace the model that the folder holds; files that are no part of a model are still never deleted
    #[arg(long)]
    pub overwrite: bool,
    /// Number type to write [default: the base's own]
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<Dtype>,
    /// For an adapter that was trained on a quantised base: the numbers to fold it into [default: dequantized]
    #[arg(long, value_name = "NUMBERS")]
    pub onto: Option<Onto>,
    /// How the base was quantised in training, for an adapter that does not say so (PEFT's do not): nf4, or keys of the recipe's
    /// `quantization`, as in '{type: nf4, double_quant: false}'
    #[arg(long, value_name = "TYPE|KEYS")]
    pub trained_on: Option<String>,
    /// Quantise the merged model, as transformers and bitsandbytes load it
    #[arg(long, value_name = "TYPE")]
    pub quantize: Option<QuantizationType>,
    /// What is quantised, and how finely.
    #[command(flatten)]
    pub quantizing: Quantizing,
    /// Ask these prompts: a text file, one to a line [default: a few of many kinds]
    #[arg(long, value_name = "FILE", conflicts_with = "no_probe")]
    pub probe: Option<PathBuf>,
    /// Do not ask: the only part of merging that needs the whole model in memory
    #[arg(long)]
    pub no_probe: bool,
    /// Take a base with other numbers than the adapter was trained on
    #[arg(long)]
    pub other_base: bool,
    /// Print the model's manifest.json
    #[arg(long)]
    pub json: bool,
}

/// What is quantised, and how finely.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct Quantizing {
    /// Keep the blocks' scales in fp32
    #[arg(long)]
    pub no_double_quant: bool,
    /// Numbers to a block with a scale of its own: 32, 64, 128, ... 4096 (nf4 and fp4)
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = block_size)]
    pub block_size: u32,
    /// Modules that stay as they are: those whose path is such a name or ends in .NAME (repeatable)
    #[arg(long, value_name = "NAME", default_value = "lm_head")]
    pub skip: Vec<String>,
}

/// The numbers that an adapter trained on a quantised base is folded into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Onto {
    /// Those it was trained on: the merged model answers as the trained one did.
    Dequantized,
    /// The base's own, which the adapter has never seen: the merged model differs by what quantising had taken away.
    Original,
}

impl std::fmt::Display for Onto {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Dequantized => "dequantized",
            Self::Original => "original",
        })
    }
}

/// `engraft export`
#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "Examples:
  engraft export runs/a --target vllm --out served                 the adapter, as vLLM loads it
  engraft export runs/a --target transformers --merge --out whole  the whole model
  engraft export runs/a --target llama.cpp --merge --type q4_k_m --out gguf
  engraft export someones/adapter --model base --target mlx --out served
  engraft export runs/a --target peft --out served --sign key.pem --push me/tickets
  engraft export recipe.yaml --save adapter --save merged          what a stopped run has learned so far

What a target cannot load is refused, with the way out, before anything is written. Beside what is loaded lie a model card, a
manifest.json, and probe.json: what the trained model and its base answer to some prompts, which `engraft verify` asks again.")]
pub struct Export {
    /// A run's folder, an adapter's folder or a model, with --target; else the recipe of a run
    #[arg(value_name = "SOURCE")]
    pub source: String,
    /// The program that is to load it
    #[arg(long, value_name = "TARGET", requires = "out", conflicts_with_all = ["save", "set"])]
    pub target: Option<Target>,
    /// Folder to write; it must be empty or not exist
    #[arg(long, short, value_name = "DIR", requires = "target")]
    pub out: Option<PathBuf>,
    /// Fold the adapter into its base and write the whole model
    #[arg(long, requires = "target")]
    pub merge: bool,
    /// How the numbers of a whole model are stored [default: as the base's own]
    #[arg(long = "type", value_name = "TYPE", requires = "target")]
    pub numbers: Option<FileType>,
    /// Of an adapter for Ollama: what Ollama calls its base [default: the base's own files]
    #[arg(long, value_name = "NAME", requires = "target")]
    pub from: Option<String>,
    /// Base model: hub id, folder of safetensors or .gguf file [default: the one that the run or adapter names]
    #[arg(long, short, value_name = "MODEL", requires = "target")]
    pub model: Option<String>,
    /// Revision of a hub id: branch, tag or commit
    #[arg(long, value_name = "REVISION", requires = "model")]
    pub revision: Option<String>,
    /// Take a base with other numbers than the run was trained on
    #[arg(long, requires = "target")]
    pub other_base: bool,
    /// For an adapter that was trained on a quantised base: the numbers to fold it into
    #[arg(long, value_name = "NUMBERS", default_value = "dequantized", requires = "merge")]
    pub onto: Onto,
    /// Text file of the prompts to ask, one to a line [default: some built in]
    #[arg(long, value_name = "FILE", requires = "target")]
    pub probe: Option<PathBuf>,
    /// Ask nothing: no probe.json, and no more memory than a tensor takes
    #[arg(long, requires = "target", conflicts_with = "probe")]
    pub no_probe: bool,
    /// Private key (Ed25519, PEM) to sign manifest.json with
    #[arg(long, value_name = "FILE")]
    pub sign: Option<PathBuf>,
    /// Push the folder to this repository of the hub, which is made where it is not there: private, and with a token that may write
    #[arg(long, value_name = "USER/NAME", requires = "target")]
    pub push: Option<String>,
    /// Make that repository a public one
    #[arg(long, requires = "push")]
    pub public: bool,
    /// Replace what the folder holds; files that are no part of an export are still never deleted
    #[arg(long, requires = "target")]
    pub overwrite: bool,
    /// Print one JSON object: what was written, and the notices
    #[arg(long, requires = "target")]
    pub json: bool,
    /// Changes to the recipe.
    #[command(flatten)]
    pub overrides: Overrides,
    /// What to write (repeatable) [default: the recipe's output.save and output.export]
    #[arg(long, value_name = "WHAT")]
    pub save: Vec<Save>,
}

/// `engraft quantize`
#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "Example:
  engraft quantize --model HuggingFaceTB/SmolLM2-135M-Instruct --out SmolLM2-135M-bnb-4bit")]
pub struct Quantize {
    /// Base model: hub id, folder of safetensors or .gguf file
    #[arg(long, short, value_name = "MODEL")]
    pub model: String,
    /// Revision of a hub id: branch, tag or commit
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
    /// Folder to write; it must be empty or not exist
    #[arg(long, short, value_name = "DIR")]
    pub out: PathBuf,
    /// Replace the model that the folder holds; files that are no part of a model are still never deleted
    #[arg(long)]
    pub overwrite: bool,
    /// The form of the linears' weights
    #[arg(long = "type", value_name = "TYPE", default_value = "nf4")]
    pub form: QuantizationType,
    /// What is quantised, and how finely.
    #[command(flatten)]
    pub quantizing: Quantizing,
    /// Number type that weights are read in, and that what is not quantised is stored in
    #[arg(long, value_name = "DTYPE", default_value = "bf16")]
    pub dtype: Dtype,
    /// Print what was written as one JSON object: the scheme, and what quantising took away, weight by weight
    #[arg(long)]
    pub json: bool,
}

fn block_size(typed: &str) -> Result<u32, String> {
    let sizes = crate::quant::four_bit::BLOCKS;
    let found = typed.parse().ok().filter(|size| sizes.contains(&i64::from(*size)));
    found.ok_or_else(|| format!("bitsandbytes has {sizes:?}"))
}
