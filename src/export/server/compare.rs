//! A server's answer beside what both models said: by its tokens, and by the probabilities it tells.

use super::dialect::{Answer, Likely, Token};
use crate::evaluate::{Candidate, Ended, Finding, Place, Said, Tolerance};
use crate::export::probe::Asked;

/// Log-probabilities below this are a server's way to say that there is none.
const LEAST: f64 = -60.0;

/// What came of comparing one answer.
pub(super) struct Compared {
    pub finding: Finding,
    /// Distances of the log-probabilities, in spreads.
    pub from_trained: Option<f64>,
    pub from_base: Option<f64>,
    /// Whether it goes on where the trained model ends.
    pub goes_on: bool,
}

/// How far a server is on the way from the base to the trained model: the least squares over all tokens that all three name.
#[derive(Default)]
pub(super) struct Strength {
    along: f64,
    whole: f64,
}

impl Strength {
    /// `None` where nothing was told, or the two models say the same.
    pub fn value(&self) -> Option<f64> {
        (self.whole > 1e-6).then(|| self.along / self.whole)
    }
}

/// Compares.
pub(super) fn compare(asked: &Asked, answer: &Answer, tolerance: &Tolerance, strength: &mut Strength) -> Compared {
    let beside = |said: &Said| {
        let (follows, same_until) = follows(said, answer, tolerance);
        (follows, distance(said, answer, same_until))
    };
    let (trained, base) = (beside(&asked.trained), asked.base.as_ref().map_or((false, None), beside));
    let base_places = asked.base.as_ref().map_or(&[][..], |said| &said.places);
    if let (Some(first), Some(of_trained), Some(of_base)) =
        (answer.tokens.first(), asked.trained.places.first(), base_places.first())
    {
        for likely in first.top.iter().filter(|likely| likely.log_probability > LEAST) {
            let of = |place: &Place| named(place, likely).map(|candidate| place.log_probability(candidate));
            if let (Some(trained), Some(base)) = (of(of_trained), of(of_base)) {
                strength.along += (likely.log_probability - base) * (trained - base);
                strength.whole += (trained - base) * (trained - base);
            }
        }
    }
    // A handful of numbers scatters more than the hundreds that the tolerance's mean is of.
    let near = |distance: Option<f64>| distance.is_none_or(|distance| distance <= 2.0 * tolerance.mean);
    let mut may_be = [trained, base].map(|(follows, distance)| follows && near(distance));
    if let ([true, true], Some(from_trained), Some(from_base)) = (may_be, trained.1, base.1) {
        // Both are within what rounding explains: one that is much nearer is it.
        may_be = [from_trained <= 4.0 * from_base, from_base <= 4.0 * from_trained];
    }
    let said = &asked.trained;
    let goes_on = may_be[0]
        && said.ended == Ended::Stop
        && match answer.tokens.len() {
            0 => answer.text.trim().len() > said.text.trim().len(),
            count => count > said.ids.len() + 1,
        };
    Compared { finding: Finding::of(may_be[0], may_be[1]), from_trained: trained.1, from_base: base.1, goes_on }
}

/// Whether an answer may be the one that was said: token by token, or letter by letter, up to where another token is as likely as
/// the tolerance allows. Then how many tokens are the very same.
fn follows(said: &Said, answer: &Answer, tolerance: &Tolerance) -> (bool, usize) {
    if answer.tokens.is_empty() {
        return (follows_as_text(said, &answer.text, tolerance), 0);
    }
    for (index, id) in said.ids.iter().enumerate() {
        // It ended sooner: it was given less room, or stopped at what is no end here.
        let Some(token) = answer.tokens.get(index) else { return (index > 0, index) };
        let place = &said.places[index];
        let expected = place.top.iter().find(|candidate| candidate.id == *id);
        if !expected.is_some_and(|expected| is(token, expected)) {
            let instead = place.top.iter().find(|candidate| is(token, candidate));
            return (instead.is_some_and(|instead| place.gap(instead) <= place.most(tolerance)), index);
        }
    }
    (true, said.ids.len())
}

fn follows_as_text(said: &Said, text: &str, tolerance: &Tolerance) -> bool {
    // Tokenizers differ in whether they show the space before the first word, and servers in whether they cut it off.
    let (ours, theirs) = (said.text.trim(), text.trim());
    if ours.is_empty() || theirs.is_empty() {
        return ours.is_empty() && theirs.is_empty();
    }
    if theirs.starts_with(ours) || ours.starts_with(theirs) {
        return true;
    }
    let common: usize = ours.chars().zip(theirs.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
    let mut end = 0;
    let skipped = said.text.len() - said.text.trim_start().len();
    for (id, place) in said.ids.iter().zip(&said.places) {
        let Some(expected) = place.top.iter().find(|candidate| candidate.id == *id) else { return false };
        let begin = end;
        end += expected.token.len();
        if end.saturating_sub(skipped) > common {
            let rest = theirs.get(begin.saturating_sub(skipped).min(common)..).unwrap_or_default();
            let fits = |candidate: &&Candidate| {
                let word = if begin == 0 { candidate.token.trim_start() } else { candidate.token.as_str() };
                !word.is_empty() && rest.starts_with(word)
            };
            let instead = place.top.iter().filter(fits).find(|candidate| candidate.id != *id);
            return instead.is_some_and(|instead| place.gap(instead) <= place.most(tolerance));
        }
    }
    false
}

/// The root of the mean square of the differences of log-probabilities at the places that were reached by the very same tokens, in
/// spreads; `None` where the server told none.
fn distance(said: &Said, answer: &Answer, same_until: usize) -> Option<f64> {
    let (mut squares, mut count) = (0.0, 0u32);
    for (place, token) in said.places.iter().zip(&answer.tokens).take(same_until + 1) {
        for likely in token.top.iter().filter(|likely| likely.log_probability > LEAST) {
            // A token that is not among the likeliest here is at most as likely as the last of them.
            let (apart, tells) = match (named(place, likely), place.top.last()) {
                (Some(candidate), _) => (likely.log_probability - place.log_probability(candidate), true),
                (None, Some(last)) => {
                    let above = likely.log_probability - place.log_probability(last);
                    (above, above > 0.0)
                }
                (None, None) => (0.0, false),
            };
            if tells {
                squares += (apart / place.spread).powi(2);
                count += 1;
            }
        }
    }
    (count > 0).then(|| (squares / f64::from(count)).sqrt())
}

fn is(token: &Token, candidate: &Candidate) -> bool {
    same(token.id, &token.text, candidate)
}

/// The candidate of just that text before one that differs by spaces.
fn named<'a>(place: &'a Place, likely: &Likely) -> Option<&'a Candidate> {
    let exactly = place.top.iter().find(|candidate| likely.id.is_none() && likely.text == candidate.token);
    exactly.or_else(|| place.top.iter().find(|candidate| same(likely.id, &likely.text, candidate)))
}

/// By the id where it is told, else by the text, which some servers show without the space before it.
fn same(id: Option<u32>, text: &str, candidate: &Candidate) -> bool {
    match id {
        Some(id) => id == candidate.id,
        None => text == candidate.token || (!text.trim().is_empty() && text.trim() == candidate.token.trim()),
    }
}
