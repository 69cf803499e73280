//! `engraft verify`: whether files are those that a manifest lists, and whether an export or a server gives the trained answers.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use super::console::{Console, Unit};
use super::loading;
use crate::adapter::config::{AdapterConfig, CONFIG};
use crate::cli::{ModelChoice, Verify};
use crate::evaluate::Verdict;
use crate::export::manifest::{self, Base, ExportManifest, MANIFEST, Manifest};
use crate::export::probe::{Checked, PROBE, Probe};
use crate::export::served::ADAPTER;
use crate::export::server::{self, Served, Server};
use crate::export::signature;
use crate::export::unchanged::{self, Change};
use crate::recipe::{BaseSource, DeviceChoice, Dtype};
use crate::{Error, Fault, Result};

/// Characters shown of a server's answer.
const SHOWN: usize = 48;

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
    let mut result = json!({"folder": folder});
    let mut wrong = Vec::new();
    let mut page = String::new();

    if let Some(address) = &arguments.server {
        let served = ask(arguments, address, folder, &console)?;
        page += &served_page(&served);
        wrong.extend(disagreement(served.verdict, &format!("{address} serves")));
        result["server"] = json!(served);
    } else {
        let has_manifest = folder.join(MANIFEST).exists();
        if let Some(key) = &arguments.key {
            signature::check(folder, key)?;
            result["signed"] = json!(true);
            page += &format!("signed by {}\n", key.display());
        }
        if has_manifest {
            let stage = console.stage("reading files", Unit::Things("files"));
            let changes = unchanged(folder, &|done, total| stage.at(done, total))?;
            page += &files_page(&changes);
            let changed = changes.iter().filter(|change| change.matters()).count();
            if changed > 0 {
                wrong.push(format!("{changed} of the files of {MANIFEST} are not as they were"));
            }
            result["files"] = json!(changes);
        }
        if folder.join(PROBE).exists() || !has_manifest {
            let (lines, verdict, others) = check(arguments, folder, gguf, &console)?;
            page += &checked_page(&lines, verdict);
            wrong.extend(others);
            wrong.extend(disagreement(verdict, "the exported files are"));
            result["probes"] = json!(lines);
            result["verdict"] = json!(verdict);
        }
    }

    result["agrees"] = json!(wrong.is_empty());
    let text = if arguments.json { format!("{result}\n") } else { page };
    out.write_all(text.as_bytes()).map_err(|error| Error::Output(Fault::new("standard output", error)))?;
    if wrong.is_empty() { Ok(()) } else { Err(Error::Mismatch(Fault::at(typed, wrong.join("; ")))) }
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

/// Reads what was exported and asks it; beside that, what of its tokenizer is another.
fn check(
    arguments: &Verify,
    folder: &Path,
    gguf: Option<&Path>,
    console: &Console,
) -> Result<(Vec<Checked>, Verdict, Vec<String>)> {
    let probe = Probe::read(folder)?;
    loading::use_cpu(None);
    let choice = choice(arguments, folder, gguf)?;
    let loaded = loading::chosen(&choice, console)?;
    let stage = console.stage("asking the probes", Unit::Things("prompts"));
    let (lines, verdict) = probe.check(&loaded.model, &|done, total| stage.at(done, total))?;
    let other = probe.tokenizer.iter().filter(|(name, expected)| {
        std::fs::read(folder.join(name)).is_ok_and(|bytes| manifest::sha256(&bytes) != **expected)
    });
    let others = other.map(|(name, _)| format!("{name} is another one than the probes were made with"));
    Ok((lines, verdict, others.collect()))
}

/// What a folder holds, as a model to run: in fp32 on the CPU, so that nothing but the files' own rounding is between the numbers.
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
    let mut page: String =
        changes.iter().filter(|change| change.matters()).map(|change| format!("{change}\n")).collect();
    let same = changes.iter().filter(|change| !change.matters()).count();
    page += &format!("{same} of {} as the manifest lists them\n", changes.len());
    page
}

fn checked_page(lines: &[Checked], verdict: Verdict) -> String {
    let mut page =
        format!("{:<28}{:>12}{:>12}{:>12}{:>10}  answers as\n", "probe", "mean", "largest", "from base", "same");
    for Checked { place, trained, base, finding } in lines {
        let same = format!("{}/{}", trained.same, trained.places);
        let from_base = base.map_or("-".to_string(), |base| format!("{:.2e}", base.mean));
        let numbers = format!("{:>12.2e}{:>12.2e}{from_base:>12}{same:>10}", trained.mean, trained.largest);
        page += &format!("{:<28}{numbers}  {finding}\n", short(place, 27));
    }
    page + &format!("(differences of logits in standard deviations of all logits)\nthis is {verdict}\n")
}

fn served_page(served: &Served) -> String {
    let mut page = format!("{:<28}{:>13}{:>13}  {:<9}answer\n", "probe", "from trained", "from base", "serves");
    let number = |distance: Option<f64>| distance.map_or("-".to_string(), |distance| format!("{distance:.3}"));
    for line in &served.lines {
        let (trained, base) = (number(line.from_trained), number(line.from_base));
        let answer = short(&line.answer.replace('\n', " "), SHOWN);
        page += &format!("{:<28}{trained:>13}{base:>13}  {:<9}{answer}\n", short(&line.place, 27), line.finding);
    }
    let asked = if served.token_ids { "token ids" } else { "text" };
    page += &format!("{}, model {}, asked in {asked}\n", served.server, served.model);
    for notice in &served.notices {
        page += &format!("note: {notice}\n");
    }
    if let Some(strength) = served.strength {
        page +=
            &format!("by its probabilities {:.0} % of the way from the base to the trained model\n", 100.0 * strength);
    }
    page + &format!("it serves {}\n", served.verdict)
}

/// The beginning, as a terminal may be given it.
fn short(text: &str, most: usize) -> String {
    let shown: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(most).collect();
    if text.chars().count() > most { format!("{}...", shown.chars().take(most - 3).collect::<String>()) } else { shown }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_long_is_cut_and_steers_no_terminal() {
        assert_eq!(short("abc", 5), "abc");
        assert_eq!(short("abcdefgh", 5), "ab...");
        assert_eq!(short("a\u{1b}[2J", 9), "a [2J");
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
