//! Which entries a token looks at, of those that windows before it were made into.

use tch::{Kind, Tensor};

use super::plain;
use crate::ops::cpu;

/// Which of a document's entries each of its tokens sees: (L, W), bool, by the `chosen` largest of `sum_i relu(q_ti . e) w_ti`, fp32,
/// among those it may see by its position. None where that is all of them. No graph.
///
/// q is (L, I, H'), `weights` (L, I), fp32, `entries` (W, H'), `positions` (L).
pub fn choose_entries(
    q: &Tensor,
    weights: &Tensor,
    entries: &Tensor,
    positions: &Tensor,
    (rate, chosen): (i64, i64),
) -> Option<Tensor> {
    let (tokens, heads, width) = q.size3().expect("(L, I, H')");
    let count = entries.size()[0];
    if count <= chosen {
        return None;
    }
    tch::no_grad(|| {
        let entries = entries.to_kind(Kind::Float).tr(); // (H', W)
        let by_kernel = cpu::serves(&[weights]);
        let allowed = Tensor::zeros([tokens, count], (Kind::Bool, q.device()));
        let rows = plain::queries_at_once(heads, count);
        for first in (0..tokens).step_by(rows as usize) {
            let rows = rows.min(tokens - first);
            let queries = q.narrow(0, first, rows).to_kind(Kind::Float).reshape([rows * heads, width]);
            let products = queries.mm(&entries).view([rows, heads, count]);
            let (weights, positions) = (weights.narrow(0, first, rows), positions.narrow(0, first, rows));
            if by_kernel {
                let positions = Vec::<i64>::try_from(&positions).expect("one dimension of i64");
                let visible: Vec<usize> = positions.iter().map(|at| ((at + 1) / rate) as usize).collect();
                let picked = cpu::choice::largest(&products, &weights, &visible, chosen as usize);
                allowed.narrow(0, first, rows).copy_(&picked);
                continue;
            }
            let scores = weights.unsqueeze(1).bmm(&products.relu()).squeeze_dim(1); // (rows, W)
            let visible = visible_entries(&positions, count, rate);
            let scores = scores.masked_fill(&visible.logical_not(), f64::NEG_INFINITY);
            let index = scores.topk(chosen, -1, true, false).1;
            let picked = visible.zeros_like().scatter_value(1, &index, 1.0);
            // Where fewer are visible than chosen, the rest are not among them.
            allowed.narrow(0, first, rows).copy_(&picked.logical_and(&visible));
        }
        Some(allowed)
    })
}

/// Whether entry w may be seen from each of `positions` (L) in its document: (L, `entries`), bool.
pub(super) fn visible_entries(positions: &Tensor, entries: i64, rate: i64) -> Tensor {
    let complete = (positions + 1).divide_scalar_mode(rate, "floor").unsqueeze(1); // (L, 1)
    Tensor::arange(entries, (Kind::Int64, positions.device())).unsqueeze(0).lt_tensor(&complete)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::attention::tests::QUERIES;
    use crate::ops::cpu::tests::without_kernels;
    use crate::ops::testing::randn;

    /// Every token sees the best of what it may see, and all of that where it is no more than are chosen.
    #[test]
    fn the_largest_scores_in_sight_are_chosen() {
        let (length, rate, most) = (23, 3, 2);
        let (q, weights, entries) = (randn(&[length, 5, 4], 1), randn(&[length, 5], 2), randn(&[length / rate, 4], 3));
        let positions = Tensor::arange(length, (Kind::Int64, tch::Device::Cpu));
        let choose = || choose_entries(&q, &weights, &entries, &positions, (rate, most)).unwrap();
        for (queries, kernel) in [(None, true), (Some(4), true), (None, false), (Some(4), false)] {
            QUERIES.set(queries);
            let allowed = if kernel { choose() } else { without_kernels(choose) };
            QUERIES.set(None);
            for t in 0..length {
                let score = |w: i64| -> f64 {
                    let product = q.get(t).matmul(&entries.get(w)).relu(); // (I)
                    product.dot(&weights.get(t)).double_value(&[])
                };
                let mut best: Vec<i64> = (0..(t + 1) / rate).collect();
                best.sort_by(|a, b| score(*b).total_cmp(&score(*a)));
                best.truncate(most as usize);
                for w in 0..length / rate {
                    let seen = allowed.int64_value(&[t, w]) == 1;
                    assert_eq!(seen, best.contains(&w), "token {t}, entry {w}, by the kernel: {kernel}");
                }
            }
        }
        assert!(choose_entries(&q, &weights, &entries, &positions, (rate, length / rate)).is_none());
    }

    /// As many as are to be chosen, though more have the same score.
    #[test]
    fn of_equal_scores_the_first_are_chosen_and_no_more() {
        let (q, weights, entries) =
            (randn(&[1, 5, 4], 1), randn(&[1, 5], 2), Tensor::ones([9, 4], (Kind::Float, tch::Device::Cpu)));
        let allowed = choose_entries(&q, &weights, &entries, &Tensor::from_slice(&[20i64]), (3, 4)).unwrap();
        let seen: Vec<bool> = (0..9).map(|w| allowed.int64_value(&[0, w]) == 1).collect();
        assert_eq!(seen, [true, true, true, true, false, false, false, false, false]);
    }
}
