//! Documents -> tensors, prepared ahead of the trainer.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use tch::Tensor;

use super::dataset::Shelf;
use super::pack::Epoch;
use super::{Batch, Cursor, Document, RowId};
use crate::model::Documents;
use crate::torch_ext::pinned;
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

impl Batch {
    /// The same in pinned memory, or as it is where there is no more of that.
    fn pinned(self) -> Self {
        let pinned = |tensor: Tensor| pinned(&tensor).unwrap_or(tensor);
        let Self { ids, positions, rows, targets, .. } = self;
        let [ids, positions, rows, targets] = [ids, positions, rows, targets].map(pinned);
        Self { ids, positions, rows, targets, documents: self.documents, origins: self.origins }
    }
}

/// Micro-batches, at most [`AHEAD`] of them made ahead by a thread of their own; each comes with the cursor after it. An error is the
/// last item, and a panic of the thread is one of [`Iterator::next`].
pub struct Batches {
    /// None once dropped, which stops the thread.
    receiver: Option<Receiver<Result<(Batch, Cursor)>>>,
    thread: Option<JoinHandle<()>>,
}

impl Batches {
    /// Goes on from `cursor` over the epochs without end.
    pub(super) fn endless(shelf: Arc<Shelf>, cursor: Cursor, size: u64, pinned: bool) -> Self {
        let mut cursor = cursor;
        let mut epoch: Option<Epoch> = None;
        Self::ahead(pinned, move || {
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
    pub(super) fn once(shelf: Arc<Shelf>, size: u64, tokens: Option<u64>, pinned: bool) -> Self {
        let mut next: u32 = 0;
        let mut done = 0;
        Self::ahead(pinned, move || {
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

    fn ahead(pinned: bool, mut make: impl FnMut() -> Option<Result<(Batch, Cursor)>> + Send + 'static) -> Self {
        let (sender, receiver) = sync_channel(AHEAD);
        let work = move || {
            while let Some(item) = make() {
                let last = item.is_err();
                let item = item.map(|(batch, cursor)| (if pinned { batch.pinned() } else { batch }, cursor));
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
        let item = self.receiver.as_ref()?.recv().ok();
        // The thread is over: having made all, or having panicked, which is then the panic of whoever asks.
        if item.is_none()
            && let Some(Err(panic)) = self.thread.take().map(JoinHandle::join)
        {
            std::panic::resume_unwind(panic);
        }
        item
    }
}

impl Drop for Batches {
    fn drop(&mut self) {
        self.receiver = None;
        if let Some(thread) = self.thread.take() {
            // A panic there of micro-batches that nobody asked for is nobody's.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use super::*;

    fn item(number: u64) -> Option<Result<(Batch, Cursor)>> {
        let document = Document { ids: vec![1, 2, 3], trained: vec![false, true, true] };
        Some(Ok((assemble(&[(RowId { file: 0, row: number }, document)]), Cursor { epoch: 0, micro_batch: number })))
    }

    #[test]
    fn a_few_are_made_ahead_and_no_more() {
        let made = Arc::new(AtomicU64::new(0));
        let count = made.clone();
        let mut batches = Batches::ahead(false, move || item(count.fetch_add(1, Ordering::SeqCst)));
        for taken in 0..3 {
            assert_eq!(batches.next().unwrap().unwrap().1.micro_batch, taken);
            std::thread::sleep(Duration::from_millis(50));
            let made = made.load(Ordering::SeqCst);
            // One more waits to be put there.
            assert!(made > taken + 1 && made <= taken + 1 + AHEAD as u64 + 1, "{made} made, {} taken", taken + 1);
        }
    }

    #[test]
    fn a_panic_of_the_thread_is_one_of_whoever_asks_after_what_was_made() {
        let mut made = 0;
        let mut batches = Batches::ahead(false, move || {
            made += 1;
            if made == 3 { panic!("the reason") } else { item(made) }
        });
        assert!(batches.by_ref().take(2).all(|item| item.is_ok()));
        let panic = catch_unwind(AssertUnwindSafe(|| batches.next().is_none())).unwrap_err();
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"the reason"));
        assert!(batches.next().is_none());
    }

    #[test]
    fn an_error_is_the_last_and_a_pinned_batch_holds_the_same() {
        let mut made = 0;
        let mut batches = Batches::ahead(true, move || {
            made += 1;
            if made == 2 { Some(Err(Error::Data(Fault::new("here", "is wrong")))) } else { item(made) }
        });
        let (found, expected) = (batches.next().unwrap().unwrap().0, item(1).unwrap().unwrap().0);
        assert!(found.ids.equal(&expected.ids) && found.positions.equal(&expected.positions));
        assert!(found.rows.equal(&expected.rows) && found.targets.equal(&expected.targets));
        assert_eq!((found.origins, found.documents.offsets), (expected.origins, expected.documents.offsets));
        assert_eq!(batches.next().unwrap().unwrap_err().to_string(), "here: is wrong");
        assert!(batches.next().is_none());
    }
}
