//! How each kind of server is asked for a continuation of exactly these tokens, and how it answers.
//!
//! | Server | How it is told | Where | Prompt | Tokens in the answer |
//! |---|---|---|---|---|
//! | vLLM | `owned_by: vllm` | `/v1/completions` | ids | as `token_id:N`, which is asked for |
//! | SGLang | `owned_by: sglang` | `/v1/completions` | ids | text |
//! | llama.cpp | `owned_by: llamacpp` | `/v1/completions` | ids | id and text, under `logprobs.content` |
//! | Ollama | answers `/api/version` | `/api/generate`, `raw`: its `/v1/completions` puts the template around the prompt once more | text | text |
//! | TGI | answers `/info` | `/generate`, `details`: its `/v1/completions` gives no probabilities | text | id and text |
//! | llama-cpp-python, any other | | `/v1/completions` | ids, then text where they are refused | text |

use serde_json::{Value, json};

use super::client::{Client, Trouble, shortened};

/// Alternatives asked for at each place: what every server gives (OpenAI's limit is 5).
const ALTERNATIVES: u32 = 5;

/// A kind of server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    Vllm,
    Sglang,
    LlamaCpp,
    Ollama,
    Tgi,
    OpenAi,
}

/// What is asked.
pub(super) struct Question<'a> {
    pub model: &'a str,
    pub ids: &'a [u32],
    /// The same as text, without what the server's own tokenizer puts before it.
    pub text: &'a str,
    pub tokens: usize,
}

/// What a server answers.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Answer {
    pub text: String,
    /// Empty where it does not tell them.
    pub tokens: Vec<Token>,
}

/// A token of an answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Token {
    pub id: Option<u32>,
    pub text: String,
    /// What else might have come: with log-probabilities.
    pub top: Vec<Likely>,
}

/// A token and its log-probability.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Likely {
    pub id: Option<u32>,
    pub text: String,
    pub log_probability: f64,
}

/// How a question is put: fuller ways first, as some servers refuse a part of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Manner {
    pub ids: bool,
    pub probabilities: bool,
}

impl Dialect {
    /// Of what `/v1/models` lists as the models' owner, or of what only one kind of server answers.
    pub fn find(client: &Client, owner: &str) -> Self {
        match owner {
            "vllm" => return Self::Vllm,
            "sglang" => return Self::Sglang,
            "llamacpp" => return Self::LlamaCpp,
            _ => {}
        }
        if client.ask("/api/version").is_ok_and(|answer| answer["version"].is_string()) {
            return Self::Ollama;
        }
        let info = client.ask("/info").unwrap_or_default();
        if info["router"] == "text-generation-router" || (info["model_id"].is_string() && info["max_best_of"].is_u64())
        {
            return Self::Tgi;
        }
        Self::OpenAi
    }

    /// The server's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vLLM",
            Self::Sglang => "SGLang",
            Self::LlamaCpp => "llama.cpp",
            Self::Ollama => "Ollama",
            Self::Tgi => "TGI",
            Self::OpenAi => "a server with OpenAI's API",
        }
    }

    /// Why a server may serve the bare base, where that can be asked or is well known.
    pub fn why_bare(self, client: &Client) -> Option<String> {
        let hint = match self {
            Self::LlamaCpp => {
                let answer = client.ask("/lora-adapters").ok()?;
                let adapters = answer.as_array()?;
                let said = adapters.iter().map(|adapter| {
                    let path = shortened(adapter["path"].as_str().unwrap_or("an adapter"));
                    format!("{path} at scale {}", adapter["scale"])
                });
                match adapters.len() {
                    0 => "the server has loaded no adapter: start it with --lora FILE".into(),
                    _ => format!("the server has loaded {}", said.collect::<Vec<_>>().join(", ")),
                }
            }
            Self::Vllm | Self::Sglang | Self::Tgi => {
                "the base answers to its own name: name the adapter with --served-model".into()
            }
            Self::Ollama | Self::OpenAi => return None,
        };
        Some(hint)
    }

    /// The ways to ask, the fullest first.
    pub fn manners(self) -> Vec<Manner> {
        let manner = |ids, probabilities| Manner { ids, probabilities };
        match self {
            Self::Vllm | Self::Sglang | Self::LlamaCpp => vec![manner(true, true), manner(true, false)],
            Self::Ollama | Self::Tgi => vec![manner(false, true), manner(false, false)],
            Self::OpenAi => vec![manner(true, true), manner(false, true), manner(true, false), manner(false, false)],
        }
    }

    /// Asks once.
    pub fn ask(self, client: &Client, question: &Question<'_>, manner: Manner) -> Result<Answer, Trouble> {
        let (path, body) = self.body(question, manner);
        let answer = client.post(path, &body)?;
        let read = match self {
            Self::Ollama => ollama(&answer),
            Self::Tgi => tgi(&answer),
            Self::Vllm | Self::Sglang | Self::LlamaCpp | Self::OpenAi => completion(&answer),
        };
        let makes_no_sense =
            || Trouble::Rubbish(format!("its answer makes no sense: {}", shortened(&answer.to_string())));
        read.ok_or_else(makes_no_sense)
    }

    fn body(self, question: &Question<'_>, Manner { ids, probabilities }: Manner) -> (&'static str, Value) {
        let Question { model, text, tokens, .. } = *question;
        match self {
            Self::Ollama => {
                let mut body = json!({
                    "model": model, "prompt": text, "raw": true, "stream": false,
                    "options": {"temperature": 0, "num_predict": tokens, "seed": 0, "repeat_penalty": 1.0},
                });
                if probabilities {
                    body["logprobs"] = json!(true);
                    body["top_logprobs"] = json!(ALTERNATIVES);
                }
                ("/api/generate", body)
            }
            Self::Tgi => {
                let mut parameters = json!({"max_new_tokens": tokens, "do_sample": false, "details": true});
                if probabilities {
                    parameters["top_n_tokens"] = json!(ALTERNATIVES);
                }
                if !model.is_empty() {
                    parameters["adapter_id"] = json!(model);
                }
                ("/generate", json!({"inputs": text, "parameters": parameters}))
            }
            Self::Vllm | Self::Sglang | Self::LlamaCpp | Self::OpenAi => {
                let prompt = if ids { json!(question.ids) } else { json!(text) };
                let mut body = json!({
                    "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": false,
                });
                if probabilities {
                    body["logprobs"] = json!(ALTERNATIVES);
                }
                match self {
                    Self::Vllm if probabilities => body["return_tokens_as_token_ids"] = json!(true),
                    // A penalty that the server sets by itself would change the likeliest token.
                    Self::LlamaCpp => {
                        body["repeat_penalty"] = json!(1.0);
                        body["cache_prompt"] = json!(false);
                    }
                    _ => {}
                }
                ("/v1/completions", body)
            }
        }
    }
}

/// OpenAI's completion: the older lists beside one another, or llama.cpp's list of objects.
fn completion(answer: &Value) -> Option<Answer> {
    let choice = answer["choices"].get(0)?;
    let text = choice["text"].as_str()?.to_string();
    let told = &choice["logprobs"];
    if let Some(content) = told["content"].as_array() {
        return Some(Answer { text, tokens: content.iter().map(object).collect() });
    }
    let names = told["tokens"].as_array().map(Vec::as_slice).unwrap_or_default();
    let tokens = names.iter().enumerate().map(|(index, name)| {
        let (id, text) = named(name.as_str().unwrap_or_default());
        let likely = told["top_logprobs"].get(index).and_then(Value::as_object);
        let likely = likely.into_iter().flatten().filter_map(|(name, number)| {
            let (id, text) = named(name);
            Some(Likely { id, text, log_probability: number.as_f64()? })
        });
        Token { id, text, top: likely.collect() }
    });
    Some(Answer { text, tokens: tokens.collect() })
}

/// A token in vLLM's way to write an id, or its text.
fn named(name: &str) -> (Option<u32>, String) {
    let id = name.strip_prefix("token_id:").and_then(|id| id.parse().ok());
    (id, if id.is_some() { String::new() } else { name.to_string() })
}

/// A token as an object with alternatives: llama.cpp's, Ollama's, OpenAI's newer one.
fn object(token: &Value) -> Token {
    let id = |token: &Value| token["id"].as_u64().and_then(|id| u32::try_from(id).ok());
    let text = |token: &Value| token["token"].as_str().unwrap_or_default().to_string();
    let likely = token["top_logprobs"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default()
        .iter()
        .filter_map(|one| Some(Likely { id: id(one), text: text(one), log_probability: one["logprob"].as_f64()? }));
    Token { id: id(token), text: text(token), top: likely.collect() }
}

fn ollama(answer: &Value) -> Option<Answer> {
    let tokens = answer["logprobs"].as_array().map(Vec::as_slice).unwrap_or_default();
    Some(Answer { text: answer["response"].as_str()?.to_string(), tokens: tokens.iter().map(object).collect() })
}

fn tgi(answer: &Value) -> Option<Answer> {
    let text = answer["generated_text"].as_str()?.to_string();
    let details = &answer["details"];
    let id = |token: &Value| token["id"].as_u64().and_then(|id| u32::try_from(id).ok());
    let word = |token: &Value| token["text"].as_str().unwrap_or_default().to_string();
    let tokens = details["tokens"].as_array().map(Vec::as_slice).unwrap_or_default();
    let tokens = tokens.iter().enumerate().map(|(index, token)| {
        let likely = details["top_tokens"].get(index).and_then(Value::as_array);
        let likely = likely
            .into_iter()
            .flatten()
            .filter_map(|one| Some(Likely { id: id(one), text: word(one), log_probability: one["logprob"].as_f64()? }));
        Token { id: id(token), text: word(token), top: likely.collect() }
    });
    Some(Answer { text, tokens: tokens.collect() })
}
