//! Who gets an adapter: PEFT's rules, on names and shapes alone.
//!
//! The rules are those of `check_target_module_exists`, `get_pattern_key`, `_maybe_include_all_linear_layers` and
//! `_find_minimal_target_modules` of PEFT 0.21.2, tried against PEFT's own answers. What PEFT passes over in silence or with a
//! warning (a name that matches nothing) is an error here.

use std::collections::{BTreeMap, BTreeSet};

use regex::Regex;

use crate::model::sites::{Role, Site};
use crate::recipe::{AdapterRecipe, Targets};
use crate::{Error, Fault, Result};

/// PEFT condenses a target list of this length or more into suffixes.
const LONG_LIST: usize = 20;

/// A linear that gets an adapter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Target {
    /// Index into the list of sites.
    pub index: usize,
    /// Rank.
    pub r: u32,
    /// `lora_alpha`.
    pub alpha: f64,
    /// What B A is multiplied with.
    pub scale: f64,
}

/// What a recipe's targets come to on a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Selection {
    /// In the order of the sites.
    pub targets: Vec<Target>,
    /// `target_modules` as PEFT writes them: `all-linear` and long lists expanded and condensed.
    pub target_modules: Targets,
    /// `layers_to_transform` as PEFT reads them beside these `target_modules`.
    pub layers_to_transform: Option<Vec<u32>>,
    /// What the user should know, in plain sentences.
    pub notices: Vec<String>,
}

/// Finds the linears that `recipe` names, among `sites`.
///
/// `all-linear` is every linear but the head, the routers and what no gradient reaches. Experts of a block are adapted together, all of them or none.
///
/// Errors list everything that is wrong: names, patterns and layers that match nothing, ranks of 0, regular expressions that do
/// not compile, experts adapted in part.
pub fn resolve(sites: &[Site], recipe: &AdapterRecipe) -> Result<Selection> {
    let mut faults = Vec::new();
    let modules: Vec<Vec<String>> = sites.iter().map(Site::modules).collect();
    let names: Vec<&str> = modules.iter().flatten().map(String::as_str).collect();
    let only = recipe.layers_to_transform.as_deref().filter(|layers| !layers.is_empty());
    check_layers(&names, only, &mut faults);

    let all = matches!(&recipe.target_modules, Targets::Pattern(text) if text.eq_ignore_ascii_case("all-linear"));
    let (target_modules, layers_to_transform) = if all {
        // PEFT takes no layers beside `all-linear`; the expanded list says the same.
        let every = sites.iter().zip(&modules).filter(|(site, _)| match site.role {
            Role::Linear | Role::Blocks | Role::Experts { .. } => true,
            Role::Head | Role::Router | Role::Indexer => false,
        });
        let every = every.flat_map(|(_, modules)| modules).filter(|name| in_layers(name, only));
        (condensed(every.cloned().collect(), &names), None)
    } else {
        match &recipe.target_modules {
            Targets::Names(typed) => (condensed(typed.clone(), &names), only.map(<[u32]>::to_vec)),
            pattern => {
                if only.is_some() {
                    faults.push(
                        Fault::new(
                            "adapter.layers_to_transform",
                            "is not used together with a regular expression in target_modules",
                        )
                        .hint("put the layers into the expression: .*layers\\.(0|1)\\..*q_proj"),
                    );
                }
                (pattern.clone(), None)
            }
        }
    };

    let wanted = Matcher::new("adapter.target_modules", &target_modules, &mut faults);
    let unwanted = recipe.exclude_modules.as_ref().map(|t| Matcher::new("adapter.exclude_modules", t, &mut faults));
    let ranks = Patterns::new("adapter.rank_pattern", &recipe.rank_pattern, &mut faults);
    let alphas = Patterns::new("adapter.alpha_pattern", &recipe.alpha_pattern, &mut faults);
    // Experts also answer to the parameter that transformers keeps them in.
    let parameters = sites.iter().filter_map(|site| match &site.role {
        Role::Experts { parameter, .. } => Some(parameter.as_str()),
        Role::Linear | Role::Router | Role::Blocks | Role::Indexer | Role::Head => None,
    });
    let known: Vec<&str> = names.iter().copied().chain(parameters).collect();
    if !all {
        check_matches("adapter.target_modules", &recipe.target_modules, &wanted, &known, sites, &mut faults);
    }
    if let (Some(typed), Some(matcher)) = (&recipe.exclude_modules, &unwanted) {
        check_matches("adapter.exclude_modules", typed, matcher, &known, sites, &mut faults);
    }

    let mut notices = Vec::new();
    let mut targets = Vec::new();
    for (index, (site, modules)) in sites.iter().zip(&modules).enumerate() {
        let is_meant = |name: &str| {
            !unwanted.as_ref().is_some_and(|m| m.matches(name))
                && wanted.matches_in(name, layers_to_transform.as_deref())
        };
        let meant = modules.iter().filter(|name| is_meant(name)).count();
        let by_parameter = matches!(&site.role, Role::Experts { parameter, .. } if is_meant(parameter));
        if meant == 0 && !by_parameter {
            continue;
        }
        if meant < modules.len() && !by_parameter {
            let what = format!("names {meant} of the {} experts of {}", modules.len(), site.name);
            let fault = Fault::new("adapter.target_modules", what);
            faults.push(fault.hint("experts of a block are adapted together: name all of them, or none"));
            continue;
        }
        let (rows, columns) = site.shape;
        let name = modules.first().unwrap_or(&site.name);
        let r = ranks.value(name).unwrap_or(recipe.r);
        let alpha = alphas.value(name).unwrap_or(recipe.lora_alpha);
        if i64::from(r) > rows.min(columns) {
            notices.push(format!(
                "{}: rank {r} is above {}, the rank of its whole weight ({rows} x {columns}); more brings nothing",
                site.name,
                rows.min(columns)
            ));
        }
        if site.role == Role::Indexer {
            let what =
                "chooses what is looked at; no gradient goes through a choice, so its adapter stays as it starts";
            notices.push(format!("{} {what}", site.name));
        }
        targets.push(Target { index, r, alpha, scale: scale(r, alpha, recipe.use_rslora) });
    }

    let chosen: Vec<&str> =
        targets.iter().map(|target| modules[target.index].first().map_or("", String::as_str)).collect();
    ranks.check_use(&chosen, &mut faults);
    alphas.check_use(&chosen, &mut faults);
    let no_rank = |place: &str| {
        Fault::new(place, "is 0; a rank is at least 1")
            .hint("to leave a module out, name it in adapter.exclude_modules")
    };
    if recipe.r == 0 {
        faults.push(no_rank("adapter.r"));
    }
    for (key, _) in recipe.rank_pattern.iter().filter(|(_, r)| **r == 0) {
        faults.push(no_rank(&format!("adapter.rank_pattern.{key}")));
    }
    for (key, alpha) in [(String::from("lora_alpha"), recipe.lora_alpha)]
        .into_iter()
        .chain(recipe.alpha_pattern.iter().map(|(key, alpha)| (format!("alpha_pattern.{key}"), *alpha)))
    {
        if !alpha.is_finite() {
            faults.push(Fault::new(format!("adapter.{key}"), format!("is {alpha}; it must be a finite number")));
        }
    }
    if targets.is_empty() && faults.is_empty() {
        faults.push(
            Fault::new(
                "adapter",
                "target_modules, exclude_modules and layers_to_transform together leave nothing to train",
            )
            .hint(format!("there are: {}", overview(&site_names(sites)))),
        );
    }
    if !faults.is_empty() {
        return Err(Error::Recipe(faults));
    }
    Ok(Selection { targets, target_modules, layers_to_transform, notices: few(notices) })
}

fn site_names(sites: &[Site]) -> Vec<&str> {
    sites.iter().map(|site| site.name.as_str()).collect()
}

/// What B A is multiplied with: `alpha / r`, or `alpha / sqrt(r)` rank-stabilised (arXiv:2312.03732).
pub fn scale(r: u32, alpha: f64, rank_stabilised: bool) -> f64 {
    alpha / if rank_stabilised { f64::from(r).sqrt() } else { f64::from(r) }
}

/// The names there are, grouped: `q_proj (30 layers), ..., lm_head`.
pub fn overview(names: &[&str]) -> String {
    let mut groups: Vec<(&str, usize)> = Vec::new();
    for name in names {
        let label = if layer(name).is_some() { name.rsplit('.').next().unwrap_or(name) } else { name };
        match groups.iter_mut().find(|(known, _)| *known == label) {
            Some((_, count)) => *count += 1,
            None => groups.push((label, 1)),
        }
    }
    let told = groups.iter().map(|(label, count)| match count {
        1 => label.to_string(),
        _ => format!("{label} ({count} layers)"),
    });
    told.collect::<Vec<_>>().join(", ")
}

/// Values by regular expression over the end of a module path; the first that matches counts (PEFT's `get_pattern_key`).
#[derive(Debug, Clone)]
pub struct Patterns<T> {
    place: String,
    entries: Vec<(String, Regex, T)>,
}

impl<T: Copy> Patterns<T> {
    /// Compiles the keys of `map`, in its order; those that do not compile are added to `faults`.
    pub fn new<'a>(place: &str, map: impl IntoIterator<Item = (&'a String, &'a T)>, faults: &mut Vec<Fault>) -> Self
    where
        T: 'a,
    {
        let mut entries = Vec::new();
        for (key, value) in map {
            match compiled(key, |key| format!("^(?:.*\\.)?(?:{key})$")) {
                Ok(regex) => entries.push((key.clone(), regex, *value)),
                Err(what) => faults.push(not_a_regex(&format!("{place}.{key}"), &what)),
            }
        }
        Self { place: place.to_string(), entries }
    }

    /// The value for a module.
    pub fn value(&self, name: &str) -> Option<T> {
        self.entries.iter().find(|(_, regex, _)| regex.is_match(name)).map(|(_, _, value)| *value)
    }

    fn check_use(&self, chosen: &[&str], faults: &mut Vec<Fault>) {
        for (key, regex, _) in &self.entries {
            if !chosen.is_empty() && !chosen.iter().any(|name| regex.is_match(name)) {
                faults.push(
                    Fault::new(format!("{}.{key}", self.place), "matches no module that gets an adapter")
                        .hint(format!("those are: {}", overview(chosen))),
                );
            }
        }
    }
}

/// `target_modules` or `exclude_modules`, ready to be asked.
enum Matcher {
    Names(Vec<String>),
    /// `None` when it does not compile (which is in the faults).
    Whole(Option<Regex>),
}

impl Matcher {
    fn new(place: &str, targets: &Targets, faults: &mut Vec<Fault>) -> Self {
        match targets {
            Targets::Names(names) => Self::Names(names.clone()),
            Targets::Pattern(text) => match compiled(text, |text| format!("^(?:{text})$")) {
                Ok(regex) => Self::Whole(Some(regex)),
                Err(what) => {
                    faults.push(not_a_regex(place, &what));
                    Self::Whole(None)
                }
            },
        }
    }

    fn matches(&self, name: &str) -> bool {
        match self {
            Self::Names(names) => names.iter().any(|typed| is_suffix(typed, name)),
            Self::Whole(regex) => regex.as_ref().is_some_and(|regex| regex.is_match(name)),
        }
    }

    /// As PEFT: a module named in full is in whatever its layer.
    fn matches_in(&self, name: &str, layers: Option<&[u32]>) -> bool {
        match self {
            Self::Names(names) if names.iter().any(|typed| typed == name) => true,
            _ => self.matches(name) && in_layers(name, layers),
        }
    }
}

/// Whether `name` is `typed` or ends in `.typed`.
pub(super) fn is_suffix(typed: &str, name: &str) -> bool {
    name.strip_suffix(typed).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// The layer of a module, as PEFT reads it: the first number that is a part of the path of its own, from the third part on, with
/// something behind it (so that an expert's number is not taken for it).
fn layer(name: &str) -> Option<u32> {
    let parts: Vec<&str> = name.split('.').collect();
    let inner = parts.get(2..parts.len().checked_sub(1)?)?;
    inner.iter().find(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))?.parse().ok()
}

fn in_layers(name: &str, layers: Option<&[u32]>) -> bool {
    layers.is_none_or(|layers| layer(name).is_some_and(|own| layers.contains(&own)))
}

/// Compiles an expression as typed, then wrapped: `a)|(b` must not become valid by being wrapped.
fn compiled(typed: &str, wrap: impl Fn(&str) -> String) -> Result<Regex, String> {
    Regex::new(typed).and_then(|_| Regex::new(&wrap(typed))).map_err(|error| error.to_string())
}

fn not_a_regex(place: &str, what: &str) -> Fault {
    let fault = Fault::new(place, format!("is not a regular expression engraft can read: {what}"));
    if what.contains("look-around") {
        return fault.hint("say what to leave out in adapter.exclude_modules instead of (?!...)");
    }
    fault.hint("the syntax is https://docs.rs/regex/1/#syntax; a literal dot is \\.")
}

fn check_layers(names: &[&str], only: Option<&[u32]>, faults: &mut Vec<Fault>) {
    let there: BTreeSet<u32> = names.iter().filter_map(|name| layer(name)).collect();
    let missing: Vec<String> =
        only.unwrap_or_default().iter().filter(|own| !there.contains(own)).map(u32::to_string).collect();
    if missing.is_empty() {
        return;
    }
    let fault = Fault::new("adapter.layers_to_transform", format!("there is no layer {}", missing.join(", ")));
    faults.push(match (there.first(), there.last()) {
        (Some(first), Some(last)) => fault.hint(format!("the model's layers are {first} to {last}")),
        _ => fault.hint("this model's modules have no layer numbers"),
    });
}

/// Everything typed must mean something.
fn check_matches(
    place: &str,
    typed: &Targets,
    matcher: &Matcher,
    names: &[&str],
    sites: &[Site],
    faults: &mut Vec<Fault>,
) {
    let there = format!("there are: {}", overview(&site_names(sites)));
    match typed {
        Targets::Names(typed) if typed.is_empty() => {
            faults.push(Fault::new(place, "is an empty list").hint(there));
        }
        Targets::Names(typed) => {
            for one in typed.iter().filter(|one| !names.iter().any(|name| is_suffix(one, name))) {
                let fault = Fault::new(place, format!("'{one}' matches no linear of this model"));
                faults.push(if one.eq_ignore_ascii_case("all-linear") {
                    fault.hint("write it by itself, not in a list: target_modules: all-linear")
                } else if one.contains(['*', '(', '[', '\\', '^', '|']) {
                    fault.hint(format!("a regular expression is written by itself, not in a list; {there}"))
                } else {
                    fault.hint(match nearest(one, names) {
                        Some(near) => format!("the nearest is {near}; {there}"),
                        None => there.clone(),
                    })
                });
            }
        }
        Targets::Pattern(text) => {
            if matches!(matcher, Matcher::Whole(Some(_))) && !names.iter().any(|name| matcher.matches(name)) {
                let fault = Fault::new(place, format!("'{text}' matches no linear of this model"));
                faults.push(if names.iter().any(|name| is_suffix(text, name)) {
                    fault.hint(format!(
                        "a string is a regular expression over the whole path, as in {}; write names as a list: [{text}]",
                        names[0]
                    ))
                } else {
                    fault.hint(format!("it must match the whole path, as in {}; {there}", names.first().unwrap_or(&"")))
                });
            }
        }
    }
}

fn nearest<'a>(typed: &str, names: &[&'a str]) -> Option<&'a str> {
    let parts = typed.split('.').count();
    let tail = |name: &'a str| {
        let start = name.rmatch_indices('.').nth(parts - 1).map_or(0, |(at, _)| at + 1);
        &name[start..]
    };
    let likeness = |name: &str| strsim::jaro_winkler(name, typed);
    names
        .iter()
        .map(|name| tail(name))
        .max_by(|a, b| likeness(a).total_cmp(&likeness(b)))
        .filter(|near| likeness(near) > 0.8)
}

/// PEFT's condensing of a list of 20 names or more: the shortest suffixes that still keep clear of every other module.
///
/// The other modules are the linears that are not meant, and the blocks that hold linears.
pub(super) fn condensed(mut targets: Vec<String>, names: &[&str]) -> Targets {
    let mut seen = BTreeSet::new();
    targets.retain(|target| seen.insert(target.clone()));
    if targets.len() < LONG_LIST {
        return Targets::Names(targets);
    }
    let others: BTreeSet<&str> = names
        .iter()
        .flat_map(|name| name.match_indices('.').map(|(at, _)| &name[..at]).chain([*name]))
        .filter(|name| !targets.iter().any(|target| is_suffix(target, name)))
        .flat_map(suffixes)
        .collect();
    let by_suffixes: BTreeMap<Vec<&str>, &str> =
        targets.iter().map(|target| (suffixes(target).collect(), target.as_str())).collect();
    let mut required: BTreeSet<&str> = BTreeSet::new();
    for (suffixes, target) in &by_suffixes {
        for suffix in suffixes {
            let covered = || required.iter().any(|known| target.len() > known.len() && is_suffix(known, target));
            if !required.contains(suffix) && !others.contains(suffix) && !covered() {
                required.insert(suffix);
                break;
            }
        }
    }
    if required.is_empty() || required.len() >= targets.len() {
        return Targets::Names(targets);
    }
    Targets::Names(required.into_iter().map(ToString::to_string).collect())
}

/// The ends of a path at its dots, shortest first.
fn suffixes(name: &str) -> impl Iterator<Item = &str> {
    name.rmatch_indices('.').map(move |(at, _)| &name[at + 1..]).chain([name])
}

/// The first few of many notices.
fn few(mut notices: Vec<String>) -> Vec<String> {
    const SHOWN: usize = 3;
    if notices.len() > SHOWN + 1 {
        let more = notices.len() - SHOWN;
        notices.truncate(SHOWN);
        notices.push(format!("and {more} more modules likewise"));
    }
    notices
}

#[cfg(test)]
mod tests {
    use super::*;

    // Against PEFT's own answers: `super::super::tests`. Here, the edges that ordinary models do not have.

    #[test]
    fn a_name_is_a_suffix_at_a_dot_only() {
        assert!(is_suffix("o_proj", "model.layers.0.self_attn.o_proj") && is_suffix("lm_head", "lm_head"));
        assert!(!is_suffix("proj", "model.layers.0.self_attn.o_proj") && !is_suffix("a.lm_head", "lm_head"));
    }

    #[test]
    fn the_layer_is_the_first_number_pefts_expression_finds() {
        for (name, expected) in [
            ("model.layers.12.self_attn.q_proj", Some(12)),
            ("model.layers.1.mlp.experts.7.up_proj", Some(1)),
            ("transformer.h.3.attn", Some(3)),
            // `.*?\.[^.]*\.(\d+)\.` wants two parts before the number and one behind it.
            ("h.3.attn.c_attn", None),
            ("model.layers.3", None),
            ("lm_head", None),
        ] {
            assert_eq!(layer(name), expected, "{name}");
        }
    }

    #[test]
    fn a_pattern_matches_whole_parts_up_to_the_end_and_the_first_counts() {
        let map: BTreeMap<String, u32> =
            [("proj", 1), ("q_proj", 2), ("layers.0", 3), ("k_proj|v_proj", 4), ("self_attn..*", 5)]
                .map(|(key, r)| (key.to_string(), r))
                .into();
        let mut faults = Vec::new();
        let patterns = Patterns::new("adapter.rank_pattern", &map, &mut faults);
        assert!(faults.is_empty());
        assert_eq!(patterns.value("model.layers.0.mlp.up_proj"), None);
        assert_eq!(patterns.value("model.layers.0.cross.q_proj"), Some(2));
        assert_eq!(patterns.value("model.layers.0.self_attn.v_proj"), Some(4));
        assert_eq!(patterns.value("model.layers.0.self_attn.q_proj"), Some(2));
        assert_eq!(patterns.value("model.layers.0.self_attn.o_proj"), Some(5));
    }
}
