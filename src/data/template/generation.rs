//! Marks that travel through a render: where the assistant speaks (`{% generation %}`), and which special-token text is
//! a person's own text.
//!
//! The marks are four characters at the end of the last private-use plane. Those a row itself contains are escaped on
//! the way in and restored on the way out.

use std::borrow::Cow;
use std::ops::Range;

use regex::Regex;

/// The filter `{% generation %}` becomes.
pub(super) const FILTER: &str = "__generation";

const BEGIN: char = '\u{10FFF0}';
const END: char = '\u{10FFF1}';
/// Put after the first character of a special token's text in a message, so that it is not that token.
const LITERAL: char = '\u{10FFF2}';
/// Put before a character of a row that is itself one of these marks.
const ESCAPE: char = '\u{10FFF3}';
/// An escaped mark is written this much higher, so that it is not read as a mark.
const SHIFT: u32 = 4;
/// What the UTF-8 form of the last private-use plane begins with.
const LAST_PLANE: u8 = 0xF4;

/// Whether a character is a mark, or an escaped one.
pub(super) fn is_mark(c: char) -> bool {
    (BEGIN as u32..=ESCAPE as u32 + SHIFT).contains(&(c as u32))
}

pub(super) fn mark(body: &str) -> String {
    format!("{BEGIN}{body}{END}")
}

/// A row's text on its way into the template: own marks escaped, special-token text kept apart from special tokens.
pub(super) fn guard<'t>(text: &'t str, special: Option<&Regex>) -> Cow<'t, str> {
    let mut text = Cow::Borrowed(text);
    if may_hold_marks(&text) {
        let mut out = String::with_capacity(text.len() + 8);
        for c in text.chars() {
            match c {
                BEGIN..=ESCAPE => {
                    out.push(ESCAPE);
                    out.extend(char::from_u32(c as u32 + SHIFT));
                }
                c => out.push(c),
            }
        }
        text = Cow::Owned(out);
    }
    let Some(special) = special.filter(|special| special.is_match(&text)) else { return text };
    let mut out = String::with_capacity(text.len() + 8);
    let mut last = 0;
    for found in special.find_iter(&text) {
        let first = found.as_str().chars().next().map_or(0, char::len_utf8);
        out.push_str(&text[last..found.start() + first]);
        out.push(LITERAL);
        last = found.start() + first;
    }
    out.push_str(&text[last..]);
    Cow::Owned(out)
}

/// A rendered conversation, free of marks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The text, byte-identical to the reference's.
    pub text: String,
    /// Bytes of `text` the template marked with `{% generation %}`, in order.
    pub generation: Vec<Range<usize>>,
    /// Bytes inside a special token's text that a message contains: it is text, not that token.
    pub literal: Vec<usize>,
}

impl Rendered {
    /// Takes the marks out of what a template printed.
    pub(super) fn new(marked: String) -> Self {
        if !may_hold_marks(&marked) {
            return Rendered { text: marked, ..Rendered::default() };
        }
        let mut rendered = Rendered { text: String::with_capacity(marked.len()), ..Rendered::default() };
        let mut open = Vec::new();
        let mut characters = marked.chars();
        while let Some(c) = characters.next() {
            match c {
                BEGIN => open.push(rendered.text.len()),
                END => {
                    if let Some(begin) = open.pop() {
                        rendered.generation.push(begin..rendered.text.len());
                    }
                }
                LITERAL => rendered.literal.push(rendered.text.len()),
                ESCAPE => {
                    let original = characters.next().and_then(|c| char::from_u32((c as u32).wrapping_sub(SHIFT)));
                    rendered.text.extend(original);
                }
                c => rendered.text.push(c),
            }
        }
        rendered.generation.retain(|span| !span.is_empty());
        rendered.generation.sort_by_key(|span| span.start);
        rendered
    }

    /// Whether the special-token text at these bytes is a person's own text.
    pub fn is_literal(&self, span: &Range<usize>) -> bool {
        let next = self.literal.partition_point(|at| *at <= span.start);
        self.literal.get(next).is_some_and(|at| *at < span.end)
    }
}

fn may_hold_marks(text: &str) -> bool {
    text.as_bytes().contains(&LAST_PLANE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_typed_by_a_person_come_out_as_they_went_in() {
        let typed = "a\u{10FFF0}b\u{10FFF3}c\u{10FFF7}d\u{10FFF2}";
        let special = Regex::new(r"<\|im_end\|>").unwrap();
        assert_eq!(Rendered::new(guard(typed, Some(&special)).into_owned()).text, typed);
        let rendered = Rendered::new(mark(&guard("x <|im_end|> y", Some(&special))));
        assert_eq!(rendered.text, "x <|im_end|> y");
        assert_eq!(rendered.generation.first(), Some(&(0..14)));
        assert!(rendered.is_literal(&(2..12)) && !rendered.is_literal(&(12..14)) && !rendered.is_literal(&(0..3)));
    }
}
