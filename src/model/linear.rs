//! A linear layer of the frozen base and the low-rank update it may carry; or one linear of every expert of a block, whose tensors
//! have one more dimension (E) in front.

use tch::Tensor;

use crate::ops::Operand;
pub use crate::ops::{LowRank, Trained};
pub use crate::quant::Weight;

/// `Y = X W^T + bias (+ scale * dropout(X) A^T B^T)`.
#[derive(Debug)]
pub struct Linear {
    /// Module path as transformers has it, without `.weight`: `model.layers.0.self_attn.q_proj`. Where it stands for one linear of
    /// every expert, [`super::sites::Site::name`].
    pub name: String,
    /// W (out, in), or (E, out, in).
    pub weight: Weight,
    /// What is trained in its place.
    pub trained: Option<Trained>,
    /// (out), or (E, out).
    pub bias: Option<Tensor>,
    /// The low-rank update.
    pub adapter: Option<LowRank>,
}

impl Clone for Linear {
    /// Another handle to the same tensors.
    fn clone(&self) -> Self {
        Self {
            name: self.name.clone(),
            weight: self.weight.handle(),
            trained: self.trained.as_ref().map(Trained::handle),
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
            adapter: self.adapter.as_ref().map(LowRank::handle),
        }
    }
}

impl Linear {
    /// (out, in).
    pub fn shape(&self) -> (i64, i64) {
        match self.weight.size()[..] {
            [.., rows, columns] => (rows, columns),
            _ => unreachable!("a linear weight has two dimensions or three: checked at load"),
        }
    }

    /// What the operations read; `micro_batch_seed` makes this layer's own dropout mask.
    pub(super) fn operand(&self, micro_batch_seed: Option<u64>) -> Operand<'_> {
        Operand {
            weight: &self.weight,
            trained: self.trained.as_ref(),
            bias: self.bias.as_ref(),
            low_rank: self.adapter.as_ref(),
            dropout_seed: micro_batch_seed.map(|seed| own_seed(seed, &self.name)),
        }
    }

    /// What is trained of it.
    pub(super) fn leaves(&self) -> impl Iterator<Item = &Tensor> {
        self.operand(None).factors()
    }
}

/// FNV-1a over the name, mixed with the seed: every layer its own mask, whatever the order of evaluation.
fn own_seed(seed: u64, name: &str) -> u64 {
    name.bytes().fold(seed ^ 0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}
