//! What a block takes of memory: what it keeps from forward for backward, and what is alive beside that while it runs.
//!
//! What is kept is what the operations of [`crate::ops`] keep. They norm, activate and multiply again what is cheap, so of the stream
//! each half keeps what it reads, and beside that: queries, keys and values as attention reads them and before a norm of theirs, its
//! output and one logsumexp of each head, gate and up, and of each low-rank update `X A^T`, A and B in the activations' type. A norm
//! behind a half keeps what it reads.
//!
//! While the feed-forward runs backward, there are the gradient of what it gives (D), that of the activated product, and in one pass
//! those of gate and up and the product again (4 F in all). Attention has the gradient of its output and, of queries, keys and values,
//! theirs twice: head by head and put together. On a GPU flash attention adds up the gradient of queries in fp32, and where keys are
//! shared it makes theirs for every query head first ([`Flash`]).

use crate::model::spec::{
    Attention, CompressedAttention, DeltaNet, ExpertGateUp, Experts, FeedForward, GateUp, GroupedAttention,
    LatentAttention, LatentQuery, LayerInput, LayerSpec, LinearSpec, ModelSpec, Projection, Residual, Routing,
};
use crate::ops::delta_net::TOKENS_OF_A_RUN;

use super::Tuned;

/// Bytes of a block for a micro-batch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Block {
    /// The stream that it reads: all that a recomputed block keeps.
    pub(super) input: u64,
    /// Kept for backward, the stream included.
    pub(super) kept: u64,
    /// The most beside what is kept while it runs forward.
    pub(super) forward: u64,
    /// The most beside what is kept while it runs backward, less what backward has done with by then.
    pub(super) backward: u64,
    /// Gradients of what is trained in it.
    pub(super) gradients: u64,
}

/// What its tokens and number type make of a model's sizes.
#[derive(Clone, Copy)]
pub(super) struct Costs<'a> {
    pub(super) tokens: u64,
    /// Tokens that go through a dense feed-forward at a time, where not all do.
    pub(super) tile: Option<u64>,
    /// Bytes of a number of the activations' type.
    pub(super) element: u64,
    /// What flash attention on a GPU goes by.
    pub(super) flash: Option<Flash>,
    pub(super) spec: &'a ModelSpec,
    pub(super) tuned: &'a Tuned<'a>,
}

/// What the memory of FlashAttention-2's backward depends on, besides tokens and heads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flash {
    pub(super) documents: u64,
    /// Then processors add up on their own first, each group of them in a sum of its own.
    pub(super) deterministic: bool,
}

impl Flash {
    /// Tokens of a document are filled up by so many in its sums.
    const FILL: u64 = 128;
    /// Heads are filled up to a multiple of so many elements.
    const HEAD: i64 = 32;
    /// Processors of a GPU that share the documents' heads where the order of sums is fixed: those of an H100 or H200.
    const PROCESSORS: u64 = 132;

    /// Bytes of the gradient of queries in fp32 and of each row's sum of products. Source: `mha_varlen_bwd` of FlashAttention-2 as
    /// libtorch has it.
    fn sums(self, tokens: u64, heads: i64, head_size: i64) -> u64 {
        let parts = match self.deterministic {
            true => Self::PROCESSORS.div_ceil((self.documents * heads as u64).max(1)),
            false => 1,
        };
        let head = (head_size as u64).next_multiple_of(Self::HEAD as u64);
        4 * (tokens + Self::FILL * self.documents) * heads as u64 * (parts * head + 1)
    }
}

/// One half of a block.
#[derive(Debug, Clone, Copy, Default)]
struct Half {
    kept: u64,
    forward: u64,
    backward: u64,
    gradients: u64,
}

/// What the updates of linears that read the same take.
#[derive(Debug, Clone, Copy, Default)]
struct Updates {
    kept: u64,
    gradients: u64,
    /// The largest weight that products make whole.
    whole: u64,
}

impl std::ops::Add for Updates {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            kept: self.kept + other.kept,
            gradients: self.gradients + other.gradients,
            whole: self.whole.max(other.whole),
        }
    }
}

impl Costs<'_> {
    pub(super) fn block(&self, layer: &LayerSpec) -> Block {
        let hidden = self.spec.hidden_size;
        let copies = self.spec.streams.as_ref().map_or(1, |streams| streams.count);
        let (mut attention, mut feed_forward) =
            (self.attention(&layer.attention), self.feed_forward(&layer.feed_forward));
        match &layer.residual {
            Residual::Sequential { attention: first, feed_forward: second, .. } => {
                for (half, around) in [(&mut attention, first), (&mut feed_forward, second)] {
                    half.kept += self.numbers(hidden) + self.fp32(2);
                    half.backward += self.numbers(hidden);
                    if around.after.is_some() {
                        half.kept += self.numbers(hidden) + self.fp32(2);
                        half.backward += self.numbers(hidden);
                    }
                }
            }
            Residual::Parallel { .. } => {
                // Both read one stream, and the gradient of what they give is one.
                attention.kept += self.numbers(hidden) + self.fp32(4);
                attention.backward += 2 * self.numbers(hidden);
                feed_forward.backward += self.numbers(hidden);
            }
            Residual::Streams { attention: first, .. } => {
                // Before each half the copies, what it reads and what it gives, and in fp32 the numbers of its map three times over.
                let map = self.fp32(3 * (2 + first.count) * first.count + 2);
                for half in [&mut attention, &mut feed_forward] {
                    half.kept += self.numbers((copies + 2) * hidden) + map;
                    half.backward += self.numbers((copies + 1) * hidden);
                }
            }
        }
        let input = self.numbers(copies * hidden);
        let own = layer.ending.input.as_ref().map_or(Half::default(), |input| self.own_input(input));
        Block {
            input,
            kept: attention.kept + feed_forward.kept + own.kept,
            // The stream that goes on is the next block's.
            forward: attention.forward.max(feed_forward.forward).max(own.forward) + input,
            backward: own
                .backward
                .max(feed_forward.backward.saturating_sub(own.kept))
                .max(attention.backward.saturating_sub(own.kept + feed_forward.kept)),
            gradients: attention.gradients + feed_forward.gradients + own.gradients,
        }
    }

    fn attention(&self, attention: &Attention) -> Half {
        match attention {
            Attention::Grouped(grouped) => self.grouped(grouped),
            Attention::Latent(latent) => self.latent(latent),
            Attention::DeltaNet(net) => self.delta_net(net),
            Attention::Compressed(compressed) => self.compressed(compressed),
        }
    }

    fn grouped(&self, attention: &GroupedAttention) -> Half {
        let GroupedAttention { heads, kv_heads, head_size, projection, output, query_key_norm, value_norm, .. } =
            attention;
        let (queries, keys) = (heads * head_size, kv_heads * head_size);
        let mut kept = self.numbers(2 * queries) + self.fp32(*heads);
        let (own_keys, linears): (bool, Vec<&LinearSpec>) = match projection {
            Projection::Separate { query, key, value } => (true, vec![query, key, value]),
            Projection::Gated { query_gate, key, value } => (true, vec![query_gate, key, value]),
            Projection::ValuesAreKeys { query, key } => (true, vec![query, key]),
            Projection::QueryOnly { query, .. } => (false, vec![query]),
            Projection::Fused(linear) | Projection::PerHead(linear) => (true, vec![linear]),
        };
        if own_keys {
            kept += self.numbers(2 * keys);
        }
        if matches!(projection, Projection::Gated { .. }) {
            kept += self.numbers(queries);
        }
        if let Some(norms) = query_key_norm {
            // Statistics are made again where heads are normed on the way to the rotation.
            let again = !norms.after_rotation && norms.query.shape.last() == Some(head_size);
            let statistics = |heads: i64| if again { 0 } else { self.fp32(2 * heads) };
            kept += self.numbers(queries) + statistics(*heads);
            if norms.key.is_some() {
                kept += self.numbers(keys) + statistics(*kv_heads);
            }
        }
        if value_norm.is_some() {
            // Values that are keys are kept by the norm of those.
            let raw = if matches!(projection, Projection::ValuesAreKeys { .. }) { 0 } else { keys };
            kept += self.numbers(raw) + self.fp32(2 * kv_heads);
        }
        let updates = self.updates(&linears) + self.updates(&[output]);
        Half {
            kept: kept + updates.kept,
            forward: self.numbers(queries).max(updates.whole),
            backward: self.attended(*heads, *kv_heads, *head_size).max(self.numbers(queries) + updates.whole),
            gradients: updates.gradients,
        }
    }

    /// What the backward of attention itself has at once: gradients of its output and of what it reads, and what those are made in.
    fn attended(&self, heads: i64, kv_heads: i64, head_size: i64) -> u64 {
        let (queries, keys) = (heads * head_size, kv_heads * head_size);
        match self.flash {
            Some(flash) => {
                let of_every_head = if kv_heads == heads { 0 } else { 2 * queries };
                self.numbers(2 * queries + 2 * keys + of_every_head) + flash.sums(self.tokens, heads, head_size)
            }
            None => self.numbers(3 * queries + 4 * keys),
        }
    }

    fn latent(&self, latent: &LatentAttention) -> Half {
        // Query, key, value and output as wide as the key, the output cut to its size, and both latents.
        let key = latent.unrotated + latent.rotated;
        let (low_rank, mut linears) = match &latent.query {
            LatentQuery::Direct(query) => (0, vec![query]),
            LatentQuery::LowRank { down, up, .. } => (down.output, vec![down, up]),
        };
        linears.extend([&latent.down, &latent.up, &latent.output]);
        let updates = linears.into_iter().map(|linear| self.updates(&[linear])).fold(Updates::default(), |a, b| a + b);
        let wide = latent.heads * key;
        Half {
            kept: self.numbers(4 * wide + latent.heads * latent.value_size + latent.latent_size + low_rank)
                + self.fp32(latent.heads + 4)
                + updates.kept,
            forward: self.numbers(wide).max(updates.whole),
            backward: self.attended(latent.heads, latent.heads, key).max(self.numbers(wide) + updates.whole),
            gradients: updates.gradients,
        }
    }

    /// Queries, keys and values before their convolution and after it, the output's gate, what the heads read and that normed; and in
    /// fp32 two gates of each head, statistics, and the state every [`TOKENS_OF_A_RUN`] tokens.
    fn delta_net(&self, net: &DeltaNet) -> Half {
        let DeltaNet { key_heads, value_heads, key_size, value_size, projection, output, .. } = net;
        let values = value_heads * value_size;
        let streams = 2 * key_heads * key_size + values;
        let updates = self.updates(&projection.linears()) + self.updates(&[output]);
        Half {
            kept: self.numbers(2 * streams + 3 * values)
                + self.fp32(5 * value_heads + values * key_size / TOKENS_OF_A_RUN)
                + updates.kept,
            forward: self.numbers(streams).max(updates.whole),
            backward: self.numbers(2 * streams + 2 * values).max(self.numbers(values) + updates.whole),
            gradients: updates.gradients,
        }
    }

    /// Queries before their norm and after it, the output before it is turned back and after it, the latent, the key twice, k and g.
    fn compressed(&self, compressed: &CompressedAttention) -> Half {
        let CompressedAttention { heads, head_size, query_down, query_up, group, entries, output, key_value, .. } =
            compressed;
        let of_windows = entries.compressor().map_or(0, |c| c.key_value.output + c.gate.output);
        let wide = heads * head_size;
        let linears = [query_down, query_up, key_value, output];
        let updates = linears.into_iter().map(|linear| self.updates(&[linear])).fold(Updates::default(), |a, b| a + b);
        Half {
            kept: self.numbers(4 * wide + query_down.output + 2 * head_size + of_windows + group.output)
                + self.fp32(3 * heads)
                + updates.kept,
            forward: self.numbers(wide).max(updates.whole),
            backward: self.numbers(4 * wide).max(self.numbers(wide) + updates.whole),
            gradients: updates.gradients,
        }
    }

    fn feed_forward(&self, feed_forward: &FeedForward) -> Half {
        let dense = matches!(feed_forward, FeedForward::Plain { .. } | FeedForward::Gated { .. });
        if let Some(tile) = self.tile.filter(|tile| dense && *tile < self.tokens) {
            // A tile runs forward and keeps, and backward and leaves its gradients beside their sums; what all tiles give is whole: the
            // next stream in forward, the gradient of what they read in backward.
            let of_a_tile = Self { tokens: tile, tile: None, ..*self }.feed_forward(feed_forward);
            let Half { kept, forward, backward, gradients } = of_a_tile;
            return Half {
                kept: 0,
                forward: kept + forward,
                backward: self.numbers(self.spec.hidden_size) + kept + backward + gradients,
                gradients,
            };
        }
        match feed_forward {
            FeedForward::Plain { up, down, .. } => {
                let updates = self.updates(&[up]) + self.updates(&[down]);
                let wide = self.numbers(up.output);
                self.dense(wide, 3 * wide, wide, updates)
            }
            FeedForward::Gated { projection, down, .. } => {
                let (linears, fused) = match projection {
                    GateUp::Separate { gate, up } => (vec![gate, up], false),
                    GateUp::Fused(both) => (vec![both], true),
                };
                let updates = self.updates(&linears) + self.updates(&[down]);
                let wide = self.numbers(down.input);
                // What is stored fused is taken apart: both are there for a moment.
                self.dense(2 * wide, 4 * wide, if fused { 2 * wide } else { wide }, updates)
            }
            FeedForward::Experts(experts) => self.experts(experts),
            FeedForward::Sum(branches) => {
                let hidden = self.numbers(self.spec.hidden_size) + self.fp32(2);
                let halves = branches.iter().map(|branch| {
                    let mut half = self.feed_forward(&branch.feed_forward);
                    for _ in [&branch.norms.before, &branch.norms.after].into_iter().flatten() {
                        half.kept += hidden;
                        half.backward += hidden;
                    }
                    half
                });
                // The stream is normed for all of them.
                let both = Half { kept: hidden, forward: hidden, backward: hidden, gradients: 0 };
                halves.fold(both, |sum, half| Half {
                    kept: sum.kept + half.kept,
                    forward: sum.forward.max(half.forward + hidden),
                    backward: sum.backward.max(half.backward + hidden),
                    gradients: sum.gradients + half.gradients,
                })
            }
        }
    }

    fn dense(&self, kept: u64, backward: u64, forward: u64, updates: Updates) -> Half {
        Half {
            kept: kept + updates.kept,
            forward: forward.max(updates.whole),
            backward: backward.max(backward / 4 + updates.whole),
            gradients: updates.gradients,
        }
    }

    fn experts(&self, experts: &Experts) -> Half {
        let Experts { router, projection, down, shared, .. } = experts;
        let chosen = match router.routing {
            Routing::Largest { chosen, .. } | Routing::OfToken { chosen, .. } => chosen,
            Routing::SparseMixer { .. } => 2,
        };
        let rows = self.rows_of_experts(chosen as u64, down.experts as u64);
        let into: Vec<&crate::model::spec::ExpertLinear> = match projection {
            ExpertGateUp::Separate { gate, up } => vec![gate, up],
            ExpertGateUp::Fused { linear, .. } => vec![linear],
        };
        let mut updates = self.updates(&[&router.linear]);
        let mut through = 0; // X A^T of all updates
        for linear in into.iter().chain([&down]) {
            let module = self.spec.names.module(&linear.name);
            let (of_it, rank) = self.tuned.of_experts(&module, self.element);
            updates = updates + Updates { kept: of_it.0, gradients: of_it.1, whole: 0 };
            through += rank;
            if self.tuned.is_quantised(&module) {
                updates.whole = updates.whole.max((linear.input * linear.output) as u64 * self.element);
            }
        }
        let (hidden, wide) = (self.spec.hidden_size as u64, down.input as u64);
        let row = |numbers: u64| rows * numbers * self.element;
        // The normed stream, that the router, experts and the shared one read; logits and scores of the router.
        let x = self.numbers(self.spec.hidden_size) * if router.wide { 1 + 4 / self.element } else { 1 };
        let routed = self.fp32(3 * router.linear.output);
        let shared_half = shared.as_ref().map_or(Half::default(), |shared| {
            let mut half = self.feed_forward(&shared.feed_forward);
            if shared.gate.is_some() {
                half.kept += self.numbers(2 * self.spec.hidden_size);
            }
            half
        });
        let backward = row(hidden + 4 * wide).max(row(2 * hidden + 2 * wide) + self.numbers(self.spec.hidden_size));
        Half {
            kept: x + routed + row(2 * wide + through) + shared_half.kept + updates.kept,
            forward: (row(hidden + wide) + updates.whole).max(shared_half.forward),
            // Updates of all experts are added up in the activations' type first.
            backward: (backward + updates.whole + updates.gradients / 2).max(shared_half.backward),
            gradients: updates.gradients + shared_half.gradients,
        }
    }

    /// Rows of all experts together: on the CPU each expert's are filled up to a multiple of 16 and of a thirty-second of the next
    /// power of two, of which every second one is for nothing.
    fn rows_of_experts(&self, chosen: u64, experts: u64) -> u64 {
        let rows = self.tokens * chosen;
        let of_one = rows.div_ceil(experts.max(1)).max(1);
        rows + experts.min(rows) * (of_one.next_power_of_two() / 32).max(16) / 2
    }

    fn own_input(&self, LayerInput { gate, projection, .. }: &LayerInput) -> Half {
        let updates = self.updates(&[gate]) + self.updates(&[projection]);
        let (hidden, width) = (self.spec.hidden_size, gate.output);
        Half {
            // What comes in, the gate and what it is multiplied with, what is normed before it is added.
            kept: self.numbers(2 * hidden + 2 * width) + self.fp32(2) + updates.kept,
            forward: self.numbers(hidden + width),
            backward: self.numbers(2 * hidden + 4 * width),
            gradients: updates.gradients,
        }
    }

    /// Of linears that read the same: X A^T, every A and B in the activations' type, and what DoRA keeps.
    fn updates(&self, linears: &[&LinearSpec]) -> Updates {
        linears.iter().map(|linear| self.update(linear)).fold(Updates::default(), |sum, one| sum + one)
    }

    fn update(&self, linear: &LinearSpec) -> Updates {
        let module = self.spec.names.module(&linear.name);
        let weight = (linear.input * linear.output) as u64;
        let whole = if self.tuned.is_quantised(&module) { weight * self.element } else { 0 };
        let mut found = Updates { whole, ..Updates::default() };
        if let Some(rank) = self.tuned.rank(&module) {
            let numbers = (rank * (linear.input + linear.output)) as u64;
            found.kept += self.numbers(rank) + numbers * self.element;
            found.gradients += 4 * numbers;
            if self.tuned.decomposes(&module) {
                // What the rows' lengths are multiplied with, and s B in fp32.
                found.kept += self.numbers(linear.output) + 4 * (rank * linear.output) as u64;
                found.gradients += 4 * linear.output as u64;
            }
        }
        if self.tuned.is_whole(&module) {
            found.kept += weight * self.element;
            found.gradients += 4 * weight;
        }
        found
    }

    /// Bytes of so many numbers of each token, in the activations' type.
    pub(super) fn numbers(&self, of_a_token: i64) -> u64 {
        of_a_token as u64 * self.tokens * self.element
    }

    /// The same in fp32.
    pub(super) fn fp32(&self, of_a_token: i64) -> u64 {
        of_a_token as u64 * self.tokens * 4
    }
}
