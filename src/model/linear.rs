//! A linear layer of the frozen base and the low-rank update it may carry.

use tch::Tensor;

/// `Y = X W^T + bias (+ scale * dropout(X) A^T B^T)`.
#[derive(Debug)]
pub struct Linear {
    /// Module path as the checkpoint has it, without `.weight`: `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// W (out, in).
    pub weight: Weight,
    /// (out).
    pub bias: Option<Tensor>,
    /// The low-rank update.
    pub adapter: Option<LowRank>,
}

/// How a weight is stored.
#[derive(Debug)]
pub enum Weight {
    /// As a tensor in the model's number type.
    Dense(Tensor),
}

/// A low-rank update (arXiv:2106.09685), trained in fp32.
#[derive(Debug)]
pub struct LowRank {
    /// (R, in), fp32, a leaf with gradient.
    pub a: Tensor,
    /// (out, R), fp32, a leaf with gradient.
    pub b: Tensor,
    /// `lora_alpha / r`, or `/ sqrt(r)` when rank-stabilised.
    pub scale: f64,
    /// Probability of dropping an element of X before A.
    pub dropout: f64,
}

impl Linear {
    /// (out, in).
    pub fn shape(&self) -> (i64, i64) {
        match &self.weight {
            Weight::Dense(w) => w.size2().expect("a linear weight has two dimensions: checked at load"),
        }
    }
}
