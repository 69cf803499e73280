//! Tokenises a file's rows in parallel into the cache, or finds them there.

use std::path::Path;
use std::sync::{Mutex, PoisonError, mpsc};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::cache::{self, Summary, Tokens, Writer};
use super::example::text_bytes;
use super::files::SourceFiles;
use super::quiet::quietly;
use super::{BadRow, Encode, Encoded, Example, report::Tally};
use crate::recipe::{DatasetRecipe, OnBadRow, Overlong};
use crate::{Error, Fault, Result};

/// Rows encoded together...
const BLOCK_ROWS: usize = 8192;
/// ...or this much text, whichever comes first.
const BLOCK_BYTES: usize = 32 << 20;
/// Rows of more text than this are encoded one at a time: what one takes in memory is not multiplied by the threads.
const LONG_ROW: usize = 1 << 20;
/// A file may unpack to this many times its size in text beyond [`TEXT_LIMIT`]; a dictionary of one long string could
/// otherwise stand for any amount of it.
const TEXT_RATIO: u64 = 1000;
const TEXT_LIMIT: u64 = 4 << 30;

/// One file to tokenise.
pub(super) struct Job<'a> {
    pub sources: &'a SourceFiles,
    /// Its index among the sources.
    pub file: usize,
    pub recipe: &'a DatasetRecipe,
    pub encoder: &'a dyn Encode,
}

impl Job<'_> {
    fn path(&self) -> &Path {
        self.sources.files[self.file].parquet.path()
    }

    /// What determines the tokens besides the program: `content` is the hash of the file's bytes.
    fn key(&self, content: &str) -> String {
        let source = &self.sources.files[self.file];
        let text = format!(
            "{}\n{content}\n{}\n{:?}\n{:?}\n{:?} {:?} {}",
            cache::VERSION,
            self.encoder.fingerprint(),
            source.layout,
            self.sources.system(),
            self.recipe.max_length,
            self.recipe.overlong,
            source.rows,
        );
        cache::hex(&Sha256::digest(text))
    }

    /// The file's tokens, from the cache below `datasets` where they are there and whole. `progress` is called with
    /// rows done so far.
    ///
    /// # Errors
    /// [`Error::Data`] for a row the recipe does not let pass; [`Error::Output`] where the cache cannot be written.
    pub fn tokens(
        &self,
        content: &str,
        datasets: &Path,
        progress: &dyn Fn(u64),
        notices: &mut Vec<String>,
    ) -> Result<Tokens> {
        let folder = datasets.join(self.key(content));
        let name = self.path().display();
        if let Ok(Some(tokens)) = Tokens::open(&folder) {
            return Ok(tokens);
        }
        let lock =
            cache::lock(&folder, || notices.push(format!("{name}: waited for another run that was tokenising it")))?;
        // Another run may have made it while this one waited.
        match Tokens::open(&folder) {
            Ok(Some(tokens)) => return Ok(tokens),
            Ok(None) => {}
            Err(what) => notices.push(format!("{name}: the token cache was damaged ({what}) and has been rebuilt")),
        }
        self.build(&folder, progress)?;
        drop(lock);
        let unreadable =
            |what: String| Error::Output(Fault::at(&folder, format!("the token cache cannot be read back: {what}")));
        Tokens::open(&folder).map_err(unreadable)?.ok_or_else(|| unreadable("it has gone".into()))
    }

    /// The file's tokens where the cache below `datasets` holds them whole.
    pub fn cached(&self, content: &str, datasets: &Path) -> Option<Tokens> {
        Tokens::open(&datasets.join(self.key(content))).ok().flatten()
    }

    fn build(&self, folder: &Path, progress: &dyn Fn(u64)) -> Result<()> {
        let mut writer = Writer::new(folder)?;
        let mut summary = Summary::default();
        let long_rows = Mutex::new(());
        let (sources, file, recipe, encoder, path) = (self.sources, self.file, self.recipe, self.encoder, self.path());
        std::thread::scope(|scope| -> Result<()> {
            // One block is read while another is encoded.
            let (sender, receiver) = mpsc::sync_channel(1);
            scope.spawn(move || read_blocks(sources, file, &sender));
            for block in receiver {
                let Block { first, rows } = block?;
                let encode_row = |row: std::result::Result<Example, BadRow>| {
                    let example = row?;
                    let long = text_bytes(&example) > LONG_ROW;
                    let _turn = long.then(|| long_rows.lock().unwrap_or_else(PoisonError::into_inner));
                    encode(encoder, &example, recipe)
                };
                let encoded: Vec<_> = rows.into_par_iter().map(encode_row).collect();
                for (row, encoded) in (first..).zip(encoded) {
                    summary.rows += 1;
                    match encoded {
                        Ok(encoded) => {
                            if encoded.answer_cut {
                                let what = format!("cut to {} tokens, within the answer", recipe.max_length);
                                summary.answer_cut.add(row, what);
                            } else if encoded.truncated {
                                summary.truncated.add(row, format!("cut to {} tokens", recipe.max_length));
                            }
                            for document in &encoded.documents {
                                writer.push(row, document)?;
                            }
                        }
                        Err(bad) => {
                            if let Some(hint) = refusal(&bad, recipe) {
                                return Err(Error::Data(
                                    Fault::new(format!("{}, row {row}", path.display()), &bad).hint(hint),
                                ));
                            }
                            tally(&mut summary, &bad).add(row, &bad);
                        }
                    }
                }
                progress(summary.rows);
            }
            Ok(())
        })?;
        writer.finish(summary)
    }
}

/// Rows read together, with the row the first one is.
struct Block {
    first: u64,
    rows: Vec<std::result::Result<Example, BadRow>>,
}

fn read_blocks(sources: &SourceFiles, file: usize, sender: &mpsc::SyncSender<Result<Block>>) {
    let read = || -> Result<()> {
        let mut examples = sources.file_examples(file)?;
        let length = sources.files[file].parquet.identity().length;
        let mut total: u64 = 0;
        let mut row = 0;
        loop {
            let mut block = Block { first: row, rows: Vec::new() };
            let mut bytes = 0;
            while block.rows.len() < BLOCK_ROWS && bytes < BLOCK_BYTES {
                let Some((_, example)) = examples.next()? else { break };
                bytes += example.as_ref().map_or(0, text_bytes);
                block.rows.push(example);
            }
            if block.rows.is_empty() {
                return Ok(());
            }
            total += bytes as u64;
            if total > TEXT_LIMIT && total / TEXT_RATIO > length {
                return Err(Error::Data(Fault::at(
                    sources.files[file].parquet.path(),
                    format!("its {length} bytes hold more than {total} bytes of text (a decompression bomb)"),
                )));
            }
            row += block.rows.len() as u64;
            if sender.send(Ok(block)).is_err() {
                return Ok(());
            }
        }
    };
    if let Err(error) = read() {
        // The receiver has gone only where it stopped for an error of its own.
        let _ = sender.send(Err(error));
    }
}

/// Encodes a row and holds the encoder to its word; a panic in it (tokenizers have them) is a bad row.
fn encode(encoder: &dyn Encode, example: &Example, recipe: &DatasetRecipe) -> std::result::Result<Encoded, BadRow> {
    let mut encoded = quietly(|| encoder.encode(example))
        .unwrap_or_else(|panic| Err(BadRow::Malformed(format!("it cannot be encoded: {panic}"))))?;
    let limit = recipe.max_length as usize;
    for document in &encoded.documents {
        if document.ids.len() != document.trained.len() {
            let (ids, marks) = (document.ids.len(), document.trained.len());
            return Err(BadRow::Malformed(format!("it was encoded into {ids} tokens with {marks} marks")));
        }
        if document.ids.len() > limit {
            return Err(BadRow::Overlong { tokens: document.ids.len(), limit });
        }
    }
    if encoded.documents.iter().all(|document| document.ids.is_empty()) {
        return Err(BadRow::Empty);
    }
    // The first token of a document is nobody's target, so one token alone teaches nothing.
    encoded.documents.retain(|document| cache::targets(document) > 0);
    if encoded.documents.is_empty() {
        let what = if encoded.truncated {
            format!("nothing that is trained is left of it in max_length {limit}")
        } else {
            "it has no trained token that follows another".into()
        };
        return Err(BadRow::NothingTrained(what));
    }
    Ok(encoded)
}

/// The way out, where the recipe says to stop at such a row.
fn refusal(bad: &BadRow, recipe: &DatasetRecipe) -> Option<&'static str> {
    match bad {
        BadRow::Overlong { .. } => (recipe.overlong == Overlong::Error)
            .then_some("raise `dataset.max_length`, or set `dataset.overlong: drop` or `truncate`; both are counted"),
        _ => (recipe.on_bad_row == OnBadRow::Error)
            .then_some("mend the row, or set `dataset.on_bad_row: skip` to leave such rows out, counted and named"),
    }
}

fn tally<'a>(summary: &'a mut Summary, bad: &BadRow) -> &'a mut Tally {
    match bad {
        BadRow::Malformed(_) => &mut summary.malformed,
        BadRow::Overlong { .. } => &mut summary.overlong,
        BadRow::NothingTrained(_) => &mut summary.nothing_trained,
        BadRow::Empty => &mut summary.empty,
    }
}

/// The error for a cached file that the recipe, stricter now, would not have let through.
pub(super) fn recheck(summary: &Summary, path: &Path, recipe: &DatasetRecipe) -> Result<()> {
    let bad = [&summary.malformed, &summary.nothing_trained, &summary.empty];
    let strict = bad.into_iter().filter(|_| recipe.on_bad_row == OnBadRow::Error);
    let first =
        strict.filter_map(|tally| tally.first.first()).min_by_key(|row| row.place.parse::<u64>().unwrap_or(u64::MAX));
    match first {
        None => Ok(()),
        Some(row) => Err(Error::Data(
            Fault::new(format!("{}, row {}", path.display(), row.place), &row.what)
                .hint("mend the row, or set `dataset.on_bad_row: skip` to leave such rows out, counted and named"),
        )),
    }
}
