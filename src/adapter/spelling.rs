//! Modules that a person or a file calls as the checkpoint does, called as transformers does: PEFT looks for them there.

use regex::Regex;

use super::config::AdapterConfig;
use super::{Update, targets::is_suffix};
use crate::model::names::Names;
use crate::model::sites::Site;
use crate::recipe::{AdapterRecipe, Targets};

/// The recipe, its targets in transformers' spelling.
pub(super) fn respelled(recipe: &AdapterRecipe, sites: &[Site], names: &Names) -> AdapterRecipe {
    let linears: Vec<String> = sites.iter().flat_map(Site::modules).collect();
    let linears: Vec<&str> = linears.iter().map(String::as_str).collect();
    let respelled = |typed: &Targets| targets(typed, &linears, names);
    AdapterRecipe {
        target_modules: respelled(&recipe.target_modules),
        exclude_modules: recipe.exclude_modules.as_ref().map(respelled),
        ..recipe.clone()
    }
}

/// What means modules in another spelling is replaced by their paths; all else stays as it was typed.
fn targets(typed: &Targets, linears: &[&str], names: &Names) -> Targets {
    let otherwise = |linear: &&str, means: &dyn Fn(&str) -> bool| {
        !means(linear) && names.spellings(linear).any(|spelling| means(&spelling))
    };
    let all =
        |means: &dyn Fn(&str) -> bool| linears.iter().copied().filter(|l| otherwise(l, means)).collect::<Vec<_>>();
    let mut listed = Vec::new();
    match typed {
        Targets::Names(typed) => {
            for one in typed {
                let means = |name: &str| is_suffix(one, name);
                let others = all(&means);
                if others.is_empty() || linears.iter().any(|name| means(name)) {
                    listed.push(one.clone());
                }
                listed.extend(others.into_iter().map(ToString::to_string));
            }
        }
        Targets::Pattern(text) => {
            let Ok(regex) = Regex::new(&format!("^(?:{text})$")) else { return typed.clone() };
            let means = |name: &str| regex.is_match(name);
            let others = all(&means);
            if others.is_empty() {
                return typed.clone();
            }
            let meant = linears.iter().filter(|name| means(name) || others.contains(name));
            listed.extend(meant.map(ToString::to_string));
        }
    }
    Targets::Names(listed)
}

impl AdapterConfig {
    /// Says module by module what is adapted, and how, instead of by patterns.
    pub(super) fn spell_out(&mut self, updates: &[Update]) {
        self.target_modules = Some(Targets::Names(updates.iter().map(|update| update.module.clone()).collect()));
        (self.exclude_modules, self.layers_to_transform, self.layers_pattern) = (None, None, None);
        if self.rank_pattern.is_empty() && self.alpha_pattern.is_empty() {
            return;
        }
        let rank = Update::rank;
        let of = |r: i64| if self.use_rslora { (r as f64).sqrt() } else { r as f64 };
        let ranks = updates.iter().filter(|update| rank(update) != i64::from(self.r));
        self.rank_pattern = ranks.map(|update| (update.module.clone(), rank(update) as u32)).collect();
        let alphas = updates.iter().map(|update| (update.module.clone(), update.scale * of(rank(update))));
        self.alpha_pattern = alphas.filter(|(_, alpha)| (alpha - self.lora_alpha).abs() > 1e-9 * alpha.abs()).collect();
    }
}
