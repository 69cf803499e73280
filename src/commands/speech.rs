//! Text out of a model, piece by piece, up to a stop: what `generate` and `chat` share.

use std::ops::ControlFlow;
use std::time::Instant;

use crate::cli;
use crate::data::Tokenizer;
use crate::model::{Decoder, Finish, Sampling};
use crate::torch_ext::catching;
use crate::{Error, Fault, Result};

/// Turns token ids into text as they come, and knows when to stop.
pub(super) struct Speaker<'a> {
    tokenizer: &'a Tokenizer,
    sampling: Sampling,
    stops: Vec<String>,
}

/// What was said.
pub(super) struct Spoken {
    pub(super) text: String,
    pub(super) finish: Finish,
    pub(super) tokens: usize,
    pub(super) tokens_per_second: f64,
}

impl<'a> Speaker<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, stop: Vec<u32>, typed: &cli::Sampling) -> Self {
        let sampling = Sampling {
            temperature: typed.temperature,
            top_p: typed.top_p,
            max_tokens: typed.max_tokens as usize,
            stop,
            seed: typed.seed,
        };
        Self { tokenizer, sampling, stops: typed.stop.iter().filter(|s| !s.is_empty()).cloned().collect() }
    }

    /// Continues `ids`; `heard` gets each piece of text and may have had enough. Text that may be the beginning of a stop is
    /// held back until it is known not to be.
    pub(super) fn speak(
        &mut self,
        model: &Decoder,
        ids: &[u32],
        heard: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Spoken> {
        if ids.is_empty() {
            return Err(Error::Data(Fault::new("the prompt", "has no tokens")));
        }
        let longest = model.spec.max_position_embeddings as usize;
        if ids.len() + 1 > longest {
            let what = format!("has {} tokens; the model was made for {longest}", ids.len());
            return Err(Error::Data(Fault::new("the prompt", what).hint("shorten it")));
        }
        let mut sampling = self.sampling.clone();
        sampling.max_tokens = sampling.max_tokens.min(longest - ids.len());
        let (mut stream, mut text, mut given) = (self.tokenizer.stream(true), String::new(), 0);
        let mut stopped = false;
        let began = Instant::now();
        let answer = catching("generating", || {
            Ok(model.generate(std::slice::from_ref(&ids.to_vec()), &sampling, &mut |_, token| {
                text.push_str(&stream.push(token));
                if let Some(at) = self.stops.iter().filter_map(|stop| text.find(stop.as_str())).min() {
                    text.truncate(at);
                    stopped = true;
                    return ControlFlow::Break(());
                }
                let safe = safe(&self.stops, &text);
                let piece = &text[given.min(safe)..safe];
                given = given.max(safe);
                if piece.is_empty() { ControlFlow::Continue(()) } else { heard(piece) }
            }))
        })?
        .remove(0);
        if !stopped {
            text.push_str(&stream.finish());
        }
        if given < text.len() {
            let _ = heard(&text[given..]);
        }
        self.sampling.seed = self.sampling.seed.wrapping_add(1);
        Ok(Spoken {
            finish: if stopped { Finish::Stop } else { answer.finish },
            tokens: answer.ids.len(),
            tokens_per_second: answer.ids.len() as f64 / began.elapsed().as_secs_f64(),
            text,
        })
    }
}

/// How much of the text cannot be part of a stop that is not whole yet.
fn safe(stops: &[String], text: &str) -> usize {
    let held = |stop: &String| {
        (1..stop.len()).rev().filter(|n| stop.is_char_boundary(*n)).find(|n| text.ends_with(&stop[..*n])).unwrap_or(0)
    };
    text.len() - stops.iter().map(held).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_the_beginning_of_a_stop_is_held_back() {
        let stops = ["END".to_string(), "über".to_string()];
        assert_eq!(safe(&stops, "all said"), 8);
        assert_eq!(safe(&stops, "all said EN"), 9);
        assert_eq!(safe(&stops, "E"), 0);
        assert_eq!(safe(&stops, "x üb"), 2);
    }
}
