//! Any low-rank adapter as plain LoRA on the base as it was: one rank, one scale, nothing that a reader would have to look up.
//!
//! Servers read less of `adapter_config.json` than PEFT does. What they pass over (a rank-stabilised scale, ranks and scales by
//! pattern) makes the adapter silently another one there, so it is folded into B: `s B A = (s B) A`, and with `lora_alpha = r` every
//! reader's own scale is 1. A smaller rank is filled up with zeros. What was taken off the base before training is part of the
//! update again, at twice the rank, as PEFT's `subtract_mutated_init` converts PiSSA and OLoRA.

use std::collections::{BTreeMap, BTreeSet};

use tch::Tensor;

use super::config::AdapterConfig;
use super::targets::condensed;
use super::{Update, layout, scale_numerator};
use crate::model::names::Names;
use crate::model::sites::{Role, Site};
use crate::recipe::{InitLora, Targets};
use crate::{Error, Fault, Result};

/// What a reader makes of an adapter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reader {
    /// Whether it divides by the root of the rank where the config says `use_rslora`.
    pub rank_stabilised: bool,
    /// What it needs updates of, beside those there are.
    pub fill: Fill,
}

/// Linears that a reader needs an update of where others have one; they get one of zeros.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fill {
    /// Each stands for itself.
    Nothing,
    /// Where a linear of one layer has an update, it must have one in all layers.
    Layers,
    /// Linears that it stacks, by the ends of their paths: all of a stack, or none.
    Stacks(&'static [&'static [&'static str]]),
}

/// An adapter for such a reader.
#[derive(Debug)]
pub struct Plain {
    /// What `adapter_config.json` says of it.
    pub config: AdapterConfig,
    /// In checkpoint order; all of the same rank and scale.
    pub updates: Vec<Update>,
    /// Whether the scale went into B.
    pub folded: bool,
    /// How many updates of zeros were added.
    pub filled: usize,
}

/// `updates` of a base with these `sites`, as `config` describes them, for `reader`.
///
/// Errors with [`Error::Model`] where lengths are trained (DoRA): no pair of matrices does what they do.
pub fn plain(
    config: &AdapterConfig,
    updates: &[Update],
    sites: &[Site],
    names: &Names,
    reader: Reader,
) -> Result<Plain> {
    if let Some(update) = updates.iter().find(|update| update.lengths.is_some()) {
        let fault = Fault::new(&update.module, "has trained lengths (DoRA), which are no part of plain LoRA");
        return Err(Error::Model(fault.hint("merge it into its base: --merge")));
    }
    let mut updates: Vec<Update> = updates.iter().map(Update::of_the_original).collect();
    let Some(r) = updates.iter().map(Update::rank).max() else {
        return Err(Error::Model(Fault::new("adapter", "has no low-rank updates")));
    };
    let uneven = updates.iter().any(|update| update.rank() != r || update.scale != updates[0].scale);
    let folded = uneven || (config.use_rslora && !reader.rank_stabilised);
    if folded {
        updates = updates.iter().map(|update| filled_up(update, r)).collect();
    }
    let scale = updates[0].scale;
    let missing = missing(&updates, sites, reader.fill);
    let filled = missing.len();
    updates.extend(missing.into_iter().map(|index| zeros(&sites[index], r, scale)));
    let places: BTreeMap<&str, usize> = sites.iter().zip(0..).map(|(site, at)| (site.name.as_str(), at)).collect();
    updates.sort_by_key(|update| places.get(update.module.as_str()).copied());

    let rank = r as u32;
    let use_rslora = config.use_rslora && !folded;
    let modules: Vec<String> = updates.iter().map(|update| update.module.clone()).collect();
    let mut plain = AdapterConfig {
        base_model_name_or_path: config.base_model_name_or_path.clone(),
        revision: config.revision.clone(),
        r: rank,
        lora_alpha: scale_numerator(scale, rank, use_rslora),
        lora_dropout: config.lora_dropout,
        use_rslora,
        use_dora: false,
        target_modules: Some(named(modules, sites, names.among_others)),
        target_parameters: None,
        exclude_modules: None,
        layers_to_transform: None,
        layers_pattern: None,
        rank_pattern: Vec::new(),
        alpha_pattern: Vec::new(),
        init_lora_weights: InitLora::Kaiming,
        modules_to_save: None,
        trainable_token_indices: None,
        ensure_weight_tying: false,
    };
    let chosen: Vec<(usize, u32, f64)> =
        updates.iter().filter_map(|update| Some((*places.get(update.module.as_str())?, rank, scale))).collect();
    layout::describe(&mut plain, sites, names, &chosen)?;
    Ok(Plain { config: plain, updates, folded, filled })
}

/// The same update at rank `r` and scale 1.
pub(super) fn filled_up(update: &Update, r: i64) -> Update {
    let more = r - update.rank();
    let (a, b) = (update.a.detach(), update.b.detach() * update.scale);
    let (a, b) = match more {
        0 => (a, b),
        // Of the last dimensions, from the last on: rows of A, columns of B.
        _ => (a.constant_pad_nd([0, 0, 0, more]), b.constant_pad_nd([0, more])),
    };
    Update { a, b, scale: 1.0, ..update.shallow_clone() }
}

/// An update of zeros.
fn zeros(site: &Site, r: i64, scale: f64) -> Update {
    let of = |rows, columns| Tensor::zeros([rows, columns], (tch::Kind::Float, tch::Device::Cpu));
    Update {
        module: site.name.clone(),
        role: site.role.clone(),
        a: of(r, site.shape.1),
        b: of(site.shape.0, r),
        scale,
        lengths: None,
        taken: None,
    }
}

/// Sites without an update that a reader needs one of.
fn missing(updates: &[Update], sites: &[Site], fill: Fill) -> Vec<usize> {
    let there: BTreeSet<&str> = updates.iter().map(|update| update.module.as_str()).collect();
    let needed = |site: &Site| match fill {
        Fill::Nothing => false,
        Fill::Layers => there.iter().any(|name| apart_from_layer(name) == apart_from_layer(&site.name)),
        Fill::Stacks(stacks) => {
            let (block, own) = site.name.rsplit_once('.').unwrap_or(("", &site.name));
            let stack = stacks.iter().find(|stack| stack.contains(&own));
            stack.is_some_and(|stack| stack.iter().any(|other| there.contains(format!("{block}.{other}").as_str())))
        }
    };
    let candidates = sites.iter().enumerate().filter(|(_, site)| site.role == Role::Linear);
    candidates.filter(|(_, site)| !there.contains(site.name.as_str()) && needed(site)).map(|(index, _)| index).collect()
}

/// A module's path, its layer's number left out.
fn apart_from_layer(name: &str) -> String {
    let mut parts: Vec<&str> = name.split('.').collect();
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    if let Some(at) = parts.iter().position(|part| is_number(part)) {
        parts[at] = "*";
    }
    parts.join(".")
}

/// `target_modules` that mean exactly these modules: the last parts of their paths where that is enough, which every reader
/// understands; full paths where it is not, or where the model is a part of a larger one whose modules end so, too.
fn named(modules: Vec<String>, sites: &[Site], among_others: bool) -> Targets {
    let last = |name: &str| name.rsplit('.').next().unwrap_or(name).to_string();
    let mut ends: Vec<String> = Vec::new();
    for end in modules.iter().map(|module| last(module)) {
        if !ends.contains(&end) {
            ends.push(end);
        }
    }
    let all: Vec<String> = sites.iter().flat_map(Site::modules).collect();
    let blocks: BTreeSet<&str> =
        all.iter().flat_map(|name| name.match_indices('.').map(|(at, _)| &name[..at])).collect();
    let meant = all.iter().map(String::as_str).chain(blocks).filter(|name| ends.contains(&last(name))).count();
    if meant == modules.len() && !among_others {
        return Targets::Names(ends);
    }
    condensed(modules, &all.iter().map(String::as_str).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::LoadedAdapter;
    use crate::model::families;
    use crate::recipe::BaseSource;
    use crate::weights::Checkpoint;
    use std::path::Path;
    use tch::Kind;

    const SERVER: Reader = Reader { rank_stabilised: false, fill: Fill::Nothing };

    /// An adapter of `tests/fixtures/peft` on its base.
    fn fitted(name: &str, base: &str) -> (LoadedAdapter, Vec<Update>, crate::model::ModelSpec) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft");
        let loaded = LoadedAdapter::read(&folder.join(name)).unwrap();
        let checkpoint = Checkpoint::open(&BaseSource::Folder(folder.join(format!("base-{base}")))).unwrap();
        let spec = families::spec(&checkpoint).unwrap();
        let updates = loaded.fit(&spec.sites(), &spec.names).unwrap().into_values().collect();
        (loaded, updates, spec)
    }

    fn product(update: &Update) -> Tensor {
        update.b.matmul(&update.a) * update.scale
    }

    fn largest(tensor: &Tensor) -> f64 {
        tensor.abs().max().double_value(&[])
    }

    #[test]
    fn patterns_and_rank_stabilised_scales_go_into_b_at_one_rank() {
        let (loaded, updates, spec) = fitted("patterns", "tied");
        assert!(loaded.config.use_rslora && !loaded.config.rank_pattern.is_empty());
        let plain = plain(&loaded.config, &updates, &spec.sites(), &spec.names, SERVER).unwrap();
        assert!(plain.folded);
        assert_eq!(plain.filled, 0);
        let config = &plain.config;
        assert_eq!((config.r, config.lora_alpha, config.use_rslora), (3, 3.0, false));
        assert!(config.rank_pattern.is_empty() && config.alpha_pattern.is_empty());
        assert!(config.exclude_modules.is_none() && config.layers_to_transform.is_none());
        assert_eq!(plain.updates.len(), updates.len());
        for (before, after) in updates.iter().zip(&plain.updates) {
            assert_eq!((before.module.as_str(), after.rank(), after.scale), (after.module.as_str(), 3, 1.0));
            assert!(
                largest(&(product(before) - product(after))) < 1e-6 * largest(&product(before)),
                "{}",
                before.module
            );
        }
        // Not every o_proj has one, so short names would say too much.
        let Some(Targets::Names(targets)) = &config.target_modules else { panic!() };
        assert!(targets.iter().all(|name| name.contains("layers.")), "{targets:?}");
    }

    #[test]
    fn an_adapter_that_is_plain_already_stays_as_it_is() {
        let (loaded, updates, spec) = fitted("names", "tied");
        let plain = plain(&loaded.config, &updates, &spec.sites(), &spec.names, SERVER).unwrap();
        assert!(!plain.folded);
        assert_eq!((plain.config.r, plain.config.lora_alpha), (2, 5.5));
        assert!(updates.iter().zip(&plain.updates).all(|(before, after)| before.b.equal(&after.b)));
        assert_eq!(plain.config.target_modules, Some(Targets::Names(vec!["q_proj".into(), "v_proj".into()])));
    }

    #[test]
    fn a_reader_that_knows_rank_stabilised_scales_is_left_them() {
        let (loaded, updates, spec) = fitted("names", "tied");
        let config = AdapterConfig { use_rslora: true, ..loaded.config.clone() };
        let root = 2f64.sqrt();
        let stabilised: Vec<Update> =
            updates.iter().map(|update| Update { scale: 5.5 / root, ..update.shallow_clone() }).collect();
        let plain = |reader| plain(&config, &stabilised, &spec.sites(), &spec.names, reader).unwrap();
        let knows = plain(Reader { rank_stabilised: true, ..SERVER });
        assert!(!knows.folded && knows.config.use_rslora);
        assert!((knows.config.lora_alpha - 5.5).abs() < 1e-12, "{}", knows.config.lora_alpha);
        let does_not = plain(SERVER);
        assert!(does_not.folded && !does_not.config.use_rslora);
        assert_eq!((does_not.config.r, does_not.config.lora_alpha), (2, 2.0));
        for (before, after) in stabilised.iter().zip(&does_not.updates) {
            assert!(largest(&(product(before) - product(after))) < 1e-6 * largest(&product(before)));
        }
    }

    #[test]
    fn what_was_taken_off_the_base_is_part_of_the_update_again() {
        let (loaded, updates, spec) = fitted("names", "tied");
        let start = |update: &Update| (update.a.ones_like() * 0.5, update.b.ones_like() * 0.25);
        let taken: Vec<Update> =
            updates.iter().map(|update| Update { taken: Some(start(update)), ..update.shallow_clone() }).collect();
        let plain = plain(&loaded.config, &taken, &spec.sites(), &spec.names, SERVER).unwrap();
        assert_eq!((plain.config.r, plain.config.lora_alpha), (4, 11.0));
        for (before, after) in taken.iter().zip(&plain.updates) {
            let (a, b) = before.taken.as_ref().unwrap();
            let expected = product(before) - b.matmul(a) * before.scale;
            assert!(largest(&(expected - product(after))) < 1e-6, "{}", before.module);
        }
    }

    #[test]
    fn readers_that_need_more_updates_get_them_of_zeros() {
        let (loaded, updates, spec) = fitted("layers", "tied");
        let sites = spec.sites();
        let plain = |fill| plain(&loaded.config, &updates, &sites, &spec.names, Reader { fill, ..SERVER }).unwrap();
        // k_proj and gate_proj of layers 0 and 2 of three.
        let layers = plain(Fill::Layers);
        assert_eq!((layers.filled, layers.updates.len()), (2, 6));
        assert_eq!(layers.config.target_modules, Some(Targets::Names(vec!["k_proj".into(), "gate_proj".into()])));
        let stacks = plain(Fill::Stacks(&[&["q_proj", "k_proj", "v_proj"], &["gate_proj", "up_proj"]]));
        assert_eq!((stacks.filled, stacks.updates.len()), (6, 10));
        for added in stacks.updates.iter().filter(|update| updates.iter().all(|own| own.module != update.module)) {
            assert_eq!(added.b.abs().sum(Kind::Float).double_value(&[]), 0.0, "{}", added.module);
        }
        let order: Vec<usize> = stacks
            .updates
            .iter()
            .map(|update| sites.iter().position(|site| site.name == update.module).unwrap())
            .collect();
        assert!(order.is_sorted(), "{order:?}");
    }

    #[test]
    fn trained_lengths_are_refused_with_the_way_out() {
        let (loaded, mut updates, spec) = fitted("names", "tied");
        updates[1].lengths = Some(Tensor::ones([4], (Kind::Float, tch::Device::Cpu)));
        let error = plain(&loaded.config, &updates, &spec.sites(), &spec.names, SERVER).unwrap_err();
        assert!(error.to_string().contains("DoRA") && error.to_string().contains("--merge"), "{error}");
    }
}
