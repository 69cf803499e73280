//! How far apart two models are that ought to be one: an adapter on the base it was trained on, and what it was merged into.
//!
//! One answers some prompts, always by the likeliest token; then both say what they think at every place of those answers.

mod said;
mod strength;
mod tolerance;
mod verdict;

use std::path::Path;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::Question;
use crate::data::{Encoder, Example, Tokenizer};
use crate::model::{Continuation, Decoder, Forward, Sampling};
use crate::ops::Documents;
use crate::quant::name_of;
use crate::{Error, Fault, Result};

pub use said::{Apart, Candidate, Ended, Place, Said};
pub use strength::Strength;
pub use tolerance::{FORMATS, Tolerance};
pub use verdict::{Finding, Verdict};

/// Asked where nobody names other prompts: of many kinds, as what an adapter was trained for is not known.
const PROMPTS: [&str; 8] = [
    "What is the capital of France, and which river runs through it?",
    "Write a short function in Python that returns the sum of the squares of a list of numbers.",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take? Explain step by step.",
    "Summarise in one sentence: The committee met on Tuesday, discussed the budget for two hours and put off the vote.",
    "Translate into German: Could you please tell me where the nearest station is?",
    "My kettle stopped working after three days. The order number is 81-402. I would like my money back.",
    "List three differences between a frog and a toad.",
    "Continue the story: The lamp in the old lighthouse had not been lit for thirty years, until that night",
];

/// The longest answer, in tokens.
const LONGEST: usize = 32;
/// Most prompts, as the logits of all places are kept.
pub const MOST_PROMPTS: usize = 64;
/// Most bytes of their file.
const MOST_BYTES: u64 = 1 << 20;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probes {
    /// The prompts.
    pub prompts: Vec<Prompt>,
    /// Token ids that end an answer.
    pub stop: Vec<u32>,
}

/// A prompt, with the chat template around it where there is one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// Where it is from: `built in`, file and line, file and row.
    pub place: String,
    /// Its tokens.
    pub ids: Vec<u32>,
}

/// An answer, and what its model thought at every place of it.
#[derive(Debug)]
pub struct Reply {
    /// Prompt and answer.
    ids: Vec<u32>,
    /// Logits (P, V), fp32: where each token of the answer was chosen, and what would come behind it.
    logits: Tensor,
}

/// How far apart two models are, or `not measured: ` and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Measured {
    /// Both were asked.
    Drift(Drift),
    /// They were not.
    Not(String),
}

/// How far apart two models are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Drift {
    /// Prompts asked.
    pub prompts: usize,
    /// Places of their answers, of the first model.
    pub places: usize,
    /// What both were computed in: `fp32`, or the number type of training where memory was short, whose rounding is part of the rest.
    pub dtype: String,
    /// The largest difference between two logits of a token at a place.
    pub max_logit_difference: f64,
    /// The mean over all tokens and places.
    pub mean_logit_difference: f64,
    /// Share of the places where the likeliest token is the same.
    pub greedy_agreement: f64,
    /// Prompts at which that is so at every place: both models give the same answer.
    pub same_answers: usize,
}

impl Probes {
    /// Prompts of a text file, one to a line, or those built in; each as a user's message where the base has a chat template.
    ///
    /// Errors with [`Error::Data`]: a file that cannot be read, holds no prompt or too many, a prompt that the template refuses or
    /// that leaves no room for an answer within `context` tokens.
    pub fn new(file: Option<&Path>, encoder: &Encoder, context: usize) -> Result<Self> {
        let stop = encoder.end_ids();
        let Some(path) = file else {
            let ids = PROMPTS.iter().filter_map(|prompt| encode(encoder, prompt).ok());
            let prompts = ids.filter(|ids| fits(ids, context)).map(|ids| Prompt { place: "built in".into(), ids });
            return Ok(Self { prompts: prompts.collect(), stop });
        };
        let fault = |what: String| Error::Data(Fault::at(path, what));
        let length = path.metadata().map_err(|error| fault(format!("cannot be read: {error}")))?.len();
        if length > MOST_BYTES {
            return Err(fault(format!("is {length} bytes; at most {MOST_BYTES} are read")));
        }
        let text = std::fs::read_to_string(path).map_err(|error| fault(format!("cannot be read: {error}")))?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let ids = lines.map(|(number, line)| {
            let place = format!("{}:{}", path.display(), number + 1);
            let ids = encode(encoder, line).map_err(|what| Error::Data(Fault::new(&place, what)))?;
            if !fits(&ids, context) {
                let what = format!("has {} tokens; with an answer of {LONGEST} the model takes {context}", ids.len());
                return Err(Error::Data(Fault::new(place, what).hint("shorten the prompt")));
            }
            Ok(Prompt { place, ids })
        });
        let prompts = ids.collect::<Result<Vec<_>>>()?;
        if prompts.is_empty() || prompts.len() > MOST_PROMPTS {
            let what =
                format!("holds {} prompts; one to a line and 1 to {MOST_PROMPTS} of them are expected", prompts.len());
            return Err(fault(what));
        }
        Ok(Self { prompts, stop })
    }

    /// Adds up to `count` rows of an eval set, evenly spread over it; those that leave no room for an answer are left out.
    pub fn add_rows(&mut self, rows: &[Question], count: usize, context: usize) {
        let fitting: Vec<&Question> = rows.iter().filter(|row| fits(&row.prompt, context)).collect();
        let count = count.min(fitting.len()).min(MOST_PROMPTS.saturating_sub(self.prompts.len()));
        let spread = (0..count).map(|i| fitting[i * fitting.len() / count]);
        self.prompts.extend(spread.map(|row| Prompt { place: row.place.clone(), ids: row.prompt.clone() }));
    }

    /// What a model answers.
    pub fn ask(&self, model: &Decoder) -> Vec<Reply> {
        let replies = self.prompts.iter().zip(self.answers(model)).map(|(prompt, answer)| {
            let ids = [&prompt.ids[..], &answer.ids].concat();
            let logits = logits(model, &ids, answer.ids.len() + 1);
            Reply { ids, logits }
        });
        replies.collect()
    }

    /// What a model answers, as it is kept beside what is exported.
    pub fn record(&self, model: &Decoder, tokenizer: &Tokenizer) -> Vec<Said> {
        let recorded = self.prompts.iter().zip(self.answers(model)).map(|(prompt, answer)| {
            let ids = [&prompt.ids[..], &answer.ids].concat();
            let logits = logits(model, &ids, answer.ids.len() + 1);
            Said::of(answer, &logits, tokenizer)
        });
        recorded.collect()
    }

    fn answers(&self, model: &Decoder) -> Vec<Continuation> {
        let sampling = Sampling { max_tokens: LONGEST, stop: self.stop.clone(), ..Sampling::default() };
        let prompts: Vec<Vec<u32>> = self.prompts.iter().map(|prompt| prompt.ids.clone()).collect();
        model.generate(&prompts, &sampling, &mut |_, _| std::ops::ControlFlow::Continue(()))
    }
}

impl Drift {
    /// How far `model` is from the one that gave `replies`.
    pub fn of(replies: &[Reply], model: &Decoder) -> Self {
        let (mut places, mut agreed, mut same_answers) = (0, 0, 0);
        let (mut largest, mut sum, mut numbers) = (0f64, 0.0, 0);
        for Reply { ids, logits: theirs } in replies {
            let ours = logits(model, ids, theirs.size()[0] as usize);
            let apart = (&ours - theirs).abs();
            largest = largest.max(apart.max().double_value(&[]));
            sum += apart.sum(Kind::Double).double_value(&[]);
            numbers += apart.numel();
            let likeliest = |logits: &Tensor| logits.argmax(-1, false); // (P)
            let same = likeliest(&ours).eq_tensor(&likeliest(theirs)).sum(Kind::Int64).int64_value(&[]) as usize;
            let here = theirs.size()[0] as usize;
            places += here;
            agreed += same;
            same_answers += usize::from(same == here);
        }
        Self {
            prompts: replies.len(),
            places,
            dtype: name_of(model.kind).into(),
            max_logit_difference: largest,
            mean_logit_difference: sum / numbers.max(1) as f64,
            greedy_agreement: agreed as f64 / places.max(1) as f64,
            same_answers,
        }
    }
}

impl std::fmt::Display for Drift {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { prompts, places, dtype, max_logit_difference: max, mean_logit_difference: mean, .. } = self;
        write!(
            f,
            "in {dtype}, logits differ by {mean:.2e} on average and {max:.2e} at most; the likeliest token is the same at {:.1}% of {places} places, \
             {} of {prompts} answers are the same",
            100.0 * self.greedy_agreement,
            self.same_answers
        )
    }
}

/// As [`Encoder`] has it; without a template there is only one way to put a prompt.
fn encode(encoder: &Encoder, prompt: &str) -> Result<Vec<u32>, String> {
    let ids = match encoder.template() {
        Some(_) => encoder.prompt_ids(&[serde_json::json!({"role": "user", "content": prompt})], None),
        None => {
            let example = Example::PromptCompletion { prompt: prompt.into(), completion: String::new() };
            encoder.prompt(&example).map(|(ids, _)| ids)
        }
    };
    ids.map_err(|bad| bad.to_string())
}

fn fits(ids: &[u32], context: usize) -> bool {
    !ids.is_empty() && ids.len() + LONGEST < context
}

/// Logits (P, V) on the CPU, fp32, of the last `places` of one document.
fn logits(model: &Decoder, ids: &[u32], places: usize) -> Tensor {
    tch::no_grad(|| {
        let length = ids.len() as i64;
        let numbers: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
        let tokens = Tensor::from_slice(&numbers).to_device(model.device);
        let positions = Tensor::arange(length, (Kind::Int64, model.device));
        let hidden = model.hidden(&tokens, &positions, &Documents::one(length), Forward::default()); // (T, D)
        let last = hidden.narrow(0, length - places as i64, places as i64); // (P, D)
        model.logits(&last).to_device(Device::Cpu) // (P, V)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::BaseSource;
    use crate::weights::Checkpoint;

    fn model() -> Decoder {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/llama/biases-untied");
        let checkpoint = Checkpoint::open(&BaseSource::Folder(folder.into())).unwrap();
        Decoder::load(&checkpoint, Kind::Float, Device::Cpu, &|_, _| ()).unwrap()
    }

    #[test]
    fn a_model_does_not_drift_from_itself_and_a_changed_one_by_what_was_changed() {
        let prompts = [vec![3, 1, 4], vec![1, 5, 9, 2, 6]].map(|ids| Prompt { place: String::new(), ids });
        let probes = Probes { prompts: prompts.to_vec(), stop: vec![] };
        let (mut model, twin) = (model(), model());
        let replies = probes.ask(&model);
        let Drift { prompts, places, max_logit_difference, mean_logit_difference, .. } = Drift::of(&replies, &twin);
        assert_eq!((prompts, places), (2, 2 * (LONGEST + 1)));
        assert_eq!((max_logit_difference, mean_logit_difference), (0.0, 0.0));
        // A bias on the head moves every logit of its token by as much.
        let vocabulary = model.spec.vocab_size;
        let head = model.linears_mut().pop().unwrap();
        let bias = Tensor::zeros([vocabulary], (Kind::Float, Device::Cpu));
        let _ = bias.get(7).fill_(0.25);
        head.bias = Some(match &head.bias {
            Some(own) => own + &bias,
            None => bias,
        });
        let drift = Drift::of(&replies, &model);
        assert!((drift.max_logit_difference - 0.25).abs() < 1e-5, "{drift:?}");
        assert!((drift.mean_logit_difference - 0.25 / vocabulary as f64).abs() < 1e-6, "{drift:?}");
        // So large a one makes it the likeliest token everywhere.
        model.linears_mut().pop().unwrap().bias = Some({
            let bias = Tensor::zeros([vocabulary], (Kind::Float, Device::Cpu));
            let _ = bias.get(7).fill_(1e4);
            bias
        });
        let drift = Drift::of(&replies, &model);
        let sevens = replies.iter().map(|reply| reply.logits.argmax(-1, false).eq(7).sum(Kind::Int64).int64_value(&[]));
        assert_eq!(drift.greedy_agreement, sevens.sum::<i64>() as f64 / drift.places as f64);
        assert_eq!(drift.same_answers, 0);
    }
}
