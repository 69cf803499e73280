//! A folder that a server loads: an adapter as it reads one, or the whole model.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::card;
use super::folder::{Staging, is_ours};
use super::probe::{About, Answers, PROBE, Probe};
use super::target::{self, AdapterRules, ExportChoice, Layout, Target};
use super::{gguf, merged, mlx, ollama, peft, sidecars};
use crate::adapter::plain::plain;
use crate::adapter::{AdapterConfig, Learned, TrainedOn};
use crate::data::Encoder;
use crate::model::{ModelSpec, families};
use crate::quant::{Form, FourBitType, Scheme};
use crate::recipe::{BaseSource, Dtype, FileType};
use crate::weights::{Checkpoint, writer};
use crate::{Error, Fault, Result};

/// The small files of an export beside what its target loads: probes, model card.
pub type Beside = BTreeMap<String, Vec<u8>>;

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
    /// What a target cannot load of it, as an error, and what the one who serves it must know: see [`target::prove`].
    pub fn prove(&self, choice: &ExportChoice) -> Result<Vec<String>> {
        let ExportChoice { target, merge, .. } = *choice;
        let mut notices = target::prove(choice, self.spec, self.config, self.learned)?;
        let name = target::rules(target).name;
        if target.loads_gguf() {
            gguf::prove(self.checkpoint)?;
        }
        if target == Target::Ollama && !merge {
            base_in_ollama(choice, self.checkpoint)?;
        }
        if self.template.is_some_and(|own| base_template(self.checkpoint).as_deref() != Some(own)) {
            let beside = match (merge, target) {
                (true, Target::LlamaCpp | Target::Ollama) => "it is in the file".to_string(),
                (true, _) | (_, Target::Transformers) => "it is in the folder".to_string(),
                (_, Target::LlamaCpp) => {
                    format!("beside an adapter, {name} takes the base's unless --chat-template-file names another")
                }
                (_, Target::Ollama) => "it is in the Modelfile, as far as Ollama's language can say it".to_string(),
                _ => format!("beside an adapter, {name} takes the base's unless it is given chat_template.jinja"),
            };
            notices
                .push(format!("the chat template is the one it was trained with, which is not the base's: {beside}"));
        }
        let rows = families::spec(self.checkpoint)?.vocab_size;
        if self.checkpoint.vocabulary > rows {
            let more = self.checkpoint.vocabulary - rows;
            notices.push(format!("the model has {more} more rows of tokens than its base; the tokenizer goes with it"));
        }
        if let Some(TrainedOn { scheme, .. }) = self.trained_on.filter(|_| !merge) {
            notices.push(format!("it was trained on its base quantised as {scheme}: on another form of the base it answers a little otherwise"));
        }
        Ok(notices)
    }

    /// What lies beside what the target loads: the probes, where the models were asked, and the model card, of which `facts` are known
    /// but for its kind.
    ///
    /// Errors with [`crate::Error::Output`].
    pub fn beside(
        &self,
        choice: &ExportChoice,
        dtype: Dtype,
        answers: Option<(&Answers, &Encoder)>,
        facts: &card::Facts<'_>,
    ) -> Result<Beside> {
        let facts = card::Facts { kind: kind_of_card(choice, self.learned), ..*facts };
        let mut beside = card::files(&facts);
        if let Some((answers, encoder)) = answers {
            let sidecars = sidecars(self.checkpoint, self.template);
            let vocabulary = self.spec.vocab_size;
            let about = About { base: facts.base, sidecars: &sidecars, encoder, vocabulary };
            let probe = Probe::make(answers, &self.forms(choice, dtype), about)?;
            beside.insert(PROBE.into(), probe.text().into_bytes());
        }
        Ok(beside)
    }

    /// The forms of numbers by which what is exported differs from the model that was trained.
    fn forms(&self, choice: &ExportChoice, dtype: Dtype) -> Vec<&'static str> {
        let mut forms = Vec::new();
        let travels = !choice.merge && target::rules(choice.target).adapters == AdapterRules::All;
        if choice.merge {
            forms.push(choice.numbers.unwrap_or(dtype.into()).name());
        } else if !travels && self.learned.updates.iter().any(|update| update.taken.is_some()) {
            // What was left of the base when training began was rounded; the untouched base is not.
            forms.push(FileType::from(dtype).name());
        }
        if let Some(trained_on) = self.trained_on.filter(|_| !travels && (!choice.merge || self.onto.is_none())) {
            forms.extend(match trained_on.scheme.form {
                Form::FourBit { code: FourBitType::Nf4, .. } => Some("nf4"),
                Form::FourBit { code: FourBitType::Fp4, .. } => Some("fp4"),
                Form::Int8 => Some("int8"),
                Form::Fp8 => Some("fp8"),
                // There is no other form of such a base.
                Form::Stored(_) => None,
            });
        }
        forms
    }

    /// Writes what the target loads into `folder`, whole or not at all: the adapter, or with `merge` the whole model, its numbers stored
    /// as the choice says, or else in `dtype`; `beside` lies beside it. An earlier export at its place is replaced. Gives what
    /// [`Served::prove`] says, and what was changed for the target.
    ///
    /// Errors: those of [`Served::prove`] and of the writers, before anything is written but for a disk that fails.
    pub fn write(
        &self,
        folder: &Path,
        choice: &ExportChoice,
        dtype: Dtype,
        beside: &Beside,
        progress: &dyn Fn(u64, u64),
    ) -> Result<Vec<String>> {
        let mut notices = self.prove(choice)?;
        let Self { checkpoint, spec, config, learned, trained_on, onto, template } = *self;
        let rules = target::rules(choice.target);
        let numbers = choice.numbers.unwrap_or(dtype.into());
        if choice.target.loads_gguf() {
            self.write_gguf(folder, choice, numbers, beside, &mut notices, progress)?;
            return Ok(notices);
        }
        let mut files = sidecars(checkpoint, template);
        files.extend(beside.iter().map(|(name, bytes)| (name.clone(), bytes.clone())));
        if choice.merge {
            let kind = numbers.plain().unwrap_or(dtype).kind();
            let made = merged::write(folder, checkpoint, learned, onto, kind, &files, progress)?;
            notices.extend(trained_on.filter(|_| onto.is_some()).and_then(|on| on.differing(&made)));
            return Ok(notices);
        }
        let AdapterRules::Plain { layout, reader, .. } = rules.adapters else {
            peft::write(folder, config, learned, trained_on, &files)?;
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
            Layout::Mlx => {
                let staging = Staging::create(folder, |name| is_ours(name, &files))?;
                mlx::write(staging.path(), &plain, spec, &files)?;
                staging.commit()?;
            }
            Layout::Peft | Layout::Gguf => {
                peft::write(folder, &plain.config, plain.updates.as_slice().into(), None, &files)?;
            }
        }
        Ok(notices)
    }

    /// One GGUF file, and Ollama's Modelfile.
    fn write_gguf(
        &self,
        folder: &Path,
        choice: &ExportChoice,
        numbers: FileType,
        beside: &Beside,
        notices: &mut Vec<String>,
        progress: &dyn Fn(u64, u64),
    ) -> Result<()> {
        let Self { checkpoint, learned, onto, template, .. } = *self;
        merged::refuse_base(folder, checkpoint)?;
        let staging = Staging::create(folder, |name| is_ours(name, beside))?;
        let sidecars = sidecars(checkpoint, template);
        let called = called(folder, choice);
        let name = if choice.merge { format!("model-{numbers}.gguf") } else { ADAPTER.to_string() };
        let path = staging.path().join(&name);
        let base = match choice.merge {
            true => {
                let texts = gguf::Texts { name: called.as_deref(), sidecars: &sidecars };
                notices.extend(gguf::write_model(&path, checkpoint, learned, onto, numbers, texts, progress)?);
                None
            }
            false => {
                gguf::write_adapter(&path, called.as_deref(), checkpoint, learned.updates, progress)?;
                (choice.target == Target::Ollama).then(|| base_in_ollama(choice, checkpoint)).transpose()?
            }
        };
        if choice.target == Target::Ollama {
            let source = match &base {
                Some(base) => ollama::Source::Adapter { base, adapter: &name },
                None => ollama::Source::Model(&name),
            };
            let text = ollama::modelfile(source, &sidecars, notices)?;
            writer::write_file(&staging.path().join(MODELFILE), text.as_bytes())?;
        }
        for (name, bytes) in beside {
            writer::write_file(&staging.path().join(name), bytes)?;
        }
        staging.commit()
    }
}

fn kind_of_card(choice: &ExportChoice, learned: Learned<'_>) -> card::Kind {
    let nothing = learned.updates.is_empty() && learned.saved.is_empty();
    match (choice.target, choice.merge) {
        (target, true) if nothing => {
            if target.loads_gguf() {
                card::Kind::GgufCopy
            } else {
                card::Kind::Copy
            }
        }
        (target, true) if target.loads_gguf() => card::Kind::Gguf,
        (_, true) => card::Kind::Merged,
        (Target::Mlx, false) => card::Kind::MlxAdapter,
        (target, false) if target.loads_gguf() => card::Kind::GgufAdapter,
        (_, false) => card::Kind::Adapter,
    }
}

/// What an export is called inside its file: as its folder, or where that is one of a run's exports, as the run.
fn called(folder: &Path, choice: &ExportChoice) -> Option<String> {
    let exports = folder.parent().filter(|parent| parent.ends_with("export") && folder.ends_with(choice.folder()));
    let named = exports.and_then(Path::parent).unwrap_or(folder);
    Some(named.file_name()?.to_str()?.to_string())
}

/// The file of an adapter for llama.cpp.
pub const ADAPTER: &str = "adapter.gguf";
/// What Ollama takes a model in by.
pub const MODELFILE: &str = "Modelfile";

/// What an adapter's Modelfile is made `FROM`: what the user says, or the base's own file or folder, as Ollama takes it in.
fn base_in_ollama(choice: &ExportChoice, checkpoint: &Checkpoint) -> Result<String> {
    if let Some(from) = &choice.from {
        return match from.trim() == from && !from.is_empty() && !from.contains(char::is_whitespace) {
            true => Ok(from.clone()),
            false => {
                let fault = Fault::new("from", format!("{from:?} is no name of a model in Ollama"));
                Err(Error::Recipe(vec![fault.hint("write it as `ollama list` shows it")]))
            }
        };
    }
    let place = match &checkpoint.source {
        BaseSource::Hub { .. } => None,
        BaseSource::Folder(path) | BaseSource::Gguf(path) => std::path::absolute(path).ok(),
    };
    let place = place.and_then(|place| Some(place.to_str()?.to_string()));
    place.ok_or_else(|| {
        let what = "an adapter for Ollama is made of its base as Ollama has it, and this base is a hub's";
        let hint =
            "say what Ollama calls it, as `ollama list` shows it (--from NAME), or write the whole model: --merge";
        Error::Model(Fault::new("--target ollama", what).hint(hint))
    })
}

/// The chat template of a base's own files.
fn base_template(checkpoint: &Checkpoint) -> Option<String> {
    if let Some(file) = checkpoint.sidecars.get("chat_template.jinja") {
        return String::from_utf8(file.clone()).ok();
    }
    let config: Value = serde_json::from_slice(checkpoint.sidecars.get("tokenizer_config.json")?).ok()?;
    config["chat_template"].as_str().map(ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_is_called_as_its_folder_or_as_its_run() {
        let choice = ExportChoice { target: Target::LlamaCpp, merge: true, numbers: Some(FileType::Q8_0), from: None };
        for (folder, name) in [
            ("exports/tickets", Some("tickets")),
            ("runs/tickets/export/llama.cpp-merged-q8_0", Some("tickets")),
            ("export/mine", Some("mine")),
            (".", None),
        ] {
            assert_eq!(called(Path::new(folder), &choice).as_deref(), name, "{folder}");
        }
    }
}
