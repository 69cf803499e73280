//! Larger models that hold a language model: pictures or sound in, text out. Only the text model is read and trained; the rest
//! stays in the checkpoint and is carried over when an adapter is merged.

use super::config::Config;
use super::{Page, gemma, gemma4, llama, llama4, qwen_next};
use crate::model::ModelSpec;
use crate::model::names::Names;
use crate::model::names::Rename::{self, Start};
use crate::{Error, Fault, Result};

/// How a larger model holds its language model, as data.
pub(super) struct Wrapper {
    /// The pages that may stand in `text_config`, by their `model_type`; the first where it has none.
    pub(super) text: &'static [(&'static str, Page)],
    /// Whether the head shares the embedding's weight where the config does not say.
    pub(super) tied: bool,
    /// Names in the files, by those of the text model alone, as published and as transformers has saved them since.
    pub(super) layouts: &'static [&'static [Rename]],
    /// Module paths by the text model's names, where `AutoModelForCausalLM` makes the larger model of such a config; none where
    /// it makes the text model alone.
    pub(super) modules: &'static [Rename],
    /// What the names of all other tensors begin with.
    pub(super) other_parts: &'static [&'static str],
}

/// As first published: the text model whole, head and all, in a part of its own.
const APART: &[Rename] = &[Start("model", "language_model.model"), Start("lm_head", "language_model.lm_head")];
/// As transformers saves it since 4.52: the head outside.
pub(super) const INSIDE: &[Rename] = &[Start("model", "model.language_model")];
const PICTURES: &[&str] =
    &["vision_tower", "multi_modal_projector", "model.vision_tower", "model.multi_modal_projector"];

/// `Gemma3Config`.
pub(super) const GEMMA3: Wrapper = Wrapper {
    text: &[("gemma3_text", gemma::gemma3_within)],
    tied: true,
    layouts: &[APART, INSIDE],
    modules: INSIDE,
    other_parts: PICTURES,
};

/// `Gemma4Config`, also where it hears.
pub(super) const GEMMA4: Wrapper = Wrapper {
    text: &[("gemma4_text", gemma4::gemma4)],
    tied: true,
    layouts: &[INSIDE],
    modules: INSIDE,
    other_parts: &["model.vision_tower", "model.embed_vision", "model.audio_tower", "model.embed_audio"],
};

/// `Mistral3Config`: `AutoModelForImageTextToText` makes it.
pub(super) const MISTRAL3: Wrapper = Wrapper {
    text: &[("mistral", llama::mistral), ("ministral3", llama::ministral3)],
    tied: true,
    layouts: &[APART, INSIDE],
    modules: INSIDE,
    other_parts: PICTURES,
};

/// `Llama4Config`: `AutoModelForCausalLM` makes the text model alone.
pub(super) const LLAMA4: Wrapper = Wrapper {
    text: &[("llama4_text", llama4::llama4)],
    tied: false,
    layouts: &[APART, &[]],
    modules: &[],
    other_parts: &["vision_model", "multi_modal_projector"],
};

/// `Qwen3_5Config`: `AutoModelForCausalLM` makes the text model alone.
pub(super) const QWEN3_5: Wrapper = Wrapper {
    text: &[("qwen3_5_text", qwen_next::qwen3_5)],
    tied: false,
    layouts: &[INSIDE, &[]],
    modules: &[],
    other_parts: &["model.visual", "mtp"],
};

/// `Qwen3_5MoeConfig`: the same.
pub(super) const QWEN3_5_MOE: Wrapper = Wrapper { text: &[("qwen3_5_moe_text", qwen_next::qwen3_5_moe)], ..QWEN3_5 };

/// The same in files that store every expert apart, as those in fp8 do.
pub(super) const QWEN3_5_MOE_APART: Wrapper =
    Wrapper { text: &[("qwen3_5_moe_text", qwen_next::qwen3_5_moe_apart)], ..QWEN3_5 };

/// The spec of the text model of a `config.json`.
pub(super) fn wrapped(config: &Config<'_>, wrapper: &Wrapper) -> Result<ModelSpec> {
    let Some(text) = config.object("text_config")? else {
        return Err(Error::Model(Fault::new("config.json: text_config", "missing")));
    };
    for left_alone in ["vision_config", "audio_config"] {
        let _ = config.field(left_alone);
    }
    let [(assumed, _), ..] = wrapper.text else { unreachable!("a wrapper names the text model it holds") };
    let model_type = if text.field("model_type").is_some() { text.text("model_type")? } else { assumed };
    let Some((_, page)) = wrapper.text.iter().find(|(known, _)| *known == model_type) else {
        let known: Vec<&str> = wrapper.text.iter().map(|(known, _)| *known).collect();
        let what = format!("'{model_type}' is not supported in a '{}'", config.text("model_type")?);
        let fault = Fault::new("config.json: text_config.model_type", what);
        return Err(Error::Model(fault.hint(format!("supported: {}", known.join(", ")))));
    };
    let mut spec = page(&text)?;
    text.prove_understood()?;
    // transformers goes by the outer field when it makes the larger model.
    let inner = text.flag_or("tie_word_embeddings", wrapper.tied)?;
    spec.head.tied = config.flag_or("tie_word_embeddings", inner)?;
    spec.names = Names {
        modules: wrapper.modules.to_vec(),
        layouts: wrapper.layouts.iter().map(|layout| layout.to_vec()).collect(),
        layout: 0,
        other_parts: wrapper.other_parts,
        among_others: !wrapper.modules.is_empty(),
        own_head_if_stored: true,
        taken_for_experts: spec.names.taken_for_experts,
    };
    Ok(spec)
}
