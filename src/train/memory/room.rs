//! How much memory there is.

use tch::{Device, Kind};

use crate::model::ModelSpec;
use crate::torch_ext::cuda_memory;

/// Share of the memory that is free which a run may be planned to take: the rest is for what the allocator cannot reuse, and for a plan
/// that is a little off.
const SHARE: f64 = 0.93;

/// What a plan may take of `free` bytes.
pub fn budget(free: u64) -> u64 {
    (free as f64 * SHARE) as u64
}

/// Whether the linears' weights, made whole, fit into half of the memory that is free on the CPU. On a GPU they are made whole at the
/// speed of its memory, so that there is little to gain.
pub fn caches_dequantised(spec: &ModelSpec, kind: Kind, device: Device) -> bool {
    let numbers: i64 = spec.sites().iter().map(|site| site.numbers()).sum();
    let bytes = numbers as u64 * kind.elt_size_in_bytes() as u64;
    device == Device::Cpu && free_bytes(device).is_some_and(|free| bytes < free / 2)
}

/// Bytes free on the device; what the kernel says is available, within the cgroup's limit, for the CPU.
pub fn free_bytes(device: Device) -> Option<u64> {
    match device {
        Device::Cuda(index) => u64::try_from(cuda_memory(index).ok()?.free).ok(),
        Device::Cpu => {
            let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
            let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
            let available = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024;
            Some(cgroup_free().map_or(available, |free| free.min(available)))
        }
        _ => None,
    }
}

fn cgroup_free() -> Option<u64> {
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let limit = number("/sys/fs/cgroup/memory.max")?;
    Some(limit.saturating_sub(number("/sys/fs/cgroup/memory.current")?))
}
