//! `engraft generate`: completes one prompt.

use std::io::{Read, Write};
use std::ops::ControlFlow;

use serde_json::json;

use super::console::Console;
use super::loading;
use super::speech::Speaker;
use crate::cli::Generate;
use crate::data::{BadRow, Encoder, Example};
use crate::recipe::DatasetRecipe;
use crate::{Error, Fault, Result};

/// Longest prompt read from standard input, in bytes.
const LONGEST_PROMPT: u64 = 16 << 20;

/// Runs the verb; the answer goes to `out` as it is made.
pub fn run(arguments: &Generate, out: &mut dyn Write) -> Result<()> {
    loading::use_cpu(None);
    let console = Console::new(arguments.json);
    let prompt = prompt(&arguments.prompt)?;
    let loaded = loading::chosen(&arguments.model, &console)?;
    let tokenizer = loading::tokenizer(&loaded.checkpoint)?;
    let encoder = Encoder::new(tokenizer.clone(), &DatasetRecipe::defaults())?;
    let bad = |bad: BadRow| Error::Data(Fault::new("the prompt", bad));
    // Without a template there is only one way to put a prompt.
    let ids = if arguments.raw || encoder.template().is_none() {
        encoder.prompt(&Example::PromptCompletion { prompt, completion: String::new() }).map_err(bad)?.0
    } else {
        let mut messages = Vec::new();
        messages.extend(arguments.system.iter().map(|text| json!({"role": "system", "content": text})));
        messages.push(json!({"role": "user", "content": prompt}));
        encoder.prompt_ids(&messages, None).map_err(bad)?
    };
    let mut speaker = Speaker::new(&tokenizer, encoder.end_ids(), &arguments.sampling);
    let spoken = speaker.speak(&loaded.model, &ids, &mut |text| {
        if arguments.json {
            return ControlFlow::Continue(());
        }
        // Whoever reads has had enough when the pipe is closed.
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    })?;
    let last = if arguments.json {
        json!({
            "text": spoken.text,
            "finish": spoken.finish,
            "prompt_tokens": ids.len(),
            "tokens": spoken.tokens,
            "tokens_per_second": spoken.tokens_per_second,
        })
        .to_string()
    } else {
        String::new()
    };
    let _ = writeln!(out, "{last}");
    Ok(())
}

fn prompt(typed: &str) -> Result<String> {
    if typed != "-" {
        return Ok(typed.into());
    }
    let mut text = String::new();
    let read = std::io::stdin().take(LONGEST_PROMPT + 1).read_to_string(&mut text);
    let fault = |what: String| Error::Data(Fault::new("standard input", what));
    read.map_err(|error| fault(error.to_string()))?;
    if text.len() as u64 > LONGEST_PROMPT {
        return Err(fault(format!("longer than {} MiB", LONGEST_PROMPT >> 20)));
    }
    if text.trim().is_empty() {
        return Err(Error::Data(
            Fault::new("standard input", "no prompt").hint("write it there, or give --prompt TEXT"),
        ));
    }
    Ok(text)
}
