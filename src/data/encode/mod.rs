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

mod begin;
mod chat;
mod mask;

use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::civil::DateTime;
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};

use self::chat::{Chat, find_template};
use self::mask::{content_text, is_assistant};
use super::template::{BUILTIN, ChatTemplate, Conversation, KeptApart, Rendered};
use super::tokenizer::{Tokenizer, Tokens, hexadecimal};
use super::{BadRow, Document, Encode, Encoded, Example};
use crate::recipe::{DataFormat, DatasetRecipe, Overlong, TrainOn};
use crate::{Error, Fault, Result};

/// Changes whenever the same row may give other tokens or another mask.
const VERSION: u32 = 3;
/// Roles every template is given; others only where the template names them.
const ROLES: [&str; 8] = ["system", "developer", "user", "assistant", "tool", "function", "ipython", "environment"];
/// What a row gives, or why it gives nothing.
type Row<T> = std::result::Result<T, BadRow>;

/// Where an assistant's turn begins in a rendered conversation, in bytes: at the end of the prompt for it.
type Begin = usize;

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
        Ok(Encoded { documents: documents.collect(), ..Default::default() })
    }

    /// Applies the policy for long rows, and refuses rows that teach nothing.
    fn finish(&self, mut document: Document) -> Row<Encoded> {
        let (tokens, limit) = (document.ids.len(), self.limit());
        let truncated = tokens > limit;
        let answer_cut = document.trained.iter().skip(limit).any(|trained| *trained);
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
        Ok(Encoded { documents: vec![document], truncated, answer_cut })
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
            let why = self.no_template();
            BadRow::Malformed(format!("a conversation, but {why}: name one with dataset.chat_template"))
        })
    }

    /// Why there is no chat template: the model has none, or several and none for want of another.
    fn no_template(&self) -> String {
        let names: Vec<&str> = self.tokenizer.chat_templates().keys().map(String::as_str).collect();
        match names.as_slice() {
            [] => "the model has no chat template".into(),
            names => format!("the model's chat templates are {}, and none is called `default`", names.join(", ")),
        }
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
    /// Conversations need a template, the others an end-of-text token.
    fn check(&self, format: DataFormat) -> Result<()> {
        match format {
            DataFormat::Messages | DataFormat::Instruction if self.chat.is_none() => {
                let names = BUILTIN.map(|builtin| builtin.name).join(", ");
                let what = format!("the rows are conversations, but {}", self.no_template());
                let own = if self.tokenizer.chat_templates().is_empty() { "" } else { "one of the model's, " };
                let hint = format!("name {own}a built-in one ({names}) or a .jinja file with `dataset.chat_template`");
                Err(Error::Data(Fault::new("dataset.chat_template", what).hint(hint)))
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

    fn notices(&self) -> Vec<String> {
        self.tokenizer.notices().to_vec()
    }

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

#[cfg(test)]
mod family_tests;
#[cfg(test)]
mod tests;
