//! Windows of m tokens compressed to one entry each: for every element a mean of k, weighed by a softmax of g + bias over the window.
//! What is computed, [`crate::model::spec::Compressor`] says.
//!
//! Kept for backward are k and g; the softmax p is made again. With e the entry: `dk = p de`, `dg = p (k - e) de`.

use tch::{Kind, Tensor};

use super::{Documents, cpu};
use crate::torch_ext::{custom, sent};

/// Entries (W, H) of the complete windows of every document, one document after the other, from k and g (T, H), or (T, 2 H) where
/// windows overlap; `bias` (m, width of g), fp32.
///
/// Where they overlap, an entry is the mean over 2 m tokens: the first halves of those of the window before, of which a document's
/// first has none, and the second halves of its own. The tokens after a document's last complete window make no entry.
pub fn compress(k: &Tensor, g: &Tensor, bias: &Tensor, overlapping: bool, documents: &Documents) -> Tensor {
    let rate = bias.size()[0];
    if cpu::serves(&[k, g]) && entries_of(documents.longest(), rate) > 0 {
        return by_kernels(k, g, bias, cpu::windows::Windows::of(documents, rate, overlapping));
    }
    let windows = Windows::new(documents, rate, overlapping, k);
    if windows.count == 0 {
        // Joined to the graph by nothing: there is nothing to walk back.
        let width = if overlapping { k.size()[1] / 2 } else { k.size()[1] };
        return Tensor::zeros([0, width], (k.kind(), k.device()));
    }
    let bias = bias.shallow_clone();
    let output = tch::no_grad(|| {
        let (values, shares) = windows.shares(k, g, &bias);
        (values * shares).sum_dim_intlist([1i64].as_slice(), false, Kind::Float) // (W, H)
    });
    let entries = vec![output.to_kind(k.kind())];
    let [k_kept, g_kept] = [k, g].map(Tensor::detach);
    custom(c"engraft::compress", &[k, g], entries, move |grads| {
        let de = grads[0].to_kind(Kind::Float).unsqueeze(1); // (W, 1, H)
        let (values, shares) = windows.shares(&k_kept, &g_kept, &bias);
        let dvalues = shares * de; // (W, slots, H)
        let dgates = (values - output.unsqueeze(1)) * &dvalues;
        [dvalues, dgates].map(|d| Some(windows.back(&d, &k_kept))).into()
    })
    .remove(0)
}

fn by_kernels(k: &Tensor, g: &Tensor, bias: &Tensor, windows: cpu::windows::Windows) -> Tensor {
    let entries = tch::no_grad(|| cpu::windows::compress(k, g, bias, &windows));
    let [k_kept, g_kept, bias] = [k, g, bias].map(Tensor::detach);
    custom(c"engraft::compress", &[k, g], vec![entries], move |grads| {
        cpu::windows::compress_backward(&grads[0].contiguous(), &k_kept, &g_kept, &bias, &windows).map(Some).into()
    })
    .remove(0)
}

/// How many entries a document of `length` tokens gives.
pub fn entries_of(length: i64, rate: i64) -> i64 {
    length / rate
}

/// Which tokens each window is made of.
struct Windows {
    /// m.
    rate: i64,
    /// W.
    count: i64,
    /// Tokens of complete windows (W m), i64.
    tokens: Tensor,
    /// Where windows overlap: the window before each (W), i64; W for a document's first.
    before: Option<Tensor>,
}

impl Windows {
    fn new(documents: &Documents, rate: i64, overlapping: bool, like: &Tensor) -> Self {
        let (mut tokens, mut before) = (Vec::new(), Vec::new());
        for (start, length) in documents.spans() {
            let (first, own) = (before.len() as i64, entries_of(length, rate));
            tokens.extend(start..start + own * rate);
            before.extend((0..own).map(|w| if w == 0 { -1 } else { first + w - 1 }));
        }
        let count = before.len() as i64;
        before.iter_mut().filter(|w| **w < 0).for_each(|w| *w = count);
        let index = |list: &[i64]| sent(&Tensor::from_slice(list), like.device());
        Self { rate, count, tokens: index(&tokens), before: overlapping.then(|| index(&before)) }
    }

    /// k (W, slots, H), and the share of each slot, fp32.
    fn shares(&self, k: &Tensor, g: &Tensor, bias: &Tensor) -> (Tensor, Tensor) {
        let values = self.slots(&self.of_tokens(k), 0.0);
        let gates = self.slots(&(self.of_tokens(g) + bias), f64::NEG_INFINITY);
        (values, gates.softmax(1, Kind::Float))
    }

    /// (W, m, width) of x (T, width), fp32.
    fn of_tokens(&self, x: &Tensor) -> Tensor {
        x.index_select(0, &self.tokens).to_kind(Kind::Float).view([self.count, self.rate, -1])
    }

    /// (W, slots, H) of x (W, m, width): the same, or where windows overlap (W, 2 m, width / 2), `missing` before a document's first.
    fn slots(&self, x: &Tensor, missing: f64) -> Tensor {
        let Some(before) = &self.before else { return x.shallow_clone() };
        let half = x.size()[2] / 2;
        let none = Tensor::full([1, self.rate, half], missing, (x.kind(), x.device()));
        let earlier = Tensor::cat(&[&x.narrow(2, 0, half), &none], 0).index_select(0, before);
        Tensor::cat(&[&earlier, &x.narrow(2, half, half)], 1)
    }

    /// The gradient of x (T, width), like `x`, from that of its slots.
    fn back(&self, d: &Tensor, x: &Tensor) -> Tensor {
        let d = match &self.before {
            None => d.shallow_clone(),
            Some(before) => {
                let half = d.size()[2];
                let shape = [self.count + 1, self.rate, half];
                let earlier = Tensor::zeros(shape, (Kind::Float, d.device()));
                let earlier = earlier.index_add(0, before, &d.narrow(1, 0, self.rate)).narrow(0, 0, self.count);
                Tensor::cat(&[&earlier, &d.narrow(1, self.rate, self.rate)], 2) // (W, m, 2 H)
            }
        };
        let rows = d.to_kind(x.kind()).reshape([self.count * self.rate, -1]);
        x.zeros_like().index_copy(0, &self.tokens, &rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, randn};

    /// The slow twin: window by window.
    fn twin(k: &Tensor, g: &Tensor, bias: &Tensor, overlapping: bool, documents: &Documents) -> Tensor {
        let (rate, mut entries) = (bias.size()[0], Vec::new());
        for (start, length) in documents.spans() {
            for w in 0..length / rate {
                let own = start + w * rate;
                let gates = g.narrow(0, own, rate) + bias;
                let values = k.narrow(0, own, rate);
                let (values, gates) = if overlapping {
                    let half = k.size()[1] / 2;
                    let mut parts = (vec![values.narrow(1, half, half)], vec![gates.narrow(1, half, half)]);
                    if w > 0 {
                        parts.0.push(k.narrow(0, own - rate, rate).narrow(1, 0, half));
                        parts.1.push((g.narrow(0, own - rate, rate) + bias).narrow(1, 0, half));
                    }
                    (Tensor::cat(&parts.0, 0), Tensor::cat(&parts.1, 0))
                } else {
                    (values, gates)
                };
                let entry = (values * gates.softmax(0, Kind::Float)).sum_dim_intlist([0i64].as_slice(), false, None);
                entries.push(entry);
            }
        }
        Tensor::stack(&entries, 0)
    }

    #[test]
    fn equals_plain_autograd() {
        // Documents shorter than a window, of whole windows, and with tokens left over.
        let documents = Documents { offsets: vec![0, 2, 11, 15, 23] };
        for (overlapping, width) in [(false, 6), (true, 12)] {
            let bias = randn(&[3, width], 3);
            check(
                &[randn(&[23, width], 1), randn(&[23, width], 2)],
                |_, x| vec![compress(&x[0], &x[1], &bias, overlapping, &documents)],
                |_, x| vec![twin(&x[0], &x[1], &bias, overlapping, &documents)],
            );
        }
    }

    #[test]
    fn too_few_tokens_for_a_window_make_no_entry() {
        let x = randn(&[4, 12], 1);
        let documents = Documents { offsets: vec![0, 2, 4] };
        assert_eq!(compress(&x, &x, &randn(&[3, 12], 2), true, &documents).size(), [0, 6]);
        assert_eq!(compress(&x, &x, &randn(&[3, 12], 2), false, &documents).size(), [0, 12]);
    }
}
