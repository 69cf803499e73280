//! How byte-level tokenizers cut text into words: what GGUF names, and what `tokenizer.json` spells out; one table, read both ways.

use serde_json::Value as Json;

/// How a byte-level tokenizer cuts text into words before merging.
pub(super) struct Splitting {
    /// The names GGUF files give it (`tokenizer.ggml.pre`).
    pub names: &'static [&'static str],
    /// The cuts, one after the other; the byte-level step comes last by itself.
    pub steps: &'static [Step],
    /// Whether a word that is a token is taken whole, whatever the merges say.
    pub ignore_merges: bool,
    /// Whether BOS is added when the metadata does not say.
    pub add_bos: bool,
    /// Whether text is normalised to NFC first.
    pub nfc: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Every digit by itself.
    Digits,
    /// Digits apart from all else.
    DigitRuns,
    /// Punctuation apart from all else.
    Punctuation,
    /// GPT-2's expression, built into the byte-level step.
    Gpt2,
    /// A regular expression whose matches are words.
    Split(&'static str),
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const PLAIN: Splitting = Splitting { names: &[], steps: &[], ignore_merges: false, add_bos: false, nfc: false };

/// Sources: the models' own `tokenizer.json` files, and `llama-vocab.cpp` of llama.cpp for which name means which.
pub(super) const SPLITTINGS: &[Splitting] = &[
    Splitting {
        names: &["gpt-2", "mpt", "olmo", "phi-2", "jais", "trillion", "roberta-bpe", "exaone4"],
        steps: &[Step::Gpt2],
        ..PLAIN
    },
    Splitting {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        steps: &[Step::Digits, Step::Gpt2],
        ..PLAIN
    },
    Splitting {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
        steps: &[Step::Split(LLAMA3)],
        ignore_merges: true,
        add_bos: true,
        ..PLAIN
    },
    Splitting { names: &["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"], steps: &[Step::Split(LLAMA3)], ..PLAIN },
    Splitting { names: &["stablelm2", "hunyuan"], steps: &[Step::Split(QWEN2)], ..PLAIN },
    Splitting { names: &["qwen2", "deepseek-r1-qwen"], steps: &[Step::Split(QWEN2)], nfc: true, ..PLAIN },
    Splitting { names: &["tekken"], steps: &[Step::Split(TEKKEN)], ignore_merges: true, add_bos: true, ..PLAIN },
    Splitting { names: &["gpt-4o", "llama4"], steps: &[Step::Split(GPT4O)], ..PLAIN },
    Splitting {
        names: &["deepseek-coder"],
        steps: &[
            Step::Split(r"[\r\n]"),
            Step::Split(r"\s?\p{L}+"),
            Step::Split(r"\s?\p{P}+"),
            Step::Split(r"[一-龥ࠀ-一가-퟿]+"),
            Step::Digits,
        ],
        ..PLAIN
    },
    // The byte-level step is among them, so those after it see bytes.
    Splitting {
        names: &["falcon"],
        steps: &[Step::Punctuation, Step::Gpt2, Step::DigitRuns, Step::Split("[0-9][0-9][0-9]")],
        ..PLAIN
    },
    Splitting {
        names: &["bloom", "gpt3-finnish"], steps: &[Step::Split(r" ?[^(\s|[.,!?…。，、।۔،])]+")], ..PLAIN
    },
];

/// The steps a `tokenizer.json` spells out.
#[derive(Debug, PartialEq)]
pub(crate) struct SpelledOut {
    steps: Vec<Owned>,
    ignore_merges: bool,
    nfc: bool,
}

#[derive(Debug, PartialEq)]
enum Owned {
    Known(Step),
    Split(String),
    /// What no name of GGUF stands for.
    Other(String),
}

impl SpelledOut {
    /// Reads the steps of a `tokenizer.json`.
    pub fn of(tokenizer: &Json) -> Self {
        let mut steps = Vec::new();
        collect(&tokenizer["pre_tokenizer"], &mut steps);
        let nfc = |normalizer: &Json| normalizer["type"] == "NFC";
        let normalizer = &tokenizer["normalizer"];
        Self {
            steps,
            ignore_merges: tokenizer["model"]["ignore_merges"] == true,
            nfc: nfc(normalizer) || normalizer["normalizers"].as_array().is_some_and(|all| all.iter().any(nfc)),
        }
    }

    fn is(&self, steps: &[Step]) -> bool {
        let same = |(own, step): (&Owned, &Step)| match (own, step) {
            (Owned::Split(own), Step::Split(regex)) => own == regex,
            (Owned::Known(own), step) => own == step,
            _ => false,
        };
        self.steps.len() == steps.len() && self.steps.iter().zip(steps).all(same)
    }
}

impl std::fmt::Display for SpelledOut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let steps: Vec<String> = self
            .steps
            .iter()
            .map(|step| match step {
                Owned::Known(step) => format!("{step:?}"),
                Owned::Split(regex) => format!("Split {regex:?}"),
                Owned::Other(what) => what.clone(),
            })
            .collect();
        write!(f, "{}", if steps.is_empty() { "nothing".to_string() } else { steps.join(", then ") })
    }
}

fn collect(step: &Json, into: &mut Vec<Owned>) {
    let text = |key: &str| step[key].as_str().unwrap_or_default();
    match text("type") {
        "Sequence" => step["pretokenizers"].as_array().into_iter().flatten().for_each(|step| collect(step, into)),
        "ByteLevel" if step["add_prefix_space"] != true => {
            if step["use_regex"] != false {
                into.push(Owned::Known(Step::Gpt2));
            }
        }
        "Digits" if step["individual_digits"] == true => into.push(Owned::Known(Step::Digits)),
        "Digits" => into.push(Owned::Known(Step::DigitRuns)),
        "Punctuation" if text("behavior") == "Contiguous" => into.push(Owned::Known(Step::Punctuation)),
        "Split" => {
            // Of an expression that matches everything, what it does not match need not be kept.
            let words = (text("behavior"), step["invert"] == true);
            match step["pattern"]["Regex"].as_str() {
                Some(regex) if [("Isolated", false), ("Removed", true)].contains(&words) => {
                    into.push(Owned::Split(regex.to_string()))
                }
                _ => into.push(Owned::Other(step.to_string())),
            }
        }
        _ if step.is_null() => {}
        _ => into.push(Owned::Other(step.to_string())),
    }
}

/// The name that GGUF has for these steps; `None` where it has none.
pub(crate) fn splitting(spelled: &SpelledOut) -> Option<&'static str> {
    let alike = |exactly: bool| {
        SPLITTINGS.iter().find(|splitting| {
            let flags = splitting.ignore_merges == spelled.ignore_merges;
            // llama.cpp normalises nothing, whatever the name.
            spelled.is(splitting.steps) && flags && (!exactly || splitting.nfc == spelled.nfc)
        })
    };
    alike(true).or_else(|| alike(false)).map(|splitting| splitting.names[0])
}

/// Every name that is known.
pub(crate) fn known() -> String {
    SPLITTINGS.iter().map(|splitting| splitting.names[0]).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn named(pre_tokenizer: Json, normalizer: Json, ignore_merges: bool) -> Option<&'static str> {
        let model = json!({"ignore_merges": ignore_merges});
        splitting(&SpelledOut::of(&json!({"pre_tokenizer": pre_tokenizer, "normalizer": normalizer, "model": model})))
    }

    #[test]
    fn steps_have_the_name_of_their_kind() {
        let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": use_regex});
        let digits = json!({"type": "Digits", "individual_digits": true});
        let sequence = |steps: &[Json]| json!({"type": "Sequence", "pretokenizers": steps});
        let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        let nfc = json!({"type": "NFC"});
        assert_eq!(named(bytes(true), Json::Null, false), Some("gpt-2"));
        // GPT-NeoX normalises, too.
        assert_eq!(named(bytes(true), nfc.clone(), false), Some("gpt-2"));
        assert_eq!(named(sequence(&[digits, bytes(true)]), Json::Null, false), Some("smollm"));
        let llama3 = sequence(&[split(LLAMA3), bytes(false)]);
        assert_eq!(named(llama3.clone(), Json::Null, true), Some("llama-bpe"));
        assert_eq!(named(llama3, Json::Null, false), Some("dbrx"));
        let qwen = sequence(&[split(QWEN2), bytes(false)]);
        assert_eq!(named(qwen.clone(), nfc, false), Some("qwen2"));
        assert_eq!(named(qwen, Json::Null, false), Some("stablelm2"));
        let falcon = [
            json!({"type": "Punctuation", "behavior": "Contiguous"}),
            bytes(true),
            json!({"type": "Digits", "individual_digits": false}),
            split("[0-9][0-9][0-9]"),
        ];
        assert_eq!(named(sequence(&falcon), Json::Null, false), Some("falcon"));
        for other in [
            sequence(&[split(r"\w+"), bytes(false)]),
            json!({"type": "ByteLevel", "add_prefix_space": true, "use_regex": true}),
            json!({"type": "Metaspace"}),
        ] {
            assert_eq!(named(other.clone(), Json::Null, false), None, "{other}");
        }
    }
}
