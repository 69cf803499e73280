//! Reads a jinja template as jinja2 does and hands minijinja a text it understands the same way.
//!
//! minijinja follows jinja2 closely; what it lacks is expressed by filters of [`super::python`]: string `%`, `~` and `+`
//! with Python's rules and a memory budget, slices, and the nesting of lists. `{% generation %}` becomes a filter block. String literals
//! are decoded by Python's rules. Everything keeps its line, so that errors name the template's own lines. The depth of
//! expressions and blocks is bounded here, before a recursive parser sees them.

mod expression;
mod literal;
mod operand;
mod statement;
mod tokens;

use std::fmt::Write;

use self::literal::{quote, unescape};
use self::tokens::{Kind, OPERATORS, Parser, Token};

/// Longest template, in bytes. The longest published ones have some 30 KB.
const LONGEST_SOURCE: usize = 64 * 1024;
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
