//! One module, three spellings: the spec's, the checkpoint's files', and transformers', which is that of PEFT's files.
//!
//! Where they differ, a family's page says how, as data; nothing else in the program knows. Tensors are found under
//! [`Names::stored`], linears are called by [`Names::module`], and what an adapter or a person calls them is looked up in
//! [`Names::spec_names`].

use super::ModelSpec;
use crate::Result;
use crate::weights::Checkpoint;

/// How a model's modules are called elsewhere.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Names {
    /// From the spec's names to transformers' module paths.
    pub modules: Vec<Rename>,
    /// From the spec's names to those in files: the ways they are published; none where they are the spec's own.
    pub layouts: Vec<Vec<Rename>>,
    /// Which of the layouts this checkpoint has.
    pub layout: usize,
    /// What the names of tensors begin with that belong to other parts of a larger model (pictures, sound), which are kept but
    /// never read.
    pub other_parts: &'static [&'static str],
    /// Whether transformers makes the larger model when asked for this one, so that a name has to say which part it is of.
    pub among_others: bool,
    /// Whether a head that is in the files is the head, whatever the config says of sharing the embedding's weight.
    pub own_head_if_stored: bool,
    /// Linears whose paths end so are parts of experts to PEFT wherever they are, also in layers that have none: it goes by the
    /// model's type. Their adapters are lost unless they are called parameters.
    pub taken_for_experts: &'static [&'static str],
}

/// Replaces whole parts of a path, at most once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rename {
    /// At its start; either side may be empty.
    Start(&'static str, &'static str),
    /// Wherever it is.
    Part(&'static str, &'static str),
}

impl Rename {
    fn apply(self, name: &str) -> String {
        match self {
            Self::Start(from, to) => match tail(name, from) {
                Some(rest) => [to, rest].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("."),
                None => name.to_string(),
            },
            Self::Part(from, to) => {
                let starts = std::iter::once(0).chain(name.match_indices('.').map(|(at, _)| at + 1));
                let found = starts.filter_map(|at| Some((&name[..at], tail(&name[at..], from)?))).next();
                match found {
                    Some((before, "")) => format!("{before}{to}"),
                    Some((before, rest)) => format!("{before}{to}.{rest}"),
                    None => name.to_string(),
                }
            }
        }
    }

    fn inverse(self) -> Self {
        match self {
            Self::Start(from, to) => Self::Start(to, from),
            Self::Part(from, to) => Self::Part(to, from),
        }
    }
}

/// What follows the parts `start` at the beginning of `name`.
fn tail<'a>(name: &'a str, start: &str) -> Option<&'a str> {
    if start.is_empty() {
        return Some(name);
    }
    let rest = name.strip_prefix(start)?;
    if rest.is_empty() { Some(rest) } else { rest.strip_prefix('.') }
}

fn renamed(renames: &[Rename], name: &str) -> String {
    renames.iter().fold(name.to_string(), |name, rename| rename.apply(&name))
}

fn undone(renames: &[Rename], name: &str) -> String {
    renames.iter().rev().fold(name.to_string(), |name, rename| rename.inverse().apply(&name))
}

impl Names {
    /// How the files call a parameter that transformers calls `path`, `there` saying which names they have; `path` where none.
    pub fn stored_as(&self, path: &str, there: impl Fn(&str) -> bool) -> String {
        let mut all = self.spec_names(path).map(|name| self.stored(&name));
        all.find(|name| there(name)).unwrap_or_else(|| path.to_string())
    }

    /// transformers' path of a module of the spec.
    pub fn module(&self, name: &str) -> String {
        renamed(&self.modules, name)
    }

    /// The name in the files of a module or tensor of the spec.
    pub fn stored(&self, name: &str) -> String {
        self.layouts.get(self.layout).map_or_else(|| name.to_string(), |layout| renamed(layout, name))
    }

    /// The names of the spec that `spelled` may mean: transformers' spelling, that of any published layout, or the spec's own.
    /// The one that exists is the one meant.
    pub fn spec_names(&self, spelled: &str) -> impl Iterator<Item = String> {
        let layouts = self.layouts.iter().map(|layout| undone(layout, spelled));
        std::iter::once(undone(&self.modules, spelled)).chain(layouts).chain([spelled.to_string()])
    }

    /// The other spellings of a module path of transformers: those of the published layouts, and the spec's.
    pub fn spellings(&self, module: &str) -> impl Iterator<Item = String> {
        let name = undone(&self.modules, module);
        let layouts: Vec<String> = self.layouts.iter().map(|layout| renamed(layout, &name)).collect();
        layouts.into_iter().chain([name])
    }

    /// Whether a tensor of the files belongs to another part of a larger model.
    pub fn is_other_part(&self, stored: &str) -> bool {
        self.other_parts.iter().any(|start| tail(stored, start).is_some())
    }
}

impl ModelSpec {
    /// Settles what only the files can say: which of its layouts they have, and whether a head is among them.
    pub(super) fn settle(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let has = |names: &Names, name: &str| checkpoint.shape(&names.stored(name)).is_some();
        if self.names.layouts.len() > 1 {
            let tensors = self.tensors();
            let missing = |layout: &usize| {
                let names = Names { layout: *layout, ..self.names.clone() };
                tensors.keys().filter(|name| !has(&names, name)).count()
            };
            self.names.layout = (0..self.names.layouts.len()).min_by_key(missing).unwrap_or(0);
        }
        let own = self.names.stored(&format!("{}.weight", self.head.name));
        let shared = self.names.stored(&self.embedding.weight);
        // Where the files have another head than the embedding, the config that says they are one is wrong, as transformers sees it.
        self.names.own_head_if_stored |= self.head.tied && checkpoint.differ(&own, &shared)?;
        if self.names.own_head_if_stored && checkpoint.shape(&own).is_some() {
            self.head.tied = false;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_replaced_whole_and_back_again() {
        let moe = [Rename::Part("mlp.gate", "block_sparse_moe.gate")];
        let gate = "model.layers.0.mlp.gate.weight";
        assert_eq!(renamed(&moe, gate), "model.layers.0.block_sparse_moe.gate.weight");
        assert_eq!(undone(&moe, &renamed(&moe, gate)), gate);
        assert_eq!(renamed(&moe, "model.layers.0.mlp.gate"), "model.layers.0.block_sparse_moe.gate");
        for other in ["model.layers.0.mlp.gate_proj.weight", "a_mlp.gate.weight", "mlp"] {
            assert_eq!(renamed(&moe, other), other);
        }
    }

    #[test]
    fn a_start_may_come_and_go() {
        let bloom = [Rename::Start("transformer", "")];
        assert_eq!(renamed(&bloom, "transformer.h.0.mlp"), "h.0.mlp");
        assert_eq!(undone(&bloom, "h.0.mlp"), "transformer.h.0.mlp");
        assert_eq!(renamed(&bloom, "lm_head"), "lm_head");
        assert_eq!(renamed(&bloom, "transformers.h"), "transformers.h");
        let wrapped =
            [Rename::Start("model", "language_model.model"), Rename::Start("lm_head", "language_model.lm_head")];
        assert_eq!(renamed(&wrapped, "model.norm.weight"), "language_model.model.norm.weight");
        assert_eq!(renamed(&wrapped, "lm_head"), "language_model.lm_head");
        assert_eq!(undone(&wrapped, "language_model.model.norm.weight"), "model.norm.weight");
    }
}
