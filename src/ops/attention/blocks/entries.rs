//! [`super`] for attention to entries ([`crate::ops::attention::entries`]): one head of keys, which are the values too, serves all heads
//! of queries, and entries stand beside the keys as more of them. One task is one document and some heads of queries; what tasks add
//! to the gradient of the same keys is summed in the end.

use std::ops::Range;

use half::bf16;
use tch::{Device, Kind, Tensor};

use super::BLOCK;
use super::pack::{dot_rows, pack_rows, pack_transposed, round_transposed, transpose};
use super::softmax::{Scores, gradient_block, softmax_block};
use crate::ops::Documents;
use crate::ops::attention::Scoring;
use crate::ops::attention::entries::Entries;
use crate::ops::compress::entries_of;
use crate::ops::cpu::{Parts, Stored};
use crate::torch_ext::{Rows, bf16_gemm, bf16_gemm_done, elements, elements_mut, parallel_tasks};

/// Bytes of fp32 gradients of keys and entries that may exist at once.
const SUMS_BYTES: usize = 64 << 20;

/// The product of a query with what was not chosen for it: finite, because it is multiplied by zeros, too.
const REFUSED: f32 = -1e30;

/// Tasks for each thread, so that none waits long for the last one.
const TASKS_OF_A_THREAD: usize = 8;

/// Sizes, who may look at what, and how scores are made.
pub(in crate::ops::attention) struct Shape {
    documents: Vec<Document>,
    tokens: usize,
    entries: usize,
    heads: usize,
    /// H.
    head: usize,
    window: usize,
    rate: usize,
    scores: Scores,
    /// Heads of a task.
    at_once: usize,
}

struct Document {
    start: usize,
    length: usize,
    first_entry: usize,
    entries: usize,
    /// Whether a token sees an entry (L, W), one byte each, where it does not see all it may.
    chosen: Option<Vec<u8>>,
}

/// Some keys, or some entries, of a document.
struct Panel {
    kind: Of,
    /// Place of the first one among those of the document.
    first: usize,
    /// How many.
    count: usize,
    /// Row of the first one among all that the document's queries may look at, in blocks filled up.
    row: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Of {
    Keys,
    Entries,
}

impl Document {
    /// What its queries may look at: keys first, of which every query sees its own.
    fn panels(&self) -> Vec<Panel> {
        let mut row = 0;
        let mut panels = Vec::new();
        for (kind, all) in [(Of::Keys, self.length), (Of::Entries, self.entries)] {
            for first in (0..all).step_by(BLOCK) {
                panels.push(Panel { kind, first, count: BLOCK.min(all - first), row });
                row += BLOCK;
            }
        }
        panels
    }

    fn query_blocks(&self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.length).step_by(BLOCK).map(|first| (first, BLOCK.min(self.length - first)))
    }
}

impl Shape {
    pub(in crate::ops::attention) fn new(
        q: &Tensor,
        entries: &Entries,
        documents: &Documents,
        scoring: &Scoring,
    ) -> Self {
        let (tokens, heads, head) = q.size3().expect("(T, N, H)");
        let mut first_entry = 0;
        let of_document = |((start, length), chosen): ((i64, i64), &Option<Tensor>)| {
            let own = entries_of(length, entries.rate) as usize;
            first_entry += own;
            Document {
                start: start as usize,
                length: length as usize,
                first_entry: first_entry - own,
                entries: own,
                chosen: chosen.as_ref().map(|chosen| elements(&chosen.to_kind(Kind::Uint8).contiguous()).to_vec()),
            }
        };
        let all: Vec<Document> = documents.spans().zip(&entries.chosen).map(of_document).collect();
        let count = entries.values.size()[0] as usize;
        let of_gradient = (tokens as usize + count) * head as usize * size_of::<f32>();
        let tasks = (TASKS_OF_A_THREAD * tch::get_num_threads() as usize).div_ceil(all.len().max(1));
        let groups = tasks.min(SUMS_BYTES / of_gradient.max(1)).clamp(1, heads as usize);
        Self {
            documents: all,
            tokens: tokens as usize,
            entries: count,
            heads: heads as usize,
            head: head as usize,
            window: scoring.window.map_or(usize::MAX, |window| window as usize),
            rate: entries.rate as usize,
            scores: Scores::new(scoring, 1, documents.longest() as usize),
            at_once: (heads as usize).div_ceil(groups),
        }
    }

    /// Heads of each task of a document.
    fn groups(&self) -> Vec<Range<usize>> {
        (0..self.heads).step_by(self.at_once).map(|first| first..self.heads.min(first + self.at_once)).collect()
    }

    /// (document, group) of every task, the longest documents first.
    fn tasks(&self) -> Vec<(usize, usize)> {
        let mut order: Vec<usize> = (0..self.documents.len()).collect();
        order.sort_by_key(|d| std::cmp::Reverse(self.documents[*d].length));
        let groups = self.groups().len();
        order.into_iter().flat_map(|d| (0..groups).map(move |group| (d, group))).collect()
    }

    /// Rows of a head, from a document's token `first` on.
    fn queries<'a>(&self, x: &'a [bf16], document: &Document, head: usize, first: usize) -> Rows<'a> {
        let stride = self.heads * self.head;
        Rows { elements: &x[(document.start + first) * stride + head * self.head..], stride }
    }

    fn panel<'a>(&self, inputs: &Inputs<'a>, document: &Document, panel: &Panel) -> Rows<'a> {
        let (x, start) = match panel.kind {
            Of::Keys => (inputs.keys, document.start),
            Of::Entries => (inputs.entries, document.first_entry),
        };
        Rows { elements: &x[(start + panel.first) * self.head..], stride: self.head }
    }

    /// Whether any of the queries `first..last` sees any of a panel.
    fn sees(&self, panel: &Panel, first: usize, last: usize) -> bool {
        match panel.kind {
            Of::Keys => panel.first < last && panel.first + panel.count > (first + 1).saturating_sub(self.window),
            Of::Entries => last / self.rate > panel.first,
        }
    }

    /// Columns of a panel that query `query` may look at.
    fn columns(&self, panel: &Panel, query: usize) -> (usize, usize) {
        let (from, to) = match panel.kind {
            Of::Keys => ((query + 1).saturating_sub(self.window), query + 1),
            Of::Entries => (0, (query + 1) / self.rate),
        };
        let [from, to] = [from, to].map(|place| place.saturating_sub(panel.first).min(panel.count));
        (from.min(to), to)
    }

    /// Of the queries `first..first + m`, those that may look at what is in place `place` of its kind.
    fn rows(&self, kind: Of, place: usize, (first, m): (usize, usize)) -> (usize, usize) {
        let (from, to) = match kind {
            Of::Keys => (place, place.saturating_add(self.window)),
            Of::Entries => ((place + 1) * self.rate - 1, usize::MAX),
        };
        let [from, to] = [from, to].map(|query| query.saturating_sub(first).min(m));
        (from, to.max(from))
    }

    /// Takes what was not chosen out of the products of a panel with the queries `first..first + m`: (m, count), or (count, m) where
    /// `turned`.
    fn refuse(
        &self,
        document: &Document,
        panel: &Panel,
        (first, m): (usize, usize),
        turned: bool,
        products: &mut [f32],
    ) {
        let (Some(chosen), Of::Entries) = (&document.chosen, panel.kind) else { return };
        for query in 0..m {
            let chosen = &chosen[(first + query) * document.entries + panel.first..][..panel.count];
            for (place, chosen) in chosen.iter().enumerate() {
                if *chosen == 0 {
                    let at = if turned { place * m + query } else { query * panel.count + place };
                    products[at] = REFUSED;
                }
            }
        }
    }

    /// A new tensor (planes, rows, H) or (planes, rows).
    fn empty(&self, planes: usize, rows: usize, width: usize, kind: Kind) -> Tensor {
        Tensor::empty([planes, rows, width].map(|n| n as i64), (kind, Device::Cpu))
    }

    fn parts<'a, T>(&self, all: &'a mut [T], planes: usize, of: Of, width: usize) -> Parts<'a, T> {
        let lengths: Vec<usize> = self
            .documents
            .iter()
            .map(|document| width * if of == Of::Keys { document.length } else { document.entries })
            .collect();
        Parts::new(all, planes, &lengths)
    }
}

/// What tasks read.
struct Inputs<'a> {
    /// (T, N, H).
    q: &'a [bf16],
    /// (T, H).
    keys: &'a [bf16],
    /// (W, H).
    entries: &'a [bf16],
}

/// What a backward task reads besides.
struct Taken<'a> {
    /// (T, N, H).
    grad: &'a [bf16],
    /// (T, N, H).
    output: &'a [bf16],
    /// (N, T).
    logsumexp: &'a [f32],
}

/// The output (T, N, H) and, for backward, logsumexp of the scores as (N, T, 1), fp32.
pub(in crate::ops::attention) fn forward(
    q: &Tensor,
    keys: &Tensor,
    entries: &Tensor,
    shape: &Shape,
) -> (Tensor, Tensor) {
    let mut output = shape.empty(shape.heads, shape.tokens, shape.head, Kind::BFloat16);
    let mut logsumexp = shape.empty(shape.heads, shape.tokens, 1, Kind::Float);
    let inputs = Inputs { q: elements(q), keys: elements(keys), entries: elements(entries) };
    {
        let outputs = shape.parts(elements_mut::<bf16>(&mut output), shape.heads, Of::Keys, shape.head);
        let logsumexps = shape.parts(elements_mut::<f32>(&mut logsumexp), shape.heads, Of::Keys, 1);
        let (tasks, groups) = (shape.tasks(), shape.groups());
        parallel_tasks(tasks.len(), |i| {
            let (document, group) = tasks[i];
            forward_task(&inputs, shape, document, groups[group].clone(), &outputs, &logsumexps);
        });
    }
    (output.transpose(0, 1).contiguous(), logsumexp)
}

fn forward_task(
    inputs: &Inputs<'_>,
    shape: &Shape,
    number: usize,
    heads: Range<usize>,
    outputs: &Parts<'_, bf16>,
    logsumexps: &Parts<'_, f32>,
) {
    let (document, size) = (&shape.documents[number], shape.head);
    let panels = document.panels();
    // K^T and V of every panel, as right operands.
    let [mut keys, mut values] = [(); 2].map(|()| vec![bf16::ZERO; panels.len() * BLOCK * size]);
    for panel in &panels {
        let rows = shape.panel(inputs, document, panel);
        pack_transposed(rows, panel.count, size, &mut keys[panel.row * size..]);
        pack_rows(rows, panel.count, size, &mut values[panel.row * size..]);
    }
    let left = shape.scores.left();
    let mut scores = vec![0f32; BLOCK * BLOCK];
    let mut weights = vec![bf16::ZERO; BLOCK * BLOCK];
    let mut sums = vec![0f32; BLOCK * size];
    for head in heads {
        let (mut output, mut logsumexp) = (outputs.take(head, number), logsumexps.take(head, number));
        for (first, m) in document.query_blocks() {
            let queries = shape.queries(inputs.q, document, head, first);
            let mut running = [shape.scores.start(head); BLOCK];
            sums[..m * size].fill(0.0);
            for panel in panels.iter().filter(|panel| shape.sees(panel, first, first + m)) {
                let (n, even) = (panel.count, panel.count.next_multiple_of(2));
                bf16_gemm((m, n, size), queries, &keys[panel.row * size..], &mut scores, false);
                shape.refuse(document, panel, (first, m), false, &mut scores);
                let columns = |row: usize| shape.columns(panel, first + row);
                softmax_block(&scores, (m, n, even), left, &columns, &mut running, &mut weights, &mut sums, size);
                let weights = Rows { elements: &weights, stride: even };
                bf16_gemm((m, size, even), weights, &values[panel.row * size..], &mut sums, true);
            }
            for (row, running) in running[..m].iter().enumerate() {
                logsumexp[first + row] = running.logsumexp();
                let out = &mut output[(first + row) * size..][..size];
                for (out, sum) in out.iter_mut().zip(&sums[row * size..]) {
                    *out = Stored::rounded(sum / running.total());
                }
            }
        }
    }
    bf16_gemm_done();
}

/// The gradients of q (T, N, H), and of keys (T, 1, H) and entries (W, H).
pub(in crate::ops::attention) fn backward(
    grad: &Tensor,
    [q, keys, entries, output]: [&Tensor; 4],
    logsumexp: &Tensor,
    shape: &Shape,
) -> [Tensor; 3] {
    let grad = grad.contiguous();
    let groups = shape.groups();
    let mut dq = shape.empty(shape.heads, shape.tokens, shape.head, Kind::BFloat16);
    let mut dkeys = shape.empty(groups.len(), shape.tokens, shape.head, Kind::Float);
    let mut dentries = shape.empty(groups.len(), shape.entries, shape.head, Kind::Float);
    let inputs = Inputs { q: elements(q), keys: elements(keys), entries: elements(entries) };
    let taken = Taken { grad: elements(&grad), output: elements(output), logsumexp: elements(logsumexp) };
    {
        let dqs = shape.parts(elements_mut::<bf16>(&mut dq), shape.heads, Of::Keys, shape.head);
        let of_keys = shape.parts(elements_mut::<f32>(&mut dkeys), groups.len(), Of::Keys, shape.head);
        let of_entries = shape.parts(elements_mut::<f32>(&mut dentries), groups.len(), Of::Entries, shape.head);
        let tasks = shape.tasks();
        parallel_tasks(tasks.len(), |i| {
            let (document, group) = tasks[i];
            let sums = backward_task(&inputs, &taken, shape, document, groups[group].clone(), &dqs);
            let (mut of_keys, mut of_entries) = (of_keys.take(group, document), of_entries.take(group, document));
            for panel in shape.documents[document].panels() {
                let into = if panel.kind == Of::Keys { &mut of_keys } else { &mut of_entries };
                let count = panel.count * shape.head;
                into[panel.first * shape.head..][..count].copy_from_slice(&sums[panel.row * shape.head..][..count]);
            }
        });
    }
    let together = |x: &Tensor| match x.size()[0] {
        1 => x.squeeze_dim(0),
        _ => x.sum_dim_intlist([0i64].as_slice(), false, Kind::Float),
    };
    let [dkeys, dentries] = [(&dkeys, keys), (&dentries, entries)].map(|(d, like)| together(d).to_kind(like.kind()));
    [dq.transpose(0, 1).contiguous(), dkeys.view_as(keys), dentries]
}

/// The gradient of what the document's queries look at, in the rows of its panels: (rows, H), fp32.
fn backward_task(
    inputs: &Inputs<'_>,
    taken: &Taken<'_>,
    shape: &Shape,
    number: usize,
    heads: Range<usize>,
    dqs: &Parts<'_, bf16>,
) -> Vec<f32> {
    let (document, size) = (&shape.documents[number], shape.head);
    let (panels, length) = (document.panels(), document.length);
    // K^T (H, n) of every panel, as left operand of dQ^T.
    let mut keys_transposed = vec![bf16::ZERO; panels.len() * BLOCK * size];
    for panel in &panels {
        let rows = shape.panel(inputs, document, panel);
        transpose(rows, panel.count, size, &mut keys_transposed[panel.row * size..]);
    }
    // Q^T, dO^T, Q and dO of every block of queries, as right operands.
    let padded = length.next_multiple_of(BLOCK) * size;
    let [mut q_columns, mut g_columns, mut q_rows, mut g_rows] = [(); 4].map(|()| vec![bf16::ZERO; padded]);
    let mut seen_sums = vec![0f32; panels.len() * BLOCK * size];
    let mut dq_sums = vec![0f32; padded]; // (H, m) of every block
    let mut delta = vec![0f32; length];
    let left = shape.scores.left();
    let [mut scores, mut products] = [(); 2].map(|()| vec![0f32; BLOCK * BLOCK]);
    let [mut weights, mut gradients, mut paired] = [(); 3].map(|()| vec![bf16::ZERO; BLOCK * BLOCK]);
    for head in heads {
        for (first, rows) in document.query_blocks() {
            let queries = shape.queries(inputs.q, document, head, first);
            let grads = shape.queries(taken.grad, document, head, first);
            pack_transposed(queries, rows, size, &mut q_columns[first * size..]);
            pack_transposed(grads, rows, size, &mut g_columns[first * size..]);
            pack_rows(queries, rows, size, &mut q_rows[first * size..]);
            pack_rows(grads, rows, size, &mut g_rows[first * size..]);
        }
        let [grads, outputs] = [taken.grad, taken.output].map(|x| shape.queries(x, document, head, 0));
        dot_rows(grads, outputs, size, &mut delta);
        let lse = &taken.logsumexp[head * shape.tokens + document.start..][..length];
        dq_sums.fill(0.0);
        for panel in &panels {
            let (n, even) = (panel.count, panel.count.next_multiple_of(2));
            let keys = shape.panel(inputs, document, panel);
            for (first, m) in document.query_blocks().filter(|(first, m)| shape.sees(panel, *first, first + m)) {
                let even_m = m.next_multiple_of(2);
                bf16_gemm((n, m, size), keys, &q_columns[first * size..], &mut scores, false);
                bf16_gemm((n, m, size), keys, &g_columns[first * size..], &mut products, false);
                shape.refuse(document, panel, (first, m), true, &mut scores);
                let columns = |row: usize| shape.rows(panel.kind, panel.first + row, (first, m));
                let per_query = (&lse[first..first + m], &delta[first..first + m]);
                let of_block = (&scores[..], &products[..]);
                gradient_block(of_block, (n, m, even_m), left, &columns, per_query, &mut weights, &mut gradients);
                let weights = Rows { elements: &weights, stride: even_m };
                let gradients = Rows { elements: &gradients, stride: even_m };
                let sums = &mut seen_sums[panel.row * size..];
                bf16_gemm((n, size, even_m), weights, &g_rows[first * size..], sums, true);
                bf16_gemm((n, size, even_m), gradients, &q_rows[first * size..], sums, true);
                pack_rows(gradients, n, m, &mut paired);
                let keys_transposed = Rows { elements: &keys_transposed[panel.row * size..], stride: BLOCK };
                bf16_gemm((size, m, even), keys_transposed, &paired, &mut dq_sums[first * size..], true);
            }
        }
        let mut dq = dqs.take(head, number);
        for (first, m) in document.query_blocks() {
            let sums = &dq_sums[first * size..(first + m) * size]; // (H, m)
            round_transposed(sums, (m, size), size, &mut dq[first * size..]);
        }
    }
    bf16_gemm_done();
    seen_sums
}
