//! The numbers an adapter was trained on: on others it is another model.
//!
//! PEFT's own files have no place for them, so they lie beside ([`super::load::SCHEME`]): how the base was quantised, how its file stored
//! that, and a fingerprint of what each weight became.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Value, json};
use tch::Kind;

use super::load::SCHEME;
use super::overview;
use crate::model::ModelSpec;
use crate::quant::{Digest, Form, Scheme, ends_in, name_of};
use crate::weights::Checkpoint;
use crate::{Error, Fault, Result};

/// More bytes than any such file has.
const MOST: u64 = 16 << 20;

/// What the base of an adapter was when it was trained.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainedOn {
    /// How its linears were kept.
    pub scheme: Scheme,
    /// How its file laid them out ([`Checkpoint::layout`]), where it stored them so.
    pub stored: Option<String>,
    /// Fingerprints of their weights by module; none where an earlier engraft trained it.
    pub weights: BTreeMap<String, Digest>,
}

/// A base as it is here, to put an adapter on.
#[derive(Clone, Copy)]
pub struct Here<'a> {
    /// Its files.
    pub checkpoint: &'a Checkpoint,
    /// What it is.
    pub spec: &'a ModelSpec,
}

impl TrainedOn {
    /// Of a base that was kept as `scheme` says, with the fingerprints of what its weights became.
    pub fn of(checkpoint: &Checkpoint, scheme: &Scheme, weights: &BTreeMap<String, Digest>) -> Self {
        let stored = checkpoint.layout().filter(|_| checkpoint.quantised_form() == Some(scheme.form));
        Self { scheme: scheme.clone(), stored, weights: weights.clone() }
    }

    /// Of the adapter in `folder`; `None` where its base was not quantised, or nothing says so.
    ///
    /// Errors with [`Error::Model`] where the file that says it is damaged.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(SCHEME);
        let fault = |what: String| Error::Model(Fault::at(&path, what));
        match path.metadata() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Ok(metadata) if metadata.len() > MOST => {
                return Err(fault(format!("is {} bytes; at most {MOST} are read", metadata.len())));
            }
            Err(_) | Ok(_) => {}
        }
        let text = std::fs::read(&path).map_err(|error| fault(format!("cannot be read: {error}")))?;
        Self::from_json(&text).map(Some).map_err(fault)
    }

    /// As JSON, for its file.
    pub fn to_json(&self) -> String {
        let mut said = self.scheme.to_value();
        if let Some(fields) = said.as_object_mut() {
            fields.extend(self.stored.iter().map(|stored| ("stored".to_string(), json!(stored))));
            let weights = self.weights.iter().map(|(module, digest)| (module.clone(), json!(digest.to_string())));
            fields.insert("weights".into(), Value::Object(weights.collect()));
        }
        format!("{said:#}\n")
    }

    /// Of its JSON.
    ///
    /// # Errors
    /// What is wrong with it, in a sentence.
    pub fn from_json(text: &[u8]) -> std::result::Result<Self, String> {
        let mut said: Value = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        let mut own = |name: &str| said.as_object_mut().and_then(|fields| fields.remove(name));
        let stored = match own("stored") {
            None => None,
            Some(Value::String(stored)) => Some(stored),
            Some(other) => return Err(format!("stored is {other}, not a text")),
        };
        let digest = |(module, digest): (String, Value)| {
            let read = digest.as_str().ok_or_else(|| format!("{digest} is no text"))?.parse();
            Ok((module.clone(), read.map_err(|error| format!("weights.{module}: {error}"))?))
        };
        let weights = match own("weights") {
            None => BTreeMap::new(),
            Some(Value::Object(weights)) => {
                weights.into_iter().map(digest).collect::<std::result::Result<_, String>>()?
            }
            Some(other) => return Err(format!("weights is {other}, not fingerprints by module")),
        };
        Ok(Self { scheme: Scheme::from_json(said.to_string().as_bytes())?, stored, weights })
    }

    /// Refuses a base that is kept, as a recipe says, in other numbers than those the adapter in `folder` was trained on: as `scheme`
    /// says, or as plain numbers of `kind`.
    ///
    /// # Errors
    /// [`Error::Model`], with both and what to write into the recipe.
    pub fn prove_same(&self, folder: &Path, here: Here<'_>, scheme: Option<&Scheme>, kind: Kind) -> Result<()> {
        let stored = self.is_stored(here.checkpoint);
        let same = match scheme {
            // What is stored quantised stays so, whatever is skipped.
            Some(scheme) if stored => scheme.form == self.scheme.form && scheme.kind == self.scheme.kind,
            Some(scheme) => {
                let kept = |scheme: &Scheme| kept(here.spec, |module| scheme.skips(module));
                (scheme.form, scheme.kind) == (self.scheme.form, self.scheme.kind) && kept(scheme) == kept(&self.scheme)
            }
            None => stored && kind == self.scheme.kind,
        };
        if !same {
            let is = match scheme {
                Some(scheme) => format!("quantised as {scheme}"),
                None => format!("not quantised, in {}", name_of(kind)),
            };
            let what =
                format!("was trained on its base quantised as {}, but by the recipe the base is {is}", self.scheme);
            let hint = format!("write into the recipe (or --set) {}", self.scheme.in_recipe());
            return Err(Error::Model(Fault::at(folder, what).hint(hint)));
        }
        self.prove_stored_alike(folder, here)?;
        self.prove_had(folder, here)
    }

    /// Refuses a base that is stored in another quantised form than the one the adapter in `folder` was trained on, or in that form with
    /// other choices: bits, groups, what is left plain.
    ///
    /// # Errors
    /// [`Error::Model`], with both.
    pub fn prove_stored_alike(&self, folder: &Path, here: Here<'_>) -> Result<()> {
        let Some(stored) = here.checkpoint.quantised_form() else { return Ok(()) };
        let fault = |what: String| {
            let hint = "name the base that it was trained on, or the unquantised model that both were made of";
            Err(Error::Model(Fault::at(folder, what).hint(hint)))
        };
        let form = self.scheme.form;
        if !stored.may_become(form) {
            return fault(format!("was trained on its base quantised as {form}, but this base is stored as {stored}"));
        }
        if stored != form {
            return Ok(());
        }
        let layout = here.checkpoint.layout();
        if let (Some(theirs), Some(own)) = (self.layout(), &layout)
            && theirs != *own
        {
            return fault(format!("was trained on its base quantised as {form}, {theirs}; this base is {form}, {own}"));
        }
        let left = here.spec.left_plain(here.checkpoint);
        let theirs = kept(here.spec, |module| self.scheme.skips(module));
        let own = kept(here.spec, |module| left.iter().any(|name| name == module));
        match (theirs.difference(&own).next(), own.difference(&theirs).next()) {
            (Some(module), _) => fault(format!(
                "was trained on its base quantised as {form}, {module} too, but in this base {module} is stored as plain numbers"
            )),
            (None, Some(module)) => fault(format!(
                "was trained on its base quantised as {form}, all but {module}, but in this base {module} is quantised, too"
            )),
            (None, None) => Ok(()),
        }
    }

    /// Refuses a base that the numbers which the adapter in `folder` was trained on cannot be made of.
    ///
    /// # Errors
    /// [`Error::Model`], with what is missing.
    pub fn prove_had(&self, folder: &Path, here: Here<'_>) -> Result<()> {
        match self.missing(here.checkpoint) {
            None => Ok(()),
            Some(what) => Err(Error::Model(Fault::at(folder, what).hint("name the base the adapter was trained on"))),
        }
    }

    /// Why the numbers it was trained on are not to be had of a base, in a sentence; `None` where they are.
    pub fn missing(&self, checkpoint: &Checkpoint) -> Option<String> {
        let form = self.scheme.form;
        if self.is_stored(checkpoint) {
            return None;
        }
        if !form.can_be_made() {
            return Some(format!("was trained on a base that is stored as {form}, which this one is not"));
        }
        let (theirs, made) = (self.layout()?, numbers_in(self.scheme.kind));
        (theirs != made).then(|| {
            let kind = name_of(self.scheme.kind);
            format!("was trained on a base that is stored as {form}, {theirs}, and read in {kind}; {form} is made here {made}")
        })
    }

    /// What differs where weights became other numbers than those it was trained on; `None` where all are the same, or nothing says what
    /// they were. `found`: fingerprints by module.
    pub fn differing(&self, found: &BTreeMap<String, Digest>) -> Option<String> {
        if found.is_empty() {
            // Read as plain numbers: those that are stored.
            return None;
        }
        let others: Vec<&str> = self
            .weights
            .iter()
            .filter(|(module, digest)| found.get(*module) != Some(digest))
            .map(|(module, _)| module.as_str())
            .collect();
        let first = others.first()?;
        let (count, all) = (others.len(), self.weights.len());
        Some(format!(
            "{count} of {all} quantised weights are not those the adapter was trained on, {first} among them: the base is another, or              was quantised by another program or on another device"
        ))
    }

    /// [`TrainedOn::differing`], which is an error where what is stored by another tool cannot be the same base.
    ///
    /// # Errors
    /// [`Error::Model`] for an adapter, in `folder`, on another base that is stored in the same form.
    pub fn notice(&self, folder: &Path, found: &BTreeMap<String, Digest>) -> Result<Option<String>> {
        match self.differing(found) {
            Some(what) if !self.scheme.form.can_be_made() => {
                Err(Error::Model(Fault::at(folder, what).hint("name the base the adapter was trained on")))
            }
            what => Ok(what.map(|what| format!("{}: {what}", folder.display()))),
        }
    }

    fn is_stored(&self, checkpoint: &Checkpoint) -> bool {
        checkpoint.quantised_form() == Some(self.scheme.form)
    }

    /// How its base's file laid the weights out; of what is made here, as engraft makes it.
    fn layout(&self) -> Option<String> {
        let made = || matches!(self.scheme.form, Form::FourBit { .. }).then(|| numbers_in(self.scheme.kind));
        self.stored.clone().or_else(made)
    }
}

/// How four-bit codes are laid out that were made of numbers of a type.
fn numbers_in(kind: Kind) -> String {
    format!("of numbers in {}", name_of(kind))
}

/// The linears that are kept quantised where `skips` says which of them are not.
fn kept(spec: &ModelSpec, skips: impl Fn(&str) -> bool) -> BTreeSet<String> {
    let sites = spec.sites().into_iter().filter(|site| site.quantisable(spec.head.tied));
    sites.map(|site| site.name).filter(|module| !skips(module)).collect()
}

/// Refuses a name, said at `place`, that skips none of the model's linears.
///
/// # Errors
/// [`Error::Recipe`], with the linears there are.
pub fn skips_something(scheme: &Scheme, spec: &ModelSpec, place: &str) -> Result<()> {
    let sites = spec.sites();
    let linears: Vec<&str> = sites.iter().map(|site| site.name.as_str()).collect();
    let idle = |name: &&String| !linears.iter().any(|linear| ends_in(linear, name));
    match scheme.skip.iter().find(idle) {
        None => Ok(()),
        Some(name) => {
            let fault = Fault::new(place, format!("'{name}' is no linear, nor the end of the path of one"));
            Err(Error::Recipe(vec![fault.hint(format!("those are: {}", overview(&linears)))]))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{FourBitType, Layout, Products};

    fn trained_on(form: Form) -> TrainedOn {
        let (kind, products, skip) = (Kind::BFloat16, Products::Dequantised, vec!["lm_head".to_string()]);
        let scheme = Scheme { form, kind, skip, products, after_start: false };
        let digest = |number| Digest::default().of_expert(number);
        let weights = BTreeMap::from([("a.q_proj".to_string(), digest(1)), ("b.q_proj".to_string(), digest(2))]);
        TrainedOn { scheme, stored: Some("4 bits in groups of 128".into()), weights }
    }

    #[test]
    fn what_is_written_is_read_again_that_of_earlier_versions_too_and_nonsense_is_not() {
        let all = trained_on(Form::Stored(Layout::Gptq));
        assert_eq!(TrainedOn::from_json(all.to_json().as_bytes()).unwrap(), all);
        let earlier = TrainedOn::from_json(br#"{"type": "int8", "skip": ["lm_head"], "dtype": "bf16"}"#).unwrap();
        assert_eq!((earlier.scheme.form, earlier.stored, earlier.weights.len()), (Form::Int8, None, 0));
        let with = |more: &str| {
            let text = format!(r#"{{"type": "int8", "skip": [], "dtype": "bf16", {more}}}"#);
            TrainedOn::from_json(text.as_bytes()).unwrap_err()
        };
        assert!(with(r#""stored": 4"#).contains("stored is 4"));
        assert!(with(r#""weights": []"#).contains("weights is []"));
        assert!(with(r#""weights": {"q": "12"}"#).contains("weights.q"));
        assert!(with(r#""others": 1"#).contains("unknown field"));
    }

    #[test]
    fn other_weights_are_counted_and_named_and_refused_where_no_one_makes_them_again() {
        let (made, stored) = (Form::FourBit { code: FourBitType::Nf4, block: 64, double_quant: true }, Layout::Gptq);
        let trained = trained_on(made);
        let folder = Path::new("adapter");
        assert_eq!(trained.notice(folder, &trained.weights).unwrap(), None);
        let mut others = trained.weights.clone();
        others.insert("b.q_proj".into(), Digest::default());
        let notice = trained.notice(folder, &others).unwrap().unwrap();
        assert!(notice.contains("1 of 2") && notice.contains("b.q_proj"), "{notice}");
        others.remove("a.q_proj");
        assert!(trained.differing(&others).unwrap().contains("2 of 2"));
        let error = trained_on(Form::Stored(stored)).notice(folder, &others).unwrap_err().to_string();
        assert!(error.contains("adapter") && error.contains("2 of 2"), "{error}");
    }
}
