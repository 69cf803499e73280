//! A dataset: tokenised files, an order over their documents, and batches from it.

mod shelf;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::cache::{self, Tokens};
use super::files::{Examples, SourceFiles};
use super::pack::Epoch;
use super::report::DatasetReport;
use super::tokenize::{self, Job};
use super::{BadRow, Batches, Cursor, Document, Encode, Example, RowId};
use crate::recipe::{DataSource, DatasetRecipe};
use crate::torch_ext::pinned;
use crate::{Error, Fault, Result};
pub(super) use shelf::Shelf;

/// Tokens of datasets unused for longest are removed where all take more than this on disk.
const CACHE_BYTES: u64 = 32 << 30;

/// Rows that are looked at to know how large micro-batches get.
const MOST_PLANNED: u64 = 1 << 24;

/// How large a micro-batch is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MicroBatchSize {
    /// Tokens.
    pub tokens: u64,
    /// Tokens that are trained.
    pub trained: u64,
    /// Documents.
    pub documents: u64,
}

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
    /// Whether micro-batches are made in pinned memory.
    pinned: bool,
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
        let tokens = |job: &Job<'_>, sha256: &str, datasets: &Path, so_far: &dyn Fn(u64), notices: &mut Vec<String>| {
            job.tokens(sha256, datasets, so_far, notices).map(Some)
        };
        let opened = Self::open_by(sources, recipe, encoder, cache_dir, seed, progress, tokens)?;
        Ok(opened.expect("what is not there is made"))
    }

    /// [`Dataset::open`] of what the cache holds already; `None` where it does not hold all of it.
    pub fn open_cached(
        sources: &[DataSource],
        recipe: &DatasetRecipe,
        encoder: &dyn Encode,
        cache_dir: &Path,
        seed: u64,
    ) -> Result<Option<Self>> {
        let tokens = |job: &Job<'_>, sha256: &str, datasets: &Path, _: &dyn Fn(u64), _: &mut Vec<String>| {
            Ok(job.cached(sha256, datasets))
        };
        Self::open_by(sources, recipe, encoder, cache_dir, seed, &|_, _| (), tokens)
    }

    fn open_by(
        sources: &[DataSource],
        recipe: &DatasetRecipe,
        encoder: &dyn Encode,
        cache_dir: &Path,
        seed: u64,
        progress: &dyn Fn(u64, u64),
        tokens_of: impl Fn(&Job<'_>, &str, &Path, &dyn Fn(u64), &mut Vec<String>) -> Result<Option<Tokens>>,
    ) -> Result<Option<Self>> {
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
            let Some(own) = tokens_of(&job, &sha256, &datasets, &so_far, &mut report.notices)? else {
                return Ok(None);
            };
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
            pinned: false,
        };
        Ok(Some(dataset.with_packing_reported()))
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

    /// From now on micro-batches are made in pinned memory, from which a GPU takes them while the host goes on. They hold the same.
    ///
    /// # Errors
    /// Where no memory can be pinned: micro-batches are then made as before.
    pub fn pin_batches(&mut self) -> Result<()> {
        pinned(&tch::Tensor::from_slice(&[0i64])).map(drop)?;
        self.pinned = true;
        Ok(())
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
        Batches::endless(self.shelf.clone(), cursor, micro_batch_size.max(1), self.pinned)
    }

    /// The most tokens of a micro-batch of `micro_batch_size` rows, the most trained ones and the most documents, among the first `count`
    /// of a run.
    ///
    /// Of a very long run those after [`MOST_PLANNED`] rows are not looked at: they are much like those before.
    pub fn largest_micro_batch(&self, micro_batch_size: u64, count: u64) -> MicroBatchSize {
        let size = micro_batch_size.max(1);
        let order = self.shelf.order();
        let order = order.as_order();
        let mut largest = MicroBatchSize::default();
        let (mut left, mut number) = (count.clamp(1, (MOST_PLANNED / size).max(1)), 0);
        while left > 0 {
            let mut epoch = Epoch::new(&order, number);
            let bins = epoch.bins();
            for first in (0..bins).step_by(size as usize).take(left as usize) {
                let mut found = MicroBatchSize::default();
                for bin in first..(first + size).min(bins) {
                    for &document in epoch.bin(&order, bin) {
                        found.tokens += u64::from(self.shelf.length(document));
                        found.trained += u64::from(self.shelf.trained(document));
                        found.documents += 1;
                    }
                }
                largest.tokens = largest.tokens.max(found.tokens);
                largest.trained = largest.trained.max(found.trained);
                largest.documents = largest.documents.max(found.documents);
            }
            left = left.saturating_sub(bins.div_ceil(size).max(1));
            number += 1;
        }
        largest
    }

    /// Every document's tokens, its trained ones, and how often it is seen in a pass.
    pub fn lengths(&self) -> impl Iterator<Item = (u64, u64, f64)> {
        self.shelf.spans.iter().flat_map(|span| {
            let documents = span.first..span.first + span.count;
            documents
                .map(|index| (u64::from(self.shelf.length(index)), u64::from(self.shelf.trained(index)), span.weight))
        })
    }

    /// One pass in file order over every document, for evaluation: `micro_batch_size` documents at a time, or with
    /// `packing` as many as fit into `micro_batch_size` times `max_length` tokens.
    pub fn eval_batches(&self, micro_batch_size: u64) -> Batches {
        let size = micro_batch_size.max(1);
        let tokens = self.packing.then_some(size * u64::from(self.max_length));
        Batches::once(self.shelf.clone(), size, tokens, self.pinned)
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

#[cfg(test)]
mod tests;
