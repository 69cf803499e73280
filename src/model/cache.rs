//! Keys and values of tokens already seen, so that generating one more costs one token.

use tch::{Device, IndexOp, Kind, Tensor};

use super::entries::Compressed;
use super::recurrent::Recurrent;
use super::spec::Mask;
use crate::ops::{self, Documents, Scoring};

/// The cache of a whole decoder for B sequences.
#[derive(Debug)]
pub struct Cache {
    /// Tokens seen of each sequence.
    pub(super) lengths: Vec<i64>,
    pub(super) layers: Vec<LayerCache>,
}

/// What one block keeps of the tokens it has seen.
#[derive(Debug)]
pub(super) enum LayerCache {
    KeysValues(KeysValues),
    Recurrent(Recurrent),
    Compressed(Compressed),
}

/// One block's keys and values.
#[derive(Debug)]
pub(super) struct KeysValues {
    /// (B, K, C, H); C is the capacity, grown by doubling.
    pub(super) keys: Tensor,
    values: Values,
    /// Tokens already in it, of each sequence.
    lengths: Vec<i64>,
}

/// Where the values are.
#[derive(Debug)]
enum Values {
    /// (B, K, C, H).
    Own(Tensor),
    /// So many of the first elements of each key: its latent.
    InKeys(i64),
}

impl Cache {
    /// Room for `sequences`, before any token, given each block's empty cache.
    pub(super) fn new(sequences: usize, layers: Vec<LayerCache>) -> Self {
        Self { lengths: vec![0; sequences], layers }
    }

    /// Tokens seen of each sequence.
    pub fn lengths(&self) -> &[i64] {
        &self.lengths
    }

    /// Keeps only these sequences, in this order: finished ones need not be carried along.
    pub fn keep(&mut self, sequences: &[usize]) {
        let index = Tensor::from_slice(&sequences.iter().map(|i| *i as i64).collect::<Vec<_>>());
        for layer in &mut self.layers {
            match layer {
                LayerCache::KeysValues(cache) => cache.keep(&index, sequences),
                LayerCache::Recurrent(cache) => cache.keep(&index),
                LayerCache::Compressed(cache) => cache.keep(sequences),
            }
        }
        self.lengths = picked(&self.lengths, sequences);
    }
}

fn picked(lengths: &[i64], sequences: &[usize]) -> Vec<i64> {
    sequences.iter().map(|i| lengths[*i]).collect()
}

impl LayerCache {
    /// The keys and values of a block that keeps them.
    pub(super) fn keys_values(&mut self) -> &mut KeysValues {
        match self {
            Self::KeysValues(cache) => cache,
            Self::Recurrent(_) | Self::Compressed(_) => unreachable!("a block is given the cache that it made"),
        }
    }

    /// The state of a block that keeps one.
    pub(super) fn recurrent(&mut self) -> &mut Recurrent {
        match self {
            Self::Recurrent(cache) => cache,
            Self::KeysValues(_) | Self::Compressed(_) => unreachable!("a block is given the cache that it made"),
        }
    }

    /// The latest keys and the entries of a block that keeps these.
    pub(super) fn compressed(&mut self) -> &mut Compressed {
        match self {
            Self::Compressed(cache) => cache,
            Self::KeysValues(_) | Self::Recurrent(_) => unreachable!("a block is given the cache that it made"),
        }
    }
}

impl KeysValues {
    /// Empty, for `sequences` sequences.
    pub(super) fn new(sequences: i64, kv_heads: i64, head_size: i64, options: (Kind, Device)) -> Self {
        let empty = Tensor::zeros([sequences, kv_heads, 0, head_size], options);
        Self { keys: empty.shallow_clone(), values: Values::Own(empty), lengths: vec![0; sequences as usize] }
    }

    /// Empty, for `sequences` sequences of one head whose keys are `head_size` wide and begin with their value, `value_size` wide.
    pub(super) fn latent(sequences: i64, head_size: i64, value_size: i64, options: (Kind, Device)) -> Self {
        Self { values: Values::InKeys(value_size), ..Self::new(sequences, 1, head_size, options) }
    }

    /// Whether no token has been seen.
    pub(super) fn is_empty(&self) -> bool {
        self.lengths.iter().all(|length| *length == 0)
    }

    /// Keeps only `sequences`, which are also in `index` (B), i64.
    fn keep(&mut self, index: &Tensor, sequences: &[usize]) {
        let index = index.to_device(self.keys.device());
        self.keys = self.keys.index_select(0, &index);
        if let Values::Own(values) = &mut self.values {
            *values = values.index_select(0, &index);
        }
        self.lengths = picked(&self.lengths, sequences);
    }

    /// Attends q (T, N, H) to everything seen, the new tokens with k and v (T, K, H) included, which are taken in already;
    /// document i of `documents` are the new tokens of sequence i. Gives (T, N, H).
    pub(super) fn attend(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        documents: &Documents,
        scoring: &Scoring,
        mask: Mask,
    ) -> Tensor {
        if self.lengths.iter().zip(documents.spans()).all(|(seen, (_, new))| *seen == new) {
            return ops::attention(q, k, v, &mask.documents(documents), scoring);
        }
        self.attend_to_seen(q, documents, scoring, mask)
    }

    /// Attends q (T, N, H) of the tokens that were last taken in to everything seen. Gives (T, N, W), W being the values' size.
    pub(super) fn attend_to_seen(&self, q: &Tensor, documents: &Documents, scoring: &Scoring, mask: Mask) -> Tensor {
        if documents.spans().all(|(_, new)| new == 1) {
            return self.attend_one_each(q, scoring, mask);
        }
        let values = self.values();
        let output = q.new_empty([q.size()[0], q.size()[1], values.size()[3]], (q.kind(), q.device()));
        for (i, (start, new)) in documents.spans().enumerate().filter(|(_, (_, new))| *new > 0) {
            let seen = self.lengths[i];
            let [keys, values] = [&self.keys, &values].map(|t| t.i(i as i64).narrow(1, 0, seen).unsqueeze(0)); // (1, K, S, H)
            let query = q.narrow(0, start, new).transpose(0, 1).unsqueeze(0).contiguous(); // (1, N, L, H)
            let queries_at = (Tensor::arange(new, (Kind::Int64, q.device())) + (seen - new)).view([1, 1, -1, 1]);
            let allowed = mask.allowed(&queries_at, seen); // (1, 1, L, S)
            let attended = ops::attention_to_cache(&query, &keys, &values, &allowed, scoring); // (1, N, L, W)
            output.narrow(0, start, new).copy_(&attended.squeeze_dim(0).transpose(0, 1));
        }
        output
    }

    /// One new token of every sequence: one call over all of them, shorter ones masked.
    fn attend_one_each(&self, q: &Tensor, scoring: &Scoring, mask: Mask) -> Tensor {
        let longest = self.lengths.iter().copied().max().unwrap_or(0);
        let query = q.unsqueeze(2); // (B, N, 1, H)
        let keys = self.keys.narrow(2, 0, longest);
        let values = self.values().narrow(2, 0, longest);
        let queries_at = (Tensor::from_slice(&self.lengths).to_device(q.device()) - 1).view([-1, 1, 1, 1]);
        let allowed = mask.allowed(&queries_at, longest); // (B, 1, 1, S)
        ops::attention_to_cache(&query, &keys, &values, &allowed, scoring).squeeze_dim(2) // (B, N, W)
    }

    /// (B, K, C, W).
    fn values(&self) -> Tensor {
        match &self.values {
            Values::Own(values) => values.shallow_clone(),
            Values::InKeys(size) => self.keys.narrow(3, 0, *size),
        }
    }

    /// Takes in the new tokens' k and v (T, K, H), v only where values are not in the keys.
    pub(super) fn append(&mut self, k: &Tensor, v: Option<&Tensor>, documents: &Documents) {
        let stores = match (&mut self.values, v) {
            (Values::Own(values), Some(v)) => vec![(&mut self.keys, k), (values, v)],
            _ => vec![(&mut self.keys, k)],
        };
        for (store, part) in stores {
            take_in(store, part, documents, &self.lengths);
        }
        for ((_, new), seen) in documents.spans().zip(&mut self.lengths) {
            *seen += new;
        }
    }
}

/// Puts each document's new tokens of `part` (T, K, H) after the `seen` ones of its sequence in `store` (B, K, C, H).
fn take_in(store: &mut Tensor, part: &Tensor, documents: &Documents, seen: &[i64]) {
    let needed = documents.spans().zip(seen).map(|((_, new), seen)| seen + new).max().unwrap_or(0);
    let (sequences, kv_heads, capacity, head) = store.size4().expect("(B, K, C, H) by construction");
    if needed > capacity {
        let grown = needed.max(2 * capacity).max(64);
        let larger = Tensor::zeros([sequences, kv_heads, grown, head], (store.kind(), store.device()));
        larger.narrow(2, 0, capacity).copy_(store);
        *store = larger;
    }
    for (i, (start, new)) in documents.spans().enumerate() {
        let mut place = store.i(i as i64).narrow(1, seen[i], new); // (K, L, H)
        place.copy_(&part.narrow(0, start, new).transpose(0, 1));
    }
}
