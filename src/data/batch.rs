//! Documents -> tensors, prepared ahead of the trainer.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use tch::Tensor;

use super::dataset::Shelf;
use super::pack::Epoch;
use super::{Batch, Cursor, Document, RowId};
use crate::model::Documents;
use crate::{Error, Fault, Result};

/// Micro-batches kept ready.
const AHEAD: usize = 4;

/// Lays documents end to end: ids (T), positions (T), and the S rows whose next token is trained.
pub(super) fn assemble(documents: &[(RowId, Document)]) -> Batch {
    let total = documents.iter().map(|(_, document)| document.ids.len()).sum();
    let (mut ids, mut positions) = (Vec::with_capacity(total), Vec::with_capacity(total));
    let (mut rows, mut targets) = (Vec::new(), Vec::new());
    let mut offsets = vec![0];
    for (_, document) in documents {
        let start = ids.len() as i64;
        ids.extend(document.ids.iter().map(|id| i64::from(*id)));
        positions.extend(0..document.ids.len() as i64);
        for (at, (id, trained)) in document.ids.iter().zip(&document.trained).enumerate().skip(1) {
            if *trained {
                rows.push(start + at as i64 - 1);
                targets.push(i64::from(*id));
            }
        }
        offsets.push(ids.len() as i64);
    }
    Batch {
        ids: Tensor::from_slice(&ids),
        positions: Tensor::from_slice(&positions),
        documents: Documents { offsets },
        rows: Tensor::from_slice(&rows),
        targets: Tensor::from_slice(&targets),
        origins: documents.iter().map(|(origin, _)| *origin).collect(),
    }
}

/// Micro-batches, made ahead by a thread of their own; each comes with the cursor after it. An error is the last item.
pub struct Batches {
    /// None once dropped, which stops the thread.
    receiver: Option<Receiver<Result<(Batch, Cursor)>>>,
    thread: Option<JoinHandle<()>>,
}

impl Batches {
    /// Goes on from `cursor` over the epochs without end.
    pub(super) fn endless(shelf: Arc<Shelf>, cursor: Cursor, size: u64) -> Self {
        let mut cursor = cursor;
        let mut epoch: Option<Epoch> = None;
        Self::ahead(move || {
            loop {
                let order = shelf.order();
                let order = order.as_order();
                let open = epoch.take().filter(|epoch| epoch.number() == cursor.epoch);
                let open = epoch.insert(open.unwrap_or_else(|| Epoch::new(&order, cursor.epoch)));
                let count = open.bins().div_ceil(size);
                if cursor.micro_batch > count {
                    let what = format!(
                        "epoch {} has {count} micro-batches, none is number {}",
                        cursor.epoch, cursor.micro_batch
                    );
                    return Some(Err(Error::State(Fault::new("data cursor", what))));
                }
                if cursor.micro_batch == count {
                    cursor = Cursor { epoch: cursor.epoch + 1, micro_batch: 0 };
                    continue;
                }
                let first = cursor.micro_batch * size;
                let mut documents = Vec::new();
                for bin in first..(first + size).min(open.bins()) {
                    for &index in open.bin(&order, bin) {
                        match shelf.document(index) {
                            Ok(document) => documents.push((shelf.origin(index), document)),
                            Err(error) => return Some(Err(error)),
                        }
                    }
                }
                cursor.micro_batch += 1;
                if cursor.micro_batch == count {
                    cursor = Cursor { epoch: cursor.epoch + 1, micro_batch: 0 };
                }
                return Some(Ok((assemble(&documents), cursor)));
            }
        })
    }

    /// One pass in file order, each document once whatever its weight: `size` documents at a time, or as many as fit
    /// into `tokens` where that is given.
    pub(super) fn once(shelf: Arc<Shelf>, size: u64, tokens: Option<u64>) -> Self {
        let mut next: u32 = 0;
        let mut done = 0;
        Self::ahead(move || {
            let mut documents = Vec::new();
            let mut filled = 0;
            while next < shelf.documents() {
                let length = u64::from(shelf.length(next));
                let full = match tokens {
                    Some(limit) => filled + length > limit,
                    None => documents.len() as u64 == size,
                };
                if full && !documents.is_empty() {
                    break;
                }
                match shelf.document(next) {
                    Ok(document) => documents.push((shelf.origin(next), document)),
                    Err(error) => return Some(Err(error)),
                }
                filled += length;
                next += 1;
            }
            done += 1;
            (!documents.is_empty()).then(|| Ok((assemble(&documents), Cursor { epoch: 0, micro_batch: done })))
        })
    }

    fn ahead(mut make: impl FnMut() -> Option<Result<(Batch, Cursor)>> + Send + 'static) -> Self {
        let (sender, receiver) = sync_channel(AHEAD);
        let work = move || {
            while let Some(item) = make() {
                let last = item.is_err();
                if sender.send(item).is_err() || last {
                    return;
                }
            }
        };
        match std::thread::Builder::new().name("batches".into()).spawn(work) {
            Ok(thread) => Self { receiver: Some(receiver), thread: Some(thread) },
            Err(error) => {
                let (sender, receiver) = sync_channel(1);
                // The receiver is right here.
                let _ =
                    sender.send(Err(Error::Data(Fault::new("batches", format!("no thread can be started: {error}")))));
                Self { receiver: Some(receiver), thread: None }
            }
        }
    }
}

impl Iterator for Batches {
    type Item = Result<(Batch, Cursor)>;

    fn next(&mut self) -> Option<Self::Item> {
        self.receiver.as_ref()?.recv().ok()
    }
}

impl Drop for Batches {
    fn drop(&mut self) {
        self.receiver = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was already seen as an early end.
            let _ = thread.join();
        }
    }
}
