//! The `Modelfile` by which Ollama takes in a GGUF file: what it is made from, how turns are written, where answers end.
//!
//! Ollama does not run chat templates in Jinja: it has its own language, Go's. So the model's template is asked for a few conversations,
//! and where what it writes is one piece of text before, between and after the turns, those pieces are the template; its language
//! could not say more without guessing. Format: <https://github.com/ollama/ollama/blob/main/docs/modelfile.md>.

use std::collections::BTreeMap;

use serde_json::{Value as Json, json};

use crate::Result;
use crate::data::{ChatTemplate, Conversation, KeptApart, Tokenizer};

/// What Ollama loads.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// One GGUF file, by its path from the Modelfile.
    Model(&'a str),
    /// A GGUF adapter, by its path from the Modelfile, on a base: its name in Ollama, or the path of its GGUF file.
    Adapter {
        /// The base.
        base: &'a str,
        /// The adapter.
        adapter: &'a str,
    },
}

/// The text of a `Modelfile`. `sidecars` are the model's small files ([`super::sidecars`]); what cannot be said in it is said in
/// `notices`.
///
/// # Errors
/// [`crate::Error::Model`] for a tokenizer or a template that cannot be read.
pub fn modelfile(
    source: Source<'_>,
    sidecars: &BTreeMap<String, Vec<u8>>,
    notices: &mut Vec<String>,
) -> Result<String> {
    let tokenizer = Tokenizer::new(sidecars)?;
    let mut text = match source {
        Source::Model(path) => format!("FROM {}\n", located(path)),
        Source::Adapter { base, adapter } => format!("FROM {base}\nADAPTER {}\n", located(adapter)),
    };
    if let Some(template) = tokenizer.chat_templates().get("default") {
        let now = jiff::Zoned::now().date().at(0, 0, 0, 0);
        let template = ChatTemplate::new(template, "chat_template", tokenizer.named_tokens().to_vec(), now)?;
        // Ollama's runner adds BOS where the file says so.
        let named = |name: &str| tokenizer.named_tokens().iter().find(|(other, _)| other == name);
        let bos = named("bos_token").filter(|_| tokenizer.adds_bos()).map(|(_, text)| text.as_str());
        match Pieces::of(&template).and_then(|pieces| pieces.written(bos.unwrap_or_default())) {
            Some(template) => text += &format!("TEMPLATE \"\"\"{template}\"\"\"\n"),
            None => notices.push(
                "the chat template says more than Ollama's language can be proved to say: the Modelfile has no TEMPLATE, and Ollama \
                 takes one of its own that is like the file's. Serve the file with llama.cpp (--jinja) to have it as it was trained"
                    .into(),
            ),
        }
    }
    for id in super::end_ids(sidecars) {
        let stop = tokenizer.decode(&[id], false);
        if !stop.is_empty() && !stop.contains(['"', '\n']) {
            text += &format!("PARAMETER stop \"{stop}\"\n");
        }
    }
    Ok(text)
}

/// A path as Ollama tells it from a model's name.
fn located(path: &str) -> String {
    if path.starts_with(['/', '.']) { path.to_string() } else { format!("./{path}") }
}

/// What a template writes around what is said.
#[derive(Debug, PartialEq)]
struct Pieces {
    /// Before all turns, without a system message.
    begin: String,
    /// Before and after the system message.
    system: (String, String),
    /// Before what a user says.
    user: String,
    /// After it: to where the answer begins.
    answer: String,
    /// After an answer.
    end: String,
}

/// What is said in the conversations a template is asked for: words that no template has.
const SYSTEM: &str = "zqxsystem";
const TURNS: [[&str; 2]; 3] = [["zqxfirst", "zqxalpha"], ["zqxsecond", "zqxbeta"], ["zqxthird", "zqxgamma"]];

impl Pieces {
    /// The pieces of a template; `None` where there is more to it.
    fn of(template: &ChatTemplate) -> Option<Self> {
        if template.uses_clock() {
            return None;
        }
        let alone = rendered(template, None, 1)?;
        let longer = rendered(template, None, 2)?;
        let led = rendered(template, Some(SYSTEM), 1)?;
        let [[first, answered], [second, _], _] = TURNS;
        let (begin, answer) = alone.split_once(first)?;
        let between = longer.split_once(answered)?.1.split_once(second)?.0;
        let (lead, rest) = led.split_once(SYSTEM)?;
        let after_lead = rest.split_once(first)?.0;
        // What comes before every turn of a user is the user's; where the border lies does not change what is written.
        let user = common_end(common_end(begin, between), after_lead);
        let without = |text: &str| text[..text.len() - user.len()].to_string();
        let pieces = Self {
            begin: without(begin),
            system: (lead.to_string(), without(after_lead)),
            user: user.to_string(),
            answer: answer.to_string(),
            end: without(between),
        };
        let right = |system: Option<&str>, turns: usize| {
            rendered(template, system, turns).is_some_and(|text| text == pieces.text(system, turns))
        };
        (1..=TURNS.len()).all(|turns| right(None, turns) && right(Some(SYSTEM), turns)).then_some(pieces)
    }

    /// What these pieces make of a conversation.
    fn text(&self, system: Option<&str>, turns: usize) -> String {
        let mut text = match system {
            Some(system) => format!("{}{system}{}", self.system.0, self.system.1),
            None => self.begin.clone(),
        };
        for (number, [said, answered]) in TURNS[..turns].iter().enumerate() {
            text += &format!("{}{said}{}", self.user, self.answer);
            if number + 1 < turns {
                text += &format!("{answered}{}", self.end);
            }
        }
        text
    }

    /// In Go's language, without `bos`, which is added by itself; `None` where a piece would end the text it stands in.
    fn written(&self, bos: &str) -> Option<String> {
        let Self { begin, system: (lead, after), user, answer, end } = self;
        let [begin, lead] = [begin, lead].map(|text| text.strip_prefix(bos).unwrap_or(text));
        let pieces = [begin, lead, after, user, answer, end];
        if pieces.iter().any(|piece| piece.contains("{{") || piece.contains("}}") || piece.contains('"')) {
            return None;
        }
        Some(format!(
            "{{{{ if .System }}}}{lead}{{{{ .System }}}}{after}{{{{ else }}}}{begin}{{{{ end }}}}{{{{ range .Messages }}}}\
             {{{{ if eq .Role \"user\" }}}}{user}{{{{ .Content }}}}{answer}\
             {{{{ else if eq .Role \"assistant\" }}}}{{{{ .Content }}}}{end}{{{{ end }}}}{{{{ end }}}}"
        ))
    }
}

fn rendered(template: &ChatTemplate, system: Option<&str>, turns: usize) -> Option<String> {
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    let mut messages: Vec<Json> = system.map(|system| message("system", system)).into_iter().collect();
    for [said, answered] in &TURNS[..turns] {
        messages.extend([message("user", said), message("assistant", answered)]);
    }
    messages.pop();
    let conversation = Conversation { messages: &messages, add_generation_prompt: true, ..Conversation::default() };
    template.render(&conversation, KeptApart::default()).ok().map(|rendered| rendered.text)
}

/// The longest text that both end with.
fn common_end<'t>(one: &'t str, other: &str) -> &'t str {
    let same = one.chars().rev().zip(other.chars().rev()).take_while(|(a, b)| a == b);
    let length: usize = same.map(|(character, _)| character.len_utf8()).sum();
    &one[one.len() - length..]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(template: &str) -> Option<Pieces> {
        let now = jiff::civil::date(2026, 1, 1).at(0, 0, 0, 0);
        let named = vec![("bos_token".to_string(), "<s>".to_string())];
        Pieces::of(&ChatTemplate::new(template, "test", named, now).unwrap())
    }

    const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}\
                          {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

    #[test]
    fn turns_of_one_form_are_written_in_gos_language() {
        let written = pieces(CHATML).unwrap().written("").unwrap();
        assert_eq!(
            written,
            "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ else }}{{ end }}{{ range .Messages }}\
             {{ if eq .Role \"user\" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n\
             {{ else if eq .Role \"assistant\" }}{{ .Content }}<|im_end|>\n{{ end }}{{ end }}"
        );
    }

    #[test]
    fn a_system_message_of_its_own_stays_and_bos_is_not_written_twice() {
        let own = format!(
            "{{{{ bos_token }}}}{{% if messages[0]['role'] != 'system' %}}<|im_start|>system\nBe kind.<|im_end|>\n{{% endif %}}{CHATML}"
        );
        let written = pieces(&own).unwrap().written("<s>").unwrap();
        assert!(written.starts_with("{{ if .System }}<|im_start|>system\n{{ .System }}"), "{written}");
        // Where a turn ends and the next begins is for the template to say once.
        assert!(written.contains("{{ else }}<|im_start|>system\nBe kind.{{ end }}"), "{written}");
        assert!(pieces(&own).unwrap().written("").unwrap().starts_with("{{ if .System }}<s><|im_start|>"));
    }

    /// The system message within the first user's turn is still one form; within the last one's it is not.
    #[test]
    fn where_there_is_more_to_it_nothing_is_claimed() {
        let first = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{% set lead = '<<' + m['content'] + '>>' %}\
                     {% endif %}{% endfor %}{% set ns = namespace(n=0) %}{% for m in messages %}{% if m['role'] == 'user' %}[INST] \
                     {% if loop.index0 == 1 and messages[0]['role'] == 'system' %}<<{{ messages[0]['content'] }}>>{% endif %}\
                     {{ m['content'] }} [/INST]{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% endif %}{% endfor %}";
        let found = pieces(first);
        // An answer begins with a space that the prompt for it does not have.
        assert_eq!(found, None);
        let thinking = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}");
        assert_eq!(pieces(&thinking), None);
        let dated = format!("{{{{ strftime_now('%d') }}}}{CHATML}");
        assert_eq!(pieces(&dated), None);
        let last = "{% for m in messages %}{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}: {% endif %}\
                    {% if m['role'] == 'user' %}U {{ m['content'] }} A {% elif m['role'] == 'assistant' %}{{ m['content'] }}|{% endif %}\
                    {% endfor %}";
        assert_eq!(pieces(last), None);
    }
}
