//! What happens to each token alone: built from its spec, walked forward.

use tch::Tensor;

use super::experts::Experts;
use super::layer::{Around, Context, Stream};
use super::linear::Linear;
use super::load::Reader;
use super::router::Router;
use super::spec::{self, GateUp};
use crate::Result;
use crate::ops::{self, Activation, Normed, Readers};

/// A feed-forward with its weights.
#[derive(Debug, Clone)]
pub(super) enum FeedForward {
    Dense(Box<Dense>),
    Experts(Box<Experts>),
    Sum(Vec<Branch>),
}

/// One of several that read the same stream.
#[derive(Debug, Clone)]
pub(super) struct Branch {
    norms: Around,
    feed_forward: FeedForward,
}

impl FeedForward {
    pub(super) fn load(spec: &spec::FeedForward, read: &Reader<'_>) -> Result<Self> {
        Ok(match spec {
            spec::FeedForward::Plain { activation, up, down } => {
                let input = Input::Plain(Box::new(read.linear(up)?));
                Self::Dense(Box::new(Dense { activation: *activation, input, down: read.linear(down)? }))
            }
            spec::FeedForward::Gated { activation, projection, down } => {
                let input = match projection {
                    GateUp::Separate { gate, up } => Input::Separate(Box::new([read.linear(gate)?, read.linear(up)?])),
                    GateUp::Fused(linear) => Input::Fused(Box::new(read.linear(linear)?)),
                };
                Self::Dense(Box::new(Dense { activation: *activation, input, down: read.linear(down)? }))
            }
            spec::FeedForward::Experts(experts) => Self::Experts(Box::new(Experts::load(experts, read)?)),
            spec::FeedForward::Sum(branches) => {
                let branch = |branch: &spec::Branch| -> Result<Branch> {
                    let norms = Around::load(&branch.norms, read)?;
                    Ok(Branch { norms, feed_forward: Self::load(&branch.feed_forward, read)? })
                };
                Self::Sum(branches.iter().map(branch).collect::<Result<_>>()?)
            }
        })
    }

    /// What it gives for the stream.
    pub(super) fn forward(&self, stream: Stream<'_>, context: &Context<'_>) -> Tensor {
        match self {
            Self::Dense(dense) => dense.forward(stream, context),
            Self::Experts(experts) => experts.forward(stream, context),
            Self::Sum(branches) => {
                let Stream { x, residual, .. } = stream;
                let given = |Branch { norms, feed_forward }: &Branch| {
                    norms.around(x.rows(), |stream| feed_forward.forward(stream, context))
                };
                let residual = residual.map(Tensor::shallow_clone).into_iter();
                residual.chain(branches.iter().map(given)).reduce(|sum, given| sum + given).expect("a branch")
            }
        }
    }

    /// What chooses among its experts, if it has any.
    pub(super) fn router(&self) -> Option<&Router> {
        match self {
            Self::Dense(_) => None,
            Self::Experts(experts) => Some(experts.router()),
            Self::Sum(branches) => branches.iter().find_map(|branch| branch.feed_forward.router()),
        }
    }

    /// What chooses among its experts, if it has any.
    pub(super) fn router_mut(&mut self) -> Option<&mut Router> {
        match self {
            Self::Dense(_) => None,
            Self::Experts(experts) => Some(experts.router_mut()),
            Self::Sum(branches) => branches.iter_mut().find_map(|branch| branch.feed_forward.router_mut()),
        }
    }

    /// Linears in checkpoint order.
    pub(super) fn linears(&self) -> Vec<&Linear> {
        match self {
            Self::Dense(dense) => dense.linears(),
            Self::Experts(experts) => experts.linears(),
            Self::Sum(branches) => branches.iter().flat_map(|branch| branch.feed_forward.linears()).collect(),
        }
    }

    /// Linears in checkpoint order.
    pub(super) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        match self {
            Self::Dense(dense) => dense.linears_mut(),
            Self::Experts(experts) => experts.linears_mut(),
            Self::Sum(branches) => branches.iter_mut().flat_map(|branch| branch.feed_forward.linears_mut()).collect(),
        }
    }
}

/// What the dropout seeds of one tile and the next are apart: odd, and far from what steps, micro-batches and passes add.
const TILE: u64 = 0xa24b_aed4_963e_e407;

/// One that every token goes through.
#[derive(Debug, Clone)]
pub(super) struct Dense {
    activation: Activation,
    input: Input,
    down: Linear,
}

/// From the stream to what is activated.
#[derive(Debug, Clone)]
enum Input {
    Plain(Box<Linear>),
    /// Gate, up.
    Separate(Box<[Linear; 2]>),
    Fused(Box<Linear>),
}

impl Dense {
    /// What it gives for the stream.
    fn forward(&self, stream: Stream<'_>, context: &Context<'_>) -> Tensor {
        let Stream { x, residual, .. } = stream;
        let seed = context.dropout_seed;
        let Some(tile) = context.tile.map(|tile| tile as i64).filter(|tile| *tile < x.rows().size()[0]) else {
            return self.whole(x, residual, seed);
        };
        let trained: Vec<&Tensor> = self.linears().into_iter().flat_map(Linear::leaves).collect();
        let dense = self.clone();
        ops::tiled(&x.into_rows(), residual, &trained, tile, move |number, rows, residual| {
            let seed = seed.map(|seed| seed.wrapping_add(TILE.wrapping_mul(number as u64)));
            dense.whole(rows.into(), residual, seed)
        })
    }

    /// What it gives for all of x (T, D) at once.
    fn whole(&self, x: Normed, residual: Option<&Tensor>, seed: Option<u64>) -> Tensor {
        let (gate, up) = self.gate_and_up(x, seed);
        let both = (&gate, up.as_ref());
        ops::gated_projection(self.activation, both, Readers::None, self.down.operand(seed), residual)
    }

    /// Both (T, F), or what is activated alone.
    fn gate_and_up(&self, x: Normed, seed: Option<u64>) -> (Tensor, Option<Tensor>) {
        let one = |linear: &Linear| ops::projection(&x, &[linear.operand(seed)], None).remove(0);
        match &self.input {
            Input::Plain(linear) => (one(linear), None),
            Input::Separate(linears) => {
                let mut parts = ops::projection(&x, &linears.each_ref().map(|l| l.operand(seed)), None);
                let up = parts.pop();
                (parts.remove(0), up)
            }
            Input::Fused(linear) => {
                let fused = one(linear); // (T, 2 F)
                let width = fused.size()[1] / 2;
                let mut parts = ops::split(&fused, 1, &[width, width]);
                let up = parts.pop();
                (parts.remove(0), up)
            }
        }
    }

    /// Linears in checkpoint order.
    fn linears(&self) -> Vec<&Linear> {
        let mut all: Vec<&Linear> = match &self.input {
            Input::Plain(linear) | Input::Fused(linear) => vec![&**linear],
            Input::Separate(linears) => linears.iter().collect(),
        };
        all.push(&self.down);
        all
    }

    /// Linears in checkpoint order.
    fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mut all: Vec<&mut Linear> = match &mut self.input {
            Input::Plain(linear) | Input::Fused(linear) => vec![&mut **linear],
            Input::Separate(linears) => linears.iter_mut().collect(),
        };
        all.push(&mut self.down);
        all
    }
}
