//! What will be trained, known from the spec and the recipe: names and shapes, before a weight is read.

use super::config::AdapterConfig;
use super::load::PREFIX;
use super::spelling;
use super::{Adapters, LoadedAdapter, saved, targets};
use crate::Result;
use crate::model::ModelSpec;
use crate::model::sites::Role;
use crate::recipe::AdapterRecipe;

/// What [`super::Adapters::attach`] would attach.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PlannedAdapters {
    /// Low-rank updates, in checkpoint order.
    pub updates: Vec<PlannedUpdate>,
    /// What is trained whole.
    pub saved: Vec<PlannedSaved>,
    /// Whether A and B are kept as they began, too.
    pub keeps_start: bool,
}

/// A low-rank update of one linear, or of one linear of every expert.
#[derive(Debug, Clone, PartialEq)]
pub struct PlannedUpdate {
    /// Module path, as in [`super::Update::module`].
    pub module: String,
    /// E, where it is one of every expert.
    pub experts: Option<i64>,
    /// (out, in) of the weight.
    pub shape: (i64, i64),
    /// R.
    pub rank: i64,
    /// Whether the lengths of the rows are trained, too.
    pub decomposed: bool,
}

/// A module of which the weight, or some rows of it, are trained.
#[derive(Debug, Clone, PartialEq)]
pub struct PlannedSaved {
    /// Module path.
    pub module: String,
    /// Of what is trained of its weight: (rows, in), or (D) of a norm.
    pub shape: Vec<i64>,
    /// Whether its bias is trained, too.
    pub bias: bool,
    /// Whether these are rows of a larger weight.
    pub rows: bool,
    /// The head, where it shares what is trained.
    pub shared_with: Option<String>,
}

/// E of a linear that every expert has.
fn experts(role: &Role) -> Option<i64> {
    if let Role::Experts { count, .. } = role { Some(*count) } else { None }
}

impl PlannedAdapters {
    /// What `recipe` names in a model of this spec. Of an adapter that is continued, its files are read.
    ///
    /// Errors: those of [`super::Adapters::attach`] that do not need the weights.
    pub fn of(spec: &ModelSpec, recipe: &AdapterRecipe) -> Result<Self> {
        let sites = spec.sites();
        if let Some(folder) = &recipe.adapter_name_or_path {
            let loaded = LoadedAdapter::read(folder)?;
            let updates = loaded.fit(&sites, &spec.names)?.into_values().map(|update| PlannedUpdate {
                module: update.module.clone(),
                experts: experts(&update.role),
                shape: update.shape(),
                rank: update.rank(),
                decomposed: update.lengths.is_some(),
            });
            let saved = loaded.saved(spec)?.into_iter().map(|saved| PlannedSaved {
                shape: saved.trained.leaf().size(),
                bias: saved.trained.leaves().count() > 1,
                module: saved.module,
                rows: matches!(saved.trained, crate::model::Trained::Rows { .. }),
                shared_with: saved.shared_with,
            });
            return Ok(Self { updates: updates.collect(), saved: saved.collect(), keeps_start: false });
        }
        let recipe = &spelling::respelled(recipe, &sites, &spec.names);
        let selection = targets::resolve(&sites, recipe)?;
        let config = AdapterConfig::new(recipe, &selection);
        let updates = selection.targets.iter().map(|target| {
            let site = &sites[target.index];
            PlannedUpdate {
                module: site.name.clone(),
                experts: experts(&site.role),
                shape: site.shape,
                rank: i64::from(target.r),
                decomposed: recipe.decomposes(),
            }
        });
        let saved = saved::named(spec, &config, true)?.into_iter().map(|named| {
            let mut shape = named.shape;
            if let Some(rows) = &named.rows {
                shape[0] = rows.len() as i64;
            }
            let rows = named.rows.is_some();
            PlannedSaved { module: named.module, shape, bias: named.bias, rows, shared_with: named.shared_with }
        });
        Ok(Self { updates: updates.collect(), saved: saved.collect(), keeps_start: recipe.starts_from_weights() })
    }

    /// Those that are on a model.
    pub fn attached(adapters: &Adapters) -> Self {
        let updates = adapters.updates().iter().map(|update| PlannedUpdate {
            module: update.module.clone(),
            experts: experts(&update.role),
            shape: update.shape(),
            rank: update.rank(),
            decomposed: update.lengths.is_some(),
        });
        Self { updates: updates.collect(), saved: Vec::new(), keeps_start: false }
    }

    /// Names and shapes of what is trained, fp32, as [`super::Adapters::parameters`] has them.
    pub fn parameters(&self) -> Vec<(String, Vec<i64>)> {
        let updates = self.updates.iter().flat_map(|update| {
            let PlannedUpdate { module, experts, shape: (rows, columns), rank, decomposed } = update;
            let of = |shape: [i64; 2]| experts.iter().copied().chain(shape).collect::<Vec<i64>>();
            let lengths = decomposed.then(|| ("lora_magnitude_vector", vec![*rows]));
            let factors = [("lora_A.weight", of([*rank, *columns])), ("lora_B.weight", of([*rows, *rank]))];
            factors.into_iter().chain(lengths).map(move |(name, shape)| (format!("{PREFIX}{module}.{name}"), shape))
        });
        let saved = self.saved.iter().flat_map(|saved| {
            let name = |end| format!("{PREFIX}{}{end}", saved.module);
            let weight = name(if saved.rows { saved::TOKENS } else { ".weight" });
            let bias = saved.bias.then(|| (name(saved::BIAS), vec![saved.shape[0]]));
            std::iter::once((weight, saved.shape.clone())).chain(bias)
        });
        updates.chain(saved).collect()
    }
}
