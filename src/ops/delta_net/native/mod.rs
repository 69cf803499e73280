//! The rule on the CPU: one task is one document and one key head with its group of value heads, so tasks share nothing they write.
//! What a task works on stays in the processor's cache and its products in registers; the formulas are those of the module
//! `chunk`, whose compositions serve other devices.
//!
//! Chunks are cut from each document, the last one as long as what is left. Nothing is seen from before a document's first chunk,
//! so there is no state yet, and none after its last one is wanted: the products with these are left out.
//!
//! Matrices lie in rows filled up with zeros to a multiple of what the products take.

mod backward;
mod chunk;
mod forward;

use tch::{Device, Kind, Tensor};

use super::{CHUNK, TOKENS_OF_A_RUN};
use crate::ops::Documents;
use crate::ops::cpu::{self, Parts, Stored, by_kind, products};
use crate::torch_ext::{elements, elements_mut, parallel_tasks_with};

/// C.
const C: usize = CHUNK as usize;

/// Chunks between two states that are kept.
const RUN: usize = TOKENS_OF_A_RUN as usize / C;

/// Whether these tensors (q, k, v, log decay, b) can go through here.
pub(super) fn serves(inputs: &[Tensor; 5]) -> bool {
    let [q, k, v, log_decay, beta] = inputs;
    cpu::serves(&[q, k, v]) && cpu::serves(&[log_decay, beta]) && log_decay.kind() == Kind::Float
}

/// Sizes, and how the documents are cut.
pub(super) struct Shape {
    documents: Vec<Document>,
    tokens: usize,
    key_heads: usize,
    /// G.
    group: usize,
    /// P.
    key: usize,
    /// H.
    value: usize,
    /// Whether the state after the last token is kept, too.
    continued: bool,
}

#[derive(Clone, Copy)]
struct Document {
    start: usize,
    length: usize,
}

impl Document {
    /// Chunks.
    fn chunks(self) -> usize {
        self.length.div_ceil(C)
    }

    /// First token in the document and length of a chunk.
    fn chunk(self, index: usize) -> (usize, usize) {
        (index * C, C.min(self.length - index * C))
    }

    fn runs(self) -> usize {
        self.chunks().div_ceil(RUN)
    }
}

impl Shape {
    pub(super) fn new(inputs: &[Tensor; 5], documents: &Documents, continued: bool) -> Self {
        let (tokens, key_heads, key) = inputs[0].size3().expect("(T, K, P)");
        let (_, value_heads, value) = inputs[2].size3().expect("(T, N, H)");
        let documents = documents
            .spans()
            .map(|(start, length)| Document { start: start as usize, length: length as usize })
            .filter(|document| document.length > 0);
        Self {
            documents: documents.collect(),
            tokens: tokens as usize,
            key_heads: key_heads as usize,
            group: (value_heads / key_heads) as usize,
            key: key as usize,
            value: value as usize,
            continued,
        }
    }

    /// States kept of a document: after every run but the last, of which nothing is seen later.
    fn states(&self, document: Document) -> usize {
        document.runs() - 1 + usize::from(self.continued)
    }

    /// Elements of the states of a group of heads.
    fn state(&self) -> usize {
        self.group * self.key * self.value
    }

    /// P, filled up.
    fn key_wide(&self) -> usize {
        self.key.next_multiple_of(products::COLUMNS)
    }

    /// H, filled up.
    fn value_wide(&self) -> usize {
        self.value.next_multiple_of(products::COLUMNS)
    }

    /// (document, key head) of every task, the longest documents first so that the last tasks are short.
    fn tasks(&self) -> Vec<(usize, usize)> {
        let mut order: Vec<usize> = (0..self.documents.len()).collect();
        order.sort_by_key(|d| std::cmp::Reverse(self.documents[*d].length));
        order.into_iter().flat_map(|d| (0..self.key_heads).map(move |head| (d, head))).collect()
    }

    /// Cuts a tensor (K, rows of all documents, width) to what each task writes.
    fn parts<'a, T>(&self, all: &'a mut [T], rows: impl Fn(Document) -> usize, width: usize) -> Parts<'a, T> {
        let lengths: Vec<usize> = self.documents.iter().map(|document| rows(*document) * width).collect();
        Parts::new(all, self.key_heads, &lengths)
    }

    /// A new tensor (K, rows, width).
    fn empty(&self, rows: usize, width: usize, kind: Kind) -> Tensor {
        Tensor::empty([self.key_heads, rows, width].map(|n| n as i64), (kind, Device::Cpu))
    }
}

/// (K, T, width) as `like`, (T, ...).
fn heads_together(x: &Tensor, like: &Tensor) -> Tensor {
    x.transpose(0, 1).contiguous().view_as(like)
}

/// o (T, N, H), and the states that backward needs: (K, states of all documents, G P H). It begins with the state (N, P, H), if given.
/// Of a continued document its last state is the last of them.
pub(super) fn forward(inputs: &[Tensor; 5], shape: &Shape, before: Option<&Tensor>) -> (Tensor, Tensor) {
    by_kind!(inputs[0].kind(), forward_of(inputs, shape, before))
}

fn forward_of<S: Stored>(tensors: &[Tensor; 5], shape: &Shape, before: Option<&Tensor>) -> (Tensor, Tensor) {
    let states = shape.documents.iter().map(|document| shape.states(*document)).sum();
    let mut output = shape.empty(shape.tokens, shape.group * shape.value, S::KIND);
    let mut kept = shape.empty(states, shape.state(), Kind::Float);
    let inputs = Inputs::<S>::new(tensors);
    let before = before.map(elements::<f32>);
    {
        let outputs = shape.parts(elements_mut::<S>(&mut output), |d| d.length, shape.group * shape.value);
        let states = shape.parts(elements_mut::<f32>(&mut kept), |d| shape.states(d), shape.state());
        let tasks = shape.tasks();
        parallel_tasks_with(
            tasks.len(),
            || forward::Room::new(shape),
            |room, i| {
                let (document, head) = tasks[i];
                let before = before.map(|before| &before[head * shape.state()..(head + 1) * shape.state()]);
                let place = Place { shape, document: shape.documents[document], head };
                forward::task(
                    &inputs,
                    place,
                    before,
                    room,
                    &mut outputs.take(head, document),
                    &mut states.take(head, document),
                );
            },
        );
    }
    (heads_together(&output, &tensors[2]), kept)
}

/// The gradients of the inputs from that of o (T, N, H), of documents that were not continued.
pub(super) fn backward(grad: &Tensor, inputs: &[Tensor; 5], states: &Tensor, shape: &Shape) -> [Tensor; 5] {
    by_kind!(inputs[0].kind(), backward_of(&grad.contiguous(), inputs, states, shape))
}

fn backward_of<S: Stored>(grad: &Tensor, tensors: &[Tensor; 5], states: &Tensor, shape: &Shape) -> [Tensor; 5] {
    let Shape { tokens, group, key, value, .. } = *shape;
    let (mut dq, mut dk) = (shape.empty(tokens, key, S::KIND), shape.empty(tokens, key, S::KIND));
    let mut dv = shape.empty(tokens, group * value, S::KIND);
    let [mut dlog_decay, mut dbeta] = [(); 2].map(|()| shape.empty(tokens, group, Kind::Float));
    let (inputs, grad) = (Inputs::<S>::new(tensors), elements::<S>(grad));
    let kept = elements::<f32>(states);
    let (all, mut starts) = (shape.documents.iter().map(|d| shape.states(*d)).sum::<usize>(), vec![0]);
    starts.extend(shape.documents.iter().scan(0, |end, document| {
        *end += shape.states(*document);
        Some(*end)
    }));
    {
        let length = |document: Document| document.length;
        let dqs = shape.parts(elements_mut::<S>(&mut dq), length, key);
        let dks = shape.parts(elements_mut::<S>(&mut dk), length, key);
        let dvs = shape.parts(elements_mut::<S>(&mut dv), length, group * value);
        let dlog_decays = shape.parts(elements_mut::<f32>(&mut dlog_decay), length, group);
        let dbetas = shape.parts(elements_mut::<f32>(&mut dbeta), length, group);
        let tasks = shape.tasks();
        parallel_tasks_with(
            tasks.len(),
            || backward::Room::new(shape),
            |room, i| {
                let (document, head) = tasks[i];
                let [first, last] = [starts[document], starts[document + 1]].map(|s| (head * all + s) * shape.state());
                let place = Place { shape, document: shape.documents[document], head };
                let gradients = backward::Gradients {
                    q: &mut dqs.take(head, document),
                    k: &mut dks.take(head, document),
                    v: &mut dvs.take(head, document),
                    log_decay: &mut dlog_decays.take(head, document),
                    beta: &mut dbetas.take(head, document),
                };
                backward::task(&inputs, grad, &kept[first..last], place, room, gradients);
            },
        );
    }
    let gradients = [dq, dk, dv, dlog_decay, dbeta];
    std::array::from_fn(|i| heads_together(&gradients[i], &tensors[i]))
}

/// What tasks read.
struct Inputs<'a, S> {
    /// (T, K, P).
    q: &'a [S],
    /// (T, K, P).
    k: &'a [S],
    /// (T, N, H).
    v: &'a [S],
    /// (T, N).
    log_decay: &'a [f32],
    /// (T, N).
    beta: &'a [f32],
}

impl<'a, S: Stored> Inputs<'a, S> {
    fn new([q, k, v, log_decay, beta]: &'a [Tensor; 5]) -> Self {
        Self { q: elements(q), k: elements(k), v: elements(v), log_decay: elements(log_decay), beta: elements(beta) }
    }
}

/// Where a task is.
#[derive(Clone, Copy)]
struct Place<'a> {
    shape: &'a Shape,
    document: Document,
    /// Of keys.
    head: usize,
}
