//! What a schema cannot say: keys that need or exclude each other, and patterns.
//!
//! The rules read the tree, not the [`Recipe`](super::Recipe), so that they speak also when another key is wrong.

use regex::{Regex, RegexBuilder};

use super::check::{foreign_value, nearest};
use super::tree::{Node, Problem, Value, shorten};

/// All rules that `tree` breaks.
pub(super) fn check(tree: &Node) -> Vec<Problem> {
    let mut problems = Vec::new();
    for &(key, needed, why) in NEEDS {
        if let (Some(node), None) = (given(tree, key), given(tree, needed)) {
            let hint = format!("give `{needed}` or leave `{key}` out");
            problems.push(Problem::new(&node.place, format!("`{key}` needs `{needed}`: {why}"), hint));
        }
    }
    for &(key, other, why) in EXCLUDES {
        if let (Some(_), Some(node)) = (given(tree, key), given(tree, other)) {
            let what = format!("`{other}` and `{key}` exclude each other: {why}");
            problems.push(Problem::new(&node.place, what, "leave one of them out"));
        }
    }
    problems.extend(of_the_optimizer(tree));
    problems.extend(of_the_batch(tree));
    problems.extend(of_recomputing(tree));
    if given(tree, "dataset.format").and_then(Node::text) == Some("text") {
        for (key, choices) in NEED_TURNS {
            let node = given(tree, key)
                .filter(|node| choices.is_empty() || node.text().is_some_and(|text| choices.contains(&text)));
            if let Some(node) = node {
                let what = format!("`{key}` is {}, but `dataset.format` is `text`, which has no turns", node.found());
                let hint = format!("leave `{key}` out or choose another `dataset.format`");
                problems.push(Problem::new(&node.place, what, hint));
            }
        }
    }
    let quantised = given(tree, "adapter.method").and_then(Node::text) == Some("qlora");
    if let (Some(node), false) = (given(tree, "quantization"), quantised) {
        let what =
            "`quantization` needs `adapter.method: qlora`: another method trains on a base that is not quantised";
        problems.push(Problem::new(&node.place, what, "write `adapter: {method: qlora}` or leave `quantization` out"));
    }
    let start = given(tree, "adapter.init_lora_weights");
    let start_is = |name: &str| start.and_then(Node::text) == Some(name);
    if let (Some(node), true, false) = (start, start_is("loftq"), quantised) {
        let what =
            "`adapter.init_lora_weights: loftq` needs `adapter.method: qlora`: it makes good what quantising loses";
        problems.push(Problem::new(&node.place, what, "choose another start, or write `method: qlora`"));
    }
    if let (Some(node), false) = (given(tree, "adapter.pissa_niter"), start_is("pissa")) {
        let what = "`adapter.pissa_niter` needs `adapter.init_lora_weights: pissa`";
        problems.push(Problem::new(&node.place, what, "leave it out, or choose that start"));
    }
    // 1 is what it is where nothing is said.
    let iterations = given(tree, "adapter.loftq_iter").filter(|node| !matches!(node.value, Value::Integer(1)));
    if let (Some(node), false) = (iterations, start_is("loftq")) {
        let what = "`adapter.loftq_iter` needs `adapter.init_lora_weights: loftq`";
        problems.push(Problem::new(&node.place, what, "leave it out, or choose that start"));
    }
    if let (Some(node), Some(_)) = (given(tree, "adapter.new_tokens"), given(tree, "adapter.adapter_name_or_path")) {
        let what = "`adapter.new_tokens` cannot be added to an adapter that is continued";
        problems.push(Problem::new(&node.place, what, "leave one of both out"));
    }
    let form = given(tree, "quantization.type").and_then(Node::text).unwrap_or("nf4");
    for key in ["quantization.double_quant", "quantization.block_size"] {
        if let (Some(node), "int8" | "fp8") = (given(tree, key), form) {
            let what = format!("`{key}` says nothing of `{form}`, which has one scale to each row");
            problems.push(Problem::new(&node.place, what, format!("leave `{key}` out")));
        }
    }
    if let Some(node) = given(tree, "quantization.compute").filter(|node| node.text() == Some("fp8")) {
        let is = |key: &str, usual: &str| given(tree, key).and_then(Node::text).unwrap_or(usual).to_string();
        // Without a type it may be a base that is stored so: that is known once it is open.
        let needs = [("quantization.type", "fp8", "fp8"), ("dtype", "bf16", "bf16")];
        for (key, usual, needed) in needs.into_iter().filter(|(key, usual, needed)| is(key, usual) != *needed) {
            let what = format!("`quantization.compute: fp8` needs `{key}: {needed}`; it is `{}`", is(key, usual));
            problems.push(Problem::new(&node.place, what, format!("write `{key}: {needed}`, or leave `compute` out")));
        }
        if is("quantization.cache_dequantized", "auto") == "always" {
            let what = "`quantization.compute: fp8` reads no numbers made whole: there are none to cache";
            problems.push(Problem::new(&node.place, what, "leave `cache_dequantized` out"));
        }
    }
    if let Some(node) = given(tree, "quantization.compute_dtype") {
        let (asked, dtype) = (node.text(), given(tree, "dtype").and_then(Node::text).unwrap_or("bf16"));
        if asked != Some(dtype) {
            let what = format!(
                "`quantization.compute_dtype` is {}, but `dtype` is `{dtype}`: products are computed in the \
                                type of the activations",
                node.found()
            );
            problems.push(Problem::new(&node.place, what, "leave it out, and set `dtype` to the type of both"));
        }
    }
    for key in ["adapter.target_modules", "adapter.exclude_modules"] {
        let text = given(tree, key).and_then(|node| Some((node, node.text()?)));
        problems.extend(text.and_then(|(node, text)| wrong_target(key, node, text)));
    }
    for key in ["adapter.rank_pattern", "adapter.alpha_pattern"] {
        problems.extend(given(tree, key).into_iter().flat_map(|node| wrong_patterns(key, node)));
    }
    problems
}

/// A key, the key it needs, and why.
const NEEDS: &[(&str, &str, &str)] = &[
    ("training.eval_steps", "dataset.eval", "there is nothing to evaluate on"),
    ("training.early_stopping_patience", "dataset.eval", "without an evaluation nothing says when to stop"),
    ("training.load_best_model_at_end", "dataset.eval", "without an evaluation nothing says which is best"),
];

/// Two keys of which a recipe gives at most one, and why.
const EXCLUDES: &[(&str, &str, &str)] = &[
    ("training.warmup_steps", "training.warmup_ratio", "each says how long the warmup is"),
    ("training.global_batch_size", GRADIENT_ACCUMULATION, "each says how many rows make up an optimizer step"),
];

const MICRO_BATCH: &str = "training.micro_batch_size";
const GRADIENT_ACCUMULATION: &str = "training.gradient_accumulation_steps";

/// Keys that speak of turns, with the values that do (any, where none is named).
const NEED_TURNS: &[(&str, &[&str])] =
    &[("dataset.chat_template", &[]), ("dataset.system", &[]), ("dataset.train_on", &["assistant", "last-assistant"])];

const OPTIMIZER: &str = "training.optimizer";

/// Keys of some optimizers, and which.
const OF_OPTIMIZERS: &[(&str, &[&str])] = &[
    ("training.adam_beta1", &["adamw", "adamw_8bit", "lion", "schedule_free_adamw", "muon"]),
    ("training.adam_beta2", &["adamw", "adamw_8bit", "lion", "schedule_free_adamw", "muon"]),
    ("training.adam_epsilon", &["adamw", "adamw_8bit", "schedule_free_adamw", "muon"]),
    ("training.momentum", &["sgd", "muon"]),
    ("training.nesterov", &["sgd", "muon"]),
    ("training.adjust_lr_fn", &["muon"]),
];

/// More regular expressions than this in one mapping would take long to check, and longer to match.
const MOST_EXPRESSIONS: usize = 1000;

/// The value at `path`, unless it is null or false, which say the same as leaving it out.
fn given<'a>(tree: &'a Node, path: &str) -> Option<&'a Node> {
    tree.at(path).filter(|node| !matches!(node.value, Value::Null | Value::Bool(false)))
}

/// Keys that the chosen optimizer does not use, and what it needs.
fn of_the_optimizer(tree: &Node) -> Vec<Problem> {
    let chosen = match given(tree, OPTIMIZER).map(|node| node.text()) {
        None => "adamw",
        Some(Some(text)) => text,
        Some(None) => return Vec::new(), // no text at all: said elsewhere
    };
    let mut problems = Vec::new();
    for (key, users) in OF_OPTIMIZERS {
        if let Some(node) = given(tree, key).filter(|_| !users.contains(&chosen)) {
            let what = format!("`{key}` is {}, but `{OPTIMIZER}` is `{chosen}`, which does not use it", node.found());
            let list: Vec<String> = users.iter().map(|user| format!("`{user}`")).collect();
            let hint = format!("leave `{key}` out, or choose {}", list.join(" or "));
            problems.push(Problem::new(&node.place, what, hint));
        }
    }
    let zero = |node: &Node| matches!(node.value, Value::Integer(0)) || matches!(node.value, Value::Float(0.0));
    match (chosen, given(tree, OPTIMIZER)) {
        ("schedule_free_adamw", Some(node)) => {
            let schedule = given(tree, "training.lr_scheduler");
            if schedule.and_then(Node::text) != Some("constant") {
                let place = schedule.map_or(&node.place, |schedule| &schedule.place);
                let what =
                    format!("`{OPTIMIZER}` is `{chosen}`, whose average takes the place of a falling learning rate");
                problems.push(Problem::new(place, what, "write `training.lr_scheduler`: `constant`"));
            }
            if let Some(beta) = given(tree, "training.adam_beta1").filter(|beta| zero(beta)) {
                let what =
                    format!("`training.adam_beta1` is 0, but `{chosen}` takes its gradients between average and steps");
                problems.push(Problem::new(&beta.place, what, "give a number above 0, or leave it out for 0.9"));
            }
        }
        ("sgd", _) if given(tree, "training.momentum").is_none_or(zero) => {
            if let Some(nesterov) = given(tree, "training.nesterov") {
                let what = "`training.nesterov` needs `training.momentum`: without it there is none to look ahead with";
                let hint = "give `training.momentum`, 0.9 for one, or leave `training.nesterov` out";
                problems.push(Problem::new(&nesterov.place, what.to_string(), hint));
            }
        }
        _ => {}
    }
    problems
}

/// What makes up an optimizer step: rows that whole micro-batches of the size that is named come to, or that one can be chosen for.
fn of_the_batch(tree: &Node) -> Option<Problem> {
    const GLOBAL: &str = "training.global_batch_size";
    let (micro, global) = (given(tree, MICRO_BATCH), given(tree, GLOBAL));
    let number = |node: &Node| if let Value::Integer(number) = node.value { Some(number) } else { None };
    match (micro, global) {
        (Some(micro), None) if micro.text() == Some("auto") => {
            let what = format!("`{MICRO_BATCH}` is `auto`, but nothing says how many rows make up an optimizer step");
            Some(Problem::new(&micro.place, what, format!("give `{GLOBAL}`, or a number of rows")))
        }
        (micro, Some(global)) => {
            let rows = number(global).filter(|rows| *rows > 0)?;
            let (size, is) = match micro {
                Some(micro) => (number(micro).filter(|size| *size > 0)?, "is"),
                None => (8, "is left out, which means"),
            };
            let what = format!("`{GLOBAL}` is {rows}, which is no multiple of `{MICRO_BATCH}`: that {is} {size}");
            let hint = format!("write `{MICRO_BATCH}: auto`, or numbers of which one divides the other");
            (rows % size != 0).then(|| Problem::new(&global.place, what, hint))
        }
        _ => None,
    }
}

/// What is there of recomputed layers alone.
fn of_recomputing(tree: &Node) -> Vec<Problem> {
    let Some(never) = given(tree, "training.recompute").filter(|node| node.text() == Some("none")) else {
        return Vec::new();
    };
    let tile = given(tree, "training.tile_feed_forward").filter(|node| matches!(node.value, Value::Integer(_)));
    let offload = given(tree, "training.offload").filter(|node| node.text() == Some("on"));
    let tile = tile.map(|node| ("training.tile_feed_forward", node, "a tile's activations are made again in backward"));
    let offload = offload.map(|node| ("training.offload", node, "it is what recomputed layers read that is sent away"));
    let problem = |(key, node, why): (&str, &Node, &str)| {
        let what = format!("`{key}` is {}, but `training.recompute` is {}: {why}", node.found(), never.found());
        Problem::new(&node.place, what, format!("write `training.recompute: auto`, or leave `{key}` out"))
    };
    tile.into_iter().chain(offload).map(problem).collect()
}

fn wrong_target(key: &str, node: &Node, text: &str) -> Option<Problem> {
    const ALL: &str = "all-linear";
    let problem = |what: String, hint: String| Some(Problem::new(&node.place, what, hint));
    if text == ALL {
        let what = format!("`{key}` is `{ALL}`, which leaves nothing to adapt");
        return if key.ends_with("exclude_modules") { problem(what, "name modules".into()) } else { None };
    }
    if foreign_value(key, text).or_else(|| nearest(text, std::iter::once(ALL))).is_some() {
        return problem(format!("`{key}` is {text:?}, which matches no module"), format!("did you mean `{ALL}`?"));
    }
    if text.contains(',') && text.chars().all(|sign| sign.is_alphanumeric() || "_., ".contains(sign)) {
        let names: Vec<&str> = text.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
        let what = format!("`{key}` is {}, which is read as one regular expression", node.found());
        return problem(what, format!("write a list: [{}]", names.join(", ")));
    }
    let error = Regex::new(&format!("^(?:{text})$")).err()?;
    let hint = format!("write `{ALL}`, a list of names, or one regular expression over the whole module path");
    problem(format!("`{key}` is {}, {}", node.found(), in_a_line(&error)), hint)
}

fn wrong_patterns(key: &str, node: &Node) -> Vec<Problem> {
    // A name is always a regular expression; a model has thousands, and each may have its own rank.
    let named = |key: &str| key.chars().all(|sign| sign.is_alphanumeric() || "_.".contains(sign));
    let expressions: Vec<_> = node.entries().iter().filter(|entry| !named(&entry.key)).collect();
    if expressions.len() > MOST_EXPRESSIONS {
        let what =
            format!("`{key}` has {} regular expressions, at most {MOST_EXPRESSIONS} are taken", expressions.len());
        return vec![Problem::new(&node.place, what, "write fewer, wider ones")];
    }
    let wrong = expressions.into_iter().filter_map(|entry| {
        let error = RegexBuilder::new(&format!(r"^(?:.*\.)?(?:{})$", entry.key)).size_limit(1 << 20).build().err()?;
        let what = format!("`{key}` has the key {:?}, {}", shorten(&entry.key), in_a_line(&error));
        Some(Problem::new(&entry.place, what, "write a module name or a regular expression"))
    });
    wrong.collect()
}

/// The regex crate draws its errors over several lines; the last one says what is wrong.
fn in_a_line(error: &regex::Error) -> String {
    let text = error.to_string();
    let last = text.lines().last().unwrap_or_default().trim_start_matches("error: ");
    format!("not a regular expression: {last}")
}
