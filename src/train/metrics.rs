//! What a run tells: `metrics.jsonl`, TensorBoard events, JSON events on standard output, and progress for a person.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use tch::Device;

use super::disk;
use super::progress::Progress;
use super::tensorboard::TensorBoard;
use crate::data::DatasetReport;
use crate::torch_ext::cuda_memory;
use crate::{Error, Result};

/// The file of all logged numbers: one JSON object per line.
pub const FILE: &str = "metrics.jsonl";

/// One logged step: a line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepRecord {
    /// Optimizer steps done.
    pub step: u64,
    /// Passes over the data done, with the part of the current one.
    pub epoch: f64,
    /// Mean cross-entropy over the trained tokens of the steps since the last logged one, in nats. Steps that were skipped as
    /// not finite are left out; null when all were.
    pub loss: f64,
    /// The loss that balances experts (arXiv:2101.03961), without its coefficient, over the same steps: as many as a token has experts
    /// where they are even, more where they are not. Absent where no experts are balanced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub router_aux_loss: Option<f64>,
    /// The rate this step was made with.
    pub learning_rate: f64,
    /// L2 norm of all gradients of this step before clipping; null when it was not finite.
    pub grad_norm: f64,
    /// Tokens seen since the run began.
    pub tokens: u64,
    /// Tokens trained on since the run began.
    pub trained_tokens: u64,
    /// Tokens per second of training since the last logged step (evaluating and saving are not counted).
    pub tokens_per_second: f64,
    /// Trained tokens per second, likewise.
    pub trained_tokens_per_second: f64,
    /// Seconds since the run began, over all its parts.
    pub elapsed_seconds: f64,
    /// Most memory in use so far: by tensors on CUDA, by the process on a CPU; null where the device does not tell.
    pub peak_memory_bytes: Option<u64>,
}

/// One evaluation: a line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EvalRecord {
    /// Optimizer steps done.
    pub step: u64,
    /// Passes over the data done.
    pub epoch: f64,
    /// Mean cross-entropy over all trained tokens of the eval set, in nats; null when it was not finite.
    pub eval_loss: f64,
    /// Those tokens.
    pub eval_tokens: u64,
    /// How long the evaluation took.
    pub eval_seconds: f64,
    /// Seconds since the run began, over all its parts.
    pub elapsed_seconds: f64,
}

/// What happens in a run, as `--json` prints it: one object per line, its kind under `event`.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event<'a> {
    /// A dataset is open.
    Dataset {
        /// `training` or `eval`.
        set: &'a str,
        /// Rows left out, whatever the reason.
        dropped: u64,
        /// What it holds.
        #[serde(flatten)]
        report: &'a DatasetReport,
    },
    /// How steps are cut, and what memory the run is expected to take.
    MemoryPlan(&'a super::Choice),
    /// What it took beyond what the process had before the base was read.
    Memory {
        /// The plan's peak.
        planned_bytes: u64,
        /// The most there was: of tensors on CUDA, of the resident set on a CPU.
        measured_bytes: u64,
        /// Of that, on a CPU, the most that tensors held at once.
        tensor_bytes: Option<u64>,
        /// And what they took, with the holes between them.
        tensor_bytes_with_holes: Option<u64>,
    },
    /// Training begins or continues.
    Start {
        /// Steps done before.
        step: u64,
        /// Steps in all.
        total_steps: u64,
        /// Tensors trained.
        trained_tensors: usize,
        /// Numbers in them.
        trained_parameters: u64,
    },
    /// A logged step.
    Step(&'a StepRecord),
    /// An evaluation.
    Eval(&'a EvalRecord),
    /// A state was saved.
    State {
        /// Its step.
        step: u64,
        /// Its folder.
        path: &'a Path,
    },
    /// Something a person should know.
    Notice {
        /// What.
        message: &'a str,
    },
    /// The training is over.
    End(&'a super::Outcome),
    /// A result is written.
    Wrote {
        /// Its folder or file.
        path: &'a Path,
    },
    /// The command ends with an error: one such event per fault.
    Error {
        /// The exit code.
        code: u8,
        /// File, line, row, tensor or key; empty where there is none.
        place: &'a str,
        /// What is wrong.
        what: &'a str,
        /// The way out; empty where there is none to offer.
        hint: &'a str,
    },
}

/// Events for a program, on standard output; nothing where none is asked for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Events {
    printed: bool,
}

impl Events {
    /// Prints events if `json` asks for them.
    pub fn new(json: bool) -> Self {
        Self { printed: json }
    }

    /// Prints an event as one line of JSON. A closed standard output is no reason to stop.
    pub fn tell(&self, event: &Event) {
        if self.printed {
            let line = serde_json::to_string(event).expect("plain structs with string keys always serialise");
            let _ = writeln!(std::io::stdout(), "{line}");
        }
    }

    /// A dataset is open; `set` says which.
    pub fn dataset(&self, set: &str, report: &DatasetReport) {
        self.tell(&Event::Dataset { set, dropped: report.dropped(), report });
    }

    /// The command ends with an error.
    pub fn error(&self, error: &Error) {
        for fault in error.faults() {
            let (place, what, hint) = (&fault.place, &fault.what, &fault.hint);
            self.tell(&Event::Error { code: error.exit_code(), place, what, hint });
        }
    }
}

/// All places a run tells things to.
pub struct Metrics {
    path: PathBuf,
    file: File,
    bytes: u64,
    tensorboard: Option<TensorBoard>,
    progress: Progress,
    events: Events,
}

impl Metrics {
    /// Opens the sinks of a run in `folder` that has `bytes` of metrics to keep; what lies beyond is cut off.
    ///
    /// `step` is where the run continues: TensorBoard drops what an earlier part logged after it.
    pub fn open(
        folder: &Path,
        bytes: u64,
        step: u64,
        tensorboard: bool,
        events: Events,
        progress: Progress,
    ) -> Result<Self> {
        let path = folder.join(FILE);
        let failed = |error: std::io::Error| disk::failed("write", &path, &error);
        let mut file = OpenOptions::new().write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        if length < bytes {
            progress.say(&format!(
                "{}: has {length} bytes, the state counted {bytes}: lines of earlier steps are lost, training is not affected",
                path.display()
            ));
        }
        let bytes = length.min(bytes);
        file.set_len(bytes).and_then(|()| file.seek(SeekFrom::End(0))).map_err(failed)?;
        let mut metrics = Self { path, file, bytes, tensorboard: None, progress, events };
        if tensorboard {
            metrics.tensorboard = metrics.optional(TensorBoard::create(folder, step));
        }
        Ok(metrics)
    }

    /// Tells an event to everyone it concerns.
    ///
    /// # Errors
    /// [`crate::Error::Output`] when `metrics.jsonl` cannot be written. TensorBoard, standard output and the terminal may fail: the training goes on without them.
    pub fn tell(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Step(record) => self.append(record)?,
            Event::Eval(record) => self.append(record)?,
            _ => {}
        }
        if let Some(tensorboard) = &mut self.tensorboard {
            let written = tensorboard.tell(event);
            if self.optional(written).is_none() {
                self.tensorboard = None;
            }
        }
        self.events.tell(event);
        self.progress.tell(event);
        Ok(())
    }

    /// Tells a person something, where an error is not one of the run's.
    pub fn notice(&mut self, message: &str) -> Result<()> {
        self.tell(&Event::Notice { message })
    }

    /// Flushes `metrics.jsonl` to the disk; its length then.
    pub fn flush(&mut self) -> Result<u64> {
        self.file.sync_data().map_err(|error| disk::failed("flush", &self.path, &error))?;
        Ok(self.bytes)
    }

    fn append(&mut self, record: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(record).expect("plain structs with string keys always serialise");
        line.push(b'\n');
        self.bytes += line.len() as u64;
        self.file.write_all(&line).map_err(|error| disk::failed("write", &self.path, &error))
    }

    fn optional<T>(&self, result: std::io::Result<T>) -> Option<T> {
        result
            .inspect_err(|error| self.progress.say(&format!("TensorBoard events are not written any more: {error}")))
            .ok()
    }
}

/// Most memory in use so far, as far as the device tells: tensors on CUDA, the resident set's high-water mark on Linux's CPU.
pub fn peak_memory_bytes(device: Device) -> Option<u64> {
    match device {
        Device::Cpu => of_status("VmHWM:"),
        Device::Cuda(index) => u64::try_from(cuda_memory(index).ok()?.peak).ok(),
        _ => None,
    }
}

/// Memory in use now, as [`peak_memory_bytes`] counts it.
pub fn memory_bytes(device: Device) -> Option<u64> {
    match device {
        Device::Cpu => of_status("VmRSS:"),
        Device::Cuda(index) => u64::try_from(cuda_memory(index).ok()?.allocated).ok(),
        _ => None,
    }
}

fn of_status(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64) -> StepRecord {
        StepRecord {
            step,
            epoch: 0.5,
            loss: 1.25,
            router_aux_loss: None,
            learning_rate: 1e-4,
            grad_norm: f64::NAN,
            tokens: 10,
            trained_tokens: 5,
            tokens_per_second: 2.0,
            trained_tokens_per_second: 1.0,
            elapsed_seconds: 5.0,
            peak_memory_bytes: Some(1),
        }
    }

    #[test]
    fn a_line_has_the_documented_fields() {
        let folder = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::open(folder.path(), 0, 0, false, Events::default(), Progress::silent()).unwrap();
        metrics.tell(&Event::Step(&record(1))).unwrap();
        let text = std::fs::read_to_string(folder.path().join(FILE)).unwrap();
        assert_eq!(
            text,
            "{\"step\":1,\"epoch\":0.5,\"loss\":1.25,\"learning_rate\":0.0001,\"grad_norm\":null,\"tokens\":10,\"trained_tokens\":5,\
             \"tokens_per_second\":2.0,\"trained_tokens_per_second\":1.0,\"elapsed_seconds\":5.0,\"peak_memory_bytes\":1}\n"
        );
    }

    #[test]
    fn what_a_killed_run_logged_after_its_state_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let open = |bytes, step| {
            Metrics::open(folder.path(), bytes, step, true, Events::default(), Progress::silent()).unwrap()
        };
        let mut metrics = open(0, 0);
        metrics.tell(&Event::Step(&record(1))).unwrap();
        let kept = metrics.flush().unwrap();
        metrics.tell(&Event::Step(&record(2))).unwrap();
        metrics.file.write_all(b"{\"step\":3,\"ep").unwrap();
        drop(metrics);
        let mut metrics = open(kept, 1);
        metrics.tell(&Event::Step(&record(2))).unwrap();
        let text = std::fs::read_to_string(folder.path().join(FILE)).unwrap();
        let steps: Vec<u64> = text
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["step"].as_u64().unwrap())
            .collect();
        assert_eq!(steps, [1, 2]);
    }

    #[test]
    fn metrics_that_got_shorter_do_not_stop_a_resume() {
        let folder = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::open(folder.path(), 5000, 3, false, Events::default(), Progress::silent()).unwrap();
        metrics.tell(&Event::Step(&record(4))).unwrap();
        assert!(std::fs::read_to_string(folder.path().join(FILE)).unwrap().starts_with("{\"step\":4"));
    }

    #[test]
    fn peak_memory_is_at_least_what_was_touched() {
        let touched = vec![1u8; 8 << 20];
        assert!(peak_memory_bytes(Device::Cpu).unwrap() > std::hint::black_box(&touched).len() as u64);
    }
}
