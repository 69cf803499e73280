//! From parquet to batches: source (parquet) -> example -> template -> tokens and mask -> pack -> batch.

use std::fmt;

use tch::Tensor;

use crate::Result;
use crate::error::one_line;
use crate::recipe::DataFormat;

mod batch;
mod cache;
mod dataset;
mod encode;
mod example;
mod files;
#[cfg(test)]
mod fixtures;
mod guard;
mod layout;
mod magic;
mod pack;
mod quiet;
mod report;
mod source;
mod template;
mod tokenize;
mod tokenizer;

pub use batch::Batches;
pub use dataset::{Dataset, DatasetFile, MicroBatchSize};
pub use encode::Encoder;
pub use files::{Examples, SourceFiles};
pub use report::{DatasetReport, Place, Tally};
pub use source::ParquetFile;
pub use template::{BUILTIN, Builtin, ChatTemplate, Conversation, KeptApart, Rendered};
pub use tokenizer::{TextStream, Tokenizer, Tokens, add_tokens, grow};

/// Turns an example into documents of tokens with their mask.
pub trait Encode: Send + Sync {
    /// Normally one document; `text` longer than the limit gives several. Err is a malformed row (unknown role, no trained token, template error...), as plain text; the dataset adds file and row.
    fn encode(&self, example: &Example) -> std::result::Result<Encoded, BadRow>;
    /// Refuses a format of which no row could be encoded, for a reason that is no row's.
    fn check(&self, _format: DataFormat) -> Result<()> {
        Ok(())
    }
    /// What a person should know about how rows are encoded.
    fn notices(&self) -> Vec<String> {
        Vec::new()
    }
    /// A digest of everything that determines its output (tokenizer bytes, template, recipe options, code version of the encoding).
    fn fingerprint(&self) -> String;
}

/// What [`Encode`] makes of a row.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Encoded {
    /// The row's documents, none longer than the recipe's `max_length`.
    pub documents: Vec<Document>,
    /// Whether tokens were cut off to fit `max_length`.
    pub truncated: bool,
    /// Whether trained tokens were among them: such a row teaches no end.
    pub answer_cut: bool,
}

/// Why a row gives no document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BadRow {
    /// The row is not what the format says, or the template refuses it.
    Malformed(String),
    /// The row is longer than the recipe's `max_length`, and is not to be cut.
    Overlong {
        /// How long it is.
        tokens: usize,
        /// `max_length`.
        limit: usize,
    },
    /// The row has tokens but none of them is trained.
    NothingTrained(String),
    /// The row holds no text.
    Empty,
}

impl fmt::Display for BadRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // It quotes what the row or the template says.
            BadRow::Malformed(what) | BadRow::NothingTrained(what) => f.write_str(&one_line(what)),
            BadRow::Overlong { tokens, limit } => write!(f, "{tokens} tokens, more than max_length {limit}"),
            BadRow::Empty => f.write_str("the row is empty"),
        }
    }
}

/// Where a document comes from: the place named in reports and errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowId {
    /// Index into the dataset's list of files.
    pub file: u32,
    /// Row of that file, from 0.
    pub row: u64,
}

/// What a row says, before any template.
#[derive(Debug, Clone, PartialEq)]
pub enum Example {
    /// Turns, each an object with at least `role` and `content`, rendered by the chat template.
    Conversation {
        /// The turns, in order.
        messages: Vec<serde_json::Value>,
        /// Tool definitions handed to the template.
        tools: Option<serde_json::Value>,
        /// First turn that may be trained: turns before it are context whatever their role (the prompt of a
        /// prompt-completion pair of message lists; 0 otherwise).
        trained_from: usize,
    },
    /// Two strings used as they are; the second is trained.
    PromptCompletion {
        /// Context.
        prompt: String,
        /// What is trained.
        completion: String,
    },
    /// Text whose every token is trained.
    Text(String),
}

/// One document: its tokens and which of them are trained.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Document {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Whether the token of the same index is learned (as a target).
    pub trained: Vec<bool>,
}

/// A micro-batch: documents laid end to end, no padding.
#[derive(Debug)]
pub struct Batch {
    /// (T) i64.
    pub ids: Tensor,
    /// (T) i64, restarting at each document.
    pub positions: Tensor,
    /// Where documents begin and end in T.
    pub documents: crate::model::Documents,
    /// (S) i64: rows of T whose next token is trained.
    pub rows: Tensor,
    /// (S) i64: those next tokens.
    pub targets: Tensor,
    /// Where each document comes from.
    pub origins: Vec<RowId>,
}

/// Where the next micro-batch is: enough to resume in O(1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Cursor {
    /// Pass over the data, from 0.
    pub epoch: u64,
    /// Micro-batch of that pass, from 0.
    pub micro_batch: u64,
}
