//! Low-rank linear projections of one input: `Y_i = X W_i^T + bias_i + s_i drop_i(X) A_i^T B_i^T (+ residual)`,
//! (arXiv:2106.09685).
//!
//! All projections that share X are one operation: X is kept once (before its norm, which is cheap to redo), the A
//! matrices are stacked so that X meets them in one product, and dX is summed in place. A frozen W costs one product
//! forward and one backward; no gradient of W is ever made and no copy of it kept: a quantised W is made whole for each product.

use tch::{Kind, Tensor};

use super::dropout::dropped;
use super::magnitude::{self, Decomposed, Lengthened, Magnitude};
use super::normed::Normed;
use super::update::Update;
use crate::quant::Weight;
use crate::torch_ext::custom;

/// A low-rank update, trained in fp32.
#[derive(Debug)]
pub struct LowRank {
    /// A (R, in), fp32, a leaf with gradient.
    pub a: Tensor,
    /// B (out, R), fp32, a leaf with gradient.
    pub b: Tensor,
    /// `lora_alpha / r`, or `/ sqrt(r)` when rank-stabilised.
    pub scale: f64,
    /// Probability of dropping an element of X before A.
    pub dropout: f64,
    /// The lengths of the rows of `W + s B A`, where they are trained.
    pub magnitude: Option<Magnitude>,
}

impl LowRank {
    /// `m / |V|` (out), fp32, of a weight (out, in), where magnitudes are trained. No graph.
    pub fn gains(&self, weight: &Tensor) -> Option<Tensor> {
        let Magnitude { lengths, squares } = self.magnitude.as_ref()?;
        Some(lengths.detach() / magnitude::lengths(weight, squares, &self.a, &(self.b.detach() * self.scale)))
    }

    /// Another handle to the same tensors.
    pub fn handle(&self) -> Self {
        let Self { a, b, scale, dropout, magnitude } = self;
        let magnitude = magnitude.as_ref().map(Magnitude::handle);
        Self { a: a.shallow_clone(), b: b.shallow_clone(), scale: *scale, dropout: *dropout, magnitude }
    }
}

/// What is trained of a weight itself.
#[derive(Debug)]
pub enum Trained {
    /// All of it.
    Whole {
        /// (out, in), fp32, a leaf with gradient; (D) or (P, D) where a norm is trained.
        weight: Tensor,
        /// (out), fp32, a leaf with gradient, where there is a bias.
        bias: Option<Tensor>,
    },
    /// Some of its rows.
    Rows {
        /// Which (K), i64.
        ids: Tensor,
        /// What they are (K, in), fp32, a leaf with gradient.
        rows: Tensor,
    },
}

impl Trained {
    /// Another handle to the same tensors.
    pub fn handle(&self) -> Self {
        match self {
            Self::Whole { weight, bias } => {
                Self::Whole { weight: weight.shallow_clone(), bias: bias.as_ref().map(Tensor::shallow_clone) }
            }
            Self::Rows { ids, rows } => Self::Rows { ids: ids.shallow_clone(), rows: rows.shallow_clone() },
        }
    }

    /// A weight (out, in) with it in place, in the weight's number type. No graph.
    pub fn whole(&self, weight: &Tensor) -> Tensor {
        match self {
            Self::Whole { weight: trained, .. } => trained.detach().to_kind(weight.kind()),
            Self::Rows { ids, rows } => weight.index_copy(0, ids, &rows.detach().to_kind(weight.kind())),
        }
    }

    /// The leaf that is the weight, or its rows.
    pub fn leaf(&self) -> &Tensor {
        match self {
            Self::Whole { weight, .. } => weight,
            Self::Rows { rows, .. } => rows,
        }
    }

    /// The bias, where that is trained, too.
    pub fn bias(&self) -> Option<&Tensor> {
        match self {
            Self::Whole { bias, .. } => bias.as_ref(),
            Self::Rows { .. } => None,
        }
    }

    /// All leaves, that of the weight first.
    pub fn leaves(&self) -> impl Iterator<Item = &Tensor> {
        [self.leaf()].into_iter().chain(self.bias())
    }
}

/// One of the projections of X.
#[derive(Debug, Clone, Copy)]
pub struct Operand<'a> {
    /// W (out, in), frozen.
    pub weight: &'a Weight,
    /// What is trained in its place.
    pub trained: Option<&'a Trained>,
    /// (out), frozen.
    pub bias: Option<&'a Tensor>,
    /// The update, if any.
    pub low_rank: Option<&'a LowRank>,
    /// Seed of this projection's dropout mask; `None` when nothing is dropped.
    pub dropout_seed: Option<u64>,
}

impl<'a> Operand<'a> {
    /// W (out, in) as it is now, without its update, in the compute type. No graph.
    pub fn whole(&self) -> Tensor {
        let weight = self.weight.dense();
        self.trained.map_or_else(|| weight.shallow_clone(), |trained| trained.whole(&weight))
    }

    /// Everything of it that is trained, in the order in which gradients are returned.
    pub(crate) fn factors(&self) -> impl Iterator<Item = &'a Tensor> + use<'a> {
        let own = self.trained.into_iter().flat_map(Trained::leaves);
        let factors = self.low_rank.into_iter().flat_map(|l| {
            let lengths = l.magnitude.as_ref().map(|magnitude| &magnitude.lengths);
            [&l.a, &l.b].into_iter().chain(lengths)
        });
        own.chain(factors)
    }
}

/// Projects rows (T, in) by every operand; `residual` (T, out) is added to the only one.
pub fn projection(input: impl Into<Normed>, operands: &[Operand<'_>], residual: Option<&Tensor>) -> Vec<Tensor> {
    let (input, source) = input.into().into_parts();
    let group = Group::of(operands);
    let (outputs, kept) = tch::no_grad(|| group.forward(&input, residual));

    let mut inputs = vec![&input];
    inputs.extend(residual);
    inputs.extend(factors(operands));
    let wants_dx = input.requires_grad();
    let has_residual = residual.is_some();
    custom(c"engraft::projection", &inputs, outputs, move |grads| {
        let (dx, dfactors) = group.backward(|_| source.rows(), &kept, grads, wants_dx);
        let mut out = vec![dx];
        if has_residual {
            out.push(Some(grads[0].shallow_clone()));
        }
        out.extend(dfactors.into_iter().map(Some));
        out
    })
}

/// What is trained of every operand, in the order in which gradients are returned.
pub(super) fn factors<'a>(operands: &[Operand<'a>]) -> Vec<&'a Tensor> {
    operands.iter().flat_map(Operand::factors).collect()
}

/// Projections of one X: what their forward and backward read. Holds handles to frozen tensors, never copies of them.
pub(super) struct Group {
    members: Vec<Member>,
    /// Every A on top of the next: (sum of R, in), in the compute type.
    a: Option<Tensor>,
}

struct Member {
    weight: Weight,
    trained: Part,
    bias: Option<Tensor>,
    update: Option<Update>,
    /// What DoRA needs beside the update.
    decomposed: Option<Decomposed>,
}

/// How much of a weight is trained.
enum Part {
    Nothing,
    /// All, and whether the bias is.
    Whole(bool),
    /// Rows by number (K), as they are now (K, in) in the compute type.
    Rows(Tensor, Tensor),
}

/// What a forward leaves for the backward.
pub(super) struct Kept {
    /// U (T, sum of R) with `U_i = drop_i(X) A_i^T`.
    u: Option<Tensor>,
    /// For each member.
    decomposed: Vec<Option<Lengthened>>,
}

impl Group {
    pub(super) fn of(operands: &[Operand<'_>]) -> Self {
        let (updates, a) = Update::of(operands);
        let member = |(operand, update): (&Operand<'_>, Option<Update>)| {
            let kind = operand.weight.kind();
            let (weight, trained) = match operand.trained {
                None => (operand.weight.handle(), Part::Nothing),
                Some(Trained::Whole { weight, bias }) => {
                    (Weight::Dense(weight.detach().to_kind(kind)), Part::Whole(bias.is_some()))
                }
                Some(Trained::Rows { ids, rows }) => {
                    let rows = Part::Rows(ids.shallow_clone(), rows.detach().to_kind(kind));
                    (operand.weight.handle(), rows)
                }
            };
            let decomposed = operand.low_rank.and_then(Decomposed::of);
            let trained_bias = operand.trained.and_then(Trained::bias).map(|bias| bias.detach().to_kind(kind));
            let bias = trained_bias.or_else(|| operand.bias.map(Tensor::shallow_clone));
            Member { weight, trained, bias, update, decomposed }
        };
        Self { members: operands.iter().zip(updates).map(member).collect(), a }
    }

    /// Every Y_i (T, out_i), and what the backward needs.
    pub(super) fn forward(&self, x: &Tensor, residual: Option<&Tensor>) -> (Vec<Tensor>, Kept) {
        assert!(residual.is_none() || self.members.len() == 1, "a residual is added to one projection");
        let u = self.a.as_ref().map(|a| self.down(x, a));
        let (outputs, decomposed) = self.members.iter().map(|member| member.forward(x, u.as_ref(), residual)).collect();
        (outputs, Kept { u, decomposed })
    }

    /// The only Y (T, out) in fp32, where nothing but a weight in half precision makes it; and what the backward needs.
    pub(super) fn wide_product(&self, x: &Tensor) -> Option<(Tensor, Kept)> {
        let [Member { weight, trained: Part::Nothing, bias: None, update: None, .. }] = &self.members[..] else {
            return None;
        };
        let served = weight.kind() != Kind::Float && !weight.is_multiplied();
        served.then(|| (weight.wide_product(x), Kept { u: None, decomposed: vec![None] }))
    }

    /// dX (T, in) when wanted, and the gradients of [`factors`], fp32, from every dY_i (T, out_i).
    ///
    /// With dU_i = dZ_i s_i B_i: `dA_i = dU_i^T drop_i(X)`, `dB_i = s_i dZ_i^T U_i`, `dX = sum_i dZ_i W_i + drop_i(dU_i A_i)`, and
    /// `dW_i = dY_i^T X` where W_i is trained. dZ_i is dY_i, or `dY_i m_i / |V_i|` where a magnitude is trained; then
    /// `dm_i = sum_t dY_i Z_i / |V_i|`.
    ///
    /// `x` makes X again; it is called once, at the end, with dX.
    pub(super) fn backward(
        &self,
        x: impl FnOnce(Option<&Tensor>) -> Tensor,
        kept: &Kept,
        grads: &[Tensor],
        wants_dx: bool,
    ) -> (Option<Tensor>, Vec<Tensor>) {
        let sides: Vec<Side<'_>> = self
            .members
            .iter()
            .zip(grads)
            .zip(&kept.decomposed)
            .map(|((m, dy), d)| Side::new(m, dy, d.as_ref()))
            .collect();
        let du: Vec<Option<Tensor>> =
            sides.iter().map(|side| side.update().map(|update| side.dz.mm(&update.scaled_b))).collect(); // (T, R) each
        let together = sides.iter().filter_map(Side::update).all(|update| update.dropout.is_none());
        let all_du = || match &du[..] {
            [Some(du)] => du.shallow_clone(),
            du => Tensor::cat(&du.iter().flatten().collect::<Vec<_>>(), 1), // (T, sum of R)
        };
        let all_du = self.a.as_ref().filter(|_| together).map(|a| (all_du(), a));
        // What is thin first, as in forward.
        let mut dx = all_du.as_ref().filter(|_| wants_dx).map(|(all_du, a)| all_du.mm(a));
        for side in sides.iter().filter(|_| wants_dx) {
            dx = Some(side.through_weight(dx.take()));
        }
        let all_du = all_du.map(|(all_du, _)| all_du);
        if let Some(a) = self.a.as_ref().filter(|_| !together && wants_dx) {
            for (side, du) in sides.iter().zip(&du) {
                let (Some(update), Some(du)) = (side.update(), du) else { continue };
                let through_a = dropped(&side.through_dropout(&du.mm(&update.rows_of(a))), update.dropout);
                dx = Some(dx.expect("wanted, so made above") + through_a);
            }
        }
        let x = x(dx.as_ref());
        let all_da = all_du.map(|du| du.tr().mm(&x)); // (sum of R, in)
        let mut factors = Vec::new();
        for (side, du) in sides.iter().zip(&du) {
            factors.extend(side.dweight(&x));
            factors.extend(side.dbias());
            let (Some(update), Some(du), Some(u)) = (side.update(), du, &kept.u) else { continue };
            let da = match &all_da {
                Some(all_da) => update.rows_of(all_da),
                None => du.tr().mm(&dropped(&x, update.dropout)),
            };
            let db = update.db(&side.dz.tr().mm(&update.columns(u)));
            factors.extend([da.to_kind(Kind::Float), db]);
            factors.extend(side.dlengths());
        }
        (dx, factors)
    }

    fn down(&self, x: &Tensor, a: &Tensor) -> Tensor {
        let updates: Vec<&Update> = self.members.iter().filter_map(|m| m.update.as_ref()).collect();
        if updates.iter().all(|update| update.dropout.is_none()) {
            return x.mm(&a.tr());
        }
        let parts: Vec<Tensor> = updates.iter().map(|u| dropped(x, u.dropout).mm(&u.rows_of(a).tr())).collect();
        Tensor::cat(&parts, 1)
    }
}

impl Member {
    /// Y (T, out), `u` being that of all members.
    fn forward(&self, x: &Tensor, u: Option<&Tensor>, residual: Option<&Tensor>) -> (Tensor, Option<Lengthened>) {
        let added = match (residual, &self.bias) {
            (Some(residual), Some(bias)) => Some(residual + bias),
            (Some(added), None) | (None, Some(added)) => Some(added.shallow_clone()),
            (None, None) => None,
        };
        let update = self.update.as_ref().zip(u);
        if let Some((update, u)) = update
            && let Some(decomposed) = &self.decomposed
        {
            let low_rank = (&update.columns(u), &update.scaled_b);
            let (y, kept) = decomposed.forward(x, &self.weight, low_rank, update.dropout, added);
            return (y, Some(kept));
        }
        // The update first: a large product reads what it is added to while it computes, a thin one would wait for it.
        let mut y = match update {
            Some((update, u)) => {
                let (u, b) = (update.columns(u), update.scaled_b.tr());
                let onto = added.map_or_else(|| u.mm(&b), |added| added.addmm(&u, &b));
                self.weight.product_onto(x, onto)
            }
            None => self.weight.product(x, added),
        };
        if let Part::Rows(ids, rows) = &self.trained {
            let _ = y.index_copy_(1, ids, &x.mm(&rows.tr()));
        }
        (y, None)
    }
}

/// `onto + left right`, in place where there is something to add to.
fn with_product(onto: Option<Tensor>, left: &Tensor, right: &Tensor) -> Tensor {
    match onto {
        Some(mut onto) => onto.addmm_(left, right),
        None => left.mm(right),
    }
}

/// A member in the backward.
struct Side<'a> {
    member: &'a Member,
    dy: &'a Tensor,
    /// The gradient of `drop(X) W^T + s U B^T`.
    dz: Tensor,
    decomposed: Option<&'a Lengthened>,
}

impl<'a> Side<'a> {
    fn new(member: &'a Member, dy: &'a Tensor, decomposed: Option<&'a Lengthened>) -> Self {
        let dz = decomposed.map_or_else(|| dy.shallow_clone(), |kept| kept.through_lengths(dy));
        Self { member, dy, dz, decomposed }
    }

    fn update(&self) -> Option<&'a Update> {
        self.member.update.as_ref()
    }

    /// `onto`, and what reaches X through W, as far as nothing of X was dropped.
    fn through_weight(&self, onto: Option<Tensor>) -> Tensor {
        let weight = &self.member.weight;
        match &self.member.trained {
            Part::Rows(ids, rows) => {
                let onto = weight.product_back(&self.dy.index_fill(1, ids, 0.0), onto);
                with_product(Some(onto), &self.dy.index_select(1, ids), rows)
            }
            Part::Nothing | Part::Whole(_) if self.drops() => weight.product_back(self.dy, onto),
            Part::Nothing | Part::Whole(_) => weight.product_back(&self.dz, onto),
        }
    }

    /// What reaches `drop(X)`: `through_a`, and through W, where its product of what is left counts otherwise than that of all.
    fn through_dropout(&self, through_a: &Tensor) -> Tensor {
        match self.decomposed.filter(|_| self.drops()) {
            Some(_) => self.member.weight.product_back(&(&self.dz - self.dy), Some(through_a.copy())),
            None => through_a.shallow_clone(),
        }
    }

    fn drops(&self) -> bool {
        self.update().is_some_and(|update| update.dropout.is_some())
    }

    /// The gradient of the weight (out, in), or of its trained rows (K, in), fp32.
    fn dweight(&self, x: &Tensor) -> Option<Tensor> {
        let dy = match &self.member.trained {
            Part::Nothing => return None,
            Part::Whole(_) => self.dy.shallow_clone(),
            Part::Rows(ids, _) => self.dy.index_select(1, ids),
        };
        Some(dy.tr().mm(x).to_kind(Kind::Float))
    }

    /// The gradient of the bias (out), fp32, where it is trained.
    fn dbias(&self) -> Option<Tensor> {
        let trained = matches!(self.member.trained, Part::Whole(true));
        trained.then(|| self.dy.sum_dim_intlist([0i64].as_slice(), false, Kind::Float))
    }

    /// dm (out), fp32.
    fn dlengths(&self) -> Option<Tensor> {
        self.decomposed.map(|kept| kept.dlengths(self.dy))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::norm::tests::{rms, twin as norm_twin};
    use crate::ops::testing::{check, randn};
    use crate::quant::{Fp8, Quantised};
    use crate::torch_ext::keep_mask;

    const T: i64 = 19;
    const D: i64 = 24;
    const OUT: [i64; 3] = [24, 8, 40];
    const RANK: i64 = 4;

    fn weight(i: usize, kind: Kind) -> Tensor {
        (randn(&[OUT[i], D], 10 + i as u64) * 0.2).to_kind(kind)
    }

    fn bias(i: usize, kind: Kind) -> Tensor {
        randn(&[OUT[i]], 20 + i as u64).to_kind(kind)
    }

    /// Leaves: X, then A and B of three projections, then a residual. A and B stay fp32 in every run, as in training.
    fn leaves(outputs: &[i64]) -> Vec<Tensor> {
        let mut leaves = vec![randn(&[T, D], 1)];
        for (i, out) in outputs.iter().enumerate() {
            leaves.push(randn(&[RANK, D], 30 + i as u64) * 0.3);
            leaves.push(randn(&[*out, RANK], 40 + i as u64) * 0.3);
        }
        leaves
    }

    fn low_rank(leaves: &[Tensor], i: usize, dropout: f64) -> LowRank {
        let handle = |t: &Tensor| t.to_kind(Kind::Float);
        LowRank { a: handle(&leaves[1 + 2 * i]), b: handle(&leaves[2 + 2 * i]), scale: 1.5, dropout, magnitude: None }
    }

    fn plain(x: &Tensor, w: &Tensor, l: Option<&LowRank>, seed: Option<u64>) -> Tensor {
        let y = x.matmul(&w.tr());
        let Some(l) = l else { return y };
        let dropped = match seed {
            Some(seed) if l.dropout > 0.0 => x * keep_mask(x, 1.0 - l.dropout, seed) / (1.0 - l.dropout),
            _ => x.shallow_clone(),
        };
        y + dropped.matmul(&l.a.tr()).matmul(&l.b.tr()) * l.scale
    }

    #[test]
    fn three_projections_after_a_norm_equal_plain_autograd() {
        for dropout in [0.0, 0.3] {
            let norm = rms(D, 1e-6);
            check(
                &leaves(&OUT),
                |kind, x| {
                    let low_ranks: Vec<LowRank> = (0..3).map(|i| low_rank(x, i, dropout)).collect();
                    let weights: Vec<Weight> = (0..3).map(|i| weight(i, kind).into()).collect();
                    let biases: Vec<Tensor> = (0..3).map(|i| bias(i, kind)).collect();
                    let operands: Vec<Operand> = (0..3)
                        .map(|i| Operand {
                            weight: &weights[i],
                            trained: None,
                            bias: (i != 1).then_some(&biases[i]),
                            low_rank: Some(&low_ranks[i]),
                            dropout_seed: Some(70 + i as u64),
                        })
                        .collect();
                    projection(norm.of(&x[0]), &operands, None)
                },
                |kind, x| {
                    let normed = norm_twin(&x[0], &norm.weight, 1e-6);
                    (0..3)
                        .map(|i| {
                            let l = low_rank(x, i, dropout);
                            let y = plain(&normed, &weight(i, kind), Some(&l), Some(70 + i as u64));
                            if i == 1 { y } else { y + bias(i, kind) }
                        })
                        .collect()
                },
            );
        }
    }

    #[test]
    fn one_adapter_among_bare_projections_equals_plain_autograd() {
        check(
            &leaves(&OUT[..1]),
            |kind, x| {
                let low_rank = low_rank(x, 0, 0.0);
                let weights: Vec<Weight> = (0..2).map(|i| weight(i, kind).into()).collect();
                let bare =
                    Operand { weight: &weights[1], trained: None, bias: None, low_rank: None, dropout_seed: None };
                let adapted = Operand {
                    weight: &weights[0],
                    trained: None,
                    bias: None,
                    low_rank: Some(&low_rank),
                    dropout_seed: None,
                };
                projection(&x[0], &[bare, adapted], None)
            },
            |kind, x| {
                let l = low_rank(x, 0, 0.0);
                vec![plain(&x[0], &weight(1, kind), None, None), plain(&x[0], &weight(0, kind), Some(&l), None)]
            },
        );
    }

    #[test]
    fn a_residual_and_a_bias_equal_plain_autograd() {
        let mut inputs = leaves(&OUT[..1]);
        inputs.push(randn(&[T, OUT[0]], 9));
        check(
            &inputs,
            |kind, x| {
                let (low_rank, weight, bias) = (low_rank(x, 0, 0.0), Weight::from(weight(0, kind)), bias(0, kind));
                let operand = Operand {
                    weight: &weight,
                    trained: None,
                    bias: Some(&bias),
                    low_rank: Some(&low_rank),
                    dropout_seed: None,
                };
                projection(&x[0], &[operand], Some(&x[3]))
            },
            |kind, x| {
                let l = low_rank(x, 0, 0.0);
                vec![plain(&x[0], &weight(0, kind), Some(&l), None) + bias(0, kind) + &x[3]]
            },
        );
    }

    /// Products with fp8 codes stand where those of whole numbers did, forward and backward, with a magnitude or without.
    #[test]
    fn a_weight_whose_codes_are_multiplied_gives_its_products_in_both_directions() {
        let leaves: Vec<Tensor> = leaves(&OUT[..1]).into_iter().map(|leaf| leaf.set_requires_grad(true)).collect();
        let codes = || Fp8 { multiplied: true, ..Fp8::of(&weight(0, Kind::Float)) };
        let (frozen, bias) = (Weight::from(Quantised::Fp8(codes())), bias(0, Kind::Float));
        let dy = randn(&[T, OUT[0]], 8);
        let (x, a, b) = (&leaves[0], leaves[1].detach(), leaves[2].detach());
        for lengths in [None, Some(randn(&[OUT[0]], 50).abs() + 0.3)] {
            let squares = magnitude::squares(&frozen);
            let magnitude = lengths.as_ref().map(|lengths| Magnitude { lengths: lengths.shallow_clone(), squares });
            let low_rank = LowRank { magnitude, ..low_rank(&leaves, 0, 0.0) };
            let gain = low_rank
                .gains(&frozen.dense())
                .unwrap_or_else(|| Tensor::ones([OUT[0]], (Kind::Float, tch::Device::Cpu)));
            let operand = Operand {
                weight: &frozen,
                trained: None,
                bias: Some(&bias),
                low_rank: Some(&low_rank),
                dropout_seed: None,
            };
            let y = projection(x, &[operand], None).remove(0);
            let update = x.detach().mm(&a.tr()).mm(&b.tr()) * 1.5;
            let expected = (codes().product(&x.detach()) + update) * &gain + &bias;
            let close = |found: &Tensor, expected: &Tensor, what: &str| {
                let off = (found - expected).abs().max().double_value(&[]) / expected.abs().max().double_value(&[]);
                assert!(off < 1e-5, "{what}: {off:e}");
            };
            close(&y.detach(), &expected, "Y");
            let [dx, da] = Tensor::run_backward(&[(&y * &dy).sum(Kind::Float)], &[x, &leaves[1]], false, false)
                .try_into()
                .unwrap();
            let dz = &dy * &gain;
            close(&dx, &(codes().product_back(&dz) + dz.mm(&b).mm(&a) * 1.5), "dX");
            close(&da, &(dz.mm(&b).tr().mm(&x.detach()) * 1.5), "dA");
        }
    }

    #[test]
    fn trained_lengths_equal_plain_autograd() {
        for dropout in [0.0, 0.3] {
            let mut inputs = leaves(&OUT[..1]);
            inputs.push(randn(&[OUT[0]], 50).abs() + 0.3);
            let residual = randn(&[T, OUT[0]], 9);
            check(
                &inputs,
                |kind, x| {
                    let (weight, bias) = (Weight::from(weight(0, kind)), bias(0, kind));
                    let squares = magnitude::squares(&weight);
                    let magnitude = Some(Magnitude { lengths: x[3].to_kind(Kind::Float), squares });
                    let low_rank = LowRank { magnitude, ..low_rank(x, 0, dropout) };
                    let operand = Operand {
                        weight: &weight,
                        trained: None,
                        bias: Some(&bias),
                        low_rank: Some(&low_rank),
                        dropout_seed: Some(70),
                    };
                    projection(&x[0], &[operand], Some(&residual.to_kind(kind)))
                },
                |kind, x| {
                    let (w, l) = (weight(0, kind), low_rank(x, 0, dropout));
                    let whole = &w + l.b.matmul(&l.a) * l.scale;
                    let found = whole.norm_scalaropt_dim(2.0, [1i64].as_slice(), false).detach();
                    let gain = &x[3] / found;
                    let dropped = match dropout {
                        0.0 => x[0].shallow_clone(),
                        p => &x[0] * keep_mask(&x[0], 1.0 - p, 70) / (1.0 - p),
                    };
                    let frozen = x[0].matmul(&w.tr()) - dropped.matmul(&w.tr());
                    let adapted = dropped.matmul(&w.tr()) + dropped.matmul(&l.a.tr()).matmul(&l.b.tr()) * l.scale;
                    vec![frozen + adapted * gain + bias(0, kind) + residual.to_kind(kind)]
                },
            );
        }
    }

    #[test]
    fn a_weight_or_some_of_its_rows_are_trained_as_by_plain_autograd() {
        let (ids, third) = (Tensor::from_slice(&[5i64, 0, 17]), 3);
        check(
            &[randn(&[T, D], 1), randn(&[OUT[0], D], 2) * 0.2, randn(&[third, D], 3) * 0.2, randn(&[OUT[0]], 4)],
            |kind, x| {
                let weights: Vec<Weight> = (0..2).map(|i| weight(i, kind).into()).collect();
                let fp32 = |t: &Tensor| t.to_kind(Kind::Float);
                let whole = Trained::Whole { weight: fp32(&x[1]), bias: None };
                let with_bias = Trained::Whole { weight: fp32(&x[1]), bias: Some(fp32(&x[3])) };
                let rows = Trained::Rows { ids: ids.shallow_clone(), rows: fp32(&x[2]) };
                let bias = bias(0, kind);
                let of = |weight, trained, bias| Operand { weight, trained, bias, low_rank: None, dropout_seed: None };
                let [whole, mixed] = [of(&weights[0], Some(&whole), Some(&bias)), of(&weights[0], Some(&rows), None)];
                let with_bias = of(&weights[0], Some(&with_bias), Some(&bias));
                projection(&x[0], &[whole, mixed, of(&weights[1], None, None), with_bias], None)
            },
            |kind, x| {
                let mixed = weight(0, kind).index_copy(0, &ids, &x[2].to_kind(kind));
                vec![
                    x[0].matmul(&x[1].to_kind(kind).tr()) + bias(0, kind),
                    x[0].matmul(&mixed.tr()),
                    x[0].matmul(&weight(1, kind).tr()),
                    x[0].matmul(&x[1].to_kind(kind).tr()) + x[3].to_kind(kind),
                ]
            },
        );
    }
}
