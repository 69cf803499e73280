//! The templates that come with engraft, each with `{% generation %}` around what the assistant says.
//!
//! They all begin with [`BEGINS_WITH_BOS`], which is taken off for a tokenizer that adds no `bos_token`.

/// How each of them begins.
pub(in crate::data) const BEGINS_WITH_BOS: &str = "{{- bos_token }}\n";

/// A template by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Builtin {
    /// What `dataset.chat_template` calls it.
    pub name: &'static str,
    /// The jinja text.
    pub source: &'static str,
    /// Special tokens it writes, which the tokenizer must know; the turn ends with the last one, or with the tokenizer's
    /// end-of-text token where there is none.
    pub tokens: &'static [&'static str],
}

/// All of them.
pub const BUILTIN: [Builtin; 9] = [
    Builtin { name: "chatml", source: include_str!("builtin/chatml.jinja"), tokens: &["<|im_start|>", "<|im_end|>"] },
    Builtin {
        name: "llama3",
        source: include_str!("builtin/llama3.jinja"),
        tokens: &["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    },
    Builtin {
        name: "gemma",
        source: include_str!("builtin/gemma.jinja"),
        tokens: &["<start_of_turn>", "<end_of_turn>"],
    },
    Builtin {
        name: "phi3",
        source: include_str!("builtin/phi3.jinja"),
        tokens: &["<|user|>", "<|assistant|>", "<|end|>"],
    },
    Builtin { name: "mistral", source: include_str!("builtin/mistral.jinja"), tokens: &[] },
    Builtin { name: "zephyr", source: include_str!("builtin/zephyr.jinja"), tokens: &[] },
    Builtin { name: "vicuna", source: include_str!("builtin/vicuna.jinja"), tokens: &[] },
    Builtin { name: "alpaca", source: include_str!("builtin/alpaca.jinja"), tokens: &[] },
    Builtin { name: "plain", source: include_str!("builtin/plain.jinja"), tokens: &[] },
];
