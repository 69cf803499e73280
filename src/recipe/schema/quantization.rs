//! How the base is kept: `quantization`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Dtype;

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
