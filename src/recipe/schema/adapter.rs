//! What is grafted: `adapter`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
