//! The whole model, from its parts: what comes before the blocks and after them.

use super::config::Config;
use crate::Result;
use crate::model::names::Names;
use crate::model::spec::{EmbeddingSpec, HeadSpec, LayerSpec, ModelSpec, NormSpec};
use crate::ops::LogitMap;

/// The token embedding as it is stored in `weight`.
pub(super) fn embedding(weight: &str) -> EmbeddingSpec {
    EmbeddingSpec { weight: weight.into(), scale: 1.0, norm: None }
}

/// The whole, from its parts; `head` is its name, and whether it is tied where the config does not say.
pub(super) fn model(
    config: &Config<'_>,
    embedding: EmbeddingSpec,
    layers: Vec<LayerSpec>,
    final_norm: NormSpec,
    (head, tied): (&str, bool),
    map: LogitMap,
) -> Result<ModelSpec> {
    Ok(ModelSpec {
        model_type: String::new(), // that of the whole config, which may hold this one
        hidden_size: config.size("hidden_size")?,
        vocab_size: config.size("vocab_size")?,
        max_position_embeddings: config.size_or("max_position_embeddings", 2048)?,
        embedding,
        layer_inputs: None,
        streams: None,
        layers,
        passes: 1,
        final_norm,
        head: HeadSpec { name: head.into(), tied: config.flag_or("tie_word_embeddings", tied)?, bias: false, map },
        names: Names::default(),
        ignored_suffixes: vec!["rotary_emb.inv_freq".into()],
        ignored_prefixes: Vec::new(),
    })
}
