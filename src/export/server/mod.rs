//! A running server is asked the probes of an export, and it shows what it serves: the trained model, the bare base (a server that
//! passes over an adapter says nothing of it), or something else.

mod client;
mod compare;
mod dialect;

#[cfg(test)]
mod tests;

use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use self::client::{Client, Trouble};
use self::compare::Comparison;
use self::dialect::{Answer, Dialect, Manner, Question};
use super::probe::{Asked, Probe};
use crate::evaluate::{Finding, Verdict};
use crate::{Error, Fault, Result};

/// Longest answer that is kept of a server, in bytes.
const MOST_KEPT: usize = 4 << 10;

/// A server to ask.
#[derive(Debug, Clone, Copy)]
pub struct Server<'a> {
    /// `http://host:port`.
    pub address: &'a str,
    /// What it calls the model; where it has only one, that.
    pub model: Option<&'a str>,
    /// A key, where it wants one.
    pub key: Option<&'a str>,
    /// How long an answer may take.
    pub patience: Duration,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Served {
    /// What kind of server it is.
    pub server: &'static str,
    /// What was asked there.
    pub model: String,
    /// Whether it was asked in token ids; in text otherwise.
    pub token_ids: bool,
    /// Whether it told probabilities.
    pub probabilities: bool,
    /// Each probe.
    pub lines: Vec<Line>,
    /// Which model it serves.
    pub verdict: Verdict,
    /// How far it is on the way from the base (0) to the trained model (1), by the probabilities it told.
    pub strength: Option<f64>,
    /// What a person should know.
    pub notices: Vec<String>,
}

/// What came of one probe.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    /// Which.
    pub place: String,
    /// What the server answered, or the beginning of it.
    pub answer: String,
    /// How far its log-probabilities behind the prompt are from the trained model's, in spreads of the logits.
    pub from_trained: Option<f64>,
    /// From the base's.
    pub from_base: Option<f64>,
    /// Whose answer it is.
    pub finding: Finding,
}

/// Asks a server.
///
/// # Errors
/// [`Error::Network`]: nobody there, no answer in time, another status than 200, an answer that is none, a model it has not; each
/// says what is there and the way out.
pub fn ask(server: Server<'_>, probe: &Probe, progress: &dyn Fn(u64, u64)) -> Result<Served> {
    let client = Client::new(server.address, server.key, server.patience).map_err(Error::Network)?;
    let place = |path: &str| format!("{}{path}", client.address());
    let models = models(&client, server.key.is_some())?;
    let (name, owner, mut notices) = choose(&models, server.model, client.address())?;
    let dialect = Dialect::find(&client, &owner);
    // What is not in TGI's list is the name of an adapter; its own model has none.
    let asked_as = match dialect {
        Dialect::Tgi if models.iter().any(|model| model.name == name) => "",
        _ => name.as_str(),
    };
    if client.shows_its_key() {
        notices.push(
            "the key goes to the server over plain http, where others can read it: name an https:// address".into(),
        );
    }
    let mut manners = dialect.manners();
    let mut lines = Vec::new();
    // Weights and what is computed with are rounded as the server likes: nearly all like bf16 or f16, and llama.cpp rounds what
    // goes into products of quantised weights to q8_0.
    let tolerance = probe.computed_in("bf16").tolerance.and("q8_0");
    let mut comparison = Comparison::by(&probe.stop, &tolerance);
    for (index, asked) in probe.probes.iter().enumerate() {
        progress(index as u64, probe.probes.len() as u64);
        let text = probe.bos.as_deref().and_then(|bos| asked.prompt.strip_prefix(bos)).unwrap_or(&asked.prompt);
        let question = Question { model: asked_as, ids: &asked.prompt_ids, text, tokens: longest(asked) };
        let answer = first_that_answers(dialect, &client, &question, &mut manners).map_err(|trouble| {
            let path = if dialect == Dialect::Ollama { "/api/generate" } else { "/v1/completions" };
            refused(&place(path), &trouble, server.key.is_some())
        })?;
        let compared = comparison.add(asked, &answer);
        lines.push(Line {
            place: asked.place.clone(),
            answer: beginning(answer.text),
            from_trained: compared.from_trained,
            from_base: compared.from_base,
            finding: compared.finding,
        });
    }
    let Comparison { strength, goes_on, cut_short, .. } = comparison;
    if cut_short > 0 {
        notices.push(format!(
            "{cut_short} of the answers ended long before what was said, and so tell nothing: see whether the server cuts answers short"
        ));
    }
    if goes_on {
        notices
            .push("the server goes on behind the token that ends the trained answers: it does not stop there".into());
    }
    let findings: Vec<Finding> = lines.iter().map(|line| line.finding).collect();
    let verdict = Verdict::of_most(&findings).or_by(&strength);
    if verdict == Verdict::Base {
        notices.extend(dialect.why_bare(&client));
    }
    let manner = manners[0];
    Ok(Served {
        server: dialect.name(),
        model: name,
        token_ids: manner.ids,
        probabilities: lines.iter().any(|line| line.from_trained.is_some()),
        verdict,
        strength: strength.value(),
        lines,
        notices,
    })
}

/// The beginning of an answer: a server may send any amount.
fn beginning(mut answer: String) -> String {
    if answer.len() > MOST_KEPT {
        let end = (0..=MOST_KEPT).rev().find(|end| answer.is_char_boundary(*end));
        answer.truncate(end.unwrap_or_default());
        answer += "...";
    }
    answer
}

/// As many tokens as the longer of the two answers has.
fn longest(asked: &Asked) -> usize {
    asked.trained.ids.len().max(asked.base.as_ref().map_or(0, |base| base.ids.len())).max(1)
}

/// A model that a server lists.
struct Listed {
    name: String,
    owner: String,
    /// Whether it says that it is an adapter on another (vLLM does).
    adapter: bool,
}

/// What a server lists under `/v1/models`; nothing where it has no such list.
fn models(client: &Client, has_key: bool) -> Result<Vec<Listed>> {
    let place = format!("{}/v1/models", client.address());
    let answer = match client.ask("/v1/models") {
        Ok(answer) => answer,
        Err(Trouble::Status(404 | 405, _)) => return Ok(Vec::new()),
        Err(trouble) => return Err(refused(&place, &trouble, has_key)),
    };
    let Some(models) = answer["data"].as_array() else {
        let what = format!("is no list of models: {}", client::shortened(&answer.to_string()));
        let hint = "name the address of an OpenAI-compatible server";
        return Err(Error::Network(Fault::new(place, what).hint(hint)));
    };
    let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
    let listed = models.iter().map(|model| Listed {
        name: text(&model["id"]),
        owner: text(&model["owned_by"]),
        adapter: model["parent"].is_string(),
    });
    Ok(listed.filter(|model| !model.name.is_empty()).collect())
}

/// Which of the listed models is asked, its owner, and what is to be said of the choice.
fn choose(models: &[Listed], typed: Option<&str>, address: &str) -> Result<(String, String, Vec<String>)> {
    let names = || models.iter().map(|model| model.name.as_str()).collect::<Vec<_>>().join(", ");
    let owner = |name: &str| {
        let found = models.iter().find(|model| model.name == name).or(models.first());
        found.map(|model| model.owner.clone()).unwrap_or_default()
    };
    if let Some(name) = typed {
        let same = |model: &&Listed| model.name == name || model.name.strip_suffix(":latest") == Some(name);
        let of_tgi = models.len() == 1 && models[0].owner == models[0].name;
        if models.is_empty() || of_tgi || models.iter().any(|model| same(&model)) {
            return Ok((name.to_string(), owner(name), Vec::new()));
        }
        let fault = Fault::new(address, format!("has no model {name:?}"));
        return Err(Error::Network(fault.hint(format!("it has {}", names()))));
    }
    let adapters: Vec<&Listed> = models.iter().filter(|model| model.adapter).collect();
    let (chosen, notice) = match (models, &adapters[..]) {
        ([], _) => {
            let fault = Fault::new(address, "lists no model");
            return Err(Error::Network(fault.hint("say which is asked: --served-model NAME")));
        }
        ([only], _) => (only, None),
        (_, [only]) => (*only, Some(format!("the server has {}; its adapter {} is asked", names(), only.name))),
        _ => {
            let fault = Fault::new(address, format!("has several models: {}", names()));
            return Err(Error::Network(fault.hint("say which is asked: --served-model NAME")));
        }
    };
    Ok((chosen.name.clone(), chosen.owner.clone(), notice.into_iter().collect()))
}

/// Asks in the fullest manner that the server takes; those that it refuses are not tried again.
fn first_that_answers(
    dialect: Dialect,
    client: &Client,
    question: &Question<'_>,
    manners: &mut Vec<Manner>,
) -> Result<Answer, Trouble> {
    loop {
        match dialect.ask(client, question, manners[0]) {
            // What these say of a part of the question that a server does not know.
            Err(Trouble::Status(400 | 422 | 500 | 501, _)) if manners.len() > 1 => {
                manners.remove(0);
            }
            other => return other,
        }
    }
}

/// What is wrong with a server, and the way out.
fn refused(place: &str, trouble: &Trouble, has_key: bool) -> Error {
    let (what, hint) = match trouble {
        Trouble::Absent(what) => {
            (format!("nobody answers: {what}"), "start the server, or check host and port".to_string())
        }
        Trouble::Hangs(patience) => (
            format!("no whole answer within {:.0} s", patience.as_secs_f64()),
            "see whether the server is still loading; --timeout SECONDS waits longer".to_string(),
        ),
        Trouble::Status(code @ (401 | 403), message) if has_key => {
            (format!("refuses this key ({code}): {message}"), "check the variable that --api-key-env names".to_string())
        }
        Trouble::Status(code @ (401 | 403), message) => (
            format!("wants a key ({code}): {message}"),
            "put it into an environment variable and name that: --api-key-env VARIABLE".to_string(),
        ),
        Trouble::Status(404, message) => (
            format!("is not there (404): {message}"),
            "check the address, and the model with --served-model".to_string(),
        ),
        Trouble::Status(code, message) => {
            (format!("answers with the status {code}: {message}"), "see what the server's log says".to_string())
        }
        Trouble::Rubbish(what) => (what.clone(), "name the address of an OpenAI-compatible server".to_string()),
    };
    Error::Network(Fault::new(place, what).hint(hint))
}
