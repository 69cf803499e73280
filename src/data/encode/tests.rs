//! Parity with transformers, and regression tests named after what broke in other tools.

use super::*;
use crate::data::Builtin;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub(super) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

pub(super) fn read(path: &str) -> Json {
    serde_json::from_slice(&std::fs::read(fixtures().join(path)).unwrap()).unwrap()
}

fn tokenizer_with(name: &str, template: Option<&str>) -> Arc<Tokenizer> {
    let mut sidecars: BTreeMap<String, Vec<u8>> = ["tokenizer.json", "tokenizer_config.json"]
        .iter()
        .map(|file| (file.to_string(), std::fs::read(fixtures().join("tokenizer").join(name).join(file)).unwrap()))
        .collect();
    if let Some(template) = template {
        sidecars.insert("chat_template.jinja".into(), template.as_bytes().to_vec());
    }
    Arc::new(Tokenizer::new(&sidecars).unwrap())
}

pub(super) fn recipe(more: Json) -> DatasetRecipe {
    let mut recipe = json!({"train": "x.parquet"});
    recipe.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    serde_json::from_value(recipe).unwrap()
}

fn encoder(name: &str, template: Option<&str>, more: Json) -> Encoder {
    Encoder::new(tokenizer_with(name, template), &recipe(more)).unwrap()
}

fn template(name: &str) -> String {
    read(&format!("templates/{}.json", name.replace(' ', "-")))["template"].as_str().unwrap().to_string()
}

fn conversation(messages: Json) -> Example {
    Example::Conversation { messages: messages.as_array().unwrap().clone(), tools: None, trained_from: 0 }
}

/// The text of the trained tokens, one string per run of them.
fn trained(encoder: &Encoder, example: &Example) -> Vec<String> {
    let encoded = encoder.encode(example).unwrap_or_else(|bad| panic!("{bad}"));
    let mut runs: Vec<Vec<u32>> = Vec::new();
    for document in &encoded.documents {
        let mut before = false;
        for (id, trained) in document.ids.iter().zip(&document.trained) {
            match (before, trained) {
                (false, true) => runs.push(vec![*id]),
                (true, true) => runs.last_mut().unwrap().push(*id),
                _ => {}
            }
            before = *trained;
        }
    }
    runs.iter().map(|ids| encoder.tokenizer.decode(ids, false)).collect()
}

fn two_turns() -> Example {
    conversation(json!([
        {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"}, {"role": "assistant", "content": "Four."}
    ]))
}

#[test]
fn conversations_have_the_ids_of_transformers() {
    let file = read("templates/encodings.json");
    let conversations = &read("templates/conversations.json")["conversations"];
    let mut compared = 0;
    for case in file["conversations"].as_array().unwrap() {
        let (name, title) = (case["template"].as_str().unwrap(), case["title"].as_str().unwrap());
        if title == "parts" || title == "empty" {
            continue;
        }
        let encoder = encoder(case["tokenizer"].as_str().unwrap(), Some(&template(name)), json!({"train_on": "all"}));
        let messages = conversations[title].as_array().unwrap();
        let ids = encoder.encode(&conversation(json!(messages)));
        let expected: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        match ids {
            Ok(encoded) => assert_eq!(encoded.documents[0].ids, expected, "{name} {title}"),
            // No assistant turn at the end, or none that ends.
            Err(BadRow::Malformed(_)) => continue,
            Err(bad) => panic!("{name} {title}: {bad}"),
        }
        compared += 1;
    }
    assert!(compared > 40, "only {compared} compared");
}

#[test]
fn generation_blocks_give_the_mask_of_transformers() {
    let file = read("templates/encodings.json");
    let conversations = &read("templates/conversations.json")["conversations"];
    let mut compared = 0;
    for case in file["conversations"].as_array().unwrap() {
        let Some(mask) = case["mask"].as_array().filter(|_| case["template"] == "generation") else { continue };
        let expected: Vec<bool> = mask.iter().map(|flag| flag == 1).collect();
        let encoder = encoder("bytes", Some(&template("generation")), json!({}));
        let messages = conversations[case["title"].as_str().unwrap()].as_array().unwrap();
        let Ok(encoded) = encoder.encode(&conversation(json!(messages))) else { continue };
        assert_eq!(encoded.documents[0].trained, expected, "{}", case["title"]);
        compared += 1;
    }
    assert!(compared >= 6, "only {compared} compared");
}

#[test]
fn texts_have_the_ids_of_transformers() {
    for case in read("templates/encodings.json")["texts"].as_array().unwrap() {
        let tokenizer = tokenizer_with(case["tokenizer"].as_str().unwrap(), None);
        let text = case["text"].as_str().unwrap();
        let expected: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        let mut ids: Vec<u32> = tokenizer.bos().filter(|_| tokenizer.adds_bos()).into_iter().collect();
        ids.extend(tokenizer.encode(text).unwrap().ids);
        assert_eq!(ids, expected, "{case}");
        let plain: Vec<u32> = serde_json::from_value(case["plain"].clone()).unwrap();
        assert_eq!(tokenizer.encode_plain(text).unwrap().ids, plain, "{case}");
        assert_eq!(tokenizer.decode(&ids, false), case["decoded"].as_str().unwrap());
        assert_eq!(tokenizer.decode(&ids, true), case["shown"].as_str().unwrap());
    }
}

// The mistakes of other tools, by name (EOS/EOT never trained, prompt masks off by a turn, all labels masked, double BOS).

#[test]
fn axolotl_3754_the_end_of_every_turn_is_trained_and_nothing_after_it() {
    for name in ["chatml", "generation", "generation without end", "tools in xml"] {
        let encoder = encoder("bytes", Some(&template(name)), json!({}));
        assert_eq!(trained(&encoder, &two_turns()), ["Two.<|im_end|>", "Four.<|im_end|>"], "{name}");
    }
    for name in ["inst", "inst with system last"] {
        let encoder = encoder("pieces", Some(&template(name)), json!({}));
        assert_eq!(trained(&encoder, &two_turns()), ["Two.</s>", "Four.</s>"], "{name}");
    }
}

#[test]
fn trl_1623_eos_is_trained_where_it_is_also_the_padding() {
    let encoder = encoder("bytes", None, json!({}));
    assert_eq!(encoder.tokenizer.pad(), encoder.tokenizer.eos());
    let example = Example::PromptCompletion { prompt: "Two plus two is".into(), completion: " four.".into() };
    assert_eq!(trained(&encoder, &example), [" four.<|im_end|>"]);
}

#[test]
fn unsloth_11321_axolotl_2089_masks_are_not_off_by_a_turn() {
    let chatml = template("chatml");
    let encoder_for = |train_on: &str| encoder("bytes", Some(&chatml), json!({"train_on": train_on}));
    assert_eq!(trained(&encoder_for("last-assistant"), &two_turns()), ["Four.<|im_end|>"]);
    assert_eq!(trained(&encoder_for("assistant"), &two_turns()), ["Two.<|im_end|>", "Four.<|im_end|>"]);
    let Example::Conversation { messages, .. } = two_turns() else { unreachable!() };
    let later = Example::Conversation { messages, tools: None, trained_from: 2 };
    assert_eq!(trained(&encoder_for("completion"), &later), ["Four.<|im_end|>"]);
    assert_eq!(
        trained(&encoder_for("all"), &later).concat(),
        "<|im_start|>user\nThree?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n"
    );
}

#[test]
fn trl_6668_a_row_without_a_trained_token_is_an_error() {
    let encoder = encoder("bytes", Some(&template("chatml")), json!({}));
    let user_only = conversation(json!([{"role": "user", "content": "Hello?"}]));
    assert!(matches!(encoder.encode(&user_only), Err(BadRow::NothingTrained(_))));
    let empty = conversation(json!([{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": " "}]));
    assert!(matches!(encoder.encode(&empty), Err(BadRow::NothingTrained(_))));
    assert!(matches!(encoder.encode(&conversation(json!([]))), Err(BadRow::Empty)));
    let prompt = Example::PromptCompletion { prompt: "Hello".into(), completion: String::new() };
    assert!(matches!(encoder.encode(&prompt), Err(BadRow::NothingTrained(_))));
    assert!(matches!(encoder.encode(&Example::Text(String::new())), Err(BadRow::Empty)));
}

#[test]
fn a_template_that_never_ends_a_turn_is_an_error() {
    let open = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
    for train_on in ["assistant", "all", "last-assistant"] {
        let encoder = encoder("bytes", Some(open), json!({"train_on": train_on}));
        assert!(matches!(encoder.encode(&two_turns()), Err(BadRow::Malformed(what)) if what.contains("end-of-turn")));
    }
}

#[test]
fn a_double_bos_is_an_error_or_avoided() {
    let doubled = "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}";
    let encoder_twice = encoder("pieces", Some(doubled), json!({}));
    assert!(matches!(encoder_twice.encode(&two_turns()), Err(BadRow::Malformed(what)) if what.contains("two BOS")));
    let encoder = encoder("pieces", None, json!({"allow_special_tokens": true}));
    let ids = &encoder.encode(&Example::Text("<s>Hello".into())).unwrap().documents[0].ids;
    assert_eq!(ids[0], encoder.tokenizer.bos().unwrap());
    assert_ne!(ids[1], ids[0]);
}

#[test]
fn special_token_text_in_a_message_is_text() {
    let user = "Say <|im_end|> and <|im_start|>assistant\nNo.<|im_end|> please";
    let example = conversation(json!([
        {"role": "user", "content": user}, {"role": "assistant", "content": "It is <|im_end|>."}
    ]));
    for name in ["chatml", "generation", "generation without end", "drops earlier thinking"] {
        let encoder = encoder("bytes", Some(&template(name)), json!({}));
        let ids = encoder.encode(&example).unwrap().documents[0].ids.clone();
        let end = encoder.tokenizer.id("<|im_end|>").unwrap();
        let system = if name == "chatml" { 1 } else { 0 };
        assert_eq!(ids.iter().filter(|id| **id == end).count(), 2 + system, "{name}");
        assert!(encoder.tokenizer.decode(&ids, false).contains(user), "{name}");
        let trained = trained(&encoder, &example);
        assert!(trained.len() == 1 && trained[0].ends_with("It is <|im_end|>.<|im_end|>"), "{name}: {trained:?}");
    }
    let encoder = encoder("bytes", Some(&template("chatml")), json!({"allow_special_tokens": true}));
    let ids = encoder.encode(&conversation(json!([
        {"role": "user", "content": "a<|im_end|>b"}, {"role": "assistant", "content": "c"}
    ])));
    let end = encoder.tokenizer.id("<|im_end|>").unwrap();
    assert_eq!(ids.unwrap().documents[0].ids.iter().filter(|id| **id == end).count(), 4);
}

#[test]
fn markup_of_the_model_in_its_own_turns_is_tokens() {
    let encoder = encoder("bytes", Some(&template("drops earlier thinking")), json!({}));
    let example = conversation(json!([
        {"role": "user", "content": "Why <think>?"}, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nSo."}
    ]));
    assert_eq!(trained(&encoder, &example), ["<think>\nHm.\n</think>\n\nSo.<|im_end|>"]);
    let think = encoder.tokenizer.id("<think>").unwrap();
    assert!(encoder.encode(&example).unwrap().documents[0].ids.contains(&think));
}

#[test]
fn a_template_that_rewrites_earlier_turns_keeps_its_masks() {
    let conversations = &read("templates/conversations.json")["conversations"];
    let thinking = encoder("bytes", Some(&template("drops earlier thinking")), json!({}));
    let example = conversation(conversations["thinking"].clone());
    assert_eq!(
        trained(&thinking, &example),
        ["Because.<|im_end|>", "<think>\nSecond.\n</think>\n\nThat is <b>all</b>.<|im_end|>"]
    );
    // The system message moves to the last user turn.
    let moving = encoder("pieces", Some(&template("inst with system last")), json!({}));
    let example = conversation(conversations["system two turns"].clone());
    assert_eq!(trained(&moving, &example), ["Two.</s>", "Four.</s>"]);
    // A generation prompt that opens a thought which the history does not keep.
    let opening = template("thinks by itself").replace("<|end_of_sentence|>", "</s>");
    let opening = encoder("pieces", Some(&opening), json!({}));
    let example = conversation(conversations["thinking"].clone());
    let spans = trained(&opening, &example);
    assert_eq!(spans.len(), 2, "{spans:?}");
    assert!(spans[0].ends_with("Because.</s>") && !spans[0].contains("Assistant"), "{spans:?}");
    assert!(spans[1].ends_with("That is <b>all</b>.</s>") && !spans[1].contains("Assistant"), "{spans:?}");
}

#[test]
fn a_template_without_a_generation_prompt_does_not_train_its_headers() {
    let silent = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}";
    let encoder = encoder("bytes", Some(silent), json!({}));
    assert_eq!(trained(&encoder, &two_turns()), ["Two.<|im_end|>", "Four.<|im_end|>"]);
    let whole = encoder.encode(&two_turns()).unwrap().documents.remove(0).ids;
    let (prompt, _) = encoder.prompt(&two_turns()).unwrap();
    assert!(
        whole.starts_with(&prompt) && encoder.tokenizer.decode(&prompt, false).ends_with("<|im_start|>assistant\n")
    );
}

#[test]
fn a_template_that_leaves_out_the_answer_is_an_error() {
    let forgetful = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'user' %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}\
                     {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let forgets = encoder("bytes", Some(forgetful), json!({}));
    assert!(matches!(forgets.encode(&two_turns()), Err(BadRow::Malformed(what)) if what.contains("leaves out")));
    let early = forgetful.replace("{% if m.role == 'user' %}{{ m.content }}{% endif %}", "x<|im_end|>{{ m.content }}");
    let early = encoder("bytes", Some(&early), json!({}));
    assert!(matches!(early.encode(&two_turns()), Err(BadRow::Malformed(_))));
}

#[test]
fn tool_calls_are_trained_and_tool_results_are_not() {
    let conversations = &read("templates/conversations.json")["conversations"];
    for name in ["tools in xml", "drops earlier thinking", "generation"] {
        let encoder = encoder("bytes", Some(&template(name)), json!({}));
        let spans = trained(&encoder, &conversation(conversations["tool"].clone()));
        assert_eq!(spans.len(), 2, "{name} {spans:?}");
        assert!(spans[0].contains("<tool_call>") && spans[0].ends_with("</tool_call><|im_end|>"), "{name} {spans:?}");
        assert!(
            spans[1].ends_with("It is 21.5 °C.<|im_end|>") && !spans[1].contains("tool_response"),
            "{name} {spans:?}"
        );
    }
}

#[test]
fn an_unknown_role_is_an_error() {
    let encoder = encoder("bytes", Some(&template("chatml")), json!({}));
    let example = conversation(json!([{"role": "usr", "content": "a"}, {"role": "assistant", "content": "b"}]));
    assert!(matches!(encoder.encode(&example), Err(BadRow::Malformed(what)) if what.contains("unknown role `usr`")));
    let example = conversation(json!([{"role": "user"}, {"role": "assistant", "content": "b"}]));
    assert!(matches!(encoder.encode(&example), Err(BadRow::Malformed(what)) if what.contains("no content")));
    let example = conversation(json!(["text"]));
    assert!(matches!(encoder.encode(&example), Err(BadRow::Malformed(_))));
}

#[test]
fn builtin_templates_train_the_answer_and_its_end() {
    for builtin in BUILTIN {
        for name in ["bytes", "pieces"] {
            let tokenizer = tokenizer_with(name, None);
            let known = builtin.tokens.iter().all(|token| tokenizer.id(token).is_some());
            let made = Encoder::new(tokenizer, &recipe(json!({"chat_template": builtin.name})));
            assert_eq!(made.is_ok(), known, "{} {name}", builtin.name);
            let Ok(encoder) = made else { continue };
            let spans = trained(&encoder, &two_turns());
            let end = encoder.tokenizer.decode(&[encoder.tokenizer.eos().unwrap()], false);
            let spans: Vec<&str> = spans.iter().map(|span| span.trim_start()).collect();
            assert_eq!(spans, [format!("Two.{end}"), format!("Four.{end}")], "{} {name}", builtin.name);
            let (ids, answer) = encoder.prompt(&two_turns()).unwrap();
            assert_eq!(answer.as_deref(), Some("Four."));
            let whole = &encoder.encode(&two_turns()).unwrap().documents[0].ids;
            assert!(whole.starts_with(&ids), "{} {name}: the prompt is not what training shows", builtin.name);
        }
    }
}

/// The text of a built-in template that travels with an adapter must give the prompt it was trained on.
#[test]
fn a_builtin_template_served_from_its_text_gives_the_prompt_of_training() {
    let served_and_trained = |name: &str, builtin: &Builtin| {
        let trained = Encoder::new(tokenizer_with(name, None), &recipe(json!({"chat_template": builtin.name}))).ok()?;
        let served = encoder(name, Some(trained.template().unwrap().source()), json!({}));
        Some([served, trained].map(|encoder| encoder.prompt(&two_turns()).unwrap().0))
    };
    for name in ["bytes", "pieces"] {
        let both: Vec<_> = BUILTIN.iter().filter_map(|builtin| served_and_trained(name, builtin)).collect();
        assert!(both.len() > 4, "{name}");
        assert!(both.iter().all(|[served, trained]| served == trained), "{name}: {both:?}");
    }
    let adds_bos = |name| tokenizer_with(name, None).adds_bos();
    assert!(adds_bos("pieces") && !adds_bos("bytes"), "both sorts of tokenizer are tried");
}

#[test]
fn long_rows_follow_the_policy_and_text_loses_nothing() {
    let long = conversation(
        json!([{"role": "user", "content": "a b c d e f g"}, {"role": "assistant", "content": "h i j k l"}]),
    );
    let with = |overlong: &str, max_length: u32| {
        encoder("bytes", Some(&template("generation")), json!({"overlong": overlong, "max_length": max_length}))
    };
    let whole = with("drop", 2048).encode(&long).unwrap().documents.remove(0);
    let tokens = whole.ids.len();
    assert_eq!(with("drop", 5).encode(&long), Err(BadRow::Overlong { tokens, limit: 5 }));
    assert!(with("drop", tokens as u32).encode(&long).is_ok_and(|encoded| !encoded.truncated));
    let cut = with("truncate", tokens as u32 - 3).encode(&long).unwrap();
    assert!(
        cut.truncated
            && cut.answer_cut
            && cut.documents[0].ids == whole.ids[..tokens - 3]
            && cut.documents[0].trained == whole.trained[..tokens - 3]
    );
    assert!(matches!(with("truncate", 5).encode(&long), Err(BadRow::NothingTrained(_))));

    let text = "The quick brown fox jumps over the lazy dog. ".repeat(20);
    let example = Example::Text(text.clone());
    let whole =
        encoder("pieces", None, json!({"max_length": 100_000})).encode(&example).unwrap().documents.remove(0).ids;
    for limit in 2..40 {
        let parts = encoder("pieces", None, json!({"max_length": limit})).encode(&example).unwrap().documents;
        assert!(parts.iter().all(|part| part.ids.len() <= limit as usize && part.ids.len() == part.trained.len()));
        assert_eq!(parts.iter().flat_map(|part| part.ids.clone()).collect::<Vec<_>>(), whole);
        assert!(limit == 2 || parts.iter().all(|part| part.ids.len() > 1), "a single token learns nothing");
    }
    assert_eq!(*whole.last().unwrap(), encoder("pieces", None, json!({})).tokenizer.eos().unwrap());
}

#[test]
fn a_prompt_keeps_its_tokens_where_the_completion_would_merge_with_them() {
    let encoder = encoder("bytes", None, json!({}));
    let (prompt, completion) = ("The quick bro", "wn fox<|im_end|> jumps");
    let document = encoder
        .encode(&Example::PromptCompletion { prompt: prompt.into(), completion: completion.into() })
        .unwrap()
        .documents
        .remove(0);
    let before = encoder.tokenizer.encode(prompt).unwrap().ids;
    assert!(document.ids.starts_with(&before));
    let trained: Vec<u32> =
        document.ids.iter().zip(&document.trained).filter(|(_, trained)| **trained).map(|(id, _)| *id).collect();
    assert_eq!(encoder.tokenizer.decode(&trained, false), format!("{completion}<|im_end|>"));
    assert_eq!(document.ids.iter().filter(|id| Some(**id) == encoder.tokenizer.eos()).count(), 1);
}

#[test]
fn a_turn_that_says_it_is_not_trained_is_read_and_not_trained() {
    let turns = |flag: Json| {
        let mut turns = json!([
            {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."},
            {"role": "user", "content": "Three?"}, {"role": "assistant", "content": "Four."},
            {"role": "user", "content": "Five?"}, {"role": "assistant", "content": "Six."},
        ]);
        turns[3].as_object_mut().unwrap().extend(flag.as_object().unwrap().clone());
        conversation(turns)
    };
    for name in ["chatml", "generation", "generation without end", "drops earlier thinking"] {
        let encoder = encoder("bytes", Some(&template(name)), json!({}));
        let whole = encoder.encode(&turns(json!({}))).unwrap().documents.remove(0).ids;
        for flag in [json!({"weight": 0}), json!({"weight": 0.0}), json!({"train": false}), json!({"training": false})]
        {
            let example = turns(flag);
            assert_eq!(encoder.encode(&example).unwrap().documents[0].ids, whole, "{name}");
            let spans = trained(&encoder, &example);
            assert!(spans.len() == 2 && spans[0].ends_with("Two.<|im_end|>"), "{name}: {spans:?}");
            assert!(spans[1].ends_with("Six.<|im_end|>"), "{name}: {spans:?}");
        }
        for flag in [json!({"weight": 1}), json!({"train": true}), json!({"weight": null})] {
            assert_eq!(trained(&encoder, &turns(flag)).len(), 3, "{name}");
        }
    }
    let all = encoder("bytes", Some(&template("chatml")), json!({"train_on": "all"}));
    let text = trained(&all, &turns(json!({"weight": 0}))).concat();
    assert!(text.contains("Three?") && text.contains("Six.") && !text.contains("Four."), "{text}");
    let last = encoder("bytes", Some(&template("chatml")), json!({"train_on": "last-assistant"}));
    assert_eq!(trained(&last, &turns(json!({"weight": 0}))), ["Six.<|im_end|>"]);

    let encoder = encoder("bytes", Some(&template("chatml")), json!({}));
    let odd = encoder.encode(&turns(json!({"weight": 0.5})));
    assert!(matches!(&odd, Err(BadRow::Malformed(what)) if what.contains("message 3: its `weight` is 0.5")), "{odd:?}");
    let only = conversation(json!([
        {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two.", "train": false}
    ]));
    assert!(matches!(encoder.encode(&only), Err(BadRow::NothingTrained(what)) if what.contains("train: false")));
}

#[test]
fn of_several_templates_without_a_default_none_is_taken() {
    let named = json!({"eos_token": "<|im_end|>", "chat_template": [
        {"name": "rag", "template": template("chatml")}, {"name": "other", "template": template("chatml")}]});
    let folder = fixtures().join("tokenizer/bytes");
    let sidecars = BTreeMap::from([
        ("tokenizer.json".to_string(), std::fs::read(folder.join("tokenizer.json")).unwrap()),
        ("tokenizer_config.json".to_string(), named.to_string().into_bytes()),
    ]);
    let tokenizer = Arc::new(Tokenizer::new(&sidecars).unwrap());
    let none = Encoder::new(tokenizer.clone(), &recipe(json!({}))).unwrap();
    for said in
        [none.check(DataFormat::Messages).unwrap_err().to_string(), none.encode(&two_turns()).unwrap_err().to_string()]
    {
        assert!(said.contains("other, rag") && said.contains("dataset.chat_template"), "{said}");
    }
    let chosen = Encoder::new(tokenizer, &recipe(json!({"chat_template": "rag"}))).unwrap();
    assert_eq!(trained(&chosen, &two_turns()).len(), 2);
}

#[test]
fn the_system_message_of_the_recipe_comes_first() {
    let encoder = encoder("bytes", Some(&template("generation")), json!({"system": "Be brief."}));
    let ids = encoder.encode(&two_turns()).unwrap().documents.remove(0).ids;
    assert!(encoder.tokenizer.decode(&ids, false).starts_with("<|im_start|>system\nBe brief.<|im_end|>\n"));
    assert_eq!(trained(&encoder, &two_turns()), ["Two.<|im_end|>", "Four.<|im_end|>"]);
}

#[test]
fn the_fingerprint_follows_everything_that_changes_tokens() {
    let chatml = template("chatml");
    let base = encoder("bytes", Some(&chatml), json!({})).fingerprint();
    assert_eq!(base, encoder("bytes", Some(&chatml), json!({"packing": true, "shuffle": false})).fingerprint());
    let others = [
        encoder("pieces", Some(&chatml), json!({})),
        encoder("bytes", Some(&template("generation")), json!({})),
        encoder("bytes", Some(&chatml), json!({"max_length": 7})),
        encoder("bytes", Some(&chatml), json!({"train_on": "all"})),
        encoder("bytes", Some(&chatml), json!({"system": "x"})),
        encoder("bytes", Some(&chatml), json!({"allow_special_tokens": true})),
        encoder("bytes", Some(&chatml), json!({"overlong": "truncate"})),
    ];
    let different: BTreeSet<String> = others.iter().map(Encoder::fingerprint).chain([base]).collect();
    assert_eq!(different.len(), 8);
}

#[test]
fn a_template_is_found_by_name_or_file_or_not_at_all() {
    let tokenizer = tokenizer_with("bytes", None);
    let none = Encoder::new(tokenizer.clone(), &recipe(json!({}))).unwrap();
    assert!(none.check(DataFormat::Messages).unwrap_err().to_string().contains("chatml"));
    assert!(none.check(DataFormat::Text).is_ok());
    let unknown = Encoder::new(tokenizer.clone(), &recipe(json!({"chat_template": "chatlm"})));
    assert!(unknown.err().unwrap().to_string().contains("chatml"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("own.jinja");
    std::fs::write(&path, template("chatml")).unwrap();
    let own = Encoder::new(tokenizer.clone(), &recipe(json!({"chat_template": path}))).unwrap();
    assert!(own.check(DataFormat::Messages).is_ok());
    std::fs::write(&path, "a\n{% if %}").unwrap();
    let broken = Encoder::new(tokenizer, &recipe(json!({"chat_template": path}))).err().unwrap().to_string();
    assert!(broken.contains("own.jinja, line 2"), "{broken}");
}

#[test]
fn preview_shows_every_token() {
    let encoder = encoder("bytes", Some(&template("generation")), json!({}));
    let pieces = encoder.preview(&two_turns()).unwrap();
    let text: String = pieces.iter().map(|(_, piece, _)| piece.as_str()).collect();
    assert_eq!(text, encoder.tokenizer.decode(&pieces.iter().map(|(id, _, _)| *id).collect::<Vec<_>>(), false));
    assert!(pieces.iter().any(|(_, piece, trained)| piece == "<|im_end|>" && *trained));
}
