//! From parquet to batches: source (parquet) -> example -> template -> tokens and mask -> pack -> batch.

use tch::Tensor;

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
