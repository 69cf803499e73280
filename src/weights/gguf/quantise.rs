//! A tensor into the bytes of a number format: rows put into llama.cpp's order and quantised, in parallel.

use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;
use rayon::prelude::*;
use tch::{Kind, Tensor};

use super::{Conversion, Quantisation};
use crate::weights::storage;
use crate::{Error, Fault, Result};

/// Beyond what any block holds; the sums by which scales are found overflow at larger ones, which then pass for nothing.
const LARGEST: f32 = 1e9;
/// Numbers per parallel task, about.
const TASK: usize = 1 << 17;

impl Quantisation {
    /// Bytes of so many numbers, whole blocks of them.
    pub(crate) fn size(&self, numbers: usize) -> usize {
        numbers / self.values * self.bytes
    }

    /// The number type that holds it as it is; `None` for blocks.
    fn kind(&self) -> Option<Kind> {
        match self.name {
            "F32" => Some(Kind::Float),
            "F16" => Some(Kind::Half),
            "BF16" => Some(Kind::BFloat16),
            _ => None,
        }
    }
}

/// The bytes of a contiguous CPU tensor of (rows.., columns), fp32 or of the format's own type, in the order in which `order` reads
/// them back. A tensor of one dimension is one row, or where `order` moves rows, one number to a row.
///
/// `name` is the tensor's, for errors: numbers that the format cannot hold.
pub(crate) fn quantise(tensor: &Tensor, format: &Quantisation, order: Conversion, name: &str) -> Result<Vec<u8>> {
    let fault = |what: String| Error::Model(Fault::new(name, what));
    let Some(quantise) = format.quantise else {
        return Err(fault(format!("{} is not written", format.name)));
    };
    let moved = !matches!(order, Conversion::Same | Conversion::FromOne);
    let columns = match tensor.size()[..] {
        [] => 1,
        [_] if moved => 1,
        [.., columns] => columns as usize,
    };
    if columns % format.values != 0 {
        return Err(fault(format!(
            "its rows of {columns} are not whole blocks of {} ({})",
            format.values, format.name
        )));
    }
    let count = tensor.numel();
    if count == 0 {
        return Ok(Vec::new());
    }
    let rows = count / columns;
    // Where each row that is written comes from.
    let mut sources = Vec::new();
    if moved {
        sources = vec![0; rows];
        (0..rows).for_each(|row| sources[order.stored(row)] = row);
    }
    let element = tensor.kind().elt_size_in_bytes();
    let as_it_is = format.kind() == Some(tensor.kind()) && order != Conversion::FromOne;
    if !as_it_is && tensor.kind() != Kind::Float {
        return Err(fault(format!("{:?} cannot be written as {}", tensor.kind(), format.name)));
    }
    let stored = storage::bytes(tensor);
    let row_bytes = columns * element;
    let mut out = vec![0; format.size(count)];
    let damaged = AtomicUsize::new(0);
    let task_rows = (TASK / columns).max(1);
    let tasks = out.par_chunks_mut(task_rows * format.size(columns)).enumerate();
    tasks.for_each_init(Vec::new, |numbers: &mut Vec<f32>, (task, out)| {
        let first = task * task_rows;
        let rows = first..(first + task_rows).min(rows);
        let source = |row: usize| &stored[if moved { sources[row] } else { row } * row_bytes..][..row_bytes];
        if as_it_is {
            for (row, out) in rows.zip(out.chunks_exact_mut(row_bytes)) {
                out.copy_from_slice(source(row));
            }
        } else {
            numbers.clear();
            for row in rows {
                numbers.extend(source(row).as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)));
            }
            if order == Conversion::FromOne {
                numbers.iter_mut().for_each(|number| *number += 1.0);
            }
            let most = if format.values > 1 { LARGEST } else { f32::MAX };
            let infinite = numbers.iter().filter(|number| number.is_nan() || number.abs() > most).count();
            damaged.fetch_add(infinite, Ordering::Relaxed);
            quantise(numbers, out);
        }
        damaged.fetch_add(infinite(format, out), Ordering::Relaxed);
    });
    match damaged.into_inner() {
        0 => Ok(out),
        count => {
            let what = format!("{count} of its numbers, or scales of them, are too large for {}", format.name);
            Err(Error::Model(Fault::new(name, what).hint("choose bf16 or f32")))
        }
    }
}

/// How many numbers, or scales of blocks, are not finite.
fn infinite(format: &Quantisation, bytes: &[u8]) -> usize {
    match format.kind() {
        Some(kind) => storage::non_finite(kind, bytes),
        None => bytes
            .chunks_exact(format.bytes)
            .flat_map(|block| format.scales.iter().map(|&at| f16::from_le_bytes([block[at], block[at + 1]])))
            .filter(|scale| !scale.is_finite())
            .count(),
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn numbers(shape: &[i64]) -> Tensor {
        Tensor::arange(shape.iter().product::<i64>(), (Kind::Float, Device::Cpu)).reshape(shape) / 7 - 3
    }

    #[test]
    fn rows_are_written_where_they_are_read_from() {
        let orders = [
            (Conversion::Same, 24),
            (Conversion::Paired { half: 4 }, 24),
            (Conversion::Apart { queries: 4, keys: 2, size: 3 }, 24),
        ];
        let tensor = numbers(&[24, 32]);
        for (order, rows) in orders {
            for name in ["F32", "Q8_0"] {
                let format = Quantisation::called(name);
                let written = quantise(&tensor, format, order, "w").unwrap();
                let mut read = vec![0f32; 24 * 32];
                for row in 0..rows {
                    let block = &written[order.stored(row) * format.size(32)..][..format.size(32)];
                    (format.dequantise.unwrap())(block, &mut read[row * 32..][..32]);
                }
                let read = Tensor::from_slice(&read).reshape([24, 32]);
                let tolerance = if name == "F32" { 0.0 } else { 0.5 };
                assert!((read - &tensor).abs().max().double_value(&[]) <= tolerance, "{name} {order:?}");
            }
        }
    }

    #[test]
    fn norms_grow_by_one_and_halves_are_copied() {
        let f32s = Quantisation::called("F32");
        let norm = quantise(&numbers(&[6]), f32s, Conversion::FromOne, "n").unwrap();
        assert_eq!(norm, storage::bytes(&(numbers(&[6]) + 1)));
        let halves = numbers(&[4, 8]).to_kind(Kind::BFloat16);
        let bf16s = Quantisation::called("BF16");
        assert_eq!(quantise(&halves, bf16s, Conversion::Same, "h").unwrap(), storage::bytes(&halves));
        assert_eq!(quantise(&numbers(&[4, 8]), bf16s, Conversion::Same, "h").unwrap(), storage::bytes(&halves));
        assert!(quantise(&halves, f32s, Conversion::Same, "h").is_err());
    }

    #[test]
    fn numbers_that_a_format_cannot_hold_are_errors() {
        let large = Tensor::full([2, 256], 1e30, (Kind::Float, Device::Cpu));
        for name in ["F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"] {
            let error = quantise(&large, Quantisation::called(name), Conversion::Same, "blk.0.x").unwrap_err();
            assert!(error.to_string().contains(&format!("too large for {name}")), "{error}");
        }
        assert!(quantise(&large, Quantisation::called("BF16"), Conversion::Same, "w").is_ok());
        let odd = quantise(&numbers(&[2, 40]), Quantisation::called("Q4_0"), Conversion::Same, "w").unwrap_err();
        assert!(odd.to_string().contains("rows of 40 are not whole blocks of 32"), "{odd}");
    }
}
