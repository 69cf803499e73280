//! `probe.json`: what the trained model and its bare base say of some prompts, so that whoever loads what was exported can be asked
//! the same, and it shows whether it serves the trained model, the base or another one.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::folder::tokenizer_file;
use super::manifest;
use crate::data::{Encoder, Tokenizer};
use crate::evaluate::{Apart, Finding, MOST_PROMPTS, Probes, Prompt, Said, Strength, Tolerance, Verdict};
use crate::model::Decoder;
use crate::torch_ext::{catching, torch_version};
use crate::weights::{json_object, sha256_file};
use crate::{Error, Fault, Result};

/// The file's name, in the folder of what was exported.
pub const PROBE: &str = "probe.json";
/// The layout of the file.
const VERSION: u32 = 1;
/// Longest such file that is read: 64 prompts of both models are some 8 MB.
const MOST_BYTES: u64 = 128 << 20;
/// Longest answer that is read, in tokens: many times what is asked for.
const MOST_TOKENS: usize = 1024;

/// What is asked of an export, and what it should answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// Layout of this file.
    pub version: u32,
    /// Version of engraft.
    pub engraft_version: String,
    /// Version of libtorch.
    pub libtorch_version: String,
    /// When it was made, RFC 3339, UTC.
    pub created: String,
    /// The base, as it was named.
    pub base: String,
    /// SHA-256 of each of the tokenizer's files, by name.
    pub tokenizer: BTreeMap<String, String>,
    /// SHA-256 of the chat template that the prompts are in; absent where there is none.
    pub chat_template: Option<String>,
    /// Number of tokens in the vocabulary.
    pub vocabulary: i64,
    /// How far apart the numbers of what was exported may be from these.
    pub tolerance: Tolerance,
    /// Token ids that end an answer.
    pub stop: Vec<u32>,
    /// What the tokenizer puts before any text by itself: a server that is asked in text is asked without it.
    pub bos: Option<String>,
    /// The prompts.
    pub probes: Vec<Asked>,
}

/// A prompt, and what both models said.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Asked {
    /// Where it is from.
    pub place: String,
    /// Its text, special tokens as they are written.
    pub prompt: String,
    /// Its token ids: what is asked where a server takes them.
    pub prompt_ids: Vec<u32>,
    /// What the trained model said.
    pub trained: Said,
    /// What its bare base said; absent of a whole model whose base is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Said>,
}

/// What a trained model and its bare base said of some prompts.
#[derive(Debug, Clone)]
pub struct Answers {
    /// What both were asked.
    pub probes: Probes,
    /// What the trained model said, in the prompts' order ([`Probes::record`]).
    pub trained: Vec<Said>,
    /// What its base said; `None` of a whole model whose base is not known.
    pub base: Option<Vec<Said>>,
    /// The form of numbers that was computed with: `fp32`, `bf16`.
    pub dtype: &'static str,
}

/// What a probe is of, beside what the models say.
#[derive(Clone, Copy)]
pub struct About<'a> {
    /// The base, as it was named.
    pub base: &'a str,
    /// The small files that travel with what is exported ([`super::sidecars`]).
    pub sidecars: &'a BTreeMap<String, Vec<u8>>,
    /// The encoder that the prompts were made with.
    pub encoder: &'a Encoder,
    /// Tokens of the vocabulary.
    pub vocabulary: i64,
}

/// One line of a check.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Checked {
    /// Which probe.
    pub place: String,
    /// How far from the trained model.
    pub trained: Apart,
    /// How far from the base, where that is known.
    pub base: Option<Apart>,
    /// Whose answer it is.
    pub finding: Finding,
}

/// What came of asking a model that our own reader read.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Found {
    /// Each probe.
    pub lines: Vec<Checked>,
    /// Which model it is.
    pub verdict: Verdict,
    /// How far it is on the way from the base (0) to the trained model (1), by all logits together.
    pub strength: Option<f64>,
}

/// Where the tokenizer's files are that do not lie beside what was exported.
#[derive(Debug, Clone, Copy)]
pub enum Elsewhere<'a> {
    /// Nowhere: a whole model in transformers' layout must have them.
    Nowhere,
    /// An adapter's are its base's, which has these small files.
    Base(&'a BTreeMap<String, Vec<u8>>),
    /// In a GGUF file, in another form.
    Inside,
}

impl Probe {
    /// Of what was said. `formats` are the forms of numbers that what is exported differs by from the model that was asked: of its
    /// weights (`q4_k_m`), beside what was computed with.
    ///
    /// # Errors
    /// [`Error::Output`] for a form that nothing is known of; [`Error::Model`] where a model's logits are no numbers, with which
    /// nothing can be compared.
    pub fn make(answers: &Answers, formats: &[&str], about: About<'_>) -> Result<Self> {
        let formats = [formats, &[answers.dtype, Tolerance::computed_in(answers.dtype)]].concat();
        let tolerance = Tolerance::of(&formats).ok_or_else(|| {
            let known: Vec<&str> = crate::evaluate::FORMATS.iter().map(|(name, _)| *name).collect();
            let what = format!("one of {} is no form of numbers", formats.join(", "));
            Error::Output(Fault::new(PROBE, what).hint(format!("those are {}", known.join(", "))))
        })?;
        let tokenizer: &Tokenizer = about.encoder.tokenizer();
        let Answers { probes, trained, base, .. } = answers;
        for (who, said) in [("trained model", Some(trained)), ("base", base.as_ref())] {
            let broken = said.into_iter().flatten().position(|said| !said.is_sound());
            if let Some(prompt) = broken.and_then(|index| probes.prompts.get(index)) {
                let what = format!("the {who}'s logits behind this prompt are no numbers, or all the same");
                return Err(Error::Model(
                    Fault::new(&prompt.place, what).hint("the model is broken: see how it was trained"),
                ));
            }
        }
        let asked = |(index, Prompt { place, ids }): (usize, &Prompt)| Asked {
            place: place.clone(),
            prompt: tokenizer.decode(ids, false),
            prompt_ids: ids.clone(),
            trained: trained[index].clone(),
            base: base.as_ref().map(|base| base[index].clone()),
        };
        Ok(Self {
            version: VERSION,
            engraft_version: env!("CARGO_PKG_VERSION").into(),
            libtorch_version: torch_version().into(),
            created: jiff::Timestamp::now().to_string(),
            base: about.base.into(),
            tokenizer: manifest::tokenizer_of(about.sidecars),
            chat_template: about.encoder.template().map(|template| manifest::sha256(template.source().as_bytes())),
            vocabulary: about.vocabulary,
            tolerance,
            stop: probes.stop.clone(),
            bos: tokenizer.bos().filter(|_| tokenizer.adds_bos()).map(|bos| tokenizer.decode(&[bos], false)),
            probes: probes.prompts.iter().enumerate().map(asked).collect(),
        })
    }

    /// The same for an export whose numbers were rounded to one more form.
    #[must_use]
    pub fn in_format(&self, format: &str) -> Self {
        Self { tolerance: self.tolerance.and(format), ..self.clone() }
    }

    /// The same for a model whose numbers are made, and which computes, in `dtype`.
    #[must_use]
    pub fn computed_in(&self, dtype: &str) -> Self {
        Self { tolerance: self.tolerance.and(dtype).and(Tolerance::computed_in(dtype)), ..self.clone() }
    }

    /// The file's text.
    pub fn text(&self) -> String {
        let text = serde_json::to_string(self).expect("names and finite numbers have a JSON form");
        format!("{text}\n")
    }

    /// Reads it back.
    ///
    /// # Errors
    /// [`Error::Model`]: no such file, not such a file, or one of a later engraft.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(PROBE);
        if !path.exists() {
            let fault = Fault::at(folder, format_args!("holds no {PROBE}, so there is nothing to ask"));
            return Err(Error::Model(fault.hint("name a folder that `engraft export` wrote")));
        }
        let (value, _) = json_object(&path, MOST_BYTES)?;
        let fault = |what: String| Error::Model(Fault::at(&path, what));
        if value["version"] != VERSION {
            let what = format!("is of layout {}, {VERSION} is known", value["version"]);
            return Err(fault(what));
        }
        let probe: Self = serde_json::from_value(value).map_err(|error| fault(error.to_string()))?;
        let sound = |said: &Said| {
            said.is_sound()
                && said.ids.len() <= MOST_TOKENS
                && said
                    .ids
                    .iter()
                    .chain(said.places.iter().flat_map(|place| place.top.iter().map(|one| &one.id)))
                    .all(|id| i64::from(*id) < probe.vocabulary)
        };
        let asked = |asked: &Asked| {
            let known = asked.prompt_ids.iter().all(|id| i64::from(*id) < probe.vocabulary);
            !asked.prompt_ids.is_empty() && known && sound(&asked.trained) && asked.base.as_ref().is_none_or(sound)
        };
        if let Some(bad) = probe.probes.iter().find(|one| !asked(one)) {
            return Err(fault(format!("the probe of {} contradicts itself", bad.place)));
        }
        if probe.probes.is_empty() || probe.probes.len() > MOST_PROMPTS {
            return Err(fault(format!("holds {} probes; 1 to {MOST_PROMPTS} are expected", probe.probes.len())));
        }
        if let Some(name) = probe.tokenizer.keys().find(|name| !tokenizer_file(name)) {
            return Err(fault(format!("names {name:?} among the tokenizer's files, which is none")));
        }
        Ok(probe)
    }

    /// Asks a model that our own reader read, place by place.
    ///
    /// # Errors
    /// [`Error::Model`] where its vocabulary is smaller, or it takes fewer tokens; what libtorch finds wrong while it computes.
    pub fn check(&self, model: &Decoder, progress: &dyn Fn(u64, u64)) -> Result<Found> {
        let others = "the probes are of another model";
        if model.spec.vocab_size < self.vocabulary {
            let what = format!("the model has {} tokens, the probes are of {}", model.spec.vocab_size, self.vocabulary);
            return Err(Error::Model(Fault::new(PROBE, what).hint(others)));
        }
        for asked in &self.probes {
            let answers = [Some(&asked.trained), asked.base.as_ref()];
            let answer = answers.into_iter().flatten().map(|said| said.ids.len()).max().unwrap_or_default();
            let (tokens, context) = (asked.prompt_ids.len() + answer, model.spec.max_position_embeddings);
            if tokens as u64 > context as u64 {
                let what = format!("the probe of {} has {tokens} tokens, the model takes {context}", asked.place);
                return Err(Error::Model(Fault::new(PROBE, what).hint(others)));
            }
        }
        let mut lines = Vec::new();
        let mut strength = Strength::default();
        for (index, asked) in self.probes.iter().enumerate() {
            progress(index as u64, self.probes.len() as u64);
            let asked_of = |said: &Said| said.asked_of(model, &asked.prompt_ids);
            let both = || {
                let found = asked_of(&asked.trained);
                let base = asked.base.as_ref().map(|base| base.apart(&asked_of(base), &self.tolerance));
                if let Some(base) = &asked.base {
                    strength.add_all(&found, &asked.trained, base);
                }
                Ok((asked.trained.apart(&found, &self.tolerance), base))
            };
            let (trained, base) = catching("asking the probes", both)?;
            let is_base = base.is_some_and(|base| base.within(&self.tolerance));
            let finding = Finding::of(trained.within(&self.tolerance), is_base);
            lines.push(Checked { place: asked.place.clone(), trained, base, finding });
        }
        let findings: Vec<Finding> = lines.iter().map(|line| line.finding).collect();
        let verdict = Verdict::strict(&findings).or_by(&strength);
        Ok(Found { lines, verdict, strength: strength.value() })
    }

    /// What of the tokenizer beside what was exported is not the one that the probes were made with, in a sentence each.
    pub fn other_tokenizer(&self, folder: &Path, elsewhere: Elsewhere<'_>) -> Vec<String> {
        let another = |name: &str| format!("{name} is another one than the probes were made with");
        let other = |(name, expected): (&String, &String)| {
            let path = folder.join(name);
            if path.symlink_metadata().is_ok() {
                return match sha256_file(&path) {
                    Ok(found) => (found != *expected).then(|| another(name)),
                    Err(error) => Some(format!("{name} {}", error.faults()[0].what)),
                };
            }
            match elsewhere {
                Elsewhere::Inside => None,
                Elsewhere::Nowhere => Some(format!("{name} is missing")),
                Elsewhere::Base(files) => match files.get(name) {
                    Some(bytes) => {
                        (manifest::sha256(bytes) != *expected).then(|| format!("the base's {}", another(name)))
                    }
                    None => Some(format!("{name} is missing, and the base has none")),
                },
            }
        };
        self.tokenizer.iter().filter_map(other).collect()
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::evaluate::Prompt;
    use crate::recipe::{BaseSource, DatasetRecipe};
    use crate::weights::Checkpoint;

    fn tokenizer() -> BTreeMap<String, Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer/bytes");
        let files = ["tokenizer.json", "tokenizer_config.json"];
        BTreeMap::from(files.map(|name| (name.to_string(), std::fs::read(folder.join(name)).unwrap())))
    }

    fn model() -> Decoder {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/llama/biases-untied");
        let checkpoint = Checkpoint::open(&BaseSource::Folder(folder.into())).unwrap();
        Decoder::load(&checkpoint, Kind::Float, Device::Cpu, &|_, _| ()).unwrap()
    }

    /// Moves the logits of the head by as much as `by` on average.
    fn changed(model: Decoder, by: f64) -> Decoder {
        moved(model, by, 5)
    }

    /// The same in another direction for each `seed`.
    fn moved(mut model: Decoder, by: f64, seed: u64) -> Decoder {
        let vocabulary = model.spec.vocab_size;
        let head = model.linears_mut().pop().unwrap();
        let like = Tensor::zeros([vocabulary], (Kind::Float, Device::Cpu));
        let noise = crate::torch_ext::uniform(&like, -1.7, 1.7, seed) * by;
        head.bias = Some(head.bias.as_ref().map_or(noise.shallow_clone(), |own| own + &noise));
        model
    }

    fn probe(formats: &[&str], change: f64) -> Probe {
        let sidecars = tokenizer();
        let tokenizer = std::sync::Arc::new(Tokenizer::new(&sidecars).unwrap());
        let encoder = Encoder::new(tokenizer, &DatasetRecipe::defaults()).unwrap();
        let prompts = [vec![3, 1, 4], vec![1, 5, 9, 2, 6]].map(|ids| Prompt { place: "built in".into(), ids });
        let probes = Probes { prompts: prompts.to_vec(), stop: vec![2] };
        let (base, trained) = (model(), changed(model(), change));
        let vocabulary = base.spec.vocab_size;
        let about = About { base: "owner/base", sidecars: &sidecars, encoder: &encoder, vocabulary };
        let said = |model: &Decoder| probes.record(model, encoder.tokenizer());
        let (trained, base) = (said(&trained), Some(said(&base)));
        Probe::make(&Answers { probes, trained, base, dtype: "f32" }, formats, about).unwrap()
    }

    #[test]
    fn a_probe_reads_back_and_a_damaged_one_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let probe = probe(&["f32"], 1.0);
        std::fs::write(folder.path().join(PROBE), probe.text()).unwrap();
        assert_eq!(Probe::read(folder.path()).unwrap(), probe);
        let said = &probe.probes[0].trained;
        assert_eq!(said.places.len(), said.ids.len() + 1);
        assert!(said.ids.iter().zip(&said.places).all(|(id, place)| place.top[0].id == *id), "greedy");
        let all: f64 = said.places[0].top.iter().map(|one| said.places[0].log_probability(one).exp()).sum();
        assert!(all > 0.0 && all <= 1.0 + 1e-6, "{all}");

        let path = folder.path().join(PROBE);
        let text = std::fs::read_to_string(&path).unwrap();
        for (from, to, part) in [
            ("\"version\":1", "\"version\":9", "is of layout 9"),
            ("\"prompt_ids\":[3,", "\"prompt_ids\":[99999999,", "contradicts itself"),
            ("\"stop\":[2]", "\"stop\":\"2\"", "invalid type"),
            (
                "\"tokenizer\":{",
                "\"tokenizer\":{\"../../secret\":\"00\",",
                "\"../../secret\" among the tokenizer's files",
            ),
            ("\"tokenizer\":{", "\"tokenizer\":{\"/dev/zero\":\"00\",", "which is none"),
            ("\"logit\":", "\"logit\":1e39,\"was\":", "contradicts itself"),
        ] {
            assert!(text.contains(from), "{from}");
            std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
            let error = Probe::read(folder.path()).unwrap_err();
            assert!(error.exit_code() == 5 && error.to_string().contains(part), "{error}");
        }
        let mut many = probe.clone();
        many.probes = vec![probe.probes[0].clone(); MOST_PROMPTS + 1];
        std::fs::write(&path, many.text()).unwrap();
        assert!(Probe::read(folder.path()).unwrap_err().to_string().contains("holds 65 probes; 1 to 64"));
        let mut long = probe.clone();
        let said = &mut long.probes[0].trained;
        said.ids = vec![1; MOST_TOKENS + 1];
        said.places = vec![said.places[0].clone(); MOST_TOKENS + 2];
        std::fs::write(&path, long.text()).unwrap();
        assert!(Probe::read(folder.path()).unwrap_err().to_string().contains("contradicts itself"));
        std::fs::remove_file(&path).unwrap();
        assert!(Probe::read(folder.path()).unwrap_err().to_string().contains("engraft export"));
        let about = std::panic::catch_unwind(|| self::probe(&["q99"], 1.0));
        assert!(about.is_err(), "a form that nobody knows has no tolerance");
    }

    #[test]
    fn the_trained_model_its_base_and_another_one_are_told_apart() {
        let probe = probe(&["f32"], 0.5);
        let verdict = |model: &Decoder, probe: &Probe| probe.check(model, &|_, _| ()).unwrap();
        let Found { lines, verdict: found, strength } = verdict(&changed(model(), 0.5), &probe);
        assert_eq!(found, Verdict::Trained);
        assert!(lines.iter().all(|line| line.trained.largest < 1e-5 && line.base.unwrap().mean > 0.01), "{lines:?}");
        assert!((strength.unwrap() - 1.0).abs() < 1e-4, "{strength:?}");
        assert_eq!(verdict(&model(), &probe).verdict, Verdict::Base);
        // An adapter at half its strength is neither.
        let half = verdict(&changed(model(), 0.25), &probe);
        assert!(half.verdict == Verdict::Other && (half.strength.unwrap() - 0.5).abs() < 1e-4, "{half:?}");
        // Of a whole model there may be no base to ask.
        let mut alone = probe.clone();
        alone.probes.iter_mut().for_each(|asked| asked.base = None);
        assert_eq!(verdict(&changed(model(), 0.5), &alone).verdict, Verdict::Trained);
        assert_eq!(verdict(&model(), &alone).verdict, Verdict::Other);
        // A number that is none agrees with nothing.
        let broken = changed(model(), f64::NAN);
        assert_eq!(verdict(&broken, &self::probe(&["q4_0"], 0.5)).verdict, Verdict::Other);
    }

    #[test]
    fn where_both_are_within_what_rounding_explains_all_numbers_together_tell() {
        // By so little that no logit is further than four bits may make it.
        let verdict = |model: &Decoder, probe: &Probe| {
            let found = probe.check(model, &|_, _| ()).unwrap();
            assert!(found.lines.iter().all(|line| line.finding == Finding::Alike), "{found:?}");
            found.verdict
        };
        let probe = self::probe(&["q4_0"], 0.05);
        assert_eq!(verdict(&changed(model(), 0.05), &probe), Verdict::Trained);
        assert_eq!(verdict(&model(), &probe), Verdict::Base);
        assert_eq!(verdict(&changed(model(), 0.025), &probe), Verdict::Other);
        // What rounding moved by far more than training did, in a direction of its own, is not told.
        let probe = self::probe(&["q4_0"], 0.001);
        for model in [moved(model(), 0.05, 3), moved(changed(model(), 0.001), 0.05, 3)] {
            assert_eq!(verdict(&model, &probe), Verdict::CannotTell);
        }
    }

    #[test]
    fn a_model_in_bf16_is_asked_with_what_that_rounds_allowed_for() {
        let probe = probe(&["f32"], 0.5);
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/llama/biases-untied");
        let checkpoint = Checkpoint::open(&BaseSource::Folder(folder.into())).unwrap();
        let base = Decoder::load(&checkpoint, Kind::BFloat16, Device::Cpu, &|_, _| ()).unwrap();
        assert_eq!(probe.computed_in("bf16").check(&base, &|_, _| ()).unwrap().verdict, Verdict::Base);
        assert_eq!(probe.check(&base, &|_, _| ()).unwrap().verdict, Verdict::Other);
    }

    #[test]
    fn probes_that_are_too_long_for_a_model_are_refused() {
        let probe = probe(&["f32"], 0.5);
        let mut short = model();
        short.spec.max_position_embeddings = 16;
        let error = probe.check(&short, &|_, _| ()).unwrap_err();
        assert!(error.exit_code() == 5 && error.to_string().contains("tokens, the model takes 16"), "{error}");
    }

    #[test]
    fn what_a_broken_model_says_is_no_probe() {
        let sidecars = tokenizer();
        let tokenizer = std::sync::Arc::new(Tokenizer::new(&sidecars).unwrap());
        let encoder = Encoder::new(tokenizer, &DatasetRecipe::defaults()).unwrap();
        let prompts = vec![Prompt { place: "rows.jsonl:3".into(), ids: vec![3, 1, 4] }];
        let probes = Probes { prompts, stop: vec![2] };
        let said = |model: &Decoder| probes.record(model, encoder.tokenizer());
        let (trained, base) = (said(&changed(model(), f64::NAN)), Some(said(&model())));
        let about = About { base: "owner/base", sidecars: &sidecars, encoder: &encoder, vocabulary: 8 };
        let answers = Answers { probes: probes.clone(), trained, base, dtype: "f32" };
        let error = Probe::make(&answers, &["f32"], about).unwrap_err();
        let text = error.to_string();
        assert!(error.exit_code() == 5 && text.starts_with("rows.jsonl:3: the trained model's logits"), "{text}");
    }

    #[test]
    fn a_tokenizer_is_looked_for_where_an_export_has_it() {
        let (probe, files) = (probe(&["f32"], 0.5), tokenizer());
        let folder = tempfile::tempdir().unwrap();
        let other = |elsewhere| probe.other_tokenizer(folder.path(), elsewhere);
        let none = [""; 0];
        // Nothing lies there: a whole model lacks it, an adapter has its base's, a GGUF file has it inside.
        assert_eq!(other(Elsewhere::Nowhere), ["tokenizer.json is missing", "tokenizer_config.json is missing"]);
        assert_eq!(other(Elsewhere::Base(&files)), none);
        assert_eq!(other(Elsewhere::Inside), none);
        let mut others = files.clone();
        others.get_mut("tokenizer.json").unwrap().push(b' ');
        others.remove("tokenizer_config.json");
        assert_eq!(
            other(Elsewhere::Base(&others)),
            [
                "the base's tokenizer.json is another one than the probes were made with",
                "tokenizer_config.json is missing, and the base has none"
            ]
        );
        for (name, bytes) in &files {
            std::fs::write(folder.path().join(name), bytes).unwrap();
        }
        for elsewhere in [Elsewhere::Nowhere, Elsewhere::Base(&others), Elsewhere::Inside] {
            assert_eq!(other(elsewhere), none);
        }
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, "{}").unwrap();
        assert_eq!(other(Elsewhere::Base(&files)), ["tokenizer.json is another one than the probes were made with"]);
        // What would be read without an end, or waited for, is not opened.
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        assert_eq!(other(Elsewhere::Inside), ["tokenizer.json is not a regular file"]);
    }
}
