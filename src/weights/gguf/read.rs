//! Stored blocks to a tensor: read, dequantised, put into order and rounded in one parallel pass.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;
use tch::{Kind, Tensor};

use super::{Quantisation, RowOrder};
use crate::weights::storage::{self, PIECE, Source};
use crate::{Error, Result};

/// Numbers per parallel task, about: a multiple of every block's size.
const TASK: usize = 1 << 17;

/// Reads a tensor of (rows.., row) numbers and rounds it once, from the exact f32 to `kind`.
pub(in crate::weights) fn read_blocks(
    source: Source,
    quantisation: &Quantisation,
    order: RowOrder,
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
    if row % quantisation.values != 0 && order != RowOrder::Same {
        return Err(source.fault(format_args!("its rows of {row} are not whole blocks of {}", quantisation.name)));
    }
    let stored_bytes = |numbers: usize| numbers / quantisation.values * quantisation.bytes;
    // A head's rows change places among themselves, so a task takes whole heads.
    let task = match order {
        RowOrder::Same => TASK,
        RowOrder::Paired { half } => (TASK / row.max(1)).max(1).next_multiple_of(2 * half) * row.max(1),
    };
    let damaged = AtomicUsize::new(0);
    storage::bytes_mut(&mut tensor).par_chunks_mut(task * size).enumerate().try_for_each_init(
        || (Vec::new(), vec![0f32; PIECE]),
        |(blocks, numbers), (number, out)| {
            blocks.resize(stored_bytes(out.len() / size), 0);
            source.read(blocks, stored_bytes(number * task) as u64)?;
            let mut round = |blocks: &[u8], out: &mut [u8]| {
                for (blocks, out) in blocks.chunks(stored_bytes(PIECE)).zip(out.chunks_mut(PIECE * size)) {
                    let numbers = &mut numbers[..out.len() / size];
                    dequantise(blocks, numbers);
                    storage::round(written, numbers, out);
                }
            };
            match order {
                RowOrder::Same => round(blocks, out),
                RowOrder::Paired { .. } => {
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
