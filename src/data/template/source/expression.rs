//! jinja2's expressions, parsed and written again for minijinja.

use std::fmt::Write;

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

/// Methods of Python's mappings that schemas have keys called like.
const METHODS: [&str; 5] = ["items", "keys", "values", "get", "copy"];

/// An expression as text for minijinja.
struct Piece {
    text: String,
    /// A filter may follow without parentheses.
    simple: bool,
    /// A literal, which cannot hold anything deep.
    literal: bool,
}

impl Piece {
    fn simple(text: String) -> Self {
        Piece { text, simple: true, literal: false }
    }

    fn compound(text: String) -> Self {
        Piece { text, simple: false, literal: false }
    }

    /// With parentheses where a filter could not follow.
    fn operand(self) -> String {
        if self.simple { self.text } else { format!("({})", self.text) }
    }
}

/// jinja2's expression grammar (`jinja2/parser.py`), a function per level.
pub(super) struct Parser<'t, 's> {
    tokens: &'t [Token<'s>],
    at: usize,
    depth: usize,
    line: usize,
}

impl<'t, 's> Parser<'t, 's> {
    pub(super) fn new(tokens: &'t [Token<'s>], line: usize) -> Self {
        Parser { tokens, at: 0, depth: 0, line }
    }

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
    fn parameters(&mut self) -> Parsed<String> {
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

    /// One expression, or several separated by commas (a tuple).
    pub(super) fn tuple(&mut self) -> Parsed<String> {
        self.items(Self::expression)
    }

    fn items(&mut self, item: fn(&mut Self) -> Parsed<Piece>) -> Parsed<String> {
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

    fn expression(&mut self) -> Parsed<Piece> {
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

    fn or(&mut self) -> Parsed<Piece> {
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

    fn primary(&mut self) -> Parsed<Piece> {
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

    fn postfix(&mut self, mut piece: Piece) -> Parsed<Piece> {
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

    fn arguments(&mut self) -> Parsed<String> {
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

    fn filters(&mut self, mut piece: Piece) -> Parsed<Piece> {
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

    fn copy_until(&mut self, stop: impl Fn(&Token) -> bool) -> String {
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

    fn peek(&self) -> &'t Token<'s> {
        &self.tokens[self.at]
    }

    /// The closing marker is never passed.
    fn next(&mut self) -> &'t Token<'s> {
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

    fn peek_name(&self, name: &str) -> bool {
        self.peek().kind == Kind::Name && self.peek().text == name
    }

    fn take_name(&mut self, name: &str) -> bool {
        self.peek_name(name) && self.take(name)
    }

    fn take(&mut self, text: &str) -> bool {
        let found = self.peek().text == text && matches!(self.peek().kind, Kind::Operator | Kind::Name);
        if found {
            self.next();
        }
        found
    }

    fn expect(&mut self, text: &str) -> Parsed<()> {
        if self.take(text) { Ok(()) } else { self.fail(format!("`{}` where `{text}` was expected", self.peek().text)) }
    }

    pub(super) fn end(&self) -> Parsed<()> {
        if self.peek().kind == Kind::End {
            Ok(())
        } else {
            self.fail(format!("`{}` was not expected here", self.peek().text))
        }
    }

    fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        self.depth += 1;
        if self.depth > DEEPEST_EXPRESSION {
            return self.fail(format!("the expression is nested more than {DEEPEST_EXPRESSION} deep"));
        }
        let parsed = parse(self);
        self.depth -= 1;
        parsed
    }

    fn link(&self, links: &mut usize) -> Parsed<()> {
        *links += 1;
        if *links > LONGEST_CHAIN {
            return self.fail(format!("more than {LONGEST_CHAIN} operators follow one another"));
        }
        Ok(())
    }

    fn fail<T>(&self, what: impl Into<String>) -> Parsed<T> {
        Err(self.error(what))
    }

    pub(super) fn error(&self, what: impl Into<String>) -> SyntaxError {
        SyntaxError { line: self.tokens.get(self.at).map_or(self.line, |token| token.line), what: what.into() }
    }
}
