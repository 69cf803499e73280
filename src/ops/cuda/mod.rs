//! CUDA kernels of what libtorch would do in many passes over memory, one pass here: compiled by NVRTC for the device at hand when a
//! run begins ([`prepare`]), kept in a cache on disk, launched on libtorch's current stream. Nothing of CUDA is needed to build.
//!
//! This room depends on `torch_ext` alone: `ops` and `quant` ask it ([`serves`], [`holds`]) before they fall back to the
//! libtorch compositions that are its kernels' twins. Where a device was not prepared, because NVRTC or a driver is missing, say, those
//! serve.
//!
//! Outputs come from libtorch's caching allocator, in the order of the stream: a weight that is made whole for a product and dropped
//! behind it leaves its memory to the next one without a wait. That is what a scratch buffer of its own would do, with one difference: the
//! allocator may keep a block for each size of weight that is in use, and a buffer would be as large as the largest.
//!
//! # What has been verified
//! Without a GPU: every kernel compiles for sm_80, sm_90 and sm_120 and spills no register; all read and write sixteen bytes at a time; those
//! of quantised weights have no fused multiply-add and flush no denormal. What the kernels compute is compared with the CPU's kernels and
//! twins on an emulated GPU (`emulator.h`), which runs their own source, through the Rust code that launches them.
//!
//! What that cannot show is the driver's part (contexts, modules, the launch), the four instructions that are written as such (rounding to
//! bf16 and to fp16, widening fp16, storing sixteen bytes), and speed. `make device-check` shows it on a machine with a GPU.
#![allow(unsafe_code)]

mod cache;
mod compiler;
mod device;
#[cfg(test)]
pub(crate) mod emulator;
mod four_bit;
mod fp8;
mod gated;
mod groups;
mod int8;
mod launch;
mod loss;
mod norm;
mod normed_rope;
mod rope;
#[cfg(test)]
mod speed;
#[cfg(test)]
mod tests;

use tch::{Device, Kind, Tensor};

pub use device::prepare;
pub(crate) use device::{multiplies_fp8, outruns_flash};
pub(crate) use four_bit::{Scales as FourBitScales, dequantise as four_bit_dequantise, quantise as four_bit_quantise};
pub(crate) use fp8::{dequantise as fp8_dequantise, quantise as fp8_quantise};
pub(crate) use gated::{Curve, gated, gated_backward};
pub(crate) use groups::{Groups, grouped as grouped_dequantise, mxfp4 as mxfp4_dequantise};
pub(crate) use int8::dequantise as int8_dequantise;
pub(crate) use loss::softmax_cross_entropy;
pub(crate) use norm::{norm, norm_again, norm_backward};
pub(crate) use normed_rope::{NormedHeads, norm_and_rotate, norm_and_rotate_backward, norms_and_rotates};
pub(crate) use rope::{Angles, rotate, rotates};

/// Threads of a block, in every launch: `THREADS` of `number.cuh`.
const THREADS: i64 = 256;

/// Bytes that kernels read and write at a time, at multiples of as many.
const VECTOR: i64 = 16;

const WARP: i64 = 32;
/// Vectors of a row for each lane of a warp, above which a whole block takes the row.
const LONG: i64 = 4;

/// A file of kernels.
struct Source {
    file: &'static str,
    text: &'static str,
    /// What NVRTC is told besides the architecture.
    options: &'static [&'static str],
    /// The kernels in it, each for every type of [`SUFFIXES`].
    kernels: &'static [&'static str],
}

/// Numbers as IEEE 754 has them; what follows in a source's options may only say more.
const IEEE: &[&str] = &["--std=c++17", "--ftz=false", "--prec-div=true", "--prec-sqrt=true", "--fmad=true"];
/// As [`IEEE`], each operation rounded by itself.
const EXACT: &[&str] = &["--std=c++17", "--ftz=false", "--prec-div=true", "--prec-sqrt=true", "--fmad=false"];

macro_rules! source {
    ($file:literal, $options:expr, $kernels:expr) => {
        Source {
            file: $file,
            text: concat!(
                "#line 1 \"number.cuh\"\n",
                include_str!("number.cuh"),
                "#line 1 \"",
                $file,
                "\"\n",
                include_str!($file)
            ),
            options: $options,
            kernels: $kernels,
        }
    };
}

static SOURCES: [Source; 9] = [
    source!("nf4.cu", EXACT, &["four_bit_dequantise", "four_bit_quantise"]),
    source!("int8.cu", EXACT, &["int8_dequantise"]),
    source!("fp8.cu", EXACT, &["fp8_quantise", "fp8_dequantise"]),
    source!("groups.cu", EXACT, &["grouped_dequantise", "mxfp4_dequantise"]),
    source!("norm.cu", IEEE, &["norm", "norm_again", "norm_backward"]),
    source!("rope.cu", IEEE, &["rope_halves", "rope_pairs", "rope_halves_odd", "rope_pairs_odd"]),
    source!(
        "normed_rope.cu",
        IEEE,
        &[
            "normed_rope_halves",
            "normed_rope_pairs",
            "normed_rope_halves_odd",
            "normed_rope_pairs_odd",
            "normed_rope_backward_halves",
            "normed_rope_backward_pairs",
            "normed_rope_backward_halves_odd",
            "normed_rope_backward_pairs_odd",
        ]
    ),
    source!("gated.cu", IEEE, &["gated", "gated_backward"]),
    source!("loss.cu", IEEE, &["cross_entropy", "cross_entropy_of_fp32"]),
];

/// How a kernel's name ends for the number type it is made for.
const SUFFIXES: [(Kind, &str); 3] = [(Kind::Float, "f32"), (Kind::BFloat16, "bf16"), (Kind::Half, "f16")];

/// Whether the kernels serve these tensors: [`holds`] them, and they are of one floating type that the kernels know.
#[cfg_attr(test, track_caller)]
pub(crate) fn serves(tensors: &[&Tensor]) -> bool {
    let kind = tensors[0].kind();
    known(kind) && tensors.iter().all(|tensor| tensor.kind() == kind) && holds(tensors)
}

/// Whether kernels may read these tensors: on one device that was prepared, contiguous, at a multiple of sixteen bytes.
#[cfg_attr(test, track_caller)]
pub(crate) fn holds(tensors: &[&Tensor]) -> bool {
    #[cfg(test)]
    if crate::ops::testing::is_off(std::panic::Location::caller()) {
        return false;
    }
    let device = tensors[0].device();
    ready(device)
        && tensors.iter().all(|tensor| {
            let aligned = (tensor.data_ptr() as usize).is_multiple_of(VECTOR as usize);
            tensor.device() == device && tensor.is_contiguous() && aligned
        })
}

/// Whether there are kernels for a floating type.
pub(crate) fn known(kind: Kind) -> bool {
    SUFFIXES.iter().any(|(known, _)| *known == kind)
}

fn ready(device: Device) -> bool {
    #[cfg(test)]
    if let Some(ready) = emulator::decides(device) {
        return ready;
    }
    device::is_prepared(device)
}

/// Numbers in [`VECTOR`] bytes.
fn length(kind: Kind) -> i64 {
    if kind == Kind::Float { VECTOR / 4 } else { VECTOR / 2 }
}

/// Threads that share a row of `width` numbers: a power of two up to a warp, or a whole block.
fn team(width: i64, kind: Kind) -> i64 {
    let vectors = (width + length(kind) - 1) / length(kind);
    if vectors > WARP * LONG { THREADS } else { vectors.min(WARP).unsigned_abs().next_power_of_two() as i64 }
}

/// Four-byte fields of a structure.
fn words_of<const N: usize>(numbers: [i64; N]) -> Vec<u32> {
    numbers.map(|number| i32::try_from(number).expect("sizes of a weight").cast_unsigned()).to_vec()
}

/// How sources number what a product is rounded to first.
fn number_of(rounding: Option<Kind>) -> i64 {
    match rounding {
        Some(Kind::Half) => 1,
        Some(Kind::BFloat16) => 2,
        _ => 0,
    }
}
