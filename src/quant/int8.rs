//! Eight-bit integers with one scale to a row: the weights of LLM.int8() (arXiv:2208.07339), as bitsandbytes stores them.

mod kernels;

use tch::{Kind, Tensor};

use super::nibbles;
use crate::ops::cuda;

/// Numbers quantised at a time where libtorch's operations do it, so that their copies stay small beside the weight.
const CHUNK: i64 = 1 << 22;

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
        let weight = weight.contiguous();
        let (codes, absmax) = match nibbles::serves(weight.device(), weight.kind()) {
            true => kernels::quantise(&weight),
            false => quantise_plainly(&weight),
        };
        Self { shape: weight.size(), kind: weight.kind(), codes, absmax }
    }

    /// [`Int8::of`] in libtorch's own operations, for every device.
    pub(super) fn of_plainly(weight: &Tensor) -> Self {
        let weight = weight.contiguous();
        let (codes, absmax) = quantise_plainly(&weight);
        Self { shape: weight.size(), kind: weight.kind(), codes, absmax }
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
        if nibbles::serves(self.codes.device(), self.kind) && self.absmax.is_contiguous() {
            return kernels::dequantise(self).view(&self.shape[..]);
        }
        self.dequantised_plainly()
    }

    /// [`Int8::dequantised`] in libtorch's own operations, for every device.
    pub(super) fn dequantised_plainly(&self) -> Tensor {
        let wide = self.codes.to_kind(Kind::Float) * self.absmax.unsqueeze(1) * (1.0 / 127.0);
        wide.to_kind(self.kind).view(&self.shape[..])
    }
}

/// Codes (rows, in) and magnitudes (rows) of a contiguous weight, in libtorch's own operations.
fn quantise_plainly(weight: &Tensor) -> (Tensor, Tensor) {
    let columns = weight.size()[weight.dim() - 1];
    let all = weight.view([-1, columns]);
    let rows = all.size()[0];
    let codes = Tensor::empty([rows, columns], (Kind::Int8, weight.device()));
    let magnitudes = Tensor::empty([rows], (Kind::Float, weight.device()));
    let chunk = (CHUNK / columns.max(1)).max(1);
    for start in (0..rows).step_by(chunk as usize) {
        let length = chunk.min(rows - start);
        let rows = all.narrow(0, start, length).to_kind(Kind::Half); // (chunk, in)
        let absmax = rows.abs().amax([1], false).to_kind(Kind::Float); // (chunk)
        // Not 127 / absmax, whose last bit may differ. A row of zeros has no scale: 0 * inf, which no integer is.
        let scale = (absmax.reciprocal() * 127.0).nan_to_num(0.0, 0.0, 0.0).unsqueeze(1);
        codes.narrow(0, start, length).copy_(&(rows.to_kind(Kind::Float) * scale).round().to_kind(Kind::Int8));
        magnitudes.narrow(0, start, length).copy_(&absmax);
    }
    (codes, magnitudes)
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

    #[test]
    fn kernels_equal_their_twins_bit_for_bit() {
        tch::manual_seed(37);
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
            for shape in [[1, 1], [3, 64], [5, 31], [700, 6001]] {
                let scale = (Tensor::randn([shape[0], 1], (Kind::Float, Device::Cpu)) * 4.0).exp();
                let values = (Tensor::randn(shape, (Kind::Float, Device::Cpu)) * scale).clamp(-6e4, 6e4);
                // Zeros, and numbers that fp16 has none for.
                let _ = values.get(0).g_mul_scalar_(if shape[0] == 5 { 0.0 } else { 1e-6 });
                let weight = Int8::of(&values.to_kind(kind));
                let (codes, absmax) = quantise_plainly(&values.to_kind(kind));
                let what = format!("{shape:?} {kind:?}");
                assert_same(&weight.codes, &codes, &what);
                assert_same(&weight.absmax, &absmax, &what);
                assert_same(&weight.dequantised(), &weight.dequantised_plainly(), &what);
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
