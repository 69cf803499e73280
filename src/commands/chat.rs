//! `engraft chat`: a conversation in the terminal.

use std::io::{BufRead, IsTerminal, Write};
use std::ops::ControlFlow;

use serde_json::{Value, json};

use super::console::Console;
use super::loading;
use super::speech::Speaker;
use crate::cli::Chat;
use crate::data::Encoder;
use crate::recipe::DatasetRecipe;
use crate::{Error, Fault, Result};

/// Runs the verb: a line in, an answer out, until the end of input or `/quit`; `/reset` forgets what was said. A turn that
/// the context has no room for is reported and left out.
pub fn run(arguments: &Chat, out: &mut dyn Write) -> Result<()> {
    loading::use_cpu(None);
    let console = Console::new(false);
    let loaded = loading::chosen(&arguments.model, &console)?;
    let tokenizer = loading::tokenizer(&loaded.checkpoint)?;
    let encoder = Encoder::new(tokenizer.clone(), &DatasetRecipe::defaults())?;
    if encoder.template().is_none() {
        let fault =
            Fault::new(&arguments.model.model, "the model has no chat template, so it cannot be talked to in turns");
        return Err(Error::Model(fault.hint("`engraft generate --raw` continues plain text")));
    }
    let mut speaker = Speaker::new(&tokenizer, encoder.end_ids(), &arguments.sampling);
    let beginning: Vec<Value> =
        arguments.system.iter().map(|text| json!({"role": "system", "content": text})).collect();
    let mut messages = beginning.clone();
    let shown = std::io::stdin().is_terminal();
    if shown {
        console.say("Ctrl-D or /quit ends, /reset forgets what was said.");
    }
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if shown {
            let _ = write!(out, "> ").and_then(|()| out.flush());
        }
        let Some(line) = lines.next() else { break };
        let line = line.map_err(|error| Error::Data(Fault::new("standard input", error)))?;
        match line.trim() {
            "" => continue,
            "/quit" | "/exit" => break,
            "/reset" => {
                messages = beginning.clone();
                continue;
            }
            said => messages.push(json!({"role": "user", "content": said})),
        }
        let ids = encoder.prompt_ids(&messages, None);
        let ids = ids.map_err(|bad| Error::Data(Fault::new("the conversation", bad)))?;
        let spoken = match speaker.speak(&loaded.model, &ids, &mut |piece| match out
            .write_all(piece.as_bytes())
            .and_then(|()| out.flush())
        {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }) {
            Ok(spoken) => spoken,
            // The conversation has outgrown the context. What was said before this turn still stands.
            Err(Error::Data(fault)) => {
                messages.pop();
                console.say(
                    Fault { place: "the conversation".into(), ..fault }
                        .hint("this turn is left out; say it shorter, or /reset to begin anew"),
                );
                continue;
            }
            Err(error) => return Err(error),
        };
        if writeln!(out).is_err() {
            break;
        }
        messages.push(json!({"role": "assistant", "content": spoken.text}));
    }
    Ok(())
}
