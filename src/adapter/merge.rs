//! Folds an update into the weight it was trained beside.

use tch::{Kind, Tensor, no_grad};

use crate::{Error, Fault, Result};

use super::Update;

/// Numbers computed at a time, so that the fp32 copies of a large head stay small beside the head itself.
const CHUNK: i64 = 1 << 24;

/// `W + scale * B A`, its rows brought to their trained lengths with DoRA, computed in fp32 and rounded once to `kind`, on the device
/// of `weight` (out, in).
///
/// Errors with [`Error::Model`] when the shapes differ, or when a sum is not finite in that number type.
pub fn merged(weight: &Tensor, update: &Update, kind: Kind) -> Result<Tensor> {
    let fault = |what: String| Error::Model(Fault::new(&update.module, what));
    let (rows, columns) = update.shape();
    if weight.size() != [rows, columns] {
        return Err(fault(format!("the weight is {:?}, but its adapter fits [{rows}, {columns}]", weight.size())));
    }
    let chunk = (CHUNK / columns).max(1);
    no_grad(|| {
        let [a, b] = [&update.a, &update.b].map(|t| t.to_device(weight.device()).to_kind(Kind::Float));
        let result = Tensor::empty(weight.size(), (kind, weight.device()));
        for start in (0..rows).step_by(chunk as usize) {
            let length = chunk.min(rows - start);
            let mut sum = weight.narrow(0, start, length).to_kind(Kind::Float); // (chunk, in)
            if weight.kind() == Kind::Float {
                sum = sum.copy();
            }
            let mut sum = sum.g_add_(&(b.narrow(0, start, length).matmul(&a) * update.scale)); // (chunk, in)
            if let Some(lengths) = &update.lengths {
                let found = sum.norm_scalaropt_dim(2.0, [1i64].as_slice(), true); // (chunk, 1)
                sum *= lengths.to_device(weight.device()).narrow(0, start, length).unsqueeze(1) / found;
            }
            result.narrow(0, start, length).copy_(&sum);
        }
        let odd = result.isfinite().logical_not().sum(Kind::Int64).int64_value(&[]);
        if odd > 0 {
            return Err(Error::Model(
                Fault::new(&update.module, format!("{odd} merged values are too large for {kind:?}"))
                    .hint("merge to bf16 or fp32"),
            ));
        }
        Ok(result)
    })
}

/// [`merged`] of the weights of all experts, (E, out, in), or (E, in, out) where `transposed`.
pub fn merged_experts(weights: &Tensor, update: &Update, transposed: bool, kind: Kind) -> Result<Tensor> {
    let result = Tensor::empty(weights.size(), (kind, weights.device()));
    for number in 0..weights.size()[0] {
        let weight = weights.select(0, number);
        let weight = if transposed { weight.tr().contiguous() } else { weight };
        let sum = merged(&weight, &update.of_expert(number), kind)?;
        result.select(0, number).copy_(&if transposed { sum.tr() } else { sum });
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::sites::Role;
    use tch::Device;

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
        let merged = merged(&weight, &update, weight.kind()).unwrap();
        assert_eq!(merged.kind(), Kind::BFloat16);
        let wrong = merged.not_equal_tensor(&sum.to_kind(Kind::BFloat16)).sum(Kind::Int64).int64_value(&[]);
        assert!(wrong <= 1, "{wrong} of 3500 values are not the nearest"); // fp32 sums may meet a tie by chance
        let twice = &weight + (update.b.matmul(&update.a) * 0.375).to_kind(Kind::BFloat16);
        assert!(merged.not_equal_tensor(&twice).sum(Kind::Int64).int64_value(&[]) > 100);
    }

    #[test]
    fn the_weight_is_left_as_it_was_and_chunks_meet() {
        let columns = CHUNK / 3;
        let update = update(7, columns, 1);
        let weight = Tensor::randn([7, columns], (Kind::Float, Device::Cpu));
        let before = weight.copy();
        let merged = merged(&weight, &update, weight.kind()).unwrap();
        assert_eq!(weight, before);
        let expected = &weight + update.b.matmul(&update.a) * 0.375;
        assert!((merged - expected).abs().max().double_value(&[]) < 1e-6);
    }

    #[test]
    fn other_shapes_and_overflows_are_errors() {
        let update = update(4, 6, 2);
        let weight = Tensor::zeros([6, 4], (Kind::Float, Device::Cpu));
        assert!(
            merged(&weight, &update, weight.kind())
                .unwrap_err()
                .to_string()
                .contains("[6, 4], but its adapter fits [4, 6]")
        );
        let weight = Tensor::full([4, 6], 65504.0, (Kind::Half, Device::Cpu));
        let update = Update { scale: 1e5, ..update };
        assert!(merged(&weight, &update, weight.kind()).unwrap_err().to_string().contains("too large for Half"));
    }
}
