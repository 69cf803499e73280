//! What a recipe means: names looked up, paths made absolute, devices chosen, defaults resolved. Made once, read by every room.

use std::path::{Path, PathBuf};

use tch::{Device, Kind};

use super::paths::{self, Found};
use super::read::in_order;
use super::tree::{Place, Problem};
use super::{
    AdapterMethod, AdapterRecipe, BaseSource, CacheDequantized, Compute, DataSource, DatasetRecipe, DeviceChoice,
    Dtype, OutputRecipe, QuantizationRecipe, QuantizationType, Recipe, RecipeFile, Save, Sources, TrainingRecipe,
    sources,
};
use crate::quant::{Form, FourBitType, Products, Scheme, name_of};
use crate::{Error, Fault, Result};

/// A recipe with everything resolved.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The recipe as typed, with `--set` overrides applied.
    pub recipe: Recipe,
    /// The recipe's file.
    pub path: PathBuf,
    /// Where the base model's files are.
    pub base: BaseSource,
    /// Number type of the base and the activations.
    pub kind: Kind,
    /// Where to train, or why not: checking a recipe and looking at its data need no device.
    device: Result<Device, Fault>,
    /// The adapter's part of the recipe, `adapter_name_or_path` made absolute.
    pub adapter: AdapterRecipe,
    /// How the base is quantised; `None` where it is not.
    pub scheme: Option<Scheme>,
    /// The dataset's part of the recipe, `chat_template` made absolute where it is a file.
    pub dataset: DatasetRecipe,
    /// Training files, in a stable order.
    pub train: Vec<DataSource>,
    /// Evaluation files, in a stable order; empty when there is no eval set.
    pub eval: Vec<DataSource>,
    /// The training part of the recipe, `gradient_accumulation_steps` as `global_batch_size` has it unless micro-batches are left to
    /// the memory plan.
    pub training: TrainingRecipe,
    /// The output part of the recipe, `dir` made absolute.
    pub output: OutputRecipe,
}

impl RecipeFile {
    /// Resolves every name in the recipe.
    ///
    /// Paths are taken from the recipe's folder, those typed after `--set` from the current one (as the shell completes
    /// them). Nothing is opened, fetched or created.
    ///
    /// # Errors
    ///
    /// [`Error::Recipe`] with every path that is missing, is something else than it should be, or would be overwritten.
    pub fn plan(self) -> Result<Plan> {
        let mut resolver = Resolver { file: &self, problems: Vec::new() };
        let base = resolver.base();
        let train = resolver.data("dataset.train", Some(&self.recipe.dataset.train));
        let eval = resolver.data("dataset.eval", self.recipe.dataset.eval.as_ref());
        let mut adapter = self.recipe.adapter.clone();
        adapter.adapter_name_or_path = resolver.adapter();
        let mut dataset = self.recipe.dataset.clone();
        dataset.chat_template = resolver.template();
        let mut output = self.recipe.output.clone();
        output.dir = resolver.output(base.as_ref(), train.iter().chain(&eval), adapter.adapter_name_or_path.as_deref());
        let Some(base) = base.filter(|_| resolver.problems.is_empty()) else {
            return Err(Error::Recipe(in_order(resolver.problems, &self.path.display().to_string())));
        };
        let placed = |key: &str, fault: Fault| Fault {
            place: self.tree.place_of(key).show(&self.path.display().to_string()),
            ..fault
        };
        let contradictions = output.exports().into_iter().filter_map(|choice| choice.prove().err()).map(|fault| {
            let what = format!("{} {}", fault.place, fault.what);
            placed("output.export", Fault { what, ..fault })
        });
        let contradictions: Vec<Fault> = contradictions.collect();
        if !contradictions.is_empty() {
            return Err(Error::Recipe(contradictions));
        }
        let device = self.recipe.device.find().map_err(|fault| placed("device", fault));
        let (recipe, path) = (self.recipe, self.path);
        let (kind, mut training) = (recipe.dtype.kind(), recipe.training.clone());
        if let (Some(global), Some(rows)) = (training.global_batch_size, training.micro_batch_size.rows()) {
            training.gradient_accumulation_steps = global / rows;
        }
        let scheme = (adapter.method == AdapterMethod::Qlora)
            .then(|| recipe.quantization.clone().unwrap_or_default().scheme(kind));
        Ok(Plan { recipe, path, base, kind, device, adapter, scheme, dataset, train, eval, training, output })
    }
}

impl Plan {
    /// Where to train.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] when the device asked for is not there.
    pub fn device(&self) -> crate::Result<Device> {
        self.device.clone().map_err(Error::Device)
    }
}

impl QuantizationType {
    /// This form, in blocks of `block` with quantised scales or not where it has blocks.
    pub fn with(self, block: i64, double_quant: bool) -> Form {
        match self {
            QuantizationType::Nf4 => Form::FourBit { code: FourBitType::Nf4, block, double_quant },
            QuantizationType::Fp4 => Form::FourBit { code: FourBitType::Fp4, block, double_quant },
            QuantizationType::Int8 => Form::Int8,
            QuantizationType::Fp8 => Form::Fp8,
        }
    }
}

impl QuantizationRecipe {
    /// Whether this asks for a form, be it by the numbers to a block alone; where it does not, a base that is stored quantised stays so.
    pub fn asks_for_a_form(&self) -> bool {
        let usual = Self::default();
        self.form.is_some() || (self.double_quant, self.block_size) != (usual.double_quant, usual.block_size)
    }

    /// What is typed for one on a command line, at `place`, as a scheme for numbers in `kind`: a `type`, or a mapping of keys.
    ///
    /// # Errors
    /// [`Error::Recipe`], as strict as a recipe's.
    pub fn typed(typed: &str, place: &str, kind: Kind) -> crate::Result<Scheme> {
        let key = if typed.trim_start().starts_with('{') { "quantization" } else { "quantization.type" };
        let set = [format!("{key}={typed}"), format!("dtype={}", name_of(kind)), "adapter.method=qlora".to_string()];
        let rest = "{base_model: base, dataset: {train: rows.parquet}, output: {dir: out}}";
        match Recipe::parse(Path::new(place), rest, &set) {
            Ok(file) => Ok(file.recipe.quantization.unwrap_or_default().scheme(kind)),
            Err(Error::Recipe(faults)) => {
                Err(Error::Recipe(faults.into_iter().map(|fault| Fault { place: place.into(), ..fault }).collect()))
            }
            Err(error) => Err(error),
        }
    }

    /// What this asks for. Whether weights are cached whole where that is left to engraft is decided when there is a device.
    fn scheme(&self, kind: Kind) -> Scheme {
        let form = self.form.unwrap_or_default().with(self.block_size.into(), self.double_quant);
        Scheme {
            form,
            kind,
            skip: self.skip.clone(),
            products: match (self.compute, self.cache_dequantized) {
                (Compute::Fp8, _) => Products::Fp8,
                (Compute::Dequantized, CacheDequantized::Always) => Products::Cached,
                (Compute::Dequantized, CacheDequantized::Auto | CacheDequantized::Never) => Products::Dequantised,
            },
            after_start: false,
        }
    }
}

impl DeviceChoice {
    /// The device this means on this machine.
    ///
    /// # Errors
    ///
    /// A fault without a place when CUDA is asked for and not there; it says whether libtorch or the GPU is missing.
    pub fn find(self) -> Result<Device, Fault> {
        match self {
            DeviceChoice::Cpu => Ok(Device::Cpu),
            DeviceChoice::Auto => Ok(Device::cuda_if_available()),
            DeviceChoice::Cuda if tch::Cuda::is_available() => Ok(Device::Cuda(0)),
            DeviceChoice::Cuda if !tch::utils::has_cuda() && !tch::utils::has_cudart() => {
                Err(Fault::new("", "CUDA is asked for, but this libtorch is built without it")
                    .hint("build engraft against a CUDA libtorch (LIBTORCH), or write device: cpu"))
            }
            DeviceChoice::Cuda => Err(Fault::new("", "CUDA is asked for, but there is no usable GPU").hint(
                "check that nvidia-smi lists one and CUDA_VISIBLE_DEVICES does not hide it, or write device: cpu",
            )),
        }
    }
}

impl Dtype {
    /// The number type as libtorch names it.
    pub fn kind(self) -> Kind {
        match self {
            Dtype::Bf16 => Kind::BFloat16,
            Dtype::Fp16 => Kind::Half,
            Dtype::Fp32 => Kind::Float,
        }
    }
}

struct Resolver<'a> {
    file: &'a RecipeFile,
    problems: Vec<Problem>,
}

impl Resolver<'_> {
    /// Adds what is wrong with the value at `key`.
    fn fault(&mut self, key: &str, fault: Fault) {
        self.fault_at(self.file.tree.place_of(key), key, fault);
    }

    fn fault_at(&mut self, place: &Place, key: &str, fault: Fault) {
        self.problems.push(Problem::new(place, format!("`{key}`: {}", fault.what), fault.hint));
    }

    /// Where a relative path at `key` starts.
    fn folder(&self, key: &str) -> &Path {
        match self.file.tree.place_of(key) {
            Place::File { .. } => self.file.path.parent().unwrap_or(Path::new("")),
            Place::Override(_) => Path::new(""),
        }
    }

    fn base(&mut self) -> Option<BaseSource> {
        let recipe = &self.file.recipe;
        let found = BaseSource::find(&recipe.base_model, recipe.revision.as_deref(), self.folder("base_model"));
        found.map_err(|fault| self.fault("base_model", fault)).ok()
    }

    fn data(&mut self, key: &str, sources: Option<&Sources>) -> Vec<DataSource> {
        match sources.map(|sources| sources::resolve(sources, self.folder(key))) {
            None => Vec::new(),
            Some(Ok(files)) => files,
            Some(Err(faults)) => {
                for (index, fault) in faults {
                    let place = self.file.tree.at(key).map_or(&self.file.tree.place, |node| &node.item(index).place);
                    self.fault_at(place, key, fault);
                }
                Vec::new()
            }
        }
    }

    fn adapter(&mut self) -> Option<PathBuf> {
        let key = "adapter.adapter_name_or_path";
        let typed = self.file.recipe.adapter.adapter_name_or_path.as_ref()?.to_string_lossy().into_owned();
        let path = paths::from_folder(&typed, self.folder(key));
        match paths::look(&path) {
            Found::Folder => return Some(paths::settle(&path)),
            Found::Nothing => {
                let hint = paths::hint_for_missing(&typed, self.folder(key));
                self.fault(key, Fault::new("", format!("there is no {}", path.display())).hint(hint));
            }
            _ => self.fault(
                key,
                Fault::new("", format!("{} is not a folder", path.display()))
                    .hint("name the folder that holds adapter_config.json and adapter_model.safetensors"),
            ),
        }
        None
    }

    /// A template that is named like a file must be one; any other name is one of the built-in ones.
    fn template(&mut self) -> Option<String> {
        let key = "dataset.chat_template";
        let typed = self.file.recipe.dataset.chat_template.clone()?;
        let path = paths::from_folder(&typed, self.folder(key));
        let called_a_file = typed.contains('/') || [".jinja", ".jinja2", ".j2"].iter().any(|end| typed.ends_with(end));
        match paths::look(&path) {
            Found::File => return Some(paths::settle_file(&path).to_string_lossy().into_owned()),
            Found::Nothing if !called_a_file => return Some(typed),
            Found::Folder if !called_a_file => return Some(typed),
            Found::Nothing => {
                let hint = paths::hint_for_missing(&typed, self.folder(key));
                self.fault(key, Fault::new("", format!("there is no {}", path.display())).hint(hint));
            }
            _ => self.fault(key, Fault::new("", format!("{} is not a file", path.display()))),
        }
        None
    }

    /// The output folder, absolute, when a run may write there without harm to what it reads.
    fn output<'s>(
        &mut self,
        base: Option<&BaseSource>,
        mut data: impl Iterator<Item = &'s DataSource>,
        adapter: Option<&Path>,
    ) -> PathBuf {
        let key = "output.dir";
        let recipe = &self.file.recipe;
        let dir = paths::settle(&paths::from_folder(&recipe.output.dir.to_string_lossy(), self.folder(key)));
        let refuse = |why: String| Fault::new("", format!("{} {why}", dir.display())).hint("name a folder of its own");
        let written = |path: &Path| {
            let saves = [(Save::Adapter, "adapter"), (Save::Merged, "merged")];
            saves.iter().any(|(save, name)| recipe.output.save.contains(save) && path.starts_with(dir.join(name)))
        };
        let fault = match base {
            _ if !matches!(paths::look(&dir), Found::Folder | Found::Nothing) => {
                Some(refuse("is a file, not a folder".into()))
            }
            // Reports and saved states name it as text, and would fail when the run is over.
            _ if dir.to_str().is_none() => Some(refuse("is not UTF-8 text".into())),
            _ if dir.ancestors().skip(1).any(|above| matches!(paths::look(above), Found::File | Found::Special)) => {
                Some(refuse("lies below a file".into()))
            }
            Some(BaseSource::Folder(model)) if dir.starts_with(model) => {
                Some(refuse(format!("is the base model's folder {} or lies in it", model.display())))
            }
            Some(BaseSource::Folder(path) | BaseSource::Gguf(path)) if written(path) => {
                Some(refuse(format!("is where the base {} would be written over", path.display())))
            }
            _ if adapter.is_some_and(written) => {
                Some(refuse("is where the adapter to continue from would be written over".into()))
            }
            _ => data
                .find(|source| source.path.parent() == Some(&dir))
                .map(|source| refuse(format!("is the folder of the data {}", source.path.display()))),
        };
        if let Some(fault) = fault {
            self.fault(key, fault);
        }
        dir
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A home for a recipe, with a model, data, an adapter and a template in it.
    fn home() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(folder.path()).unwrap();
        for name in
            ["recipes/x", "model/x", "data/t.parquet", "data/e.parquet", "old/adapter/x", "chat.jinja", "m.gguf"]
        {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        (folder, root)
    }

    const GOOD: &str =
        "base_model: ../model\ndevice: cpu\ndataset:\n  train: ../data/t.parquet\noutput:\n  dir: ../runs/x\n";

    fn plan(root: &Path, text: &str, overrides: &[&str]) -> Result<Plan> {
        let path = root.join("recipes/r.yaml");
        fs::write(&path, text).unwrap();
        Recipe::read(&path, &overrides.iter().map(ToString::to_string).collect::<Vec<_>>())?.plan()
    }

    /// The faults, with the root's name left out.
    fn faults(root: &Path, text: &str, overrides: &[&str]) -> Vec<String> {
        match plan(root, text, overrides) {
            Err(Error::Recipe(faults)) => {
                faults.iter().map(|fault| fault.to_string().replace(&format!("{}/", root.display()), "")).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn paths_are_taken_from_the_recipes_folder() {
        let (_guard, root) = home();
        let text = format!("{GOOD}adapter: {{adapter_name_or_path: ../old/adapter}}\n")
            .replace("dataset:", "dataset:\n  eval: ../data/e.parquet\n  chat_template: ../chat.jinja");
        let plan = plan(&root, &text, &[]).unwrap();
        assert_eq!(plan.base, BaseSource::Folder(root.join("model")));
        assert_eq!(plan.train[0].path, root.join("data/t.parquet"));
        assert_eq!(plan.eval[0].path, root.join("data/e.parquet"));
        assert_eq!(plan.output.dir, root.join("runs/x"));
        assert_eq!(plan.adapter.adapter_name_or_path, Some(root.join("old/adapter")));
        assert_eq!(plan.dataset.chat_template, Some(root.join("chat.jinja").display().to_string()));
        assert_eq!((plan.kind, plan.device().unwrap()), (Kind::BFloat16, Device::Cpu));
        assert_eq!(plan.recipe.base_model, "../model");
        assert!(!root.join("runs").exists(), "planning creates nothing");
    }

    #[test]
    fn paths_of_overrides_are_taken_from_the_current_folder() {
        let (_guard, root) = home();
        let plan = plan(&root, GOOD, &["output.dir=some/run", "base_model=owner/name"]).unwrap();
        assert_eq!(plan.output.dir, std::env::current_dir().unwrap().join("some/run"));
        assert_eq!(plan.base, BaseSource::Hub { id: "owner/name".into(), revision: "main".into() });
    }

    #[test]
    fn names_of_built_in_templates_stay() {
        let (_guard, root) = home();
        let plan = plan(&root, GOOD, &["dataset.chat_template=chatml"]).unwrap();
        assert_eq!(plan.dataset.chat_template.as_deref(), Some("chatml"));
    }

    #[test]
    fn all_paths_that_lead_nowhere_are_listed_with_their_lines() {
        let (_guard, root) = home();
        let text = "base_model: ../modell\nadapter: {adapter_name_or_path: ../chat.jinja}\ndataset:\n  train:\n    - ../data\n    \
                    - ../data/x.parquet\n  eval: '*.parquet'\n  chat_template: x.jinja\noutput: {dir: ../m.gguf}\n";
        let faults = faults(&root, text, &[]);
        let starts = [
            "recipes/r.yaml:1:13: `base_model`: ../modell is not a hub id (owner/name), and there is no recipes/../modell",
            "recipes/r.yaml:2:33: `adapter.adapter_name_or_path`: recipes/../chat.jinja is not a folder",
            "recipes/r.yaml:6:7: `dataset.train`: there is no recipes/../data/x.parquet",
            "recipes/r.yaml:7:9: `dataset.eval`: nothing matches recipes/*.parquet",
            "recipes/r.yaml:8:18: `dataset.chat_template`: there is no recipes/x.jinja",
            "recipes/r.yaml:9:15: `output.dir`: m.gguf is a file",
        ];
        assert_eq!(faults.len(), starts.len(), "{faults:#?}");
        for (fault, start) in faults.iter().zip(starts) {
            assert!(fault.starts_with(start), "{start}\n{fault}");
        }
        assert!(faults[0].contains("did you mean") && faults[0].ends_with("model?"), "{}", faults[0]);
    }

    #[test]
    fn a_path_that_is_right_from_the_current_folder_is_explained() {
        let (_guard, root) = home();
        let text = GOOD.replace("../model", "src/model").replace("../data/t.parquet", "src/data");
        let faults = faults(&root, &text, &[]);
        assert!(faults.len() == 2 && faults.iter().all(|fault| fault.contains("in the current folder")), "{faults:#?}");
    }

    #[test]
    fn a_run_never_writes_over_what_it_reads() {
        let (_guard, root) = home();
        for (dir, more, what) in [
            ("../model", "", "is the base model's folder"),
            ("../model/runs/x", "", "is the base model's folder"),
            ("../recipes/../model", "", "is the base model's folder"),
            ("../data", "", "is the folder of the data"),
            ("../m.gguf", "", "is a file"),
            ("../m.gguf/x", "", "lies below a file"),
            ("../old", "adapter: {adapter_name_or_path: ../old/adapter}\n", "would be written over"),
        ] {
            let faults = faults(&root, &format!("{}{more}", GOOD.replace("../runs/x", dir)), &[]);
            assert!(faults.len() == 1 && faults[0].contains(what), "{dir}: {faults:#?}");
            assert!(faults[0].starts_with("recipes/r.yaml:6:8: `output.dir`:"), "{dir}: {faults:#?}");
        }
        let merged = root.join("run/merged");
        fs::create_dir_all(&merged).unwrap();
        let text = GOOD.replace("../model", "../run/merged").replace("../runs/x", "../run");
        assert!(faults(&root, &format!("{text}  save: [merged]\n"), &[])[0].contains("would be written over"));
        assert!(plan(&root, &text, &[]).is_ok(), "an adapter beside its base harms nothing");
    }

    #[test]
    fn an_output_folder_that_is_no_text_is_refused_before_the_run() {
        use std::os::unix::ffi::OsStrExt;
        let (_guard, root) = home();
        let odd = root.join(std::ffi::OsStr::from_bytes(b"odd\xff"));
        fs::rename(root.join("recipes"), &odd).unwrap();
        let path = odd.join("r.yaml");
        fs::write(&path, GOOD.replace("../runs/x", "run")).unwrap();
        let error = Recipe::read(&path, &[]).unwrap().plan().unwrap_err().to_string();
        assert!(error.contains("`output.dir`") && error.contains("is not UTF-8 text"), "{error}");
    }

    #[test]
    fn cuda_that_is_not_there_is_a_device_error() {
        if tch::Cuda::is_available() {
            return;
        }
        let (_guard, root) = home();
        let plan_for = |device: &str| plan(&root, &GOOD.replace("device: cpu", device), &[]).unwrap();
        let error = plan_for("device: cuda").device().unwrap_err();
        assert_eq!(error.exit_code(), 8);
        assert!(error.to_string().contains("recipes/r.yaml:2:9: CUDA is asked for, but"), "{error}");
        assert_eq!(plan_for("device: auto").device().unwrap(), Device::Cpu);
    }
}
