//! Parquet files and an encoder for this room's tests.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, ListArray, RecordBatch, StringArray, StructArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use serde_json::Value;

use super::{BadRow, Document, Encode, Encoded, Example};
use crate::recipe::{DataSource, DatasetRecipe};

pub(super) fn strings(cells: &[&str]) -> ArrayRef {
    Arc::new(StringArray::from(cells.to_vec()))
}

pub(super) fn optional_strings(cells: &[Option<&str>]) -> ArrayRef {
    Arc::new(StringArray::from(cells.to_vec()))
}

/// A list of `{first, second}` structs, null fields allowed.
pub(super) fn message_lists(keys: [&str; 2], rows: &[&[(&str, Option<&str>)]]) -> ArrayRef {
    let left: StringArray = rows.iter().flat_map(|row| row.iter()).map(|(left, _)| Some(*left)).collect();
    let right: StringArray = rows.iter().flat_map(|row| row.iter()).map(|(_, right)| *right).collect();
    let field = |name: &str| Arc::new(Field::new(name, DataType::Utf8, true));
    let items = StructArray::from(vec![
        (field(keys[0]), Arc::new(left) as ArrayRef),
        (field(keys[1]), Arc::new(right) as ArrayRef),
    ]);
    let field = Arc::new(Field::new("item", arrow::array::Array::data_type(&items).clone(), true));
    let offsets = OffsetBuffer::from_lengths(rows.iter().map(|row| row.len()));
    Arc::new(ListArray::new(field, offsets, Arc::new(items), None))
}

pub(super) fn write(path: &Path, columns: Vec<(&str, ArrayRef)>) {
    write_with(path, columns, Compression::SNAPPY, 1 << 20);
}

pub(super) fn write_with(path: &Path, columns: Vec<(&str, ArrayRef)>, compression: Compression, group_rows: usize) {
    let batch =
        RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(name, array)| (name, array, true))).unwrap();
    let properties =
        WriterProperties::builder().set_compression(compression).set_max_row_group_row_count(Some(group_rows)).build();
    let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

/// A file of prompts and completions with lengths that vary.
pub(super) fn pairs(path: &Path, rows: usize) {
    let prompts: Vec<String> = (0..rows).map(|row| "p".repeat(1 + row * 7 % 23)).collect();
    let completions: Vec<String> = (0..rows).map(|row| format!("{row:->width$}", width = 4 + row * 5 % 29)).collect();
    let columns = [prompts, completions].map(|cells| Arc::new(StringArray::from(cells)) as ArrayRef);
    write_with(path, ["prompt", "completion"].into_iter().zip(columns).collect(), Compression::SNAPPY, 100);
}

pub(super) fn recipe(more: &str) -> DatasetRecipe {
    serde_yaml::from_str(&format!("train: unused\nmax_length: 64\n{more}")).unwrap()
}

pub(super) fn source(path: &Path) -> DataSource {
    DataSource { path: path.to_path_buf(), weight: 1.0 }
}

pub(super) fn one(path: PathBuf) -> Vec<DataSource> {
    vec![source(&path)]
}

/// One token per byte; completions and assistant turns are trained.
pub(super) struct Bytes {
    pub limit: usize,
    pub truncate: bool,
    pub name: &'static str,
}

pub(super) const BYTES: Bytes = Bytes { limit: 64, truncate: false, name: "bytes" };

impl Encode for Bytes {
    fn encode(&self, example: &Example) -> Result<Encoded, BadRow> {
        let mut document = Document::default();
        let mut push = |text: &str, trained: bool| {
            document.ids.extend(text.bytes().map(u32::from));
            document.trained.resize(document.ids.len(), trained);
        };
        match example {
            Example::Text(text) => {
                let bytes: Vec<u32> = text.bytes().map(u32::from).collect();
                let documents =
                    bytes.chunks(self.limit).map(|ids| Document { ids: ids.to_vec(), trained: vec![true; ids.len()] });
                return Ok(Encoded { documents: documents.collect(), ..Default::default() });
            }
            Example::PromptCompletion { prompt, completion } => {
                assert_ne!(completion, "panic", "the encoder was asked to panic");
                push(prompt, false);
                push(completion, true);
            }
            Example::Conversation { messages, .. } => {
                for message in messages {
                    let content = message["content"]
                        .as_str()
                        .map(str::to_string)
                        .unwrap_or_else(|| Value::to_string(&message["content"]));
                    push(&content, message["role"] == "assistant");
                }
            }
        }
        let truncated = document.ids.len() > self.limit;
        if truncated && !self.truncate {
            return Err(BadRow::Overlong { tokens: document.ids.len(), limit: self.limit });
        }
        let answer_cut = document.trained.iter().skip(self.limit).any(|trained| *trained);
        document.ids.truncate(self.limit);
        document.trained.truncate(self.limit);
        Ok(Encoded { documents: vec![document], truncated, answer_cut })
    }

    fn fingerprint(&self) -> String {
        format!("{} {} {}", self.name, self.limit, self.truncate)
    }
}
