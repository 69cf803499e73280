//! Let the model answer held-out rows and compare with what the rows say.

use std::ops::ControlFlow;

use regex::Regex;
use serde::Serialize;

use super::Question;
use crate::data::Tokenizer;
use crate::model::{Continuation, Decoder, Finish, Sampling};

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
    /// How many tokens that is.
    pub tokens: usize,
    /// Why the answer ended.
    pub finish: Finish,
    /// Whether the two are the same but for white space around them.
    pub exact: Option<bool>,
    /// Whether the pattern, if one was given, is found in the answer without white space around it.
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

/// Answers every question, in their order, each with at most the tokens that `sampling` and its own room allow; `answered` is
/// told how many are done and may end it early.
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
        let mut spoken = vec![0; chunk.len()];
        let continuations = model.generate(&prompts, sampling, &mut |prompt, _| {
            spoken[prompt] += 1;
            if spoken[prompt] < questions[chunk[prompt]].room {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        });
        for (i, continuation) in chunk.iter().zip(continuations) {
            answers.push((*i, judged(tokenizer, &questions[*i], &continuation, pattern)));
        }
        if answered(answers.len()).is_break() {
            break;
        }
    }
    answers.sort_by_key(|(i, _)| *i);
    answers.into_iter().map(|(_, answer)| answer).collect()
}

fn judged(tokenizer: &Tokenizer, question: &Question, said: &Continuation, pattern: Option<&Regex>) -> Answer {
    let answer = tokenizer.decode(&said.ids, true);
    Answer {
        place: question.place.clone(),
        prompt: tokenizer.decode(&question.prompt, false),
        exact: question.expected.as_ref().map(|expected| expected.trim() == answer.trim()),
        // The same text for both judgements: an answer that is right must not fail `^...$` for a space before it.
        matches: pattern.map(|pattern| pattern.is_match(answer.trim())),
        expected: question.expected.clone(),
        tokens: said.ids.len(),
        // Nobody but the room ends an answer here.
        finish: if said.finish == Finish::Cancelled { Finish::Length } else { said.finish },
        answer,
    }
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
    use std::collections::BTreeMap;
    use std::path::Path;

    use tch::{Device, Kind};

    use super::*;
    use crate::recipe::BaseSource;
    use crate::weights::Checkpoint;

    fn tokenizer() -> Tokenizer {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer/bytes");
        let files = ["tokenizer.json", "tokenizer_config.json"];
        let sidecars = files.map(|name| (name.to_string(), std::fs::read(folder.join(name)).unwrap()));
        Tokenizer::new(&BTreeMap::from(sidecars)).unwrap()
    }

    fn question(prompt: Vec<u32>, expected: &str, room: usize) -> Question {
        Question { place: String::new(), prompt, expected: Some(expected.into()), room }
    }

    #[test]
    fn one_question_that_nearly_fills_the_context_cuts_its_own_answer_only() {
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft/base-tied");
        let checkpoint = Checkpoint::open(&BaseSource::Folder(base)).unwrap();
        let model = Decoder::load(&checkpoint, Kind::Float, Device::Cpu, &|_, _| ()).unwrap();
        let questions = [question(vec![3; 30], "", 2), question(vec![3, 4], "", 30)];
        let sampling = Sampling { max_tokens: 8, ..Sampling::default() };
        let answers = answer_all(&model, &tokenizer(), &questions, &sampling, None, |_| ControlFlow::Continue(()));
        assert_eq!(answers.iter().map(|answer| answer.tokens).collect::<Vec<_>>(), [2, 8]);
        assert!(answers.iter().all(|answer| answer.finish == Finish::Length));
    }

    #[test]
    fn white_space_around_an_answer_changes_no_judgement() {
        let tokenizer = tokenizer();
        let said = Continuation { ids: tokenizer.encode_plain(" {42}\n").unwrap().ids, finish: Finish::Stop };
        let pattern = Regex::new(r"^\{\d+\}$").unwrap();
        let answer = judged(&tokenizer, &question(vec![1], "{42}", 9), &said, Some(&pattern));
        assert_eq!((answer.exact, answer.matches), (Some(true), Some(true)));
        assert_eq!(answer.answer, " {42}\n", "it is shown as it was given");
    }

    fn answer(exact: Option<bool>, matches: Option<bool>) -> Answer {
        Answer {
            place: String::new(),
            prompt: String::new(),
            expected: None,
            answer: String::new(),
            tokens: 0,
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
