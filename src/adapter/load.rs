//! Reads an adapter folder as PEFT writes it: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use super::config::{AdapterConfig, CONFIG, MERGE_IT, Ranks};
use super::layout::{self, Assembled};
use super::saved::{self, BIAS, Named, Saved, TOKENS};
use super::{TrainedOn, Update, overview};
use crate::model::names::Names;
use crate::model::sites::{Role, Site};
use crate::model::{ModelSpec, Trained};
use crate::recipe::{Targets, TokenIndices};
use crate::weights::Checkpoint;
use crate::{Error, Fault, Result};

/// The weights' file.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// Says how the base was quantised: PEFT's own files have no place for it, and other numbers are another base.
pub const SCHEME: &str = "base_quantization.json";
/// What PEFT puts before a module's path.
pub const PREFIX: &str = "base_model.model.";

const MAX_TEMPLATE: u64 = 1 << 20;
const MAX_TOKENIZER: u64 = 256 << 20;

/// An adapter read from its folder, checked in itself but not yet against a base.
#[derive(Debug)]
pub struct LoadedAdapter {
    /// The folder.
    pub folder: PathBuf,
    /// What its config says.
    pub config: AdapterConfig,
    /// A and B by module as the file has them, in the order of the module's paths: those of experts not yet put together.
    pub updates: Vec<Update>,
    /// What the user should know, in plain sentences.
    pub notices: Vec<String>,
    /// Modules trained whole and rows of tokens, fp32, by the end of their key.
    whole: Vec<(String, Tensor)>,
    /// Base weights stored along with a targeted head, which are passed over: module and shape.
    base_layers: BaseLayers,
}

/// Modules and shapes.
type BaseLayers = Vec<(String, Vec<i64>)>;

impl LoadedAdapter {
    /// Reads the adapter in `folder`: A and B as fp32 on the CPU.
    ///
    /// Errors name the file and what is wrong with it: not an adapter's folder, pickled weights, a damaged file, a feature beside
    /// LoRA and DoRA on linears, A without B, shapes that contradict each other or the config, numbers that are not finite.
    pub fn read(folder: &Path) -> Result<Self> {
        check_files(folder)?;
        let (config, mut notices) = AdapterConfig::read(folder)?;
        let path = folder.join(WEIGHTS);
        let weights = Checkpoint::open_file(&path)?;
        let Sorted { pairs, base_layers, whole } = sort(&path, &weights, &config)?;
        let ranks = config.ranks(&folder.join(CONFIG))?;
        if config.lora_alpha == 0.0 {
            notices.push(format!("{CONFIG}: lora_alpha is 0, so the adapter changes nothing"));
        }
        if let Some((module, _)) = base_layers.first() {
            notices.push(format!("{WEIGHTS} also holds the base's own weight of {module}: the base's is used"));
        }
        let updates = pairs
            .into_iter()
            .map(|(module, pair)| read_pair(&path, &weights, &ranks, config.use_dora, module, &pair))
            .collect::<Result<_>>()?;
        let whole = whole.into_iter().map(|key| {
            let stored = weights.stored_as(&key).unwrap_or_default();
            if !FLOATS.contains(&stored) {
                let what = format!("is stored as {stored}; F32, F16, BF16 or F64 was expected");
                return Err(Error::Model(Fault::new(format!("{}: {key}", path.display()), what)));
            }
            Ok((key.strip_prefix(PREFIX).unwrap_or(&key).to_string(), weights.tensor(&key, Kind::Float, Device::Cpu)?))
        });
        let whole = whole.collect::<Result<_>>()?;
        Ok(Self { folder: folder.to_path_buf(), config, updates, notices, whole, base_layers })
    }

    /// The chat template that lies beside the adapter: the one it was trained with.
    pub fn chat_template(&self) -> Result<Option<String>> {
        let path = self.folder.join("chat_template.jinja");
        let fault = |what: String| Error::Model(Fault::at(&path, what));
        match path.metadata() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(fault(format!("cannot be read: {error}"))),
            Ok(metadata) if !metadata.is_file() => return Err(fault("is not a regular file".into())),
            Ok(metadata) if metadata.len() > MAX_TEMPLATE => {
                return Err(fault(format!("is {} bytes; at most {MAX_TEMPLATE} are read", metadata.len())));
            }
            Ok(_) => {}
        }
        std::fs::read_to_string(&path).map(Some).map_err(|error| fault(format!("cannot be read: {error}")))
    }

    /// How many tokens the base must have for the rows that are trained; 0 where none are.
    pub fn vocabulary(&self) -> i64 {
        let ids = match &self.config.trainable_token_indices {
            None => None,
            Some(TokenIndices::Embedding(ids)) => ids.iter().max(),
            Some(TokenIndices::Modules(modules)) => modules.values().flatten().max(),
        };
        ids.map_or(0, |id| i64::from(*id) + 1)
    }

    /// The tokenizer that lies beside the adapter.
    pub fn tokenizer(&self) -> Result<Option<Vec<u8>>> {
        let path = self.folder.join("tokenizer.json");
        match path.metadata() {
            Ok(metadata) if metadata.is_file() && metadata.len() <= MAX_TOKENIZER => {
                std::fs::read(&path).map(Some).map_err(|error| Error::Model(Fault::at(&path, error)))
            }
            Ok(_) => Err(Error::Model(Fault::at(&path, format!("is no file of at most {MAX_TOKENIZER} bytes")))),
            Err(_) => Ok(None),
        }
    }

    /// What its base was when it was trained; `None` where that was not quantised, or nothing says so.
    pub fn trained_on(&self) -> Result<Option<TrainedOn>> {
        TrainedOn::read(&self.folder)
    }

    /// What of a model of this spec is trained whole, and how it is now.
    ///
    /// # Errors
    /// [`Error::Model`] where the file lacks it or has another shape, and where the file has what the base has not.
    pub fn saved(&self, spec: &ModelSpec) -> Result<Vec<Saved>> {
        let fault = |key: &str, what: String| {
            Error::Model(Fault::new(format!("{}: {key}", self.folder.join(WEIGHTS).display()), what))
        };
        let names = &spec.names;
        let named = saved::named(spec, &self.config, self.config.ensure_weight_tying)
            .map_err(|error| fault(CONFIG, error.to_string()))?;
        let mut taken = BTreeSet::new();
        let mut all = Vec::new();
        for Named { module, mut shape, bias, rows, shared_with } in named {
            let mut part = |end: &str, expected: &[i64]| -> Result<Tensor> {
                let of_it = |(key, _): &&(String, Tensor)| {
                    let spelled = key.strip_suffix(end).into_iter().flat_map(|own| names.spec_names(own));
                    spelled
                        .map(|name| names.module(&name))
                        .any(|name| name == module || shared_with.as_ref() == Some(&name))
                };
                let found: Vec<&(String, Tensor)> = self.whole.iter().filter(of_it).collect();
                let Some((key, tensor)) = found.first() else {
                    let missing = if end == BIAS { format!("{module}{end}") } else { module.clone() };
                    return Err(fault(&missing, format!("is not there, but {CONFIG} says that it was trained")));
                };
                if tensor.size() != expected {
                    let found = tensor.size();
                    let what = format!("is {found:?} there, {expected:?} here: another base, or other tokens");
                    return Err(fault(key, what));
                }
                taken.extend(found.iter().map(|(key, _)| key.as_str()));
                Ok(tensor.shallow_clone())
            };
            let trained = match rows {
                None => {
                    let weight = part(".weight", &shape)?;
                    let bias = bias.then(|| part(BIAS, &shape[..1])).transpose()?;
                    Trained::Whole { weight, bias }
                }
                Some(ids) => {
                    shape[0] = ids.len() as i64;
                    Trained::Rows { ids: Tensor::from_slice(&ids), rows: part(TOKENS, &shape)? }
                }
            };
            all.push(Saved { module, trained, shared_with });
        }
        match self.whole.iter().find(|(key, _)| !taken.contains(key.as_str())) {
            Some((key, _)) => Err(fault(key, "is nothing of this base that is trained whole".into())),
            None => Ok(all),
        }
    }

    /// Checks that the adapter fits a base whose linears are `sites`; returns the updates by the index of their site, those of
    /// experts put together. Modules may be called as transformers does or as the base's files do.
    ///
    /// The error of an adapter for another base names both and what differs.
    pub fn fit(&self, sites: &[Site], names: &Names) -> Result<BTreeMap<usize, Update>> {
        let place = self.folder.join(WEIGHTS).display().to_string();
        let Assembled { updates, absent, mut differing } =
            Assembled::new(&self.updates, sites, names, &self.config, &place)?;
        let by_name: BTreeMap<&str, &Site> = sites.iter().map(|site| (site.name.as_str(), site)).collect();
        for (module, shape) in &self.base_layers {
            let mut spelled = names.spec_names(module).map(|name| names.module(&name));
            let here = spelled.find_map(|name| by_name.get(name.as_str()).map(|site| site.shape));
            if let Some((rows, columns)) = here.filter(|(rows, columns)| shape != &[*rows, *columns]) {
                differing.push(format!("{module} ({shape:?} there, [{rows}, {columns}] here)"));
            }
        }
        if absent.is_empty() && differing.is_empty() {
            let parted = self.trained_on()?.is_some_and(|trained_on| trained_on.scheme.after_start);
            let updates = updates.into_iter();
            return Ok(updates.map(|(index, u)| (index, if parted { u.parted() } else { u })).collect());
        }
        let mut what = Vec::new();
        if !absent.is_empty() {
            let all = if absent.len() == self.updates.len() { "all".to_string() } else { absent.len().to_string() };
            what.push(format!("{all} of its modules are not linears of this base, {} among them", absent[0]));
        }
        if let Some(first) = differing.first() {
            what.push(match differing.len() {
                1 => format!("this shape differs: {first}"),
                count => format!("{count} shapes differ, among them {first}"),
            });
        }
        let base = match &self.config.base_model_name_or_path {
            Some(name) => format!("it was trained on {name}"),
            None => "it does not say which base it was trained on".to_string(),
        };
        let names: Vec<&str> = sites.iter().map(|site| site.name.as_str()).collect();
        let what = format!("this adapter is for another base: {}", what.join("; "));
        let hint = format!("{base}; the linears here are: {}", overview(&names));
        Err(Error::Model(Fault::at(&self.folder, what).hint(hint)))
    }
}

impl LoadedAdapter {
    /// What the config of the adapter, fitted to a base, says there, where modules may be called otherwise: `dropout` while training.
    ///
    /// Errors with [`Error::Recipe`] for what PEFT has no way to say.
    pub fn config_on(
        &self,
        fitted: &BTreeMap<usize, Update>,
        sites: &[Site],
        names: &Names,
        dropout: f64,
    ) -> Result<AdapterConfig> {
        let mut config = AdapterConfig { lora_dropout: dropout, ..self.config.clone() };
        let originals: Vec<Update> = fitted.values().map(Update::of_the_original).collect();
        let chosen: Vec<(usize, u32, f64)> =
            fitted.keys().zip(&originals).map(|(index, update)| (*index, update.rank() as u32, update.scale)).collect();
        layout::describe(&mut config, sites, names, &chosen)?;
        let theirs: BTreeSet<&str> = self.updates.iter().map(|update| update.module.as_str()).collect();
        // Null where PEFT was to guess from the model's type.
        config
            .target_modules
            .get_or_insert_with(|| Targets::Names(originals.iter().map(|update| update.module.clone()).collect()));
        let otherwise_spelled = originals.iter().any(|update| !theirs.contains(update.module.as_str()));
        if otherwise_spelled && config.target_parameters.is_none() {
            config.spell_out(&originals);
        }
        Ok(config)
    }
}

const FLOATS: [&str; 4] = ["F32", "F16", "BF16", "F64"];

/// The keys of one module's A and B.
#[derive(Default)]
struct Pair {
    a: Option<String>,
    b: Option<String>,
    lengths: Option<String>,
}

/// How the keys of trained lengths end: as saved, and with an adapter's name left in.
const DORA: [&str; 2] = [".lora_magnitude_vector", ".lora_magnitude_vector.default.weight"];

/// What PEFT makes of a module: how its key ends, and the feature's name.
const FEATURES: &[(&str, &str)] = &[
    (".lora_embedding_A", "an adapter on an embedding"),
    (".lora_embedding_B", "an adapter on an embedding"),
    (".lora_B.bias", "a bias on lora_B"),
];

fn check_files(folder: &Path) -> Result<()> {
    let fault = |what: &str, hint: String| Err(Error::Model(Fault::at(folder, what).hint(hint)));
    let has = |name: &str| folder.join(name).symlink_metadata().is_ok();
    if folder.is_file() {
        return fault("is a file", format!("name the adapter's folder, which holds {CONFIG} and {WEIGHTS}"));
    }
    if !folder.is_dir() {
        return fault(
            "there is no such folder",
            format!("name an adapter's folder, which holds {CONFIG} and {WEIGHTS}"),
        );
    }
    if !has(CONFIG) {
        return fault(
            &format!("holds no {CONFIG}"),
            match () {
                () if folder.join("adapter").join(CONFIG).is_file() => {
                    format!("the adapter is one folder down: {}", folder.join("adapter").display())
                }
                () if has("config.json") => "this is a whole model: name it as base_model".to_string(),
                () => "name the folder that PEFT or engraft wrote".to_string(),
            },
        );
    }
    if !has(WEIGHTS) {
        if has("adapter_model.bin") {
            return fault(
                "its weights are adapter_model.bin, a Python pickle, which can run code when opened",
                "convert it where you trust it: load it in PEFT and save_pretrained(..., safe_serialization=True)"
                    .into(),
            );
        }
        return fault(&format!("holds no {WEIGHTS}"), "copy the whole folder, or fetch it again".into());
    }
    Ok(())
}

/// What a file's keys are.
struct Sorted {
    pairs: BTreeMap<String, Pair>,
    base_layers: BaseLayers,
    whole: Vec<String>,
}

/// Sorts the file's keys into pairs; what is trained whole and base weights stored along (of a targeted head) are set aside.
fn sort(path: &Path, weights: &Checkpoint, config: &AdapterConfig) -> Result<Sorted> {
    let mut pairs: BTreeMap<String, Pair> = BTreeMap::new();
    let mut base_layers = Vec::new();
    let mut whole = Vec::new();
    let saves = |module: &str| {
        let named = config.modules_to_save.iter().flatten().any(|typed| module.ends_with(typed.as_str()));
        // A head that shares the embedding's weight is stored without being named.
        named || (config.ensure_weight_tying && config.modules_to_save.is_some())
    };
    let mut features = Vec::new();
    let mut unknown = Vec::new();
    for key in weights.names() {
        let module = key.strip_prefix(PREFIX).unwrap_or(key);
        // Some tools leave the adapter's name in.
        let plain = module.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.");
        let slot = if let Some(module) = plain.strip_suffix(".lora_A.weight") {
            &mut pairs.entry(module.to_string()).or_default().a
        } else if let Some(module) = plain.strip_suffix(".lora_B.weight") {
            &mut pairs.entry(module.to_string()).or_default().b
        } else if let Some(module) = DORA.iter().find_map(|end| plain.strip_suffix(end)) {
            &mut pairs.entry(module.to_string()).or_default().lengths
        } else if let Some(module) = plain.strip_suffix(".base_layer.weight") {
            base_layers.push((module.to_string(), weights.shape(key).unwrap_or_default()));
            continue;
        } else if (config.trainable_token_indices.is_some() && plain.ends_with(TOKENS))
            || [".weight", BIAS].iter().any(|end| plain.strip_suffix(end).is_some_and(&saves))
        {
            whole.push(key.to_string());
            continue;
        } else {
            let known = FEATURES.iter().find(|(end, _)| plain.trim_end_matches(".weight").ends_with(end));
            match known.or_else(|| FEATURES.iter().find(|(end, _)| plain.ends_with(end))) {
                Some((_, feature)) if !features.contains(feature) => features.push(*feature),
                Some(_) => {}
                None => unknown.push(key),
            }
            continue;
        };
        if let Some(other) = slot.replace(key.to_string()) {
            let what = format!("{key} and {other} are the same matrix");
            return Err(Error::Model(Fault::at(path, what).hint("keep one of them")));
        }
    }
    if !features.is_empty() {
        let what = format!("holds {}; engraft reads plain LoRA on linears", features.join(" and "));
        return Err(Error::Model(Fault::at(path, what).hint(MERGE_IT)));
    }
    if !unknown.is_empty() {
        let shown = unknown.iter().take(5).copied().collect::<Vec<_>>().join(", ");
        let more = if unknown.len() > 5 { format!(" and {} more", unknown.len() - 5) } else { String::new() };
        let what = format!("holds tensors that are no part of a LoRA adapter on linears: {shown}{more}");
        return Err(Error::Model(Fault::at(path, what).hint(MERGE_IT)));
    }
    if pairs.is_empty() && whole.is_empty() {
        return Err(Error::Model(Fault::at(
            path,
            "holds no lora_A and lora_B: nothing was trained, or nothing was saved",
        )));
    }
    Ok(Sorted { pairs, base_layers, whole })
}

fn read_pair(
    path: &Path,
    weights: &Checkpoint,
    ranks: &Ranks,
    use_dora: bool,
    module: String,
    pair: &Pair,
) -> Result<Update> {
    let fault = |what: String| Error::Model(Fault::new(format!("{}: {module}", path.display()), what));
    let (Some(a), Some(b)) = (&pair.a, &pair.b) else {
        let (has, lacks) = if pair.a.is_some() { ("lora_A", "lora_B") } else { ("lora_B", "lora_A") };
        return Err(fault(format!("has {has} but no {lacks}")));
    };
    let shape = |key: &str| weights.shape(key).unwrap_or_default();
    let (&[r, columns], &[rows, other]) = (shape(a).as_slice(), shape(b).as_slice()) else {
        return Err(fault(format!("lora_A is {:?} and lora_B {:?}; both must be matrices", shape(a), shape(b))));
    };
    if r == 0 || rows == 0 || columns == 0 {
        return Err(fault(format!("lora_A is ({r} x {columns}) and lora_B ({rows} x {other}): empty")));
    }
    if r != other {
        return Err(fault(format!("lora_A has rank {r} ({r} x {columns}) but lora_B {other} ({rows} x {other})")));
    }
    // Where a pair stands for all experts of a block, the base is needed to say what its rank is.
    let of_experts = module.ends_with(".experts") || module.ends_with(".base_layer");
    let stated = ranks.rank(&module);
    if i64::from(stated) != r && !of_experts {
        return Err(fault(format!("its matrices have rank {r}, but {CONFIG} says {stated} (r, rank_pattern)")));
    }
    match &pair.lengths {
        None if use_dora => {
            return Err(fault(format!("has no lora_magnitude_vector, but {CONFIG} says use_dora")));
        }
        Some(_) if !use_dora => {
            return Err(fault(format!("has a lora_magnitude_vector, but {CONFIG} does not say use_dora")));
        }
        Some(lengths) if shape(lengths) != [rows] => {
            let found = shape(lengths);
            return Err(fault(format!("lora_magnitude_vector is {found:?}, but lora_B has {rows} rows")));
        }
        Some(_) | None => {}
    }
    for key in [a, b].into_iter().chain(&pair.lengths) {
        let stored = weights.stored_as(key).unwrap_or_default();
        if !FLOATS.contains(&stored) {
            return Err(fault(format!("is stored as {stored}; F32, F16, BF16 or F64 was expected")));
        }
    }
    let scale = ranks.scale(&module);
    if !scale.is_finite() {
        return Err(fault(format!("its scale (lora_alpha over rank {r}) is {scale}")));
    }
    let read = |key: &str| weights.tensor(key, Kind::Float, Device::Cpu);
    let lengths = pair.lengths.as_deref().map(read).transpose()?;
    Ok(Update { a: read(a)?, b: read(b)?, scale, module, role: Role::Linear, lengths, taken: None })
}
