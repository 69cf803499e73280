//! The recipe's structs. Their doc comments are the reference: `engraft schema` and the README print them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ExportRecipe;

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

/// What is grafted. Names are PEFT's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdapterRecipe {
    /// The method.
    pub method: AdapterMethod,
    /// Rank.
    #[schemars(range(min = 1, max = 65536))]
    pub r: u32,
    /// Scale numerator: the update is `lora_alpha / r * B A` (`lora_alpha / sqrt(r)` with `use_rslora`).
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub lora_alpha: f64,
    /// Dropout on the adapter's input.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub lora_dropout: f64,
    /// `all-linear` (every linear but the head), module names (by suffix), or one regular expression over the full module path.
    pub target_modules: Targets,
    /// Modules left out, by the same rules as `target_modules`.
    pub exclude_modules: Option<Targets>,
    /// Only these layers (indices from 0).
    #[schemars(length(min = 1))]
    pub layers_to_transform: Option<Vec<u32>>,
    /// Rank by module name or regular expression.
    #[schemars(extend("additionalProperties" = {"type": "integer", "format": "uint32", "minimum": 1, "maximum": 65536}))]
    pub rank_pattern: BTreeMap<String, u32>,
    /// `lora_alpha` by module name or regular expression.
    #[schemars(extend("additionalProperties" = {"type": "number", "format": "double", "exclusiveMinimum": 0}))]
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Rank-stabilised scale, `lora_alpha / sqrt(r)` (arXiv:2312.03732).
    pub use_rslora: bool,
    /// Train the lengths of the weights' rows, too (DoRA, arXiv:2402.09353), also with `method: qlora`.
    pub use_dora: bool,
    /// How A and B start. `pissa` and `olora` train on what is left of the base; the adapter that is written has twice the rank and
    /// fits the base as it was.
    pub init_lora_weights: InitLora,
    /// For `pissa`: iterations of the fast decomposition (arXiv:0909.4061), as in PEFT's `pissa_niter_16`; the exact one where left
    /// out, which takes seconds for each large weight.
    #[schemars(range(min = 0, max = 1000))]
    pub pissa_niter: Option<u32>,
    /// For `loftq`: how often quantising and making good take turns, as PEFT's `loftq_iter`. From 2 on the base that is trained on is
    /// what is left of it, as with `pissa`.
    #[schemars(range(min = 1, max = 1000))]
    pub loftq_iter: u32,
    /// Modules trained whole, in fp32, with their biases, by the ends of their paths: the embedding, the head, linears, norms (`norm` is
    /// all that end so). A head that shares the embedding's weight shares what is trained (PEFT's `ensure_weight_tying`), unless both
    /// are named.
    #[schemars(length(min = 1), inner(length(min = 1)))]
    pub modules_to_save: Option<Vec<String>>,
    /// Tokens trained by their rows alone: ids for the embedding (and a head that shares it), or lists of ids by module.
    pub trainable_token_indices: Option<TokenIndices>,
    /// Tokens added to the tokenizer, and trained by their rows. Where the base has no rows left for them it gets more, which begin
    /// as the mean of all.
    #[schemars(length(min = 1), inner(length(min = 1)))]
    pub new_tokens: Option<Vec<String>>,
    /// Continue from this adapter folder (PEFT layout).
    #[schemars(length(min = 1))]
    pub adapter_name_or_path: Option<PathBuf>,
}

impl Default for AdapterRecipe {
    fn default() -> Self {
        Self {
            method: AdapterMethod::Lora,
            r: 16,
            lora_alpha: 32.0,
            lora_dropout: 0.0,
            target_modules: Targets::default(),
            exclude_modules: None,
            layers_to_transform: None,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            use_rslora: false,
            use_dora: false,
            init_lora_weights: InitLora::Kaiming,
            pissa_niter: None,
            loftq_iter: 1,
            modules_to_save: None,
            trainable_token_indices: None,
            new_tokens: None,
            adapter_name_or_path: None,
        }
    }
}

/// The adapter method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AdapterMethod {
    /// Low-rank adaptation (arXiv:2106.09685).
    #[default]
    Lora,
    /// The same on a quantised base (arXiv:2305.14314); see `quantization`.
    Qlora,
    /// LoRA with `use_dora`.
    Dora,
}

impl AdapterRecipe {
    /// Whether the lengths of the weights' rows are trained, too.
    pub fn decomposes(&self) -> bool {
        self.use_dora || self.method == AdapterMethod::Dora
    }

    /// Trains the rows of these tokens, too, of the embedding and of a head that has rows of its own.
    pub fn train_tokens(&mut self, ids: &[u32], tied_head: bool) {
        let named = self.trainable_token_indices.take();
        let with = |own: Vec<u32>| own.into_iter().chain(ids.iter().copied()).collect::<Vec<u32>>();
        self.trainable_token_indices = Some(match named {
            Some(TokenIndices::Modules(mut modules)) => {
                for own in modules.values_mut() {
                    *own = with(std::mem::take(own));
                }
                TokenIndices::Modules(modules)
            }
            named if tied_head => TokenIndices::Embedding(match named {
                Some(TokenIndices::Embedding(own)) => with(own),
                Some(TokenIndices::Modules(_)) | None => with(Vec::new()),
            }),
            named => {
                let own = match named {
                    Some(TokenIndices::Embedding(own)) => own,
                    Some(TokenIndices::Modules(_)) | None => Vec::new(),
                };
                TokenIndices::Modules([("embed_tokens".into(), with(own)), ("lm_head".into(), ids.to_vec())].into())
            }
        });
    }

    /// Whether A and B start from the weights themselves.
    pub fn starts_from_weights(&self) -> bool {
        self.takes_off() || self.init_lora_weights == InitLora::Loftq
    }

    /// Whether what A and B start with is taken off the weights.
    pub fn takes_off(&self) -> bool {
        let taken = match self.init_lora_weights {
            InitLora::Pissa | InitLora::Olora => true,
            InitLora::Loftq => self.loftq_iter > 1,
            InitLora::Kaiming | InitLora::Gaussian => false,
        };
        self.adapter_name_or_path.is_none() && taken
    }
}

/// How the frozen base is quantised, with `adapter.method: qlora`. Names are bitsandbytes'.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct QuantizationRecipe {
    /// The form of the linears' weights; without it that in which the base is stored, or `nf4`.
    #[serde(rename = "type")]
    pub form: Option<QuantizationType>,
    /// Quantise the blocks' scales, too (`nf4` and `fp4`).
    pub double_quant: bool,
    /// Numbers to a block with a scale of its own (`nf4` and `fp4`).
    #[schemars(extend("enum" = [32, 64, 128, 256, 512, 1024, 2048, 4096]))]
    pub block_size: u32,
    /// Modules that stay as they are: those whose path is such a name or ends in `.name`.
    #[schemars(inner(length(min = 1)))]
    pub skip: Vec<String>,
    /// Accepted for recipes that have it from bitsandbytes, and nothing but `dtype`: products are computed in the type of the activations.
    pub compute_dtype: Option<Dtype>,
    /// What products with the base read.
    pub compute: Compute,
    /// Keep the quantised numbers in `dtype`, so that none is made whole twice: the same result, in more memory and less time.
    pub cache_dequantized: CacheDequantized,
}

impl Default for QuantizationRecipe {
    fn default() -> Self {
        Self {
            form: None,
            double_quant: true,
            block_size: 64,
            skip: vec!["lm_head".into()],
            compute_dtype: None,
            compute: Compute::Dequantized,
            cache_dequantized: CacheDequantized::Auto,
        }
    }
}

/// The form of a quantised base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum QuantizationType {
    /// Four bits: quantiles of a normal distribution (arXiv:2305.14314).
    #[default]
    Nf4,
    /// Four bits: sign, exponent and mantissa.
    Fp4,
    /// Eight bits: integers with a scale to each row (arXiv:2208.07339), inputs not quantised.
    Int8,
    /// Eight bits: floating-point numbers (e4m3) with a scale to each row (arXiv:2209.05433), inputs not quantised.
    Fp8,
}

impl std::fmt::Display for QuantizationType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
            Self::Int8 => "int8",
            Self::Fp8 => "fp8",
        })
    }
}

/// What products with a quantised base read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// Its numbers, made whole.
    #[default]
    Dequantized,
    /// The fp8 numbers themselves, with `dtype: bf16` and `type: fp8` or a base that is stored so, a scale to each row; inputs and
    /// gradients are quantised row by row, too. Faster where a GPU multiplies fp8 (compute capability 8.9 and up), and another
    /// arithmetic; experts' weights are made whole.
    Fp8,
}

/// Whether a quantised base is kept made whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CacheDequantized {
    /// On the CPU, where it takes less than half of the free memory.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never: every product makes its weight whole.
    Never,
}

/// One name or regular expression, or a list of names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Targets {
    /// `all-linear`, or a regular expression that must match the whole module path.
    Pattern(#[schemars(length(min = 1))] String),
    /// Module names; a module matches when its path is a name or ends in `.name`.
    Names(#[schemars(length(min = 1), inner(length(min = 1)))] Vec<String>),
}

/// Ids of tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum TokenIndices {
    /// Of the embedding.
    Embedding(#[schemars(length(min = 1))] Vec<u32>),
    /// By the end of a module's path: the embedding's, the head's.
    Modules(BTreeMap<String, Vec<u32>>),
}

impl Default for Targets {
    fn default() -> Self {
        Targets::Pattern("all-linear".into())
    }
}

/// How A and B start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum InitLora {
    /// A uniform in +-1/sqrt(in), PEFT's default (`kaiming_uniform_` with a = sqrt(5)); B zero.
    #[default]
    Kaiming,
    /// A normal with standard deviation 1/r, PEFT's `gaussian`; B zero.
    Gaussian,
    /// The weight's principal singular values and vectors, which are taken off it (arXiv:2404.02948).
    Pissa,
    /// The first columns of its QR decomposition, which are taken off it (arXiv:2406.01775).
    Olora,
    /// What quantising the weight lost, with `method: qlora` (arXiv:2310.08659); see `loftq_iter`.
    Loftq,
}

/// What is learned from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DatasetRecipe {
    /// Parquet to train on: a file, folder, glob, or a list of these, each with an optional weight.
    pub train: Sources,
    /// Parquet to evaluate on.
    #[serde(default)]
    pub eval: Option<Sources>,
    /// What a row is; inferred from the columns when not named.
    #[serde(default)]
    pub format: Option<DataFormat>,
    /// Column names, where they differ from the format's own: `{messages: conversations}`, `{prompt: question, completion: answer}`.
    #[schemars(extend("additionalProperties" = {"type": "string", "minLength": 1}))]
    #[serde(default)]
    pub columns: BTreeMap<String, String>,
    /// Chat template: a built-in name, a file (`.jinja`), or absent for the model's own.
    #[schemars(length(min = 1))]
    #[serde(default)]
    pub chat_template: Option<String>,
    /// System message put before conversations that have none.
    #[serde(default)]
    pub system: Option<String>,
    /// Longest document, in tokens.
    #[schemars(range(min = 2, max = 16777216))]
    #[serde(default = "max_length")]
    pub max_length: u32,
    /// What to do with a row longer than `max_length`.
    #[serde(default)]
    pub overlong: Overlong,
    /// What to do with a row that has nothing to train on or is malformed.
    #[serde(default)]
    pub on_bad_row: OnBadRow,
    /// Fill each micro-batch row up to `max_length` with whole documents; they never attend to each other.
    #[serde(default)]
    pub packing: bool,
    /// Which tokens are trained.
    #[serde(default)]
    pub train_on: TrainOn,
    /// Encode special-token text inside user content as the special token instead of as plain text.
    #[serde(default)]
    pub allow_special_tokens: bool,
    /// Mix rows anew each epoch (from `training.seed`).
    #[serde(default = "yes")]
    pub shuffle: bool,
    /// Use at most this many rows (the first ones), for trials.
    #[schemars(range(min = 1))]
    #[serde(default)]
    pub limit: Option<u64>,
}

impl DatasetRecipe {
    /// Nothing but defaults, for what needs no recipe.
    pub fn defaults() -> Self {
        serde_json::from_value(serde_json::json!({"train": ""})).expect("every other key has a default")
    }
}

/// One source, or several.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Sources {
    /// A file, folder or glob.
    One(#[schemars(length(min = 1))] String),
    /// Several, each with an optional weight.
    Many(#[schemars(length(min = 1))] Vec<Source>),
}

/// A file, folder or glob, with an optional weight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Source {
    /// Weight 1.
    Path(#[schemars(length(min = 1))] String),
    /// `{path, weight}`.
    Weighted(WeightedSource),
}

/// A source with a weight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WeightedSource {
    /// A file, folder or glob.
    #[schemars(length(min = 1))]
    pub path: String,
    /// How often each row is seen per epoch: 2 sees every row twice, 0.5 a seeded half of them.
    #[schemars(range(max = 1000), extend("exclusiveMinimum" = 0))]
    #[serde(default = "one")]
    pub weight: f64,
}

/// What a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DataFormat {
    /// A list of `{role, content}` (or ShareGPT's `{from, value}`), or a JSON string of one.
    Messages,
    /// Two strings (or two message lists); the completion is trained. Strings are used as they are, without a chat template.
    PromptCompletion,
    /// Alpaca's `instruction`, optional `input`, `output`: one user turn and one assistant turn through the chat template.
    Instruction,
    /// Plain text, every token trained.
    Text,
}

/// A row longer than `max_length`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Overlong {
    /// Leave it out, counted (`text` is split into several documents instead, nothing lost).
    #[default]
    Drop,
    /// Keep its first `max_length` tokens, counted; a row whose answer is cut is named in the report.
    Truncate,
    /// Stop with the row.
    Error,
}

/// A row that is malformed or has nothing to train on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnBadRow {
    /// Stop with the row.
    #[default]
    Error,
    /// Leave it out, counted and named.
    Skip,
}

/// Which tokens are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TrainOn {
    /// The completion, or every assistant turn with its end-of-turn token (another name for `assistant`).
    #[default]
    Completion,
    /// Every assistant turn with its end-of-turn token.
    Assistant,
    /// The last assistant turn with its end-of-turn token.
    LastAssistant,
    /// Every token.
    All,
}

/// How to train. Names are TRL's and transformers'.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainingRecipe {
    /// Passes over the data; ignored when `max_steps` is given.
    #[schemars(range(max = 10000), extend("exclusiveMinimum" = 0))]
    pub epochs: f64,
    /// Optimizer steps.
    #[schemars(range(min = 1))]
    pub max_steps: Option<u64>,
    /// Rows per forward pass (packed rows of `max_length` tokens with `packing`); `auto`: as many as the memory plan finds best, of
    /// the numbers that divide `global_batch_size`. It changes memory and speed, never the loss.
    pub micro_batch_size: MicroBatch,
    /// Forward passes per optimizer step.
    #[schemars(range(min = 1))]
    pub gradient_accumulation_steps: u32,
    /// Rows per optimizer step, instead of `gradient_accumulation_steps`: a multiple of `micro_batch_size`.
    #[schemars(range(min = 1, max = 1048576))]
    pub global_batch_size: Option<u32>,
    /// Peak learning rate.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub learning_rate: f64,
    /// The optimizer.
    pub optimizer: Optimizer,
    /// First decay of AdamW's kinds and of Lion; absent: 0.9.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub adam_beta1: Option<f64>,
    /// Second decay of AdamW's kinds and of Lion; absent: 0.999, 0.99 for Lion.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub adam_beta2: Option<f64>,
    /// Epsilon of AdamW's kinds.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub adam_epsilon: f64,
    /// Momentum of `sgd` and `muon`; absent: 0 and 0.95.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub momentum: Option<f64>,
    /// Whether the momentum of `sgd` and `muon` is Nesterov's; absent: false and true.
    pub nesterov: Option<bool>,
    /// What `muon` multiplies the learning rate by; absent: `original`.
    pub adjust_lr_fn: Option<AdjustLr>,
    /// The learning rate of B is so many times that of A (LoRA+, arXiv:2402.12354); absent: the same.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub loraplus_lr_ratio: Option<f64>,
    /// Weight decay on A and B: decoupled from the gradient, but with `sgd`.
    #[schemars(range(min = 0))]
    pub weight_decay: f64,
    /// Shape of the learning rate after warmup.
    pub lr_scheduler: Scheduler,
    /// Steps of linear warmup.
    pub warmup_steps: Option<u64>,
    /// Warmup as a fraction of all steps; not together with `warmup_steps`.
    #[schemars(range(min = 0, max = 1))]
    pub warmup_ratio: Option<f64>,
    /// Gradients are scaled down to this L2 norm; 0 turns clipping off.
    #[schemars(range(min = 0))]
    pub max_grad_norm: f64,
    /// Activation recompute: which layers keep their activations.
    pub recompute: Recompute,
    /// Whether the inputs of recomputed layers wait for backward in the host's memory, pinned: copied away and back while the GPU
    /// computes, and the same to the bit. On the CPU there is nothing to gain, and it is not done.
    pub offload: Offload,
    /// How many tokens go through a layer's dense feed-forward at a time, for very long rows: what it keeps is then never there of more,
    /// every layer is recomputed, and its feed-forward once more. Sums are rounded in another order, and `lora_dropout` drops other
    /// numbers; experts are not tiled.
    pub tile_feed_forward: TileFeedForward,
    /// Seed of everything random.
    pub seed: u64,
    /// Log every so many steps.
    #[schemars(range(min = 1))]
    pub logging_steps: u64,
    /// Evaluate every so many steps; absent: once at the end of each epoch when there is an eval set.
    #[schemars(range(min = 1))]
    pub eval_steps: Option<u64>,
    /// Save a resumable state every so many steps.
    #[schemars(range(min = 1))]
    pub save_steps: Option<u64>,
    /// Keep this many states (the best one is kept besides).
    #[schemars(range(min = 1))]
    pub save_total_limit: u32,
    /// Stop after this many evaluations without improvement.
    #[schemars(range(min = 1))]
    pub early_stopping_patience: Option<u32>,
    /// An evaluation improves when its loss falls by more than this.
    #[schemars(range(min = 0))]
    pub early_stopping_threshold: f64,
    /// At the end, take the adapter of the best evaluation instead of the last.
    pub load_best_model_at_end: bool,
    /// NEFTune noise (arXiv:2310.05914) on the embeddings; 0 or absent turns it off.
    #[schemars(range(min = 0))]
    pub neftune_noise_alpha: Option<f64>,
    /// Coefficient of the loss that keeps a mixture's experts balanced (arXiv:2101.03961); absent, the base's own where its config
    /// sets `output_router_logits`, 0 turns it off. The reported loss is the cross-entropy alone; this
    /// one, without its coefficient, is reported as `router_aux_loss`.
    #[schemars(range(min = 0))]
    pub router_aux_loss_coef: Option<f64>,
    /// Stop after this many steps in a row with a non-finite loss or gradient.
    #[schemars(range(min = 1))]
    pub max_nonfinite_steps: u32,
    /// Equal runs on the same GPU are equal bit for bit; what that costs is measured as the run begins, and said. On the CPU they always
    /// are, with as many threads.
    pub deterministic: bool,
    /// CPU threads; absent: all the machine (or its cgroup) allows.
    #[schemars(range(min = 1, max = 1024))]
    pub threads: Option<u32>,
}

impl Default for TrainingRecipe {
    fn default() -> Self {
        Self {
            epochs: 1.0,
            max_steps: None,
            micro_batch_size: MicroBatch::Rows(8),
            gradient_accumulation_steps: 1,
            global_batch_size: None,
            learning_rate: 2e-4,
            optimizer: Optimizer::Adamw,
            adam_beta1: None,
            adam_beta2: None,
            adam_epsilon: 1e-8,
            momentum: None,
            nesterov: None,
            adjust_lr_fn: None,
            loraplus_lr_ratio: None,
            weight_decay: 0.0,
            lr_scheduler: Scheduler::Cosine,
            warmup_steps: None,
            warmup_ratio: None,
            max_grad_norm: 1.0,
            recompute: Recompute::Auto,
            offload: Offload::Auto,
            tile_feed_forward: TileFeedForward::Left(Tiling::Auto),
            seed: 42,
            logging_steps: 1,
            eval_steps: None,
            save_steps: None,
            save_total_limit: 2,
            early_stopping_patience: None,
            early_stopping_threshold: 0.0,
            load_best_model_at_end: false,
            neftune_noise_alpha: None,
            router_aux_loss_coef: None,
            max_nonfinite_steps: 3,
            deterministic: false,
            threads: None,
        }
    }
}

/// Rows per forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum MicroBatch {
    /// So many.
    Rows(#[schemars(range(min = 1))] u32),
    /// Left to the plan.
    Planned(Auto),
}

impl MicroBatch {
    /// How many, unless that is left to the plan.
    pub fn rows(self) -> Option<u32> {
        match self {
            Self::Rows(rows) => Some(rows),
            Self::Planned(Auto::Auto) => None,
        }
    }

    /// How many rows are evaluated at a time: the usual number where training leaves it to the plan.
    pub fn rows_to_evaluate(self) -> u64 {
        self.rows().or(TrainingRecipe::default().micro_batch_size.rows()).map_or(1, u64::from)
    }
}

/// Left to the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Auto {
    /// As the memory plan finds best.
    Auto,
}

/// The optimizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Optimizer {
    /// AdamW (arXiv:1711.05101), libtorch's fused kernel.
    #[default]
    Adamw,
    /// AdamW with moments of 8 bits (arXiv:2110.02861), as bitsandbytes keeps them.
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
    /// Adafactor (arXiv:1804.04235), as transformers' Trainer sets it: the learning rate is the recipe's.
    Adafactor,
    /// Lion (arXiv:2302.06675); it wants a learning rate some ten times lower than AdamW's.
    Lion,
    /// Gradient descent, with momentum where one is given.
    Sgd,
    /// Schedule-free AdamW (arXiv:2405.15682); it needs `lr_scheduler: constant`. An average of the steps is evaluated and saved.
    ScheduleFreeAdamw,
    /// Muon, as torch has it: momentum made orthogonal; it wants a learning rate some hundred times higher than AdamW's, or the same
    /// with `adjust_lr_fn: match_rms_adamw`.
    Muon,
}

/// What `muon` multiplies the learning rate by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AdjustLr {
    /// sqrt(max(1, rows / columns)).
    #[default]
    Original,
    /// 0.2 sqrt(max(rows, columns)): steps as large as AdamW's (arXiv:2502.16982).
    MatchRmsAdamw,
}

/// Shape of the learning rate after warmup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Scheduler {
    /// Half a cosine down to 0.
    #[default]
    Cosine,
    /// A line down to 0.
    Linear,
    /// The peak throughout.
    Constant,
}

/// Activation recompute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Recompute only the layers whose activations would not fit.
    #[default]
    Auto,
    /// Keep every layer's activations.
    None,
    /// Recompute every layer.
    Full,
}

/// Whether the inputs of recomputed layers wait in the host's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Offload {
    /// Only where recomputing every layer is not enough.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Those of every recomputed layer.
    On,
}

/// How many tokens go through a dense feed-forward at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum TileFeedForward {
    /// So many.
    Tokens(#[schemars(range(min = 1))] u32),
    /// Not said.
    Left(Tiling),
}

/// Whether feed-forwards are tiled where no number of tokens is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Tiling {
    /// Only where nothing else fits, in the largest tiles that do.
    Auto,
    /// All tokens at once.
    Off,
}

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

fn max_length() -> u32 {
    2048
}
fn yes() -> bool {
    true
}
fn one() -> f64 {
    1.0
}
fn save_adapter() -> Vec<Save> {
    vec![Save::Adapter]
}
