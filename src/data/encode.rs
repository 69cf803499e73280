//! Examples to tokens and mask, exact to the token.
//!
//! - A conversation is rendered by the chat template and encoded as transformers encodes it. Where the template has
//!   `{% generation %}`, that is what is trained. Elsewhere an assistant's turn begins where the prompt for it ends
//!   (the text the model is given at inference) and ends with its end-of-turn token; what follows that (a line end, as a
//!   rule) is never generated and not trained.
//! - A prompt with completion is `prompt ++ completion ++ EOS`, encoded as one text when that keeps the prompt's tokens,
//!   else as two (a token across the boundary would be neither the prompt the model sees nor a completion it can
//!   give).
//! - Text is `BOS? ++ text ++ EOS`, all trained, cut into documents of at most the limit.
//!
//! A mask that cannot be told for certain is an error, never a guess.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use jiff::civil::DateTime;
use regex::Regex;
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};

use super::template::{BUILTIN, ChatTemplate, Conversation, KeptApart, Rendered};
use super::tokenizer::{Tokenizer, Tokens, hexadecimal, pattern};
use super::{BadRow, Document, Encode, Encoded, Example};
use crate::recipe::{DataFormat, DatasetRecipe, Overlong, TrainOn};
use crate::{Error, Fault, Result};

/// Changes whenever the same row may give other tokens or another mask.
const VERSION: u32 = 1;
/// Roles every template is given; others only where the template names them.
const ROLES: [&str; 8] = ["system", "developer", "user", "assistant", "tool", "function", "ipython", "environment"];
/// Stands for what the assistant says while a template is examined.
const PROBE: char = '\u{F8FF}';

type Row<T> = std::result::Result<T, BadRow>;

/// Encodes the rows of one dataset for one model.
pub struct Encoder {
    tokenizer: Arc<Tokenizer>,
    recipe: DatasetRecipe,
    /// Absent where the model has none and the recipe names none.
    chat: Option<Chat>,
    /// For rows with tools, where the model has a template of its own for them.
    tool_chat: Option<Chat>,
    fingerprint: String,
}

/// A template as this model uses it.
struct Chat {
    template: ChatTemplate,
    /// What the template writes before an assistant's turn, when it holds a special token: then no message can contain it.
    header: Option<String>,
    /// What the template writes before an assistant's turn though it does not write it as a prompt for one.
    unprompted_header: Option<String>,
    /// Tokens that end an assistant's turn.
    end_ids: BTreeSet<u32>,
    /// Special-token text kept apart in the assistant's messages: all but what the template itself looks for there.
    assistant_special: Option<Regex>,
}

/// An assistant turn's bytes: from the end of the prompt on; the end is a token.
type Begin = usize;

impl Encoder {
    /// For a model's tokenizer and a recipe's dataset; templates that print the date print today's.
    ///
    /// Errors: a template that does not exist, does not compile, or writes tokens this tokenizer does not have.
    pub fn new(tokenizer: Arc<Tokenizer>, recipe: &DatasetRecipe) -> Result<Self> {
        Self::dated(tokenizer, recipe, jiff::Zoned::now().date().at(0, 0, 0, 0))
    }

    /// Like [`Encoder::new`], with the moment that templates print: a run keeps its own, so that resuming it gives the same tokens.
    pub fn dated(tokenizer: Arc<Tokenizer>, recipe: &DatasetRecipe, now: DateTime) -> Result<Self> {
        let chat =
            find_template(&tokenizer, recipe, now)?.map(|template| Chat::new(template, &tokenizer)).transpose()?;
        let tool_chat = match (&recipe.chat_template, tokenizer.chat_templates().get("tool_use")) {
            (None, Some(source)) => {
                let template =
                    ChatTemplate::new(source, "chat template `tool_use`", tokenizer.named_tokens().to_vec(), now)?;
                Some(Chat::new(template, &tokenizer)?)
            }
            _ => None,
        };
        let fingerprint = fingerprint(&tokenizer, recipe, &[&chat, &tool_chat], now);
        Ok(Encoder { tokenizer, recipe: recipe.clone(), chat, tool_chat, fingerprint })
    }

    /// Checks that rows of a format can be encoded at all: conversations need a template, the others an end-of-text token.
    pub fn check(&self, format: DataFormat) -> Result<()> {
        match format {
            DataFormat::Messages | DataFormat::Instruction if self.chat.is_none() => {
                let names = BUILTIN.map(|builtin| builtin.name).join(", ");
                let fault = Fault::new(
                    "dataset.chat_template",
                    "the rows are conversations, and the model has no chat template",
                );
                Err(Error::Data(fault.hint(format!("name a built-in one ({names}) or a .jinja file"))))
            }
            DataFormat::PromptCompletion | DataFormat::Text if self.tokenizer.eos().is_none() => {
                let fault = Fault::new(
                    "tokenizer_config.json",
                    "the tokenizer names no eos_token, so a model could not learn to stop",
                );
                Err(Error::Model(fault.hint("add eos_token to tokenizer_config.json")))
            }
            _ => Ok(()),
        }
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// The chat template in use.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.chat.as_ref().map(|chat| &chat.template)
    }

    /// Every token that ends a generation: the model's own and the template's end of turn, in ascending order.
    pub fn end_ids(&self) -> Vec<u32> {
        let mut ids: BTreeSet<u32> = self.tokenizer.end_ids().iter().copied().collect();
        ids.extend(self.chat.iter().flat_map(|chat| chat.end_ids.iter().copied()));
        ids.into_iter().collect()
    }

    /// The tokens a model is given to answer a conversation: all messages and the header of the assistant's turn.
    pub fn prompt_ids(&self, messages: &[Json], tools: Option<&Json>) -> Row<Vec<u32>> {
        let chat = self.chat(tools)?;
        let messages = self.with_system(messages);
        self.check_messages(chat, &messages)?;
        let mut rendered = self.render(chat, &messages, tools, true)?;
        rendered.text.push_str(chat.unprompted_header.as_deref().unwrap_or_default());
        let tokens = self.tokenizer.encode_rendered(&rendered).map_err(BadRow::Malformed)?;
        self.check_bos(&tokens.ids)?;
        Ok(tokens.ids)
    }

    /// What a model is asked and what it should answer, for evaluation on generated text: a conversation up to its last
    /// assistant turn and that turn's content; a prompt and its completion; for text the text itself and no answer.
    pub fn prompt(&self, example: &Example) -> Row<(Vec<u32>, Option<String>)> {
        match example {
            Example::Conversation { messages, tools, .. } => {
                let last = messages.iter().rposition(is_assistant);
                let asked = &messages[..last.unwrap_or(messages.len())];
                if asked.is_empty() {
                    return Err(BadRow::Malformed(
                        "the conversation begins with the answer: there is nothing to ask".into(),
                    ));
                }
                let answer = last.and_then(|last| content_text(&messages[last]["content"]));
                Ok((self.prompt_ids(asked, tools.as_ref())?, answer))
            }
            Example::PromptCompletion { prompt, completion } => {
                let mut ids = self.bos_for(prompt);
                ids.extend(self.encode_text(prompt)?.ids);
                Ok((ids, Some(completion.clone())))
            }
            Example::Text(text) => {
                let mut ids = self.bos_for(text);
                ids.extend(self.encode_text(text)?.ids);
                Ok((ids, None))
            }
        }
    }

    /// Every token of an example as the model will see it: its id, its text and whether it is trained. Documents follow one another.
    pub fn preview(&self, example: &Example) -> Row<Vec<(u32, String, bool)>> {
        let encoded = self.encode(example)?;
        let tokens = encoded.documents.iter().flat_map(|document| document.ids.iter().zip(&document.trained));
        Ok(tokens.map(|(id, trained)| (*id, self.tokenizer.decode(&[*id], false), *trained)).collect())
    }

    fn conversation(&self, messages: &[Json], tools: Option<&Json>, trained_from: usize) -> Row<Document> {
        let chat = self.chat(tools)?;
        let with_system = self.with_system(messages);
        let trained_from = trained_from + with_system.len() - messages.len();
        let messages = with_system;
        self.check_messages(chat, &messages)?;
        let selected = self.selected(&messages, trained_from)?;

        let rendered = self.render(chat, &messages, tools, false)?;
        let tokens = self.tokenizer.encode_rendered(&rendered).map_err(BadRow::Malformed)?;
        self.check_bos(&tokens.ids)?;
        let mut trained = vec![false; tokens.ids.len()];
        if self.recipe.train_on == TrainOn::All {
            let from = if trained_from == 0 { 0 } else { self.begin(chat, &messages, tools, trained_from, &rendered)? };
            for (flag, span) in trained.iter_mut().zip(&tokens.spans) {
                *flag = span.end > from;
            }
        } else {
            for span in self.trained_tokens(chat, &messages, tools, &selected, &rendered, &tokens)? {
                trained[span].fill(true);
            }
        }
        let ends = tokens.ids.iter().zip(&trained).any(|(id, trained)| *trained && chat.end_ids.contains(id));
        if !ends {
            return Err(BadRow::Malformed(
                "no end-of-turn token is trained, so the model would not learn to stop: the chat template writes none \
                 after the assistant's turn; name another with dataset.chat_template"
                    .into(),
            ));
        }
        Ok(Document { ids: tokens.ids, trained })
    }

    /// The messages whose turns are trained: all of the assistant's from `from` on, or the last one.
    fn selected(&self, messages: &[Json], from: usize) -> Row<Vec<usize>> {
        let mut selected: Vec<usize> = (from..messages.len()).filter(|at| is_assistant(&messages[*at])).collect();
        if self.recipe.train_on == TrainOn::LastAssistant {
            selected = selected.split_off(selected.len().saturating_sub(1));
        }
        if selected.is_empty() && self.recipe.train_on != TrainOn::All {
            return Err(BadRow::NothingTrained("the conversation has no assistant turn to train on".into()));
        }
        for at in &selected {
            let message = &messages[*at];
            let says = |field: &str| match &message[field] {
                Json::Null => false,
                Json::String(text) => !text.trim().is_empty(),
                Json::Array(items) => !items.is_empty(),
                _ => true,
            };
            let content = content_text(&message["content"]).is_some_and(|text| !text.trim().is_empty());
            if !content
                && !["tool_calls", "function_call", "reasoning_content", "thinking", "reasoning"]
                    .iter()
                    .any(|field| says(field))
            {
                return Err(BadRow::NothingTrained(format!("message {at}: the assistant's turn is empty")));
            }
        }
        Ok(selected)
    }

    /// The tokens of the selected turns, each with its end-of-turn token.
    fn trained_tokens(
        &self,
        chat: &Chat,
        messages: &[Json],
        tools: Option<&Json>,
        selected: &[usize],
        rendered: &Rendered,
        tokens: &Tokens,
    ) -> Row<Vec<Range<usize>>> {
        if chat.template.marks_generation() {
            let spans = self.generated(chat, messages, tools, selected, rendered)?;
            return Ok(spans.into_iter().map(|span| tokens_of(tokens, &span, rendered, chat)).collect());
        }
        let assistants: Vec<usize> = (0..messages.len()).filter(|at| is_assistant(&messages[*at])).collect();
        let begins: Vec<(usize, Begin)> = match chat.headers(rendered).filter(|ends| ends.len() == assistants.len()) {
            Some(ends) => assistants.into_iter().zip(ends).filter(|(at, _)| selected.contains(at)).collect(),
            None => {
                let begin = |at: &usize| Ok((*at, self.begin(chat, messages, tools, *at, rendered)?));
                selected.iter().map(begin).collect::<Row<_>>()?
            }
        };
        let mut spans = Vec::with_capacity(begins.len());
        for (turn, (message, begin)) in begins.iter().enumerate() {
            let first = tokens.spans.partition_point(|span| span.end <= *begin);
            let limit = begins.get(turn + 1).map_or(usize::MAX, |(_, next)| *next);
            let end = (first..tokens.ids.len())
                .take_while(|at| tokens.spans[*at].start < limit)
                .find(|at| chat.end_ids.contains(&tokens.ids[*at]));
            let Some(end) = end else {
                return Err(BadRow::Malformed(format!(
                    "message {message}: the chat template ends the assistant's turn with no end-of-turn token, so the model would not \
                     learn to stop; name another with dataset.chat_template"
                )));
            };
            let turn = &rendered.text[tokens.spans[first].start..tokens.spans[end].end];
            if tokens.ids[first..end].iter().all(|id| chat.end_ids.contains(id)) {
                return Err(BadRow::Malformed(format!(
                    "message {message}: the chat template leaves out what the assistant says (its tool calls?); name another with \
                     dataset.chat_template"
                )));
            }
            if !holds_answer(turn, &messages[*message]["content"]) {
                return Err(uncertain(*message));
            }
            spans.push(first..end + 1);
        }
        Ok(spans)
    }

    /// The spans a template marks with `{% generation %}` for the selected messages.
    fn generated(
        &self,
        chat: &Chat,
        messages: &[Json],
        tools: Option<&Json>,
        selected: &[usize],
        rendered: &Rendered,
    ) -> Row<Vec<Range<usize>>> {
        let assistants: Vec<usize> = (0..messages.len()).filter(|at| is_assistant(&messages[*at])).collect();
        let spans = &rendered.generation;
        if selected.len() == assistants.len() {
            return Ok(spans.clone());
        }
        if spans.len() == assistants.len() {
            let chosen = assistants.iter().zip(spans).filter(|(at, _)| selected.contains(at));
            return Ok(chosen.map(|(_, span)| span.clone()).collect());
        }
        // Several spans per turn: those of the turns before the first selected one are left out.
        let before = self.render(chat, &messages[..selected[0]], tools, false)?;
        if before.generation.len() > spans.len() || spans[..before.generation.len()] != before.generation {
            return Err(uncertain(selected[0]));
        }
        Ok(spans[before.generation.len()..].to_vec())
    }

    /// Where the turn of a message begins in the rendered conversation: where the prompt for it ends.
    fn begin(
        &self,
        chat: &Chat,
        messages: &[Json],
        tools: Option<&Json>,
        at: usize,
        rendered: &Rendered,
    ) -> Row<Begin> {
        // The template keeps what came before, as a rule: then the prompt is a prefix.
        let prompt =
            (at > 0).then(|| self.render(chat, &messages[..at], tools, is_assistant(&messages[at])).ok()).flatten();
        if let Some(rest) = prompt.as_ref().and_then(|prompt| rendered.text.strip_prefix(&prompt.text)) {
            let header =
                chat.unprompted_header.as_deref().filter(|header| rest.starts_with(header)).unwrap_or_default();
            return Ok(rendered.text.len() - rest.len() + header.len());
        }
        // It may also move the system message, or shorten earlier turns: look where the content comes out.
        let Some(content) = messages[at]["content"].as_str() else { return Err(uncertain(at)) };
        let with = |content: String| {
            let mut messages = messages.to_vec();
            messages[at]["content"] = Json::String(content);
            self.render(chat, &messages, tools, false).ok().map(|rendered| rendered.text)
        };
        let blank = content.len() - content.trim_start().len();
        for place in [0, blank] {
            let Some(marked) = with(format!("{}{PROBE}{}", &content[..place], &content[place..])) else { continue };
            let Some((before, after)) = marked.split_once(PROBE) else { continue };
            if rendered.text.strip_prefix(before) == Some(after) {
                return Ok(before.len());
            }
        }
        let replaced = with(PROBE.to_string()).unwrap_or_default();
        let place = replaced.split_once(PROBE).filter(|(before, after)| {
            !after.contains(PROBE) && rendered.text.strip_prefix(before).is_some_and(|rest| rest.ends_with(after))
        });
        if let Some((before, _)) = place {
            return Ok(before.len());
        }
        Err(uncertain(at))
    }

    fn prompt_completion(&self, prompt: &str, completion: &str) -> Row<Document> {
        let eos = self.eos()?;
        let completion = self.without_eos(completion);
        if completion.is_empty() {
            return Err(BadRow::NothingTrained("the completion is empty".into()));
        }
        let before = self.encode_text(prompt)?.ids;
        let whole = self.encode_text(&format!("{prompt}{completion}"))?.ids;
        let (body, boundary) = if whole.len() > before.len() && whole.starts_with(&before) {
            (whole, before.len())
        } else if self.recipe.allow_special_tokens {
            let after = self.encode_text(completion)?.ids;
            let boundary = before.len();
            (before.into_iter().chain(after).collect(), boundary)
        } else {
            let (tokens, boundary) = self.tokenizer.encode_apart(prompt, completion).map_err(BadRow::Malformed)?;
            (tokens.ids, boundary)
        };
        let mut ids = self.bos_for(prompt);
        let boundary = boundary + ids.len();
        ids.extend(body);
        ids.push(eos);
        self.check_bos(&ids)?;
        let from = if self.recipe.train_on == TrainOn::All { 0 } else { boundary };
        let trained = (0..ids.len()).map(|at| at >= from).collect();
        Ok(Document { ids, trained })
    }

    fn text(&self, text: &str) -> Row<Encoded> {
        let eos = self.eos()?;
        let text = self.without_eos(text);
        if text.is_empty() {
            return Err(BadRow::Empty);
        }
        let mut ids = self.bos_for(text);
        ids.extend(self.encode_text(text)?.ids);
        ids.push(eos);
        self.check_bos(&ids)?;
        let documents = cut(&ids, self.limit()).into_iter().map(|part| {
            let mut trained = vec![true; part.len()];
            trained[0] = false;
            Document { ids: part.to_vec(), trained }
        });
        Ok(Encoded { documents: documents.collect(), truncated: false })
    }

    /// Applies the policy for long rows, and refuses rows that teach nothing.
    fn finish(&self, mut document: Document) -> Row<Encoded> {
        let (tokens, limit) = (document.ids.len(), self.limit());
        let truncated = tokens > limit;
        if truncated {
            match self.recipe.overlong {
                Overlong::Drop | Overlong::Error => return Err(BadRow::Overlong { tokens, limit }),
                Overlong::Truncate => {
                    document.ids.truncate(limit);
                    document.trained.truncate(limit);
                }
            }
        }
        // The first token of a document follows nothing, so nothing can learn to predict it.
        if let Some(first) = document.trained.first_mut() {
            *first = false;
        }
        if !document.trained.contains(&true) {
            let what = if truncated {
                format!("the first {limit} of {tokens} tokens hold nothing to train on: raise dataset.max_length")
            } else {
                "no token of the row is trained".into()
            };
            return Err(BadRow::NothingTrained(what));
        }
        Ok(Encoded { documents: vec![document], truncated })
    }

    fn render(
        &self,
        chat: &Chat,
        messages: &[Json],
        tools: Option<&Json>,
        add_generation_prompt: bool,
    ) -> Row<Rendered> {
        let apart = match self.recipe.allow_special_tokens {
            true => KeptApart::default(),
            false => KeptApart { others: self.tokenizer.special_text(), assistant: chat.assistant_special.as_ref() },
        };
        let conversation = Conversation { messages, tools, add_generation_prompt, ..Default::default() };
        chat.template.render(&conversation, apart).map_err(BadRow::Malformed)
    }

    fn chat(&self, tools: Option<&Json>) -> Row<&Chat> {
        let chat = if tools.is_some() { self.tool_chat.as_ref().or(self.chat.as_ref()) } else { self.chat.as_ref() };
        chat.ok_or_else(|| {
            BadRow::Malformed(
                "a conversation, but there is no chat template: name one with dataset.chat_template".into(),
            )
        })
    }

    /// The recipe's system message before conversations that have none.
    fn with_system(&self, messages: &[Json]) -> Vec<Json> {
        let has_one =
            messages.first().is_some_and(|message| message["role"] == "system" || message["role"] == "developer");
        let system = self.recipe.system.iter().filter(|_| !has_one && !messages.is_empty());
        system.map(|text| json!({"role": "system", "content": text})).chain(messages.iter().cloned()).collect()
    }

    fn check_messages(&self, chat: &Chat, messages: &[Json]) -> Row<()> {
        if messages.is_empty() {
            return Err(BadRow::Empty);
        }
        for (at, message) in messages.iter().enumerate() {
            let Some(role) = message["role"].as_str() else {
                return Err(BadRow::Malformed(format!("message {at} has no role")));
            };
            if !ROLES.contains(&role) && !chat.template.quotes(role) {
                let known = ROLES.join(", ");
                return Err(BadRow::Malformed(format!(
                    "message {at}: unknown role `{role}` (known: {known}, and those the chat template names)"
                )));
            }
            let content = &message["content"];
            if !(content.is_string() || content.is_array() || (content.is_null() && is_assistant(message))) {
                return Err(BadRow::Malformed(format!("message {at} ({role}) has no content")));
            }
        }
        Ok(())
    }

    fn check_bos(&self, ids: &[u32]) -> Row<()> {
        match (self.tokenizer.bos(), ids) {
            (Some(bos), [first, second, ..])
                if *first == bos && *second == bos && self.tokenizer.eos() != Some(bos) =>
            {
                Err(BadRow::Malformed(format!(
                    "the row begins with two BOS tokens (id {bos}): the chat template and the text both write one; remove it from the text"
                )))
            }
            _ => Ok(()),
        }
    }

    /// The BOS that text without a template begins with, unless it says it itself.
    fn bos_for(&self, text: &str) -> Vec<u32> {
        let said = self.recipe.allow_special_tokens
            && self
                .tokenizer
                .named_tokens()
                .iter()
                .any(|(name, bos)| name == "bos_token" && text.starts_with(bos.as_str()));
        self.tokenizer.bos().filter(|_| self.tokenizer.adds_bos() && !said).into_iter().collect()
    }

    /// Text without the end-of-text token it may end with, which is added in any case.
    fn without_eos<'t>(&self, text: &'t str) -> &'t str {
        let eos = self.tokenizer.named_tokens().iter().find(|(name, _)| name == "eos_token");
        eos.and_then(|(_, eos)| text.strip_suffix(eos.as_str())).unwrap_or(text)
    }

    fn encode_text(&self, text: &str) -> Row<Tokens> {
        let tokens = if self.recipe.allow_special_tokens {
            self.tokenizer.encode(text)
        } else {
            self.tokenizer.encode_plain(text)
        };
        tokens.map_err(BadRow::Malformed)
    }

    fn eos(&self) -> Row<u32> {
        self.tokenizer.eos().ok_or_else(|| {
            BadRow::Malformed("the tokenizer names no eos_token, so the model could not learn to stop".into())
        })
    }

    fn limit(&self) -> usize {
        (self.recipe.max_length as usize).max(2)
    }
}

impl Encode for Encoder {
    fn encode(&self, example: &Example) -> Row<Encoded> {
        match example {
            Example::Conversation { messages, tools, trained_from } => {
                self.finish(self.conversation(messages, tools.as_ref(), *trained_from)?)
            }
            Example::PromptCompletion { prompt, completion } => {
                self.finish(self.prompt_completion(prompt, completion)?)
            }
            Example::Text(text) => self.text(text),
        }
    }

    fn fingerprint(&self) -> String {
        self.fingerprint.clone()
    }
}

impl Chat {
    fn new(template: ChatTemplate, tokenizer: &Tokenizer) -> Result<Self> {
        let looked_for = |text: &str| {
            // `'</think>' in content`, `content.split('</think>')`: markup the assistant's messages are expected to hold.
            let text = regex::escape(text);
            let uses = format!(
                r#"(?s)['"]{text}['"]\s+(not\s+)?in\b|(split|partition|startswith|endswith|find|index|replace)\(\s*['"]{text}"#
            );
            Regex::new(&uses).is_ok_and(|uses| uses.is_match(template.source()))
        };
        let kept = tokenizer.special_tokens().iter().map(|(text, _)| text.as_str()).filter(|text| !looked_for(text));
        let mut chat = Chat {
            assistant_special: pattern(kept),
            header: None,
            unprompted_header: None,
            end_ids: BTreeSet::new(),
            template,
        };
        chat.end_ids = tokenizer.end_ids().iter().copied().chain(chat.end_of_turn(tokenizer)).collect();
        chat.header = chat.find_header(tokenizer);
        chat.unprompted_header = chat.find_unprompted_header();
        Ok(chat)
    }

    /// The special token that ends what the assistant says, where the model's configuration does not name it: the last of
    /// those the template writes both at the end of a conversation and before a further turn.
    fn end_of_turn(&self, tokenizer: &Tokenizer) -> Option<u32> {
        let answer = PROBE.to_string();
        let messages = [("user", "One"), ("assistant", answer.as_str()), ("user", "Two")];
        let closing = |messages: &[(&str, &str)]| -> Option<Vec<u32>> {
            let text = self.probe(messages, false)?;
            let mut rest = text.rsplit_once(PROBE)?.1;
            let mut ids = Vec::new();
            while let Some(found) = tokenizer.special_text()?.find(rest.trim_start()).filter(|found| found.start() == 0)
            {
                ids.push(tokenizer.id(found.as_str())?);
                rest = &rest.trim_start()[found.end()..];
            }
            Some(ids)
        };
        let last = closing(&messages[..2])?;
        // A template may refuse a conversation that ends with a question.
        let within = closing(&messages).unwrap_or_else(|| last.clone());
        let both: Vec<u32> = last.into_iter().zip(within).take_while(|(a, b)| a == b).map(|(id, _)| id).collect();
        let configured = both.iter().any(|id| tokenizer.end_ids().contains(id));
        both.last().copied().filter(|_| !configured)
    }

    /// The header of the assistant's turn, when it can be searched for: it holds a special token, and it is where turns begin in a conversation.
    fn find_header(&self, tokenizer: &Tokenizer) -> Option<String> {
        let first = [("user", "One")];
        let both = [("user", "One"), ("assistant", "Two"), ("user", "Three"), ("assistant", "Four")];
        let header = self.probe(&first, true)?.strip_prefix(&self.probe(&first, false)?)?.to_string();
        tokenizer.special_text()?.find(&header)?;
        let whole = self.probe(&both, false)?;
        let ends: Vec<usize> = whole.match_indices(&header).map(|(at, _)| at + header.len()).collect();
        let prompts = [self.probe(&both[..1], true)?, self.probe(&both[..3], true)?];
        let agree = ends.len() == 2
            && ends.iter().zip(&prompts).all(|(end, prompt)| whole.starts_with(prompt) && *end == prompt.len());
        agree.then_some(header)
    }

    /// Templates that ignore `add_generation_prompt` write `<|im_start|>assistant` only together with the answer.
    fn find_unprompted_header(&self) -> Option<String> {
        let answer = PROBE.to_string();
        let messages = [("user", "One"), ("assistant", answer.as_str())];
        let before = self.probe(&messages[..1], false)?;
        let text = self.probe(&messages, false)?;
        let header = text.split_once(PROBE)?.0.strip_prefix(&before)?.to_string();
        // White space alone is the model's to write, as in `[/INST] answer`.
        let prompted = self.probe(&messages[..1], true)? != before;
        Some(header).filter(|header| !prompted && !header.trim().is_empty())
    }

    fn probe(&self, messages: &[(&str, &str)], add_generation_prompt: bool) -> Option<String> {
        let messages: Vec<Json> =
            messages.iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
        let conversation = Conversation { messages: &messages, add_generation_prompt, ..Default::default() };
        self.template.render(&conversation, KeptApart::default()).ok().map(|rendered| rendered.text)
    }

    /// Where the template's own headers end in a rendered conversation.
    fn headers(&self, rendered: &Rendered) -> Option<Vec<Begin>> {
        let header = self.header.as_deref()?;
        let found = rendered.text.match_indices(header).map(|(at, _)| at..at + header.len());
        Some(found.filter(|span| !rendered.is_literal(span)).map(|span| span.end).collect())
    }
}

/// The tokens of a marked span, and the end-of-turn token after it where the template left it outside.
fn tokens_of(tokens: &Tokens, span: &Range<usize>, rendered: &Rendered, chat: &Chat) -> Range<usize> {
    let first = tokens.spans.partition_point(|token| token.end <= span.start);
    let mut end = tokens.spans.partition_point(|token| token.start < span.end);
    let ends = |at: usize| tokens.ids.get(at).is_some_and(|id| chat.end_ids.contains(id));
    if end > first && !(first..end).any(ends) {
        let blank = (end..tokens.ids.len()).find(|at| !rendered.text[tokens.spans[*at].clone()].trim().is_empty());
        if let Some(next) = blank.filter(|at| ends(*at)) {
            end = next + 1;
        }
    }
    first..end.max(first)
}

/// The template the recipe names, or the model's own.
fn find_template(tokenizer: &Tokenizer, recipe: &DatasetRecipe, now: DateTime) -> Result<Option<ChatTemplate>> {
    let named = tokenizer.named_tokens().to_vec();
    let own = tokenizer.chat_templates();
    let Some(name) = recipe.chat_template.as_deref() else {
        let source = own.get("default").or_else(|| own.values().next());
        return source.map(|source| ChatTemplate::new(source, "the model's chat template", named, now)).transpose();
    };
    if let Some(builtin) = BUILTIN.iter().find(|builtin| builtin.name == name) {
        let place = format!("chat template `{name}`");
        let special = |text: &str| tokenizer.special_tokens().iter().any(|(special, _)| special == text);
        if let Some(missing) = builtin.tokens.iter().find(|token| !special(token)) {
            let fault =
                Fault::new(place, format!("it writes `{missing}`, which is no special token of this tokenizer"));
            return Err(Error::Data(
                fault.hint("plain, alpaca, vicuna, zephyr and mistral end turns with the tokenizer's own eos_token"),
            ));
        }
        if builtin.tokens.is_empty() && tokenizer.eos().is_none() {
            let fault = Fault::new(place, "it ends turns with eos_token, which this tokenizer does not name");
            return Err(Error::Data(fault.hint("add eos_token to tokenizer_config.json")));
        }
        let named = named.into_iter().filter(|(name, _)| name != "bos_token" || tokenizer.adds_bos()).collect();
        return ChatTemplate::new(builtin.source, &place, named, now).map(Some);
    }
    if let Some(source) = own.get(name) {
        return ChatTemplate::new(source, &format!("the model's chat template `{name}`"), named, now).map(Some);
    }
    let path = std::path::Path::new(name);
    if !name.ends_with(".jinja") && !path.is_file() {
        let names = BUILTIN.map(|builtin| builtin.name).join(", ");
        let fault = Fault::new("dataset.chat_template", format!("no template is called `{name}`"));
        return Err(Error::Data(fault.hint(format!("there are {names}; or name a .jinja file"))));
    }
    let metadata = std::fs::metadata(path).map_err(|error| Error::Data(Fault::at(path, error)))?;
    if !metadata.is_file() || metadata.len() > 1 << 20 {
        return Err(Error::Data(Fault::at(path, "not a template: it is no file, or larger than 1 MiB")));
    }
    let bytes = std::fs::read(path).map_err(|error| Error::Data(Fault::at(path, error)))?;
    let source = String::from_utf8(bytes).map_err(|_| Error::Data(Fault::at(path, "the template is not UTF-8")))?;
    let source = source.strip_prefix('\u{FEFF}').unwrap_or(&source);
    ChatTemplate::new(source, name, named, now).map(Some)
}

fn fingerprint(tokenizer: &Tokenizer, recipe: &DatasetRecipe, chats: &[&Option<Chat>], now: DateTime) -> String {
    let mut hasher = Sha256::new();
    let mut add = |text: &str| {
        hasher.update((text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    add(&format!("encoding {VERSION}"));
    add(tokenizer.digest());
    for chat in chats {
        let template = chat.as_ref().map(|chat| &chat.template);
        add(template.map_or("", |template| template.source()));
        if template.is_some_and(|template| template.uses_clock()) {
            add(&now.to_string());
        }
    }
    let recipe =
        json!([recipe.system, recipe.max_length, recipe.overlong, recipe.train_on, recipe.allow_special_tokens]);
    add(&recipe.to_string());
    hexadecimal(&hasher.finalize())
}

/// Cuts tokens into pieces of at most `limit`, none of which is a single token (it would have nothing to learn from).
fn cut(ids: &[u32], limit: usize) -> Vec<&[u32]> {
    let mut parts = Vec::new();
    let mut rest = ids;
    while rest.len() > limit {
        let length = if rest.len() == limit + 1 && limit > 2 { limit - 1 } else { limit };
        let (part, after) = rest.split_at(length);
        parts.push(part);
        rest = after;
    }
    parts.push(rest);
    parts
}

fn is_assistant(message: &Json) -> bool {
    message["role"] == "assistant"
}

fn content_text(content: &Json) -> Option<String> {
    match content {
        Json::String(text) => Some(text.clone()),
        Json::Array(parts) => Some(parts.iter().filter_map(|part| part["text"].as_str()).collect()),
        _ => None,
    }
}

/// Whether a turn's text holds what the assistant says after thinking; white space does not count, templates trim it.
fn holds_answer(turn: &str, content: &Json) -> bool {
    let Some(content) = content_text(content) else { return true };
    let answer = content.rsplit_once("</think>").map_or(content.as_str(), |(_, answer)| answer);
    let dense = |text: &str| text.chars().filter(|c| !c.is_whitespace()).collect::<String>();
    turn.contains(answer.trim()) || dense(turn).contains(&dense(answer))
}

fn uncertain(message: usize) -> BadRow {
    BadRow::Malformed(format!(
        "message {message}: the chat template rewrites this conversation so that where the assistant's turn begins cannot be told; \
         name a template with generation blocks (a built-in one) with dataset.chat_template, or train on the last turn only"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::path::{Path, PathBuf};

    fn fixtures() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
    }

    fn read(path: &str) -> Json {
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

    fn recipe(more: Json) -> DatasetRecipe {
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
            let encoder =
                encoder(case["tokenizer"].as_str().unwrap(), Some(&template(name)), json!({"train_on": "all"}));
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
            assert!(
                matches!(encoder.encode(&two_turns()), Err(BadRow::Malformed(what)) if what.contains("end-of-turn"))
            );
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
        let silent =
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}";
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
        let early =
            forgetful.replace("{% if m.role == 'user' %}{{ m.content }}{% endif %}", "x<|im_end|>{{ m.content }}");
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
            assert!(
                spans[0].contains("<tool_call>") && spans[0].ends_with("</tool_call><|im_end|>"),
                "{name} {spans:?}"
            );
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
        assert!(
            matches!(encoder.encode(&example), Err(BadRow::Malformed(what)) if what.contains("unknown role `usr`"))
        );
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
}
