//! A dataset: tokenised files, an order over their documents, and batches from it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::cache::{self, Tokens};
use super::files::{Examples, SourceFiles};
use super::pack::{Epoch, Order, Span};
use super::report::DatasetReport;
use super::tokenize::{self, Job};
use super::{BadRow, Batches, Cursor, Document, Encode, Example, RowId};
use crate::recipe::{DataSource, DatasetRecipe};
use crate::{Error, Fault, Result};

/// Tokens of datasets unused for longest are removed where all take more than this on disk.
const CACHE_BYTES: u64 = 32 << 30;

/// Parquet files, tokenised and cached. Only lengths and places are in memory; tokens are read as batches need them.
#[derive(Debug)]
pub struct Dataset {
    sources: SourceFiles,
    files: Vec<DatasetFile>,
    shelf: Arc<Shelf>,
    report: DatasetReport,
    fingerprint: String,
    max_length: u32,
    packing: bool,
    /// Packed rows of the epochs asked about so far.
    bins: Mutex<BTreeMap<u64, u64>>,
}

/// A file of a dataset, for a run's manifest.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct DatasetFile {
    /// Where it is.
    pub path: PathBuf,
    /// SHA-256 of its bytes, in hexadecimal.
    pub sha256: String,
    /// Rows used.
    pub rows: u64,
    /// How often each row is seen per epoch.
    pub weight: f64,
}

impl Dataset {
    /// Opens the files, finds their formats, and tokenises what the cache below `cache_dir` does not hold yet.
    ///
    /// `progress` is called on this thread with rows done and rows in all; `seed` decides the order of batches.
    ///
    /// # Errors
    /// [`Error::Data`] naming file and row: a file that cannot be read, columns that do not fit, a row the recipe does
    /// not let pass, nothing left to train on. [`Error::Output`] where the cache cannot be written.
    pub fn open(
        sources: &[DataSource],
        recipe: &DatasetRecipe,
        encoder: &dyn Encode,
        cache_dir: &Path,
        seed: u64,
        progress: &dyn Fn(u64, u64),
    ) -> Result<Self> {
        let sources = SourceFiles::open(sources, recipe)?;
        // Said before a row is: it is not the first row that must be mended.
        sources.files.iter().try_for_each(|file| encoder.check(file.layout.format()))?;
        let datasets = cache_dir.join("datasets");
        let hashes: Vec<String> = sources
            .files
            .par_iter()
            .map(|file| cache::content_hash(&datasets, &file.parquet))
            .collect::<Result<_>>()?;
        let mut report =
            DatasetReport { inference: sources.sentences(), files: sources.files.len() as u64, ..Default::default() };
        report.notices.extend(encoder.notices());
        let mut digest = Sha256::new();
        let (mut files, mut tokens, mut done) = (Vec::new(), Vec::new(), 0);
        for (index, (file, sha256)) in sources.files.iter().zip(hashes).enumerate() {
            let path = file.parquet.path();
            if file.parquet.rows() == 0 {
                report.notices.push(format!("{}: the file has no rows", path.display()));
            }
            let so_far = |rows| progress(done + rows, sources.rows());
            let job = Job { sources: &sources, file: index, recipe, encoder };
            let own = job.tokens(&sha256, &datasets, &so_far, &mut report.notices)?;
            tokenize::recheck(&own.summary, path, recipe)?;
            done += file.rows;
            progress(done, sources.rows());
            digest.update(&own.summary.digest);
            digest.update(file.weight.to_le_bytes());
            add(&mut report, &path.display().to_string(), &own);
            files.push(DatasetFile { path: path.to_path_buf(), sha256, rows: file.rows, weight: file.weight });
            tokens.push(own);
        }
        cache::prune(&datasets, CACHE_BYTES);
        let capacity = recipe.packing.then_some(recipe.max_length);
        let shelf = Shelf::new(tokens, &files, capacity, recipe.shuffle, seed)?;
        if shelf.spans.iter().all(|span| span.count == 0 || span.weight == 0.0) {
            return Err(nothing_left(&sources, &report));
        }
        let dataset = Self {
            sources,
            files,
            shelf: Arc::new(shelf),
            report,
            fingerprint: cache::hex(&digest.finalize()),
            max_length: recipe.max_length,
            packing: recipe.packing,
            bins: Mutex::default(),
        };
        Ok(dataset.with_packing_reported())
    }

    fn with_packing_reported(mut self) -> Self {
        if self.packing {
            let order = self.shelf.order();
            let order = order.as_order();
            let epoch = Epoch::new(&order, 0);
            let (bins, tokens) = (epoch.bins(), epoch.tokens(&order));
            self.bins = Mutex::new(BTreeMap::from([(0, bins)]));
            self.report.bins = Some(bins);
            self.report.packing_efficiency = Some(tokens as f64 / (bins as f64 * f64::from(self.max_length)));
        }
        self
    }

    /// What the dataset holds.
    pub fn report(&self) -> &DatasetReport {
        &self.report
    }

    /// The files with their digests.
    pub fn files(&self) -> &[DatasetFile] {
        &self.files
    }

    /// A digest of every document, mask, row and weight: another one means other training data.
    pub fn fingerprint(&self) -> String {
        self.fingerprint.clone()
    }

    /// Micro-batches of `micro_batch_size` rows (packed rows with `packing`) in an epoch; the last may be smaller.
    pub fn micro_batches_in_epoch(&self, epoch: u64, micro_batch_size: u64) -> u64 {
        self.bins_in_epoch(epoch).div_ceil(micro_batch_size.max(1))
    }

    fn bins_in_epoch(&self, epoch: u64) -> u64 {
        let mut bins = self.bins.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *bins.entry(epoch).or_insert_with(|| Epoch::new(&self.shelf.order().as_order(), epoch).bins())
    }

    /// Micro-batches from `cursor` on, epoch after epoch without end, each with the cursor after it.
    ///
    /// Resuming from a cursor gives exactly the batches that followed it, for the same dataset, seed and size.
    pub fn batches(&self, cursor: Cursor, micro_batch_size: u64) -> Batches {
        Batches::endless(self.shelf.clone(), cursor, micro_batch_size.max(1))
    }

    /// One pass in file order over every document, for evaluation: `micro_batch_size` documents at a time, or with
    /// `packing` as many as fit into `micro_batch_size` times `max_length` tokens.
    pub fn eval_batches(&self, micro_batch_size: u64) -> Batches {
        let size = micro_batch_size.max(1);
        Batches::once(self.shelf.clone(), size, self.packing.then_some(size * u64::from(self.max_length)))
    }

    /// The documents made of a row: none where it was left out.
    ///
    /// # Errors
    /// [`Error::Data`] where the token cache is damaged.
    pub fn documents_at(&self, id: RowId) -> Result<Vec<Document>> {
        let Some(tokens) = self.shelf.files.get(id.file as usize) else { return Ok(Vec::new()) };
        let first = tokens.entries.partition_point(|entry| entry.row < id.row);
        let count = tokens.entries[first..].iter().take_while(|entry| entry.row == id.row).count();
        (first..first + count).map(|index| tokens.document(index)).collect()
    }

    /// Whether a row gave any document: not where it was left out.
    pub fn keeps(&self, id: RowId) -> bool {
        let tokens = self.shelf.files.get(id.file as usize);
        tokens.is_some_and(|tokens| tokens.entries.binary_search_by_key(&id.row, |entry| entry.row).is_ok())
    }

    /// One row as it was before any template; the inner error is what is wrong with it.
    ///
    /// # Errors
    /// [`Error::Data`] where the file has changed or there is no such row.
    pub fn example_at(&self, id: RowId) -> Result<std::result::Result<Example, BadRow>> {
        self.sources.example_at(id)
    }

    /// The first `limit` rows as examples, read from the files again.
    pub fn examples(&self, limit: u64) -> Examples<'_> {
        self.sources.examples(limit)
    }

    /// A row's place as errors name it: file and row, counted from 0.
    pub fn place(&self, id: RowId) -> String {
        self.sources.place(id)
    }
}

fn add(report: &mut DatasetReport, file: &str, tokens: &Tokens) {
    report.rows += tokens.summary.rows;
    report.documents += tokens.entries.len() as u64;
    for entry in &tokens.entries {
        report.tokens += u64::from(entry.tokens);
        report.trained_tokens += u64::from(entry.trained);
        report.longest = report.longest.max(u64::from(entry.tokens));
    }
    report.overlong.merge(file, &tokens.summary.overlong);
    report.truncated.merge(file, &tokens.summary.truncated);
    report.answer_cut.merge(file, &tokens.summary.answer_cut);
    report.malformed.merge(file, &tokens.summary.malformed);
    report.nothing_trained.merge(file, &tokens.summary.nothing_trained);
    report.empty.merge(file, &tokens.summary.empty);
}

fn nothing_left(sources: &SourceFiles, report: &DatasetReport) -> Error {
    let reasons: Vec<String> = report
        .tallies()
        .into_iter()
        .filter(|(_, tally)| tally.count > 0)
        .map(|(what, tally)| {
            let first = tally.first.first().map(|row| format!(" ({}: {})", row.place, row.what)).unwrap_or_default();
            format!("{} {what}{first}", tally.count)
        })
        .collect();
    let place = sources.files.first().map(|file| file.parquet.path().display().to_string()).unwrap_or_default();
    let reasons = if reasons.is_empty() { "every file has weight 0".to_string() } else { reasons.join("; ") };
    Error::Data(Fault::new(place, format!("none of the {} rows is left to train on: {reasons}", report.rows)).hint(
        "look at the rows with `engraft preview`; `dataset.max_length`, `train_on` and `columns` decide what is left",
    ))
}

/// All documents of all files under one numbering, and what decides their order.
#[derive(Debug)]
pub(super) struct Shelf {
    files: Vec<Tokens>,
    spans: Vec<Span>,
    capacity: Option<u32>,
    shuffle: bool,
    seed: u64,
}

impl Shelf {
    fn new(
        tokens: Vec<Tokens>,
        files: &[DatasetFile],
        capacity: Option<u32>,
        shuffle: bool,
        seed: u64,
    ) -> Result<Self> {
        let mut spans = Vec::with_capacity(tokens.len());
        let mut first: u32 = 0;
        let mut seen = 0.0;
        for (own, file) in tokens.iter().zip(files) {
            seen += own.entries.len() as f64 * file.weight.max(1.0);
            let count = own.entries.len() as u32;
            let next = u32::try_from(own.entries.len()).ok().and_then(|count| first.checked_add(count));
            let Some(next) = next.filter(|_| seen < f64::from(u32::MAX)) else {
                let what = format!("more than {} documents in an epoch", u32::MAX);
                return Err(Error::Data(
                    Fault::at(&file.path, what).hint("train on fewer files at a time, or lower the weights"),
                ));
            };
            spans.push(Span { first, count, weight: file.weight });
            first = next;
        }
        Ok(Self { files: tokens, spans, capacity, shuffle, seed })
    }

    /// How many documents there are.
    pub fn documents(&self) -> u32 {
        self.spans.last().map_or(0, |span| span.first + span.count)
    }

    fn find(&self, index: u32) -> (usize, usize) {
        let file = self.spans.partition_point(|span| span.first <= index) - 1;
        (file, (index - self.spans[file].first) as usize)
    }

    fn entry(&self, index: u32) -> cache::Entry {
        let (file, at) = self.find(index);
        self.files[file].entries[at]
    }

    /// Tokens of a document.
    pub fn length(&self, index: u32) -> u32 {
        self.entry(index).tokens
    }

    /// Where a document comes from.
    pub fn origin(&self, index: u32) -> RowId {
        RowId { file: self.find(index).0 as u32, row: self.entry(index).row }
    }

    /// Reads a document.
    pub fn document(&self, index: u32) -> Result<Document> {
        let (file, at) = self.find(index);
        self.files[file].document(at)
    }

    /// What decides the order, as [`Order`] wants it.
    pub fn order(&self) -> ShelfOrder<'_> {
        ShelfOrder {
            shelf: self,
            length: Box::new(|index| self.length(index)),
            row: Box::new(|index| self.entry(index).row),
        }
    }
}

/// Owns the look-ups an [`Order`] borrows.
pub(super) struct ShelfOrder<'a> {
    shelf: &'a Shelf,
    length: Box<dyn Fn(u32) -> u32 + Sync + 'a>,
    row: Box<dyn Fn(u32) -> u64 + Sync + 'a>,
}

impl ShelfOrder<'_> {
    /// The order itself.
    pub fn as_order(&self) -> Order<'_> {
        Order {
            spans: &self.shelf.spans,
            length: &self.length,
            row: &self.row,
            capacity: self.shelf.capacity,
            shuffle: self.shelf.shuffle,
            seed: self.shelf.seed,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::fs;

    use super::super::Batch;
    use super::super::fixtures::{BYTES, Bytes, one, optional_strings, pairs, recipe, source, strings, write};
    use super::*;
    use crate::recipe::DataFormat;

    struct Room {
        folder: tempfile::TempDir,
    }

    impl Room {
        fn new() -> Self {
            Self { folder: tempfile::tempdir().unwrap() }
        }

        fn file(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn open(&self, sources: &[DataSource], more: &str, seed: u64) -> Result<Dataset> {
            Dataset::open(sources, &recipe(more), &BYTES, &self.file("cache"), seed, &|_, _| {})
        }
    }

    fn numbers(tensor: &tch::Tensor) -> Vec<i64> {
        Vec::<i64>::try_from(tensor).unwrap()
    }

    /// Ids, positions, offsets, rows, targets; and where they come from.
    fn flat(batch: &Batch) -> ([Vec<i64>; 5], Vec<RowId>) {
        let [ids, positions, rows, targets] = [&batch.ids, &batch.positions, &batch.rows, &batch.targets].map(numbers);
        ([ids, positions, batch.documents.offsets.clone(), rows, targets], batch.origins.clone())
    }

    fn epoch(dataset: &Dataset, number: u64, size: u64) -> Vec<Batch> {
        let count = dataset.micro_batches_in_epoch(number, size) as usize;
        let start = Cursor { epoch: number, micro_batch: 0 };
        let (batches, cursors): (Vec<_>, Vec<_>) = dataset.batches(start, size).take(count).map(Result::unwrap).unzip();
        assert_eq!(cursors[count - 1], Cursor { epoch: number + 1, micro_batch: 0 });
        batches
    }

    #[test]
    fn a_batch_lays_documents_end_to_end() {
        let room = Room::new();
        let path = room.file("data.parquet");
        write(&path, vec![("prompt", strings(&["ab", "x"])), ("completion", strings(&["cd", "yz"]))]);
        let dataset = room.open(&one(path), "shuffle: false", 1).unwrap();
        let (batch, after) = dataset.batches(Cursor::default(), 8).next().unwrap().unwrap();
        let ([ids, positions, offsets, rows, targets], origins) = flat(&batch);
        assert_eq!(ids, b"abcdxyz".map(i64::from));
        assert_eq!(positions, [0, 1, 2, 3, 0, 1, 2]);
        assert_eq!(offsets, [0, 4, 7]);
        assert_eq!(rows, [1, 2, 4, 5]);
        assert_eq!(targets, b"cdyz".map(i64::from));
        assert_eq!(origins, [RowId { file: 0, row: 0 }, RowId { file: 0, row: 1 }]);
        assert_eq!(after, Cursor { epoch: 1, micro_batch: 0 });
    }

    #[test]
    fn trained_tokens_do_not_depend_on_packing_or_batch_size() {
        let room = Room::new();
        let path = room.file("data.parquet");
        pairs(&path, 700);
        for more in ["packing: true", "packing: false", "packing: true\nshuffle: false"] {
            let dataset = room.open(&one(path.clone()), more, 3).unwrap();
            for size in [1, 3, 8] {
                for number in [0, 1] {
                    let batches = epoch(&dataset, number, size);
                    let trained: usize = batches.iter().map(|batch| batch.targets.numel()).sum();
                    assert_eq!(trained as u64, dataset.report().trained_tokens, "{more}, size {size}");
                    let mut origins: Vec<RowId> = batches.iter().flat_map(|batch| batch.origins.clone()).collect();
                    origins.sort_unstable();
                    assert!(origins.into_iter().map(|id| id.row).eq(0..700));
                }
            }
            let evaluated: Vec<Batch> = dataset.eval_batches(4).map(|item| item.unwrap().0).collect();
            assert_eq!(
                evaluated.iter().map(|batch| batch.targets.numel() as u64).sum::<u64>(),
                dataset.report().trained_tokens
            );
            assert!(evaluated.iter().flat_map(|batch| &batch.origins).map(|id| id.row).eq(0..700));
        }
    }

    #[test]
    fn batches_from_any_cursor_are_the_tail_of_the_run() {
        let room = Room::new();
        let path = room.file("data.parquet");
        pairs(&path, 211);
        let weighted = DataSource { weight: 1.5, ..source(&path) };
        for more in ["packing: true", "packing: false"] {
            let dataset = room.open(std::slice::from_ref(&weighted), more, 9).unwrap();
            let whole: Vec<_> = dataset.batches(Cursor::default(), 4).take(120).map(Result::unwrap).collect();
            assert!(whole.last().unwrap().1.epoch >= 1);
            let again = room.open(std::slice::from_ref(&weighted), more, 9).unwrap();
            for at in [0, 1, 17, 40, 79, 118] {
                let tail = again.batches(whole[at].1, 4).take(3);
                for ((batch, cursor), item) in whole[at + 1..].iter().zip(tail) {
                    let (found, after) = item.unwrap();
                    assert_eq!((flat(&found), after), (flat(batch), *cursor), "{more}, from {at}");
                }
            }
        }
    }

    #[test]
    fn a_cursor_beyond_the_epoch_is_refused() {
        let room = Room::new();
        let path = room.file("data.parquet");
        pairs(&path, 10);
        let dataset = room.open(&one(path), "", 9).unwrap();
        let mut at_the_end = dataset.batches(Cursor { epoch: 0, micro_batch: 5 }, 2);
        assert_eq!(at_the_end.next().unwrap().unwrap().1, Cursor { epoch: 1, micro_batch: 1 });
        let mut beyond = dataset.batches(Cursor { epoch: 0, micro_batch: 6 }, 2);
        assert!(matches!(beyond.next(), Some(Err(Error::State(_)))));
        assert!(beyond.next().is_none());
    }

    #[test]
    fn bad_rows_stop_the_run_or_are_counted_and_named() {
        let room = Room::new();
        let path = room.file("data.parquet");
        let long = "x".repeat(100);
        write(
            &path,
            vec![
                ("prompt", optional_strings(&[Some("p"), Some("p"), None, Some("p"), Some(""), Some(""), Some("p")])),
                (
                    "completion",
                    optional_strings(&[
                        Some("ok"),
                        Some(&long),
                        Some("c"),
                        Some("panic"),
                        Some("1"),
                        Some(""),
                        Some("ok"),
                    ]),
                ),
            ],
        );
        let stopped = room.open(&one(path.clone()), "", 1).unwrap_err();
        assert_eq!(stopped.exit_code(), 4);
        assert!(stopped.to_string().contains("data.parquet, row 2: column `prompt` is null"), "{stopped}");
        assert!(stopped.to_string().contains("on_bad_row: skip"), "{stopped}");
        let strict = room.open(&one(path.clone()), "overlong: error\non_bad_row: skip", 1).unwrap_err().to_string();
        assert!(strict.contains("row 1: 101 tokens, more than max_length 64"), "{strict}");

        let dataset = room.open(&one(path.clone()), "on_bad_row: skip", 1).unwrap();
        let report = dataset.report();
        assert_eq!((report.rows, report.documents, report.dropped()), (7, 2, 5));
        let counts =
            [&report.overlong, &report.malformed, &report.nothing_trained, &report.empty].map(|tally| tally.count);
        assert_eq!(counts, [1, 2, 1, 1]);
        assert!(report.malformed.first[1].place.ends_with("data.parquet, row 3"));
        assert!(report.malformed.first[1].what.contains("asked to panic"));
        let screen = report.to_string();
        assert!(
            screen.contains("2 row(s) left out, malformed:") && screen.contains("row 2: column `prompt` is null"),
            "{screen}"
        );
        assert_eq!(dataset.documents_at(RowId { file: 0, row: 1 }).unwrap(), []);
        let kept: Vec<u64> = (0..9).filter(|row| dataset.keeps(RowId { file: 0, row: *row })).collect();
        assert_eq!(kept, [0, 6]);
        assert!(!dataset.keeps(RowId { file: 1, row: 0 }));
        assert_eq!(dataset.documents_at(RowId { file: 0, row: 6 }).unwrap()[0].ids.len(), 3);

        // The cache now holds what a stricter recipe does not let pass.
        let stopped = room.open(&one(path), "on_bad_row: error", 1).unwrap_err().to_string();
        assert!(stopped.contains("row 2: column `prompt` is null"), "{stopped}");
    }

    #[test]
    fn nothing_left_to_train_on_is_an_error() {
        let room = Room::new();
        let path = room.file("data.parquet");
        write(&path, vec![("prompt", strings(&["p"; 3])), ("completion", strings(&["long".repeat(50).as_str(); 3]))]);
        let said = room.open(&one(path.clone()), "", 1).unwrap_err().to_string();
        assert!(
            said.contains("none of the 3 rows is left to train on") && said.contains("longer than max_length"),
            "{said}"
        );
        let none = DataSource { weight: 0.0, ..source(&path) };
        write(&path, vec![("text", strings(&["some text"]))]);
        assert!(room.open(&[none], "", 1).unwrap_err().to_string().contains("weight 0"));
    }

    #[test]
    fn truncated_rows_are_counted_and_one_without_its_answer_is_bad() {
        let room = Room::new();
        let path = room.file("data.parquet");
        let (short, long) = ("p".repeat(60), "p".repeat(70));
        write(&path, vec![("prompt", strings(&[&short, &long])), ("completion", strings(&["completion"; 2]))]);
        let encoder = Bytes { truncate: true, ..BYTES };
        let recipe = recipe("overlong: truncate\non_bad_row: skip");
        let dataset = Dataset::open(&one(path), &recipe, &encoder, &room.file("cache"), 1, &|_, _| {}).unwrap();
        assert_eq!((dataset.report().answer_cut.count, dataset.report().nothing_trained.count), (1, 1));
        assert!(dataset.report().to_string().contains("no row's answer is whole"), "{}", dataset.report());
        assert_eq!(dataset.report().trained_tokens, 4);
    }

    #[test]
    fn long_text_is_split_and_nothing_is_lost() {
        let room = Room::new();
        let path = room.file("data.parquet");
        write(&path, vec![("text", strings(&[&"t".repeat(150), "short"]))]);
        let dataset = room.open(&one(path), "packing: true", 1).unwrap();
        assert_eq!((dataset.report().documents, dataset.report().tokens), (4, 155));
        assert_eq!(dataset.documents_at(RowId { file: 0, row: 0 }).unwrap().len(), 3);
        assert_eq!(dataset.report().bins, Some(3));
    }

    #[test]
    fn a_second_start_reads_the_cache_and_damage_is_rebuilt() {
        let room = Room::new();
        let path = room.file("data.parquet");
        pairs(&path, 300);
        let refusing = Bytes { name: "bytes", limit: 64, truncate: false };
        let first = room.open(&one(path.clone()), "", 1).unwrap();
        let calls = RefCell::new(Vec::new());
        let open = |encoder: &dyn Encode| {
            Dataset::open(&one(path.clone()), &recipe(""), encoder, &room.file("cache"), 1, &|done, all| {
                calls.borrow_mut().push((done, all));
            })
            .unwrap()
        };
        let second = open(&refusing);
        assert_eq!(calls.take(), [(300, 300)]);
        assert_eq!(second.report(), first.report());
        assert_eq!(second.fingerprint(), first.fingerprint());
        let folder = second.shelf.files[0].folder().to_path_buf();
        for name in ["documents.bin", "index.bin", "summary.json"] {
            let whole = fs::read(folder.join(name)).unwrap();
            for damage in ["flip", "cut", "gone"] {
                match damage {
                    "flip" => {
                        let mut bytes = whole.clone();
                        bytes[whole.len() / 2] ^= 0x80;
                        fs::write(folder.join(name), bytes).unwrap();
                    }
                    "cut" => fs::write(folder.join(name), &whole[..whole.len() / 2]).unwrap(),
                    _ => fs::remove_file(folder.join(name)).unwrap(),
                }
                let rebuilt = open(&BYTES);
                let notices = &rebuilt.report().notices;
                assert!(notices.len() == 1 && notices[0].contains("damaged"), "{name} {damage}: {notices:?}");
                assert_eq!(rebuilt.fingerprint(), first.fingerprint());
                assert!(open(&BYTES).report().notices.is_empty());
            }
        }
        // Damage after the start, where a large cache is not checked whole.
        let dataset = open(&BYTES);
        let mut bytes = fs::read(folder.join("documents.bin")).unwrap();
        bytes[40] ^= 1;
        fs::write(folder.join("documents.bin"), bytes).unwrap();
        let error = dataset.batches(Cursor::default(), 8).find_map(Result::err).unwrap().to_string();
        assert!(error.contains("token cache is damaged"), "{error}");
        assert!(!open(&BYTES).report().notices.is_empty());
    }

    #[test]
    fn another_fingerprint_tells_other_data() {
        let room = Room::new();
        let path = room.file("data.parquet");
        pairs(&path, 40);
        let print =
            |more: &str, weight| room.open(&[DataSource { weight, ..source(&path) }], more, 1).unwrap().fingerprint();
        let base = print("", 1.0);
        assert_eq!(base, print("packing: true", 1.0));
        assert_ne!(base, print("", 2.0));
        assert_ne!(base, print("limit: 39", 1.0));
        // The same rows under another name are the same data.
        let moved = room.file("moved.parquet");
        fs::copy(&path, &moved).unwrap();
        assert_eq!(base, room.open(&one(moved), "", 1).unwrap().fingerprint());
        pairs(&path, 41);
        assert_ne!(base, print("", 1.0));
    }

    #[test]
    fn two_runs_at_once_make_one_cache() {
        let room = Room::new();
        let path = room.file("data.parquet");
        pairs(&path, 2000);
        let prints: Vec<String> = std::thread::scope(|scope| {
            let runs: Vec<_> =
                (0..4).map(|_| scope.spawn(|| room.open(&one(path.clone()), "", 1).unwrap().fingerprint())).collect();
            runs.into_iter().map(|run| run.join().unwrap()).collect()
        });
        assert!(prints.iter().all(|print| *print == prints[0]));
        let kept = fs::read_dir(room.file("cache/datasets"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap());
        assert!(kept.into_iter().all(|name| !name.ends_with("building")));
    }

    /// Conversations without a chat template, say.
    struct NoTemplate;

    impl Encode for NoTemplate {
        fn encode(&self, _: &Example) -> std::result::Result<crate::data::Encoded, BadRow> {
            Err(BadRow::Malformed("no template".into()))
        }

        fn fingerprint(&self) -> String {
            "no template".into()
        }

        fn check(&self, format: DataFormat) -> Result<()> {
            match format {
                DataFormat::Messages => Err(Error::Data(Fault::new("dataset.chat_template", "there is none"))),
                _ => Ok(()),
            }
        }
    }

    #[test]
    fn what_no_row_can_mend_is_said_before_the_first_row() {
        let room = Room::new();
        let path = room.file("data.parquet");
        write(&path, vec![("messages", strings(&["[]"]))]);
        let open = |more: &str| {
            Dataset::open(&one(path.clone()), &recipe(more), &NoTemplate, &room.file("cache"), 1, &|_, _| {})
        };
        assert_eq!(open("").unwrap_err().to_string(), "dataset.chat_template: there is none");
        assert!(open("columns: {text: messages}").unwrap_err().to_string().contains("no template"));
    }

    #[test]
    fn a_cache_that_cannot_be_written_says_how_to_move_it() {
        let room = Room::new();
        let path = room.file("data.parquet");
        pairs(&path, 3);
        fs::write(room.file("cache"), "a file").unwrap();
        let error = room.open(&one(path), "", 1).unwrap_err();
        assert_eq!(error.exit_code(), 6);
        assert!(error.to_string().contains("ENGRAFT_CACHE"), "{error}");
    }
}
