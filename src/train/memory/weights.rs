//! What a base takes of memory, known from its files' headers: each tensor as it is kept, in the order in which it is read.

use std::collections::{HashMap, HashSet};

use tch::Kind;

use crate::model::ModelSpec;
use crate::model::sites::{Role, Site};
use crate::quant::{Products, Scheme};
use crate::weights::Checkpoint;

/// What a base takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Weights {
    /// As it is kept.
    pub(super) kept: u64,
    /// The most at once while it is read.
    pub(super) loading: u64,
}

impl Weights {
    /// Of a base of this `spec` kept in `kind`, its linears as `scheme` says.
    pub(super) fn of(spec: &ModelSpec, checkpoint: Option<&Checkpoint>, kind: Kind, scheme: Option<&Scheme>) -> Self {
        let stored = |name: &str| spec.names.stored(name);
        let keeps_stored = scheme.is_some_and(|s| checkpoint.and_then(Checkpoint::quantised_form) == Some(s.form));
        let sites = spec.sites();
        let by_module = by_module(&sites);
        let site_of = |name: &str| by_module.get(&spec.names.module(name.strip_suffix(".weight").unwrap_or(name)));
        let element = kind.elt_size_in_bytes() as u64;
        // The embedding is read first, the head last, the blocks in between.
        let head = format!("{}.weight", spec.head.name);
        let mut tensors: Vec<(String, Vec<i64>)> = spec.tensors().into_iter().collect();
        tensors.sort_by_key(|(name, _)| match () {
            () if *name == spec.embedding.weight => 0,
            () if *name == head => 2,
            () => 1,
        });
        let mut found = Self::default();
        let mut gathered: HashMap<&str, u64> = HashMap::new();
        let wide: HashSet<String> = spec.wide_tensors().into_iter().collect();
        for (name, shape) in tensors {
            let numbers = shape.iter().product::<i64>() as u64;
            let site = site_of(&name).copied();
            let dense = numbers * if wide.contains(&name) { 4 } else { element };
            let whole_numbers = checkpoint.and_then(|checkpoint| checkpoint.whole_kind(&stored(&name)));
            let kept = match (scheme, site) {
                _ if whole_numbers.is_some() => 8 * numbers,
                (Some(scheme), Some(site))
                    if scheme.kind == kind
                        && scheme.products != Products::Cached
                        && site.quantisable(spec.head.tied) =>
                {
                    let module = spec.names.module(name.strip_suffix(".weight").unwrap_or(&name));
                    if keeps_stored {
                        checkpoint.and_then(|checkpoint| checkpoint.quantised_bytes(&stored(&name))).unwrap_or(dense)
                    } else if scheme.skips(&module) {
                        dense
                    } else {
                        scheme.form.bytes(&shape).unwrap_or(dense)
                    }
                }
                _ => dense,
            };
            // What is not kept as it is read is there whole for a moment, and so are all experts where they are made whole again.
            let together = site.filter(|site| matches!(site.role, Role::Experts { .. })).map_or(0, |site| {
                let before = gathered.entry(&site.name).or_default();
                *before += numbers * element;
                *before
            });
            let read = checkpoint.map_or(0, |checkpoint| checkpoint.bytes_while_read(&stored(&name), kind));
            let whole = match scheme.map(|scheme| scheme.products) {
                Some(Products::Cached) => dense.max(together),
                _ if kept < dense => dense,
                _ => 0,
            };
            found.loading = found.loading.max(found.kept + kept + whole + read);
            found.kept += kept;
        }
        Self { loading: found.loading.max(found.kept), ..found }
    }
}

/// Sites by the paths of the modules, or of the parameter, that their weights are.
fn by_module(sites: &[Site]) -> HashMap<String, &Site> {
    let paths = |site: &Site| match site.role {
        Role::Experts { .. } => {
            site.parameters().into_iter().map(|path| path.trim_end_matches(".weight").to_string()).collect()
        }
        _ => site.modules(),
    };
    sites.iter().flat_map(|site| paths(site).into_iter().map(move |path| (path, site))).collect()
}
