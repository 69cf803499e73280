//! Generating text: several prompts at once over one cache; a sequence that has stopped is not carried along.

use std::ops::ControlFlow;

use tch::{Kind, Tensor};

use super::Decoder;
use crate::ops::Documents;

/// How the next token is picked, and when to stop.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token; otherwise logits are divided by it.
    pub temperature: f64,
    /// Only the most likely tokens that together reach this probability are drawn from; 1 for all.
    pub top_p: f64,
    /// Tokens at most, per prompt.
    pub max_tokens: usize,
    /// Token ids that end a sequence; they are not part of the answer.
    pub stop: Vec<u32>,
    /// Seed of the draws: the same prompt at the same place with the same seed gives the same answer, whatever it is batched with.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_p: 1.0, max_tokens: 256, stop: Vec::new(), seed: 0 }
    }
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// A stop token.
    Stop,
    /// `max_tokens` reached.
    Length,
    /// The caller had enough.
    Cancelled,
}

/// One prompt's continuation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Continuation {
    /// The new tokens, without the one that stopped it.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
}

impl Decoder {
    /// Continues every prompt; `on_token` sees each new token with its prompt's index and may end that sequence.
    ///
    /// Prompts must not be empty.
    pub fn generate(
        &self,
        prompts: &[Vec<u32>],
        sampling: &Sampling,
        on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
    ) -> Vec<Continuation> {
        let mut answers: Vec<Continuation> =
            prompts.iter().map(|_| Continuation { ids: Vec::new(), finish: Finish::Length }).collect();
        // Which prompt each sequence of the cache belongs to.
        let mut running: Vec<usize> = (0..prompts.len()).collect();
        let mut cache = self.cache(prompts.len());
        let mut new: Vec<Vec<u32>> = prompts.to_vec();
        let borders: Vec<i64> = self.spec.layers.iter().filter_map(|layer| layer.position.border()).collect();
        while !running.is_empty() {
            let outgrows = |(seen, new): (&i64, &Vec<u32>)| {
                borders.iter().any(|border| (1..=*border).contains(seen) && seen + new.len() as i64 > *border)
            };
            if cache.lengths().iter().zip(&new).any(outgrows) {
                // From here on the keys of earlier tokens stand at other angles, too: all is read again.
                cache = self.cache(running.len());
                new = running.iter().map(|prompt| [&prompts[*prompt][..], &answers[*prompt].ids].concat()).collect();
            }
            let mut offsets = vec![0];
            for ids in &new {
                offsets.push(offsets[offsets.len() - 1] + ids.len() as i64);
            }
            let flat: Vec<i64> = new.iter().flatten().map(|id| i64::from(*id)).collect();
            let ids = Tensor::from_slice(&flat).to_device(self.device);
            let last: Vec<i64> = offsets[1..].iter().map(|end| end - 1).collect();
            let hidden = self.hidden_cached(&ids, &Documents { offsets }, &mut cache);
            let last = Tensor::from_slice(&last).to_device(self.device);
            let logits = self.logits(&hidden.index_select(0, &last)); // (B, V)
            let picked = pick(&logits, sampling, &running, &answers);

            let mut kept = Vec::new();
            for (sequence, (prompt, token)) in running.iter().zip(&picked).enumerate() {
                let answer = &mut answers[*prompt];
                if sampling.stop.contains(token) {
                    answer.finish = Finish::Stop;
                    continue;
                }
                answer.ids.push(*token);
                if on_token(*prompt, *token).is_break() {
                    answer.finish = Finish::Cancelled;
                } else if answer.ids.len() < sampling.max_tokens {
                    kept.push(sequence);
                }
            }
            new = kept.iter().map(|s| vec![picked[*s]]).collect();
            if kept.len() < running.len() {
                cache.keep(&kept);
                running = kept.iter().map(|s| running[*s]).collect();
            }
        }
        answers
    }
}

/// The next token of every running sequence, from logits (B, V).
fn pick(logits: &Tensor, sampling: &Sampling, running: &[usize], answers: &[Continuation]) -> Vec<u32> {
    if sampling.temperature <= 0.0 {
        let best = logits.argmax(-1, false);
        return Vec::<i64>::try_from(best).expect("a vector of i64").into_iter().map(|id| id as u32).collect();
    }
    let probabilities = (logits / sampling.temperature).softmax(-1, Kind::Float);
    let (sorted, order) = probabilities.sort(-1, true);
    running
        .iter()
        .enumerate()
        .map(|(row, prompt)| {
            let sorted = Vec::<f32>::try_from(sorted.get(row as i64)).expect("a vector of f32");
            let draw = uniform(sampling.seed, *prompt as u64, answers[*prompt].ids.len() as u64);
            let index = nucleus(&sorted, sampling.top_p, draw);
            order.int64_value(&[row as i64, index as i64]) as u32
        })
        .collect()
}

/// Index of the drawn token among probabilities sorted downwards; `draw` in [0, 1) (arXiv:1904.09751).
fn nucleus(sorted: &[f32], top_p: f64, draw: f64) -> usize {
    let mut mass = 0.0;
    let mut kept = 0;
    for p in sorted {
        mass += f64::from(*p);
        kept += 1;
        if mass >= top_p {
            break;
        }
    }
    let mut left = draw * mass;
    for (i, p) in sorted[..kept].iter().enumerate() {
        left -= f64::from(*p);
        if left < 0.0 {
            return i;
        }
    }
    kept - 1
}

/// A number in [0, 1) that depends on nothing but its arguments (SplitMix64's finaliser).
fn uniform(seed: u64, prompt: u64, token: u64) -> f64 {
    let mut z = seed
        .wrapping_add(prompt.wrapping_mul(0x9e37_79b9_7f4a_7c15))
        .wrapping_add(token.wrapping_mul(0xd1b5_4a32_d192_ed03))
        .wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nucleus_holds_the_least_tokens_that_reach_top_p() {
        let sorted = [0.5, 0.3, 0.15, 0.05];
        let drawn = |top_p, draw| nucleus(&sorted, top_p, draw);
        assert_eq!(drawn(0.5, 0.999), 0);
        assert_eq!(drawn(0.6, 0.999), 1);
        assert_eq!(drawn(1.0, 0.999), 3);
        assert_eq!(drawn(1.0, 0.0), 0);
        assert_eq!(drawn(1.0, 0.6), 1);
        assert_eq!(drawn(0.0, 0.3), 0, "the most likely token is always in");
    }

    #[test]
    fn draws_depend_on_their_place_alone_and_fill_the_unit_interval() {
        assert_eq!(uniform(1, 2, 3), uniform(1, 2, 3));
        let draws: Vec<f64> = (0..1000).map(|i| uniform(7, i / 50, i % 50)).collect();
        let mean = draws.iter().sum::<f64>() / 1000.0;
        assert!((mean - 0.5).abs() < 0.05 && draws.iter().all(|d| (0.0..1.0).contains(d)), "mean {mean}");
    }
}
