//! A launch: a kernel's name, how many blocks of it, and what it takes.

use std::ffi::c_void;
use std::marker::PhantomData;

use tch::{Device, Kind, Tensor};

#[cfg(test)]
use super::emulator;
use super::{SUFFIXES, THREADS, device};

/// What a kernel takes, as it lies in memory.
pub(super) enum Argument<'a> {
    /// A tensor's elements, or null.
    Pointer(*mut c_void, PhantomData<&'a Tensor>),
    Int(i32),
    Long(i64),
    Float(f32),
    /// A structure of four-byte fields.
    Words(Vec<u32>),
}

impl<'a> From<&'a Tensor> for Argument<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        assert!(tensor.is_contiguous(), "kernels read contiguous tensors");
        Self::Pointer(tensor.data_ptr(), PhantomData)
    }
}

impl<'a> From<Option<&'a Tensor>> for Argument<'a> {
    fn from(tensor: Option<&'a Tensor>) -> Self {
        tensor.map_or(Self::Pointer(std::ptr::null_mut(), PhantomData), Self::from)
    }
}

impl Argument<'_> {
    fn place(&self) -> *mut c_void {
        match self {
            Self::Pointer(pointer, _) => std::ptr::from_ref(pointer).cast_mut().cast(),
            Self::Int(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::Long(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::Float(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::Words(words) => words.as_ptr().cast_mut().cast(),
        }
    }

    #[cfg(test)]
    fn size(&self) -> usize {
        match self {
            Self::Pointer(..) | Self::Long(_) => 8,
            Self::Int(_) | Self::Float(_) => 4,
            Self::Words(words) => 4 * words.len(),
        }
    }
}

/// Runs a kernel for `kind` on a device that is ready: `blocks` blocks, on libtorch's current stream, without waiting.
///
/// Panics where the driver refuses, as libtorch's own operations do.
///
/// # Safety
/// The arguments are what the kernel takes, in its order, and the tensors are on the device and as large as it reads and writes.
pub(super) unsafe fn launch(on: Device, kernel: &'static str, kind: Kind, blocks: i64, arguments: &[Argument<'_>]) {
    let number = SUFFIXES.iter().position(|(known, _)| *known == kind).expect("a type that kernels are made for");
    if blocks == 0 {
        return;
    }
    let blocks = u32::try_from(blocks).ok().filter(|blocks| *blocks < 1 << 31).expect("as many blocks as a grid holds");
    let mut places: Vec<*mut c_void> = arguments.iter().map(Argument::place).collect();
    #[cfg(test)]
    if on == Device::Cpu {
        let sizes: Vec<usize> = arguments.iter().map(Argument::size).collect();
        return emulator::run(&format!("{kernel}_{}", SUFFIXES[number].1), blocks, &mut places, &sizes);
    }
    let Device::Cuda(index) = on else { unreachable!("only CUDA devices are ever ready") };
    // SAFETY: by the caller's promise; the arguments outlive the call, which copies them.
    if let Err(error) = unsafe { device::launch(index, kernel, number, blocks, &mut places) } {
        panic!("{error}");
    }
}

/// Blocks of so many threads' work in all.
pub(super) fn blocks_of(threads: i64) -> i64 {
    (threads + THREADS - 1) / THREADS
}
