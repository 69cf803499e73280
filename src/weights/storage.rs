//! Stored numbers into tensors: each tensor is read by positioned reads straight into its own memory, in parallel.
//!
//! Not by mapping the file: a file that is truncated while mapped kills the process with SIGBUS, while a positioned read of it is
//! an ordinary error; and a mapping would be copied anyway, because a tensor must own its memory. The peak is the same or lower:
//! what is loaded plus the tensor being read.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::file::unreadable;
use crate::{Error, Fault, Result};

#[cfg(target_endian = "big")]
compile_error!("weights are stored little-endian and read into memory as they are");

/// Bytes per positioned read: large enough for any disk, small enough that the check that follows finds them in the cache.
const CHUNK: usize = 1 << 20;
/// Numbers dequantised at a time: a multiple of every block's size that fits into the nearest cache.
pub(super) const PIECE: usize = 4096;

/// A number type of the safetensors format.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Dtype {
    /// Its name in the header.
    pub name: &'static str,
    /// Bits of one element.
    pub bits: u64,
    /// What holds it here; `None` for types that are known (their span is checked) but cannot be computed with.
    pub kind: Option<Kind>,
}

impl Dtype {
    /// Every type of the safetensors format, 0.8.
    pub const ALL: &'static [Dtype] = &[
        Dtype { name: "BOOL", bits: 8, kind: Some(Kind::Bool) },
        Dtype { name: "F4", bits: 4, kind: None },
        Dtype { name: "F6_E2M3", bits: 6, kind: None },
        Dtype { name: "F6_E3M2", bits: 6, kind: None },
        Dtype { name: "U8", bits: 8, kind: Some(Kind::Uint8) },
        Dtype { name: "I8", bits: 8, kind: Some(Kind::Int8) },
        Dtype { name: "F8_E5M2", bits: 8, kind: Some(Kind::Float8e5m2) },
        Dtype { name: "F8_E4M3", bits: 8, kind: Some(Kind::Float8e4m3fn) },
        Dtype { name: "F8_E8M0", bits: 8, kind: None },
        Dtype { name: "F8_E4M3FNUZ", bits: 8, kind: None },
        Dtype { name: "F8_E5M2FNUZ", bits: 8, kind: None },
        Dtype { name: "I16", bits: 16, kind: Some(Kind::Int16) },
        Dtype { name: "U16", bits: 16, kind: None },
        Dtype { name: "F16", bits: 16, kind: Some(Kind::Half) },
        Dtype { name: "BF16", bits: 16, kind: Some(Kind::BFloat16) },
        Dtype { name: "I32", bits: 32, kind: Some(Kind::Int) },
        Dtype { name: "U32", bits: 32, kind: None },
        Dtype { name: "F32", bits: 32, kind: Some(Kind::Float) },
        Dtype { name: "C64", bits: 64, kind: None },
        Dtype { name: "F64", bits: 64, kind: Some(Kind::Double) },
        Dtype { name: "I64", bits: 64, kind: Some(Kind::Int64) },
        Dtype { name: "U64", bits: 64, kind: None },
    ];

    /// The type a header names.
    pub fn named(name: &str) -> Option<&'static Dtype> {
        Self::ALL.iter().find(|dtype| dtype.name == name)
    }

    /// The type that holds `kind`.
    pub fn of(kind: Kind) -> Option<&'static Dtype> {
        Self::ALL.iter().find(|dtype| dtype.kind == Some(kind))
    }
}

/// Where a tensor's bytes are, for reading and for errors.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub path: &'a Path,
    pub file: &'a File,
    /// The tensor's name as its file spells it.
    pub name: &'a str,
    pub offset: u64,
}

impl Source<'_> {
    /// Reads `bytes` at `offset` of the tensor's data.
    pub fn read(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(bytes, self.offset + offset).map_err(|error| {
            if error.kind() == std::io::ErrorKind::UnexpectedEof {
                return self.fault("the file ends inside this tensor: it was truncated after it was opened");
            }
            unreadable(self.path, &error)
        })
    }

    /// A fault of this tensor.
    pub fn fault(&self, what: impl std::fmt::Display) -> Error {
        Error::Model(Fault::new(format_args!("{}: {}", self.path.display(), self.name), what))
    }

    /// The fault of `count` values that are NaN or infinite as `kind`; none for 0.
    pub fn finite(&self, count: usize, kind: Kind) -> Result<()> {
        if count == 0 {
            return Ok(());
        }
        let values = if count == 1 { "1 value is".to_string() } else { format!("{count} values are") };
        let fault = Fault::new(
            format_args!("{}: {}", self.path.display(), self.name),
            format_args!("{values} NaN or infinite as {}", name_of(kind)),
        );
        Err(Error::Model(fault.hint(
            "the file is damaged, or its numbers are too large for this dtype: fetch it again, or choose bf16 or fp32",
        )))
    }
}

/// Reads a tensor stored as plain numbers and converts it to `kind` on the CPU.
///
/// When `kind` is the stored one this is one read into the tensor's memory and nothing else.
pub(super) fn read_plain(source: Source, dtype: &Dtype, shape: &[i64], kind: Kind) -> Result<Tensor> {
    let Some(stored) = dtype.kind else {
        return Err(source.fault(format_args!("numbers of type {} are not supported", dtype.name)));
    };
    if whole(stored) && !whole(kind) {
        let fault = Fault::new(
            format_args!("{}: {}", source.path.display(), source.name),
            format_args!("holds whole numbers ({}), expected floating-point ones", dtype.name),
        );
        return Err(Error::Model(fault.hint(
            "weights stored so are quantised, and their scales are elsewhere: name the model's unquantised version",
        )));
    }
    let mut tensor = allocate(shape, stored)?;
    let damaged = AtomicUsize::new(0);
    bytes_mut(&mut tensor).par_chunks_mut(CHUNK).enumerate().try_for_each(|(chunk, bytes)| {
        source.read(bytes, (chunk * CHUNK) as u64)?;
        damaged.fetch_add(non_finite(stored, bytes), Ordering::Relaxed);
        Ok::<(), Error>(())
    })?;
    source.finite(damaged.into_inner(), stored)?;
    convert(source, tensor, kind)
}

/// Whether a kind holds whole numbers only.
pub(super) fn whole(kind: Kind) -> bool {
    matches!(kind, Kind::Bool | Kind::Uint8 | Kind::Int8 | Kind::Int16 | Kind::Int | Kind::Int64)
}

/// Converts a CPU tensor, refusing numbers that `kind` cannot hold.
pub(super) fn convert(source: Source, tensor: Tensor, kind: Kind) -> Result<Tensor> {
    if tensor.kind() == kind {
        return Ok(tensor);
    }
    let converted = tensor.f_to_kind(kind).map_err(out_of_memory)?;
    drop(tensor);
    source.finite(non_finite_numbers(&converted), kind)?;
    Ok(converted)
}

/// A contiguous CPU tensor whose numbers are not yet written.
pub(super) fn allocate(shape: &[i64], kind: Kind) -> Result<Tensor> {
    Tensor::f_empty(shape, (kind, Device::Cpu)).map_err(out_of_memory)
}

/// Moves a tensor to its device.
pub(super) fn place(tensor: Tensor, device: Device) -> Result<Tensor> {
    if device == Device::Cpu { Ok(tensor) } else { tensor.f_to_device(device).map_err(out_of_memory) }
}

/// The numbers of a contiguous CPU tensor as bytes: no copy.
///
/// Panics when the tensor is on another device or not contiguous (a bug of the caller).
pub(super) fn bytes(tensor: &Tensor) -> &[u8] {
    let (pointer, length) = memory(tensor);
    if length == 0 {
        return &[];
    }
    // SAFETY: `memory` proved that `pointer` begins `length` bytes of one allocation that the tensor owns, and the borrow keeps
    // the tensor alive. Any byte is a valid u8. Nobody writes meanwhile: tensors made in this room have no aliases.
    unsafe { std::slice::from_raw_parts(pointer, length) }
}

/// The memory of a contiguous CPU tensor, to be written.
pub(super) fn bytes_mut(tensor: &mut Tensor) -> &mut [u8] {
    let (pointer, length) = memory(tensor);
    if length == 0 {
        return &mut [];
    }
    // SAFETY: as in `bytes`; the tensor is borrowed mutably and was made by `allocate`, so no alias exists.
    unsafe { std::slice::from_raw_parts_mut(pointer, length) }
}

/// Where a contiguous CPU tensor's numbers are, and how many bytes they take.
fn memory(tensor: &Tensor) -> (*mut u8, usize) {
    assert!(tensor.device() == Device::Cpu && tensor.is_contiguous(), "only contiguous CPU tensors are read as bytes");
    (tensor.data_ptr().cast(), tensor.numel() * tensor.kind().elt_size_in_bytes())
}

/// Rounds at most [`PIECE`] numbers to `kind` (fp32, bf16 or fp16; nearest, ties to even) and writes their bytes.
pub(super) fn round(kind: Kind, numbers: &[f32], out: &mut [u8]) {
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

/// How many numbers of a contiguous CPU tensor are NaN or infinite; of one that is large, in parallel.
pub(crate) fn non_finite_numbers(tensor: &Tensor) -> usize {
    match bytes(tensor) {
        few if few.len() <= CHUNK => non_finite(tensor.kind(), few),
        many => non_finite_in(tensor.kind(), many),
    }
}

/// [`non_finite`] of many bytes, in parallel.
pub(super) fn non_finite_in(kind: Kind, bytes: &[u8]) -> usize {
    bytes.par_chunks(CHUNK).map(|bytes| non_finite(kind, bytes)).sum()
}

/// How many numbers of `kind` in `bytes` are NaN or infinite.
pub(super) fn non_finite(kind: Kind, bytes: &[u8]) -> usize {
    // A number is not finite when its exponent bits are all ones (F8_E4M3: when all bits but the sign are). The largest masked
    // value tells whether there is any; this form of the question compiles to a few vector instructions per 16 bytes.
    match kind {
        Kind::Float => {
            let masked = |b: &[u8; 4]| (u32::from_le_bytes(*b) & 0x7f80_0000) as i32;
            count(bytes.as_chunks().0, 0x7f80_0000, masked)
        }
        Kind::BFloat16 => {
            let masked = |b: &[u8; 2]| (u16::from_le_bytes(*b) & 0x7f80) as i16;
            count(bytes.as_chunks().0, 0x7f80, masked)
        }
        Kind::Half => {
            let masked = |b: &[u8; 2]| (u16::from_le_bytes(*b) & 0x7c00) as i16;
            count(bytes.as_chunks().0, 0x7c00, masked)
        }
        Kind::Double => {
            let masked = |b: &[u8; 8]| (u64::from_le_bytes(*b) >> 52 & 0x7ff) as i32;
            count(bytes.as_chunks().0, 0x7ff, masked)
        }
        Kind::Float8e5m2 => count(bytes.as_chunks::<1>().0, 0x7c, |b| b[0] & 0x7c),
        Kind::Float8e4m3fn => count(bytes.as_chunks::<1>().0, 0x7f, |b| b[0] & 0x7f),
        _ => 0,
    }
}

fn count<const N: usize, T: Ord + Copy + Default>(
    numbers: &[[u8; N]],
    limit: T,
    masked: impl Fn(&[u8; N]) -> T,
) -> usize {
    let largest = numbers.iter().fold(T::default(), |largest, number| largest.max(masked(number)));
    if largest < limit { 0 } else { numbers.iter().filter(|number| masked(number) >= limit).count() }
}

/// The safetensors name of a kind, for messages.
fn name_of(kind: Kind) -> String {
    Dtype::of(kind).map_or_else(|| format!("{kind:?}"), |dtype| dtype.name.to_string())
}

fn out_of_memory(error: tch::TchError) -> Error {
    let text = error.to_string();
    let first = text.lines().next().unwrap_or_default();
    Error::Device(
        Fault::new("loading the base model", first)
            .hint("if memory ran out: choose a smaller model or dtype, or free memory on this device"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn non_finite_agrees_with_libtorch_on_every_pattern() {
        let patterns: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for kind in [Kind::BFloat16, Kind::Half] {
            let mut tensor = allocate(&[1 << 16], kind).unwrap();
            bytes_mut(&mut tensor).copy_from_slice(&patterns);
            let expected = tensor.to_kind(Kind::Float).isfinite().logical_not().sum(Kind::Int64).int64_value(&[]);
            assert_eq!(non_finite(kind, &patterns) as i64, expected, "{kind:?}");
        }
        let all: Vec<u8> = (0..=u8::MAX).collect();
        for kind in [Kind::Float8e4m3fn, Kind::Float8e5m2] {
            let mut tensor = allocate(&[256], kind).unwrap();
            bytes_mut(&mut tensor).copy_from_slice(&all);
            let expected = tensor.to_kind(Kind::Float).isfinite().logical_not().sum(Kind::Int64).int64_value(&[]);
            assert_eq!(non_finite(kind, &all) as i64, expected, "{kind:?}");
        }
        let odd = [1.0f32, f32::NAN, f32::MAX, f32::NEG_INFINITY, -0.0, f32::MIN_POSITIVE];
        assert_eq!(non_finite(Kind::Float, &odd.map(f32::to_le_bytes).concat()), 2);
        let odd = odd.map(|x| f64::from(x).to_le_bytes()).concat();
        assert_eq!(non_finite(Kind::Double, &odd), 2);
    }

    #[test]
    fn rounding_equals_libtorch() {
        let mut numbers: Vec<f32> =
            (0..4000u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9))).filter(|x| x.is_finite()).collect();
        numbers.extend([0.0, -0.0, 65504.0, 65519.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0]);
        let wide = Tensor::from_slice(&numbers);
        for kind in [Kind::BFloat16, Kind::Half, Kind::Float] {
            let mut out = vec![0; numbers.len() * kind.elt_size_in_bytes()];
            round(kind, &numbers, &mut out);
            assert_eq!(out, bytes(&wide.to_kind(kind)), "{kind:?}");
        }
        let mut out = [0; 2];
        round(Kind::BFloat16, &[f32::from_bits(0x7fff_ffff)], &mut out);
        assert_eq!(non_finite(Kind::BFloat16, &out), 1);
    }
}
