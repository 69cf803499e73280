//! The tokens of a tag, read one after the other.

use super::literal::quote;
use super::{Parsed, SyntaxError};

/// Nested parentheses, calls and unary operators of an expression.
const DEEPEST_EXPRESSION: usize = 40;
/// Operators chained on one level: `a or b or c ...`.
const LONGEST_CHAIN: usize = 100;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Name,
    Number,
    Text,
    Operator,
    End,
}

#[derive(Debug)]
pub(super) struct Token<'s> {
    pub(super) kind: Kind,
    pub(super) text: &'s str,
    /// What a string literal says.
    pub(super) value: String,
    /// Line ends between the token before and this one.
    pub(super) lines: usize,
    pub(super) line: usize,
}

/// Longest first.
pub(super) const OPERATORS: [&str; 27] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<", "=", ".",
    ":", "|", ",", ";", "!",
];

/// Reads the tokens of one tag.
pub(super) struct Parser<'t, 's> {
    pub(super) tokens: &'t [Token<'s>],
    pub(super) at: usize,
    depth: usize,
    line: usize,
}

impl<'t, 's> Parser<'t, 's> {
    pub(super) fn new(tokens: &'t [Token<'s>], line: usize) -> Self {
        Parser { tokens, at: 0, depth: 0, line }
    }

    pub(super) fn copy_until(&mut self, stop: impl Fn(&Token) -> bool) -> String {
        let mut text = String::new();
        while self.peek().kind != Kind::End && !stop(self.peek()) {
            let token = self.next();
            text.push_str(&"\n".repeat(token.lines));
            if !matches!(token.text, "." | ",") && !text.ends_with('.') {
                text.push(' ');
            }
            text.push_str(&if token.kind == Kind::Text { quote(&token.value) } else { token.text.to_string() });
        }
        text
    }

    pub(super) fn peek(&self) -> &'t Token<'s> {
        &self.tokens[self.at]
    }

    /// The closing marker is never passed.
    pub(super) fn next(&mut self) -> &'t Token<'s> {
        let token = &self.tokens[self.at];
        self.line = token.line;
        if token.kind != Kind::End {
            self.at += 1;
        }
        token
    }

    pub(super) fn name(&mut self) -> Option<&'s str> {
        (self.peek().kind == Kind::Name).then(|| self.next().text)
    }

    pub(super) fn peek_name(&self, name: &str) -> bool {
        self.peek().kind == Kind::Name && self.peek().text == name
    }

    pub(super) fn take_name(&mut self, name: &str) -> bool {
        self.peek_name(name) && self.take(name)
    }

    pub(super) fn take(&mut self, text: &str) -> bool {
        let found = self.peek().text == text && matches!(self.peek().kind, Kind::Operator | Kind::Name);
        if found {
            self.next();
        }
        found
    }

    pub(super) fn expect(&mut self, text: &str) -> Parsed<()> {
        if self.take(text) { Ok(()) } else { self.fail(format!("`{}` where `{text}` was expected", self.peek().text)) }
    }

    pub(super) fn end(&self) -> Parsed<()> {
        if self.peek().kind == Kind::End {
            Ok(())
        } else {
            self.fail(format!("`{}` was not expected here", self.peek().text))
        }
    }

    pub(super) fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        self.depth += 1;
        if self.depth > DEEPEST_EXPRESSION {
            return self.fail(format!("the expression is nested more than {DEEPEST_EXPRESSION} deep"));
        }
        let parsed = parse(self);
        self.depth -= 1;
        parsed
    }

    pub(super) fn link(&self, links: &mut usize) -> Parsed<()> {
        *links += 1;
        if *links > LONGEST_CHAIN {
            return self.fail(format!("more than {LONGEST_CHAIN} operators follow one another"));
        }
        Ok(())
    }

    pub(super) fn fail<T>(&self, what: impl Into<String>) -> Parsed<T> {
        Err(self.error(what))
    }

    pub(super) fn error(&self, what: impl Into<String>) -> SyntaxError {
        SyntaxError { line: self.tokens.get(self.at).map_or(self.line, |token| token.line), what: what.into() }
    }
}
