//! What a recurrence keeps of tokens already seen: its state, and the last few tokens of what goes through its convolutions.

use tch::{Device, Kind, Tensor};

use crate::ops::{self, Convolution, Documents};

/// One block's state of B sequences.
#[derive(Debug)]
pub(super) struct Recurrent {
    /// The last tokens of queries, keys and values before their convolutions: (B, C - 1, K P) twice, (B, C - 1, N H).
    history: [Tensor; 3],
    /// (B, N, P, H), fp32.
    state: Tensor,
}

impl Recurrent {
    /// Before any token, with these shapes.
    pub(super) fn new(history: [[i64; 3]; 3], state: [i64; 4], (kind, device): (Kind, Device)) -> Self {
        let history = history.map(|shape| Tensor::zeros(shape, (kind, device)));
        Self { history, state: Tensor::zeros(state, (Kind::Float, device)) }
    }

    /// Keeps only the sequences in `index` (B), i64.
    pub(super) fn keep(&mut self, index: &Tensor) {
        let index = index.to_device(self.state.device());
        for tensor in self.history.iter_mut().chain([&mut self.state]) {
            *tensor = tensor.index_select(0, &index);
        }
    }

    /// Queries, keys and values (T, W) convolved, each document of new tokens continuing its sequence.
    pub(super) fn convolve(
        &mut self,
        convolutions: &[Convolution; 3],
        streams: &[Tensor; 3],
        documents: &Documents,
    ) -> [Tensor; 3] {
        let before = self.history[0].size()[1];
        let (mut offsets, mut new, mut last) = (vec![0], Vec::new(), Vec::new());
        for (_, length) in documents.spans() {
            let begin = offsets[offsets.len() - 1];
            let end = begin + before + length;
            new.extend(begin + before..end);
            last.extend(end - before..end);
            offsets.push(end);
        }
        let extended = Documents { offsets };
        let [new, last] = [new, last].map(|rows| Tensor::from_slice(&rows).to_device(self.state.device()));
        std::array::from_fn(|i| {
            let (x, history) = (&streams[i], &mut self.history[i]);
            let parts: Vec<Tensor> = (0..)
                .zip(documents.spans())
                .flat_map(|(sequence, (start, length))| [history.get(sequence), x.narrow(0, start, length)])
                .collect();
            let x = Tensor::cat(&parts, 0); // (T + B (C - 1), W)
            *history = x.index_select(0, &last).view_as(history);
            convolutions[i].apply(&x, &extended).index_select(0, &new)
        })
    }

    /// [`ops::delta_rule`] of new tokens, each document continuing its sequence: (T, N, H).
    pub(super) fn recur(&mut self, inputs: [&Tensor; 5], documents: &Documents) -> Tensor {
        if documents.spans().all(|(_, new)| new == 1) {
            return ops::delta_rule_step(inputs, &mut self.state);
        }
        let output = inputs[2].empty_like();
        for (sequence, (start, new)) in documents.spans().enumerate().filter(|(_, (_, new))| *new > 0) {
            let part = inputs.map(|input| input.narrow(0, start, new));
            let mut state = self.state.get(sequence as i64);
            let (o, after) = ops::delta_rule_continued(part.each_ref(), &state);
            output.narrow(0, start, new).copy_(&o);
            state.copy_(&after);
        }
        output
    }
}
