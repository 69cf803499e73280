//! The command line: clap structs only. Their doc comments are the help texts.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::adapter::combine::{MajoritySign, Method};
use crate::recipe::{DeviceChoice, Dtype, FileType, QuantizationType, Save, Target};
use crate::train::Card;

/// Graft low-rank adapters onto open language models: one recipe, one executable, exact results.
#[derive(Debug, Clone, PartialEq, Parser)]
#[command(name = "engraft", version, after_help = FIRST_STEPS, after_long_help = FIRST_STEPS_AND_EXIT_CODES)]
#[command(propagate_version = true, arg_required_else_help = true, subcommand_required = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// One verb each.
#[derive(Debug, Clone, PartialEq, Subcommand)]
pub enum Command {
    /// Train an adapter as a recipe says
    Train(Train),
    /// Say what a recipe will take: memory by what it is for, tokens per second, hours, on this machine or another
    Plan(Plan),
    /// Measure a model or adapter on a recipe's eval set
    Eval(Eval),
    /// Talk to a model in the terminal
    Chat(Chat),
    /// Complete one prompt
    Generate(Generate),
    /// Fold an adapter into its base and write the whole model
    Merge(Merge),
    /// Write what a server loads: an adapter by its rules, or the whole model; or the outputs of a stopped run
    Export(Export),
    /// Make one adapter of several of the same base, with weights
    Combine(Combine),
    /// Take the adapter of a given rank that comes nearest to a fine-tuned model
    Extract(Extract),
    /// Compare two adapters or models, tensor by tensor
    Diff(Diff),
    /// Check that a run's files are unchanged, or that an export or a server gives the trained answers
    Verify(Verify),
    /// Write a base in four or eight bits, as transformers and bitsandbytes load it
    Quantize(Quantize),
    /// Show a model, an adapter, a dataset or a run in one screen
    Inspect(Inspect),
    /// Show rows as the model will see them: every token, and whether it is trained
    Preview(Preview),
    /// Check recipes without loading or training anything
    Validate(Validate),
    /// Print the recipe's reference: a JSON Schema for editors, or Markdown
    Schema(Schema),
    /// Write the logits of token ids to a file, for comparing with other programs
    #[command(hide = true)]
    Logits(Logits),
    /// Quantise the tensors of a file and make them whole again, for comparing with other programs
    #[command(hide = true)]
    Codes(Codes),
    /// Check this machine: libtorch, CUDA, memory, disk; what is missing and how to get it
    Doctor(Doctor),
}

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

impl Default for Quantizing {
    fn default() -> Self {
        Self { no_double_quant: false, block_size: 64, skip: vec!["lm_head".into()] }
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

/// `engraft doctor`
#[derive(Debug, Clone, PartialEq, Args)]
pub struct Doctor {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Changes to a recipe.
#[derive(Debug, Clone, PartialEq, Default, Args)]
pub struct Overrides {
    /// Change a key of the recipe, checked as strictly as the file (repeatable)
    ///
    /// The value is read as in YAML: `--set adapter.r=8`, `--set 'adapter.target_modules=[q_proj, v_proj]'`; an empty one
    /// (`--set revision=`) unsets the key. Relative paths start at the current folder.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
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

fn finite(typed: &str) -> Result<f64, String> {
    let number = typed.trim().parse::<f64>().ok().filter(|number| number.is_finite());
    number.ok_or_else(|| format!("{typed:?} is not a number"))
}

fn tolerance(typed: &str) -> Result<f64, String> {
    finite(typed).and_then(|t| if t >= 0.0 { Ok(t) } else { Err("must be at least 0".into()) })
}

fn temperature(typed: &str) -> Result<f64, String> {
    finite(typed).and_then(|t| if t >= 0.0 { Ok(t) } else { Err("must be at least 0".into()) })
}

fn probability(typed: &str) -> Result<f64, String> {
    finite(typed).and_then(|p| if p > 0.0 && p <= 1.0 { Ok(p) } else { Err("must be above 0 and at most 1".into()) })
}

const FIRST_STEPS: &str = "First steps:
  engraft doctor                     is everything there?
  engraft validate recipe.yaml       is the recipe sound?
  engraft plan recipe.yaml           does it fit, and how long will it take?
  engraft preview recipe.yaml        what will be trained, token by token?
  engraft train recipe.yaml          train

Exit codes are listed by `engraft --help`.";

const FIRST_STEPS_AND_EXIT_CODES: &str = "First steps:
  engraft doctor                     is everything there?
  engraft validate recipe.yaml       is the recipe sound?
  engraft plan recipe.yaml           does it fit, and how long will it take?
  engraft preview recipe.yaml        what will be trained, token by token?
  engraft train recipe.yaml          train

Exit codes:
   0  done
   1  a bug or an uncaught failure
   2  wrong usage of the command line
   3  the recipe or a --set is wrong
   4  the dataset or its template cannot be trained on
   5  the model, its tokenizer or an adapter is damaged or not supported
   6  something could not be written, or the output folder is in use
   7  a saved state is damaged or belongs to another recipe, dataset or base
   8  the device is missing or out of memory
   9  the loss or a gradient stopped being finite
  10  a limit (--fail-under, --fail-over) was missed
  11  a hub or server could not be reached
  12  what was compared (diff) is not equal
  12  verify: files changed, or an export or server does not give the trained answers
  75  stopped by a signal; the state is saved, --resume continues

Environment:
  ENGRAFT_CACHE   cache folder [default: $XDG_CACHE_HOME/engraft, else ~/.cache/engraft]
  HF_TOKEN, HF_HOME   token and cache of the hub";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Error, Fault};
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Command, String> {
        let words = std::iter::once("engraft").chain(line.split_whitespace());
        Cli::try_parse_from(words).map(|cli| cli.command).map_err(|error| error.to_string())
    }

    #[test]
    fn the_definition_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn each_verb_is_read() {
        let Command::Train(train) = parse("train r.yaml --set a.b=1 --set c=d=e --resume --json").unwrap() else {
            panic!()
        };
        assert_eq!(train.overrides.set, ["a.b=1", "c=d=e"]);
        assert!(train.resume && train.json && !train.quiet);
        let Command::Eval(eval) = parse("eval r.yaml --fail-under exact_match=0.8 --fail-over loss=2").unwrap() else {
            panic!()
        };
        assert_eq!(eval.fail_under, [Threshold { metric: Metric::ExactMatch, value: 0.8 }]);
        assert_eq!(eval.fail_over, [Threshold { metric: Metric::Loss, value: 2.0 }]);
        let Command::Generate(generate) = parse("generate --model m --dtype fp32 --stop a --stop b").unwrap() else {
            panic!()
        };
        assert_eq!((generate.prompt.as_str(), generate.model.dtype), ("-", Some(Dtype::Fp32)));
        for line in [
            "chat --model m --adapter a --temperature 0.7 --top-p 0.9",
            "merge --model m --adapter a --out o --dtype bf16 --overwrite",
            "merge --model m --adapter a --out o --quantize nf4 --block-size 128 --no-probe --json",
            "export r.yaml --save adapter --save merged",
            "export runs/a --target vllm --out o --model b --revision r --overwrite --json",
            "export runs/a --target transformers --merge --type fp16 --onto original --out o",
            "export runs/a --target llama.cpp --merge --type q4_k_m --no-probe --out o --sign key.pem",
            "export runs/a --target ollama --from llama3 --out o --push me/it --public",
            "combine a b --by dare_ties_svd --weights 0.7,-0.3 --density 0.5 --majority-sign frequency --rank 8 --out o",
            "extract --tuned t --model m --rank 8 --save-others --out o --json",
            "diff a b --tolerance 1e-5 --json",
            "inspect a b --json",
            "preview r.yaml --eval --rows 5 --no-color",
            "validate a.yaml b.yaml",
            "plan r.yaml --gpu h200 --set a.b=1 --json",
            "train r.yaml --ignore-memory-plan --sign key.pem",
            "verify runs/a --key public.pem --json",
            "verify e --model owner/name --revision main",
            "verify e --server http://localhost:8000 --served-model a --api-key-env KEY --timeout 5",
            "schema --markdown",
            "doctor --json",
        ] {
            parse(line).unwrap();
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (line, part) in [
            ("eval r.yaml --fail-under accuracy=1", "there is no metric accuracy"),
            ("eval r.yaml --fail-under loss=nan", "is not a number"),
            ("eval r.yaml --limit 0", "0 is not in"),
            ("generate --model m --temperature=-1", "--temperature"),
            ("generate --model m --top-p 0", "must be above 0"),
            ("generate --model m --dtype int8", "possible values"),
            ("train r.yaml --json --quiet", "cannot be used with"),
            ("merge --model m --adapter a --out o --quantize nf4 --block-size 63", "bitsandbytes has"),
            ("merge --model m --adapter a --out o --probe f --no-probe", "cannot be used with"),
            ("export runs/a --target vllm", "required"),
            ("export runs/a --out o", "required"),
            ("export runs/a --target vllm --out o --save merged", "cannot be used with"),
            ("export runs/a --target tensorrt --out o", "possible values"),
            ("export runs/a --target peft --out o --public", "required"),
            ("export runs/a --target peft --out o --probe f --no-probe", "cannot be used with"),
            ("combine a b --weights 1,x --out o", "is not a number"),
            ("diff a b --tolerance=-1", "at least 0"),
            ("verify e --served-model a", "--server"),
            ("verify e --server http://x --model m", "cannot be used with"),
            ("verify e --server http://x --timeout 0", "0 is not in"),
            ("trian r.yaml", "similar subcommand"),
            ("validate", "required"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
        }
    }

    #[test]
    fn the_help_lists_every_exit_code() {
        let fault = || Fault::new("", "");
        for error in [
            Error::Recipe(vec![]),
            Error::Data(fault()),
            Error::Model(fault()),
            Error::Output(fault()),
            Error::State(fault()),
            Error::Device(fault()),
            Error::Diverged(fault()),
            Error::Gate(fault()),
            Error::Network(fault()),
            Error::Mismatch(fault()),
            Error::Interrupted(fault()),
        ] {
            assert!(FIRST_STEPS_AND_EXIT_CODES.contains(&format!("\n{:>4}  ", error.exit_code())), "{error:?}");
        }
    }
}
