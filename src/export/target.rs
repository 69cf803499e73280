//! What each server loads, as data: which features of an adapter it takes, which it passes over (they are folded into B), which it
//! refuses, and what it needs beside. Sources: the servers' own loaders (vLLM `lora/peft_helper.py` and `lora/lora_model.py`, SGLang
//! `srt/lora`, TGI `adapters/lora.py` and `utils/adapter.py`, mlx-lm `tuner/utils.py`, llama.cpp `src/llama-adapter.cpp`).

use super::mlx;
use crate::adapter::plain::{Fill, Reader};
use crate::adapter::{AdapterConfig, Learned, Update, overview};
use crate::model::ModelSpec;
use crate::model::sites::Role;
pub use crate::recipe::{ExportChoice, Target};
use crate::{Error, Fault, Result};

/// What a server loads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rules {
    /// Its name, as its makers write it.
    pub name: &'static str,
    /// What it loads of adapters beside whole models.
    pub adapters: AdapterRules,
    /// Whether it loads whole models.
    pub models: bool,
}

/// What a server loads of adapters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum AdapterRules {
    /// All that PEFT writes.
    All,
    /// Plain LoRA.
    Plain {
        /// How its files are laid out.
        layout: Layout,
        /// What it makes of them.
        reader: Reader,
        /// The ends of the paths of the linears it adapts; none where it adapts any.
        linears: Option<&'static [&'static str]>,
        /// Whether it adapts the linears of experts.
        experts: bool,
        /// Ranks it can be started for, in order, and the option that says so; none where it takes any.
        ranks: Option<(&'static [i64], &'static str)>,
    },
}

/// How an adapter's files are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// As PEFT's; experts one by one where the base's files have them so, in stacks where they are stacked there.
    Peft,
    /// As mlx-lm's: `adapters.safetensors`, matrices transposed.
    Mlx,
    /// As llama.cpp's: one GGUF file.
    Gguf,
}

const TGI_LINEARS: &[&str] = &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"];
const SGLANG_LINEARS: &[&str] = &[
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "qkv_proj",
    "gate_up_proj",
    "lm_head",
];
/// SGLang puts these together before it looks whether all are there.
const STACKS: &[&[&str]] = &[&["q_proj", "k_proj", "v_proj"], &["gate_proj", "up_proj"]];
/// vLLM's `max_lora_rank`; 16 unless it is told another.
const VLLM_RANKS: &[i64] = &[1, 8, 16, 32, 64, 128, 256, 320, 512];

/// What a target loads.
pub fn rules(target: Target) -> Rules {
    match target {
        Target::Peft => Rules { name: "PEFT", adapters: AdapterRules::All, models: false },
        // Its from_pretrained hands an adapter's folder to PEFT.
        Target::Transformers => Rules { name: "transformers", adapters: AdapterRules::All, models: true },
        Target::Vllm => Rules {
            name: "vLLM",
            adapters: AdapterRules::Plain {
                layout: Layout::Peft,
                // One scale for all modules, whatever alpha_pattern says.
                reader: Reader { rank_stabilised: true, fill: Fill::Nothing },
                linears: None,
                experts: true,
                ranks: Some((VLLM_RANKS, "--max-lora-rank")),
            },
            models: true,
        },
        Target::Sglang => Rules {
            name: "SGLang",
            adapters: AdapterRules::Plain {
                layout: Layout::Peft,
                reader: Reader { rank_stabilised: false, fill: Fill::Stacks(STACKS) },
                linears: Some(SGLANG_LINEARS),
                experts: false,
                ranks: None,
            },
            models: true,
        },
        Target::Tgi => Rules {
            name: "TGI",
            adapters: AdapterRules::Plain {
                layout: Layout::Peft,
                // It passes over a kind of linear that one layer has no update of, in all layers.
                reader: Reader { rank_stabilised: true, fill: Fill::Layers },
                linears: Some(TGI_LINEARS),
                experts: false,
                ranks: None,
            },
            models: true,
        },
        Target::LlamaCpp | Target::Ollama => Rules {
            name: if target == Target::Ollama { "Ollama" } else { "llama.cpp" },
            adapters: AdapterRules::Plain {
                layout: Layout::Gguf,
                // The file has one alpha, and ranks of each tensor: other scales are folded into B as it is written.
                reader: Reader { rank_stabilised: false, fill: Fill::Nothing },
                linears: None,
                experts: true,
                ranks: None,
            },
            models: true,
        },
        Target::Mlx => Rules {
            name: "mlx-lm",
            adapters: AdapterRules::Plain {
                layout: Layout::Mlx,
                reader: Reader { rank_stabilised: false, fill: Fill::Nothing },
                linears: None,
                experts: true,
                ranks: None,
            },
            models: true,
        },
    }
}

/// Refuses what a target cannot load, all of it at once and with the way out; gives what its user must do or know.
///
/// `config` and `learned` are the adapter on a base of this `spec`; none with `merge`, where only the target is asked.
pub fn prove(
    choice: &ExportChoice,
    spec: &ModelSpec,
    config: &AdapterConfig,
    learned: Learned<'_>,
) -> Result<Vec<String>> {
    choice.prove().map_err(|fault| Error::Recipe(vec![fault]))?;
    let (target, merge) = (choice.target, choice.merge);
    let rules = rules(target);
    let place = format!("--target {target}");
    if merge {
        return match rules.models {
            true => Ok(Vec::new()),
            false => {
                let what = format!("{} loads adapters, and --merge makes a whole model", rules.name);
                let hint = "leave --merge out, or name the program that is to load the model: --target transformers";
                Err(Error::Model(Fault::new(place, what).hint(hint)))
            }
        };
    }
    let AdapterRules::Plain { layout, linears, experts, ranks, .. } = rules.adapters else { return Ok(Vec::new()) };
    let Learned { updates, saved } = learned;
    let mut unfit: Vec<String> = Vec::new();
    if config.use_dora || updates.iter().any(|update| update.lengths.is_some()) {
        unfit.push("it has trained lengths (DoRA)".into());
    }
    if !saved.is_empty() {
        let modules: Vec<&str> = saved.iter().map(|saved| saved.module.as_str()).collect();
        unfit.push(format!("modules or tokens are trained whole ({})", overview(&modules)));
    }
    if updates.is_empty() && saved.is_empty() {
        unfit.push("it has no low-rank updates".into());
    }
    let of = |fits: &dyn Fn(&Role, &str) -> bool| -> Vec<&str> {
        let found = updates.iter().filter(|update| fits(&update.role, &update.module));
        found.map(|update| update.module.as_str()).collect()
    };
    let others = of(&|role, _| matches!(role, Role::Router | Role::Blocks | Role::Indexer));
    if !others.is_empty() {
        unfit.push(format!("it adapts what is no plain linear ({})", overview(&others)));
    }
    let heads = of(&|role, _| *role == Role::Head);
    if spec.head.tied && !heads.is_empty() {
        unfit.push(format!("it adapts {}, which is the embedding in this model", heads[0]));
    }
    let of_experts = of(&|role, _| matches!(role, Role::Experts { .. }));
    if !experts && !of_experts.is_empty() {
        unfit.push(format!("it adapts experts ({})", overview(&of_experts)));
    }
    let end = |module: &str| module.rsplit('.').next().unwrap_or(module).to_string();
    let known = |module: &str| linears.is_none_or(|linears| linears.contains(&end(module).as_str()));
    let unknown = of(&|role, module| matches!(role, Role::Linear | Role::Head) && !known(module));
    if !unknown.is_empty() {
        unfit.push(format!("it adapts {}, which it would pass over in silence", overview(&unknown)));
    }
    if layout == Layout::Mlx {
        unfit.extend(mlx::unfit(spec, updates));
    }
    // On the base as it was.
    let rank = |update: &Update| if update.taken.is_some() { 2 * update.rank() } else { update.rank() };
    let r = updates.iter().map(rank).max().unwrap_or(0);
    let mut notices = Vec::new();
    if let Some((ranks, option)) = ranks {
        match ranks.iter().find(|rank| **rank >= r) {
            Some(16 | 8 | 1) => {}
            Some(rank) => notices.push(format!("{} must be started with {option} {rank}: the rank is {r}", rules.name)),
            None => unfit.push(format!(
                "its rank is {r}{}, and the highest that {option} takes is {}",
                if updates.iter().any(|update| update.taken.is_some()) { " on the base as it was" } else { "" },
                ranks.last().copied().unwrap_or_default()
            )),
        }
    }
    if unfit.is_empty() {
        return Ok(notices);
    }
    let what = format!("{} cannot load this adapter: {}", rules.name, unfit.join("; "));
    Err(Error::Model(Fault::new(place, what).hint("write the whole model with the adapter folded in: --merge")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::{LoadedAdapter, Saved};
    use crate::model::{Trained, families};
    use crate::recipe::BaseSource;
    use crate::weights::Checkpoint;
    use clap::ValueEnum;
    use std::path::Path;
    use tch::{Device, Kind, Tensor};

    fn fixtures() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
    }

    fn of(name: &str, base: &str) -> (AdapterConfig, Vec<Update>, ModelSpec) {
        let folder = fixtures().join("peft");
        let adapter = LoadedAdapter::read(&folder.join(name)).unwrap();
        let base = Checkpoint::open(&BaseSource::Folder(folder.join(format!("base-{base}")))).unwrap();
        let spec = families::spec(&base).unwrap();
        let updates = adapter.fit(&spec.sites(), &spec.names).unwrap().into_values().collect();
        (adapter.config, updates, spec)
    }

    fn of_adapter(target: Target) -> ExportChoice {
        ExportChoice { target, merge: false, numbers: None, from: None }
    }

    fn merged(target: Target) -> ExportChoice {
        ExportChoice { merge: true, ..of_adapter(target) }
    }

    fn servers() -> impl Iterator<Item = Target> {
        Target::value_variants().iter().copied().filter(|target| rules(*target).adapters != AdapterRules::All)
    }

    #[track_caller]
    fn refused(target: Target, spec: &ModelSpec, config: &AdapterConfig, learned: Learned<'_>, parts: &[&str]) {
        let error = prove(&of_adapter(target), spec, config, learned).unwrap_err();
        assert_eq!(error.exit_code(), 5);
        for part in parts.iter().chain(&[target.name(), "--merge"]) {
            assert!(error.to_string().contains(part), "{part:?} is not in: {error}");
        }
    }

    #[test]
    fn every_server_takes_a_plain_adapter_and_says_what_ranks_need() {
        let (config, updates, spec) = of("all-linear", "tied");
        for target in servers() {
            assert!(
                prove(&of_adapter(target), &spec, &config, updates.as_slice().into()).unwrap().is_empty(),
                "{target}"
            );
        }
        let ranked = |r: i64| -> Vec<Update> {
            let grown = |update: &Update| Update {
                a: update.a.repeat([r, 1]).narrow(0, 0, r),
                b: update.b.repeat([1, r]).narrow(1, 0, r),
                ..update.shallow_clone()
            };
            updates.iter().map(grown).collect()
        };
        let notices = prove(&of_adapter(Target::Vllm), &spec, &config, ranked(17).as_slice().into()).unwrap();
        assert!(notices[0].contains("--max-lora-rank 32"), "{notices:?}");
        assert!(prove(&of_adapter(Target::Vllm), &spec, &config, ranked(16).as_slice().into()).unwrap().is_empty());
        refused(Target::Vllm, &spec, &config, ranked(513).as_slice().into(), &["its rank is 513", "512"]);
        assert!(prove(&of_adapter(Target::Sglang), &spec, &config, ranked(513).as_slice().into()).is_ok());
    }

    #[test]
    fn what_servers_do_not_take_is_refused_all_at_once() {
        let (config, mut updates, spec) = of("all-linear", "tied");
        let saved = [Saved {
            module: "model.norm".into(),
            trained: Trained::Whole { weight: Tensor::ones([8], (Kind::Float, Device::Cpu)), bias: None },
            shared_with: None,
        }];
        updates[0].lengths = Some(Tensor::ones([8], (Kind::Float, Device::Cpu)));
        updates[1].role = Role::Router;
        let head = Update { module: "lm_head".into(), role: Role::Head, ..updates[2].shallow_clone() };
        updates.push(head);
        let learned = Learned { updates: &updates, saved: &saved };
        for target in servers() {
            let parts = ["DoRA", "model.norm", "no plain linear", "lm_head, which is the embedding"];
            refused(target, &spec, &config, learned, &parts);
            assert!(prove(&merged(target), &spec, &config, learned).is_ok(), "{target}: merged");
            refused(target, &spec, &config, Learned::default(), &["no low-rank updates"]);
        }
        for target in [Target::Peft, Target::Transformers] {
            assert!(prove(&of_adapter(target), &spec, &config, learned).is_ok(), "{target}");
        }
        // A head of its own is another thing.
        let (config, updates, spec) = of("head", "untied");
        for target in servers() {
            assert!(prove(&of_adapter(target), &spec, &config, updates.as_slice().into()).is_ok(), "{target}");
        }
        let mut updates: Vec<Update> = updates.iter().map(Update::shallow_clone).collect();
        updates[0].module = "model.layers.0.self_attn.query_key_value".into();
        for target in [Target::Sglang, Target::Tgi] {
            refused(target, &spec, &config, updates.as_slice().into(), &["query_key_value", "in silence"]);
        }
    }

    #[test]
    fn experts_go_where_they_are_read() {
        let config = std::fs::read(fixtures().join("families/qwen3_moe/config.json")).unwrap();
        let spec = families::from_config(&serde_json::from_slice(&config).unwrap()).unwrap();
        let site = spec.sites().into_iter().find(|site| matches!(site.role, Role::Experts { .. })).unwrap();
        let Role::Experts { count, .. } = site.role else { panic!() };
        let zeros = |shape: [i64; 3]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        let update = Update {
            module: site.name.clone(),
            role: site.role.clone(),
            a: zeros([count, 2, site.shape.1]),
            b: zeros([count, site.shape.0, 2]),
            scale: 1.0,
            lengths: None,
            taken: None,
        };
        let (plain, ..) = of("names", "tied");
        let updates = [update];
        for target in [Target::Vllm, Target::Mlx] {
            assert!(prove(&of_adapter(target), &spec, &plain, updates.as_slice().into()).is_ok(), "{target}");
        }
        for target in [Target::Sglang, Target::Tgi] {
            refused(target, &spec, &plain, updates.as_slice().into(), &["it adapts experts"]);
        }
    }

    #[test]
    fn peft_is_given_adapters_only() {
        let (config, updates, spec) = of("names", "tied");
        let error = prove(&merged(Target::Peft), &spec, &config, updates.as_slice().into()).unwrap_err();
        assert!(error.to_string().contains("--target transformers"), "{error}");
    }
}
