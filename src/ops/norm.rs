//! RMSNorm, `y = x / sqrt(mean(x^2) + eps) * w` (arXiv:1910.07467), and LayerNorm, `y = (x - mean(x)) / sqrt(var(x) + eps) * w + b`
//! (arXiv:1607.06450). Statistics in fp32, one rounding at the end.

use tch::{Kind, Tensor};

use super::normed::sum;
use super::{cpu, cuda};

/// A norm: frozen, but for what is trained in its place.
#[derive(Debug)]
pub struct Norm {
    /// Module path as transformers has it; empty where its weights are several modules'.
    pub name: String,
    /// w (P, D), fp32: row i of what is normed is multiplied by w[i mod P]. P is 1 but for norms with a weight for each head.
    pub weight: Tensor,
    /// b (D), fp32, where there is one.
    pub bias: Option<Tensor>,
    /// Added to the mean square.
    pub eps: f64,
    /// Whether the mean is taken away first: LayerNorm, else RMSNorm.
    pub centred: bool,
    /// w is what is stored and this.
    pub offset: f64,
    /// What is trained in place of w and b.
    pub trained: Option<TrainedNorm>,
}

/// A norm's own numbers, trained.
#[derive(Debug)]
pub struct TrainedNorm {
    /// As it is stored, without the offset: (D) or (P, D), fp32, a leaf with gradient.
    pub weight: Tensor,
    /// (D), fp32, a leaf with gradient, where the norm has a bias.
    pub bias: Option<Tensor>,
}

impl TrainedNorm {
    /// Another handle to the same tensors.
    pub fn handle(&self) -> Self {
        Self { weight: self.weight.shallow_clone(), bias: self.bias.as_ref().map(Tensor::shallow_clone) }
    }

    /// The leaves.
    pub fn leaves(&self) -> impl Iterator<Item = &Tensor> {
        [&self.weight].into_iter().chain(&self.bias)
    }
}

impl Clone for Norm {
    /// Another handle to the same tensors.
    fn clone(&self) -> Self {
        Self {
            name: self.name.clone(),
            weight: self.weight.shallow_clone(),
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
            trained: self.trained.as_ref().map(TrainedNorm::handle),
            ..*self
        }
    }
}

impl Norm {
    /// y (T, D) in x's number type, and of each row its mean (0 for RMSNorm) and 1/deviation: (T, 2) in fp32. No graph.
    pub(crate) fn forward(&self, x: &Tensor) -> (Tensor, Tensor) {
        if self.runs_on_cuda(&[x]) {
            let (_, y, stats) = cuda::norm(x, None, &self.weight, self.bias.as_ref(), self.eps, self.centred);
            return (y, stats);
        }
        if cpu::serves(&[x]) {
            return cpu::norm(x, &self.weight, self.bias.as_ref(), self.eps, self.centred);
        }
        let wide = x.to_kind(Kind::Float);
        let mean = match self.centred {
            true => wide.mean_dim([-1i64].as_slice(), true, Kind::Float), // (T, 1)
            false => Tensor::zeros([x.size()[0], 1], (Kind::Float, x.device())),
        };
        let square = (&wide - &mean).square().mean_dim([-1i64].as_slice(), true, Kind::Float);
        let stats = Tensor::cat(&[&mean, &(square + self.eps).rsqrt()], 1); // (T, 2)
        (self.again(x, &stats), stats)
    }

    /// The sum `h + given * factor` (T, D) where something is given, and what [`Norm::forward`] makes of it. No graph.
    pub(crate) fn forward_of_sum(&self, h: &Tensor, given: Option<(&Tensor, f64)>) -> (Tensor, Tensor, Tensor) {
        let Some((given, factor)) = given else {
            let (y, stats) = self.forward(h);
            return (h.shallow_clone(), y, stats);
        };
        if self.runs_on_cuda(&[h, given]) {
            let given = Some((given, factor));
            let (sum, y, stats) = cuda::norm(h, given, &self.weight, self.bias.as_ref(), self.eps, self.centred);
            return (sum.expect("something is given"), y, stats);
        }
        if cpu::serves(&[h, given]) {
            return cpu::norm_of_sum(h, given, factor, &self.weight, self.bias.as_ref(), self.eps, self.centred);
        }
        let sum = sum(h, given, factor);
        let (y, stats) = self.forward(&sum);
        (sum, y, stats)
    }

    /// y again, from x and the kept statistics: cheaper than keeping y.
    pub(crate) fn again(&self, x: &Tensor, stats: &Tensor) -> Tensor {
        if self.runs_on_cuda(&[x]) {
            return cuda::norm_again(x, &self.weight, self.bias.as_ref(), stats);
        }
        if cpu::serves(&[x]) {
            return cpu::norm_again(x, &self.weight, self.bias.as_ref(), stats);
        }
        let y = normed(x, stats) * self.weight_of_rows(x);
        self.bias.as_ref().map_or_else(|| y.shallow_clone(), |bias| &y + bias).to_kind(x.kind())
    }

    /// dx (T, D) from dy (T, D), with `more` (T, D) added if given.
    ///
    /// With g = dy * w and n the normed x: `dx = (g - n * mean(g * n)) / deviation`, and for LayerNorm less the mean of g.
    pub(crate) fn backward(&self, dy: &Tensor, x: &Tensor, stats: &Tensor, more: Option<&Tensor>) -> Tensor {
        let all: Vec<&Tensor> = [x, dy].into_iter().chain(more).collect();
        if self.runs_on_cuda(&all) {
            return cuda::norm_backward(dy, x, &self.weight, stats, self.centred, more);
        }
        if cpu::serves(&all) {
            return cpu::norm_backward(dy, x, &self.weight, stats, self.centred, more);
        }
        let g = dy.to_kind(Kind::Float) * self.weight_of_rows(x);
        let n = normed(x, stats);
        let dot = (&g * &n).mean_dim([-1i64].as_slice(), true, Kind::Float); // (T, 1)
        let through = match self.centred {
            true => &g - g.mean_dim([-1i64].as_slice(), true, Kind::Float),
            false => g,
        };
        let dx = (through - n * dot) * stats.narrow(1, 1, 1);
        more.map_or_else(|| dx.shallow_clone(), |more| &dx + more).to_kind(x.kind())
    }

    /// What is trained of it.
    pub fn leaves(&self) -> impl Iterator<Item = &Tensor> {
        self.trained.iter().flat_map(TrainedNorm::leaves)
    }

    /// With what is trained in place. No graph.
    pub(super) fn as_it_is(&self) -> Self {
        let Some(trained) = &self.trained else { return self.clone() };
        let weight = trained.weight.detach().view([-1, self.weight.size()[1]]) + self.offset;
        let bias = trained.bias.as_ref().map(Tensor::detach);
        Self { weight, bias, trained: None, name: self.name.clone(), ..*self }
    }

    /// [`Norm::apply`] along the last dimension of x (T, N, H), a head at a time.
    pub fn apply_to_heads(&self, x: &Tensor) -> Tensor {
        let size = x.size();
        let width = size[size.len() - 1];
        self.apply(&x.reshape([-1, width])).view(size.as_slice())
    }

    /// Whether there are CUDA kernels for x (and dy) with this norm.
    fn runs_on_cuda(&self, x: &[&Tensor]) -> bool {
        let all: Vec<&Tensor> = [x[0], &self.weight].into_iter().chain(&self.bias).collect();
        cuda::serves(x) && cuda::holds(&all)
    }

    /// w of every row of x: (1, D), or (T, D) where the weights take turns.
    fn weight_of_rows(&self, x: &Tensor) -> Tensor {
        let turns = self.weight.size()[0];
        if turns == 1 { self.weight.shallow_clone() } else { self.weight.repeat([x.size()[0] / turns, 1]) }
    }
}

/// (x - mean) / deviation, fp32.
pub(super) fn normed(x: &Tensor, stats: &Tensor) -> Tensor {
    (x.to_kind(Kind::Float) - stats.narrow(1, 0, 1)) * stats.narrow(1, 1, 1)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::ops::testing::{check, randn};

    /// The slow twin of RMSNorm.
    pub(crate) fn twin(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
        let wide = x.to_kind(Kind::Float);
        let rms = (wide.square().mean_dim([-1i64].as_slice(), true, Kind::Float) + eps).sqrt();
        (wide / rms * weight.to_kind(Kind::Float)).to_kind(x.kind())
    }

    pub(crate) fn rms(width: i64, eps: f64) -> Norm {
        frozen(randn(&[1, width], 2) * 0.1 + 1.0, None, eps, false)
    }

    pub(crate) fn frozen(weight: Tensor, bias: Option<Tensor>, eps: f64, centred: bool) -> Norm {
        Norm { name: String::new(), weight, bias, eps, centred, offset: 0.0, trained: None }
    }

    #[test]
    fn rms_norm_equals_plain_autograd() {
        let norm = rms(35, 1e-5);
        check(&[randn(&[7, 35], 1)], |_, x| vec![norm.apply(&x[0])], |_, x| vec![twin(&x[0], &norm.weight, 1e-5)]);
    }

    #[test]
    fn layer_norm_equals_plain_autograd() {
        for biased in [true, false] {
            let bias = randn(&[35], 3);
            let norm = Norm { bias: biased.then_some(bias), centred: true, ..rms(35, 1e-5) };
            check(
                &[randn(&[7, 35], 1) + 0.7],
                |_, x| vec![norm.apply(&x[0])],
                |_, x| {
                    let weight = norm.weight.view([35]);
                    vec![x[0].layer_norm([35], Some(&weight), norm.bias.as_ref(), 1e-5, false)]
                },
            );
        }
    }

    #[test]
    fn what_is_trained_of_a_norm_learns_as_by_plain_autograd() {
        let (rows, heads, head, eps) = (7, 3, 10, 1e-5);
        let wide = heads * head;
        check(
            &[randn(&[rows, wide], 1) + 0.7, randn(&[wide], 2), randn(&[wide], 3), randn(&[heads, head], 4)],
            |_, x| {
                let fp32 = |t: &Tensor| t.to_kind(Kind::Float);
                let trained = Some(TrainedNorm { weight: fp32(&x[1]), bias: Some(fp32(&x[2])) });
                let layer =
                    Norm { trained, ..frozen(Tensor::ones([1, wide], (Kind::Float, x[0].device())), None, eps, true) };
                let trained = Some(TrainedNorm { weight: fp32(&x[3]), bias: None });
                let of_heads = Norm {
                    trained,
                    offset: 1.0,
                    ..frozen(Tensor::ones([heads, head], (Kind::Float, x[0].device())), None, eps, false)
                };
                vec![layer.apply(&x[0]), of_heads.apply_to_heads(&x[0].view([rows, heads, head]))]
            },
            |_, x| {
                let wide_x = x[0].to_kind(Kind::Float);
                let layer = wide_x.layer_norm(
                    [wide],
                    Some(&x[1].to_kind(Kind::Float)),
                    Some(&x[2].to_kind(Kind::Float)),
                    eps,
                    false,
                );
                let own = wide_x.view([rows, heads, head]);
                let rms = (own.square().mean_dim([-1i64].as_slice(), true, Kind::Float) + eps).sqrt();
                let of_heads = own / rms * (x[3].to_kind(Kind::Float) + 1.0);
                vec![layer.to_kind(x[0].kind()), of_heads.to_kind(x[0].kind())]
            },
        );
    }

    #[test]
    fn heads_may_have_weights_of_their_own() {
        let (heads, head) = (3, 10);
        for centred in [true, false] {
            let norm = Norm { weight: randn(&[heads, head], 2), centred, ..rms(head, 1e-5) };
            check(
                &[randn(&[5, heads, head], 1)],
                |_, x| vec![norm.apply_to_heads(&x[0])],
                |_, x| {
                    let mean = x[0].mean_dim([-1i64].as_slice(), true, Kind::Float);
                    let x = if centred { &x[0] - mean } else { x[0].shallow_clone() };
                    let rms = (x.square().mean_dim([-1i64].as_slice(), true, Kind::Float) + 1e-5).sqrt();
                    vec![x / rms * &norm.weight]
                },
            );
        }
    }
}
