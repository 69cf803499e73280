//! Several adapters of one base as one, with weights: what PEFT 0.21.2's `add_weighted_adapter` computes.
//!
//! Either the factors are combined (`linear`, `ties`, `dare_linear`, `dare_ties`, `magnitude_prune`): A and B each with weights
//! `sqrt(|w s|)`, A's with the sign of `w s`, so that a lone adapter comes out as it was; or their products are, which are then split
//! again by their largest singular values (the kinds that end in `svd`); or the factors are put beside each other (`cat`), which is
//! exact. Where an adapter has no update of a module, the others alone count there.
//!
//! What is written has scale 1. PEFT leaves `use_rslora` of the first adapter in the config, which makes the sum too strong by the
//! root of the rank; here it is off.

mod arithmetic;
mod numbers;

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};
use tch::Tensor;

use self::arithmetic::{Pruning, Sum};
pub use self::numbers::trained_on;
use super::config::AdapterConfig;
use super::singular::Largest;
use super::{LoadedAdapter, Update};
use crate::recipe::{InitLora, Targets};
use crate::torch_ext::{catching, keep_mask};
use crate::{Error, Fault, Result};

/// How adapters are combined. Names are PEFT's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Method {
    /// Weighted sums of A and of B: fast, and rough, since the product of sums is not the sum of products.
    Linear,
    /// A and B side by side: exact, at the sum of the ranks.
    Cat,
    /// The weighted sum of the products, split again: the best there is of that rank.
    Svd,
    /// TIES (arXiv:2306.01708) on A and B: small numbers are dropped, then those against the majority's sign.
    Ties,
    /// TIES on the products, split again.
    TiesSvd,
    /// DARE (arXiv:2311.03099) on A and B: numbers are dropped at random, and the rest made larger.
    DareLinear,
    /// DARE, then the majority's sign, on A and B.
    DareTies,
    /// DARE on the products, split again.
    DareLinearSvd,
    /// DARE, then the majority's sign, on the products, split again.
    DareTiesSvd,
    /// Weighted sums of the largest numbers of A and of B.
    MagnitudePrune,
    /// The weighted sum of the largest numbers of the products, split again.
    MagnitudePruneSvd,
}

/// What counts as the majority's sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
#[value(rename_all = "lowercase")]
pub enum MajoritySign {
    /// That of the sum.
    #[default]
    Total,
    /// That of more adapters.
    Frequency,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Combination {
    /// How.
    pub method: Method,
    /// One for each adapter; it may be negative.
    pub weights: Vec<f64>,
    /// The share of numbers that are kept, where some are dropped: above 0, at most 1.
    pub density: Option<f64>,
    /// Whose sign counts, with TIES.
    pub majority: MajoritySign,
    /// R of what is split again; the largest there is where not given.
    pub rank: Option<u32>,
    /// Seed of what is dropped at random.
    pub seed: u64,
}

impl Method {
    /// Its name, as it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Cat => "cat",
            Self::Svd => "svd",
            Self::Ties => "ties",
            Self::TiesSvd => "ties_svd",
            Self::DareLinear => "dare_linear",
            Self::DareTies => "dare_ties",
            Self::DareLinearSvd => "dare_linear_svd",
            Self::DareTiesSvd => "dare_ties_svd",
            Self::MagnitudePrune => "magnitude_prune",
            Self::MagnitudePruneSvd => "magnitude_prune_svd",
        }
    }

    fn splits(self) -> bool {
        self.name().ends_with("svd")
    }

    fn prunes(self) -> bool {
        !matches!(self, Self::Linear | Self::Cat | Self::Svd)
    }

    /// What is dropped, and how the rest is summed.
    fn arithmetic(self, majority: MajoritySign) -> (Pruning, Sum) {
        let signed = Sum::Majority(majority);
        match self {
            Self::Linear | Self::Cat | Self::Svd => (Pruning::None, Sum::All),
            Self::Ties | Self::TiesSvd => (Pruning::Smallest, signed),
            Self::DareLinear | Self::DareLinearSvd => (Pruning::Random, Sum::All),
            Self::DareTies | Self::DareTiesSvd => (Pruning::Random, signed),
            Self::MagnitudePrune | Self::MagnitudePruneSvd => (Pruning::Smallest, Sum::All),
        }
    }
}

/// Several adapters as one.
#[derive(Debug)]
pub struct Combined {
    /// What its config says.
    pub config: AdapterConfig,
    /// At scale 1, in the order of their modules.
    pub updates: Vec<Update>,
    /// Of sums that are split again, how far the factors are from them: `|D - B A| / |D|` of all modules together.
    pub relative_error: Option<f64>,
}

/// The adapters as one. `progress` is called with modules done and in all.
///
/// Errors, each naming the adapter: less than one adapter or another number of weights; a density or rank that is missing, or of no
/// use, or out of range; DoRA, modules trained whole or adapted parameters (experts), which have no weighted sum in PEFT either;
/// ranks that differ where factors are summed; modules whose shapes differ, as those of adapters for two bases do.
pub fn combine(adapters: &[LoadedAdapter], how: &Combination, progress: &dyn Fn(u64, u64)) -> Result<Combined> {
    let keep = |like: &Tensor, name: &str, density: f64| keep_mask(like, density, mask_seed(how.seed, name));
    combined(adapters, how, &keep, progress)
}

/// [`combine`] with the masks of what is kept at random: 1 where a number stays, for the tensor `like` of that name.
fn combined(
    adapters: &[LoadedAdapter],
    how: &Combination,
    keep: &dyn Fn(&Tensor, &str, f64) -> Tensor,
    progress: &dyn Fn(u64, u64),
) -> Result<Combined> {
    // As in PEFT: of one alone there is nothing to weigh against.
    let method = if adapters.len() == 1 { Method::Linear } else { how.method };
    prove(adapters, how, method)?;
    let ranks: Vec<u32> = adapters.iter().map(|adapter| largest_rank(&adapter.config)).collect();
    let largest = ranks.iter().copied().max().unwrap_or(1);
    let rank = match method {
        Method::Cat => ranks.iter().sum(),
        _ if method.splits() => how.rank.unwrap_or(largest),
        _ => largest,
    };
    let mut modules: BTreeMap<&str, Vec<(usize, &Update)>> = BTreeMap::new();
    for (index, adapter) in adapters.iter().enumerate() {
        for update in &adapter.updates {
            modules.entry(&update.module).or_default().push((index, update));
        }
    }
    let density = how.density.unwrap_or(1.0);
    let (mut updates, count) = (Vec::with_capacity(modules.len()), modules.len() as u64);
    let (mut all, mut missed) = (0.0, 0.0);
    for (module, of_it) in modules {
        same_shapes(adapters, module, &of_it, method)?;
        let weighted: Vec<f64> = of_it.iter().map(|(index, update)| how.weights[*index] * update.scale).collect();
        let sum = |tensors: &[Tensor], weights: &[f64], part: &str| {
            let masks =
                |number: usize, like: &Tensor| keep(like, &format!("{}.{module}.{part}", of_it[number].0), density);
            arithmetic::sum(tensors, weights, method.arithmetic(how.majority), density, &masks)
        };
        let (a, b) = match method {
            Method::Cat => {
                let a: Vec<Tensor> =
                    of_it.iter().map(|(index, update)| &update.a * how.weights[*index] * update.scale).collect();
                let b: Vec<&Tensor> = of_it.iter().map(|(_, update)| &update.b).collect();
                (Tensor::cat(&a, 0), Tensor::cat(&b, 1))
            }
            _ if method.splits() => {
                let largest = catching(module, || match method {
                    // The sum of products is the product of the factors beside each other: nothing large is ever made.
                    Method::Svd => {
                        let a: Vec<&Tensor> = of_it.iter().map(|(_, update)| &update.a).collect();
                        let b: Vec<Tensor> =
                            of_it.iter().zip(&weighted).map(|((_, update), weight)| &update.b * *weight).collect();
                        Ok(Largest::of_product(&Tensor::cat(&b, 1), &Tensor::cat(&a, 0), i64::from(rank)))
                    }
                    _ => {
                        let products: Vec<Tensor> =
                            of_it.iter().map(|(_, update)| update.b.mm(&update.a) * update.scale).collect(); // (out, in)
                        let weights: Vec<f64> = of_it.iter().map(|(index, _)| how.weights[*index]).collect();
                        Ok(Largest::of(&sum(&products, &weights, "product"), i64::from(rank)))
                    }
                })?;
                all += largest.all;
                missed += largest.missed;
                largest.in_b()
            }
            _ => {
                let of = |part: fn(&Update) -> &Tensor| -> Vec<Tensor> {
                    of_it.iter().map(|(_, update)| part(update).shallow_clone()).collect()
                };
                let roots: Vec<f64> = weighted.iter().map(|weight| weight.abs().sqrt()).collect();
                let signed: Vec<f64> = roots
                    .iter()
                    .zip(&weighted)
                    .map(|(root, weight)| if *weight < 0.0 { -root } else { *root })
                    .collect();
                (sum(&of(|u| &u.a), &signed, "lora_A"), sum(&of(|u| &u.b), &roots, "lora_B"))
            }
        };
        let update = Update { a, b, scale: 1.0, ..of_it[0].1.shallow_clone() };
        updates.push(super::plain::filled_up(&update, i64::from(rank)));
        progress(updates.len() as u64, count);
    }
    let relative_error = method.splits().then(|| if all > 0.0 { (missed / all).sqrt() } else { 0.0 });
    Ok(Combined { config: config(adapters, rank, &updates), updates, relative_error })
}

/// Refuses what has no weighted sum.
fn prove(adapters: &[LoadedAdapter], how: &Combination, method: Method) -> Result<()> {
    let typed = |place: &str, what: String, hint: &str| Err(Error::Recipe(vec![Fault::new(place, what).hint(hint)]));
    if adapters.is_empty() || how.weights.len() != adapters.len() {
        let what = format!("names {} weights for {} adapters", how.weights.len(), adapters.len());
        return typed("--weights", what, "name one for each, in their order");
    }
    if let Some(odd) = how.weights.iter().find(|weight| !weight.is_finite()) {
        return typed("--weights", format!("holds {odd}"), "a weight is a finite number");
    }
    let name = method.name();
    match how.density {
        None if method.prunes() => {
            return typed("--density", format!("is missing: {name} drops numbers"), "name the share that is kept: 0.5");
        }
        // Nothing would be left, and DARE would divide by it.
        Some(density) if !(density > 0.0 && density <= 1.0) => {
            return typed("--density", format!("is {density}"), "the share that is kept is above 0 and at most 1");
        }
        Some(density) if how.method == method && !method.prunes() => {
            return typed("--density", format!("is {density}, but {name} drops nothing"), "leave it out");
        }
        _ => {}
    }
    match how.rank {
        Some(0) => return typed("--rank", "is 0".into(), "a rank is at least 1"),
        Some(rank) if how.method == method && !method.splits() => {
            let what = format!("is {rank}, but the rank of {name} is that of the adapters");
            return typed("--rank", what, "leave it out, or combine by svd or a kind that ends so");
        }
        _ => {}
    }
    for adapter in adapters {
        let config = &adapter.config;
        let feature = [
            (config.use_dora, "trained lengths (DoRA)"),
            (config.modules_to_save.is_some(), "modules trained whole (modules_to_save)"),
            (config.trainable_token_indices.is_some(), "trained tokens"),
            (
                config.target_parameters.as_ref().is_some_and(|names| !names.is_empty()),
                "adapted parameters (of experts)",
            ),
        ];
        if let Some((_, feature)) = feature.iter().find(|(has, _)| *has) {
            let fault = Fault::at(&adapter.folder, format!("has {feature}, of which there is no weighted sum"));
            return Err(Error::Model(fault.hint("merge it into the base, and train or combine the others on that")));
        }
    }
    if !method.splits() && method != Method::Cat {
        let rank = |adapter: &LoadedAdapter| largest_rank(&adapter.config);
        if let Some(other) = adapters.iter().find(|adapter| rank(adapter) != rank(&adapters[0])) {
            let (one, two) = (rank(&adapters[0]), rank(other));
            let what = format!("has rank {two} and {} rank {one}: {name} sums A with A", adapters[0].folder.display());
            let fault = Fault::at(&other.folder, what);
            return Err(Error::Model(
                fault.hint("combine by svd, cat or a kind that ends in svd: ranks may differ there"),
            ));
        }
    }
    Ok(())
}

/// Refuses updates of one module for two bases, and of two ranks where factors are summed.
fn same_shapes(adapters: &[LoadedAdapter], module: &str, of_it: &[(usize, &Update)], method: Method) -> Result<()> {
    let (first, one) = of_it[0];
    let folder = |index: usize| adapters[index].folder.display();
    let summed = !method.splits() && method != Method::Cat;
    for (index, other) in &of_it[1..] {
        let place = format!("{}: {module}", folder(*index));
        if other.shape() != one.shape() {
            let what =
                format!("is {:?}, but {:?} in {}: adapters for two bases", other.shape(), one.shape(), folder(first));
            return Err(Error::Model(Fault::new(place, what).hint("combine adapters of the same base")));
        }
        if summed && other.rank() != one.rank() {
            let what = format!("has rank {}, but {} in {}", other.rank(), one.rank(), folder(first));
            return Err(Error::Model(Fault::new(place, what).hint("combine by svd or cat")));
        }
    }
    Ok(())
}

/// The largest rank that a config says, as PEFT finds it.
fn largest_rank(config: &AdapterConfig) -> u32 {
    config.rank_pattern.iter().map(|(_, rank)| *rank).chain([config.r]).max().unwrap_or(1)
}

/// The config of the sum: that of the first adapter, with the targets of all, at scale 1.
fn config(adapters: &[LoadedAdapter], rank: u32, updates: &[Update]) -> AdapterConfig {
    let first = &adapters[0].config;
    // Of lists that mean what they say, the union is that of what they mean.
    let names = adapters.iter().map(|adapter| match &adapter.config {
        AdapterConfig {
            target_modules: Some(Targets::Names(names)),
            exclude_modules: None,
            layers_to_transform: None,
            ..
        } => Some(names.clone()),
        _ => None,
    });
    let names = names.collect::<Option<Vec<_>>>().map(|lists| {
        let mut all: Vec<String> = Vec::new();
        for name in lists.into_iter().flatten() {
            if !all.contains(&name) {
                all.push(name);
            }
        }
        all
    });
    let spelled = || updates.iter().map(|update| update.module.clone()).collect();
    AdapterConfig {
        r: rank,
        lora_alpha: f64::from(rank),
        use_rslora: false,
        target_modules: Some(Targets::Names(names.unwrap_or_else(spelled))),
        exclude_modules: None,
        layers_to_transform: None,
        layers_pattern: None,
        rank_pattern: Vec::new(),
        alpha_pattern: Vec::new(),
        init_lora_weights: InitLora::Kaiming,
        ..first.clone()
    }
}

/// A mask's own seed: neither the order of modules nor which of them there are changes it.
fn mask_seed(seed: u64, name: &str) -> u64 {
    let digest = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(name).finalize();
    u64::from_le_bytes(digest[..8].try_into().expect("a digest has 32 bytes"))
}

#[cfg(test)]
mod tests;
