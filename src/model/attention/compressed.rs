//! Attention to the latest tokens and to entries that windows of tokens are compressed to.
//!
//! ```text
//! h ─ norm ─┬─ wq_a ─ norm ──┬─ wq_b ─ norm of each head ─ rotation ──> queries of N heads
//!           │                └─ indexer ···························┐
//!           ├─ wkv ─ norm ─ rotation ──> one key of each token, its value too
//!           └─ compressor ─ norm ─ rotation ──> one entry of each window, key and value too, all or those the indexer chose
//! attention to both ─ rotation back ─ G parts, a block of the weight each ─ wo_b ──>
//! ```

use tch::{Device, Kind, Tensor};

use super::compressor::{Compressor, Indexed, Indexer};
use crate::Result;
use crate::model::entries::{Compressed, Sequence};
use crate::model::layer::{Context, Stream};
use crate::model::linear::Linear;
use crate::model::load::Reader;
use crate::model::spec::{self, LayerSpec, Mask, Position, Rope};
use crate::ops::attention::entries::{Entries, attention_to_entries, new_tokens_to_entries};
use crate::ops::compress::entries_of;
use crate::ops::rope::Rotation;
use crate::ops::{self, Documents, Norm, Scoring};

/// Compressed attention with its weights.
#[derive(Debug, Clone)]
pub(in crate::model) struct CompressedAttention {
    heads: i64,
    head_size: i64,
    scoring: Scoring,
    rope: Rope,
    query_down: Linear,
    query_norm: Norm,
    query_up: Linear,
    query_head_norm: Norm,
    key_value: Linear,
    key_value_norm: Norm,
    source: Source,
    groups: i64,
    group: Linear,
    output: Linear,
}

/// Where entries come from.
#[derive(Debug, Clone)]
enum Source {
    None,
    All(Compressor),
    Chosen { compressor: Compressor, indexer: Box<Indexer> },
}

impl CompressedAttention {
    /// Reads the weights of `attention`, which is that of `spec`.
    pub(super) fn load(attention: &spec::CompressedAttention, spec: &LayerSpec, read: &Reader<'_>) -> Result<Self> {
        let Mask::Sliding { window } = spec.mask else { unreachable!("compressed attention has a window") };
        let Position::Rope(rope) = &spec.position else { unreachable!("compressed attention rotates") };
        let source = match &attention.entries {
            spec::Entries::None => Source::None,
            spec::Entries::All(compressor) => Source::All(Compressor::load(compressor, read)?),
            spec::Entries::Chosen { compressor, indexer } => Source::Chosen {
                compressor: Compressor::load(compressor, read)?,
                indexer: Box::new(Indexer::load(indexer, read)?),
            },
        };
        Ok(Self {
            heads: attention.heads,
            head_size: attention.head_size,
            scoring: Scoring {
                window: Some(window),
                sinks: Some(read.wide(&attention.sinks)?),
                ..Scoring::scaled(attention.scale)
            },
            rope: rope.clone(),
            query_down: read.linear(&attention.query_down)?,
            query_norm: read.norm(&attention.query_norm)?,
            query_up: read.linear(&attention.query_up)?,
            query_head_norm: read.norm(&attention.query_head_norm)?,
            key_value: read.linear(&attention.key_value)?,
            key_value_norm: read.norm(&attention.key_value_norm)?,
            source,
            groups: attention.groups,
            group: read.linear(&attention.group)?,
            output: read.linear(&attention.output)?,
        })
    }

    /// What attention gives for the stream.
    pub(super) fn forward(&self, stream: Stream<'_>, context: &Context<'_>, cache: Option<&mut Compressed>) -> Tensor {
        let Stream { h, x, residual } = stream;
        let (tokens, seed) = (h.size()[0], context.dropout_seed);
        let rotation = context.rotation.expect("compressed attention rotates");
        let mut linears = vec![&self.query_down, &self.key_value];
        linears.extend(self.source.compressor().into_iter().flat_map(|c| [&c.key_value, &c.gate]));
        let operands: Vec<_> = linears.iter().map(|linear| linear.operand(seed)).collect();
        let mut parts = ops::projection(&x, &operands, None).into_iter();
        let mut next = || parts.next().expect("as many as there are linears");
        let (latent, key) = (next(), next());
        let q = ops::projection(self.query_norm.of(&latent), &[self.query_up.operand(seed)], None).remove(0);
        let q = q.view([tokens, self.heads, self.head_size]); // (T, N, H)
        let key = key.view([tokens, 1, self.head_size]); // (T, 1, H)
        let [q, key] = ops::normed_rope_last([&q, &key], [&self.query_head_norm, &self.key_value_norm], rotation);
        let made = self.source.compressor().map(|_| (next(), next()));
        let indexed = || self.source.indexer().map(|indexer| indexer.read(&x, (&latent, &self.query_norm), rotation));
        let attended = match cache {
            None => match made {
                None => ops::attention(&q, &key, &key, context.documents, &self.scoring),
                Some((k, g)) => {
                    let entries = self.entries(&k, &g, indexed, context);
                    attention_to_entries(&q, &key, &entries, context.documents, &self.scoring)
                }
            },
            Some(cache) => self.attend_cached(&q, &key, made, indexed(), context.documents, cache),
        };
        let back = Rotation { sin: rotation.sin.neg(), ..rotation.shallow_clone() };
        let [attended] = ops::rope_last([&attended], &back);
        let attended = attended.view([tokens, self.heads * self.head_size]); // (T, N H)
        let grouped = ops::block_projection(&attended, self.groups, self.group.operand(seed)); // (T, G R')
        ops::projection(&grouped, &[self.output.operand(seed)], residual).remove(0)
    }

    /// The entries of whole documents, from k and g of their tokens. What the indexer makes is asked for only where a document has
    /// more entries than it chooses.
    fn entries(
        &self,
        k: &Tensor,
        g: &Tensor,
        indexed: impl FnOnce() -> Option<Indexed>,
        context: &Context<'_>,
    ) -> Entries {
        let compressor = self.source.compressor().expect("k and g are a compressor's");
        let documents = context.documents;
        let numbers: Vec<i64> = documents.spans().flat_map(|(_, l)| 0..entries_of(l, compressor.rate)).collect();
        let values = compressor.entries(k, g, documents, &numbers, &self.rope);
        let needed = |indexer: &&Indexer| entries_of(documents.longest(), compressor.rate) > indexer.chosen;
        let chosen = match self.source.indexer().filter(needed) {
            None => documents.spans().map(|_| None).collect(),
            Some(indexer) => tch::no_grad(|| {
                let Indexed { queries, weights, k, g } = indexed().expect("there is an indexer");
                let own = indexer.compressor.entries(&k, &g, documents, &numbers, &self.rope);
                let mut first = 0;
                let of_document = |(start, length): (i64, i64)| {
                    let count = entries_of(length, compressor.rate);
                    let [queries, weights] = [&queries, &weights].map(|x| x.narrow(0, start, length));
                    let positions = context.positions.narrow(0, start, length);
                    first += count;
                    indexer.choose(&queries, &weights, &own.narrow(0, first - count, count), &positions)
                };
                documents.spans().map(of_document).collect()
            }),
        };
        Entries { values, rate: compressor.rate, chosen }
    }

    /// Attends q (T, N, H) of new tokens with `key` (T, 1, H) to everything seen, which they are taken into: (T, N, H). No graph.
    fn attend_cached(
        &self,
        q: &Tensor,
        key: &Tensor,
        made: Option<(Tensor, Tensor)>,
        indexed: Option<Indexed>,
        documents: &Documents,
        cache: &mut Compressed,
    ) -> Tensor {
        let output = q.empty_like();
        let window = self.scoring.window.unwrap_or(i64::MAX);
        for (sequence, (start, new)) in cache.sequences.iter_mut().zip(documents.spans()) {
            if new == 0 {
                continue;
            }
            let part = |x: &Tensor| x.narrow(0, start, new);
            let before = sequence.seen;
            let keys = sequence.take_in_keys(&part(key), window);
            if let (Some(compressor), Some((k, g))) = (self.source.compressor(), &made) {
                sequence.entries.take_in(compressor, &part(k), &part(g), &self.rope);
            }
            let chosen = self.source.indexer().zip(indexed.as_ref()).and_then(|(indexer, indexed)| {
                sequence.index.take_in(&indexer.compressor, &part(&indexed.k), &part(&indexed.g), &self.rope);
                let positions = Tensor::arange_start(before, before + new, (Kind::Int64, q.device()));
                indexer.choose(&part(&indexed.queries), &part(&indexed.weights), &sequence.index.values, &positions)
            });
            let entries = Entries {
                values: sequence.entries.values.shallow_clone(),
                rate: self.source.compressor().map_or(i64::MAX, |compressor| compressor.rate),
                chosen: vec![chosen],
            };
            part(&output).copy_(&new_tokens_to_entries(&part(q), before, &keys, &entries, &self.scoring));
        }
        output
    }

    /// Linears in checkpoint order.
    pub(super) fn linears(&self) -> Vec<&Linear> {
        let mut all = vec![&self.query_down, &self.query_up, &self.key_value];
        match &self.source {
            Source::None => {}
            Source::All(compressor) => all.extend([&compressor.key_value, &compressor.gate]),
            Source::Chosen { compressor, indexer } => {
                let Indexer { compressor: own, query, weights, .. } = &**indexer;
                all.extend([&compressor.key_value, &compressor.gate, &own.key_value, &own.gate, query, weights]);
            }
        }
        all.extend([&self.group, &self.output]);
        all
    }

    /// Linears in checkpoint order.
    pub(super) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mut all = vec![&mut self.query_down, &mut self.query_up, &mut self.key_value];
        match &mut self.source {
            Source::None => {}
            Source::All(compressor) => all.extend([&mut compressor.key_value, &mut compressor.gate]),
            Source::Chosen { compressor, indexer } => {
                let Indexer { compressor: own, query, weights, .. } = &mut **indexer;
                all.extend([&mut compressor.key_value, &mut compressor.gate]);
                all.extend([&mut own.key_value, &mut own.gate, query, weights]);
            }
        }
        all.extend([&mut self.group, &mut self.output]);
        all
    }

    /// An empty cache for `sequences` sequences.
    pub(super) fn cache(&self, sequences: i64, options: (Kind, Device)) -> Compressed {
        let index_width = self.source.indexer().map_or(0, |indexer| indexer.head_size);
        let empty = || Sequence::new(self.head_size, index_width, options);
        Compressed { sequences: (0..sequences).map(|_| empty()).collect() }
    }
}

impl Source {
    fn compressor(&self) -> Option<&Compressor> {
        match self {
            Self::None => None,
            Self::All(compressor) | Self::Chosen { compressor, .. } => Some(compressor),
        }
    }

    fn indexer(&self) -> Option<&Indexer> {
        match self {
            Self::None | Self::All(_) => None,
            Self::Chosen { indexer, .. } => Some(indexer),
        }
    }
}
