//! `engraft doctor`: what this machine has, what is missing and how to get it.

use std::io::Write;
use std::path::Path;

use serde::Serialize;
use tch::{Cuda, utils};

use crate::cli::Doctor;
use crate::ops::cuda as kernels;
use crate::recipe::cache_dir;
use crate::torch_ext;
use crate::train::device_name;
use crate::weights::hub::Hub;
use crate::{Error, Fault, Result};

/// One thing looked at.
#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    found: String,
    /// What to do about it, where something should be done.
    #[serde(skip_serializing_if = "String::is_empty")]
    help: String,
}

/// Runs the verb; the findings go to `out`.
pub fn run(arguments: &Doctor, out: &mut dyn Write) -> Result<()> {
    let findings = findings();
    let text = if arguments.json {
        let pairs = findings.iter().map(|finding| (finding.what, finding));
        format!("{}\n", serde_json::to_string(&pairs.collect::<std::collections::BTreeMap<_, _>>()).unwrap_or_default())
    } else {
        let line = |finding: &Finding| {
            let help =
                if finding.help.is_empty() { String::new() } else { format!("\n{:18}help: {}", "", finding.help) };
            format!("{:<16}  {}{help}\n", finding.what, finding.found)
        };
        findings.iter().map(line).collect()
    };
    out.write_all(text.as_bytes()).map_err(|error| Error::Output(Fault::new("standard output", error)))
}

fn findings() -> Vec<Finding> {
    let fine = |what, found: String| Finding { what, found, help: String::new() };
    let mut all = vec![
        fine("engraft", env!("CARGO_PKG_VERSION").into()),
        fine("libtorch", format!("{}, {}", torch_ext::torch_version(), libtorch_folder())),
        fine("cpu", format!("{} threads allowed, {}", threads(), torch_ext::cpu_capability())),
        attention(),
    ];
    all.extend(cuda());
    all.push(memory());
    let cache = cache_dir();
    let cache_free = free_disk(&cache);
    all.push(Finding {
        what: "cache",
        found: format!("{}, {}", cache.display(), bytes(cache_free)),
        help: match cache_free {
            Some(free) if free < 10 << 30 => "under 10 GB free: ENGRAFT_CACHE=/another/folder moves it".into(),
            _ => String::new(),
        },
    });
    let here = std::env::current_dir().unwrap_or_default();
    all.push(fine("disk here", format!("{}, {}", here.display(), bytes(free_disk(&here)))));
    let token = Hub::from_environment().is_ok_and(|hub| hub.has_token());
    all.push(Finding {
        what: "hub token",
        found: if token { "found" } else { "none" }.into(),
        help: if token { "" } else { "only gated models need one: export HF_TOKEN=..." }.into(),
    });
    all
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

fn attention() -> Finding {
    let serves = torch_ext::bf16_gemm_serves();
    Finding {
        what: "bf16 kernels",
        found: if serves { "own attention in bf16" } else { "libtorch's attention" }.into(),
        help: if serves { "" } else { "this processor has no fast bf16: on the CPU, dtype: fp32 may be faster" }.into(),
    }
}

fn cuda() -> Vec<Finding> {
    let finding = |what, found: String, help: &str| Finding { what, found, help: help.into() };
    if !utils::has_cuda() {
        let driver = Path::new("/proc/driver/nvidia/version").exists();
        let (found, help) = match (libtorch_cuda_is_loaded(), driver) {
            (false, _) => (
                "this libtorch is without CUDA; training runs on the CPU",
                "for a GPU, `pip install torch==2.11.0` brings a libtorch with CUDA: point LIBTORCH at it and build again",
            ),
            (true, false) => (
                "libtorch has CUDA, the machine has no NVIDIA driver; training runs on the CPU",
                "for a GPU, install an NVIDIA driver of the 580 series or newer",
            ),
            (true, true) => (
                "libtorch has CUDA and a driver is there, but no GPU answers",
                "`nvidia-smi` says why; the driver must be of the 580 series or newer, and CUDA_VISIBLE_DEVICES not empty",
            ),
        };
        return vec![finding("cuda", found.into(), help)];
    }
    let mut all = Vec::new();
    for index in 0..Cuda::device_count() as usize {
        let memory = torch_ext::cuda_memory(index);
        let found = match memory {
            Ok(memory) => format!(
                "{}, {:.1} of {:.1} GiB free",
                device_name(tch::Device::Cuda(index)),
                memory.free as f64 / f64::from(1 << 30),
                memory.total as f64 / f64::from(1 << 30),
            ),
            Err(error) => error.to_string(),
        };
        all.push(finding("cuda", found, ""));
    }
    let (found, help) = match kernels::prepare(tch::Device::Cuda(0), &cache_dir(), &|_, _| ()) {
        Ok(()) => ("compiled for the first GPU".into(), String::new()),
        Err(error) => {
            let fault = error.faults()[0].clone();
            (
                format!("none, libtorch's operations serve: {}", Fault { hint: String::new(), ..fault.clone() }),
                fault.hint,
            )
        }
    };
    all.push(finding("cuda kernels", found, &help));
    let cudnn = if Cuda::cudnn_is_available() { utils::version_cudnn().to_string() } else { "none".into() };
    all.push(finding("cudnn", cudnn, ""));
    all
}

/// Where the libtorch lies that this program runs with.
fn libtorch_folder() -> String {
    torch_ext::libtorch_folder().map_or_else(|| "somewhere".into(), |folder| folder.display().to_string())
}

fn libtorch_cuda_is_loaded() -> bool {
    std::fs::read_to_string("/proc/self/maps").is_ok_and(|maps| maps.contains("libtorch_cuda"))
}

fn memory() -> Finding {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let number = |key: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib as f64 / f64::from(1 << 20))
    };
    let found = match (number("MemAvailable:"), number("MemTotal:")) {
        (Some(available), Some(total)) => format!("{available:.1} of {total:.1} GiB available"),
        _ => "unknown".into(),
    };
    Finding { what: "memory", found, help: String::new() }
}

fn bytes(free: Option<u64>) -> String {
    free.map_or_else(|| "free space unknown".into(), |free| format!("{:.1} GB free", free as f64 / 1e9))
}

/// Bytes free on the disk of a folder, or of the nearest folder above it that exists.
fn free_disk(folder: &Path) -> Option<u64> {
    let there = folder.ancestors().find(|folder| folder.exists())?;
    let disk = rustix::fs::statvfs(there).ok()?;
    Some(disk.f_bavail * disk.f_frsize)
}
