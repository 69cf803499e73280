//! What several verbs begin with: the base opened and read, its tokenizer, a recipe's datasets, an adapter put on.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use tch::{Device, Kind};

use super::console::{Console, Stage, Unit};
use crate::adapter::numbers::{Here, skips_something};
use crate::adapter::{Adapters, LoadedAdapter, Origin, TrainedOn};
use crate::cli::{ModelChoice, Quantizing};
use crate::data::{Dataset, Encoder, Tokenizer, add_tokens, grow};
use crate::export::manifest::{self, FileDigest};
use crate::export::run::Written;
use crate::export::{gguf, sidecars};
use crate::model::{Decoder, ModelSpec, families};
use crate::ops::cuda;
use crate::quant::{Form, Products, Scheme, fp8};
use crate::recipe::{
    AdapterRecipe, BaseSource, CacheDequantized, DataSource, DatasetRecipe, Dtype, Plan, QuantizationType, cache_dir,
};
use crate::torch_ext::{FEW_SHAPES, MANY_SHAPES, catching, keep_freed_memory, keep_shapes};
use crate::train::caches_dequantised;
use crate::weights::Checkpoint;
use crate::{Error, Fault, Result};

/// Opens a base; hub files are fetched with progress, and what the reader noticed is said.
pub(super) fn checkpoint(source: &BaseSource, console: &Console) -> Result<Checkpoint> {
    let stage = console.stage("fetching the base", Unit::Bytes);
    let checkpoint = Checkpoint::open_with(source, &mut |transfer| stage.at(transfer.done, transfer.total))?;
    drop(stage);
    for notice in checkpoint.notices().iter().chain(&families::notices(&checkpoint.config)) {
        console.say(format_args!("note: {notice}"));
    }
    Ok(checkpoint)
}

/// The base of a plan: nothing but headers read.
pub(super) struct Base {
    pub(super) checkpoint: Checkpoint,
    /// The plan's adapter, with the rows of the tokens that it adds named.
    pub(super) adapter: AdapterRecipe,
    pub(super) spec: ModelSpec,
}

/// Opens the base of a plan, with the tokens that its adapter adds.
pub(super) fn base(plan: &Plan, console: &Console) -> Result<Base> {
    let mut checkpoint = checkpoint(&plan.base, console)?;
    let mut adapter = plan.adapter.clone();
    let ids = add_tokens_of(plan, &mut checkpoint)?;
    let mut spec = families::spec(&checkpoint)?;
    if let Some(ids) = ids {
        adapter.train_tokens(&ids, spec.head.tied);
    }
    spec.grow(checkpoint.vocabulary)?;
    Ok(Base { checkpoint, adapter, spec })
}

/// The base of a plan for its tokenizer and template alone: it need be none that is supported.
pub(super) fn texts(plan: &Plan, console: &Console) -> Result<Checkpoint> {
    let mut checkpoint = checkpoint(&plan.base, console)?;
    add_tokens_of(plan, &mut checkpoint)?;
    Ok(checkpoint)
}

/// Adds the tokens that a plan's adapter adds, and gives their ids.
fn add_tokens_of(plan: &Plan, checkpoint: &mut Checkpoint) -> Result<Option<Vec<u32>>> {
    let Some(tokens) = &plan.adapter.new_tokens else { return Ok(None) };
    let ids = add_tokens(&mut checkpoint.sidecars, tokens).map_err(|error| checkpoint.located(error))?;
    checkpoint.vocabulary = ids.iter().max().map_or(0, |id| i64::from(*id) + 1);
    Ok(Some(ids))
}

/// Gives a base the tokens that an adapter was trained with, where it trained any.
pub(super) fn with_tokens_of(adapter: &LoadedAdapter, checkpoint: &mut Checkpoint) -> Result<()> {
    checkpoint.vocabulary = adapter.vocabulary();
    if let Some(tokenizer) = adapter.tokenizer()?.filter(|_| checkpoint.vocabulary > 0) {
        checkpoint.sidecars.insert("tokenizer.json".into(), tokenizer);
        if let Some(config) = checkpoint.sidecars.get_mut("config.json")
            && let Ok(mut grown) = serde_json::from_slice(config)
            && grow(&mut grown, checkpoint.vocabulary as u64)
        {
            *config = grown.to_string().into_bytes();
        }
    }
    Ok(())
}

/// Refuses a folder that holds something, unless that may be replaced.
pub(super) fn refuse_filled(folder: &Path, overwrite: bool, doing: &str) -> Result<()> {
    let holds_something = std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some());
    if holds_something && !overwrite {
        let fault = Fault::at(folder, format!("is not empty, and {doing} would replace what it holds"));
        return Err(Error::Output(fault.hint("name another folder, or say --overwrite")));
    }
    Ok(())
}

/// Says once what of a model's attention a GPU computes in plain products.
pub(super) fn announce_plain_attention(spec: &ModelSpec, kind: Kind, device: Device, console: &Console) {
    let plain: Vec<String> = spec.layers.iter().filter_map(|layer| layer.plain_on_gpu(kind)).collect();
    if let (Device::Cuda(_), Some(what)) = (device, plain.first()) {
        console.say(format_args!(
            "note: attention of {} of {} layers is computed in plain products, for no fused kernel takes {what}: slower, and slower \
             than a plan foretells",
            plain.len(),
            spec.layers.len()
        ));
    }
}

/// Reads the weights of a base of this `spec`, quantised where `scheme` says so.
pub(super) fn decoder(
    checkpoint: &Checkpoint,
    spec: ModelSpec,
    kind: Kind,
    device: Device,
    scheme: Option<&Scheme>,
    console: &Console,
) -> Result<Decoder> {
    let stage = console.stage("making CUDA kernels", Unit::Things("files"));
    let made = cuda::prepare(device, &cache_dir(), &|done, total| stage.at(done, total));
    drop(stage);
    if let Err(error) = made {
        console.say(format_args!("note: without engraft's CUDA kernels, libtorch's operations serve: {error}"));
    }
    keep_shapes(if spec.has_few_shapes() { FEW_SHAPES } else { MANY_SHAPES });
    let stage = console.stage("loading the base", Unit::Bytes);
    let progress = |done, total| stage.at(done, total);
    catching("loading the base", || Decoder::load_as(spec, checkpoint, kind, device, scheme, &progress))
}

/// How a plan's base is kept on a device, told to the user where there is a choice.
pub(super) fn scheme(
    plan: &Plan,
    checkpoint: &Checkpoint,
    spec: &ModelSpec,
    device: Device,
    console: &Console,
) -> Result<Option<Scheme>> {
    let Some(mut scheme) = plan.scheme.clone() else { return Ok(None) };
    if let Some(stored) = checkpoint.quantised_form() {
        let asked = plan.recipe.quantization.as_ref().filter(|said| said.asks_for_a_form()).map(|_| scheme.form);
        if asked.is_some_and(|asked| !stored.may_become(asked)) {
            let fault = Fault::new(
                "quantization",
                format!("the base is stored quantised as {stored}, {} is asked for", scheme.form),
            );
            return Err(Error::Recipe(vec![
                fault.hint("leave `quantization.type` out, or name the base it was made of"),
            ]));
        }
        scheme.form = asked.unwrap_or(stored);
    }
    if checkpoint.quantised_form() == Some(scheme.form) {
        scheme.skip = spec.left_plain(checkpoint);
    } else {
        skips_something(&scheme, spec, "quantization.skip")?;
    }
    if scheme.products == Products::Fp8 {
        let own = checkpoint.quantised_form() == Some(scheme.form);
        if scheme.form != Form::Fp8 && !(own && checkpoint.is_fp8_in_rows()) {
            let layout = checkpoint.layout().filter(|_| own).map(|layout| format!(" ({layout})")).unwrap_or_default();
            let what = format!(
                "`compute: fp8` needs fp8 numbers with a scale to each row; the base is kept as {}{layout}",
                scheme.form
            );
            let fault = Fault::new("quantization.compute", what);
            return Err(Error::Recipe(vec![fault.hint("write `quantization.type: fp8`, or leave `compute` out")]));
        }
        if !fp8::multiplies(device) {
            console.say("note: this device does not multiply fp8; `compute: fp8` is made of fp32 products, slowly");
        }
        return Ok(Some(scheme));
    }
    let cache = plan.recipe.quantization.as_ref().map(|quantization| quantization.cache_dequantized);
    if cache.unwrap_or_default() == CacheDequantized::Auto && caches_dequantised(spec, plan.kind, device) {
        scheme.products = Products::Cached;
        console.say("the quantised base is kept made whole, which this machine has the memory for");
    }
    Ok(Some(scheme))
}

/// Refuses an adapter that was trained on other numbers than the base has here: `scheme` is how it is kept as the recipe says.
pub(super) fn same_numbers(
    adapter: &Path,
    plan: &Plan,
    scheme: Option<&Scheme>,
    here: Here<'_>,
    console: &Console,
) -> Result<()> {
    match (TrainedOn::read(adapter)?, scheme) {
        (Some(trained_on), scheme) => trained_on.prove_same(adapter, here, scheme, plan.kind)?,
        (None, Some(scheme)) => console.say(format_args!(
            "note: {} does not say that it was trained on a quantised base; here its base is quantised as {scheme}",
            adapter.display()
        )),
        (None, None) => {}
    }
    Ok(())
}

/// Says where weights were quantised to other numbers than those that the adapter which was put on a model was trained on.
pub(super) fn say_what_differs(adapter: &Path, model: &Decoder, console: &Console) -> Result<()> {
    if let Some(trained_on) = TrainedOn::read(adapter)?
        && let Some(notice) = trained_on.notice(adapter, &model.digests)?
    {
        console.say(format_args!("note: {notice}"));
    }
    Ok(())
}

/// The scheme that options ask for, of numbers in `kind`, for a model of this spec.
///
/// Errors with [`Error::Recipe`]: a name under `--skip` that no linear has.
pub(super) fn asked(form: QuantizationType, how: &Quantizing, kind: Kind, spec: &ModelSpec) -> Result<Scheme> {
    let form = form.with(how.block_size.into(), !how.no_double_quant);
    let scheme = Scheme { form, kind, skip: how.skip.clone(), products: Products::Dequantised, after_start: false };
    skips_something(&scheme, spec, "--skip")?;
    Ok(scheme)
}

/// The tokenizer of a base.
pub(super) fn tokenizer(checkpoint: &Checkpoint) -> Result<Arc<Tokenizer>> {
    Tokenizer::new(&checkpoint.sidecars).map(Arc::new).map_err(|error| checkpoint.located(error))
}

/// The tokenizer and encoder of a recipe's dataset, for this base.
pub(super) fn encoder(checkpoint: &Checkpoint, recipe: &DatasetRecipe) -> Result<Encoder> {
    Encoder::new(tokenizer(checkpoint)?, recipe)
}

/// Tokenises a dataset for a base, or finds it in the cache.
pub(super) fn dataset(
    what: &str,
    sources: &[DataSource],
    plan: &Plan,
    checkpoint: &Checkpoint,
    encoder: &Encoder,
    console: &Console,
) -> Result<Dataset> {
    let stage = console.stage(&format!("tokenising the {what} set"), Unit::Things("rows"));
    let (recipe, seed) = (&plan.dataset, plan.training.seed);
    Dataset::open(sources, recipe, encoder, &cache_dir(), seed, &|done, total| stage.at(done, total))
        .map_err(|error| checkpoint.located(error))
}

/// The training set of a plan where the cache holds its tokens.
pub(super) fn cached_dataset(plan: &Plan, checkpoint: &Checkpoint) -> Result<Option<Dataset>> {
    let encoder = encoder(checkpoint, &plan.dataset)?;
    Dataset::open_cached(&plan.train, &plan.dataset, &encoder, &cache_dir(), plan.training.seed)
        .map_err(|error| checkpoint.located(error))
}

/// Refuses a recipe without an eval set, for what is about nothing else.
pub(super) fn has_eval_set(plan: &Plan) -> Result<()> {
    if !plan.eval.is_empty() {
        return Ok(());
    }
    let fault = Fault::at(&plan.path, "the recipe has no eval set");
    Err(Error::Recipe(vec![fault.hint("name one: dataset.eval, or --set dataset.eval=rows.parquet")]))
}

/// A model to talk to: the base, with an adapter on it if one is named.
pub(super) struct Loaded {
    pub(super) model: Decoder,
    /// The base's files, with the template the adapter was trained with in place of the base's own.
    pub(super) checkpoint: Checkpoint,
}

/// Opens what `--model`, `--adapter`, `--dtype` and `--device` name.
pub(super) fn chosen(choice: &ModelChoice, console: &Console) -> Result<Loaded> {
    let base = |fault: Fault| Error::Model(Fault { place: "--model".into(), ..fault });
    let source = BaseSource::find(&choice.model, choice.revision.as_deref(), Path::new("")).map_err(base)?;
    let device = choice.device.find().map_err(|fault| Error::Device(Fault { place: "--device".into(), ..fault }))?;
    let mut checkpoint = checkpoint(&source, console)?;
    let is_gguf = |path: &&Path| path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"));
    let (of_llama_cpp, of_peft) = match choice.adapter.as_deref() {
        Some(path) if is_gguf(&path) => (Some(gguf::read_adapter(path, &checkpoint)?), None),
        other => (None, other),
    };
    let loaded = of_peft.map(LoadedAdapter::read).transpose()?;
    // Asked on other numbers than it learned on, it would answer differently.
    let trained_on = loaded.as_ref().map(LoadedAdapter::trained_on).transpose()?.flatten();
    let scheme = trained_on.as_ref().map(|trained_on| trained_on.scheme.clone());
    if let Some(loaded) = &loaded {
        with_tokens_of(loaded, &mut checkpoint)?;
    }
    let trained_in = scheme.as_ref().map_or(Kind::BFloat16, |scheme| scheme.kind);
    let kind = choice.dtype.map_or(trained_in, Dtype::kind);
    let spec = families::spec(&checkpoint)?;
    if let (Some(loaded), Some(trained_on)) = (&loaded, &trained_on) {
        let here = Here { checkpoint: &checkpoint, spec: &spec };
        trained_on.prove_stored_alike(&loaded.folder, here)?;
        trained_on.prove_had(&loaded.folder, here)?;
    }
    let mut model = decoder(&checkpoint, spec, kind, device, scheme.as_ref(), console)?;
    if let Some(updates) = &of_llama_cpp {
        Adapters::put(&mut model, updates)?;
    }
    if let Some(loaded) = &loaded {
        put_on(&mut model, loaded, &checkpoint, scheme.as_ref(), console)?;
        // Asked in another form than it learned, and stopped at other tokens, it would answer as if untrained.
        checkpoint.sidecars = sidecars(&checkpoint, loaded.chat_template()?.as_deref());
    }
    Ok(Loaded { model, checkpoint })
}

/// Puts the adapter of a folder on the model.
pub(super) fn adapter(
    model: &mut Decoder,
    folder: &Path,
    checkpoint: &Checkpoint,
    scheme: Option<&Scheme>,
    console: &Console,
) -> Result<()> {
    put_on(model, &LoadedAdapter::read(folder)?, checkpoint, scheme, console)
}

fn put_on(
    model: &mut Decoder,
    loaded: &LoadedAdapter,
    checkpoint: &Checkpoint,
    scheme: Option<&Scheme>,
    console: &Console,
) -> Result<()> {
    for notice in &loaded.notices {
        console.say(format_args!("note: {notice}"));
    }
    let origin = Origin { checkpoint, scheme, start: None, progress: &|_, _| () };
    Adapters::attach_loaded(model, loaded, 0.0, Some(&origin))?;
    say_what_differs(&loaded.folder, model, console)
}

/// Tells how far each of a run's outputs is, by its name.
pub(super) struct Writing<'a> {
    console: &'a Console,
    now: RefCell<Option<(String, Stage)>>,
}

impl<'a> Writing<'a> {
    pub(super) fn new(console: &'a Console) -> Self {
        Self { console, now: RefCell::new(None) }
    }

    pub(super) fn at(&self, name: &str, done: u64, total: u64) {
        let mut now = self.now.borrow_mut();
        if now.as_ref().is_none_or(|(other, _)| other != name) {
            // The one before is over.
            *now = None;
            *now = Some((name.to_string(), self.console.stage(&format!("writing {name}"), Unit::Bytes)));
        }
        if let Some((_, stage)) = &*now {
            stage.at(done, total);
        }
    }
}

/// Says what a run has written, and what the one who serves it must know.
pub(super) fn say_written(console: &Console, written: &Written) {
    for notice in &written.notices {
        console.say(format_args!("note: {notice}"));
    }
    for folder in &written.folders {
        console.say(format_args!("wrote {}", folder.display()));
    }
}

/// What the base's config says its weights are.
pub(super) fn own_dtype(config: &serde_json::Value) -> Dtype {
    let said = [
        &config["dtype"],
        &config["torch_dtype"],
        &config["text_config"]["dtype"],
        &config["text_config"]["torch_dtype"],
    ];
    match said.into_iter().find_map(|dtype| dtype.as_str()) {
        Some("float32") => Dtype::Fp32,
        Some("float16") => Dtype::Fp16,
        _ => Dtype::Bf16,
    }
}

/// As many CPU threads as asked for, else as many as this process may use (its cgroup's share, too), and memory kept for reuse.
pub(super) fn use_cpu(asked: Option<u32>) {
    let allowed = || std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    tch::set_num_threads(asked.unwrap_or_else(allowed) as i32);
    keep_freed_memory();
}

/// Digests of the base's files, made while other things load: a run is traced to them, and resuming refuses others.
pub(super) fn hash_in_background(files: Vec<PathBuf>) -> JoinHandle<Result<Vec<FileDigest>>> {
    std::thread::spawn(move || manifest::digests(&files, &|_, _| ()))
}

/// What a thread has found out.
pub(super) fn joined<T>(thread: JoinHandle<Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
