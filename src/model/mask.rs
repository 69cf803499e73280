//! Who may look at whom, in the two forms attention takes: documents, and a table for keys kept in a cache.

use std::borrow::Cow;

use tch::{Kind, Tensor};

use super::spec::Mask;
use crate::ops::Documents;

impl Mask {
    /// What attention is to take for documents, so that no token looks beyond its chunk.
    pub(super) fn documents(self, documents: &Documents) -> Cow<'_, Documents> {
        match self {
            Mask::Chunked { size } => Cow::Owned(documents.chunked(size)),
            Mask::Full | Mask::Sliding { .. } => Cow::Borrowed(documents),
        }
    }

    /// Whether queries at places (B, 1, L, 1) may look at each of `keys` keys from the start: (B, 1, L, S).
    pub(super) fn allowed(self, queries_at: &Tensor, keys: i64) -> Tensor {
        let keys_at = Tensor::arange(keys, (Kind::Int64, queries_at.device())).view([1, 1, 1, -1]);
        let before = keys_at.le_tensor(queries_at);
        match self {
            Mask::Full => before,
            Mask::Sliding { window } => before.logical_and(&keys_at.gt_tensor(&(queries_at - window))),
            Mask::Chunked { size } => {
                let chunk = queries_at.divide_scalar_mode(size, "floor") * size;
                before.logical_and(&keys_at.ge_tensor(&chunk))
            }
        }
    }
}
