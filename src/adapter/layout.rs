//! How PEFT names and shapes the updates of experts, in files and in configurations.
//!
//! Transformers keeps all experts of a block in two parameters, `gate_up_proj` and `down_proj`, whatever the checkpoint has. PEFT
//! adapts such a parameter by stacking (`target_parameters`): A (E R, in), expert by expert, and B (out, R E), the expert running
//! fastest; of two adapted parameters of one module the first is called `base_layer`. A checkpoint that has its experts apart also
//! has files with a pair for each expert, which PEFT fuses when it loads them: gate and up become one update of twice the rank.

use std::collections::BTreeMap;

use tch::Tensor;

use super::config::AdapterConfig;
use super::load::PREFIX;
use super::targets::condensed;
use super::{Update, scale_numerator};
use crate::model::names::Names;
use crate::model::sites::{Role, Site, expert};
use crate::model::spec::Stored;
use crate::recipe::Targets;
use crate::{Error, Fault, Result};

/// Every tensor of an adapter's file under its key, A before B.
pub fn tensors(updates: &[Update]) -> Vec<(String, Tensor)> {
    let updates: Vec<Update> = updates.iter().map(Update::of_the_original).collect();
    let mut all = Vec::new();
    for (i, update) in updates.iter().enumerate() {
        let Role::Experts { count, stored, parameter } = &update.role else {
            let named =
                |(name, tensor): (&str, &Tensor)| (format!("{PREFIX}{}.{name}", update.module), tensor.detach());
            all.extend(update.tensors().map(named));
            continue;
        };
        let (a, b) = (update.a.detach(), update.b.detach());
        let mut add = |module: &str, a: Tensor, b: Tensor| {
            all.push((format!("{PREFIX}{module}.lora_A.weight"), a));
            all.push((format!("{PREFIX}{module}.lora_B.weight"), b));
        };
        if *stored == Stored::Apart {
            for number in 0..*count {
                add(&expert(&update.module, number), a.select(0, number), b.select(0, number));
            }
            continue;
        }
        let module = parent(parameter);
        let wrapped = updates[i + 1..].iter().any(|other| match &other.role {
            Role::Experts { parameter, .. } => parent(parameter) == module,
            Role::Linear | Role::Router | Role::Blocks | Role::Indexer | Role::Head => false,
        });
        let (a, b) = stack(&a, &b, *stored);
        add(&if wrapped { format!("{module}.base_layer") } else { module.to_string() }, a, b);
    }
    all
}

/// A (E R, in) and B (out, R E) as files have them, from A (E, R, in) and B (E, out, R).
fn stack(a: &Tensor, b: &Tensor, stored: Stored) -> (Tensor, Tensor) {
    // Where PEFT takes in for out, its update is the transpose of ours, so A and B change places.
    let (a, b) = match stored {
        Stored::Transposed { swapped: true } => (b.transpose(1, 2), a.transpose(1, 2)),
        Stored::Apart | Stored::Together | Stored::Transposed { swapped: false } => {
            (a.shallow_clone(), b.shallow_clone())
        }
    };
    let (experts, rank, columns) = a.size3().expect("(E, R, in)");
    let rows = b.size()[1];
    (a.reshape([experts * rank, columns]), b.permute([1, 2, 0]).reshape([rows, rank * experts]))
}

/// A (E, R, in) and B (E, out, R) from those of a file.
fn unstack(a: &Tensor, b: &Tensor, experts: i64, stored: Stored) -> (Tensor, Tensor) {
    let (rank, rows) = (a.size()[0] / experts, b.size()[0]);
    let a = a.reshape([experts, rank, -1]);
    let b = b.reshape([rows, rank, experts]).permute([2, 0, 1]);
    match stored {
        Stored::Transposed { swapped: true } => (b.transpose(1, 2).contiguous(), a.transpose(1, 2).contiguous()),
        Stored::Apart | Stored::Together | Stored::Transposed { swapped: false } => (a, b.contiguous()),
    }
}

fn parent(path: &str) -> &str {
    path.rsplit_once('.').map_or("", |(parent, _)| parent)
}

/// The updates of a file, put together for the sites of a base.
#[derive(Default)]
pub(super) struct Assembled {
    /// In the order of the sites.
    pub(super) updates: BTreeMap<usize, Update>,
    /// Modules of the file that are no linears of the base.
    pub(super) absent: Vec<String>,
    /// Modules whose shapes differ, with both.
    pub(super) differing: Vec<String>,
}

impl Assembled {
    /// Takes `updates` as a file has them. `config` says the ranks of those that stand for all experts of a block.
    ///
    /// # Errors
    /// [`Error::Model`] when a block's experts are adapted in part or with different ranks, or with another rank than `config` says.
    pub(super) fn new(
        updates: &[Update],
        sites: &[Site],
        names: &Names,
        config: &AdapterConfig,
        place: &str,
    ) -> Result<Self> {
        let mut all = Self::default();
        let mut alone: BTreeMap<String, (usize, Option<i64>)> = BTreeMap::new();
        let mut together: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (index, site) in sites.iter().enumerate() {
            let apart = matches!(site.role, Role::Experts { stored: Stored::Apart, .. });
            if let Role::Experts { parameter, .. } = &site.role {
                together.entry(parent(parameter)).or_default().push(index);
            }
            if apart || !matches!(site.role, Role::Experts { .. }) {
                for (number, module) in (0..).zip(site.modules()) {
                    alone.insert(module, (index, apart.then_some(number)));
                }
            }
        }
        let mut gathered: BTreeMap<usize, BTreeMap<i64, &Update>> = BTreeMap::new();
        for update in updates {
            let spelled = |module: &str| names.spec_names(module).map(|name| names.module(&name)).collect::<Vec<_>>();
            if let Some(&(index, number)) = spelled(&update.module).iter().find_map(|name| alone.get(name)) {
                let ((rows, columns), own) = (sites[index].shape, update.shape());
                if own != (rows, columns) {
                    all.differing
                        .push(format!("{} ([{}, {}] there, [{rows}, {columns}] here)", update.module, own.0, own.1));
                }
                match number {
                    Some(number) => drop(gathered.entry(index).or_default().insert(number, update)),
                    None => {
                        let Site { name, role, .. } = &sites[index];
                        let own = Update { module: name.clone(), role: role.clone(), ..update.shallow_clone() };
                        all.updates.insert(index, own);
                    }
                }
                continue;
            }
            let module = update.module.strip_suffix(".base_layer").unwrap_or(&update.module);
            match spelled(module).iter().find_map(|name| together.get(name.as_str())) {
                Some(of_module) => all.stacked(update, of_module, sites, config, place)?,
                None => all.absent.push(update.module.clone()),
            }
        }
        if all.differing.is_empty() {
            for (index, experts) in gathered {
                let update = joined(&sites[index], &experts, place)?;
                all.updates.insert(index, update);
            }
        }
        Ok(all)
    }

    /// An update of all experts of a block in one pair: its shape says which parameter it belongs to.
    fn stacked(
        &mut self,
        update: &Update,
        of_module: &[usize],
        sites: &[Site],
        config: &AdapterConfig,
        place: &str,
    ) -> Result<()> {
        let found = update.shape();
        // Sites that share a parameter, gate before up: their rows lie one after the other in it.
        let mut parameters: Vec<(&str, i64, Stored, Vec<usize>)> = Vec::new();
        for &index in of_module {
            let Role::Experts { count, stored, parameter } = &sites[index].role else { continue };
            match parameters.iter_mut().find(|(known, ..)| known == parameter) {
                Some((.., members)) => members.push(index),
                None => parameters.push((parameter, *count, *stored, vec![index])),
            }
        }
        let fits = |(_, _, stored, members): &&(&str, i64, Stored, Vec<usize>)| {
            let rows: i64 = members.iter().map(|&index| sites[index].shape.0).sum();
            let columns = sites[members[0]].shape.1;
            found == if *stored == (Stored::Transposed { swapped: true }) { (columns, rows) } else { (rows, columns) }
        };
        let Some((parameter, count, stored, members)) = parameters.iter().find(fits) else {
            let shapes: Vec<String> =
                of_module.iter().map(|&index| format!("{} {:?}", sites[index].name, sites[index].shape)).collect();
            self.differing.push(format!("{} ({found:?} there; here {})", update.module, shapes.join(", ")));
            return Ok(());
        };
        let fault = |what: String| Error::Model(Fault::new(format!("{place}: {}", update.module), what));
        let stacked = update.a.size()[0];
        let ranks = config.ranks(std::path::Path::new(place))?;
        let rank = i64::from(ranks.rank(parameter));
        if stacked != rank * count {
            let what =
                format!("its matrices have {stacked} ranks for {count} experts, but the config says {rank} each");
            return Err(fault(what));
        }
        let (a, b) = unstack(&update.a, &update.b, *count, *stored);
        let scale = ranks.scale(parameter);
        let mut row = 0;
        for &index in members {
            let rows = sites[index].shape.0;
            let own = Update {
                module: sites[index].name.clone(),
                role: sites[index].role.clone(),
                a: a.copy(),
                b: b.narrow(1, row, rows).contiguous(),
                scale,
                lengths: None,
                taken: None,
            };
            row += rows;
            if self.updates.insert(index, own).is_some() {
                return Err(fault(format!("{parameter} has two updates")));
            }
        }
        Ok(())
    }
}

/// One update of all experts from a pair for each.
fn joined(site: &Site, experts: &BTreeMap<i64, &Update>, place: &str) -> Result<Update> {
    let fault = |what: String| Err(Error::Model(Fault::new(format!("{place}: {}", site.name), what)));
    let count = site.modules().len();
    if experts.len() < count {
        let missing = (0..count as i64).find(|number| !experts.contains_key(number)).unwrap_or_default();
        return fault(format!(
            "has updates of {} of {count} experts; that of expert {missing} is missing",
            experts.len()
        ));
    }
    let first = experts.values().next().expect("all are there");
    let rank = |update: &Update| update.a.size()[0];
    if let Some((number, other)) =
        experts.iter().find(|(_, other)| rank(other) != rank(first) || other.scale != first.scale)
    {
        return fault(format!(
            "expert 0 has rank {} and scale {}, expert {number} rank {} and scale {}; they must be the same",
            rank(first),
            first.scale,
            rank(other),
            other.scale
        ));
    }
    let stack = |one: fn(&Update) -> &Tensor| Tensor::stack(&experts.values().map(|u| one(u)).collect::<Vec<_>>(), 0);
    Ok(Update {
        module: site.name.clone(),
        role: site.role.clone(),
        a: stack(|update| &update.a),
        b: stack(|update| &update.b),
        scale: first.scale,
        lengths: None,
        taken: None,
    })
}

/// Writes into `config` how PEFT is to find the updates of `chosen` (index into `sites`, rank, scale), where experts, routers or
/// what PEFT takes for them are among them: by parameter, which takes no dropout. Otherwise `config` stays as it is.
///
/// # Errors
/// [`Error::Recipe`] when gate and up, which PEFT fuses, are not adapted alike.
pub(super) fn describe(
    config: &mut AdapterConfig,
    sites: &[Site],
    names: &Names,
    chosen: &[(usize, u32, f64)],
) -> Result<()> {
    let taken = |path: &str| names.taken_for_experts.contains(&path.rsplit('.').next().unwrap_or(path));
    let parameter = |site: &Site| match &site.role {
        Role::Experts { parameter, .. } => Some(parameter.clone()),
        Role::Router | Role::Blocks => Some(format!("{}.weight", site.name)),
        Role::Linear | Role::Indexer if taken(&site.name) => Some(format!("{}.weight", site.name)),
        Role::Linear | Role::Indexer | Role::Head => None,
    };
    let Some(first) = chosen.iter().map(|(index, ..)| &sites[*index]).find(|site| parameter(site).is_some()) else {
        return Ok(());
    };
    if config.use_dora {
        let what =
            format!("is true, but {} can be adapted as a parameter only, which PEFT has no DoRA for", first.name);
        let hint = "name the other linears in adapter.target_modules, or leave use_dora out";
        return Err(Error::Recipe(vec![Fault::new("adapter.use_dora", what).hint(hint)]));
    }
    let mut modules = Vec::new();
    let mut parameters: BTreeMap<String, (u32, f64, Vec<&str>)> = BTreeMap::new();
    for &(index, r, scale) in chosen {
        let site = &sites[index];
        let Some(parameter) = parameter(site) else {
            modules.push(site.name.clone());
            continue;
        };
        match parameters.get_mut(&parameter) {
            None => drop(parameters.insert(parameter, (r, scale, vec![&site.name]))),
            Some((rank, other, members)) if *rank == r * members.len() as u32 && *other == scale => {
                *rank += r;
                members.push(&site.name);
            }
            Some((.., members)) => {
                let what = format!("{} and {} differ in rank or scale, but PEFT fuses them", members[0], site.name);
                return Err(Error::Recipe(vec![Fault::new("adapter.rank_pattern", what).hint("give both the same")]));
            }
        }
    }
    for (path, (.., members)) in &parameters {
        let all =
            sites.iter().filter(|site| matches!(&site.role, Role::Experts { parameter, .. } if parameter == path));
        if let Some(other) = all.map(|site| site.name.as_str()).find(|name| !members.contains(name)) {
            let what = format!("{} is named without {other}, but PEFT fuses them", members[0]);
            return Err(Error::Recipe(vec![Fault::new("adapter.target_modules", what).hint("name both, or neither")]));
        }
    }
    let ranks = config.ranks(std::path::Path::new("adapter"))?;
    let (mut rank_patterns, mut alpha_patterns) = (BTreeMap::new(), BTreeMap::new());
    for (path, (rank, scale, _)) in &parameters {
        let ending =
            |path: &str| path.rmatch_indices('.').nth(1).map_or(String::new(), |(at, _)| path[at..].to_string());
        let alike = parameters.iter().filter(|(other, _)| ending(other) == ending(path));
        let key = match alike.clone().all(|(_, other)| (other.0, other.1) == (*rank, *scale)) {
            true => format!(".*{}", regex::escape(&ending(path))),
            false => regex::escape(path),
        };
        if ranks.rank(path) != *rank {
            rank_patterns.insert(key.clone(), *rank);
        }
        if ranks.rank(path) != *rank || (ranks.scale(path) - scale).abs() > 1e-12 * scale.abs() {
            alpha_patterns.insert(key, scale_numerator(*scale, *rank, config.use_rslora));
        }
    }
    config.rank_pattern.retain(|(key, _)| !rank_patterns.contains_key(key));
    config.alpha_pattern.retain(|(key, _)| !alpha_patterns.contains_key(key));
    config.rank_pattern.extend(rank_patterns);
    config.alpha_pattern.extend(alpha_patterns);
    let all: Vec<String> = sites.iter().flat_map(Site::modules).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    config.target_modules =
        Some(if modules.is_empty() { Targets::Names(Vec::new()) } else { condensed(modules, &all) });
    config.target_parameters = Some(parameters.into_keys().collect());
    (config.exclude_modules, config.layers_to_transform, config.layers_pattern) = (None, None, None);
    config.lora_dropout = 0.0;
    Ok(())
}
