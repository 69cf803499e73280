//! Reading a recipe: file, tree, overrides, checks, and at last the struct.

use std::path::{Path, PathBuf};

use super::tree::{Node, Problem, Value};
use super::{Recipe, check, file, json_schema, overrides, rules};
use crate::{Error, Fault, Result};

/// A recipe that was read and found sound, with the places its values were typed at.
#[derive(Debug, Clone)]
pub struct RecipeFile {
    /// The recipe, overrides applied.
    pub recipe: Recipe,
    /// The file it was read from.
    pub path: PathBuf,
    pub(super) tree: Node,
}

impl Recipe {
    /// Reads the recipe at `path` and applies `overrides`, each `key.path=value` as typed after `--set`.
    ///
    /// # Errors
    ///
    /// [`Error::Recipe`] with every problem found: a file that is no recipe, YAML that cannot be read, unknown keys
    /// (with the nearest known one), wrong types and ranges, missing keys, impossible pairs. Each fault's place is
    /// `path:line:column` or the `--set` it was typed in.
    pub fn read(path: &Path, overrides: &[String]) -> Result<RecipeFile> {
        let text = file::read(path).map_err(|fault| Error::Recipe(vec![fault]))?;
        Self::parse(path, &text, overrides)
    }

    pub(super) fn parse(path: &Path, text: &str, overrides: &[String]) -> Result<RecipeFile> {
        let name = path.display().to_string();
        let mut tree = Node::parse(text, &name).map_err(|fault| Error::Recipe(vec![fault]))?;
        if !matches!(tree.value, Value::Map(_)) {
            let (what, hint) = match tree.value {
                Value::Null => ("holds no recipe: it is empty".to_string(), "it needs base_model, dataset and output"),
                _ => (format!("is {}, expected a mapping of keys", tree.found()), "write `key: value` lines"),
            };
            return Err(Error::Recipe(vec![Fault::at(path, what).hint(hint)]));
        }
        let mut problems = overrides::apply(&mut tree, overrides);
        problems.extend(check::check(&tree, &json_schema()));
        problems.extend(rules::check(&tree));
        if !problems.is_empty() {
            return Err(Error::Recipe(in_order(problems, &name)));
        }
        // What the schema allows, serde reads: they are made from the same structs.
        let recipe =
            serde_json::from_value(tree.json()).map_err(|error| Error::Recipe(vec![Fault::at(path, error)]))?;
        Ok(RecipeFile { recipe, path: path.to_path_buf(), tree })
    }
}

/// The problems as a person reads the file, top down, those of `--set` last; a flood of them is cut.
pub(super) fn in_order(mut problems: Vec<Problem>, name: &str) -> Vec<Fault> {
    const MOST: usize = 100;
    problems.sort_by(|one, other| one.place.cmp(&other.place));
    let left = problems.len().saturating_sub(MOST);
    let mut faults: Vec<Fault> = problems.into_iter().take(MOST).map(|problem| problem.fault(name)).collect();
    if left > 0 {
        faults.push(Fault::new(name, format!("{left} more problems are not listed")));
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::{Offload, TileFeedForward, Tiling};

    const GOOD: &str = "base_model: a/b\ndataset:\n  train: t.parquet\noutput:\n  dir: out\n";

    fn read(text: &str, overrides: &[&str]) -> Result<Recipe, String> {
        let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
        match Recipe::parse(Path::new("r.yaml"), text, &overrides) {
            Ok(file) => Ok(file.recipe),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Asserts that reading `text` gives just these problems, each `line:column: start of what is wrong | part of the hint`.
    #[track_caller]
    fn refused(text: &str, expected: &[&str]) {
        let Err(Error::Recipe(faults)) = Recipe::parse(Path::new("r.yaml"), text, &[]) else {
            panic!("taken: {text}");
        };
        let shown = faults.iter().map(Fault::to_string).collect::<Vec<_>>().join("\n");
        assert_eq!(faults.len(), expected.len(), "{shown}");
        for (fault, expected) in faults.iter().zip(expected) {
            let (what, hint) = expected.split_once(" | ").unwrap_or((expected, ""));
            let line = format!("{}: {}", fault.place.trim_start_matches("r.yaml").trim_start_matches(':'), fault.what);
            assert!(line.starts_with(what), "expected {what}\nin {shown}");
            assert!(fault.hint.contains(hint), "expected {hint}\nin {shown}");
        }
    }

    /// Like [`refused`], for a sound recipe with these lines added.
    #[track_caller]
    fn refused_with(added: &str, expected: &[&str]) {
        refused(&format!("{GOOD}{added}"), expected);
    }

    #[test]
    fn a_short_recipe_gets_every_default() {
        let recipe = read(GOOD, &[]).unwrap();
        assert_eq!((recipe.adapter.r, recipe.training.learning_rate, recipe.dataset.max_length), (16, 2e-4, 2048));
        assert_eq!(recipe.base_model, "a/b");
        let crlf = read(&GOOD.replace('\n', "\r\n"), &[]).unwrap();
        assert_eq!(recipe, crlf);
        // What is written out reads back as the same.
        assert_eq!(read(&serde_json::to_string(&recipe).unwrap(), &[]).unwrap(), recipe);
    }

    #[test]
    fn numbers_are_read_as_yaml_1_2_reads_them() {
        for (typed, value) in
            [("1e-4", 1e-4), ("1E-4", 1e-4), (".5", 0.5), ("3", 3.0), ("+2.5", 2.5), ("1.0e-05", 1e-5)]
        {
            let recipe = read(&format!("{GOOD}training:\n  learning_rate: {typed}\n"), &[]).unwrap();
            assert_eq!(recipe.training.learning_rate, value, "{typed}");
        }
        let recipe = read(&format!("{GOOD}training: {{seed: 18446744073709551615}}\n"), &[]).unwrap();
        assert_eq!(recipe.training.seed, u64::MAX);
    }

    #[test]
    fn anchors_and_merges_are_fine() {
        let text = "base_model: a/b\noutput: {dir: &d out}\ndataset:\n  <<: {packing: true}\n  train: *d\n";
        let recipe = read(text, &[]).unwrap();
        assert!(recipe.dataset.packing && recipe.dataset.train == crate::recipe::Sources::One("out".into()));
    }

    #[test]
    fn what_is_no_mapping_is_refused() {
        refused("", &[": holds no recipe: it is empty"]);
        refused("# nothing\n", &[": holds no recipe: it is empty"]);
        refused("---\n", &[": holds no recipe: it is empty"]);
        refused("- a\n", &[": is a list"]);
        refused("some text\n", &[": is the text \"some text\""]);
        refused("12\n", &[": is the number 12"]);
    }

    #[test]
    fn what_is_no_yaml_is_refused() {
        refused("a: 1\n---\nb: 2\n", &["3:1: not valid YAML: a second document | ---"]);
        refused("a: 1\n...\nb: 2\n", &["3:1: not valid YAML: a second document"]);
        refused("a: 1\nb: 2\na: 3\n", &["3:1: not valid YAML: the key `a` is given twice"]);
        refused("a: {b: 1, \"b\": 2}\n", &["1:11: not valid YAML: the key `b` is given twice"]);
        refused("training:\n\tepochs: 1\n", &["2:2: not valid YAML: tabs | indent with spaces"]);
        refused(
            "a: !!python/object:os.system x\n",
            &["1:30: not valid YAML: unsupported tag `!!python/object:os.system`"],
        );
        refused("a: !include x\n", &["1:13: not valid YAML: unsupported tag"]);
        refused("a: &a [*a]\n", &["1:8: not valid YAML: this alias refers to the value it is in"]);
        refused("a: &a {b: *a}\n", &["1:11: not valid YAML: this alias refers to the value it is in"]);
        refused("a: *.parquet\n", &["1:4: not valid YAML: this alias has no anchor | quoted"]);
        refused("a: b: c\n", &["1:5: not valid YAML: mapping values | quoted"]);
        refused("a: @x\n", &["1:4: not valid YAML: unexpected character | quoted"]);
        refused("a: [1\n", &["1:4: not valid YAML: unclosed bracket"]);
        refused("? [a]\n: 1\n", &["1:3: not valid YAML: a key must be a text"]);
        refused("null: 1\n", &["1:1: not valid YAML: a key must be a text"]);
    }

    #[test]
    fn what_grows_or_nests_without_end_is_refused_at_once() {
        let start = std::time::Instant::now();
        let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n\
                    c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: [*c,*c,*c,*c,*c,*c,*c,*c,*c]\n";
        refused(bomb, &["3:20: not valid YAML: the aliases repeat too much"]);
        let long = format!("a: &a \"{}\"\nb: [{}*a]\n", "x".repeat(200_000), "*a, ".repeat(10_000));
        refused(&long, &["2:261: not valid YAML: too large or too deep"]);
        for opening in ["[", "{a: ", "- ", "? ", "[{b: "] {
            let deep = opening.repeat(200_000 / opening.len());
            let Err(message) = read(&deep, &[]) else { panic!("taken") };
            assert!(message.contains("too deep"), "{message}");
        }
        let block: String = (0..300).map(|depth| format!("{}a:\n", " ".repeat(depth))).collect();
        refused(&block, &["17:17: not valid YAML: too large or too deep"]);
        refused(&format!("a: [{}]", "1, ".repeat(80_000)), &["1:149996: not valid YAML: too large"]);
        let keys: String = (0..20_000).map(|index| format!("key{index}: 1\n")).collect();
        let Err(Error::Recipe(faults)) = Recipe::parse(Path::new("r.yaml"), &keys, &[]) else { panic!("taken") };
        assert_eq!((faults.len(), faults[100].what.as_str()), (101, "19903 more problems are not listed"));
        let same = format!("{GOOD}  save: [{}]\n", "adapter, ".repeat(20_000));
        assert!(read(&same, &[]).is_err());
        assert!(start.elapsed().as_secs() < 5, "took {:?}", start.elapsed());
    }

    #[test]
    fn keys_of_other_tools_are_translated() {
        refused_with(
            "lora_r: 16\nsequence_len: 5\nnum_train_epochs: 3\nPer_Device_Train_Batch_Size: 4\nload_in_4bit: true\nbf16: true\n",
            &[
                "6:1: unknown key `lora_r` | write `adapter.r`",
                "7:1: unknown key `sequence_len` | write `dataset.max_length`",
                "8:1: unknown key `num_train_epochs` | write `training.epochs`",
                "9:1: unknown key `Per_Device_Train_Batch_Size` | write `training.micro_batch_size`",
                "10:1: unknown key `load_in_4bit` | write `adapter.method`: `qlora`",
                "11:1: unknown key `bf16` | write `dtype`: `bf16`",
            ],
        );
        refused_with("adapter:\n  lora_rank: 8\n", &["7:3: unknown key `adapter.lora_rank` | write `adapter.r`"]);
    }

    #[test]
    fn unknown_keys_lead_to_the_nearest_known_one() {
        refused_with(
            "learning_rate: 1\ntrainig: {}\nzzz: 1\nmax_step: 3\nwarmup: 3\nadapter: {r: 1, lora-alpha: 2, Lora_Dropout: 0}\n",
            &[
                "6:1: unknown key `learning_rate` | it belongs elsewhere: write `training.learning_rate`",
                "7:1: unknown key `trainig` | did you mean `training`?",
                "8:1: unknown key `zzz` | the keys here are base_model, revision",
                "9:1: unknown key `max_step` | did you mean `training.max_steps`?",
                "10:1: unknown key `warmup` | did you mean `training.warmup_steps`?",
                "11:17: unknown key `adapter.lora-alpha` | did you mean `adapter.lora_alpha`?",
                "11:32: unknown key `adapter.Lora_Dropout` | did you mean `adapter.lora_dropout`?",
            ],
        );
        refused(
            "base_model: a/b\noutput: {dir: o}\ndataset:\n  train: [{path: x, wieght: 2}]\n",
            &["4:21: unknown key `dataset.train[0].wieght` | did you mean"],
        );
    }

    #[test]
    fn missing_keys_are_named_unless_they_are_misspelt() {
        refused(
            "dtype: bf16\noutput: {}\n",
            &[
                "1:1: the key `base_model` is missing | Hub id",
                "1:1: the key `dataset` is missing",
                "2:9: the key `output.dir` is missing",
            ],
        );
        refused("base_mdel: a/b\ndatasets: x\noutput_dir: y\n", &["1:1: unknown", "2:1: unknown", "3:1: unknown"]);
    }

    #[test]
    fn types_are_strict_and_say_what_to_write() {
        refused(
            "base_model: 12\ndataset: data.parquet\nadapter: lora\ntraining:\noutput: {dir: o, save: adapter}\n",
            &[
                "1:13: `base_model` is the number 12, expected a text | \"12\"",
                "2:10: `dataset` is the text \"data.parquet\", expected a mapping | indented (train,",
                "3:10: `adapter` is the text \"lora\", expected a mapping | write `{method: lora}`",
                "4:9: `training` is empty, expected a mapping | or leave the key out",
                "5:24: `output.save` is the text \"adapter\", expected a list | write `[adapter]`",
            ],
        );
        refused_with(
            "adapter:\n  r: 010\n  lora_alpha: '32'\n  use_rslora: no\n  init_lora_weights: true\n  layers_to_transform: 3\n",
            &[
                "7:6: `adapter.r` is 010, which YAML 1.1 reads as octal | write 10",
                "8:15: `adapter.lora_alpha` is the text \"32\" | remove the quotes: write 32",
                "9:15: `adapter.use_rslora` is the text \"no\", expected true or false | write `false`",
                "10:22: `adapter.init_lora_weights` is `true`, expected one of | write `kaiming`",
                "11:24: `adapter.layers_to_transform` is the number 3, expected a list | [3]",
            ],
        );
        refused_with(
            "training:\n  micro_batch_size: 8.0\n  learning_rate: \"1e-4\"\n  save_steps: 1e3\n  threads: 1,000\n  recompute: true\n  seed: ten\n",
            &[
                "7:21: `training.micro_batch_size` is the number 8.0, expected a whole number | write 8",
                "8:18: `training.learning_rate` is the text \"1e-4\" | remove the quotes: write 1e-4",
                "9:15: `training.save_steps` is the number 1e3 | write 1000",
                "10:12: `training.threads` is the text \"1,000\" | write 1000",
                "11:14: `training.recompute` is `true` | write `full`",
                "12:9: `training.seed` is the text \"ten\", expected a whole number",
            ],
        );
    }

    #[test]
    fn choices_are_listed_and_those_of_other_tools_translated() {
        refused_with(
            "device: gpu\ndtype: bfloat16\ntraining: {optimizer: adamw_torch, lr_scheduler: cosin}\nadapter: {method: lokr}\n",
            &[
                "6:9: `device` is the text \"gpu\", expected one of `auto`, `cpu`, `cuda` | write `cuda`",
                "7:8: `dtype` is the text \"bfloat16\" | write `bf16`",
                "8:23: `training.optimizer` is the text \"adamw_torch\", expected one of `adamw`, `adamw_8bit` | write `adamw`",
                "8:50: `training.lr_scheduler` is the text \"cosin\" | write `cosine`",
                "9:19: `adapter.method` is the text \"lokr\", expected one of `lora`, `qlora`, `dora`",
            ],
        );
    }

    #[test]
    fn optimizers_of_other_tools_are_translated() {
        for (theirs, ours) in [
            ("paged_adamw_8bit", "adamw_8bit"),
            ("adamw_bnb_8bit", "adamw_8bit"),
            ("paged_adamw_32bit", "adamw"),
            ("adamw_torch_fused", "adamw"),
            ("lion_32bit", "lion"),
            ("schedule_free_adam", "schedule_free_adamw"),
            ("muom", "muon"),
        ] {
            let expected =
                format!("6:23: `training.optimizer` is the text \"{theirs}\", expected one of | write `{ours}`");
            refused_with(&format!("training: {{optimizer: {theirs}}}\n"), &[&expected]);
        }
    }

    #[test]
    fn keys_that_the_optimizer_does_not_use_are_refused() {
        refused_with(
            "training:\n  optimizer: sgd\n  adam_beta1: 0.9\n  adam_epsilon: 1e-6\n  adjust_lr_fn: original\n  momentum: 0.9\n",
            &[
                "8:15: `training.adam_beta1` is the number 0.9, but `training.optimizer` is `sgd`, which does not use it | leave",
                "9:17: `training.adam_epsilon` is the number 1e-6, but | or choose `adamw` or `adamw_8bit`",
                "10:17: `training.adjust_lr_fn` is the text \"original\", but | or choose `muon`",
            ],
        );
        refused_with(
            "training: {momentum: 0.9, nesterov: true}\n",
            &[
                "6:22: `training.momentum` is the number 0.9, but `training.optimizer` is `adamw`, which does not use it | `sgd`",
                "6:37: `training.nesterov` is `true`, but | or choose `sgd` or `muon`",
            ],
        );
        refused_with(
            "training: {optimizer: sgd, nesterov: true}\n",
            &["6:38: `training.nesterov` needs `training.momentum` | 0.9"],
        );
        refused_with(
            "training: {optimizer: schedule_free_adamw, adam_beta1: 0}\n",
            &[
                "6:23: `training.optimizer` is `schedule_free_adamw`, whose average | `constant`",
                "6:56: `training.adam_beta1` is 0, but `schedule_free_adamw` | above 0",
            ],
        );
        refused_with(
            "training: {optimizer: schedule_free_adamw, lr_scheduler: linear}\n",
            &["6:58: `training.optimizer` is `schedule_free_adamw` | `constant`"],
        );
        for taken in [
            "{optimizer: schedule_free_adamw, lr_scheduler: constant, warmup_steps: 3}",
            "{optimizer: muon, adam_beta1: 0.8, momentum: 0.9, adjust_lr_fn: match_rms_adamw}",
            "{optimizer: sgd, momentum: 0.9, nesterov: true}",
            "{optimizer: adafactor, loraplus_lr_ratio: 16}",
        ] {
            let text = format!("{GOOD}training: {taken}\n");
            Recipe::parse(Path::new("r.yaml"), &text, &[]).unwrap_or_else(|error| panic!("{taken}: {error}"));
        }
    }

    #[test]
    fn ranges_hold() {
        let sections = [
            (
                "adapter",
                "r: 0|r: 70000|lora_alpha: 0|lora_alpha: -1|lora_dropout: 1|lora_dropout: -0.1|lora_alpha: .inf",
            ),
            ("adapter", "rank_pattern: {q: 0}|alpha_pattern: {q: 0}|layers_to_transform: []|layers_to_transform: [-1]"),
            ("adapter", "target_modules: []|target_modules: ['']|target_modules: ''|rank_pattern: {'(': 4}"),
            (
                "training",
                "epochs: 0|epochs: 10001|epochs: .nan|max_steps: 0|max_steps: -1|micro_batch_size: 0|learning_rate: 0",
            ),
            (
                "training",
                "learning_rate: .nan|learning_rate: .inf|learning_rate: 1e999|learning_rate: -1e-4|adam_beta1: 1|loraplus_lr_ratio: 0",
            ),
            (
                "training",
                "adam_beta2: -0.1|adam_epsilon: 0|weight_decay: -1|warmup_ratio: 1.1|warmup_steps: -1|seed: -1",
            ),
            ("training", "gradient_accumulation_steps: 0|gradient_accumulation_steps: 5000000000|save_total_limit: 0"),
            (
                "training",
                "neftune_noise_alpha: -1|max_grad_norm: -1|max_nonfinite_steps: 0|threads: 0|logging_steps: 0|threads: 1025",
            ),
        ];
        for (section, lines) in sections {
            for line in lines.split('|') {
                let text = format!("{GOOD}{section}:\n  {line}\n");
                let Err(Error::Recipe(faults)) = Recipe::parse(Path::new("r.yaml"), &text, &[]) else {
                    panic!("taken: {line}");
                };
                assert!(faults.len() == 1 && faults[0].place.starts_with("r.yaml:7:"), "{line}: {faults:?}");
            }
        }
        refused(
            &GOOD.replace("train: t.parquet", "train: [{path: t.parquet, weight: 1e7}]"),
            &["3:37: `dataset.train[0].weight` is 1e7, expected a number, above 0 and at most 1000"],
        );
        refused_with(
            "training: {max_steps: -1}\nadapter: {lora_dropout: 1.0}\n",
            &[
                "6:23: `training.max_steps` is -1, expected a whole number, at least 1 | leave the key out",
                "7:25: `adapter.lora_dropout` is 1.0, expected a number, at least 0 and below 1",
            ],
        );
    }

    #[test]
    fn names_are_one_line_and_no_message_steers_a_terminal() {
        refused(
            "base_model: |\n  a/b\ndataset: {train: \"a\\e[31m\", system: \"x\\ny\"}\noutput: {dir: o}\n\"k\\e[2J\": 1\n",
            &[
                "2:3: `base_model` is the text \"a/b\\n\", which holds a control character | on one line",
                "3:18: `dataset.train` is the text \"a\\u{1b}[31m\"",
                "5:1: unknown key `k\\u{1b}[2J`",
            ],
        );
        let doubled = read("\"k\\e\": 1\n\"k\\e\": 1\n", &[]).unwrap_err();
        assert!(!doubled.contains('\u{1b}'), "{doubled:?}");
    }

    #[test]
    fn the_recipes_in_this_repository_are_sound() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|ending| ending == "yaml") {
                Recipe::read(&path, &[]).unwrap();
                let text = std::fs::read_to_string(&path).unwrap();
                let first = "# yaml-language-server: $schema=recipe.schema.json\n";
                assert!(text.starts_with(first), "{} does not start with {first}", path.display());
            }
        }
    }

    #[test]
    fn impossible_pairs_are_refused() {
        refused_with(
            "training:\n  warmup_steps: 3\n  warmup_ratio: 0.1\n  eval_steps: 10\n  early_stopping_patience: 3\n  load_best_model_at_end: true\n",
            &[
                "8:17: `training.warmup_ratio` and `training.warmup_steps` exclude each other",
                "9:15: `training.eval_steps` needs `dataset.eval`",
                "10:28: `training.early_stopping_patience` needs `dataset.eval`",
                "11:27: `training.load_best_model_at_end` needs `dataset.eval`",
            ],
        );
        assert!(
            read(
                GOOD,
                &["training.warmup_steps=~", "training.warmup_ratio=0.1", "training.load_best_model_at_end=false"]
            )
            .is_ok()
        );
        assert!(read(GOOD, &["training.eval_steps=5", "dataset.eval=e.parquet"]).is_ok());
        let text = GOOD
            .replace("  train:", "  format: text\n  system: x\n  chat_template: y\n  train_on: assistant\n  train:");
        refused(&text, &["4:11: `dataset.system`", "5:18: `dataset.chat_template`", "6:13: `dataset.train_on`"]);
        assert!(read(GOOD, &["dataset.format=text", "dataset.train_on=all"]).is_ok());
    }

    #[test]
    fn what_makes_up_a_step_is_said_once_and_comes_out_even() {
        refused_with(
            "training: {micro_batch_size: auto}\n",
            &[
                "6:30: `training.micro_batch_size` is `auto`, but nothing says how many rows | give `training.global_batch_size`",
            ],
        );
        refused_with(
            "training: {micro_batch_size: 3, global_batch_size: 8, gradient_accumulation_steps: 2}\n",
            &[
                "6:52: `training.global_batch_size` is 8, which is no multiple of `training.micro_batch_size`: that is 3 | auto",
                "6:84: `training.gradient_accumulation_steps` and `training.global_batch_size` exclude each other",
            ],
        );
        refused_with(
            "training: {micro_batch_size: all, global_batch_size: 12}\n",
            &["6:30: `training.micro_batch_size` is the text \"all\""],
        );
        refused_with("training: {global_batch_size: 12}\n", &["6:31: `training.global_batch_size` is 12 | auto"]);
        let with = |sets: &[&str]| read(GOOD, sets).unwrap().training;
        let auto = with(&["training.micro_batch_size=auto", "training.global_batch_size=12"]);
        assert_eq!((auto.micro_batch_size.rows(), auto.global_batch_size), (None, Some(12)));
        assert_eq!(with(&["training.micro_batch_size=3"]).micro_batch_size.rows(), Some(3));
        assert_eq!(with(&["training.global_batch_size=16"]).micro_batch_size.rows(), Some(8));
    }

    #[test]
    fn what_is_of_recomputed_layers_needs_some() {
        refused_with(
            "training: {recompute: none, tile_feed_forward: 4096, offload: on}\n",
            &[
                "6:48: `training.tile_feed_forward` is the number 4096, but `training.recompute` is the text \"none\" | auto",
                "6:63: `training.offload` is the text \"on\", but `training.recompute` is the text \"none\" | auto",
            ],
        );
        refused_with("training: {tile_feed_forward: 0}\n", &["6:31: `training.tile_feed_forward` is"]);
        let with = |sets: &[&str]| read(GOOD, sets).unwrap().training;
        let both = with(&["training.tile_feed_forward=512", "training.offload=off"]);
        assert_eq!((both.tile_feed_forward, both.offload), (TileFeedForward::Tokens(512), Offload::Off));
        let off = with(&["training.tile_feed_forward=off", "training.recompute=none"]);
        assert_eq!((off.tile_feed_forward, off.offload), (TileFeedForward::Left(Tiling::Off), Offload::Auto));
    }

    #[test]
    fn patterns_must_be_able_to_match() {
        refused_with(
            "adapter:\n  target_modules: all_linear\n  exclude_modules: '(?!x)a'\n  rank_pattern: {'(': 4, q_proj: 8}\n",
            &[
                "7:19: `adapter.target_modules` is \"all_linear\", which matches no module | `all-linear`",
                "8:20: `adapter.exclude_modules` is the text \"(?!x)a\", not a regular expression: look-around",
                "9:18: `adapter.rank_pattern` has the key \"(\", not a regular expression: unclosed group",
            ],
        );
        refused_with(
            "adapter: {target_modules: 'q_proj, v_proj'}\n",
            &["6:27: `adapter.target_modules` | [q_proj, v_proj]"],
        );
        refused_with("adapter: {exclude_modules: all-linear}\n", &["6:28: `adapter.exclude_modules`"]);
        let start = std::time::Instant::now();
        let nested = format!("{GOOD}adapter:\n  target_modules: '(((a{{99}}){{99}}){{99}}){{99}}'\n");
        assert!(read(&nested, &[]).unwrap_err().contains("not a regular expression"));
        assert!(start.elapsed().as_secs() < 5);
        for good in ["all-linear", r".*\.(q|v)_proj", "[q_proj, v_proj]", "'model.layers.[0-9]+.self_attn.(q|k)_proj'"]
        {
            assert!(read(&format!("{GOOD}adapter: {{target_modules: {good}}}\n"), &[]).is_ok(), "{good}");
        }
    }

    #[test]
    fn overrides_are_as_strict_as_the_file() {
        let recipe =
            read(GOOD, &["training.learning_rate=1e-4", "adapter.target_modules=[q_proj]", "revision=v1"]).unwrap();
        assert_eq!((recipe.training.learning_rate, recipe.revision.as_deref()), (1e-4, Some("v1")));
        assert_eq!(recipe.adapter.target_modules, crate::recipe::Targets::Names(vec!["q_proj".into()]));
        let error =
            read(GOOD, &["training.learning_rat=1", "adapter.r=x", "lora_r=3", "training.epochs", "trainig.x=1"])
                .unwrap_err();
        for part in [
            "--set training.learning_rat=1: unknown key `training.learning_rat`\n  help: did you mean `training.learning_rate`?",
            "--set adapter.r=x: `adapter.r` is the text \"x\", expected a whole number",
            "--set lora_r=3: unknown key `lora_r`\n  help: write `adapter.r`",
            "--set training.epochs: has no value",
            "--set trainig.x=1: unknown key `trainig`",
        ] {
            assert!(error.contains(part), "{part}\nnot in\n{error}");
        }
        // An override heals what the file has wrong.
        assert!(read(&format!("{GOOD}adapter: {{r: x}}\n"), &["adapter.r=4"]).is_ok());
    }

    #[test]
    fn no_mutation_of_a_recipe_panics_or_hangs() {
        const FULL: &str = "# c\nbase_model: a/b\nadapter: &x {r: 8, lora_alpha: 1e1, target_modules: [q, 'v'], rank_pattern: {\"a.*\": 4}}\n\
            dataset:\n  train: [{path: a*, weight: .5}, b]\n  columns: {text: t}\n  system: |\n    hé\n     x\noutput:\n  dir: >-\n    o\n  save: [adapter]\n";
        assert!(read(FULL, &[]).is_ok(), "{:?}", read(FULL, &[]));
        const PIECES: &[&str] = &[
            ":", " ", "\n", "\t", "- ", "[", "]", "{", "}", "&x ", "*x", "!!str ", "!", "'", "\"", "|", ">", "%", "#",
            "---\n", "...\n", "<<: ", "? ", ",", "null", "~", "010", ".nan", "\u{85}", "\u{2028}", "é", "\u{feff}",
            "\\", "\r", "1e999", "=", "x",
        ];
        // A linear congruential generator (Knuth's MMIX constants): the same mutations on every run.
        let mut state = 1u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % below.max(1)
        };
        let start = std::time::Instant::now();
        for _ in 0..4000 {
            let mut signs: Vec<char> = FULL.chars().collect();
            for _ in 0..=random(6) {
                let at = random(signs.len());
                match random(3) {
                    0 => drop(signs.drain(at..(at + 1 + random(12)).min(signs.len()))),
                    1 => drop(signs.splice(at..at, PIECES[random(PIECES.len())].chars())),
                    _ => {
                        let piece: Vec<char> = signs[at..(at + random(40)).min(signs.len())].to_vec();
                        let to = random(signs.len());
                        drop(signs.splice(to..to, piece));
                    }
                }
            }
            let text: String = signs.into_iter().collect();
            let set = format!("{}={text}", ["adapter.r", "dataset", "dataset.train", "x.y"][random(4)]);
            for result in [read(&text, &[]), read(GOOD, &[&set])] {
                if let Err(message) = result {
                    assert!(!message.is_empty());
                }
            }
        }
        assert!(start.elapsed().as_secs() < 60, "took {:?}", start.elapsed());
    }
}
