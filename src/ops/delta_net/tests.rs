//! The rule in chunks against the recurrence token by token.

use tch::{Kind, Tensor};

use super::*;
use crate::ops::testing::{check, randn};

/// The slow twin: the recurrence as the reference writes it, under autograd; in fp64, or its own rounding would be what is seen.
fn twin(x: &[Tensor], documents: &Documents) -> Tensor {
    let x: Vec<Tensor> = x.iter().map(|x| x.to_kind(Kind::Double)).collect();
    let (value_heads, value_size) = (x[2].size()[1], x[2].size()[2]);
    let (group, key_size) = (value_heads / x[0].size()[1], x[0].size()[2]);
    let unit = |x: &Tensor| {
        let length = (x.square().sum_dim_intlist([2i64].as_slice(), true, Kind::Float) + 1e-6).sqrt();
        (x / length).repeat_interleave_self_int(group, 1, None) // (T, N, P)
    };
    let (q, k) = (unit(&x[0]) * (key_size as f64).powf(-0.5), unit(&x[1]));
    let mut outputs = Vec::new();
    for (start, length) in documents.spans() {
        let mut state = Tensor::zeros([value_heads, key_size, value_size], (Kind::Double, q.device()));
        for t in start..start + length {
            let (q, k, v) = (q.get(t).unsqueeze(1), k.get(t).unsqueeze(1), x[2].get(t).unsqueeze(1)); // (N, 1, P)
            let (decay, beta) = (x[3].get(t).exp().view([-1, 1, 1]), x[4].get(t).view([-1, 1, 1]));
            let faded = state * decay;
            let new = (v - k.matmul(&faded)) * beta; // (N, 1, H)
            state = faded + k.transpose(1, 2).matmul(&new);
            outputs.push(q.matmul(&state).squeeze_dim(1));
        }
    }
    Tensor::stack(&outputs, 0).to_kind(Kind::Float)
}

/// q, k, v, log decay, b of `tokens`; one head hardly forgets, the last at once.
fn leaves(tokens: i64, [key_heads, group, key_size, value_size]: [i64; 4]) -> Vec<Tensor> {
    let heads = key_heads * group;
    let pace =
        Tensor::from_slice(&(0..heads).map(|i| 10f32.powi(i as i32 - heads as i32 + 1)).collect::<Vec<_>>()) * 4.0;
    vec![
        randn(&[tokens, key_heads, key_size], 1),
        randn(&[tokens, key_heads, key_size], 2),
        randn(&[tokens, heads, value_size], 3),
        -(randn(&[tokens, heads], 4).exp() * pace),
        randn(&[tokens, heads], 5).sigmoid(),
    ]
}

fn lay_out(lengths: &[i64]) -> Documents {
    let ends = lengths.iter().scan(0, |end, length| {
        *end += length;
        Some(*end)
    });
    Documents { offsets: std::iter::once(0).chain(ends).collect() }
}

fn op(x: &[Tensor], documents: &Documents) -> Vec<Tensor> {
    let float = |x: &Tensor| x.to_kind(Kind::Float);
    vec![delta_rule(&x[0], &x[1], &x[2], &float(&x[3]), &float(&x[4]), documents)]
}

#[test]
fn equals_the_recurrence_token_by_token() {
    for (lengths, sizes) in [
        // Chunks with several documents, with borders inside and between, and a document over several runs of chunks.
        (vec![13, 1, 50, 1, 1, 127, 64, 300, 5], [1, 2, 24, 12]),
        (vec![7], [2, 1, 5, 3]),
        (vec![64, 64], [2, 2, 16, 7]),
        // Heads wider than a register's tile, of different widths.
        (vec![70], [1, 2, 36, 72]),
        (vec![1, 1, 1], [3, 3, 4, 4]),
    ] {
        let documents = lay_out(&lengths);
        let tokens = lengths.iter().sum();
        check(&leaves(tokens, sizes), |_, x| op(x, &documents), |_, x| vec![twin(x, &documents)]);
    }
}

#[test]
fn a_document_of_many_runs_equals_the_recurrence() {
    let (documents, inputs) = (lay_out(&[60, 600]), leaves(660, [1, 2, 40, 36]));
    let run = |f: &dyn Fn(&[Tensor]) -> Tensor| {
        let leaves: Vec<Tensor> = inputs.iter().map(|x| x.copy().set_requires_grad(true)).collect();
        let output = f(&leaves);
        (&output * randn(&output.size(), 6)).sum(Kind::Float).backward();
        let gradients = leaves.iter().map(Tensor::grad);
        std::iter::once(output.detach()).chain(gradients).collect::<Vec<_>>()
    };
    let (found, expected) = (run(&|x| op(x, &documents).remove(0)), run(&|x| twin(x, &documents)));
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let off = ((found - expected).abs().max() / expected.abs().max()).double_value(&[]);
        assert!(off < 3e-5, "{i} is off by {off:e}");
    }
}

#[test]
fn nothing_overflows_where_a_head_forgets_at_once() {
    let documents = lay_out(&[40, 90]);
    let mut x = leaves(130, [1, 2, 8, 8]);
    x[3] = x[3].full_like(-90.0);
    check(&x, |_, x| op(x, &documents), |_, x| vec![twin(x, &documents)]);
}

#[test]
fn a_document_may_be_continued_at_any_token_also_by_single_ones() {
    let x = leaves(150, [2, 2, 8, 6]);
    let expected = twin(&x, &Documents::one(150));
    let mut state = Tensor::zeros([4, 8, 6], (Kind::Float, tch::Device::Cpu));
    let mut found = Vec::new();
    for (start, count) in [(0, 70), (70, 1), (71, 64), (135, 12)] {
        let part: Vec<Tensor> = x.iter().map(|x| x.narrow(0, start, count)).collect();
        let (output, after) = delta_rule_continued(std::array::from_fn(|i| &part[i]), &state);
        found.push(output);
        state = after;
    }
    let mut states = Tensor::stack(&[&state, &state.zeros_like()], 0);
    for t in 147..150 {
        let both: Vec<Tensor> = x.iter().map(|x| Tensor::stack(&[x.get(t), x.get(t - 147)], 0)).collect();
        let output = delta_rule_step(std::array::from_fn(|i| &both[i]), &mut states);
        found.push(output.narrow(0, 0, 1));
        assert!((output.get(1) - expected.get(t - 147)).abs().max().double_value(&[]) < 1e-5, "a new sequence beside");
    }
    let off = (Tensor::cat(&found, 0) - &expected).abs().max().double_value(&[]);
    assert!(off < 1e-5 * expected.abs().max().double_value(&[]), "off by {off:e}");
}
