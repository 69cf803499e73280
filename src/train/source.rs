//! Where the trainer's micro-batches come from.

use crate::Result;
use crate::data::{Batch, Cursor, Dataset, RowId};

/// Micro-batches one after the other.
pub type MicroBatches<'a> = Box<dyn Iterator<Item = Result<Batch>> + 'a>;

/// Where micro-batches come from. Every pass over the data is a function of its number alone.
pub trait BatchSource {
    /// Micro-batches of a pass, at least 1.
    fn micro_batches(&self, epoch: u64) -> Result<u64>;

    /// Micro-batches from the one at `from` on, pass after pass, for ever.
    fn batches<'a>(&'a self, from: Cursor) -> Result<MicroBatches<'a>>;

    /// Whether there is an eval set.
    fn has_evaluation(&self) -> bool;

    /// The micro-batches of the eval set, always the same.
    fn evaluation<'a>(&'a self) -> Result<MicroBatches<'a>>;

    /// A row as a person finds it: `train.parquet row 17`.
    fn describe(&self, row: RowId) -> String;
}

/// The datasets of a recipe as a source of micro-batches.
pub struct Datasets<'a> {
    /// Trained on.
    pub train: &'a Dataset,
    /// Evaluated on.
    pub eval: Option<&'a Dataset>,
    /// Rows of a micro-batch.
    pub micro_batch_size: u64,
}

impl BatchSource for Datasets<'_> {
    fn micro_batches(&self, epoch: u64) -> Result<u64> {
        Ok(self.train.micro_batches_in_epoch(epoch, self.micro_batch_size))
    }

    fn batches<'a>(&'a self, from: Cursor) -> Result<MicroBatches<'a>> {
        Ok(without_cursors(self.train.batches(from, self.micro_batch_size)))
    }

    fn has_evaluation(&self) -> bool {
        self.eval.is_some()
    }

    fn evaluation<'a>(&'a self) -> Result<MicroBatches<'a>> {
        Ok(self.eval.map_or_else(
            || Box::new(std::iter::empty()) as MicroBatches<'a>,
            |eval| without_cursors(eval.eval_batches(self.micro_batch_size)),
        ))
    }

    fn describe(&self, row: RowId) -> String {
        self.train.place(row)
    }
}

/// The trainer counts micro-batches itself: it must know the end of a pass before it reads across it.
fn without_cursors<'a>(batches: impl Iterator<Item = Result<(Batch, Cursor)>> + 'a) -> MicroBatches<'a> {
    Box::new(batches.map(|item| item.map(|(batch, _)| batch)))
}
