//! What follows the keyword of a statement.

use std::fmt::Write;

use super::Parsed;
use super::expression::Piece;
use super::tokens::{Kind, Parser};

impl Parser<'_, '_> {
    /// The rest of a statement after its keyword.
    pub(super) fn statement(&mut self, keyword: &str) -> Parsed<String> {
        match keyword {
            "if" | "elif" | "print" => self.tuple(),
            "for" => {
                let targets = self.copy_until(|token| token.kind == Kind::Name && token.text == "in");
                if !self.take_name("in") {
                    return self.fail("`for` without `in`");
                }
                let mut text = format!("{targets} in ({})|__each", self.items(Self::or)?);
                if self.take_name("if") {
                    let _ = write!(text, " if {}", self.expression()?.text);
                }
                if self.take_name("recursive") {
                    text.push_str(" recursive");
                }
                Ok(text)
            }
            "set" => {
                let targets = self.copy_until(|token| matches!(token.text, "=" | "|"));
                if self.take("=") {
                    return Ok(format!("{targets} = {}", self.tuple()?));
                }
                let piece = self.filters(Piece::simple(targets))?;
                Ok(piece.text)
            }
            "macro" => {
                let name = self.copy_until(|token| token.text == "(");
                Ok(format!("{name}{}", self.parameters()?))
            }
            "call" => {
                let parameters = if self.peek().text == "(" { self.parameters()? } else { String::new() };
                Ok(format!("{parameters} {}", self.expression()?.text))
            }
            "filter" => {
                let name = self.name().ok_or_else(|| self.error("`filter` needs the name of one"))?.to_string();
                let arguments = if self.peek().text == "(" { self.arguments()? } else { String::new() };
                let piece = self.filters(Piece::simple(format!(" {name}{arguments}")))?;
                Ok(piece.text)
            }
            "with" => {
                let mut text = String::new();
                while self.peek().kind != Kind::End {
                    let target = self.copy_until(|token| token.text == "=");
                    if !self.take("=") {
                        return self.fail("`with` needs `name = value`");
                    }
                    let comma = if text.is_empty() { "" } else { "," };
                    let _ = write!(text, "{comma}{target} = {}", self.expression()?.text);
                    self.take(",");
                }
                Ok(text)
            }
            _ => Ok(self.copy_until(|_| false)),
        }
    }

    /// `(a, b=1)` of a macro.
    pub(super) fn parameters(&mut self) -> Parsed<String> {
        self.expect("(")?;
        let mut text = String::from("(");
        while !self.take(")") {
            let name = self.name().ok_or_else(|| self.error("a parameter needs a name"))?;
            text.push_str(name);
            if self.take("=") {
                let _ = write!(text, "={}", self.expression()?.text);
            }
            if self.take(",") {
                text.push_str(", ");
            }
        }
        text.push(')');
        Ok(text)
    }
}
