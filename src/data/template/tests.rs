use super::*;
use std::path::{Path, PathBuf};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/templates")
}

fn read(name: &str) -> Json {
    serde_json::from_slice(&std::fs::read(fixtures().join(name)).unwrap()).unwrap()
}

fn special_tokens() -> Vec<(String, String)> {
    let tokens = read("conversations.json");
    tokens["special_tokens"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(name, text)| (name.clone(), text.as_str().unwrap().into()))
        .collect()
}

fn now() -> DateTime {
    read("conversations.json")["now"].as_str().unwrap().parse().unwrap()
}

fn compile(source: &str) -> Result<ChatTemplate> {
    ChatTemplate::new(source, "test", special_tokens(), now())
}

fn render(source: &str, messages: &[Json]) -> std::result::Result<String, String> {
    let template = compile(source).map_err(|error| error.to_string())?;
    let conversation = Conversation { messages, ..Default::default() };
    template.render(&conversation, KeptApart::default()).map(|rendered| rendered.text)
}

/// What ours gives instead of the reference's, if it does.
fn difference(
    template: &Result<ChatTemplate>,
    case: &Json,
    messages: &[Json],
    variables: &Map<String, Json>,
) -> Option<String> {
    let ours = match template {
        Err(error) => Err(error.to_string()),
        Ok(template) => {
            let conversation = Conversation {
                messages,
                tools: case.get("tools"),
                documents: case.get("documents"),
                add_generation_prompt: case["add_generation_prompt"] == true,
                variables: Some(variables),
            };
            template.render(&conversation, KeptApart::default())
        }
    };
    match (ours, case["text"].as_str()) {
        (Err(_), None) => None,
        (Ok(rendered), Some(text)) => {
            let spans = case["generation"].as_array().into_iter().flatten();
            let spans: Vec<_> =
                spans.map(|span| span[0].as_u64().unwrap() as usize..span[1].as_u64().unwrap() as usize).collect();
            if rendered.text == text && rendered.generation == spans {
                return None;
            }
            Some(format!("ours   {:?} {:?}\n  theirs {text:?} {spans:?}", rendered.text, rendered.generation))
        }
        (Ok(rendered), None) => Some(format!("ours   {:?}\n  theirs {}", rendered.text, case["error"])),
        (Err(error), Some(text)) => Some(format!("ours   {error}\n  theirs {text:?}")),
    }
}

#[test]
fn conversations_render_as_transformers_renders_them() {
    let conversations = &read("conversations.json")["conversations"];
    let (mut compared, mut differences) = (0, Vec::new());
    for entry in std::fs::read_dir(fixtures()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let file = read(&name);
        let Some(source) = file["template"].as_str() else { continue };
        let template = compile(source);
        let shape = template.as_ref().unwrap().content;
        for case in file["cases"].as_array().unwrap() {
            let title = case["title"].as_str().unwrap();
            // Contents the template does not take are made to fit here, and print as nothing or as Python lists there.
            if (shape == ContentShape::Text && title == "parts") || (shape == ContentShape::Parts && title != "parts") {
                continue;
            }
            let messages = conversations[title].as_array().unwrap();
            let variables = case["variables"].as_object().cloned().unwrap_or_default();
            compared += 1;
            if let Some(difference) = difference(&template, case, messages, &variables) {
                differences.push(format!("{name} {title} {}\n  {difference}", Json::Object(variables)));
            }
        }
    }
    assert!(differences.is_empty(), "{} of {compared} differ:\n{}", differences.len(), differences.join("\n"));
    assert!(compared > 300, "only {compared} compared");
}

#[test]
fn jinja_means_what_it_means_to_jinja2() {
    let file = read("expressions.json");
    let mut context = file["context"].as_object().unwrap().clone();
    let messages = context.remove("messages").unwrap();
    let mut differences = Vec::new();
    let cases = file["cases"].as_array().unwrap();
    // Python refuses this; printing `False` does no harm.
    let lenient = ["{{ 1 in 'abc' }}"];
    for case in cases {
        if lenient.contains(&case["template"].as_str().unwrap()) {
            continue;
        }
        let template = compile(case["template"].as_str().unwrap());
        if let Some(difference) = difference(&template, case, messages.as_array().unwrap(), &context) {
            differences.push(format!("{}\n  {difference}", case["template"]));
        }
    }
    assert!(differences.is_empty(), "{} of {} differ:\n{}", differences.len(), cases.len(), differences.join("\n"));
}

/// On a thread with the small stack of a worker.
fn on_small_stack<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> T {
    std::thread::Builder::new().stack_size(2 << 20).spawn(run).unwrap().join().expect("no overflow, no panic")
}

#[test]
fn hostile_templates_end_in_an_error() {
    let deep =
        |open: &str, close: &str, count: usize| format!("{{{{ {}1{} }}}}", open.repeat(count), close.repeat(count));
    let hostile = [
        deep("-", "", 60_000),
        deep("not ", "", 15_000),
        deep("(", ")", 30_000),
        deep("[", "]", 30_000),
        deep("{'a':", "}", 10_000),
        deep("a(", ")", 20_000),
        deep("a[", "]", 20_000),
        deep("1 if 1 else ", "", 5_000),
        deep("1+", "", 30_000),
        deep("1~", "", 30_000),
        deep("1*", "", 30_000),
        deep("1-", "", 30_000),
        deep("1**", "", 20_000),
        deep("1<", "", 30_000),
        deep("1 and ", "", 9_000),
        deep("1|", "abs", 1),
        format!("{{{{ 1{} }}}}", "|abs".repeat(15_000)),
        format!("{{{{ a{} }}}}", ".a".repeat(30_000)),
        "{% if 1 %}".repeat(6_000),
        "{% for a in [1] %}".repeat(3_500),
        format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(5_000)),
        "x".repeat(65 * 1024),
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".into(),
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}".into(),
        "{% set ns = namespace(s='x' * 1000) %}{% for a in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}".into(),
        "{% set ns = namespace(s='x' * 1000) %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}".into(),
        "{% set ns = namespace(s='x' * 1000) %}{% for a in range(60) %}{% set ns.s = ns.s.replace('x', 'xx') %}{% endfor %}".into(),
        "{% set ns = namespace(s='x' * 1000) %}{% for a in range(60) %}{% set ns.s = [ns.s, ns.s]|join %}{% endfor %}".into(),
        "{% set ns = namespace(s='x' * 1000) %}{% for a in range(60) %}{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}".into(),
        "{% set ns = namespace(s='x' * 1000) %}{% for a in range(60) %}{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}{% endfor %}".into(),
        "{% set ns = namespace(l=[1] * 1000) %}{% for a in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}".into(),
        "{% set ns = namespace(l=[]) %}{% for a in range(90000) %}{% set ns.l = [ns.l] %}{% endfor %}".into(),
        "{% set ns = namespace(l={}) %}{% for a in range(90000) %}{% set ns.l = {'a': ns.l} %}{% endfor %}".into(),
        "{% set ns = namespace() %}{% set ns.self = ns %}{{ ns }}".into(),
        "{% set ns = namespace() %}{% set ns.self = ns %}{{ ns|tojson }}".into(),
        format!("{{% for a in range(99999) %}}{}{{% endfor %}}", "raw text ".repeat(6_000)),
        format!("{{% set x %}}{{% for a in range(99999) %}}{}{{% endfor %}}{{% endset %}}", "raw text ".repeat(6_000)),
        "{{ 'x' * 99999999999 }}".into(),
        "{{ 'x'.ljust(99999999999) }}".into(),
        "{{ '%999999999d' % 1 }}".into(),
        "{{ '{:999999999}'.format(1) }}".into(),
        "{{ range(999999999999)|list }}".into(),
        "{{ 'open".into(),
        "{% raw %} never closed".into(),
        "{# never closed".into(),
        "{% generation %} never closed".into(),
        "{% include 'other' %}".into(),
        "{{ '\\x4' }}".into(),
        "{%".into(),
        "{{".into(),
        "{{}}".into(),
        "{% %}".into(),
        "{% set %}".into(),
        "{% for %}".into(),
        "{{ a[] }}".into(),
        "{{ a. }}".into(),
        "{{ 'a' 5 }}".into(),
        "{{ \u{0} }}".into(),
    ];
    for source in hostile {
        let shown: String = source.chars().take(60).collect();
        let outcome = on_small_stack(move || render(&source, &[json!({"role": "user", "content": "x"})]));
        assert!(outcome.is_err(), "{shown} gave {} bytes", outcome.unwrap().len());
    }
}

#[test]
fn the_deepest_template_allowed_fits_a_small_stack() {
    let allowed = [
        format!("{{{{ {}1{} }}}}", "(".repeat(38), ")".repeat(38)),
        format!("{{{{ {}1{} }}}}", "[".repeat(38), "]".repeat(38)),
        format!("{{{{ {}1 }}}}", "- ".repeat(38)),
        format!("{{{{ {}messages{} }}}}", "(".repeat(38), "|length)".to_string() + &")".repeat(37)),
        format!("{}x{}", "{% if 1 %}".repeat(60), "{% endif %}".repeat(60)),
        format!("{}x{}", "{% for a in [1] %}".repeat(60), "{% endfor %}".repeat(60)),
        format!("{{% if 0 %}}{}{{% else %}}x{{% endif %}}", "{% elif 0 %}".repeat(58)),
        format!("{{{{ {}1 }}}}", "1 + ".repeat(99)),
        format!("{{{{ {}1 }}}}", "1 and ".repeat(99)),
        format!("{{{{ 1{} }}}}", "|abs".repeat(99)),
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}x".into(),
    ];
    for source in allowed {
        let shown: String = source.chars().take(60).collect();
        let outcome = on_small_stack(move || render(&source, &[json!({"role": "user", "content": "x"})]));
        assert!(outcome.as_ref().is_ok_and(|text| !text.is_empty()), "{shown}: {outcome:?}");
    }
}

#[test]
fn errors_name_the_line_of_the_template() {
    let template =
        compile("a\n{#\n\n#}{{ 'b\n' }}\n{% if true %}\n  {{ raise_exception('no ' ~\n 'tools') }}{% endif %}")
            .unwrap();
    let error = template.render(&Conversation::default(), KeptApart::default()).unwrap_err();
    assert!(error.starts_with("test, line 7") || error.starts_with("test, line 8"), "{error}");
    assert!(error.ends_with("no tools"), "{error}");
    let error = compile("one\ntwo {{ 1 +* 2 }}").err().unwrap().to_string();
    assert!(error.starts_with("test, line 2: "), "{error}");
    let error = compile("one\n\n{% unknown %}").err().unwrap().to_string();
    assert!(error.starts_with("test, line 3: "), "{error}");
}

#[test]
fn content_is_given_in_the_shape_a_template_takes() {
    let parts = [json!({"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]})];
    let text = [json!({"role": "user", "content": "a b"})];
    for source in [
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content | trim }}{% endfor %}",
        "{% for m in messages %}{{ m.content + '' }}{% endfor %}",
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}",
    ] {
        assert_eq!(render(source, &parts).unwrap(), "a b", "{source}");
        assert_eq!(render(source, &text).unwrap(), "a b", "{source}");
    }
    let image = [json!({"role": "user", "content": [{"type": "image", "image": "x.png"}]})];
    assert!(render("{% for m in messages %}{{ m.content }}{% endfor %}", &image).unwrap_err().contains("image"));
}
