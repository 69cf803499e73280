//! The command line: clap structs only. Their doc comments are the help texts.

mod adapters;
mod asking;
mod recipes;
mod training;
mod writing;

use clap::{Args, Parser, Subcommand};

pub use adapters::*;
pub use asking::*;
pub use recipes::*;
pub use training::*;
pub use writing::*;

/// Graft low-rank adapters onto open language models: one recipe, one executable, exact results.
#[derive(Debug, Clone, PartialEq, Parser)]
#[command(name = "engraft", version, after_help = FIRST_STEPS, after_long_help = FIRST_STEPS_AND_EXIT_CODES)]
#[command(propagate_version = true, arg_required_else_help = true, subcommand_required = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// One verb each.
#[derive(Debug, Clone, PartialEq, Subcommand)]
pub enum Command {
    /// Train an adapter as a recipe says
    Train(Train),
    /// Say what a recipe will take: memory by what it is for, tokens per second, hours, on this machine or another
    Plan(Plan),
    /// Measure a model or adapter on a recipe's eval set
    Eval(Eval),
    /// Talk to a model in the terminal
    Chat(Chat),
    /// Complete one prompt
    Generate(Generate),
    /// Fold an adapter into its base and write the whole model
    Merge(Merge),
    /// Write what a server loads: an adapter by its rules, or the whole model; or the outputs of a stopped run
    Export(Export),
    /// Make one adapter of several of the same base, with weights
    Combine(Combine),
    /// Take the adapter of a given rank that comes nearest to a fine-tuned model
    Extract(Extract),
    /// Compare two adapters or models, tensor by tensor
    Diff(Diff),
    /// Check that a run's files are unchanged, or that an export or a server gives the trained answers
    Verify(Verify),
    /// Write a base in four or eight bits, as transformers and bitsandbytes load it
    Quantize(Quantize),
    /// Show a model, an adapter, a dataset or a run in one screen
    Inspect(Inspect),
    /// Show rows as the model will see them: every token, and whether it is trained
    Preview(Preview),
    /// Check recipes without loading or training anything
    Validate(Validate),
    /// Print the recipe's reference: a JSON Schema for editors, or Markdown
    Schema(Schema),
    /// Write the logits of token ids to a file, for comparing with other programs
    #[command(hide = true)]
    Logits(Logits),
    /// Quantise the tensors of a file and make them whole again, for comparing with other programs
    #[command(hide = true)]
    Codes(Codes),
    /// Check this machine: libtorch, CUDA, memory, disk; what is missing and how to get it
    Doctor(Doctor),
}

impl Default for Quantizing {
    fn default() -> Self {
        Self { no_double_quant: false, block_size: 64, skip: vec!["lm_head".into()] }
    }
}

/// Changes to a recipe.
#[derive(Debug, Clone, PartialEq, Default, Args)]
pub struct Overrides {
    /// Change a key of the recipe, checked as strictly as the file (repeatable)
    ///
    /// The value is read as in YAML: `--set adapter.r=8`, `--set 'adapter.target_modules=[q_proj, v_proj]'`; an empty one
    /// (`--set revision=`) unsets the key. Relative paths start at the current folder.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

fn finite(typed: &str) -> Result<f64, String> {
    let number = typed.trim().parse::<f64>().ok().filter(|number| number.is_finite());
    number.ok_or_else(|| format!("{typed:?} is not a number"))
}

const FIRST_STEPS: &str = "First steps:
  engraft doctor                     is everything there?
  engraft validate recipe.yaml       is the recipe sound?
  engraft plan recipe.yaml           does it fit, and how long will it take?
  engraft preview recipe.yaml        what will be trained, token by token?
  engraft train recipe.yaml          train

Exit codes are listed by `engraft --help`.";

const FIRST_STEPS_AND_EXIT_CODES: &str = "First steps:
  engraft doctor                     is everything there?
  engraft validate recipe.yaml       is the recipe sound?
  engraft plan recipe.yaml           does it fit, and how long will it take?
  engraft preview recipe.yaml        what will be trained, token by token?
  engraft train recipe.yaml          train

Exit codes:
   0  done
   1  a bug or an uncaught failure
   2  wrong usage of the command line
   3  the recipe or a --set is wrong
   4  the dataset or its template cannot be trained on
   5  the model, its tokenizer or an adapter is damaged or not supported
   6  something could not be written, or the output folder is in use
   7  a saved state is damaged or belongs to another recipe, dataset or base
   8  the device is missing or out of memory
   9  the loss or a gradient stopped being finite
  10  a limit (--fail-under, --fail-over) was missed
  11  a hub or server could not be reached
  12  what was compared (diff) is not equal
  12  verify: files changed, or an export or server does not give the trained answers
  75  stopped by a signal; the state is saved, --resume continues

Environment:
  ENGRAFT_CACHE   cache folder [default: $XDG_CACHE_HOME/engraft, else ~/.cache/engraft]
  HF_TOKEN, HF_HOME   token and cache of the hub";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Dtype;
    use crate::{Error, Fault};
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Command, String> {
        let words = std::iter::once("engraft").chain(line.split_whitespace());
        Cli::try_parse_from(words).map(|cli| cli.command).map_err(|error| error.to_string())
    }

    #[test]
    fn the_definition_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn each_verb_is_read() {
        let Command::Train(train) = parse("train r.yaml --set a.b=1 --set c=d=e --resume --json").unwrap() else {
            panic!()
        };
        assert_eq!(train.overrides.set, ["a.b=1", "c=d=e"]);
        assert!(train.resume && train.json && !train.quiet);
        let Command::Eval(eval) = parse("eval r.yaml --fail-under exact_match=0.8 --fail-over loss=2").unwrap() else {
            panic!()
        };
        assert_eq!(eval.fail_under, [Threshold { metric: Metric::ExactMatch, value: 0.8 }]);
        assert_eq!(eval.fail_over, [Threshold { metric: Metric::Loss, value: 2.0 }]);
        let Command::Generate(generate) = parse("generate --model m --dtype fp32 --stop a --stop b").unwrap() else {
            panic!()
        };
        assert_eq!((generate.prompt.as_str(), generate.model.dtype), ("-", Some(Dtype::Fp32)));
        for line in [
            "chat --model m --adapter a --temperature 0.7 --top-p 0.9",
            "merge --model m --adapter a --out o --dtype bf16 --overwrite",
            "merge --model m --adapter a --out o --quantize nf4 --block-size 128 --no-probe --json",
            "export r.yaml --save adapter --save merged",
            "export runs/a --target vllm --out o --model b --revision r --overwrite --json",
            "export runs/a --target transformers --merge --type fp16 --onto original --out o",
            "export runs/a --target llama.cpp --merge --type q4_k_m --no-probe --out o --sign key.pem",
            "export runs/a --target ollama --from llama3 --out o --push me/it --public",
            "combine a b --by dare_ties_svd --weights 0.7,-0.3 --density 0.5 --majority-sign frequency --rank 8 --out o",
            "extract --tuned t --model m --rank 8 --save-others --out o --json",
            "diff a b --tolerance 1e-5 --json",
            "inspect a b --json",
            "preview r.yaml --eval --rows 5 --no-color",
            "validate a.yaml b.yaml",
            "plan r.yaml --gpu h200 --set a.b=1 --json",
            "train r.yaml --ignore-memory-plan --sign key.pem",
            "verify runs/a --key public.pem --json",
            "verify e --model owner/name --revision main",
            "verify e --server http://localhost:8000 --served-model a --api-key-env KEY --timeout 5",
            "schema --markdown",
            "doctor --json",
        ] {
            parse(line).unwrap();
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (line, part) in [
            ("eval r.yaml --fail-under accuracy=1", "there is no metric accuracy"),
            ("eval r.yaml --fail-under loss=nan", "is not a number"),
            ("eval r.yaml --limit 0", "0 is not in"),
            ("generate --model m --temperature=-1", "--temperature"),
            ("generate --model m --top-p 0", "must be above 0"),
            ("generate --model m --dtype int8", "possible values"),
            ("train r.yaml --json --quiet", "cannot be used with"),
            ("merge --model m --adapter a --out o --quantize nf4 --block-size 63", "bitsandbytes has"),
            ("merge --model m --adapter a --out o --probe f --no-probe", "cannot be used with"),
            ("export runs/a --target vllm", "required"),
            ("export runs/a --out o", "required"),
            ("export runs/a --target vllm --out o --save merged", "cannot be used with"),
            ("export runs/a --target tensorrt --out o", "possible values"),
            ("export runs/a --target peft --out o --public", "required"),
            ("export runs/a --target peft --out o --probe f --no-probe", "cannot be used with"),
            ("combine a b --weights 1,x --out o", "is not a number"),
            ("diff a b --tolerance=-1", "at least 0"),
            ("verify e --served-model a", "--server"),
            ("verify e --server http://x --model m", "cannot be used with"),
            ("verify e --server http://x --timeout 0", "0 is not in"),
            ("trian r.yaml", "similar subcommand"),
            ("validate", "required"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
        }
    }

    #[test]
    fn the_help_lists_every_exit_code() {
        let fault = || Fault::new("", "");
        for error in [
            Error::Recipe(vec![]),
            Error::Data(fault()),
            Error::Model(fault()),
            Error::Output(fault()),
            Error::State(fault()),
            Error::Device(fault()),
            Error::Diverged(fault()),
            Error::Gate(fault()),
            Error::Network(fault()),
            Error::Mismatch(fault()),
            Error::Interrupted(fault()),
        ] {
            assert!(FIRST_STEPS_AND_EXIT_CODES.contains(&format!("\n{:>4}  ", error.exit_code())), "{error:?}");
        }
    }
}
