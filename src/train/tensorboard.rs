//! TensorBoard events in `<run>/tensorboard`.
//!
//! Each part of a run (begun or resumed) writes a file of its own. It opens with a session start at its first step,
//! which makes TensorBoard drop what an earlier part logged from that step on: no point shows twice.
//! Only the record format of `tensorboard-rs` is used: its own writer ends the process when the disk is full.

use std::fs::File;
use std::io::{self, BufWriter};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use protobuf::Message;
use tensorboard_proto::event::{Event as Record, SessionLog, SessionLog_SessionStatus};
use tensorboard_rs::record_writer::RecordWriter;
use tensorboard_rs::summary::scalar;

use super::metrics::Event;

/// The folder of event files.
pub const FOLDER: &str = "tensorboard";

/// An event file being written.
pub struct TensorBoard {
    records: RecordWriter<BufWriter<File>>,
}

impl TensorBoard {
    /// Starts an event file for a run in `folder` that has done `step` steps.
    pub fn create(folder: &Path, step: u64) -> io::Result<Self> {
        let folder = folder.join(FOLDER);
        std::fs::create_dir_all(&folder)?;
        // TensorBoard reads the files of a folder in the order of their names.
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let name =
            format!("events.out.tfevents.{:010}.engraft.{:09}", since_epoch.as_secs(), since_epoch.subsec_nanos());
        let file = BufWriter::new(File::create(folder.join(name))?);
        let mut tensorboard = Self { records: RecordWriter::new(file) };
        let mut version = Record::new();
        version.set_file_version("brain.Event:2".into());
        tensorboard.write(version, 0)?;
        let mut session = SessionLog::new();
        session.set_status(SessionLog_SessionStatus::START);
        let mut start = Record::new();
        start.set_session_log(session);
        tensorboard.write(start, step + 1)?;
        tensorboard.records.flush()?;
        Ok(tensorboard)
    }

    /// Writes what an event has to plot.
    pub fn tell(&mut self, event: &Event) -> io::Result<()> {
        match event {
            Event::Step(record) => {
                let scalars = [
                    ("train/loss", record.loss),
                    ("train/learning_rate", record.learning_rate),
                    ("train/grad_norm", record.grad_norm),
                    ("train/epoch", record.epoch),
                    ("train/tokens_per_second", record.tokens_per_second),
                    ("train/trained_tokens_per_second", record.trained_tokens_per_second),
                ];
                let balance = record.router_aux_loss.map(|value| ("train/router_aux_loss", value));
                scalars.into_iter().chain(balance).try_for_each(|(tag, value)| self.scalar(tag, value, record.step))?;
            }
            Event::Eval(record) => self.scalar("eval/loss", record.eval_loss, record.step)?,
            _ => return Ok(()),
        }
        self.records.flush()
    }

    fn scalar(&mut self, tag: &str, value: f64, step: u64) -> io::Result<()> {
        let mut record = Record::new();
        record.set_summary(scalar(tag, value as f32));
        self.write(record, step)
    }

    fn write(&mut self, mut record: Record, step: u64) -> io::Result<()> {
        record.set_wall_time(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());
        record.set_step(step as i64);
        let bytes = record.write_to_bytes().map_err(io::Error::other)?;
        self.records.write(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::metrics::EvalRecord;

    /// The events of a file: length, its checksum, the event, its checksum.
    fn events(bytes: &[u8]) -> Vec<Record> {
        let mut rest = bytes;
        let mut events = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            events.push(protobuf::Message::parse_from_bytes(&rest[12..12 + length]).unwrap());
            rest = &rest[16 + length..];
        }
        events
    }

    #[test]
    fn a_resumed_part_tells_tensorboard_to_drop_what_it_repeats() {
        let folder = tempfile::tempdir().unwrap();
        let record =
            EvalRecord { step: 8, epoch: 1.0, eval_loss: 0.5, eval_tokens: 9, eval_seconds: 1.0, elapsed_seconds: 2.0 };
        let mut tensorboard = TensorBoard::create(folder.path(), 7).unwrap();
        tensorboard.tell(&Event::Eval(&record)).unwrap();
        let file = std::fs::read_dir(folder.path().join(FOLDER)).unwrap().next().unwrap().unwrap();
        let events = events(&std::fs::read(file.path()).unwrap());
        assert_eq!(events.len(), 3);
        assert_eq!(events[0].get_file_version(), "brain.Event:2");
        assert_eq!(
            (events[1].get_session_log().get_status(), events[1].get_step()),
            (SessionLog_SessionStatus::START, 8)
        );
        let value = &events[2].get_summary().get_value()[0];
        assert_eq!((value.get_tag(), value.get_simple_value(), events[2].get_step()), ("eval/loss", 0.5, 8));
    }
}
