//! What a decoder is, as data. Expanded per layer, so the forward does no layer-index arithmetic.

/// A whole decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// `model_type` of `config.json`.
    pub model_type: String,
    /// D.
    pub hidden_size: i64,
    /// V.
    pub vocab_size: i64,
}
