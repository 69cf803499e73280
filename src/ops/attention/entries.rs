//! Attention of tokens to the latest ones before them and to entries that windows of earlier ones were made into, in one softmax.
//! One head of keys, which are the values too, serves all heads of queries.
//!
//! ```text
//! query t sees    keys t - window + 1 ..= t      entries 0 .. (t + 1) / rate, or those of them that were chosen
//! ```
//!
//! On the CPU bf16 goes through our own blocks. All else goes in plain products, some queries at a time: the heads of these queries are
//! the rows of one product with the keys in sight of any of them, so scores stay bounded however long a document is.

use tch::{Kind, Tensor};

use super::choice::visible_entries;
use super::{Scoring, blocks, plain};
use crate::ops::Documents;
use crate::ops::compress::entries_of;
use crate::torch_ext::custom;

/// Entries of every document, in [`crate::ops::compress`]'s order.
#[derive(Debug)]
pub struct Entries {
    /// (W, H), keys and values.
    pub values: Tensor,
    /// How many tokens an entry stands for.
    pub rate: i64,
    /// Of each document, whether a token sees an entry (L, W of the document), bool: only those it could see by their place. None
    /// where it sees all of them.
    pub chosen: Vec<Option<Tensor>>,
}

impl Entries {
    fn shallow_clone(&self) -> Self {
        let chosen = self.chosen.iter().map(|chosen| chosen.as_ref().map(Tensor::shallow_clone)).collect();
        Self { values: self.values.shallow_clone(), rate: self.rate, chosen }
    }
}

/// `softmax([q keys^T, q entries^T] scale + mask) [keys, entries]`: (T, N, H) from q (T, N, H) and keys (T, 1, H), the scoring's
/// window and sinks included.
pub fn attention_to_entries(
    q: &Tensor,
    keys: &Tensor,
    entries: &Entries,
    documents: &Documents,
    scoring: &Scoring,
) -> Tensor {
    assert!(scoring.soft_cap.is_none() && scoring.alibi.is_none(), "no page asks for these beside entries");
    if blocks::serves(q, keys, &entries.values.unsqueeze(1)) {
        return in_blocks(q, keys, entries, documents, scoring);
    }
    let blocks = Block::of_documents(q.size()[1], entries, documents, scoring);
    let shape = Shape { scoring: scoring.clone(), entries: entries.shallow_clone() };
    let (output, kept) = tch::no_grad(|| {
        let output = q.empty_like();
        let kept: Vec<Tensor> = blocks
            .iter()
            .map(|block| {
                let part = Part::new(q, keys, block, &shape);
                let (attended, logsumexp) = part.attend(&shape.scoring);
                part.rows(&output).copy_(&attended);
                logsumexp
            })
            .collect();
        (output, kept)
    });
    let [q_kept, keys_kept, output_kept] = [q, keys, &output].map(Tensor::detach);
    custom(c"engraft::attention_to_entries", &[q, keys, &entries.values], vec![output], move |grads| {
        let grad = grads[0].contiguous();
        let dq = q_kept.empty_like();
        let [dkeys, dentries] =
            [&keys_kept, &shape.entries.values].map(|x| Tensor::zeros(x.size(), (Kind::Float, x.device())));
        for (block, logsumexp) in blocks.iter().zip(&kept) {
            let part = Part::new(&q_kept, &keys_kept, block, &shape);
            let (dq_block, d_seen) = part.backward(&grad, &output_kept, logsumexp, &shape.scoring);
            part.rows(&dq).copy_(&dq_block);
            let (first, count) = block.keys;
            let (mut of_keys, own) = (dkeys.squeeze_dim(1).narrow(0, first, count), d_seen.narrow(0, 0, count));
            of_keys += own;
            let mut of_entries = dentries.narrow(0, block.entries.0, block.entries.1);
            of_entries += d_seen.narrow(0, count, block.entries.1);
        }
        vec![Some(dq), Some(dkeys.to_kind(keys_kept.kind())), Some(dentries.to_kind(q_kept.kind()))]
    })
    .remove(0)
}

fn in_blocks(q: &Tensor, keys: &Tensor, entries: &Entries, documents: &Documents, scoring: &Scoring) -> Tensor {
    let shape = blocks::entries::Shape::new(q, entries, documents, scoring);
    let (output, logsumexp) = tch::no_grad(|| blocks::entries::forward(q, keys, &entries.values, &shape));
    let kept = [q, keys, &entries.values, &output].map(Tensor::detach);
    custom(c"engraft::attention_to_entries", &[q, keys, &entries.values], vec![output], move |grads| {
        blocks::entries::backward(&grads[0], kept.each_ref(), &logsumexp, &shape).map(Some).into()
    })
    .remove(0)
}

/// The same for new tokens of one sequence, q (L, N, H): `keys` (S, 1, H) are those of its last S tokens, the new ones included, which
/// begin at position `before`; `entries` are of the whole sequence. No graph.
pub fn new_tokens_to_entries(q: &Tensor, before: i64, keys: &Tensor, entries: &Entries, scoring: &Scoring) -> Tensor {
    let (new, seen) = (q.size()[0], keys.size()[0]);
    let document = Document {
        queries: (0, new),
        before,
        keys: (0, before + new - seen),
        entries: (0, entries.values.size()[0]),
        number: 0,
    };
    let shape = Shape { scoring: scoring.clone(), entries: entries.shallow_clone() };
    let output = q.empty_like();
    for block in document.blocks(q.size()[1], entries.rate, scoring) {
        let part = Part::new(q, keys, &block, &shape);
        part.rows(&output).copy_(&part.attend(scoring).0);
    }
    output
}

/// What every block reads besides its own rows.
struct Shape {
    scoring: Scoring,
    entries: Entries,
}

/// A document, or the new tokens of a sequence.
struct Document {
    /// (start, length) among all queries.
    queries: (i64, i64),
    /// Position of the first query.
    before: i64,
    /// Row of its first key among all keys, and that key's position.
    keys: (i64, i64),
    /// (start, count) among all entries.
    entries: (i64, i64),
    number: usize,
}

/// Some queries, and the keys and entries that any of them may see; (start, count) among all of each kind.
struct Block {
    queries: (i64, i64),
    /// Position of the first query.
    position: i64,
    keys: (i64, i64),
    /// Position of the first key.
    first_key: i64,
    entries: (i64, i64),
    document: usize,
    /// Place of the first query among those of its document.
    place: i64,
}

impl Block {
    fn of_documents(heads: i64, entries: &Entries, documents: &Documents, scoring: &Scoring) -> Vec<Block> {
        let mut first_entry = 0;
        let of_document = |(number, (start, length)): (usize, (i64, i64))| {
            let own = entries_of(length, entries.rate);
            let document =
                Document { queries: (start, length), before: 0, keys: (start, 0), entries: (first_entry, own), number };
            first_entry += own;
            document.blocks(heads, entries.rate, scoring)
        };
        documents.spans().enumerate().flat_map(of_document).collect()
    }
}

impl Document {
    fn blocks(&self, heads: i64, rate: i64, scoring: &Scoring) -> Vec<Block> {
        let (start, length) = self.queries;
        let window = scoring.window.unwrap_or(i64::MAX);
        // No more queries than a window: beyond that most keys of a block are out of most queries' sight.
        let in_sight = (self.before + length).min(window.saturating_mul(2)) + self.entries.1;
        let rows = plain::queries_at_once(heads, in_sight).min(window.max(64));
        let block = |place: i64| {
            let count = rows.min(length - place);
            let position = self.before + place;
            let first_key = (position + 1 - window.min(position + 1)).max(self.keys.1);
            Block {
                queries: (start + place, count),
                position,
                keys: (self.keys.0 + first_key - self.keys.1, position + count - first_key),
                first_key,
                entries: (self.entries.0, entries_of(position + count, rate).min(self.entries.1)),
                document: self.number,
                place,
            }
        };
        (0..length).step_by(rows as usize).map(block).collect()
    }
}

/// A block's operands.
struct Part<'a> {
    block: &'a Block,
    /// (L N, H): the heads of a token one after the other.
    q: Tensor,
    /// (S, H): keys, then entries.
    seen: Tensor,
    /// L, N, S.
    size: [i64; 3],
    /// (L, 1, S): where a query may not look.
    refused: Tensor,
}

impl<'a> Part<'a> {
    fn new(q: &Tensor, keys: &Tensor, block: &'a Block, shape: &Shape) -> Self {
        let (heads, head) = (q.size()[1], q.size()[2]);
        let ((first, rows), (first_entry, entries)) = (block.queries, block.entries);
        let own = keys.squeeze_dim(1).narrow(0, block.keys.0, block.keys.1);
        let seen = Tensor::cat(&[&own, &shape.entries.values.narrow(0, first_entry, entries)], 0); // (S, H)
        let options = (Kind::Int64, q.device());
        let positions = Tensor::arange_start(block.position, block.position + rows, options);
        let at = positions.unsqueeze(1); // (L, 1)
        let keys_at = Tensor::arange_start(block.first_key, block.first_key + block.keys.1, options).unsqueeze(0);
        let mut keys_seen = keys_at.le_tensor(&at);
        if let Some(window) = shape.scoring.window {
            keys_seen = keys_seen.logical_and(&keys_at.gt_tensor(&(&at - window)));
        }
        let entries_seen = match &shape.entries.chosen[block.document] {
            Some(chosen) => chosen.narrow(0, block.place, rows).narrow(1, 0, entries),
            None => visible_entries(&positions, entries, shape.entries.rate),
        };
        Self {
            block,
            q: q.narrow(0, first, rows).reshape([rows * heads, head]),
            size: [rows, heads, seen.size()[0]],
            seen,
            refused: Tensor::cat(&[keys_seen, entries_seen], 1).logical_not_().unsqueeze(1),
        }
    }

    /// The rows of this block's queries in x (T, N, H).
    fn rows(&self, x: &Tensor) -> Tensor {
        x.narrow(0, self.block.queries.0, self.block.queries.1)
    }

    /// Scores (L, N, S), fp32, minus infinity where a query may not look.
    fn scores(&self, scoring: &Scoring) -> Tensor {
        let mut scores = self.q.mm(&self.seen.tr()).to_kind(Kind::Float).view(self.size) * scoring.scale;
        scores.masked_fill_(&self.refused, f64::NEG_INFINITY)
    }

    /// (L, N, H), and the logsumexp of the scores (L, N, 1), sinks among them.
    fn attend(&self, scoring: &Scoring) -> (Tensor, Tensor) {
        let [rows, heads, seen] = self.size;
        let scores = self.scores(scoring);
        let logsumexp = scores.logsumexp([-1i64].as_slice(), true); // (L, N, 1)
        let logsumexp = match &scoring.sinks {
            Some(sinks) => logsumexp.logaddexp(&sinks.view([1, heads, 1])),
            None => logsumexp,
        };
        let weights = (scores - &logsumexp).exp_().to_kind(self.q.kind()).view([rows * heads, seen]);
        (weights.mm(&self.seen).view([rows, heads, -1]), logsumexp)
    }

    /// dq (L, N, H), and the gradient (S, H) of keys and entries, fp32.
    fn backward(&self, grad: &Tensor, output: &Tensor, logsumexp: &Tensor, scoring: &Scoring) -> (Tensor, Tensor) {
        let [rows, heads, seen] = self.size;
        let [grad, output] = [grad, output].map(|x| self.rows(x).reshape([rows * heads, -1])); // (L N, H)
        let weights = (self.scores(scoring) - logsumexp).exp_(); // (L, N, S)
        let delta = (&grad * output).sum_dim_intlist([1i64].as_slice(), true, Kind::Float).view([rows, heads, 1]);
        let dweights = grad.mm(&self.seen.tr()).to_kind(Kind::Float).view(self.size);
        let flat = |x: Tensor| x.to_kind(self.q.kind()).view([rows * heads, seen]);
        let dscores = flat((dweights - delta) * &weights * scoring.scale);
        let weights = flat(weights);
        let dseen = dscores.tr().mm(&self.q).to_kind(Kind::Float) + weights.tr().mm(&grad).to_kind(Kind::Float);
        (dscores.mm(&self.seen).view([rows, heads, -1]), dseen)
    }
}

#[cfg(test)]
mod tests;
