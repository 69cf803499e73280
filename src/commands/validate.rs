//! `engraft validate`: reads and resolves recipes, and says what they mean or all that is wrong with them.

use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};

use crate::cli::Validate;
use crate::recipe::{BaseSource, DataSource, Plan, Recipe};
use crate::{Error, Fault, Result};

/// Checks each recipe and writes what it means to `out`.
///
/// # Errors
///
/// [`Error::Recipe`] with the problems of all recipes; [`Error::Device`] when that is all that is wrong;
/// [`Error::Output`] when `out` cannot be written.
pub fn run(arguments: &Validate, out: &mut dyn Write) -> Result<()> {
    let (mut faults, mut other) = (Vec::new(), None);
    for path in &arguments.recipes {
        let plan = Recipe::read(path, &arguments.overrides.set).and_then(|recipe| recipe.plan());
        let text = match &plan {
            Ok(plan) if arguments.json => format!("{}\n", facts(path, plan)),
            Ok(plan) => page(path, plan),
            Err(error) if arguments.json => format!("{}\n", problems(path, error)),
            Err(_) => String::new(),
        };
        out.write_all(text.as_bytes()).map_err(|error| Error::Output(Fault::new("standard output", error)))?;
        match plan {
            Ok(_) => {}
            Err(Error::Recipe(more)) => faults.extend(more),
            Err(error) => other = other.or(Some(error)),
        }
    }
    match other {
        _ if !faults.is_empty() => Err(Error::Recipe(faults)),
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn page(path: &Path, plan: &Plan) -> String {
    let recipe = &plan.recipe;
    let (adapter, training) = (&plan.adapter, &plan.training);
    let of_micro_batches = || {
        training
            .micro_batch_size
            .rows()
            .map_or(0, |rows| u64::from(rows) * u64::from(training.gradient_accumulation_steps))
    };
    let rows = training.global_batch_size.map_or_else(of_micro_batches, u64::from);
    let length = match training.max_steps {
        Some(steps) => format!("{steps} steps"),
        None => format!("{} epochs", training.epochs),
    };
    let mut lines = vec![
        format!("{}: ok", path.display()),
        format!("  base      {} ({}, {})", base(&plan.base), word(&json!(recipe.dtype)), device(plan)),
        format!("  adapter   {} r={} alpha={}", word(&json!(adapter.method)), adapter.r, adapter.lora_alpha),
        format!("  train     {}", files(&plan.train)),
    ];
    if !plan.eval.is_empty() {
        lines.push(format!("  eval      {}", files(&plan.eval)));
    }
    lines.push(format!("  training  {length}, {rows} rows per step, learning rate {}", training.learning_rate));
    lines.push(format!("  output    {}", plan.output.dir.display()));
    lines.join("\n") + "\n"
}

fn facts(path: &Path, plan: &Plan) -> Value {
    let sources = |sources: &[DataSource]| -> Value {
        sources.iter().map(|source| json!({"path": source.path, "weight": source.weight})).collect()
    };
    json!({
        "path": path,
        "ok": true,
        "base": base(&plan.base),
        "device": device(plan),
        "train": sources(&plan.train),
        "eval": sources(&plan.eval),
        "output": plan.output.dir,
        "recipe": plan.recipe,
    })
}

fn problems(path: &Path, error: &Error) -> Value {
    let faults = match error {
        Error::Recipe(faults) => faults.clone(),
        Error::Device(fault) => vec![fault.clone()],
        error => vec![Fault::at(path, error)],
    };
    let problems: Vec<Value> =
        faults.into_iter().map(|fault| json!({"place": fault.place, "what": fault.what, "hint": fault.hint})).collect();
    json!({"path": path, "ok": false, "problems": problems})
}

fn base(base: &BaseSource) -> String {
    match base {
        BaseSource::Hub { id, revision } => format!("{id}@{revision}"),
        BaseSource::Folder(path) | BaseSource::Gguf(path) => path.display().to_string(),
    }
}

fn device(plan: &Plan) -> &'static str {
    match plan.device() {
        Ok(device) if device.is_cuda() => "cuda",
        Ok(_) => "cpu",
        Err(_) => "cuda (not on this machine)",
    }
}

fn files(sources: &[DataSource]) -> String {
    match sources {
        [first, rest @ ..] if !rest.is_empty() => format!("{} and {} more", first.path.display(), rest.len()),
        sources => sources.iter().map(|source| source.path.display().to_string()).collect(),
    }
}

/// A unit variant as the recipe spells it.
fn word(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Overrides;
    use std::fs;

    fn validate(recipes: &[(&str, &str)], json: bool) -> (String, Result<()>) {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("data")).unwrap();
        fs::write(folder.path().join("data/t.parquet"), "").unwrap();
        let paths = recipes.iter().map(|(name, text)| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            path
        });
        let arguments = Validate { recipes: paths.collect(), overrides: Overrides::default(), json };
        let mut out = Vec::new();
        let result = run(&arguments, &mut out);
        (String::from_utf8(out).unwrap(), result)
    }

    const GOOD: &str = "base_model: a/b\ndevice: cpu\ndataset: {train: data}\noutput: {dir: out}\n";

    #[test]
    fn a_sound_recipe_says_what_it_means() {
        let (text, result) = validate(&[("r.yaml", GOOD)], false);
        result.unwrap();
        assert!(text.lines().next().unwrap().ends_with("r.yaml: ok"), "{text}");
        assert!(text.contains("a/b@main (bf16, cpu)") && text.contains("lora r=16 alpha=32"), "{text}");
        let (text, _) = validate(&[("r.yaml", GOOD)], true);
        let facts: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&facts["ok"], &facts["recipe"]["adapter"]["r"]), (&json!(true), &json!(16)));
    }

    #[test]
    fn the_problems_of_all_recipes_are_listed() {
        let bad = "base_model: a/b\ndataset: {train: none}\noutput: {dir: out, r: 1}\n";
        let (text, result) = validate(&[("a.yaml", bad), ("g.yaml", GOOD), ("b.yaml", "- x\n")], true);
        let error = result.unwrap_err();
        assert_eq!(error.exit_code(), 3);
        let Error::Recipe(faults) = error else { panic!() };
        assert!(faults.len() == 2 && faults[0].place.ends_with("a.yaml:3:20") && faults[1].place.ends_with("b.yaml"));
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.iter().map(|line| &line["ok"]).collect::<Vec<_>>(), [false, true, false]);
        assert_eq!(lines[0]["problems"][0]["hint"], "it belongs elsewhere: write `adapter.r`");
    }
}
