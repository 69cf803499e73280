//! A tensor into the bytes of a number format: rows put into llama.cpp's order and quantised, in parallel, a piece at a time.

use half::f16;
use rayon::prelude::*;
use tch::{Kind, Tensor};

use super::{Conversion, Quantisation};
use crate::weights::storage::{self, Dtype};
use crate::{Error, Fault, Result};

/// Beyond what any block holds; the sums by which scales are found overflow at larger ones, which then pass for nothing.
const LARGEST: f32 = 1e9;
/// Numbers per parallel task, about.
const TASK: usize = 1 << 17;
/// Tasks per piece: enough for all threads to end together, and few enough for the buffer to be little beside a large tensor.
const TASKS: usize = 32;
/// Bytes of a piece that is handed on as it is: small enough to be in the cache still when it is written.
const AS_IT_IS: usize = 4 << 20;

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

/// [`quantise_in_pieces`], in one piece.
pub(crate) fn quantise(tensor: &Tensor, format: &Quantisation, order: Conversion, name: &str) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    quantise_in_pieces(tensor, format, order, name, &mut |bytes| {
        all.extend_from_slice(bytes);
        Ok(())
    })?;
    Ok(all)
}

/// Hands the bytes of a contiguous CPU tensor of (rows.., columns), fp32, fp16 or bf16, in the order in which `order` reads them back, to
/// `take`, piece by piece: beside the tensor there is never more than a buffer. A tensor of one dimension is one row, or where `order`
/// moves rows, one number to a row.
///
/// `name` is the tensor's, for errors: numbers that the format cannot hold, after which nothing more is handed on. Errors of `take` pass
/// through.
pub(crate) fn quantise_in_pieces(
    tensor: &Tensor,
    format: &Quantisation,
    order: Conversion,
    name: &str,
    take: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let fault = |what: String| Error::Model(Fault::new(name, what));
    let (Some(quantise), kind) = (format.quantise, tensor.kind()) else {
        return Err(fault(format!("{} is not written", format.name)));
    };
    let widened = match kind {
        Kind::Float | Kind::Half | Kind::BFloat16 => Dtype::of(kind).map(|dtype| Quantisation::called(dtype.name)),
        _ => None,
    };
    let Some(widen) = widened.and_then(|stored| stored.dequantise) else {
        return Err(fault(format!("{kind:?} cannot be written as {}", format.name)));
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
        return Ok(());
    }
    let too_large = |count: usize| match count {
        0 => Ok(()),
        count => {
            let what = format!("{count} of its numbers, or scales of them, are too large for {}", format.name);
            Err(Error::Model(Fault::new(name, what).hint("choose bf16 or f32")))
        }
    };
    let stored = storage::bytes(tensor);
    let as_it_is = format.kind() == Some(kind) && order != Conversion::FromOne;
    let mut damaged = 0;
    if as_it_is && !moved {
        for piece in stored.chunks(AS_IT_IS) {
            damaged += storage::non_finite_in(kind, piece);
            if damaged == 0 {
                take(piece)?;
            }
        }
        return too_large(damaged);
    }

    let rows = count / columns;
    // Where each row that is written comes from.
    let mut sources = Vec::new();
    if moved {
        sources = vec![0; rows];
        (0..rows).for_each(|row| sources[order.stored(row)] = row);
    }
    let row_bytes = columns * kind.elt_size_in_bytes();
    let task_rows = (TASK / columns).max(1);
    let piece_rows = (task_rows * TASKS).min(rows);
    let most = if format.values > 1 { LARGEST } else { f32::MAX };
    let mut buffer = vec![0; format.size(piece_rows * columns)];
    for start in (0..rows).step_by(piece_rows) {
        let end = (start + piece_rows).min(rows);
        let piece = &mut buffer[..format.size((end - start) * columns)];
        let tasks = piece.par_chunks_mut(format.size(task_rows * columns)).enumerate();
        let odd = tasks.map_init(Vec::new, |numbers: &mut Vec<f32>, (task, out)| {
            let first = start + task * task_rows;
            let rows = first..(first + task_rows).min(end);
            let source = |row: usize| &stored[if moved { sources[row] } else { row } * row_bytes..][..row_bytes];
            if as_it_is {
                for (row, out) in rows.zip(out.chunks_exact_mut(row_bytes)) {
                    out.copy_from_slice(source(row));
                }
                return infinite(format, out);
            }
            numbers.resize(rows.len() * columns, 0.0);
            if moved {
                for (row, numbers) in rows.zip(numbers.chunks_exact_mut(columns)) {
                    widen(source(row), numbers);
                }
            } else {
                widen(&stored[rows.start * row_bytes..rows.end * row_bytes], numbers);
            }
            if order == Conversion::FromOne {
                numbers.iter_mut().for_each(|number| *number += 1.0);
            }
            let infinite_before = numbers.iter().filter(|number| number.is_nan() || number.abs() > most).count();
            quantise(numbers, out);
            infinite_before + infinite(format, out)
        });
        damaged += odd.sum::<usize>();
        if damaged == 0 {
            take(piece)?;
        }
    }
    too_large(damaged)
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
        // What is stored in fewer bits is made wider row by row, on the way.
        let wide = halves.to_kind(Kind::Float);
        for (tensor, name) in [(&halves, "F32"), (&halves, "F16"), (&wide.to_kind(Kind::Half), "F32")] {
            let format = Quantisation::called(name);
            let through = quantise(&tensor.to_kind(Kind::Float), format, Conversion::Same, "h").unwrap();
            assert_eq!(quantise(tensor, format, Conversion::Same, "h").unwrap(), through, "{name}");
        }
        assert!(quantise(&halves.to_kind(Kind::Int64), f32s, Conversion::Same, "h").is_err());
    }

    /// Beside a tensor, memory is that of a buffer.
    #[test]
    fn large_tensors_are_handed_on_in_pieces_and_after_a_fault_not_at_all() {
        let most = TASK * TASKS;
        let rows = (3 * most / 64) as i64 + 3;
        let half = (numbers(&[rows, 64]).remainder(143) - 71).to_kind(Kind::BFloat16);
        let order = Conversion::Paired { half: 1 };
        for (format, order) in
            [("Q8_0", Conversion::Same), ("Q4_0", Conversion::Same), ("BF16", Conversion::Same), ("BF16", order)]
        {
            let format = Quantisation::called(format);
            let rows = if order == Conversion::Same { rows } else { rows - 1 };
            let tensor = half.narrow(0, 0, rows);
            let mut pieces = Vec::new();
            let mut all = Vec::new();
            quantise_in_pieces(&tensor, format, order, "w", &mut |bytes| {
                pieces.push(bytes.len());
                all.extend_from_slice(bytes);
                Ok(())
            })
            .unwrap();
            assert!(pieces.len() >= 4 && pieces.iter().all(|bytes| *bytes <= format.size(most)), "{pieces:?}");
            // A row's bytes are a function of the row alone.
            for row in [0, 1, most / 64 - 1, most / 64, rows as usize - 1] {
                let own = quantise(&tensor.narrow(0, row as i64, 1), format, Conversion::Same, "w").unwrap();
                assert_eq!(all[order.stored(row) * format.size(64)..][..format.size(64)], own, "{} {row}", format.name);
            }
        }
        let _ = half.get(most as i64 / 64 + 1).fill_(f64::NAN);
        for format in ["Q8_0", "BF16"] {
            let mut taken = 0;
            let format = Quantisation::called(format);
            let found = quantise_in_pieces(&half, format, Conversion::Same, "w", &mut |bytes| {
                taken += bytes.len();
                Ok(())
            });
            let error = found.unwrap_err().to_string();
            assert!(error.contains("of its numbers"), "{error}");
            assert!(taken <= format.size(most), "{taken}");
        }
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
