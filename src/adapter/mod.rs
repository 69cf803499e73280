//! Who gets an adapter ([`targets`]), how it starts ([`init`]), is loaded ([`load`]) and merged ([`merge`]).
//!
//! The low-rank mechanism belongs to the model ([`crate::model::LowRank`]); this room is the policy.

pub mod combine;
pub mod config;
mod decompose;
pub mod extract;
pub mod init;
pub mod layout;
pub mod load;
pub mod merge;
pub mod numbers;
pub mod plain;
mod planned;
pub mod saved;
mod singular;
mod spelling;
pub mod targets;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use tch::{Device, Kind, Tensor};

use crate::model::names::Names;
use crate::model::sites::{self, Role, Site};
use crate::model::{Decoder, Linear, LowRank};
use crate::ops::{Magnitude, magnitude};
use crate::recipe::AdapterRecipe;
use crate::torch_ext::catching;
use crate::{Error, Fault, Result};

pub use config::AdapterConfig;
pub use decompose::Origin;
use decompose::Originals;
pub use load::LoadedAdapter;
pub use numbers::TrainedOn;
pub use planned::{PlannedAdapters, PlannedSaved, PlannedUpdate};
pub use saved::Saved;
pub use targets::overview;

/// The update of one linear: `scale * B A` on its weight (out, in); or of one linear of every expert of a block.
#[derive(Debug)]
pub struct Update {
    /// Module path as transformers has it: [`Site::name`].
    pub module: String,
    /// What it updates.
    pub role: Role,
    /// A (R, in) or (E, R, in), fp32.
    pub a: Tensor,
    /// B (out, R) or (E, out, R), fp32.
    pub b: Tensor,
    /// What B A is multiplied with.
    pub scale: f64,
    /// The lengths that the rows of the updated weight are brought to (out), fp32, with DoRA.
    pub lengths: Option<Tensor>,
    /// A (R, in) and B (out, R) as they began, where `scale * B A` of them was taken off the weight before training: the whole
    /// update of the weight as it was is this one less that.
    pub taken: Option<(Tensor, Tensor)>,
}

impl Update {
    /// (out, in) of the weight it fits.
    pub fn shape(&self) -> (i64, i64) {
        let [(rows, _), (_, columns)] = [&self.b, &self.a].map(|factor| match factor.size()[..] {
            [.., rows, columns] => (rows, columns),
            _ => unreachable!("A and B have two dimensions or three"),
        });
        (rows, columns)
    }

    /// R.
    pub fn rank(&self) -> i64 {
        self.b.size().last().copied().unwrap_or_default()
    }

    /// The update of one expert alone.
    pub fn of_expert(&self, number: i64) -> Self {
        let [a, b] = [&self.a, &self.b].map(|factor| factor.select(0, number));
        Self {
            module: sites::expert(&self.module, number),
            role: Role::Linear,
            a,
            b,
            scale: self.scale,
            lengths: None,
            taken: self.taken.as_ref().map(|(a, b)| (a.select(0, number), b.select(0, number))),
        }
    }

    /// Another handle to the same tensors.
    pub fn shallow_clone(&self) -> Self {
        let (a, b) = (self.a.shallow_clone(), self.b.shallow_clone());
        let lengths = self.lengths.as_ref().map(Tensor::shallow_clone);
        let taken = self.taken.as_ref().map(|(a, b)| (a.shallow_clone(), b.shallow_clone()));
        Self { module: self.module.clone(), role: self.role.clone(), a, b, scale: self.scale, lengths, taken }
    }

    /// The same as an update of the weight as it was: of twice the rank, where something was taken off.
    pub fn of_the_original(&self) -> Self {
        let Some((a, b)) = &self.taken else { return self.shallow_clone() };
        let here = |t: &Tensor, like: &Tensor| t.to_device(like.device());
        Self {
            a: Tensor::cat(&[&self.a.detach(), &here(a, &self.a)], -2),
            b: Tensor::cat(&[&self.b.detach(), &(-here(b, &self.b))], -1),
            taken: None,
            ..self.shallow_clone()
        }
    }

    /// What is left of a weight, (out, in) or (E, out, in), without what was taken off it, fp32; `None` where nothing was.
    pub fn left(&self, weight: &Tensor) -> Option<Tensor> {
        let (a, b) = self.taken.as_ref()?;
        Some(decompose::left(weight, (a, b), self.scale))
    }

    /// What [`Update::of_the_original`] was made of.
    fn parted(self) -> Self {
        let r = self.rank() / 2;
        let part = |start: i64| (self.a.narrow(-2, start, r).contiguous(), self.b.narrow(-1, start, r).contiguous());
        let ((a, b), (first_a, first_b)) = (part(0), part(r));
        Self { a, b, taken: Some((first_a, -first_b)), ..self }
    }

    /// What is trained of it, and how PEFT's files call it.
    pub fn tensors(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        let lengths = self.lengths.iter().map(|lengths| ("lora_magnitude_vector", lengths));
        [("lora_A.weight", &self.a), ("lora_B.weight", &self.b)].into_iter().chain(lengths)
    }
}

/// What a training learned.
#[derive(Debug, Clone, Copy, Default)]
pub struct Learned<'a> {
    /// Low-rank updates of linears.
    pub updates: &'a [Update],
    /// What is trained whole.
    pub saved: &'a [Saved],
}

impl<'a> From<&'a [Update]> for Learned<'a> {
    fn from(updates: &'a [Update]) -> Self {
        Self { updates, saved: &[] }
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
    saved: Vec<Saved>,
    start: Vec<(String, Tensor)>,
}

impl Adapters {
    /// Gives the linears that `recipe` names an adapter: A drawn from `seed`, B zero, or both as `recipe` has them start, or as they
    /// are in `adapter_name_or_path`. Adapters that were there are replaced.
    ///
    /// Starts that are taken from the weights need the `origin` of a base that is kept quantised.
    ///
    /// Errors: what [`targets::resolve`], [`LoadedAdapter::read`] and [`LoadedAdapter::fit`] find wrong; a recipe that
    /// contradicts the adapter it continues; memory.
    pub fn attach(model: &mut Decoder, recipe: &AdapterRecipe, seed: u64, origin: Option<&Origin<'_>>) -> Result<Self> {
        let sites = model.spec.sites();
        if let Some(folder) = &recipe.adapter_name_or_path {
            let loaded = LoadedAdapter::read(folder)?;
            let fitted = loaded.fit(&sites, &model.spec.names)?;
            agrees(&sites, &model.spec.names, recipe, &loaded, &fitted.keys().copied().collect())?;
            return Self::attach_fitted(model, &loaded, &sites, fitted, recipe.lora_dropout, origin);
        }
        let recipe = &spelling::respelled(recipe, &sites, &model.spec.names);
        let selection = targets::resolve(&sites, recipe)?;
        let mut config = AdapterConfig::new(recipe, &selection);
        let twice = if recipe.takes_off() { 2 } else { 1 };
        config.widen(twice);
        let chosen: Vec<(usize, u32, f64)> =
            selection.targets.iter().map(|t| (t.index, twice * t.r, t.scale)).collect();
        layout::describe(&mut config, &sites, &model.spec.names, &chosen)?;
        let device = model.device;
        let originals = Originals::of(model, origin);
        let mut linears = by_name(model);
        let mut done = 0;
        let updates = selection.targets.iter().map(|target| {
            let site = &sites[target.index];
            let linear = linears.get_mut(&site.name).expect("every site has a linear");
            let update = catching(&site.name, || {
                let (a, b, taken) = match recipe.starts_from_weights() {
                    true => originals.start(site, linear, target, recipe, seed)?,
                    false => {
                        let (a, b) = fresh(site, recipe, seed, i64::from(target.r));
                        (a, b, None)
                    }
                };
                done += 1;
                originals.progress(done, selection.targets.len());
                let (module, role) = (site.name.clone(), site.role.clone());
                let (a, b, scale) = (leaf(&a, device), leaf(&b, device), target.scale);
                let update = Update { module, role, a, b, scale, lengths: None, taken };
                let lengths = recipe.decomposes().then(|| leaf(&lengths(linear, &update), device));
                let update = Update { lengths, ..update };
                linear.adapter = Some(low_rank(linear, &update, recipe.lora_dropout));
                Ok(update)
            })?;
            Ok(update)
        });
        let updates = updates.collect::<Result<Vec<_>>>()?;
        model.digests.extend(originals.digests());
        if model.spec.names.among_others && config.target_parameters.is_none() {
            // A short name would match in the parts that are not trained, too.
            config.spell_out(&updates);
        }
        let mut notices = selection.notices;
        notices.extend(tied_head(model, &updates));
        let saved = saved::attach(model, saved::named(&model.spec, &config, true)?)?;
        config.ensure_weight_tying = saved.iter().any(|saved| saved.shared_with.is_some());
        let mut adapters = Self { config, notices, updates, saved, start: Vec::new() };
        if recipe.starts_from_weights() {
            let began = adapters.parameters().into_iter().map(|(name, t)| (name, t.detach().copy()));
            let taken = decompose::taken_otherwise(recipe, &adapters.updates);
            adapters.start = began.chain(taken).collect();
        }
        Ok(adapters)
    }

    /// Attaches an adapter that was read, trained on from where it is: with `dropout` while training.
    pub fn attach_loaded(
        model: &mut Decoder,
        loaded: &LoadedAdapter,
        dropout: f64,
        origin: Option<&Origin<'_>>,
    ) -> Result<Self> {
        let sites = model.spec.sites();
        let fitted = loaded.fit(&sites, &model.spec.names)?;
        Self::attach_fitted(model, loaded, &sites, fitted, dropout, origin)
    }

    fn attach_fitted(
        model: &mut Decoder,
        loaded: &LoadedAdapter,
        sites: &[Site],
        fitted: BTreeMap<usize, Update>,
        dropout: f64,
        origin: Option<&Origin<'_>>,
    ) -> Result<Self> {
        let device = model.device;
        let originals = Originals::of(model, origin);
        let config = loaded.config_on(&fitted, sites, &model.spec.names, dropout)?;
        let mut linears = by_name(model);
        let mut updates = Vec::with_capacity(fitted.len());
        for (index, update) in fitted {
            let update = catching(&update.module, || {
                let lengths = update.lengths.as_ref().map(|lengths| leaf(lengths, device));
                let (a, b) = (leaf(&update.a, device), leaf(&update.b, device));
                let update = Update { a, b, lengths, ..update.shallow_clone() };
                let linear = linears.get_mut(&update.module).expect("every site has a linear");
                if let Some(left) = update.left(&originals.whole(&sites[index], linear)?) {
                    originals.leave(linear, &left);
                }
                linear.adapter = Some(low_rank(linear, &update, dropout));
                Ok(update)
            })?;
            updates.push(update);
        }
        model.digests.extend(originals.digests());
        let mut notices = loaded.notices.clone();
        notices.extend(tied_head(model, &updates));
        let saved: Vec<Saved> = loaded.saved(&model.spec)?.iter().map(|saved| saved.trainable(device)).collect();
        saved::put(model, &saved)?;
        Ok(Self { config, notices, updates, saved, start: Vec::new() })
    }

    /// Puts updates on the linears that they are for, to be computed with: they are not trained, and not kept.
    pub fn put(model: &mut Decoder, updates: &[Update]) -> Result<()> {
        let device = model.device;
        let mut linears = by_name(model);
        for update in updates {
            catching(&update.module, || {
                let (a, b) = (update.a.to_device(device), update.b.to_device(device));
                let update = Update { a, b, ..update.shallow_clone() };
                let linear = linears.get_mut(&update.module).expect("every update has a linear");
                linear.adapter = Some(low_rank(linear, &update, 0.0));
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Takes the adapters off again: the model is its base.
    pub fn detach(self, model: &mut Decoder) {
        for linear in model.linears_mut() {
            (linear.adapter, linear.trained) = (None, None);
        }
        model.embedding.trained = None;
        model.norms_mut().into_iter().for_each(|norm| norm.trained = None);
    }

    /// What is trained, in checkpoint order, A before B, under the keys of PEFT's files
    /// (`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`), all experts of a linear in one tensor under a key with `*`
    /// for their number. Handles, not copies.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        let parameters = self.updates.iter().flat_map(|update| {
            let named = |(name, tensor): (&str, &Tensor)| {
                (format!("{}{}.{name}", load::PREFIX, update.module), tensor.shallow_clone())
            };
            update.tensors().map(named).collect::<Vec<_>>()
        });
        let saved = self.saved.iter().flat_map(Saved::leaves);
        parameters.chain(saved).collect()
    }

    /// How many numbers are trained.
    pub fn trainable(&self) -> usize {
        let low_rank = self.updates.iter().flat_map(Update::tensors).map(|(_, tensor)| tensor.numel());
        low_rank.chain(self.saved.iter().flat_map(|saved| saved.trained.leaves()).map(Tensor::numel)).sum()
    }

    /// All that is trained.
    pub fn learned(&self) -> Learned<'_> {
        Learned { updates: &self.updates, saved: &self.saved }
    }

    /// A and B as they began, under the names of [`Adapters::parameters`], where they were taken from the weights: what
    /// [`Origin::start`] is to a later part of the run.
    pub fn start(&self) -> &[(String, Tensor)] {
        &self.start
    }

    /// The updates, in checkpoint order.
    pub fn updates(&self) -> &[Update] {
        &self.updates
    }
}

fn by_name(model: &mut Decoder) -> HashMap<String, &mut Linear> {
    model.linears_mut().into_iter().map(|linear| (linear.name.clone(), linear)).collect()
}

/// A as it starts and B, zero: (R, in) and (out, R), or (E, R, in) and (E, out, R). Every expert has an A of its own.
fn fresh(site: &Site, recipe: &AdapterRecipe, seed: u64, r: i64) -> (Tensor, Tensor) {
    let (rows, columns) = site.shape;
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let start = |name: &str| init::start(recipe.init_lora_weights, seed, name, (r, columns));
    match site.role {
        Role::Experts { count, .. } => {
            let all: Vec<Tensor> = (0..count).map(|number| start(&format!("{}.{number}", site.name))).collect();
            (Tensor::stack(&all, 0), zeros(&[count, rows, r]))
        }
        Role::Linear | Role::Router | Role::Blocks | Role::Indexer | Role::Head => {
            (start(&site.name), zeros(&[rows, r]))
        }
    }
}

/// `lora_alpha` of a scale: what [`targets::scale`] divides by the rank.
fn scale_numerator(scale: f64, r: u32, rank_stabilised: bool) -> f64 {
    let alpha = scale * if rank_stabilised { f64::from(r).sqrt() } else { f64::from(r) };
    // Whole where it was typed whole.
    if (alpha - alpha.round()).abs() < 1e-9 { alpha.round() } else { alpha }
}

/// A trained tensor of its own, on its device. Its rows lie one after the other, as those that are read from a file do: products of
/// another order round otherwise, and a run that is resumed would not go on to the same bits.
fn leaf(tensor: &Tensor, device: Device) -> Tensor {
    let own = Tensor::empty(tensor.size(), (Kind::Float, device));
    tch::no_grad(|| own.shallow_clone().copy_(&tensor.detach()));
    own.set_requires_grad(true)
}

fn low_rank(linear: &Linear, update: &Update, dropout: f64) -> LowRank {
    let magnitude = update
        .lengths
        .as_ref()
        .map(|lengths| Magnitude { lengths: lengths.shallow_clone(), squares: magnitude::squares(&linear.weight) });
    LowRank { a: update.a.shallow_clone(), b: update.b.shallow_clone(), scale: update.scale, dropout, magnitude }
}

/// The lengths (out), fp32, of the rows of a linear's weight with its update: where DoRA starts.
fn lengths(linear: &Linear, update: &Update) -> Tensor {
    let squares = magnitude::squares(&linear.weight);
    magnitude::lengths(&linear.weight.dense(), &squares, &update.a, &(update.b.detach() * update.scale))
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
fn agrees(
    sites: &[Site],
    names: &Names,
    recipe: &AdapterRecipe,
    loaded: &LoadedAdapter,
    fitted: &BTreeSet<usize>,
) -> Result<()> {
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
    if recipe.decomposes() && !config.use_dora {
        differs("use_dora", "true".into(), "false".into());
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
    if !typed.iter().all(|pair| found.contains(pair)) {
        differs("rank_pattern", format!("{typed:?}"), format!("{found:?}"));
    }
    let typed = sorted(recipe.alpha_pattern.clone().into_iter().collect());
    let found = sorted(config.alpha_pattern.clone());
    if !typed.iter().all(|pair| found.contains(pair)) {
        differs("alpha_pattern", format!("{typed:?}"), format!("{found:?}"));
    }
    let names_modules = recipe.target_modules != default.target_modules
        || recipe.exclude_modules.is_some()
        || recipe.layers_to_transform.is_some();
    if names_modules {
        let only_targets = AdapterRecipe {
            target_modules: recipe.target_modules.clone(),
            exclude_modules: recipe.exclude_modules.clone(),
            layers_to_transform: recipe.layers_to_transform.clone(),
            ..default
        };
        let selection = targets::resolve(sites, &spelling::respelled(&only_targets, sites, names))?;
        let typed: BTreeSet<usize> = selection.targets.iter().map(|target| target.index).collect();
        if let Some(&one) = typed.symmetric_difference(fitted).next() {
            let which = if typed.contains(&one) { "without" } else { "with" };
            differs(
                "target_modules",
                format!("{} modules", typed.len()),
                format!("{}, {which} {}", fitted.len(), sites[one].name),
            );
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(Error::Recipe(faults)) }
}
