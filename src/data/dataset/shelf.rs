//! All documents of all files under one numbering.

use super::DatasetFile;
use crate::data::cache::{self, Tokens};
use crate::data::pack::{Order, Span};
use crate::data::{Document, RowId};
use crate::{Error, Fault, Result};

/// All documents of all files under one numbering, and what decides their order.
#[derive(Debug)]
pub(in crate::data) struct Shelf {
    pub(super) files: Vec<Tokens>,
    pub(super) spans: Vec<Span>,
    capacity: Option<u32>,
    shuffle: bool,
    seed: u64,
}

impl Shelf {
    pub(super) fn new(
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

    /// Tokens of a document that are trained.
    pub fn trained(&self, index: u32) -> u32 {
        self.entry(index).trained
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
pub(in crate::data) struct ShelfOrder<'a> {
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
