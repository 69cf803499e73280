//! The kernels against libtorch's own conversion, bit for bit.

use tch::{Device, Kind, Tensor};

use super::*;
use crate::ops::cuda::emulator::on_gpus;
use crate::ops::testing::randn;
use crate::quant::four_bit::assert_same;

fn bytes(codes: &Tensor) -> Tensor {
    codes.view_dtype(Kind::Uint8)
}

#[test]
fn rows_are_quantised_as_libtorch_does_it() {
    tch::manual_seed(5);
    let on_cpu = (Kind::Float, Device::Cpu);
    // Every code and the middle between each two, in a row whose scale is 1; numbers beyond all magnitudes; zeros, of either sign.
    let every = Tensor::arange(127, (Kind::Uint8, Device::Cpu)).view_dtype(Kind::Float8e4m3fn).to_kind(Kind::Float);
    let middle = (every.narrow(0, 1, 126) + every.narrow(0, 0, 126)) / 2.0;
    let numbers = Tensor::cat(&[&every, &(-&every), &middle, &(-&middle)], 0).unsqueeze(0);
    let columns = numbers.size()[1];
    let wide = Tensor::randn([40, columns], on_cpu) * (Tensor::randn([40, columns], on_cpu) * 8.0).exp();
    let zeros = Tensor::cat(&[Tensor::zeros([1, columns], on_cpu), -Tensor::zeros([1, columns], on_cpu)], 0);
    let tiny = Tensor::randn([3, columns], on_cpu) * 1e-41;
    let all = Tensor::cat(&[&numbers, &wide, &zeros, &tiny], 0);
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        let weight = all.clamp(-60_000.0, 60_000.0).to_kind(kind);
        let found = Fp8::of(&weight);
        let (codes, scales) = quantise_plainly(&weight);
        assert_eq!((found.codes.kind(), found.block), (Kind::Float8e4m3fn, [1, columns]));
        assert_same(&found.scales, &scales, &format!("{kind:?} scales"));
        assert_same(&bytes(&found.codes), &bytes(&codes), &format!("{kind:?} codes"));
        assert_same(&found.dequantised(), &found.dequantised_plainly(), &format!("{kind:?} numbers"));
        on_gpus(|device| {
            let (codes, scales) = cuda::fp8_quantise(&weight.to_device(device)).expect("served");
            assert_same(&scales, &found.scales, &format!("{kind:?} scales on {device:?}"));
            assert_same(&bytes(&codes), &bytes(&found.codes), &format!("{kind:?} codes on {device:?}"));
        });
        // In the row whose scale is 1 what is a code already comes back as it was.
        let back = found.dequantised().get(0).narrow(0, 0, 2 * 127);
        assert!(back.equal(&weight.get(0).narrow(0, 0, 2 * 127)), "{kind:?}");
    }
}

/// Half a step of the last of three bits is the most that rounding costs.
#[test]
fn what_is_made_whole_is_near_what_was_quantised() {
    let weight = Tensor::randn([64, 300], (Kind::Float, Device::Cpu));
    let found = Fp8::of(&weight).dequantised();
    let smallest = weight.abs().amax([1], true) / 448.0 * 2f64.powi(-10); // half a step of the smallest numbers
    let allowed = (weight.abs() / 16.0).maximum(&smallest) * 1.000_001;
    let beyond = (&found - &weight).abs().gt_tensor(&allowed).sum(Kind::Int64).int64_value(&[]);
    assert_eq!(beyond, 0);
}

#[test]
fn the_kernels_equal_their_twin_on_every_code_and_block() {
    let every = Tensor::arange(256, (Kind::Int64, Device::Cpu)).to_kind(Kind::Uint8);
    for own in [Kind::Float8e4m3fn, Kind::Float8e5m2] {
        let finite = every.view_dtype(own).to_kind(Kind::Float).isfinite();
        let finite = every.masked_select(&finite);
        for ([rows, columns], block) in
            [([9, 256], [1, 256]), ([9, 130], [4, 48]), ([1, 7], [1, 1]), ([260, 40], [128, 128])]
        {
            let drawn = Tensor::randint(finite.numel() as i64, [rows * columns], (Kind::Int64, Device::Cpu));
            let codes = finite.index_select(0, &drawn).view([rows, columns]).view_dtype(own);
            let shape = [(rows + block[0] - 1) / block[0], (columns + block[1] - 1) / block[1]];
            let scales = (Tensor::rand(shape, (Kind::Float, Device::Cpu)) * -12.0).exp();
            for rounding in [Rounding::None, Rounding::Half, Rounding::BFloat16] {
                for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
                    let (codes, scales) = (codes.shallow_clone(), scales.shallow_clone());
                    let weight = Fp8 { kind, rounding, codes, scales, block, multiplied: false };
                    let what = format!("{own:?} {rows} x {columns} {block:?} {rounding:?} {kind:?}");
                    let found = weight.dequantised();
                    assert_same(&found, &weight.dequantised_plainly(), &what);
                    on_gpus(|device| {
                        let (codes, scales) = (weight.codes.to_device(device), weight.scales.to_device(device));
                        let own = cuda::fp8_dequantise(&codes, &scales, block, rounding.kind(), kind).expect("served");
                        assert_same(&own, &found, &format!("{what} on {device:?}"));
                    });
                }
            }
        }
    }
}

/// Rows of every width that a team of threads shares, from one number to more than a block takes at once.
#[test]
fn rows_of_every_width_are_quantised_alike() {
    for [rows, width] in [[1, 1], [9, 5], [3, 24], [2, 130], [1, 2056], [2, 4099]] {
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
            let x = (randn(&[rows, width], 3) * 7.0).to_kind(kind);
            let found = Fp8::of(&x);
            on_gpus(|device| {
                let (codes, scales) = cuda::fp8_quantise(&x.to_device(device)).expect("served");
                assert_same(&scales, &found.scales, &format!("{rows} x {width} {kind:?} scales on {device:?}"));
                assert_same(&bytes(&codes), &bytes(&found.codes), &format!("{rows} x {width} {kind:?} on {device:?}"));
            });
        }
    }
}

/// Against the product of the numbers that both sides stand for once they are quantised; on a real GPU by its own units.
#[test]
fn products_are_those_of_what_both_sides_stand_for() {
    let (tokens, input, output) = (37, 64, 48);
    let weight = randn(&[output, input], 1) * (randn(&[output, 1], 2) * 2.0).exp();
    let rows = Fp8 { multiplied: true, ..Fp8::of(&weight.to_kind(Kind::BFloat16)) };
    assert!(rows.has_rows());
    let whole = Fp8 { kind: Kind::Float, ..rows.handle() }.dequantised();
    let quantised = |x: &Tensor| Fp8 { kind: Kind::Float, ..Fp8::of(x) }.dequantised();
    let x = randn(&[tokens, input], 3).to_kind(Kind::BFloat16);
    let dy = randn(&[tokens, output], 4).to_kind(Kind::BFloat16);
    let y = quantised(&x).mm(&whole.tr());
    let codes = rows.codes.to_kind(Kind::Float);
    let dx = quantised(&(dy.to_kind(Kind::Float) * rows.scales.tr())).mm(&codes);
    // Half of a step of bf16, and what the order of a sum leaves.
    let close = |found: &Tensor, expected: &Tensor, what: &str| {
        let off = (found.to_device(Device::Cpu).to_kind(Kind::Float) - expected).abs();
        let allowed = expected.abs() * 0.5f64.powi(8) + expected.abs().max() * 1e-5;
        assert!(bool::try_from(off.le_tensor(&allowed).all()).unwrap(), "{what}: {:e}", off.max().double_value(&[]));
    };
    on_gpus(|device| {
        let (codes, scales) = (rows.codes.to_device(device), rows.scales.to_device(device));
        let rows = Fp8 { codes, scales, ..rows.handle() };
        close(&rows.product(&x.to_device(device)), &y, &format!("Y on {device:?}"));
        close(&rows.product_back(&dy.to_device(device)), &dx, &format!("dX on {device:?}"));
    });
    // The arithmetic is another one than that of whole numbers, and near it.
    let exact = x.to_kind(Kind::Float).mm(&whole.tr());
    let off = (&y - &exact).norm().double_value(&[]) / exact.norm().double_value(&[]);
    assert!((1e-3..0.05).contains(&off), "{off}");
}
