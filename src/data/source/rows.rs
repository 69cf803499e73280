//! Rows of a parquet file, batch by batch.

use std::fs::File;
use std::panic::AssertUnwindSafe;

use arrow::array::RecordBatch;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};

use super::{Identity, ParquetFile, open_files};
use crate::data::guard;
use crate::data::quiet::quietly;
use crate::{Error, Fault, Result};

/// Rows decoded together, at most; fewer where they are long.
const BATCH_ROWS: u64 = 256;
/// Bytes decoded together, about.
const BATCH_BYTES: u64 = 32 << 20;

impl ParquetFile {
    /// Streams the given top-level columns from row `first` on.
    pub(in crate::data) fn read(&self, roots: Vec<usize>, first: u64) -> Result<RowReader<'_>> {
        let file = self.reopen()?;
        let mut group = 0;
        let mut start = 0;
        for rows in self.group_rows() {
            if start + rows > first {
                break;
            }
            start += rows;
            group += 1;
        }
        Ok(RowReader { source: self, file, roots, group, row: first, skip: first - start.min(first), reader: None })
    }
}

/// Record batches of a file in order, each with the row it starts at.
pub(in crate::data) struct RowReader<'a> {
    source: &'a ParquetFile,
    file: File,
    roots: Vec<usize>,
    /// The row group read now, or next when there is no reader.
    group: usize,
    /// The next row.
    row: u64,
    /// Rows to leave out at the front of the next row group.
    skip: u64,
    reader: Option<ParquetRecordBatchReader>,
}

impl RowReader<'_> {
    /// The next batch (projected columns in file order) and its first row; None at the end.
    pub fn next(&mut self) -> Result<Option<(u64, RecordBatch)>> {
        loop {
            if self.reader.is_none() {
                if self.group == self.source.metadata.metadata().num_row_groups() {
                    return Ok(None);
                }
                let rows = self.check_group()?;
                let skip = std::mem::take(&mut self.skip);
                let reader = quietly(|| self.open_group(&self.roots, skip, rows)).unwrap_or_else(Err);
                self.reader = Some(reader.map_err(|what| self.damaged(&what))?);
            }
            let Some(reader) = self.reader.as_mut() else { continue };
            match quietly(AssertUnwindSafe(|| reader.next())) {
                Ok(Some(Ok(batch))) if batch.num_rows() > 0 => {
                    let first = self.row;
                    self.row += batch.num_rows() as u64;
                    return Ok(Some((first, batch)));
                }
                Ok(Some(Ok(_))) => {}
                Ok(None) => {
                    self.reader = None;
                    self.group += 1;
                    let expected: u64 = self.source.group_rows().take(self.group).sum();
                    if self.row != expected {
                        self.group -= 1;
                        return Err(self.damaged(&format!("it ends at row {}, its footer says {expected}", self.row)));
                    }
                    let now = std::fs::metadata(&self.source.path).map(|status| Identity::of(&status));
                    match now {
                        Ok(now) if now == self.source.identity => {}
                        Ok(_) => return Err(self.source.changed()),
                        Err(error) => {
                            let what = format!("the file has gone while it was being read: {error}");
                            return Err(Error::Data(Fault::at(&self.source.path, what)));
                        }
                    }
                }
                Ok(Some(Err(error))) => return Err(self.damaged(&error.to_string())),
                Err(panic) => return Err(self.damaged(&panic)),
            }
        }
    }

    /// Looks at the row group before it is decoded; returns how many rows to decode together.
    fn check_group(&self) -> Result<u64> {
        let metadata = self.source.metadata.metadata();
        let schema = metadata.file_metadata().schema_descr();
        let group = metadata.row_group(self.group);
        let chunks: Vec<guard::Chunk> = (0..schema.num_columns())
            .filter(|leaf| self.roots.contains(&schema.get_column_root_idx(*leaf)))
            .map(|leaf| {
                let column = group.column(leaf);
                // check_counts has seen that neither is negative.
                let (start, length) = column.byte_range();
                guard::Chunk { start, length, compression: column.compression(), kind: column.column_type() }
            })
            .collect();
        let unpacked =
            guard::check_pages(&self.file, self.source.identity.length, &chunks).map_err(|what| self.damaged(&what))?;
        let row_bytes = unpacked / group.num_rows().unsigned_abs().max(1);
        Ok((BATCH_BYTES / row_bytes.max(1)).clamp(1, BATCH_ROWS))
    }

    fn open_group(&self, roots: &[usize], skip: u64, batch_rows: u64) -> Result<ParquetRecordBatchReader, String> {
        let file = self.file.try_clone().map_err(|error| error.to_string())?;
        let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(file, self.source.metadata.clone());
        let mask = ProjectionMask::roots(builder.parquet_schema(), roots.iter().copied());
        let builder =
            builder.with_projection(mask).with_row_groups(vec![self.group]).with_batch_size(batch_rows as usize);
        let builder = if skip > 0 { builder.with_offset(skip as usize) } else { builder };
        builder.build().map_err(|error| error.to_string())
    }

    /// The error for damage met in this row group, with the row and column found where possible.
    pub(super) fn damaged(&self, what: &str) -> Error {
        let mut place = format!("{}, row group {}", self.source.path.display(), self.group);
        if let Some((row, column)) = self.locate() {
            place += &format!(", row {row}, column `{column}`");
        }
        if what.contains("Too many open files") {
            return open_files(&self.source.path);
        }
        Error::Data(
            Fault::new(place, format!("the parquet data is damaged: {what}")).hint("fetch or write the file again"),
        )
    }

    /// Reads on from the last good row, one row and one column at a time, to the first that cannot be read.
    fn locate(&self) -> Option<(u64, String)> {
        self.reader.as_ref()?;
        let start: u64 = self.source.group_rows().take(self.group).sum();
        let fields = self.source.metadata.schema().fields();
        let first_bad = |root: usize| {
            let mut reader = quietly(|| self.open_group(&[root], self.row - start, 1)).unwrap_or_else(Err).ok()?;
            for row in self.row..self.row + BATCH_ROWS {
                match quietly(AssertUnwindSafe(|| reader.next())) {
                    Ok(Some(Ok(_))) => {}
                    Ok(None) => return None,
                    _ => return Some((row, fields[root].name().clone())),
                }
            }
            None
        };
        self.roots.iter().filter_map(|root| first_bad(*root)).min_by_key(|(row, _)| *row)
    }
}
