//! What there is: libtorch, processor, devices and their memory.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

use tch::Device;

use super::failure::checked;
use crate::error::Result;

unsafe extern "C" {
    fn engraft_cuda_memory(
        index: c_int,
        allocated: *mut i64,
        peak: *mut i64,
        free: *mut i64,
        total: *mut i64,
    ) -> *mut c_char;
    fn engraft_cuda_stream(index: c_int, stream: *mut *mut c_void) -> *mut c_char;
    fn engraft_allocate_on_cpu();
    fn engraft_set_deterministic(on: c_int);
    fn engraft_deterministic() -> c_int;
    fn engraft_keep_shapes(count: c_int);
    fn engraft_cpu_memory(allocated: *mut i64, peak: *mut i64, used: *mut i64);
    fn engraft_cpu_capability() -> *const c_char;
    fn engraft_torch_version() -> *const c_char;
}

/// Memory of a CUDA device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaMemory {
    /// Allocated by tensors now.
    pub allocated: i64,
    /// The most that was allocated by tensors at once.
    pub peak: i64,
    /// Free on the device.
    pub free: i64,
    /// All there is on the device.
    pub total: i64,
}

/// Memory of CUDA device `index`; an error where libtorch has no CUDA.
pub fn cuda_memory(index: usize) -> Result<CudaMemory> {
    let mut memory = CudaMemory { allocated: 0, peak: 0, free: 0, total: 0 };
    // SAFETY: four distinct places to write to.
    checked(unsafe {
        engraft_cuda_memory(
            index as c_int,
            &mut memory.allocated,
            &mut memory.peak,
            &mut memory.free,
            &mut memory.total,
        )
    })?;
    Ok(memory)
}

/// The stream, a `CUstream`, that this thread's libtorch puts its work on; null is the device's default one. An error where libtorch has
/// no CUDA.
pub fn cuda_stream(index: usize) -> Result<*mut c_void> {
    let mut stream = std::ptr::null_mut();
    // SAFETY: one place to write to.
    checked(unsafe { engraft_cuda_stream(index as c_int, &mut stream) })?;
    Ok(stream)
}

/// Has libtorch compute the same bits from the same numbers on a GPU, too, or as it is fastest. An operation that has no such form fails
/// then. To be called before the first product, which makes cuBLAS read its settings.
pub fn set_deterministic(on: bool) {
    // SAFETY: sets libtorch's own flags, and a variable that nothing else reads before cuBLAS is first used.
    unsafe { engraft_set_deterministic(c_int::from(on)) };
}

/// Whether [`set_deterministic`] is on.
pub fn deterministic() -> bool {
    // SAFETY: reads a flag.
    unsafe { engraft_deterministic() != 0 }
}

/// Where a device is, as an index libtorch understands.
pub fn cuda_index(device: Device) -> Option<usize> {
    match device {
        Device::Cuda(index) => Some(index),
        _ => None,
    }
}

/// Gives tensors on the CPU memory of their own (`cpu_memory.cpp`), which is kept when it is freed: a training step asks for the same
/// blocks over and over, and handing them back to the kernel costs a page fault for every 4 KiB, every time. To be called before the
/// first product.
pub fn keep_freed_memory() {
    // SAFETY: what libtorch has allocated before is freed by whom it came from.
    unsafe { engraft_allocate_on_cpu() };
}

/// Of how many shapes of products what oneDNN compiled is kept, above it and by itself: those of about two steps.
pub const FEW_SHAPES: u32 = 64;

/// The same for models whose steps have many: those of experts, whose rows are as many as they are sent. One too few, and all of
/// them are compiled anew in every step, which takes up to half of the time.
pub const MANY_SHAPES: u32 = 4096;

/// Has libtorch keep what oneDNN compiles of so many shapes. To be called before the first product.
pub fn keep_shapes(count: u32) {
    // SAFETY: sets variables that nothing else reads before oneDNN is first used.
    unsafe { engraft_keep_shapes(count as c_int) };
}

/// Memory of tensors on the CPU, in bytes, of those of at least 4 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuMemory {
    /// Held by tensors now.
    pub allocated: u64,
    /// The most that was held at once.
    pub peak: u64,
    /// What it took, with the holes between them.
    pub used: u64,
}

/// Memory of tensors on the CPU since [`keep_freed_memory`].
pub fn cpu_memory() -> CpuMemory {
    let (mut allocated, mut peak, mut used) = (0, 0, 0);
    // SAFETY: three distinct places to write to.
    unsafe { engraft_cpu_memory(&mut allocated, &mut peak, &mut used) };
    let [allocated, peak, used] = [allocated, peak, used].map(|bytes| bytes.max(0) as u64);
    CpuMemory { allocated, peak, used }
}

/// The instruction set libtorch chose for its CPU kernels, as in `AVX512`.
pub fn cpu_capability() -> &'static str {
    // SAFETY: a NUL-terminated string that lives as long as the program.
    unsafe { CStr::from_ptr(engraft_cpu_capability()) }.to_str().unwrap_or("unknown")
}

/// The folder of the libtorch that this program runs with, where the system tells it.
pub fn libtorch_folder() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let library = maps.lines().find(|line| line.ends_with("/libtorch_cpu.so"))?;
    // A path begins at the line's only slash-led column and may hold spaces.
    let path = &library[library.find('/')?..];
    Path::new(path).parent().map(Path::to_path_buf)
}

/// libtorch's version, as in `2.11.0`.
pub fn torch_version() -> &'static str {
    // SAFETY: a NUL-terminated string literal of the C++ file.
    unsafe { CStr::from_ptr(engraft_torch_version()) }.to_str().unwrap_or("unknown")
}
