//! Where adapters can be attached, known from the spec alone.

use super::spec::{ExpertLinear, LinearSpec, Stored};

/// A linear, or one linear of every expert of a block.
#[derive(Debug, Clone, PartialEq)]
pub struct Site {
    /// Module path as transformers has it; with `*` for the number of an expert where experts are stored apart.
    pub name: String,
    /// (out, in).
    pub shape: (i64, i64),
    /// What it is to the model.
    pub role: Role,
}

/// What a linear is to the model.
#[derive(Debug, Clone, PartialEq)]
pub enum Role {
    /// One of a block's.
    Linear,
    /// Chooses experts.
    Router,
    /// Block-diagonal: PEFT knows it as a parameter only.
    Blocks,
    /// Chooses what is looked at: no gradient reaches it.
    Indexer,
    /// Makes logits.
    Head,
    /// One linear of every expert.
    Experts {
        /// E.
        count: i64,
        /// How the checkpoint has them.
        stored: Stored,
        /// Path of the parameter in transformers.
        parameter: String,
    },
}

impl Site {
    pub(super) fn of(spec: &LinearSpec, role: Role) -> Self {
        Self { name: spec.name.clone(), shape: (spec.output, spec.input), role }
    }

    pub(super) fn of_experts(spec: &ExpertLinear) -> Self {
        let role = Role::Experts { count: spec.experts, stored: spec.stored, parameter: spec.parameter.clone() };
        Self { name: spec.name.clone(), shape: (spec.output, spec.input), role }
    }

    /// Numbers of its weight, those of all experts.
    pub fn numbers(&self) -> i64 {
        let experts = if let Role::Experts { count, .. } = self.role { count } else { 1 };
        experts * self.shape.0 * self.shape.1
    }

    /// Paths in transformers of the parameters its weight is made of: of each expert, where they are stored apart.
    pub fn parameters(&self) -> Vec<String> {
        match &self.role {
            Role::Experts { stored: Stored::Together | Stored::Transposed { .. }, .. } => vec![self.name.clone()],
            _ => self.modules().into_iter().map(|module| format!("{module}.weight")).collect(),
        }
    }

    /// Whether it can be kept quantised: not what chooses experts, nor a head that is the embedding.
    pub fn quantisable(&self, tied_head: bool) -> bool {
        match self.role {
            Role::Router => false,
            Role::Head => !tied_head,
            Role::Linear | Role::Blocks | Role::Indexer | Role::Experts { .. } => true,
        }
    }

    /// Module paths: of each expert, where they are stored apart.
    pub fn modules(&self) -> Vec<String> {
        match self.role {
            Role::Experts { count, stored: Stored::Apart, .. } => (0..count).map(|e| expert(&self.name, e)).collect(),
            _ => vec![self.name.clone()],
        }
    }
}

/// The path of one expert's module.
pub fn expert(name: &str, number: i64) -> String {
    name.replacen('*', &number.to_string(), 1)
}
