//! Tokens on disk: what tokenising made of one file, kept under a key of everything that determines it.
//!
//! ```text
//! <cache>/datasets/<key>/documents.bin   "ENGRAFTD" version | per document: ids u32[n], trained bits, CRC-32
//!                        index.bin       "ENGRAFTI" version | count, data bytes | per document: row u64, tokens u32, trained u32 | SHA-256
//!                        summary.json    counts and the first bad rows
//! <cache>/datasets/<key>.lock            held while the folder is made
//! <cache>/datasets/hashes/<identity>     SHA-256 of a file's contents, by path, size, time and inode
//! ```
//! Numbers are little-endian. The folder is made under another name and renamed, so it is there whole or not at all.
//! Only the index is held in memory; documents are read where they are needed and checked as they are read.

use std::fs::{self, File, TryLockError};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Document;
use super::report::Tally;
use super::source::ParquetFile;
use crate::{Error, Fault, Result};

/// Changes whenever the files' layout, or what this module's neighbours put into them, changes.
pub(super) const VERSION: u32 = 2;
const DOCUMENTS: &[u8; 8] = b"ENGRAFTD";
const INDEX: &[u8; 8] = b"ENGRAFTI";
const HEADER: u64 = 12;
const ENTRY: usize = 16;
/// A cache up to this many bytes is checked whole when opened; of a larger one each document is checked when read.
const CHECKED_WHOLE: u64 = 256 << 20;
/// A file changed this recently may change again within one tick of its time stamp: its hash is not remembered.
const SETTLED: Duration = Duration::from_secs(2);
/// Tokens opened within this time are never removed.
const RECENT: Duration = Duration::from_secs(24 * 60 * 60);

/// A document in the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    /// Row of the file.
    pub row: u64,
    /// Where its record begins.
    pub offset: u64,
    /// Tokens.
    pub tokens: u32,
    /// Tokens that are targets.
    pub trained: u32,
}

/// What became of a file's rows. Places are row numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Summary {
    pub rows: u64,
    pub overlong: Tally,
    pub truncated: Tally,
    pub answer_cut: Tally,
    pub malformed: Tally,
    pub nothing_trained: Tally,
    pub empty: Tally,
    /// SHA-256 of all documents with their rows and masks.
    pub digest: String,
}

/// One file's documents.
#[derive(Debug)]
pub(super) struct Tokens {
    pub summary: Summary,
    pub entries: Vec<Entry>,
    folder: PathBuf,
    file: File,
}

impl Tokens {
    /// Reads a cached folder; None where there is none.
    ///
    /// # Errors
    /// What is wrong with the folder, in words.
    pub fn open(folder: &Path) -> Result<Option<Self>, String> {
        let index = match fs::read(folder.join("index.bin")) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !folder.exists() => return Ok(None),
            Err(error) => return Err(format!("index.bin: {error}")),
        };
        let (entries, length) = read_index(&index).ok_or("index.bin is damaged")?;
        // Its time says when it was last used; on a read-only disk it stays as it is.
        let _ =
            File::options().write(true).open(folder.join("index.bin")).and_then(|f| f.set_modified(SystemTime::now()));
        let summary = fs::read(folder.join("summary.json")).map_err(|error| format!("summary.json: {error}"))?;
        let summary: Summary = serde_json::from_slice(&summary).map_err(|error| format!("summary.json: {error}"))?;
        let file = File::open(folder.join("documents.bin")).map_err(|error| format!("documents.bin: {error}"))?;
        let found = file.metadata().map_err(|error| format!("documents.bin: {error}"))?.len();
        let mut header = [0; HEADER as usize];
        let read = file.read_exact_at(&mut header, 0);
        if found != length || read.is_err() || header != *header_of(DOCUMENTS) {
            return Err(format!("documents.bin has {found} bytes, expected {length}"));
        }
        let tokens = Self { summary, entries, folder: folder.to_path_buf(), file };
        if length <= CHECKED_WHOLE {
            for index in 0..tokens.entries.len() {
                tokens.record(index).ok_or_else(|| format!("documents.bin: document {index} is damaged"))?;
            }
        }
        Ok(Some(tokens))
    }

    /// Reads one document.
    ///
    /// # Errors
    /// [`Error::Data`] where its record is damaged; the folder is then marked, and made anew by the next run.
    pub fn document(&self, index: usize) -> Result<Document> {
        self.record(index).ok_or_else(|| {
            // Without an index the folder counts as damaged; failing to remove it changes nothing here.
            let _ = fs::remove_file(self.folder.join("index.bin"));
            Error::Data(
                Fault::at(
                    &self.folder.join("documents.bin"),
                    format!("document {index} of the token cache is damaged"),
                )
                .hint("start again: the cache is then rebuilt (a run goes on from its last state with --resume)"),
            )
        })
    }

    /// Where the cache lies.
    #[cfg(test)]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn record(&self, index: usize) -> Option<Document> {
        let entry = self.entries[index];
        let mut bytes = vec![0; record_length(entry.tokens) as usize];
        self.file.read_exact_at(&mut bytes, entry.offset).ok()?;
        let (body, sum) = bytes.split_at(bytes.len() - 4);
        if crc32fast::hash(body).to_le_bytes() != sum {
            return None;
        }
        let (ids, bits) = body.split_at(entry.tokens as usize * 4);
        let ids = ids.chunks_exact(4).map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]])).collect();
        let trained = (0..entry.tokens as usize).map(|at| bits[at / 8] >> (at % 8) & 1 == 1).collect();
        Some(Document { ids, trained })
    }
}

fn record_length(tokens: u32) -> u64 {
    let tokens = u64::from(tokens);
    tokens * 4 + tokens.div_ceil(8) + 4
}

fn header_of(magic: &[u8; 8]) -> &'static [u8; 12] {
    const fn with_version(magic: &[u8; 8]) -> [u8; 12] {
        let version = VERSION.to_le_bytes();
        let mut header = [0; 12];
        let mut at = 0;
        while at < 12 {
            header[at] = if at < 8 { magic[at] } else { version[at - 8] };
            at += 1;
        }
        header
    }
    static OF_DOCUMENTS: [u8; 12] = with_version(DOCUMENTS);
    static OF_INDEX: [u8; 12] = with_version(INDEX);
    if magic == DOCUMENTS { &OF_DOCUMENTS } else { &OF_INDEX }
}

/// The entries and the length of documents.bin, or None where anything is wrong.
fn read_index(bytes: &[u8]) -> Option<(Vec<Entry>, u64)> {
    let (body, sum) = bytes.split_at_checked(bytes.len().checked_sub(32)?)?;
    if Sha256::digest(body)[..] != *sum {
        return None;
    }
    let body = body.strip_prefix(header_of(INDEX))?;
    let word = |bytes: &[u8]| bytes.try_into().ok().map(u64::from_le_bytes);
    let half = |bytes: &[u8]| bytes.try_into().ok().map(u32::from_le_bytes);
    let (count, length) = (word(body.get(..8)?)?, word(body.get(8..16)?)?);
    let body = &body[16..];
    if body.len() as u64 != count.checked_mul(ENTRY as u64)? {
        return None;
    }
    let mut offset = HEADER;
    let mut entries = Vec::with_capacity(body.len() / ENTRY);
    for entry in body.chunks_exact(ENTRY) {
        let (row, tokens, trained) = (word(&entry[..8])?, half(&entry[8..12])?, half(&entry[12..])?);
        entries.push(Entry { row, offset, tokens, trained });
        offset += record_length(tokens);
    }
    (offset == length).then_some((entries, length))
}

/// Writes a folder of tokens under a temporary name; [`Writer::finish`] gives it its own.
pub(super) struct Writer {
    building: PathBuf,
    folder: PathBuf,
    documents: BufWriter<File>,
    offset: u64,
    index: Vec<u8>,
    digest: Sha256,
}

impl Writer {
    /// Begins; whatever another run left under the temporary name is removed. The key's lock must be held.
    pub fn new(folder: &Path) -> Result<Self> {
        let building = folder.with_extension("building");
        let made = || -> io::Result<File> {
            if building.exists() {
                fs::remove_dir_all(&building)?;
            }
            fs::create_dir_all(&building)?;
            File::create(building.join("documents.bin"))
        };
        let mut documents = BufWriter::with_capacity(1 << 20, made().map_err(|error| unwritable(&building, &error))?);
        documents.write_all(header_of(DOCUMENTS)).map_err(|error| unwritable(&building, &error))?;
        let mut index = header_of(INDEX).to_vec();
        index.extend([0; 16]);
        Ok(Self { building, folder: folder.to_path_buf(), documents, offset: HEADER, index, digest: Sha256::new() })
    }

    /// Adds a document of row `row`.
    pub fn push(&mut self, row: u64, document: &Document) -> Result<()> {
        // Documents are no longer than max_length, a u32.
        let tokens = document.ids.len() as u32;
        let mut record = Vec::with_capacity(record_length(tokens) as usize);
        record.extend(document.ids.iter().flat_map(|id| id.to_le_bytes()));
        record.extend(
            document
                .trained
                .chunks(8)
                .map(|bits| bits.iter().enumerate().fold(0u8, |byte, (at, trained)| byte | u8::from(*trained) << at)),
        );
        self.digest.update(row.to_le_bytes());
        self.digest.update(tokens.to_le_bytes());
        self.digest.update(&record);
        record.extend(crc32fast::hash(&record).to_le_bytes());
        self.documents.write_all(&record).map_err(|error| unwritable(&self.building, &error))?;
        self.offset += record.len() as u64;
        self.index.extend(row.to_le_bytes());
        self.index.extend(tokens.to_le_bytes());
        self.index.extend((targets(document) as u32).to_le_bytes());
        Ok(())
    }

    /// Writes index and summary, and puts the folder in its place.
    pub fn finish(mut self, mut summary: Summary) -> Result<()> {
        summary.digest = hex(&self.digest.finalize_reset());
        let count = ((self.index.len() - HEADER as usize - 16) / ENTRY) as u64;
        self.index[12..20].copy_from_slice(&count.to_le_bytes());
        self.index[20..28].copy_from_slice(&self.offset.to_le_bytes());
        let sum = Sha256::digest(&self.index);
        self.index.extend(sum);
        let building = self.building.clone();
        let written = (|| -> io::Result<()> {
            self.documents.flush()?;
            self.documents.get_ref().sync_all()?;
            let json = serde_json::to_vec_pretty(&summary)?;
            for (name, bytes) in [("index.bin", &self.index), ("summary.json", &json)] {
                let mut file = File::create(building.join(name))?;
                file.write_all(bytes)?;
                file.sync_all()?;
            }
            File::open(&building)?.sync_all()?;
            if self.folder.exists() {
                fs::remove_dir_all(&self.folder)?;
            }
            fs::rename(&building, &self.folder)?;
            File::open(building.parent().unwrap_or(&building))?.sync_all()
        })();
        written.map_err(|error| unwritable(&building, &error))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Left behind only where tokenising stopped early; the next run would remove it too.
        let _ = fs::remove_dir_all(&self.building);
    }
}

/// How many of a document's tokens are targets: the first has no row that predicts it.
pub(super) fn targets(document: &Document) -> usize {
    document.trained.iter().skip(1).filter(|trained| **trained).count()
}

/// Removes the token folders that were not opened for longest, until what is left takes at most `limit` bytes. Those of the
/// last day stay in any case. What cannot be removed stays: the cache is only larger for it.
pub(super) fn prune(datasets: &Path, limit: u64) {
    let Ok(entries) = fs::read_dir(datasets) else { return };
    let mut folders: Vec<(SystemTime, u64, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| {
            let folder = entry.path();
            let index = fs::metadata(folder.join("index.bin")).ok()?;
            let documents = fs::metadata(folder.join("documents.bin")).ok()?;
            Some((index.modified().ok()?, index.len() + documents.len(), folder))
        })
        .collect();
    folders.sort();
    let mut total: u64 = folders.iter().map(|(_, bytes, _)| bytes).sum();
    for (used, bytes, folder) in folders {
        if total <= limit || SystemTime::now().duration_since(used).is_ok_and(|age| age < RECENT) {
            break;
        }
        // A run that has it open goes on reading: the file lives until it is closed.
        if fs::remove_dir_all(&folder).is_ok() {
            let _ = fs::remove_file(folder.with_extension("lock"));
            total -= bytes;
        }
    }
}

/// Waits until no other run makes the folder, and keeps others waiting while the file lives.
pub(super) fn lock(folder: &Path, waiting: impl FnOnce()) -> Result<File> {
    let path = folder.with_extension("lock");
    let locked = || -> io::Result<File> {
        fs::create_dir_all(path.parent().unwrap_or(&path))?;
        let file = File::options().create(true).truncate(false).write(true).open(&path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                waiting();
                file.lock()?;
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
        Ok(file)
    };
    locked().map_err(|error| unwritable(&path, &error))
}

fn unwritable(path: &Path, error: &io::Error) -> Error {
    Error::Output(
        Fault::at(path, format!("the token cache cannot be written: {error}"))
            .hint("free some disk, or move the cache elsewhere: ENGRAFT_CACHE=/another/folder"),
    )
}

/// SHA-256 of the file's contents, in hexadecimal; remembered in `datasets` (the cache's folder) while the file stays as it is.
pub(super) fn content_hash(datasets: &Path, parquet: &ParquetFile) -> Result<String> {
    let identity = parquet.identity();
    let absolute = std::path::absolute(parquet.path()).unwrap_or_else(|_| parquet.path().to_path_buf());
    let memo = datasets.join("hashes").join(hex(&Sha256::digest(format!("{} {identity:?}", absolute.display()))));
    if let Ok(hash) = fs::read_to_string(&memo)
        && hash.len() == 64
        && hash.bytes().all(|byte| byte.is_ascii_hexdigit())
    {
        return Ok(hash);
    }
    let mut file = parquet.reopen()?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => digest.update(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::Data(Fault::at(parquet.path(), error))),
        }
    }
    parquet.reopen()?;
    let hash = hex(&digest.finalize());
    let modified = file.metadata().and_then(|status| status.modified());
    if modified.is_ok_and(|time| SystemTime::now().duration_since(time).is_ok_and(|age| age > SETTLED)) {
        // A memo that cannot be kept costs time at the next start, nothing else.
        let _ = remember(&memo, &hash);
    }
    Ok(hash)
}

fn remember(memo: &Path, hash: &str) -> io::Result<()> {
    let folder = memo.parent().unwrap_or(memo);
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(hash.as_bytes())?;
    file.persist(memo)?;
    Ok(())
}

/// Lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tokens_unused_for_longest_make_room_and_recent_ones_stay() {
        let place = tempfile::tempdir().unwrap();
        let add = |name: &str, days: u64| {
            let folder = place.path().join(name);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("documents.bin"), [0; 600]).unwrap();
            let index = File::create(folder.join("index.bin")).unwrap();
            index.set_modified(SystemTime::now() - Duration::from_secs(days * 24 * 60 * 60)).unwrap();
        };
        for (name, days) in [("oldest", 9), ("old", 5), ("newer", 3), ("today", 0)] {
            add(name, days);
        }
        let left = |limit| {
            prune(place.path(), limit);
            ["oldest", "old", "newer", "today"].map(|name| place.path().join(name).exists())
        };
        assert_eq!(left(2400), [true, true, true, true]);
        assert_eq!(left(1300), [false, false, true, true]);
        assert_eq!(left(0), [false, false, false, true], "what was used today stays");
    }
}
