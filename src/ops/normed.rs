//! What a half of a block reads: the stream, to which what the half before gave is added, and the sum normed.
//!
//! One pass over memory writes the sum and the normed rows. One pass back makes the gradient of the stream: that of the normed rows, through
//! the norm, and that of the stream which goes on, added to it. The rows themselves are kept by no one: what reads them makes them again
//! from the stream, which is kept for the norm anyway.

use tch::{Kind, Tensor};

use super::Norm;
use super::norm::normed;
use crate::torch_ext::custom;

/// The stream between the halves of blocks: h (T, D), and what the last half gave (T, D), which is still to be added, times a factor.
#[derive(Debug)]
pub struct Flow {
    h: Tensor,
    given: Option<(Tensor, f64)>,
}

/// Rows (T, D) that operations read.
#[derive(Debug)]
pub struct Normed {
    rows: Tensor,
    source: Source,
}

/// How rows are had in backward. No graph.
#[derive(Debug)]
pub(super) enum Source {
    /// They are kept.
    Rows(Tensor),
    /// They are made again from what was normed (T, D) and its statistics (T, 2).
    Stream { norm: Norm, x: Tensor, stats: Tensor },
}

impl Flow {
    /// A stream (T, D) to which nothing is to be added.
    pub fn of(h: Tensor) -> Self {
        Self { h, given: None }
    }

    /// The stream `h` (T, D) with `given` (T, D) times `factor`.
    pub fn with(h: Tensor, given: Tensor, factor: f64) -> Self {
        Self { h, given: Some((given, factor)) }
    }

    /// The sum (T, D).
    pub fn joined(self) -> Tensor {
        match &self.given {
            None => self.h,
            Some((given, factor)) => sum(&self.h, given, *factor),
        }
    }

    /// The sum (T, D), and what is read of it: normed, where there is a norm.
    pub fn normed(self, norm: Option<&Norm>) -> (Tensor, Normed) {
        match norm {
            Some(norm) => {
                let (h, rows) = self.through(norm, true);
                (h.expect("it goes on"), rows)
            }
            None => {
                let h = self.joined();
                let rows = Normed::from(&h);
                (h, rows)
            }
        }
    }

    /// The sum normed, where the stream ends.
    pub fn ended(self, norm: &Norm) -> Normed {
        self.through(norm, false).1
    }

    /// The sum, if it goes on, and normed.
    fn through(self, norm: &Norm, goes_on: bool) -> (Option<Tensor>, Normed) {
        let Self { h, given } = self;
        let now = norm.as_it_is();
        let given_now = given.as_ref().map(|(given, factor)| (given, *factor));
        let (x, y, stats) = tch::no_grad(|| now.forward_of_sum(&h, given_now));
        let source = Source::Stream { norm: now, x: x.detach(), stats };

        let mut inputs = vec![&h];
        inputs.extend(given.as_ref().map(|(given, _)| given));
        inputs.extend(norm.leaves());
        let outputs = if goes_on { vec![x, y] } else { vec![y] };
        let factor = given.as_ref().map(|(_, factor)| *factor);
        let trained = norm.trained.as_ref().map(|trained| (trained.weight.size(), trained.bias.is_some()));
        let kept = source.handle();
        let mut outputs = custom(c"engraft::norm", &inputs, outputs, move |grads| {
            let Source::Stream { norm, x, stats } = kept else { unreachable!("made so above") };
            let (dy, of_stream) = match grads {
                [dx, dy] => (dy, Some(dx)),
                grads => (&grads[0], None),
            };
            let dx = norm.backward(dy, &x, &stats, of_stream);
            let mut all = vec![Some(dx.shallow_clone())];
            all.extend(factor.map(|factor| Some(if factor == 1.0 { dx.shallow_clone() } else { &dx * factor })));
            if let Some((shape, biased)) = &trained {
                // Each row's own, summed over the rows that share a weight.
                let dy = dy.to_kind(Kind::Float);
                let turns = [-1, norm.weight.size()[0], norm.weight.size()[1]];
                let dweight =
                    (&dy * normed(&x, &stats)).view(turns).sum_dim_intlist([0i64].as_slice(), false, Kind::Float);
                all.push(Some(dweight.view(&shape[..])));
                all.extend(biased.then(|| Some(dy.sum_dim_intlist([0i64].as_slice(), false, Kind::Float))));
            }
            all
        });
        let rows = outputs.pop().expect("normed rows");
        (outputs.pop(), Normed { rows, source })
    }
}

/// `h + given * factor` (T, D).
pub(super) fn sum(h: &Tensor, given: &Tensor, factor: f64) -> Tensor {
    if factor == 1.0 { h + given } else { h + given * factor }
}

impl Norm {
    /// x (T, D) normed, to be read. Differentiable in x and in what is trained of the norm.
    pub fn of(&self, x: &Tensor) -> Normed {
        Flow::of(x.shallow_clone()).ended(self)
    }

    /// The norm alone, differentiable in x (T, D) and in what is trained of it.
    pub fn apply(&self, x: &Tensor) -> Tensor {
        self.of(x).into_rows()
    }
}

impl Normed {
    /// The rows (T, D).
    pub fn rows(&self) -> &Tensor {
        &self.rows
    }

    /// The rows (T, D) alone.
    pub fn into_rows(self) -> Tensor {
        self.rows
    }

    pub(super) fn into_parts(self) -> (Tensor, Source) {
        (self.rows, self.source)
    }
}

impl Clone for Normed {
    /// Another handle to the same tensors.
    fn clone(&self) -> Self {
        Self { rows: self.rows.shallow_clone(), source: self.source.handle() }
    }
}

impl From<&Tensor> for Normed {
    /// Rows that no norm is before.
    fn from(rows: &Tensor) -> Self {
        Self { rows: rows.shallow_clone(), source: Source::Rows(rows.detach()) }
    }
}

impl From<&Normed> for Normed {
    /// Another handle to the same tensors.
    fn from(normed: &Normed) -> Self {
        normed.clone()
    }
}

impl Source {
    /// The rows (T, D).
    pub(super) fn rows(&self) -> Tensor {
        match self {
            Self::Rows(rows) => rows.shallow_clone(),
            Self::Stream { norm, x, stats } => norm.again(x, stats),
        }
    }

    fn handle(&self) -> Self {
        match self {
            Self::Rows(rows) => Self::Rows(rows.shallow_clone()),
            Self::Stream { norm, x, stats } => {
                Self::Stream { norm: norm.clone(), x: x.shallow_clone(), stats: stats.shallow_clone() }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::norm::tests::{rms, twin};
    use crate::ops::testing::{check, randn};
    use crate::ops::{Operand, projection};
    use crate::quant::Weight;

    #[test]
    fn a_sum_that_is_normed_and_goes_on_equals_plain_autograd() {
        for (factor, biased) in [(1.0, false), (0.22, true)] {
            let bias = biased.then(|| randn(&[35], 3));
            let norm = Norm { bias, centred: biased, ..rms(35, 1e-5) };
            check(
                &[randn(&[7, 35], 1), randn(&[7, 35], 4)],
                |_, x| {
                    let flow = Flow::with(x[0].shallow_clone(), x[1].shallow_clone(), factor);
                    let (h, rows) = flow.normed(Some(&norm));
                    vec![h, rows.rows().shallow_clone()]
                },
                |_, x| {
                    let h = &x[0] + &x[1] * factor;
                    let y = match &norm.bias {
                        Some(bias) => h.layer_norm([35], Some(&norm.weight.view([35])), Some(bias), 1e-5, false),
                        None => twin(&h, &norm.weight, 1e-5),
                    };
                    vec![h, y]
                },
            );
        }
    }

    /// Two halves, each read by a projection that makes its rows again, and a norm at the end.
    #[test]
    fn a_stream_through_two_halves_equals_plain_autograd() {
        let (norms, weight) = ([rms(24, 1e-5), rms(24, 1e-3)], |kind| (randn(&[24, 24], 9) * 0.2).to_kind(kind));
        check(
            &[randn(&[5, 24], 1)],
            |kind, x| {
                let weight = Weight::from(weight(kind));
                let operand =
                    Operand { weight: &weight, trained: None, bias: None, low_rank: None, dropout_seed: None };
                let mut flow = Flow::of(x[0].shallow_clone());
                for norm in &norms {
                    let (h, rows) = flow.normed(Some(norm));
                    let y = projection(&rows, &[operand], None).remove(0);
                    flow = Flow::with(h, y, 1.0);
                }
                vec![flow.ended(&norms[0]).rows().shallow_clone()]
            },
            |kind, x| {
                let mut h = x[0].shallow_clone();
                for norm in &norms {
                    h = &h + twin(&h, &norm.weight, norm.eps).matmul(&weight(kind).tr());
                }
                vec![twin(&h, &norms[0].weight, norms[0].eps)]
            },
        );
    }

    #[test]
    fn a_norm_that_is_trained_and_what_it_is_added_to_learn_as_by_plain_autograd() {
        check(
            &[randn(&[7, 10], 1), randn(&[7, 10], 2), randn(&[10], 3)],
            |_, x| {
                let trained = Some(crate::ops::TrainedNorm { weight: x[2].to_kind(Kind::Float), bias: None });
                let norm = Norm { trained, offset: 1.0, ..rms(10, 1e-5) };
                let flow = Flow::with(x[0].shallow_clone(), x[1].shallow_clone(), 1.0);
                let (h, rows) = flow.normed(Some(&norm));
                vec![h, rows.rows().shallow_clone()]
            },
            |_, x| {
                let h = &x[0] + &x[1];
                let y = twin(&h, &(x[2].to_kind(Kind::Float) + 1.0), 1e-5);
                vec![h, y]
            },
        );
    }
}
