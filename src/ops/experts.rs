//! Experts: each token goes through the few feed-forwards that its router chose (arXiv:1701.06538), and no other is computed.
//!
//! Tokens are sorted by expert, so that every expert meets its own rows in one product: on CUDA one grouped product over all
//! experts, on the CPU one product for each expert that has rows. Weights of all experts are one tensor (E, out, in), and so are
//! their low-rank updates: A (E, R, in), B (E, out, R). Kept for backward are the tokens before they are sorted, gate and up;
//! sorted rows and the activated product are made again.
//!
//! S is the number of rows after sorting, T C with C experts for each token.

use tch::{Device, Kind, Tensor};

use super::gated::Activation;
use super::projection::{Operand, factors};
use crate::quant::Weight;
use crate::torch_ext::{custom, keep_mask};

/// The feed-forwards of all experts: the operands' weights are (E, out, in), their biases (E, out).
#[derive(Debug, Clone, Copy)]
pub struct Experts<'a> {
    /// What the gate goes through.
    pub activation: Activation,
    /// From a token to gate and up.
    pub input: ExpertInput<'a>,
    /// From the activated product back: (E, D, F).
    pub down: Operand<'a>,
    /// What the router's weights are multiplied with.
    pub weighted: Weighted,
}

/// How gate and up are stored.
#[derive(Debug, Clone, Copy)]
pub enum ExpertInput<'a> {
    /// Gate and up, (E, F, D) each.
    Separate([Operand<'a>; 2]),
    /// One weight (E, 2 F, D): gate, then up, or the two in turn where `interleaved`.
    Fused {
        /// The weight.
        operand: Operand<'a>,
        /// Whether its rows are gate, up, gate, up.
        interleaved: bool,
    },
}

/// What the router's weights are multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weighted {
    /// What an expert gives.
    Output,
    /// What an expert is given.
    Input,
}

/// `sum_c weights[t, c] * expert_{chosen[t, c]}(x[t])` for x (T, D), plus `residual` (T, D) if given; chosen (T, C) i64, weights (T, C)
/// fp32, which get their gradient.
pub fn experts(
    x: &Tensor,
    chosen: &Tensor,
    weights: &Tensor,
    experts: &Experts<'_>,
    residual: Option<&Tensor>,
) -> Tensor {
    let operands = experts.operands();
    let banks: Vec<Bank> = operands.iter().map(Bank::of).collect();
    let shape = Shape { activation: experts.activation, weighted: experts.weighted, input: Fusion::of(&experts.input) };
    let sorted = Sorted::new(chosen, experts.down.weight);
    let (output, kept) = tch::no_grad(|| shape.forward(&banks, &sorted, x, weights, residual));

    let mut inputs = vec![x, weights];
    inputs.extend(residual);
    inputs.extend(factors(&operands));
    let wants = Wants { x: x.requires_grad(), weights: weights.requires_grad() };
    let has_residual = residual.is_some();
    let (x, weights) = (x.detach(), weights.detach());
    custom(c"engraft::experts", &inputs, vec![output], move |grads| {
        let (dx, dweights, dfactors) = shape.backward(&banks, &sorted, &x, &weights, &kept, &grads[0], wants);
        let mut out = vec![dx, dweights];
        out.extend(has_residual.then(|| Some(grads[0].shallow_clone())));
        out.extend(dfactors.into_iter().map(Some));
        out
    })
    .remove(0)
}

impl<'a> Experts<'a> {
    /// Down last.
    fn operands(&self) -> Vec<Operand<'a>> {
        match self.input {
            ExpertInput::Separate([gate, up]) => vec![gate, up, self.down],
            ExpertInput::Fused { operand, .. } => vec![operand, self.down],
        }
    }
}

/// What forward and backward need to know beside the tensors.
#[derive(Clone, Copy)]
struct Shape {
    activation: Activation,
    weighted: Weighted,
    input: Fusion,
}

#[derive(Clone, Copy)]
enum Fusion {
    Separate,
    Halves,
    Interleaved,
}

#[derive(Clone, Copy)]
struct Wants {
    x: bool,
    weights: bool,
}

/// What forward keeps: gate and up (S, F), and `drop(rows) A^T` (S, R) of each bank that has an update.
struct Kept {
    gate: Tensor,
    up: Tensor,
    through_a: Vec<Option<Tensor>>,
}

impl Shape {
    fn forward(
        &self,
        banks: &[Bank],
        sorted: &Sorted,
        x: &Tensor,
        weights: &Tensor,
        residual: Option<&Tensor>,
    ) -> (Tensor, Kept) {
        let rows = self.rows(sorted, x, weights);
        let (down, into) = banks.split_last().expect("a bank for each operand");
        let (products, mut through_a): (Vec<Tensor>, Vec<Option<Tensor>>) =
            into.iter().map(|bank| bank.forward(&rows, sorted)).unzip();
        drop(rows);
        let (gate, up) = self.input.apart(products);
        let (y, u) = down.forward(&self.activation.gated(&gate, Some(&up)), sorted); // (S, D)
        through_a.push(u);
        let y = sorted.by_token(&y); // (T, C, D)
        let y = match self.weighted {
            Weighted::Output => y * weights.to_kind(x.kind()).unsqueeze(-1),
            Weighted::Input => y,
        };
        let summed = y.sum_dim_intlist([1i64].as_slice(), false, x.kind()); // (T, D)
        let output = residual.map_or_else(|| summed.shallow_clone(), |residual| residual + &summed);
        (output, Kept { gate, up, through_a })
    }

    /// The sorted tokens (S, D), weighted where that comes first.
    fn rows(&self, sorted: &Sorted, x: &Tensor, weights: &Tensor) -> Tensor {
        let rows = x.index_select(0, &sorted.tokens);
        match self.weighted {
            Weighted::Output => rows,
            Weighted::Input => rows * sorted.weights(weights).to_kind(x.kind()),
        }
    }

    /// dX (T, D), dweights (T, C) and dA, dB of every update.
    #[allow(clippy::too_many_arguments)]
    fn backward(
        &self,
        banks: &[Bank],
        sorted: &Sorted,
        x: &Tensor,
        weights: &Tensor,
        kept: &Kept,
        grad: &Tensor,
        wants: Wants,
    ) -> (Option<Tensor>, Option<Tensor>, Vec<Tensor>) {
        let (down, into) = banks.split_last().expect("a bank for each operand");
        let (u_of_down, u_of_into) = kept.through_a.split_last().expect("one for each bank");
        let of_rows = sorted.weights(weights); // (S, 1), fp32
        let dy = grad.index_select(0, &sorted.tokens); // (S, D), before it is weighted
        let (dproduct, du) = down.backward(&dy, sorted);
        // A weight of the output scales everything behind it, so it is applied to the narrow tensors only.
        let weigh = |t: &Tensor| match self.weighted {
            Weighted::Output => t * of_rows.to_kind(t.kind()),
            Weighted::Input => t.shallow_clone(),
        };
        let (dgate, dup, product) = self.activation.gated_backward(&weigh(&dproduct), &kept.gate, Some(&kept.up));
        let mut dweights = None;
        if wants.weights && self.weighted == Weighted::Output {
            let mut dot = row_products(&dproduct, &product); // (S, 1)
            if let Some(bias) = &down.bias {
                dot += row_products(&dy, &bias.index_select(0, &sorted.experts));
            }
            dweights = Some(dot);
        }
        let of_down = down.factors(&product, u_of_down.as_ref().map(&weigh), &dy, du.as_ref().map(&weigh), sorted);
        drop((product, dy, dproduct));

        let rows = self.rows(sorted, x, weights);
        let mut drows: Option<Tensor> = None;
        let mut dfactors = Vec::new();
        for ((bank, u), dy) in into.iter().zip(u_of_into).zip(self.input.together(dgate, dup.expect("up was given"))) {
            let (dx, du) = bank.backward(&dy, sorted);
            dfactors.extend(bank.factors(&rows, u.as_ref().map(Tensor::shallow_clone), &dy, du, sorted));
            drows = Some(match drows {
                Some(mut sum) => sum.g_add_(&dx),
                None => dx,
            });
        }
        dfactors.extend(of_down);
        let mut drows = drows.expect("gate and up have banks");
        if self.weighted == Weighted::Input {
            if wants.weights {
                dweights = Some(row_products(&drows, &x.index_select(0, &sorted.tokens)));
            }
            drows = &drows * of_rows.to_kind(drows.kind());
        }
        let dx = wants.x.then(|| sorted.by_token(&drows).sum_dim_intlist([1i64].as_slice(), false, x.kind()));
        let dweights = dweights.map(|rows| sorted.by_token(&rows).squeeze_dim(2)); // (T, C)
        (dx, dweights, dfactors)
    }
}

/// The products of rows with rows: (S, 1), fp32.
fn row_products(a: &Tensor, b: &Tensor) -> Tensor {
    (a * b).sum_dim_intlist([1i64].as_slice(), true, Kind::Float)
}

impl Fusion {
    fn of(input: &ExpertInput<'_>) -> Self {
        match input {
            ExpertInput::Separate(_) => Self::Separate,
            ExpertInput::Fused { interleaved: false, .. } => Self::Halves,
            ExpertInput::Fused { interleaved: true, .. } => Self::Interleaved,
        }
    }

    /// Gate and up (S, F), contiguous, from what the banks give.
    fn apart(self, mut products: Vec<Tensor>) -> (Tensor, Tensor) {
        let first = products.remove(0);
        let (rows, width) = first.size2().expect("(S, F) or (S, 2 F)");
        let of = |pair: &Tensor, dim: i64, at: i64| pair.select(dim, at).contiguous();
        match self {
            Self::Separate => (first, products.remove(0)),
            Self::Halves => {
                let halves = first.view([rows, 2, width / 2]);
                (of(&halves, 1, 0), of(&halves, 1, 1))
            }
            Self::Interleaved => {
                let pairs = first.view([rows, width / 2, 2]);
                (of(&pairs, 2, 0), of(&pairs, 2, 1))
            }
        }
    }

    /// The gradients of what the banks gave, from those of gate and up (S, F).
    fn together(self, dgate: Tensor, dup: Tensor) -> Vec<Tensor> {
        let rows = dgate.size()[0];
        match self {
            Self::Separate => vec![dgate, dup],
            Self::Halves => vec![Tensor::cat(&[dgate, dup], 1)],
            Self::Interleaved => vec![Tensor::stack(&[dgate, dup], 2).view([rows, -1])],
        }
    }
}

/// Which row goes to which expert.
struct Sorted {
    /// The token of each row (S), i64.
    tokens: Tensor,
    /// The expert of each row (S), i64, ascending.
    experts: Tensor,
    /// Place in (T, C) of each row (S), i64.
    places: Tensor,
    /// Row of each place (T C), i64.
    rows: Tensor,
    /// E.
    count: i64,
    /// C.
    choices: i64,
    ranges: Ranges,
}

/// Where each expert's rows are.
enum Ranges {
    /// Ends of all experts' rows (E), i32, for grouped products.
    Ends(Tensor),
    /// (expert, first row, number of rows) of those that have any.
    Spans(Vec<(i64, i64, i64)>),
}

impl Sorted {
    fn new(chosen: &Tensor, like: &Weight) -> Self {
        tch::no_grad(|| {
            let (count, choices) = (like.size()[0], chosen.size()[1]);
            // Stable: rows of an expert keep the order of the tokens, so that sums do not depend on the sort.
            let (experts, places) = chosen.reshape([-1]).sort_stable(true, 0, false); // (S)
            let sizes = experts.bincount(None::<Tensor>, count); // (E)
            // Grouped products are for bf16; other types go expert by expert.
            let ranges = if like.device().is_cuda() && like.kind() == Kind::BFloat16 {
                Ranges::Ends(sizes.cumsum(0, Kind::Int))
            } else {
                let sizes = Vec::<i64>::try_from(sizes.to_device(Device::Cpu)).expect("one dimension of i64");
                let mut start = 0;
                let spans = sizes.into_iter().enumerate().map(|(expert, size)| {
                    start += size;
                    (expert as i64, start - size, size)
                });
                Ranges::Spans(spans.filter(|(.., size)| *size > 0).collect())
            };
            let tokens = places.divide_scalar_mode(choices, "floor");
            let rows = places.argsort(0, false);
            Self { tokens, experts, places, rows, count, choices, ranges }
        })
    }

    /// The router's weights (T, C) of each row: (S, 1).
    fn weights(&self, weights: &Tensor) -> Tensor {
        weights.reshape([-1]).index_select(0, &self.places).unsqueeze(1)
    }

    /// Rows (S, n) where they came from: (T, C, n).
    fn by_token(&self, rows: &Tensor) -> Tensor {
        rows.index_select(0, &self.rows).view([-1, self.choices, rows.size()[1]])
    }

    /// `rows_e W_e` for rows (S, in) and weights (E, in, out), added to `onto` (S, out) where it is given: (S, out).
    fn products(&self, rows: &Tensor, weights: &Tensor, onto: Option<Tensor>) -> Tensor {
        match &self.ranges {
            Ranges::Ends(ends) => {
                let products = rows.internal_grouped_mm(weights, Some(ends), None, None);
                onto.map_or_else(|| products.shallow_clone(), |onto| onto + &products)
            }
            Ranges::Spans(spans) => {
                let fresh = onto.is_none();
                let output = onto.unwrap_or_else(|| {
                    rows.new_empty([rows.size()[0], weights.size()[2]], (rows.kind(), rows.device()))
                });
                for &(expert, start, size) in spans {
                    let (own, weight) = (rows.narrow(0, start, size), weights.select(0, expert));
                    let mut place = output.narrow(0, start, size);
                    let _ = if fresh { own.mm_out(&place, &weight) } else { place.addmm_(&own, &weight) };
                }
                output
            }
        }
    }

    /// `left_e^T right_e` for rows left (S, m) and right (S, n): (E, m, n), zero where an expert has no row.
    fn outer_products(&self, left: &Tensor, right: &Tensor) -> Tensor {
        match &self.ranges {
            Ranges::Ends(ends) => left.tr().internal_grouped_mm(right, Some(ends), None, None),
            Ranges::Spans(spans) => {
                let shape = [self.count, left.size()[1], right.size()[1]];
                let output = Tensor::zeros(shape, (left.kind(), left.device()));
                for &(expert, start, size) in spans {
                    let (left, right) = (left.narrow(0, start, size), right.narrow(0, start, size));
                    let _ = left.tr().mm_out(&output.select(0, expert), &right);
                }
                output
            }
        }
    }
}

/// One linear of every expert: handles to frozen tensors, never copies of them.
struct Bank {
    weight: Weight,
    bias: Option<Tensor>,
    update: Option<Update>,
}

struct Update {
    /// A (E, R, in) in the compute type.
    a: Tensor,
    /// s B (E, out, R) in the compute type.
    scaled_b: Tensor,
    scale: f64,
    /// Probability and seed of dropout, when there is any.
    dropout: Option<(f64, u64)>,
}

impl Bank {
    fn of(operand: &Operand<'_>) -> Self {
        let kind = operand.weight.kind();
        let update = operand.low_rank.map(|low_rank| Update {
            a: low_rank.a.detach().to_kind(kind),
            scaled_b: (low_rank.b.detach() * low_rank.scale).to_kind(kind),
            scale: low_rank.scale,
            dropout: operand.dropout_seed.filter(|_| low_rank.dropout > 0.0).map(|seed| (low_rank.dropout, seed)),
        });
        Self { weight: operand.weight.handle(), bias: operand.bias.map(Tensor::shallow_clone), update }
    }

    /// Y (S, out) of rows (S, in), and `drop(rows) A^T` (S, R) where there is an update.
    fn forward(&self, rows: &Tensor, sorted: &Sorted) -> (Tensor, Option<Tensor>) {
        let bias = self.bias.as_ref().map(|bias| bias.index_select(0, &sorted.experts)); // (S, out)
        let y = sorted.products(rows, &self.weight.dense().transpose(1, 2), bias);
        let Some(update) = &self.update else { return (y, None) };
        let u = sorted.products(&update.dropped(rows), &update.a.transpose(1, 2), None); // (S, R)
        (sorted.products(&u, &update.scaled_b.transpose(1, 2), Some(y)), Some(u))
    }

    /// dX (S, in) from dY (S, out), and dU = `dY s B` (S, R) where there is an update.
    fn backward(&self, dy: &Tensor, sorted: &Sorted) -> (Tensor, Option<Tensor>) {
        let dx = sorted.products(dy, &self.weight.dense(), None);
        let Some(update) = &self.update else { return (dx, None) };
        let du = sorted.products(dy, &update.scaled_b, None); // (S, R)
        let dx = match update.dropout {
            Some(_) => dx + update.dropped(&sorted.products(&du, &update.a, None)),
            None => sorted.products(&du, &update.a, Some(dx)),
        };
        (dx, Some(du))
    }

    /// dA (E, R, in) and dB (E, out, R), fp32, of the update, if there is one.
    fn factors(
        &self,
        rows: &Tensor,
        u: Option<Tensor>,
        dy: &Tensor,
        du: Option<Tensor>,
        sorted: &Sorted,
    ) -> Vec<Tensor> {
        let (Some(update), Some(u), Some(du)) = (&self.update, u, du) else { return Vec::new() };
        let da = sorted.outer_products(&du, &update.dropped(rows)).to_kind(Kind::Float);
        let db = sorted.outer_products(dy, &u).to_kind(Kind::Float) * update.scale;
        vec![da, db]
    }
}

impl Update {
    /// Rows with elements dropped and the rest scaled up; the same mask for the same seed, so it is never kept.
    fn dropped(&self, rows: &Tensor) -> Tensor {
        match self.dropout {
            Some((probability, seed)) => rows * keep_mask(rows, 1.0 - probability, seed) * (1.0 / (1.0 - probability)),
            None => rows.shallow_clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::LowRank;
    use crate::ops::testing::{check, randn};

    const T: i64 = 29;
    const D: i64 = 12;
    const F: i64 = 10;
    const E: i64 = 5;
    const C: i64 = 2;
    const RANK: i64 = 4;

    /// Experts 0 to 3: the last one has no row.
    fn chosen() -> Tensor {
        let pairs: Vec<i64> = (0..T).flat_map(|t| [t % 3, (t % 3 + 1 + t % 2) % 4]).collect();
        Tensor::from_slice(&pairs).view([T, C])
    }

    /// Shapes (out, in) of the banks, down last.
    fn shapes(fused: bool) -> Vec<(i64, i64)> {
        if fused { vec![(2 * F, D), (D, F)] } else { vec![(F, D), (F, D), (D, F)] }
    }

    fn weight(i: usize, (rows, columns): (i64, i64), kind: Kind) -> Tensor {
        (randn(&[E, rows, columns], 10 + i as u64) * 0.3).to_kind(kind)
    }

    fn bias(i: usize, rows: i64, kind: Kind) -> Tensor {
        randn(&[E, rows], 20 + i as u64).to_kind(kind)
    }

    /// Leaves: X, weights of the router, the residual, then A and B of each bank.
    fn leaves(fused: bool) -> Vec<Tensor> {
        let mut leaves = vec![randn(&[T, D], 1), randn(&[T, C], 2).abs() + 0.1, randn(&[T, D], 3)];
        for (i, (rows, columns)) in shapes(fused).into_iter().enumerate() {
            leaves.push(randn(&[E, RANK, columns], 30 + i as u64) * 0.3);
            leaves.push(randn(&[E, rows, RANK], 40 + i as u64) * 0.3);
        }
        leaves
    }

    /// Every expert over all tokens, under plain autograd; then the chosen ones are picked.
    fn twin(kind: Kind, x: &[Tensor], input: Fusion, weighted: Weighted, biased: bool) -> Tensor {
        let fused = !matches!(input, Fusion::Separate);
        let linear = |i: usize, e: i64, rows: &Tensor| {
            let shape = shapes(fused)[i];
            let y = rows.matmul(&weight(i, shape, kind).select(0, e).tr());
            let low = rows.matmul(&x[3 + 2 * i].select(0, e).tr()).matmul(&x[4 + 2 * i].select(0, e).tr()) * 1.5;
            let y = y + low;
            if biased { y + bias(i, shape.0, kind).select(0, e) } else { y }
        };
        let mut sum = x[2].shallow_clone();
        for (e, c) in (0..E).flat_map(|e| (0..C).map(move |c| (e, c))) {
            let here = chosen().select(1, c).eq(e).to_kind(kind).unsqueeze(1); // (T, 1)
            let weights = x[1].select(1, c).unsqueeze(1);
            let rows = if weighted == Weighted::Input { &x[0] * &weights } else { x[0].shallow_clone() };
            let (gate, up) = match input {
                Fusion::Separate => (linear(0, e, &rows), linear(1, e, &rows)),
                Fusion::Halves => {
                    let both = linear(0, e, &rows);
                    (both.narrow(1, 0, F), both.narrow(1, F, F))
                }
                Fusion::Interleaved => {
                    let both = linear(0, e, &rows).view([T, F, 2]);
                    (both.select(2, 0), both.select(2, 1))
                }
            };
            let y = linear(shapes(fused).len() - 1, e, &(gate.silu() * up));
            let y = if weighted == Weighted::Output { y * &weights } else { y };
            sum = y * here + sum;
        }
        sum
    }

    fn compare(input: Fusion, weighted: Weighted, biased: bool) {
        let fused = !matches!(input, Fusion::Separate);
        check(
            &leaves(fused),
            |kind, x| {
                let low_ranks: Vec<LowRank> = (0..shapes(fused).len())
                    .map(|i| LowRank {
                        a: x[3 + 2 * i].to_kind(Kind::Float),
                        b: x[4 + 2 * i].to_kind(Kind::Float),
                        scale: 1.5,
                        dropout: 0.0,
                    })
                    .collect();
                let tensors: Vec<(Weight, Tensor)> = shapes(fused)
                    .into_iter()
                    .enumerate()
                    .map(|(i, shape)| (weight(i, shape, kind).into(), bias(i, shape.0, kind)))
                    .collect();
                let operand = |i: usize| Operand {
                    weight: &tensors[i].0,
                    bias: biased.then_some(&tensors[i].1),
                    low_rank: Some(&low_ranks[i]),
                    dropout_seed: None,
                };
                let all = Experts {
                    activation: Activation::Silu,
                    input: match input {
                        Fusion::Separate => ExpertInput::Separate([operand(0), operand(1)]),
                        Fusion::Halves => ExpertInput::Fused { operand: operand(0), interleaved: false },
                        Fusion::Interleaved => ExpertInput::Fused { operand: operand(0), interleaved: true },
                    },
                    down: operand(tensors.len() - 1),
                    weighted,
                };
                vec![experts(&x[0], &chosen(), &x[1].to_kind(Kind::Float), &all, Some(&x[2]))]
            },
            |kind, x| vec![twin(kind, x, input, weighted, biased)],
        );
    }

    #[test]
    fn equal_every_expert_over_all_tokens_with_the_chosen_ones_picked() {
        for input in [Fusion::Separate, Fusion::Halves, Fusion::Interleaved] {
            for weighted in [Weighted::Output, Weighted::Input] {
                for biased in [false, true] {
                    compare(input, weighted, biased);
                }
            }
        }
    }

    #[test]
    fn dropped_rows_are_the_same_in_backward() {
        // With a probability of dropping, gradients by differences must still fit.
        let (rows, columns) = (F, D);
        let weight = weight(0, (rows, columns), Kind::Double).into();
        let low = |x: &[Tensor]| LowRank { a: x[1].shallow_clone(), b: x[2].shallow_clone(), scale: 0.7, dropout: 0.4 };
        let value = |x: &[Tensor]| {
            let low = low(x);
            let bank = Bank::of(&Operand { weight: &weight, bias: None, low_rank: Some(&low), dropout_seed: Some(9) });
            let sorted = Sorted::new(&chosen(), &weight);
            let (y, u) = bank.forward(&x[0], &sorted);
            let dy = y.ones_like();
            let (dx, du) = bank.backward(&dy, &sorted);
            let mut grads = vec![dx];
            grads.extend(bank.factors(&x[0], u, &dy, du, &sorted));
            (y.sum(Kind::Double).double_value(&[]), grads)
        };
        let double = |shape: &[i64], seed| randn(shape, seed).to_kind(Kind::Double);
        let x = [double(&[T * C, D], 1), double(&[E, RANK, D], 2), double(&[E, F, RANK], 3)];
        let (_, grads) = value(&x);
        for (i, at) in [(0, 17), (1, 5), (2, 40)] {
            let moved = |step: f64| {
                let mut copies: Vec<Tensor> = x.iter().map(Tensor::copy).collect();
                let flat = copies[i].view([-1]);
                let _ = flat.narrow(0, at, 1).g_add_scalar_(step);
                copies[i] = flat.view(x[i].size().as_slice());
                value(&copies).0
            };
            let slope = (moved(1e-4) - moved(-1e-4)) / 2e-4;
            let found = grads[i].view([-1]).double_value(&[at]);
            assert!(
                (slope - found).abs() < 1e-4 * slope.abs().max(1.0),
                "{i}: {slope} by differences, {found} by backward"
            );
        }
    }
}
