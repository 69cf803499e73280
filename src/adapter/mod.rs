//! Who gets an adapter ([`targets`]), how it starts ([`init`]), is loaded ([`load`]) and merged ([`merge`]).
//!
//! The low-rank mechanism belongs to the model ([`crate::model::LowRank`]); this room is the policy.

pub mod config;
pub mod init;
pub mod load;
pub mod merge;
mod spelling;
pub mod targets;

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use tch::{Device, Kind, Tensor};

use crate::model::{Decoder, LowRank};
use crate::recipe::{AdapterRecipe, Targets};
use crate::torch_ext::catching;
use crate::{Error, Fault, Result};

pub use config::AdapterConfig;
pub use load::LoadedAdapter;
pub use targets::overview;

/// The update of one linear: `scale * B A` on its weight (out, in).
#[derive(Debug)]
pub struct Update {
    /// Module path, as transformers has it.
    pub module: String,
    /// A (R, in), fp32.
    pub a: Tensor,
    /// B (out, R), fp32.
    pub b: Tensor,
    /// What B A is multiplied with.
    pub scale: f64,
}

impl Update {
    /// (out, in) of the weight it fits.
    pub fn shape(&self) -> (i64, i64) {
        (self.b.size()[0], self.a.size()[1])
    }

    /// Another handle to the same tensors.
    pub fn shallow_clone(&self) -> Self {
        let Self { module, a, b, scale } = self;
        Self { module: module.clone(), a: a.shallow_clone(), b: b.shallow_clone(), scale: *scale }
    }
}

/// The adapters attached to a model: handles to their tensors, and what their config will say.
#[derive(Debug)]
pub struct Adapters {
    /// What `adapter_config.json` will say. The base's name is for the caller to set.
    pub config: AdapterConfig,
    /// What the user should know, in plain sentences.
    pub notices: Vec<String>,
    /// In checkpoint order.
    updates: Vec<Update>,
}

impl Adapters {
    /// Gives the linears that `recipe` names an adapter: A drawn from `seed`, B zero, or both as they are in
    /// `adapter_name_or_path`. Adapters that were there are replaced.
    ///
    /// Errors: what [`targets::resolve`], [`LoadedAdapter::read`] and [`LoadedAdapter::fit`] find wrong; a recipe that
    /// contradicts the adapter it continues; memory.
    pub fn attach(model: &mut Decoder, recipe: &AdapterRecipe, seed: u64) -> Result<Self> {
        if let Some(folder) = &recipe.adapter_name_or_path {
            let loaded = LoadedAdapter::read(folder)?;
            let indices = loaded.fit(&linears(model), &model.spec.names)?;
            agrees(model, recipe, &loaded, &indices)?;
            return Self::attach_loaded(model, &loaded, recipe.lora_dropout);
        }
        let head = model.spec.names.module(&model.spec.head.name);
        let recipe = &respelled(model, recipe);
        let selection = targets::resolve(&linears(model), &head, recipe)?;
        let device = model.device;
        let mut all = model.linears_mut();
        let updates = selection.targets.iter().map(|target| {
            let linear = &mut all[target.index];
            let (rows, columns) = linear.shape();
            let r = i64::from(target.r);
            let update = catching(&linear.name, || {
                let a = init::start(recipe.init_lora_weights, seed, &linear.name, (r, columns)); // (R, in)
                let b = Tensor::zeros([rows, r], (Kind::Float, Device::Cpu)); // (out, R)
                Ok(Update {
                    module: linear.name.clone(),
                    a: leaf(&a, device),
                    b: leaf(&b, device),
                    scale: target.scale,
                })
            })?;
            linear.adapter = Some(low_rank(&update, recipe.lora_dropout));
            Ok(update)
        });
        let updates = updates.collect::<Result<Vec<_>>>()?;
        let mut config = AdapterConfig::new(recipe, &selection);
        if model.spec.names.among_others {
            // A short name would match in the parts that are not trained, too.
            config.spell_out(&updates);
        }
        let mut notices = selection.notices;
        notices.extend(tied_head(model, &updates));
        Ok(Self { config, notices, updates })
    }

    /// Attaches an adapter that was read, trained on from where it is: with `dropout` while training.
    pub fn attach_loaded(model: &mut Decoder, loaded: &LoadedAdapter, dropout: f64) -> Result<Self> {
        let indices = loaded.fit(&linears(model), &model.spec.names)?;
        let device = model.device;
        let mut all = model.linears_mut();
        let mut updates = Vec::with_capacity(indices.len());
        for (update, &index) in loaded.updates.iter().zip(&indices) {
            let update = catching(&update.module, || {
                let (a, b) = (leaf(&update.a, device), leaf(&update.b, device));
                Ok(Update { module: all[index].name.clone(), a, b, scale: update.scale })
            })?;
            all[index].adapter = Some(low_rank(&update, dropout));
            updates.push((index, update));
        }
        let otherwise_spelled =
            loaded.updates.iter().zip(&updates).any(|(theirs, (_, ours))| theirs.module != ours.module);
        updates.sort_by_key(|(index, _)| *index);
        let updates: Vec<Update> = updates.into_iter().map(|(_, update)| update).collect();
        let mut config = AdapterConfig { lora_dropout: dropout, ..loaded.config.clone() };
        // Null where PEFT was to guess from the model's type.
        config
            .target_modules
            .get_or_insert_with(|| Targets::Names(updates.iter().map(|update| update.module.clone()).collect()));
        if otherwise_spelled {
            config.spell_out(&updates);
        }
        let mut notices = loaded.notices.clone();
        notices.extend(tied_head(model, &updates));
        Ok(Self { config, notices, updates })
    }

    /// Takes the adapters off again: the model is its base.
    pub fn detach(self, model: &mut Decoder) {
        for linear in model.linears_mut() {
            linear.adapter = None;
        }
    }

    /// What is trained, in checkpoint order, A before B, under the keys of PEFT's files
    /// (`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`). Handles, not copies.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        named(&self.updates).map(|(key, tensor)| (key, tensor.shallow_clone())).collect()
    }

    /// How many numbers are trained.
    pub fn trainable(&self) -> usize {
        self.updates.iter().map(|update| update.a.numel() + update.b.numel()).sum()
    }

    /// The updates, in checkpoint order.
    pub fn updates(&self) -> &[Update] {
        &self.updates
    }
}

/// A and B of each update under their keys in PEFT's files.
pub fn named(updates: &[Update]) -> impl Iterator<Item = (String, &Tensor)> {
    updates.iter().flat_map(|update| {
        [("A", &update.a), ("B", &update.b)]
            .map(|(which, tensor)| (format!("{}{}.lora_{which}.weight", load::PREFIX, update.module), tensor))
    })
}

fn respelled(model: &Decoder, recipe: &AdapterRecipe) -> AdapterRecipe {
    let all = linears(model);
    spelling::respelled(recipe, &all.iter().map(|(name, _)| *name).collect::<Vec<_>>(), &model.spec.names)
}

fn linears(model: &Decoder) -> Vec<(&str, (i64, i64))> {
    model.linears().into_iter().map(|linear| (linear.name.as_str(), linear.shape())).collect()
}

/// A trained tensor of its own, on its device.
fn leaf(tensor: &Tensor, device: Device) -> Tensor {
    tensor.to_device(device).detach().copy().set_requires_grad(true)
}

fn low_rank(update: &Update, dropout: f64) -> LowRank {
    LowRank { a: update.a.shallow_clone(), b: update.b.shallow_clone(), scale: update.scale, dropout }
}

fn tied_head(model: &Decoder, updates: &[Update]) -> Option<String> {
    let head = model.spec.names.module(&model.spec.head.name);
    (model.spec.head.tied && updates.iter().any(|update| update.module == head)).then(|| {
        format!(
            "{head} shares its weight with the embedding and gets an adapter of its own: a merged model has to store both, and \
             llama.cpp refuses the adapter"
        )
    })
}

/// What a recipe says of an adapter it continues must be what that adapter is. What it leaves at the default, it does not say.
fn agrees(model: &Decoder, recipe: &AdapterRecipe, loaded: &LoadedAdapter, indices: &[usize]) -> Result<()> {
    let (config, default) = (&loaded.config, AdapterRecipe::default());
    let mut faults = Vec::new();
    let mut differs = |key: &str, typed: String, found: String| {
        faults.push(
            Fault::new(
                format!("adapter.{key}"),
                format!("is {typed}, but the adapter continued from has {found} ({})", loaded.folder.display()),
            )
            .hint("an adapter is continued as it is: remove this key, or say the same"),
        );
    };
    if recipe.r != default.r && recipe.r != config.r {
        differs("r", recipe.r.to_string(), config.r.to_string());
    }
    if recipe.lora_alpha != default.lora_alpha && recipe.lora_alpha != config.lora_alpha {
        differs("lora_alpha", recipe.lora_alpha.to_string(), config.lora_alpha.to_string());
    }
    if recipe.use_rslora && !config.use_rslora {
        differs("use_rslora", "true".into(), "false".into());
    }
    let sorted = |mut pairs: Vec<(String, f64)>| {
        pairs.sort_by(|a, b| a.0.cmp(&b.0));
        pairs
    };
    let ranks = |pairs: &mut dyn Iterator<Item = (&String, &u32)>| {
        sorted(pairs.map(|(key, r)| (key.clone(), f64::from(*r))).collect())
    };
    let typed = ranks(&mut recipe.rank_pattern.iter());
    let found = ranks(&mut config.rank_pattern.iter().map(|(key, r)| (key, r)));
    if !typed.is_empty() && typed != found {
        differs("rank_pattern", format!("{typed:?}"), format!("{found:?}"));
    }
    let typed = sorted(recipe.alpha_pattern.clone().into_iter().collect());
    let found = sorted(config.alpha_pattern.clone());
    if !typed.is_empty() && typed != found {
        differs("alpha_pattern", format!("{typed:?}"), format!("{found:?}"));
    }
    let names_modules = recipe.target_modules != default.target_modules
        || recipe.exclude_modules.is_some()
        || recipe.layers_to_transform.is_some();
    if names_modules {
        let all = linears(model);
        let only_targets = AdapterRecipe {
            target_modules: recipe.target_modules.clone(),
            exclude_modules: recipe.exclude_modules.clone(),
            layers_to_transform: recipe.layers_to_transform.clone(),
            ..default
        };
        let head = model.spec.names.module(&model.spec.head.name);
        let selection = targets::resolve(&all, &head, &respelled(model, &only_targets))?;
        let typed: BTreeSet<usize> = selection.targets.iter().map(|target| target.index).collect();
        let found: BTreeSet<usize> = indices.iter().copied().collect();
        if let Some(&one) = typed.symmetric_difference(&found).next() {
            let which = if typed.contains(&one) { "without" } else { "with" };
            differs(
                "target_modules",
                format!("{} modules", typed.len()),
                format!("{}, {which} {}", found.len(), all[one].0),
            );
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(Error::Recipe(faults)) }
}
