//! Weighted sums of tensors of which a part is dropped, as PEFT 0.21.2's `utils/merge_utils.py` computes them, operation by
//! operation.

use tch::{Kind, Tensor};

use super::MajoritySign;

/// What is dropped before summing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pruning {
    /// Nothing.
    None,
    /// What is smallest, by magnitude.
    Smallest,
    /// At random; the rest is divided by the share that is kept.
    Random,
}

/// What is summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sum {
    /// Everything.
    All,
    /// At each place the numbers of the majority's sign alone, and their mean.
    Majority(MajoritySign),
}

/// The weighted sum of `tensors`, fp32, all of one shape. `keep` gives the mask of what stays of a tensor, by its place in the list.
pub(super) fn sum(
    tensors: &[Tensor],
    weights: &[f64],
    (pruning, how): (Pruning, Sum),
    density: f64,
    keep: &dyn Fn(usize, &Tensor) -> Tensor,
) -> Tensor {
    let pruned: Vec<Tensor> = tensors
        .iter()
        .enumerate()
        .map(|(number, tensor)| match pruning {
            _ if density >= 1.0 => tensor.shallow_clone(),
            Pruning::None => tensor.shallow_clone(),
            Pruning::Smallest => largest(tensor, density),
            Pruning::Random => tensor * keep(number, tensor) / density,
        })
        .collect();
    let all = Tensor::stack(&pruned, 0); // (adapters, ...)
    let weights: Vec<f32> = weights.iter().map(|weight| *weight as f32).collect();
    let mut shape = vec![1; all.dim()];
    shape[0] = weights.len() as i64;
    let weighted = &all * Tensor::from_slice(&weights).view(&shape[..]);
    let first: &[i64] = &[0];
    match how {
        Sum::All => weighted.sum_dim_intlist(first, false, Kind::Float),
        Sum::Majority(majority) => {
            let sign = all.sign();
            let voted = match majority {
                MajoritySign::Total => all.sum_dim_intlist(first, false, Kind::Float),
                MajoritySign::Frequency => sign.sum_dim_intlist(first, false, Kind::Float),
            };
            let majority = voted.ge(0.0).to_kind(Kind::Float) * 2.0 - 1.0;
            let agrees = sign.eq_tensor(&majority).to_kind(Kind::Float); // (adapters, ...)
            let sum = (weighted * &agrees).sum_dim_intlist(first, false, Kind::Float);
            sum / agrees.sum_dim_intlist(first, false, Kind::Float).clamp_min(1.0)
        }
    }
}

/// A tensor's largest numbers, so many that they are the share `density` of all, rounded down; zeros elsewhere.
fn largest(tensor: &Tensor, density: f64) -> Tensor {
    let count = (density * tensor.numel() as f64) as i64;
    let (_, places) = tensor.abs().reshape([-1]).topk(count, 0, true, true);
    let mut mask = Tensor::zeros([tensor.numel() as i64], (tensor.kind(), tensor.device()));
    let _ = mask.index_fill_(0, &places, 1.0);
    tensor * mask.view(&tensor.size()[..])
}
