//! Held-out rows as questions: exactly the rows that the loss is measured on.

use crate::data::{Dataset, Encoder, Tally};
use crate::recipe::OnBadRow;
use crate::{Error, Fault, Result};

/// A held-out row as a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// File and row.
    pub place: String,
    /// What the model is given; never empty.
    pub prompt: Vec<u32>,
    /// What the row answers, if it does.
    pub expected: Option<String>,
    /// Tokens an answer may have before the context is full; at least 1.
    pub room: usize,
}

/// A dataset's questions, and its rows that the loss covers but that cannot be asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Questions {
    /// In the order of the rows.
    pub asked: Vec<Question>,
    /// Rows without a prompt, or with one that leaves no room for an answer.
    pub not_asked: Tally,
}

/// Makes a question of every row that gave a document; those left out of the loss are left out here too.
///
/// `context` is how many tokens the model was made for.
///
/// # Errors
/// [`Error::Data`] for a row that cannot be asked, unless `on_bad_row` leaves such rows out; a file that has changed.
pub fn questions(eval: &Dataset, encoder: &Encoder, context: usize, on_bad_row: OnBadRow) -> Result<Questions> {
    let mut questions = Questions::default();
    for item in eval.examples(u64::MAX) {
        let (row, example) = item?;
        let Some(example) = example.ok().filter(|_| eval.keeps(row)) else { continue };
        let question = match encoder.prompt(&example) {
            Ok((prompt, _)) if prompt.is_empty() => Err("the prompt has no tokens, so nothing is asked".to_string()),
            Ok((prompt, _)) if prompt.len() >= context => {
                let tokens = prompt.len();
                Err(format!(
                    "the prompt's {tokens} tokens leave no room for an answer: the model was made for {context}"
                ))
            }
            Ok((prompt, expected)) => {
                Ok(Question { room: context - prompt.len(), place: eval.place(row), prompt, expected })
            }
            Err(bad) => Err(bad.to_string()),
        };
        match (question, on_bad_row) {
            (Ok(question), _) => questions.asked.push(question),
            (Err(why), OnBadRow::Skip) => questions.not_asked.add(eval.place(row), why),
            (Err(why), OnBadRow::Error) => {
                let hint = "mend the row, or set `dataset.on_bad_row: skip` to leave such rows out, counted and named";
                return Err(Error::Data(Fault::new(eval.place(row), why).hint(hint)));
            }
        }
    }
    Ok(questions)
}
