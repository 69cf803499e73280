//! `README.md`: the model card as a hub shows it. Metadata first (what it is made of, how it is loaded, licence, emissions), then what
//! a person asks of a model: what it was trained on, how, how well, at what cost, and what nobody has looked at.
//!
//! Source of the metadata: the hub's documentation of model cards (`base_model`, `base_model_relation`, `library_name`,
//! `pipeline_tag`, `license`, `license_name`, `license_link`, `datasets`, `tags`, `co2_eq_emissions`). What is not known is left
//! out, the language among it.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

use super::documentation::Documentation;
use super::licence::Licence;
use super::manifest::FileDigest;
use crate::evaluate::Drift;
use crate::recipe::BaseSource;

/// The card's file.
pub const CARD: &str = "README.md";
/// The loss curve beside it.
pub const CURVE: &str = "loss.svg";

/// What lies beside the card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An adapter in PEFT's layout.
    Adapter,
    /// A whole model in transformers' layout, of a base and an adapter.
    Merged,
    /// A whole model for llama.cpp, of a base and what was trained.
    Gguf,
    /// The base itself in transformers' layout, nothing trained.
    Copy,
    /// The base itself for llama.cpp, nothing trained.
    GgufCopy,
    /// An adapter for llama.cpp.
    GgufAdapter,
    /// An adapter in mlx-lm's layout.
    MlxAdapter,
}

/// All that a card may say; what is not known is left out, or said to be.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// The model's name.
    pub name: &'a str,
    /// What it is.
    pub kind: Kind,
    /// The base as it was named: a hub id, a folder, a file.
    pub base: &'a str,
    /// The base's licence.
    pub licence: &'a Licence,
    /// Of the run.
    pub documentation: Option<&'a Documentation>,
    /// The recipe with defaults filled in.
    pub recipe: Option<&'a Value>,
    /// How the run went ([`crate::train::Outcome`]).
    pub metrics: Option<&'a Value>,
    /// Files that it was trained on.
    pub train: &'a [FileDigest],
    /// How far merging moved it.
    pub drift: Option<&'a Drift>,
    /// The loss curve, as SVG.
    pub curve: Option<&'a str>,
}

/// The card, and the curve beside it, by name.
pub fn files(facts: &Facts<'_>) -> BTreeMap<String, Vec<u8>> {
    let curve = facts.curve.map(|curve| (CURVE.to_string(), curve.as_bytes().to_vec()));
    let card = (CARD.to_string(), text(facts).into_bytes());
    std::iter::once(card).chain(curve).collect()
}

/// The card's text.
pub fn text(facts: &Facts<'_>) -> String {
    let mut card = metadata(facts);
    let mut line = |text: &str| {
        card.push_str(text);
        card.push('\n');
    };
    let base = plain(facts.base);
    line(&format!("\n# {}\n", plain(facts.name)));
    line(&match facts.kind {
        Kind::Adapter | Kind::MlxAdapter => format!("An adapter for {base}, trained with engraft."),
        Kind::GgufAdapter => format!("An adapter for {base}, trained with engraft, as GGUF for llama.cpp."),
        Kind::Merged => format!("{base} with an adapter folded into it by engraft."),
        Kind::Gguf => format!("{base} with what engraft trained, as GGUF for llama.cpp and what is built on it."),
        Kind::Copy => format!("{base}, as engraft wrote it out."),
        Kind::GgufCopy => format!("{base}, as GGUF for llama.cpp and what is built on it."),
    });
    line(&usage(facts));
    if let Some(documentation) = facts.documentation {
        training(documentation, facts, &mut line);
    }
    evaluation(facts, &mut line);
    cost(facts.documentation, &mut line);
    licence(facts, &mut line);
    line("## Limits\n");
    line(
        "- It inherits what its base gets wrong, and whatever bias its base and its data have: neither was looked for here.",
    );
    line("- It answers well at most what its data is like. Serve it with the chat template that lies beside it.");
    line("- Beside the numbers above nothing about its answers has been measured.");
    for left in facts.documentation.iter().flat_map(|documentation| &documentation.left_to_say) {
        line(&format!("- To be said by whoever publishes it: {left}."));
    }
    card
}

fn metadata(facts: &Facts<'_>) -> String {
    let mut lines = vec!["---".to_string()];
    // Every text in quotes: a licence called `no` would be false.
    let quoted = |text: &str| Value::from(text).to_string();
    if is_hub_id(facts.base) {
        lines.push(format!("base_model: {}", quoted(facts.base)));
        let relation = match facts.kind {
            Kind::Adapter | Kind::GgufAdapter | Kind::MlxAdapter => "adapter",
            // The hub calls a merge what several models were made one; and a model that was trained is none of its base's
            // quantisations, whatever its numbers are stored in.
            Kind::Merged | Kind::Gguf => "finetune",
            Kind::Copy | Kind::GgufCopy => "quantized",
        };
        lines.push(format!("base_model_relation: {relation}"));
    }
    lines.push(match facts.kind {
        Kind::Adapter => "library_name: peft".into(),
        Kind::Merged | Kind::Copy => "library_name: transformers".into(),
        Kind::Gguf | Kind::GgufCopy | Kind::GgufAdapter => "library_name: gguf".into(),
        Kind::MlxAdapter => "library_name: mlx".into(),
    });
    lines.push("pipeline_tag: text-generation".into());
    let Licence { id, name, link, .. } = facts.licence;
    for (key, value) in [("license", id), ("license_name", name), ("license_link", link)] {
        lines.extend(value.iter().map(|value| format!("{key}: {}", quoted(value))));
    }
    let datasets = facts.train.iter().filter_map(|file| hub_dataset(&file.path));
    let datasets: std::collections::BTreeSet<String> = datasets.collect();
    if !datasets.is_empty() {
        lines.push("datasets:".into());
        lines.extend(datasets.iter().map(|id| format!("- {}", quoted(id))));
    }
    lines.push("tags:".into());
    lines.push("- engraft".into());
    if !matches!(facts.kind, Kind::Copy | Kind::GgufCopy) {
        lines.push("- lora".into());
    }
    if let Some(documentation) = facts.documentation
        && let Some(emissions) = &documentation.emissions
    {
        lines.push("co2_eq_emissions:".into());
        lines.push(format!("  emissions: {:.3}", emissions.grams));
        lines.push(format!("  source: {}", quoted(&format!("energy counters of the machine; {}", emissions.source))));
        lines.push("  training_type: fine-tuning".into());
        lines.push(format!("  hardware_used: {}", quoted(&documentation.device)));
    }
    lines.push("---\n".into());
    lines.join("\n")
}

fn usage(facts: &Facts<'_>) -> String {
    // What goes into a program must be one string there.
    let base = Value::from(facts.base).to_string().replace('`', "'");
    match facts.kind {
        Kind::Adapter => format!(
            "\n```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n\
             model = AutoModelForCausalLM.from_pretrained({base})\nmodel = PeftModel.from_pretrained(model, \"path/to/this\")\n```\n"
        ),
        Kind::Merged | Kind::Copy => "\n```python\nfrom transformers import pipeline\n\n\
             pipe = pipeline(\"text-generation\", \"path/to/this\")\n```\n"
            .into(),
        Kind::Gguf | Kind::GgufCopy => "\n```\nllama-server -m FILE.gguf\n```\n".into(),
        Kind::GgufAdapter => "\n```\nllama-server -m BASE.gguf --lora adapter.gguf\n```\n".into(),
        Kind::MlxAdapter => format!("\n```\nmlx_lm.generate --model {base} --adapter-path path/to/this\n```\n"),
    }
}

fn training(documentation: &Documentation, facts: &Facts<'_>, line: &mut dyn FnMut(&str)) {
    line("## Training\n");
    line(&format!("{}.\n", plain(&capital(&documentation.method))));
    if facts.curve.is_some() {
        line(&format!("![Loss]({CURVE})\n"));
    }
    line("| | |\n|---|---|");
    let mut row = |what: &str, said: String| line(&format!("| {what} | {} |", plain(&said)));
    row(
        "Base",
        format!(
            "{} ({}, {} parameters)",
            facts.base,
            documentation.architecture,
            grouped(documentation.base_parameters)
        ),
    );
    row("Trained parameters", grouped(documentation.trained_parameters));
    for (set, data) in &documentation.data {
        let of = format!(
            "{} rows in {} file(s), {} left out; {} tokens, {} of them trained",
            grouped(data.rows),
            data.files,
            grouped(data.left_out),
            grouped(data.tokens),
            grouped(data.trained_tokens)
        );
        row(&format!("{} data", capital(set)), of);
    }
    for file in facts.train {
        let name = file.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        row("Training file", format!("{name}, SHA-256 {}", file.sha256));
    }
    if let Some(began) = &documentation.began {
        row("When", format!("{began} to {}", documentation.ended));
    }
    let recipe = facts.recipe.unwrap_or(&Value::Null);
    for (key, place) in [("Seed", &recipe["training"]["seed"]), ("Number type", &recipe["dtype"])] {
        if !place.is_null() {
            row(key, place.as_str().map_or_else(|| place.to_string(), str::to_string));
        }
    }
    line("");
    let sections = [("adapter", "Adapter"), ("quantization", "Quantisation"), ("training", "Training")];
    let set: Vec<String> = sections
        .iter()
        .flat_map(|(section, _)| {
            let keys = recipe[*section].as_object().into_iter().flatten();
            keys.filter(|(_, value)| !value.is_null()).map(move |(key, value)| format!("{section}.{key}: {value}"))
        })
        .collect();
    if !set.is_empty() {
        line("<details><summary>All hyper-parameters</summary>\n\n```yaml");
        set.iter().for_each(|one| line(&one.replace("```", "'''")));
        line("```\n\n</details>\n");
    }
}

fn evaluation(facts: &Facts<'_>, line: &mut dyn FnMut(&str)) {
    let metrics = facts.metrics.unwrap_or(&Value::Null);
    let number = |value: &Value| value.as_f64().map(|number| format!("{number:.4}"));
    let mut rows = Vec::new();
    rows.extend(number(&metrics["loss"]).map(|loss| ("Last training loss", loss)));
    rows.extend(number(&metrics["eval_loss"]).map(|loss| ("Loss on held-out rows", loss)));
    rows.extend(metrics["eval_loss"].as_f64().map(|loss| ("Perplexity there", format!("{:.3}", loss.exp()))));
    rows.extend(number(&metrics["best"]["eval_loss"]).map(|loss| ("The best of these", loss)));
    rows.extend(facts.drift.map(|drift| ("Merged beside adapter on base", drift.to_string())));
    line("## Evaluation\n");
    if rows.is_empty() {
        line("Nothing was measured.\n");
        return;
    }
    line("| | |\n|---|---|");
    rows.iter().for_each(|(what, said)| line(&format!("| {what} | {} |", plain(said))));
    line("");
}

fn cost(documentation: Option<&Documentation>, line: &mut dyn FnMut(&str)) {
    let Some(documentation) = documentation else { return };
    line("## Computation, energy and CO2\n");
    line(&format!(
        "About {:.2e} floating-point operations in {:.0} s on {}.",
        documentation.floating_point_operations,
        documentation.seconds,
        plain(&documentation.device)
    ));
    match (&documentation.energy, &documentation.emissions) {
        (Some(energy), Some(emissions)) => line(&format!(
            "{:.4} kWh of the whole machine ({}), which is {:.2} g of CO2 equivalent at {} g/kWh ({}).\n",
            energy.joules / 3.6e6,
            plain(&energy.of.join(", ")),
            emissions.grams,
            emissions.grams_per_kilowatt_hour,
            plain(&emissions.source)
        )),
        _ => line("The machine does not say how much energy that took: neither RAPL nor NVML could be read.\n"),
    }
}

fn licence(facts: &Facts<'_>, line: &mut dyn FnMut(&str)) {
    line("## Licence\n");
    let licence = facts.licence;
    match licence.called() {
        Some(name) => line(&format!("That of the base: {}.", plain(name))),
        None => {
            line("The base does not say under which licence it is: ask whoever published it before publishing this.")
        }
    }
    if let Some(link) = &licence.link {
        line(&format!("Its text: {}", plain(link)));
    }
    for restriction in &licence.restrictions {
        line(&format!("- {}", plain(restriction)));
    }
    line("");
}

fn is_hub_id(base: &str) -> bool {
    matches!(BaseSource::find(base, None, Path::new("")), Ok(BaseSource::Hub { .. }))
}

/// The dataset that a file of the hub's cache is of.
fn hub_dataset(path: &Path) -> Option<String> {
    let folder = path
        .components()
        .filter_map(|part| part.as_os_str().to_str())
        .find_map(|part| part.strip_prefix("datasets--"))?;
    let id = folder.replacen("--", "/", 1);
    is_hub_id(&id).then_some(id)
}

/// As a line of Markdown, whatever a file or a recipe says: no tables, no markup, no further lines.
fn plain(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            c if c.is_control() => shown.push(' '),
            '|' | '`' | '<' | '>' | '[' | ']' | '*' => {
                let _ = write!(shown, "\\{c}");
            }
            c => shown.push(c),
        }
    }
    shown
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}

/// Digits in threes.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;
    use crate::export::documentation::{DataUsed, Emissions};
    use crate::train::Energy;

    fn documentation() -> Documentation {
        let energy = Energy { joules: 3.6e6, of: vec!["package-0".into()] };
        Documentation {
            tasks: "answers".into(),
            inputs_and_outputs: "text".into(),
            architecture: "llama".into(),
            base_parameters: 134_515_008,
            trained_parameters: 4_884_480,
            context: 2048,
            base_licence: Licence::default(),
            method: "low-rank adaptation (LoRA), rank 16".into(),
            data: BTreeMap::from([(
                "training".into(),
                DataUsed {
                    modality: "text".into(),
                    files: 1,
                    bytes: 10,
                    rows: 1200,
                    left_out: 3,
                    tokens: 50_000,
                    trained_tokens: 20_000,
                    preparation: vec![],
                },
            )]),
            began: Some("2026-01-01T00:00:00Z".into()),
            ended: "2026-01-01T01:00:00Z".into(),
            seconds: 3600.0,
            device: "cpu".into(),
            floating_point_operations: 1.25e15,
            emissions: Some(Emissions::of(&energy, None)),
            energy: Some(energy),
            left_to_say: vec!["what it is for".into()],
        }
    }

    #[test]
    fn a_card_begins_with_metadata_that_the_hub_reads() {
        let licence = Licence::in_card("---\nlicense: llama3.1\n---\n");
        let documentation = documentation();
        let train = [FileDigest {
            path: "/cache/hub/datasets--me--tickets/snapshots/0/train.parquet".into(),
            bytes: 10,
            sha256: "ab".repeat(32),
        }];
        let recipe = json!({"dtype": "bf16", "training": {"seed": 42, "max_steps": null}, "adapter": {"r": 16}});
        let metrics = json!({"loss": 1.0, "eval_loss": 2.0, "best": null});
        let facts = Facts {
            name: "tickets",
            kind: Kind::Adapter,
            base: "meta-llama/Llama-3.1-8B",
            licence: &licence,
            documentation: Some(&documentation),
            recipe: Some(&recipe),
            metrics: Some(&metrics),
            train: &train,
            drift: None,
            curve: Some("<svg/>"),
        };
        let files = files(&facts);
        let card = String::from_utf8(files[CARD].clone()).unwrap();
        assert_eq!(files[CURVE], b"<svg/>");
        let end = card[4..].find("\n---\n").unwrap() + 4;
        let metadata: Value = serde_yaml::from_str(&card[4..=end]).unwrap();
        assert_eq!(
            metadata,
            json!({
                "base_model": "meta-llama/Llama-3.1-8B", "base_model_relation": "adapter", "library_name": "peft",
                "pipeline_tag": "text-generation", "license": "llama3.1", "datasets": ["me/tickets"],
                "tags": ["engraft", "lora"],
                "co2_eq_emissions": {
                    "emissions": 473.0, "training_type": "fine-tuning", "hardware_used": "cpu",
                    "source": "energy counters of the machine; the world's mean of 2024 (Ember), as the grid is not known",
                },
            })
        );
        for part in [
            "134,515,008 parameters",
            "4,884,480",
            "1,200 rows in 1 file(s), 3 left out",
            "![Loss](loss.svg)",
            "adapter.r: 16",
            "| Loss on held-out rows | 2.0000 |",
            "1.25e15 floating-point",
            "1.0000 kWh",
            "473.00 g",
            "Built with Llama",
            "To be said by whoever publishes it: what it is for.",
            "| Seed | 42 |",
        ] {
            assert!(card.contains(part), "{part} is not in\n{card}");
        }
        assert!(!card.contains("language") && !card.contains("max_steps"), "what is not known is left out");
    }

    #[test]
    fn what_is_not_known_is_said_or_left_out_and_nothing_breaks_the_card() {
        let licence = Licence::default();
        let mut documentation = documentation();
        (documentation.energy, documentation.emissions) = (None, None);
        documentation.device = "a|b\n# heading <script>".into();
        let facts = Facts {
            name: "x\ny: z",
            kind: Kind::Merged,
            base: "/home/me/base\n---\nlicense: mit",
            licence: &licence,
            documentation: Some(&documentation),
            recipe: None,
            metrics: None,
            train: &[],
            drift: None,
            curve: None,
        };
        let card = text(&facts);
        let end = card[4..].find("\n---\n").unwrap() + 4;
        let metadata: Value = serde_yaml::from_str(&card[4..=end]).unwrap();
        assert_eq!(
            metadata,
            json!({"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["engraft", "lora"]})
        );
        assert!(card.contains("neither RAPL nor NVML") && card.contains("does not say under which licence"));
        assert!(card.contains("Nothing was measured") && !card.contains(CURVE));
        assert!(card.contains(r"a\|b # heading \<script\>") && !card.contains("\n# heading"));
        let gguf = Facts { kind: Kind::Gguf, base: "owner/base", documentation: None, ..facts };
        assert!(text(&gguf).contains("base_model_relation: finetune") && text(&gguf).contains("llama-server"));
    }

    #[test]
    fn the_hub_lists_a_trained_model_under_its_base_as_trained_and_a_copy_as_quantised() {
        for (kind, relation) in [
            (Kind::Adapter, "adapter"),
            (Kind::GgufAdapter, "adapter"),
            (Kind::MlxAdapter, "adapter"),
            (Kind::Merged, "finetune"),
            (Kind::Gguf, "finetune"),
            (Kind::Copy, "quantized"),
            (Kind::GgufCopy, "quantized"),
        ] {
            let facts = Facts {
                name: "x",
                kind,
                base: "owner/base",
                licence: &Licence::default(),
                documentation: None,
                recipe: None,
                metrics: None,
                train: &[],
                drift: None,
                curve: None,
            };
            let card = text(&facts);
            assert!(card.contains(&format!("\nbase_model_relation: {relation}\n")), "{kind:?}: {card}");
            assert_eq!(card.contains("\n- lora\n"), relation != "quantized", "{kind:?}");
        }
    }

    #[test]
    fn digits_are_grouped() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
    }
}
