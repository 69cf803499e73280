use super::*;
use crate::ops::attention::choose_entries;
use crate::ops::attention::tests::QUERIES;
use crate::ops::testing::{check, randn};

const HEADS: i64 = 3;
const HEAD: i64 = 8;

fn scoring(window: i64) -> Scoring {
    Scoring { window: Some(window), sinks: Some(randn(&[HEADS], 9)), ..Scoring::scaled(0.3) }
}

/// Whether each token sees each key and each entry, one by one: (T, T + W).
fn sight(documents: &Documents, rate: i64, window: i64, chosen: &[Option<Tensor>]) -> Tensor {
    let (tokens, entries): (i64, i64) =
        (documents.spans().map(|(_, l)| l).sum(), documents.spans().map(|(_, l)| l / rate).sum());
    let mut seen = vec![false; (tokens * (tokens + entries)) as usize];
    let mut first_entry = 0;
    for (number, (start, length)) in documents.spans().enumerate() {
        for t in 0..length {
            let row = ((start + t) * (tokens + entries)) as usize;
            (0..=t).filter(|key| t - key < window).for_each(|key| seen[row + (start + key) as usize] = true);
            for entry in 0..(t + 1) / rate {
                let picked = chosen[number].as_ref().is_none_or(|chosen| chosen.int64_value(&[t, entry]) == 1);
                seen[row + (tokens + first_entry + entry) as usize] = picked;
            }
        }
        first_entry += length / rate;
    }
    Tensor::from_slice(&seen).view([tokens, tokens + entries])
}

/// The slow twin: one softmax over all keys, entries and the sink.
fn twin(q: &Tensor, keys: &Tensor, entries: &Tensor, seen: &Tensor, scoring: &Scoring) -> Tensor {
    let all = Tensor::cat(&[&keys.squeeze_dim(1), entries], 0); // (T + W, H)
    let scores = q.matmul(&all.tr()) * scoring.scale; // (T, N, T + W)
    let scores = scores.masked_fill(&seen.logical_not().unsqueeze(1), f64::NEG_INFINITY);
    let sinks = scoring.sinks.as_ref().expect("sinks").view([1, HEADS, 1]).expand([q.size()[0], HEADS, 1], false);
    let weights = Tensor::cat(&[&scores, &sinks], 2).softmax(-1, Kind::Float).narrow(2, 0, all.size()[0]);
    weights.to_kind(q.kind()).matmul(&all)
}

/// Which entries tokens were to see: two of those in sight, at random.
fn chosen(documents: &Documents, rate: i64) -> Vec<Option<Tensor>> {
    let of = |(number, (_, length)): (usize, (i64, i64))| {
        let positions = Tensor::arange(length, (Kind::Int64, tch::Device::Cpu));
        let q = randn(&[length, 2, 4], 20 + number as u64);
        let entries = randn(&[length / rate, 4], 30 + number as u64);
        choose_entries(&q, &randn(&[length, 2], 40), &entries, &positions, (rate, 2))
    };
    documents.spans().enumerate().map(of).collect()
}

#[test]
fn equals_plain_autograd_over_documents_windows_and_choices() {
    let documents = Documents { offsets: vec![0, 2, 13, 14, 45] };
    for (rate, window, sparse, queries) in
        [(3, 5, false, None), (3, 5, true, None), (3, 5, true, Some(4)), (5, 40, true, Some(3)), (4, 1, false, Some(7))]
    {
        QUERIES.set(queries);
        let scoring = scoring(window);
        let chosen = if sparse { chosen(&documents, rate) } else { vec![None, None, None, None] };
        assert!(!sparse || chosen.iter().any(Option::is_some));
        let seen = sight(&documents, rate, window, &chosen);
        let entries: i64 = documents.spans().map(|(_, length)| length / rate).sum();
        check(
            &[randn(&[45, HEADS, HEAD], 1), randn(&[45, 1, HEAD], 2), randn(&[entries, HEAD], 3)],
            |_, x| {
                let chosen = chosen.iter().map(|c| c.as_ref().map(Tensor::shallow_clone)).collect();
                let entries = Entries { values: x[2].shallow_clone(), rate, chosen };
                vec![attention_to_entries(&x[0], &x[1], &entries, &documents, &scoring)]
            },
            |_, x| vec![twin(&x[0], &x[1], &x[2], &seen, &scoring)],
        );
        QUERIES.set(None);
    }
}

#[test]
fn documents_and_entries_of_several_blocks_equal_plain_autograd() {
    let documents = Documents { offsets: vec![0, 5, 430, 561] };
    for (rate, window, sparse) in [(3, 140, true), (2, 30, false)] {
        let scoring = scoring(window);
        let chosen = if sparse { chosen(&documents, rate) } else { vec![None, None, None] };
        let seen = sight(&documents, rate, window, &chosen);
        let entries: i64 = documents.spans().map(|(_, length)| length / rate).sum();
        check(
            &[randn(&[561, HEADS, HEAD], 1), randn(&[561, 1, HEAD], 2), randn(&[entries, HEAD], 3)],
            |_, x| {
                let chosen = chosen.iter().map(|c| c.as_ref().map(Tensor::shallow_clone)).collect();
                let entries = Entries { values: x[2].shallow_clone(), rate, chosen };
                vec![attention_to_entries(&x[0], &x[1], &entries, &documents, &scoring)]
            },
            |_, x| vec![twin(&x[0], &x[1], &x[2], &seen, &scoring)],
        );
    }
}

#[test]
fn new_tokens_see_what_the_whole_document_would_show_them() {
    let (length, rate, window) = (31, 4, 6);
    let scoring = scoring(window);
    let [q, keys] = [(HEADS, 1), (1, 2)].map(|(heads, seed)| randn(&[length, heads, HEAD], seed));
    let values = randn(&[length / rate, HEAD], 3);
    let documents = Documents::one(length);
    for sparse in [false, true] {
        let chosen = if sparse { chosen(&documents, rate) } else { vec![None] };
        let expected = twin(&q, &keys, &values, &sight(&documents, rate, window, &chosen), &scoring);
        for (before, kept) in [(0, 0), (12, 0), (12, 7), (30, 25)] {
            let part = chosen[0].as_ref().map(|chosen| chosen.narrow(0, before, length - before));
            let entries = Entries { values: values.shallow_clone(), rate, chosen: vec![part] };
            let query = q.narrow(0, before, length - before);
            let found = new_tokens_to_entries(&query, before, &keys.narrow(0, kept, length - kept), &entries, &scoring);
            let off = (found - expected.narrow(0, before, length - before)).abs().max().double_value(&[]);
            assert!(off < 1e-5, "off by {off:e} from {before} on, keys from {kept} on");
        }
    }
}
