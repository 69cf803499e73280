//! `engraft preview`: rows as the model will see them, every token marked by whether it is trained, and the totals.

use std::io::{IsTerminal, Write};

use serde_json::json;

use super::console::Console;
use super::loading;
use crate::cli::Preview;
use crate::recipe::Recipe;
use crate::{Error, Fault, Result};

/// Runs the verb. Only the base's tokenizer is read, not its weights.
pub fn run(arguments: &Preview, out: &mut dyn Write) -> Result<()> {
    let plan = Recipe::read(&arguments.recipe, &arguments.overrides.set)?.plan()?;
    if arguments.eval {
        loading::has_eval_set(&plan)?;
    }
    let console = Console::new(arguments.json);
    let checkpoint = loading::texts(&plan, &console)?;
    let encoder = loading::encoder(&checkpoint, &plan.dataset)?;
    let (what, sources) = if arguments.eval { ("eval", &plan.eval) } else { ("training", &plan.train) };
    let dataset = loading::dataset(what, sources, &plan, &checkpoint, &encoder, &console)?;
    let colour = !arguments.no_color && std::env::var_os("NO_COLOR").is_none() && std::io::stdout().is_terminal();
    let mut text = String::new();
    for item in dataset.examples(arguments.rows) {
        let (row, example) = item?;
        let tokens = example.and_then(|example| encoder.preview(&example));
        let place = dataset.place(row);
        if arguments.json {
            let line = match &tokens {
                Ok(tokens) => json!({
                    "row": place,
                    "tokens": tokens.iter().map(|(id, piece, trained)| json!({"id": id, "text": piece, "trained": trained})).collect::<Vec<_>>(),
                }),
                Err(bad) => json!({"row": place, "left_out": bad.to_string()}),
            };
            text += &format!("{line}\n");
            continue;
        }
        match tokens {
            Ok(tokens) => {
                let trained = tokens.iter().filter(|(_, _, trained)| *trained).count();
                text += &format!("{place}: {} tokens, {trained} trained\n", tokens.len());
                text += &marked(&tokens, colour);
                text += "\n\n";
            }
            Err(bad) => text += &format!("{place}: left out: {bad}\n\n"),
        }
    }
    if arguments.json {
        text += &format!("{}\n", json!({"totals": dataset.report()}));
    } else {
        let legend =
            if colour { "\x1b[1;32mtrained\x1b[0m, \x1b[2mnot trained\x1b[0m" } else { "[trained], not trained" };
        text += &format!("{legend}; tokens are parted by |\n\n{}\n", dataset.report());
    }
    out.write_all(text.as_bytes()).map_err(|error| Error::Output(Fault::new("standard output", error)))
}

/// Tokens in a row, those trained in green or in brackets; control characters are shown, not obeyed.
fn marked(tokens: &[(u32, String, bool)], colour: bool) -> String {
    let mut text = String::new();
    for (i, (_, piece, trained)) in tokens.iter().enumerate() {
        let piece: String = piece
            .chars()
            .map(|c| match c {
                '\n' => "\\n\n".to_string(),
                c if c.is_control() => c.escape_default().to_string(),
                c => c.to_string(),
            })
            .collect();
        let follows = i > 0 && tokens[i - 1].2 == *trained;
        text += if follows { "|" } else { "" };
        text += &match (colour, trained) {
            (true, true) => format!("\x1b[1;32m{piece}\x1b[0m"),
            (true, false) => format!("\x1b[2m{piece}\x1b[0m"),
            (false, false) => piece,
            (false, true) => {
                let opens = if follows { "" } else { "[" };
                let closes = if tokens.get(i + 1).is_some_and(|next| next.2) { "" } else { "]" };
                format!("{opens}{piece}{closes}")
            }
        };
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stretch_of_trained_tokens_stands_in_one_pair_of_brackets() {
        let token = |text: &str, trained| (0, text.to_string(), trained);
        let tokens = [token("a", false), token("b\n", false), token("c", true), token("\x1b", true), token("d", false)];
        assert_eq!(marked(&tokens, false), "a|b\\n\n[c|\\u{1b}]d");
    }
}
