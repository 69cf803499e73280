//! The kernels against their twin; against the tools themselves, numbers are compared where their files are read.

use tch::{Device, Kind, Tensor};

use super::*;
use crate::ops::cuda::emulator::on_gpus;
use crate::quant::four_bit::assert_same;

fn weight(bits: u32, [rows, columns]: [i64; 2], group: i64, scales: Kind, with_zeros: bool, ordered: bool) -> Grouped {
    let on_cpu = |kind| (kind, Device::Cpu);
    let stride = (columns * i64::from(bits) + 31) / 32 * 4;
    let groups = (columns + group - 1) / group;
    let order = Tensor::randint(groups, [columns], on_cpu(Kind::Int));
    Grouped {
        columns,
        bits,
        group,
        kind: Kind::Float,
        codes: Tensor::randint(256, [rows, stride], on_cpu(Kind::Uint8)),
        // Small ones among them, whose products are no normal numbers of fp16.
        scales: (Tensor::rand([rows, groups], on_cpu(Kind::Float)) * -18.0).exp().to_kind(scales),
        zeros: with_zeros.then(|| Tensor::randint(1 << bits, [rows, groups], on_cpu(Kind::Uint8))),
        order: ordered.then_some(order),
    }
}

/// A weight's numbers as a device makes them.
fn on(weight: &Grouped, device: Device) -> Tensor {
    let moved = |part: &Option<Tensor>| part.as_ref().map(|part| part.to_device(device));
    let weight = Grouped {
        codes: weight.codes.to_device(device),
        scales: weight.scales.to_device(device),
        zeros: moved(&weight.zeros),
        order: moved(&weight.order),
        ..weight.handle()
    };
    cuda::grouped_dequantise(&weight.groups(), weight.kind).expect("served")
}

#[test]
fn the_kernels_equal_their_twin_at_every_size() {
    tch::manual_seed(9);
    for bits in BITS {
        for (shape, group) in [
            ([1, 32], 32),
            ([7, 96], 32),
            ([33, 256], 128),
            ([5, 160], 64), // the last group is short
            ([4, 76], 76),  // no whole pieces
            ([3, 61], 13),  // groups that begin inside a byte
            ([2, 1], 1),
            ([300, 224], 224),
        ] {
            for scales in [Kind::Half, Kind::BFloat16, Kind::Float] {
                for (zeros, ordered) in [(false, false), (true, false), (true, true), (false, true)] {
                    let mut weight = weight(bits, shape, group, scales, zeros, ordered);
                    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
                        weight.kind = kind;
                        let what =
                            format!("{bits} bits {shape:?} groups of {group} {scales:?} {zeros} {ordered} {kind:?}");
                        let found = weight.dequantised();
                        assert_eq!((found.size(), found.kind()), (shape.to_vec(), kind), "{what}");
                        assert_same(&found, &weight.dequantised_plainly(), &what);
                        on_gpus(|device| assert_same(&on(&weight, device), &found, &format!("{what} on {device:?}")));
                    }
                }
            }
        }
    }
}

#[test]
fn codes_follow_one_another_from_the_lowest_bits_on() {
    let bytes = Tensor::from_slice(&[0b1010_0100u8, 0b1100_1101, 0b0111_0001, 0]).view([1, 4]);
    for (bits, expected) in [
        (2, vec![0, 1, 2, 2, 1, 3, 0, 3]),
        (3, vec![4, 4, 6, 6, 4, 3, 4, 3]),
        (4, vec![4, 10, 13, 12, 1, 7, 0, 0]),
        (8, vec![0xa4, 0xcd, 0x71, 0, 0, 0, 0, 0]),
    ] {
        let mut found = [0; 8];
        kernels::unpack(&[0b1010_0100, 0b1100_1101, 0b0111_0001, 0], bits, &mut found);
        assert_eq!(found.to_vec(), expected, "{bits} bits");
        let count = 8.min(32 / i64::from(bits));
        let plain = Vec::<f32>::try_from(plain_codes(&bytes, bits, count).view([-1])).unwrap();
        assert_eq!(
            plain,
            expected[..count as usize].iter().map(|code| f32::from(*code)).collect::<Vec<_>>(),
            "{bits} bits"
        );
    }
}
