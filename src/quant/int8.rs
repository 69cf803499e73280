//! Eight-bit integers with one scale to a row: the weights of LLM.int8() (arXiv:2208.07339), as bitsandbytes stores them.

use tch::{Kind, Tensor};

use crate::ops::cuda;

/// A weight of eight-bit integers.
#[derive(Debug)]
pub struct Int8 {
    /// Of the weight: (out, in) or (E, out, in).
    pub shape: Vec<i64>,
    /// The number type it is made whole in.
    pub kind: Kind,
    /// The integers (rows, in) i8.
    pub codes: Tensor,
    /// The largest magnitude of each row (rows), fp32.
    pub absmax: Tensor,
}

impl Int8 {
    /// Quantises a weight, by way of fp16 as bitsandbytes does.
    pub fn of(weight: &Tensor) -> Self {
        let shape = weight.size();
        let rows = weight.to_kind(Kind::Half).view([-1, shape[shape.len() - 1]]);
        let absmax = rows.abs().amax([1], false).to_kind(Kind::Float); // (rows)
        // Not 127 / absmax, whose last bit may differ. A row of zeros has no scale: 0 * inf, which no integer is.
        let scale = (absmax.reciprocal() * 127.0).nan_to_num(0.0, 0.0, 0.0).unsqueeze(1);
        let codes = (rows.to_kind(Kind::Float) * scale).round().to_kind(Kind::Int8);
        Self { shape, kind: weight.kind(), codes, absmax }
    }

    /// Another handle to the same tensors.
    pub(super) fn handle(&self) -> Self {
        let Self { shape, kind, codes, absmax } = self;
        Self { shape: shape.clone(), kind: *kind, codes: codes.shallow_clone(), absmax: absmax.shallow_clone() }
    }

    /// The numbers it stands for, in its shape and kind: `codes * absmax / 127`.
    pub fn dequantised(&self) -> Tensor {
        if let Some(whole) = cuda::int8_dequantise(&self.codes, &self.absmax, self.kind) {
            return whole.view(&self.shape[..]);
        }
        let wide = self.codes.to_kind(Kind::Float) * self.absmax.unsqueeze(1) * (1.0 / 127.0);
        wide.to_kind(self.kind).view(&self.shape[..])
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tch::Device;

    use super::*;
    use crate::ops::cuda::emulator::{on_gpus, plainly};
    use crate::quant::four_bit::assert_same;

    #[test]
    fn the_cuda_kernel_equals_its_twin_bit_for_bit() {
        tch::manual_seed(11);
        for shape in [[3, 64], [5, 1], [7, 13], [257, 40], [2, 5001]] {
            let scale = (Tensor::randn([shape[0], 1], (Kind::Float, Device::Cpu)) * 4.0).exp();
            let values = (Tensor::randn(shape, (Kind::Float, Device::Cpu)) * scale).clamp(-6e4, 6e4);
            let mut weight = Int8::of(&values);
            for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
                weight.kind = kind;
                let expected = weight.dequantised();
                on_gpus(|device| {
                    let (codes, absmax) = (weight.codes.to_device(device), weight.absmax.to_device(device));
                    let what = format!("{shape:?} {kind:?} on {device:?}");
                    let found = cuda::int8_dequantise(&codes, &absmax, kind).expect("served");
                    assert_same(&found, &expected, &what);
                    let moved = Int8 { codes, absmax, ..weight.handle() };
                    assert_same(&plainly(|| moved.dequantised()), &expected, &format!("{what}, its twin"));
                });
            }
        }
    }

    /// What bitsandbytes makes of the same tensors (`tests/python/bnb_quants.py`).
    #[test]
    fn codes_magnitudes_and_numbers_are_those_of_bitsandbytes() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/bnb_quants.safetensors");
        let golden: BTreeMap<String, Tensor> =
            Tensor::read_safetensors(path).expect("the fixture is committed").into_iter().collect();
        let mut compared = 0;
        for (name, codes) in golden.iter().filter(|(name, _)| name.ends_with(".int8.codes")) {
            let place = name.strip_suffix(".codes").unwrap();
            let tensor = &golden[place.strip_suffix(".int8").unwrap()];
            let mut found = Int8::of(tensor);
            found.kind = Kind::Float;
            assert_same(&found.codes.view([-1]), &codes.view([-1]), name);
            assert_same(&found.absmax, &golden[&format!("{place}.absmax")], name);
            assert_same(&found.dequantised().view([-1]), &golden[&format!("{place}.f32")].view([-1]), name);
            compared += 1;
        }
        assert!(compared > 10, "{compared} cases");
    }
}
