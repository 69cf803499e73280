//! How much energy a run takes, where the machine counts it: the processor's packages and memory by RAPL, a GPU by NVML.
//!
//! RAPL (`/sys/class/powercap/intel-rapl:N`, AMD's too) counts microjoules and begins anew at `max_energy_range_uj`, within some
//! minutes at full power, so it is read every few seconds. What it counts is the whole machine's: of other programs, too, and
//! nothing of fans, disks and what the power supply loses.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tch::Device;

use crate::torch_ext::GpuEnergy;

/// Where Linux lists the counters.
const COUNTERS: &str = "/sys/class/powercap";
/// How often they are read.
const EVERY: Duration = Duration::from_secs(10);

/// Energy that was counted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Energy {
    /// Joules of all counters.
    pub joules: f64,
    /// What they count: `package-0`, `dram`, a GPU.
    pub of: Vec<String>,
}

/// Counts from when it is made until it is dropped.
#[derive(Debug)]
pub struct Meter {
    counters: Arc<Mutex<Vec<Counter>>>,
    stop: Option<Sender<()>>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Counter {
    name: String,
    source: Source,
    last: f64,
    joules: f64,
}

#[derive(Debug)]
enum Source {
    /// `energy_uj`, and the joules at which it begins anew.
    Rapl(PathBuf, f64),
    Gpu(GpuEnergy),
}

impl Meter {
    /// Begins to count for a run on `device`; `None` where nothing can be read.
    pub fn start(device: Device) -> Option<Self> {
        let mut sources = rapl(Path::new(COUNTERS));
        if let Device::Cuda(index) = device {
            let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
            sources.extend(
                GpuEnergy::of(index, visible.as_deref()).map(|gpu| (super::device_name(device), Source::Gpu(gpu))),
            );
        }
        Self::of(sources, EVERY)
    }

    fn of(sources: Vec<(String, Source)>, every: Duration) -> Option<Self> {
        let counters: Vec<Counter> = sources
            .into_iter()
            .filter_map(|(name, source)| Some(Counter { last: source.joules()?, name, source, joules: 0.0 }))
            .collect();
        if counters.is_empty() {
            return None;
        }
        let counters = Arc::new(Mutex::new(counters));
        let (stop, stopped) = channel();
        let shared = Arc::clone(&counters);
        let read = move || {
            while stopped.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                read_all(&shared);
            }
        };
        // Without a thread it is read when it is asked.
        let reader = std::thread::Builder::new().name("energy".into()).spawn(read).ok();
        Some(Self { counters, stop: Some(stop), reader })
    }

    /// What was counted so far, beside what earlier parts of the run did.
    pub fn energy(&self, before: Option<&Energy>) -> Energy {
        read_all(&self.counters);
        let counters = self.counters.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut all = before.cloned().unwrap_or_default();
        for counter in counters.iter() {
            all.joules += counter.joules;
            if !all.of.contains(&counter.name) {
                all.of.push(counter.name.clone());
            }
        }
        all
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(reader) = self.reader.take() {
            // A reader that panicked has nothing more to say.
            let _ = reader.join();
        }
    }
}

fn read_all(counters: &Mutex<Vec<Counter>>) {
    let mut counters = counters.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    for counter in counters.iter_mut() {
        let Some(now) = counter.source.joules() else { continue };
        let passed = match &counter.source {
            Source::Rapl(_, range) if now < counter.last => now + range - counter.last,
            _ => (now - counter.last).max(0.0),
        };
        counter.joules += passed;
        counter.last = now;
    }
}

impl Source {
    fn joules(&self) -> Option<f64> {
        match self {
            Self::Rapl(path, _) => number(path),
            Self::Gpu(gpu) => gpu.joules(),
        }
    }
}

/// The packages, and the memory beside each: the cores are a part of their package, and `psys` counts all once more.
fn rapl(folder: &Path) -> Vec<(String, Source)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut zones: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    zones.sort();
    let named = zones.into_iter().filter_map(|zone| {
        let own = zone.file_name()?.to_str()?.starts_with("intel-rapl:");
        let name = fs::read_to_string(zone.join("name")).ok()?.trim().to_string();
        let counted = name.starts_with("package") || name == "dram";
        let range = number(&zone.join("max_energy_range_uj"))?;
        (own && counted).then(|| (name, Source::Rapl(zone.join("energy_uj"), range)))
    });
    named.collect()
}

/// Microjoules in a file, as joules.
fn number(path: &Path) -> Option<f64> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().parse::<f64>().ok()? / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zone(root: &Path, folder: &str, name: &str, microjoules: u64) {
        let zone = root.join(folder);
        fs::create_dir_all(&zone).unwrap();
        fs::write(zone.join("name"), format!("{name}\n")).unwrap();
        fs::write(zone.join("max_energy_range_uj"), "10000000\n").unwrap();
        fs::write(zone.join("energy_uj"), format!("{microjoules}\n")).unwrap();
    }

    #[test]
    fn packages_and_memory_are_counted_once_and_beyond_the_end_of_their_range() {
        let root = tempfile::tempdir().unwrap();
        zone(root.path(), "intel-rapl:0", "package-0", 9_000_000);
        zone(root.path(), "intel-rapl:0:0", "core", 1);
        zone(root.path(), "intel-rapl:0:1", "dram", 0);
        zone(root.path(), "intel-rapl:1", "psys", 5);
        zone(root.path(), "intel-rapl-mmio:0", "package-0", 5);
        let meter = Meter::of(rapl(root.path()), Duration::from_secs(3600)).unwrap();
        assert_eq!(meter.energy(None), Energy { joules: 0.0, of: vec!["package-0".into(), "dram".into()] });
        zone(root.path(), "intel-rapl:0", "package-0", 2_000_000);
        zone(root.path(), "intel-rapl:0:1", "dram", 500_000);
        assert!((meter.energy(None).joules - 3.5).abs() < 1e-9);
        // A counter that can no longer be read counts no further.
        fs::remove_file(root.path().join("intel-rapl:0/energy_uj")).unwrap();
        let before = Energy { joules: 10.0, of: vec!["package-0".into()] };
        let all = meter.energy(Some(&before));
        assert!((all.joules - 13.5).abs() < 1e-9 && all.of == ["package-0", "dram"], "{all:?}");
        drop(meter);
        assert!(Meter::of(rapl(&root.path().join("none")), EVERY).is_none());
    }

    #[test]
    fn it_is_read_by_itself() {
        let root = tempfile::tempdir().unwrap();
        zone(root.path(), "intel-rapl:0", "package-0", 9_000_000);
        let meter = Meter::of(rapl(root.path()), Duration::from_millis(5)).unwrap();
        let read = || meter.counters.lock().unwrap()[0].joules;
        zone(root.path(), "intel-rapl:0", "package-0", 9_500_000);
        let began = std::time::Instant::now();
        while read() == 0.0 && began.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!((read() - 0.5).abs() < 1e-9);
    }
}
