//! What a run computes on, in words.

use tch::Device;

use crate::torch_ext::cpu_capability;

/// What computes: on the same device with as many threads, runs are equal bit for bit.
pub fn device_name(device: Device) -> String {
    match device {
        Device::Cpu => format!("cpu, {} threads, {}", tch::get_num_threads(), cpu_capability()),
        Device::Cuda(index) => gpu_model(index).unwrap_or_else(|| format!("cuda:{index}")),
        other => format!("{other:?}"),
    }
}

/// The GPU's name as its driver tells it; GPUs are listed in bus order there, as CUDA numbers them when not told otherwise.
fn gpu_model(index: usize) -> Option<String> {
    let mut folders: Vec<_> = std::fs::read_dir("/proc/driver/nvidia/gpus").ok()?.flatten().map(|e| e.path()).collect();
    folders.sort();
    let text = std::fs::read_to_string(folders.get(index)?.join("information")).ok()?;
    Some(text.lines().find_map(|line| line.strip_prefix("Model:"))?.trim().to_string())
}
