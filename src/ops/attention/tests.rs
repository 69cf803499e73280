use std::cell::Cell;

use super::*;
use crate::ops::testing::{check, randn};

thread_local! {
    /// Whether everything goes through plain products.
    pub(super) static PLAIN: Cell<bool> = const { Cell::new(false) };
    /// How many queries at once they take.
    pub(super) static QUERIES: Cell<Option<i64>> = const { Cell::new(None) };
}

/// The slow twin: one softmax over all T keys with a mask that says who may look where.
fn twin(q: &Tensor, k: &Tensor, v: &Tensor, documents: &Documents, scoring: &Scoring) -> Tensor {
    let t = q.size()[0];
    let mut allowed = vec![false; (t * t) as usize];
    let mut places = vec![0i64; t as usize];
    for (start, length) in documents.spans() {
        for i in start..start + length {
            places[i as usize] = i - start;
            for j in start..=i {
                allowed[(i * t + j) as usize] = scoring.window.is_none_or(|w| i - j < w);
            }
        }
    }
    let refused = Tensor::from_slice(&allowed).view([t, t]).logical_not();
    let groups = q.size()[1] / k.size()[1];
    let spread = |x: &Tensor| x.repeat_interleave_self_int(groups, 1, None).transpose(0, 1); // (N, T, H)
    let mut scores = q.transpose(0, 1).matmul(&spread(k).transpose(1, 2)) * scoring.scale;
    if let Some(alibi) = &scoring.alibi {
        // Falcon multiplies bf16 by whole numbers, which libtorch makes bf16 first.
        let kind = if alibi.rounded { Kind::BFloat16 } else { Kind::Float };
        let bias = alibi.slopes.view([-1, 1, 1]).to_kind(kind) * Tensor::from_slice(&places);
        scores += bias.to_kind(Kind::Float) * alibi.scale;
    }
    if let Some(cap) = scoring.soft_cap {
        scores = (scores / cap).tanh() * cap;
    }
    let mut scores = scores.masked_fill(&refused, f64::NEG_INFINITY);
    if let Some(sinks) = &scoring.sinks {
        scores = Tensor::cat(&[&scores, &sinks.view([-1, 1, 1]).expand([-1, t, 1], false)], 2);
    }
    let weights = scores.softmax(-1, Kind::Float).narrow(2, 0, t).to_kind(q.kind());
    weights.matmul(&spread(v)).transpose(0, 1)
}

/// Every way against the twin; `value` is the head size of values.
fn compare(offsets: &[i64], (heads, kv_heads): (i64, i64), value: i64, scoring: &Scoring) {
    let documents = Documents { offsets: offsets.to_vec() };
    let t = offsets[offsets.len() - 1];
    let inputs = [randn(&[t, heads, 16], 1), randn(&[t, kv_heads, 16], 2), randn(&[t, kv_heads, value], 3)];
    for (plain, queries) in [(false, None), (true, None), (true, Some(3 + t / 5))] {
        PLAIN.set(plain);
        QUERIES.set(queries);
        check(
            &inputs,
            |_, x| vec![attention(&x[0], &x[1], &x[2], &documents, scoring)],
            |_, x| vec![twin(&x[0], &x[1], &x[2], &documents, scoring)],
        );
        PLAIN.set(false);
        QUERIES.set(None);
    }
}

fn slopes() -> Tensor {
    Tensor::from_slice(&[0.5f32, 0.25, 0.13, 0.0625, 0.03, 0.01])
}

/// Every way of scoring that is more than a scaled product, alone and together.
fn scorings() -> Vec<Scoring> {
    let alibi = |rounded| Some(Alibi { slopes: slopes(), rounded, scale: 0.5 });
    vec![
        Scoring { soft_cap: Some(1.5), ..Scoring::scaled(0.4) },
        Scoring { alibi: alibi(false), ..Scoring::scaled(0.25) },
        Scoring { alibi: alibi(true), ..Scoring::scaled(0.25) },
        Scoring { sinks: Some(slopes() * 4.0), ..Scoring::scaled(0.25) },
        Scoring { soft_cap: Some(2.0), alibi: alibi(false), sinks: Some(slopes()), ..Scoring::scaled(0.25) },
    ]
}

#[test]
fn equals_plain_autograd_over_documents_groups_and_windows() {
    // Short documents, one of a single token; then one of several blocks with an odd rest.
    let cases = [(vec![0, 7, 8, 29], [None, Some(5), Some(100)]), (vec![0, 3, 304], [None, Some(130), Some(77)])];
    let heads = [(6, 2), (4, 4), (3, 1)];
    for ((offsets, windows), heads) in cases.iter().flat_map(|c| heads.iter().map(move |h| (c, *h))) {
        for window in *windows {
            compare(offsets, heads, 16, &Scoring { window, ..Scoring::scaled(0.25) });
        }
    }
}

#[test]
fn soft_caps_linear_biases_and_sinks_equal_plain_autograd() {
    for scoring in scorings() {
        for (offsets, window) in [(vec![0, 7, 8, 29], None), (vec![0, 7, 8, 29], Some(5)), (vec![0, 3, 304], Some(130))]
        {
            compare(&offsets, (6, 2), 16, &Scoring { window, ..scoring.clone() });
        }
    }
}

#[test]
fn values_may_have_another_head_size() {
    for (value, window) in [(10, None), (24, Some(130))] {
        compare(&[0, 3, 208], (6, 2), value, &Scoring { window, ..Scoring::scaled(0.25) });
        compare(&[0, 3, 208], (6, 2), value, &Scoring { window, sinks: Some(slopes()), ..Scoring::scaled(0.25) });
    }
}

#[test]
fn new_queries_see_the_cache_as_the_whole_document_would_have_them() {
    let (heads, kv_heads, seen, new) = (6, 2, 23, 9);
    let [q, k, v] =
        [(heads, 16, 1), (kv_heads, 16, 2), (kv_heads, 10, 3)].map(|(n, h, seed)| randn(&[seen, n, h], seed));
    for scoring in scorings() {
        let whole = twin(&q, &k, &v, &Documents::one(seen), &scoring).narrow(0, seen - new, new); // (L, N, Hv)
        let by_head = |x: &Tensor| x.transpose(0, 1).unsqueeze(0).contiguous(); // (1, K, S, H)
        let allowed = Tensor::ones([seen, seen], (Kind::Bool, Device::Cpu)).tril(0).narrow(0, seen - new, new);
        for queries in [None, Some(4)] {
            QUERIES.set(queries);
            let query = by_head(&q.narrow(0, seen - new, new));
            let found =
                attention_to_cache(&query, &by_head(&k), &by_head(&v), &allowed.view([1, 1, new, seen]), &scoring);
            QUERIES.set(None);
            let off = (found.squeeze_dim(0).transpose(0, 1) - &whole).abs().max().double_value(&[]);
            assert!(off < 1e-5, "off by {off:e} with {scoring:?}");
        }
    }
}

/// Where there is a GPU of those: cuDNN's kernels are taken for documents of one length, and give what flash attention gives.
#[test]
fn documents_of_one_length_are_attended_to_alike_by_cudnn() {
    let Some(device) = crate::ops::cuda::emulator::gpu().filter(|device| crate::ops::cuda::outruns_flash(*device))
    else {
        return; // Nothing takes cuDNN's then.
    };
    let heads = |heads: i64, seed| randn(&[768, heads, 128], seed).to_device(device).to_kind(Kind::BFloat16);
    let scoring = Scoring::scaled(0.09);
    for (kv_heads, length) in [(8, 256), (2, 256), (2, 768)] {
        let [q, k, v, grad] = [heads(8, 1), heads(kv_heads, 2), heads(kv_heads, 3), heads(8, 4)];
        let documents = Documents { offsets: (0..=768 / length).map(|i| i * length).collect() };
        assert!(dense::serves(&q, &k, &documents, &scoring), "{kv_heads} of 8 heads");
        let expected = flash::cuda_once(&grad, [&q, &k, &v], &documents, scoring.scale);
        let leaves = [q, k, v].map(|x| x.set_requires_grad(true));
        let output = dense::attend(&leaves[0], &leaves[1], &leaves[2], &documents, &scoring);
        let loss = (&output * &grad).sum(Kind::Float);
        let grads = Tensor::run_backward(&[loss], &leaves.each_ref(), false, false);
        for (found, expected) in [output].iter().chain(&grads).zip(&expected) {
            let [found, expected] = [found, expected].map(|x| x.to_kind(Kind::Float));
            let largest = expected.abs().max().double_value(&[]);
            assert!((found - &expected).abs().max().double_value(&[]) < 2e-2 * largest);
        }
    }
    let other = Documents { offsets: vec![0, 256, 512, 640, 768] };
    let q = heads(8, 1);
    assert!(!dense::serves(&q, &q, &other, &scoring), "lengths that differ");
}
