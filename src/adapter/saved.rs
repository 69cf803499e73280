//! What is trained whole beside low-rank updates: modules (PEFT's `modules_to_save`) and rows of tokens (`trainable_token_indices`).
//!
//! A head that shares the embedding's weight goes on sharing it, as PEFT has it with `ensure_weight_tying`; PEFT without it leaves
//! such a head behind when the embedding alone is named. Named both, they part.

use std::collections::HashSet;

use tch::{Device, Kind, Tensor};

use super::config::AdapterConfig;
use super::load::PREFIX;
use super::targets::{is_suffix, overview};
use crate::model::sites::{Role, Site};
use crate::model::{Decoder, Linear, ModelSpec, Trained};
use crate::ops::{Norm, TrainedNorm};
use crate::recipe::TokenIndices;
use crate::{Error, Fault, Result};

/// A module of which the weight, or some rows of it, are trained.
#[derive(Debug)]
pub struct Saved {
    /// Its path as transformers has it.
    pub module: String,
    /// What is trained.
    pub trained: Trained,
    /// The head, where it shares the weight.
    pub shared_with: Option<String>,
}

/// How the key of a token adapter ends.
pub(super) const TOKENS: &str = ".token_adapter.trainable_tokens_delta";

impl Saved {
    /// Another handle to the same tensors.
    pub fn handle(&self) -> Self {
        Self { module: self.module.clone(), trained: self.trained.handle(), shared_with: self.shared_with.clone() }
    }

    /// The same as tensors to be trained on from here, on a device.
    pub(super) fn trainable(&self, device: Device) -> Self {
        let trained = match &self.trained {
            Trained::Whole { weight, bias } => Trained::Whole {
                weight: leaf(&weight.to_device(device)),
                bias: bias.as_ref().map(|bias| leaf(&bias.to_device(device))),
            },
            Trained::Rows { ids, rows } => {
                Trained::Rows { ids: ids.to_device(device), rows: leaf(&rows.to_device(device)) }
            }
        };
        Self { module: self.module.clone(), trained, shared_with: self.shared_with.clone() }
    }

    /// How its key ends in PEFT's files.
    pub(super) fn end(&self) -> &'static str {
        match &self.trained {
            Trained::Whole { .. } => ".weight",
            Trained::Rows { .. } => TOKENS,
        }
    }

    /// What is trained under the keys of PEFT's files.
    pub fn leaves(&self) -> impl Iterator<Item = (String, Tensor)> {
        let ends = [self.end(), BIAS].into_iter().zip(self.trained.leaves());
        ends.map(|(end, leaf)| (format!("{PREFIX}{}{end}", self.module), leaf.shallow_clone()))
    }

    /// Its tensors under the keys of PEFT's files: what is trained, and the weight once more for a head that shares it whole.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        // PEFT gives the head the embedding's rows by itself.
        let shared = self.shared_with.as_ref().filter(|_| matches!(self.trained, Trained::Whole { .. }));
        let again =
            shared.map(|module| (format!("{PREFIX}{module}{}", self.end()), self.trained.leaf().shallow_clone()));
        self.leaves().chain(again).collect()
    }
}

/// How the key of a bias ends.
pub(super) const BIAS: &str = ".bias";

/// A module that is named to be trained whole, or by some rows.
pub(super) struct Named {
    pub(super) module: String,
    /// Of its weight.
    pub(super) shape: Vec<i64>,
    /// Whether it has a bias.
    pub(super) bias: bool,
    /// Which rows; all where there is none.
    pub(super) rows: Option<Vec<i64>>,
    pub(super) shared_with: Option<String>,
}

/// What a configuration names, in a model of this spec. `ensure_weight_tying`: see above.
///
/// # Errors
/// [`Error::Recipe`] for what is no such module or token, and for a module named twice.
pub(super) fn named(spec: &ModelSpec, config: &AdapterConfig, ensure_weight_tying: bool) -> Result<Vec<Named>> {
    const MODULES: &str = "adapter.modules_to_save";
    let mut all: Vec<Named> = Vec::new();
    for typed in config.modules_to_save.iter().flatten() {
        let known = known(spec);
        // As PEFT has it, wherever the end begins: `norm` is every norm.
        let (meant, others): (Vec<_>, Vec<_>) = known.into_iter().partition(|one| one.module.ends_with(typed.as_str()));
        if meant.is_empty() {
            let what = format!("'{typed}' is no module that can be trained whole");
            let names: Vec<&str> = others.iter().map(|one| one.module.as_str()).collect();
            let hint = format!("those are: {}", overview(&names));
            return Err(Error::Recipe(vec![Fault::new(MODULES, what).hint(hint)]));
        }
        for one in meant {
            if !all.iter().any(|other| other.module == one.module) {
                all.push(one);
            }
        }
    }
    let of_tokens = match &config.trainable_token_indices {
        Some(indices) => rows(spec, indices)?,
        None => Vec::new(),
    };
    for (module, rows) in of_tokens {
        if all.iter().any(|other| other.module == module) {
            let fault = Fault::new(MODULES, format!("{module} is to be trained whole and by its rows"));
            return Err(Error::Recipe(vec![fault.hint("name it in modules_to_save or in trainable_token_indices")]));
        }
        let shape = vec![spec.vocab_size, spec.hidden_size];
        all.push(Named { module, shape, bias: false, rows: Some(rows), shared_with: None });
    }
    let head = head(spec);
    if spec.head.tied && !all.iter().any(|other| other.module == head) {
        let embedding = embedding(spec);
        let shared = |one: &&mut Named| one.module == embedding && (ensure_weight_tying || one.rows.is_some());
        all.iter_mut().filter(shared).for_each(|one| one.shared_with = Some(head.clone()));
    }
    Ok(all)
}

/// Whose rows `indices` names: the embedding's where it is a list.
fn rows(spec: &ModelSpec, indices: &TokenIndices) -> Result<Vec<(String, Vec<i64>)>> {
    let fault = |what: String, hint: String| {
        Err(Error::Recipe(vec![Fault::new("adapter.trainable_token_indices", what).hint(hint)]))
    };
    let of_modules = match indices {
        TokenIndices::Embedding(ids) => vec![(embedding(spec), ids.clone())],
        TokenIndices::Modules(modules) => {
            let tables = [embedding(spec), head(spec)];
            let mut found = Vec::new();
            for (typed, ids) in modules {
                let Some(meant) = tables.iter().find(|name| is_suffix(typed, name)) else {
                    let hint = format!("those are {} and {}", tables[0], tables[1]);
                    return fault(format!("'{typed}' neither makes vectors of tokens nor tokens of vectors"), hint);
                };
                found.push((meant.clone(), ids.clone()));
            }
            found
        }
    };
    // In their order, which is that of the rows in the file.
    let mut checked = Vec::new();
    for (module, ids) in of_modules {
        let mut seen = HashSet::new();
        if let Some(again) = ids.iter().find(|id| !seen.insert(**id)) {
            return fault(format!("names {again} twice"), "name every token once".into());
        }
        match ids.iter().max() {
            None => return fault("is an empty list".into(), "leave it out, or name the tokens to train".into()),
            Some(&last) if i64::from(last) >= spec.vocab_size => {
                let hint = format!("its tokens are 0 to {}", spec.vocab_size - 1);
                return fault(format!("{last} is no token of this base"), hint);
            }
            Some(_) => checked.push((module, ids.into_iter().map(i64::from).collect())),
        }
    }
    Ok(checked)
}

/// Trains what is named, from the base's own numbers on.
///
/// # Errors
/// [`Error::Recipe`] where a module has a low-rank adapter, too.
pub(super) fn attach(model: &mut Decoder, named: Vec<Named>) -> Result<Vec<Saved>> {
    let mut saved: Vec<Saved> = Vec::new();
    for Named { module, shape, rows, shared_with, .. } in named {
        if let Some(norm) = norm(model, &module) {
            // As it is stored: without what the model adds to it.
            let weight = leaf(&(&norm.weight - norm.offset).view(&shape[..]));
            let trained = Trained::Whole { weight, bias: norm.bias.as_ref().map(leaf) };
            saved.push(Saved { module, trained, shared_with });
            continue;
        }
        let (weight, bias) = match module == model.embedding.name {
            true => (model.embedding.table.shallow_clone(), None),
            false => {
                let linear = linear(model, &module);
                (linear.weight.dense(), linear.bias.as_ref().map(Tensor::shallow_clone))
            }
        };
        let trained = match rows {
            None => Trained::Whole { weight: leaf(&weight), bias: bias.as_ref().map(leaf) },
            Some(ids) => {
                let ids = Tensor::from_slice(&ids).to_device(weight.device());
                Trained::Rows { rows: leaf(&weight.index_select(0, &ids)), ids }
            }
        };
        saved.push(Saved { module, trained, shared_with });
    }
    put(model, &saved)?;
    Ok(saved)
}

/// Puts what is trained in place.
///
/// # Errors
/// [`Error::Recipe`] where a module has a low-rank adapter, too.
pub(super) fn put(model: &mut Decoder, saved: &[Saved]) -> Result<()> {
    for one in saved {
        for module in [Some(&one.module), one.shared_with.as_ref()].into_iter().flatten() {
            if *module == model.embedding.name {
                model.embedding.trained = Some(one.trained.handle());
                continue;
            }
            if let Some(norm) = norm(model, module) {
                let bias = one.trained.bias().map(Tensor::shallow_clone);
                norm.trained = Some(TrainedNorm { weight: one.trained.leaf().shallow_clone(), bias });
                continue;
            }
            let linear = linear(model, module);
            if linear.adapter.is_some() {
                let fault = Fault::new("adapter", format!("{module} is trained itself and has a low-rank adapter"));
                return Err(Error::Recipe(vec![fault.hint("leave it out in one of both; see exclude_modules")]));
            }
            linear.trained = Some(one.trained.handle());
        }
    }
    Ok(())
}

fn linear<'a>(model: &'a mut Decoder, module: &str) -> &'a mut Linear {
    let mut linears = model.linears_mut().into_iter();
    linears.find(|linear| linear.name == module).expect("every site has a linear")
}

fn norm<'a>(model: &'a mut Decoder, module: &str) -> Option<&'a mut Norm> {
    model.norms_mut().into_iter().find(|norm| norm.name == module)
}

/// Modules whose weights can be trained whole: the embedding, linears, norms.
pub(super) fn known(spec: &ModelSpec) -> Vec<Named> {
    let tensors = spec.tensors();
    let of = |module, shape, bias| Named { module, shape, bias, rows: None, shared_with: None };
    let table = of(embedding(spec), vec![spec.vocab_size, spec.hidden_size], false);
    let linears = spec.sites().into_iter().filter(|site| matches!(site.role, Role::Linear | Role::Head));
    let biased = |module: &str| {
        let biases = spec.names.spec_names(module).map(|name| format!("{name}{BIAS}"));
        biases.into_iter().any(|bias| tensors.contains_key(&bias))
    };
    let linears = linears.map(|Site { name, shape, .. }| {
        let bias = biased(&name);
        of(name, vec![shape.0, shape.1], bias)
    });
    let norms = spec
        .trainable_norms()
        .into_iter()
        .filter_map(|norm| Some(of(spec.names.module(norm.module()?), norm.shape.clone(), norm.bias.is_some())));
    [table].into_iter().chain(linears).chain(norms).collect()
}

fn embedding(spec: &ModelSpec) -> String {
    spec.names.module(spec.embedding.weight.trim_end_matches(".weight"))
}

fn head(spec: &ModelSpec) -> String {
    spec.names.module(&spec.head.name)
}

pub(super) fn leaf(weight: &Tensor) -> Tensor {
    weight.detach().to_kind(Kind::Float).copy().set_requires_grad(true)
}
