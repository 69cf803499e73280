//! What llama.cpp calls a tensor or a setting, and what transformers calls it: the form of the table in
//! [`super::architectures`], and how it is read.

use super::Conversion;
use super::architectures::ARCHITECTURES;

/// An architecture as GGUF files name it (`general.architecture`).
#[derive(Debug)]
pub(crate) struct Architecture {
    /// Its GGUF name.
    pub name: &'static str,
    /// The tensor or setting that a file must have to be this one, where others have the same name.
    pub only_with: Option<&'static str>,
    /// transformers' class.
    pub class: &'static str,
    /// transformers' `model_type`.
    pub model_type: &'static str,
    /// Its tensors. `{}` stands for the layer's number; `.weight` and `.bias` follow the name.
    pub tensors: &'static [&'static [Name]],
    /// GGUF tensors that hold no weights of the model (read for the config, or derived data).
    pub derived: &'static [&'static str],
    /// Whether norms are stored as 1 + w.
    pub norms_from_one: bool,
    /// How much of each head rotates.
    pub rotary: Rotary,
    /// The fields of the config that are this architecture's own.
    pub fields: &'static [&'static [Field]],
    /// The configs that are written as this architecture, by their `model_type`, and after a slash that of the text model they hold;
    /// its own where none is named.
    pub written_from: &'static [&'static str],
    /// Where llama.cpp looks for the head's weight.
    pub head: Head,
    /// Settings that are the same in every file that is written.
    pub constant: &'static [(&'static str, &'static str)],
}

/// Where llama.cpp looks for the head's weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Head {
    /// In a tensor of its own if there is one, else in the embedding.
    Either,
    /// In a tensor of its own, which must be there.
    Own,
    /// In the embedding; a tensor of its own is refused.
    Embedding,
}

/// One row of the table.
#[derive(Debug)]
pub(crate) struct Name {
    /// llama.cpp's.
    pub gguf: &'static str,
    /// transformers'; `*` stands for the number of an expert, where llama.cpp has all of them in one tensor (E, out, in).
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
    /// All queries, all keys, all values, where transformers has them head by head.
    Apart,
    /// As it is: one row, which older converters wrote without saying that it is one.
    One,
}

/// How much of each head rotates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rotary {
    /// Nothing: positions enter otherwise.
    None,
    /// All of it.
    Whole,
    /// The share in this field of the config.
    Share(&'static str),
}

/// Where a field of `config.json` comes from.
#[derive(Debug)]
pub(crate) enum Field {
    /// A positive number of the metadata, by its key after the architecture's name, which must be there.
    Required(&'static str, &'static str),
    /// The same; null where it is not there or 0.
    Optional(&'static str, &'static str),
    /// A flag of the metadata, which must be there.
    Flag(&'static str, &'static str),
    /// The same text for every model of the architecture.
    Text(&'static str, &'static str),
    /// The same number.
    Number(&'static str, f64),
    /// The same answer.
    Fixed(&'static str, bool),
    /// Whether there is a tensor whose name ends so.
    Has(&'static str, &'static str),
    /// The rows of the tensor whose name ends so.
    RowsOf(&'static str, &'static str),
    /// The key heads that the rows of the tensor whose name ends so make, where the metadata counts all heads.
    KeyHeadsIn(&'static str, &'static str),
    /// The size of a head.
    HeadSize(&'static str),
    /// The number of key heads.
    KeyHeads(&'static str),
    /// What scores are scaled by the inverse root of, as llama.cpp has it: D / N in models of so many layers, else the size of a
    /// head.
    Scale {
        /// Its name.
        field: &'static str,
        /// That number of layers.
        of_the_width: i64,
    },
}

/// The sizes of attention.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub query: i64,
    pub key: i64,
}

impl Architecture {
    /// The architecture a file names; `has` says whether it has a tensor or a setting.
    pub fn named(name: &str, has: impl Fn(&str) -> bool) -> Option<&'static Architecture> {
        ARCHITECTURES.iter().find(|architecture| architecture.name == name && architecture.only_with.is_none_or(&has))
    }

    /// The checkpoint name and row order of a GGUF tensor; `None` when the table has none.
    pub fn to_checkpoint(&self, gguf: &str) -> Option<(String, Rows)> {
        let (name, suffix) = split(gguf)?;
        let mut rows = self.tensors.iter().copied().flatten();
        rows.find_map(|row| Some((translate(row.gguf, row.checkpoint, name)? + suffix, row.rows)))
    }

    /// The architecture that a config is written as: by its `model_type` and that of the text model it holds, if any; `has` says whether
    /// there is a tensor of that checkpoint name.
    pub fn written(
        model_type: &str,
        text: Option<Option<&str>>,
        has: impl Fn(&str) -> bool,
    ) -> Option<&'static Architecture> {
        let named = |entry: &str| match (entry.split_once('/'), text) {
            (None, None) => entry == model_type,
            (Some((outer, inner)), Some(text)) => outer == model_type && text.is_none_or(|text| text == inner),
            _ => false,
        };
        ARCHITECTURES.iter().find(|architecture| {
            let known = match architecture.written_from {
                [] => named(architecture.model_type),
                others => others.iter().any(|entry| named(entry)),
            };
            // Settings are told by the type; only a tensor tells two forms of one type apart.
            let tensor = architecture.only_with.and_then(|gguf| architecture.to_checkpoint(gguf));
            known && tensor.is_none_or(|(name, _)| has(&name) || has(&name.replace('*', "0")))
        })
    }

    /// The configs that are written, by `model_type`.
    pub fn all_written() -> Vec<&'static str> {
        let each = |architecture: &'static Architecture| match architecture.written_from {
            [] => vec![architecture.model_type],
            others => others.iter().map(|entry| entry.split('/').next().unwrap_or(entry)).collect(),
        };
        let mut names: Vec<_> = ARCHITECTURES.iter().flat_map(each).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The GGUF name and row order of a tensor of the checkpoint, and which expert's part of the GGUF tensor it is; `None` when the
    /// table has none.
    pub fn to_gguf(&self, checkpoint: &str) -> Option<(String, Rows, Option<usize>)> {
        let (name, suffix) = split(checkpoint)?;
        self.tensors.iter().copied().flatten().find_map(|row| {
            let (gguf, expert) = match row.checkpoint.split_once('*') {
                None => (translate(row.checkpoint, row.gguf, name)?, None),
                Some((before, after)) => {
                    let numbered = name.strip_suffix(after)?;
                    let at = numbered.rfind('.')? + 1;
                    let number: usize =
                        numbered[at..].parse().ok().filter(|n: &usize| n.to_string() == numbered[at..])?;
                    (translate(before, row.gguf, &numbered[..at])?, Some(number))
                }
            };
            Some((gguf + suffix, row.rows, expert))
        })
    }

    /// Whether experts are among its tensors.
    pub fn has_experts(&self) -> bool {
        self.tensors.iter().copied().flatten().any(|row| row.checkpoint.contains('*'))
    }

    /// Whether a GGUF tensor is derived data, not a weight.
    pub fn is_derived(&self, gguf: &str) -> bool {
        self.derived.iter().any(|pattern| *pattern == gguf || translate(pattern, pattern, gguf).is_some())
    }
}

impl Rows {
    /// The order for a tensor of `rows` rows; `None` when the heads do not divide them.
    pub fn order(self, rows: i64, heads: Heads) -> Option<Conversion> {
        let paired = |heads: i64| {
            let pairs = heads.checked_mul(2).filter(|&pairs| pairs > 0 && rows > 0 && rows % pairs == 0)?;
            Some(Conversion::Paired { half: (rows / pairs) as usize })
        };
        match self {
            Rows::Same | Rows::One => Some(Conversion::Same),
            Rows::QueryHeads => paired(heads.query),
            Rows::KeyHeads => paired(heads.key),
            Rows::Apart => {
                let Heads { query, key } = heads;
                let all =
                    query.checked_add(key.checked_mul(2)?).filter(|&all| all > 0 && rows > 0 && rows % all == 0)?;
                let whole = key > 0 && query % key == 0;
                whole.then_some(Conversion::Apart {
                    queries: query as usize,
                    keys: key as usize,
                    size: (rows / all) as usize,
                })
            }
        }
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
        for architecture in ARCHITECTURES {
            for row in architecture.tensors.iter().copied().flatten() {
                for suffix in [".weight", ".bias"] {
                    let gguf = row.gguf.replace("{}", "17") + suffix;
                    let (checkpoint, rows) = architecture.to_checkpoint(&gguf).unwrap();
                    assert_eq!(checkpoint, row.checkpoint.replace("{}", "17") + suffix);
                    assert_eq!(rows, row.rows);
                    // And back.
                    let expert = row.checkpoint.contains('*').then_some(5);
                    assert_eq!(architecture.to_gguf(&checkpoint.replace('*', "5")), Some((gguf, rows, expert)));
                }
            }
        }
        let llama = Architecture::named("llama", |_| false).unwrap();
        assert_eq!(llama.to_checkpoint("blk.0.attn_q.weight").unwrap().1, Rows::QueryHeads);
        for unknown in
            ["blk.x.attn_q.weight", "blk.01.attn_q.weight", "blk.0.ffn_gate_exps.weight", "blk.0.attn_q", "q"]
        {
            assert_eq!(llama.to_checkpoint(unknown), None, "{unknown}");
        }
        assert!(llama.is_derived("rope_freqs.weight") && !llama.is_derived("output.weight"));
        for unknown in
            ["model.layers.x.mlp.up_proj.weight", "model.layers.0.mlp.up_proj", "lm_head.scale", "norm.weight"]
        {
            assert_eq!(llama.to_gguf(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn the_readme_names_every_architecture() {
        let mut names: Vec<String> = ARCHITECTURES.iter().map(|one| format!("`{}`", one.name)).collect();
        names.dedup();
        let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
        let words = readme.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(
            words.contains(&format!("is one of {};", names.join(", "))),
            "README.md: put there {}",
            names.join(", ")
        );
    }

    #[test]
    fn an_architecture_is_told_by_what_it_has() {
        let named = |name, has: &str| Architecture::named(name, |one| one == has).unwrap().model_type;
        assert_eq!((named("olmo2", ""), named("olmo2", "attention.sliding_window")), ("olmo2", "olmo3"));
        assert_eq!((named("llama", ""), named("llama", "blk.0.ffn_gate_inp.weight")), ("llama", "mixtral"));
        let written = |config, text, has: &str| {
            Architecture::written(config, text, |one| one == has).map(|found| (found.name, found.model_type))
        };
        assert_eq!(written("mistral", None, ""), Some(("llama", "llama")));
        assert_eq!(written("mistral3", Some(Some("mistral")), ""), Some(("mistral3", "mistral")));
        assert_eq!(written("mistral3", Some(Some("ministral3")), ""), Some(("mistral3", "ministral3")));
        assert_eq!(written("gemma3", Some(None), ""), Some(("gemma3", "gemma3_text")));
        let grouped = written("falcon", None, "transformer.h.0.ln_attn.weight").unwrap();
        assert_eq!((grouped.0, written("falcon", None, "").unwrap().0), ("falcon", "falcon"));
        assert_eq!(written("gpt_oss", None, ""), None);
    }
}
