//! `engraft eval`: loss, perplexity and generated answers on held-out rows; a gate for CI.

use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;

use regex::Regex;
use serde_json::{Value, json};

use super::console::{Console, Unit};
use super::loading::{self, Base};
use crate::adapter::numbers::Here;
use crate::cli::{Eval, Metric, Threshold};
use crate::evaluate::{self, Answer, Questions};
use crate::model::Sampling;
use crate::recipe::Recipe;
use crate::torch_ext::catching;
use crate::{Error, Fault, Result};

/// Answers shown to a person; programs get all of them.
const SHOWN: usize = 5;

/// Runs the verb; the result goes to `out`.
pub fn run(arguments: &Eval, out: &mut dyn Write) -> Result<()> {
    let pattern = arguments.pattern.as_deref().map(Regex::new).transpose();
    let pattern = pattern.map_err(|error| Error::Recipe(vec![Fault::new("--match", error)]))?;
    let generates = arguments.generate || pattern.is_some();
    gates_can_be_judged(arguments, generates, pattern.is_some())?;
    let mut plan = Recipe::read(&arguments.recipe, &arguments.overrides.set)?.plan()?;
    let device = plan.device()?;
    loading::has_eval_set(&plan)?;
    plan.dataset.limit = arguments.limit.or(plan.dataset.limit);
    loading::use_cpu(plan.training.threads);
    let console = Console::new(arguments.json);

    let Base { checkpoint, spec, .. } = loading::base(&plan, &console)?;
    let encoder = loading::encoder(&checkpoint, &plan.dataset)?;
    let eval = loading::dataset("eval", &plan.eval, &plan, &checkpoint, &encoder, &console)?;
    console.say(eval.report());
    let scheme = loading::scheme(&plan, &checkpoint, &spec, device, &console)?;
    let adapter = match (&arguments.adapter, arguments.base) {
        (_, true) => None,
        (Some(folder), _) => Some(folder.clone()),
        (None, _) => Some(plan.output.dir.join("adapter")),
    };
    if let Some(folder) = &adapter {
        if arguments.adapter.is_none() && !folder.exists() {
            let fault = Fault::at(folder, "there is no adapter yet");
            return Err(Error::Model(
                fault.hint("train it, name another with --adapter, or measure the base with --base"),
            ));
        }
        loading::same_numbers(folder, &plan, scheme.as_ref(), Here { checkpoint: &checkpoint, spec: &spec }, &console)?;
    }
    let mut model = loading::decoder(&checkpoint, spec, plan.kind, device, scheme.as_ref(), &console)?;
    if let Some(folder) = &adapter {
        loading::adapter(&mut model, folder, &checkpoint, scheme.as_ref(), &console)?;
    }

    // Made before anything slow is measured: a row that cannot be asked may end the command.
    let context = model.spec.max_position_embeddings as usize;
    let questions = match generates {
        true => evaluate::questions(&eval, &encoder, context, plan.dataset.on_bad_row)?,
        false => Questions::default(),
    };
    if questions.not_asked.count > 0 {
        console.say(questions.not_asked.list("not asked"));
    }

    let stage = console.stage("measuring the loss", Unit::Things("tokens"));
    let total = eval.report().trained_tokens;
    let batches =
        eval.eval_batches(plan.training.micro_batch_size.rows_to_evaluate()).map(|item| item.map(|(batch, _)| batch));
    let loss = catching("measuring the loss", || {
        evaluate::loss(&model, batches, |tokens| {
            stage.at(tokens, total);
            ControlFlow::Continue(())
        })
    })?;
    drop(stage);

    let report = eval.report();
    let mut result = json!({
        "recipe": plan.path, "adapter": adapter, "rows": report.rows - report.dropped(),
        "dropped": report.dropped(), "truncated": report.cut(),
        "loss": loss.loss, "perplexity": loss.perplexity, "trained_tokens": loss.trained_tokens,
    });
    let mut answers = Vec::new();
    if generates {
        let sampling =
            Sampling { max_tokens: arguments.max_tokens as usize, stop: encoder.end_ids(), ..Sampling::default() };
        let asked = &questions.asked;
        let stage = console.stage("answering", Unit::Things("rows"));
        answers = catching("answering", || {
            Ok(evaluate::answer_all(&model, encoder.tokenizer(), asked, &sampling, pattern.as_ref(), |done| {
                stage.at(done as u64, asked.len() as u64);
                ControlFlow::Continue(())
            }))
        })?;
        let score = evaluate::score(&answers);
        result["answers"] = json!(score.answers);
        result["not_asked"] = json!(questions.not_asked.count);
        result["exact_match"] = json!(score.exact_match);
        if pattern.is_some() {
            result["match"] = json!(score.matches);
        }
    }

    let text = if arguments.json {
        result["rows_answered"] = json!(answers);
        result["rows_not_asked"] = json!(questions.not_asked.first);
        result["data"] = json!(report);
        format!("{result}\n")
    } else {
        page(&result, &answers)
    };
    out.write_all(text.as_bytes()).map_err(|error| Error::Output(Fault::new("standard output", error)))?;
    judge(&result, &arguments.fail_under, &arguments.fail_over)
}

/// A limit on a metric that is not measured would always pass or always fail: it is refused before anything is loaded.
fn gates_can_be_judged(arguments: &Eval, generates: bool, matches: bool) -> Result<()> {
    let limits = |option, thresholds| std::iter::repeat(option).zip(thresholds);
    let under = limits("--fail-under", &arguments.fail_under);
    for (option, threshold) in under.chain(limits("--fail-over", &arguments.fail_over)) {
        let missing = match threshold.metric {
            Metric::ExactMatch if !generates => "--generate",
            Metric::Match if !matches => "--match REGEX",
            _ => continue,
        };
        let fault = Fault::new(format!("{option} {}", name(threshold.metric)), "this metric is not measured");
        return Err(Error::Recipe(vec![fault.hint(format!("add {missing}"))]));
    }
    Ok(())
}

fn page(result: &Value, answers: &[Answer]) -> String {
    let bold = |text: &str| if std::io::stdout().is_terminal() { format!("\x1b[1m{text}\x1b[0m") } else { text.into() };
    let mut page = String::new();
    for answer in answers.iter().take(SHOWN) {
        let mark = match answer.exact.or(answer.matches) {
            Some(true) => "yes",
            Some(false) => "no",
            None => "-",
        };
        page += &format!("{}\n", bold(&answer.place));
        page += &format!("  asked     {}\n", answer.prompt.trim().replace('\n', "\n            "));
        if let Some(expected) = &answer.expected {
            page += &format!("  expected  {}\n", expected.trim().replace('\n', "\n            "));
        }
        page +=
            &format!("  answered  {}\n  right     {mark}\n\n", answer.answer.trim().replace('\n', "\n            "));
    }
    if answers.len() > SHOWN {
        page += &format!("... and {} more (all of them with --json)\n\n", answers.len() - SHOWN);
    }
    for key in
        ["rows", "dropped", "truncated", "not_asked", "trained_tokens", "loss", "perplexity", "exact_match", "match"]
    {
        match &result[key] {
            Value::Null => {}
            Value::Number(number) if number.is_f64() => {
                page += &format!("{key:<15} {:.4}\n", number.as_f64().unwrap_or(f64::NAN));
            }
            value => page += &format!("{key:<15} {value}\n"),
        }
    }
    page
}

fn judge(result: &Value, under: &[Threshold], over: &[Threshold]) -> Result<()> {
    let mut missed = Vec::new();
    for (thresholds, passes, word) in
        [(under, f64::ge as fn(&f64, &f64) -> bool, "at least"), (over, f64::le as fn(&f64, &f64) -> bool, "at most")]
    {
        for threshold in thresholds {
            let name = name(threshold.metric);
            // A number that is not finite is null in JSON: it passes no limit.
            let value = result[name].as_f64().unwrap_or(f64::NAN);
            if !passes(&value, &threshold.value) {
                missed.push(format!("{name} is {value:.4}, not {word} {}", threshold.value));
            }
        }
    }
    if missed.is_empty() { Ok(()) } else { Err(Error::Gate(Fault::new("", missed.join("; ")))) }
}

fn name(metric: Metric) -> &'static str {
    match metric {
        Metric::Loss => "loss",
        Metric::Perplexity => "perplexity",
        Metric::ExactMatch => "exact_match",
        Metric::Match => "match",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_that_cannot_be_judged_is_called_by_its_own_name() {
        for option in ["--fail-under", "--fail-over"] {
            let line = ["engraft", "eval", "r.yaml", option, "exact_match=0.5"];
            let cli = <crate::cli::Cli as clap::Parser>::try_parse_from(line).unwrap();
            let crate::cli::Command::Eval(arguments) = cli.command else { panic!() };
            let error = gates_can_be_judged(&arguments, false, false).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{option} exact_match: ")), "{error}");
        }
    }

    #[test]
    fn a_gate_is_missed_below_above_and_by_what_is_no_number() {
        let result = json!({"loss": 1.5, "perplexity": null, "exact_match": 0.8});
        let limit = |metric, value| vec![Threshold { metric, value }];
        assert!(judge(&result, &limit(Metric::ExactMatch, 0.8), &limit(Metric::Loss, 1.5)).is_ok());
        for (under, over) in [
            (limit(Metric::ExactMatch, 0.81), vec![]),
            (vec![], limit(Metric::Loss, 1.4)),
            (vec![], limit(Metric::Perplexity, 100.0)),
        ] {
            assert_eq!(judge(&result, &under, &over).unwrap_err().exit_code(), 10);
        }
    }
}
