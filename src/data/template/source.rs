//! Reads a jinja template as jinja2 does and hands minijinja a text it understands the same way.
//!
//! minijinja follows jinja2 closely; what it lacks is expressed by filters of [`super::python`]: string `%`, `~` and `+`
//! with Python's rules and a memory budget, slices, and the nesting of lists. `{% generation %}` becomes a filter block. String literals
//! are decoded by Python's rules. Everything keeps its line, so that errors name the template's own lines. The depth of
//! expressions and blocks is bounded here, before a recursive parser sees them.

use std::fmt::Write;

/// Longest template, in bytes. The longest published ones have some 30 KB.
const LONGEST_SOURCE: usize = 64 * 1024;
/// Nested parentheses, calls and unary operators of an expression.
const DEEPEST_EXPRESSION: usize = 40;
/// Operators chained on one level: `a or b or c ...`.
const LONGEST_CHAIN: usize = 100;
/// Nested blocks (`{% if %}`, `{% for %}`), an `elif` counted as one more.
const DEEPEST_BLOCK: usize = 60;
/// Template text longer than this goes through the formatter, which counts it against the render's budget.
const UNCOUNTED_TEXT: usize = 64;

/// A template minijinja can compile.
pub(super) struct Source {
    /// The rewritten text.
    pub text: String,
    /// Whether it marks what the assistant says with `{% generation %}`.
    pub marks_generation: bool,
}

/// What is wrong, and in which line of the template (from 1).
#[derive(Debug)]
pub(super) struct SyntaxError {
    pub line: usize,
    pub what: String,
}

type Parsed<T> = Result<T, SyntaxError>;

/// Rewrites a template for minijinja.
pub(super) fn rewrite(source: &str) -> Parsed<Source> {
    if source.len() > LONGEST_SOURCE {
        let what = format!("the template has {} bytes; the limit is {LONGEST_SOURCE}", source.len());
        return Err(SyntaxError { line: 1, what });
    }
    // jinja2 reads every kind of line end as "\n".
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut reader =
        Reader { source: &source, at: 0, line: 1, out: String::new(), generation: false, blocks: Vec::new() };
    reader.template()?;
    Ok(Source { text: reader.out, marks_generation: reader.generation })
}

struct Reader<'s> {
    source: &'s str,
    at: usize,
    line: usize,
    out: String,
    generation: bool,
    /// Depth added by each open block: 1, and 1 for each `elif`.
    blocks: Vec<usize>,
}

impl<'s> Reader<'s> {
    fn template(&mut self) -> Parsed<()> {
        loop {
            let rest = &self.source[self.at..];
            let Some(tag) = next_tag(rest) else {
                self.text(rest.len());
                return Ok(());
            };
            self.text(tag);
            match self.source.as_bytes()[self.at + 1] {
                b'#' => self.comment()?,
                b'{' => self.variable()?,
                _ => self.statement()?,
            }
        }
    }

    /// Copies template text, long text as an expression so that it is counted when printed.
    fn text(&mut self, length: usize) {
        let text = &self.source[self.at..self.at + length];
        let core = text.trim();
        // A final newline is dropped by jinja2 only where it is text, so white space at both ends stays text.
        if core.len() > UNCOUNTED_TEXT {
            let begin = core.as_ptr() as usize - text.as_ptr() as usize;
            let _ = write!(
                self.out,
                "{}{{{{ {}{} }}}}{}",
                &text[..begin],
                quote(core),
                "\n".repeat(core.matches('\n').count()),
                &text[begin + core.len()..]
            );
        } else {
            self.out.push_str(text);
        }
        self.advance(length);
    }

    fn advance(&mut self, length: usize) {
        self.line += self.source[self.at..self.at + length].matches('\n').count();
        self.at += length;
    }

    fn copy(&mut self, length: usize) {
        self.out.push_str(&self.source[self.at..self.at + length]);
        self.advance(length);
    }

    fn comment(&mut self) -> Parsed<()> {
        match self.source[self.at + 2..].find("#}") {
            Some(end) => self.copy(2 + end + 2),
            None => return self.fail("a comment `{#` is never closed by `#}`"),
        }
        Ok(())
    }

    fn variable(&mut self) -> Parsed<()> {
        self.copy(2);
        self.sign();
        let tokens = self.tokens("}}")?;
        let mut parser = Parser::new(&tokens, self.line);
        let text = parser.tuple()?;
        parser.end()?;
        let _ = write!(self.out, " {text} ");
        self.close(&tokens, "}}");
        Ok(())
    }

    fn statement(&mut self) -> Parsed<()> {
        if let Some((begin, length)) = raw_block(&self.source[self.at..]) {
            let Some(length) = length else { return self.fail("`{% raw %}` is never closed by `{% endraw %}`") };
            // jinja2 keeps a line end after `{% raw %}`, whatever `trim_blocks` says.
            let keep = if self.source[self.at..self.at + begin].ends_with("-%}") { "" } else { "+" };
            self.copy(begin - 2);
            self.out.push_str(keep);
            self.copy(length - (begin - 2));
            return Ok(());
        }
        self.copy(2);
        self.sign();
        let tokens = self.tokens("%}")?;
        let mut parser = Parser::new(&tokens, self.line);
        let keyword = parser.name().ok_or_else(|| parser.error("a statement begins with a keyword"))?;
        let lines = "\n".repeat(tokens[0].lines);
        let (keyword, text) = match keyword {
            "generation" => {
                self.generation = true;
                ("filter", " __generation".to_string())
            }
            "endgeneration" => ("endfilter", String::new()),
            other => (other, parser.statement(other)?),
        };
        parser.end()?;
        self.nest(keyword, &text)?;
        let _ = write!(self.out, "{lines} {keyword} {text} ");
        self.close(&tokens, "%}");
        Ok(())
    }

    /// Follows the nesting of blocks, which minijinja's parser and compiler recurse over.
    fn nest(&mut self, keyword: &str, text: &str) -> Parsed<()> {
        match keyword {
            "if" | "for" | "macro" | "call" | "filter" | "with" | "autoescape" | "block" => self.blocks.push(1),
            "set" if !text.contains('=') => self.blocks.push(1),
            "elif" => {
                if let Some(depth) = self.blocks.last_mut() {
                    *depth += 1;
                }
            }
            _ if keyword.starts_with("end") => {
                self.blocks.pop();
            }
            _ => {}
        }
        if self.blocks.iter().sum::<usize>() > DEEPEST_BLOCK {
            return self.fail(format!("blocks are nested more than {DEEPEST_BLOCK} deep"));
        }
        Ok(())
    }

    /// The `-` or `+` of `{%-`.
    fn sign(&mut self) {
        if matches!(self.source.as_bytes().get(self.at), Some(b'-' | b'+')) {
            self.copy(1);
        }
    }

    /// Copies the closing marker with the lines before it.
    fn close(&mut self, tokens: &[Token], marker: &str) {
        let closing = &tokens[tokens.len() - 1];
        self.out.push_str(&"\n".repeat(closing.lines));
        self.out.push_str(closing.text.strip_suffix(marker).unwrap_or(""));
        self.out.push_str(marker);
    }

    /// The tokens up to and with the closing marker, which is the last.
    fn tokens(&mut self, marker: &str) -> Parsed<Vec<Token<'s>>> {
        let mut tokens = Vec::new();
        let mut open = 0usize;
        loop {
            let rest = &self.source[self.at..];
            let blank = rest.len() - rest.trim_start().len();
            let before = self.line;
            self.advance(blank);
            let (line, lines) = (self.line, self.line - before);
            let rest = &self.source[self.at..];
            if open == 0 {
                let signs: &[&str] = if marker == "%}" { &["-", "+", ""] } else { &["-", ""] };
                if let Some(sign) =
                    signs.iter().find(|sign| rest.strip_prefix(**sign).is_some_and(|r| r.starts_with(marker)))
                {
                    let length = sign.len() + marker.len();
                    tokens.push(Token { kind: Kind::End, text: &rest[..length], value: String::new(), lines, line });
                    self.advance(length);
                    return Ok(tokens);
                }
            }
            let Some(first) = rest.chars().next() else {
                return self.fail(format!("a tag is never closed by `{marker}`"));
            };
            let (kind, length) = match first {
                '\'' | '"' => (Kind::Text, self.string_length(rest, first)?),
                '0'..='9' => (Kind::Number, number_length(rest)),
                c if c == '_' || c.is_alphabetic() => {
                    (Kind::Name, rest.find(|c: char| c != '_' && !c.is_alphanumeric()).unwrap_or(rest.len()))
                }
                _ => match OPERATORS.iter().find(|operator| rest.starts_with(**operator)) {
                    Some(operator) => (Kind::Operator, operator.len()),
                    None => return self.fail(format!("`{first}` means nothing in a template expression")),
                },
            };
            let text = &rest[..length];
            match text {
                "(" | "[" | "{" => open += 1,
                ")" | "]" | "}" => open = open.saturating_sub(1),
                _ => {}
            }
            let value = match kind {
                Kind::Text => unescape(&text[1..length - 1]).map_err(|what| SyntaxError { line, what })?,
                _ => String::new(),
            };
            tokens.push(Token { kind, text, value, lines, line });
            self.advance(length);
        }
    }

    fn string_length(&self, rest: &str, quote: char) -> Parsed<usize> {
        let mut escaped = false;
        for (at, c) in rest.char_indices().skip(1) {
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                c if c == quote => return Ok(at + 1),
                _ => {}
            }
        }
        self.fail("a string is never closed")
    }

    fn fail<T>(&self, what: impl Into<String>) -> Parsed<T> {
        Err(SyntaxError { line: self.line, what: what.into() })
    }
}

/// Where the next `{{`, `{%` or `{#` begins.
fn next_tag(text: &str) -> Option<usize> {
    text.as_bytes().windows(2).position(|pair| pair[0] == b'{' && matches!(pair[1], b'{' | b'%' | b'#'))
}

/// The lengths of the `{% raw %}` at the start of `text` and of the block up to `{% endraw %}`; no second when it is never closed.
fn raw_block(text: &str) -> Option<(usize, Option<usize>)> {
    let tag = |text: &str, name: &str| -> Option<usize> {
        let rest = text.strip_prefix("{%")?;
        let rest = rest.strip_prefix(['-', '+']).unwrap_or(rest).trim_start().strip_prefix(name)?.trim_start();
        let rest = rest.strip_prefix(['-', '+']).unwrap_or(rest).strip_prefix("%}")?;
        Some(text.len() - rest.len())
    };
    let begin = tag(text, "raw")?;
    let mut at = begin;
    while let Some(found) = text[at..].find("{%") {
        at += found;
        if let Some(length) = tag(&text[at..], "endraw") {
            return Some((begin, Some(at + length)));
        }
        at += 2;
    }
    Some((begin, None))
}

fn number_length(text: &str) -> usize {
    let bytes = text.as_bytes();
    let digits =
        |from: usize| from + bytes[from..].iter().take_while(|c| c.is_ascii_alphanumeric() || **c == b'_').count();
    let mut end = digits(0);
    // `1.5`, but not `items.0.name` (handled by the dot) and not `1.real`.
    if bytes.get(end) == Some(&b'.') && bytes.get(end + 1).is_some_and(u8::is_ascii_digit) {
        end = digits(end + 1);
    }
    if matches!(bytes[end - 1], b'e' | b'E') && !text.starts_with("0x") && matches!(bytes.get(end), Some(b'-' | b'+')) {
        end = digits(end + 1);
    }
    end
}

/// Decodes the inside of a string literal by Python's rules.
fn unescape(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    let number = |digits: String, radix: u32, count: usize| {
        let code = u32::from_str_radix(&digits, radix).ok().filter(|_| digits.len() == count);
        code.and_then(char::from_u32).ok_or_else(|| format!("`\\{digits}` is no character"))
    };
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        match chars.next() {
            None => out.push('\\'),
            Some('\n') => {}
            Some(c @ ('\\' | '\'' | '"')) => out.push(c),
            Some('a') => out.push('\x07'),
            Some('b') => out.push('\x08'),
            Some('f') => out.push('\x0c'),
            Some('n') => out.push('\n'),
            Some('r') => out.push('\r'),
            Some('t') => out.push('\t'),
            Some('v') => out.push('\x0b'),
            Some('x') => out.push(number(chars.by_ref().take(2).collect(), 16, 2)?),
            Some('u') => {
                let code = u32::from_str_radix(&chars.by_ref().take(4).collect::<String>(), 16).unwrap_or(u32::MAX);
                // A surrogate pair is written as two escapes.
                let code = if (0xD800..0xDC00).contains(&code) && chars.as_str().starts_with("\\u") {
                    let low = u32::from_str_radix(&chars.by_ref().take(6).skip(2).collect::<String>(), 16).unwrap_or(0);
                    0x10000 + ((code - 0xD800) << 10) + low.wrapping_sub(0xDC00) % 0x400
                } else {
                    code
                };
                out.push(char::from_u32(code).ok_or("`\\u` is not followed by the number of a character")?);
            }
            Some('U') => out.push(number(chars.by_ref().take(8).collect(), 16, 8)?),
            Some('N') => return Err("`\\N{...}` is not supported: write the character itself".into()),
            Some(c @ '0'..='7') => {
                let mut digits = c.to_string();
                while digits.len() < 3 && chars.as_str().starts_with(|c| ('0'..='7').contains(&c)) {
                    digits.extend(chars.next());
                }
                let count = digits.len();
                out.push(number(digits, 8, count)?);
            }
            Some(c) => {
                out.push('\\');
                out.push(c);
            }
        }
    }
    Ok(out)
}

/// A string literal for minijinja.
fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Name,
    Number,
    Text,
    Operator,
    End,
}

#[derive(Debug)]
struct Token<'s> {
    kind: Kind,
    text: &'s str,
    /// What a string literal says.
    value: String,
    /// Line ends between the token before and this one.
    lines: usize,
    line: usize,
}

/// Longest first.
const OPERATORS: [&str; 27] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<", "=", ".",
    ":", "|", ",", ";", "!",
];

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
struct Parser<'t, 's> {
    tokens: &'t [Token<'s>],
    at: usize,
    depth: usize,
    line: usize,
}

impl<'t, 's> Parser<'t, 's> {
    fn new(tokens: &'t [Token<'s>], line: usize) -> Self {
        Parser { tokens, at: 0, depth: 0, line }
    }

    /// The rest of a statement after its keyword.
    fn statement(&mut self, keyword: &str) -> Parsed<String> {
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
    fn tuple(&mut self) -> Parsed<String> {
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
                    piece = Piece::simple(format!("{}.{}", piece.text, token.text));
                }
                "[" => piece = self.subscript(piece)?,
                "(" => piece = Piece::simple(format!("{}{}", piece.text, self.arguments()?)),
                _ => return Ok(piece),
            }
            self.link(&mut links)?;
        }
    }

    fn subscript(&mut self, base: Piece) -> Parsed<Piece> {
        self.expect("[")?;
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

    fn name(&mut self) -> Option<&'s str> {
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

    fn end(&self) -> Parsed<()> {
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

    fn error(&self, what: impl Into<String>) -> SyntaxError {
        SyntaxError { line: self.tokens.get(self.at).map_or(self.line, |token| token.line), what: what.into() }
    }
}
