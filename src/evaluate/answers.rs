//! Let the model answer held-out rows and compare with what the rows say.

use std::ops::ControlFlow;

use regex::Regex;
use serde::Serialize;

use crate::data::Tokenizer;
use crate::model::{Decoder, Finish, Sampling};

/// A held-out row as a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// File and row.
    pub place: String,
    /// What the model is given.
    pub prompt: Vec<u32>,
    /// What the row answers, if it does.
    pub expected: Option<String>,
}

/// What the model answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// File and row.
    pub place: String,
    /// What the model was given, as text.
    pub prompt: String,
    /// What the row answers, if it does.
    pub expected: Option<String>,
    /// What the model answered.
    pub answer: String,
    /// Why the answer ended.
    pub finish: Finish,
    /// Whether the two are the same but for white space around them.
    pub exact: Option<bool>,
    /// Whether the pattern, if one was given, is found in the answer.
    pub matches: Option<bool>,
}

/// Shares of answers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Score {
    /// Answers given.
    pub answers: usize,
    /// Share that is exact, of those whose row has an answer.
    pub exact_match: Option<f64>,
    /// Share that the pattern is found in.
    #[serde(rename = "match")]
    pub matches: Option<f64>,
}

/// Sequences generated at once: enough to fill the products, few enough for the cache of a small machine.
const AT_ONCE: usize = 32;

/// Answers every question, in their order; `answered` is told how many are done and may end it early.
pub fn answer_all(
    model: &Decoder,
    tokenizer: &Tokenizer,
    questions: &[Question],
    sampling: &Sampling,
    pattern: Option<&Regex>,
    mut answered: impl FnMut(usize) -> ControlFlow<()>,
) -> Vec<Answer> {
    // Questions of like length together: they tend to be done together.
    let mut order: Vec<usize> = (0..questions.len()).collect();
    order.sort_by_key(|i| questions[*i].prompt.len());
    let mut answers: Vec<(usize, Answer)> = Vec::with_capacity(questions.len());
    for chunk in order.chunks(AT_ONCE) {
        let prompts: Vec<Vec<u32>> = chunk.iter().map(|i| questions[*i].prompt.clone()).collect();
        let continuations = model.generate(&prompts, sampling, &mut |_, _| ControlFlow::Continue(()));
        for (i, continuation) in chunk.iter().zip(continuations) {
            let question = &questions[*i];
            let answer = tokenizer.decode(&continuation.ids, true);
            answers.push((
                *i,
                Answer {
                    place: question.place.clone(),
                    prompt: tokenizer.decode(&question.prompt, false),
                    exact: question.expected.as_ref().map(|expected| expected.trim() == answer.trim()),
                    matches: pattern.map(|pattern| pattern.is_match(&answer)),
                    expected: question.expected.clone(),
                    finish: continuation.finish,
                    answer,
                },
            ));
        }
        if answered(answers.len()).is_break() {
            break;
        }
    }
    answers.sort_by_key(|(i, _)| *i);
    answers.into_iter().map(|(_, answer)| answer).collect()
}

/// The shares over all answers.
pub fn score(answers: &[Answer]) -> Score {
    let share = |of: fn(&Answer) -> Option<bool>| {
        let told: Vec<bool> = answers.iter().filter_map(of).collect();
        (!told.is_empty()).then(|| told.iter().filter(|yes| **yes).count() as f64 / told.len() as f64)
    };
    Score { answers: answers.len(), exact_match: share(|answer| answer.exact), matches: share(|answer| answer.matches) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(exact: Option<bool>, matches: Option<bool>) -> Answer {
        Answer {
            place: String::new(),
            prompt: String::new(),
            expected: None,
            answer: String::new(),
            finish: Finish::Stop,
            exact,
            matches,
        }
    }

    #[test]
    fn shares_are_of_the_rows_that_can_be_judged() {
        let answers = [
            answer(Some(true), Some(false)),
            answer(Some(false), Some(true)),
            answer(Some(true), Some(true)),
            answer(None, Some(true)),
        ];
        let score = score(&answers);
        assert_eq!((score.answers, score.exact_match, score.matches), (4, Some(2.0 / 3.0), Some(0.75)));
        assert_eq!(super::score(&answers[3..]).exact_match, None);
    }
}
