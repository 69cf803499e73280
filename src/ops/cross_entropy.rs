//! Cross-entropy of supervised rows through the head, in chunks: the logits of a micro-batch never exist at once.
//!
//! `loss = scale * sum_s (logsumexp(h_s W^T) - h_s W^T[target_s])`, softmax statistics in fp32. The gradient of h is made
//! while a chunk's logits are at hand, so backward only scales it (Liger Kernel, arXiv:2410.10989, does the same).
//!
//! On CUDA the logits of a plain head stay in the fp32 that products of half precision are summed in.

use tch::{Device, Kind, Tensor};

use super::projection::{Group, Operand, factors};
use super::{cpu, cuda};
use crate::torch_ext::custom;

/// Rows whose logits over `vocabulary` tokens exist at once.
///
/// On the CPU 64 MiB of fp32 logits. A GPU reads all of the head for every chunk, and computes with a weight as long as it reads it at
/// some two hundred rows: 256 MiB there, in whole tiles of its products.
pub fn rows_of_logits(vocabulary: i64, device: Device) -> i64 {
    const TILE: i64 = 128;
    let bytes = if device == Device::Cpu { 64 << 20 } else { 256 << 20 };
    let rows = (bytes / (4 * vocabulary)).max(1);
    if device == Device::Cpu || rows < TILE { rows } else { rows - rows % TILE }
}

/// What becomes of the head's products before they are logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitMap {
    /// They are multiplied by this.
    pub scale: f64,
    /// Then become `c tanh(logit / c)` (arXiv:2408.00118).
    pub soft_cap: Option<f64>,
}

impl LogitMap {
    /// Products are logits.
    pub const PLAIN: Self = Self { scale: 1.0, soft_cap: None };

    /// Logits, fp32, of products (C, V).
    pub fn logits(self, products: &Tensor) -> Tensor {
        let logits = products.to_kind(Kind::Float);
        let logits = if self.scale == 1.0 { logits } else { logits * self.scale };
        match self.soft_cap {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        }
    }

    /// The gradient of the products from that of the logits.
    fn backward(self, dlogits: Tensor, logits: &Tensor) -> Tensor {
        let dlogits = match self.soft_cap {
            Some(cap) => dlogits * ((logits / cap).square().neg() + 1.0),
            None => dlogits,
        };
        if self.scale == 1.0 { dlogits } else { dlogits * self.scale }
    }
}

/// The summed loss, times `scale`, of predicting `targets` (S) i64 from `hidden` (S, D) through `head` (V, D): an fp32 scalar.
pub fn cross_entropy(hidden: &Tensor, head: Operand<'_>, map: LogitMap, targets: &Tensor, scale: f64) -> Tensor {
    in_chunks_of(rows_of_logits(head.weight.size()[0], hidden.device()), hidden, head, map, targets, scale)
}

fn in_chunks_of(chunk: i64, hidden: &Tensor, head: Operand<'_>, map: LogitMap, targets: &Tensor, scale: f64) -> Tensor {
    let mut inputs = vec![hidden];
    inputs.extend(factors(&[head]));
    let wants_gradients = crate::torch_ext::records_graph(&inputs);
    let wants_dhidden = hidden.requires_grad();
    let group = Group::of(&[head]);
    let rows = hidden.size()[0];

    let (loss, dhidden, dfactors) = tch::no_grad(|| {
        let mut loss = Tensor::zeros([] as [i64; 0], (Kind::Float, hidden.device()));
        let dhidden = (wants_gradients && wants_dhidden).then(|| hidden.empty_like());
        let mut dfactors: Vec<Tensor> = Vec::new();
        let mut start = 0;
        while start < rows {
            let length = chunk.min(rows - start);
            let h = hidden.narrow(0, start, length);
            let target = targets.narrow(0, start, length);
            let (products, kept) = match cuda::serves(&[&h]).then(|| group.wide_product(&h)).flatten() {
                Some(wide) => wide,
                None => {
                    let (mut products, kept) = group.forward(&h, None);
                    (products.remove(0), kept)
                }
            };
            let kind = wants_gradients.then_some(hidden.kind());
            let (losses, dlogits) = softmax(&products, map, &target, scale, kind);
            loss += losses.sum(Kind::Float) * scale;
            if let Some(dlogits) = dlogits {
                let (dh, df) = group.backward(|_| h.shallow_clone(), &kept, &[dlogits], wants_dhidden);
                if let (Some(into), Some(dh)) = (&dhidden, dh) {
                    into.narrow(0, start, length).copy_(&dh);
                }
                if dfactors.is_empty() {
                    dfactors = df;
                } else {
                    dfactors.iter_mut().zip(df).for_each(|(sum, part)| *sum += part);
                }
            }
            start += length;
        }
        (loss, dhidden, dfactors)
    });

    custom(c"engraft::cross_entropy", &inputs, vec![loss], move |grads| {
        let upstream = &grads[0];
        let mut out = vec![dhidden.map(|d| &d * upstream.to_kind(d.kind()))];
        out.extend(dfactors.into_iter().map(|d| Some(d * upstream)));
        out
    })
    .remove(0)
}

/// Each row's loss (C, 1), fp32, and, if one of some kind is wanted, the gradient (C, V) of `scale` times it, of products (C, V), of that
/// kind or fp32, and targets (C).
pub(super) fn softmax(
    products: &Tensor,
    map: LogitMap,
    targets: &Tensor,
    scale: f64,
    gradient: Option<Kind>,
) -> (Tensor, Option<Tensor>) {
    if let Some(kind) = gradient.filter(|kind| cuda::serves(&[products]) && cuda::known(*kind)) {
        let map = (map.scale, map.soft_cap);
        let (losses, gradient) = cuda::softmax_cross_entropy(products, targets, map, scale, kind);
        return (losses, Some(gradient));
    }
    if gradient.is_some_and(|kind| cpu::serves(&[products]) && products.kind() == kind) {
        let (losses, gradient) = cpu::softmax_cross_entropy(products, map, targets, scale);
        return (losses, Some(gradient));
    }
    let targets = targets.unsqueeze(1); // (C, 1)
    let logits = map.logits(products);
    let logsumexp = logits.logsumexp([1i64].as_slice(), true); // (C, 1)
    let losses = &logsumexp - logits.gather(1, &targets, false);
    let gradient = gradient.map(|kind| {
        let mut gradient = (&logits - logsumexp).exp_();
        let _ = gradient.scatter_add_(1, &targets, &Tensor::full_like(&targets, -1).to_kind(Kind::Float));
        map.backward(gradient * scale, &logits).to_kind(kind)
    });
    (losses, gradient)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::LowRank;
    use crate::ops::testing::{check, randn};

    fn twin(hidden: &Tensor, weight: &Tensor, map: LogitMap, targets: &Tensor, scale: f64) -> Tensor {
        let logits = hidden.matmul(&weight.tr()).to_kind(Kind::Float) * map.scale;
        let logits = map.soft_cap.map_or_else(|| logits.shallow_clone(), |cap| (&logits / cap).tanh() * cap);
        logits.cross_entropy_loss::<Tensor>(targets, None, tch::Reduction::Sum, -100, 0.0) * scale
    }

    #[test]
    fn equals_plain_autograd_over_several_chunks() {
        let (rows, d, v) = (70, 8, 501);
        let weight = |kind| (randn(&[v, d], 2) * 0.3).to_kind(kind);
        let targets = Tensor::from_slice(&(0..rows).map(|i| i * 7001 % v).collect::<Vec<i64>>());
        for map in
            [LogitMap::PLAIN, LogitMap { scale: 0.25, soft_cap: None }, LogitMap { scale: 1.5, soft_cap: Some(2.0) }]
        {
            check(
                &[randn(&[rows, d], 1)],
                |kind, x| {
                    let w = weight(kind).into();
                    let head = Operand { weight: &w, trained: None, bias: None, low_rank: None, dropout_seed: None };
                    vec![in_chunks_of(32, &x[0], head, map, &targets, 0.1)]
                },
                |kind, x| vec![twin(&x[0], &weight(kind), map, &targets, 0.1)],
            );
        }
    }

    #[test]
    fn an_adapter_on_the_head_is_trained_too() {
        let (rows, d, v, r) = (9, 16, 40, 4);
        let weight = |kind| (randn(&[v, d], 2) * 0.3).to_kind(kind);
        let targets = Tensor::from_slice(&(0..rows).map(|i| i * 3 % v).collect::<Vec<i64>>());
        check(
            &[randn(&[rows, d], 1), randn(&[r, d], 3) * 0.3, randn(&[v, r], 4) * 0.3],
            |kind, x| {
                let w = weight(kind).into();
                let l = LowRank {
                    a: x[1].to_kind(Kind::Float),
                    b: x[2].to_kind(Kind::Float),
                    scale: 2.0,
                    dropout: 0.0,
                    magnitude: None,
                };
                let head = Operand { weight: &w, trained: None, bias: None, low_rank: Some(&l), dropout_seed: None };
                vec![cross_entropy(&x[0], head, LogitMap::PLAIN, &targets, 0.1)]
            },
            |kind, x| vec![twin(&x[0], &(weight(kind) + x[2].matmul(&x[1]) * 2.0), LogitMap::PLAIN, &targets, 0.1)],
        );
    }

    #[test]
    fn no_rows_is_a_loss_of_zero() {
        let hidden = randn(&[0, 8], 1).set_requires_grad(true);
        let w = randn(&[5, 8], 2).into();
        let head = Operand { weight: &w, trained: None, bias: None, low_rank: None, dropout_seed: None };
        let loss =
            cross_entropy(&hidden, head, LogitMap::PLAIN, &Tensor::zeros([0], (Kind::Int64, tch::Device::Cpu)), 1.0);
        assert_eq!(loss.double_value(&[]), 0.0);
        loss.backward();
    }
}
