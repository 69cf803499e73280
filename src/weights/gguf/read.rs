//! Stored blocks to a tensor: read, dequantised, put into order and rounded in one parallel pass.

use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use tch::{Kind, Tensor};

use super::{Conversion, Quantisation};
use crate::weights::storage::{self, Source};
use crate::{Error, Result};

/// Numbers per parallel task, about: a multiple of every block's size.
const TASK: usize = 1 << 17;
/// Numbers dequantised at a time: a multiple of every block's size that fits into the nearest cache.
const PIECE: usize = 4096;

/// Reads a tensor of (rows.., row) numbers and rounds it once, from the exact f32 to `kind`.
pub(in crate::weights) fn read_blocks(
    source: Source,
    quantisation: &Quantisation,
    order: Conversion,
    shape: &[i64],
    kind: Kind,
) -> Result<Tensor> {
    let Some(dequantise) = quantisation.dequantise else {
        return Err(source.fault(format_args!("numbers of type {} are not supported", quantisation.name)));
    };
    // Kinds the loop below does not write are converted from f32 afterwards.
    let written = if matches!(kind, Kind::BFloat16 | Kind::Half) { kind } else { Kind::Float };
    let size = written.elt_size_in_bytes();
    let mut tensor = storage::allocate(shape, written)?;
    // A bias has one number per row.
    let row = if let [_, inner @ ..] = shape { inner.iter().product::<i64>() as usize } else { 1 };
    if row % quantisation.values != 0 && order != Conversion::Same {
        return Err(source.fault(format_args!("its rows of {row} are not whole blocks of {}", quantisation.name)));
    }
    let stored_bytes = |numbers: usize| numbers / quantisation.values * quantisation.bytes;
    // A head's rows change places among themselves, so a task takes whole heads.
    let task = match order {
        Conversion::Same | Conversion::FromOne => TASK,
        Conversion::Paired { half } => (TASK / row.max(1)).max(1).next_multiple_of(2 * half) * row.max(1),
        Conversion::Apart { .. } => (TASK / row.max(1)).max(1) * row.max(1),
    };
    let damaged = AtomicUsize::new(0);
    storage::bytes_mut(&mut tensor).par_chunks_mut(task * size).enumerate().try_for_each_init(
        || (Vec::new(), vec![0f32; PIECE]),
        |(blocks, numbers), (number, out)| {
            blocks.resize(stored_bytes(out.len() / size), 0);
            if let Conversion::Apart { .. } = order {
                // Its rows lie far apart.
                for (index, blocks) in blocks.chunks_exact_mut(stored_bytes(row)).enumerate() {
                    source.read(blocks, stored_bytes(order.stored(number * task / row + index) * row) as u64)?;
                }
            } else {
                source.read(blocks, stored_bytes(number * task) as u64)?;
            }
            let mut round = |blocks: &[u8], out: &mut [u8]| {
                for (blocks, out) in blocks.chunks(stored_bytes(PIECE)).zip(out.chunks_mut(PIECE * size)) {
                    let numbers = &mut numbers[..out.len() / size];
                    dequantise(blocks, numbers);
                    if order == Conversion::FromOne {
                        numbers.iter_mut().for_each(|number| *number -= 1.0);
                    }
                    write(written, numbers, out);
                }
            };
            match order {
                Conversion::Same | Conversion::FromOne | Conversion::Apart { .. } => round(blocks, out),
                Conversion::Paired { .. } => {
                    for (number, out) in out.chunks_exact_mut(row * size).enumerate() {
                        round(&blocks[stored_bytes(order.stored(number) * row)..][..stored_bytes(row)], out);
                    }
                }
            }
            damaged.fetch_add(storage::non_finite(written, out), Ordering::Relaxed);
            Ok::<(), Error>(())
        },
    )?;
    source.finite(damaged.into_inner(), written)?;
    storage::convert(source, tensor, kind)
}

/// Rounds numbers to `kind` (nearest, ties to even) and writes their bytes.
fn write(kind: Kind, numbers: &[f32], out: &mut [u8]) {
    match kind {
        Kind::BFloat16 => {
            for (number, out) in numbers.iter().zip(out.as_chunks_mut::<2>().0) {
                let bits = number.to_bits();
                let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
                // A NaN may round past the last NaN to zero; it must stay one to be noticed.
                let rounded = if number.is_nan() { 0x7fc0 } else { rounded };
                *out = (rounded as u16).to_le_bytes();
            }
        }
        Kind::Half => {
            let mut halves = [f16::ZERO; PIECE];
            let halves = &mut halves[..numbers.len()];
            halves.convert_from_f32_slice(numbers);
            for (half, out) in halves.iter().zip(out.as_chunks_mut::<2>().0) {
                *out = half.to_le_bytes();
            }
        }
        _ => {
            for (number, out) in numbers.iter().zip(out.as_chunks_mut::<4>().0) {
                *out = number.to_le_bytes();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_equals_libtorch() {
        let mut numbers: Vec<f32> =
            (0..4000u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9))).filter(|x| x.is_finite()).collect();
        numbers.extend([0.0, -0.0, 65504.0, 65519.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0]);
        let wide = Tensor::from_slice(&numbers);
        for kind in [Kind::BFloat16, Kind::Half, Kind::Float] {
            let mut out = vec![0; numbers.len() * kind.elt_size_in_bytes()];
            write(kind, &numbers, &mut out);
            assert_eq!(out, storage::bytes(&wide.to_kind(kind)), "{kind:?}");
        }
        let mut out = [0; 2];
        write(Kind::BFloat16, &[f32::from_bits(0x7fff_ffff)], &mut out);
        assert_eq!(storage::non_finite(Kind::BFloat16, &out), 1);
    }
}
