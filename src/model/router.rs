//! Routers: which experts a token goes through, and with what weight; and the loss that keeps them balanced.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tch::{Device, Kind, Tensor};

use super::layer::Context;
use super::linear::Linear;
use super::load::Reader;
use super::spec::{self, Groups, Routing, Scores};
use crate::Result;
use crate::ops::{self, Documents, Norm, Normed};
use crate::torch_ext::{custom, sent};

/// A router with its weights.
#[derive(Debug)]
pub(super) struct Router {
    /// Where it does not read what the experts read.
    norm: Option<Norm>,
    linear: Linear,
    wide: bool,
    routing: Routing,
    /// Added to the scores (E), fp32, for the choice alone.
    correction: Option<Tensor>,
    /// The weights of each expert are multiplied by it (E), fp32.
    expert_scale: Option<Tensor>,
    /// The experts of each token id (V, C), i64.
    of_token: Option<Tensor>,
    balance: f64,
}

impl Clone for Router {
    /// Another handle to the same tensors.
    fn clone(&self) -> Self {
        Self {
            norm: self.norm.clone(),
            linear: self.linear.clone(),
            routing: self.routing.clone(),
            correction: self.correction.as_ref().map(Tensor::shallow_clone),
            expert_scale: self.expert_scale.as_ref().map(Tensor::shallow_clone),
            of_token: self.of_token.as_ref().map(Tensor::shallow_clone),
            ..*self
        }
    }
}

impl Router {
    pub(super) fn load(spec: &spec::Router, read: &Reader<'_>) -> Result<Self> {
        let (correction, expert_scale) = match &spec.routing {
            Routing::Largest { correction, expert_scale, .. } => (correction.as_ref(), expert_scale.as_ref()),
            Routing::OfToken { .. } | Routing::SparseMixer { .. } => (None, None),
        };
        let of_token = match &spec.routing {
            Routing::OfToken { table, .. } => Some(read.table(table, spec.linear.output)?),
            Routing::Largest { .. } | Routing::SparseMixer { .. } => None,
        };
        let of_experts = |name: Option<&String>| name.map(|name| read.tensor_as(name, Kind::Float)).transpose();
        let norm = spec.norm.as_ref().map(|own| {
            let norm = read.norm(&own.norm)?;
            Ok(Norm { weight: &norm.weight * own.scale, ..norm })
        });
        Ok(Self {
            norm: norm.transpose()?,
            linear: read.linear_unquantised(&spec.linear, spec.wide)?,
            wide: spec.wide,
            routing: spec.routing.clone(),
            correction: of_experts(correction)?,
            expert_scale: of_experts(expert_scale)?,
            of_token,
            balance: spec.balance,
        })
    }

    pub(super) fn linear(&self) -> &Linear {
        &self.linear
    }

    /// Whether it takes part in the balancing loss.
    pub(super) fn balances(&self) -> bool {
        self.balance > 0.0
    }

    /// Gives the balancing loss another coefficient. One that reads its choice from a table has nothing to balance, as transformers
    /// has it.
    pub(super) fn balance(&mut self, coefficient: f64) {
        if self.of_token.is_none() {
            self.balance = coefficient;
        }
    }

    pub(super) fn linear_mut(&mut self) -> &mut Linear {
        &mut self.linear
    }

    /// The experts of each row of x (T, D), which is h (T, D) normed for them: (T, C), i64, and their weights (T, C), fp32.
    pub(super) fn forward(&self, h: &Tensor, x: &Normed, context: &Context<'_>) -> (Tensor, Tensor) {
        let x = self.norm.as_ref().map_or_else(|| x.clone(), |norm| norm.of(h));
        let x = if self.wide { Normed::from(&x.rows().to_kind(Kind::Float)) } else { x };
        let products = ops::projection(x, &[self.linear.operand(context.dropout_seed)], None).remove(0);
        let logits = products.to_kind(Kind::Float); // (T, E)
        let (chosen, weights) = match &self.routing {
            Routing::Largest { chosen, scores, groups, normalised, scale, .. } => {
                let scores = scores.of(&logits);
                let index = tch::no_grad(|| match (&self.correction, groups) {
                    // The order of the scores, before they are rounded to 0 or 1.
                    (None, None) => logits.detach().topk(*chosen, -1, true, true).1,
                    _ => self.largest(&scores.detach(), *chosen, *groups),
                });
                let weights = weights(&scores, &index, *normalised, *scale);
                let weights = match &self.expert_scale {
                    Some(scale) => weights * scale.take(&index), // (T, C)
                    None => weights,
                };
                (index, weights)
            }
            Routing::OfToken { scores, normalised, scale, .. } => {
                let table = self.of_token.as_ref().expect("read with the weights");
                let index = table.index_select(0, context.ids); // (T, C)
                let weights = weights(&scores.of(&logits), &index, Some(*normalised), *scale);
                (index, weights)
            }
            Routing::SparseMixer { jitter } => sparse_mixer(&logits, *jitter),
        };
        // The gradient of the balancing loss enters where the logits are, so that it is there however the block is run.
        let weights = match context.balance {
            Some(balance) if self.balance > 0.0 => {
                let counted = self.counted(&logits, &chosen);
                balance.enter(&logits, &counted, weights, context.documents, self.balance)
            }
            _ => weights,
        };
        (chosen, weights)
    }

    /// The experts that the balancing loss counts: those of the largest logits, whatever is added to scores for the choice.
    fn counted(&self, logits: &Tensor, chosen: &Tensor) -> Tensor {
        match &self.correction {
            Some(_) => logits.detach().topk(chosen.size()[1], -1, true, true).1,
            None => chosen.shallow_clone(),
        }
    }

    /// Index (T, C) of the largest scores (T, E). No graph.
    fn largest(&self, scores: &Tensor, chosen: i64, groups: Option<Groups>) -> Tensor {
        let scores = self.correction.as_ref().map_or_else(|| scores.shallow_clone(), |added| scores + added);
        let scores = match groups {
            Some(Groups { count, kept, judged_by }) => {
                let grouped = scores.view([-1, count, scores.size()[1] / count]); // (T, groups, E / groups)
                let merit =
                    grouped.topk(judged_by, -1, true, false).0.sum_dim_intlist([-1i64].as_slice(), false, Kind::Float);
                let best = merit.topk(kept, -1, true, false).1; // (T, kept)
                let out = merit.ones_like().scatter_value(1, &best, 0.0).to_kind(Kind::Bool); // (T, groups)
                grouped.masked_fill(&out.unsqueeze(-1), f64::NEG_INFINITY).view(scores.size().as_slice())
            }
            None => scores,
        };
        scores.topk(chosen, -1, true, true).1
    }
}

impl Scores {
    /// Scores (T, E) of logits (T, E).
    fn of(self, logits: &Tensor) -> Tensor {
        match self {
            Self::Softmax => logits.softmax(-1, Kind::Float),
            Self::Sigmoid => logits.sigmoid(),
            // Below, the score is 0 to any precision that matters, and its slope would be 0 / 0.
            Self::SqrtSoftplus => logits.clamp_min(-80.0).softplus().sqrt(),
        }
    }
}

/// The scores (T, E) of the experts in `index` (T, C), divided by their sum plus `normalised` if given, times `scale`: (T, C).
fn weights(scores: &Tensor, index: &Tensor, normalised: Option<f64>, scale: f64) -> Tensor {
    let weights = scores.gather(1, index, false);
    let weights = match normalised {
        Some(eps) => &weights / (weights.sum_dim_intlist([1i64].as_slice(), true, Kind::Float) + eps),
        None => weights,
    };
    if scale == 1.0 { weights } else { weights * scale }
}

/// The inference form of SparseMixer: the largest logit, and the largest of the others, each weighed by a softmax over the logits
/// that are near it. Index (T, 2) and weights (T, 2) of logits (T, E).
fn sparse_mixer(logits: &Tensor, jitter: f64) -> (Tensor, Tensor) {
    let pick = |considered: &Tensor| {
        let (largest, index) = considered.detach().max_dim(1, true); // (T, 1)
        let distance = (&largest - logits.detach()) / logits.detach().abs().maximum(&largest);
        let far = distance.gt(2.0 * jitter);
        let weight = considered.masked_fill(&far, f64::NEG_INFINITY).softmax(-1, Kind::Float).gather(1, &index, false);
        (index, weight)
    };
    let (first, first_weight) = pick(logits);
    let others = logits.scatter_value(1, &first, f64::NEG_INFINITY);
    let (second, second_weight) = pick(&others);
    (Tensor::cat(&[first, second], 1), Tensor::cat(&[first_weight, second_weight], 1))
}

/// The loss that keeps experts balanced (arXiv:2101.03961, equations 4 to 6), over all routers of a forward, document by document:
/// `E sum_e tokens_e prob_e` with `tokens_e` the share of a document's tokens that went to expert e (C in all) and `prob_e` its mean
/// softmax. Documents are weighed, not their tokens pooled, so that packing and accumulation do not change it.
///
/// Routers fill it in the forward; its gradient, which needs the sums of all of them, is added in their backward.
#[derive(Debug, Clone)]
pub struct Balance(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// What each document's loss is multiplied with beside each router's own coefficient: (documents, 1), fp32.
    weights: Mutex<Tensor>,
    sums: Mutex<Sums>,
}

#[derive(Debug, Default)]
struct Sums {
    /// Tokens that went to each expert (documents, E), and the sum of their softmax, fp32.
    filled: Option<(Tensor, Tensor)>,
    /// Routers.
    routers: u32,
    /// From here on blocks only run again.
    complete: bool,
}

impl Balance {
    /// Empty; the loss is the sum over documents of `weight * loss`.
    pub fn new(weights: &[f32], device: Device) -> Self {
        let weights = Mutex::new(sent(&Tensor::from_slice(weights), device).unsqueeze(1));
        Self(Arc::new(Shared { weights, sums: Mutex::default() }))
    }

    /// The forward is done: what runs now, runs again.
    pub(super) fn complete(&self) {
        self.sums().complete = true;
    }

    /// The loss, without the coefficient: an fp32 scalar. Zero where no router took part.
    pub fn loss(&self, documents: &Documents) -> Tensor {
        let sums = self.sums();
        let Some((counts, probabilities)) = &sums.filled else { return Tensor::from(0f32) };
        let experts = counts.size()[1] as f64;
        let lengths = lengths(documents, counts.device()); // (documents, 1)
        let rows = &lengths * f64::from(sums.routers);
        let own = (counts * probabilities / (&rows * &rows)).sum_dim_intlist([1i64].as_slice(), true, Kind::Float);
        (own * self.weights()).sum(Kind::Float) * experts
    }

    fn weights(&self) -> Tensor {
        self.0.weights.lock().unwrap_or_else(PoisonError::into_inner).shallow_clone()
    }

    fn sums(&self) -> MutexGuard<'_, Sums> {
        self.0.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `weights` as they are, with this loss's gradient, times `coefficient`, going into `logits` (T, E) beside theirs.
    fn enter(
        &self,
        logits: &Tensor,
        chosen: &Tensor,
        weights: Tensor,
        documents: &Documents,
        coefficient: f64,
    ) -> Tensor {
        let of_token = token_documents(documents, logits.device()); // (T)
        let probabilities = tch::no_grad(|| {
            let probabilities = logits.detach().softmax(-1, Kind::Float); // (T, E)
            let mut sums = self.sums();
            if !sums.complete {
                let shape = [documents.spans().count() as i64, logits.size()[1]];
                let zeros = || Tensor::zeros(shape, (Kind::Float, logits.device()));
                let ones = probabilities.zeros_like().scatter_value(1, chosen, 1.0); // (T, E)
                let counted = zeros().index_add(0, &of_token, &ones);
                let summed = zeros().index_add(0, &of_token, &probabilities);
                sums.filled = Some(match sums.filled.take() {
                    Some((counts, probabilities)) => (counts + counted, probabilities + summed),
                    None => (counted, summed),
                });
                sums.routers += 1;
            }
            probabilities
        });
        let (balance, lengths) = (self.clone(), lengths(documents, logits.device()));
        let outputs = vec![tch::no_grad(|| weights.copy())];
        custom(c"engraft::router_balance", &[&weights, logits], outputs, move |grads| {
            let sums = balance.sums();
            let (counts, _) = sums.filled.as_ref().expect("filled in the forward");
            let factor = coefficient * counts.size()[1] as f64 / f64::from(sums.routers).powi(2);
            let of_document = counts * balance.weights() * factor / lengths.square(); // (documents, E): d loss / d softmax of each token
            let dprobabilities = of_document.index_select(0, &of_token); // (T, E)
            let product = &probabilities * dprobabilities;
            let sum = product.sum_dim_intlist([1i64].as_slice(), true, Kind::Float);
            vec![Some(grads[0].shallow_clone()), Some(product - &probabilities * sum)]
        })
        .remove(0)
    }
}

/// The length of each document: (documents, 1), fp32.
fn lengths(documents: &Documents, device: Device) -> Tensor {
    let lengths: Vec<f32> = documents.spans().map(|(_, length)| length as f32).collect();
    sent(&Tensor::from_slice(&lengths), device).unsqueeze(1)
}

/// Which document each token belongs to: (T), i64.
fn token_documents(documents: &Documents, device: Device) -> Tensor {
    let of = documents.spans().enumerate().flat_map(|(i, (_, length))| std::iter::repeat_n(i as i64, length as usize));
    sent(&Tensor::from_slice(&of.collect::<Vec<i64>>()), device)
}
