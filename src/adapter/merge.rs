//! Folds an update into the weight it was trained beside.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use tch::{Device, Kind, Tensor, no_grad};

use super::Update;
use crate::torch_ext::parallel_tasks;
use crate::weights::non_finite_numbers;
use crate::{Error, Fault, Result};

/// Numbers computed at a time: few enough for what is computed with them to stay in the caches, and for the copies of a chunk to be
/// nothing beside a large weight.
const CHUNK: i64 = 1 << 18;

/// `W + scale * B A`, its rows brought to their trained lengths with DoRA, computed in fp32 and rounded once to `kind`. `weight` (out, in)
/// is on the CPU and contiguous; its own memory is used where it is of that kind, so that there are never two of it.
///
/// Errors with [`Error::Model`] when the shapes differ, or when a sum is not finite in that number type.
pub fn merged(weight: Tensor, update: &Update, kind: Kind) -> Result<Tensor> {
    let fault = |what: String| Error::Model(Fault::new(&update.module, what));
    let (rows, columns) = update.shape();
    if weight.size() != [rows, columns] {
        return Err(fault(format!("the weight is {:?}, but its adapter fits [{rows}, {columns}]", weight.size())));
    }
    let [a, b] = [&update.a, &update.b].map(|factor| factor.detach().to_device(Device::Cpu).to_kind(Kind::Float));
    let lengths = update.lengths.as_ref().map(|lengths| lengths.detach().to_device(Device::Cpu));
    let result = match weight.kind() == kind {
        true => weight.shallow_clone(),
        false => Tensor::empty(weight.size(), (kind, Device::Cpu)),
    };
    let chunk = (CHUNK / columns).max(1);
    let chunks = (0..rows).step_by(chunk as usize).map(|start| {
        let part = |whole: &Tensor| whole.narrow(0, start, chunk.min(rows - start));
        Mutex::new(Rows {
            weight: part(&weight),
            result: part(&result),
            a: a.shallow_clone(),
            b: part(&b),
            lengths: lengths.as_ref().map(part),
        })
    });
    let chunks: Vec<Mutex<Rows>> = chunks.collect();
    // Each thread does a chunk from beginning to end: threads that waited for each other after every operation would do little else.
    let (odd, scale) = (AtomicUsize::new(0), update.scale);
    parallel_tasks(chunks.len(), |index| {
        let rows = chunks[index].lock().expect("a chunk has one task");
        odd.fetch_add(no_grad(|| rows.fold(scale)), Ordering::Relaxed);
    });
    match odd.into_inner() {
        0 => Ok(result),
        odd => Err(Error::Model(
            Fault::new(&update.module, format!("{odd} merged values are too large for {kind:?}"))
                .hint("merge to bf16 or fp32"),
        )),
    }
}

/// Some rows of a weight, and what goes into them.
struct Rows {
    weight: Tensor,
    result: Tensor,
    a: Tensor,
    b: Tensor,
    lengths: Option<Tensor>,
}

impl Rows {
    /// Writes the sum into the result; gives how many of its numbers are not finite.
    fn fold(&self, scale: f64) -> usize {
        let mut sum = self.b.matmul(&self.a).g_mul_scalar_(scale).g_add_(&self.weight); // (chunk, in)
        if let Some(lengths) = &self.lengths {
            let found = sum.norm_scalaropt_dim(2.0, [1i64].as_slice(), true); // (chunk, 1)
            sum *= lengths.unsqueeze(1) / found;
        }
        let mut result = self.result.shallow_clone();
        result.copy_(&sum);
        non_finite_numbers(&result)
    }
}

/// [`merged`] of the weights of all experts, (E, out, in), or (E, in, out) where `transposed`.
pub fn merged_experts(weights: Tensor, update: &Update, transposed: bool, kind: Kind) -> Result<Tensor> {
    let own = weights.kind() == kind;
    let result = if own { weights.shallow_clone() } else { Tensor::empty(weights.size(), (kind, weights.device())) };
    for number in 0..weights.size()[0] {
        let weight = weights.select(0, number);
        let weight = if transposed { weight.tr().contiguous() } else { weight };
        let sum = merged(weight, &update.of_expert(number), kind)?;
        // What was folded in place is there.
        if transposed || !own {
            result.select(0, number).copy_(&if transposed { sum.tr() } else { sum });
        }
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::sites::Role;

    fn update(rows: i64, columns: i64, r: i64) -> Update {
        tch::manual_seed(5);
        let normal = |shape: [i64; 2]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
        Update {
            module: "q_proj".into(),
            role: Role::Linear,
            a: normal([r, columns]),
            b: normal([rows, r]),
            scale: 0.375,
            lengths: None,
            taken: None,
        }
    }

    /// In f64, rounded once: a merge that rounds the update to bf16 first gives other numbers.
    #[test]
    fn sums_are_rounded_once() {
        let update = update(50, 70, 4);
        let weight = Tensor::randn([50, 70], (Kind::BFloat16, Device::Cpu));
        let sum = weight.to_kind(Kind::Double) + update.b.matmul(&update.a).to_kind(Kind::Double) * 0.375;
        let merged = merged(weight.copy(), &update, weight.kind()).unwrap();
        assert_eq!(merged.kind(), Kind::BFloat16);
        let wrong = merged.not_equal_tensor(&sum.to_kind(Kind::BFloat16)).sum(Kind::Int64).int64_value(&[]);
        assert!(wrong <= 1, "{wrong} of 3500 values are not the nearest"); // fp32 sums may meet a tie by chance
        let twice = &weight + (update.b.matmul(&update.a) * 0.375).to_kind(Kind::BFloat16);
        assert!(merged.not_equal_tensor(&twice).sum(Kind::Int64).int64_value(&[]) > 100);
    }

    #[test]
    fn what_is_of_the_kind_is_folded_into_in_place_and_chunks_meet() {
        let columns = CHUNK / 3;
        let update = update(7, columns, 1);
        let weight = Tensor::randn([7, columns], (Kind::Float, Device::Cpu));
        let expected = &weight + update.b.matmul(&update.a) * 0.375;
        let rounded = merged(weight.shallow_clone(), &update, Kind::BFloat16).unwrap();
        assert!(rounded.equal(&expected.to_kind(Kind::BFloat16)), "of another kind, the weight stays as it was");
        let place = weight.data_ptr();
        let merged = merged(weight, &update, Kind::Float).unwrap();
        assert_eq!(merged.data_ptr(), place);
        assert!((merged - expected).abs().max().double_value(&[]) < 1e-6);
    }

    #[test]
    fn experts_lie_either_way() {
        let (rows, columns) = (5, 6);
        let all = Update {
            a: Tensor::randn([3, 2, columns], (Kind::Float, Device::Cpu)),
            b: Tensor::randn([3, rows, 2], (Kind::Float, Device::Cpu)),
            role: Role::Experts { count: 3, stored: crate::model::spec::Stored::Together, parameter: "experts".into() },
            ..update(rows, columns, 2)
        };
        let weights = Tensor::randn([3, rows, columns], (Kind::BFloat16, Device::Cpu));
        for kind in [Kind::BFloat16, Kind::Float] {
            let sum = (weights.to_kind(Kind::Float) + all.b.matmul(&all.a) * 0.375).to_kind(kind);
            let plain = merged_experts(weights.copy(), &all, false, kind).unwrap();
            let turned = weights.transpose(1, 2).contiguous();
            let turned = merged_experts(turned, &all, true, kind).unwrap().transpose(1, 2);
            for found in [plain, turned] {
                assert!(found.allclose(&sum, 1e-5, 1e-5, false), "{kind:?}");
            }
        }
    }

    #[test]
    fn other_shapes_and_overflows_are_errors() {
        let update = update(4, 6, 2);
        let weight = Tensor::zeros([6, 4], (Kind::Float, Device::Cpu));
        assert!(
            merged(weight.shallow_clone(), &update, weight.kind())
                .unwrap_err()
                .to_string()
                .contains("[6, 4], but its adapter fits [4, 6]")
        );
        let weight = Tensor::full([4, 6], 65504.0, (Kind::Half, Device::Cpu));
        let update = Update { scale: 1e5, ..update };
        let kind = weight.kind();
        assert!(merged(weight, &update, kind).unwrap_err().to_string().contains("too large for Half"));
    }
}
