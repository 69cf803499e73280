//! Parquet files, streamed.

mod footer;
mod rows;

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use arrow::datatypes::Fields;
use parquet::arrow::arrow_reader::ArrowReaderMetadata;

use super::quiet::quietly;
use super::{guard, layout, magic};
use crate::{Error, Fault, Result};
use footer::{check_counts, read_metadata};
pub(super) use rows::RowReader;

/// A parquet file, its footer read and checked; rows are streamed from it row group by row group.
#[derive(Debug)]
pub struct ParquetFile {
    path: PathBuf,
    identity: Identity,
    metadata: ArrowReaderMetadata,
    /// Its columns; text has a type of its own here, and is read as bytes.
    fields: Fields,
}

/// What tells a file from another at the same path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    pub device: u64,
    pub inode: u64,
    pub length: u64,
    /// Nanoseconds since 1970.
    pub modified: i128,
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            modified: i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec()),
        }
    }
}

impl ParquetFile {
    /// Opens the file and reads its footer.
    ///
    /// # Errors
    /// [`Error::Data`] where it is missing, not a regular file, not parquet, truncated or damaged.
    pub fn open(path: &Path) -> Result<Self> {
        // Asked before opening: opening a FIFO would wait for a writer.
        let status = std::fs::metadata(path).map_err(|error| Error::Data(Fault::at(path, error)))?;
        if !status.is_file() {
            let what = if status.is_dir() { "a folder" } else { "not a regular file" };
            return Err(Error::Data(Fault::at(path, format!("is {what}, expected a parquet file"))));
        }
        let file = File::open(path).map_err(|error| unopened(path, "", &error))?;
        let identity = Identity::of(&file.metadata().map_err(|error| Error::Data(Fault::at(path, error)))?);
        magic::check(path, &file, identity.length)?;
        let damaged = |what: String| {
            Error::Data(
                Fault::at(path, format!("the parquet footer cannot be read: {what}"))
                    .hint("fetch or write the file again"),
            )
        };
        guard::check_footer(&file, identity.length).map_err(damaged)?;
        let (metadata, fields) = quietly(|| read_metadata(&file)).unwrap_or_else(Err).map_err(damaged)?;
        check_counts(metadata.metadata()).map_err(damaged)?;
        Ok(Self { path: path.to_path_buf(), identity, metadata, fields })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many rows it has.
    pub fn rows(&self) -> u64 {
        self.group_rows().sum()
    }

    /// Its columns, each with its type in words.
    pub fn columns(&self) -> Vec<(String, String)> {
        self.fields.iter().map(|field| (field.name().clone(), layout::type_name(field.data_type()))).collect()
    }

    pub(super) fn fields(&self) -> &Fields {
        &self.fields
    }

    pub(super) fn identity(&self) -> Identity {
        self.identity
    }

    /// The file's bytes as they were when it was first opened.
    ///
    /// # Errors
    /// [`Error::Data`] where the file has gone or is another one by now.
    pub(super) fn reopen(&self) -> Result<File> {
        let file = File::open(&self.path)
            .map_err(|error| unopened(&self.path, "the file has gone since it was first read: ", &error))?;
        let now = file.metadata().map_err(|error| Error::Data(Fault::at(&self.path, error)))?;
        if Identity::of(&now) == self.identity { Ok(file) } else { Err(self.changed()) }
    }

    fn changed(&self) -> Error {
        Error::Data(
            Fault::at(&self.path, "the file changed while it was being read").hint(
                "start again once nothing writes to it; write a new version under a temporary name and rename it",
            ),
        )
    }

    fn group_rows(&self) -> impl Iterator<Item = u64> {
        // check_counts has seen that none is negative.
        self.metadata.metadata().row_groups().iter().map(|group| group.num_rows().unsigned_abs())
    }
}

/// The error of a file that cannot be opened because too many are: no fault of the file.
fn open_files(path: &Path) -> Error {
    Error::Data(
        Fault::at(path, "cannot be opened: this process holds as many files open as it may (too many open files)")
            .hint("raise the limit with `ulimit -n`, or join small parquet files into larger ones"),
    )
}

/// The error of a file that cannot be opened.
fn unopened(path: &Path, what: &str, error: &io::Error) -> Error {
    // EMFILE and ENFILE have no kind of their own.
    match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => open_files(path),
        _ => Error::Data(Fault::at(path, format!("{what}{error}"))),
    }
}

#[cfg(test)]
mod tests;
