//! The adapter that comes nearest to a fine-tuned model: of what each linear became, less what it was, the largest singular values
//! and vectors ([`super::singular`]).
//!
//! Weights are read linear by linear, the base's a piece at a time, so that memory peaks at one tensor in fp32 and what its decomposition
//! takes; the error that is reported is measured on the factors as they are written.

use std::collections::BTreeSet;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::Update;
use super::config::AdapterConfig;
use super::saved::{self, Saved};
use super::singular::Largest;
use super::targets::{Selection, Target, condensed};
use super::{layout, overview};
use crate::model::sites::{Role, Site};
use crate::model::spec::Stored;
use crate::model::{ModelSpec, Trained};
use crate::recipe::AdapterRecipe;
use crate::torch_ext::catching;
use crate::weights::{Checkpoint, Pieces};
use crate::{Error, Fault, Result};

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    /// R of every linear; its whole rank where that is less.
    pub rank: u32,
    /// Whether what is no linear, and became another, is kept whole.
    pub save_others: bool,
}

/// An adapter, and how near it comes.
#[derive(Debug)]
pub struct Extracted {
    /// What its config says.
    pub config: AdapterConfig,
    /// In checkpoint order.
    pub updates: Vec<Update>,
    /// What is kept whole.
    pub saved: Vec<Saved>,
    /// How near it comes.
    pub report: Report,
}

/// How near an adapter comes to the model it was taken from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// By linear that became another.
    pub modules: Vec<Nearness>,
    /// Of all of them together: `|D - B A| / |D|`.
    pub relative_error: f64,
    /// The share of `|D|^2` that the factors hold.
    pub energy: f64,
    /// Linears that are as they were.
    pub unchanged: usize,
    /// What became another and is kept whole, by tensor.
    pub saved: Vec<String>,
    /// What became another and is lost, by tensor, and why.
    pub lost: Vec<String>,
}

/// How near the factors of one linear come.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Nearness {
    /// Its path.
    pub module: String,
    /// `|D|` over the length of the base's weight.
    pub change: f64,
    /// `|D - B A| / |D|`.
    pub relative_error: f64,
    /// The share of `|D|^2` that the factors hold.
    pub energy: f64,
}

/// Takes the adapter of `wish` that makes of `base` what comes nearest to `tuned`; `spec` is the base's. `progress` is called with
/// linears done and in all.
///
/// Errors with [`Error::Model`]: linears of other shapes, or missing ones: another model; nothing that differs.
pub fn extract(
    tuned: &Checkpoint,
    base: &Checkpoint,
    spec: &ModelSpec,
    wish: Wish,
    progress: &dyn Fn(u64, u64),
) -> Result<Extracted> {
    let sites = spec.sites();
    let pair = Pair { tuned, base, spec };
    let mut seen = BTreeSet::new();
    let others = pair.others(&sites, &mut seen)?;
    let whole = pair.saved(&others, wish)?;
    let mut report = Report {
        modules: Vec::new(),
        relative_error: 0.0,
        energy: 1.0,
        unchanged: 0,
        saved: whole.tensors,
        lost: whole.lost,
    };
    let (mut all, mut missed) = (0.0, 0.0);
    let mut updates = Vec::new();
    for (number, site) in sites.iter().enumerate() {
        let kept_whole = whole.saved.iter().any(|saved| saved.module == site.name);
        let is_the_embedding = site.role == Role::Head && spec.head.tied;
        let other_rows = pair.other_rows(site);
        if !kept_whole && !is_the_embedding && other_rows.is_none() {
            let found = catching(&site.name, || pair.update(site, i64::from(wish.rank)))?;
            match found {
                None => report.unchanged += 1,
                Some((update, measured)) => {
                    all += measured.all;
                    missed += measured.missed;
                    report.modules.push(measured.nearness(&site.name));
                    updates.push(update);
                }
            }
        }
        report.lost.extend(other_rows.filter(|_| !kept_whole && !is_the_embedding));
        progress(number as u64 + 1, sites.len() as u64);
    }
    if updates.is_empty() && whole.saved.is_empty() {
        let what = match report.lost.as_slice() {
            [] => "is the base: no tensor differs".to_string(),
            lost => format!("differs from the base in no linear, only in {}", lost[0]),
        };
        let fault = Fault::new("--tuned", what);
        return Err(Error::Model(fault.hint("name the fine-tuned model; --save-others keeps what is no linear")));
    }
    if all > 0.0 {
        report.relative_error = (missed / all).sqrt();
        report.energy = 1.0 - missed / all;
    }
    let config = config(wish.rank, &updates, &whole.saved, &sites, spec)?;
    Ok(Extracted { config, updates, saved: whole.saved, report })
}

/// The two models.
struct Pair<'a> {
    tuned: &'a Checkpoint,
    base: &'a Checkpoint,
    spec: &'a ModelSpec,
}

/// Squares of lengths.
struct Measured {
    weight: f64,
    all: f64,
    missed: f64,
}

impl Measured {
    fn nearness(&self, module: &str) -> Nearness {
        Nearness {
            module: module.into(),
            change: (self.all / self.weight).sqrt(),
            relative_error: (self.missed / self.all).sqrt(),
            energy: 1.0 - self.missed / self.all,
        }
    }
}

/// What is kept whole.
struct Whole {
    saved: Vec<Saved>,
    tensors: Vec<String>,
    lost: Vec<String>,
}

impl Pair<'_> {
    /// The update of a linear, or of all experts' linear, and how near it comes; `None` where it is as it was.
    fn update(&self, site: &Site, rank: i64) -> Result<Option<(Update, Measured)>> {
        let mut measured = Measured { weight: 0.0, all: 0.0, missed: 0.0 };
        let r = rank.min(site.shape.0).min(site.shape.1);
        let mut factors: Vec<(Tensor, Tensor)> = Vec::new();
        let names = self.stored(site);
        let transposed = matches!(site.role, Role::Experts { stored: Stored::Transposed { .. }, .. });
        for name in &names {
            let (difference, weight) = self.difference(name)?;
            measured.weight += weight;
            let difference = if transposed { difference.transpose(1, 2) } else { difference }; // (out, in) or (E, out, in)
            let each = if difference.dim() == 3 { difference.unbind(0) } else { vec![difference] };
            for difference in each {
                let (a, b) = match difference.any().int64_value(&[]) {
                    // Most of a large model may be as it was.
                    0 => (zeros([r, difference.size()[1]]), zeros([difference.size()[0], r])),
                    _ => Largest::of(&difference, r).even(),
                };
                let (all, missed) = lengths(&difference, &a, &b);
                measured.all += all;
                measured.missed += missed;
                factors.push((a, b));
            }
        }
        if measured.all == 0.0 {
            return Ok(None);
        }
        let (a, b) = match &site.role {
            Role::Experts { .. } => {
                let stack = |of: fn(&(Tensor, Tensor)) -> &Tensor| {
                    Tensor::stack(&factors.iter().map(of).collect::<Vec<_>>(), 0)
                };
                (stack(|pair| &pair.0), stack(|pair| &pair.1)) // (E, R, in), (E, out, R)
            }
            _ => factors.remove(0),
        };
        let update =
            Update { module: site.name.clone(), role: site.role.clone(), a, b, scale: 1.0, lengths: None, taken: None };
        Ok(Some((update, measured)))
    }

    /// How the base's files call what a site's weight is made of.
    fn stored(&self, site: &Site) -> Vec<String> {
        let has = |name: &str| self.base.shape(name).is_some();
        site.parameters().iter().map(|path| self.spec.names.stored_as(path, has)).collect()
    }

    /// What a tensor of the tuned model is beyond that of the base, fp32, and the latter's length, squared.
    fn difference(&self, name: &str) -> Result<(Tensor, f64)> {
        let tuned = self.tuned.tensor(name, Kind::Float, Device::Cpu)?;
        let shape = self.base.shape(name).unwrap_or_default();
        if tuned.size() != shape {
            let what = format!("is {:?} in the fine-tuned model, {shape:?} in the base", tuned.size());
            return Err(Error::Model(Fault::new(name, what).hint("name the base that the model was made of: --model")));
        }
        let (base, flat) = (self.base.pieces(name)?, tuned.view(-1));
        let mut weight = 0.0;
        for place in base.places() {
            let piece = base.piece(place, Kind::Float)?;
            weight += squares(&piece);
            let _ = flat.narrow(0, place.0, place.1).g_sub_(&piece);
        }
        Ok((tuned, weight))
    }

    /// Whether a tensor that both have in one shape holds other numbers in each.
    fn differs(&self, name: &str) -> Result<bool> {
        let (tuned, base) = (self.tuned.pieces(name)?, self.base.pieces(name)?);
        for place in base.places() {
            if !tuned.piece(place, Kind::Double)?.equal(&base.piece(place, Kind::Double)?) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Why an adapter cannot hold what the head became: its rows are tokens, and the tuned model has others.
    fn other_rows(&self, site: &Site) -> Option<String> {
        let name = self.stored(site).into_iter().next().filter(|_| site.role == Role::Head)?;
        let [tuned, base] = [self.tuned, self.base].map(|of| of.shape(&name));
        let (tuned, base) = (tuned?, base?);
        let rows = |shape: &[i64]| shape.first().copied().unwrap_or(0);
        (tuned.get(1) == base.get(1) && rows(&tuned) != rows(&base)).then(|| {
            format!("{name}: {} rows, of which the base has {}: an adapter adds none", rows(&tuned), rows(&base))
        })
    }

    /// What became another beside linears' weights: names in the base's files.
    fn others(&self, sites: &[Site], seen: &mut BTreeSet<String>) -> Result<Vec<String>> {
        seen.extend(sites.iter().flat_map(|site| self.stored(site)));
        let mut others = Vec::new();
        for name in self.base.names() {
            if seen.contains(name) || self.base.is_spare(name) || self.spec.names.is_other_part(name) {
                continue;
            }
            let changed = match self.tuned.shape(name) {
                None => false,
                Some(shape) if Some(&shape) != self.base.shape(name).as_ref() => true,
                Some(_) => self.differs(name)?,
            };
            if changed {
                others.push(name.to_string());
            }
        }
        // A head that has become one of its own.
        let head = self.spec.names.stored(&format!("{}.weight", self.spec.head.name));
        if self.spec.head.tied && self.tuned.shape(&head).is_some() && !others.contains(&head) {
            let shared = self.spec.names.stored(&self.spec.embedding.weight);
            if self.tuned.differ(&head, &shared)? {
                others.push(head);
            }
        }
        Ok(others)
    }

    /// Keeps whole what became another, as far as PEFT can.
    fn saved(&self, others: &[String], wish: Wish) -> Result<Whole> {
        let mut whole = Whole { saved: Vec::new(), tensors: Vec::new(), lost: Vec::new() };
        let mut left: BTreeSet<String> = others.iter().cloned().collect();
        if !wish.save_others {
            whole.lost = others.iter().map(|name| format!("{name}: no linear's weight")).collect();
            return Ok(whole);
        }
        let head = self.spec.names.module(&self.spec.head.name);
        for known in saved::known(self.spec) {
            let stored = |end: &str| {
                let path = format!("{}{end}", known.module);
                self.spec.names.stored_as(&path, |name| self.base.shape(name).is_some())
            };
            let (weight, bias) = (stored(".weight"), stored(saved::BIAS));
            let own: Vec<String> =
                [weight.clone(), bias.clone()].into_iter().filter(|name| left.contains(name)).collect();
            // Beside a head that is the embedding, only the latter can be kept.
            if own.is_empty() || (known.module == head && self.spec.head.tied) {
                continue;
            }
            if let Some(name) = own.iter().find(|name| self.tuned.shape(name) != self.base.shape(name)) {
                whole.lost.push(format!("{name}: of another shape, which the base has no room for"));
                left.retain(|name| !own.contains(name));
                continue;
            }
            let read = |name: &str| self.tuned.tensor(name, Kind::Float, Device::Cpu);
            let trained = Trained::Whole {
                weight: read(&weight)?.view(&known.shape[..]),
                bias: known.bias.then(|| read(&bias)).transpose()?,
            };
            let tied = self.spec.head.tied && weight == self.spec.names.stored(&self.spec.embedding.weight);
            let shared_with = tied.then(|| head.clone());
            whole.tensors.extend(own.iter().cloned());
            left.retain(|name| !own.contains(name));
            whole.saved.push(Saved { module: known.module, trained, shared_with });
        }
        whole.lost.extend(left.into_iter().map(|name| format!("{name}: PEFT has no place for it")));
        Ok(whole)
    }
}

/// The squares of the lengths of a difference (out, in), and of what is missed of it by B A.
fn lengths(difference: &Tensor, a: &Tensor, b: &Tensor) -> (f64, f64) {
    let (rows, columns) = (difference.size()[0], difference.size()[1]);
    let chunk = (Pieces::LENGTH / columns.max(1)).max(1);
    let (mut all, mut missed) = (0.0, 0.0);
    for start in (0..rows).step_by(chunk as usize) {
        let part = |whole: &Tensor| whole.narrow(0, start, chunk.min(rows - start));
        all += squares(&part(difference));
        missed += squares(&(part(difference) - part(b).mm(a)));
    }
    (all, missed)
}

fn zeros(shape: [i64; 2]) -> Tensor {
    Tensor::zeros(shape, (Kind::Float, Device::Cpu))
}

fn squares(tensor: &Tensor) -> f64 {
    tensor.square().sum(Kind::Double).double_value(&[])
}

/// The config of updates at scale 1 beside what is kept whole.
fn config(rank: u32, updates: &[Update], saved: &[Saved], sites: &[Site], spec: &ModelSpec) -> Result<AdapterConfig> {
    let place = |module: &str| sites.iter().position(|site| site.name == module);
    let chosen: Vec<(usize, u32, f64)> =
        updates.iter().filter_map(|update| Some((place(&update.module)?, update.rank() as u32, 1.0))).collect();
    let modules: Vec<String> = updates.iter().map(|update| update.module.clone()).collect();
    let all: Vec<String> = sites.iter().flat_map(Site::modules).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    // A linear whose whole rank is less has a rank of its own.
    let smaller = updates.iter().filter(|update| update.rank() != i64::from(rank));
    let ranks = smaller.map(|update| (update.module.clone(), update.rank() as u32)).collect::<Vec<_>>();
    let targets = chosen
        .iter()
        .map(|(index, r, scale)| Target { index: *index, r: *r, alpha: f64::from(*r), scale: *scale })
        .collect();
    let target_modules = if spec.names.among_others || modules.is_empty() {
        crate::recipe::Targets::Names(modules)
    } else {
        condensed(modules, &all)
    };
    let selection = Selection { targets, target_modules, layers_to_transform: None, notices: Vec::new() };
    let recipe = AdapterRecipe { r: rank, lora_alpha: f64::from(rank), lora_dropout: 0.0, ..Default::default() };
    let mut config = AdapterConfig::new(&recipe, &selection);
    config.rank_pattern = ranks.iter().map(|(module, r)| (regex::escape(module), *r)).collect();
    config.alpha_pattern = ranks.iter().map(|(module, r)| (regex::escape(module), f64::from(*r))).collect();
    layout::describe(&mut config, sites, &spec.names, &chosen)?;
    if !saved.is_empty() {
        config.modules_to_save = Some(saved.iter().map(|saved| saved.module.clone()).collect());
        config.ensure_weight_tying = saved.iter().any(|saved| saved.shared_with.is_some());
    }
    Ok(config)
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let percent = |share: f64| 100.0 * share;
        let (error, energy) = (percent(self.relative_error), percent(self.energy));
        let count = self.modules.len();
        write!(f, "{count} linears changed: relative error {error:.2}%, {energy:.2}% of the change is kept")?;
        if let Some(worst) = self.modules.iter().max_by(|a, b| a.relative_error.total_cmp(&b.relative_error)) {
            write!(f, "\nworst: {} (relative error {:.2}%)", worst.module, percent(worst.relative_error))?;
        }
        if self.unchanged > 0 {
            write!(f, "\n{} linears are as they were", self.unchanged)?;
        }
        if !self.saved.is_empty() {
            let names: Vec<&str> = self.saved.iter().map(String::as_str).collect();
            write!(f, "\nkept whole: {}", overview(&names))?;
        }
        if !self.lost.is_empty() {
            write!(f, "\nlost: {}", self.lost.iter().take(8).cloned().collect::<Vec<_>>().join("; "))?;
            if self.lost.len() > 8 {
                write!(f, "; and {} more", self.lost.len() - 8)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
