//! What compressed attention keeps of tokens already seen: the keys of the latest ones, the entries of complete windows, and the tokens
//! that do not make one yet.

use tch::{Device, Kind, Tensor};

use super::attention::Compressor;
use super::spec::Rope;
use crate::ops::Documents;

/// One block's cache.
#[derive(Debug)]
pub(super) struct Compressed {
    pub(super) sequences: Vec<Sequence>,
}

/// What is kept of one sequence.
#[derive(Debug)]
pub(super) struct Sequence {
    /// Tokens.
    pub(super) seen: i64,
    /// (S, 1, H): those of the latest.
    keys: Tensor,
    /// What attention looks at.
    pub(super) entries: Growing,
    /// What the indexer chooses them by.
    pub(super) index: Growing,
}

/// Entries, and what the next ones will be made of.
#[derive(Debug)]
pub(super) struct Growing {
    /// (W, H).
    pub(super) values: Tensor,
    /// k and g of the tokens after the last complete window, before them those of that window where windows overlap.
    pending: Option<[Tensor; 2]>,
}

impl Compressed {
    /// Keeps only these sequences, in this order.
    pub(super) fn keep(&mut self, sequences: &[usize]) {
        self.sequences = sequences.iter().map(|i| self.sequences[*i].shallow_clone()).collect();
    }
}

impl Sequence {
    /// Before any token; entries are `width` wide, those of an indexer `index_width`.
    pub(super) fn new(width: i64, index_width: i64, options: (Kind, Device)) -> Self {
        let growing = |width: i64| Growing { values: Tensor::zeros([0, width], options), pending: None };
        let keys = Tensor::zeros([0, 1, width], options);
        Self { seen: 0, keys, entries: growing(width), index: growing(index_width) }
    }

    /// Takes in keys (L, 1, H) of new tokens: those (S, 1, H) that any of them may look at, its own included, none further back than
    /// `window` tells.
    pub(super) fn take_in_keys(&mut self, new: &Tensor, window: i64) -> Tensor {
        self.seen += new.size()[0];
        let all = Tensor::cat(&[&self.keys, new], 0);
        let kept = (window - 1).clamp(0, all.size()[0]);
        self.keys = all.narrow(0, all.size()[0] - kept, kept).copy();
        all
    }

    fn shallow_clone(&self) -> Self {
        let Self { seen, keys, entries, index } = self;
        let (entries, index) = (entries.shallow_clone(), index.shallow_clone());
        Self { seen: *seen, keys: keys.shallow_clone(), entries, index }
    }
}

impl Growing {
    /// Takes in k and g of new tokens (L, width).
    pub(super) fn take_in(&mut self, compressor: &Compressor, k: &Tensor, g: &Tensor, rope: &Rope) {
        let [k, g] = match self.pending.take() {
            None => [k.copy(), g.copy()],
            Some([before_k, before_g]) => [Tensor::cat(&[&before_k, k], 0), Tensor::cat(&[&before_g, g], 0)],
        };
        let (tokens, rate, known) = (k.size()[0], compressor.rate, self.values.size()[0]);
        // The window before the first new one is there only to be overlapped.
        let again = i64::from(compressor.overlapping && known > 0);
        let windows = tokens / rate;
        if windows > again {
            let numbers: Vec<i64> = (known - again..known - again + windows).collect();
            let made = compressor.entries(&k, &g, &Documents::one(tokens), &numbers, rope);
            self.values = Tensor::cat(&[&self.values, &made.narrow(0, again, windows - again)], 0);
        }
        let done = (windows - i64::from(compressor.overlapping)).max(0) * rate;
        self.pending = Some([k, g].map(|x| x.narrow(0, done, tokens - done).copy()));
    }

    fn shallow_clone(&self) -> Self {
        let pending = self.pending.as_ref().map(|pending| pending.each_ref().map(Tensor::shallow_clone));
        Self { values: self.values.shallow_clone(), pending }
    }
}
