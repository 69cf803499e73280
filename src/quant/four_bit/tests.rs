//! Against what bitsandbytes makes of the same tensors (`tests/python/bnb_quants.py`), and kernels against their twins.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::*;
use crate::ops::cuda::emulator::{on_gpus, plainly};

fn golden() -> BTreeMap<String, Tensor> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/bnb_quants.safetensors");
    Tensor::read_safetensors(path).expect("the fixture is committed").into_iter().collect()
}

/// Bit for bit: -0 is not 0.
pub(in crate::quant) fn assert_same(found: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!((found.kind(), found.numel()), (expected.kind(), expected.numel()), "{what}");
    let bits = |t: &Tensor| {
        let t = t.to_device(Device::Cpu).contiguous().view([-1]);
        match t.kind() {
            Kind::Float => t.view_dtype(Kind::Int),
            Kind::Half | Kind::BFloat16 => t.view_dtype(Kind::Int16),
            _ => t,
        }
        .to_kind(Kind::Int64)
    };
    let wrong = bits(found).ne_tensor(&bits(expected)).to_kind(Kind::Int64);
    let count = wrong.sum(Kind::Int64).int64_value(&[]);
    let first = wrong.argmax(None, false).int64_value(&[]);
    let at = |t: &Tensor| t.contiguous().view([-1]).to_kind(Kind::Double).double_value(&[first]);
    assert!(count == 0, "{what}: {count} differ, the first at {first}: {:e} is not {:e}", at(found), at(expected));
}

fn flat(tensor: &Tensor) -> Tensor {
    tensor.contiguous().view([-1])
}

/// The same weight on another device.
fn on(weight: &FourBit, device: Device) -> FourBit {
    let moved = |tensor: &Tensor| tensor.to_device(device);
    let absmax = match &weight.absmax {
        Absmax::Plain(absmax) => Absmax::Plain(moved(absmax)),
        Absmax::Nested { codes, absmax, offset, map } => {
            Absmax::Nested { codes: moved(codes), absmax: moved(absmax), offset: *offset, map: moved(map) }
        }
    };
    FourBit { codes: moved(&weight.codes), absmax, ..weight.handle() }
}

/// Numbers of all magnitudes and signs, denormal ones, zeros and blocks of zeros among them; the sum of all is finite.
fn wide(n: i64, seed: i64) -> Tensor {
    tch::manual_seed(seed);
    let exponents = Tensor::rand([n], (Kind::Float, Device::Cpu)) * 290.0 - 150.0;
    let values = Tensor::randn([n], (Kind::Float, Device::Cpu)) * exponents.exp2();
    let at = Tensor::arange(n, (Kind::Int64, Device::Cpu));
    values.masked_fill(&at.bitwise_and(1023).lt(130), 0.0).clamp(-1e36, 1e36)
}

#[test]
fn codes_magnitudes_and_numbers_are_those_of_bitsandbytes() {
    let golden = golden();
    let mut compared = 0;
    for (name, packed) in golden.iter().filter(|(name, _)| name.ends_with(".packed")) {
        let place = name.strip_suffix(".packed").unwrap();
        let mut parts = place.split('.');
        let tensor = &golden[parts.next().unwrap()];
        let code = if parts.next() == Some("nf4") { FourBitType::Nf4 } else { FourBitType::Fp4 };
        let block = parts.next().unwrap().parse().unwrap();
        let nested = parts.next().is_some();
        let mut found = FourBit::of(tensor, code, block, nested);
        assert_same(&found.codes, &flat(packed), name);
        match &found.absmax {
            Absmax::Plain(absmax) => assert_same(absmax, &golden[&format!("{place}.absmax")], name),
            Absmax::Nested { codes, absmax, offset, map } => {
                assert_same(codes, &golden[&format!("{place}.absmax")], name);
                assert_same(absmax, &golden[&format!("{place}.nested_absmax")], name);
                assert_same(&Tensor::from_slice(&[*offset]), &golden[&format!("{place}.nested_offset")], name);
                assert_same(map, &golden["dynamic.code"], "the dynamic map");
            }
        }
        for (short, kind) in [("f32", Kind::Float), ("f16", Kind::Half), ("bf16", Kind::BFloat16)] {
            // bitsandbytes rounds with an instruction of AVX-512 that takes denormal numbers for zero, where the processor has it.
            let stored = if place.starts_with("denormal") { "f32" } else { short };
            let expected = &golden[&format!("{place}.{stored}")].to_kind(kind);
            (found.stored, found.kind) = (kind, kind);
            assert_same(&found.dequantised(), expected, &format!("{place} as {short}"));
            assert_same(&found.dequantised_plainly(), expected, &format!("{place} as {short}, plainly"));
            on_gpus(|device| {
                let what = format!("{place} as {short} on {device:?}");
                assert_same(&on(&found, device).dequantised_on_cuda().expect("served"), &flat(expected), &what);
            });
        }
        on_gpus(|device| {
            let what = format!("{place} made on {device:?}");
            let (codes, absmax) = quantise(&tensor.to_device(device), code, block);
            assert_same(&codes, &flat(packed), &what);
            if !nested {
                assert_same(&absmax, &golden[&format!("{place}.absmax")], &what);
                return;
            }
            let whole = FourBit::of(&tensor.to_device(device), code, block, true);
            let Absmax::Nested { codes, absmax, offset, .. } = &whole.absmax else { unreachable!("asked for") };
            assert_same(codes, &golden[&format!("{place}.absmax")], &what);
            assert_same(absmax, &golden[&format!("{place}.nested_absmax")], &what);
            assert_same(&Tensor::from_slice(&[*offset]), &golden[&format!("{place}.nested_offset")], &what);
        });
        compared += 1;
    }
    assert!(compared > 40, "{compared} cases");
}

#[test]
fn code_books_are_those_of_bitsandbytes() {
    let golden = golden();
    for code in [FourBitType::Nf4, FourBitType::Fp4] {
        assert_same(&Tensor::from_slice(code.values()), &golden[&format!("{code}.code")], "code book");
    }
}

#[test]
fn kernels_equal_their_twins_at_every_block_size() {
    tch::manual_seed(3);
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        for block in BLOCKS {
            for n in [1, 31, 2 * block - 1, 2 * block, 3 * block + 33] {
                let values = Tensor::randn([n], (Kind::Float, Device::Cpu)).to_kind(kind);
                for code in [FourBitType::Nf4, FourBitType::Fp4] {
                    let what = format!("{code} {kind:?} block {block}, {n} numbers");
                    let (codes, absmax) = quantise_plainly(&values, code, block);
                    let found = FourBit::of(&values, code, block, false);
                    assert_same(&found.codes, &flat(&codes), &what);
                    let Absmax::Plain(own) = &found.absmax else { unreachable!("not asked for double quantisation") };
                    assert_same(own, &absmax, &what);
                    assert_same(&found.dequantised(), &found.dequantised_plainly(), &what);
                }
            }
        }
    }
}

/// Tails, block borders within a warp's tile and beyond it, scales of two levels, on the GPU that tests emulate and on a real one.
#[test]
fn cuda_kernels_equal_the_cpu_at_every_block_size() {
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        for block in BLOCKS {
            for n in [1, 33, block - 1, 2 * block + 1, 9 * 1024 + 3 * 32, 8 * 1024] {
                let values = [wide(n, 5), Tensor::randn([n], (Kind::Float, Device::Cpu))].map(|t| t.to_kind(kind));
                // fp16 has no numbers that large.
                for (values, code) in values.iter().zip([FourBitType::Nf4, FourBitType::Fp4]) {
                    let values = values.nan_to_num(0.0, 6e4, -6e4);
                    let what = format!("{code} {kind:?} block {block}, {n} numbers");
                    let weights = [false, true].map(|nested| FourBit::of(&values, code, block, nested));
                    let expected: Vec<Tensor> = weights.iter().map(FourBit::dequantised).collect();
                    on_gpus(|device| {
                        let (codes, absmax) = quantise(&values.to_device(device), code, block);
                        let Absmax::Plain(own) = &weights[0].absmax else {
                            unreachable!("not asked for double quantisation")
                        };
                        assert_same(&codes, &weights[0].codes, &what);
                        assert_same(&absmax, own, &what);
                        for (weight, expected) in weights.iter().zip(&expected) {
                            let weight = on(weight, device);
                            assert_same(&weight.dequantised_on_cuda().expect("served"), &flat(expected), &what);
                            let plain = plainly(|| weight.dequantised_plainly());
                            assert_same(&plain, &flat(expected), &format!("{what}, its twin on {device:?}"));
                        }
                    });
                }
            }
        }
    }
}

#[test]
fn what_lies_askew_is_left_to_the_twin() {
    let weight = FourBit::of(&wide(4096, 7), FourBitType::Nf4, 64, false);
    let askew = Tensor::cat(&[Tensor::zeros([1], (Kind::Uint8, Device::Cpu)), weight.codes.shallow_clone()], 0)
        .narrow(0, 1, 2048);
    let expected = weight.dequantised();
    let weight = FourBit { codes: askew, ..weight };
    on_gpus(|device| {
        // On a real GPU the copy lies well again.
        assert_eq!(on(&weight, device).dequantised_on_cuda().is_none(), device == Device::Cpu);
        assert_same(&on(&weight, device).dequantised(), &expected, "askew");
    });
}
