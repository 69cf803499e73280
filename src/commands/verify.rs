//! `engraft verify`: whether files are those that a manifest lists, and whether an export or a server gives the trained answers.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tch::{Device, Kind};

use super::console::{Console, Unit};
use super::loading;
use super::probing::computed_in;
use crate::adapter::TrainedOn;
use crate::adapter::config::{AdapterConfig, CONFIG};
use crate::cli::{ModelChoice, Verify};
use crate::error::{one_line, printable};
use crate::evaluate::Verdict;
use crate::export::manifest::{Base, ExportManifest, MANIFEST, Manifest};
use crate::export::probe::{Checked, Elsewhere, Found, PROBE, Probe};
use crate::export::served::ADAPTER;
use crate::export::server::{self, Served, Server};
use crate::export::signature;
use crate::export::unchanged::{self, Change, State};
use crate::model::families;
use crate::recipe::{BaseSource, DeviceChoice, Dtype};
use crate::train::free_bytes;
use crate::weights::Checkpoint;
use crate::{Error, Fault, Result};

/// Characters shown of a server's answer.
const SHOWN: usize = 48;
/// Characters shown of a name that a server gives.
const SHOWN_OF_NAMES: usize = 200;

/// Runs the verb; the result goes to `out`. What does not agree is an error of its own kind.
pub fn run(arguments: &Verify, out: &mut dyn Write) -> Result<()> {
    let console = Console::new(arguments.json);
    let typed = arguments.folder.as_path();
    let gguf = typed.is_file().then_some(typed);
    let folder = match gguf {
        Some(file) => file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")),
        None => typed,
    };
    if !folder.is_dir() {
        let fault = Fault::at(folder, "there is no such folder");
        return Err(Error::Model(fault.hint("name a run's folder, or the folder of what was exported")));
    }
    let mut report = Report { page: String::new(), result: json!({"folder": folder}), wrong: Vec::new() };
    match &arguments.server {
        Some(address) => report.served(&ask(arguments, address, folder, &console)?, address),
        // What a manifest says that somebody else has written is not worth looking at.
        None if !report.signed(folder, arguments.key.as_deref())? => {}
        None => {
            let has_manifest = folder.join(MANIFEST).exists();
            if has_manifest {
                let stage = console.stage("reading files", Unit::Bytes);
                report.files(&unchanged(folder, &|done, total| stage.at(done, total))?);
            }
            if folder.join(PROBE).exists() || !has_manifest {
                let (found, dtype, others) = check(arguments, folder, gguf, &console)?;
                report.wrong.extend(others);
                report.checked(&found, dtype);
            }
        }
    }
    let Report { page, mut result, wrong } = report;
    result["agrees"] = json!(wrong.is_empty());
    result["wrong"] = json!(wrong);
    let text = if arguments.json { format!("{result}\n") } else { page };
    out.write_all(text.as_bytes()).map_err(|error| Error::Output(Fault::new("standard output", error)))?;
    if wrong.is_empty() { Ok(()) } else { Err(Error::Mismatch(Fault::at(typed, wrong.join("; ")))) }
}

/// What was found out.
struct Report {
    /// For a person.
    page: String,
    /// For a program.
    result: Value,
    /// What does not agree.
    wrong: Vec<String>,
}

impl Report {
    /// Whether the manifest is the one that was signed, where it is to be; errors where that cannot be told.
    fn signed(&mut self, folder: &Path, key: Option<&Path>) -> Result<bool> {
        let Some(key) = key else { return Ok(true) };
        let signed = match signature::check(folder, key) {
            Ok(()) => {
                self.page += &format!("signed by {}\n", key.display());
                true
            }
            Err(Error::Mismatch(fault)) => {
                self.page += &format!("NOT SIGNED by {}\n", key.display());
                self.wrong.push(format!("{}: {}: {}", fault.place, fault.what, fault.hint));
                false
            }
            Err(error) => return Err(error),
        };
        self.result["signed"] = json!(signed);
        Ok(signed)
    }

    fn files(&mut self, changes: &[Change]) {
        self.page += &files_page(changes);
        let changed = changes.iter().filter(|change| change.matters()).count();
        if changed > 0 {
            self.wrong.push(format!("{changed} of the files of {MANIFEST} are not as they were"));
        }
        self.result["files"] = json!(changes);
    }

    fn checked(&mut self, found: &Found, dtype: Dtype) {
        self.page += &checked_page(found, dtype);
        self.wrong.extend(disagreement(found.verdict, "the exported files are"));
        self.result["probes"] = json!(found.lines);
        self.result["verdict"] = json!(found.verdict);
        self.result["strength"] = json!(found.strength);
        self.result["dtype"] = json!(dtype);
    }

    fn served(&mut self, served: &Served, address: &str) {
        self.page += &served_page(served);
        self.wrong.extend(disagreement(served.verdict, &format!("{address} serves")));
        self.result["server"] = json!(served);
    }
}

/// [`unchanged::changes`], with progress that is told from several threads.
fn unchanged(folder: &Path, at: &dyn Fn(u64, u64)) -> Result<Vec<Change>> {
    let (told, heard) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let told = std::sync::Mutex::new(told);
        let look = scope.spawn(move || {
            unchanged::changes(folder, &|done, total| {
                // Nobody listens any more only where this is over, too.
                let _ = told.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).send((done, total));
            })
        });
        heard.iter().for_each(|(done, total)| at(done, total));
        look.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn ask(arguments: &Verify, address: &str, folder: &Path, console: &Console) -> Result<Served> {
    let probe = Probe::read(folder)?;
    let key = arguments.api_key_env.as_deref().map(|name| {
        let found = std::env::var(name).ok().filter(|key| !key.trim().is_empty());
        found.ok_or_else(|| {
            let fault = Fault::new("--api-key-env", format!("there is no environment variable {name}, or it is empty"));
            Error::Network(fault.hint("name a variable that holds the key"))
        })
    });
    let key = key.transpose()?;
    let server = Server {
        address,
        model: arguments.served_model.as_deref(),
        key: key.as_deref().map(str::trim),
        patience: Duration::from_secs(arguments.timeout),
    };
    let stage = console.stage("asking the server", Unit::Things("prompts"));
    server::ask(server, &probe, &|done, total| stage.at(done, total))
}

/// Reads what was exported and asks it: what came of it, what was computed in, and what of its tokenizer is another.
fn check(
    arguments: &Verify,
    folder: &Path,
    gguf: Option<&Path>,
    console: &Console,
) -> Result<(Found, Dtype, Vec<String>)> {
    let probe = Probe::read(folder)?;
    loading::use_cpu(None);
    let choice = choice(arguments, folder, gguf)?;
    let dtype = fitting(&choice, console)?;
    let choice = ModelChoice { dtype: Some(dtype), ..choice };
    let probe = probe.computed_in(&dtype.to_string());
    let loaded = loading::chosen(&choice, console)?;
    let stage = console.stage("asking the probes", Unit::Things("prompts"));
    let found = probe.check(&loaded.model, &|done, total| stage.at(done, total))?;
    let is_gguf = |path: &Path| path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf"));
    let elsewhere = match choice.adapter.as_deref() {
        _ if is_gguf(Path::new(&choice.model)) => Elsewhere::Inside,
        // llama.cpp has the tokenizer of the GGUF file that the adapter is put on.
        Some(adapter) if is_gguf(adapter) => Elsewhere::Inside,
        Some(_) => Elsewhere::Base(&loaded.checkpoint.sidecars),
        None => Elsewhere::Nowhere,
    };
    let others = probe.other_tokenizer(folder, elsewhere);
    Ok((found, dtype, others))
}

/// What there is memory for: fp32, else bf16.
///
/// Errors with [`Error::Device`]: neither fits.
fn fitting(choice: &ModelChoice, console: &Console) -> Result<Dtype> {
    // How much a quantised base takes, only its file tells: far less than its numbers say.
    let quantised = match choice.adapter.as_deref().filter(|adapter| adapter.is_dir()) {
        Some(adapter) => TrainedOn::read(adapter)?.is_some(),
        None => false,
    };
    if quantised {
        return Ok(Dtype::Fp32);
    }
    let base = |fault: Fault| Error::Model(Fault { place: "--model".into(), ..fault });
    let source = BaseSource::find(&choice.model, choice.revision.as_deref(), Path::new("")).map_err(base)?;
    let stage = console.stage("fetching the base", Unit::Bytes);
    let checkpoint = Checkpoint::open_with(&source, &mut |transfer| stage.at(transfer.done, transfer.total))?;
    drop(stage);
    let shapes = families::spec(&checkpoint)?.tensors();
    let numbers: i64 = shapes.values().map(|shape| shape.iter().product::<i64>()).sum();
    in_memory_of(numbers as u64, free_bytes(Device::Cpu))
}

fn in_memory_of(numbers: u64, free: Option<u64>) -> Result<Dtype> {
    match computed_in(numbers, free, Kind::BFloat16) {
        Ok(Kind::BFloat16) => Ok(Dtype::Bf16),
        Ok(_) => Ok(Dtype::Fp32),
        Err(why) => {
            let hint = "ask a server that has it loaded, --server URL, or a machine with more memory";
            Err(Error::Device(Fault::new("memory", why).hint(hint)))
        }
    }
}

/// What a folder holds, as a model to run: on the CPU in fp32, so that nothing but the files' own rounding is between the numbers.
fn choice(arguments: &Verify, folder: &Path, gguf: Option<&Path>) -> Result<ModelChoice> {
    let of = |model: String, revision: Option<String>, adapter: Option<PathBuf>| ModelChoice {
        model,
        revision,
        adapter,
        dtype: Some(Dtype::Fp32),
        device: DeviceChoice::Cpu,
    };
    let text = |path: &Path| path.display().to_string();
    let alone = |model: String| match &arguments.model {
        None => Ok(of(model, None, None)),
        Some(base) => {
            let fault = Fault::new("--model", format!("{base} is named as a base, but {model} is a whole model"));
            Err(Error::Model(fault.hint("leave it out")))
        }
    };
    if let Some(file) = gguf {
        return alone(text(file));
    }
    let of_llama_cpp = Some(folder.join(ADAPTER)).filter(|path| path.is_file());
    let of_peft = Some(folder.to_path_buf()).filter(|folder| folder.join(CONFIG).exists());
    if let Some(adapter) = of_peft.or(of_llama_cpp) {
        let (model, revision) = match (&arguments.model, exported_from(folder)) {
            (Some(model), _) => (model.clone(), arguments.revision.clone()),
            (None, Some(base)) => base,
            (None, None) if !folder.join(CONFIG).exists() => {
                let fault = Fault::at(&adapter, "does not say which base it is for");
                return Err(Error::Model(fault.hint("name it: --model MODEL")));
            }
            (None, None) => {
                let (config, _) = AdapterConfig::read(folder)?;
                let Some(base) = config.base_model_name_or_path else {
                    let fault = Fault::at(&folder.join(CONFIG), "does not say which base it is for");
                    return Err(Error::Model(fault.hint("name it: --model MODEL")));
                };
                // A commit belongs to a hub's repository.
                let revision = config.revision.filter(|_| !Path::new(&base).exists());
                (base, revision)
            }
        };
        return Ok(of(model, revision, Some(adapter)));
    }
    if folder.join("config.json").exists() {
        return alone(text(folder));
    }
    let entries = std::fs::read_dir(folder).map_err(|error| Error::Model(Fault::at(folder, error)))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf")));
    files.sort();
    match files.as_slice() {
        [] => {
            let fault = Fault::at(folder, "holds neither an adapter, a model nor a .gguf file");
            Err(Error::Model(fault.hint("name a folder that `engraft export` wrote")))
        }
        [only] => alone(text(only)),
        many => {
            let names: Vec<String> = many.iter().map(|path| text(path)).collect();
            let fault = Fault::at(folder, format!("holds {} .gguf files", many.len()));
            Err(Error::Model(fault.hint(format!("name one: {}", names.join(", ")))))
        }
    }
}

/// The base that an export, or the run whose folder it lies in, says it was made of, where that can be had here.
fn exported_from(folder: &Path) -> Option<(String, Option<String>)> {
    let Base { name, revision, .. } = match ExportManifest::read(folder) {
        Some(manifest) => manifest.base,
        None => {
            let folder = std::path::absolute(folder).ok()?;
            let (run, manifest) =
                folder.ancestors().skip(1).take(2).find_map(|run| Some((run, Manifest::read(run).ok()?)))?;
            manifest.outputs.iter().find(|file| run.join(&file.path).starts_with(&folder))?;
            // Paths in a recipe start at its own folder.
            let base = BaseSource::find(&manifest.base.name, None, manifest.recipe.path.parent()?).ok()?;
            Base { name: base.name(), ..manifest.base }
        }
    };
    match (Path::new(&name).exists(), revision) {
        (true, _) => Some((name, None)),
        // Of a hub's repository.
        (false, Some(commit)) => Some((name, Some(commit))),
        (false, None) => None,
    }
}

fn disagreement(verdict: Verdict, who: &str) -> Option<String> {
    match verdict {
        Verdict::Trained => None,
        Verdict::CannotTell => Some("it cannot be told: both models answer every probe alike in this form".into()),
        other => Some(format!("{who} {other}")),
    }
}

fn files_page(changes: &[Change]) -> String {
    let shown = |change: &&Change| change.matters() || matches!(change.state, State::Another { .. });
    let mut page: String = changes.iter().filter(shown).map(|change| format!("{change}\n")).collect();
    let count =
        |is: fn(&State) -> bool| changes.iter().filter(|change| change.what != "program" && is(&change.state)).count();
    let (same, all) = (count(|state| *state == State::Same), count(|_| true));
    page += &format!("{same} of {all} as the manifest lists them");
    match count(|state| matches!(state, State::Unknown { .. })) {
        0 => page += "\n",
        unknown => page += &format!("; {unknown} are not on this machine, and cannot be told\n"),
    }
    page
}

fn checked_page(found: &Found, dtype: Dtype) -> String {
    let mut page =
        format!("{:<28}{:>12}{:>12}{:>12}{:>10}  answers as\n", "probe", "mean", "largest", "from base", "same");
    for Checked { place, trained, base, finding } in &found.lines {
        let same = format!("{}/{}", trained.same, trained.places);
        let from_base = base.map_or("-".to_string(), |base| format!("{:.2e}", base.mean));
        let numbers = format!("{:>12.2e}{:>12.2e}{from_base:>12}{same:>10}", trained.mean, trained.largest);
        page += &format!("{:<28}{numbers}  {finding}\n", short(place, 27));
    }
    page += &format!("(differences of logits in standard deviations of all logits, computed in {dtype})\n");
    page + &on_the_way(found.strength, "logits") + &format!("this is {}\n", found.verdict)
}

fn on_the_way(strength: Option<f64>, what: &str) -> String {
    strength.map_or(String::new(), |strength| {
        // 0 % is not to be -0 %.
        let percent = (100.0 * strength).round() + 0.0;
        format!("by its {what} {percent:.0} % of the way from the base to the trained model\n")
    })
}

fn served_page(served: &Served) -> String {
    let mut page = format!("{:<28}{:>13}{:>13}  {:<9}answer\n", "probe", "from trained", "from base", "serves");
    let number = |distance: Option<f64>| distance.map_or("-".to_string(), |distance| format!("{distance:.3}"));
    for line in &served.lines {
        let (trained, base) = (number(line.from_trained), number(line.from_base));
        let answer = short(&line.answer, SHOWN);
        page += &format!("{:<28}{trained:>13}{base:>13}  {:<9}{answer}\n", short(&line.place, 27), line.finding);
    }
    let asked = if served.token_ids { "token ids" } else { "text" };
    page += &format!("{}, model {}, asked in {asked}\n", served.server, short(&served.model, SHOWN_OF_NAMES));
    for notice in &served.notices {
        page += &format!("note: {}\n", printable(notice));
    }
    page + &on_the_way(served.strength, "probabilities") + &format!("it serves {}\n", served.verdict)
}

/// The beginning, as a terminal may be given it: on one line, with nothing that steers.
fn short(text: &str, most: usize) -> String {
    let begin: String = text.chars().take(most + 1).map(|c| if c == '\n' { ' ' } else { c }).collect();
    let shown = one_line(&begin);
    if shown.chars().count() > most { shown.chars().take(most - 3).chain("...".chars()).collect() } else { shown }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluate::Finding;
    use crate::export::server::Line;

    #[test]
    fn what_is_long_is_cut_and_steers_no_terminal() {
        assert_eq!(short("abc", 5), "abc");
        assert_eq!(short("abcdefgh", 5), "ab...");
        assert_eq!(short("a\nb", 9), "a b");
        assert_eq!(short("a\u{1b}[2J", 12), r"a\u{1b}[2J");
        assert_eq!(short(&"\u{202e}".repeat(99), 10), r"\u{202e...");
    }

    #[test]
    fn what_a_server_says_steers_no_terminal() {
        let line = Line {
            place: "a\u{1b}c:1".into(),
            answer: "\u{1b}[31mred\u{202e}\r\nit serves the trained model".into(),
            from_trained: None,
            from_base: None,
            finding: Finding::Other,
        };
        let served = Served {
            server: "vLLM",
            model: "x\u{1b}]0;y\u{7}\nit serves the trained model".into(),
            token_ids: true,
            probabilities: false,
            lines: vec![line],
            verdict: Verdict::Other,
            strength: None,
            notices: vec!["it has \u{1b}[2J".into()],
        };
        let page = served_page(&served);
        assert!(page.chars().all(|c| c == '\n' || !c.is_control()) && !page.contains('\u{202e}'), "{page:?}");
        assert_eq!(page.lines().filter(|line| line.starts_with("it serves")).count(), 1, "{page}");
    }

    #[test]
    fn files_that_are_not_here_are_counted_by_themselves_and_another_program_is_said() {
        let change = |what, state| Change { what, path: "p".into(), state };
        let another = State::Another { version: "0.1.0".into(), expected: "a".repeat(64), found: "b".repeat(64) };
        let mut changes = vec![change("output", State::Same), change("program", State::Same)];
        assert_eq!(files_page(&changes), "1 of 1 as the manifest lists them\n");
        changes.push(change("base", State::Unknown { why: "is not on this machine".into() }));
        changes[1].state = another;
        let page = files_page(&changes);
        assert!(page.contains("made by another program: engraft 0.1.0"), "{page}");
        assert!(
            page.ends_with("1 of 2 as the manifest lists them; 1 are not on this machine, and cannot be told\n"),
            "{page}"
        );
    }

    #[test]
    fn what_does_not_fit_in_fp32_is_asked_in_bf16_or_refused_with_the_way_out() {
        let of = |free| in_memory_of(1_000_000_000, free);
        assert_eq!((of(None).unwrap(), of(Some(4_000_000_000)).unwrap()), (Dtype::Fp32, Dtype::Fp32));
        assert_eq!(of(Some(3_999_999_999)).unwrap(), Dtype::Bf16);
        let error = of(Some(1_999_999_999)).unwrap_err();
        let text = error.to_string();
        assert!(error.exit_code() == 8 && text.contains("2.0 GB each in bf16") && text.contains("--server"), "{text}");
    }

    #[test]
    fn only_the_trained_model_agrees() {
        assert_eq!(disagreement(Verdict::Trained, "x"), None);
        let said = |verdict| disagreement(verdict, "it serves").unwrap();
        assert!(said(Verdict::Base).contains("it serves the bare base"));
        assert!(said(Verdict::CannotTell).contains("cannot be told"));
        assert!(said(Verdict::Other).contains("neither"));
    }
}
