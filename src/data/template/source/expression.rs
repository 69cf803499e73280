//! jinja2's expressions, parsed and written again for minijinja.

use std::fmt::Write;

use super::Parsed;
use super::tokens::{Kind, Parser, Token};

/// An expression as text for minijinja.
pub(super) struct Piece {
    pub(super) text: String,
    /// A filter may follow without parentheses.
    pub(super) simple: bool,
    /// A literal, which cannot hold anything deep.
    pub(super) literal: bool,
}

impl Piece {
    pub(super) fn simple(text: String) -> Self {
        Piece { text, simple: true, literal: false }
    }

    pub(super) fn compound(text: String) -> Self {
        Piece { text, simple: false, literal: false }
    }

    /// With parentheses where a filter could not follow.
    pub(super) fn operand(self) -> String {
        if self.simple { self.text } else { format!("({})", self.text) }
    }
}

/// jinja2's expression grammar (`jinja2/parser.py`), a function per level.
impl Parser<'_, '_> {
    /// One expression, or several separated by commas (a tuple).
    pub(super) fn tuple(&mut self) -> Parsed<String> {
        self.items(Self::expression)
    }

    pub(super) fn items(&mut self, item: fn(&mut Self) -> Parsed<Piece>) -> Parsed<String> {
        let mut text = item(self)?.text;
        while self.take(",") {
            text.push_str(", ");
            if matches!(self.peek().kind, Kind::End) || matches!(self.peek().text, ")" | "]" | "if" | "recursive") {
                break;
            }
            text.push_str(&item(self)?.text);
        }
        Ok(text)
    }

    pub(super) fn expression(&mut self) -> Parsed<Piece> {
        self.deeper(|parser| {
            let mut piece = parser.or()?;
            let mut links = 0;
            while parser.take_name("if") {
                parser.link(&mut links)?;
                let condition = parser.or()?.text;
                let mut text = format!("{} if {condition}", piece.text);
                if parser.take_name("else") {
                    let _ = write!(text, " else {}", parser.expression()?.text);
                }
                piece = Piece::compound(text);
            }
            Ok(piece)
        })
    }

    pub(super) fn or(&mut self) -> Parsed<Piece> {
        self.chain(Self::and, &["or"])
    }

    fn and(&mut self) -> Parsed<Piece> {
        self.chain(Self::not, &["and"])
    }

    fn not(&mut self) -> Parsed<Piece> {
        if self.take_name("not") {
            return self.deeper(|parser| Ok(Piece::compound(format!("not {}", parser.not()?.text))));
        }
        self.comparison()
    }

    fn comparison(&mut self) -> Parsed<Piece> {
        let mut piece = self.sum()?;
        let mut links = 0;
        loop {
            let operator = match self.peek().text {
                "==" | "!=" | "<" | ">" | "<=" | ">=" => self.next().text.to_string(),
                "in" => {
                    self.next();
                    "in".into()
                }
                "not" if self.tokens.get(self.at + 1).is_some_and(|token| token.text == "in") => {
                    self.next();
                    self.next();
                    "not in".into()
                }
                _ => return Ok(piece),
            };
            self.link(&mut links)?;
            piece = Piece::compound(format!("{} {operator} {}", piece.text, self.sum()?.text));
        }
    }

    /// `+` becomes a filter; `-` stays.
    fn sum(&mut self) -> Parsed<Piece> {
        let mut piece = self.concatenation()?;
        let mut links = 0;
        loop {
            if self.take("-") {
                self.link(&mut links)?;
                let right = self.concatenation()?.operand();
                piece = Piece::compound(format!("{} - {right}", piece.operand()));
            } else if self.peek().text == "+" {
                let mut terms = Vec::new();
                while self.take("+") {
                    self.link(&mut links)?;
                    terms.push(self.concatenation()?.text);
                }
                piece = Piece::simple(format!("{}|__add({})", piece.operand(), terms.join(", ")));
            } else {
                return Ok(piece);
            }
        }
    }

    /// `~` binds tighter than `+` in jinja2.
    fn concatenation(&mut self) -> Parsed<Piece> {
        let piece = self.product()?;
        if self.peek().text != "~" {
            return Ok(piece);
        }
        let mut terms = Vec::new();
        let mut links = 0;
        while self.take("~") {
            self.link(&mut links)?;
            terms.push(self.product()?.text);
        }
        Ok(Piece::simple(format!("{}|__concat({})", piece.operand(), terms.join(", "))))
    }

    fn product(&mut self) -> Parsed<Piece> {
        let mut piece = self.power()?;
        let mut links = 0;
        loop {
            let operator = self.peek().text;
            let filter = match operator {
                "*" => "__multiply",
                "%" => "__modulo",
                "/" | "//" => {
                    self.next();
                    self.link(&mut links)?;
                    let right = self.power()?.operand();
                    piece = Piece::compound(format!("{} {operator} {right}", piece.operand()));
                    continue;
                }
                _ => return Ok(piece),
            };
            self.next();
            self.link(&mut links)?;
            let right = self.power()?.text;
            piece = Piece::simple(format!("{}|{filter}({right})", piece.operand()));
        }
    }

    fn power(&mut self) -> Parsed<Piece> {
        let mut piece = self.unary(true)?;
        let mut links = 0;
        while self.take("**") {
            self.link(&mut links)?;
            let right = self.unary(true)?.operand();
            piece = Piece::compound(format!("{} ** {right}", piece.operand()));
        }
        Ok(piece)
    }

    fn unary(&mut self, with_filters: bool) -> Parsed<Piece> {
        let sign = ["-", "+"].into_iter().find(|sign| self.peek().text == *sign);
        let piece = match sign {
            Some(sign) => {
                self.next();
                let inner = self.deeper(|parser| parser.unary(false))?;
                if sign == "+" { inner } else { Piece::compound(format!("-{}", inner.operand())) }
            }
            None => {
                let primary = self.primary()?;
                self.postfix(primary)?
            }
        };
        if with_filters && (self.peek().text == "|" || self.peek_name("is")) {
            let operand = Piece { text: piece.operand(), simple: true, literal: false };
            return self.filters(operand);
        }
        Ok(piece)
    }

    pub(super) fn filters(&mut self, mut piece: Piece) -> Parsed<Piece> {
        let mut links = 0;
        loop {
            if self.take("|") {
                self.link(&mut links)?;
                let name = self.dotted_name("a filter")?;
                let arguments = if self.peek().text == "(" { self.arguments()? } else { String::new() };
                piece = Piece::simple(format!("{}|{name}{arguments}", piece.operand()));
            } else if self.peek_name("is") {
                self.next();
                self.link(&mut links)?;
                let not = if self.take_name("not") { "not " } else { "" };
                let name = self.dotted_name("a test")?;
                let argument = match self.peek() {
                    token if token.text == "(" => self.arguments()?,
                    token if self.begins_value(token) => {
                        let primary = self.primary()?;
                        format!("({})", self.postfix(primary)?.text)
                    }
                    _ => String::new(),
                };
                piece = Piece::compound(format!("{} is {not}{name}{argument}", piece.operand()));
            } else {
                return Ok(piece);
            }
        }
    }

    /// Whether a test's argument without parentheses begins here: `x is divisibleby 3`.
    fn begins_value(&self, token: &Token) -> bool {
        match token.kind {
            Kind::Name => !matches!(token.text, "else" | "or" | "and" | "is" | "if" | "in" | "not" | "recursive"),
            Kind::Number | Kind::Text => true,
            Kind::Operator => matches!(token.text, "[" | "{"),
            Kind::End => false,
        }
    }

    fn dotted_name(&mut self, what: &str) -> Parsed<String> {
        let mut name = self.name().ok_or_else(|| self.error(format!("{what} needs a name")))?.to_string();
        while self.take(".") {
            let part = self.name().ok_or_else(|| self.error(format!("{what} needs a name")))?;
            let _ = write!(name, ".{part}");
        }
        Ok(name)
    }

    fn chain(&mut self, level: fn(&mut Self) -> Parsed<Piece>, words: &[&str]) -> Parsed<Piece> {
        let mut piece = level(self)?;
        let mut links = 0;
        while let Some(word) = words.iter().find(|word| self.peek_name(word)) {
            self.next();
            self.link(&mut links)?;
            piece = Piece::compound(format!("{} {word} {}", piece.text, level(self)?.text));
        }
        Ok(piece)
    }
}
