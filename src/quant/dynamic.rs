//! Block-wise dynamic quantisation to 8 bits (arXiv:2110.02861): a number is its block's largest magnitude times one of 256 codes.
//!
//! ```text
//! absmax_b  = max |x_i|                     over the 256 numbers of block b, in row-major order; the last block may be shorter
//! code_i    = the index nearest to x_i * (1 / absmax_b) in the map; of two equally near the lower; 0 where absmax_b is 0
//! x_i       ~ map[code_i] * absmax_b
//! ```
//!
//! A map is a float with few bits whose exponent takes the fewer of them the nearer to 1 a number is: decades from 1e-7 to 1,
//! each with twice as many steps as the one below. The bits are those of bitsandbytes 0.50.2 (`create_dynamic_map`,
//! `quantize_blockwise`), whose CPU kernel for fp32 alone is coarser: it goes through a table of 65536 values.

use multiversion::multiversion;
use tch::{Device, Kind, Tensor};

use crate::torch_ext::{elements, filled, filled_pair};

/// Numbers that share a scale.
pub const BLOCK: usize = 256;

/// The 256 codes, and the bounds between them.
#[derive(Debug)]
pub struct Map {
    table: Table,
    /// (256), fp32, on the device that the map is for.
    codes: Tensor,
    /// (255), fp32, likewise: what is above the i-th is at least code i + 1.
    bounds: Tensor,
}

/// A tensor in 8 bits.
#[derive(Debug)]
pub struct Quantised {
    /// Indices into the map, uint8, shaped as the numbers were.
    pub codes: Tensor,
    /// Largest magnitude of each block: (ceil(numbers / [`BLOCK`])), fp32.
    pub absmax: Tensor,
}

impl Map {
    /// For numbers of either sign.
    pub fn signed(device: Device) -> Self {
        Self::of(codes(true), device)
    }

    /// For numbers that are not negative: half the distance between codes.
    pub fn unsigned(device: Device) -> Self {
        Self::of(codes(false), device)
    }

    fn of(codes: [f32; 256], device: Device) -> Self {
        let mut bounds = [f32::INFINITY; 256];
        for (bound, pair) in bounds.iter_mut().zip(codes.windows(2)) {
            *bound = (pair[0] + pair[1]) / 2.0;
        }
        let on = |values: &[f32]| Tensor::from_slice(values).to_device(device);
        let starts = starts(&bounds);
        Self { codes: on(&codes), bounds: on(&bounds[..255]), table: Table { codes, bounds, starts } }
    }
}

/// Blocks that hold `numbers` numbers.
pub fn blocks(numbers: usize) -> usize {
    numbers.div_ceil(BLOCK)
}

/// The nearest codes of fp32 `values`, which are finite and on the map's device; no wait for the device.
pub fn quantise(values: &Tensor, map: &Map) -> Quantised {
    if values.device() == Device::Cpu { on_cpu::quantise(values, &map.table) } else { plain::quantise(values, map) }
}

/// The fp32 numbers that codes stand for, shaped as they are; everything on the map's device.
pub fn dequantise(codes: &Tensor, absmax: &Tensor, map: &Map) -> Tensor {
    if codes.device() == Device::Cpu {
        on_cpu::dequantise(codes, absmax, &map.table)
    } else {
        plain::dequantise(codes, absmax, map)
    }
}

/// The map's numbers in ascending order.
///
/// Decade i, from 1e-6 on, cuts 0.1..1 into equal parts and takes the middle of each; 0 and 1 are added.
pub(super) fn codes(signed: bool) -> [f32; 256] {
    let mut codes = vec![0.0, 1.0];
    for decade in 0..7 {
        let parts = 1 << if signed { decade } else { decade + 1 };
        let scale = 10f64.powi(decade - 6) as f32;
        // torch's linspace: from either end, so that both are exact.
        let step = (1.0 - 0.1f32) / parts as f32;
        let edge = |i: i32| match i < (parts + 1) / 2 {
            true => step.mul_add(i as f32, 0.1),
            false => step.mul_add(-(parts - i) as f32, 1.0),
        };
        for i in 0..parts {
            let middle = (edge(i) + edge(i + 1)) / 2.0 * scale;
            codes.push(middle);
            codes.extend(signed.then_some(-middle));
        }
    }
    codes.sort_by(f32::total_cmp);
    codes.try_into().expect("2 and 2 + 4 + .. + 128 are 256, of either map")
}

#[derive(Debug)]
struct Table {
    codes: [f32; 256],
    /// Between a code and the next, and none above the last.
    bounds: [f32; 256],
    /// Of each [`bucket`] the number of bounds below all that is in it. So fine are the buckets that at most one lies inside.
    starts: Box<[u8; BUCKETS]>,
}

/// All bits of a number but its sign.
const MAGNITUDE: u32 = 0x7fff_ffff;
/// Sign, and 12 bits of magnitude.
const BUCKETS: usize = 1 << 13;
/// The upper halves of 2^-25 and of 1: no bound of either map but 0 is nearer to 0, and scaled numbers go to 1.
const LEAST: u32 = 0x3300;
const MOST: u32 = 0x3f80;

/// Numbers that share sign, exponent and 7 bits of their fraction.
#[inline(always)]
fn bucket(scaled: f32) -> usize {
    let bits = scaled.to_bits();
    let place = ((bits & MAGNITUDE) >> 16).clamp(LEAST, MOST) - LEAST;
    (place | (bits >> 31 << 12)) as usize & (BUCKETS - 1)
}

fn starts(bounds: &[f32; 256]) -> Box<[u8; BUCKETS]> {
    let mut starts = Box::new([0; BUCKETS]);
    for magnitude in LEAST..=MOST {
        // The least number of the bucket: nearest to 0 where positive, farthest where negative.
        let near = f32::from_bits(if magnitude == LEAST { 0 } else { magnitude << 16 });
        let far = -f32::from_bits((magnitude << 16) | 0xffff);
        for least in [near, far] {
            starts[bucket(least)] = bounds.iter().filter(|bound| **bound < least).count() as u8;
        }
    }
    starts
}

/// In libtorch's operations, on any device; the twin of [`on_cpu`].
mod plain {
    use super::*;

    pub fn quantise(values: &Tensor, map: &Map) -> Quantised {
        let numbers = values.numel();
        let missing = (blocks(numbers) * BLOCK - numbers) as i64;
        let rows = values.flatten(0, -1).constant_pad_nd([0, missing]).reshape([-1, BLOCK as i64]); // (blocks, 256)
        let absmax = rows.abs().amax([1i64].as_slice(), true); // (blocks, 1)
        let scaled = &rows * absmax.reciprocal();
        let codes = scaled.bucketize(&map.bounds, true, false) * absmax.greater(0.0); // (blocks, 256)
        let codes = codes.to_kind(Kind::Uint8).flatten(0, -1).narrow(0, 0, numbers as i64).reshape(values.size());
        Quantised { codes, absmax: absmax.flatten(0, -1) }
    }

    pub fn dequantise(codes: &Tensor, absmax: &Tensor, map: &Map) -> Tensor {
        let numbers = codes.numel();
        let values = map.codes.index_select(0, &codes.flatten(0, -1).to_kind(Kind::Int));
        let missing = (absmax.numel() * BLOCK - numbers) as i64;
        let rows = values.constant_pad_nd([0, missing]).reshape([-1, BLOCK as i64]) * absmax.unsqueeze(1); // (blocks, 256)
        rows.flatten(0, -1).narrow(0, 0, numbers as i64).reshape(codes.size())
    }
}

/// In one pass over blocks, in parallel.
mod on_cpu {
    use super::*;

    pub fn quantise(values: &Tensor, table: &Table) -> Quantised {
        let (flat, count) = (values.contiguous(), values.numel());
        let numbers = elements::<f32>(&flat);
        let rows = blocks(count) as i64;
        let [codes, absmax] = filled_pair::<u8, f32>(&[rows, BLOCK as i64], &[rows], |range, codes, absmax| {
            let numbers = &numbers[range.start * BLOCK..count.min(range.end * BLOCK)];
            quantise_blocks(numbers, table, codes, absmax);
        });
        let codes = codes.flatten(0, -1).narrow(0, 0, count as i64).reshape(values.size());
        Quantised { codes, absmax }
    }

    pub fn dequantise(codes: &Tensor, absmax: &Tensor, table: &Table) -> Tensor {
        let (flat, count) = (codes.contiguous(), codes.numel());
        let (codes_of, scales) = (elements::<u8>(&flat), elements::<f32>(absmax));
        let values = filled::<f32>(&[blocks(count) as i64, BLOCK as i64], |range, values| {
            let codes = &codes_of[range.start * BLOCK..count.min(range.end * BLOCK)];
            dequantise_blocks(codes, &scales[range], &table.codes, values);
        });
        values.flatten(0, -1).narrow(0, 0, count as i64).reshape(codes.size())
    }

    /// What is behind the last number in its block gets code 0.
    #[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
    fn quantise_blocks(numbers: &[f32], table: &Table, codes: &mut [u8], absmax: &mut [f32]) {
        for ((numbers, codes), absmax) in numbers.chunks(BLOCK).zip(codes.chunks_exact_mut(BLOCK)).zip(absmax) {
            // Magnitudes are in the order of their bits.
            let largest = numbers.iter().fold(0, |largest, number| largest.max(number.to_bits() & MAGNITUDE));
            *absmax = f32::from_bits(largest);
            let (these, behind) = codes.split_at_mut(numbers.len());
            behind.fill(0);
            if largest == 0 {
                these.fill(0);
                continue;
            }
            let scale = absmax.recip();
            for (code, number) in these.iter_mut().zip(numbers) {
                let scaled = number * scale;
                let start = table.starts[bucket(scaled)];
                *code = start + u8::from(table.bounds[usize::from(start)] < scaled);
            }
        }
    }

    #[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
    fn dequantise_blocks(codes: &[u8], absmax: &[f32], map: &[f32; 256], values: &mut [f32]) {
        for ((codes, values), scale) in codes.chunks(BLOCK).zip(values.chunks_exact_mut(BLOCK)).zip(absmax) {
            let (these, behind) = values.split_at_mut(codes.len());
            for (value, code) in these.iter_mut().zip(codes) {
                *value = map[usize::from(*code)] * scale;
            }
            behind.fill(0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::Checkpoint;

    /// `tests/python/optimizers.py` writes it.
    fn reference(name: &str, kind: Kind) -> Tensor {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/optimizers.safetensors");
        Checkpoint::open_file(&path).unwrap().tensor(name, kind, Device::Cpu).unwrap()
    }

    fn maps() -> [(&'static str, Map); 2] {
        [("signed", Map::signed(Device::Cpu)), ("unsigned", Map::unsigned(Device::Cpu))]
    }

    #[test]
    fn the_maps_are_those_of_bitsandbytes_bit_for_bit() {
        for (name, map) in maps() {
            let expected = Vec::<f32>::try_from(reference(&format!("{name}/map"), Kind::Float)).unwrap();
            for (i, (found, expected)) in map.table.codes.iter().zip(expected).enumerate() {
                assert_eq!(found.to_bits(), expected.to_bits(), "{name} {i}: {found:e} is not {expected:e}");
            }
        }
    }

    #[test]
    fn codes_scales_and_numbers_are_those_of_bitsandbytes_bit_for_bit() {
        for (name, map) in maps() {
            let of = |part: &str, kind| reference(&format!("{name}/{part}"), kind);
            let values = of("values", Kind::Float);
            for Quantised { codes, absmax } in [plain::quantise(&values, &map), quantise(&values, &map)] {
                assert!(absmax.equal(&of("absmax", Kind::Float)), "{name}");
                assert!(codes.equal(&of("codes", Kind::Uint8)), "{name}");
                for back in [plain::dequantise(&codes, &absmax, &map), dequantise(&codes, &absmax, &map)] {
                    assert!(back.equal(&of("back", Kind::Float)), "{name}");
                }
            }
        }
    }

    #[test]
    fn the_kernels_equal_their_plain_twins_bit_for_bit() {
        for (name, map) in maps() {
            // The bounds themselves and their neighbours, then numbers of all magnitudes.
            let bounds: Vec<f32> = map.table.bounds[..255].to_vec();
            let near = bounds.iter().flat_map(|bound| [bound.next_down(), *bound, bound.next_up()]);
            let near: Vec<f32> = near.flat_map(|value| [1.0, value]).collect();
            let wave = (Tensor::arange(70_007, (Kind::Float, Device::Cpu)) * 1.7).sin();
            let wide = &wave * (Tensor::arange(70_007, (Kind::Float, Device::Cpu)) * 0.001 - 40.0).exp();
            for values in
                [Tensor::from_slice(&near), wide.shallow_clone(), wide.reshape([7, 73, 137]), wide.narrow(0, 0, 0)]
            {
                let values = if name == "signed" { values } else { values.abs() };
                let (plain, fast) = (plain::quantise(&values, &map), quantise(&values, &map));
                assert!(
                    plain.codes.equal(&fast.codes) && plain.absmax.equal(&fast.absmax),
                    "{name} {:?}",
                    values.size()
                );
                assert_eq!((fast.codes.size(), fast.absmax.numel()), (values.size(), blocks(values.numel())));
                let plain = plain::dequantise(&fast.codes, &fast.absmax, &map);
                assert!(plain.equal(&dequantise(&fast.codes, &fast.absmax, &map)), "{name} {:?}", values.size());
            }
        }
    }
}
