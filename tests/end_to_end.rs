//! The binary, from a recipe to an adapter, on a tiny random model: what a user's terminal and a team's CI rely on.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use engraft::weights::writer::{self, TensorSpec};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

const VOCABULARY: i64 = 704;
const HIDDEN: i64 = 32;
const FEED_FORWARD: i64 = 48;

/// A folder with a base model, a dataset and a recipe.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new(training: &str) -> Self {
        let bench = Self { folder: tempfile::tempdir().unwrap() };
        write_base(&bench.path("base"));
        let rows: Vec<(String, String)> =
            (0..40).map(|i| (format!("add {i} and {}", i * 3 % 7), format!(" gives {}", i + i * 3 % 7))).collect();
        write_rows(&bench.path("train.parquet"), &rows);
        write_rows(&bench.path("eval.parquet"), &rows[..6]);
        let recipe = format!(
            "base_model: base\ndtype: fp32\ndevice: cpu\n\
             adapter: {{r: 4, lora_alpha: 8, lora_dropout: 0.1}}\n\
             dataset: {{train: train.parquet, eval: eval.parquet, max_length: 64, packing: true}}\n\
             training: {{micro_batch_size: 1, gradient_accumulation_steps: 2, learning_rate: 1.0e-2, {training}}}\n\
             output: {{dir: run, save: [adapter, merged], base_model_name_or_path: tiny/base}}\n"
        );
        std::fs::write(bench.path("recipe.yaml"), recipe).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_engraft"));
        command.current_dir(self.folder.path()).env("ENGRAFT_CACHE", self.path("cache")).args(arguments);
        command
    }

    fn engraft(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs a command that must succeed; gives what it printed.
    #[track_caller]
    fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.engraft(arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?} ended with {:?}:\n{errors}", output.status.code());
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that must fail with `code` and say `parts`, without a panic.
    #[track_caller]
    fn fail(&self, arguments: &[&str], code: i32, parts: &[&str]) {
        let output = self.engraft(arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}:\n{errors}");
        assert!(errors.starts_with("error: ") || errors.contains("\nerror: "), "{errors}");
        assert!(!errors.contains("panicked"), "{errors}");
        let mut said = errors.lines().skip_while(|line| !line.starts_with("error: "));
        assert!(said.all(|line| line.starts_with("error: ") || line.starts_with("  ")), "{errors}");
        for part in parts {
            assert!(errors.contains(part), "{part:?} is not in:\n{errors}");
        }
    }

    /// What two equal runs have in common to the last bit: the losses and the adapter.
    fn result(&self, run: &str) -> (Vec<Value>, Vec<u8>) {
        let metrics = std::fs::read_to_string(self.path(run).join("metrics.jsonl")).unwrap();
        let numbers = metrics.lines().map(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            json!([line["step"], line["loss"], line["grad_norm"], line["eval_loss"], line["trained_tokens"]])
        });
        let adapter = std::fs::read(self.path(run).join("adapter/adapter_model.safetensors")).unwrap();
        (numbers.collect(), adapter)
    }
}

fn write_base(folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "vocab_size": VOCABULARY,
        "intermediate_size": FEED_FORWARD, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer/bytes");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(tokenizer.join(name), folder.join(name)).unwrap();
    }
    let mut tensors = vec![("model.embed_tokens.weight".to_string(), vec![VOCABULARY, HIDDEN])];
    for i in 0..2 {
        let name = |part: &str| format!("model.layers.{i}.{part}.weight");
        tensors.extend([
            (name("self_attn.q_proj"), vec![HIDDEN, HIDDEN]),
            (name("self_attn.k_proj"), vec![HIDDEN / 2, HIDDEN]),
            (name("self_attn.v_proj"), vec![HIDDEN / 2, HIDDEN]),
            (name("self_attn.o_proj"), vec![HIDDEN, HIDDEN]),
            (name("mlp.gate_proj"), vec![FEED_FORWARD, HIDDEN]),
            (name("mlp.up_proj"), vec![FEED_FORWARD, HIDDEN]),
            (name("mlp.down_proj"), vec![HIDDEN, FEED_FORWARD]),
            (name("input_layernorm"), vec![HIDDEN]),
            (name("post_attention_layernorm"), vec![HIDDEN]),
        ]);
    }
    tensors.push(("model.norm.weight".into(), vec![HIDDEN]));
    let values: Vec<(String, Tensor)> = tensors
        .into_iter()
        .enumerate()
        .map(|(seed, (name, shape))| {
            let like = Tensor::zeros(shape.as_slice(), (Kind::Float, Device::Cpu));
            let random = engraft::torch_ext::uniform(&like, -0.3, 0.3, seed as u64);
            (name, if shape.len() == 1 { random + 1.0 } else { random })
        })
        .collect();
    let specs: Vec<TensorSpec> = values.iter().map(|(name, tensor)| TensorSpec::of(name, tensor)).collect();
    let path = folder.join("model.safetensors");
    writer::write(&path, &specs, &BTreeMap::new(), |i| Ok(values[i].1.shallow_clone())).unwrap();
}

fn write_rows(path: &Path, rows: &[(String, String)]) {
    let column = |pick: fn(&(String, String)) -> &String| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(rows.iter().map(pick)))
    };
    let batch = RecordBatch::try_from_iter([("prompt", column(|r| &r.0)), ("completion", column(|r| &r.1))]).unwrap();
    let file = std::fs::File::create(path).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

#[test]
fn a_recipe_becomes_an_adapter_a_merged_model_and_a_manifest() {
    let bench = Bench::new("max_steps: 12, eval_steps: 6");
    bench.succeed(&["train", "recipe.yaml"]);
    let run = bench.path("run");
    for file in ["adapter/adapter_config.json", "merged/model.safetensors", "merged/tokenizer.json", "report.html"] {
        assert!(run.join(file).exists(), "{file}");
    }
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let losses: Vec<f64> =
        metrics.lines().filter_map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64()).collect();
    assert_eq!(losses.len(), 12);
    assert!(losses[11] < losses[0] * 0.9, "the loss falls: {losses:?}");
    let manifest: Value = serde_json::from_slice(&std::fs::read(run.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["base"]["files"].as_array().unwrap().len(), 1);
    assert_eq!(manifest["seeds"]["training"], 42);

    // The adapter on its base, and the model they were merged into, are one and the same.
    let logits = |name: &str, model: &[&str]| {
        let out = bench.path(name);
        let ids = ["--ids", "5,80,33,7", "--dtype", "fp32", "--out", out.to_str().unwrap()];
        bench.succeed(&[&["logits"], model, &ids[..]].concat());
        let bytes = std::fs::read(&out).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let view = file.tensor("logits").unwrap();
        assert_eq!(view.shape(), [4, VOCABULARY as usize]);
        Tensor::from_data_size(view.data(), &[4, VOCABULARY], Kind::Float)
    };
    let adapted = logits("adapted", &["--model", "base", "--adapter", "run/adapter"]);
    let merged = logits("merged", &["--model", "run/merged"]);
    let base = logits("base.out", &["--model", "base"]);
    assert!(adapted.allclose(&merged, 1e-5, 1e-5, false));
    assert!(!adapted.allclose(&base, 1e-2, 1e-2, false));

    // The verb merges to the same bytes.
    bench.succeed(&["merge", "--model", "base", "--adapter", "run/adapter", "--out", "again"]);
    let read = |path: PathBuf| std::fs::read(path).unwrap();
    assert_eq!(read(bench.path("again/model.safetensors")), read(run.join("merged/model.safetensors")));
    let again = ["merge", "--model", "base", "--adapter", "run/adapter", "--out", "again", "--dtype", "bf16"];
    bench.fail(&again, 6, &["again", "not empty", "--overwrite"]);
    assert_eq!(read(bench.path("again/model.safetensors")), read(run.join("merged/model.safetensors")));
    bench.succeed(&[&again[..], &["--overwrite"]].concat());
    assert!(read(bench.path("again/model.safetensors")) != read(run.join("merged/model.safetensors")));

    let result: Value = serde_json::from_str(&bench.succeed(&["eval", "recipe.yaml", "--generate", "--json"])).unwrap();
    assert!(result["loss"].as_f64().unwrap() < losses[0] && result["answers"] == 6, "{result}");
    bench.fail(&["eval", "recipe.yaml", "--fail-over", "loss=0.001"], 10, &["loss is", "at most 0.001"]);
    bench.fail(&["eval", "recipe.yaml", "--fail-under", "exact_match=0.8"], 3, &["--generate"]);
    let said: Value = serde_json::from_str(&bench.succeed(&[
        "generate",
        "--model",
        "base",
        "--adapter",
        "run/adapter",
        "--raw",
        "--prompt",
        "add 1",
        "--max-tokens",
        "5",
        "--json",
    ]))
    .unwrap();
    assert!(said["tokens"].as_u64().unwrap() <= 5, "{said}");
    for path in ["base", "run", "run/adapter", "train.parquet", "run/merged/model.safetensors"] {
        bench.succeed(&["inspect", path]);
    }
    assert!(bench.succeed(&["preview", "recipe.yaml", "--rows", "1"]).contains("trained"));
    assert!(bench.succeed(&["preview", "recipe.yaml", "--eval"]).contains("eval.parquet, row 0: "));
    bench.fail(
        &["preview", "recipe.yaml", "--eval", "--set=dataset.eval=", "--set=training.eval_steps="],
        3,
        &["no eval set"],
    );
    bench.succeed(&["doctor"]);
}

#[test]
fn an_adapter_is_asked_in_the_template_it_was_trained_with() {
    let bench = Bench::new("max_steps: 1");
    bench.succeed(&["train", "recipe.yaml", "--quiet", "--set", "dataset.chat_template=zephyr"]);
    let prompt_tokens = |model: &[&str]| {
        let asked = ["--prompt", "hello", "--max-tokens", "1", "--json"];
        let said: Value = serde_json::from_str(&bench.succeed(&[&["generate"], model, &asked[..]].concat())).unwrap();
        said["prompt_tokens"].as_u64().unwrap()
    };
    let merged = prompt_tokens(&["--model", "run/merged"]);
    assert_eq!(prompt_tokens(&["--model", "base", "--adapter", "run/adapter"]), merged);
    assert!(prompt_tokens(&["--model", "base"]) < merged, "the base has no template");

    // A turn that the context has no room for is left out; the conversation goes on.
    let mut chat = bench.command(&["chat", "--model", "base", "--adapter", "run/adapter", "--max-tokens", "2"]);
    let pipe = std::process::Stdio::piped;
    let mut chat = chat.stdin(pipe()).stdout(pipe()).stderr(pipe()).spawn().unwrap();
    let said = format!("{}\nhello\n", "0 1 2 ".repeat(100));
    std::io::Write::write_all(&mut chat.stdin.take().unwrap(), said.as_bytes()).unwrap();
    let output = chat.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && errors.contains("the model was made for 256"), "{errors}");
    assert_eq!(output.stdout.iter().filter(|byte| **byte == b'\n').count(), 1, "one turn was answered");
}

#[test]
fn eval_answers_exactly_the_rows_that_its_loss_covers() {
    let bench = Bench::new("max_steps: 1");
    let row = |prompt: &str| (prompt.to_string(), " x".to_string());
    write_rows(&bench.path("rows.parquet"), &[row("add 1"), row(&"0 1 2 ".repeat(100)), row("add 2")]);
    let ask = ["eval", "recipe.yaml", "--base", "--generate", "--max-tokens", "4", "--json"];
    let ask = [&ask[..], &["--set", "dataset.eval=rows.parquet"]].concat();
    let eval = |more: &[&str]| -> Value { serde_json::from_str(&bench.succeed(&[&ask[..], more].concat())).unwrap() };
    // Each answer has its own room: the long row, which is dropped, must not cut the others to one token.
    let whole = |result: &Value| {
        let answers = result["rows_answered"].as_array().unwrap();
        answers.len() == 2 && answers.iter().all(|answer| answer["tokens"] == 4 || answer["finish"] == "stop")
    };
    let result = eval(&[]);
    assert_eq!(json!([result["rows"], result["answers"], result["dropped"]]), json!([2, 2, 1]), "{result}");
    assert!(whole(&result), "{result}");
    // The loss covers it here, but the model has no room to answer it.
    let longer = ["--set", "dataset.max_length=2048"];
    bench.fail(&[&ask[..], &longer].concat(), 4, &["rows.parquet, row 1", "made for 256", "on_bad_row: skip"]);
    let result = eval(&[&longer[..], &["--set", "dataset.on_bad_row=skip"]].concat());
    assert_eq!(json!([result["rows"], result["answers"], result["not_asked"]]), json!([3, 2, 1]), "{result}");
    assert!(whole(&result), "{result}");

    write_rows(&bench.path("rows.parquet"), &[("add 3".into(), " x".repeat(90))]);
    let result = eval(&["--set", "dataset.overlong=truncate"]);
    assert_eq!(json!([result["rows"], result["dropped"], result["truncated"]]), json!([1, 0, 1]), "{result}");

    // A row that the template refuses is left out of both when the recipe says so.
    let talk = |said: &str| {
        let messages = json!([{"role": "user", "content": said}, {"role": "assistant", "content": "yes"}]);
        (messages.to_string(), String::new())
    };
    write_rows(&bench.path("rows.parquet"), &[talk("refuse me"), talk("hello")]);
    let template = "{% for m in messages %}{% if m.content == 'refuse me' %}{{ raise_exception('no') }}{% endif %}\
                    {{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}\
                    {{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content + eos_token }}{% endif %}\
                    {{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    std::fs::write(bench.path("refusing.jinja"), template).unwrap();
    let talks = ["chat_template=refusing.jinja", "format=messages", "columns={messages: prompt}", "on_bad_row=skip"];
    let talks: Vec<String> = talks.iter().map(|typed| format!("--set=dataset.{typed}")).collect();
    let result = eval(&talks.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(json!([result["rows"], result["answers"], result["dropped"]]), json!([1, 1, 1]), "{result}");
}

#[test]
fn inspect_takes_the_names_that_other_verbs_take() {
    let bench = Bench::new("max_steps: 1");
    std::fs::create_dir(bench.path("rows")).unwrap();
    for name in ["a.parquet", "b.parquet"] {
        std::fs::copy(bench.path("train.parquet"), bench.path("rows").join(name)).unwrap();
    }
    for name in ["rows", "rows/*.parquet"] {
        let facts: Value = serde_json::from_str(&bench.succeed(&["inspect", name, "--json"])).unwrap();
        assert_eq!(json!([facts["files"], facts["rows"]]), json!([2, 80]), "{facts}");
        assert_eq!(facts["first_row"], "prompt: add 0 and 0\ncompletion:  gives 0");
    }
    bench.fail(&["inspect", "none.gguf"], 5, &["models/none.gguf"]);
    bench.fail(&["inspect", "cache"], 5, &["cache"]);
    // Nobody listens there: that the hub was asked is what is seen.
    let mut hub = bench.command(&["inspect", "owner/name"]);
    let hub = hub.env("HF_ENDPOINT", "http://127.0.0.1:9").env("HF_HOME", bench.path("hub")).output().unwrap();
    assert_eq!(hub.status.code(), Some(11), "{}", String::from_utf8_lossy(&hub.stderr));
}

#[test]
fn a_run_killed_at_random_moments_ends_bit_identical() {
    let bench = Bench::new("max_steps: 30, save_steps: 2, eval_steps: 10, threads: 1");
    bench.succeed(&["train", "recipe.yaml", "--set", "output.dir=whole"]);
    let expected = bench.result("whole");
    let arguments = ["train", "recipe.yaml", "--resume", "--quiet"];
    // Kills later and later into the run, in saves as likely as in steps; the last one is left to finish.
    for pause in [150, 220, 260, 310, 370, 430] {
        let mut child = bench.command(&arguments).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(pause));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    bench.succeed(&arguments);
    let found = bench.result("run");
    assert_eq!(found.0, expected.0, "the loss series");
    assert!(found.1 == expected.1, "the adapter's bytes");
    bench.fail(&["train", "recipe.yaml", "--resume", "--set", "training.learning_rate=1e-3"], 7, &["learning_rate"]);
    bench.fail(&["train", "recipe.yaml"], 6, &["--resume", "--overwrite"]);
}

/// What an adapter may be beside plain LoRA, all at once: what is worked out of the weights, quantised, trained whole.
#[test]
fn two_deterministic_runs_are_one_bit_for_bit() {
    let bench = Bench::new("max_steps: 6, eval_steps: 3, threads: 2, deterministic: true");
    let runs = ["one", "other"].map(|run| {
        let said = bench.engraft(&["train", "recipe.yaml", "--set", &format!("output.dir={run}")]);
        let said = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(said.contains("deterministic: nothing: on the CPU every run is"), "{said}");
        bench.result(run)
    });
    assert!(runs[0] == runs[1]);
    assert!(bench.succeed(&["plan", "recipe.yaml"]).contains("deterministic at no cost"));
}

#[test]
fn an_adapter_of_every_kind_goes_on_where_it_was_and_is_the_same_to_export_eval_and_merge() {
    let bench = Bench::new("max_steps: 12, save_steps: 2, threads: 1");
    let kinds = [
        "adapter.method=qlora",
        "adapter.init_lora_weights=pissa",
        "adapter.use_dora=true",
        "adapter.trainable_token_indices=[5, 6]",
        "adapter.modules_to_save=[v_proj]",
        "adapter.exclude_modules=[v_proj]",
    ];
    let set: Vec<&str> = kinds.iter().flat_map(|kind| ["--set", kind]).collect();
    let with = |arguments: &[&'static str]| [arguments, &set].concat();
    bench.succeed(&with(&["train", "recipe.yaml", "--set", "output.dir=whole"]));
    let expected = bench.result("whole");
    let mut child = bench.command(&with(&["train", "recipe.yaml", "--quiet"])).spawn().unwrap();
    while !bench.path("run/state").read_dir().is_ok_and(|mut states| states.next().is_some()) {
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    bench.succeed(&with(&["train", "recipe.yaml", "--resume"]));
    let found = bench.result("run");
    assert_eq!(found.0, expected.0, "the loss series");
    assert!(found.1 == expected.1, "the adapter's bytes");
    std::fs::remove_dir_all(bench.path("run/adapter")).unwrap();
    bench.succeed(&with(&["export", "recipe.yaml", "--save", "adapter"]));
    assert!(bench.result("run").1 == expected.1, "exported anew");

    let config: Value =
        serde_json::from_slice(&std::fs::read(bench.path("run/adapter/adapter_config.json")).unwrap()).unwrap();
    assert_eq!([&config["r"], &config["lora_alpha"]], [&json!(8), &json!(16)], "on the base as it was");
    assert_eq!([&config["use_dora"], &config["modules_to_save"]], [&json!(true), &json!(["v_proj"])]);
    let loss = |arguments: &[&str]| {
        let result: Value = serde_json::from_str(&bench.succeed(arguments)).unwrap();
        result["loss"].as_f64().unwrap()
    };
    let adapted = loss(&with(&["eval", "recipe.yaml", "--json"]));
    bench.succeed(&["merge", "--model", "base", "--adapter", "run/adapter", "--out", "merged", "--dtype", "fp32"]);
    for merged in ["base_model=merged", "base_model=run/merged"] {
        let merged = loss(&["eval", "recipe.yaml", "--json", "--base", "--set", merged, "--set", "output.dir=other"]);
        assert!((merged - adapted).abs() < 1e-4 * adapted, "{merged} merged, {adapted} adapted");
    }
    let base = loss(&["eval", "recipe.yaml", "--json", "--base"]);
    assert!(adapted < 0.9 * base, "{adapted} adapted, {base} before");
}

#[test]
fn new_tokens_join_the_tokenizer_the_adapter_and_the_merged_model() {
    let bench = Bench::new("max_steps: 12, threads: 1");
    let set = ["--set", "adapter.new_tokens=[' gives ', <a>, <b>, <c>, <d>, <e>, <f>, <end>]"];
    let with = |arguments: &[&'static str]| [arguments, &set].concat();
    bench.succeed(&with(&["train", "recipe.yaml"]));
    let read = |path: &str| -> Value { serde_json::from_slice(&std::fs::read(bench.path(path)).unwrap()).unwrap() };
    let tokens = read("run/adapter/tokenizer.json")["added_tokens"].as_array().unwrap().clone();
    let ids: Vec<i64> = tokens.iter().rev().take(8).rev().map(|token| token["id"].as_i64().unwrap()).collect();
    assert_eq!(tokens[tokens.len() - 8]["content"], " gives ");
    assert_eq!(read("run/adapter/adapter_config.json")["trainable_token_indices"], json!(ids));
    assert_eq!(
        read("run/merged/config.json")["vocab_size"],
        json!(ids[7] + 1),
        "more than the {VOCABULARY} of the base"
    );
    let loss = |arguments: &[&str]| {
        let result: Value = serde_json::from_str(&bench.succeed(arguments)).unwrap();
        result["loss"].as_f64().unwrap()
    };
    let adapted = loss(&with(&["eval", "recipe.yaml", "--json"]));
    bench.succeed(&["merge", "--model", "base", "--adapter", "run/adapter", "--out", "merged", "--dtype", "fp32"]);
    for merged in ["base_model=merged", "base_model=run/merged"] {
        let merged = loss(&["eval", "recipe.yaml", "--json", "--base", "--set", merged, "--set", "output.dir=other"]);
        assert!((merged - adapted).abs() < 1e-4 * adapted, "{merged} merged, {adapted} adapted");
    }
    let one =
        ["generate", "--model", "base", "--adapter", "run/adapter", "--prompt", "add 3 and 4", "--max-tokens", "4"];
    let two = ["generate", "--model", "merged", "--prompt", "add 3 and 4", "--max-tokens", "4"];
    assert_eq!(bench.succeed(&one), bench.succeed(&two));
    let again = ["train", "recipe.yaml", "--set", "output.dir=again", "--set", "base_model=merged", set[0], set[1]];
    bench.fail(&again, 3, &["is a token already", "trainable_token_indices"]);
}

#[test]
fn sigterm_saves_a_state_and_says_how_to_go_on() {
    let bench = Bench::new("max_steps: 100000, logging_steps: 1000");
    let child = bench
        .command(&["train", "recipe.yaml", "--json"])
        .stderr(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let begun = bench.path("run/metrics.jsonl");
    while !begun.exists() {
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_millis(300));
    // SAFETY of the number: the child has not been waited for, so its id is still its own.
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(75), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--resume"));
    let last = events(&output.stdout).pop().unwrap();
    assert_eq!((&last["event"], &last["code"]), (&json!("error"), &json!(75)));
    bench.succeed(&["export", "recipe.yaml", "--save", "adapter"]);
    assert!(bench.path("run/adapter/adapter_model.safetensors").exists());
}

#[test]
fn what_is_wrong_ends_with_its_code_and_leaves_nothing_behind() {
    let bench = Bench::new("max_steps: 2");
    let base_config = std::fs::read_to_string(bench.path("base/config.json")).unwrap();
    let set = |value: &str| format!("--set={value}");
    let train = |value: &str| ["train".to_string(), "recipe.yaml".into(), set(value)];
    let cases: [(&str, i32, &[&str]); 9] = [
        ("training.learning_rat=1", 3, &["learning_rate"]),
        ("adapter.r=0", 3, &["adapter.r"]),
        ("adapter.target_modules=[q_prj]", 3, &["q_prj"]),
        ("dataset.train=nothing.parquet", 3, &["nothing.parquet"]),
        ("dataset.columns={prompt: quest}", 4, &["quest"]),
        ("dataset.format=messages", 4, &["messages"]),
        ("base_model=missing-model", 3, &["missing-model"]),
        ("base_model=weights.bin", 3, &["weights.bin"]),
        ("device=cuda", 8, &[]),
    ];
    for (value, code, parts) in cases {
        if value == "device=cuda" && tch::Cuda::is_available() {
            continue;
        }
        let arguments = train(value);
        bench.fail(&arguments.each_ref().map(String::as_str), code, parts);
    }
    std::fs::write(bench.path("base/config.json"), base_config.replace("\"llama\"", "\"mamba\"")).unwrap();
    bench.fail(&["train", "recipe.yaml"], 5, &["mamba", "llama"]);
    std::fs::write(bench.path("base/config.json"), base_config.replace("\"hidden_size\":32", "\"hidden_size\":40"))
        .unwrap();
    bench.fail(&["train", "recipe.yaml"], 5, &["40"]);
    std::fs::write(bench.path("base/config.json"), &base_config).unwrap();
    let weights = std::fs::read(bench.path("base/model.safetensors")).unwrap();
    std::fs::write(bench.path("base/model.safetensors"), &weights[..weights.len() - 2]).unwrap();
    bench.fail(&["train", "recipe.yaml"], 5, &["model.safetensors"]);
    std::fs::write(bench.path("base/model.safetensors"), &weights).unwrap();
    let rows = std::fs::read(bench.path("train.parquet")).unwrap();
    std::fs::write(bench.path("train.parquet"), &rows[..rows.len() / 2]).unwrap();
    bench.fail(&["train", "recipe.yaml"], 4, &["train.parquet"]);
    assert!(!bench.path("run").exists(), "the folder of a run that never began was left behind");

    // Nor is anything taken away from the run before, or made, by what is refused.
    std::fs::write(bench.path("train.parquet"), &rows).unwrap();
    bench.succeed(&["train", "recipe.yaml"]);
    std::fs::write(bench.path("base/model.safetensors"), &weights[..weights.len() - 2]).unwrap();
    bench.fail(&["train", "recipe.yaml", "--overwrite"], 5, &["model.safetensors"]);
    for kept in ["run/state/step-000002", "run/metrics.jsonl", "run/report.html", "run/manifest.json"] {
        assert!(bench.path(kept).exists(), "{kept} was removed");
    }
    bench.fail(&["train", "recipe.yaml", "--set", "output.dir=deep/er/run"], 5, &["model.safetensors"]);
    bench.fail(&["export", "recipe.yaml", "--set", "output.dir=deep/er/run"], 7, &["no saved state"]);
    assert!(!bench.path("deep").exists());
}

/// Rows of fp8 are the same, made while the base is loaded or stored so before; an adapter says which it was trained on.
#[test]
fn a_base_in_fp8_trains_alike_quantised_on_the_way_and_stored() {
    let bench = Bench::new("max_steps: 4, eval_steps: 2");
    let train = |run: &str, more: &[&str]| {
        let dir = format!("output.dir={run}");
        let own = ["train", "recipe.yaml", "--set", "adapter.method=qlora", "--set", &dir];
        bench.succeed(&[&own[..], more].concat());
        let said = std::fs::read(bench.path(run).join("adapter/base_quantization.json")).unwrap();
        serde_json::from_slice::<Value>(&said).unwrap()
    };
    let said =
        train("on-the-way", &["--set", "quantization.type=fp8", "--set", "quantization.cache_dequantized=never"]);
    assert_eq!((&said["type"], &said["skip"], &said["dtype"]), (&json!("fp8"), &json!(["lm_head"]), &json!("fp32")));
    let (digests, stored) = (said["weights"].as_object().unwrap().clone(), &said["stored"]);
    assert_eq!((digests.len(), stored), (14, &Value::Null));
    bench.succeed(&["quantize", "--model", "base", "--out", "stored", "--type", "fp8", "--dtype", "fp32"]);
    let config: Value = serde_json::from_slice(&std::fs::read(bench.path("stored/config.json")).unwrap()).unwrap();
    assert_eq!(config["quantization_config"]["quant_method"], "compressed-tensors");
    let said = train("stored-run", &["--set", "base_model=stored", "--set", "quantization.cache_dequantized=never"]);
    assert_eq!(said["type"], "compressed-tensors");
    assert_eq!(said["stored"], "F8_E4M3 with scales in F32 to each row");
    assert_eq!(said["weights"].as_object().unwrap(), &digests);
    assert_eq!(bench.result("on-the-way"), bench.result("stored-run"));

    let [one, other] = [("base", "on-the-way"), ("stored", "stored-run")].map(|(base, run)| {
        let (adapter, out) = (format!("{run}/adapter"), format!("merged-{run}"));
        bench.succeed(&["merge", "--model", base, "--adapter", &adapter, "--out", &out, "--dtype", "fp32"]);
        std::fs::read(bench.path(&out).join("model.safetensors")).unwrap()
    });
    assert!(one == other, "merged onto the same numbers");
    let merge = ["merge", "--model", "base", "--adapter", "stored-run/adapter", "--out", "other"];
    bench.fail(&merge, 5, &["trained on a base that is stored as compressed-tensors", "--onto original"]);
    std::fs::write(bench.path("probes.txt"), "add 3 and 4\n").unwrap();
    let probed = [&merge[..], &["--onto", "original", "--probe", "probes.txt"]].concat();
    bench.fail(&probed, 5, &["--probe", "stored as compressed-tensors"]);
    bench.succeed(&[&merge[..], &["--onto", "original"]].concat());
    bench.fail(&["quantize", "--model", "stored", "--out", "again"], 5, &["is quantised already"]);
    let as_nf4 = ["train", "recipe.yaml", "--set", "adapter.method=qlora", "--set", "base_model=stored"];
    for start in ["loftq", "pissa"] {
        let start = format!("adapter.init_lora_weights={start}");
        let start = [&as_nf4[..], &["--set", &start, "--set", "output.dir=start"]].concat();
        bench.fail(&start, 3, &["adapter.init_lora_weights", "stored as compressed-tensors"]);
    }
    let as_nf4 = [&as_nf4[..], &["--set", "quantization.type=nf4", "--set", "output.dir=nf4"]].concat();
    bench.fail(
        &as_nf4,
        3,
        &["the base is stored quantised as compressed-tensors, nf4", "leave `quantization.type` out"],
    );
}

/// Of the base's small files, which are known by their names to those who read them.
#[test]
fn a_fault_in_a_small_file_of_the_base_names_its_path() {
    let bench = Bench::new("max_steps: 2");
    for (file, from, to, verb) in [
        ("config.json", "\"hidden_size\":32", "\"hidden_size\":-1", "train"),
        ("config.json", "\"llama\"", "\"llama\",\"quantization_config\":{\"quant_method\":\"aqlm\"}", "train"),
        (
            "config.json",
            "\"llama\"",
            "\"llama\",\"quantization_config\":{\"quant_method\":\"fp8\",\"weight_block_size\":3}",
            "preview",
        ),
        ("tokenizer.json", "{", "[", "train"),
        ("tokenizer.json", "{", "[", "preview"),
        ("tokenizer_config.json", "{", "[", "train"),
    ] {
        let path = bench.path("base").join(file);
        let good = std::fs::read_to_string(&path).unwrap();
        assert!(good.contains(from), "{file} lacks {from}");
        std::fs::write(&path, good.replace(from, to)).unwrap();
        bench.fail(&[verb, "recipe.yaml"], 5, &[&format!("error: {}", path.display())]);
        std::fs::write(&path, good).unwrap();
    }
}

/// The events of a run's standard output.
fn events(out: &[u8]) -> Vec<Value> {
    std::str::from_utf8(out).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_program_reads_what_was_left_out_what_was_written_and_what_went_wrong() {
    let bench = Bench::new("max_steps: 4, logging_steps: 2, warmup_steps: 4");
    let row = |text: &str| (text.to_string(), " gives".to_string());
    write_rows(&bench.path("eval.parquet"), &[row("add 1"), row(&"add ".repeat(200))]);
    let output = bench.engraft(&["train", "recipe.yaml", "--json"]);
    let told = events(&output.stdout);
    let kinds: Vec<&str> = told.iter().map(|event| event["event"].as_str().unwrap()).collect();
    let expected = [
        "dataset",
        "dataset",
        "memory_plan",
        "notice",
        "start",
        "step",
        "step",
        "eval",
        "state",
        "end",
        "memory",
        "wrote",
        "wrote",
    ];
    assert_eq!(kinds, expected, "{told:?}");
    assert_eq!([&told[0]["set"], &told[0]["rows"], &told[0]["dropped"]], [&json!("training"), &json!(40), &json!(0)]);
    assert_eq!([&told[1]["set"], &told[1]["rows"], &told[1]["dropped"]], [&json!("eval"), &json!(2), &json!(1)]);
    assert!(told[3]["message"].as_str().unwrap().contains("warmup of 4 steps"));
    assert!(told[11]["path"].as_str().unwrap().ends_with("run/adapter"));
    assert_eq!(told[10]["planned_bytes"], told[2]["peak"]);
    assert!(told[10]["measured_bytes"].as_u64().unwrap() > 0);
    let manifest: Value = serde_json::from_slice(&std::fs::read(bench.path("run/manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["datasets"]["eval"]["overlong"]["count"], 1);
    assert_eq!(manifest["datasets"]["training"]["rows"], 40);
    let report = std::fs::read_to_string(bench.path("run/report.html")).unwrap();
    assert!(report.contains("adapter.r</td><td>4") && report.contains("1 row(s) left out, longer than max_length"));

    let refused = bench.engraft(&["train", "recipe.yaml", "--json", "--set", "adapter.r=0", "--set", "dtype=f"]);
    let told = events(&refused.stdout);
    assert_eq!((refused.status.code(), told.len()), (Some(3), 2), "{told:?}");
    assert!(told.iter().all(|event| event["event"] == "error" && event["code"] == 3 && event["place"] != ""));
    let refused = bench.engraft(&["train", "recipe.yaml", "--json"]);
    let told = events(&refused.stdout);
    assert_eq!(told.last().unwrap()["code"], 6);
    assert!(told.last().unwrap()["hint"].as_str().unwrap().contains("--overwrite"), "{told:?}");

    // A person reads the same.
    let output = bench.engraft(&["train", "recipe.yaml", "--overwrite"]);
    let said = String::from_utf8(output.stderr).unwrap();
    let eval = said.split_once("eval set:").expect("the eval set is reported").1;
    assert!(eval.contains("1 row(s) left out, longer than max_length"), "{said}");
}

#[test]
fn a_plan_says_what_training_will_take_before_anything_is_loaded() {
    let bench = Bench::new("max_steps: 3");
    let text = bench.succeed(&["plan", "recipe.yaml"]);
    for part in
        ["not tokenised yet", "measured just now", "it fits", "all 2 keep their activations", "to a step of 2 rows"]
    {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
    let plan = |more: &[&str]| -> Value {
        serde_json::from_str(&bench.succeed(&[&["plan", "recipe.yaml", "--json"], more].concat())).unwrap()
    };
    assert_eq!(plan(&[])["lengths_from"], "dataset.max_length");
    let told = events(&bench.engraft(&["train", "recipe.yaml", "--json"]).stdout);
    let known = plan(&[]);
    assert_eq!((&known["lengths_from"], &known["lengths"]["documents"]), (&json!("token cache"), &json!(40.0)));
    assert_eq!(known["memory"]["peak"], told[2]["peak"], "one plan serves both");
    assert_eq!((&known["layers"], &known["speed"]["steps"]), (&json!(["save", "save"]), &json!(3)));
    assert_eq!(known["largest_micro_batch"]["micro_batch_size"], 2);
    let card = plan(&["--gpu", "4090", "--set", "training.recompute=full"]);
    assert_eq!((&card["machine"]["name"], &card["layers"]), (&json!("RTX 4090"), &json!(["recompute", "recompute"])));
    assert!(card["speed"]["total_seconds"].as_f64().unwrap() > 0.0);
    let unknown = bench.engraft(&["plan", "recipe.yaml", "--gpu", "gtx"]);
    let said = String::from_utf8_lossy(&unknown.stderr);
    assert!(unknown.status.code() == Some(2) && said.contains("figures are known are b200, h200, h100"), "{said}");
}

#[test]
fn a_micro_batch_left_to_the_plan_trains_the_same_and_a_resumed_run_keeps_it() {
    let bench = Bench::new("max_steps: 3, save_steps: 1, save_total_limit: 9");
    let recipe = std::fs::read_to_string(bench.path("recipe.yaml")).unwrap();
    let recipe = recipe.replace("gradient_accumulation_steps: 2, ", "").replace("lora_dropout: 0.1", "lora_dropout: 0");
    std::fs::write(bench.path("recipe.yaml"), recipe).unwrap();
    let run = |more: &[&str]| {
        let output = bench.engraft(&[&["train", "recipe.yaml"], more].concat());
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{said}");
        said
    };
    let losses = |folder: &str| -> Vec<f64> {
        let metrics = std::fs::read_to_string(bench.path(folder).join("metrics.jsonl")).unwrap();
        metrics.lines().filter_map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64()).collect()
    };
    run(&["--set", "training.global_batch_size=2", "--set", "output.dir=one"]);
    let auto = ["--set", "training.micro_batch_size=auto", "--set", "training.global_batch_size=2"];
    let said = run(&auto);
    assert!(said.contains("micro-batches of 2 rows, 1 to a step\n"), "{said}");
    for (one, whole) in losses("one").iter().zip(losses("run")) {
        assert!((one - whole).abs() < 1e-4, "{one} {whole}");
    }
    let finished = bench.result("run");
    std::fs::remove_dir_all(bench.path("run/state/step-000003")).unwrap();
    let said = run(&[&auto[..], &["--resume"]].concat());
    assert!(said.contains("micro-batches of 2 rows, 1 to a step, as the run began"), "{said}");
    assert!(bench.result("run") == finished, "it ends as before");
}

#[test]
fn a_run_that_diverges_ends_with_9_and_writes_no_adapter() {
    let bench = Bench::new("max_steps: 3");
    bench.fail(&["train", "recipe.yaml", "--set", "training.learning_rate=1e30"], 9, &["step 3", "state/step-000003"]);
    assert!(!bench.path("run/adapter").exists());
}

#[test]
fn export_writes_the_adapter_that_training_took_and_refuses_another_base_or_eval_set() {
    let bench = Bench::new("max_steps: 8, eval_steps: 2, load_best_model_at_end: true, lr_scheduler: constant");
    // Answers that the training rows speak against, at so high a rate that this shows soon.
    write_rows(&bench.path("eval.parquet"), &[("add 1 and 1".into(), "??? !!! ??? !!!".into())]);
    let rate = ["--set", "training.learning_rate=0.3"];
    bench.succeed(&[&["train", "recipe.yaml", "--set", "output.save=[adapter]"], &rate[..]].concat());
    let manifest = || -> Value {
        let mut manifest: Value =
            serde_json::from_slice(&std::fs::read(bench.path("run/manifest.json")).unwrap()).unwrap();
        manifest["metrics"]["seconds"] = Value::Null;
        manifest
    };
    let (trained, adapter) = (manifest(), bench.result("run").1);
    let metrics = &trained["metrics"];
    assert!(metrics["taken"].as_u64() < metrics["steps"].as_u64(), "the best is not the last: {metrics}");

    bench.succeed(&[&["export", "recipe.yaml", "--save", "merged"], &rate[..]].concat());
    let exported = manifest();
    assert_eq!(exported["metrics"], *metrics);
    let listed: Vec<&str> =
        exported["outputs"].as_array().unwrap().iter().map(|output| output["path"].as_str().unwrap()).collect();
    for file in ["adapter/adapter_model.safetensors", "merged/model.safetensors"] {
        assert_eq!(listed.iter().filter(|listed| **listed == file).count(), 1, "{file}: {listed:?}");
    }
    bench.succeed(&[&["export", "recipe.yaml", "--save", "adapter"], &rate[..]].concat());
    assert!(bench.result("run").1 == adapter, "the best adapter is not written over");
    // But for the card, which says when.
    let outputs = |manifest: &Value| -> Vec<Value> {
        let all = manifest["outputs"].as_array().unwrap().iter();
        all.filter(|output| !output["path"].as_str().unwrap().ends_with("README.md")).cloned().collect()
    };
    assert_eq!(outputs(&manifest()), outputs(&exported));

    let export = [&["export", "recipe.yaml"], &rate[..]].concat();
    let resume = [&["train", "recipe.yaml", "--resume"], &rate[..]].concat();
    let held_out = std::fs::read(bench.path("eval.parquet")).unwrap();
    write_rows(&bench.path("eval.parquet"), &[("add 1 and 1".into(), " gives 3".into())]);
    for arguments in [&export, &resume] {
        bench.fail(arguments, 7, &["the eval set has changed"]);
    }
    std::fs::write(bench.path("eval.parquet"), held_out).unwrap();
    let mut weights = std::fs::read(bench.path("base/model.safetensors")).unwrap();
    *weights.last_mut().unwrap() ^= 1;
    std::fs::write(bench.path("base/model.safetensors"), weights).unwrap();
    for arguments in [&export, &resume] {
        bench.fail(arguments, 7, &["the base model has changed"]);
    }
}

#[test]
fn a_signal_ends_a_run_at_once_that_has_nothing_to_save_yet() {
    let bench = Bench::new("max_steps: 2");
    // A hub that never answers.
    let hub = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut command = bench.command(&["train", "recipe.yaml", "--quiet", "--set", "base_model=tiny/base"]);
    command.env_remove("HF_HUB_OFFLINE").env_remove("TRANSFORMERS_OFFLINE");
    command.env("HF_ENDPOINT", format!("http://{}", hub.local_addr().unwrap())).env("HF_HOME", bench.path("hub"));
    let mut child = command.spawn().unwrap();
    let _connection = hub.accept().unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM).unwrap();
    for _ in 0..500 {
        if let Some(status) = child.try_wait().unwrap() {
            return assert!(!status.success());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    panic!("the signal was not heard");
}

#[test]
fn a_hub_models_commit_is_written_down_not_its_branch() {
    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
    let bench = Bench::new("max_steps: 1");
    let repository = bench.path("hub/hub/models--tiny--base");
    std::fs::create_dir_all(repository.join("refs")).unwrap();
    std::fs::create_dir_all(repository.join("snapshots")).unwrap();
    std::fs::write(repository.join("refs/main"), COMMIT).unwrap();
    std::fs::rename(bench.path("base"), repository.join("snapshots").join(COMMIT)).unwrap();
    let overrides = ["--set", "base_model=tiny/base", "--set", "output.base_model_name_or_path=null"];
    let mut command =
        bench.command(&[&["train", "recipe.yaml", "--set", "output.save=[adapter]"], &overrides[..]].concat());
    for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"] {
        command.env_remove(name);
    }
    let output = command.env("HF_HOME", bench.path("hub")).env("HF_HUB_OFFLINE", "1").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let json = |name: &str| -> Value { serde_json::from_slice(&std::fs::read(bench.path(name)).unwrap()).unwrap() };
    assert_eq!(json("run/manifest.json")["base"]["revision"], COMMIT);
    assert_eq!(json("run/adapter/adapter_config.json")["revision"], COMMIT);
}

/// `--set` for each.
fn settings<'a>(values: &[&'a str]) -> Vec<&'a str> {
    values.iter().flat_map(|value| ["--set", value]).collect()
}

const QLORA: &str = "adapter.method=qlora";

/// Products of fp8 codes are another arithmetic than those of the numbers they stand for, and near it.
#[test]
fn an_adapter_trains_on_products_of_fp8_numbers_and_its_recipe_says_what_they_need() {
    let bench = Bench::new("max_steps: 12");
    let fp8 = [QLORA, "quantization.type=fp8", "dtype=bf16", "output.save=[adapter]"];
    let losses = |more: &[&str]| -> Vec<f64> {
        bench.succeed(&[&["train", "recipe.yaml"], &settings(&[&fp8, more].concat())[..]].concat());
        bench.result("run").0.iter().filter_map(|line| line[1].as_f64()).collect()
    };
    let whole = losses(&["output.dir=run"]);
    std::fs::remove_dir_all(bench.path("run")).unwrap();
    let multiplied = losses(&["quantization.compute=fp8"]);
    assert_eq!(whole.len(), multiplied.len());
    let apart = whole.iter().zip(&multiplied).map(|(whole, own)| (whole - own).abs() / whole).fold(0.0, f64::max);
    assert!(apart > 1e-6 && apart < 0.05, "{whole:?} {multiplied:?}");
    let refused = |set: &[&str], words: &[&str]| {
        bench.fail(&[&["validate", "recipe.yaml"], &settings(set)[..]].concat(), 3, words);
    };
    let nf4 = [QLORA, "quantization={type: nf4, compute: fp8}", "dtype=bf16"];
    refused(&nf4, &["quantization.type: fp8", "nf4"]);
    // Without a type, it is the base that says whether it is stored so.
    let unsaid = [QLORA, "quantization.compute=fp8", "dtype=bf16", "output.dir=stored", "output.save=[adapter]"];
    let train = |base: &'static str| [&["train", "recipe.yaml", "--set", base], &settings(&unsaid)[..]].concat();
    bench.fail(&train("base_model=base"), 3, &["quantization.compute", "kept as nf4", "quantization.type: fp8"]);
    bench.succeed(&["quantize", "--model", "base", "--out", "eight", "--type", "int8", "--dtype", "bf16"]);
    bench.fail(&train("base_model=eight"), 3, &["quantization.compute", "kept as int8"]);
    bench.succeed(&["quantize", "--model", "base", "--out", "rows", "--type", "fp8", "--dtype", "bf16"]);
    bench.succeed(&train("base_model=rows"));
    let stored: Vec<f64> = bench.result("stored").0.iter().filter_map(|line| line[1].as_f64()).collect();
    // Norms are stored in bf16 there, and read in fp32.
    let apart = stored.iter().zip(&multiplied).map(|(stored, own)| (stored - own).abs() / own).fold(0.0, f64::max);
    assert!(stored.len() == multiplied.len() && apart < 0.02, "{stored:?} {multiplied:?}");
    refused(&[QLORA, "quantization.type=fp8", "quantization.compute=fp8", "dtype=fp32"], &["dtype: bf16", "fp32"]);
    let cached = "quantization.cache_dequantized=always";
    refused(&[&fp8[..], &["quantization.compute=fp8", cached]].concat(), &["cache_dequantized"]);
}

#[test]
fn a_merge_says_how_far_it_is_from_what_was_trained_and_what_quantising_took_away() {
    let bench = Bench::new("max_steps: 12");
    bench.succeed(&[&["train", "recipe.yaml"], &settings(&[QLORA, "output.save=[adapter]"])[..]].concat());
    std::fs::write(bench.path("prompts.txt"), "add 1 and 2\n\nadd 3 and 4\n").unwrap();
    let merge = |out: &str, more: &[&str]| -> Value {
        let merge = ["merge", "--model", "base", "--adapter", "run/adapter", "--json", "--out", out];
        let said: Value = serde_json::from_str(&bench.succeed(&[&merge[..], more].concat())).unwrap();
        let written: Value =
            serde_json::from_slice(&std::fs::read(bench.path(out).join("manifest.json")).unwrap()).unwrap();
        assert_eq!(said, written);
        said
    };
    let number = |said: &Value, of: &str, key: &str| said[of][key].as_f64().unwrap_or_else(|| panic!("{said}"));
    let largest = |said: &Value| number(said, "drift", "max_logit_difference");

    let exact = merge("exact", &[]);
    assert_eq!(
        (&exact["onto"], &exact["dtype"], &exact["drift"]["prompts"]),
        (&json!("dequantized"), &json!("fp32"), &json!(8))
    );
    assert!(largest(&exact) < 1e-4 && exact["drift"]["greedy_agreement"] == 1.0 && exact["drift"]["same_answers"] == 8);
    assert_eq!(exact["trained_on"]["type"], "nf4");
    let rounded = merge("rounded", &["--probe", "prompts.txt", "--dtype", "bf16"]);
    assert_eq!(rounded["drift"]["prompts"], 2);
    assert!(largest(&rounded) > 10.0 * largest(&exact), "{rounded}");
    let other = merge("other", &["--onto", "original"]);
    assert!(largest(&other) > 3.0 * largest(&rounded), "{other}");
    assert!(number(&other, "drift", "greedy_agreement") < 1.0, "{other}");

    let again = merge("again", &["--probe", "prompts.txt", "--quantize", "nf4", "--block-size", "32"]);
    assert_eq!(again["quantization"]["block_size"], 32);
    let losses = again["quantization_loss"]["tensors"].as_object().unwrap();
    assert_eq!(losses.len(), 14);
    let of = |key| number(&again, "quantization_loss", key);
    assert!(of("mean") > 0.03 && of("mean") < of("worst") && of("worst") < 0.2, "{again}");
    assert_eq!(losses[again["quantization_loss"]["worst_tensor"].as_str().unwrap()], of("worst"));
    assert!(largest(&again) > 3.0 * largest(&rounded), "{again}");
    // Merged and then quantised, the model has the same bytes.
    let quantize = ["quantize", "--model", "exact", "--out", "after", "--block-size", "32", "--dtype", "fp32"];
    bench.succeed(&quantize);
    let bytes = |folder: &str| std::fs::read(bench.path(folder).join("model.safetensors")).unwrap();
    assert!(bytes("again") == bytes("after"));
    let config = |folder: &str| std::fs::read_to_string(bench.path(folder).join("config.json")).unwrap();
    assert_eq!(config("again"), config("after"));

    assert_eq!(merge("unasked", &["--no-probe"])["drift"], "not measured: --no-probe");
    let fail = |more: &[&str], code, parts: &[&str]| {
        let merge = ["merge", "--model", "base", "--adapter", "run/adapter", "--out", "none"];
        bench.fail(&[&merge[..], more].concat(), code, parts);
        assert!(!bench.path("none").exists());
    };
    std::fs::write(bench.path("long.txt"), format!("add\n{}\n", "0 1 2 ".repeat(100))).unwrap();
    fail(&["--probe", "long.txt"], 4, &["long.txt:2", "256"]);
    std::fs::write(bench.path("empty.txt"), "\n").unwrap();
    fail(&["--probe", "empty.txt"], 4, &["empty.txt", "0 prompts"]);
    fail(&["--block-size", "32"], 3, &["--block-size", "--quantize"]);
}

#[test]
fn a_model_merged_into_fp8_is_that_which_quantising_the_merged_one_gives() {
    let bench = Bench::new("max_steps: 6");
    bench.succeed(&[&["train", "recipe.yaml"], &settings(&[QLORA, "output.save=[adapter]"])[..]].concat());
    let merge = |out: &str, more: &[&str]| -> Value {
        let merge = ["merge", "--model", "base", "--adapter", "run/adapter", "--json", "--out", out];
        serde_json::from_str(&bench.succeed(&[&merge[..], more].concat())).unwrap()
    };
    merge("exact", &["--no-probe"]);
    let said = merge("eight", &["--quantize", "fp8"]);
    assert_eq!((&said["quantization"]["type"], &said["drift"]["prompts"]), (&json!("fp8"), &json!(8)));
    let mean = said["quantization_loss"]["mean"].as_f64().unwrap();
    // Three bits of mantissa: a 16th of a number at most, and less on average.
    assert!(mean > 0.01 && mean < 0.05 && said["drift"]["greedy_agreement"].as_f64().unwrap() > 0.8, "{said}");
    bench.succeed(&["quantize", "--model", "exact", "--out", "after", "--type", "fp8", "--dtype", "fp32"]);
    for file in ["model.safetensors", "config.json"] {
        let bytes = |folder: &str| std::fs::read(bench.path(folder).join(file)).unwrap();
        assert!(bytes("eight") == bytes("after"), "{file}");
    }
    // It is a base like any other: to ask, and to train on as it is stored.
    let generate = ["generate", "--model", "eight", "--raw", "--prompt", "add", "--max-tokens", "5"];
    bench.succeed(&generate);
    let on = settings(&[QLORA, "base_model=eight", "output.dir=on", "output.save=[adapter]"]);
    bench.succeed(&[&["train", "recipe.yaml"], &on[..]].concat());
    let trained_on: Value =
        serde_json::from_slice(&std::fs::read(bench.path("on/adapter/base_quantization.json")).unwrap()).unwrap();
    assert_eq!((&trained_on["type"], &trained_on["skip"]), (&json!("compressed-tensors"), &json!(["lm_head"])));
    bench.succeed(&["merge", "--model", "eight", "--adapter", "on/adapter", "--out", "plain", "--json"]);
}

#[test]
fn what_is_skipped_must_be_there_and_a_stored_base_says_itself_what_is_not_quantised() {
    let bench = Bench::new("max_steps: 1");
    let with = |values: &[&'static str]| [&["train", "recipe.yaml"], &settings(values)[..]].concat();
    let wrong = with(&[QLORA, "quantization={skip: [lm_hed]}"]);
    bench.fail(&wrong, 3, &["quantization.skip", "'lm_hed' is no linear", "q_proj", "lm_head"]);
    let quantize = |out, skip| ["quantize", "--model", "base", "--dtype", "fp32", "--out", out, "--skip", skip];
    bench.fail(&quantize("none", "gate"), 3, &["--skip", "'gate' is no linear"]);
    bench.succeed(&quantize("own", "v_proj"));
    // Trained on a base that leaves some linears as they were, merged onto the model it was made of: those stay so there, too.
    bench.succeed(&with(&[QLORA, "base_model=own", "output.save=[adapter]"]));
    for (base, out) in [("own", "one"), ("base", "two")] {
        bench.succeed(&["merge", "--model", base, "--adapter", "run/adapter", "--out", out, "--dtype", "fp32"]);
    }
    let bytes = |folder: &str| std::fs::read(bench.path(folder).join("model.safetensors")).unwrap();
    assert!(bytes("one") == bytes("two"));
}

#[test]
fn an_adapter_is_not_put_on_other_numbers_than_it_was_trained_on() {
    let bench = Bench::new("max_steps: 2");
    let with = |verb: &[&'static str], values: &[&'static str]| [verb, &settings(values)[..]].concat();
    let nf4 = [QLORA, "output.save=[adapter]"];
    let fp4 = [QLORA, "quantization={type: fp4}"];
    bench.succeed(&with(&["train", "recipe.yaml"], &nf4));
    bench.succeed(&with(&["train", "recipe.yaml"], &["output.dir=plain", "output.save=[adapter]"]));

    // Each by name, and what to write.
    let way_out = "quantization: {type: nf4, double_quant: true, block_size: 64, skip: [lm_head]}";
    let theirs = "nf4 in blocks of 64 with quantised scales, of numbers in fp32";
    let eval = ["eval", "recipe.yaml", "--adapter", "run/adapter"];
    bench.fail(&eval, 5, &["run/adapter", theirs, "not quantised, in fp32", way_out]);
    bench.fail(&with(&eval, &fp4), 5, &[theirs, "fp4 in blocks of 64", way_out]);
    bench.fail(&with(&eval, &[QLORA, "dtype=bf16"]), 5, &[theirs, "of numbers in bf16"]);
    bench.succeed(&with(&eval, &[QLORA]));
    let continued =
        ["train", "recipe.yaml", "--set", "adapter.adapter_name_or_path=run/adapter", "--set", "output.dir=on"];
    bench.fail(&continued, 5, &[theirs, "not quantised, in fp32", way_out]);
    bench.fail(&with(&continued, &fp4), 5, &[theirs, "fp4 in blocks of 64", way_out]);
    assert!(!bench.path("on").exists());
    bench.succeed(&with(&continued, &nf4));

    // One that says nothing may have been trained on either.
    let output = bench.engraft(&with(&["eval", "recipe.yaml", "--adapter", "plain/adapter"], &[QLORA]));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("does not say that it was trained on a quantised base"), "{said}");

    // Resumed with other numbers; how they are kept is free.
    let resume = ["train", "recipe.yaml", "--resume"];
    let other = [QLORA, "output.save=[adapter]", "quantization={double_quant: false}"];
    bench.fail(&with(&resume, &other), 7, &["quantization"]);
    bench.fail(&with(&resume, &["output.save=[adapter]"]), 7, &["adapter.method", "qlora"]);

    // The base stored in another form than the adapter's.
    bench.succeed(&["quantize", "--model", "base", "--out", "base4", "--type", "fp4", "--dtype", "fp32"]);
    let (mine, stored) = ("nf4 in blocks of 64 with quantised scales", "fp4 in blocks of 64 with quantised scales");
    let generate = ["generate", "--model", "base4", "--adapter", "run/adapter", "--raw", "--prompt", "add"];
    bench.fail(&generate, 5, &["run/adapter", mine, stored]);
    bench.fail(&["merge", "--model", "base4", "--adapter", "run/adapter", "--out", "m"], 5, &[mine, stored]);
    // In its own form, made of other numbers, or of other linears.
    bench.succeed(&["quantize", "--model", "base", "--out", "of-bf16", "--dtype", "bf16"]);
    let left = ["--dtype", "fp32", "--skip", "lm_head", "--skip", "v_proj"];
    bench.succeed(&[&["quantize", "--model", "base", "--out", "left"], &left[..]].concat());
    let words =
        [("of-bf16", ["of numbers in fp32", "of numbers in bf16"]), ("left", ["v_proj", "stored as plain numbers"])];
    for (base, words) in words {
        let generate = ["generate", "--model", base, "--adapter", "run/adapter", "--raw", "--prompt", "add"];
        bench.fail(&generate, 5, &[&["run/adapter"], &words[..]].concat());
        bench.fail(&["merge", "--model", base, "--adapter", "run/adapter", "--out", "m"], 5, &words);
        let model = format!("base_model={base}");
        let eval = ["eval", "recipe.yaml", "--adapter", "run/adapter", "--set", &model, "--set", QLORA];
        bench.fail(&eval, 5, &words);
    }
    // In its own it is the same base.
    bench.succeed(&["quantize", "--model", "base", "--out", "base-nf4", "--dtype", "fp32"]);
    let own = [
        "generate",
        "--model",
        "base-nf4",
        "--adapter",
        "run/adapter",
        "--raw",
        "--prompt",
        "add",
        "--max-tokens",
        "9",
    ];
    let unquantised = [&["generate", "--model", "base"], &own[3..]].concat();
    assert_eq!(bench.succeed(&own), bench.succeed(&unquantised));
}

/// The mean of a weight's scales, which is a part of all its numbers, is summed in one order: what is merged later, with other threads,
/// is what was trained on.
#[test]
fn codes_are_the_same_whatever_the_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    tch::manual_seed(1);
    let weight = Tensor::randn([2048, 2048], (Kind::Float, Device::Cpu));
    Tensor::write_safetensors(&[("w", &weight)], path("w.safetensors")).unwrap();
    let codes = |threads: &str| {
        let (tensors, out) = (path("w.safetensors"), path(threads));
        let arguments = ["codes", "--tensors", &tensors, "--out", &out, "--threads", threads];
        let output = Command::new(env!("CARGO_BIN_EXE_engraft")).args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        std::fs::read(out).unwrap()
    };
    let one = codes("1");
    assert!(["2", "4"].iter().all(|threads| codes(threads) == one));
}

/// PEFT's adapters do not say what they were trained on: it is said for them, or the merged model is of the base's own numbers.
#[test]
fn an_adapter_that_does_not_say_how_its_base_was_quantised_is_told() {
    let bench = Bench::new("max_steps: 6");
    bench.succeed(&[&["train", "recipe.yaml"], &settings(&[QLORA, "output.save=[adapter]"])[..]].concat());
    let said = bench.path("run/adapter/base_quantization.json");
    let merge = |out: &'static str, more: &[&'static str]| {
        let merge = ["merge", "--model", "base", "--adapter", "silent", "--dtype", "fp32", "--no-probe", "--out", out];
        [&merge[..], more].concat()
    };
    std::fs::rename(bench.path("run/adapter"), bench.path("silent")).unwrap();
    let said_moved = bench.path("silent").join(said.file_name().unwrap());
    bench.succeed(&merge("exact", &[]));
    bench.fail(&merge("twice", &["--trained-on", "nf4"]), 3, &["--trained-on", "says itself", "nf4"]);
    let scheme = std::fs::read(&said_moved).unwrap();
    std::fs::remove_file(&said_moved).unwrap();

    bench.fail(&merge("none", &["--onto", "dequantized"]), 5, &["does not say", "--trained-on nf4"]);
    let plain = bench.engraft(&merge("plain", &[]));
    let words = String::from_utf8_lossy(&plain.stderr);
    assert!(plain.status.success() && words.contains("--trained-on nf4"), "{words}");
    bench.succeed(&merge("told", &["--trained-on", "nf4"]));
    bench
        .succeed(&merge("keys", &["--trained-on", "{type: nf4, block_size: 64, double_quant: true, skip: [lm_head]}"]));
    bench.succeed(&merge("single", &["--trained-on", "{type: nf4, double_quant: false}"]));
    let bytes = |folder: &str| std::fs::read(bench.path(folder).join("model.safetensors")).unwrap();
    assert!(bytes("told") == bytes("exact") && bytes("keys") == bytes("exact"));
    assert!(bytes("plain") != bytes("exact") && bytes("single") != bytes("exact"));
    bench.fail(&merge("wrong", &["--trained-on", "nf5"]), 3, &["--trained-on", "nf5"]);
    bench.fail(&merge("wrong", &["--trained-on", "{skip: [lm_hed]}"]), 3, &["--trained-on", "lm_hed"]);

    // What it says it was trained on is compared with what is made.
    let mut other: Value = serde_json::from_slice(&scheme).unwrap();
    let modules = other["weights"].as_object_mut().unwrap();
    let first = modules.keys().next().unwrap().clone();
    modules.insert(first.clone(), json!("0".repeat(32)));
    std::fs::write(&said_moved, other.to_string()).unwrap();
    let output = bench.engraft(&merge("other", &[]));
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && words.contains("1 of 14") && words.contains(&first), "{words}");
    let manifest = std::fs::read_to_string(bench.path("other/manifest.json")).unwrap();
    assert!(manifest.contains("1 of 14"), "{manifest}");
    let generate =
        ["generate", "--model", "base", "--adapter", "silent", "--raw", "--prompt", "add", "--max-tokens", "3"];
    let output = bench.engraft(&generate);
    assert!(String::from_utf8_lossy(&output.stderr).contains("1 of 14"));
}

/// Logits of some token ids, by a model as options name it.
fn logits(bench: &Bench, model: &[&str]) -> Tensor {
    let out = bench.path("logits.safetensors");
    let ids = ["--ids", "5,80,33,7", "--dtype", "fp32", "--out", out.to_str().unwrap()];
    bench.succeed(&[&["logits"], model, &ids[..]].concat());
    let tensors = Tensor::read_safetensors(&out).unwrap();
    tensors.into_iter().find(|(name, _)| name == "logits").unwrap().1
}

fn read_json(path: PathBuf) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_run_is_exported_as_each_server_loads_it() {
    let bench = Bench::new("max_steps: 3");
    let exports = "output.export=[vllm, {target: transformers, merge: true, type: f16}]";
    let patterns = "adapter.rank_pattern={q_proj: 2}";
    bench.succeed(&[
        "train",
        "recipe.yaml",
        "--quiet",
        "--set=adapter.use_rslora=true",
        "--set",
        patterns,
        "--set",
        exports,
    ]);
    let manifest = read_json(bench.path("run/manifest.json"));
    let recipe = manifest["recipe"]["path"].as_str().unwrap();
    assert!(Path::new(recipe).is_absolute(), "it is found from any folder: {recipe}");
    let written: Vec<&str> =
        manifest["outputs"].as_array().unwrap().iter().map(|file| file["path"].as_str().unwrap()).collect();
    for file in ["export/vllm/adapter_model.safetensors", "export/transformers-merged-f16/model.safetensors"] {
        assert!(written.contains(&file), "{file} is not in {written:?}");
    }
    let adapted = logits(&bench, &["--model", "base", "--adapter", "run/adapter"]);
    assert!(!adapted.allclose(&logits(&bench, &["--model", "base"]), 1e-3, 1e-3, false));
    let same = |model: &[&str]| adapted.allclose(&logits(&bench, model), 1e-5, 1e-5, false);
    assert!(same(&["--model", "base", "--adapter", "run/export/vllm"]));

    // The scale, which these servers would get wrong, is in B; ranks are filled up to one.
    for target in ["vllm", "sglang", "tgi", "peft", "transformers"] {
        let said = bench.succeed(&["export", "run", "--target", target, "--out", target, "--json"]);
        let facts: Value = serde_json::from_str(&said).unwrap();
        assert_eq!((&facts["target"], &facts["merged"]), (&json!(target), &json!(false)), "{facts}");
        assert_eq!(facts["probe"], "probe.json", "{facts}");
        bench.succeed(&["verify", target]);
        assert!(same(&["--model", "base", "--adapter", target]), "{target}");
        let config = read_json(bench.path(target).join("adapter_config.json"));
        let found = json!([config["r"], config["lora_alpha"], config["use_rslora"], config["rank_pattern"]]);
        match target {
            "peft" | "transformers" => assert_eq!(found, json!([4, 8, true, {"q_proj": 2}]), "{target}"),
            _ => {
                assert_eq!(found, json!([4, 4, false, {}]), "{target}");
                assert!(facts["notices"].to_string().contains("in B"), "{facts}");
                let targets = config["target_modules"].as_array().unwrap();
                assert!(targets.contains(&json!("q_proj")) && targets.len() == 7, "{config}");
            }
        }
        assert_eq!(config["base_model_name_or_path"], "tiny/base", "{target}");
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            assert!(bench.path(target).join(file).exists(), "{target}: {file}");
        }
    }
    bench.succeed(&["verify", "run/export/transformers-merged-f16"]);
    bench.succeed(&["verify", "run/export/transformers-merged-f16"]);
    bench.succeed(&["verify", "run"]);
    bench.succeed(&["export", "run", "--target", "mlx", "--out", "mlx"]);
    assert!(bench.path("mlx/README.md").exists() && bench.path("mlx/probe.json").exists());
    let config = read_json(bench.path("mlx/adapter_config.json"));
    assert_eq!(json!([config["fine_tune_type"], config["num_layers"]]), json!(["lora", 2]));
    assert_eq!(json!([config["lora_parameters"]["rank"], config["lora_parameters"]["scale"]]), json!([4, 1.0]));
    assert!(config["lora_parameters"]["keys"].as_array().unwrap().contains(&json!("self_attn.q_proj")), "{config}");
    let of = |file: &str| -> BTreeMap<String, Tensor> {
        Tensor::read_safetensors(bench.path(file)).unwrap().into_iter().collect()
    };
    let (ours, theirs) = (of("mlx/adapters.safetensors"), of("sglang/adapter_model.safetensors"));
    assert_eq!(ours.len(), 28);
    for part in ["a", "b"] {
        let name = format!("base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight", part.to_uppercase());
        assert!(ours[&format!("model.layers.1.mlp.down_proj.lora_{part}")].equal(&theirs[&name].tr()), "{part}");
    }

    // Whole models, of the adapter and of what is merged already.
    for (target, source) in [("vllm", "run"), ("transformers", "run/merged"), ("mlx", "run/adapter")] {
        let out = format!("{target}-merged");
        let model = if source == "run/adapter" { &["--model", "base"][..] } else { &[] };
        bench.succeed(&[&["export", source, "--target", target, "--merge", "--out", &out], model].concat());
        assert!(same(&["--model", &out]), "{target}");
        bench.succeed(&["verify", &out]);
    }
    bench.fail(&["export", "run", "--target", "vllm", "--out", "vllm"], 6, &["vllm", "not empty", "--overwrite"]);
    bench.succeed(&["export", "run", "--target", "vllm", "--out", "vllm", "--overwrite"]);
    bench.fail(&["export", "run", "--target", "vllm", "--out", "new", "--type", "fp16"], 3, &["is f16", "merge"]);
    bench.fail(
        &["export", "run", "--target", "vllm", "--merge", "--type", "q4_k_m", "--out", "new"],
        3,
        &["is q4_k_m", "llama.cpp"],
    );
    bench.fail(&["export", "run"], 3, &["--target", "ollama"]);
    // One kind of export may stand in another's place, but not in that of the adapter it is made of.
    for (target, merge) in [("mlx", &[][..]), ("llama.cpp", &[]), ("tgi", &["--merge"]), ("vllm", &[])] {
        bench.succeed(&[&["export", "run", "--target", target, "--out", "vllm", "--overwrite"], merge].concat());
    }
    let own = ["export", "run/adapter", "--model", "base", "--target", "tgi", "--out", "run/adapter", "--overwrite"];
    bench.fail(&own, 6, &["where the adapter itself lies"]);
    let output = bench.command(&["export", "run", "--target", "peft", "--out", "new", "--push", "me/it"]);
    let output = { output }.env("HF_HOME", bench.path("hub")).env_remove("HF_TOKEN").output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(11) && errors.contains("there is no token"), "{errors}");
    bench.fail(
        &["export", "run", "--target", "peft", "--merge", "--out", "new"],
        5,
        &["PEFT loads adapters", "transformers"],
    );
    bench.fail(&["export", "recipe.yaml", "--target", "vllm", "--out", "new"], 5, &["is a recipe", "output.dir"]);
    bench.fail(&["export", "cache", "--target", "vllm", "--out", "new"], 5, &["cache"]);
    assert!(!bench.path("new").exists());
}

#[test]
fn llama_cpp_and_ollama_get_files_that_answer_as_the_trained_model_does() {
    let bench = Bench::new("max_steps: 12");
    let exports = "output.export=[llama.cpp, {target: ollama, merge: true, type: q8_0}]";
    bench.succeed(&["train", "recipe.yaml", "--quiet", "--set", exports]);
    let listed = read_json(bench.path("run/manifest.json"))["outputs"].to_string();
    for file in ["llama.cpp/adapter.gguf", "ollama-merged-q8_0/model-q8_0.gguf", "ollama-merged-q8_0/Modelfile"] {
        assert!(listed.contains(&format!("export/{file}")), "{file} is not in {listed}");
    }
    let adapted = logits(&bench, &["--model", "base", "--adapter", "run/adapter"]);
    let same = |model: &[&str], by: f64| adapted.allclose(&logits(&bench, model), by, by, false);
    assert!(same(&["--model", "base", "--adapter", "run/export/llama.cpp/adapter.gguf"], 1e-5));
    bench.succeed(&["verify", "run/export/llama.cpp", "--model", "base"]);
    bench.succeed(&["verify", "run/export/ollama-merged-q8_0"]);

    bench.succeed(&["export", "run", "--target", "llama.cpp", "--out", "adapter"]);
    let page = bench.succeed(&["verify", "adapter"]);
    assert!(page.contains("this is the trained model"), "{page}");
    for (numbers, by) in [("f32", 1e-5), ("bf16", 0.1), ("q8_0", 0.1), ("q4_k_m", 1.0)] {
        let export = ["export", "run", "--target", "llama.cpp", "--merge", "--type", numbers, "--out", numbers];
        let facts: Value = serde_json::from_str(&bench.succeed(&[&export[..], &["--json"]].concat())).unwrap();
        assert_eq!(facts["type"], numbers, "{facts}");
        let file = format!("{numbers}/model-{numbers}.gguf");
        assert!(same(&["--model", &file], by), "{numbers}");
        let probe = read_json(bench.path(numbers).join("probe.json"));
        assert!(probe["tolerance"]["formats"].to_string().contains(numbers), "{}", probe["tolerance"]);
    }
    bench.succeed(&["verify", "q8_0"]);
    // The base in the trained model's place.
    std::fs::copy(bench.path("run/export/llama.cpp/probe.json"), bench.path("f32/probe.json")).unwrap();
    std::fs::remove_file(bench.path("f32/manifest.json")).unwrap();
    bench.succeed(&["verify", "f32"]);
    bench.succeed(&["export", "base", "--target", "llama.cpp", "--out", "bare", "--no-probe"]);
    assert!(!bench.path("bare/probe.json").exists());
    let file = std::fs::read_dir(bench.path("bare")).unwrap().map(|entry| entry.unwrap().path());
    let file = file.into_iter().find(|path| path.extension().is_some_and(|end| end == "gguf")).unwrap();
    std::fs::copy(file, bench.path("f32/model-f32.gguf")).unwrap();
    bench.fail(&["verify", "f32"], 12, &["the bare base"]);

    // What is merged already keeps the probes of whoever merged it, and is proved by them in its new form.
    bench.succeed(&["export", "run", "--target", "transformers", "--merge", "--out", "whole"]);
    bench.succeed(&["export", "whole", "--target", "ollama", "--type", "q8_0", "--out", "ollama"]);
    let modelfile = std::fs::read_to_string(bench.path("ollama/Modelfile")).unwrap();
    assert!(modelfile.starts_with("FROM ./model-q8_0.gguf\n"), "{modelfile}");
    bench.succeed(&["verify", "ollama"]);
    bench.succeed(&["export", "run", "--target", "ollama", "--out", "light"]);
    let modelfile = std::fs::read_to_string(bench.path("light/Modelfile")).unwrap();
    let base = bench.path("base");
    assert!(modelfile.starts_with(&format!("FROM {}\nADAPTER ./adapter.gguf\n", base.display())), "{modelfile}");
    bench.succeed(&["export", "run", "--target", "ollama", "--from", "tiny", "--out", "named"]);
    assert!(std::fs::read_to_string(bench.path("named/Modelfile")).unwrap().starts_with("FROM tiny\n"));
    bench.fail(&["export", "run", "--target", "ollama", "--from", "a b", "--out", "new"], 3, &["ollama list"]);
    bench.fail(
        &["export", "run", "--target", "vllm", "--from", "a", "--out", "new"],
        3,
        &["only an adapter for Ollama"],
    );
    bench.fail(
        &["validate", "recipe.yaml", "--set", "output.export=[{target: tgi, type: f16}]"],
        3,
        &["output.export"],
    );
    assert!(!bench.path("new").exists());
}

#[test]
fn an_output_that_cannot_be_written_takes_no_other_with_it() {
    let bench = Bench::new("max_steps: 1, save_steps: 1");
    bench.succeed(&["train", "recipe.yaml", "--quiet", "--set", "output.save=[adapter]"]);
    std::fs::remove_file(bench.path("run/manifest.json")).unwrap();
    std::fs::write(bench.path("run/export"), "in the way").unwrap();
    let export = ["export", "recipe.yaml", "--set", "output.export=[vllm]"];
    bench.fail(&export, 6, &["run/export", "what was trained is saved", "engraft export"]);
    // What is whole is the run's, and is exported.
    let listed = read_json(bench.path("run/manifest.json"))["outputs"].to_string();
    assert!(listed.contains("merged/model.safetensors") && !listed.contains("export/"), "{listed}");
    bench.succeed(&["export", "run", "--target", "peft", "--out", "served", "--no-probe"]);
    std::fs::remove_file(bench.path("run/export")).unwrap();
    bench.succeed(&export);
    bench.succeed(&["verify", "run/export/vllm"]);
}

#[test]
fn another_base_of_the_same_shapes_takes_no_adapter_in_silence() {
    let bench = Bench::new("max_steps: 2");
    bench.succeed(&["train", "recipe.yaml", "--quiet"]);
    let other = bench.path("other");
    std::fs::create_dir(&other).unwrap();
    for entry in std::fs::read_dir(bench.path("base")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, other.join(path.file_name().unwrap())).unwrap();
    }
    let mut tensors = Tensor::read_safetensors(other.join("model.safetensors")).unwrap();
    tensors[0].1 = &tensors[0].1 + 0.5;
    Tensor::write_safetensors(&tensors, other.join("model.safetensors")).unwrap();
    bench.succeed(&["export", "run", "--target", "vllm", "--out", "served"]);
    for adapter in ["run/adapter", "served"] {
        let merge = ["merge", "--model", "other", "--adapter", adapter, "--out", "merged"];
        bench.fail(&merge, 5, &["has other numbers than the base of the adapter", "--other-base"]);
        let export = ["export", adapter, "--model", "other", "--target", "tgi", "--out", "merged"];
        bench.fail(&export, 5, &["has other numbers than the base of the adapter", "--other-base"]);
    }
    assert!(!bench.path("merged").exists());
    bench.succeed(&["merge", "--model", "other", "--adapter", "run/adapter", "--out", "merged", "--other-base"]);
    // Its manifest holds from any folder.
    let mut elsewhere = bench.command(&["verify", bench.path("merged").to_str().unwrap()]);
    let output = elsewhere.current_dir(bench.path("base")).output().unwrap();
    let page = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!page.contains("MISSING") && page.contains("as the manifest lists them"), "{page}");
}

#[test]
fn what_a_server_cannot_load_is_refused_before_training_and_before_writing() {
    let bench = Bench::new("max_steps: 1");
    let train = ["train", "recipe.yaml", "--quiet", "--set", "output.save=[adapter]"];
    let whole = "--set=adapter.modules_to_save=[model.norm]";
    for (set, target, parts) in [
        ("--set=adapter.use_dora=true", "vllm", ["trained lengths (DoRA)", "--merge"]),
        (whole, "sglang", ["trained whole (model.norm)", "--merge"]),
        ("--set=adapter.target_modules=[q_proj, lm_head]", "mlx", ["lm_head, which is the embedding", "--merge"]),
        ("--set=adapter.trainable_token_indices=[3]", "tgi", ["trained whole (model.embed_tokens)", "--merge"]),
    ] {
        let export = format!("output.export=[{target}]");
        bench.fail(&[&train[..], &[set, "--set", &export, "--overwrite"]].concat(), 5, &parts);
        assert!(!bench.path("run/adapter").exists(), "{set}: nothing was trained");
    }
    let dir = |set: &str, dir: &str| {
        let dir = format!("output.dir={dir}");
        bench.succeed(&[&train[..], &[set, "--set", &dir]].concat());
    };
    dir("--set=adapter.use_dora=true", "dora");
    bench.fail(&["export", "dora", "--target", "vllm", "--out", "out"], 5, &["vLLM cannot load", "DoRA", "--merge"]);
    dir(whole, "whole");
    bench.fail(
        &["export", "whole", "--target", "tgi", "--out", "out"],
        5,
        &["TGI cannot load", "model.norm", "--merge"],
    );
    dir("--set=adapter.target_modules=[lm_head]", "head");
    for target in ["vllm", "sglang", "tgi", "mlx"] {
        bench.fail(&["export", "head", "--target", target, "--out", "out"], 5, &["lm_head", "embedding", "--merge"]);
    }
    assert!(!bench.path("out").exists());
    // The way out is one.
    for run in ["dora", "whole", "head"] {
        let out = format!("{run}-merged");
        bench.succeed(&["export", run, "--target", "vllm", "--merge", "--out", &out]);
        let adapter = format!("{run}/adapter");
        let adapted = logits(&bench, &["--model", "base", "--adapter", &adapter]);
        assert!(adapted.allclose(&logits(&bench, &["--model", &out]), 1e-5, 1e-5, false), "{run}");
        // And PEFT loads all of it.
        let peft = format!("{run}-peft");
        bench.succeed(&["export", run, "--target", "peft", "--out", &peft]);
        assert!(
            adapted.allclose(&logits(&bench, &["--model", "base", "--adapter", &peft]), 1e-6, 1e-6, false),
            "{run}"
        );
    }
    // An adapter whose rank no server of this kind can be started for.
    let config = read_json(bench.path("head/adapter/adapter_config.json"));
    assert_eq!(config["r"], 4);
    let pissa = "--set=adapter.init_lora_weights=pissa";
    dir(pissa, "pissa");
    bench.succeed(&["export", "pissa", "--target", "sglang", "--out", "plain"]);
    assert_eq!(read_json(bench.path("plain/adapter_config.json"))["r"], 8, "twice, on the base as it was");
    let adapted = logits(&bench, &["--model", "base", "--adapter", "pissa/adapter"]);
    assert!(adapted.allclose(&logits(&bench, &["--model", "base", "--adapter", "plain"]), 1e-5, 1e-5, false));
}

#[test]
fn half_written_runs_changed_files_and_other_bases_are_not_exported() {
    let bench = Bench::new("max_steps: 1, save_steps: 1");
    bench.succeed(&["train", "recipe.yaml", "--quiet", "--set", "output.save=[adapter]"]);
    let export = ["export", "run", "--target", "vllm", "--out", "out"];
    let (manifest, kept) = (bench.path("run/manifest.json"), bench.path("kept.json"));
    std::fs::rename(&manifest, &kept).unwrap();
    bench.fail(&export, 7, &["without manifest.json", "cut short", "--resume"]);
    std::fs::rename(&kept, &manifest).unwrap();

    let (adapter, aside) = (bench.path("run/adapter"), bench.path("aside"));
    std::fs::rename(&adapter, &aside).unwrap();
    bench.fail(&export, 7, &["has written no adapter", "--resume"]);
    std::fs::rename(&aside, &adapter).unwrap();

    let config = adapter.join("adapter_config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("\"lora_alpha\": 8", "\"lora_alpha\": 80")).unwrap();
    bench.fail(&export, 7, &["adapter_config.json", "SHA-256", "run/adapter"]);
    std::fs::write(&config, &text).unwrap();

    // The same shapes with other numbers: what no server would notice.
    let base = bench.path("base/model.safetensors");
    let mut tensors = Tensor::read_safetensors(&base).unwrap();
    std::fs::rename(&base, bench.path("base.safetensors")).unwrap();
    tensors[0].1 = &tensors[0].1 + 0.5;
    Tensor::write_safetensors(&tensors, &base).unwrap();
    bench.fail(&export, 5, &["model.safetensors has other numbers", "base", "--other-base"]);
    bench.succeed(&[&export[..], &["--other-base", "--overwrite"]].concat());
    std::fs::rename(bench.path("base.safetensors"), &base).unwrap();

    // Other shapes.
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft/base-tied");
    let another = ["--model", fixture.to_str().unwrap(), "--overwrite"];
    bench.fail(
        &[&["export", "run/adapter"], &export[2..], &another].concat(),
        5,
        &["is for another base", "tiny/base"],
    );
    // Named as the hub has it, where there is no network: the way out is --model.
    let mut offline = bench.command(&["export", "run/adapter", "--target", "vllm", "--out", "new"]);
    let offline = offline.env("HF_ENDPOINT", "http://127.0.0.1:9").env("HF_HOME", bench.path("hub")).output().unwrap();
    assert_eq!(offline.status.code(), Some(11), "{}", String::from_utf8_lossy(&offline.stderr));
    assert!(!bench.path("new").exists());
    std::fs::rename(bench.path("base"), bench.path("moved")).unwrap();
    bench.fail(&[&export[..], &["--overwrite"]].concat(), 5, &["the base of run/adapter", "--model"]);
    bench.succeed(&[&export[..], &["--overwrite", "--model", "moved"]].concat());
}

#[test]
fn adapters_are_combined_taken_out_of_models_and_compared() {
    let bench = Bench::new("max_steps: 2");
    for (dir, seed) in [("one", "1"), ("two", "2")] {
        let (dir, seed) = (format!("output.dir={dir}"), format!("training.seed={seed}"));
        bench.succeed(&["train", "recipe.yaml", "--quiet", "--set", &dir, "--set", &seed]);
    }
    bench.succeed(&["diff", "one/adapter", "one"]);
    bench.fail(&["diff", "one", "two"], 12, &["28 of 28 tensors differ"]);
    let facts = bench.engraft(&["diff", "one", "two", "--json"]);
    let facts: Value = serde_json::from_slice(&facts.stdout).unwrap();
    assert_eq!(json!([facts["is_equal"], facts["in_both"], facts["equal"]]), json!([false, 28, 0]), "{facts}");
    bench.fail(&["diff", "one", "base"], 5, &["only one of one and base is an adapter"]);
    bench.fail(&["diff", "base", "one/merged"], 12, &["14 of 20 tensors differ"]);
    bench.succeed(&["diff", "base", "one/merged", "--tolerance", "10"]);

    // Exact: the sum of both, and one less itself.
    let sum = ["combine", "one/adapter", "two/adapter", "--out", "sum", "--weights"];
    bench.succeed(&[&sum[..], &["0.75,0.5", "--by", "cat"]].concat());
    let config = read_json(bench.path("sum/adapter_config.json"));
    assert_eq!(
        json!([config["r"], config["lora_alpha"], config["base_model_name_or_path"]]),
        json!([8, 8, "tiny/base"])
    );
    bench.fail(&[&sum[..], &["1,1"]].concat(), 6, &["not empty"]);
    bench.fail(&[&sum[..], &["1,1", "--by", "ties", "--overwrite"]].concat(), 3, &["--density"]);
    bench.succeed(&[&sum[..], &["1,1", "--by", "dare_ties", "--density", "0.5", "--overwrite"]].concat());
    bench.succeed(&["combine", "one/adapter", "one/adapter", "--weights", "1,-1", "--out", "none"]);
    assert!(logits(&bench, &["--model", "base"]).allclose(
        &logits(&bench, &["--model", "base", "--adapter", "none"]),
        1e-6,
        1e-6,
        false
    ));

    // What was written, for programs.
    let said = |arguments: &[&str]| -> Value { serde_json::from_str(&bench.succeed(arguments)).unwrap() };
    let facts = said(&["combine", "one/adapter", "two/adapter", "--out", "split", "--rank", "2", "--json"]);
    assert_eq!(json!([facts["rank"], facts["by"], facts["weights"]]), json!([2, "svd", [1.0, 1.0]]), "{facts}");
    assert_eq!(facts["modules"].as_array().unwrap().len(), 14, "{facts}");
    assert!((0.01..1.0).contains(&facts["relative_error"].as_f64().unwrap()), "{facts}");
    let facts = said(&["quantize", "--model", "base", "--out", "four", "--json"]);
    assert_eq!(json!([facts["quantized"], facts["quantization"]["type"]]), json!([14, "nf4"]), "{facts}");
    assert_eq!(facts["loss"]["tensors"].as_object().unwrap().len(), 14, "{facts}");

    // Out of the merged model comes the adapter that went into it.
    let said = bench.succeed(&[
        "extract",
        "--tuned",
        "one/merged",
        "--model",
        "base",
        "--rank",
        "4",
        "--out",
        "out",
        "--json",
    ]);
    let facts: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(facts["modules"].as_array().unwrap().len(), 14, "{facts}");
    assert!(facts["relative_error"].as_f64().unwrap() < 1e-3 && facts["energy"].as_f64().unwrap() > 0.999, "{facts}");
    let [one, other] = ["one/adapter", "out"].map(|adapter| logits(&bench, &["--model", "base", "--adapter", adapter]));
    assert!(one.allclose(&other, 1e-4, 1e-4, false));
    bench.fail(&["extract", "--tuned", "base", "--model", "base", "--out", "nothing"], 5, &["no tensor differs"]);
    assert!(!bench.path("nothing").exists());
}

#[test]
fn verify_tells_what_changed_and_whether_an_export_is_what_was_trained() {
    let bench = Bench::new("max_steps: 12");
    // The secret of RFC 8032's first test, and what OpenSSL makes of it.
    let pem = |kind: &str, text: &str| format!("-----BEGIN {kind} KEY-----\n{text}\n-----END {kind} KEY-----\n");
    let secret = "MC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g";
    std::fs::write(bench.path("key.pem"), pem("PRIVATE", secret)).unwrap();
    let public = "MCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=";
    std::fs::write(bench.path("public.pem"), pem("PUBLIC", public)).unwrap();
    bench.fail(&["train", "recipe.yaml", "--sign", "recipe.yaml"], 6, &["genpkey"]);
    bench.succeed(&["train", "recipe.yaml", "--sign", "key.pem"]);
    bench.succeed(&["verify", "run", "--key", "public.pem"]);
    let manifest: Value = serde_json::from_slice(&std::fs::read(bench.path("run/manifest.json")).unwrap()).unwrap();
    let documentation = &manifest["documentation"];
    assert!(documentation["floating_point_operations"].as_f64().unwrap() > 1e6, "{documentation}");
    assert!(documentation["trained_parameters"].as_u64().unwrap() > 0 && documentation["began"].is_string());
    assert_eq!(documentation["data"]["training"]["rows"], 40);
    for folder in ["adapter", "merged"] {
        let card = std::fs::read_to_string(bench.path("run").join(folder).join("README.md")).unwrap();
        assert!(card.starts_with("---\nbase_model: \"tiny/base\"\n") && card.contains("](loss.svg)"), "{card}");
        assert!(bench.path("run").join(folder).join("loss.svg").exists());
    }

    // The run's files, one of them changed, one more, one less.
    let page = bench.succeed(&["verify", "run"]);
    assert!(page.contains("as the manifest lists them"), "{page}");
    let result: Value = serde_json::from_str(&bench.succeed(&["verify", "run", "--json"])).unwrap();
    assert!(result["agrees"] == true && result["files"].as_array().unwrap().len() > 8, "{result}");
    let config = bench.path("run/adapter/adapter_config.json");
    let before = std::fs::read(&config).unwrap();
    std::fs::write(&config, String::from_utf8(before.clone()).unwrap().replace("tiny/base", "tiny/bass")).unwrap();
    bench.fail(&["verify", "run"], 12, &["1 of the files"]);
    std::fs::write(&config, before).unwrap();
    std::fs::rename(bench.path("train.parquet"), bench.path("gone.parquet")).unwrap();
    let output = bench.engraft(&["verify", "run"]);
    let page = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.code() == Some(12) && page.contains("training data") && page.contains("MISSING"), "{page}");
    std::fs::rename(bench.path("gone.parquet"), bench.path("train.parquet")).unwrap();
    bench.succeed(&["verify", "run"]);
    bench.fail(&["verify", "run", "--key", "recipe.yaml"], 5, &["is no public key"]);
    bench.fail(&["verify", "nowhere"], 5, &["no such folder"]);
    bench.fail(&["verify", "base"], 5, &["probe.json", "engraft export"]);

    // Written anew, the manifest is no longer what was signed.
    bench.succeed(&["export", "recipe.yaml", "--save", "adapter"]);
    bench.fail(&["verify", "run", "--key", "public.pem"], 5, &["it is not signed"]);
    bench.succeed(&["export", "recipe.yaml", "--sign", "key.pem"]);
    bench.succeed(&["verify", "run", "--key", "public.pem"]);

    // A program is told, too, that somebody else has written it; and what lists nothing agrees with nothing.
    let manifest = bench.path("run/manifest.json");
    let signed = std::fs::read(&manifest).unwrap();
    std::fs::write(&manifest, [&signed[..], b" "].concat()).unwrap();
    let output = bench.engraft(&["verify", "run", "--key", "public.pem", "--json"]);
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &result["signed"], &result["agrees"]), (Some(12), &json!(false), &json!(false)));
    assert!(result["wrong"][0].as_str().unwrap().contains("does not sign"), "{result}");
    std::fs::write(&manifest, "{}").unwrap();
    bench.fail(&["verify", "run"], 7, &["lists no base and no outputs"]);
    std::fs::write(&manifest, signed).unwrap();

    // Exports: the adapter on its base and the merged model give the trained answers.
    bench.succeed(&["export", "run", "--target", "peft", "--out", "exported", "--sign", "key.pem"]);
    bench.succeed(&["verify", "exported", "--key", "public.pem"]);
    bench.succeed(&["export", "run", "--target", "transformers", "--merge", "--out", "whole"]);
    let (adapter, merged) = (bench.path("exported"), bench.path("whole"));
    let page = bench.succeed(&["verify", "exported", "--model", "base"]);
    assert!(page.contains("this is the trained model"), "{page}");
    bench.succeed(&["verify", "whole"]);
    bench.fail(&["verify", "whole", "--model", "base"], 5, &["is a whole model"]);
    // The name that the adapter has for its base is not here.
    std::fs::remove_file(adapter.join("manifest.json")).unwrap();
    let mut alone = bench.command(&["verify", "exported"]);
    let output = alone.env("HF_HUB_OFFLINE", "1").env("HF_HOME", bench.path("hub")).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(11) && errors.contains("tiny/base"), "{errors}");

    // Without a tokenizer of its own it has its base's.
    std::fs::remove_file(adapter.join("tokenizer.json")).unwrap();
    bench.succeed(&["verify", "exported", "--model", "base"]);

    // An adapter at half its strength, and one that does nothing.
    let weights = adapter.join("adapter_model.safetensors");
    let tensors = Tensor::read_safetensors(&weights).unwrap();
    for (factor, said) in [(0.5, "neither the trained model nor its base"), (0.0, "the bare base")] {
        let scaled: Vec<(String, Tensor)> = tensors
            .iter()
            .map(|(name, tensor)| (name.clone(), if name.contains("lora_B") { tensor * factor } else { tensor.copy() }))
            .collect();
        let specs: Vec<TensorSpec> = scaled.iter().map(|(name, tensor)| TensorSpec::of(name, tensor)).collect();
        writer::write(&weights, &specs, &BTreeMap::new(), |i| Ok(scaled[i].1.contiguous())).unwrap();
        bench.fail(&["verify", "exported", "--model", "base"], 12, &[said]);
    }
    // A tokenizer that is another one gives other prompts, whatever the weights say.
    let tokenizer = merged.join("tokenizer_config.json");
    let text = std::fs::read_to_string(&tokenizer).unwrap();
    std::fs::write(&tokenizer, format!("{text} ")).unwrap();
    bench.fail(&["verify", "whole"], 12, &["tokenizer_config.json is another one"]);
    std::fs::remove_file(&tokenizer).unwrap();
    bench.fail(&["verify", "whole"], 12, &["1 of the files", "tokenizer_config.json is missing"]);
    bench.fail(&["verify", "whole", "--server", "http://127.0.0.1:9"], 11, &["nobody answers"]);
    bench.fail(
        &["verify", "whole", "--server", "http://127.0.0.1:9", "--api-key-env", "NO_SUCH_KEY"],
        11,
        &["NO_SUCH_KEY"],
    );
}
