//! The numbers that combined adapters were trained on.

use std::collections::BTreeMap;

use crate::adapter::{LoadedAdapter, TrainedOn};
use crate::{Error, Fault, Result};

/// What the base of the sum is: the adapters' own where all were trained on the same numbers, in as far as they say; none where that is the
/// base as it is. Where they differ it is none, too, and the sentence says so.
///
/// Errors with [`Error::Model`], naming the adapter: one that is an update of what was left of a quantised base, which has no place in a
/// sum; two for bases that are stored quantised in one form, with other numbers: they cannot be the same base.
pub fn trained_on(adapters: &[LoadedAdapter]) -> Result<(Option<TrainedOn>, Option<String>)> {
    let all: Vec<Option<TrainedOn>> = adapters.iter().map(LoadedAdapter::trained_on).collect::<Result<_>>()?;
    for (adapter, on) in adapters.iter().zip(&all) {
        if let Some(TrainedOn { scheme, .. }) = on.as_ref().filter(|on| on.scheme.after_start) {
            let what = format!("is an update of what was left of a base quantised as {scheme}");
            let hint = "combine adapters that were trained on the base as it is";
            return Err(Error::Model(Fault::at(&adapter.folder, what).hint(hint)));
        }
    }
    let Some(first) = all.first().cloned().flatten() else {
        let other = all.iter().position(Option::is_some);
        return Ok((None, other.map(|other| differing(adapters, &all, other))));
    };
    let mut weights = BTreeMap::new();
    for (index, on) in all.iter().enumerate() {
        let same = on.as_ref().filter(|on| (&on.scheme, &on.stored) == (&first.scheme, &first.stored));
        let Some(on) = same else { return Ok((None, Some(differing(adapters, &all, index)))) };
        for (module, digest) in &on.weights {
            if weights.entry(module.clone()).or_insert(*digest) == digest {
                continue;
            }
            let what = format!(
                "was trained on another {module} than an adapter before it, both in a base quantised as {}",
                first.scheme
            );
            if !first.scheme.form.can_be_made() {
                let fault = Fault::at(&adapters[index].folder, what);
                return Err(Error::Model(fault.hint("combine adapters of the same base")));
            }
            let what = format!(
                "{}: {what}: their bases differ, or were quantised by other programs or on other devices; {LEFT}",
                adapters[index].folder.display()
            );
            return Ok((None, Some(what)));
        }
    }
    Ok((Some(TrainedOn { weights, ..first }), None))
}

const LEFT: &str = "the sum does not say what it is for, and is taken as one for the base as it is";

fn differing(adapters: &[LoadedAdapter], all: &[Option<TrainedOn>], other: usize) -> String {
    let told = |index: usize| {
        let on = match &all[index] {
            Some(on) => format!(
                "quantised as {}{}",
                on.scheme,
                on.stored.iter().map(|laid| format!(", {laid}")).collect::<String>()
            ),
            None => "as it is".to_string(),
        };
        format!("{} on its base {on}", adapters[index].folder.display())
    };
    format!("{} was trained, {}: {LEFT}", told(0), told(other))
}
