//! What operators stand between: names, literals, groups, and what is reached from them.

use std::fmt::Write;

use super::Parsed;
use super::expression::Piece;
use super::literal::quote;
use super::tokens::{Kind, Parser};

/// Methods of Python's mappings that schemas have keys called like.
const METHODS: [&str; 5] = ["items", "keys", "values", "get", "copy"];

impl Parser<'_, '_> {
    pub(super) fn primary(&mut self) -> Parsed<Piece> {
        let lines = "\n".repeat(self.peek().lines);
        let token = self.next();
        match (token.kind, token.text) {
            (Kind::Name, name) => {
                let literal = matches!(name, "true" | "false" | "none" | "True" | "False" | "None");
                Ok(Piece { text: format!("{lines}{name}"), simple: true, literal })
            }
            (Kind::Number, number) => Ok(Piece { text: format!("{lines}{number}"), simple: true, literal: true }),
            (Kind::Text, text) => {
                let mut value = token.value.clone();
                let mut lines = lines + &"\n".repeat(text.matches('\n').count());
                // Strings side by side are one string.
                while self.peek().kind == Kind::Text {
                    let next = self.next();
                    lines.push_str(&"\n".repeat(next.lines + next.text.matches('\n').count()));
                    value.push_str(&next.value);
                }
                Ok(Piece { text: format!("{lines}{}", quote(&value)), simple: true, literal: true })
            }
            (_, "(") => self.group(lines, ")"),
            (_, "[") => self.group(lines, "]"),
            (_, "{") => self.dictionary(lines),
            (Kind::End, _) => self.fail("the expression ends too early"),
            (_, other) => self.fail(format!("`{other}` where a value was expected")),
        }
    }

    /// `(a)`, `(a, b)` or `[a, b]`.
    fn group(&mut self, lines: String, closing: &str) -> Parsed<Piece> {
        let opening = if closing == ")" { "(" } else { "[" };
        let (mut inside, mut literal, mut comma) = (String::new(), true, false);
        while self.peek().text != closing {
            let piece = self.expression()?;
            literal &= piece.literal;
            inside.push_str(&piece.text);
            if self.take(",") {
                comma = true;
                inside.push_str(", ");
            } else {
                break;
            }
        }
        inside.push_str(&"\n".repeat(self.peek().lines));
        self.expect(closing)?;
        let text = format!("{lines}{opening}{inside}{closing}");
        let holds_values = closing == "]" || comma;
        if literal || !holds_values {
            return Ok(Piece { text, simple: true, literal: literal && holds_values });
        }
        Ok(Piece::simple(format!("({text}|__deep)")))
    }

    fn dictionary(&mut self, lines: String) -> Parsed<Piece> {
        let (mut inside, mut literal) = (String::new(), true);
        while self.peek().text != "}" {
            let key = self.expression()?;
            self.expect(":")?;
            let value = self.expression()?;
            literal &= key.literal && value.literal;
            let _ = write!(inside, "{}: {}", key.text, value.text);
            if self.take(",") {
                inside.push_str(", ");
            } else {
                break;
            }
        }
        inside.push_str(&"\n".repeat(self.peek().lines));
        self.expect("}")?;
        let text = format!("{lines}{{{inside}}}");
        Ok(if literal { Piece { text, simple: true, literal } } else { Piece::simple(format!("({text}|__deep)")) })
    }

    pub(super) fn postfix(&mut self, mut piece: Piece) -> Parsed<Piece> {
        let mut links = 0;
        loop {
            match self.peek().text {
                "." => {
                    self.next();
                    let token = self.next();
                    if !matches!(token.kind, Kind::Name | Kind::Number) {
                        return self.fail("a dot needs a name after it");
                    }
                    piece = match self.peek().text {
                        "(" => Piece::simple(format!("{}.{}", piece.text, token.text)),
                        _ => Self::member(piece, token.text)
                            .unwrap_or_else(|piece| Piece::simple(format!("{}.{}", piece.text, token.text))),
                    };
                }
                "[" => piece = self.subscript(piece)?,
                "(" => piece = Piece::simple(format!("{}{}", piece.text, self.arguments()?)),
                _ => return Ok(piece),
            }
            self.link(&mut links)?;
        }
    }

    /// A member by a name that is also a method of Python's mappings, which `x['items']` is where there is no such key.
    fn member(base: Piece, name: &str) -> Result<Piece, Piece> {
        match METHODS.contains(&name) {
            true => Ok(Piece::simple(format!("({}|__member({}))", base.operand(), quote(name)))),
            false => Err(base),
        }
    }

    fn subscript(&mut self, base: Piece) -> Parsed<Piece> {
        self.expect("[")?;
        if let [name, closing, next, ..] = &self.tokens[self.at..]
            && (name.kind, closing.text) == (Kind::Text, "]")
            && METHODS.contains(&name.value.as_str())
        {
            self.at += 2;
            if next.text == "(" {
                return Ok(Piece::simple(format!("{}.{}", base.text, name.value)));
            }
            return Ok(Self::member(base, &name.value).unwrap_or_else(|base| base));
        }
        let mut parts = vec![None];
        let mut slice = false;
        while self.peek().text != "]" {
            if self.take(":") {
                slice = true;
                parts.push(None);
            } else {
                let text = self.items(Self::expression)?;
                *parts.last_mut().expect("never empty") = Some(text);
                if !matches!(self.peek().text, ":" | "]") {
                    return self.fail("a subscript is not closed by `]`");
                }
            }
        }
        self.expect("]")?;
        if !slice {
            let Some(Some(index)) = parts.pop() else { return self.fail("an empty subscript `[]`") };
            let index = if index.contains(',') { format!("({index})") } else { index };
            return Ok(Piece::simple(format!("{}[{index}]", base.text)));
        }
        if parts.len() > 3 {
            return self.fail("a slice has at most start, stop and step");
        }
        parts.resize(3, None);
        let parts: Vec<String> = parts.into_iter().map(|part| part.unwrap_or_else(|| "none".into())).collect();
        Ok(Piece::simple(format!("({}|__slice({}))", base.text, parts.join(", "))))
    }

    pub(super) fn arguments(&mut self) -> Parsed<String> {
        self.expect("(")?;
        let mut text = String::from("(");
        while self.peek().text != ")" {
            if matches!(self.peek().text, "*" | "**") {
                text.push_str(self.next().text);
            } else if self.peek().kind == Kind::Name
                && self.tokens.get(self.at + 1).is_some_and(|token| token.text == "=")
            {
                let _ = write!(text, "{}=", self.next().text);
                self.next();
            }
            text.push_str(&self.expression()?.text);
            if self.take(",") {
                text.push_str(", ");
            } else {
                break;
            }
        }
        text.push_str(&"\n".repeat(self.peek().lines));
        self.expect(")")?;
        text.push(')');
        Ok(text)
    }
}
