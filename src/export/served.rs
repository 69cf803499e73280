//! A folder that a server loads: an adapter as it reads one, or the whole model.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use tch::Kind;

use super::folder::Staging;
use super::target::{self, AdapterRules, Layout, Target};
use super::{merged, mlx, peft, sidecars};
use crate::Result;
use crate::adapter::config::CONFIG;
use crate::adapter::plain::plain;
use crate::adapter::{AdapterConfig, Learned, TrainedOn};
use crate::model::ModelSpec;
use crate::quant::Scheme;
use crate::weights::Checkpoint;

/// What is to be served.
#[derive(Debug, Clone, Copy)]
pub struct Served<'a> {
    /// The base, with the tokens that were added.
    pub checkpoint: &'a Checkpoint,
    /// Its spec.
    pub spec: &'a ModelSpec,
    /// What `adapter_config.json` says, with the base's name.
    pub config: &'a AdapterConfig,
    /// What was learned; nothing where the checkpoint is a merged model.
    pub learned: Learned<'a>,
    /// How the base was quantised when the adapter was trained.
    pub trained_on: Option<&'a TrainedOn>,
    /// The numbers that the update is folded into, where not the base's own.
    pub onto: Option<&'a Scheme>,
    /// Source of the chat template it was trained with, where one is known.
    pub template: Option<&'a str>,
}

impl Served<'_> {
    /// What `target` cannot load of it, as an error, and what the one who serves it must know: see [`target::prove`].
    pub fn prove(&self, target: Target, merge: bool) -> Result<Vec<String>> {
        let mut notices = target::prove(target, merge, self.spec, self.config, self.learned)?;
        let name = target::rules(target).name;
        if self.template.is_some_and(|own| base_template(self.checkpoint).as_deref() != Some(own)) {
            let beside = match (merge, target) {
                (true, _) | (_, Target::Transformers) => "it is in the folder".to_string(),
                _ => format!("beside an adapter, {name} takes the base's unless it is given chat_template.jinja"),
            };
            notices
                .push(format!("the chat template is the one it was trained with, which is not the base's: {beside}"));
        }
        let rows = self.checkpoint.config["vocab_size"].as_i64().unwrap_or(i64::MAX);
        if self.checkpoint.vocabulary > rows {
            let more = self.checkpoint.vocabulary - rows;
            notices.push(format!("the model has {more} more rows of tokens than its base; the tokenizer goes with it"));
        }
        if let Some(TrainedOn { scheme, .. }) = self.trained_on.filter(|_| !merge) {
            notices.push(format!("it was trained on its base quantised as {scheme}: on another form of the base it answers a little otherwise"));
        }
        Ok(notices)
    }

    /// Writes what `target` loads into `folder`, whole or not at all: the adapter, or with `merge` the whole model stored as `kind`.
    /// An earlier export at its place is replaced. Gives what [`Served::prove`] says, and what was changed for the target.
    ///
    /// Errors: those of [`Served::prove`] and of the writers, before anything is written but for a disk that fails.
    pub fn write(
        &self,
        folder: &Path,
        target: Target,
        merge: bool,
        kind: Kind,
        progress: &dyn Fn(u64, u64),
    ) -> Result<Vec<String>> {
        let mut notices = self.prove(target, merge)?;
        let Self { checkpoint, spec, config, learned, trained_on, onto, template } = *self;
        let sidecars = sidecars(checkpoint, template);
        if merge {
            let made = merged::write(folder, checkpoint, learned, onto, kind, &sidecars, progress)?;
            notices.extend(trained_on.filter(|_| onto.is_some()).and_then(|on| on.differing(&made)));
            return Ok(notices);
        }
        let rules = target::rules(target);
        let AdapterRules::Plain { layout, reader, .. } = rules.adapters else {
            peft::write(folder, config, learned, trained_on, &sidecars)?;
            return Ok(notices);
        };
        let plain = plain(config, learned.updates, &spec.sites(), &spec.names, reader)?;
        if plain.folded {
            notices.push(format!(
                "{} passes over ranks and scales of single modules, or rank-stabilised ones: they are in B, at rank {} and scale 1",
                rules.name, plain.config.r
            ));
        }
        if plain.filled > 0 {
            let count = plain.filled;
            notices
                .push(format!("{count} updates of zeros are added, without which {} passes over others", rules.name));
        }
        match layout {
            Layout::Peft => peft::write(folder, &plain.config, plain.updates.as_slice().into(), None, &sidecars)?,
            Layout::Mlx => {
                let staging = Staging::create(folder, |name| ours(name, &sidecars))?;
                mlx::write(staging.path(), &plain, spec, &sidecars)?;
                staging.commit()?;
            }
        }
        Ok(notices)
    }
}

/// Whether an adapter for mlx-lm may replace a file of this name.
fn ours(name: &str, sidecars: &BTreeMap<String, Vec<u8>>) -> bool {
    [CONFIG, mlx::WEIGHTS, "README.md"].contains(&name) || sidecars.contains_key(name) || peft::tokenizer_file(name)
}

/// The chat template of a base's own files.
fn base_template(checkpoint: &Checkpoint) -> Option<String> {
    if let Some(file) = checkpoint.sidecars.get("chat_template.jinja") {
        return String::from_utf8(file.clone()).ok();
    }
    let config: Value = serde_json::from_slice(checkpoint.sidecars.get("tokenizer_config.json")?).ok()?;
    config["chat_template"].as_str().map(ToString::to_string)
}
