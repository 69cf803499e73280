//! From text to token ids: of a person's text, of a template's, of both side by side.

use std::collections::BTreeMap;
use std::ops::Range;

use tokenizers::AddedToken;

use super::Tokenizer;
use crate::data::quiet::quietly;
use crate::data::template::Rendered;

/// First of the private-use characters that stand for special tokens while text is encoded around them.
const STAND_INS: u32 = 0xF0000;

/// The tokenizer with special tokens replaced by characters no text has.
pub(super) struct Plain {
    inner: tokenizers::Tokenizer,
    /// Id of a stand-in to the id it stands for.
    ids: BTreeMap<u32, u32>,
}

/// Encoded text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tokens {
    /// Token ids.
    pub ids: Vec<u32>,
    /// The bytes of the text each token stands for.
    pub spans: Vec<Range<usize>>,
}

impl Tokenizer {
    /// Encodes text in which special-token text is the special token. Adds nothing.
    pub fn encode(&self, text: &str) -> Result<Tokens, String> {
        encode(&self.inner, text)
    }

    /// Encodes text in which special-token text is only text. Adds nothing.
    pub fn encode_plain(&self, text: &str) -> Result<Tokens, String> {
        match &self.special_text {
            Some(special) if special.is_match(text) => encode(&self.plain()?.inner, text),
            _ => encode(&self.inner, text),
        }
    }

    /// Encodes two pieces of plain text with a token boundary between them; gives the number of tokens of the first too.
    pub fn encode_apart(&self, first: &str, second: &str) -> Result<(Tokens, usize), String> {
        let plain = self.plain()?;
        let boundary = stand_in(self.special.len());
        reject_stand_ins(first, self.special.len())?;
        reject_stand_ins(second, self.special.len())?;
        let mut tokens = encode(&plain.inner, &format!("{first}{boundary}{second}"))?;
        let boundary = plain.inner.token_to_id(&boundary.to_string());
        let at =
            tokens.ids.iter().position(|id| Some(*id) == boundary).ok_or("the tokenizer drops unknown characters")?;
        let width = tokens.spans[at].len();
        tokens.ids.remove(at);
        tokens.spans.remove(at);
        for span in &mut tokens.spans[at..] {
            *span = span.start.saturating_sub(width)..span.end.saturating_sub(width);
        }
        Ok((tokens, at))
    }

    /// Encodes a rendered conversation: special-token text a message contains is text, the template's own is the token.
    ///
    /// Where no message contains any, this is the encoding of the whole text.
    pub fn encode_rendered(&self, rendered: &Rendered) -> Result<Tokens, String> {
        let text = rendered.text.as_str();
        let Some(special) = self.special_text.as_ref().filter(|_| !rendered.literal.is_empty()) else {
            return self.encode(text);
        };
        // The template's special tokens become single characters the plain tokenizer reads as tokens.
        reject_stand_ins(text, self.special.len())?;
        let plain = self.plain()?;
        let mut replaced = String::with_capacity(text.len());
        // Where the replaced text is ahead of the original: (byte in the replaced text, bytes left out up to there).
        let mut shifts = vec![(0usize, 0usize)];
        let (mut copied, mut at) = (0, 0);
        while let Some(found) = special.find_at(text, at) {
            let span = found.range();
            if rendered.is_literal(&span) {
                at = span.start + text[span.start..].chars().next().map_or(1, char::len_utf8);
                continue;
            }
            let index =
                self.special.iter().position(|(text, _)| text == found.as_str()).ok_or("an unknown special token")?;
            replaced.push_str(&text[copied..span.start]);
            replaced.push(stand_in(index));
            copied = span.end;
            at = span.end;
            shifts.push((replaced.len(), span.end - replaced.len()));
        }
        replaced.push_str(&text[copied..]);
        let mut tokens = encode(&plain.inner, &replaced)?;
        for (id, span) in tokens.ids.iter_mut().zip(&mut tokens.spans) {
            let original = |at: usize| at + shifts[shifts.partition_point(|(from, _)| *from <= at) - 1].1;
            *span = original(span.start)..original(span.end);
            if let Some(stands_for) = plain.ids.get(id) {
                *id = *stands_for;
            }
        }
        Ok(tokens)
    }

    fn plain(&self) -> Result<&Plain, String> {
        if let Some(plain) = self.plain.get() {
            return Ok(plain);
        }
        let mut inner = self.inner.clone();
        inner.set_encode_special_tokens(true);
        let decoder = self.inner.get_added_tokens_decoder();
        let mut stand_ins: Vec<AddedToken> = self
            .special
            .iter()
            .enumerate()
            .map(|(index, (_, id))| {
                let token = AddedToken::from(stand_in(index).to_string(), false).normalized(false);
                match decoder.get(id) {
                    Some(original) => {
                        token.single_word(original.single_word).lstrip(original.lstrip).rstrip(original.rstrip)
                    }
                    None => token,
                }
            })
            .collect();
        stand_ins.push(AddedToken::from(stand_in(self.special.len()).to_string(), false).normalized(false));
        inner.add_tokens(stand_ins).map_err(|error| error.to_string())?;
        let ids = self
            .special
            .iter()
            .enumerate()
            .filter_map(|(index, (_, id))| Some((inner.token_to_id(&stand_in(index).to_string())?, *id)))
            .collect();
        Ok(self.plain.get_or_init(|| Plain { inner, ids }))
    }
}

fn encode(inner: &tokenizers::Tokenizer, text: &str) -> Result<Tokens, String> {
    let encoding = quietly(|| inner.encode(text, false))
        .map_err(|panic| format!("the tokenizer failed on this text: {panic}"))?
        .map_err(|error| format!("the tokenizer failed on this text: {error}"))?;
    let spans = encoding.get_offsets().iter().map(|(begin, end)| *begin..*end).collect();
    Ok(Tokens { ids: encoding.get_ids().to_vec(), spans })
}

fn stand_in(index: usize) -> char {
    char::from_u32(STAND_INS + index as u32)
        .expect("a vocabulary has fewer special tokens than plane 15 characters: checked when read")
}

fn reject_stand_ins(text: &str, count: usize) -> Result<(), String> {
    let taken = STAND_INS..=STAND_INS + count as u32;
    match text.chars().find(|c| taken.contains(&(*c as u32))) {
        Some(c) => Err(format!(
            "private-use character U+{:X} beside special-token text: set dataset.allow_special_tokens, or remove the character",
            c as u32
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use crate::data::tokenizer::tests::with;

    #[test]
    fn apart_means_a_boundary_and_nothing_else() {
        for name in ["bytes", "pieces"] {
            let tokenizer = with(name, &[]).unwrap();
            let (tokens, at) = tokenizer.encode_apart("The quick bro", "wn <|im_end|></s> fox").unwrap();
            assert_eq!(tokens.ids[..at], tokenizer.encode_plain("The quick bro").unwrap().ids);
            assert_eq!(tokens.spans.last().unwrap().end, "The quick brown <|im_end|></s> fox".len());
            assert!(tokens.ids.iter().all(|id| !tokenizer.is_special(*id)));
        }
    }
}
