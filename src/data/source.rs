//! Parquet files, streamed.

use std::cell::Cell;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, FieldRef, Fields, Schema};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use parquet::basic::{ConvertedType, LogicalType};
use parquet::file::metadata::{FileMetaData, ParquetMetaData};
use parquet::schema::types::{SchemaDescriptor, Type, TypePtr};

use super::{guard, layout, magic};
use crate::{Error, Fault, Result};

/// Rows decoded together, at most; fewer where they are long.
const BATCH_ROWS: u64 = 256;
/// Bytes decoded together, about.
const BATCH_BYTES: u64 = 32 << 20;

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

    /// Streams the given top-level columns from row `first` on.
    pub(super) fn read(&self, roots: Vec<usize>, first: u64) -> Result<RowReader<'_>> {
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
pub(super) struct RowReader<'a> {
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
    fn damaged(&self, what: &str) -> Error {
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

/// Runs `work`; a panic in it becomes an error with its text, and prints nothing.
pub(super) fn quietly<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    thread_local! {
        static QUIET: Cell<bool> = const { Cell::new(false) };
    }
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let loud = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !QUIET.with(Cell::get) {
                loud(panic);
            }
        }));
    });
    let before = QUIET.replace(true);
    let outcome = catch_unwind(AssertUnwindSafe(work));
    QUIET.set(before);
    outcome.map_err(|panic| {
        let text =
            panic.downcast_ref::<&str>().map(ToString::to_string).or_else(|| panic.downcast_ref::<String>().cloned());
        text.unwrap_or_else(|| "the decoder panicked".into())
    })
}

/// The footer for reading, and the columns with the types that it gives them.
///
/// The file's own schema for arrow is passed over, so that each parquet type has one arrow type here; strings are read
/// as views into the pages, so that a dictionary of long strings is not copied out row by row.
fn read_metadata(file: &File) -> Result<(ArrowReaderMetadata, Fields), String> {
    let text = |error: parquet::errors::ParquetError| error.to_string();
    let options = || ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    let typed = ArrowReaderMetadata::load(file, options()).map_err(text)?;
    let views = |fields: &Fields| -> Fields { fields.iter().map(with_views).collect() };
    // Text is read as bytes: the decoder refuses all rows together where one is not UTF-8, here it is one bad row.
    let footer = typed.metadata().file_metadata();
    let schema = untyped_text(footer.schema_descr().root_schema_ptr()).map_err(text)?;
    let footer = FileMetaData::new(
        footer.version(),
        footer.num_rows(),
        footer.created_by().map(str::to_string),
        footer.key_value_metadata().cloned(),
        Arc::new(SchemaDescriptor::new(schema)),
        footer.column_orders().cloned(),
    );
    let metadata = Arc::new(ParquetMetaData::new(footer, typed.metadata().row_groups().to_vec()));
    let plain = ArrowReaderMetadata::try_new(metadata.clone(), options()).map_err(text)?;
    let schema = Arc::new(Schema::new_with_metadata(views(plain.schema().fields()), plain.schema().metadata().clone()));
    let reading = ArrowReaderMetadata::try_new(metadata, options().with_schema(schema)).map_err(text)?;
    Ok((reading, views(typed.schema().fields())))
}

/// A parquet type in which strings are byte arrays that promise nothing.
fn untyped_text(kind: TypePtr) -> parquet::errors::Result<TypePtr> {
    let info = kind.get_basic_info();
    let id = info.has_id().then(|| info.id());
    if kind.is_group() {
        let fields = kind.get_fields().iter().cloned().map(untyped_text).collect::<parquet::errors::Result<_>>()?;
        let group = Type::group_type_builder(kind.name())
            .with_converted_type(info.converted_type())
            .with_logical_type(info.logical_type_ref().cloned())
            .with_fields(fields)
            .with_id(id);
        let group = if info.has_repetition() { group.with_repetition(info.repetition()) } else { group };
        return group.build().map(Arc::new);
    }
    let text = matches!(info.logical_type_ref(), Some(LogicalType::String | LogicalType::Json))
        || matches!(info.converted_type(), ConvertedType::UTF8 | ConvertedType::JSON);
    if !text {
        return Ok(kind);
    }
    let bytes = Type::primitive_type_builder(kind.name(), kind.get_physical_type()).with_id(id);
    bytes.with_repetition(info.repetition()).build().map(Arc::new)
}

fn with_views(field: &FieldRef) -> FieldRef {
    let kind = match field.data_type() {
        DataType::Utf8 => DataType::Utf8View,
        DataType::Binary => DataType::BinaryView,
        DataType::List(item) => DataType::List(with_views(item)),
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(with_views).collect()),
        DataType::Map(entries, sorted) => DataType::Map(with_views(entries), *sorted),
        _ => return field.clone(),
    };
    Arc::new(Field::clone(field).with_data_type(kind))
}

/// Numbers the decoder takes on trust.
fn check_counts(metadata: &ParquetMetaData) -> Result<(), String> {
    let mut rows: i64 = 0;
    for (index, group) in metadata.row_groups().iter().enumerate() {
        let wrong = |what: &str| format!("row group {index} claims {what}");
        if group.num_rows() < 0 {
            return Err(wrong(&format!("{} rows", group.num_rows())));
        }
        rows = rows.checked_add(group.num_rows()).ok_or_else(|| wrong("too many rows"))?;
        for column in group.columns() {
            let start = column.dictionary_page_offset().unwrap_or_else(|| column.data_page_offset());
            if start < 0 || column.compressed_size() < 0 || column.num_values() < 0 {
                return Err(wrong("a negative offset or size"));
            }
        }
    }
    let claimed = metadata.file_metadata().num_rows();
    if rows == claimed { Ok(()) } else { Err(format!("it claims {claimed} rows, its row groups have {rows}")) }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use arrow::array::{ArrayRef, AsArray, FixedSizeListArray, Int32Array, LargeListArray};
    use arrow::compute::cast;
    use parquet::basic::{Compression, GzipLevel, ZstdLevel};
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::super::fixtures::{message_lists, one, pairs, recipe, strings, write, write_with};
    use super::super::{Example, RowId, SourceFiles};
    use super::*;

    fn refusal(path: &Path) -> String {
        match ParquetFile::open(path) {
            Err(Error::Data(fault)) => fault.to_string(),
            other => panic!("{other:?}"),
        }
    }

    fn read_all(path: &Path) -> Result<Vec<Example>> {
        let sources = SourceFiles::open(&one(path.to_path_buf()), &recipe(""))?;
        sources.examples(u64::MAX).map(|row| row?.1.map_err(|bad| Error::Data(Fault::at(path, bad)))).collect()
    }

    #[test]
    fn what_is_not_parquet_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.parquet");
        let cases: [(&[u8], &str); 9] = [
            (b"", "is empty"),
            (b"prompt,completion\nhi,there\n", "CSV"),
            (b"[{\"text\": \"hi\"}]", "JSON"),
            (b"\xef\xbb\xbf  {\"text\": \"hi\"}", "JSON"),
            (b"ARROW1\0\0", "Arrow IPC"),
            (b"\x80\x04\x95\x10", "pickle"),
            (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
            (b"\x1f\x8b\x08", "gunzip"),
            (b"PAR1 but no end", "truncated"),
        ];
        for (bytes, named) in cases {
            fs::write(&path, bytes).unwrap();
            let said = refusal(&path);
            assert!(said.contains(named) && said.contains("data.parquet"), "{said}");
        }
        assert!(refusal(folder.path()).contains("a folder"));
        assert!(refusal(Path::new("/dev/zero")).contains("not a regular file"));
        assert!(refusal(&folder.path().join("missing.parquet")).contains("No such file"));
        let fifo = folder.path().join("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        assert!(refusal(&fifo).contains("not a regular file"));
    }

    #[test]
    fn every_truncation_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("whole.parquet");
        pairs(&path, 50);
        let bytes = fs::read(&path).unwrap();
        let cut = folder.path().join("cut.parquet");
        for length in (0..bytes.len()).step_by(13) {
            fs::write(&cut, &bytes[..length]).unwrap();
            refusal(&cut);
            // With its end put back the magic is right and the rest is not.
            fs::write(&cut, [&bytes[..length], b"PAR1"].concat()).unwrap();
            assert!(read_all(&cut).is_err(), "length {length}");
        }
    }

    #[test]
    fn damaged_bytes_are_an_error_or_harmless() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.parquet");
        let codecs = [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            Compression::GZIP(GzipLevel::default()),
            Compression::ZSTD(ZstdLevel::default()),
            Compression::LZ4_RAW,
            Compression::BROTLI(Default::default()),
        ];
        let mut state = 7u64;
        let mut random = move |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as usize % below
        };
        let mut errors = 0;
        for codec in codecs {
            let messages =
                message_lists(["role", "content"], &[&[("user", Some("hello")), ("assistant", Some("hi"))][..]; 40]);
            write_with(&path, vec![("messages", messages)], codec, 30);
            let whole = fs::read(&path).unwrap();
            for _ in 0..250 {
                let mut bytes = whole.clone();
                for _ in 0..1 + random(3) {
                    let at = random(bytes.len());
                    bytes[at] = if random(2) == 0 { bytes[at] ^ (1 << random(8)) } else { random(256) as u8 };
                }
                fs::write(&path, &bytes).unwrap();
                errors += usize::from(read_all(&path).is_err());
            }
        }
        assert!(errors > 500, "{errors} of 1500 noticed");
    }

    #[test]
    fn invalid_utf8_is_one_bad_row_named_with_its_column() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.parquet");
        let schema = "message m { required binary prompt (STRING); required binary completion (STRING); }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = WriterProperties::builder().set_dictionary_enabled(false).build();
        let mut writer = SerializedFileWriter::new(File::create(&path).unwrap(), schema, Arc::new(properties)).unwrap();
        let mut group = writer.next_row_group().unwrap();
        for bad in [None, Some(17)] {
            let mut cells = vec![ByteArray::from("fine"); 30];
            if let Some(row) = bad {
                cells[row] = ByteArray::from(vec![b'a', 0xff, 0xfe]);
            }
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&cells, None, None).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
        writer.close().unwrap();
        let sources = SourceFiles::open(&one(path), &recipe("")).unwrap();
        assert_eq!(sources.files[0].parquet.columns()[1], ("completion".to_string(), "string".to_string()));
        let rows: Vec<_> = sources.examples(u64::MAX).map(Result::unwrap).collect();
        assert_eq!(rows.len(), 30);
        for (id, row) in rows {
            match row {
                Ok(_) => assert_ne!(id.row, 17),
                Err(bad) => {
                    let said = bad.to_string();
                    assert!(
                        id.row == 17 && said.contains("column `completion`: the text is not valid UTF-8"),
                        "{said}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_arrow_type_of_strings_and_lists_reads_alike() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.parquet");
        let cells = strings(&["one", "two", "two"]);
        let dictionary = DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8));
        for kind in [DataType::Utf8, DataType::LargeUtf8, DataType::Utf8View, DataType::Binary, dictionary] {
            write(&path, vec![("text", cast(&cells, &kind).unwrap())]);
            let texts = ["one", "two", "two"].map(|text| Example::Text(text.into()));
            assert_eq!(read_all(&path).unwrap(), texts, "{kind}");
        }
        let list = message_lists(["from", "value"], &[&[("human", Some("a")), ("gpt", Some("b"))][..]; 2]);
        let items = list.as_list::<i32>().values().clone();
        let field = Arc::new(Field::new("item", items.data_type().clone(), true));
        let offsets = arrow::buffer::OffsetBuffer::from_lengths([2, 2]);
        let large: ArrayRef = Arc::new(LargeListArray::new(field.clone(), offsets, items.clone(), None));
        let fixed: ArrayRef = Arc::new(FixedSizeListArray::new(field, 2, items, None));
        let expected = vec![
            Example::Conversation {
                messages: vec![
                    serde_json::json!({"role": "user", "content": "a"}),
                    serde_json::json!({"role": "assistant", "content": "b"}),
                ],
                tools: None,
                trained_from: 0,
            };
            2
        ];
        for lists in [list, large, fixed] {
            write(&path, vec![("conversations", lists)]);
            assert_eq!(read_all(&path).unwrap(), expected);
        }
    }

    #[test]
    fn columns_that_do_not_fit_are_listed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.parquet");
        let numbers: ArrayRef = Arc::new(Int32Array::from(vec![1]));
        write(&path, vec![("question", strings(&["q"])), ("answer", strings(&["a"])), ("n", numbers)]);
        let said = |more: &str| SourceFiles::open(&one(path.clone()), &recipe(more)).unwrap_err().to_string();
        let unknown = said("");
        assert!(unknown.contains("`question` (string), `answer` (string), `n` (int32)"), "{unknown}");
        assert!(unknown.contains("columns: {prompt: question, completion: answer}"), "{unknown}");
        let steering = folder.path().join("steering.parquet");
        write(&steering, vec![("text", strings(&["t"])), ("\x1b[31m\nx", strings(&["u"]))]);
        let sources = SourceFiles::open(&one(steering), &recipe("")).unwrap();
        assert!(sources.sentences()[0].ends_with(r"not used: `\u{1b}[31m\nx`"), "{:?}", sources.sentences());
        let missing = said("columns: {prompt: question, completion: nswer}");
        assert!(missing.contains("no column `nswer`") && missing.contains("`answer`"), "{missing}");
        let mistyped = said("columns: {prompt: question, completion: n}");
        assert!(mistyped.contains("column `n` is int32, expected a string"), "{mistyped}");
        let part = said("columns: {prompt: question, completion: answer, reply: n}");
        assert!(part.contains("no part `reply`"), "{part}");
        let sources =
            SourceFiles::open(&one(path.clone()), &recipe("columns: {prompt: question, completion: answer}")).unwrap();
        assert_eq!(
            sources.sentences(),
            ["format `prompt-completion`, from dataset.columns: `question` (string), `answer` (string); not used: `n`"]
        );
    }

    #[test]
    fn an_optional_column_of_another_type_is_not_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.parquet");
        let numbers: ArrayRef = Arc::new(Int32Array::from(vec![1]));
        for (name, found) in [("input", "int32"), ("system", "int32")] {
            let texts = [("instruction", strings(&["q"])), ("output", strings(&["a"]))];
            write(&path, texts.into_iter().chain([(name, numbers.clone())]).collect());
            let said = SourceFiles::open(&one(path.clone()), &recipe("")).unwrap_err().to_string();
            assert!(said.contains(&format!("column `{name}` is {found}, expected a string")), "{said}");
        }
        let lists = message_lists(["role", "content"], &[&[("user", Some("q")), ("assistant", Some("a"))]]);
        write(&path, vec![("instruction", strings(&["q"])), ("output", strings(&["a"])), ("input", lists)]);
        let said = SourceFiles::open(&one(path), &recipe("")).unwrap_err().to_string();
        assert!(said.contains("column `input` is list of {role, content}, expected a string"), "{said}");
    }

    #[test]
    fn no_rows_are_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.parquet");
        write(&path, vec![("text", strings(&[]))]);
        assert!(SourceFiles::open(&one(path), &recipe("")).unwrap_err().to_string().contains("there are no rows"));
    }

    #[test]
    fn rows_are_found_across_row_groups_and_the_limit_holds() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.parquet");
        pairs(&path, 350);
        let sources = SourceFiles::open(&[one(path.clone()), one(path)].concat(), &recipe("limit: 600")).unwrap();
        let all: Vec<_> = sources.examples(u64::MAX).map(Result::unwrap).collect();
        assert_eq!(all.len(), 600);
        assert_eq!(all[599].0, RowId { file: 1, row: 249 });
        for (id, example) in [&all[0], &all[99], &all[100], &all[349], &all[350], &all[599]] {
            assert_eq!(&sources.example_at(*id).unwrap(), example);
        }
        assert!(sources.example_at(RowId { file: 1, row: 250 }).is_err());
    }

    #[test]
    fn a_file_that_changes_or_goes_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.parquet");
        pairs(&path, 300);
        let sources = SourceFiles::open(&one(path.clone()), &recipe("")).unwrap();
        let mut reading = sources.examples(u64::MAX);
        assert!(reading.next().unwrap().unwrap().1.is_ok());
        pairs(&path, 299);
        let said = reading.find_map(Result::err).unwrap().to_string();
        assert!(said.contains("data.parquet") && said.contains("changed"), "{said}");
        assert!(sources.examples(1).next().unwrap().unwrap_err().to_string().contains("changed"));
        fs::remove_file(&path).unwrap();
        assert!(sources.examples(1).next().unwrap().unwrap_err().to_string().contains("has gone"));
    }

    #[test]
    fn too_many_open_files_are_not_called_damage() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.parquet");
        pairs(&path, 3);
        let file = ParquetFile::open(&path).unwrap();
        let reader = file.read(vec![0], 0).unwrap();
        let limit = io::Error::from_raw_os_error(libc::EMFILE);
        for error in [unopened(&path, "it has gone: ", &limit), reader.damaged(&limit.to_string())] {
            let said = error.to_string();
            assert!(said.contains("ulimit -n") && !said.contains("damaged") && !said.contains("gone"), "{said}");
        }
    }

    #[test]
    fn a_panic_is_quiet_text() {
        assert_eq!(quietly(|| -> u8 { panic!("page {}", 3) }), Err("page 3".into()));
        assert_eq!(quietly(|| 5), Ok(5));
    }
}
