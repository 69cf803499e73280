//! From token ids to text, one by one.

use super::Tokenizer;

impl Tokenizer {
    /// Decodes a generation token by token.
    pub fn stream(&self, skip_special: bool) -> TextStream<'_> {
        TextStream { tokenizer: self, skip_special, ids: Vec::new(), begin: 0, shown: 0 }
    }
}

/// Text that grows token by token: a character made of several tokens appears when it is whole.
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    skip_special: bool,
    ids: Vec<u32>,
    /// First token still needed as context of the next text.
    begin: usize,
    /// Tokens whose text has been given out.
    shown: usize,
}

impl TextStream<'_> {
    /// The text that a further token adds; empty while a character is incomplete.
    pub fn push(&mut self, id: u32) -> String {
        self.ids.push(id);
        self.advance(false)
    }

    /// What is left, complete or not.
    pub fn finish(mut self) -> String {
        self.advance(true)
    }

    fn advance(&mut self, last: bool) -> String {
        let before = self.tokenizer.decode(&self.ids[self.begin..self.shown], self.skip_special);
        let now = self.tokenizer.decode(&self.ids[self.begin..], self.skip_special);
        if (now.ends_with('\u{FFFD}') && !last) || now.len() <= before.len() {
            return String::new();
        }
        self.begin = self.shown;
        self.shown = self.ids.len();
        now.get(before.len()..).unwrap_or_default().to_string()
    }
}

#[cfg(test)]
mod tests {
    use crate::data::tokenizer::tests::with;

    #[test]
    fn a_stream_gives_the_whole_text_and_no_broken_characters() {
        for name in ["bytes", "pieces"] {
            let tokenizer = with(name, &[]).unwrap();
            let text = "Grüße 你好 🙂🙃 and  two spaces\n\nend é";
            let ids = tokenizer.encode(text).unwrap().ids;
            let mut stream = tokenizer.stream(true);
            let pieces: Vec<String> = ids.iter().map(|id| stream.push(*id)).collect();
            let streamed = pieces.concat() + &stream.finish();
            assert!(!streamed.contains('\u{FFFD}'), "{streamed}");
            assert_eq!(streamed, tokenizer.decode(&ids, true));
            assert!(pieces.iter().filter(|piece| !piece.is_empty()).count() > 10);
        }
    }
}
