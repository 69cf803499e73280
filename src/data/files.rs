//! The files of a dataset and the examples in them.

use arrow::array::RecordBatch;

use super::layout::{self, Layout};
use super::source::{ParquetFile, RowReader};
use super::{BadRow, Example, RowId, example};
use crate::recipe::{DataSource, DatasetRecipe};
use crate::{Error, Fault, Result};

/// The files of a dataset, each with its format found. Rows are read on demand.
#[derive(Debug)]
pub struct SourceFiles {
    pub(super) files: Vec<SourceFile>,
    system: Option<String>,
}

#[derive(Debug)]
pub(super) struct SourceFile {
    pub parquet: ParquetFile,
    pub layout: Layout,
    pub weight: f64,
    /// Rows used: all, or those `dataset.limit` leaves to this file.
    pub rows: u64,
    pub sentence: String,
}

impl SourceFiles {
    /// Opens every file and finds its format.
    ///
    /// # Errors
    /// [`Error::Data`] where a file cannot be read, its columns do not fit, or there is no row at all.
    pub fn open(sources: &[DataSource], recipe: &DatasetRecipe) -> Result<Self> {
        let mut left = recipe.limit.unwrap_or(u64::MAX);
        let mut files = Vec::new();
        for source in sources {
            if !source.weight.is_finite() || source.weight < 0.0 {
                return Err(Error::Data(Fault::at(
                    &source.path,
                    format!("weight {} is not a number from 0 up", source.weight),
                )));
            }
            let parquet = ParquetFile::open(&source.path)?;
            let (layout, sentence) = layout::find(&source.path, parquet.fields(), recipe)?;
            let rows = parquet.rows().min(left);
            left -= rows;
            files.push(SourceFile { parquet, layout, weight: source.weight, rows, sentence });
        }
        if files.iter().all(|file| file.rows == 0) {
            let names: Vec<String> =
                files.iter().take(3).map(|file| file.parquet.path().display().to_string()).collect();
            return Err(Error::Data(
                Fault::new(names.join(", "), "there are no rows").hint("name a file with rows under `dataset`"),
            ));
        }
        Ok(Self { files, system: recipe.system.clone() })
    }

    /// What was decided about the files' formats, one sentence per distinct decision.
    pub fn sentences(&self) -> Vec<String> {
        let mut sentences: Vec<String> = Vec::new();
        for file in &self.files {
            if !sentences.contains(&file.sentence) {
                sentences.push(file.sentence.clone());
            }
        }
        sentences
    }

    /// Rows in all.
    pub fn rows(&self) -> u64 {
        self.files.iter().map(|file| file.rows).sum()
    }

    /// The first `limit` rows as examples, in order.
    pub fn examples(&self, limit: u64) -> Examples<'_> {
        Examples { sources: self, file: 0, left: limit, open: None }
    }

    /// One row as an example; the inner error is what is wrong with it.
    ///
    /// # Errors
    /// [`Error::Data`] where the file has changed or there is no such row.
    pub fn example_at(&self, id: RowId) -> Result<std::result::Result<Example, BadRow>> {
        let missing = || Error::Data(Fault::new(self.place(id), "there is no such row"));
        let file = self.files.get(id.file as usize).filter(|file| id.row < file.rows).ok_or_else(missing)?;
        let mut reader = file.parquet.read(file.layout.roots(), id.row)?;
        let (_, batch) = reader.next()?.ok_or_else(missing)?;
        Ok(example::read(&file.layout, &batch, 0, self.system.as_deref()))
    }

    /// A row's place as errors name it; rows count from 0.
    pub fn place(&self, id: RowId) -> String {
        match self.files.get(id.file as usize) {
            Some(file) => format!("{}, row {}", file.parquet.path().display(), id.row),
            None => format!("file {}, row {}", id.file, id.row),
        }
    }

    pub(super) fn system(&self) -> Option<&str> {
        self.system.as_deref()
    }

    /// The rows of one file, from the first.
    pub(super) fn file_examples(&self, file: usize) -> Result<FileExamples<'_>> {
        let source = &self.files[file];
        Ok(FileExamples {
            source,
            system: self.system.as_deref(),
            reader: source.parquet.read(source.layout.roots(), 0)?,
            batch: None,
        })
    }
}

/// Examples in file order, from [`SourceFiles::examples`]. The inner error is what is wrong with a row.
pub struct Examples<'a> {
    sources: &'a SourceFiles,
    file: usize,
    left: u64,
    open: Option<FileExamples<'a>>,
}

impl Iterator for Examples<'_> {
    type Item = Result<(RowId, std::result::Result<Example, BadRow>)>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.left > 0 && self.file < self.sources.files.len() {
            if self.open.is_none() {
                match self.sources.file_examples(self.file) {
                    Ok(examples) => self.open = Some(examples),
                    Err(error) => {
                        self.left = 0;
                        return Some(Err(error));
                    }
                }
            }
            match self.open.as_mut().and_then(|examples| examples.next().transpose()) {
                Some(Ok((row, example))) => {
                    self.left -= 1;
                    return Some(Ok((RowId { file: self.file as u32, row }, example)));
                }
                Some(Err(error)) => {
                    self.left = 0;
                    return Some(Err(error));
                }
                None => {
                    self.open = None;
                    self.file += 1;
                }
            }
        }
        None
    }
}

/// Examples of one file.
pub(super) struct FileExamples<'a> {
    source: &'a SourceFile,
    system: Option<&'a str>,
    reader: RowReader<'a>,
    /// The batch being read, the row it starts at, and the next of its rows.
    batch: Option<(u64, RecordBatch, usize)>,
}

impl FileExamples<'_> {
    /// The next row and what it says; None after the last row that is used.
    pub fn next(&mut self) -> Result<Option<(u64, std::result::Result<Example, BadRow>)>> {
        loop {
            if let Some((first, batch, index)) = &mut self.batch {
                let row = *first + *index as u64;
                if row >= self.source.rows {
                    return Ok(None);
                }
                if *index < batch.num_rows() {
                    let example = example::read(&self.source.layout, batch, *index, self.system);
                    *index += 1;
                    return Ok(Some((row, example)));
                }
            }
            match self.reader.next()? {
                Some((first, batch)) => self.batch = Some((first, batch, 0)),
                None => return Ok(None),
            }
        }
    }
}
