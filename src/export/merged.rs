//! `merged/`: the base with its adapter folded in, as transformers' `save_pretrained` lays out a model.
//!
//! The base is read from its checkpoint again, tensor by tensor, so writing peaks at one tensor and never needs a second model.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use super::folder::{Staging, is_ours};
use crate::adapter::merge::{merged, merged_experts};
use crate::adapter::{Learned, Saved, Update};
use crate::data::grow;
use crate::model::families;
use crate::model::sites::{Role, Site, expert};
use crate::model::spec::Stored;
use crate::model::{Trained, grown};
use crate::quant::{Digest, Scheme};
use crate::weights::Checkpoint;
use crate::weights::writer::{self, SHARD_BYTES, TensorSpec};
use crate::{Error, Fault, Result};

/// Writes the merged model into `folder`, whole or not at all; an earlier one is replaced.
///
/// Tensors keep the checkpoint's names (those of transformers for a GGUF) and are stored as `kind` (tables of whole numbers as
/// they are), also where the base is quantised (its scales and its `quantization_config` are gone then), in shards of 5 GB. A head
/// that shares the embedding's weight is not stored, unless an update targets it: then both are stored and the config says they
/// are no longer tied. `onto` is how the base was quantised when the adapter was trained: the update is folded into those numbers.
/// `sidecars` come from [`super::sidecars`]; `progress` is called with bytes written so far and in all. Gives the fingerprints of the
/// weights that were quantised, by module ([`crate::adapter::TrainedOn::differing`]).
///
/// Errors: an update that does not fit the base, a merged value that `kind` cannot hold, what the checkpoint finds damaged;
/// [`Error::Output`] for a folder that cannot be written or is the base's own.
pub fn write(
    folder: &Path,
    checkpoint: &Checkpoint,
    learned: Learned<'_>,
    onto: Option<&Scheme>,
    kind: Kind,
    sidecars: &BTreeMap<String, Vec<u8>>,
    progress: &dyn Fn(u64, u64),
) -> Result<BTreeMap<String, Digest>> {
    let merging = Merging::new(folder, checkpoint, learned, onto, kind)?;
    let specs: Vec<TensorSpec> = (0..merging.tensors()).map(|index| merging.spec(index)).collect();
    let bytes = |spec: &TensorSpec| spec.shape.iter().product::<i64>() as u64 * spec.kind.elt_size_in_bytes() as u64;
    let (mut done, total) = (0, specs.iter().map(bytes).sum());

    let staging = Staging::create(folder, |name| is_ours(name, sidecars))?;
    writer::write_model(staging.path(), &specs, SHARD_BYTES, |index| {
        let tensor = merging.tensor(index, specs[index].kind)?;
        done += bytes(&specs[index]);
        progress(done, total);
        Ok(tensor)
    })?;
    finish(staging, &merging.config(), sidecars)?;
    Ok(merging.digests())
}

/// Puts the small files beside the weights, and the folder into its place.
pub(super) fn finish(staging: Staging, config: &Value, sidecars: &BTreeMap<String, Vec<u8>>) -> Result<()> {
    for (name, bytes) in sidecars.iter().filter(|(name, _)| *name != "config.json") {
        writer::write_file(&staging.path().join(name), bytes)?;
    }
    writer::write_file(&staging.path().join("config.json"), format!("{config:#}\n").as_bytes())?;
    staging.commit()
}

/// A base with updates folded in, made tensor by tensor as it is read.
pub(super) struct Merging<'a> {
    checkpoint: &'a Checkpoint,
    plan: Plan<'a>,
    onto: Option<&'a Scheme>,
    kind: Kind,
    digests: RefCell<BTreeMap<String, Digest>>,
}

impl<'a> Merging<'a> {
    /// What [`write`] would write into `folder`, and its errors but those of the tensors' own numbers and of the disk.
    pub(super) fn new(
        folder: &Path,
        checkpoint: &'a Checkpoint,
        learned: Learned<'a>,
        onto: Option<&'a Scheme>,
        kind: Kind,
    ) -> Result<Self> {
        refuse_base(folder, checkpoint)?;
        let stored = onto.is_some_and(|scheme| checkpoint.quantised_form() == Some(scheme.form));
        if let Some(scheme) = onto.filter(|scheme| !stored && !scheme.form.can_be_made()) {
            let what =
                format!("the adapter was trained on a base that is stored as {}, which this one is not", scheme.form);
            let fault = Fault::new("merge", what);
            return Err(Error::Model(fault.hint("name the base the adapter was trained on, or say --onto original")));
        }
        Ok(Self { checkpoint, plan: Plan::new(checkpoint, learned, onto)?, onto, kind, digests: RefCell::default() })
    }

    /// How many tensors there are.
    pub(super) fn tensors(&self) -> usize {
        self.plan.tensors.len()
    }

    /// A tensor as it is stored in plain numbers.
    pub(super) fn spec(&self, index: usize) -> TensorSpec {
        let Planned { name, from, shape, .. } = &self.plan.tensors[index];
        let kind = self.checkpoint.whole_kind(from).unwrap_or(self.kind);
        TensorSpec { name: name.clone(), kind, shape: shape.clone() }
    }

    /// The number type of a tensor that nothing is folded into, where it is read as the checkpoint has it.
    pub(super) fn untouched(&self, index: usize) -> Option<Kind> {
        (self.plan.tensors[index].update.is_none() && self.onto.is_none()).then_some(self.kind)
    }

    /// A tensor's numbers, rounded once to `kind`; tables of whole numbers, which are no weights, are of their own.
    pub(super) fn tensor(&self, index: usize, kind: Kind) -> Result<Tensor> {
        let planned = &self.plan.tensors[index];
        let whole = self.checkpoint.whole_kind(planned.from);
        let rounded_to = self.onto.map_or(self.kind, |scheme| if planned.wide { Kind::Float } else { scheme.kind });
        // What is folded into in fp32 is read so where that rounds nothing: it is folded into in place then.
        let exact = storage_name(rounded_to) == self.checkpoint.stored_as(planned.from);
        let in_place = kind == Kind::Float && exact && planned.quantised.is_none();
        let folded = planned.update.as_ref().is_some_and(|part| !part.is_of_the_rest());
        let read_as = whole.unwrap_or(if in_place && folded { Kind::Float } else { rounded_to });
        let tensor = self.checkpoint.tensor(planned.from, read_as, Device::Cpu)?;
        let grown = |tensor: Tensor| match planned.shape[..] == tensor.size()[..] {
            true => tensor,
            false => grown(tensor, planned.shape[0]),
        };
        // As a model grows: by numbers of the quantised weight, where nothing was taken off it.
        let tensor = match &planned.update {
            Some(part) if part.is_of_the_rest() => part.left(grown(tensor), read_as),
            _ => tensor,
        };
        let tensor = grown(match (&planned.quantised, self.onto) {
            (Some(place), Some(scheme)) => self.quantised(place, scheme, planned, tensor)?,
            _ => tensor,
        });
        let own = whole.unwrap_or(kind);
        match &planned.update {
            Some(part) => part.merged(tensor, own),
            None => Ok(tensor.to_kind(own)),
        }
    }

    /// What a weight stood for when the adapter was trained.
    fn quantised(&self, place: &Place, scheme: &Scheme, planned: &Planned<'_>, tensor: Tensor) -> Result<Tensor> {
        let (digest, numbers) = match place.stored {
            // Read as the numbers it was trained on.
            true => match self.checkpoint.quantised(planned.from, scheme.kind, Device::Cpu)? {
                Some(stored) => (stored.digest(), tensor),
                None => return Ok(tensor),
            },
            false => {
                let turned = |tensor: Tensor| match place.lies {
                    Lies::AsComputed => tensor,
                    Lies::Transposed => tensor.transpose(1, 2).contiguous(),
                };
                let made = scheme.quantised(&turned(tensor));
                (made.digest(), turned(made.dequantised()))
            }
        };
        let mut all = self.digests.borrow_mut();
        let own = place.expert.map_or(digest, |number| digest.of_expert(number));
        all.entry(place.module.clone()).and_modify(|others| *others = others.with(own)).or_insert(own);
        Ok(numbers)
    }

    /// Fingerprints of the weights that were quantised as their tensors were made, by module.
    pub(super) fn digests(self) -> BTreeMap<String, Digest> {
        self.digests.into_inner()
    }

    /// The base's config, with what merging changes.
    pub(super) fn config(&self) -> Value {
        let mut config = config(&self.checkpoint.config, self.kind, self.plan.unties);
        grow(&mut config, self.checkpoint.vocabulary as u64);
        config
    }

    /// Whether the head has a weight of its own here that it shares with the embedding in the base.
    pub(super) fn unties(&self) -> bool {
        self.plan.unties
    }
}

/// What is stored.
struct Plan<'a> {
    tensors: Vec<Planned<'a>>,
    /// Whether the config must say that the head does not share the embedding's weight.
    unties: bool,
}

struct Planned<'a> {
    name: String,
    /// The checkpoint's tensor it is made of.
    from: &'a str,
    shape: Vec<i64>,
    update: Option<Part<'a>>,
    /// What it was part of, where it was quantised in training.
    quantised: Option<Place>,
    /// Whether it was computed with in fp32, so that its numbers were never rounded.
    wide: bool,
}

/// Whose weight a tensor is, or a part of.
struct Place {
    /// Of the linear, as transformers has it.
    module: String,
    /// Whose it is, where each expert's is a tensor of its own.
    expert: Option<i64>,
    lies: Lies,
    /// Whether the file has it as it was in training.
    stored: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Lies {
    /// (out, in) or (E, out, in).
    AsComputed,
    /// (E, in, out).
    Transposed,
}

/// An update, as far as it goes into one tensor.
enum Part<'a> {
    /// In its place, in this shape.
    Trained(&'a Saved, Vec<i64>),
    /// In the place of a bias.
    TrainedBias(&'a Saved, &'a Tensor),
    Whole(&'a Update),
    Expert(&'a Update, i64),
    Experts {
        update: &'a Update,
        transposed: bool,
    },
}

impl<'a> Part<'a> {
    /// The tensors that `update` goes into, by name.
    fn of(update: &'a Update) -> Vec<(String, Self)> {
        match &update.role {
            Role::Experts { count, stored: Stored::Apart, .. } => (0..*count)
                .map(|number| (format!("{}.weight", expert(&update.module, number)), Self::Expert(update, number)))
                .collect(),
            Role::Experts { stored, .. } => {
                let transposed = *stored != Stored::Together;
                vec![(update.module.clone(), Self::Experts { update, transposed })]
            }
            Role::Linear | Role::Router | Role::Blocks | Role::Indexer | Role::Head => {
                vec![(format!("{}.weight", update.module), Self::Whole(update))]
            }
        }
    }

    fn merged(&self, tensor: Tensor, kind: Kind) -> Result<Tensor> {
        match self {
            Self::Trained(saved, _) => Ok(saved.trained.whole(&tensor.to_kind(kind))),
            Self::TrainedBias(_, bias) => Ok(bias.detach().to_kind(kind)),
            Self::Whole(update) => merged(tensor, update, kind),
            Self::Expert(update, number) => merged(tensor, &update.of_expert(*number), kind),
            Self::Experts { update, transposed } => merged_experts(tensor, update, *transposed, kind),
        }
    }

    /// Whether something was taken off the weight before training.
    fn is_of_the_rest(&self) -> bool {
        match self {
            Self::Trained(..) | Self::TrainedBias(..) => false,
            Self::Whole(update) | Self::Expert(update, _) | Self::Experts { update, .. } => update.taken.is_some(),
        }
    }

    /// What was left of the weight when training began.
    fn left(&self, tensor: Tensor, kind: Kind) -> Tensor {
        match self {
            Self::Trained(..) | Self::TrainedBias(..) => None,
            Self::Whole(update) => update.left(&tensor).map(|left| left.to_kind(kind)),
            Self::Expert(update, number) => update.of_expert(*number).left(&tensor).map(|left| left.to_kind(kind)),
            Self::Experts { update, transposed: false } => update.left(&tensor).map(|left| left.to_kind(kind)),
            Self::Experts { update, transposed: true } => {
                let left = update.left(&tensor.transpose(1, 2).contiguous());
                left.map(|left| left.to_kind(kind).transpose(1, 2).contiguous())
            }
        }
        .unwrap_or(tensor)
    }

    /// The shape of the tensor it fits.
    fn shape(&self) -> Vec<i64> {
        match self {
            Self::Trained(_, shape) => shape.clone(),
            Self::TrainedBias(_, bias) => bias.size(),
            Self::Whole(update) | Self::Expert(update, _) => <[i64; 2]>::from(update.shape()).to_vec(),
            Self::Experts { update, transposed } => {
                let (rows, columns) = update.shape();
                let [outer, inner] = if *transposed { [columns, rows] } else { [rows, columns] };
                vec![update.a.size()[0], outer, inner]
            }
        }
    }

    fn module(&self) -> &str {
        match self {
            Self::Trained(saved, _) | Self::TrainedBias(saved, _) => &saved.module,
            Self::Whole(update) | Self::Expert(update, _) | Self::Experts { update, .. } => &update.module,
        }
    }
}

impl<'a> Plan<'a> {
    fn new(checkpoint: &'a Checkpoint, learned: Learned<'a>, onto: Option<&Scheme>) -> Result<Self> {
        let mut spec = families::spec(checkpoint)?;
        spec.grow(checkpoint.vocabulary)?;
        let head = spec.names.stored(&format!("{}.weight", spec.head.name));
        let bias = spec.names.stored(&format!("{}.bias", spec.head.name));
        let embedding = spec.names.stored(&spec.embedding.weight);
        let stored = |path: &str| spec.names.stored_as(path, |name| name == head || checkpoint.shape(name).is_some());
        let Learned { updates, saved } = learned;
        let trained = saved.iter().flat_map(|saved| {
            let shape = match &saved.trained {
                Trained::Whole { weight, .. } => weight.size(),
                Trained::Rows { rows, .. } => vec![spec.vocab_size, rows.size()[1]],
            };
            let weight = (format!("{}.weight", saved.module), Part::Trained(saved, shape));
            let bias = |bias| (format!("{}.bias", saved.module), Part::TrainedBias(saved, bias));
            [weight].into_iter().chain(saved.trained.bias().map(bias))
        });
        let parts = updates.iter().flat_map(Part::of).chain(trained);
        let mut by_weight: BTreeMap<String, Part<'_>> = parts.map(|(name, part)| (stored(&name), part)).collect();
        let stored_so = onto.is_some_and(|scheme| checkpoint.quantised_form() == Some(scheme.form));
        let mut quantised: BTreeMap<String, Place> = onto.map_or_else(BTreeMap::new, |scheme| {
            let sites = spec.sites().into_iter();
            sites
                .filter(|site| site.quantisable(spec.head.tied) && !scheme.skips(&site.name))
                .flat_map(|site| {
                    let (parameters, lies) = (site.parameters(), lies(&site));
                    let apart = matches!(site.role, Role::Experts { stored: Stored::Apart, .. });
                    let place = move |number| {
                        let expert = apart.then_some(number);
                        Place { module: site.name.clone(), expert, lies, stored: stored_so }
                    };
                    parameters.into_iter().zip((0..).map(place))
                })
                .map(|(name, place)| (stored(&name), place))
                .collect()
        });
        // An embedding that is trained without a head that shared its weight leaves that behind as it was.
        let parts_from_head = |part: &Part<'_>| matches!(part, Part::Trained(saved, _) if saved.shared_with.is_none());
        let unties =
            spec.head.tied && (by_weight.contains_key(&head) || by_weight.get(&embedding).is_some_and(parts_from_head));
        let wide: HashSet<String> = spec.wide_tensors().iter().map(|name| spec.names.stored(name)).collect();
        let accounted: HashSet<String> = spec.tensors().keys().map(|name| spec.names.stored(name)).collect();
        let mut tensors = Vec::new();
        for from in checkpoint.names() {
            // A checkpoint may store the shared weight a second time; the embedding's is the one that is used.
            let second = spec.head.tied && from == head;
            if second || (checkpoint.is_spare(from) && !accounted.contains(from)) {
                continue;
            }
            let mut shape = checkpoint.shape(from).unwrap_or_default();
            if [&embedding, &head, &bias].iter().any(|name| *name == from) {
                shape[0] = shape[0].max(spec.vocab_size);
            }
            tensors.push(Planned {
                name: from.to_string(),
                from,
                shape: shape.clone(),
                // A base that is stored quantised reads as the numbers it was trained on, but for what was taken off them.
                quantised: quantised.remove(from).map(|place| {
                    let rest = by_weight.get(from).is_some_and(Part::is_of_the_rest);
                    Place { stored: place.stored && !rest, ..place }
                }),
                update: by_weight.remove(from),
                wide: wide.contains(from),
            });
            if unties && from == embedding {
                let update = by_weight.remove(&head);
                tensors.push(Planned { name: head.clone(), from, shape, update, quantised: None, wide: false });
            }
        }
        if let Some(update) = by_weight.values().next() {
            let what = format!(
                "{} of the adapter's modules are not in this base, {} among them",
                by_weight.len(),
                update.module()
            );
            return Err(Error::Model(Fault::new("merge", what).hint("name the base the adapter was trained on")));
        }
        for planned in &tensors {
            if let Some(part) = planned.update.as_ref().filter(|part| part.shape() != planned.shape) {
                let what = format!("is {:?} in this base, but the adapter fits {:?}", planned.shape, part.shape());
                let fault = Fault::new(&planned.name, what);
                return Err(Error::Model(fault.hint("name the base the adapter was trained on")));
            }
        }
        // Of a larger model, the files say whether the head is its own, and its config may not.
        Ok(Self { tensors, unties: unties || (spec.names.own_head_if_stored && !spec.head.tied) })
    }
}

/// How a linear's weight lies in its file.
fn lies(site: &Site) -> Lies {
    match &site.role {
        Role::Experts { stored: Stored::Transposed { .. }, .. } => Lies::Transposed,
        _ => Lies::AsComputed,
    }
}

/// How a checkpoint calls plain numbers of a type.
fn storage_name(kind: Kind) -> Option<&'static str> {
    match kind {
        Kind::BFloat16 => Some("BF16"),
        Kind::Half => Some("F16"),
        Kind::Float => Some("F32"),
        _ => None,
    }
}

/// What torch calls a number type.
pub(super) fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float32",
    }
}

/// The base's config, with what merging changes: the number type, and whether the head is tied.
fn config(base: &Value, kind: Kind, unties: bool) -> Value {
    let mut config = base.clone();
    let dtype = json!(dtype_name(kind));
    let Some(fields) = config.as_object_mut() else { return config };
    fields.insert("dtype".into(), dtype.clone());
    if unties {
        fields.insert("tie_word_embeddings".into(), json!(false));
    }
    // A model of several parts says it again for each.
    let parts = ["text_config", "vision_config", "audio_config"];
    change(fields, &dtype, unties);
    for part in parts {
        if let Some(fields) = fields.get_mut(part).and_then(Value::as_object_mut) {
            change(fields, &dtype, unties);
        }
    }
    config
}

/// Sets what is said already; what was quantised is written as plain numbers.
fn change(fields: &mut Map<String, Value>, dtype: &Value, unties: bool) {
    fields.remove("quantization_config");
    // The second is the name before transformers 4.56; both are read, and must not differ.
    for name in ["dtype", "torch_dtype"] {
        if let Some(said) = fields.get_mut(name) {
            *said = dtype.clone();
        }
    }
    for name in ["tie_word_embeddings", "share_embedding"] {
        if let Some(said) = fields.get_mut(name).filter(|_| unties) {
            *said = json!(false);
        }
    }
}

/// Merging must not replace the files it reads.
pub(super) fn refuse_base(folder: &Path, checkpoint: &Checkpoint) -> Result<()> {
    // A folder that does not exist yet holds no base.
    let Ok(folder) = fs::canonicalize(folder) else { return Ok(()) };
    // The hub's cache holds links: neither they nor what they point at may be lost.
    let within = |path: &Path| fs::canonicalize(path).is_ok_and(|path| path.starts_with(&folder));
    match checkpoint.files.iter().find(|file| within(file) || file.parent().is_some_and(within)) {
        Some(file) => {
            let what = format!("is the base model's own folder ({})", file.display());
            Err(Error::Output(Fault::at(&folder, what).hint("name another folder")))
        }
        None => Ok(()),
    }
}
