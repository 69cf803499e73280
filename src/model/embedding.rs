//! The table that tokens are looked up in, and what is trained of it.

use tch::{Kind, Tensor};

use super::linear::Trained;
use super::spec::ModelSpec;
use crate::{Error, Fault, Result};

impl ModelSpec {
    /// Makes this the spec of a model of so many tokens, where it has fewer: see [`grown`].
    ///
    /// # Errors
    /// [`Error::Model`] where other tables go by tokens, too.
    pub fn grow(&mut self, vocabulary: i64) -> Result<()> {
        let rows = vocabulary.max(self.vocab_size);
        if rows > self.vocab_size {
            let [head, bias] = ["weight", "bias"].map(|part| format!("{}.{part}", self.head.name));
            let tables = [&self.embedding.weight, &head, &bias];
            let tensors = self.tensors();
            let by_token = |(name, shape): &(&String, &Vec<i64>)| {
                shape.first() == Some(&self.vocab_size) && !tables.contains(name)
            };
            if let Some((name, _)) = tensors.iter().find(by_token) {
                let fault = Fault::new("adapter.new_tokens", format!("{name} goes by tokens, too, and cannot grow"));
                return Err(Error::Model(fault.hint("use tokens that the model has: adapter.trainable_token_indices")));
            }
            self.vocab_size = rows;
        }
        Ok(())
    }
}

/// A table (V, ...) with `rows` rows: those beyond are the mean of all.
pub fn grown(table: Tensor, rows: i64) -> Tensor {
    let more = rows - table.size()[0];
    if more <= 0 {
        return table;
    }
    let mean = table.mean_dim([0i64].as_slice(), true, Kind::Float).to_kind(table.kind());
    let mut shape = table.size();
    shape[0] = more;
    Tensor::cat(&[&table, &mean.expand(shape, false)], 0)
}

/// The token embedding.
#[derive(Debug)]
pub struct Embedding {
    /// Module path as transformers has it: `model.embed_tokens`.
    pub name: String,
    /// (V, D), frozen.
    pub table: Tensor,
    /// What is trained in its place.
    pub trained: Option<Trained>,
}

impl Embedding {
    /// The rows (T, D) of `ids` (T), i64, in the table's number type; with a graph to what is trained.
    pub(super) fn look_up(&self, ids: &Tensor) -> Tensor {
        match &self.trained {
            None => self.table.index_select(0, ids),
            Some(Trained::Whole { weight, .. }) => weight.index_select(0, ids).to_kind(self.table.kind()),
            Some(Trained::Rows { ids: trained, rows }) => {
                let same = ids.unsqueeze(1).eq_tensor(&trained.unsqueeze(0)).to_kind(Kind::Uint8); // (T, K)
                let (any, which) = same.max_dim(1, false); // (T) each
                let own = rows.index_select(0, &which).to_kind(self.table.kind()); // (T, D)
                own.where_self(&any.unsqueeze(1).to_kind(Kind::Bool), &self.table.index_select(0, ids))
            }
        }
    }

    /// (V, D) as it is now, in the table's number type. No graph.
    pub fn whole(&self) -> Tensor {
        match &self.trained {
            None => self.table.shallow_clone(),
            Some(trained) => trained.whole(&self.table),
        }
    }
}
