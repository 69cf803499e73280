//! Servers of each kind, and servers that misbehave, against a stand-in on this machine.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde_json::json;

use super::*;
use crate::evaluate::{Candidate, Ended, Place, Said, Tolerance};

/// Words of a small language; a token's id is its place here.
const WORDS: [&str; 12] =
    ["<s>", "ask", " red", " blue", " green", " and", " then", " stop", " on", " off", " up", "?"];

/// What a model thinks at a place: the words in order of likelihood, a logit apart.
fn place(first: usize, shift: f32) -> Place {
    let order = (0..WORDS.len()).map(|i| (first + i) % WORDS.len());
    let top: Vec<Candidate> = order
        .enumerate()
        .map(|(rank, id)| Candidate { id: id as u32, token: WORDS[id].into(), logit: 10.0 - shift * rank as f32 })
        .collect();
    let log_sum = top.iter().map(|one| f64::from(one.logit).exp()).sum::<f64>().ln();
    Place { top, log_sum, spread: 2.0 }
}

fn said(ids: &[usize]) -> Said {
    let text: String = ids.iter().map(|id| WORDS[*id]).collect();
    let places = ids.iter().copied().chain([0]).map(|id| place(id, 1.0));
    let ids = ids.iter().map(|id| *id as u32).collect();
    Said { ids, text, ended: Ended::Stop, places: places.collect() }
}

fn probe() -> Probe {
    let asked = |number: usize, trained: &[usize], base: &[usize]| Asked {
        place: format!("built in {number}"),
        prompt: format!("<s>ask{}", WORDS[number + 1]),
        prompt_ids: vec![0, 1, number as u32 + 1],
        trained: said(trained),
        base: Some(said(base)),
    };
    Probe {
        version: 1,
        engraft_version: "0".into(),
        libtorch_version: "0".into(),
        created: "2026-01-01T00:00:00Z".into(),
        base: "owner/base".into(),
        tokenizer: Default::default(),
        chat_template: None,
        vocabulary: WORDS.len() as i64,
        tolerance: Tolerance::of(&["bf16"]).unwrap(),
        stop: vec![0],
        bos: Some("<s>".into()),
        probes: vec![
            asked(1, &[2, 5, 3], &[2, 5, 4]),
            asked(2, &[6, 7], &[8, 9]),
            asked(3, &[10, 11], &[10, 11]),
            asked(4, &[3, 3], &[3, 4, 4]),
        ],
    }
}

/// What the stand-in serves.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Serves {
    Trained,
    Base,
    /// Something else.
    Strange,
    /// The trained one, and it does not stop.
    Endless,
}

/// How it misbehaves.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Misdeed {
    None,
    Status(u16),
    Silent,
    Drips,
    Rubbish,
    NotHttp,
    HangsUp,
    Streams,
    Endless,
    Elsewhere,
    WrongShape,
}

struct Stand {
    dialect: Dialect,
    serves: Serves,
    fault: Misdeed,
    /// Whether it tells probabilities; a request for them is refused otherwise.
    probabilities: bool,
    requests: Vec<(String, Value, String)>,
}

fn start(dialect: Dialect, serves: Serves) -> (String, Arc<Mutex<Stand>>) {
    let stand = Stand { dialect, serves, fault: Misdeed::None, probabilities: true, requests: Vec::new() };
    let stand = Arc::new(Mutex::new(stand));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let shared = stand.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let shared = shared.clone();
            std::thread::spawn(move || {
                let _ = answer(stream, &shared);
            });
        }
    });
    (address, stand)
}

fn answer(mut stream: TcpStream, stand: &Mutex<Stand>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or_default().to_string();
    let (mut length, mut key) = (0, String::new());
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        match name.to_lowercase().as_str() {
            "content-length" => length = value.parse().unwrap(),
            "authorization" => key = value.to_string(),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let (dialect, serves, fault, probabilities) = {
        let mut stand = stand.lock().unwrap();
        stand.requests.push((path.clone(), body.clone(), key));
        (stand.dialect, stand.serves, stand.fault, stand.probabilities)
    };
    let mut reply = |status: u16, kind: &str, body: &str| {
        let length = body.len();
        write!(
            stream,
            "HTTP/1.1 {status} x\r\nConnection: close\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n{body}"
        )
    };
    match fault {
        Misdeed::None => {}
        Misdeed::Status(status) => {
            return reply(status, "application/json", &json!({"error": {"message": "not for you"}}).to_string());
        }
        Misdeed::Silent => {
            std::thread::sleep(Duration::from_secs(20));
            return Ok(());
        }
        Misdeed::Drips => {
            write!(stream, "HTTP/1.1 200 x\r\nContent-Type: application/json\r\n\r\n")?;
            loop {
                std::thread::sleep(Duration::from_millis(50));
                stream.write_all(b" ")?;
            }
        }
        Misdeed::Rubbish => return reply(200, "text/html", "<html>Welcome to \x1b[2Jnginx</html>"),
        Misdeed::NotHttp => return stream.write_all(b"220 mail.example ESMTP\r\n"),
        Misdeed::HangsUp => return Ok(()),
        Misdeed::Streams => return reply(200, "text/event-stream", "data: {}\n\n"),
        Misdeed::Endless => {
            write!(stream, "HTTP/1.1 200 x\r\nContent-Type: application/json\r\n\r\n")?;
            loop {
                stream.write_all(&[b' '; 1 << 16])?;
            }
        }
        Misdeed::Elsewhere => {
            return write!(
                stream,
                "HTTP/1.1 302 x\r\nLocation: http://127.0.0.1:9/v1/models\r\nContent-Length: 0\r\n\r\n"
            );
        }
        Misdeed::WrongShape if path != "/v1/models" => return reply(200, "application/json", "{\"choices\": [{}]}"),
        Misdeed::WrongShape => {}
    }
    let refuse = |what: &str| json!({"error": {"message": what}}).to_string();
    let json = "application/json";
    match path.as_str() {
        "/v1/models" => reply(200, json, &models(dialect).to_string()),
        "/api/version" if dialect == Dialect::Ollama => reply(200, json, "{\"version\": \"0.12.11\"}"),
        "/lora-adapters" if dialect == Dialect::LlamaCpp => reply(200, json, r#"[{"path": "a.gguf", "scale": 0.0}]"#),
        "/info" if dialect == Dialect::Tgi => reply(200, json, "{\"router\": \"text-generation-router\"}"),
        "/v1/completions" | "/api/generate" | "/generate" => {
            let wants = !body["logprobs"].is_null() || !body["parameters"]["top_n_tokens"].is_null();
            let prompt = if path == "/generate" { &body["inputs"] } else { &body["prompt"] };
            if wants && !probabilities {
                return reply(500, json, &refuse("logprobs is not supported"));
            }
            let ids = prompt.is_array();
            if ids && matches!(dialect, Dialect::OpenAi | Dialect::Ollama | Dialect::Tgi) {
                return reply(422, json, &refuse("prompt: a string was expected"));
            }
            let probe = probe();
            let asked = probe.probes.iter().find(|asked| match ids {
                true => json!(asked.prompt_ids) == *prompt,
                // Its tokenizer puts the BOS there.
                false => prompt.as_str().is_some_and(|text| format!("<s>{text}") == asked.prompt),
            });
            let Some(asked) = asked else { return reply(400, json, &refuse("another prompt than was probed")) };
            let said = match serves {
                Serves::Trained | Serves::Endless => asked.trained.clone(),
                Serves::Base => asked.base.clone().unwrap(),
                Serves::Strange => said(&[9, 9, 1]),
            };
            reply(200, json, &completion(dialect, &said, wants, serves == Serves::Endless).to_string())
        }
        _ => reply(404, json, &refuse("no such path")),
    }
}

fn models(dialect: Dialect) -> Value {
    match dialect {
        Dialect::Vllm => json!({"object": "list", "data": [
            {"id": "owner/base", "owned_by": "vllm", "parent": null},
            {"id": "tickets", "owned_by": "vllm", "parent": "owner/base"},
        ]}),
        Dialect::Sglang => json!({"data": [{"id": "owner/base", "owned_by": "sglang"}]}),
        Dialect::LlamaCpp => json!({"data": [{"id": "m.gguf", "owned_by": "llamacpp", "meta": {}}]}),
        Dialect::Ollama => json!({"data": [{"id": "tickets:latest", "owned_by": "library"}]}),
        Dialect::Tgi => json!({"data": [{"id": "owner/base", "owned_by": "owner/base"}]}),
        Dialect::OpenAi => json!({"data": [{"id": "/models/m.gguf", "owned_by": "me"}]}),
    }
}

/// An answer in the server's own words.
fn completion(dialect: Dialect, said: &Said, wants: bool, endless: bool) -> Value {
    let mut ids: Vec<usize> = said.ids.iter().map(|id| *id as usize).collect();
    let mut places = said.places.clone();
    if endless {
        ids.extend([7, 7, 7]);
        places.extend([place(7, 1.0), place(7, 1.0), place(7, 1.0)]);
    }
    let text: String = ids.iter().map(|id| WORDS[*id]).collect();
    let likely = |place: &Place| -> Vec<(u32, String, f64)> {
        let first = place.top.iter().take(5);
        // A little off, as another program's numbers are.
        first.map(|one| (one.id, one.token.clone(), place.log_probability(one) + 0.003)).collect()
    };
    let object = |(id, token, logprob): (u32, String, f64)| json!({"id": id, "token": token, "logprob": logprob});
    match dialect {
        Dialect::LlamaCpp | Dialect::Ollama => {
            let content: Vec<Value> = ids
                .iter()
                .zip(&places)
                .map(|(id, place)| {
                    let top: Vec<Value> = likely(place).into_iter().map(object).collect();
                    let mut token = json!({"token": WORDS[*id], "top_logprobs": top});
                    if dialect == Dialect::LlamaCpp {
                        token["id"] = json!(id);
                    }
                    token
                })
                .collect();
            match dialect {
                Dialect::Ollama if wants => json!({"response": text, "done": true, "logprobs": content}),
                Dialect::Ollama => json!({"response": text, "done": true}),
                _ => {
                    json!({"choices": [{"text": text, "logprobs": if wants { json!({"content": content}) } else { Value::Null }}]})
                }
            }
        }
        Dialect::Tgi => {
            let word = |(id, text, logprob): (u32, String, f64)| json!({"id": id, "text": text, "logprob": logprob});
            let tokens: Vec<Value> = ids.iter().map(|id| json!({"id": id, "text": WORDS[*id]})).collect();
            let top: Vec<Vec<Value>> =
                places.iter().map(|place| likely(place).into_iter().map(word).collect()).collect();
            let top = if wants { json!(top) } else { Value::Null };
            json!({"generated_text": text, "details": {"tokens": tokens, "top_tokens": top}})
        }
        Dialect::Vllm | Dialect::Sglang | Dialect::OpenAi => {
            let name = |id: u32| match dialect {
                Dialect::Vllm => format!("token_id:{id}"),
                _ => WORDS[id as usize].to_string(),
            };
            let tokens: Vec<String> = ids.iter().map(|id| name(*id as u32)).collect();
            let tops = places.iter().map(|place| {
                let pairs = likely(place).into_iter().map(|(id, _, logprob)| (name(id), json!(logprob)));
                Value::Object(pairs.collect())
            });
            let told = json!({"tokens": tokens, "top_logprobs": tops.collect::<Vec<_>>()});
            json!({"choices": [{"text": text, "logprobs": if wants { told } else { Value::Null }}]})
        }
    }
}

const ALL: [Dialect; 6] =
    [Dialect::Vllm, Dialect::Sglang, Dialect::LlamaCpp, Dialect::Ollama, Dialect::Tgi, Dialect::OpenAi];

fn server(address: &str) -> Server<'_> {
    Server { address, model: None, key: None, patience: Duration::from_secs(10) }
}

#[test]
fn every_kind_of_server_is_asked_in_its_own_way_and_what_it_serves_is_told() {
    for dialect in ALL {
        for (serves, verdict) in [
            (Serves::Trained, Verdict::Trained),
            (Serves::Base, Verdict::Base),
            (Serves::Strange, Verdict::Other),
            (Serves::Endless, Verdict::Trained),
        ] {
            for probabilities in [true, false] {
                let (address, stand) = start(dialect, serves);
                stand.lock().unwrap().probabilities = probabilities;
                let served = ask(server(&address), &probe(), &|_, _| ()).unwrap();
                assert_eq!(served.verdict, verdict, "{dialect:?} {serves:?} {probabilities}: {served:?}");
                assert_eq!(served.probabilities, probabilities, "{dialect:?}");
                let ids = matches!(dialect, Dialect::Vllm | Dialect::Sglang | Dialect::LlamaCpp);
                assert_eq!(served.token_ids, ids, "{dialect:?}");
                // The third probe tells nothing, unless by a strange answer.
                let alike = if serves == Serves::Strange { Finding::Other } else { Finding::Alike };
                assert_eq!(served.lines[2].finding, alike);
                let goes_on = served.notices.iter().any(|notice| notice.contains("goes on"));
                assert_eq!(goes_on, serves == Serves::Endless, "{dialect:?} {probabilities}");
                match (serves, served.strength) {
                    (_, None) => assert!(!probabilities),
                    (Serves::Trained | Serves::Endless, Some(strength)) => {
                        assert!((strength - 1.0).abs() < 0.1, "{strength}")
                    }
                    (Serves::Base, Some(strength)) => assert!(strength.abs() < 0.1, "{strength}"),
                    (Serves::Strange, Some(_)) => {}
                }
                if serves == Serves::Base && dialect == Dialect::LlamaCpp {
                    assert!(served.notices[0].ends_with("a.gguf at scale 0.0"), "{:?}", served.notices);
                }
                let requests = std::mem::take(&mut stand.lock().unwrap().requests);
                let last = &requests.iter().rfind(|request| request.0 != "/lora-adapters").unwrap().1;
                match dialect {
                    Dialect::Ollama => assert!(last["raw"] == true && last["options"]["temperature"] == 0),
                    Dialect::Tgi => {
                        assert!(last["parameters"]["do_sample"] == false && last["parameters"]["adapter_id"].is_null())
                    }
                    _ => assert!(last["temperature"] == 0 && last["max_tokens"] == 3, "{last}"),
                }
                // What a server has refused once is not tried again.
                let path = match dialect {
                    Dialect::Ollama => "/api/generate",
                    Dialect::Tgi => "/generate",
                    _ => "/v1/completions",
                };
                let asked = requests.iter().filter(|request| request.0 == path).count();
                let refusals = match (dialect, probabilities) {
                    (Dialect::OpenAi, true) => 1,
                    (Dialect::OpenAi, false) => 3,
                    (_, true) => 0,
                    (_, false) => 1,
                };
                assert_eq!(asked, 4 + refusals, "{dialect:?} {probabilities}");
            }
        }
    }
}

#[test]
fn an_adapter_at_part_of_its_strength_is_neither_and_how_much_of_it_is_there_is_told() {
    let probe = probe();
    let asked = &probe.probes[0];
    let other = Asked {
        base: Said {
            places: vec![place(2, 0.5), place(5, 0.5), place(4, 0.5), place(0, 0.5)],
            ..asked.base.clone().unwrap()
        }
        .into(),
        ..asked.clone()
    };
    let mix = |part: f64| {
        let (trained, base) = (&other.trained.places[0], &other.base.as_ref().unwrap().places[0]);
        let top = trained.top.iter().take(5).map(|one| {
            let other = base.top.iter().find(|other| other.id == one.id).unwrap();
            let log_probability = part * trained.log_probability(one) + (1.0 - part) * base.log_probability(other);
            dialect::Likely { id: Some(one.id), text: String::new(), log_probability }
        });
        let token = dialect::Token { id: Some(2), text: " red".into(), top: top.collect() };
        let answer = Answer { text: " red".into(), tokens: vec![token] };
        let tolerance = Tolerance::of(&["bf16"]).unwrap();
        let mut comparison = Comparison::by(&probe.stop, &tolerance);
        (comparison.add(&other, &answer).finding, comparison.strength.value().unwrap())
    };
    for (part, finding) in [(1.0, Finding::Trained), (0.0, Finding::Base), (0.25, Finding::Other)] {
        let (found, strength) = mix(part);
        assert_eq!(found, finding, "{part}");
        assert!((strength - part).abs() < 1e-6, "{strength}");
    }
}

/// An answer of these words; with what is likely at each place where `told` says so.
fn words(ids: &[usize], told: Option<&dyn Fn(usize) -> Place>) -> Answer {
    let token = |(index, id): (usize, &usize)| {
        let place = told.map(|told| told(index));
        let top = place.iter().flat_map(|place| {
            let likely = |one: &Candidate| dialect::Likely {
                id: Some(one.id),
                text: String::new(),
                log_probability: place.log_probability(one),
            };
            place.top.iter().take(5).map(likely).collect::<Vec<_>>()
        });
        dialect::Token { id: Some(*id as u32), text: WORDS[*id].into(), top: top.collect() }
    };
    let text = ids.iter().map(|id| WORDS[*id]).collect();
    Answer { text, tokens: ids.iter().enumerate().map(token).collect() }
}

/// An answer whose words alone are told.
fn text_of(ids: &[usize]) -> Answer {
    Answer { tokens: Vec::new(), ..words(ids, None) }
}

fn asked(trained: Said, base: Said) -> Asked {
    Asked { trained, base: Some(base), ..probe().probes[0].clone() }
}

fn compared(asked: &Asked, answer: &Answer) -> (Finding, usize, bool) {
    let tolerance = Tolerance::of(&["bf16"]).unwrap();
    let mut comparison = Comparison::by(&[0], &tolerance);
    let finding = comparison.add(asked, answer).finding;
    (finding, comparison.cut_short, comparison.goes_on)
}

#[test]
fn whatever_is_answered_is_not_what_a_model_says_that_says_nothing() {
    // The trained model ends at once.
    let silent = asked(said(&[]), said(&[6, 7, 3]));
    for answer in [words(&[], None), words(&[0], None)] {
        // A token that ends it may be shown, without its text.
        let answer = Answer { text: String::new(), ..answer };
        assert_eq!(compared(&silent, &answer), (Finding::Trained, 0, false), "{answer:?}");
    }
    for answer in [words(&[4, 5], None), text_of(&[4, 5])] {
        assert_eq!(compared(&silent, &answer).0, Finding::Other, "{answer:?}");
    }
    for answer in [words(&[6, 7, 3], None), text_of(&[6, 7, 3])] {
        assert_eq!(compared(&silent, &answer).0, Finding::Base, "{answer:?}");
    }
    // A server that passes over the end says something, with the trained model's probabilities.
    let ends = |_: usize| place(0, 1.0);
    assert_eq!(compared(&silent, &words(&[4, 5], Some(&ends))), (Finding::Trained, 0, true));
    let strange = |_: usize| place(4, 1.0);
    assert_eq!(compared(&silent, &words(&[4, 5], Some(&strange))).0, Finding::Other);
}

#[test]
fn an_answer_that_is_cut_short_tells_nothing_by_its_words() {
    let both = asked(said(&[2, 5, 3, 6]), said(&[2, 8, 9, 9, 9]));
    for make in [&(|ids: &[usize]| words(ids, None)) as &dyn Fn(&[usize]) -> Answer, &text_of] {
        // One word of four, which is of five, too.
        assert_eq!(compared(&both, &make(&[2])), (Finding::Alike, 1, false));
        // Three of them are more than half of the trained model's, and not the base's.
        assert_eq!(compared(&both, &make(&[2, 5, 3])), (Finding::Trained, 0, false));
        // A word of the trained model's alone, but too few.
        let apart = asked(said(&[2, 5, 3, 6]), said(&[8, 9]));
        assert_eq!(compared(&apart, &make(&[2])), (Finding::Alike, 1, false));
        // Where the trained model says no more, it is it.
        let brief = asked(said(&[2]), said(&[2, 8, 9, 9, 9]));
        assert_eq!(compared(&brief, &make(&[2])), (Finding::Trained, 0, false));
        assert_eq!(compared(&asked(said(&[2, 8, 9]), said(&[2])), &make(&[2])), (Finding::Base, 0, false));
    }
    // Where the end was as likely as what was said, it is no cut.
    let mut tied = both.clone();
    tied.trained.places[1].top.iter_mut().filter(|one| one.id == 0).for_each(|one| one.logit = 10.0);
    assert_eq!(compared(&tied, &words(&[2], None)), (Finding::Trained, 0, false));
    // Probabilities tell, whatever the length.
    let mut told = both.clone();
    told.base.as_mut().unwrap().places[0] = place(2, 0.2);
    assert_eq!(compared(&told, &words(&[2], Some(&|_| place(2, 1.0)))), (Finding::Trained, 0, false));
    assert_eq!(compared(&told, &words(&[2], Some(&|_| place(2, 0.2)))), (Finding::Base, 0, false));
}

#[test]
fn a_server_that_cuts_every_answer_short_is_not_taken_for_the_trained_model() {
    let mut probe = probe();
    probe.probes.iter_mut().for_each(|asked| asked.trained = said(&[2, 5, 3, 4, 6]));
    let tolerance = Tolerance::of(&["bf16"]).unwrap();
    let mut comparison = Comparison::by(&probe.stop, &tolerance);
    let findings: Vec<Finding> =
        probe.probes.iter().map(|asked| comparison.add(asked, &words(&[2], None)).finding).collect();
    assert_eq!((Verdict::of_most(&findings), comparison.cut_short), (Verdict::CannotTell, 4));
}

#[test]
fn probabilities_that_no_probe_tells_apart_tell_together() {
    // Training moved every logit by a little, the server rounds by half as much, both up here and down there.
    let moved = |index: usize, rank: usize| if (index + rank).is_multiple_of(2) { 0.06 } else { -0.06 };
    let rounded = |index: usize, rank: usize| if (index / 2 + rank / 2).is_multiple_of(2) { 0.03 } else { -0.03 };
    let at = |index: usize, change: &dyn Fn(usize, usize) -> f32| {
        let mut place = place([2, 5, 3, 0][index % 4], 1.0);
        place.top.iter_mut().enumerate().for_each(|(rank, one)| one.logit += change(index, rank));
        place
    };
    let all = |first: usize, change: &dyn Fn(usize, usize) -> f32| Said {
        places: (0..4).map(|index| at(first + index, change)).collect(),
        ..said(&[2, 5, 3])
    };
    let probes: Vec<Asked> = (0..8).map(|i| asked(all(4 * i, &moved), all(4 * i, &|_, _| 0.0))).collect();
    for (part, verdict) in [(1.0, Verdict::Trained), (0.0, Verdict::Base), (0.5, Verdict::Other)] {
        let tolerance = Tolerance::of(&["bf16", "q8_0"]).unwrap();
        let mut comparison = Comparison::by(&[0], &tolerance);
        let findings = probes.iter().enumerate().map(|(i, asked)| {
            let told =
                |index: usize| at(4 * i + index, &|index, rank| part * moved(index, rank) + rounded(index, rank));
            comparison.add(asked, &words(&[2, 5, 3], Some(&told))).finding
        });
        let findings: Vec<Finding> = findings.collect();
        assert_eq!(Verdict::of_most(&findings), Verdict::CannotTell, "{part}: {findings:?}");
        assert_eq!(
            Verdict::of_most(&findings).or_by(&comparison.strength),
            verdict,
            "{part}: {:?}",
            comparison.strength
        );
    }
}

#[test]
fn a_long_answer_is_kept_in_part() {
    assert_eq!(beginning("short".into()), "short");
    let long = beginning("ä".repeat(9000));
    assert!(long.len() <= MOST_KEPT + 3 && long.ends_with("ä..."), "{}", long.len());
    assert!(beginning(format!("x{}", "ä".repeat(9000))).ends_with("ä..."));
}

#[test]
fn the_model_is_the_one_that_was_named_or_the_only_one_or_the_only_adapter() {
    let (vllm, stand) = start(Dialect::Vllm, Serves::Trained);
    let served = ask(server(&vllm), &probe(), &|_, _| ()).unwrap();
    assert_eq!(served.model, "tickets");
    assert!(served.notices[0].contains("its adapter tickets is asked"), "{:?}", served.notices);
    let named = Server { model: Some("owner/base"), key: Some("word"), ..server(&vllm) };
    assert_eq!(ask(named, &probe(), &|_, _| ()).unwrap().model, "owner/base");
    let last = stand.lock().unwrap().requests.last().unwrap().clone();
    assert_eq!((last.1["model"].as_str(), last.2.as_str()), (Some("owner/base"), "Bearer word"));
    let wrong = Server { model: Some("tikets"), ..server(&vllm) };
    let error = ask(wrong, &probe(), &|_, _| ()).unwrap_err();
    assert!(error.exit_code() == 11 && error.to_string().contains("it has owner/base, tickets"), "{error}");

    let (ollama, _) = start(Dialect::Ollama, Serves::Trained);
    let short = Server { model: Some("tickets"), ..server(&ollama) };
    assert_eq!(ask(short, &probe(), &|_, _| ()).unwrap().model, "tickets");

    // TGI lists its base alone: another name is an adapter's.
    let (tgi, stand) = start(Dialect::Tgi, Serves::Trained);
    ask(Server { model: Some("tickets"), ..server(&tgi) }, &probe(), &|_, _| ()).unwrap();
    let last = stand.lock().unwrap().requests.last().unwrap().1.clone();
    assert_eq!(last["parameters"]["adapter_id"], "tickets");
}

#[test]
fn a_server_that_misbehaves_is_a_clear_error_in_time() {
    for (fault, part) in [
        (Misdeed::Status(401), "wants a key (401): not for you"),
        (Misdeed::Status(500), "the status 500: not for you"),
        (Misdeed::Silent, "no whole answer within 2 s"),
        (Misdeed::Drips, "no whole answer within 2 s"),
        (Misdeed::Rubbish, r"is not JSON: <html>Welcome to"),
        (Misdeed::NotHttp, "HTTP"),
        (Misdeed::HangsUp, "nobody answers"),
        (Misdeed::Streams, "it streams"),
        (Misdeed::Endless, "longer than 16 MiB"),
        (Misdeed::Elsewhere, "it sends to http://127.0.0.1:9"),
        (Misdeed::WrongShape, "makes no sense"),
    ] {
        let (address, stand) = start(Dialect::Vllm, Serves::Trained);
        stand.lock().unwrap().fault = fault;
        let began = Instant::now();
        // What ends by itself may take its time on a busy machine.
        let hangs = matches!(fault, Misdeed::Silent | Misdeed::Drips);
        let patience = Duration::from_secs(if hangs { 2 } else { 30 });
        let patient = Server { patience, ..server(&address) };
        let error = ask(patient, &probe(), &|_, _| ()).unwrap_err();
        let text = error.to_string();
        assert!(error.exit_code() == 11 && text.contains(part) && text.contains(&address), "{fault:?}: {text}");
        assert!(!text.contains('\x1b'), "{text}");
        assert!(!hangs || began.elapsed() < Duration::from_secs(15), "{fault:?}");
    }
    let (address, stand) = start(Dialect::Vllm, Serves::Trained);
    stand.lock().unwrap().fault = Misdeed::Status(403);
    let keyed = Server { key: Some("word"), ..server(&address) };
    let text = ask(keyed, &probe(), &|_, _| ()).unwrap_err().to_string();
    assert!(
        text.contains("refuses this key (403)") && text.contains("--api-key-env") && !text.contains("word"),
        "{text}"
    );
    // A server without a list of models can still be asked for one by its name.
    stand.lock().unwrap().fault = Misdeed::Status(404);
    let text = ask(server(&address), &probe(), &|_, _| ()).unwrap_err().to_string();
    assert!(text.contains("--served-model"), "{text}");
    let text = ask(Server { model: Some("m"), ..server(&address) }, &probe(), &|_, _| ()).unwrap_err().to_string();
    assert!(text.contains("is not there (404)"), "{text}");
    let nobody = ask(server("http://127.0.0.1:9"), &probe(), &|_, _| ()).unwrap_err().to_string();
    assert!(nobody.contains("nobody answers") && nobody.contains("start the server"), "{nobody}");
    assert!(ask(server("localhost"), &probe(), &|_, _| ()).unwrap_err().to_string().contains("http://host:port"));
    let error = ask(server("http://me:hush@127.0.0.1:9"), &probe(), &|_, _| ()).unwrap_err();
    let text = error.to_string();
    assert!(error.exit_code() == 11 && text.contains("--api-key-env") && !text.contains("hush"), "{text}");
}
