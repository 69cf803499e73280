//! Weights of whole numbers in groups, however a file lays them out, as [`Grouped`] keeps them.

use std::fs::File;
use std::path::PathBuf;

use tch::{Device, Kind, Tensor};

use super::parts::Part;
use crate::quant::{Grouped, Layout, grouped};
use crate::torch_ext::{elements, filled};
use crate::weights::storage;
use crate::{Error, Fault, Result};

/// Number types that scales may have.
pub(super) const SCALES: [&str; 3] = ["F16", "BF16", "F32"];
/// Bits of a word of codes.
pub(super) const WORD: i64 = 32;

/// Where the parts of a weight are, and how they lie.
#[derive(Debug)]
pub(in crate::weights) struct Parts {
    /// Whose they are.
    pub layout: Layout,
    pub lies: Lies,
    /// Of a code.
    pub bits: u32,
    /// Columns to a scale.
    pub group: i64,
    pub codes: Part,
    pub scales: Part,
    /// The middle of the range where there is none.
    pub zeros: Option<Part>,
    /// The groups of columns.
    pub order: Option<Part>,
}

/// How codes, scales and zeros lie.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::weights) enum Lies {
    /// GPTQ: words hold codes of a column of the matrix (in, out) one after the other, and zeros of a row of (groups, out); a stored
    /// zero may be one less than what it stands for.
    Columns { one_less: bool },
    /// AWQ for matrix products: words hold codes of a row of (in, out), and zeros of one of (groups, out), in AWQ's own order.
    Interleaved,
    /// AWQ for products with a vector: words hold codes of a row of (out, in), and zeros of one of (out, groups), filled up as the
    /// scales (out, groups) are.
    Rows,
    /// compressed-tensors: words hold codes of a row of (out, in), and zeros of a column of (out, groups); scales and zeros are those
    /// of so many rows each.
    Words { high: i64 },
    /// compressed-tensors: bytes with a sign, scales and zeros of so many rows each.
    Bytes { high: i64 },
}

/// Where in a word of AWQ's the codes of eight neighbours are: the first of a pair in the lower half, the second in the upper.
const INTERLEAVED: [u32; 8] = [0, 16, 4, 20, 8, 24, 12, 28];

impl Parts {
    /// What the form is called.
    pub(in crate::weights) fn name(&self) -> &'static str {
        match (self.layout, self.bits) {
            (Layout::Gptq, 2) => "GPTQ2",
            (Layout::Gptq, 3) => "GPTQ3",
            (Layout::Gptq, 4) => "GPTQ4",
            (Layout::Gptq, _) => "GPTQ8",
            (Layout::Awq, _) => "AWQ4",
            (_, 2) => "INT2",
            (_, 4) => "INT4",
            _ => "INT8",
        }
    }

    /// How it lies: bits, columns to a scale, whether there are zeros and an order of columns.
    pub(in crate::weights) fn layout_of(&self, shape: &[i64]) -> String {
        let group = match shape.last() {
            Some(columns) if *columns <= self.group => "with a scale to each row".to_string(),
            _ => format!("in groups of {}", self.group),
        };
        let zeros = if self.zeros.is_some() { ", with zeros" } else { "" };
        let order = if self.order.is_some() { ", in an order of their own" } else { "" };
        format!("{} bits {group}{zeros}{order}", self.bits)
    }

    /// Bytes that are kept of a weight of `shape` (out, in), its zeros among them where the file has some: whether all are the middle
    /// of the range shows only when they are read.
    pub(in crate::weights) fn bytes(&self, shape: &[i64]) -> u64 {
        let &[rows, columns] = shape else { unreachable!("a matrix was proved") };
        let groups = (rows * ((columns + self.group - 1) / self.group)) as u64;
        let zeros = if self.zeros.is_some() { groups } else { 0 };
        let order = if self.order.is_some() { 4 * columns as u64 } else { 0 };
        self.codes.bytes() + groups * self.scales.dtype.bits / 8 + zeros + order
    }

    /// Reads a weight of `shape` (out, in) that is made whole in `kind`.
    ///
    /// Errors: scales that are not finite, groups of columns that do not exist.
    pub(in crate::weights) fn read(
        &self,
        shape: &[i64],
        (files, opened): (&[PathBuf], &[File]),
        (kind, device): (Kind, Device),
    ) -> Result<Grouped> {
        let &[rows, columns] = shape else { unreachable!("a matrix was proved") };
        let groups = (columns + self.group - 1) / self.group;
        let read = |part: &Part| part.as_stored(files, opened);
        let scales = read(&self.scales)?;
        let scales = match self.lies {
            Lies::Columns { .. } | Lies::Interleaved => scales.tr(), // (out, groups)
            Lies::Rows => scales.narrow(1, 0, groups),
            Lies::Words { high } | Lies::Bytes { high } => of_rows(&scales, rows, groups, high),
        };
        let zeros = self.zeros.as_ref().map(|zeros| Ok(self.zeros(&read(zeros)?, rows, groups))).transpose()?;
        let middle = 1 << (self.bits - 1);
        let zeros = zeros.filter(|zeros: &Tensor| zeros.ne(middle).any().int64_value(&[]) != 0);
        let order = match &self.order {
            Some(part) => self.order(part, read(part)?, groups, files)?,
            None => None,
        };
        let codes = self.codes(&read(&self.codes)?);
        let place = |tensor: Tensor| storage::place(tensor.contiguous(), device);
        Ok(Grouped {
            columns,
            bits: self.bits,
            group: self.group,
            kind,
            codes: place(codes)?,
            scales: place(scales)?,
            zeros: zeros.map(place).transpose()?,
            order: order.map(place).transpose()?,
        })
    }

    /// What the file's codes are as rows of bytes, (out, bytes).
    fn codes(&self, stored: &Tensor) -> Tensor {
        match self.lies {
            Lies::Columns { .. } => stored.tr().contiguous().view_dtype(Kind::Uint8),
            Lies::Interleaved => untangled(stored),
            Lies::Rows | Lies::Words { .. } => stored.view_dtype(Kind::Uint8),
            // Codes count from the least number on.
            Lies::Bytes { .. } => stored.view_dtype(Kind::Uint8).bitwise_xor(128),
        }
    }

    /// What the file's zeros are as codes, (out, groups).
    fn zeros(&self, stored: &Tensor, rows: i64, groups: i64) -> Tensor {
        let of_words = |words: &Tensor, count| {
            let bytes = words.contiguous().view_dtype(Kind::Uint8);
            grouped::plain_codes(&bytes, self.bits, count).to_kind(Kind::Int)
        };
        let zeros = match self.lies {
            Lies::Columns { one_less } => {
                let zeros = of_words(stored, rows).tr();
                // The largest of the stored ones stands for the least: so AutoGPTQ's own kernels have it.
                if one_less { (zeros + 1).bitwise_and((1 << self.bits) - 1) } else { zeros }
            }
            Lies::Interleaved => {
                let parts: Vec<Tensor> =
                    INTERLEAVED.map(|shift| stored.bitwise_right_shift_tensor_scalar(i64::from(shift))).into();
                Tensor::stack(&parts, -1).bitwise_and(15).view([groups, rows]).tr()
            }
            Lies::Rows => of_words(stored, groups),
            Lies::Words { high } | Lies::Bytes { high } if stored.kind() != Kind::Int => {
                of_rows(&(stored.to_kind(Kind::Int) + (1i64 << (self.bits - 1))), rows, groups, high)
            }
            Lies::Words { .. } | Lies::Bytes { .. } => of_words(&stored.tr(), rows).tr(),
        };
        zeros.to_kind(Kind::Uint8)
    }

    /// The groups of columns, unless they are those of columns in their own order.
    fn order(&self, part: &Part, order: Tensor, groups: i64, files: &[PathBuf]) -> Result<Option<Tensor>> {
        let order = order.to_kind(Kind::Int);
        let columns = order.numel() as i64;
        // compressed-tensors says so that there is none.
        if order.ne(-1).any().int64_value(&[]) == 0 {
            return Ok(None);
        }
        let wrong = order.lt(0).logical_or(&order.ge(groups));
        if wrong.any().int64_value(&[]) != 0 {
            let found = order.masked_select(&wrong).int64_value(&[0]);
            let place = format!("{}: {}", files[part.file].display(), part.name);
            let what = format!("holds the group {found}, but groups are from 0 to {}", groups - 1);
            return Err(Error::Model(Fault::new(place, what).hint("fetch the model again")));
        }
        let own = Tensor::arange(columns, (Kind::Int, Device::Cpu)).divide_scalar_mode(self.group, "floor");
        Ok((!order.equal(&own.to_kind(Kind::Int))).then_some(order))
    }
}

/// Numbers of `high` rows each as those of every row: (out, groups).
fn of_rows(numbers: &Tensor, rows: i64, groups: i64, high: i64) -> Tensor {
    let numbers = numbers.reshape([-1, groups]);
    if high == 1 { numbers } else { numbers.repeat_interleave_self_int(high, 0, None).narrow(0, 0, rows) }
}

/// AWQ's words (in, out / 8) as rows of bytes (out, in / 2), two codes to a byte, the first in the lower half.
fn untangled(words: &Tensor) -> Tensor {
    let size = words.size();
    let (columns, across) = (size[0] as usize, size[1] as usize);
    let words = elements::<i32>(words);
    let half = columns / 2;
    let eights = filled::<u8>(&[size[1], 8, half as i64], |range, bytes| {
        for (pair, rows) in words.chunks_exact(2 * across.max(1)).enumerate() {
            for (place, eight) in range.clone().enumerate() {
                let (first, second) = (rows[eight] as u32, rows[across + eight] as u32);
                for (j, shift) in INTERLEAVED.into_iter().enumerate() {
                    bytes[(place * 8 + j) * half + pair] = ((first >> shift & 15) | (second >> shift & 15) << 4) as u8;
                }
            }
        }
    });
    eights.view([8 * size[1], half as i64]) // (out, in / 2)
}
