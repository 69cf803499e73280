//! Experts and their router: built from their spec, walked forward.

use tch::{Kind, Tensor};

use super::feed_forward::FeedForward;
use super::layer::{Context, Stream};
use super::linear::Linear;
use super::load::Reader;
use super::router::Router;
use super::spec::{self, ExpertGateUp};
use crate::Result;
use crate::ops::{self, Activation, ExpertInput, Normed, Weighted};

/// Experts with their weights.
#[derive(Debug, Clone)]
pub(super) struct Experts {
    router: Router,
    activation: Activation,
    input: Input,
    down: Linear,
    weighted: Weighted,
    shared: Option<Shared>,
}

/// From a token to gate and up of an expert.
#[derive(Debug, Clone)]
enum Input {
    /// Gate, up.
    Separate(Box<[Linear; 2]>),
    Fused {
        linear: Box<Linear>,
        interleaved: bool,
    },
}

/// What every token goes through.
#[derive(Debug, Clone)]
struct Shared {
    feed_forward: FeedForward,
    gate: Option<Linear>,
}

impl Experts {
    pub(super) fn load(spec: &spec::Experts, read: &Reader<'_>) -> Result<Self> {
        let input = match &spec.projection {
            ExpertGateUp::Separate { gate, up } => Input::Separate(Box::new([read.experts(gate)?, read.experts(up)?])),
            ExpertGateUp::Fused { linear, interleaved } => {
                Input::Fused { linear: Box::new(read.experts(linear)?), interleaved: *interleaved }
            }
        };
        let shared = match &spec.shared {
            Some(shared) => Some(Shared {
                feed_forward: FeedForward::load(&shared.feed_forward, read)?,
                gate: shared.gate.as_ref().map(|gate| read.linear(gate)).transpose()?,
            }),
            None => None,
        };
        Ok(Self {
            router: Router::load(&spec.router, read)?,
            activation: spec.activation,
            input,
            down: read.experts(&spec.down)?,
            weighted: spec.weighted,
            shared,
        })
    }

    /// What they give for the stream.
    pub(super) fn forward(&self, stream: Stream<'_>, context: &Context<'_>) -> Tensor {
        // Router, experts and the shared one read the same rows.
        let Stream { h, x, residual } = stream;
        let (chosen, weights) = self.router.forward(h, &x, context);
        let shared = self.shared.as_ref().map(|shared| shared.forward(&x, residual, context));
        let seed = context.dropout_seed;
        let input = match &self.input {
            Input::Separate(linears) => ExpertInput::Separate(linears.each_ref().map(|linear| linear.operand(seed))),
            Input::Fused { linear, interleaved } => {
                ExpertInput::Fused { operand: linear.operand(seed), interleaved: *interleaved }
            }
        };
        let experts =
            ops::Experts { activation: self.activation, input, down: self.down.operand(seed), weighted: self.weighted };
        ops::experts(x.rows(), &chosen, &weights, &experts, shared.as_ref().or(residual))
    }

    pub(super) fn router(&self) -> &Router {
        &self.router
    }

    pub(super) fn router_mut(&mut self) -> &mut Router {
        &mut self.router
    }

    /// Linears in checkpoint order.
    pub(super) fn linears(&self) -> Vec<&Linear> {
        let mut all = vec![self.router.linear()];
        match &self.input {
            Input::Separate(linears) => all.extend(linears.iter()),
            Input::Fused { linear, .. } => all.push(linear),
        }
        all.push(&self.down);
        if let Some(shared) = &self.shared {
            all.extend(shared.feed_forward.linears());
            all.extend(&shared.gate);
        }
        all
    }

    /// Linears in checkpoint order.
    pub(super) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mut all = vec![self.router.linear_mut()];
        match &mut self.input {
            Input::Separate(linears) => all.extend(linears.iter_mut()),
            Input::Fused { linear, .. } => all.push(linear),
        }
        all.push(&mut self.down);
        if let Some(shared) = &mut self.shared {
            all.extend(shared.feed_forward.linears_mut());
            all.extend(&mut shared.gate);
        }
        all
    }
}

impl Shared {
    /// What it gives for rows x (T, D), added to `residual` (T, D) if given.
    fn forward(&self, x: &Normed, residual: Option<&Tensor>, context: &Context<'_>) -> Tensor {
        let stream = |residual| Stream { h: x.rows(), x: x.clone(), residual };
        let Some(gate) = &self.gate else {
            return self.feed_forward.forward(stream(residual), context);
        };
        let given = self.feed_forward.forward(stream(None), context);
        let gate = ops::projection(x, &[gate.operand(context.dropout_seed)], None).remove(0); // (T, 1)
        let given = given * gate.to_kind(Kind::Float).sigmoid().to_kind(context.kind);
        residual.map_or_else(|| given.shallow_clone(), |residual| residual + &given)
    }
}
