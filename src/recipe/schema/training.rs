//! How it is trained: `training`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
