//! A tensor cut to what each task writes.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The rows of every document in every plane of a tensor (planes, rows of all documents, width).
pub(in crate::ops) struct Parts<'a, T> {
    parts: Vec<Mutex<&'a mut [T]>>,
    documents: usize,
}

impl<'a, T> Parts<'a, T> {
    /// Of all elements, where each document has so many of a plane.
    pub(in crate::ops) fn new(mut all: &'a mut [T], planes: usize, lengths: &[usize]) -> Self {
        let mut parts = Vec::with_capacity(planes * lengths.len());
        for length in (0..planes).flat_map(|_| lengths) {
            let (part, rest) = all.split_at_mut(*length);
            parts.push(Mutex::new(part));
            all = rest;
        }
        Self { parts, documents: lengths.len() }
    }

    /// The part of a document in a plane, for the one task that writes it.
    pub(in crate::ops) fn take(&self, plane: usize, document: usize) -> MutexGuard<'_, &'a mut [T]> {
        self.parts[plane * self.documents + document].lock().unwrap_or_else(PoisonError::into_inner)
    }
}
