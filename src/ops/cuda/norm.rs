//! RMSNorm and LayerNorm by `norm.cu`; shapes are those of `ops::norm`.

use tch::{Kind, Tensor};

use super::launch::{Argument, launch};
use super::{THREADS, team};

/// y (T, D) and each row's mean and 1/deviation (T, 2), of x (T, D), w (P, D) and b (D). Where something is given (T, D), and a factor of
/// it, x is the sum of the two, which comes first.
pub(crate) fn norm(
    x: &Tensor,
    given: Option<(&Tensor, f64)>,
    weight: &Tensor,
    bias: Option<&Tensor>,
    eps: f64,
    centred: bool,
) -> (Option<Tensor>, Tensor, Tensor) {
    let shape = Shape::of(x, weight, bias, centred);
    assert!(given.is_none_or(|(given, _)| given.size() == x.size()), "as much is given as there is");
    let (y, stats) = (x.empty_like(), Tensor::empty([shape.rows, 2], (Kind::Float, x.device())));
    let sum = given.map(|_| x.empty_like());
    let factor = given.map_or(1.0, |(_, factor)| factor as f32);
    let arguments = [
        x.into(),
        given.map(|(given, _)| given).into(),
        Argument::Float(factor),
        weight.into(),
        bias.into(),
        Argument::Float(eps as f32),
        shape.argument(),
        sum.as_ref().into(),
        (&y).into(),
        (&stats).into(),
    ];
    // SAFETY: what `norm` takes; the outputs were made for it.
    unsafe { launch(x.device(), "norm", x.kind(), shape.blocks(), &arguments) };
    (sum, y, stats)
}

/// y (T, D) of [`norm`] again, from the kept statistics (T, 2).
pub(crate) fn norm_again(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, stats: &Tensor) -> Tensor {
    let shape = Shape::of(x, weight, bias, false);
    let y = x.empty_like();
    let arguments = [x.into(), weight.into(), bias.into(), stats.into(), shape.argument(), (&y).into()];
    // SAFETY: what `norm_again` takes; the statistics are those that `norm` made of x.
    unsafe { launch(x.device(), "norm_again", x.kind(), shape.blocks(), &arguments) };
    y
}

/// dx (T, D) of [`norm`], with `more` (T, D) added if given.
pub(crate) fn norm_backward(
    dy: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    stats: &Tensor,
    centred: bool,
    more: Option<&Tensor>,
) -> Tensor {
    let shape = Shape::of(x, weight, None, centred);
    assert!(dy.size() == x.size() && more.is_none_or(|more| more.size() == x.size()), "a gradient of every number");
    let dx = x.empty_like();
    let arguments = [dy.into(), x.into(), weight.into(), stats.into(), more.into(), shape.argument(), (&dx).into()];
    // SAFETY: what `norm_backward` takes; sizes as just asserted.
    unsafe { launch(x.device(), "norm_backward", x.kind(), shape.blocks(), &arguments) };
    dx
}

/// The `Rows` of `norm.cu`.
struct Shape {
    rows: i64,
    width: i64,
    turns: i64,
    /// Threads to a row, a power of two up to a warp, or all of a block.
    team: i64,
    centred: bool,
}

impl Shape {
    fn of(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, centred: bool) -> Self {
        let (rows, width) = x.size2().expect("(T, D)");
        let turns = weight.numel() as i64 / width.max(1);
        assert!(turns > 0 && weight.numel() as i64 == turns * width, "a norm's weight is as wide as what it norms");
        assert!(weight.kind() == Kind::Float && bias.is_none_or(|bias| bias.kind() == Kind::Float), "weights in fp32");
        assert!(bias.is_none_or(|bias| bias.numel() as i64 == width), "a norm's bias is as wide as what it norms");
        Self { rows, width, turns, team: team(width, x.kind()), centred }
    }

    /// `Rows` as it lies in memory: a long number, then four short ones.
    fn argument(&self) -> Argument<'static> {
        let rows = self.rows as u64;
        let short = [self.width, self.turns, self.team, i64::from(self.centred)].map(|value| value as u32);
        Argument::Words([rows as u32, (rows >> 32) as u32].into_iter().chain(short).collect())
    }

    fn blocks(&self) -> i64 {
        let rows_of_a_block = THREADS / self.team;
        (self.rows + rows_of_a_block - 1) / rows_of_a_block
    }
}
