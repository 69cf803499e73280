//! What a model said of a prompt, as it is kept: its answer, and what it thought most likely at each place of it.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::{Tolerance, logits};
use crate::data::Tokenizer;
use crate::model::{Continuation, Decoder, Finish};

/// Tokens kept of a place.
const KEPT: i64 = 20;

/// An answer by the likeliest token each, and what was thought at its places.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Said {
    /// Token ids of the answer, without the one that ended it.
    pub ids: Vec<u32>,
    /// Their text, special tokens left out.
    pub text: String,
    /// Why it ended.
    pub ended: Ended,
    /// Behind the prompt, and behind each token of the answer: one more than there are tokens.
    pub places: Vec<Place>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ended {
    /// By a token that ends answers.
    Stop,
    /// It has as many tokens as were asked for.
    Length,
}

/// What a model thought at a place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Place {
    /// The likeliest tokens, the likeliest first.
    pub top: Vec<Candidate>,
    /// Logarithm of the sum of the exponentials of all logits: a logit less this is a log-probability.
    pub log_sum: f64,
    /// Standard deviation of all logits: what differences are measured by.
    pub spread: f64,
}

/// A token that may come next.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// Its id.
    pub id: u32,
    /// Its text by itself.
    pub token: String,
    /// Its logit.
    pub logit: f32,
}

/// How far a model is from what was said.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Apart {
    /// Root of the mean square of the differences of logits, in spreads.
    pub mean: f64,
    /// The largest of them.
    pub largest: f64,
    /// Places.
    pub places: usize,
    /// Of these, where the likeliest token is the same, or one that the tolerance allows instead.
    pub same: usize,
}

impl Said {
    /// An answer with the logits (P, V) at its places, fp32.
    pub(super) fn of(answer: Continuation, logits: &Tensor, tokenizer: &Tokenizer) -> Self {
        let (values, ids) = logits.topk(KEPT.min(logits.size()[1]), -1, true, true); // (P, K)
        let log_sums = Vec::<f64>::try_from(logits.to_kind(Kind::Double).logsumexp([-1], false));
        let spreads = Vec::<f64>::try_from(logits.to_kind(Kind::Double).std_dim([-1].as_slice(), true, false));
        let [log_sums, spreads] = [log_sums, spreads].map(|numbers| numbers.expect("a vector of f64"));
        let places = log_sums.into_iter().zip(spreads).enumerate().map(|(index, (log_sum, spread))| {
            let row = |tensor: &Tensor| tensor.get(index as i64);
            let logits = Vec::<f32>::try_from(row(&values)).expect("a vector of f32");
            let ids = Vec::<i64>::try_from(row(&ids)).expect("a vector of i64");
            let candidate = |(id, logit): (i64, f32)| {
                let id = id as u32;
                Candidate { id, token: tokenizer.decode(&[id], false), logit }
            };
            Place { top: ids.into_iter().zip(logits).map(candidate).collect(), log_sum, spread }
        });
        Self {
            places: places.collect(),
            text: tokenizer.decode(&answer.ids, true),
            ended: if answer.finish == Finish::Stop { Ended::Stop } else { Ended::Length },
            ids: answer.ids,
        }
    }

    /// Logits (P, V) of `model` at the places of this, behind the same tokens; fp32, on the CPU.
    pub fn asked_of(&self, model: &Decoder, prompt: &[u32]) -> Tensor {
        logits(model, &[prompt, &self.ids].concat(), self.places.len())
    }

    /// How far what was found at its places ([`Said::asked_of`]) is from this.
    pub fn apart(&self, found: &Tensor, tolerance: &Tolerance) -> Apart {
        let (mut squares, mut largest, mut count, mut same) = (0.0, 0f64, 0, 0);
        let likeliest = Vec::<i64>::try_from(found.argmax(-1, false)).expect("a vector of i64");
        for (index, place) in self.places.iter().enumerate() {
            for candidate in &place.top {
                let logit = found.double_value(&[index as i64, i64::from(candidate.id)]);
                let apart = ((logit - f64::from(candidate.logit)) / place.spread).abs();
                // What is no number is as far as can be.
                let apart = if apart.is_nan() { f64::INFINITY } else { apart };
                squares += apart * apart;
                largest = largest.max(apart);
                count += 1;
            }
            same += usize::from(place.allows(likeliest[index] as u32, tolerance));
        }
        Apart { mean: (squares / f64::from(count.max(1))).sqrt(), largest, places: self.places.len(), same }
    }

    /// How many tokens this and another answer begin with alike.
    pub fn alike(&self, other: &Self) -> usize {
        self.ids.iter().zip(&other.ids).take_while(|(one, other)| one == other).count()
    }

    /// Whether every number in it is one, and each place has logits that differ: what a broken model says is nothing to compare with.
    pub fn is_sound(&self) -> bool {
        let sound = |place: &Place| {
            let numbers = place.top.iter().all(|one| one.logit.is_finite());
            numbers
                && !place.top.is_empty()
                && place.log_sum.is_finite()
                && place.spread.is_finite()
                && place.spread > 0.0
        };
        self.places.len() == self.ids.len() + 1 && self.places.iter().all(sound)
    }
}

impl Place {
    /// Whether a token may be the likeliest here as far as the tolerance goes: both it and the likeliest may be off by as much.
    pub fn allows(&self, id: u32, tolerance: &Tolerance) -> bool {
        self.top.iter().any(|candidate| candidate.id == id && self.gap(candidate) <= self.most(tolerance))
    }

    /// Logits between the likeliest and this one, in spreads.
    pub fn gap(&self, candidate: &Candidate) -> f64 {
        let first = self.top.first().map_or(f64::NEG_INFINITY, |first| f64::from(first.logit));
        (first - f64::from(candidate.logit)) / self.spread
    }

    /// The largest such difference between two that may change places: each is off by as much as all are, so their difference by
    /// `sqrt(2)` of it, and what is twice as large again is rare.
    pub fn most(&self, tolerance: &Tolerance) -> f64 {
        3.0 * tolerance.mean
    }

    /// Log-probability of a candidate.
    pub fn log_probability(&self, candidate: &Candidate) -> f64 {
        f64::from(candidate.logit) - self.log_sum
    }
}

impl Apart {
    /// Whether the two are one and the same model as far as the tolerance goes.
    pub fn within(&self, tolerance: &Tolerance) -> bool {
        // Where two tokens are as likely, one place in ten may fall the other way for all that rounding explains.
        let same = 10 * self.same >= 9 * self.places;
        self.mean <= tolerance.mean && self.largest <= tolerance.largest && same
    }
}
