//! String literals: Python's escapes read, minijinja's written.

/// Decodes the inside of a string literal by Python's rules.
pub(super) fn unescape(text: &str) -> Result<String, String> {
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
pub(super) fn quote(text: &str) -> String {
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
