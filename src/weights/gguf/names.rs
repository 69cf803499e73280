//! The table of names: what llama.cpp calls a tensor or a setting, and what transformers calls it.

use super::RowOrder;

/// An architecture as GGUF files name it (`general.architecture`).
#[derive(Debug)]
pub(crate) struct Architecture {
    /// Its GGUF name.
    pub name: &'static str,
    /// transformers' class.
    pub class: &'static str,
    /// transformers' `model_type`.
    pub model_type: &'static str,
    /// Its tensors. `{}` stands for the layer's number; `.weight` and `.bias` follow the name.
    pub tensors: &'static [Name],
    /// GGUF tensors that hold no weights of the model (read for the config, or derived data).
    pub derived: &'static [&'static str],
    /// Settings that are numbers: GGUF key after the architecture's name, config key. All must be there.
    pub settings: &'static [(&'static str, &'static str)],
    /// Settings with the same value for every model of the architecture.
    pub constants: &'static [(&'static str, Constant)],
}

/// One row of the table.
#[derive(Debug)]
pub(crate) struct Name {
    /// llama.cpp's.
    pub gguf: &'static str,
    /// transformers'.
    pub checkpoint: &'static str,
    /// How llama.cpp's converter orders the rows.
    pub rows: Rows,
}

/// How a converter orders a tensor's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rows {
    /// As they are.
    Same,
    /// The rotary pairs of each query head made adjacent.
    QueryHeads,
    /// The rotary pairs of each key head made adjacent.
    KeyHeads,
}

/// A config value that the architecture fixes.
#[derive(Debug)]
pub(crate) enum Constant {
    Text(&'static str),
    Number(f64),
}

const fn same(gguf: &'static str, checkpoint: &'static str) -> Name {
    Name { gguf, checkpoint, rows: Rows::Same }
}

/// The architectures that can be read.
pub(crate) const ARCHITECTURES: &[Architecture] = &[Architecture {
    name: "llama",
    class: "LlamaForCausalLM",
    model_type: "llama",
    tensors: &[
        same("token_embd", "model.embed_tokens"),
        same("output_norm", "model.norm"),
        same("output", "lm_head"),
        same("blk.{}.attn_norm", "model.layers.{}.input_layernorm"),
        Name { gguf: "blk.{}.attn_q", checkpoint: "model.layers.{}.self_attn.q_proj", rows: Rows::QueryHeads },
        Name { gguf: "blk.{}.attn_k", checkpoint: "model.layers.{}.self_attn.k_proj", rows: Rows::KeyHeads },
        same("blk.{}.attn_v", "model.layers.{}.self_attn.v_proj"),
        same("blk.{}.attn_output", "model.layers.{}.self_attn.o_proj"),
        same("blk.{}.ffn_norm", "model.layers.{}.post_attention_layernorm"),
        same("blk.{}.ffn_gate", "model.layers.{}.mlp.gate_proj"),
        same("blk.{}.ffn_up", "model.layers.{}.mlp.up_proj"),
        same("blk.{}.ffn_down", "model.layers.{}.mlp.down_proj"),
    ],
    derived: &["rope_freqs.weight", "blk.{}.attn_rot_embd"],
    settings: &[
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("block_count", "num_hidden_layers"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ],
    constants: &[
        ("hidden_act", Constant::Text("silu")),
        ("attention_dropout", Constant::Number(0.0)),
        ("initializer_range", Constant::Number(0.02)),
    ],
}];

impl Architecture {
    /// The architecture a file names.
    pub fn named(name: &str) -> Option<&'static Architecture> {
        ARCHITECTURES.iter().find(|architecture| architecture.name == name)
    }

    /// The checkpoint name and row order of a GGUF tensor; `None` when the table has none.
    pub fn to_checkpoint(&self, gguf: &str) -> Option<(String, Rows)> {
        let (name, suffix) = split(gguf)?;
        self.tensors.iter().find_map(|row| Some((translate(row.gguf, row.checkpoint, name)? + suffix, row.rows)))
    }

    /// Whether a GGUF tensor is derived data, not a weight.
    pub fn is_derived(&self, gguf: &str) -> bool {
        self.derived.iter().any(|pattern| *pattern == gguf || translate(pattern, pattern, gguf).is_some())
    }
}

impl Rows {
    /// The order for a tensor of `rows` rows; `None` when the heads do not divide them.
    pub fn order(self, rows: i64, query_heads: i64, key_heads: i64) -> Option<RowOrder> {
        let heads = match self {
            Rows::Same => return Some(RowOrder::Same),
            Rows::QueryHeads => query_heads,
            Rows::KeyHeads => key_heads,
        };
        let pairs = heads.checked_mul(2).filter(|&pairs| pairs > 0 && rows > 0 && rows % pairs == 0)?;
        Some(RowOrder::Paired { half: (rows / pairs) as usize })
    }
}

fn split(name: &str) -> Option<(&str, &str)> {
    let at = name.rfind('.').filter(|&at| matches!(&name[at..], ".weight" | ".bias"))?;
    Some(name.split_at(at))
}

/// Reads `name` by the pattern `from`, writes it by `to`; `{}` in either is the layer's number.
fn translate(from: &str, to: &str, name: &str) -> Option<String> {
    let Some((before, after)) = from.split_once("{}") else {
        return (from == name).then(|| to.to_string());
    };
    let layer = name.strip_prefix(before)?.strip_suffix(after)?;
    // Only the plain spelling of a number, so that no two tensors get one name.
    let plain = layer.parse::<u32>().is_ok_and(|number| number.to_string() == layer);
    plain.then(|| to.replace("{}", layer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_translate() {
        let llama = Architecture::named("llama").unwrap();
        for row in llama.tensors {
            for suffix in [".weight", ".bias"] {
                let gguf = row.gguf.replace("{}", "17") + suffix;
                let (checkpoint, rows) = llama.to_checkpoint(&gguf).unwrap();
                assert_eq!(checkpoint, row.checkpoint.replace("{}", "17") + suffix);
                assert_eq!(rows, row.rows);
            }
        }
        assert_eq!(llama.to_checkpoint("blk.0.attn_q.weight").unwrap().1, Rows::QueryHeads);
        for unknown in
            ["blk.x.attn_q.weight", "blk.01.attn_q.weight", "blk.0.ffn_gate_exps.weight", "blk.0.attn_q", "q"]
        {
            assert_eq!(llama.to_checkpoint(unknown), None, "{unknown}");
        }
        assert!(llama.is_derived("rope_freqs.weight") && !llama.is_derived("output.weight"));
    }
}
