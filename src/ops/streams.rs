//! Several copies of the stream (arXiv:2409.19606, arXiv:2512.24880): what is read from M copies h (T, M, D), and how what a half of
//! a block gives is written back to them. What is computed, [`crate::model::spec::StreamMix`] says.
//!
//! Kept for backward are the copies themselves, which both operations share, and the few numbers of each token's weights, in fp32.
//! The rounds that normalise a token's M x M matrix are made again in backward and walked back one by one.

use tch::{Kind, Tensor};

use super::cpu;
use crate::torch_ext::custom;

/// From the copies of a token to numbers: `scale * (function (h / rms(h))) + base`, h flattened.
#[derive(Debug)]
pub struct StreamMap {
    /// (numbers, M D), fp32.
    pub function: Tensor,
    /// (numbers), fp32.
    pub base: Tensor,
    /// (numbers), fp32: each number's own factor.
    pub scale: Tensor,
    /// Added to the mean square.
    pub eps: f64,
}

/// A map, and what its numbers become.
#[derive(Debug)]
pub struct Streams {
    /// To M numbers for reading alone, or M + M + M M for reading, writing and mixing.
    pub map: StreamMap,
    /// Added to weights.
    pub floor: f64,
    /// How often the columns of the mixing matrix are normalised.
    pub rounds: i64,
}

/// How a half writes to the copies: each token's own weights, fp32.
#[derive(Debug)]
pub struct Spread {
    /// (T, M): what the half gives goes to copy m with this weight.
    pub post: Tensor,
    /// (T, M, M): element (k, m) is how much of copy k goes to copy m.
    pub mix: Tensor,
}

impl Clone for StreamMap {
    /// Another handle to the same tensors.
    fn clone(&self) -> Self {
        Self {
            function: self.function.shallow_clone(),
            base: self.base.shallow_clone(),
            scale: self.scale.shallow_clone(),
            ..*self
        }
    }
}

impl Clone for Streams {
    /// Another handle to the same tensors.
    fn clone(&self) -> Self {
        Self { map: self.map.clone(), ..*self }
    }
}

/// What a map makes of h, and its backward reads besides.
struct Mapped {
    /// (T, numbers): function h, before it is normed.
    products: Tensor,
    /// (T, 1): the sum of squares of h.
    squares: Tensor,
}

impl StreamMap {
    fn forward(&self, h: &Tensor) -> Mapped {
        let (products, squares) = if cpu::serves(&[h]) {
            cpu::streams::mapped(h, &self.function)
        } else {
            let wide = h.flatten(1, 2).to_kind(Kind::Float); // (T, M D)
            (wide.mm(&self.function.tr()), wide.norm_scalaropt_dim(2, [1i64].as_slice(), true).square())
        };
        Mapped { products, squares }
    }

    /// 1 / rms (T, 1).
    fn inverse(&self, mapped: &Mapped) -> Tensor {
        (&mapped.squares / self.width() as f64 + self.eps).rsqrt()
    }

    /// The numbers (T, numbers).
    fn numbers(&self, mapped: &Mapped) -> Tensor {
        &mapped.products * self.inverse(mapped) * &self.scale + &self.base
    }

    /// From the gradient of the numbers that of h, as `weights` (T, numbers) `function + factor` (T, 1) `h`, fp32.
    ///
    /// With z = function h and r = 1 / rms(h): `dh = (r scale dn) function - (r^3 / (M D)) (scale dn . z) h`.
    fn backward(&self, dnumbers: &Tensor, mapped: &Mapped) -> [Tensor; 2] {
        let (scaled, inverse) = (dnumbers * &self.scale, self.inverse(mapped));
        let along = (&scaled * &mapped.products).sum_dim_intlist([1i64].as_slice(), true, Kind::Float); // (T, 1)
        let factor = along * inverse.pow_tensor_scalar(3) / -(self.width() as f64);
        [scaled * inverse, factor]
    }

    /// M D.
    fn width(&self) -> i64 {
        self.function.size()[1]
    }

    /// dh (T, M, D) of what is read of h (T, M, D) by the weights `pre` (T, M), from what [`StreamMap::backward`] gave and the gradient
    /// of what was read, dx (T, D), with `more` (T, M, D) if given.
    fn read_gradient(
        &self,
        [weights, factor]: [Tensor; 2],
        (h, pre): (&Tensor, &Tensor),
        dx: &Tensor,
        more: Option<&Tensor>,
    ) -> Tensor {
        let contiguous = more.map(Tensor::contiguous);
        let more = contiguous.as_ref();
        if cpu::serves(&[dx, h]) && more.is_none_or(|more| cpu::serves(&[h, more])) {
            let of = cpu::streams::ReadGradient { weights: &weights, function: &self.function, factor: &factor, pre };
            return cpu::streams::read_gradient(&of, h, dx, more);
        }
        let through_map = weights.mm(&self.function).view_as(h) + h.to_kind(Kind::Float) * factor.unsqueeze(2);
        let dh = through_map + pre.unsqueeze(2) * dx.to_kind(Kind::Float).unsqueeze(1);
        more.map_or_else(|| dh.shallow_clone(), |more| &dh + more).to_kind(h.kind())
    }
}

impl Streams {
    /// The M copies of `h` (T, M, D) read as one (T, D), by a map to M numbers.
    pub fn gather(&self, h: &Tensor) -> Tensor {
        let (x, pre, mapped) = tch::no_grad(|| {
            let mapped = self.map.forward(h);
            let pre = self.map.numbers(&mapped).sigmoid() + self.floor;
            (read(h, &pre), pre, mapped)
        });
        let (streams, h_kept) = (self.clone(), h.detach());
        custom(c"engraft::gather_streams", &[h], vec![x], move |grads| {
            let dnumbers = products_with_copies(&grads[0], &h_kept) * sigmoid_slope(&(&pre - streams.floor));
            let of_map = streams.map.backward(&dnumbers, &mapped);
            vec![Some(streams.map.read_gradient(of_map, (&h_kept, &pre), &grads[0], None))]
        })
        .remove(0)
    }

    /// What a half reads of the M copies of `h` (T, M, D), (T, D), and how it is to write to them: to `h` as it is returned last, so that
    /// both gradients of the copies are made in one go.
    pub fn enter(&self, h: &Tensor) -> (Tensor, Spread, Tensor) {
        let copies = h.size()[1];
        let (outputs, pre, mapped) = tch::no_grad(|| {
            let mapped = self.map.forward(h);
            let [pre, post, mix] = self.weights(&mapped, copies);
            (vec![read(h, &pre), post, mix, h.shallow_clone()], pre, mapped)
        });
        let (streams, h_kept) = (self.clone(), h.detach());
        let mut outputs = custom(c"engraft::enter_streams", &[h], outputs, move |grads| {
            let [dx, dpost, dmix, dh] = grads else { unreachable!("four outputs") };
            let dpre = products_with_copies(dx, &h_kept);
            let of_map = streams.weights_backward([&dpre, dpost, dmix], &mapped, copies);
            vec![Some(streams.map.read_gradient(of_map, (&h_kept, &pre), dx, Some(dh)))]
        });
        let mut next = || outputs.pop().expect("four outputs");
        let (h, mix, post, x) = (next(), next(), next(), next());
        (x, Spread { post, mix }, h)
    }

    /// The weights to read with and to write with (T, M), and to mix with (T, M, M).
    fn weights(&self, mapped: &Mapped, copies: i64) -> [Tensor; 3] {
        if cpu::serves(&[&mapped.products, &mapped.squares]) {
            return cpu::stream_weights::weights(&mapped.products, &mapped.squares, self.rules(copies));
        }
        let [a, b, c] = self.parts(&self.map.numbers(mapped), copies);
        let mix = self.normalised(&c, copies, &mut |_| ());
        [a.sigmoid() + self.floor, b.sigmoid() * 2.0, mix.permute([2, 0, 1]).contiguous()]
    }

    /// What [`StreamMap::backward`] gives, from the gradients of [`Streams::weights`].
    fn weights_backward(&self, gradients: [&Tensor; 3], mapped: &Mapped, copies: i64) -> [Tensor; 2] {
        if cpu::serves(&[&mapped.products, &mapped.squares]) {
            let gradients = gradients.map(Tensor::contiguous);
            let Mapped { products, squares } = mapped;
            return cpu::stream_weights::weights_backward(gradients.each_ref(), products, squares, self.rules(copies));
        }
        let [dpre, dpost, dmix] = gradients;
        let [a, b, c] = self.parts(&self.map.numbers(mapped), copies);
        let da = dpre * sigmoid_slope(&a.sigmoid());
        let db = dpost * sigmoid_slope(&b.sigmoid()) * 2.0;
        let dc = self.normalised_backward(dmix, &c, copies); // (T, M M)
        self.map.backward(&Tensor::cat(&[da, db, dc], 1), mapped)
    }

    fn rules(&self, copies: i64) -> cpu::stream_weights::Rules<'_> {
        let StreamMap { base, scale, eps, .. } = &self.map;
        let (width, rounds) = (self.map.width() as usize, self.rounds);
        cpu::stream_weights::Rules { scale, base, copies: copies as usize, width, eps: *eps, floor: self.floor, rounds }
    }

    /// a and b (T, M), and c (T, M M).
    fn parts(&self, numbers: &Tensor, copies: i64) -> [Tensor; 3] {
        let parts = numbers.split_with_sizes([copies, copies, copies * copies], 1);
        parts.try_into().expect("three parts")
    }

    /// The mixing matrices (M, M, T) of c (T, M M), tokens last so that sums over copies run over whole rows of tokens; every step is
    /// shown to `step`.
    fn normalised(&self, c: &Tensor, copies: i64, step: &mut dyn FnMut(Step)) -> Tensor {
        let rows = c.tr().contiguous().view([copies, copies, -1]).softmax(1, Kind::Float); // (M, M, T)
        step(Step { dim: 1, after: rows.shallow_clone(), sum: None });
        let mut mix = rows + self.floor;
        for dim in (0..2 * self.rounds - 1).map(|i| i % 2) {
            let sum = mix.sum_dim_intlist([dim].as_slice(), true, Kind::Float) + self.floor;
            mix = mix.g_div(&sum); // not in place: the step before is kept
            step(Step { dim, after: mix.shallow_clone(), sum: Some(sum) });
        }
        mix
    }

    /// dc (T, M M) from the gradient of the mixing matrices (T, M, M).
    fn normalised_backward(&self, dmix: &Tensor, c: &Tensor, copies: i64) -> Tensor {
        let mut steps = Vec::new();
        let _ = self.normalised(c, copies, &mut |step| steps.push(step));
        let mut grad = dmix.permute([1, 2, 0]).contiguous(); // (M, M, T)
        for Step { dim, after, sum } in steps.into_iter().rev() {
            let along = (&grad * &after).sum_dim_intlist([dim].as_slice(), true, Kind::Float);
            grad = match sum {
                // y = x / (sum x + floor): dx = (dy - sum(dy y)) / (sum x + floor).
                Some(sum) => (grad - along) / sum,
                // y = softmax(x): dx = y (dy - sum(dy y)).
                None => (grad - along) * after,
            };
        }
        grad.view([copies * copies, -1]).tr()
    }
}

/// One of the steps that make a mixing matrix.
struct Step {
    /// Along which it normalises.
    dim: i64,
    /// The matrix after it.
    after: Tensor,
    /// What was divided by; none for the softmax.
    sum: Option<Tensor>,
}

/// The copies after a half gave `y` (T, D) for what it read of the copies `h` (T, M, D): `h'_m = post_m y + sum_k mix[k, m] h_k`.
pub fn spread(h: &Tensor, y: &Tensor, Spread { post, mix }: &Spread) -> Tensor {
    let output = tch::no_grad(|| {
        if cpu::serves(&[h, y]) {
            return cpu::streams::spread(h, y, post, mix);
        }
        let kind = h.kind();
        let mixed = mix.to_kind(kind).transpose(1, 2).bmm(h); // (T, M, D)
        mixed + post.to_kind(kind).unsqueeze(2) * y.unsqueeze(1)
    });
    let saved = [h, y, post, mix].map(Tensor::detach);
    custom(c"engraft::spread_streams", &[h, y, post, mix], vec![output], move |grads| {
        let [h, y, post, mix] = saved;
        let (grad, kind) = (&grads[0], h.kind());
        if cpu::serves(&[grad, &h, &y]) {
            return cpu::streams::spread_backward(grad, &h, &y, &post, &mix).map(Some).into();
        }
        let dh = mix.to_kind(kind).bmm(grad); // (T, M, D)
        let dy = post.to_kind(kind).unsqueeze(1).bmm(grad).squeeze_dim(1); // (T, D)
        let dpost = grad.bmm(&y.unsqueeze(2)).squeeze_dim(2).to_kind(Kind::Float); // (T, M)
        let dmix = h.bmm(&grad.transpose(1, 2)).to_kind(Kind::Float); // (T, M, M)
        vec![Some(dh), Some(dy), Some(dpost), Some(dmix)]
    })
    .remove(0)
}

/// `sum_m pre_m h_m` (T, D), summed in fp32.
fn read(h: &Tensor, pre: &Tensor) -> Tensor {
    if cpu::serves(&[h]) {
        return cpu::streams::read(h, pre);
    }
    let weighed = |m: i64| h.select(1, m).to_kind(Kind::Float) * pre.narrow(1, m, 1);
    (1..h.size()[1]).fold(weighed(0), |sum, m| sum + weighed(m)).to_kind(h.kind())
}

/// dpre (T, M), fp32, of [`read`].
fn products_with_copies(dx: &Tensor, h: &Tensor) -> Tensor {
    if cpu::serves(&[dx, h]) {
        return cpu::streams::products_with_copies(dx, h);
    }
    h.bmm(&dx.unsqueeze(2)).squeeze_dim(2).to_kind(Kind::Float)
}

/// The derivative of a sigmoid whose value is `s`.
fn sigmoid_slope(s: &Tensor) -> Tensor {
    s * (s.ones_like() - s)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, randn};

    /// T, M and D: fewer tokens and columns than the kernels take at once; and more, with some left over.
    const SIZES: [[i64; 3]; 2] = [[9, 3, 16], [21, 4, 40]];

    fn streams(numbers: i64, [_, m, d]: [i64; 3]) -> Streams {
        let map = StreamMap {
            function: randn(&[numbers, m * d], 1) * 0.15,
            base: randn(&[numbers], 2) * 0.3,
            scale: randn(&[numbers], 3) * 0.2 + 1.0,
            eps: 1e-6,
        };
        Streams { map, floor: 1e-2, rounds: 3 }
    }

    /// The slow twin: what is read, and the weights to write with.
    fn twin(h: &Tensor, streams: &Streams) -> (Tensor, Vec<Tensor>) {
        let (t, m, d) = h.size3().unwrap();
        let flat = h.to_kind(Kind::Float).view([t, m * d]);
        let rms = (flat.square().mean_dim([1i64].as_slice(), true, Kind::Float) + streams.map.eps).sqrt();
        let numbers = (flat / rms).matmul(&streams.map.function.tr()) * &streams.map.scale + &streams.map.base;
        let pre = numbers.narrow(1, 0, m).sigmoid() + streams.floor;
        let x = (pre.unsqueeze(2) * h.to_kind(Kind::Float)).sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
        if numbers.size()[1] == m {
            return (x, Vec::new());
        }
        let post = numbers.narrow(1, m, m).sigmoid() * 2.0;
        let mut mix = numbers.narrow(1, 2 * m, m * m).reshape([t, m, m]).softmax(-1, Kind::Float) + streams.floor;
        for round in 0..streams.rounds {
            if round > 0 {
                mix = &mix / (mix.sum_dim_intlist([-1i64].as_slice(), true, Kind::Float) + streams.floor);
            }
            mix = &mix / (mix.sum_dim_intlist([-2i64].as_slice(), true, Kind::Float) + streams.floor);
        }
        (x, vec![post, mix])
    }

    #[test]
    fn reading_alone_equals_plain_autograd() {
        for sizes in SIZES {
            let streams = streams(sizes[1], sizes);
            check(&[randn(&sizes, 4)], |_, x| vec![streams.gather(&x[0])], |_, x| vec![twin(&x[0], &streams).0]);
        }
    }

    #[test]
    fn reading_with_the_weights_to_write_equals_plain_autograd() {
        for sizes in SIZES {
            let streams = streams(sizes[1] * (sizes[1] + 2), sizes);
            check(
                &[randn(&sizes, 4)],
                |_, x| {
                    let (y, Spread { post, mix }, h) = streams.enter(&x[0]);
                    vec![y, post, mix, h]
                },
                |_, x| {
                    let (y, rest) = twin(&x[0], &streams);
                    std::iter::once(y).chain(rest).chain([x[0].shallow_clone()]).collect()
                },
            );
        }
    }

    #[test]
    fn writing_equals_plain_autograd() {
        let [t, m, d] = SIZES[0];
        check(
            &[randn(&[t, m, d], 1), randn(&[t, d], 2), randn(&[t, m], 3), randn(&[t, m, m], 4)],
            |_, x| {
                let [post, mix] = [&x[2], &x[3]].map(|t| t.to_kind(Kind::Float));
                vec![spread(&x[0], &x[1], &Spread { post, mix })]
            },
            |_, x| vec![x[2].unsqueeze(2) * x[1].unsqueeze(1) + x[3].transpose(1, 2).matmul(&x[0])],
        );
    }

    #[test]
    fn a_block_that_reads_and_writes_equals_plain_autograd() {
        let [_, m, _] = SIZES[0];
        let streams = streams(m * (m + 2), SIZES[0]);
        check(
            &[randn(&SIZES[0], 4)],
            |_, x| {
                let (y, weights, h) = streams.enter(&x[0]);
                vec![spread(&h, &y.tanh(), &weights)]
            },
            |_, x| {
                let (y, weights) = twin(&x[0], &streams);
                let h = x[0].to_kind(Kind::Float);
                vec![weights[0].unsqueeze(2) * y.tanh().unsqueeze(1) + weights[1].transpose(1, 2).matmul(&h)]
            },
        );
    }
}
